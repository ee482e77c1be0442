"""The linear-time regular expressions: the same language as Python's, without its worst case."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.core.regex import MOVES_MAX, Regex, RegexError

MATCHES = [
    ("/v[0-9]+/x", "/v12/x", True),
    ("/v[0-9]+/x", "/v/x", False),
    ("/v[0-9]+/x", "/v12/x/", False),
    ("^/a$", "/a", True),
    ("/(a|bc)*", "/abcabc", True),
    ("/(?:a|bc)*", "/ab", False),
    (r"/\d{2,3}", "/1", False),
    (r"/\d{2,3}", "/123", True),
    (r"/\d{2,}", "/123456", True),
    (r"/\d{2}", "/123", False),
    (r"/[^/]*\.php", "/index.php", True),
    (r"/[^/]*\.php", "/a/index.php", False),
    (r"/[\w-]+", "/a-b_c", True),
    (r"/[a\]-]+", "/]a-", True),
    (r"/\D", "/5", False),
    ("/a?b", "/b", True),
    ("/.*", "/é\n", True),
    ("/(a*)*b", "/" + "a" * 4000, False),
    ("/(a|a)*b", "/" + "a" * 4000, False),
    ("/.*.*.*.*=.*", "/" + "x" * 4000, False),
    ("/|", "", True),
]


@pytest.mark.parametrize(("pattern", "text", "expected"), MATCHES)
def test_matches(pattern: str, text: str, expected: bool) -> None:
    assert Regex(pattern).matches(text) is expected


ERRORS = [
    ("/(a", "'(' without ')'"),
    ("/a)", "')' without '('"),
    ("/[a", "ends too early"),
    ("/[]", "empty set"),
    ("/[z-a]", "later one"),
    ("*", "nothing to repeat"),
    ("/a**", "lazy or possessive"),
    ("/a+?", "lazy or possessive"),
    ("/a{3", "comes {m}"),
    ("/a{,3}", "comes {m}"),
    ("/a{\u0663}", "comes {m}"),
    ("/a{3,2}", "go up"),
    ("/a{999}", "go up"),
    ("/(?=a)", "look-around"),
    (r"/(a)\1", "not supported"),
    (r"/\bx", "not supported"),
    ("/a^b", "belongs to the ends"),
    ("/a\\", "too early"),
    ("/((a{64}){64}){64}", "too large"),
    ("/" + "(" * 40 + ")" * 40, "inside each other"),
]


@pytest.mark.parametrize(("pattern", "message"), ERRORS)
def test_errors(pattern: str, message: str) -> None:
    with pytest.raises(RegexError, match=re.escape(message)):
        Regex(pattern)


def patterns() -> st.SearchStrategy[str]:
    atom = st.sampled_from(["a", "b", "/", ".", "[ab]", "[^a]", r"\w", r"\.", r"\d", "[a-b/]"])
    sign = st.sampled_from(["", "*", "+", "?", "{2}", "{1,2}", "{0,1}", "{1,}"])
    bounded = st.sampled_from(
        ["", "?", "{2}", "{1,2}"]
    )  # around groups `re` could take years with the others

    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        joined = st.lists(inner, min_size=1, max_size=3)
        return st.builds(lambda parts, s: f"({'|'.join(parts)}){s}", joined, bounded) | joined.map("".join)

    return st.recursive(st.builds(str.__add__, atom, sign), grown, max_leaves=6)


@settings(deadline=None)
@given(patterns(), st.text("ab/.1é", max_size=8))
def test_same_language_as_re(pattern: str, text: str) -> None:
    try:
        regex = Regex(pattern)
    except RegexError as error:
        assert "too large" in str(error)
        return
    assert regex.matches(text) is (re.fullmatch(pattern, text, re.ASCII | re.DOTALL) is not None)


def test_what_is_kept_is_bounded() -> None:
    regex = Regex("/.*a.{12}")
    for code in range(0x4E00, 0x4E00 + 3 * MOVES_MAX):
        assert regex.matches("/" + chr(code)) is False
    assert len(regex._moves) <= MOVES_MAX
    assert regex.matches("/xa" + "b" * 12)
