"""HTTP/1.0 and 1.1, as an observer has to read them: strictly (RFC 9112), message by message, in pieces.

    HEAD ──no body──────────────────────────────▶ HEAD
      ├──content-length──▶ BODY ────────────────▶ HEAD
      ├──chunked──▶ CHUNK_SIZE ─▶ CHUNK_DATA ─▶ CHUNK_END ─▶ CHUNK_SIZE
      │                 └──size 0──▶ TRAILERS ──▶ HEAD
      └──(answers) until close, tunnel ─▶ OPAQUE

A piece is HEAD or FRAMING, complete and looked at, or OPAQUE, of known length, which may reach beyond the bytes
at hand. (mode, remaining) is a dissector's whole state between two pieces: it can be pinned and restored.

What is against the grammar raises HttpMalformed; what two servers would read differently, HttpAmbiguous.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from typing import NamedTuple

import httptools  # type: ignore[import-not-found,import-untyped,unused-ignore]

from parsers.checksum import Octets
from parsers.errors import DissectError, HttpAmbiguous, HttpMalformed, HttpTooLong, NotHttp
from parsers.path import readings

HEAD_MAX = 16384  # bytes of a head: twice what common servers take
HEADERS_MAX = 100  # fields of a head, as many as common servers take
CHUNK_LINE_MAX = 1024  # bytes of a chunk-size line with its extensions
TRAILERS_MAX = 8192  # bytes of a trailer section
LENGTH_DIGITS = 18  # of a Content-Length; 10^18 bytes fit into 64 bits
CHUNK_DIGITS = 15  # hexadecimal, of a chunk's size
OPAQUE_MAX = 1 << 30  # bytes of one OPAQUE piece: a pass window's bound (R8)

# RFC 9110 section 5.6.2: token = 1*tchar
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# RFC 9112 section 3: request-line = method SP request-target SP HTTP-version CRLF; the target: VCHAR alone
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([\x21-\x7e]+) HTTP/1\.([01])".encode())
# RFC 9112 section 4: status-line = HTTP-version SP status-code SP [ reason-phrase ]
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
# RFC 9112 section 5: field-name ":" OWS field-value OWS; RFC 9110 section 5.5: no control characters in a value
_FIELD = re.compile(rf"({_TOKEN}):([\t\x20-\x7e\x80-\xff]*)".encode())  # OWS is stripped: linear in any case
# RFC 9112 section 7.1: chunk-size [ chunk-ext ]; extensions are read over, if they are printable
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]+)(?:[\t ]*;[\t\x20-\x7e]*)?")
_BEGINNING = re.compile(rf"{_TOKEN}(?: |\Z)".encode())
_DIGITS = re.compile(r"[0-9]+")
# RFC 9110 section 7.2: Host = uri-host [ ":" port ], without user information
# without empty labels; a dot at the end is the root's
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_~-]+(?:\.[A-Za-z0-9_~-]+)*\.?)(?::([0-9]{1,5}))?")
_NO_TRAILER = frozenset({"content-length", "transfer-encoding", "host", "trailer", "connection"})
# Servers differ in whether these have a body (RFC 9110 section 9.3): for some, its bytes are the next request.
_BODILESS = frozenset({"GET", "HEAD", "CONNECT", "TRACE"})
# CGI and its heirs take `_` and `-` for the same (RFC 3875 section 4.1.18).
_FRAMING_LOOKALIKES = frozenset({"content_length", "transfer_encoding"})
_METHOD_MAX = 32


class Mode(IntEnum):
    """What the next byte belongs to."""

    HEAD = 0
    BODY = 1
    CHUNK_SIZE = 2
    CHUNK_DATA = 3
    CHUNK_END = 4
    TRAILERS = 5
    OPAQUE = 6


class PieceKind(Enum):
    HEAD = auto()
    FRAMING = auto()
    OPAQUE = auto()


Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A request's head. `path` is normalised for the decision, `readings` what else servers could make of it;
    `target` and `raw_path` stand as on the wire."""

    method: str
    target: str
    path: str
    readings: tuple[str, ...]
    raw_path: str
    host: str | None
    port: int | None
    headers: Headers
    version: tuple[int, int]
    upgrade: str | None
    expect_continue: bool
    keep_alive: bool
    body: int | None
    chunked: bool

    @property
    def connect(self) -> bool:
        return self.method == "CONNECT"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's head; `until_close`: its body ends with the connection."""

    status: int
    headers: Headers
    version: tuple[int, int]
    body: int | None
    chunked: bool
    until_close: bool


class Piece(NamedTuple):
    kind: PieceKind
    length: int
    message: Request | Answer | None = None


# -- heads -------------------------------------------------------------------------------------------------


def _head_end(data: bytes, at: int) -> int | None:
    """Where the head that begins at `at` ends; None: not yet. A line may only end in CRLF (RFC 9112 section 2.2)."""
    end = data.find(b"\r\n\r\n", at)
    end = end + 4 if end >= 0 else -1
    known = end if end >= 0 else len(data)
    if known - at > HEAD_MAX:
        raise HttpTooLong(f"a head of more than {HEAD_MAX} bytes")
    if data.count(b"\n", at, known) != data.count(b"\r\n", at, known):
        raise HttpAmbiguous("a line that ends in LF alone")
    bare = data.count(b"\r", at, known) - data.count(b"\r\n", at, known)
    if bare > (1 if end < 0 and data.endswith(b"\r") else 0):
        raise HttpAmbiguous("a CR that ends no line")
    return end if end >= 0 else None


def _fields(lines: list[bytes]) -> Headers:
    if len(lines) > HEADERS_MAX:
        raise HttpTooLong(f"more than {HEADERS_MAX} header fields")
    found = []
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            if line[:1] in (b" ", b"\t"):
                raise HttpAmbiguous("a folded header line")
            raise HttpMalformed("a header line against the grammar")
        found.append((match[1].decode("ascii").lower(), match[2].strip(b"\t ").decode("latin-1")))
    return tuple(found)


def _values(headers: Headers, name: str) -> list[str]:
    return [value for each, value in headers if each == name]


def _framing(headers: Headers, version: tuple[int, int]) -> tuple[int | None, bool]:
    """Content-Length and whether it is chunked (RFC 9112 sections 6.1 to 6.3)."""
    if any(name in _FRAMING_LOOKALIKES for name, _ in headers):
        raise HttpAmbiguous("a header that some servers take for one that frames the body")
    lengths, encodings = _values(headers, "content-length"), _values(headers, "transfer-encoding")
    if encodings:
        if lengths:
            raise HttpAmbiguous("both Content-Length and Transfer-Encoding")
        if version == (1, 0):
            raise HttpAmbiguous("Transfer-Encoding in HTTP/1.0")
        if len(encodings) > 1 or encodings[0].lower() != "chunked":
            raise HttpAmbiguous("a Transfer-Encoding other than chunked")
        return None, True
    if not lengths:
        return None, False
    if len(lengths) > 1:
        raise HttpAmbiguous("more than one Content-Length")
    if not _DIGITS.fullmatch(lengths[0]) or len(lengths[0]) > LENGTH_DIGITS:
        raise HttpMalformed("a Content-Length that is no number")
    return int(lengths[0]), False


def _keeps_alive(headers: Headers, version: tuple[int, int]) -> bool:
    options = {part.strip().lower() for value in _values(headers, "connection") for part in value.split(",")}
    return "close" not in options if version == (1, 1) else "keep-alive" in options


def _authority(text: str) -> tuple[str, int | None]:
    match = _HOST.fullmatch(text)
    if match is None or (match[2] and int(match[2]) > 65535):
        raise HttpAmbiguous("a host that is none")
    return match[1].lower(), int(match[2]) if match[2] else None


def _host(headers: Headers, version: tuple[int, int]) -> tuple[str | None, int | None]:
    """RFC 9112 section 3.2: exactly one Host in HTTP/1.1."""
    hosts = _values(headers, "host")
    if len(hosts) > 1:
        raise HttpAmbiguous("more than one Host")
    if not hosts:
        if version == (1, 1):
            raise HttpMalformed("no Host")
        return None, None
    return _authority(hosts[0]) if hosts[0] else (None, None)


def _target(method: str, target: str, host: tuple[str | None, int | None]) -> tuple[str, tuple[str, ...]]:
    """Raw path and its readings, of a request-target in one of its four forms (RFC 9112 section 3.2)."""
    if method == "CONNECT":
        _authority(target)
        return target, (target,)
    if target == "*":
        if method != "OPTIONS":
            raise HttpMalformed("* as the target of something other than OPTIONS")
        return target, (target,)
    raw = target
    if not target.startswith("/"):
        scheme, separator, rest = target.partition("://")
        if not separator or scheme.lower() not in ("http", "https"):
            raise HttpMalformed("a request target of no known form")
        authority, slash, tail = rest.partition("/")
        if "?" in authority or _authority(authority) != host:
            raise HttpAmbiguous("a target whose host is not the Host header's")
        raw = slash + tail or "/"
    return raw.partition("?")[0], readings(raw)


def _upgrade(headers: Headers) -> str | None:
    asked = _values(headers, "upgrade")
    return ", ".join(asked) if asked else None


class _Second:
    """llhttp's opinion: what it refuses or frames otherwise is not passed on."""

    def __init__(self) -> None:
        self.done = False

    def on_headers_complete(self) -> None:
        self.done = True


def _second_opinion(head: bytes) -> None:
    second = _Second()
    try:
        httptools.HttpRequestParser(second).feed_data(head)
    except httptools.HttpParserUpgrade:
        return
    except httptools.HttpParserError as error:
        raise HttpMalformed(str(error)) from None
    if not second.done:
        raise HttpAmbiguous("a head that another parser does not see the end of")


def parse_request(head: bytes) -> Request:
    """A whole head, with the empty line that ends it."""
    lines = head[:-4].split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(lines[0])
    if match is None:
        raise HttpMalformed("a request line against the grammar")
    method, target, version = match[1].decode(), match[2].decode(), (1, int(match[3]))
    headers = _fields(lines[1:])
    body, chunked = _framing(headers, version)
    host = _host(headers, version)
    raw_path, (path, *others) = _target(method, target, host)
    if method in _BODILESS and (body or chunked):
        raise HttpAmbiguous(f"{method} with a body")
    _second_opinion(head)
    expect = [value.lower() for value in _values(headers, "expect")]
    if any(value != "100-continue" for value in expect):
        raise HttpMalformed("an expectation nobody knows")
    return Request(
        method, target, path, tuple(others), raw_path, *host, headers, version,
        _upgrade(headers), bool(expect), _keeps_alive(headers, version), body, chunked,
    )  # fmt: skip


def parse_answer(head: bytes, method: str) -> Answer:
    """A whole head of the answer to a request with this method."""
    lines = head[:-4].split(b"\r\n")
    match = _STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise HttpMalformed("a status line against the grammar")
    version, status = (1, int(match[1])), int(match[2])
    headers = _fields(lines[1:])
    body, chunked = _framing(headers, version)
    if method == "HEAD" or status < 200 or status in (204, 304):  # RFC 9112 section 6.3
        return Answer(status, headers, version, None, False, False)
    return Answer(status, headers, version, body, chunked, body is None and not chunked)


# -- bodies ------------------------------------------------------------------------------------------------


class _Dissector:
    """What requests and answers have in common: everything behind the head."""

    def __init__(self, mode: Mode = Mode.HEAD, remaining: int = 0) -> None:
        self.mode = mode
        self.remaining = remaining
        self._failed: DissectError | None = None

    def advance(self, data: Octets, at: int = 0) -> Piece | None:
        """The piece that begins at data[at]; None: more bytes are needed. After an error it stays failed."""
        if self._failed is not None:
            raise self._failed
        try:
            return self._advance(data if isinstance(data, bytes) else bytes(data), at)
        except DissectError as error:
            self._failed = error
            raise

    def _advance(self, data: bytes, at: int) -> Piece | None:
        if self.mode == Mode.HEAD:
            return self._head(data, at)
        if self.mode in (Mode.BODY, Mode.CHUNK_DATA):
            return self._counted()
        if self.mode == Mode.CHUNK_SIZE:
            return self._chunk_size(data, at)
        if self.mode == Mode.CHUNK_END:
            return self._chunk_end(data, at)
        if self.mode == Mode.TRAILERS:
            return self._trailers(data, at)
        return Piece(PieceKind.OPAQUE, OPAQUE_MAX)

    def _head(self, data: bytes, at: int) -> Piece | None:
        raise NotImplementedError

    def _ended(self) -> None:
        """A message is complete."""
        self.mode, self.remaining = Mode.HEAD, 0

    def _enter_body(self, body: int | None, chunked: bool) -> None:
        if chunked:
            self.mode = Mode.CHUNK_SIZE
        elif body:
            self.mode, self.remaining = Mode.BODY, body
        else:
            self._ended()

    def _counted(self) -> Piece:
        length = min(self.remaining, OPAQUE_MAX)
        self.remaining -= length
        if self.remaining == 0:
            if self.mode == Mode.BODY:
                self._ended()
            else:
                self.mode = Mode.CHUNK_END
        return Piece(PieceKind.OPAQUE, length)

    def _chunk_size(self, data: bytes, at: int) -> Piece | None:
        end = data.find(b"\n", at, at + CHUNK_LINE_MAX + 2)
        if end < 0:
            if len(data) - at > CHUNK_LINE_MAX:
                raise HttpTooLong(f"a chunk-size line of more than {CHUNK_LINE_MAX} bytes")
            return None
        if end == at or data[end - 1] != 0x0D:
            raise HttpAmbiguous("a chunk-size line that ends in LF alone")
        match = _CHUNK_SIZE.fullmatch(data[at : end - 1])
        if match is None:
            raise HttpMalformed("a chunk-size line against the grammar")
        if len(match[1]) > CHUNK_DIGITS:
            raise HttpMalformed("a chunk of more bytes than can be counted")
        self.remaining = int(match[1], 16)
        self.mode = Mode.CHUNK_DATA if self.remaining else Mode.TRAILERS
        return Piece(PieceKind.FRAMING, end + 1 - at)

    def _chunk_end(self, data: bytes, at: int) -> Piece | None:
        if not b"\r\n".startswith(data[at : at + 2]):
            raise HttpMalformed("a chunk that is longer than its size")
        if len(data) - at < 2:
            return None
        self.mode = Mode.CHUNK_SIZE
        return Piece(PieceKind.FRAMING, 2)

    def _trailers(self, data: bytes, at: int) -> Piece | None:
        if data[at : at + 2] == b"\r\n":
            self._ended()
            return Piece(PieceKind.FRAMING, 2)
        end = _head_end(data, at)
        if (end if end is not None else len(data)) - at > TRAILERS_MAX:
            raise HttpTooLong(f"a trailer section of more than {TRAILERS_MAX} bytes")
        if end is None:
            return None
        names = {name for name, _ in _fields(data[at : end - 4].split(b"\r\n"))}
        if names & _NO_TRAILER:  # RFC 9110 section 6.5.1
            raise HttpAmbiguous("a trailer field that frames or routes")
        self._ended()
        return Piece(PieceKind.FRAMING, end - at)


class RequestDissector(_Dissector):
    """A client's bytes. Behind CONNECT and an Upgrade it reads on as if the server had declined."""

    def _head(self, data: bytes, at: int) -> Piece | None:
        begins = _BEGINNING.match(data, at, at + _METHOD_MAX + 1)
        if begins is None or (len(begins[0]) > _METHOD_MAX and not begins[0].endswith(b" ")):
            raise NotHttp("what begins here is no request")
        end = _head_end(data, at)
        if end is None:
            return None
        request = parse_request(data[at:end])
        self._enter_body(request.body, request.chunked)
        return Piece(PieceKind.HEAD, end - at, request)


class AnswerDissector(_Dissector):
    """A server's bytes. `methods`: of the requests that are not answered yet, in their order."""

    def __init__(self, methods: deque[str], mode: Mode = Mode.HEAD, remaining: int = 0) -> None:
        super().__init__(mode, remaining)
        self._methods = methods

    @property
    def outstanding(self) -> int:
        """Requests whose answers are not complete."""
        return len(self._methods)

    def _ended(self) -> None:
        super()._ended()
        if self._methods:
            self._methods.popleft()

    def _head(self, data: bytes, at: int) -> Piece | None:
        end = _head_end(data, at)
        if end is None:
            return None
        if not self._methods:
            raise HttpMalformed("an answer that nobody asked for")
        method = self._methods[0]
        answer = parse_answer(data[at:end], method)
        if answer.status == 101 or (method == "CONNECT" and 200 <= answer.status < 300):
            self.mode = Mode.OPAQUE
        elif answer.status >= 200:
            if answer.until_close:
                self.mode = Mode.OPAQUE
            else:
                self._enter_body(answer.body, answer.chunked)
        return Piece(PieceKind.HEAD, end - at, answer)
