"""Paths as rules see them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsers.errors import HttpAmbiguous
from parsers.path import normalise, readings


@pytest.mark.parametrize(("raw", "path"), [
    ("/", "/"), ("/a/b", "/a/b"), ("/a/", "/a/"), ("/a///b", "/a/b"), ("/a/./b/.", "/a/b/"), ("/a/../b", "/b"),
    ("/%61%2D%7e", "/a-~"), ("/a/%2e%2e/b", "/b"), ("/a?x=/../", "/a"), ("/caf%C3%A9", "/café"),
    ("/a;v=1/b", "/a;v=1/b"),
    ("/a%3Fb", "/a%3Fb"), ("/a%3fb", "/a%3Fb"),
])  # fmt: skip
def test_normalised(raw: str, path: str) -> None:
    assert normalise(raw) == path


@pytest.mark.parametrize(("raw", "others"), [
    ("/a/b", ()), ("/a/%62?x=//", ()), ("/a//b", ("/a//b",)), ("/a/./b", ("/a/./b",)),
    ("/a/../b", ("/a/../b",)),  # as it came, to those that route by prefix
    ("/admin//../public/x", ("/admin//../public/x", "/admin/public/x")),  # RFC 3986 section 5.2.4 to the letter
    ("//public/admin/x", ("//public/admin/x", "/admin/x")),  # `public` taken for a host
    ("//h/a/../b", ("//h/a/../b", "//h/b", "/b", "/a/../b")),
])  # fmt: skip
def test_what_else_it_may_be_read_as(raw: str, others: tuple[str, ...]) -> None:
    assert set(readings(raw)[1:]) == set(others) - {readings(raw)[0]}


@pytest.mark.parametrize("raw", [
    "", "a", "/..", "/a/../../b", "/%2e%2e/a", "/a%2fb", "/a%2Fb", "/a%5cb", "/a\\b", "/%00", "/%0a", "/%7f", "/%252e",
    "/%2", "/%zz", "/%", "/%ff", "/%c0%ae", "/a/..;/b", "/a/.;x", "/a#b", "/a b", "//a//b",
    "/" * 15000, "//a" * 5000,
])  # fmt: skip
def test_refused(raw: str) -> None:
    with pytest.raises(HttpAmbiguous):
        normalise(raw)


@given(st.text(alphabet="/.%2eEfFaA5c;?~-", max_size=30).map("/".__add__))
def test_twice_is_once(raw: str) -> None:
    try:
        path = normalise(raw)
    except HttpAmbiguous:
        return
    assert normalise(path) == path
    assert "/../" not in path + "/" and "/./" not in path + "/" and "//" not in path
