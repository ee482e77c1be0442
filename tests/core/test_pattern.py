"""Path and host patterns: what they match, and what they cannot be."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.core.pattern import (
    HostPattern,
    PathPattern,
    PatternError,
    glob_expression,
    without_parameters,
)

PATHS = [
    ("/", "/", True),
    ("/", "/a", False),
    ("/a", "/a", True),
    ("/a", "/a/", False),
    ("/a", "/A", False),
    ("/a/", "/a/", True),
    ("/a/", "/a", False),
    ("/orders/{id}", "/orders/7", True),
    ("/orders/{id}", "/orders/", False),
    ("/orders/{id}", "/orders/7/x", False),
    ("/orders/*/items", "/orders/7/items", True),
    ("/orders/*/items", "/orders//items", False),
    ("/api/v1/**", "/api/v1", True),
    ("/api/v1/**", "/api/v1/", True),
    ("/api/v1/**", "/api/v1/a/b/c", True),
    ("/api/v1/**", "/api/v10", False),
    ("/**", "/", True),
    ("/**", "/a/b", True),
    ("/**", "*", False),  # OPTIONS * has no path
    ("/a.b", "/axb", False),
    ("/a+b", "/a%2Bb", True),
    ("/a+b", "/a+b", True),
    ("/a b", "/a%20b", True),
    ("/é", "/%C3%A9", True),
    ("/100%", "/100%25", True),
    ("regex:/v[0-9]+/x", "/v12/x", True),
    ("regex:/v[0-9]+", "/v12/x", False),
    ("regex:.*[.]php", "/a/b.php", True),
    ("regex:/a[+]b", "/a%2Bb", True),
]


@pytest.mark.parametrize(("pattern", "path", "expected"), PATHS)
def test_paths(pattern: str, path: str, expected: bool) -> None:
    assert PathPattern(pattern).matches(path) is expected


SEGMENTS = st.sampled_from(["a", "b", "a.b", "é", "%41", "\n", ""])


@given(
    st.lists(st.sampled_from(["a", "b", "a.b", "é", "*", "{id}"]), max_size=3),
    st.sampled_from(["", "/", "/**"]),
    st.lists(SEGMENTS, max_size=4),
)
def test_plain_patterns_match_what_their_expression_does(
    segments: list[str], end: str, path: list[str]
) -> None:
    pattern, there = "".join(f"/{each}" for each in segments) + end or "/", "/".join(["", *path])
    expression = re.compile(glob_expression(pattern), re.DOTALL)
    assert PathPattern(pattern).matches(there) is (expression.fullmatch(unquote(there)) is not None)


WRONG_PATHS = [
    ("api", "write /api"),
    ("", "begins with '/'"),
    ("**", "write /**"),
    ("/a/**/b", "comes last"),
    ("/a*", "whole segment"),
    ("/{id}.json", "whole segment"),
    ("/{}", "whole segment"),
    ("/a//b", "remove them"),
    ("/a/../b", "remove them"),
    ("/./b", "remove them"),
    ("/a?x=1", "queries are not matched"),
    ("/a\\b", "backslash"),
    ("/a\x00", "control character"),
    ("/a%20b", "write the character itself"),
    ("regex:/(", "bad regular expression"),
    ("regex:v1", "never match"),
    ("/" + "a" * 2000, "at most"),
]


@pytest.mark.parametrize(("pattern", "message"), WRONG_PATHS)
def test_wrong_paths(pattern: str, message: str) -> None:
    with pytest.raises(PatternError) as raised:
        PathPattern(pattern)
    assert message in str(raised.value)


HOSTS = [
    ("api.local", "api.local", True),
    ("api.local", "api.local.", True),
    ("api.local", "xapi.local", False),
    ("*.local", "api.local", True),
    ("*.local", "a.b.local", True),
    ("*.local", "local", False),
    ("*.local", ".local", False),
    ("10.0.0.1", "10.0.0.1", True),
    ("[fd00::1]", "[fd00::1]", True),
]


@pytest.mark.parametrize(("pattern", "host", "expected"), HOSTS)
def test_hosts(pattern: str, host: str, expected: bool) -> None:
    assert HostPattern(pattern).matches(host) is expected


@pytest.mark.parametrize(
    "pattern", ["API.local", "a b", "api.local:80", "*", "*.", "a.*.b", "", "-a", "a" * 300]
)
def test_wrong_hosts(pattern: str) -> None:
    with pytest.raises(PatternError):
        HostPattern(pattern)


def test_equal_by_text() -> None:
    assert PathPattern("/a") == PathPattern("/a") != PathPattern("/b")
    assert len({PathPattern("regex:/a"), PathPattern("regex:/a"), HostPattern("a"), HostPattern("a")}) == 2


PARAMETERS = [
    ("/a", "/a"),
    ("/a;v=1/b;x", "/a/b"),
    ("/a%3Bx/b", "/a/b"),
    ("/a/;x/b", "/a/b"),
    ("/a/;x", "/a/"),
    ("/..%3Bx/b", None),
]


@pytest.mark.parametrize(("path", "cut"), PARAMETERS)
def test_without_parameters(path: str, cut: str | None) -> None:
    assert without_parameters(path) == cut
