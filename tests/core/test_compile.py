"""The compiler against an oracle that knows nothing of identities, entries or order.

Left: what the kernel would do with the compiled entries (longest prefix, four lookups, then the profile).
Right: every rule evaluated by itself for one packet and one request. They must agree, so nothing is widened.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isolator.core.compile import Compiled, PolicyEntry, PolicyTooLarge, compile_policies
from isolator.core.identities import Address
from isolator.core.model import Direction, DropReason, Endpoint, Outsider, PolicyFlag, RuleRef, Verdict
from isolator.core.pattern import PathPattern
from isolator.core.policy import (
    Action,
    DenyWith,
    Failure,
    HttpRule,
    Mode,
    Peer,
    Policy,
    PortMatch,
    Range,
    Rule,
    Selected,
    World,
    labels_of,
)
from tests.core.requests import Ask

ENDPOINTS = {
    1: Endpoint("api", {"app": "shop", "role": "api"}),
    2: Endpoint("web", {"app": "shop", "role": "web"}),
    3: Endpoint("spy", {"role": "spy"}),
    4: Endpoint("bare", {}),
}
LINK_LOCAL = ip_address("fe80::1")  # of two endpoints
ADDRESSES: dict[int, list[Address]] = {
    1: [ip_address("10.0.0.1"), ip_address("fd00::1"), LINK_LOCAL],
    2: [ip_address("10.0.0.2"), LINK_LOCAL],
    3: [ip_address("10.9.7.3"), ip_address("fd00::3")],
    4: [],
}
PEERS = [
    *(address for addresses in ADDRESSES.values() for address in addresses),
    *map(
        ip_address,
        (
            "10.0.0.77",
            "10.9.1.1",
            "10.9.7.9",
            "8.8.8.8",
            "0.0.0.0",
            "224.0.0.251",
            "239.1.0.1",
            "223.255.255.255",
            "240.0.0.0",
            "fd00::77",
            "2001:db8::1",
            "::",
            "ff02::fb",
            "feff::1",
        ),
    ),
]
NETWORKS = [
    ip_network(each)
    for each in (
        "0.0.0.0/0", "::/0", "10.0.0.0/8", "10.0.0.0/24", "10.0.0.1/32", "10.9.0.0/16", "10.9.7.0/24",
        "10.9.7.3/32", "fd00::/8", "fd00::/64", "fd00::3/128", "192.0.0.0/2", "224.0.0.251/32", "ff02::/16",
    )
]  # fmt: skip
POINTS = [(6, 80), (6, 443), (6, 9), (17, 80), (17, 53), (1, 0), (132, 0)]
ASKS = [
    Ask("GET", "/a"),
    Ask("GET", "/a/b"),
    Ask("POST", "/a"),
    Ask("GET", "/c"),
    Ask("GET", "/a", upgrade="h2c"),
]


# -- the kernel, and the oracle ----------------------------------------------------------------------------


def kernel(
    compiled: Compiled, endpoint: int, direction: Direction, peer: Address, protocol: int, port: int
) -> PolicyEntry:
    """isolator_flow4.h, decide() and policy_at()."""
    mapped = peer.packed if isinstance(peer, IPv6Address) else bytes(10) + b"\xff\xff" + peer.packed
    value = int.from_bytes(mapped, "big")
    holding = [
        (prefix.prefixlen, prefix.identity)
        for prefix in compiled.identities
        if int.from_bytes(prefix.address, "big") >> (128 - prefix.prefixlen)
        == value >> (128 - prefix.prefixlen)
    ]
    assert holding, "every address has an identity"
    identity = max(holding)[1]
    entries = {
        (entry.peer, entry.protocol, entry.port): entry
        for entry in compiled.entries
        if entry.endpoint == endpoint and entry.direction is direction
    }
    order = [(identity, protocol, port), (identity, protocol, 0), (identity, 0, 0), (0, 0, 0)]
    return next(entries[key] for key in order if key in entries)


def peer_matches(peer: Peer, address: Address, deny: bool) -> bool:
    owners = [ENDPOINTS[number].labels.items() for number, having in ADDRESSES.items() if address in having]
    groups = any(address in ip_network(each) for each in ("224.0.0.0/4", "ff00::/8"))
    match peer:
        case World():
            return not owners and not groups
        case Range(network, excluded):
            return address in network and not any(address in each for each in excluded)
        case Selected(labels):
            hits = [all(item in owner for item in labels) for owner in owners]
            return any(hits) if deny else bool(hits) and all(hits)


def applying(
    policies: Iterable[Policy], direction: Direction, address: Address, protocol: int, port: int
) -> list[Rule]:
    found = []
    for policy in policies:
        for rule in policy.rules(direction) or ():
            by_port = any(match.protocol in (0, protocol) and match.port in (0, port) for match in rule.ports)
            by_peer = rule.peers is None or any(
                peer_matches(peer, address, rule.action is Action.DENY) for peer in rule.peers
            )
            if by_port and by_peer and (rule.http is None or protocol == 6):
                found.append(rule)
    return found


def allowed(
    policies: list[Policy], direction: Direction, address: Address, protocol: int, port: int, ask: Ask
) -> bool:
    """Rule by rule: deny beats allow, and what no rule allows is denied."""
    if not policies:
        return True
    rules = applying(policies, direction, address, protocol, port)
    plain = [rule for rule in rules if rule.http is None]
    reading = [rule for rule in rules if rule.http is not None]
    if any(rule.action is Action.DENY for rule in plain):
        return False
    hit = {rule.action for rule in reading if any(line.matches(ask) for line in rule.http or ())}
    if Action.DENY in hit:
        return False
    denies_something = any(rule.action is Action.DENY and rule.http for rule in reading)
    if ask.upgrade and reading and (not plain or denies_something):
        return False
    return bool(plain) or bool(hit)


# -- what hypothesis makes ---------------------------------------------------------------------------------

selectors = st.sampled_from([{}, {"app": "shop"}, {"role": "api"}, {"role": "spy"}, {"no": "body"}]).map(
    labels_of
)
networks = st.sampled_from(NETWORKS)
peers = (
    selectors.map(Selected)
    | st.builds(Range, networks, st.lists(networks, max_size=2).map(tuple))
    | st.just(World())
)
ports = st.sampled_from([(0, 0), (6, 0), (6, 80), (6, 443), (17, 0), (17, 53), (1, 0)]).map(
    lambda pair: PortMatch(*pair)
)
tcp_ports = st.sampled_from([0, 80, 443]).map(lambda port: PortMatch(6, port))
lines = st.builds(
    HttpRule,
    st.none() | st.just(frozenset({"GET"})),
    st.none() | st.sampled_from(["/a", "/a/**", "/{x}"]).map(PathPattern),
)
some_peers = st.none() | st.lists(peers, max_size=2).map(tuple)
actions = st.sampled_from(Action)


def lists(of: st.SearchStrategy[PortMatch]) -> st.SearchStrategy[tuple[PortMatch, ...]]:
    return st.lists(of, min_size=1, max_size=2).map(tuple)


rules = st.builds(Rule, st.just("r"), actions, some_peers, lists(ports)) | st.builds(
    Rule,
    st.just("r"),
    actions,
    some_peers,
    lists(tcp_ports),
    st.lists(lines, min_size=1, max_size=2).map(tuple),
)
rule_lists = st.none() | st.lists(rules, max_size=4).map(tuple)
policies = st.builds(
    Policy,
    st.just("p"),
    selectors,
    st.sampled_from([Mode.PROTECT, Mode.PROTECT, Mode.MONITOR]),
    st.sampled_from(Failure),
    st.sampled_from(DenyWith),
    rule_lists,
    rule_lists,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(policies, max_size=4), st.sampled_from([1, 2, 4]), st.sampled_from(Direction))
@example([Policy("p", ingress=(Rule("r", peers=(Range(ip_network("::/0")),)),))], 1, Direction.INGRESS)
def test_compiling_agrees_with_every_rule_by_itself(
    made: list[Policy], endpoint: int, direction: Direction
) -> None:
    compiled = compile_policies(made, ENDPOINTS, ADDRESSES, 7)
    selecting = [policy for policy in made if policy.selects(ENDPOINTS[endpoint].labels, direction)]
    enforcing = [policy for policy in selecting if policy.mode is Mode.PROTECT]
    for peer in PEERS:
        for protocol, port in POINTS:
            entry = kernel(compiled, endpoint, direction, peer, protocol, port)
            for ask in ASKS:
                where = (direction, peer, protocol, port, ask)
                passes = allowed(enforcing, *where)
                tried = allowed(selecting, *where)
                if entry.verdict is Verdict.INSPECT:
                    assert protocol == 6
                    decision = compiled.profiles[entry.profile].decide(ask)
                    verdict, trial = decision.verdict, decision.trial
                else:
                    verdict, trial = entry.verdict, bool(entry.flags & PolicyFlag.TRIAL)
                assert (verdict is Verdict.ALLOW) is passes, where
                assert trial is (passes and not tried), where


@settings(deadline=None)
@given(st.lists(policies, max_size=4))
def test_entries_are_well_formed(made: list[Policy]) -> None:
    compiled = compile_policies(made, ENDPOINTS, ADDRESSES, 7)
    keys = [(e.endpoint, e.direction, e.peer, e.protocol, e.port) for e in compiled.entries]
    assert len(keys) == len(set(keys))
    assert len({(prefix.address, prefix.prefixlen) for prefix in compiled.identities}) == len(
        compiled.identities
    )
    assert {prefix.identity for prefix in compiled.identities} == set(compiled.identity_names)
    assert min(compiled.identity_names) == 1
    for entry in compiled.entries:
        assert entry.peer or (entry.protocol, entry.port) == (0, 0)
        assert entry.protocol or not entry.port
        assert bool(entry.profile) is (entry.verdict is Verdict.INSPECT)
        assert entry.profile in (0, *compiled.profiles) and entry.rule in (0, *compiled.rules)
        dropped = entry.verdict in (Verdict.DROP, Verdict.RESET)
        assert bool(entry.reason) is (dropped or bool(entry.flags & PolicyFlag.TRIAL))


@settings(deadline=None)
@given(st.lists(policies, max_size=4))
def test_the_same_input_gives_the_same_numbers(made: list[Policy]) -> None:
    assert compile_policies(made, ENDPOINTS, ADDRESSES, 7) == compile_policies(made, ENDPOINTS, ADDRESSES, 7)


# -- single cases ------------------------------------------------------------------------------------------


def entries_of(policy: Policy, endpoint: int, direction: Direction) -> dict[tuple[str, int, int], str]:
    compiled = compile_policies([policy], ENDPOINTS, ADDRESSES, 1)
    names = {0: "*", **compiled.identity_names}
    return {
        (names[entry.peer], entry.protocol, entry.port): entry.verdict.name
        for entry in compiled.entries
        if entry.endpoint == endpoint and entry.direction is direction
    }


def test_nothing_selected_is_allowed() -> None:
    assert entries_of(Policy("p", ingress=()), 1, Direction.EGRESS) == {("*", 0, 0): "ALLOW"}
    assert entries_of(Policy("p", ingress=()), 1, Direction.INGRESS) == {("*", 0, 0): "DROP"}


def test_an_empty_peer_list_matches_nobody() -> None:
    policy = Policy("p", ingress=(Rule("r", peers=()),))
    assert entries_of(policy, 1, Direction.INGRESS) == {("*", 0, 0): "DROP"}


def test_one_rule_one_entry() -> None:
    rule = Rule("r", peers=(Selected(labels_of({"role": "spy"})),), ports=(PortMatch(6, 80),))
    assert entries_of(Policy("p", ingress=(rule,)), 1, Direction.INGRESS) == {
        ("*", 0, 0): "DROP",
        ("role=spy", 6, 80): "ALLOW",
    }


def test_a_narrow_deny_does_not_leak_into_a_wide_allow() -> None:
    everything = Rule("all", peers=(World(),))
    deny = Rule("no-dns", Action.DENY, (World(),), (PortMatch(17, 53),))
    assert entries_of(Policy("p", egress=(everything, deny)), 1, Direction.EGRESS) == {
        ("*", 0, 0): "DROP",
        ("world", 0, 0): "ALLOW",
        ("world", 17, 53): "DROP",
    }


def test_a_wide_deny_beats_a_narrow_allow() -> None:
    narrow = Rule("ssh", peers=None, ports=(PortMatch(6, 22),))
    deny = Rule("none", Action.DENY, (World(),))
    found = entries_of(Policy("p", ingress=(narrow, deny)), 1, Direction.INGRESS)
    assert found[("world", 0, 0)] == "DROP" and ("world", 6, 22) not in found
    assert found[("role=spy", 6, 22)] == "ALLOW"


def test_an_inspected_entry_points_at_its_profile_and_rule() -> None:
    rule = Rule("read", ports=(PortMatch(6, 80),), http=(HttpRule(),))
    policy = Policy("p", failure=Failure.OPEN, select=labels_of({"role": "api"}), ingress=(rule,))
    compiled = compile_policies([policy], ENDPOINTS, ADDRESSES, 1)
    inspected = [entry for entry in compiled.entries if entry.verdict is Verdict.INSPECT]
    assert {entry.profile for entry in inspected} == {1} and set(compiled.profiles) == {1}
    assert {compiled.rules[entry.rule] for entry in inspected} == {RuleRef("p", "read")}
    assert {entry.flags for entry in inspected} == {PolicyFlag.FAIL_OPEN}


def test_monitor_mode_is_an_allow_with_the_reason() -> None:
    deny = Rule("spies", Action.DENY, (Selected(labels_of({"role": "spy"})),))
    compiled = compile_policies([Policy("p", mode=Mode.MONITOR, ingress=(deny,))], ENDPOINTS, ADDRESSES, 1)
    spies = kernel(compiled, 1, Direction.INGRESS, IPv4Address("10.9.7.3"), 6, 80)
    others = kernel(compiled, 1, Direction.INGRESS, IPv4Address("10.0.0.2"), 6, 80)
    assert (spies.verdict, spies.flags, spies.reason) == (
        Verdict.ALLOW,
        PolicyFlag.TRIAL,
        DropReason.POLICY_DENY,
    )
    assert (others.verdict, others.flags, others.reason) == (
        Verdict.ALLOW, PolicyFlag.TRIAL, DropReason.POLICY_DEFAULT,
    )  # fmt: skip


def test_addresses_nobody_tells_apart_share_an_identity() -> None:
    many = {number: Endpoint(f"e{number}", {"app": "shop"}) for number in range(1, 51)}
    addresses: dict[int, list[Address]] = {number: [IPv4Address(f"10.0.0.{number}")] for number in many}
    compiled = compile_policies([Policy("p", ingress=(Rule("r", peers=(World(),)),))], many, addresses, 1)
    assert sorted(compiled.identity_names.values()) == [
        "app=shop",
        "entity=link-local",
        "entity=multicast",
        "world",
    ]
    assert len(compiled.entries) == 50 * (2 + 1)


@pytest.mark.parametrize(("peer", "who"), [
    (Selected(labels_of({})), ["app=web"]),
    (Selected(labels_of({"app": "web"})), ["app=web"]),
    (Selected(labels_of({"entity": "host"})), ["entity=host", "entity=host,network=back"]),
    (Selected(labels_of({"entity": "host", "network": "back"})), ["entity=host,network=back"]),
    (Selected(labels_of({"entity": "multicast"})), ["entity=multicast"]),
    (Selected(labels_of({"entity": "link-local"})), ["entity=link-local"]),
    (Selected(labels_of({"network": "back"})), []),
    (World(), ["world"]),
])  # fmt: skip
def test_the_host_and_gateways_are_meant_only_where_they_are_named(peer: Peer, who: list[str]) -> None:
    """Neither `every endpoint` nor `the world` lets them in."""
    outsiders = [
        Outsider("host", {"entity": "host"}, (IPv4Address("10.0.0.1"),)),
        Outsider("gateway of back", {"entity": "host", "network": "back"}, (IPv4Address("10.1.0.1"),)),
        Outsider("web", {"app": "web"}, (IPv4Address("10.1.0.9"),)),
    ]
    policy = Policy("p", labels_of({"app": "shop"}), ingress=(Rule("r", peers=(peer,)),))
    shop = {1: Endpoint("shop", {"app": "shop"})}
    compiled = compile_policies([policy], shop, {1: []}, 1, outsiders)
    allowed = {each.peer for each in compiled.entries if each.verdict is Verdict.ALLOW and not each.direction}
    assert sorted(compiled.identity_names[each] for each in allowed) == who


def test_too_large_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isolator.core.compile.POLICY_MAX", 4)
    with pytest.raises(PolicyTooLarge, match="more than 2 policy entries"):
        compile_policies([], ENDPOINTS, ADDRESSES, 1)
