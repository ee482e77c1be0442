"""Inspected flows when something around them changes: the agent goes, the policy changes, a connection is older.

A new policy holds for live connections too, and what was not followed from its SYN on is trusted by none.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP

from isolator.core.model import Direction, DropReason, FlowFlag
from isolator.datapath.abi import POLICY_FAIL_OPEN, POLICY_UNREAD
from parsers.http1 import Mode
from tests.bpf.bench import ALLOW, CONTAINER, DROP, INSPECT, PEER, POLICY, Bench, Entry, key_of
from tests.bpf.conversation import HEAD, SERVER_ISN, Conversation
from tests.bpf.frames import inbound, outbound, tcp

pytestmark = pytest.mark.root
INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
MODE_OPAQUE = Mode.OPAQUE
END = len(HEAD)
S = SERVER_ISN + 1  # the server's first byte


@pytest.fixture
def c(b: Bench) -> Conversation:
    return Conversation(b).handshake()


# -- the agent is down -----------------------------------------------------------------------------------


def test_without_the_agent_what_is_proven_passes(c: Conversation) -> None:
    c.commit(END + 10, record=(c.start, HEAD), window=(c.at(END), c.at(END + 10)))
    c.b.agent(up=False)
    assert str(c.client("PA", c.start, S, HEAD)) == "container"
    assert str(c.client("PA", c.at(END), S, b"b" * 10)) == "container"
    assert str(c.server("A", S, c.at(END))) == "network"
    assert c.half.acked == c.at(END)
    assert str(c.client("PA", c.at(END + 10), S, HEAD)) == "drop AGENT_DOWN"


def test_without_the_agent_and_failing_open(b: Bench) -> None:
    b.policy([replace(entry, flags=4) for entry in POLICY])
    c = Conversation(b).handshake()
    b.agent(up=False)
    assert str(c.client("PA", c.start, S, HEAD)) == "container"
    assert c.flow.flags & FlowFlag.PASSED_OPEN
    b.agent(up=True)
    assert str(c.client("PA", c.at(END), S, HEAD)) == "container"  # its boundary is lost


def test_without_the_agent_nothing_overtakes_what_it_holds_even_failing_open(b: Bench) -> None:
    """The client need not send it again: without it the server waits for ever."""
    b.policy([replace(entry, flags=4) for entry in POLICY])
    c = Conversation(b).handshake()
    c.commit(0, record=(c.start, HEAD[:10]))
    b.agent(up=False)
    assert str(c.client("PA", c.at(10), S, HEAD[10:])) == "drop AGENT_DOWN"
    b.agent(up=True)
    assert str(c.client("PA", c.at(10), S, HEAD[10:])) == "punt PAYLOAD"


# -- policy, quota ---------------------------------------------------------------------------------------


def with_port_80(entry: Entry) -> list[Entry]:
    return [entry if (old.port, old.direction) == (80, INGRESS) else old for old in POLICY]


def test_a_live_flow_is_denied_by_a_newer_policy(c: Conversation) -> None:
    c.allow_head()
    c.b.policy(with_port_80(Entry(INGRESS, DROP, 6, 80, 2, reason=DropReason.POLICY_DENY)))
    assert str(c.client("PA", c.start, S, HEAD)) == "drop POLICY_DENY"
    assert str(c.server("A", S, c.at(END))) == "drop POLICY_DENY"
    c.b.policy(POLICY)
    assert str(c.client("PA", c.start, S, HEAD)) == "container"


def test_a_live_flow_is_released_and_cannot_be_taken_back(c: Conversation) -> None:
    c.b.policy(with_port_80(Entry(INGRESS, ALLOW, 6, 80, 2)))
    assert str(c.client("PA", c.start, S, b"SSH-2.0")) == "container"
    c.b.policy(with_port_80(Entry(INGRESS, INSPECT, 6, 80, 2, profile=6)))
    assert str(c.client("PA", c.at(7), S, HEAD)) == "punt STATE_LOST"


def test_a_released_flow_may_go_on_where_policy_fails_open_and_is_marked(c: Conversation) -> None:
    c.b.policy(with_port_80(Entry(INGRESS, ALLOW, 6, 80, 2)))
    assert str(c.client("PA", c.start, S, b"SSH-2.0")) == "container"
    c.b.policy(with_port_80(Entry(INGRESS, INSPECT, 6, 80, 2, profile=6, flags=POLICY_FAIL_OPEN)))
    assert str(c.client("PA", c.at(7), S, HEAD)) == "container"
    assert c.flow.flags & FlowFlag.PASSED_OPEN


def test_a_released_flow_whose_client_connects_anew_is_read_again(c: Conversation) -> None:
    c.b.policy(with_port_80(Entry(INGRESS, ALLOW, 6, 80, 2)))
    c.client("PA", c.start, S, b"SSH-2.0")
    c.b.policy(with_port_80(Entry(INGRESS, INSPECT, 6, 80, 2, profile=6)))
    again = Conversation(c.b, isn=90000).handshake()
    assert str(again.client("PA", again.start, S, HEAD)) == "punt PAYLOAD"
    assert c.b.datapath.flows7_used(7) == 1


def test_what_fails_open_is_read_again_with_the_next_connection(c: Conversation) -> None:
    """Though policy let the one before go unread."""
    c.b.policy(with_port_80(Entry(INGRESS, ALLOW, 6, 80, 2)))
    c.client("PA", c.start, S, b"SSH-2.0")
    for flags in (POLICY_FAIL_OPEN, POLICY_UNREAD):
        c.b.policy(with_port_80(Entry(INGRESS, INSPECT, 6, 80, 2, profile=6, flags=flags)))
        again = Conversation(c.b, isn=90000 + flags).handshake()
        assert str(again.client("PA", again.start, S, HEAD)) == "punt PAYLOAD"


def test_what_passed_without_the_agent_lets_no_other_connection_pass(b: Bench) -> None:
    """Also not one that begins with the same number."""
    b.policy([replace(entry, flags=POLICY_FAIL_OPEN) for entry in POLICY])
    c = Conversation(b).handshake()
    b.agent(up=False)
    assert str(c.client("PA", c.start, S, HEAD)) == "container"
    b.agent(up=True)
    c.handshake()
    assert str(c.client("PA", c.start, S, HEAD)) == "punt PAYLOAD"


@pytest.mark.parametrize(("flags", "expected"), [(0, "punt STATE_LOST"), (POLICY_UNREAD, "container")])
def test_what_was_let_go_unread_is_not_trusted_by_a_stricter_policy(
    c: Conversation, flags: int, expected: str
) -> None:
    assert c.commit(1000, window=(c.start, c.at(1000)), mode=MODE_OPAQUE)
    assert str(c.client("PA", c.start, S, b"SSH-2.0")) == "container"
    c.b.policy(with_port_80(Entry(INGRESS, INSPECT, 6, 80, 2, profile=6, flags=flags)))
    assert str(c.client("PA", c.at(7), S, HEAD)) == expected


EGRESS_OPEN = [
    Entry(INGRESS, INSPECT, 6, 80, 2, profile=5), Entry(INGRESS, DROP, reason=DropReason.POLICY_DEFAULT),
    Entry(EGRESS, ALLOW),
]  # fmt: skip


def test_a_connection_from_before_is_inspected_whoever_speaks_first(b: Bench) -> None:
    """An endpoint with ingress rules and open egress: an answer must not make its connection an egress one."""
    b.reset(EGRESS_OPEN)
    for port in (1000, 40000):
        c = Conversation(b, client_port=port)
        assert str(c.server("PA", S, c.start, b"hello")) == "punt STATE_LOST"
        assert str(c.client("PA", c.start, S, HEAD)) == "punt STATE_LOST"
        denied = Conversation(b, client_port=port, server_port=22)
        assert str(denied.client("PA", c.start, S, b"evil")) == "drop POLICY_DEFAULT"
        assert str(denied.server("PA", S, c.start, b"evil")) == "drop POLICY_DEFAULT"
    own = Conversation(b, EGRESS, client_port=40000, server_port=443)
    assert str(own.server("PA", S, own.start, b"answer")) == "container"


def test_a_connection_let_go_where_policy_fails_open_is_the_last_on_its_ports(b: Bench) -> None:
    b.policy([replace(entry, flags=POLICY_FAIL_OPEN) for entry in POLICY])
    c = Conversation(b)
    assert str(c.client("A", 1, 1)) == "container"
    assert str(c.handshake().client("PA", c.start, S, HEAD)) == "punt PAYLOAD"


def test_an_inspected_syn_takes_no_live_flows_place(b: Bench) -> None:
    b.policy([Entry(INGRESS, INSPECT, 6, 0, 2, profile=5), *POLICY[1:]])
    c = Conversation(b, EGRESS, server_port=90)
    for flags in ("S", "A"):
        assert str(c.client(flags, c.isn)) == "network"
    assert str(c.server("S", 777)) == "drop TCP_STATE"
    assert str(c.server("A", S)) == "container"


def test_no_reset_for_a_reset(b: Bench) -> None:
    assert str(b.from_network(inbound(tcp(1000, 83, "RA", 5, 6)))) == "drop POLICY_DENY"


def test_an_answer_that_comes_after_a_new_policy(b: Bench) -> None:
    assert str(b.from_container(outbound(UDP(sport=5000, dport=53)))) == "network"
    b.policy(POLICY)
    assert str(b.from_network(inbound(UDP(sport=53, dport=5000)))) == "container"


def test_an_icmp_error_for_a_flow_that_the_policy_in_force_has_not_seen(b: Bench) -> None:
    error = outbound(ICMP(type=3, code=4) / IP(src=PEER, dst=CONTAINER) / TCP(sport=1000, dport=81))
    assert str(b.from_network(inbound(tcp(1000, 81)))) == "container"
    assert str(b.from_container(error)) == "network"
    b.policy([entry for entry in POLICY if entry.port != 81])
    assert str(b.from_container(error)) == "drop ICMP_UNRELATED"


def test_another_profile(c: Conversation) -> None:
    c.b.policy(with_port_80(Entry(INGRESS, INSPECT, 6, 80, 2, profile=6, rule=66)))
    c.client("PA", c.start, S, HEAD)
    assert (c.flow.profile, c.flow.rule, c.half.word.punts) == (6, 66, 1)


def test_the_quota(b: Bench) -> None:
    b.reset(flows7_max=2)
    seen = [str(Conversation(b, client_port=port).client("S", 1000)) for port in (1, 2, 3)]
    assert seen == ["container", "container", "drop FLOWS_FULL"]
    assert b.datapath.flows7_used(7) == 2
    assert b.datapath.commands.delete(key_of(80, 1), b.flow7(key_of(80, 1)).incarnation)
    assert str(Conversation(b, client_port=3).client("S", 1000)) == "container"


def test_traffic_is_counted(c: Conversation) -> None:
    assert c.flow.packets == (2, 1)
    assert c.flow.octets == (108, 54)


# -- an upgrade ------------------------------------------------------------------------------------------


def test_while_inspected_flows_are_moved_they_do_not_change(c: Conversation) -> None:
    """Layer 4 goes on; who is dropped sends again."""
    c.allow_head()
    before = c.flow
    c.b.datapath.control.frozen_until = time.monotonic_ns() + 3600 * 10**9
    assert str(c.client("PA", c.at(END), S, HEAD)) == "drop UPGRADE"
    assert str(c.server("A", S, c.at(END))) == "drop UPGRADE"
    assert str(c.b.from_network(inbound(tcp(4711, 80)))) == "drop UPGRADE"
    assert c.flow == before and len(list(c.b.datapath.flows7())) == 1
    assert str(c.b.from_network(inbound(tcp(4711, 81)))) == "container"


def test_the_freeze_ends_by_itself(c: Conversation) -> None:
    c.b.datapath.control.frozen_until = time.monotonic_ns()
    assert str(c.client("PA", c.start, S, HEAD)) == "punt PAYLOAD"
