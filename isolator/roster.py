"""Who is who: endpoints by number, outsiders by name, with their addresses. Policy is compiled from it, records name
from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from isolator.core.identities import Address
from isolator.core.model import ENTITY, Endpoint, Outsider


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


def with_host(outsiders: Iterable[Outsider], addresses: Sequence[Address]) -> tuple[Outsider, ...]:
    """With the host itself as an outsider. Those addresses of a gateway that are the host's own are the host, with
    the label of its network: `{entity: host}` selects all of the host, `{entity: host, network: back}` the gateway
    of `back`."""
    mine = frozenset(addresses)
    found = [part for each in outsiders for part in parted(each, mine)]
    taken = {address for each in found for address in each.addresses}
    rest = tuple(address for address in addresses if address not in taken and not address.is_loopback)
    return (*found, Outsider("host", {ENTITY: "host"}, rest)) if rest else tuple(found)


def parted(outsider: Outsider, mine: Collection[Address]) -> Iterator[Outsider]:
    """A gateway's addresses that are the host's, and those that are not; the others as they are."""
    if outsider.labels.get(ENTITY) != "gateway":
        yield outsider
        return
    for entity, is_mine in ("host", True), ("gateway", False):
        addresses = tuple(address for address in outsider.addresses if (address in mine) is is_mine)
        if addresses:
            yield Outsider(outsider.name, {**outsider.labels, ENTITY: entity}, addresses)
