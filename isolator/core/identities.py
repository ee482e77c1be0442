"""Addresses to identities: what the kernel's longest-prefix map holds.

Policies name labels and networks; packets carry addresses. Two addresses that no rule can tell apart share
one identity, so the kernel's policy entries multiply with identities, not with addresses.

    networks that policies name, endpoints' addresses, groups', 0.0.0.0/0, ::/0 → prefixes
    each prefix → (whose labels, which networks it lies in)                     → number, from 1

An address's identity is that of its longest prefix: any network that holds the address and is longer would
itself be a longer prefix. IPv4 stands mapped into IPv6 (::ffff:a.b.c.d), but `::/0` is not the parent of
0.0.0.0/0: the families are kept apart. Multicast groups belong to `{entity: multicast}`, addresses of IPv6's link that
nobody is known to have to `{entity: link-local}`: they are near, may be anybody's, the host's too, and not the world's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import NamedTuple

from isolator.core.model import ENTITY, Endpoint, Outsider
from isolator.core.policy import Identity, LabelSet, Network, Policy, labels_of

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
"""An address, and the network that its interface is in."""

IDENTITIES_MAX = 131072
"""Prefixes the kernel's map holds (IDENTITIES_MAX of the shared header): two generations, so half each."""

MAPPED_BITS = 96
MAPPED = 0xFFFF << 32
EVERYWHERE: tuple[Network, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
NEAR: tuple[Network, ...] = (IPv4Network("224.0.0.0/4"), IPv6Network("ff00::/8"), IPv6Network("fe80::/10"))
MULTICAST = frozenset({labels_of({ENTITY: "multicast"})})
LINK = frozenset({labels_of({ENTITY: "link-local"})})
NOBODY: frozenset[LabelSet] = frozenset()


class IdentityPrefix(NamedTuple):
    """One entry of the kernel's map: `address` 16 bytes, `prefixlen` 0 … 128 (an IPv4 /24 is a /120)."""

    address: bytes
    prefixlen: int
    identity: int


@dataclass(frozen=True, slots=True)
class Identities:
    prefixes: tuple[IdentityPrefix, ...]
    numbers: Mapping[Identity, int] = field(hash=False)
    names: Mapping[int, str] = field(hash=False)


class Families:
    """The networks that hold a network or an address, per family, shortest first."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._by_length: dict[tuple[int, int], dict[int, Network]] = {}
        for network in networks:
            of_length = self._by_length.setdefault((network.version, network.prefixlen), {})
            of_length[int(network.network_address)] = network

    def holding(self, version: int, value: int, prefixlen: int) -> frozenset[Network]:
        bits = 32 if version == 4 else 128
        found = set()
        for (family, length), networks in self._by_length.items():
            if family == version and length <= prefixlen:
                network = networks.get(value >> (bits - length) << (bits - length))
                if network is not None:
                    found.add(network)
        return frozenset(found)


def unmapped(address: Address) -> Address:
    """::ffff:a.b.c.d is the IPv4 address a.b.c.d (RFC 4291 section 2.5.5.2)."""
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def unowned(place: Address | Network) -> frozenset[LabelSet]:
    """Whose an address is that no endpoint and no outsider has."""
    if place.version == 6 and place.is_link_local:
        return LINK
    return MULTICAST if place.is_multicast else NOBODY


def owners_of(
    endpoints: Mapping[int, Endpoint],
    addresses: Mapping[int, Iterable[Address]],
    outsiders: Iterable[Outsider] = (),
) -> dict[Address, frozenset[LabelSet]]:
    owners: dict[Address, frozenset[LabelSet]] = {}
    having: list[tuple[Mapping[str, str], Iterable[Address]]] = [
        *((endpoint.labels, addresses.get(number, ())) for number, endpoint in endpoints.items()),
        *((each.labels, each.addresses) for each in outsiders),
    ]
    for labels, held in having:
        for address in map(unmapped, held):
            owners[address] = owners.get(address, NOBODY) | {labels_of(labels)}
    return owners


def identify(
    address: Address, policies: Iterable[Policy], owners: Mapping[Address, frozenset[LabelSet]]
) -> Identity:
    """One address's identity, without a map: for questions, not for packets."""
    address = unmapped(address)
    families = Families(network for policy in policies for network in policy.networks())
    held = families.holding(address.version, int(address), address.max_prefixlen)
    return Identity(owners.get(address, unowned(address)), held)


def build_identities(
    policies: Iterable[Policy],
    endpoints: Mapping[int, Endpoint],
    addresses: Mapping[int, Iterable[Address]],
    outsiders: Iterable[Outsider] = (),
) -> Identities:
    """Every address has an identity afterwards: 0.0.0.0/0 and ::/0 are always among the prefixes."""
    named = {network for policy in policies for network in policy.networks()}
    families = Families(named)
    owners = owners_of(endpoints, addresses, outsiders)
    prefixes: list[IdentityPrefix] = []
    numbers: dict[Identity, int] = {}

    def add(version: int, value: int, prefixlen: int, owned: frozenset[LabelSet]) -> None:
        identity = Identity(owned, families.holding(version, value, prefixlen))
        number = numbers.setdefault(identity, len(numbers) + 1)
        prefixes.append(mapped_prefix(version, value, prefixlen, number))

    for network in sorted({*named, *EVERYWHERE, *NEAR}, key=network_order):
        whole = network.prefixlen == network.max_prefixlen and network.network_address in owners
        if not whole:
            add(network.version, int(network.network_address), network.prefixlen, unowned(network))
    for address in sorted(owners, key=lambda each: (each.version, int(each))):
        add(address.version, int(address), address.max_prefixlen, owners[address])
    return Identities(tuple(prefixes), numbers, {number: name_of(each) for each, number in numbers.items()})


def network_order(network: Network) -> tuple[int, int, int]:
    return network.version, network.prefixlen, int(network.network_address)


def mapped_prefix(version: int, value: int, prefixlen: int, identity: int) -> IdentityPrefix:
    if version == 4:
        value, prefixlen = MAPPED | value, MAPPED_BITS + prefixlen
    return IdentityPrefix(value.to_bytes(16, "big"), prefixlen, identity)


def name_of(identity: Identity) -> str:
    """`app=shop,role=api` for an endpoint, `world` or `world 10.0.0.0/8` for the others."""
    networks = " ".join(str(network) for network in sorted(identity.networks, key=network_order))
    owners = sorted(",".join(f"{key}={value}" for key, value in sorted(owner)) for owner in identity.owners)
    return " ".join(filter(None, ["|".join(each or "endpoint" for each in owners) or "world", networks]))
