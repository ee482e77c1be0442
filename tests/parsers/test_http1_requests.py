"""Requests as tables: what passes, what is against the grammar, what two servers could read differently."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsers.errors import DissectError, HttpAmbiguous, HttpError, HttpMalformed, HttpTooLong, NotHttp
from parsers.http1 import HEAD_MAX, AnswerDissector, Mode, PieceKind, Request, RequestDissector

HOST = b"Host: a\r\n"
GET = b"GET / HTTP/1.1\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"


def pieces(dissector: RequestDissector | AnswerDissector, data: bytes) -> list[tuple[PieceKind, int]]:
    found, at = [], 0
    while at < len(data):
        piece = dissector.advance(data, at)
        if piece is None:
            break
        found.append((piece.kind, piece.length))
        at += piece.length
    return found


@pytest.mark.parametrize(("head", "error"), [
    (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", HttpMalformed),
    (b"GET /  HTTP/1.1\r\n" + HOST + b"\r\n", HttpMalformed),
    (b"GET /\tx HTTP/1.1\r\n" + HOST + b"\r\n", HttpMalformed),
    (b"GET /\r\n\r\n", HttpMalformed),
    (b"GET / HTTP/0.9\r\n\r\n", HttpMalformed),
    (b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", HttpMalformed),
    (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", HttpMalformed),
    (b"GET / http/1.1\r\n" + HOST + b"\r\n", HttpMalformed),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", HttpMalformed),
    (b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n", NotHttp),
    (b"\x16\x03\x01\x02\x00", NotHttp),
    (b" GET / HTTP/1.1\r\n", NotHttp),
    (b"G\x00T / HTTP/1.1\r\n", NotHttp),
    (b"A" * 40 + b" / HTTP/1.1\r\n", NotHttp),
    (GET + b"\r\n", HttpMalformed),
    (GET + HOST + HOST + b"\r\n", HttpAmbiguous),
    (GET + b"Host: a\nX: b\r\n\r\n", HttpAmbiguous),
    (GET + b"Host: a\rX: b\r\n\r\n", HttpAmbiguous),
    (GET + HOST + b"X: a\r\n b\r\n\r\n", HttpAmbiguous),
    (GET + b"Host : a\r\n\r\n", HttpMalformed),
    (GET + HOST + b"X y: a\r\n\r\n", HttpMalformed),
    (GET + HOST + b": a\r\n\r\n", HttpMalformed),
    (GET + HOST + b"X: a\x00b\r\n\r\n", HttpMalformed),
    (GET + b"Host: a b\r\n\r\n", HttpAmbiguous),
    (GET + b"Host: user@a\r\n\r\n", HttpAmbiguous),
    (GET + b"Host: a:99999\r\n\r\n", HttpAmbiguous),
    (GET + b"Host: a/b\r\n\r\n", HttpAmbiguous),
    (b"GET http://b/ HTTP/1.1\r\n" + HOST + b"\r\n", HttpAmbiguous),
    (b"GET http://a@b/ HTTP/1.1\r\n" + HOST + b"\r\n", HttpAmbiguous),
    (b"GET ftp://a/ HTTP/1.1\r\n" + HOST + b"\r\n", HttpMalformed),
    (b"GET a HTTP/1.1\r\n" + HOST + b"\r\n", HttpMalformed),
    (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", HttpMalformed),
    (b"CONNECT / HTTP/1.1\r\n" + HOST + b"\r\n", HttpAmbiguous),
    (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n", HttpAmbiguous),
    (POST + b"Content-Length: 5, 5\r\n\r\n", HttpMalformed),
    (POST + b"Content-Length: +5\r\n\r\n", HttpMalformed),
    (POST + b"Content-Length: -5\r\n\r\n", HttpMalformed),
    (POST + b"Content-Length: 0x10\r\n\r\n", HttpMalformed),
    (POST + b"Content-Length: 1_0\r\n\r\n", HttpMalformed),
    (POST + b"Content-Length: \xb2\r\n\r\n", HttpMalformed),
    (POST + b"Content-Length: 5 5\r\n\r\n", HttpMalformed),
    (POST + b"Content-Length: \r\n\r\n", HttpMalformed),
    (POST + b"Content-Length: 99999999999999999999\r\n\r\n", HttpMalformed),
    (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", HttpAmbiguous),
    (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", HttpAmbiguous),
    (POST + b"Transfer-Encoding: identity\r\n\r\n", HttpAmbiguous),
    (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n", HttpAmbiguous),
    (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", HttpAmbiguous),
    (POST + b"Transfer-Encoding: xchunked\r\n\r\n", HttpAmbiguous),
    (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", HttpAmbiguous),
    (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n", HttpMalformed),
    (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", HttpAmbiguous),
    (POST + b"Expect: 200-ok\r\n\r\n", HttpMalformed),
    (GET + HOST + b"X: " + b"a" * HEAD_MAX, HttpTooLong),
    (GET + HOST + b"X: a\r\n" * 101 + b"\r\n", HttpTooLong),
    (b"GET /a%2fb HTTP/1.1\r\n" + HOST + b"\r\n", HttpAmbiguous),
    (GET + HOST + b"Content-Length: 5\r\n\r\n", HttpAmbiguous),
    (b"HEAD / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n", HttpAmbiguous),
    (POST + b"Content-Length: 5\r\nContent_Length: 6\r\n\r\n", HttpAmbiguous),
    (POST + b"transfer_encoding: chunked\r\n\r\n", HttpAmbiguous),
    (GET + b"Host: admin.local..\r\n\r\n", HttpAmbiguous),
    (GET + b"Host: .admin\r\n\r\n", HttpAmbiguous),
])  # fmt: skip
def test_what_is_refused(head: bytes, error: type[DissectError]) -> None:
    dissector = RequestDissector()
    with pytest.raises(error):
        dissector.advance(head)
    with pytest.raises(error):  # it stays refused
        dissector.advance(GET + HOST + b"\r\n")


@pytest.mark.parametrize(("head", "method", "path", "body"), [
    (GET + HOST + b"\r\n", "GET", "/", None),
    (b"GET /a/./b//c?x=%2f HTTP/1.1\r\n" + HOST + b"\r\n", "GET", "/a/b/c", None),
    (b"GET http://A:80/x HTTP/1.1\r\nHost: a:80\r\n\r\n", "GET", "/x", None),
    (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", "OPTIONS", "*", None),
    (b"GET / HTTP/1.0\r\n\r\n", "GET", "/", None),
    (POST + b"Content-Length: 10\r\n\r\n", "POST", "/", 10),
    (POST + b"content-length:\t7 \r\n\r\n", "POST", "/", 7),
    (GET + b"Host: [::1]:80\r\n\r\n", "GET", "/", None),
])  # fmt: skip
def test_what_passes(head: bytes, method: str, path: str, body: int | None) -> None:
    piece = RequestDissector().advance(head)
    assert piece is not None and piece.length == len(head) and isinstance(piece.message, Request)
    assert (piece.message.method, piece.message.path, piece.message.body) == (method, path, body)


def test_a_hostile_header_line_takes_no_longer_than_another() -> None:
    """A pattern with two places for white space once took hours for this one."""
    blank = b"X:" + b" " * 16000
    with pytest.raises(HttpMalformed):
        RequestDissector().advance(GET + HOST + blank + b"\x01\r\n\r\n")
    piece = RequestDissector().advance(GET + HOST + blank + b"a b \t\r\n\r\n")
    assert piece is not None and isinstance(piece.message, Request)
    assert piece.message.headers[-1] == ("x", "a b")


def test_chunks_with_trailers() -> None:
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    dissector = RequestDissector()
    data = head + b"5;a=b\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n" + GET + HOST + b"\r\n"
    assert [kind.name for kind, _ in pieces(dissector, data)] == [
        "HEAD", "FRAMING", "OPAQUE", "FRAMING", "FRAMING", "FRAMING", "HEAD",
    ]  # fmt: skip
    assert dissector.mode is Mode.HEAD


@pytest.mark.parametrize("chunk", [
    b"x\r\n", b"0x5\r\n", b"+5\r\n", b"-5\r\n", b" 5\r\n", b"5 \r\n", b"5\n", b"1_0\r\n", b"fffffffffffffffff\r\n",
    b"5\r\nhelloX\r\n", b"0\r\nHost: b\r\n\r\n", b"0\r\nContent-Length: 5\r\n\r\n", b"5;" + b"a" * 2000,
])  # fmt: skip
def test_bad_chunks(chunk: bytes) -> None:
    with pytest.raises(HttpError):
        pieces(RequestDissector(), POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk)


def test_answers_frame_by_status_method_and_length() -> None:
    dissector = AnswerDissector(deque(["GET", "HEAD", "GET", "GET"]))
    data = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nHTTP/1.1 304 Not Modified\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    )
    assert sum(length for _, length in pieces(dissector, data)) == len(data)
    assert dissector.outstanding == 0


WORDS = st.sampled_from([
    GET, HOST, POST, b"\r\n", b"\n", b"\r", b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n",
    b"0\r\n", b"abc", b" ", b"\x00", b"X: y\r\n",
])  # fmt: skip
BYTES = st.lists(WORDS | st.binary(max_size=4), max_size=12).map(b"".join)


def outcome(data: bytes, steps: list[int]) -> tuple[list[tuple[PieceKind, int]], bool]:
    """Pieces and failure when the bytes come in these portions."""
    dissector, found, at = RequestDissector(), list[tuple[PieceKind, int]](), 0
    for known in [*steps, len(data)]:
        try:
            while at < known and (piece := dissector.advance(data[:known], at)) is not None:
                found.append((piece.kind, piece.length))
                at += piece.length
        except DissectError:
            return found, True
    return found, False


@given(BYTES, st.lists(st.integers(0, 200), max_size=6))
def test_the_split_changes_nothing(data: bytes, cuts: list[int]) -> None:
    steps = sorted(cut for cut in cuts if cut < len(data))
    assert outcome(data, steps) == outcome(data, [])
