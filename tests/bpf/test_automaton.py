"""Requests that the kernel accepts by itself, attacked: what reaches the other side is the oracle (R2 R5 R7 R9)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet import TCP

from isolator.core.automaton.states import Automaton
from isolator.core.model import Direction, Owner
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule
from isolator.datapath.libbpf import BpfError
from tests.bpf.bench import ENDPOINT, IDENTITIES, POLICY, PROFILE, Bench, Entry, Outcome
from tests.bpf.conversation import HEAD, SERVER_ISN, Conversation
from tests.core.automaton.world import automaton_of, rule

pytestmark = pytest.mark.root
EGRESS = Direction.EGRESS
END = len(HEAD)
S = SERVER_ISN + 1  # the server's first byte
OTHER = b"GET /books/2 HTTP/1.1\r\nHost: api.local\r\n\r\n"
SECRET = b"GET /secret HTTP/1.1\r\nHost: api.local\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
BOOKS = HttpRule(frozenset({"GET", "HEAD"}), PathPattern("/books/**"))
KINDS = [
    pytest.param({}, id="ipv4"),
    pytest.param({"v6": True}, id="ipv6"),
    pytest.param({"direction": EGRESS, "server_port": 91}, id="egress"),
    pytest.param({"isn": 0xFFFFFFF0}, id="wrap"),
    pytest.param({"isn": 0x7FFFFFF0}, id="half-way"),
]


def books() -> Automaton:
    return automaton_of(rule("books", BOOKS))


def secrets() -> Automaton:
    return automaton_of(rule("secrets", HttpRule(frozenset({"GET"}), PathPattern("/secret"))))


def full() -> Iterator[Entry]:
    """Entries that find no room behind the first ones."""
    yield from POLICY
    raise BpfError("map policy: full", 7)


@pytest.fixture
def b(b: Bench) -> Bench:
    b.policy(automata={PROFILE: books()})
    return b


@pytest.fixture
def c(b: Bench, request: pytest.FixtureRequest) -> Conversation:
    return Conversation(b, **getattr(request, "param", {})).handshake()


on_every_kind = pytest.mark.parametrize("c", KINDS, indirect=True)


def passed(outcome: Outcome, payload: bytes) -> bool:
    """Whether it came out, with these bytes and no others."""
    return outcome.where in ("container", "network") and bytes(outcome.packet[TCP].payload) == payload


def answered(c: Conversation, asked: int, at: int = 0, data: bytes = OK) -> int:
    """The server answers what ends at `asked`. Where its half stands then."""
    c.server("PA", S + at, c.at(asked), data)
    return at + len(data)


# -- what the kernel accepts -------------------------------------------------------------------------------


@on_every_kind
def test_changes_of_the_policy_in_force_leave_its_automata_where_they_are(b: Bench, c: Conversation) -> None:
    """Behind one whole policy come changes, also after a whole one that could not be written."""
    datapath, told = b.datapath, 0
    for at, head in enumerate((HEAD,) * 5):
        assert passed(c.client("PA", c.at(at * END), S + told, head), head)
        told = answered(c, (at + 1) * END, told)
        if at == 2:
            with pytest.raises(BpfError):
                datapath.write_policy(datapath.next_generation(), full(), IDENTITIES, {PROFILE: secrets()})
        elif at == 3:
            b.policy(automata={PROFILE: books()})
        else:
            own = {(ENDPOINT, direction): ENDPOINT for direction in Direction}
            datapath.change_policy(datapath.next_generation(), [], {}, own, {9: secrets()})
            datapath.retire()
        assert c.half.owner == Owner.KERNEL
    assert str(c.client("PA", c.at(5 * END), S + told, SECRET)) == "punt PAYLOAD"


@on_every_kind
def test_heads_one_after_the_other(c: Conversation) -> None:
    at, told = 0, 0
    for head in (HEAD, OTHER, HEAD):
        assert passed(c.client("PA", c.at(at), S + told, head), head)
        at += len(head)
        assert (c.half.next, c.half.record, c.half.owner) == (c.at(at), head, Owner.KERNEL)
        told = answered(c, at, told)
    assert str(c.client("PA", c.at(at), S + told, SECRET)) == "punt PAYLOAD"
    assert c.half.owner == Owner.PYTHON


def test_the_numbers_wrap_around_within_a_head(b: Bench) -> None:
    c = Conversation(b, isn=0xFFFFFFFF - 20).handshake()
    assert passed(c.client("PA", c.start, S, HEAD), HEAD) and c.half.next == c.at(END) < 100
    assert passed(c.client("PA", c.start, S, HEAD), HEAD)
    assert str(c.client("PA", c.at(5), S, b"!")) == "punt MISMATCH"


@on_every_kind
def test_far_away_numbers_are_nothing_new(c: Conversation) -> None:
    c.client("PA", c.start, S, HEAD)
    answered(c, END)
    for at in (END + 1, END - 2**31, END + 2**31 - 1, END + 2**31 + 1, END + 2**30):
        outcome = c.client("PA", c.at(at), S + len(OK), SECRET)
        assert outcome.where in ("punt", "drop") or passed(outcome, b"")


# -- retransmissions ---------------------------------------------------------------------------------------

AGAIN = [
    ("whole", 0, HEAD, True),
    ("its beginning", 0, HEAD[:10], True),
    ("its end", 10, HEAD[10:], True),
    ("a longer tail", 0, HEAD + SECRET, False),
    ("a longer tail that is allowed", 0, HEAD + OTHER, False),
    ("another head as long", 0, HEAD.replace(b"books", b"admin"), False),
    ("another byte in its middle", 7, b"!", False),
    ("from before it", -3, b"abc" + HEAD, False),
    ("a tail alone", END - 1, b"\n" + SECRET, False),
]


@on_every_kind
@pytest.mark.parametrize(("at", "data", "passes"), [row[1:] for row in AGAIN], ids=[row[0] for row in AGAIN])
def test_what_the_server_never_got(c: Conversation, at: int, data: bytes, passes: bool) -> None:
    """It has to pass again, equal, however it is cut; anything else is Python's."""
    c.client("PA", c.start, S, HEAD)
    outcome = c.client("PA", c.at(at), S, data)
    assert passed(outcome, data) if passes else outcome.where == "punt"
    assert c.half.next == c.at(END)


def test_another_head_at_a_taken_boundary(c: Conversation) -> None:
    """Both are allowed, but the server could get a mixture."""
    assert passed(c.client("PA", c.start, S, HEAD), HEAD)
    assert c.client("PA", c.start, S, OTHER).where == "punt"
    assert c.client("PA", c.start, S, OTHER[:END]).where == "punt"


# -- who opens, ends and forges ----------------------------------------------------------------------------


def test_an_answer_to_a_repeated_syn_that_comes_late_moves_nothing_back(b: Bench) -> None:
    """The server has what was accepted meanwhile, and would take a longer head's tail for what follows it."""
    c = Conversation(b)
    c.client("S", c.isn)
    c.server("SA", SERVER_ISN, c.start)
    c.client("S", c.isn)  # the server has not seen the handshake's end: it answers this one too
    assert passed(c.client("PA", c.start, S, HEAD), HEAD)
    before = c.flow
    assert str(c.server("SA", SERVER_ISN, c.start)) == "network"
    assert (c.flow.incarnation, c.half.next, c.half.record) == (before.incarnation, c.at(END), HEAD)
    longer = HEAD[:-2] + b"X: GET /secret HTTP/1.1\r\nHost: a\r\n\r\n"
    assert c.client("PA", c.start, S, longer).where == "punt"


def test_nor_does_it_where_a_reset_was_forged_in_between(b: Bench) -> None:
    """One that the server does not believe, since it waits for bytes further on."""
    c = Conversation(b)
    c.client("S", c.isn)
    c.server("SA", SERVER_ISN, c.start)
    c.client("S", c.isn)
    c.client("PA", c.start, S, HEAD)
    c.client("R", c.start)
    c.client("S", c.isn)
    c.server("SA", SERVER_ISN, c.start)
    assert (c.half.next, c.half.record) == (c.at(END), HEAD)


def test_another_syn_ack_for_the_same_syn_is_followed(c: Conversation) -> None:
    """The server has forgotten the first one, and nothing is under way."""
    c.client("S", c.isn)
    assert str(c.server("SA", 70000, c.start)) == "network"
    assert (c.flow.server.next, c.half.next) == (70001, c.start)
    assert passed(c.client("PA", c.start, 70001, HEAD), HEAD)


def test_a_boundary_that_is_just_in_use_is_moved_by_nobody(c: Conversation) -> None:
    c.client("S", 90000)
    c.own(Owner.BUSY)
    assert str(c.server("SA", 70000, 90001)) == "drop TCP_STATE"
    assert c.half.next == c.start
    c.own(Owner.KERNEL)
    assert str(c.server("SA", 70000, 90001)) == "network"
    assert c.half.next == 90001


def test_both_ends_have_closed(c: Conversation) -> None:
    c.client("PA", c.start, S, HEAD)
    told = answered(c, END)
    assert str(c.client("FA", c.at(END), S + told)) == "container"
    c.client("A", c.at(END + 1), S + told + 1)  # forged: the server has sent no FIN
    assert c.server("A", S + told, c.at(END + 1)).where == "network"
    assert c.flow.live
    c.server("FA", S + told, c.at(END + 1))
    assert c.client("A", c.at(END + 1), S + told + 1).where == "container"
    assert c.b.datapath.flow7(c.key) is None and c.b.datapath.flows7_used(7) == 0
    assert str(c.client("PA", c.at(END + 1), S + told + 1, OTHER)) == "punt STATE_LOST"
