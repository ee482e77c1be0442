"""Who is protected: endpoints by number, with their addresses. Policy is compiled from it, records name from it."""

from __future__ import annotations

from isolator.core.identities import Address
from isolator.core.model import Endpoint


class Roster:
    """`owners`: the endpoint that has an address, by the address's text. For the event loop alone."""

    def __init__(self) -> None:
        self.endpoints: dict[int, Endpoint] = {}
        self.addresses: dict[int, tuple[Address, ...]] = {}
        self.owners: dict[str, Endpoint] = {}

    def put(self, number: int, endpoint: Endpoint, addresses: tuple[Address, ...]) -> None:
        self.endpoints[number], self.addresses[number] = endpoint, addresses
        self._own()

    def remove(self, number: int) -> None:
        self.endpoints.pop(number, None)
        self.addresses.pop(number, None)
        self._own()

    def _own(self) -> None:
        """Anew: two endpoints may have one address, and keep it when the other loses it."""
        self.owners.clear()
        for number, endpoint in self.endpoints.items():
            self.owners.update((str(address), endpoint) for address in self.addresses[number])
