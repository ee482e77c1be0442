"""Flows that kernel and Python decide in turn: nothing is lost, nothing passes twice (R2 R4 R5 R6 R7)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from isolator.core.automaton.build import build
from isolator.core.automaton.states import Automaton
from isolator.core.model import Direction, DropReason, Owner
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule
from isolator.datapath.abi import HALF_FIN
from isolator.datapath.flow7 import Outcome
from tests.bpf.bench import POLICY, PROFILE, VNET_NONE, Bench, Entry, gso
from tests.bpf.conversation import HEAD, SERVER_ISN, Conversation
from tests.bpf.frames import inbound, outbound, tcp
from tests.core.automaton.world import automaton_of, profile, rule
from tests.datapath import slow_path
from tests.datapath.slow_path import Place

pytestmark = pytest.mark.root
END = len(HEAD)
S = SERVER_ISN + 1  # the server's first byte
OTHER = b"GET /books/2 HTTP/1.1\r\nHost: api.local\r\n\r\n"
SECRET = b"GET /secret HTTP/1.1\r\nHost: api.local\r\n\r\n"
POST = b"POST /books HTTP/1.1\r\nHost: api.local\r\nContent-Length: 3000\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
BOOKS = profile(rule("books", HttpRule(frozenset({"GET", "HEAD", "POST"}), PathPattern("/books/**"))))


def only(path: str) -> Automaton:
    return automaton_of(rule(path, HttpRule(frozenset({"GET"}), PathPattern(path))))


@pytest.fixture
def b(b: Bench) -> Bench:
    b.policy(automata={PROFILE: build(BOOKS)})
    b.datapath.automata.take_counts()
    return b


@pytest.fixture
def c(b: Bench) -> Conversation:
    return Conversation(b).handshake()


def passed(outcome: object, payload: bytes) -> bool:
    """Whether it came out at the container, with these bytes and no others."""
    return outcome.where == "container" and bytes(outcome.packet[TCP].payload) == payload  # type: ignore[attr-defined]


def served(c: Conversation, at: int = 0, told: int = S, head: bytes = HEAD) -> tuple[int, int]:
    """A head that the kernel accepts, and its answer. Where both halves stand then."""
    assert passed(c.client("PA", c.at(at), told, head), head)
    c.server("PA", told, c.at(at + len(head)), OK)
    return at + len(head), told + len(OK)


def untouched(c: Conversation, at: int = 0, record: bytes = b"") -> bool:
    return (c.half.next, c.half.record, c.half.flags & HALF_FIN) == (c.at(at), record, 0)


# -- whose the boundary is -----------------------------------------------------------------------------------


def test_a_commit_that_believes_less_than_the_kernel_has_done_is_stale(c: Conversation) -> None:
    """A frame stood in the ring while the kernel accepted another."""
    served(c)
    assert c.commit(10, expect=c.start, record=(c.start, HEAD[:10])).outcome is Outcome.STALE
    assert c.commit(END + 10, expect=c.at(END)).outcome is Outcome.STALE  # right, but not asked for
    taken = c.b.datapath.commands.take(c.key, c.direction, c.flow.incarnation)
    assert taken and (taken.next, taken.owner) == (c.at(END), Owner.PYTHON)
    assert c.commit(10, expect=c.start).outcome is Outcome.STALE
    assert untouched(c, END, HEAD)


def test_python_takes_and_the_kernel_accepts_no_more(c: Conversation) -> None:
    c.b.datapath.commands.take(c.key, c.direction, c.flow.incarnation)
    assert c.client("PA", c.start, S, HEAD).where == "punt"
    assert c.commit(END, record=(c.start, HEAD), mark=True, lend=True)
    c.server("PA", S, c.at(END), OK)
    assert passed(c.client("PA", c.at(END), S + len(OK), OTHER), OTHER)


def test_what_is_lent_is_accepted_only_once_the_last_answer_has_begun(c: Conversation) -> None:
    served(c)
    assert c.client("PA", c.at(END), S, OTHER).where == "punt"  # the client has not seen the answer


def test_without_an_agent_what_the_kernel_accepts_goes_on(c: Conversation) -> None:
    c.b.agent(up=False)
    at, told = served(c)
    assert str(c.client("PA", c.at(at), told, SECRET)) == "drop AGENT_DOWN"
    assert str(c.client("PA", c.at(at), told, HEAD + OTHER)) == "drop AGENT_DOWN"
    at, told = served(c, at, told, OTHER)
    assert (c.half.owner, c.half.next) == (Owner.KERNEL, c.at(at))
    c.b.agent(up=True)
    assert c.client("PA", c.at(at), told, SECRET).where == "punt"
    c.b.agent(up=False)
    assert (
        str(c.client("PA", c.at(at), told, HEAD)) == "drop AGENT_DOWN"
    )  # it was handed to one that is no more


# -- another policy between two requests -----------------------------------------------------------------------


def test_the_next_request_is_read_by_the_policy_that_is_in_force(c: Conversation) -> None:
    at, told = served(c)
    c.b.policy(automata={PROFILE: only("/books/2")})
    at, told = served(c, at, told, OTHER)
    assert c.client("PA", c.at(at), told, HEAD).where == "punt"
    counted = [(named.rule, count) for *_, named, count in c.b.datapath.automata.take_counts()]
    assert sorted(counted) == [("/books/2", 1), ("books", 1)]


def test_a_policy_without_an_automaton_leaves_nothing_to_the_kernel(c: Conversation) -> None:
    at, told = served(c)
    c.b.policy()
    assert c.client("PA", c.at(at), told, HEAD).where == "punt"
    c.b.policy(automata={PROFILE: build(BOOKS)})
    assert c.client("PA", c.at(at), told, HEAD).where == "punt"  # Python has it
    assert c.commit(at + END, record=(c.at(at), HEAD), mark=True, lend=True)
    c.server("PA", told, c.at(at + END), OK)
    served(c, at + END, told + len(OK))


def test_a_flow_that_began_without_an_automaton_is_pythons_until_it_is_lent(b: Bench) -> None:
    b.policy()
    c = Conversation(b).handshake()
    b.policy(automata={PROFILE: build(BOOKS)})
    assert c.client("PA", c.start, S, HEAD).where == "punt"


def test_a_policy_that_denies_the_peer_lets_nothing_pass(c: Conversation) -> None:
    at, told = served(c)
    c.b.policy([Entry(Direction.INGRESS, POLICY[2].verdict, reason=DropReason.POLICY_DENY)])
    assert c.client("PA", c.at(at), told, HEAD).where == "drop"


# -- segments of other shapes -----------------------------------------------------------------------------------


def test_two_heads_in_one_segment_are_pythons(c: Conversation) -> None:
    for data in (HEAD + OTHER, HEAD + b"G", HEAD[:-1], b"\r\n" + HEAD):
        assert c.client("PA", c.start, S, data).where == "punt" and untouched(c)
        c.own(Owner.KERNEL)


@pytest.mark.parametrize("flags", ["FPA", "FA", "P", "PAE", "PAC"])
def test_a_head_with_other_flags_is_pythons(c: Conversation, flags: str) -> None:
    outcome = c.client(flags, c.start, S, HEAD)
    assert not passed(outcome, HEAD) and untouched(c)


def test_several_segments_in_one_are_pythons(c: Conversation) -> None:
    assert c.client("PA", c.start, S, HEAD, vnet=gso(54, 20)).where == "punt" and untouched(c)


def test_a_segment_behind_the_boundary_is_pythons(c: Conversation) -> None:
    assert c.client("PA", c.at(1), S, HEAD).where == "punt" and untouched(c)


@pytest.mark.parametrize("length", [40, 41, 40 + END - 1])
def test_what_the_ip_header_does_not_cover_is_not_read(c: Conversation, length: int) -> None:
    """Its receiver would cut it off."""
    outcome = c.client("PA", c.start, S, HEAD, len=length)
    assert outcome.where in ("drop", "punt") or outcome.packet[IP].len == 40
    assert untouched(c)


def test_what_follows_the_ip_packet_counts_for_nothing(c: Conversation) -> None:
    outcome = c.client("PA", c.start, S, HEAD + SECRET, len=40 + END)
    assert untouched(c) or (c.half.next == c.at(END) and c.half.record == HEAD)
    assert outcome.where in ("drop", "punt", "container")


def test_a_wrong_checksum_moves_nothing(c: Conversation) -> None:
    """Its receiver takes none of it; another head with the same numbers may come."""
    at, told = served(c)
    forged = tcp(1000, 80, "PA", c.at(at), told, chksum=0xBEEF) / OTHER
    assert str(c.b.from_network(inbound(forged))) == "punt PAYLOAD"
    assert untouched(c, at, HEAD) and c.half.owner == Owner.PYTHON


def test_nor_does_one_on_an_equal_retransmission(c: Conversation) -> None:
    assert passed(c.client("PA", c.start, S, HEAD), HEAD)
    c.b.from_network(inbound(tcp(1000, 80, "PA", c.start, S, chksum=0xBEEF) / HEAD))
    assert (c.half.next, c.half.record, c.half.owner) == (c.at(END), HEAD, Owner.KERNEL)


# -- probes and retransmissions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\0", b"\n"])
def test_a_keep_alive_probe_is_answered_and_changes_nothing(c: Conversation, data: bytes) -> None:
    """RFC 9293 section 3.8.4: one number below the next, with a byte of garbage or none."""
    at, told = served(c)
    assert passed(c.client("A", c.at(at - 1), told, data), b"")
    assert untouched(c, at, HEAD) and c.half.owner == Owner.KERNEL
    served(c, at, told, OTHER)


def test_a_probe_of_a_closed_window(c: Conversation) -> None:
    """RFC 9293 section 3.8.6.1: one byte of what is to come, or none, while the last head is not acknowledged."""
    assert passed(c.client("PA", c.start, S, HEAD), HEAD)
    assert passed(c.client("A", c.at(END - 1), S, b""), b"")
    assert passed(c.client("A", c.at(END - 1), S, b"\n"), b"\n")
    assert c.client("A", c.at(END), S, b"G").where == "punt"
    assert c.half.next == c.at(END)


def test_two_requests_that_come_again_as_one(c: Conversation) -> None:
    """The server has the first; of the second it may have nothing. Python cuts."""
    at, told = served(c)
    assert passed(c.client("PA", c.at(at), told, OTHER), OTHER)
    assert str(c.client("PA", c.start, told, HEAD + OTHER)) == "punt PAYLOAD"
    assert (c.half.next, c.half.record) == (c.at(at + len(OTHER)), OTHER)


def test_one_that_comes_again_in_two_where_the_server_has_the_first_part(c: Conversation) -> None:
    assert passed(c.client("PA", c.start, S, HEAD), HEAD)
    c.server("A", S, c.at(10))
    assert passed(c.client("PA", c.start, S, HEAD[:10]), b"")  # it is acknowledged
    assert passed(c.client("PA", c.at(10), S, HEAD[10:]), HEAD[10:])
    assert str(c.client("PA", c.start, S, HEAD)) == "punt PAYLOAD"
    assert c.half.next == c.at(END)


# -- who forges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 1000, 2**31 - 1, 2**31, -1])
def test_a_client_that_acknowledges_what_was_never_sent(c: Conversation, ahead: int) -> None:
    """The server refuses the segment (RFC 9293 section 3.10.7.4): it must not move the boundary."""
    assert c.client("PA", c.start, S + ahead, HEAD).where == "punt"
    assert untouched(c) and c.flow.server.next == S


@pytest.mark.parametrize("ahead", [1, 1000, 2**31 - 1, 2**31 - 100, -5])
def test_a_server_that_acknowledges_what_it_was_never_given(c: Conversation, ahead: int) -> None:
    assert passed(c.client("PA", c.start, S, HEAD), HEAD)
    c.server("A", S, c.at(END + ahead) if ahead > 0 else c.at(ahead))
    assert c.half.acked == c.start
    assert passed(c.client("PA", c.start, S, HEAD), HEAD)


def test_bytes_behind_a_fin(c: Conversation) -> None:
    at, told = served(c)
    assert str(c.client("FA", c.at(at), told)) == "container"
    assert str(c.client("PA", c.at(at), told, OTHER)) == "drop TCP_STATE"
    assert str(c.client("PA", c.at(at + 1), told, OTHER)) == "drop TCP_STATE"
    assert c.half.next == c.at(at)


def test_a_fin_that_the_server_does_not_believe_ends_nothing(c: Conversation) -> None:
    at, told = served(c)
    forged = tcp(1000, 80, "FA", c.at(at), told, chksum=0xBEEF)
    assert str(c.b.from_network(inbound(forged))) == "drop BAD_CHECKSUM"
    assert str(c.client("FA", c.at(at - 5), told)) == "drop TCP_STATE"  # within what was read
    served(c, at, told, OTHER)


def test_a_fin_beyond_the_boundary_is_pythons(c: Conversation) -> None:
    at, told = served(c)
    assert str(c.client("FA", c.at(at + 50), told)) == "punt PAYLOAD"
    assert untouched(c, at, HEAD)


def test_no_room_for_another_connection(b: Bench) -> None:
    b.reset(flows7_max=1)
    b.policy(automata={PROFILE: build(BOOKS)})
    c, other = Conversation(b).handshake(), Conversation(b, client_port=1001)
    assert str(other.client("S", other.isn)) == "drop FLOWS_FULL"
    assert other.client("PA", other.start, S, HEAD).where == "punt"  # told that nobody knows it
    at, told = served(c)
    c.client("FA", c.at(at), told)
    c.server("FA", told, c.at(at + 1))
    c.client("A", c.at(at + 1), told + 1)
    served(other.handshake())


# -- with Python at work ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> Iterator[Place]:
    with slow_path.place() as made:
        yield made


class Talk:
    """A connection through kernel and Python; `got` is what the server has been given, by its place."""

    def __init__(self, place: Place) -> None:
        self.place, self.told = place, S
        self.got: list[tuple[int, bytes]] = []
        self.c = Conversation(place.bench)
        place.send(VNET_NONE + bytes(inbound(tcp(1000, 80, "S", self.c.isn))))
        self.server("SA", 0)
        self.client(0, b"", "A")

    def client(self, at: int, data: bytes, flags: str = "PA") -> bytes:
        """What of it reached the server now."""
        self.place.served.clear()
        self.place.send(VNET_NONE + bytes(inbound(tcp(1000, 80, flags, self.c.at(at), self.told) / data)))
        frames = [Ether(frame) for frame in self.place.served]
        new = [((frame[TCP].seq - self.c.start) & 0xFFFFFFFF, bytes(frame[TCP].payload)) for frame in frames]
        self.got += [each for each in new if each[1]]
        return b"".join(data for _, data in new)

    def server(self, flags: str, asked: int, data: bytes = b"") -> None:
        seq = SERVER_ISN if "S" in flags else self.told
        frame = outbound(tcp(80, 1000, flags, seq, self.c.at(asked)) / data)
        self.place.send(VNET_NONE + bytes(frame), from_container=True)
        self.told += len(data)

    @property
    def owner(self) -> Owner:
        return self.c.half.owner


@pytest.fixture
def talk(made: Place) -> Talk:
    made.bench.reset()
    made.bench.policy(automata={PROFILE: build(BOOKS)})
    for flow in made.inspector.flows:
        made.inspector.forget(flow)
    made.inspector.prepare_policy({PROFILE: BOOKS}, made.bench.datapath.generation)
    made.forwarder.drops.clear()
    made.bench.datapath.automata.take_counts()
    made.inspector.take_counts()
    return Talk(made)


def test_kernel_then_python_then_the_kernel_again(talk: Talk) -> None:
    body = bytes(range(250)) * 12
    sent, at = [HEAD, POST + body[:1000], body[1000:2400], body[2400:], HEAD, OTHER, HEAD], 0
    owners = []
    for data in sent:
        assert talk.client(at, data) == data
        at += len(data)
        owners.append(talk.owner)
        talk.server("PA", at, OK if data.endswith(b"\r\n\r\n") or data == body[2400:] else b"")
    assert owners == [Owner.KERNEL, *[Owner.PYTHON] * 3, *[Owner.KERNEL] * 3]
    assert b"".join(data for _, data in sorted(talk.got)) == b"".join(sent)
    by_kernel = sum(count for *_, count in talk.place.bench.datapath.automata.take_counts())
    assert (by_kernel, sum(talk.place.inspector.take_counts().values())) == (3, 2)


def test_a_frame_in_the_ring_while_the_boundary_moves(talk: Talk) -> None:
    talk.client(0, POST)
    at = len(POST) + 3000
    talk.client(len(POST), b"b" * 1400)
    assert talk.owner is Owner.PYTHON
    late = VNET_NONE + bytes(inbound(tcp(1000, 80, "PA", talk.c.at(at), talk.told) / HEAD))
    talk.place.bench.network.send(late)  # the forwarder has not looked yet
    assert talk.c.commit(at + 5, expect=talk.c.at(at))
    talk.place.served.clear()
    talk.place.send(VNET_NONE + bytes(inbound(tcp(1000, 80, "A", talk.c.at(0), talk.told))))
    assert all(bytes(Ether(frame)[TCP].payload) == b"" for frame in talk.place.served)
    assert talk.place.forwarder.drops[DropReason.TCP_STATE] == 1
    assert talk.c.half.next == talk.c.at(at + 5)


def test_python_cuts_what_comes_again_as_one(talk: Talk) -> None:
    talk.client(0, HEAD)
    talk.server("PA", END, OK)
    assert talk.client(END, OTHER) == OTHER
    assert talk.client(0, HEAD + OTHER) == OTHER
    assert talk.client(0, HEAD + OTHER.replace(b"2", b"3")) == b""
    assert talk.owner is Owner.CLOSED


def test_python_decides_the_rest_of_a_longer_retransmission(talk: Talk) -> None:
    assert talk.client(0, HEAD) == HEAD
    assert talk.client(0, HEAD + OTHER) == HEAD + OTHER
    assert talk.client(0, HEAD + OTHER + SECRET).count(b"secret") == 0
    assert talk.owner is Owner.CLOSED


def test_a_head_with_a_fin_goes_through_python(talk: Talk) -> None:
    assert talk.client(0, HEAD, "FPA") == HEAD
    assert talk.owner is Owner.PYTHON and talk.c.half.flags & HALF_FIN
    assert talk.client(END + 1, OTHER) == b""


def test_a_super_packet_goes_through_python_and_is_lent_back(talk: Talk) -> None:
    frame = gso(54, 20) + bytes(inbound(tcp(1000, 80, "PA", talk.c.start, S) / HEAD))
    talk.place.send(frame)
    assert talk.c.half.next == talk.c.at(END) and talk.owner is Owner.KERNEL


def test_pipelined_heads_are_pythons_until_they_are_answered(talk: Talk) -> None:
    assert talk.client(0, HEAD + OTHER) == HEAD + OTHER
    assert talk.owner is Owner.PYTHON
    at = END + len(OTHER)
    talk.server("PA", at, OK + OK)
    assert talk.client(at, HEAD) == HEAD and talk.owner is Owner.KERNEL
    talk.server("PA", at + END, OK)
    assert talk.client(at + END, SECRET) == b""
    assert b"403" in b"".join(talk.place.returned) and talk.owner is Owner.CLOSED
