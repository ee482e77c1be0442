"""The compiled policy as it is asked here, against the oracle of the compiler's own tests."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.core.compile import compile_policies
from isolator.core.model import Direction, DropReason, Verdict
from isolator.core.policy import Policy
from isolator.datapath.abi import FlowKey, mapped
from isolator.replay.policy_table import PolicyTable
from tests.core.test_compile import ADDRESSES, ENDPOINTS, PEERS, POINTS, kernel, policies


@settings(max_examples=50, deadline=None)
@given(st.lists(policies, max_size=4))
def test_it_answers_as_the_kernel_does(made: list[Policy]) -> None:
    compiled = compile_policies(made, ENDPOINTS, ADDRESSES, 7)
    table = PolicyTable(compiled)
    for direction in Direction:
        for peer in PEERS:
            for protocol, port in POINTS:
                ports = (port, 0) if direction is Direction.INGRESS else (0, port)
                key = FlowKey(1, bytes(16), mapped(peer), *ports, protocol)
                assert table.decide(key, direction) == kernel(compiled, 1, direction, peer, protocol, port)


def test_both_icmps_are_one_protocol() -> None:
    table = PolicyTable(compile_policies([], ENDPOINTS, ADDRESSES, 7))
    v4, v6 = (FlowKey(1, bytes(16), mapped(PEERS[0]), 9, 9, protocol) for protocol in (1, 58))
    assert table.decide(v4, Direction.INGRESS) == table.decide(v6, Direction.INGRESS)


def test_an_endpoint_without_entries_is_closed() -> None:
    table = PolicyTable(compile_policies([], {}, {}, 7))
    found = table.decide(FlowKey(1, bytes(16), mapped(PEERS[0]), 80, 4000, 6), Direction.INGRESS)
    assert (found.verdict, found.reason) == (Verdict.DROP, DropReason.NO_POLICY)
