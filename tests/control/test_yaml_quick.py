"""The quick reader reads what the careful one reads, or gives up: on text of all kinds, and on odd policies."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isolator.control import yaml_source
from isolator.control.yaml_quick import read_values
from isolator.control.yaml_source import DEPTH_MAX, parse_carefully, parse_documents, scalar

PARTS = [
    *"ab1:-,[]{}#'\"\\ \n?!&*|>%@`~_+=<.", "kind", "true", "yes", "off", "null", "08", "0o7", "0x1f", "1_0", "1.5",
    "1e3", ".inf", "10.0.0.0/8", "fd00::/8", "::1", "/a/{id}", "/**", "2026-01-01", "1:30", "a: b", "a #b", "a:\n",
    "\"\\n\"", "''", "x'y", "é", "<<", "--- ", "---", "...", "&a", "*a", "!x", "http://x:80/", "\n  ", "\n- ",
    "\n  - ", "\"a\"", "'a'", "\"a\":1", "\t", "\r\n", "12345678901234567890123",
]  # fmt: skip
POLICY = """\
kind: Policy
metadata: {name: 'a', of: "b c"}
spec:
  select: {app: shop}
  ingress:
    - name: read  # who reads
      from: [{cidr: 10.0.0.0/8}, {select: {}}]
      ports: [{port: 80, protocol: tcp}]
      http:
      - {methods: [GET], path: /a/*, headers: {x: true}}
      - path: 'regex:/b\\d+'
"""


def quick(text: str, nodes_max: int = 1000) -> list[Any] | None:
    return read_values(text, nodes_max, DEPTH_MAX, scalar)


def exact(value: Any) -> Any:
    """With the types and the order of keys, and a nan that equals itself."""
    if isinstance(value, dict):
        return [(key, exact(each)) for key, each in value.items()]
    if isinstance(value, list):
        return list, [exact(each) for each in value]
    return type(value), repr(value)


def agree(text: str) -> None:
    values = quick(text)
    if values:
        documents, problems = parse_carefully(text, "f", 1000)
        assert not problems
        assert exact([document.value for document in documents]) == exact(values)


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=14).map("".join))
@example('["a":1GET]')
def test_any_text(text: str) -> None:
    agree(text)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_policy_with_something_put_in_and_something_left_out(data: st.DataObject) -> None:
    text = POLICY
    for _ in range(data.draw(st.integers(1, 3))):
        at, left_out = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 4))
        text = text[:at] + data.draw(st.sampled_from([*PARTS, ""])) + text[at + left_out :]
    agree(text)


@pytest.mark.parametrize(
    "text, value",
    [
        ("a: yes", {"a": "yes"}),
        ("a: off", {"a": "off"}),
        ("a: 080", {"a": 80}),
        ("a: 0o17", {"a": 15}),
        ("a: 1:30", {"a": "1:30"}),
        ("a: true", {"a": True}),
        ("a: 'true'", {"a": "true"}),
        ("yes: no", {"yes": "no"}),
        ("- 80\n- 70000\n- '80'", [80, 70000, "80"]),
        ('a: "b\\\\c"', {"a": "b\\c"}),
        ("a: é", {"a": "é"}),
    ],
)
def test_what_plain_values_mean(text: str, value: Any) -> None:
    assert exact(quick(text)) == exact([value])
    agree(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2", "a:", "a: ~", "<<: {a: 1}", "a: &x 1", "a: !!str 1", "%YAML 1.1\n--- {a: yes}", "a: |\n  b",
        "a: b\n  c", 'a: "\\x41"', "a: 'b\n  c'", "[1]: 2", "a\tb: 1", "a: b\r\n", "a: [", "a: =", "", "# nothing",
        "[" * 70 + "]" * 70,
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_the_careful_reader(text: str) -> None:
    assert not quick(text)


def test_too_many_values_are_left_to_the_careful_reader() -> None:
    assert quick("[1, 2, 3]", 4) == [[1, 2, 3]]
    assert quick("[1, 2, 3]", 3) is None


def test_places_are_those_of_the_careful_reader_and_only_read_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "a: 1\nb:\n  - c: 2\n---\nd: 3\n"
    read: list[str] = []

    def counting(*arguments: Any) -> Any:
        read.append("")
        return parse_carefully(*arguments)

    monkeypatch.setattr(yaml_source, "parse_carefully", counting)
    (first, second), problems = parse_documents(text.encode(), "f")
    assert (first.value, second.value, problems, read) == ({"a": 1, "b": [{"c": 2}]}, {"d": 3}, [], [])
    assert str(first.problem(("b", 0, "c"), "wrong")) == "f:3:8: wrong"
    assert str(first.problem(("b",), "wrong", at_key=True)) == "f:2:1: wrong"
    assert second.line(("d",)) == 5 and len(read) == 1
