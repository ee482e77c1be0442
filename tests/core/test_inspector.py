"""The slow path as transcripts, as long as a flow is open."""

from __future__ import annotations

import pytest

from isolator.core.commands import Commit, Forward, Own, Read, Send
from isolator.core.inspector import Inspector
from isolator.core.model import Decision, Direction, DropReason, Owner, PuntReason, Verdict
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule, Outcome, Profile, Ruling
from parsers.packet import ACK, FIN, PSH
from tests.core.transcript import (
    DENIED,
    GET,
    RULE,
    START,
    Conversation,
    Pinned,
    kinds,
    payload_of,
    segment_of,
)


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


def test_a_body_is_granted_with_its_head_a_gibibyte_at_a_time(talk: Conversation) -> None:
    head = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\nContent-Length: 5000000000\r\n\r\n"
    commit = talk.client(0, head)[0]
    body = (START + len(head)) & 0xFFFFFFFF
    assert isinstance(commit, Commit) and commit.record == head
    assert commit.window == (body, (body + (1 << 30)) & 0xFFFFFFFF) and commit.next == commit.window[1]


def test_an_equal_retransmission_passes_and_a_different_one_ends_both_sides(talk: Conversation) -> None:
    talk.client(0, GET)
    assert kinds(talk.client(0, GET)) == [
        "Commit",
        "Forward",
    ]  # a Commit that moves nothing asks: still the same?
    assert kinds(talk.client(5, GET[5:9])) == ["Commit", "Forward"]
    ended = talk.client(0, GET.replace(b"/api/v1/a", b"/admin/zz"))
    assert kinds(ended) == ["Own", "Own", "Report", "Read"]
    assert [c.owner for c in ended if isinstance(c, Own)] == [Owner.CLOSED, Owner.PYTHON]


def test_a_retransmission_with_a_longer_tail_is_decided_for_its_tail(talk: Conversation) -> None:
    talk.client(0, GET)
    assert kinds(talk.client(0, GET + DENIED))[-4:] == ["Own", "Own", "Report", "Read"]


def test_what_the_kernel_finds_different_ends_both_sides(talk: Conversation) -> None:
    talk.client(0, GET)
    assert "Own" in kinds(talk.client(0, GET, why=PuntReason.MISMATCH))


def test_a_head_in_parts_is_held_acknowledged_and_sent_whole(talk: Conversation) -> None:
    assert talk.client(0, GET[:10]) == []
    assert kinds(talk.wake(2.0)) == ["Read"]
    pin, ack = talk.resume(2.0)
    assert isinstance(pin, Commit) and (pin.expect, pin.next, pin.record) == (START, START, GET[:10])
    assert isinstance(ack, Send) and ack.direction is Direction.EGRESS and payload_of(ack) == b""
    commit, send, _ = talk.client(10, GET[10:], now=2.0)
    assert isinstance(commit, Commit) and payload_of(send) == GET
    talk.pinned.client.acked = START
    (read,) = talk.wake(3.0)
    assert isinstance(read, Read)
    (again,) = talk.resume(3.0)  # the client believes it delivered: we deliver
    assert payload_of(again) == GET
    talk.pinned.client.acked = (START + len(GET)) & 0xFFFFFFFF
    talk.wake(9.0)
    assert talk.resume(9.0) == []


def test_what_an_agent_that_died_has_acknowledged_the_next_one_has(talk: Conversation) -> None:
    talk.pinned.client.record_seq, talk.pinned.client.record = START, GET[:10]
    commit, send, _ = talk.client(10, GET[10:])
    assert isinstance(commit, Commit) and commit.record == GET
    assert payload_of(send) == GET
    assert kinds(talk.wake(3.0)) == ["Read"]
    (again,) = talk.resume(3.0)
    assert payload_of(again) == GET


def test_a_record_that_is_in_use_makes_way_for_no_held_bytes(talk: Conversation) -> None:
    """What the server has not acknowledged may come again, and is compared with it."""
    talk.client(0, GET + GET[:10])
    talk.pinned.client.next = (START + len(GET)) & 0xFFFFFFFF
    assert kinds(talk.wake(2.0)) == ["Read"] and talk.resume(2.0) == []
    talk.pinned.client.acked = talk.pinned.client.next
    assert kinds(talk.wake(2.1)) == ["Read"]
    assert kinds(talk.resume(2.1)) == ["Commit", "Send"]


def test_held_bytes_go_to_the_server_when_its_container_is_let_go(talk: Conversation) -> None:
    talk.client(0, GET[:10])
    assert talk.inspector.release(1, 1.1) == [], "the client sends them again"
    talk.wake(2.5)
    assert kinds(talk.resume(2.5)) == ["Commit", "Send"]
    (handed,) = talk.inspector.release(1, 2.6)
    assert payload_of(handed) == GET[:10] and segment_of(handed).seq == START
    assert talk.inspector.release(2, 2.6) == []


def test_nothing_is_acknowledged_while_its_container_is_let_go(talk: Conversation) -> None:
    talk.client(0, GET[:10])
    talk.inspector.release(1, 1.9)
    talk.wake(2.0)
    assert talk.resume(2.0) == []
    talk.inspector.forget_endpoint(1)
    talk.flow = None
    talk.client(0, GET[:10], now=2.1)
    talk.wake(2.2)
    assert kinds(talk.resume(2.2)) == ["Commit", "Send"]


def test_parts_out_of_order_wait_for_the_first(talk: Conversation) -> None:
    assert talk.client(10, GET[10:]) == []
    commit, send, _ = talk.client(0, GET[:10])
    assert isinstance(commit, Commit) and payload_of(send) == GET


def test_a_different_copy_of_held_bytes_ends_both_sides(talk: Conversation) -> None:
    talk.client(0, GET[:12])
    assert kinds(talk.client(4, b"/admin/xx"))[:2] == ["Own", "Own"]


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
    talk.inspector.prepare_policy({1: Profile(1, Outcome(nothing, nothing, False))}, 8)
    assert talk.inspector.find(3, flow.wire[0][1], 1) is None  # its pinned state has to be read again
    talk.pinned.generation = 8
    talk.pinned.client.next = (START + len(GET)) & 0xFFFFFFFF
    assert talk.inspector.adopt(flow.key, 3, flow.wire[0][1], talk.pinned) is flow
    assert "Read" in kinds(talk.client(len(GET), GET))


def test_a_policy_that_the_kernel_did_not_take_is_forgotten(talk: Conversation) -> None:
    talk.client(0, GET)
    assert talk.flow is not None
    talk.inspector.prepare_policy({}, 8)
    talk.inspector.discard_policy(8)
    assert talk.inspector.find(3, talk.flow.wire[0][1], 1) is talk.flow
    talk.inspector.prepare_policy({}, 9)
    talk.inspector.policy_in_force(9)
    assert (
        talk.inspector.adopt(talk.flow.key, 3, talk.flow.wire[0][1], talk.pinned) is not None
    )  # punted before


# -- who it was that spoke -----------------------------------------------------------------------------------


def test_another_connection_on_the_same_ports_inherits_nothing(talk: Conversation) -> None:
    """Also where the kernel's number for it is the same, as after an endpoint came back."""
    talk.client(0, GET)
    old = talk.flow
    assert old is not None
    talk.pinned = Pinned()
    new = talk.inspector.adopt(old.key, 3, old.wire[0][1], talk.pinned)
    assert new is not old and new is not None and new.next == START and len(talk.inspector.flows) == 1


def test_an_endpoint_that_is_no_more_leaves_no_flow(talk: Conversation) -> None:
    talk.client(0, GET[:10])
    talk.inspector.forget_endpoint(2)
    assert len(talk.inspector.flows) == 1
    talk.inspector.forget_endpoint(1)
    assert len(talk.inspector.flows) == 0 and not talk.inspector.waiting


def test_a_flow_is_forgotten_by_its_own_number_alone(talk: Conversation) -> None:
    talk.client(0, GET)
    assert talk.flow is not None
    talk.inspector.forget_flow(talk.flow.key, 2)
    assert len(talk.inspector.flows) == 1
    talk.inspector.forget_flow(talk.flow.key, 1)
    assert len(talk.inspector.flows) == 0


# -- what was acknowledged -----------------------------------------------------------------------------------


def test_bytes_that_were_acknowledged_go_no_further_whatever_they_are(talk: Conversation) -> None:
    talk.client(0, GET)
    talk.inspector.acknowledged(talk.flow.key, 1, (START + 10) & 0xFFFFFFFF)  # type: ignore[union-attr]
    _, send = talk.client(0, b"X" * 10 + GET[10:])
    assert payload_of(send) == GET[10:] and segment_of(send).seq == (START + 10) & 0xFFFFFFFF
    same, old, commit, new, _ = talk.client(0, b"X" * 10 + GET[10:] + GET)
    assert isinstance(same, Commit) and payload_of(old) == GET[10:]
    assert isinstance(commit, Commit) and payload_of(new) == GET


def test_the_rest_of_a_body_and_the_next_head_in_one_segment(talk: Conversation) -> None:
    head = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\nContent-Length: 10\r\n\r\n"
    talk.client(0, head + b"01234")
    same, old, commit, new, _ = talk.client(len(head) + 5, b"56789" + GET)
    assert isinstance(same, Commit) and payload_of(old) == b"56789"
    assert isinstance(commit, Commit) and payload_of(new) == GET
    *_, denied = talk.client(len(head) + 10 + len(GET) - 5, GET[-5:] + DENIED)
    assert isinstance(denied, Read)


def test_what_is_acknowledged_is_let_go(talk: Conversation) -> None:
    talk.client(0, GET)
    flow = talk.flow
    assert flow is not None and len(flow.record) == len(GET)
    talk.inspector.acknowledged(flow.key, 2, (START + len(GET)) & 0xFFFFFFFF)
    assert len(flow.record) == len(GET)
    talk.inspector.acknowledged(flow.key, 1, (START + len(GET)) & 0xFFFFFFFF)
    assert len(flow.record) == 0


# -- bounds --------------------------------------------------------------------------------------------------


def test_a_message_that_fits_no_packet_is_sent_in_several(talk: Conversation) -> None:
    head = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\nContent-Length: 70000\r\n\r\n"
    data = head + b"x" * (65536 - len(head))
    for at in range(1, len(data), 2048):
        assert talk.client(at, data[at : at + 2048]) == []
    commit, *sends = talk.client(0, data[:1])
    assert isinstance(commit, Commit)
    assert b"".join(payload_of(send) for send in sends if isinstance(send, Send)) == data


def test_many_small_pieces_behind_a_hole_are_refused(talk: Conversation) -> None:
    dropped = [talk.client(at, b"x") for at in range(1, 200, 2)]
    assert dropped[0] == [] and kinds(dropped[-1]) == ["Drop"]
    assert sum(not commands for commands in dropped) == 64


def test_a_body_of_tiny_chunks_is_read_a_part_at_a_time(talk: Conversation) -> None:
    head = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = head + b"1\r\nx\r\n" * 3000
    sent = [c for c in talk.client(0, data) if isinstance(c, Send)]
    while talk.inspector.waiting:
        sent += [c for c in talk.wake(1.1) if isinstance(c, Send)]
    assert len(sent) > 1 and b"".join(map(payload_of, sent)) == data


def test_requests_that_nobody_answers_are_not_kept_for_ever(talk: Conversation) -> None:
    at = 0
    for _ in range(1100):
        talk.client(at, GET)
        at += len(GET)
        talk.inspector.acknowledged(talk.flow.key, 1, (START + at) & 0xFFFFFFFF)  # type: ignore[union-attr]
    assert talk.flow is not None and talk.flow.unanswered is not None and len(talk.flow.unanswered) < 200


def test_a_lost_acknowledgement_is_given_again(talk: Conversation) -> None:
    """Else Nagle's algorithm would hold the head's rest back for ever."""
    assert talk.client(0, GET[:10]) == []
    talk.wake(2.0)
    _, ack = talk.resume(2.0)
    (again,) = talk.client(0, GET[:10], now=2.3)
    assert segment_of(again).ack == segment_of(ack).ack == (START + 10) & 0xFFFFFFFF


def test_nobody_vouches_for_bytes_that_never_came(talk: Conversation) -> None:
    """A body is granted before it is there: half a head behind it must not acknowledge the hole in it."""
    head = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\nContent-Length: 1000\r\n\r\n"
    talk.client(0, head)
    assert talk.client(len(head) + 500, b"x" * 500 + GET[:10])[-1:] != []
    (read,) = talk.wake(2.0)
    assert isinstance(read, Read)
    talk.pinned.client.acked = (START + len(head)) & 0xFFFFFFFF
    assert talk.resume(2.0) == [] and kinds(talk.wake(3.0)) == ["Read"]
    talk.pinned.client.acked = (START + len(head) + 1000) & 0xFFFFFFFF
    _, ack = talk.resume(3.0)
    assert segment_of(ack).ack == (START + len(head) + 1010) & 0xFFFFFFFF


def test_bytes_behind_a_hole_are_not_kept_for_ever(talk: Conversation) -> None:
    assert talk.client(100, b"x") == []
    commands, now = [], 1.0
    while talk.inspector.waiting and now < 200 and not commands:
        now += 5
        commands = talk.wake(now)
    assert kinds(commands) == ["Own", "Own", "Report", "Read"]


# -- ends ----------------------------------------------------------------------------------------------------


def test_a_fin_goes_with_the_bytes_before_it(talk: Conversation) -> None:
    commit, send, _ = talk.client(0, GET, flags=ACK | PSH | FIN)
    assert isinstance(commit, Commit) and commit.fin
    assert payload_of(send) == GET and segment_of(send).flags & FIN
    same, again = talk.client(len(GET), b"", flags=ACK | FIN)
    assert isinstance(same, Commit) and same.fin and segment_of(again).flags & FIN


def test_a_fin_that_would_cut_what_was_read_goes_nowhere(talk: Conversation) -> None:
    talk.client(0, GET)
    assert kinds(talk.client(0, GET[:10], flags=ACK | FIN)) == ["Drop"]


def test_a_fin_inside_a_body_that_nobody_reads(talk: Conversation) -> None:
    head = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\nContent-Length: 1000\r\n\r\n"
    talk.client(0, head + b"x" * 10)
    same, fin = talk.client(len(head) + 10, b"", flags=ACK | FIN)
    assert isinstance(same, Commit) and same.fin and segment_of(fin).flags & FIN


def test_a_monitored_request_is_not_counted_as_allowed(talk: Conversation) -> None:
    line = HttpRule(frozenset({"GET"}), PathPattern("/api/v1/**"))
    trial = Ruling(Decision(Verdict.INSPECT, rule=RULE), allows=((line, Decision(Verdict.ALLOW, rule=RULE)),))
    outcome = Outcome(Ruling(Decision(Verdict.ALLOW)), trial, True)
    talk.inspector = Inspector({1: Profile(1, outcome)}, 7)
    assert kinds(talk.client(0, DENIED))[:2] == ["Commit", "Forward"]
    assert talk.inspector.take_counts() == {}
