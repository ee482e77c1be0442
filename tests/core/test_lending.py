"""A boundary that goes to and fro between Python and the kernel (R7): when it is lent, and what is known of it then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from isolator.core.commands import Command, Commit, Forward
from isolator.core.model import Direction, DropReason, Owner, PuntReason
from isolator.datapath.flow7 import Answer, Outcome
from isolator.datapath.forwarder import Forwarder
from parsers.packet import ACK, FIN, PSH, VNET
from tests.core.transcript import (
    CLIENT_FRAMES,
    DENIED,
    GET,
    OK,
    SERVER,
    START,
    Conversation,
    Half,
    Pinned,
    kinds,
    payload_of,
    segment_of,
)

HEAD = GET.replace(b"GET", b"HEAD")
POST = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\n"
END = len(GET)
_MASK = 0xFFFFFFFF


@pytest.fixture
def talk() -> Conversation:
    talk = Conversation()
    talk.pinned.automaton = 5
    return talk


def commits(commands: Sequence[Command]) -> list[Commit]:
    return [each for each in commands if isinstance(each, Commit)]


# -- when it is lent -----------------------------------------------------------------------------------------


def test_behind_a_plain_head_it_is_lent(talk: Conversation) -> None:
    assert [c.lend for c in commits(talk.client(0, GET))] == [True]
    assert [c.lend for c in commits(talk.client(END, GET, ack=SERVER + len(OK)))] == [True]


def test_nothing_is_lent_where_the_kernel_has_no_automaton(talk: Conversation) -> None:
    talk.pinned.automaton = 0
    assert [c.lend for c in commits(talk.client(0, GET))] == [False]


NOT_LENT = {
    "a body that has begun": POST + b"Content-Length: 10\r\n\r\n12345",
    "a body that is yet to come": POST + b"Content-Length: 10\r\n\r\n",
    "a chunk that has begun": POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
    "a chunk that is yet to come": POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "the beginning of the next head": GET + GET[:10],
    "a second head": GET + GET,
    "a head behind a body": POST + b"Content-Length: 1\r\n\r\nx" + GET,
}


@pytest.mark.parametrize("data", NOT_LENT.values(), ids=NOT_LENT.keys())
def test_python_still_has_something_to_do(talk: Conversation, data: bytes) -> None:
    made = commits(talk.client(0, data))
    assert made and not any(c.lend for c in made)


def test_behind_a_body_that_is_whole_it_is_lent(talk: Conversation) -> None:
    talk.client(0, POST + b"Transfer-Encoding: chunked\r\n\r\n")
    at = len(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    assert [c.lend for c in commits(talk.client(at, b"1\r\nx\r\n"))] == [False]
    assert [c.lend for c in commits(talk.client(at + 6, b"0\r\n\r\n"))] == [True]


def test_behind_a_fin_nothing_is_lent(talk: Conversation) -> None:
    assert [c.lend for c in commits(talk.client(0, GET, flags=ACK | PSH | FIN))] == [False]


@pytest.mark.parametrize("at", [END, 2 * END])
def test_nor_in_front_of_one_that_came_early(talk: Conversation, at: int) -> None:
    talk.client(at, b"", flags=ACK | FIN)
    assert [c.lend for c in commits(talk.client(0, GET))] == [False]


def test_nor_in_front_of_bytes_that_wait_behind_a_hole(talk: Conversation) -> None:
    talk.client(END + 5, GET[5:])
    assert [c.lend for c in commits(talk.client(0, GET))] == [False]
    assert [c.lend for c in commits(talk.client(END, GET[:5]))] == [False]  # two requests, neither answered


def test_nor_while_held_bytes_are_promised_and_not_delivered(talk: Conversation) -> None:
    """The client need not send them again: only Python has them."""
    talk.client(0, GET[:10])
    assert kinds(talk.wake(1.1)) == ["Read"]
    assert kinds(talk.resume(1.1)) == ["Commit", "Send"]
    assert [c.lend for c in commits(talk.client(10, GET[10:]))] == [False]
    talk.pinned.client.acked = (START + END) & _MASK
    assert kinds(talk.wake(2.0)) == ["Read"] and talk.resume(2.0) == []
    assert [c.lend for c in commits(talk.client(END, GET, ack=SERVER + len(OK)))] == [True]


def test_requests_that_were_not_answered_in_between_are_pythons(talk: Conversation) -> None:
    assert [c.lend for c in commits(talk.client(0, GET))] == [True]
    assert [(c.lend, c.mark) for c in commits(talk.client(END, GET))] == [(False, False)]
    answered = talk.client(2 * END, GET, ack=SERVER + 2 * len(OK))
    assert [(c.lend, c.mark) for c in commits(answered)] == [(True, True)]


def test_what_asks_whether_the_flow_is_still_the_same_lends_nothing(talk: Conversation) -> None:
    """What lies at the boundary may be on its way through Python."""
    talk.client(0, GET)
    assert [c.lend for c in commits(talk.client(0, GET))] == [False]


# -- what the kernel accepted --------------------------------------------------------------------------------


def method(head: bytes) -> str:
    return head.partition(b" ")[0].decode()


def taken(talk: Conversation, head: bytes = GET, answer: bytes = b"", alone: bool = True) -> int:
    """The kernel has accepted `head`, and the server's half has come this far. Where the boundary stands."""
    end = (START + len(head)) & _MASK
    talk.pinned.client = Half(
        end, START, record_seq=START, record=head, alone=method(head) if alone else None
    )
    talk.pinned.server = Half(SERVER + len(answer), SERVER, record_seq=SERVER, record=answer)
    return len(head)


def test_a_denial_waits_for_the_answer_to_what_the_kernel_accepted(talk: Conversation) -> None:
    end = taken(talk)
    assert kinds(talk.client(end, DENIED)) == ["Own", "Own", "Report", "Read"]
    assert talk.resume() == []
    forward, denial = talk.server(0, OK)
    assert isinstance(forward, Forward)
    assert segment_of(denial).seq == SERVER + len(OK) and b"HTTP/1.1 403" in payload_of(denial)


def test_and_stands_right_behind_one_that_has_passed(talk: Conversation) -> None:
    talk.client(taken(talk, answer=OK), DENIED, ack=SERVER + len(OK))
    denial, *_ = talk.resume()
    assert segment_of(denial).seq == SERVER + len(OK)


def test_and_behind_one_that_is_on_its_way(talk: Conversation) -> None:
    talk.client(taken(talk, answer=OK[:-3]), DENIED, ack=SERVER)
    assert talk.resume() == []
    _, denial = talk.server(len(OK) - 3, OK[-3:])
    assert segment_of(denial).seq == SERVER + len(OK)


def test_an_answer_to_head_ends_with_its_fields(talk: Conversation) -> None:
    """Its length is the one that GET's answer would have."""
    fields = OK[: -len(b"hello")]
    talk.client(taken(talk, HEAD, answer=fields), DENIED, ack=SERVER + len(fields))
    denial, *_ = talk.resume()
    assert segment_of(denial).seq == SERVER + len(fields)


def test_the_answers_to_both_come_first(talk: Conversation) -> None:
    """The kernel accepted one, Python the next before the client had seen an answer."""
    end = taken(talk)
    (commit,) = commits(talk.client(end, GET))
    assert (commit.mark, commit.lend) == (False, False)
    talk.client(end + END, DENIED)
    talk.pinned.client = Half(
        (START + end + END) & _MASK, START, record_seq=(START + end) & _MASK, record=GET
    )
    assert talk.resume() == []
    assert kinds(talk.server(0, OK)) == ["Forward"]
    _, denial = talk.server(len(OK), OK)
    assert segment_of(denial).seq == SERVER + 2 * len(OK)


def test_the_next_answer_has_a_mark_of_its_own(talk: Conversation) -> None:
    end = taken(talk, answer=OK)
    (commit,) = commits(talk.client(end, GET, ack=SERVER + len(OK)))
    assert (commit.mark, commit.lend) == (True, True)


def test_an_equal_retransmission_of_what_the_kernel_accepted_passes(talk: Conversation) -> None:
    taken(talk)
    assert kinds(talk.client(0, GET)) == ["Commit", "Forward"]
    assert kinds(talk.client(0, GET.replace(b"/a", b"/b"))) == ["Own", "Own", "Report", "Read"]


# -- the forwarder takes it back -----------------------------------------------------------------------------


@dataclass
class Frame:
    vnet_packet: memoryview
    context: int
    time: int = 10**9

    @property
    def packet(self) -> memoryview:
        return self.vnet_packet[VNET:]


@dataclass
class Kernel:
    """One flow as the kernel has it: what it lends and takes, and what it is asked to send."""

    pinned: Pinned
    calls: list[str] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    takes: Outcome = Outcome.OK
    need_wakeup = False

    @property
    def commands(self) -> Kernel:
        return self

    control = commands

    def flow7(self, key: bytes) -> Pinned:
        self.calls.append("read")
        return replace(self.pinned, client=replace(self.pinned.client), server=replace(self.pinned.server))

    def _answer(self, outcome: Outcome) -> Answer:
        client, server = self.pinned.client, self.pinned.server
        return Answer(outcome, client.acked, server.next, len(server.record), client.next, client.owner)

    def commit(
        self, key: bytes, direction: Direction, incarnation: int, expect: int, following: int, *,
        record: tuple[int, bytes] | None = None, lend: bool = False, **_: object,
    ) -> Answer:  # fmt: skip
        client = self.pinned.client
        self.calls.append("lend" if lend else "commit")
        if client.next != expect or client.owner is not Owner.PYTHON:
            return self._answer(Outcome.STALE)
        client.next, client.owner = following, Owner.KERNEL if lend else Owner.PYTHON
        if following != expect and record is not None:
            (client.record_seq, client.record), client.alone = record, None
        return self._answer(Outcome.OK)

    def take(self, key: bytes, direction: Direction, incarnation: int) -> Answer:
        self.calls.append("take")
        if self.takes is Outcome.OK:
            self.pinned.client.owner = Owner.PYTHON
        return self._answer(self.takes)

    def own(self, key: bytes, direction: Direction, incarnation: int, owner: Owner) -> Answer:
        half = self.pinned.client if direction is self.pinned.initiator else self.pinned.server
        half.owner = owner
        return self._answer(Outcome.OK)

    def open_gate(self, key: bytes, direction: Direction, incarnation: int) -> Answer:
        return self._answer(Outcome.OK)

    def delete(self, key: bytes, incarnation: int) -> Answer:
        return self._answer(Outcome.OK)

    def send(self, ifindex: int, vnet_frame: bytes | memoryview) -> None:
        self.sent.append(bytes(vnet_frame))

    def accepts(self, head: bytes, answer: bytes = OK) -> None:
        """By itself, while Python looks elsewhere; the answer to what came before has passed."""
        client, server = self.pinned.client, self.pinned.server
        assert client.owner is Owner.KERNEL
        server.next += len(answer)
        server.record_seq, server.record = server.next, b""
        client.acked, client.record_seq, client.record = client.next, client.next, head
        client.alone = method(head)
        client.next = (client.next + len(head)) & _MASK


@dataclass
class Place:
    kernel: Kernel
    forwarder: Forwarder
    talk: Conversation

    def client(self, at: int, payload: bytes, ack: int = SERVER) -> list[bytes]:
        """A frame that was punted; the payloads that reached the server."""
        frame = CLIENT_FRAMES.build((START + at) & _MASK, ack, ACK | PSH, payload)
        self.kernel.sent.clear()
        self.kernel.calls.clear()
        if self.kernel.pinned.client.owner is Owner.KERNEL:
            self.kernel.pinned.client.owner = Owner.PYTHON  # hand_over
        self.forwarder.handle(Frame(memoryview(frame), 1 << 1 | 1 | PuntReason.PAYLOAD << 16 | 1 << 24))
        return [frame[VNET + 54 :] for frame in self.kernel.sent]


@pytest.fixture
def place(talk: Conversation) -> Place:
    kernel = Kernel(talk.pinned)
    ports = {1: (10, 11)}
    forwarder = Forwarder(kernel, None, None, kernel, talk.inspector, ports, lambda *_: None)  # type: ignore[arg-type]
    return Place(kernel, forwarder, talk)


def test_nobody_asks_the_kernel_for_what_is_pythons_anyway(place: Place) -> None:
    place.client(0, POST + b"Content-Length: 5\r\n\r\n")
    place.client(len(POST) + 21, b"hello")
    assert "take" not in place.kernel.calls


def test_one_that_was_lent_is_asked_for_and_goes_on_where_it_was(place: Place) -> None:
    assert place.client(0, GET) == [GET] and place.kernel.calls == ["read", "lend"]
    assert place.client(END, GET, SERVER + len(OK)) == [GET]
    assert place.kernel.calls == ["take", "lend"]


def test_where_the_kernel_has_moved_on_the_flow_is_read_again(place: Place) -> None:
    place.client(0, GET)
    place.kernel.accepts(GET)
    assert place.client(2 * END, GET, SERVER + 2 * len(OK)) == [GET]
    assert place.kernel.calls == ["take", "read", "lend"]
    (flow,) = place.talk.inspector.flows
    assert flow.next == (START + 3 * END) & _MASK and len(place.talk.inspector.flows) == 1


def test_it_is_not_lost_where_it_was_the_kernels_when_it_was_read(place: Place) -> None:
    """Begun by another agent: the first frame is read, asked for, and decided."""
    place.kernel.pinned.client.owner = Owner.PYTHON
    place.client(0, GET)
    place.kernel.accepts(GET)
    (flow,) = place.talk.inspector.flows
    place.talk.inspector.forget(flow)
    assert place.client(2 * END, GET, SERVER + 2 * len(OK)) == [GET]


def test_a_frame_that_the_kernel_has_moved_past_is_compared_not_decided(place: Place) -> None:
    """It stood in the ring when an equal one was accepted."""
    place.client(0, GET)
    place.kernel.accepts(GET)
    assert place.client(END, GET, SERVER + len(OK)) == [GET]
    assert place.kernel.pinned.client.next == (START + 2 * END) & _MASK
    place.client(END, DENIED, SERVER + len(OK))
    assert DENIED not in b"".join(place.kernel.sent)
    assert place.kernel.pinned.client.owner is Owner.CLOSED


def test_a_kernel_that_does_not_let_go_is_not_believed(place: Place) -> None:
    place.client(0, GET)
    place.kernel.takes = Outcome.STALE
    assert place.client(END, GET, SERVER + len(OK)) == []
    assert place.forwarder.drops[DropReason.TCP_STATE] == 1 and len(place.talk.inspector.flows) == 0


def test_a_denial_behind_what_the_kernel_accepted(place: Place) -> None:
    place.client(0, GET)
    place.kernel.accepts(GET)
    assert place.client(2 * END, DENIED, SERVER + len(OK)) == []
    (flow,) = place.talk.inspector.flows
    assert flow.unanswered == ["GET"] and flow.answer == b""


# -- what the kernel has forgotten -----------------------------------------------------------------------------


def test_what_the_kernel_has_not_known_twice_is_forgotten(talk: Conversation) -> None:
    talk.client(0, GET)
    (flow,) = talk.inspector.flows
    talk.inspector.forget_gone([])
    assert len(talk.inspector.flows) == 1  # it may have been added while the kernel was being asked
    talk.inspector.forget_gone([flow.key])
    talk.inspector.forget_gone([])
    assert len(talk.inspector.flows) == 1
    talk.inspector.forget_gone([])
    assert len(talk.inspector.flows) == 0
