"""Ten thousand packets of hostile clients through tc, ring and slow path, on real veths.

The server is a model of every server at once: whatever copy of a byte reaches it, it may be the one that it takes. So
for each byte that a rule looked at, all copies that come out must be equal (invariant 1), and what they spell must be
requests that the policy allows, as another parser reads them. Honest clients among the hostile ones must get all
of theirs through.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator

import httptools  # type: ignore[import-not-found,import-untyped,unused-ignore]
import pytest

from isolator.core.flow import HELD_MAX
from isolator.core.inspector import RECORD_UNACKED_MAX, Inspector
from parsers.errors import DissectError
from parsers.http1 import Mode, PieceKind, RequestDissector
from parsers.packet import ACK, FIN, PSH, RST, SYN, URG, Segment, parse_segment
from tests.datapath import slow_path
from tests.datapath.slow_path import Place, template

pytestmark = pytest.mark.root
PACKETS = 10_000
SEGMENT = 1400  # bytes of payload; what is longer is sent as a GSO frame
_MASK = 0xFFFFFFFF
SERVER_ISN = 0x7FFF_FF00

HOST = b"Host: api\r\n"
ALLOWED = (
    b"GET /api/v1/books HTTP/1.1\r\n" + HOST + b"\r\n",
    b"HEAD /api/v1/%62ooks?x=1 HTTP/1.1\r\n" + HOST + b"Accept: */*\r\n\r\n",
    b"POST /api/v1/a HTTP/1.1\r\n"
    + HOST
    + b"Content-Length: 30\r\n\r\n"
    + b"GET /admin HTTP/1.1\r\nHost: a\r\n",
    b"POST /api/v1/b HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    b"8\r\nGET /adm\r\n5;x=y\r\nin HT\r\n0\r\n\r\n",
    b"POST /api/v1/c HTTP/1.1\r\n" + HOST + b"Content-Length: 3000\r\n\r\n" + b"b" * 3000,
)
FORBIDDEN = (
    b"GET /admin HTTP/1.1\r\n" + HOST + b"\r\n",
    b"DELETE /api/v1/books HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /api/v1/../../admin HTTP/1.1\r\n" + HOST + b"\r\n",
    b"POST /api/v1/a HTTP/1.1\r\n"
    + HOST
    + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"\x16\x03\x01\x00\x05hello",
)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with slow_path.place() as made:
        yield made


# -- the server ----------------------------------------------------------------------------------------------


SERVERS: dict[int, Server] = {}  # by the client's port


def deliver(place: Place) -> None:
    """What has reached the container since."""
    for frame in place.served:
        segment = parse_segment(frame)
        assert segment.destination_port(frame) == 80
        SERVERS[segment.source_port(frame)].take(segment, frame)
    place.served.clear()


class Server:
    """Every copy of every byte that came through, by its distance from the first."""

    def __init__(self, place: Place, port: int, isn: int, dice: random.Random, honest: bool) -> None:
        self.place, self.port, self.start = place, port, (isn + 1) & _MASK
        self.dice, self.honest = dice, honest
        self.silent = (
            not honest and dice.random() < 0.5
        )  # acknowledges nothing: all copies may still be taken
        self.copies: dict[int, set[int]] = {}
        self.first: dict[int, int] = {}
        self.reached = 0  # in sequence
        self.sent = 0

    def take(self, segment: Segment, frame: bytes) -> None:
        at = (segment.seq - self.start) & _MASK
        payload = frame[segment.payload_at : segment.payload_end]
        for offset, value in enumerate(payload, at):
            assert offset < 1 << 20, "a byte that no client sent"
            self.copies.setdefault(offset, set()).add(value)
            self.first.setdefault(offset, value)
        while self.reached in self.first:
            self.reached += 1

    def back(self, payload: bytes = b"", flags: int = ACK, ack: int | None = None) -> None:
        acked = self.reached if ack is None else ack
        frame = template(self.port).reversed().build(
            SERVER_ISN + 1 + self.sent, self.start + acked, flags, payload
        )  # fmt: skip
        self.sent += len(payload)
        self.place.send(frame, from_container=True)

    def answer(self) -> None:
        """A lazy, forgetful or hostile server; an honest one acknowledges what it has."""
        kind = 0 if self.honest else self.dice.randrange(6)
        if self.silent:
            return
        if kind == 0:
            self.back()
        elif kind == 1:
            self.back(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", PSH | ACK)
        elif kind == 2:
            self.back(ack=self.dice.randrange(self.reached + 1))
        elif kind == 3:
            self.back(ack=self.reached + self.dice.randrange(1, 5000))  # optimistic

    # what it got

    def judge(self) -> list[bytes]:
        """The targets that it would serve, whichever copies it took."""
        stream = bytes(self.first[at] for at in range(self.reached))
        bodies = bodies_of(stream)
        for at in self.copies:
            if not any(at in body for body in bodies):
                assert len(self.copies[at]) == 1, f"port {self.port}: two copies of byte {at} of {stream!r}"
        return served(stream)


def bodies_of(stream: bytes) -> list[range]:
    """Where nobody looks; the last one may reach beyond what came."""
    dissector, at, found = RequestDissector(), 0, []
    try:
        while at < len(stream):
            piece = dissector.advance(stream, at)
            if piece is None:
                break
            if piece.kind is PieceKind.OPAQUE:
                found.append(range(at, at + piece.length))
            at += piece.length
    except DissectError as error:
        raise AssertionError(f"{error} in what came through: {stream!r}") from error
    assert dissector.mode != Mode.OPAQUE
    return found


def served(stream: bytes) -> list[bytes]:
    """Methods and targets, as llhttp reads them."""
    seen: list[bytes] = []

    class Reader:
        def on_url(self, url: bytes) -> None:
            seen.append(url)

    parser = httptools.HttpRequestParser(Reader())
    parser.feed_data(stream)
    return seen


# -- the client ----------------------------------------------------------------------------------------------


class Client:
    def __init__(self, place: Place, port: int, seed: int, honest: bool) -> None:
        self.dice = random.Random(seed)
        self.place, self.honest, self.packets = place, honest, 0
        self.isn = self.dice.choice((self.dice.randrange(1 << 32), _MASK - self.dice.randrange(3000)))
        self.frames = template(port)
        self.server = SERVERS[port] = Server(place, port, self.isn, self.dice, honest)
        self.requests = [self.dice.choice(ALLOWED) for _ in range(self.dice.randrange(1, 5))]
        if not honest:
            self.requests.insert(self.dice.randrange(len(self.requests) + 1), self.dice.choice(FORBIDDEN))
        self.stream = b"".join(self.requests)

    def send(self, at: int, payload: bytes, flags: int = ACK | PSH, broken: bool = False) -> None:
        frame = bytearray(self.frames.build(self.isn + 1 + at, SERVER_ISN + 1, flags, payload, mss=SEGMENT))
        if broken and len(payload) <= SEGMENT:  # a finished checksum, and a wrong one
            frame[0] = 0
        self.packets += 1
        self.place.send(bytes(frame))
        deliver(self.place)

    def run(self) -> None:
        self.send(-1, b"", SYN)
        self.server.sent = -1
        self.server.back(b"", SYN | ACK, 0)
        self.server.sent = 0
        self.send(0, b"", ACK)
        (self._honestly if self.honest else self._hostilely)()

    def _honestly(self) -> None:
        """Cuts as it likes, loses and repeats segments, reorders; never changes a byte."""
        cuts = sorted({0, len(self.stream), *(self.dice.randrange(len(self.stream)) for _ in range(6))})
        parts = list(itertools.pairwise(cuts))
        for _ in range(6):
            for start, end in self.dice.sample(parts, len(parts)):
                self.send(start, self.stream[start:end])
                if self.dice.random() < 0.3:
                    self.server.answer()
            self.server.answer()
            if self.server.reached == len(self.stream):
                return

    def _hostilely(self) -> None:
        if self.dice.random() < 0.5:
            for request in self.requests[:3]:  # several messages at once, none acknowledged
                self.send(self.server.reached, request)
        for _ in range(self.dice.randrange(10, 60)):
            self._strike()
            if self.dice.random() < 0.3:
                self.server.answer()
            if self.dice.random() < 0.05:
                self.place.forwarder.tick(time.time() + self.dice.random())

    def _strike(self) -> None:
        dice, stream = self.dice, self.stream
        reached = self.server.reached
        start = dice.choice((reached, reached, dice.randrange(reached + 1), dice.randrange(len(stream))))
        payload = stream[start : start + dice.choice((1, 20, 100, 200, 1460, 5000))]
        kind = dice.randrange(12)
        if kind < 4:
            self.send(start, payload)
        elif kind == 4 and payload:
            changed = bytearray(payload)
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
            self.send(start, bytes(changed), broken=dice.random() < 0.3)
        elif kind == 5:
            self.send(start, dice.choice(FORBIDDEN))
        elif kind == 6:
            self.send(start, payload + dice.choice(FORBIDDEN))
        elif kind == 7:
            self.send(
                start, payload, dice.choice((ACK, FIN | ACK, RST | ACK, RST, FIN, URG | ACK, 0, SYN | ACK))
            )
        elif kind == 8:
            self.send(start + dice.choice((1 << 31, 1 << 30, 70000, -1, -5000)), payload or b"x")
        elif kind == 9:
            self.send(dice.choice((-1, start - 1, start)), b"", SYN)
        elif kind == 10:
            self.send(start, b"", dice.choice((FIN | ACK, RST)), broken=dice.random() < 0.5)
        else:
            self.send(start - 1, b"\0")  # a keep-alive probe


# -- the test ------------------------------------------------------------------------------------------------


def bounded(inspector: Inspector) -> None:
    for flow in inspector.flows:
        assert flow.stream.held <= HELD_MAX
        assert len(flow.record) <= RECORD_UNACKED_MAX + HELD_MAX + 65536


def test_no_hostile_client_gets_a_byte_through_that_was_not_inspected(place: Place) -> None:
    packets = came_through = complete = 0
    for number in range(PACKETS):
        client = Client(place, 2000 + number, number, honest=number % 4 == 0)
        client.run()
        packets += client.packets
        bounded(place.inspector)
        targets = client.server.judge()
        assert all(target.startswith(b"/api/v1/") and b".." not in target for target in targets)
        came_through += len(targets)
        if client.honest:
            complete += 1
            assert client.server.reached == len(client.stream), f"{number}: {client.requests}"
        if packets >= PACKETS:
            break
    assert packets >= PACKETS and complete > 50 and came_through > 200
