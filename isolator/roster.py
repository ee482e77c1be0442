"""Who is who: endpoints by number, outsiders by name, with their addresses. Policy is compiled from it, records name
from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Interface

from isolator.core.identities import Address, Interface
from isolator.core.model import ENTITY, Endpoint, Outsider

LIMITED_BROADCAST = IPv4Address("255.255.255.255")


class Roster:
    """`owners`: who has an address, by the address's text. For the event loop alone."""

    def __init__(self) -> None:
        self.endpoints: dict[int, Endpoint] = {}
        self.addresses: dict[int, tuple[Address, ...]] = {}
        self.outsiders: tuple[Outsider, ...] = ()
        self.owners: dict[str, Endpoint] = {}
        self._texts: dict[int, tuple[str, ...]] = {}  # of addresses: to make them anew takes long

    def put(self, number: int, endpoint: Endpoint, addresses: tuple[Address, ...]) -> None:
        self.endpoints[number], self.addresses[number] = endpoint, addresses
        self._texts[number] = tuple(str(address) for address in addresses)
        self._own()

    def remove(self, number: int) -> None:
        self.endpoints.pop(number, None)
        self.addresses.pop(number, None)
        self._texts.pop(number, None)
        self._own()

    def put_outsiders(self, outsiders: tuple[Outsider, ...]) -> None:
        if outsiders != self.outsiders:
            self.outsiders = outsiders
            self._own()

    def _own(self) -> None:
        """Anew: two may have one address, and keep it when the other loses it. Endpoints come before outsiders."""
        self.owners.clear()
        for outsider in self.outsiders:
            endpoint = Endpoint(outsider.name, outsider.labels)
            self.owners.update((str(address), endpoint) for address in outsider.addresses)
        for number, endpoint in self.endpoints.items():
            self.owners.update(dict.fromkeys(self._texts[number], endpoint))


def with_host(outsiders: Iterable[Outsider], interfaces: Sequence[Interface]) -> tuple[Outsider, ...]:
    """With the host itself as an outsider: its addresses, and what else it listens to. Those addresses of a gateway
    that are the host's own are the host, with the label of its network: `{entity: host}` selects all of the host,
    `{entity: host, network: back}` the gateway of `back`."""
    mine = {each.ip for each in interfaces}
    found = [part for each in outsiders for part in parted(each, mine)]
    taken = {address for each in found for address in each.addresses}
    heard = dict.fromkeys([*(each.ip for each in interfaces), *also_heard(interfaces)])
    rest = tuple(address for address in heard if address not in taken and not address.is_loopback)
    return (*found, Outsider("host", {ENTITY: "host"}, rest))


def also_heard(interfaces: Iterable[Interface]) -> Iterator[Address]:
    """Broadcasts, in a network's lowest address too (kernels before 5.14 take it for one), and IPv6 routers' anycast
    (RFC 4291 section 2.6.1; the kernel joins it where it forwards)."""
    yield LIMITED_BROADCAST
    for each in interfaces:
        network = each.network
        if network.prefixlen < network.max_prefixlen - 1:  # RFC 3021, RFC 6164
            yield network.network_address
            if isinstance(each, IPv4Interface):
                yield network.broadcast_address


def parted(outsider: Outsider, mine: Collection[Address]) -> Iterator[Outsider]:
    """A gateway's addresses that are the host's, and those that are not; the others as they are."""
    if outsider.labels.get(ENTITY) != "gateway":
        yield outsider
        return
    for entity, is_mine in ("host", True), ("gateway", False):
        addresses = tuple(address for address in outsider.addresses if (address in mine) is is_mine)
        if addresses:
            yield Outsider(outsider.name, {**outsider.labels, ENTITY: entity}, addresses)
