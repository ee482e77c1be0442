"""A kernel, a policy and a runtime that a test of the endpoints sets.

The worker is the real one, and the kernel takes its time: changes that come at once do meet.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from isolator.admission import Place
from isolator.control.agent_view import EndpointState
from isolator.control.runtime import Change, ChangeKind, RuntimeEndpoint
from isolator.core.compile import PolicyTooLarge
from isolator.core.identities import Address, Interface
from isolator.core.model import Endpoint, Outsider
from isolator.datapath.splice import InterfaceMissingError, Recovered, Splice, SpliceRequest
from isolator.endpoints import Endpoints
from isolator.roster import Roster
from isolator.worker import Worker

WAITING, PENDING, ENFORCED = EndpointState.WAITING, EndpointState.PENDING, EndpointState.ENFORCED
FAILED, RESTORED, EXEMPT = EndpointState.FAILED, EndpointState.RESTORED, EndpointState.EXEMPT
APPEARED, VANISHED = ChangeKind.APPEARED, ChangeKind.VANISHED
REPLACED, RELABELLED = ChangeKind.REPLACED, ChangeKind.RELABELLED
SLOW = 0.005  # s for what the kernel does


def endpoint(name: str, **labels: str) -> RuntimeEndpoint:
    return RuntimeEndpoint(name, Path(f"/run/netns/{name}"), "eth0", labels)


def address(name: str, last: int = 0) -> Address:
    return ip_address(f"10.0.{ord(name[0]) - ord('a')}.{last}")


def splice(name: str, port: int = 100, interface: str = "eth0", cookie: int = 0) -> Splice:
    netns, mac = f"/run/netns/{name}", "02:00:00:00:00:01"
    return Splice(name, netns, interface, port, port + 1, 2, mac, (address(name),), cookie)


class FakeKernel:
    """Implements endpoints.Kernel. `there`: addresses by endpoint whose interface is there; `cookies`: which
    namespace it is in; `ports`: numbers of what is spliced."""

    def __init__(self, *there: str) -> None:
        self.there = {name: (address(name),) for name in there}
        self.cookies: dict[str, int] = {}
        self.ports: dict[str, int] = {}
        self.done: list[str] = []
        self.found = Recovered()
        self.tidied: set[int] | None = None
        self.refuses: dict[str, Exception] = {}
        self.busy = 0

    def _do(self, what: str, name: str) -> None:
        self.busy += 1
        assert self.busy == 1
        time.sleep(SLOW)
        self.done.append(f"{what} {name}")
        self.busy -= 1
        if f"{what} {name}" in self.refuses:
            raise self.refuses[f"{what} {name}"]

    def spliced(self) -> dict[tuple[str, str], str]:
        return {(each.netns, each.interface): each.name for each in self.found.adopted}

    def recover(self) -> Recovered:
        return self.found

    def number_of(self, splice: Splice) -> int | None:
        return self.ports.get(splice.name)

    def numbers(self) -> set[int]:
        return set(self.ports.values())

    def adopt(self, splice: Splice, number: int) -> None:
        self._do("adopt", splice.name)
        self.ports[splice.name] = number

    def tidy(self, numbers: Collection[int]) -> None:
        self.tidied = set(numbers)

    def look(self, request: SpliceRequest) -> tuple[Address, ...]:
        self._do("look", request.name)
        if request.name not in self.there:
            raise InterfaceMissingError(f"{request.name}: eth0 is missing")
        return self.there[request.name]

    def protect(self, request: SpliceRequest, number: int) -> Splice:
        self._do("protect", request.name)
        assert request.name not in self.ports and number not in self.numbers() and number > 0
        self.ports[request.name] = number
        made = splice(request.name, cookie=self.cookies.get(request.name, 0))
        return replace(made, addresses=self.there[request.name])

    def release(self, splice: Splice, number: int) -> None:
        self._do("release", splice.name)
        del self.ports[splice.name]

    def lose(self, splice: Splice, number: int) -> None:
        assert self.ports.pop(splice.name) == number  # forgotten in any case
        self._do("lose", splice.name)

    def addresses(self, splices: Iterable[Splice]) -> dict[str, tuple[Address, ...] | None]:
        same = {each.name: each.cookie == self.cookies.get(each.name, 0) for each in splices}
        return {name: self.there.get(name) if stands else None for name, stands in same.items()}

    def set_addresses(self, number: int, addresses: Iterable[Address]) -> None:
        self._do("set_addresses", str(number))


class FakePolicy:
    """Implements endpoints.Policy. `most`: endpoints that fit; `written`: the names of each policy."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.most = 100
        self.exempt: dict[str, str] = {}  # reason by the value of the label `role`
        self.in_force: dict[int, tuple[Endpoint, object]] = {}
        self.written: list[list[str]] = []

    def exempts(self, labels: Mapping[str, str], inherited: Collection[str] = ()) -> str | None:
        return self.exempt.get(labels.get("role", ""))

    async def enforce(self) -> None:
        wanted: dict[int, tuple[Endpoint, object]] = {
            number: (each, self.roster.addresses[number]) for number, each in self.roster.endpoints.items()
        }
        if wanted == self.in_force:
            return
        await asyncio.sleep(SLOW)
        if len(wanted) > self.most:
            raise PolicyTooLarge("too much")
        self.in_force = wanted
        self.written.append(sorted(each.name for each, _ in wanted.values()))

    async def retire(self) -> None: ...

    async def catch_up(self) -> None:
        with contextlib.suppress(PolicyTooLarge):
            await self.enforce()


class FakeGate:
    """Implements endpoints.Gate. `admitted`: as `settle` had it last; `host`: addresses of the host."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.admitted: list[Place] = []
        self.host: list[Interface] = []

    async def shut(self) -> None:
        self.calls.append("shut")

    async def open(self) -> None:
        self.calls.append("open")

    async def host_addresses(self) -> list[Interface]:
        return self.host

    async def admit(self, place: Place) -> None:
        self.calls.append(f"admit {place}")

    async def expel(self, place: Place) -> None:
        self.calls.append(f"expel {place}")

    async def settle(self, places: Iterable[Place]) -> None:
        self.admitted = list(places)


class FakeRuntime:
    """Implements runtime.Runtime over names that a test sets."""

    name = "fake"
    host = None

    def bridges(self) -> set[str]:
        return set()

    def outsiders(self) -> tuple[Outsider, ...]:
        return self.known

    def unprotectable(self) -> dict[str, str]:
        return {}

    def recall(self, names: Mapping[tuple[str, str], str]) -> None:
        self.recalled = dict(names)

    def opened(self, endpoints: Collection[RuntimeEndpoint]) -> None:
        self.open = sorted(each.name for each in endpoints)

    def __init__(self, *configured: str, there: Collection[str] = ()) -> None:
        self.configured = list(configured)
        self.there = set(there)
        self.told: list[Change | Exception] = []
        self.known: tuple[Outsider, ...] = ()

    def endpoints(self) -> list[RuntimeEndpoint]:
        return [endpoint(name) for name in self.configured if name in self.there]

    def missing(self) -> list[RuntimeEndpoint]:
        return [endpoint(name) for name in self.configured if name not in self.there]

    def configure(self, configured: Sequence[Any]) -> set[str]:
        gone = set(self.configured) - set(configured)
        self.configured = list(configured)
        return gone

    async def changes(self) -> AsyncIterator[Change]:
        while True:
            await asyncio.sleep(0.001)
            if self.told:
                told = self.told.pop(0)
                if isinstance(told, Exception):
                    raise told
                yield told


class World:
    """Configured endpoints, of which `there` have a namespace and an interface."""

    def __init__(self, *configured: str, there: Collection[str] = ()) -> None:
        self.kernel = FakeKernel(*there)
        self.runtime = FakeRuntime(*configured, there=there)
        self.roster = Roster()
        self.policy = FakePolicy(self.roster)
        self.now = 0.0
        self.forgotten: list[int] = []
        self.worker = Worker()
        self.gate = FakeGate()
        self.endpoints = Endpoints(
            self.runtime, self.kernel, self.policy, self.roster, self.gate, self.worker, asyncio.Lock(),
            self.forgotten.append, lambda: self.now,
        )  # fmt: skip

    def play(self, *steps: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """One after the other, from `take_up` on."""

        async def run() -> None:
            await self.endpoints.take_up()
            for step in steps:
                await step()
            await self.worker.close()

        asyncio.run(run())

    def at_once(
        self, *steps: Callable[[], Coroutine[Any, Any, object]]
    ) -> Callable[[], Coroutine[Any, Any, object]]:
        async def run() -> None:
            await asyncio.gather(*(step() for step in steps))

        return run

    def change(self, kind: ChangeKind, name: str, **labels: str) -> Callable[[], Coroutine[Any, Any, object]]:
        async def run() -> None:
            (self.runtime.there.discard if kind is VANISHED else self.runtime.there.add)(name)
            if kind is REPLACED:
                self.kernel.cookies[name] = self.kernel.cookies.get(name, 0) + 1
            await self.endpoints.change(Change(kind, endpoint(name, **labels)))

        return run

    def refresh(self, seconds: float = 0.0) -> Callable[[], Coroutine[Any, Any, object]]:
        async def run() -> None:
            self.now += seconds
            await self.endpoints.refresh()

        return run

    def do(self, what: Callable[[], object]) -> Callable[[], Coroutine[Any, Any, object]]:
        async def run() -> None:
            what()

        return run

    @property
    def states(self) -> dict[str, EndpointState]:
        return {each.name: each.state for each in self.endpoints}

    def sound(self) -> None:
        """Each number has one owner, and kernel, roster and policy agree."""
        spliced = {each.name: each.number for each in self.endpoints if each.state is ENFORCED}
        assert spliced == self.kernel.ports
        assert {number: each.name for number, each in self.roster.endpoints.items()} == {
            number: name for name, number in spliced.items()
        }
        assert sorted(each.name for each, _ in self.policy.in_force.values()) == sorted(spliced)
        assert all(
            (each.splice is None) == (each.number == 0) == (each.state is not ENFORCED)
            for each in self.endpoints
        )
