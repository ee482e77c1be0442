"""Changes one after the other say what compiling everything anew says, for every packet, at every moment."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, ip_address, ip_network
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.core import standing as module
from isolator.core.compile import PolicyEntry, compile_policies
from isolator.core.identities import Address, mapped_prefix
from isolator.core.model import Direction, Endpoint, Outsider
from isolator.core.policy import (
    Action,
    HttpRule,
    Mode,
    Policy,
    PortMatch,
    Range,
    Rule,
    Selected,
    World,
    labels_of,
)
from isolator.core.standing import Change, Standing

ADDRESSES = [
    ip_address(text) for text in ("10.0.0.1", "10.0.0.2", "10.0.1.1", "192.0.2.1", "fd00::1", "fe80::1")
]
LABELS = [{}, {"app": "a"}, {"app": "b"}, {"app": "a", "tier": "x"}, {"entity": "host"}]
PORTS = [(0, 0), (6, 80), (6, 81), (17, 53), (1, 0)]
networks = st.sampled_from(
    [ip_network(text) for text in ("10.0.0.0/8", "10.0.0.0/24", "10.0.0.1/32", "fd00::/8")]
)
labels = st.sampled_from(LABELS)
peers = st.one_of(
    st.builds(Selected, labels.map(labels_of)),
    st.builds(Range, networks, st.just(()) | st.just((IPv4Network("10.0.0.1/32"),))),
    st.just(World()),
)
rules = st.builds(
    Rule,
    st.sampled_from(["r", "s"]),
    st.sampled_from(Action),
    st.none() | st.lists(peers, max_size=3).map(tuple),
    st.lists(st.sampled_from([PortMatch(0), PortMatch(6, 80), PortMatch(6)]), min_size=1, max_size=2).map(
        tuple
    ),
    st.none() | st.just((HttpRule(frozenset({"GET"})),)),
)
sides = st.none() | st.lists(rules, max_size=3).map(tuple)
policies = st.lists(
    st.builds(
        Policy,
        st.sampled_from(["p", "q"]),
        labels.map(labels_of),
        st.sampled_from(Mode),
        ingress=sides,
        egress=sides,
    ),
    max_size=4,
)
held = st.lists(st.sampled_from(ADDRESSES), max_size=3, unique=True).map(tuple)
endpoints = st.dictionaries(st.integers(1, 4), st.tuples(labels, held), max_size=4)
outsiders = st.lists(st.builds(Outsider, st.sampled_from(["o", "host"]), labels, held), max_size=2).map(tuple)
rosters = st.tuples(endpoints, outsiders)
Roster = tuple[dict[int, tuple[dict[str, str], tuple[Address, ...]]], tuple[Outsider, ...]]
Prefixes = dict[tuple[bytes, int], int]


class Kernel:
    """The maps, and the lookup of bpf/isolator_flow4.h."""

    def __init__(
        self, entries: Iterable[PolicyEntry], prefixes: Prefixes, tables: dict[tuple[int, Direction], int]
    ) -> None:
        self.entries: dict[tuple[int, int, int, int, int], PolicyEntry] = {}
        self.put(entries)
        self.prefixes, self.tables = prefixes, tables

    def put(self, entries: Iterable[PolicyEntry]) -> None:
        for each in entries:
            assert self.entries.setdefault(each[:5], each) == each, "nothing in force is written over"

    def change(self, change: Change) -> None:
        self.put(change.entries)
        for prefix, (before, after) in change.identities.items():
            assert self.prefixes.get(prefix, 0) == before != after
            if after:
                self.prefixes[prefix] = after
            else:
                del self.prefixes[prefix]
        self.tables = change.tables

    def decide(
        self, endpoint: int, direction: Direction, address: Address, protocol: int, port: int
    ) -> PolicyEntry:
        value = int.from_bytes(mapped_prefix(address.version, int(address), 0, 0).address, "big")
        peer = next(
            self.prefixes[key]
            for length in range(128, -1, -1)
            if (key := ((value >> (128 - length) << (128 - length)).to_bytes(16, "big"), length))
            in self.prefixes
        )
        table = self.tables.get((endpoint, direction), endpoint)
        for point in ((peer, protocol, port), (peer, protocol, 0), (peer, 0, 0), (0, 0, 0)):
            if (found := self.entries.get((table, direction, *point))) is not None:
                return found
        raise AssertionError("every endpoint has a default")


def parts(roster: Roster) -> tuple[dict[int, Endpoint], dict[int, tuple[Address, ...]], tuple[Outsider, ...]]:
    there, outside = roster
    return (
        {number: Endpoint(f"e{number}", wearing) for number, (wearing, _) in there.items()},
        {number: addresses for number, (_, addresses) in there.items()},
        outside,
    )


def kernel_of(standing: Standing) -> Kernel:
    whole = standing.whole
    return Kernel(whole.entries, dict(whole.identities), whole.tables)


def agree(kernel: Kernel, standing: Standing, made: list[Policy], roster: Roster) -> None:
    there, addresses, outside = parts(roster)
    anew = compile_policies(made, there, addresses, 1, outside)
    fresh = Kernel(
        anew.entries, {(each.address, each.prefixlen): each.identity for each in anew.identities}, {}
    )
    assert kernel.prefixes.keys() == fresh.prefixes.keys()
    for number, direction, address, point in product(there, Direction, ADDRESSES, PORTS):
        mine, other = (
            kernel.decide(number, direction, address, *point),
            fresh.decide(number, direction, address, *point),
        )
        assert mine[5:8] == other[5:8]
        assert standing.rules.get(mine.rule) == anew.rules.get(other.rule)
        profile, expected = standing.profiles.get(mine.profile), anew.profiles.get(other.profile)
        assert (profile and profile.outcome) == (expected and expected.outcome)


@settings(max_examples=150, deadline=None)
@given(policies, st.lists(rosters, min_size=1, max_size=6))
def test_changes_say_what_compiling_anew_says(made: list[Policy], history: list[Roster]) -> None:
    standing = Standing(made, *parts(history[0]))
    kernel = kernel_of(standing)
    agree(kernel, standing, made, history[0])
    for roster in history[1:]:
        change = standing.change(*parts(roster))
        assert change is not None
        kernel.change(change)
        agree(kernel, standing, made, roster)


@settings(max_examples=100, deadline=None)
@given(policies, rosters, rosters)
def test_until_the_switch_each_address_is_decided_as_before_or_as_behind_it(
    made: list[Policy], first: Roster, second: Roster
) -> None:
    """Whatever of the addresses has changed already: no packet meets an identity that its table says nothing of."""
    standing = Standing(made, *parts(first))
    kernel = kernel_of(standing)
    alike = [
        number for number in first[0] if number in second[0] and first[0][number][0] == second[0][number][0]
    ]

    def decisions() -> list[PolicyEntry]:
        asked = product(alike, Direction, ADDRESSES, PORTS)
        return [kernel.decide(*whose, *point)[5:] for *whose, point in asked]

    before = decisions()
    change = standing.change(*parts(second))
    assert change is not None
    kernel.put(change.entries)
    assert decisions() == before
    kernel.prefixes.update({prefix: after for prefix, (_, after) in change.identities.items() if after})
    half = decisions()
    kernel.prefixes = {
        prefix: at for prefix, at in kernel.prefixes.items() if change.identities.get(prefix, (0, 1))[1]
    }
    kernel.tables = change.tables
    assert all(now in ends for now, *ends in zip(half, before, decisions(), strict=True))


def test_endpoints_that_the_same_policies_select_share_their_entries() -> None:
    made = [Policy("p", labels_of({"app": "a"}), ingress=(Rule("r", ports=(PortMatch(6, 80),)),))]
    there = {number: Endpoint(f"e{number}", {"app": "a", "name": f"e{number}"}) for number in range(1, 101)}
    whole = Standing(made, there, {}).whole
    assert len(set(whole.tables.values())) == 2 and len(whole.tables) == 200 and len(whole.entries) < 20


def test_what_is_out_of_use_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNUSED_MAX", 3)
    standing = Standing([], {}, {})
    found = [
        standing.change({1: Endpoint("e", {"n": str(at)})}, {1: (ADDRESSES[0],)}) is None for at in range(5)
    ]
    assert found == [False, False, False, True, True]
