"""The end of a flow as transcripts: denials behind earlier answers, and resets."""

from __future__ import annotations

import pytest

from isolator.core.commands import Command, Drop, Forward, Own, Send
from isolator.core.flow import State
from isolator.core.model import Direction, Owner, PuntReason
from parsers.packet import ACK, FIN, RST
from tests.core.transcript import (
    DENIED,
    GET,
    OK,
    SERVER,
    START,
    Conversation,
    Half,
    kinds,
    payload_of,
    segment_of,
)

CLOSED = PuntReason.CLOSED
NOT_HTTP = b"\x16\x03\x01\x02\x00"


@pytest.fixture
def talk() -> Conversation:
    return Conversation()


def sends(commands: list[Command], direction: Direction) -> list[Send]:
    return [command for command in commands if isinstance(command, Send) and command.direction is direction]


def to_server(commands: list[Command]) -> list[Send]:
    return sends(commands, Direction.INGRESS)


def to_client(commands: list[Command]) -> list[Send]:
    return sends(commands, Direction.EGRESS)


def test_a_denied_request_is_answered_and_the_server_reset(talk: Conversation) -> None:
    commands = talk.client(0, DENIED)
    assert kinds(commands) == ["Own", "Own", "Report", "Read"]
    answer, own, reset = talk.resume()
    assert isinstance(own, Own) and own.owner is Owner.CLOSED
    assert payload_of(answer).startswith(b"HTTP/1.1 403 ") and b"api-allow" in payload_of(answer)
    assert to_server([reset]) and segment_of(reset).flags & RST
    (again,) = talk.wake(2.0)
    assert payload_of(again) == payload_of(answer)
    end = SERVER + len(payload_of(answer)) + 1
    assert talk.client(len(DENIED), b"", ack=end, why=CLOSED) == []
    assert kinds(talk.wake(60.0)) == ["Delete"]


def drain(talk: Conversation) -> None:
    """A denied request right behind an allowed one that is not answered yet."""
    commands = talk.client(0, GET + DENIED)
    assert kinds(commands) == ["Commit", "Send", "Report", "Own", "Own", "Report", "Read"]
    assert payload_of(commands[1]) == GET
    assert talk.resume() == []


def test_a_denial_waits_for_the_answer_before_it(talk: Conversation) -> None:
    drain(talk)
    assert kinds(talk.server(0, OK[:30])) == ["Forward"]
    forward, answer = talk.server(30, OK[30:])
    assert isinstance(forward, Forward) and segment_of(answer).seq == SERVER + len(OK)


def test_the_server_is_reset_only_once_the_client_has_its_answer(talk: Conversation) -> None:
    """A lost segment of it has to be sent again, and by the server."""
    drain(talk)
    talk.server(0, OK)
    assert kinds(talk.server(0, OK)) == ["Forward"]
    passed = to_server(talk.client(len(GET + DENIED), b"", ack=SERVER + 10, why=CLOSED))
    assert [segment_of(ack).ack for ack in passed] == [SERVER + 10]
    assert kinds(talk.server(len(OK), b"HTTP/1.1 200 more")) == ["Drop"]
    own, *ends = talk.client(len(GET + DENIED), b"", ack=SERVER + len(OK), why=CLOSED)
    assert isinstance(own, Own) and own.owner is Owner.CLOSED
    assert ends and all(segment_of(reset).flags & RST for reset in to_server(ends))
    assert kinds(talk.server(0, OK)) == ["Drop"]


def test_what_was_allowed_still_reaches_the_server(talk: Conversation) -> None:
    """A lost copy, or the rest of a body that was granted: without it the earlier answer would never come."""
    drain(talk)
    (again,) = to_server(talk.client(0, GET, why=CLOSED))
    assert payload_of(again) == GET
    (other,) = to_server(talk.client(0, GET.replace(b"/a", b"/b"), why=CLOSED))
    assert payload_of(other) == b""


def test_a_late_rest_of_a_granted_body_reaches_the_server(talk: Conversation) -> None:
    head = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\nContent-Length: 1000\r\n\r\n"
    talk.client(0, head)
    assert kinds(talk.client(len(head) + 500, b"x" * 500 + DENIED))[-1] == "Read"
    talk.pinned.client.acked = (START + len(head)) & 0xFFFFFFFF
    assert talk.resume() == []
    (late,) = to_server(talk.client(len(head), b"y" * 500, why=CLOSED))
    assert payload_of(late) == b"y" * 500


def test_a_message_that_is_refused_within_is_answered_at_once(talk: Conversation) -> None:
    """The server waits for its end: it will not answer it."""
    head = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n"
    talk.client(0, head + b"5\r\nhello\r\n")
    assert kinds(talk.client(len(head) + 10, b"zz\r\n"))[-1] == "Read"
    answer, *_ = talk.resume()
    assert b"HTTP/1.1 403" in payload_of(answer) and segment_of(answer).seq == SERVER


def test_more_than_the_answer_is_cut_off(talk: Conversation) -> None:
    drain(talk)
    cut, answer = talk.server(0, OK + b"HTTP/1.1 200 OK\r\n")
    assert payload_of(cut) == OK and segment_of(answer).seq == SERVER + len(OK)


def test_a_server_that_closes_behind_its_answer_is_answered_in_its_place(talk: Conversation) -> None:
    drain(talk)
    cut, answer = talk.server(0, OK, flags=ACK | FIN)
    assert payload_of(cut) == OK and not segment_of(cut).flags & FIN
    assert b" 403 " in payload_of(answer)


def test_a_server_that_closes_before_its_answer_is_complete_has_the_last_word(talk: Conversation) -> None:
    drain(talk)
    assert kinds(talk.server(0, OK[:30], flags=ACK | FIN)) == ["Forward"]
    assert talk.flow is not None and talk.flow.state is State.ENDING
    assert kinds(talk.server(0, OK[:30])) == ["Forward"]
    assert [
        segment_of(ack).ack for ack in talk.client(len(GET + DENIED), b"", ack=SERVER + 30, why=CLOSED)
    ] == [SERVER + 30]
    assert "Read" in kinds(talk.client(len(GET + DENIED), b"", ack=SERVER + 31, why=CLOSED))


def test_a_complete_answer_is_not_waited_for(talk: Conversation) -> None:
    talk.client(0, GET)
    talk.client(len(GET), DENIED, ack=SERVER + len(OK))
    talk.pinned.server = Half(SERVER + len(OK), SERVER, record_seq=SERVER, record=OK)
    talk.pinned.client.acked = (START + len(GET)) & 0xFFFFFFFF
    assert kinds(talk.resume()) == ["Send", "Own", "Send"]


@pytest.mark.parametrize("garbage", [NOT_HTTP, b"SSH-2.0-x\r\n", b"\x00\x00"])
def test_what_is_no_http_is_reset(talk: Conversation, garbage: bytes) -> None:
    assert kinds(talk.client(0, garbage)) == ["Own", "Own", "Report", "Read"]
    commands = talk.resume()
    assert [segment_of(c).seq for c in to_client(commands)] == [SERVER]
    assert [segment_of(c).seq for c in to_server(commands)] == [START]
    assert all(segment_of(command).flags & RST for command in commands)


def test_a_reset_stands_where_the_server_waits(talk: Conversation) -> None:
    """It may have less than was granted, and more than it said: then it tells, and is hit."""
    head = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\nContent-Length: 300000\r\n\r\n"
    talk.client(0, head + b"x")
    talk.client(0, b"X" + head[1:], why=PuntReason.MISMATCH)
    end = (START + len(head)) & 0xFFFFFFFF
    talk.pinned.client = Half((end + 300000) & 0xFFFFFFFF, end)
    seqs = [segment_of(c).seq for c in to_server(talk.resume())]
    assert seqs == [end, (end + 300000) & 0xFFFFFFFF]
    (reset,) = talk.server(0, b"", ack=(end + 77) & 0xFFFFFFFF)
    assert (segment_of(reset).seq, segment_of(reset).flags & RST) == ((end + 77) & 0xFFFFFFFF, RST)


def test_a_closed_flow_resets_a_bounded_number_of_times(talk: Conversation) -> None:
    talk.client(0, NOT_HTTP)
    talk.resume()
    seen = [talk.client(0, NOT_HTTP, why=CLOSED)[0] for _ in range(20)]
    assert isinstance(seen[0], Send) and segment_of(seen[0]).flags & RST
    assert isinstance(seen[-1], Drop)


def test_a_reset_of_the_client_ends_the_server_too(talk: Conversation) -> None:
    drain(talk)
    assert kinds(talk.client(5, b"", flags=RST, why=CLOSED)) == [
        "Drop"
    ]  # not where the server would believe it
    ends = talk.client(len(GET + DENIED), b"", flags=RST, why=CLOSED)
    assert to_server(ends) == ends != [] and all(segment_of(reset).flags & RST for reset in ends)


def test_a_flow_that_an_earlier_agent_closed_stays_closed(talk: Conversation) -> None:
    talk.pinned.client.owner = Owner.CLOSED
    (reset,) = talk.client(0, GET, why=CLOSED)
    assert to_client([reset]) and segment_of(reset).flags & RST
    assert kinds(talk.wake(60.0)) == ["Delete"]
