"""The slow path as transcripts: `client(...)` is a punted frame, the list is what the inspector asks for."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from isolator.core.commands import Command, Commit, Forward, Own, Read, Send
from isolator.core.inspector import Inspector
from isolator.core.model import Decision, Direction, DropReason, Owner, PuntReason, RuleRef, Verdict
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule, Outcome, Profile, Ruling
from parsers.packet import ACK, PSH, VNET, SegmentTemplate, parse_segment

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


@dataclass
class Pinned:
    client: Half = field(default_factory=lambda: Half(START, START))
    server: Half = field(default_factory=lambda: Half(SERVER, SERVER, record_seq=SERVER))
    profile: int = 1
    generation: int = 7
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
    ) -> list[Command]:
        frame = CLIENT_FRAMES.build(START + at, ack, ACK | PSH, payload)
        return self._receive(frame, 1 << 1 | 1 | why << 16 | 1 << 24, now)

    def server(self, at: int, payload: bytes, now: float = 1.0) -> list[Command]:
        frame = CLIENT_FRAMES.reversed().build(SERVER + at, 0, ACK, payload)
        return self._receive(frame, 1 << 1 | PuntReason.REVERSE << 16 | 1 << 24, now)

    def resume(self, now: float = 1.0) -> list[Command]:
        assert self.flow is not None
        return self.inspector.resume(self.flow, self.pinned, now)


def kinds(commands: list[Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


def payload_of(command: Command) -> bytes:
    assert isinstance(command, Send)
    packet = memoryview(command.frame)[VNET:]
    segment = parse_segment(packet)
    return bytes(packet[segment.payload_at : segment.payload_end])


@pytest.fixture
def talk() -> Conversation:
    return Conversation()


def test_an_allowed_request_is_committed_and_then_forwarded_itself(talk: Conversation) -> None:
    commit, forward, report = talk.client(0, GET)
    assert isinstance(commit, Commit) and isinstance(forward, Forward)
    assert (commit.expect, commit.next) == (START, (START + len(GET)) & 0xFFFFFFFF)
    assert commit.record == GET and commit.window is None and commit.mark
    assert talk.inspector.take_counts() == {RULE: 1}
    assert type(report).__name__ == "Report"


def test_a_body_gets_a_pass_window(talk: Conversation) -> None:
    head = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\nContent-Length: 100000\r\n\r\n"
    commit = talk.client(0, head + bytes(100))[0]
    assert isinstance(commit, Commit) and commit.record == head
    body = (START + len(head)) & 0xFFFFFFFF
    end = (body + 100000) & 0xFFFFFFFF
    assert commit.window == (body, end) and commit.next == end


def test_an_equal_retransmission_passes_and_a_different_one_ends_both_sides(talk: Conversation) -> None:
    talk.client(0, GET)
    assert kinds(talk.client(0, GET)) == ["Forward"]
    assert kinds(talk.client(5, GET[5:9])) == ["Forward"]
    ended = talk.client(0, GET.replace(b"/api/v1/a", b"/admin/zz"))
    assert kinds(ended) == ["Own", "Own", "Report", "Send", "Send"]
    assert [c.owner for c in ended if isinstance(c, Own)] == [Owner.CLOSED, Owner.CLOSED]
    assert kinds(talk.client(len(GET), GET)) == []


def test_a_retransmission_with_a_longer_tail_is_decided_for_its_tail(talk: Conversation) -> None:
    talk.client(0, GET)
    assert kinds(talk.client(0, GET + DENIED))[-4:] == ["Own", "Own", "Report", "Read"]


def test_what_the_kernel_finds_different_ends_both_sides(talk: Conversation) -> None:
    talk.client(0, GET)
    assert "Own" in kinds(talk.client(0, GET, why=PuntReason.MISMATCH))


def test_a_head_in_parts_is_held_acknowledged_and_sent_whole(talk: Conversation) -> None:
    assert talk.client(0, GET[:10]) == []
    (ack,) = talk.inspector.tick(2.0)
    assert isinstance(ack, Send) and ack.direction is Direction.EGRESS and payload_of(ack) == b""
    commit, send, _ = talk.client(10, GET[10:], now=2.0)
    assert isinstance(commit, Commit) and payload_of(send) == GET
    talk.pinned.client.acked = START
    (read,) = talk.inspector.tick(3.0)
    assert isinstance(read, Read)
    (again,) = talk.resume(3.0)  # the client believes it delivered: we deliver
    assert payload_of(again) == GET
    talk.pinned.client.acked = (START + len(GET)) & 0xFFFFFFFF
    talk.inspector.tick(9.0)
    assert talk.resume(9.0) == []


def test_parts_out_of_order_wait_for_the_first(talk: Conversation) -> None:
    assert talk.client(10, GET[10:]) == []
    commit, send, _ = talk.client(0, GET[:10])
    assert isinstance(commit, Commit) and payload_of(send) == GET


def test_a_different_copy_of_held_bytes_ends_both_sides(talk: Conversation) -> None:
    talk.client(0, GET[:12])
    assert kinds(talk.client(4, b"/admin/xx"))[:2] == ["Own", "Own"]


def test_a_denied_request_is_answered_and_the_server_reset(talk: Conversation) -> None:
    commands = talk.client(0, DENIED)
    assert kinds(commands) == ["Own", "Own", "Report", "Read"]
    own, answer, reset = talk.resume()
    assert isinstance(own, Own) and own.owner is Owner.CLOSED
    assert payload_of(answer).startswith(b"HTTP/1.1 403 ") and b"api-allow" in payload_of(answer)
    assert isinstance(reset, Send) and reset.direction is Direction.INGRESS and payload_of(reset) == b""
    (again,) = talk.inspector.tick(2.0)
    assert payload_of(again) == payload_of(answer)
    end = SERVER + len(payload_of(answer)) + 1
    assert talk.client(len(DENIED), b"", ack=end, why=PuntReason.CLOSED) == []
    assert kinds(talk.inspector.tick(60.0)) == ["Delete"]


def test_a_denial_waits_for_the_answer_before_it(talk: Conversation) -> None:
    commands = talk.client(0, GET + DENIED)
    assert kinds(commands) == ["Commit", "Send", "Report", "Own", "Own", "Report", "Read"]
    assert payload_of(commands[1]) == GET
    assert talk.resume() == []
    assert kinds(talk.server(0, OK[:30])) == ["Forward"]
    assert kinds(talk.server(30, OK[30:])) == ["Forward", "Own", "Send", "Send"]


def test_a_complete_answer_is_not_waited_for(talk: Conversation) -> None:
    talk.client(0, GET)
    talk.client(len(GET), DENIED, ack=SERVER + len(OK))
    talk.pinned.server = Half(SERVER + len(OK), SERVER, record_seq=SERVER, record=OK)
    assert kinds(talk.resume()) == ["Own", "Send", "Send"]


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00", b"SSH-2.0-x\r\n", b"\x00\x00"])
def test_what_is_no_http_is_reset(talk: Conversation, garbage: bytes) -> None:
    commands = talk.client(0, garbage)
    assert kinds(commands)[:2] == ["Own", "Own"] and kinds(commands)[-2:] == ["Send", "Send"]


def test_far_ahead_and_too_much_is_dropped(talk: Conversation) -> None:
    assert kinds(talk.client(1 << 20, b"x")) == ["Drop"]
    for at in range(1, 60):
        talk.client(at * 1000 + 1, b"x" * 1000)
    dropped = talk.client(65530, b"x" * 1000)
    assert dropped[0].reason is DropReason.HELD_FULL  # type: ignore[union-attr]


def test_a_new_policy_holds_for_the_live_connection(talk: Conversation) -> None:
    talk.client(0, GET)
    flow = talk.flow
    assert flow is not None
    nothing = Ruling(Decision(Verdict.INSPECT, rule=RULE))
    talk.inspector.change_policy({1: Profile(1, Outcome(nothing, nothing, False))}, 8)
    assert talk.inspector.find(3, flow.wire[0][1], 1) is None  # its pinned state has to be read again
    talk.pinned.generation = 8
    assert talk.inspector.adopt(flow.key, 3, flow.wire[0][1], talk.pinned) is flow
    assert "Read" in kinds(talk.client(len(GET), GET))
