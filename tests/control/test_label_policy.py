"""Labels to policies: what they say, what is wrong with them and where, and that a mistake closes its container."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.control.config import PolicySource, load_policies
from isolator.control.label_policy import (
    LABEL_MAX,
    LABELS_MAX,
    PROBLEMS_MAX,
    label_policies,
    label_policy,
    own_labels,
)
from isolator.control.problems import errors_in
from isolator.core.explain import Question, explain
from isolator.core.model import Direction, DropReason, Endpoint, Verdict
from isolator.core.policy import (
    ICMP,
    TCP,
    UDP,
    Action,
    Covering,
    DenyWith,
    Failure,
    Mode,
    Policy,
    Rule,
    weigh,
)

NAME = {"name": "api", "image": "nginx:1", "app": "shop"}
ALLOW, DENY, EGRESS = "isolator.allow.ingress", "isolator.deny.ingress", "isolator.allow.egress"
READ = """\
- from: [{select: {app: shop}}]
  ports: [{port: 80}]
  http: [{methods: [GET], path: /api/v1/**}]
"""
AT = "container api, label "


def source_of(**labels: str) -> PolicySource:
    """`allow_ingress="..."` is the label `isolator.allow.ingress`; `isolator.deny_with` has to be spelt."""
    source = label_policy(
        {**NAME, **{f"isolator.{key.replace('_', '.')}": value for key, value in labels.items()}}
    )
    assert source is not None
    return source


def told(source: PolicySource) -> list[str]:
    return [str(problem) for problem in source.problems]


def is_closed(source: PolicySource) -> bool:
    """To everybody, in both directions, on every protocol, whatever other policies allow."""
    free = Policy("free", ingress=(Rule("all"),), egress=(Rule("all"),))
    for direction in Direction:
        rules = [
            Covering(policy, rule)
            for policy in (free, source.policy)
            for rule in policy.rules(direction) or ()
        ]
        for protocol in (0, TCP, UDP, ICMP):
            covering = [
                each for each in rules if each.rule.matches_port(protocol, 0) and each.rule.peers is None
            ]
            if weigh([free, source.policy], covering).flow.verdict is not Verdict.DROP:
                return False
    return source.policy.selects(dict(source.policy.select), Direction.INGRESS)


# -- what is right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels", [{}, {"isolator.exclude": "false"}, {"isolator.exclude": "TRUE"}, {"isolators": "x"}]
)
def test_labels_that_ask_for_no_policy(labels: dict[str, str]) -> None:
    assert label_policy({**NAME, **labels}) is None


def test_the_policy_of_a_label_is_that_of_a_file(tmp_path: Path) -> None:
    """The rules differ by their names, which tell the label."""
    rules = READ.replace("\n", "\n    ")
    (tmp_path / "p.yaml").write_text(
        f"kind: Policy\nmetadata: {{name: p}}\nspec:\n  select: {{name: api}}\n  ingress:\n    {rules}\n"
    )
    filed, source = load_policies([tmp_path / "p.yaml"]), source_of(allow_ingress=READ)
    ((rule,),) = [policy.ingress or () for policy in filed]
    assert source.policy.ingress == (replace(rule, name="allow.ingress[0]"),)
    assert source.policy.egress is None and source.problems == ()
    assert (source.policy.name, source.file) == ("label:api", "container api, label isolator.allow.ingress")


def test_all_of_them() -> None:
    source = label_policy({
        **NAME, "isolator.mode": "monitor", "isolator.failure": "open", "isolator.deny_with": "reset",
        ALLOW: "[{name: web, ports: [{port: 80}]}]", DENY: "[{from: [{world: true}]}]", EGRESS: "[]",
    })  # fmt: skip
    assert source is not None and source.problems == ()
    policy = source.policy
    assert (policy.mode, policy.failure, policy.deny_with) == (Mode.MONITOR, Failure.OPEN, DenyWith.RESET)
    assert [(rule.name, rule.action) for rule in policy.ingress or ()] == [
        ("web", Action.ALLOW), ("deny.ingress[0]", Action.DENY),
    ]  # fmt: skip
    assert policy.egress == ()
    assert source.document["spec"] == {
        "select": {"name": "api"}, "mode": "monitor", "failure": "open", "deny_with": "reset", "egress": [],
        "ingress": [{"name": "web", "ports": [{"port": 80}], "action": "allow"},
                    {"from": [{"world": True}], "action": "deny"}],
    }  # fmt: skip


def test_it_selects_every_network_of_its_container_and_nobody_else() -> None:
    policy = source_of(allow_ingress="[]").policy
    own = {**NAME, ALLOW: "[]"}
    assert policy.selects({**own, "network": "back"}, Direction.INGRESS)
    assert not policy.selects({**own, "name": "other"}, Direction.INGRESS)
    assert not policy.selects({**NAME, ALLOW: READ}, Direction.INGRESS), "the next container of this name"
    assert not policy.selects(own, Direction.EGRESS)


def test_a_warning_closes_nothing() -> None:
    source = source_of(allow_ingress="- from: []\n")
    assert told(source)[0].startswith(f"{AT}{ALLOW}:1:3: warning: an empty list matches nobody")
    assert not is_closed(source)


# -- what is wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "value", "expected"), [
    ("isolator.mode", "protct", ":1:1: 'isolator.mode' cannot be 'protct': did you mean protect? It is one of"),
    ("isolator.failure", "", ":1:1: 'isolator.failure' cannot be '': write one of closed, open"),
    ("isolator.deny_with", "DROP", ":1:1: 'isolator.deny_with' cannot be 'DROP': did you mean drop? It is one of"),
    ("isolator.exclude", "yes", ":1:1: 'isolator.exclude' cannot be 'yes': write one of true, false"),
    ("isolator.mode", "protect", ":1:1: without rules these labels decide nothing: add isolator.allow.ingress (its"),
    ("isolator.alow.ingress", "[]", ":1:1: there is no such label: did you mean isolator.allow.ingress? Known: isol"),
    ("Isolator.Allow.Ingress", "[]", ":1:1: there is no such label: did you mean isolator.allow.ingress? Known: isol"),
    ("isolator.", "x", ":1:1: there is no such label"),
    ("isolator.untold", "nobody knows", ":1:1: nobody knows"),
    (ALLOW, "", ":1:1: an empty value: write a list of rules, or [] for none"),
    (ALLOW, "# none", ":1:1: nothing in it"),
    (ALLOW, "everybody", ":1:1: the document is a list, not the text 'everybody': write [...]"),
    (ALLOW, "- ports: [80]\n", ":1:11: 'ports[0]' is a mapping, not the number 80"),
    (ALLOW, "- ports: [{port: 80}]\n  form: []\n", ":2:3: unknown key 'form' in the document: did you mean 'from'?"),
    (EGRESS, "- from: []\n", ":1:3: unknown key 'from' in the document: did you mean 'to'?"),
    (ALLOW, "- ports: [{port: 80}]\n  action: allow\n", ":2:3: the label's name says what becomes of it"),
    (ALLOW, "- http: []\n", ":1:3: an empty list matches no request"),
    (ALLOW, "- from: [{select: {}, world: true}]\n", ":1:10: a peer is one of select, cidr, world"),
    (ALLOW, "- {name: a}\n- {name: a}\n", ":2:10: ingress[0] is named 'a' already"),
    (ALLOW, "- from: [\n", ":2:1: this is not YAML"),
    (ALLOW, "[]\n---\n[]\n", ":3:1: a second document: remove '---'"),
    (ALLOW, "- &a [*a]\n", ":1:3: too deep or too large"),
    (ALLOW, "- &a {from: [{world: true}]}\n" + "- *a\n" * 600, ":1:22: too deep or too large"),
    (ALLOW, "- ports: [" + ", ".join(f"{{port: {port}}}" for port in range(1, 67)) + "]", ":1:1: 66 ports, of 64"),
    (ALLOW, "- from: [" + ", ".join(f"{{cidr: 10.{at}.0.0/16}}" for at in range(65)) + "]", ":1:1: 65 networks, of 64"),
    (ALLOW, "- ports: [" + ", ".join(f"{{port: {port}}}" for port in range(1, 18)) + "]\n  from: ["
     + ", ".join(f"{{cidr: 10.{at}.0.0/16}}" for at in range(16)) + "]", ":1:1: 272 combinations of port and peer, of"),
    (ALLOW, "[] #" + "x" * LABEL_MAX, ":1:1: larger than 8192 bytes: put this policy into a file"),
    (ALLOW, "- \ud800\n", ":1:3: this is not UTF-8"),
    (ALLOW, "- !!float abc\n", ":1:3: "),
])  # fmt: skip
def test_a_mistake_closes_its_container_and_is_told_at_its_place(
    label: str, value: str, expected: str
) -> None:
    source = label_policy({**NAME, label: value})
    assert source is not None and is_closed(source)
    assert told(source)[0].startswith(f"{AT}{label}{expected}")
    assert source.policy.mode is Mode.PROTECT and source.policy.name == "label:api"
    assert source.document["spec"]["ingress"] == [{"name": "wrong-labels", "action": "deny"}]


def test_one_wrong_label_is_enough() -> None:
    labels = {"mode": "monitor", "allow_ingress": READ}
    assert not is_closed(source_of(**labels))
    assert is_closed(source_of(**labels, deny_egress="x"))
    assert is_closed(source_of(**labels, mod="protect"))


def test_every_mistake_is_told_at_once() -> None:
    assert told(source_of(mode="x", allow_ingress="- form: []\n  ports: []\n"))[0:3] == [
        f"{AT}{ALLOW}:1:3: unknown key 'form' in the document: did you mean 'from'? Known here: "
        "action, from, http, name, ports",
        f"{AT}{ALLOW}:2:3: an empty list matches no port: name ports, or remove 'ports' for every port",
        f"{AT}isolator.mode:1:1: 'isolator.mode' cannot be 'x': write one of protect, monitor",
    ]  # fmt: skip
    assert len(told(source_of(allow_ingress="[" + "1, " * 100 + "]"))) == PROBLEMS_MAX


def test_of_many_labels_their_number_is_told_and_none_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isolator.control.label_policy.read_label", None)
    source = source_of(**{f"allow.ingres{at}": READ for at in range(LABELS_MAX + 1)})
    (line,) = told(source)
    assert line.startswith(
        "container api, labels isolator.*:1:1: 17 labels, of 16: known are isolator.mode, "
    )
    assert is_closed(source)


def test_a_long_label_is_told_by_its_beginning() -> None:
    (line,) = told(source_of(**{"a" * 100_000: READ}))
    assert line.startswith(f"container api, label isolator.{'a' * 31}…:1:1: there is no such label")
    assert len(line) < 400


def test_two_labels_with_one_rules_name() -> None:
    source = source_of(allow_ingress="[{name: a}]", deny_egress="[{name: a}]")
    assert "two rules are named 'a'" in told(source)[0] and is_closed(source)


def test_a_container_that_is_closed_is_explained() -> None:
    """Whatever a file allows."""
    labels = {**NAME, "isolator.mode": "protct"}
    source = label_policy(labels)
    assert source is not None
    free = Policy("free", ingress=(Rule("all"),), egress=(Rule("all"),))
    endpoints = {1: Endpoint("api", labels), 2: Endpoint("web", {"name": "web"})}
    addresses = {1: (ip_address("10.0.0.1"),), 2: (ip_address("10.0.0.2"),)}
    for question in (Question("web", "api", 80), Question("api", "web", 80), Question("world", "api", 80)):
        decision = explain([free, source.policy], endpoints, addresses, question).decision
        assert (decision.verdict, decision.reason) == (Verdict.DROP, DropReason.POLICY_DENY)
        assert str(decision.rule) == "label:api/wrong-labels"


# -- whatever the labels hold --------------------------------------------------------------------------------

words = st.sampled_from([
    "from", "to", "select", "cidr", "except", "world", "ports", "port", "protocol", "http", "methods", "path",
    "hosts", "headers", "name", "action", "GET", "/api/**", "10.0.0.0/8", "tcp", "&a", "*a", "!!float", "%YAML 1.1",
])  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | words
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=12,
)
pieces = st.lists(
    words | st.sampled_from([": ", "- ", "\n", "  ", "{", "}", "[", "]", ", ", "'", "---\n"]), max_size=12
)
texts = (
    st.text(max_size=60)
    | values.map(json.dumps)
    | pieces.map("".join)
    | st.builds(
        lambda at, noise: READ[:at] + noise + READ[at:], st.integers(0, len(READ)), st.text(max_size=8)
    )
)
own_keys = st.sampled_from([ALLOW, DENY, EGRESS, "isolator.deny.egress", "isolator.mode", "isolator.exclude"])
labels = st.dictionaries(
    own_keys | st.text(max_size=8).map("isolator.".__add__), texts, min_size=1, max_size=3
)


@settings(deadline=None, max_examples=300)
@given(labels)
def test_any_text_ends_in_a_policy_or_closes_the_container(given: dict[str, str]) -> None:
    source = label_policy({**NAME, **given})
    if source is None:
        assert set(given) == {"isolator.exclude"}
        return
    assert is_closed(source) or not errors_in(source.problems)
    assert not any("cannot be read: " in line for line in told(source)), "nothing but problems, no exceptions"
    assert source.policy.ingress is not None or source.policy.egress is not None


# -- many containers -----------------------------------------------------------------------------------------


def test_what_was_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [
        Endpoint("api", {**NAME, ALLOW: READ}),
        Endpoint("api@back", {**NAME, ALLOW: READ, "network": "back"}),
    ]
    known = label_policies([*first, Endpoint("web", {"name": "web"})], {})
    assert list(known) == [own_labels(first[0].labels)]
    monkeypatch.setattr("isolator.control.label_policy.label_policy", None)
    assert label_policies(first, known) == known
    assert label_policies([], known) == {}


def test_two_containers_with_one_label_have_a_policy_each() -> None:
    found = label_policies([Endpoint(name, {"name": name, ALLOW: "x"}) for name in ("a", "b")], {})
    assert [source.policy.name for source in found.values()] == ["label:a", "label:b"]
