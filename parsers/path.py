"""A request's path as rules see it (RFC 3986 sections 6.2.2 and 5.2.4).

For the decision only: the bytes go on unchanged. What servers are known to read in different ways is rejected, or,
where each way gives a path, given in all of them: an allow rule has to match every one, a deny rule any.
"""

from __future__ import annotations

import re

from parsers.errors import HttpAmbiguous

_PLAIN = re.compile(r"/(?:[A-Za-z0-9_~-][A-Za-z0-9_.~-]*(?:/|\Z))*\Z")  # nothing to normalise, no dot segment
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})?")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_REFUSED = {0x2F: "an encoded slash", 0x5C: "an encoded backslash", 0x25: "a double encoding"}


def normalise(raw: str | bytes) -> str:
    """The path without its query: escapes decoded once, dot segments resolved, slashes collapsed.

    Raises HttpAmbiguous for an encoded slash or percent sign, a backslash, control characters, escapes that are no
    UTF-8, a broken escape, a fragment, a dot segment that leaves the root or hides behind a parameter.
    """
    return readings(raw)[0]


def readings(raw: str | bytes) -> tuple[str, ...]:
    """The path as `normalise` has it, then what else servers make of it; most paths have one reading alone.

    Some route by the path as it came, some resolve dot segments and leave double slashes, and some take what
    stands behind two slashes at the beginning for a host (RFC 3986 section 4.2). Raises as `normalise` does.
    """
    text = raw.decode("latin-1") if isinstance(raw, bytes) else raw
    path = text.partition("?")[0]
    if _PLAIN.match(path):
        return (path,)
    if not path.startswith("/"):
        raise HttpAmbiguous("a path that does not begin with a slash")
    for character in "\\#":
        if character in path:
            raise HttpAmbiguous(f"{character!r} in the path")
    found = _resolutions(_decode(path))
    if path.startswith("//"):
        rest = "/" + path[2:].partition("/")[2]
        if rest.startswith("//"):
            raise HttpAmbiguous("a path whose host, if it has one, nobody can tell")
        found += _resolutions(_decode(rest))
    return tuple(dict.fromkeys(found))


def _decode(path: str) -> str:
    """Escapes to characters; what is reserved stays escaped, in capitals, so that `%3F` is not `?`."""

    def one(match: re.Match[str]) -> str:
        if match[1] is None:
            raise HttpAmbiguous("a broken percent escape")
        number = int(match[1], 16)
        if number in _REFUSED:
            raise HttpAmbiguous(f"{_REFUSED[number]} in the path")
        if number < 0x20 or number == 0x7F:
            raise HttpAmbiguous("a control character in the path")
        character = chr(number)
        return character if number >= 0x80 or character in _UNRESERVED else f"%{match[1].upper()}"

    decoded = _ESCAPE.sub(one, path)
    if any(character < "!" or character == "\x7f" for character in decoded):
        raise HttpAmbiguous("a control character or a space in the path")
    try:
        return decoded.encode("latin-1").decode("utf-8")
    except UnicodeError:
        raise HttpAmbiguous("a path that is no UTF-8") from None


def _resolutions(path: str) -> tuple[str, ...]:
    return _resolve(path), path, _without_dots(path)


def _resolve(path: str) -> str:
    kept: list[str] = []
    segments = path.split("/")[1:]
    last = segments[-1]
    for segment in segments:
        bare = segment.partition(";")[0]
        if bare in (".", "..") and bare != segment:
            raise HttpAmbiguous("a dot segment with a parameter")
        if segment == "..":
            if not kept:
                raise HttpAmbiguous("a path that leaves the root")
            kept.pop()
        elif segment not in ("", "."):
            kept.append(segment)
    return "/" + "/".join(kept) + ("/" if kept and last in ("", ".", "..") else "")


def _without_dots(path: str) -> str:
    """RFC 3986 section 5.2.4 to the letter: an empty segment is a segment."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    return "/" + "/".join(kept) + ("/" if kept and segments[-1] in (".", "..") else "")
