"""Path, host and header patterns: the words in which an HTTP rule names requests.

A path pattern is compared with the request's path as a server would understand it: `parsers.path` has
resolved dot segments and double slashes and refused what is ambiguous, and the percent-escapes that are left
(`%2B`, `%C3%A9`) are decoded here. So a pattern is written as people read it (`/a b`, `/é`), and an escape
evades no rule.

    /orders/{id}    literal segments; `{id}` and `*` stand for one segment that is not empty
    /api/v1/**      whatever follows, also nothing: /api/v1, /api/v1/, /api/v1/x/y
    regex:/v[0-9]+  the whole path, in the language of isolator.core.regex

Some servers cut path parameters (`/admin;v=1` is `/admin` to Tomcat), others do not: an allow rule has to
match both readings, a deny rule one. Paths are case-sensitive, and a slash at the end counts: `/admin` is not
`/admin/`; `/admin/**` is both. The query is not part of the path.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from isolator.core.regex import Regex, RegexError

PATTERN_MAX = 1024
"""Characters of a pattern."""

REGEX = "regex:"
REST = "/**"
WILD = re.compile(r"[*{]")
NAMED = re.compile(r"\{[A-Za-z_][A-Za-z0-9_-]*\}")
PARAMETER = re.compile(";|%3B", re.IGNORECASE)
ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*|\[[0-9a-f:.]+\]")
HOST_MAX = 253  # RFC 1035 section 2.3.4, less the length octets


class PatternError(ValueError):
    """A pattern that cannot be meant; the text says what to write instead."""


class PathPattern:
    """A path pattern, compiled. Raises PatternError. Patterns with the same text are equal."""

    __slots__ = ("_glob", "_prefix", "_regex", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self._regex: Regex | None = None
        self._glob: re.Pattern[str] | None = None
        self._prefix: str | None = None
        if len(source) > PATTERN_MAX:
            raise PatternError(f"a pattern has at most {PATTERN_MAX} characters")
        if source.startswith(REGEX):
            self._regex = path_regex(source[len(REGEX) :])
            return
        expression = glob_expression(source)
        if not WILD.search(
            source.removesuffix(REST)
        ):  # most are plain text, and an expression takes long to make
            self._prefix = source.removesuffix(REST) if source.endswith(REST) else None
        else:
            self._glob = re.compile(expression, re.DOTALL)

    def matches(self, path: str) -> bool:
        """`path`: normalised, without the query."""
        if "%" in path:
            path = unquote(path)
        if self._regex is not None:
            return self._regex.matches(path)
        if self._glob is not None:
            return self._glob.fullmatch(path) is not None
        if self._prefix is not None:
            return path.startswith(self._prefix) and path[len(self._prefix) :][:1] in ("", "/")
        return path == self.source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PathPattern) and other.source == self.source

    def __hash__(self) -> int:
        return hash(self.source)

    def __repr__(self) -> str:
        return f"PathPattern({self.source!r})"


def without_parameters(path: str) -> str | None:
    """The path as servers read it that cut parameters off; None if dot segments are left."""
    if not PARAMETER.search(path):
        return path
    *segments, last = [PARAMETER.split(segment, maxsplit=1)[0] for segment in path.split("/")[1:]]
    if any(segment in (".", "..") for segment in (*segments, last)):
        return None
    return "/" + "/".join([*filter(None, segments), last])


def path_regex(source: str) -> Regex:
    try:
        regex = Regex(source)
    except RegexError as error:
        raise PatternError(f"bad regular expression: {error}") from error
    if not regex.may_begin("/"):
        raise PatternError("it can never match: a path begins with '/'")
    return regex


def glob_expression(source: str) -> str:
    """For Python's `re`, and for isolator.core.regex. Segments exclude '/': nothing is ever tried twice."""
    if not source.startswith("/"):
        raise PatternError(f"a path begins with '/': write /{source} or {REGEX}…")
    *segments, last = source[1:].split("/")
    expression = "".join("/" + segment_expression(segment, source) for segment in segments)
    if last == "**":
        return expression + "(?:/.*)?"
    return expression + "/" + (segment_expression(last, source) if last else "")


def segment_expression(segment: str, source: str) -> str:
    if segment == "*" or NAMED.fullmatch(segment):
        return "[^/]+"
    if segment == "**":
        raise PatternError("'**' stands for all the rest, so it comes last; one segment is '*'")
    if segment in ("", ".", ".."):
        raise PatternError("paths are compared without '//', '.' and '..': remove them from the pattern")
    if any(sign in segment for sign in "*{}"):
        raise PatternError(f"'*' and '{{name}}' stand for a whole segment: for a part of one write {REGEX}…")
    if any(sign in segment for sign in "?#\\") or not segment.isprintable():
        raise PatternError(
            "a path holds no '?', '#', backslash or control character; queries are not matched"
        )
    if ESCAPE.search(segment):
        raise PatternError(f"write the character itself: {unquote(source)!r} matches its escaped form too")
    return re.escape(segment)


class HostPattern:
    """`api.local` exactly, or `*.local`: any name below it, but not itself. Case and port do not count."""

    __slots__ = ("_suffix", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self._suffix = source[1:] if source.startswith("*.") else ""
        name = source[2:] if self._suffix else source
        if name != name.lower():
            raise PatternError(f"host names are compared in lower case: write {source.lower()}")
        if len(name) > HOST_MAX or not HOST.fullmatch(name):
            raise PatternError("a host is a name or address without port, or '*.' and a name")

    def matches(self, host: str) -> bool:
        """`host`: lower case, without the port. The root's dot (`api.local.`) names the same host."""
        name = host.removesuffix(".")
        return name.endswith(self._suffix) and name != self._suffix if self._suffix else name == self.source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostPattern) and other.source == self.source

    def __hash__(self) -> int:
        return hash(self.source)

    def __repr__(self) -> str:
        return f"HostPattern({self.source!r})"
