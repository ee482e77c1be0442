"""The slow path's transcripts: `client(...)` is a punted frame, what it returns is what the inspector asks for."""

from __future__ import annotations

from dataclasses import dataclass, field

from isolator.core.commands import Command, Send
from isolator.core.inspector import Inspector
from isolator.core.model import Decision, Direction, Owner, PuntReason, RuleRef, Verdict
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule, Outcome, Profile, Ruling
from parsers.packet import ACK, PSH, VNET, Segment, SegmentTemplate, parse_segment

RULE = RuleRef("api-allow", "read")
START, SERVER = 0xFFFFFF80, 5000  # the client's numbers wrap around on the way
CLIENT_FRAMES = SegmentTemplate(
    4, bytes(12) + b"\x08\x00", b"\x0a\x09\x00\x01", b"\x0a\x09\x00\x02", b"\x9c\x40\x00\x50"
)
GET = b"GET /api/v1/a HTTP/1.1\r\nHost: api\r\n\r\n"
DENIED = b"GET /admin HTTP/1.1\r\nHost: api\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@dataclass
class Half:
    next: int
    acked: int
    owner: Owner = Owner.PYTHON
    mode: int = 0
    remaining: int = 0
    windows: tuple[tuple[int, int], ...] = ()
    record_seq: int = 0
    record: bytes = b""
    gate: int = 0
    alone: str | None = None


@dataclass
class Pinned:
    client: Half = field(default_factory=lambda: Half(START, START))
    server: Half = field(default_factory=lambda: Half(SERVER, SERVER, record_seq=SERVER))
    profile: int = 1
    generation: int = 7
    automaton: int = 0
    incarnation: int = 1
    initiator: Direction = Direction.INGRESS
    live: bool = True


class Conversation:
    def __init__(self) -> None:
        line = HttpRule(frozenset({"GET", "POST"}), PathPattern("/api/v1/**"))
        ruling = Ruling(
            Decision(Verdict.INSPECT, rule=RULE), allows=((line, Decision(Verdict.ALLOW, rule=RULE)),)
        )
        self.inspector = Inspector({1: Profile(1, Outcome(ruling, ruling, False))}, 7)
        self.pinned = Pinned()
        self.flow = None

    def _receive(self, frame: bytes, context: int, now: float) -> list[Command]:
        packet = memoryview(frame)[VNET:]
        segment = parse_segment(packet)
        if self.flow is None:
            self.flow = self.inspector.adopt(bytes(44), context & 0xFFFF, segment.key, self.pinned)
        assert self.flow is not None
        return self.inspector.receive(self.flow, segment, packet, context, now)

    def client(
        self,
        at: int,
        payload: bytes,
        ack: int = SERVER,
        now: float = 1.0,
        why: PuntReason = PuntReason.PAYLOAD,
        flags: int = ACK | PSH,
    ) -> list[Command]:
        frame = CLIENT_FRAMES.build(START + at, ack, flags, payload)
        return self._receive(frame, 1 << 1 | 1 | why << 16 | 1 << 24, now)

    def server(
        self, at: int, payload: bytes, now: float = 1.0, flags: int = ACK, ack: int = 0
    ) -> list[Command]:
        frame = CLIENT_FRAMES.reversed().build(SERVER + at, ack, flags, payload)
        return self._receive(frame, 1 << 1 | PuntReason.REVERSE << 16 | 1 << 24, now)

    def wake(self, now: float) -> list[Command]:
        return [command for flow in self.inspector.due(now) for command in self.inspector.wake(flow, now)]

    def resume(self, now: float = 1.0) -> list[Command]:
        assert self.flow is not None
        return self.inspector.resume(self.flow, self.pinned, now)


def kinds(commands: list[Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


def segment_of(command: Command) -> Segment:
    assert isinstance(command, Send)
    return parse_segment(memoryview(command.frame)[VNET:])


def payload_of(command: Command) -> bytes:
    assert isinstance(command, Send)
    packet = memoryview(command.frame)[VNET:]
    segment = parse_segment(packet)
    return bytes(packet[segment.payload_at : segment.payload_end])
