"""The ten rules' part in the kernel as transcripts: what is sent, what becomes of it, what is remembered.

R0 R3 R4 R5 R6 R8 R9 R10 and R1 on inspected flows; the rules themselves stand in docs/architecture.md.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from scapy.layers.inet import IP, TCP

from isolator.core.model import Direction, Owner
from isolator.datapath.abi import (
    HALF_FIN,
    HALF_RST,
    RECORD_MAX,
    WINDOW_BYTES_MAX,
)
from isolator.datapath.flow7 import Outcome
from parsers.http1 import Mode
from tests.bpf.bench import Bench, gso
from tests.bpf.conversation import HEAD, SERVER_ISN, Conversation
from tests.bpf.frames import checksums_are_right, inbound, outbound, tcp

pytestmark = pytest.mark.root
INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
MODE_OPAQUE = Mode.OPAQUE
END = len(HEAD)
S = SERVER_ISN + 1  # the server's first byte
KINDS = [
    pytest.param({}, id="ipv4"),
    pytest.param({"v6": True}, id="ipv6"),
    pytest.param({"direction": EGRESS, "server_port": 91}, id="egress"),
    pytest.param({"isn": 0xFFFFFFF0}, id="wrap"),
]


@pytest.fixture
def c(b: Bench, request: pytest.FixtureRequest) -> Conversation:
    return Conversation(b, **getattr(request, "param", {})).handshake()


on_every_kind = pytest.mark.parametrize("c", KINDS, indirect=True)


def receiver(c: Conversation) -> str:
    return "container" if c.direction is INGRESS else "network"


# -- the boundary (R0, R6) -------------------------------------------------------------------------------


@on_every_kind
def test_handshake(c: Conversation) -> None:
    flow = c.flow
    assert (flow.live, flow.pending, flow.start, flow.initiator) == (True, False, c.start, c.direction)
    assert (flow.client.next, flow.client.acked, flow.client.owner) == (c.start, c.start, Owner.PYTHON)
    assert (flow.server.next, flow.server.record_seq, flow.server.owner) == (S, S, Owner.KERNEL)
    assert flow.profile == 5


@on_every_kind
def test_new_payload_is_held(c: Conversation) -> None:
    outcome = c.client("PA", c.start, S, HEAD)
    assert (str(outcome), outcome.incarnation) == ("punt PAYLOAD", c.flow.incarnation & 0xFF)
    assert bytes(outcome.packet[TCP].payload) == HEAD
    assert (c.half.next, c.half.word.punts) == (c.start, 1)


def test_payload_beyond_the_boundary_is_held(c: Conversation) -> None:
    c.allow_head()
    assert str(c.client("PA", c.at(END + 100), S, b"later")) == "punt PAYLOAD"
    assert str(c.client("PA", c.start, S, HEAD + b"GET /secret")) == "punt PAYLOAD"


def test_a_super_packet_is_held_whole(b: Bench) -> None:
    c = Conversation(b).handshake()
    payload = bytes(inbound(tcp(1000, 80, "A", c.start, S) / (b"x" * 9000)))
    outcome = b.from_network(payload, gso(54, 1448))
    assert (str(outcome), len(outcome.frame)) == ("punt PAYLOAD", len(payload))


def test_lengths_that_disagree(c: Conversation) -> None:
    """R1: an IP length of 0 on a GSO frame once hid a payload."""
    for length in (0, 40, 2000):
        assert str(c.client("PA", c.start, S, HEAD, gso(54, 20), len=length)) == "drop LENGTH_MISMATCH"
    assert c.half.word.punts == 0


def test_urgent_data(c: Conversation) -> None:
    assert str(c.client("PAU", c.start, S, HEAD)) == "drop URGENT"


def test_payload_before_the_handshake(b: Bench) -> None:
    c = Conversation(b)
    assert str(c.client("S", c.isn)) == "container"
    assert str(c.client("PA", c.start, 0, HEAD)) == "drop TCP_STATE"
    assert str(c.server("PA", S, c.start, b"hello")) == "drop TCP_STATE"


# -- commands (R0) ---------------------------------------------------------------------------------------


@on_every_kind
def test_commit(c: Conversation) -> None:
    answer = c.commit(END, record=(c.start, HEAD), mode=1, remaining=77)
    assert answer.outcome is Outcome.OK and (answer.acked, answer.other_next) == (c.start, S)
    half = c.half
    assert (half.next, half.record_seq, half.record) == (c.at(END), c.start, HEAD)
    assert (half.mode, half.remaining, half.acked) == (1, 77, c.start)


def test_commands_that_come_too_late(c: Conversation) -> None:
    before = c.flow
    assert c.commit(END, incarnation=c.flow.incarnation - 1).outcome is Outcome.STALE
    assert c.commit(END, expect=c.start + 1).outcome is Outcome.STALE
    assert replace(c.flow, last_seen=0) == replace(before, last_seen=0)
    c.own(Owner.CLOSED)
    assert c.commit(END).outcome is Outcome.STALE
    assert c.b.datapath.commands.delete(c.key, before.incarnation)
    assert c.b.datapath.flow7(c.key) is None
    assert c.b.datapath.commands.own(c.key, INGRESS, 1, Owner.PYTHON).outcome is Outcome.GONE


def test_an_owner_keeps_the_boundary_and_the_punts(c: Conversation) -> None:
    c.client("PA", c.start, S, HEAD)
    assert c.own(Owner.CLOSED)
    assert (c.half.next, c.half.owner, c.half.word.punts) == (c.start, Owner.CLOSED, 1)


# -- acknowledgements (R3) -------------------------------------------------------------------------------

ACKS = [(0, 0), (1, 1), (END, END), (END + 1, 0), (END + 2**31, 0), (-1, 0), (-(2**31), 0)]


@on_every_kind
@pytest.mark.parametrize(("ack", "acked"), ACKS)
def test_acknowledged_never_beyond_next(c: Conversation, ack: int, acked: int) -> None:
    c.allow_head()
    assert c.server("A", S, c.at(ack)).where != "drop"
    assert c.half.acked == c.at(acked)


def test_acknowledged_never_goes_back(c: Conversation) -> None:
    c.allow_head()
    c.server("A", S, c.at(END))
    c.server("A", S, c.at(5))
    assert c.half.acked == c.at(END)


def test_the_client_acknowledges_nothing_for_the_server(c: Conversation) -> None:
    c.allow_head()
    c.client("A", c.at(END), c.at(END))
    assert c.half.acked == c.start


# -- below the acknowledged number (R4) ------------------------------------------------------------------


@on_every_kind
@pytest.mark.parametrize("payload", [b"x", b"GET", HEAD, HEAD[:-1] + b"!"], ids=len)
def test_acknowledged_payload_is_cut_off(c: Conversation, payload: bytes) -> None:
    c.allow_head()
    c.server("A", S, c.at(END))
    outcome = c.client("PA", c.at(END - len(payload)), S, payload)
    assert outcome.where == receiver(c)
    assert bytes(outcome.packet[TCP].payload) == b"" and outcome.packet[TCP].seq == c.at(END - len(payload))
    assert checksums_are_right(outcome.frame)


def test_a_keep_alive_probe_passes(c: Conversation) -> None:
    outcome = c.client("A", c.at(-1), S, b"\0")
    assert str(outcome) == "container" and outcome.packet[IP].len == 40


def test_a_cut_super_packet_keeps_a_right_checksum(c: Conversation) -> None:
    """Its checksum field holds the pseudo header's sum, to be completed by hardware."""
    c.b.reset()
    head = b"GET /" + b"x" * 1395
    c.handshake()
    c.commit(len(head), window=(c.start, c.at(len(head))))
    c.server("A", S, c.at(len(head)))
    frame = inbound(tcp(1000, 80, "A", c.start, S) / head)
    outcome = c.b.from_network(frame, gso(54, 700))
    assert str(outcome) == "container" and len(outcome.frame) == 54


# -- the record (R5) -------------------------------------------------------------------------------------

RETRANSMISSIONS = [
    ("whole", 0, HEAD, "forward"),
    ("its beginning", 0, HEAD[:10], "forward"),
    ("its middle", 7, HEAD[7:20], "forward"),
    ("its last byte", END - 1, HEAD[-1:], "forward"),
    ("another first byte", 0, b"P" + HEAD[1:], "punt MISMATCH"),
    ("another last byte", 0, HEAD[:-1] + b"!", "punt MISMATCH"),
    ("another byte in a piece", 7, b"!" + HEAD[8:20], "punt MISMATCH"),
    ("one byte, another", END - 1, b"!", "punt MISMATCH"),
    ("a byte too early", 0, HEAD[1:], "punt MISMATCH"),
    ("beginning below what is acknowledged", -3, b"abc" + HEAD, "punt PAYLOAD"),
    ("beyond the boundary", 0, HEAD + b"!", "punt PAYLOAD"),
]


@on_every_kind
@pytest.mark.parametrize(
    ("at", "data", "expected"), [row[1:] for row in RETRANSMISSIONS], ids=[row[0] for row in RETRANSMISSIONS]
)
def test_retransmission(c: Conversation, at: int, data: bytes, expected: str) -> None:
    c.allow_head()
    outcome = c.client("PA", c.at(at), S, data)
    assert str(outcome) == (receiver(c) if expected == "forward" else expected)
    if expected == "forward":
        assert bytes(outcome.packet[TCP].payload) == data
    assert c.half.next == c.at(END)


def test_a_record_as_long_as_a_segment(c: Conversation) -> None:
    head = bytes(range(256)) * 5 + bytes(RECORD_MAX - 1280)
    c.allow_head(head)
    assert str(c.client("PA", c.start, S, head)) == "container"
    assert str(c.client("PA", c.start, S, head[:-1] + b"!")) == "punt MISMATCH"
    assert str(c.client("PA", c.at(RECORD_MAX - 1), S, head[-1:])) == "container"


def test_without_a_record_python_compares(c: Conversation) -> None:
    c.commit(END)
    assert str(c.client("PA", c.start, S, HEAD)) == "punt PAYLOAD"


def test_a_record_that_lies_elsewhere(c: Conversation) -> None:
    c.commit(END + 10, record=(c.at(10), HEAD))
    assert str(c.client("PA", c.start, S, HEAD)) == "punt PAYLOAD"
    assert str(c.client("PA", c.at(10), S, HEAD)) == "container"


def test_partly_acknowledged(c: Conversation) -> None:
    """Bytes below the acknowledged number go no further; those above it must be equal. Python cuts."""
    c.allow_head()
    c.server("A", S, c.at(5))
    assert str(c.client("PA", c.start, S, b"XXXXX" + HEAD[5:])) == "punt PAYLOAD"
    assert str(c.client("PA", c.at(5), S, HEAD[5:])) == "container"
    assert str(c.client("PA", c.at(5), S, b"!" + HEAD[6:])) == "punt MISMATCH"


def test_another_message_takes_the_records_place(c: Conversation) -> None:
    """Else its bytes would match again once the numbers have come round."""
    c.allow_head()
    assert c.commit(END + 2000)  # a head longer than a record
    assert c.half.record == b""
    assert str(c.client("PA", c.start, S, HEAD)) == "punt PAYLOAD"


def test_held_bytes_take_the_place_of_a_record_that_is_acknowledged(c: Conversation) -> None:
    c.allow_head()
    assert c.commit(END, record=(c.at(END), b"GET"))
    assert (c.half.record_seq, c.half.record) == (c.start, HEAD), "still in use"
    c.server("A", S, c.at(END))
    assert c.commit(END, record=(c.at(END), b"GET"))
    assert (c.half.record_seq, c.half.record) == (c.at(END), b"GET")
    assert str(c.client("PA", c.at(END), S, b"GET")) == "punt PAYLOAD", "held, not let through"
    c.commit(END + 3)
    assert c.half.record == b""


def test_asking_whether_the_flow_is_still_the_same_changes_nothing(c: Conversation) -> None:
    c.allow_head()
    before = c.flow
    assert c.commit(END)
    assert replace(c.flow, last_seen=0) == replace(before, last_seen=0)


def test_the_boundary_goes_forward_and_not_too_far(c: Conversation) -> None:
    c.allow_head()
    assert c.commit(END - 1).outcome is Outcome.STALE
    assert c.commit(END + 2**31 - 1).outcome is Outcome.STALE


# -- pass windows (R5, R8) -------------------------------------------------------------------------------

WINDOW = [
    ("all of it", 0, 100, "forward"),
    ("its beginning", 0, 1, "forward"),
    ("its end", 99, 1, "forward"),
    ("a byte too many", 50, 51, "punt PAYLOAD"),
    ("behind it", 100, 1, "punt PAYLOAD"),
    ("far behind it", 2**31 - 200, 1, "punt PAYLOAD"),
]


@on_every_kind
@pytest.mark.parametrize(
    ("at", "length", "expected"), [row[1:] for row in WINDOW], ids=[row[0] for row in WINDOW]
)
def test_pass_window(c: Conversation, at: int, length: int, expected: str) -> None:
    assert c.commit(END + 100, record=(c.start, HEAD), window=(c.at(END), c.at(END + 100)))
    outcome = c.client("PA", c.at(END + at), S, b"b" * length)
    assert str(outcome) == (receiver(c) if expected == "forward" else expected)


def test_a_window_that_wraps(b: Bench) -> None:
    c = Conversation(b, isn=0xFFFFFFFF - 51).handshake()
    assert c.commit(100, window=(c.start, c.at(100)))
    for at, length in ((0, 100), (40, 20), (52, 48)):
        assert str(c.client("PA", c.at(at), S, b"b" * length)) == "container"
    assert str(c.client("PA", c.at(52), S, b"b" * 49)) == "punt PAYLOAD"
    assert c.half.next == 49


def test_a_super_packet_inside_a_window(b: Bench) -> None:
    c = Conversation(b).handshake()
    assert c.commit(9000, window=(c.start, c.at(9000)))
    frame = bytes(inbound(tcp(1000, 80, "A", c.start, S) / (b"x" * 9000)))
    outcome = b.from_network(frame, gso(54, 1448))
    assert (str(outcome), len(outcome.frame)) == ("container", len(frame))


def test_a_window_ends_where_something_else_begins(c: Conversation) -> None:
    """Half in the window, half in the record: neither covers it, so Python compares."""
    assert c.commit(END + 10, record=(c.start, HEAD), window=(c.at(END), c.at(END + 10)))
    assert str(c.client("PA", c.at(END - 1), S, HEAD[-1:] + b"b")) == "punt PAYLOAD"


def test_four_windows_are_kept(c: Conversation) -> None:
    for number in range(5):
        assert c.commit(10 * (number + 1), window=(c.at(10 * number), c.at(10 * number + 10)))
    assert c.half.windows == tuple((c.at(10 * n), c.at(10 * n + 10)) for n in range(1, 5))
    assert str(c.client("PA", c.at(10), S, b"b" * 10)) == "container"
    assert str(c.client("PA", c.start, S, b"b" * 10)) == "punt PAYLOAD"


def test_a_window_of_more_than_a_gibibyte(c: Conversation) -> None:
    with pytest.raises(ValueError, match="window"):
        c.commit(END, window=(c.start, c.at(WINDOW_BYTES_MAX + 1)))


def test_a_window_beyond_the_boundary_passes_nothing_yet(c: Conversation) -> None:
    """It is granted together with the boundary; until then new payload is Python's."""
    assert c.commit(0, window=(c.start, c.at(100)))
    assert str(c.client("PA", c.start, S, b"b" * 10)) == "punt PAYLOAD"


# -- new incarnations, resets, ends (R9) -----------------------------------------------------------------


def test_a_syn_on_a_live_connection_changes_nothing_yet(c: Conversation) -> None:
    c.allow_head()
    before = c.flow
    assert str(c.client("S", 90000)) == "container"
    assert c.flow.pending and c.flow.live and c.flow.half == before.half
    assert str(c.server("A", S, c.start)) == "network"  # the challenge ACK, RFC 5961 section 4
    assert str(c.client("PA", c.start, S, HEAD)) == "container"
    assert str(c.client("PA", 90001, S, HEAD)) == "punt PAYLOAD"
    assert c.half.next == c.at(END)


def test_a_syn_ack_for_another_syn(c: Conversation) -> None:
    before = c.flow
    c.client("S", 90000)
    c.server("SA", 70000, 80001)
    assert c.flow.half == before.half and c.flow.incarnation == before.incarnation


def test_a_syn_ack_that_nobody_asked_for(c: Conversation) -> None:
    before = c.flow
    c.server("SA", 70000, c.start)
    assert c.flow.half == before.half and c.flow.incarnation == before.incarnation


def test_the_syn_ack_begins_a_new_incarnation(c: Conversation) -> None:
    c.commit(END, record=(c.start, HEAD), window=(c.at(END), c.at(END + 10)))
    before = c.flow.incarnation
    c.client("S", 90000)
    assert str(c.server("SA", 70000, 90001)) == "network"
    half = c.half
    assert (c.flow.incarnation, c.flow.live, c.flow.pending) == ((before + 1) & 0xFFFFFFFF, True, False)
    assert (half.next, half.acked, half.record, half.windows) == (90001, 90001, b"", ())
    assert c.commit(END, incarnation=before).outcome is Outcome.STALE


def test_a_repeated_syn_begins_nothing(c: Conversation) -> None:
    """Its answer must not move the boundary back over bytes that the server may have by now: what Python would
    inspect there again, the server would not read again.
    """
    c.allow_head()
    before = c.flow
    assert str(c.client("S", c.isn)) == "container"
    assert str(c.server("SA", SERVER_ISN, c.start)) == "network"
    assert c.flow.half == before.half and c.flow.incarnation == before.incarnation


def test_the_same_ports_again_after_bytes_that_nobody_acknowledged(c: Conversation) -> None:
    """Whoever answers another SYN has no connection any more."""
    c.allow_head()
    c.server("R", S)
    c.client("S", 90000)
    assert str(c.server("SA", 70000, 90001)) == "network"
    assert c.half.next == c.half.acked == 90001


def test_syn_with_payload(c: Conversation) -> None:
    assert str(c.client("S", 90000, 0, b"GET")) == "drop SYN_PAYLOAD"
    assert not c.flow.pending


@pytest.mark.parametrize(("flags", "reason"), [("SF", "TCP_FLAGS"), ("SR", "TCP_FLAGS"), ("SA", "TCP_STATE")])
def test_odd_syns(c: Conversation, flags: str, reason: str) -> None:
    assert str(c.client(flags, 90000)) == f"drop {reason}"


def test_the_server_sends_no_syn(c: Conversation) -> None:
    assert str(c.server("S", 90000)) == "drop TCP_STATE"


def test_a_reset_stops_new_payload_alone(c: Conversation) -> None:
    c.allow_head()
    assert str(c.client("R", c.at(END))) == "container"
    assert c.half.flags == HALF_RST and c.half.record == HEAD
    assert str(c.client("PA", c.at(END), S, b"GET /secret")) == "drop TCP_STATE"
    assert str(c.client("PA", c.start, S, HEAD)) == "container"


def test_a_reset_that_the_server_would_not_believe(c: Conversation) -> None:
    for seq in (c.at(-1), c.at(1), c.at(2**31 - 1)):
        c.client("R", seq)
        assert c.half.flags == 0
    assert str(c.client("RA", c.start, S, b"why")) == "drop TCP_FLAGS"


def test_a_fin_stops_new_payload(c: Conversation) -> None:
    c.allow_head()
    assert str(c.client("FA", c.at(END), S)) == "container"
    assert c.half.flags == HALF_FIN
    assert str(c.client("PA", c.at(END), S, b"GET /secret")) == "drop TCP_STATE"
    assert str(c.client("FA", c.at(END), S)) == "container"
    c.server("A", S, c.at(END + 1))
    assert c.half.acked == c.at(END)


def test_a_fin_behind_what_python_holds(c: Conversation) -> None:
    assert str(c.client("FA", c.at(END), S)) == "punt PAYLOAD"
    assert c.half.flags == 0


@pytest.mark.parametrize(("at", "data"), [(10, b""), (0, HEAD[:10])], ids=["alone", "with payload"])
def test_a_fin_inside_the_record_truncates_nothing(c: Conversation, at: int, data: bytes) -> None:
    """The server would take the message for ended there: not what was inspected."""
    c.allow_head()
    assert c.client("FA", c.at(at), S, data).where in ("punt", "drop")


def test_a_window_is_gone_once_it_is_acknowledged(c: Conversation) -> None:
    """Else it would pass whatever stands at the same numbers 4 GiB later."""
    step, at = 1 << 30, 0
    for _ in range(4):
        assert c.commit(at + step, window=(c.at(at), c.at(at + step)))
        at += step
        c.server("A", S, c.at(at))
    assert c.commit(at + END, record=(c.at(at), HEAD))
    assert c.half.windows == ()
    assert str(c.client("PA", c.at(at), S, b"GET /secret")) == "punt MISMATCH"


def test_nothing_overtakes_what_python_holds(c: Conversation) -> None:
    assert c.commit(END + 100, record=(c.start, HEAD), window=(c.at(END), c.at(END + 100)), gate=True)
    assert str(c.client("PA", c.at(END), S, b"b" * 50)) == "punt PAYLOAD"
    c.b.agent(up=False)
    assert str(c.client("PA", c.at(END), S, b"b" * 50)) == "container"  # nobody is left to keep the order
    c.b.agent(up=True)
    assert c.b.datapath.commands.open_gate(c.key, c.direction, c.flow.incarnation)
    assert str(c.client("PA", c.at(END + 50), S, b"b" * 50)) == "container"


def test_a_fin_inside_a_window(c: Conversation) -> None:
    """A body that nobody reads may end early: an upload that is given up, a half-closed tunnel."""
    assert c.commit(END + 1000, record=(c.start, HEAD), window=(c.at(END), c.at(END + 1000)))
    assert str(c.client("FA", c.at(END + 10), S)) == "container"
    assert c.half.flags == HALF_FIN
    assert str(c.client("PA", c.at(END + 1000), S, HEAD)) == "drop TCP_STATE"


def test_a_fin_that_python_sends(c: Conversation) -> None:
    assert c.commit(END, record=(c.start, HEAD), fin=True)
    assert c.half.flags == HALF_FIN
    c.server("A", S, c.at(END + 1))
    assert c.half.acked == c.at(END)


@pytest.mark.parametrize("flags", ["FA", "R", "RA", "FPA"])
def test_what_no_receiver_believes_ends_nothing(c: Conversation, flags: str) -> None:
    c.allow_head()
    data = HEAD if "P" in flags else b""
    forged = tcp(1000, 80, flags, c.at(END - len(data)), S, chksum=0xBEEF) / data
    assert str(c.b.from_network(inbound(forged))) == "drop BAD_CHECKSUM"
    forged = tcp(80, 1000, flags, S, c.at(END), chksum=0xBEEF) / data
    assert str(c.b.from_container(outbound(forged))) == "drop BAD_CHECKSUM"
    assert c.half.flags == c.flow.server.flags == 0
    assert str(c.client(flags, c.at(END - len(data)), S, data)) == "container"
    assert c.half.flags == (HALF_RST if "R" in flags else HALF_FIN)


# -- the answers -----------------------------------------------------------------------------------------


def test_the_answers_beginning_is_kept(c: Conversation) -> None:
    c.allow_head()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    assert str(c.server("PA", S, c.at(END), answer)) == "network"
    assert c.flow.server.record == answer and c.flow.server.next == S + len(answer)
    assert str(c.server("PA", S + len(answer), c.at(END), b"hello")) == "network"
    assert c.flow.server.record == answer and c.flow.server.next == S + len(answer) + 5
    assert c.commit(END + 1, mark=True)
    assert (c.flow.server.record, c.flow.server.record_seq) == (b"", S + len(answer) + 5)


def test_python_follows_the_answers(c: Conversation) -> None:
    assert c.own(Owner.PYTHON, server=True)
    assert str(c.server("PA", S, c.start, b"HTTP/1.1 101")) == "punt REVERSE"


# -- a denied flow (R10) ---------------------------------------------------------------------------------


def test_a_closed_flow(c: Conversation) -> None:
    c.client("PA", c.start, S, HEAD)
    assert c.own(Owner.CLOSED) and c.own(Owner.CLOSED, server=True)
    assert str(c.client("PA", c.start, S, HEAD)) == "punt CLOSED"
    assert str(c.client("R", c.start)) == "punt CLOSED"
    assert str(c.server("R", S)) == "drop FLOW_CLOSED"
    assert str(c.server("PA", S, c.start, b"HTTP/1.1 200 OK")) == "drop FLOW_CLOSED"
    c.b.agent(up=False)
    assert str(c.client("PA", c.start, S, HEAD)) == "drop FLOW_CLOSED"
