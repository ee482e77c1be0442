"""Who may pass the gate (isolator.datapath.gate): whoever is enforced, whoever is left alone, whoever is no engine's.

    endpoint spliced, or exempt ──▶ its host end ─┐
    host end at no bridge of the engine's ────────┴▶ admitted        everybody else: closed

Whatever goes wrong here, who is not admitted stays closed, and is looked for again a second later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import structlog

from isolator.control.runtime import Runtime, RuntimeAwayError
from isolator.core.identities import Interface
from isolator.datapath.errors import DatapathError
from isolator.datapath.gate import HostEnd
from isolator.worker import Worker

ASK_AGAIN = 10.0  # s until an engine that was away is asked for its bridges again: each time may block

log = structlog.get_logger()

Place = tuple[str, int | str]
"""A device that leads to a host end: a namespace (empty: the isolator netns), and an ifindex, name or MAC in it."""


class Gate(Protocol):
    """What this needs of isolator.datapath.gate.Gate, which says what each does; all of it blocks."""

    def shut(self) -> None: ...
    def remove(self) -> None: ...
    def addresses(self) -> list[Interface]: ...
    def host_ends(self) -> list[HostEnd]: ...
    def host_end(self, netns: str, which: int | str) -> int: ...
    def admit(self, wanted: Collection[int]) -> bool: ...
    def admit_one(self, ifindex: int) -> None: ...
    def expel(self, ifindex: int) -> None: ...


class Admission:
    """`gate` None: endpoints that hang at no engine's bridges, nothing is done. `closed`: new containers are cut off
    until they are admitted; else there is no gate."""

    def __init__(
        self,
        gate: Gate | None,
        closed: bool,
        isolator_netns: str,
        runtime: Runtime,
        work: Worker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host, self._isolator_netns = gate, isolator_netns
        self._gate = gate if closed else None
        self._runtime, self._work = runtime, work
        self._ends: dict[Place, int] = {}
        self._addresses: list[Interface] = []
        self._foreign: set[int] = set()
        self._closed: set[int] = set()
        self._told: set[int] = set()
        self._ask_again = 0.0
        self._clock = clock

    async def shut(self) -> None:
        """Before anything else is done. Raises NftablesError."""
        if self._gate is not None:
            await self._work(self._gate.shut)
        elif self._host is not None:
            await self._work(self._host.remove)

    async def open(self) -> None:
        """For good: nobody is protected any more."""
        if self._gate is not None:
            await self._work(self._gate.remove)

    async def host_addresses(self) -> list[Interface]:
        """Those that were known last, where they cannot be asked for: they must not become the world's."""
        try:
            self._addresses = await self._work(self._host.addresses) if self._host is not None else []
        except OSError as error:
            log.error("the host's addresses cannot be asked for", error=str(error))
        return self._addresses

    async def admit(self, place: Place) -> None:
        """At once: its traffic waits for it."""
        if self._gate is None:
            return
        try:
            if end := await self._find(self._gate, place):
                await self._work(self._gate.admit_one, end)
        except (DatapathError, OSError) as error:
            log.error("not admitted, tried again", place=place, error=str(error))

    async def expel(self, place: Place) -> None:
        """Before its protection ends. Raises DatapathError or OSError: then it must not end."""
        if self._gate is not None and (end := await self._find(self._gate, place)):
            await self._work(self._gate.expel, end)

    async def settle(self, places: Iterable[Place]) -> None:
        """These, and who is no engine's, are admitted, and nobody else."""
        if self._gate is None:
            return
        try:
            await self._settle(self._gate, list(places))
        except (DatapathError, OSError) as error:
            log.error("the gate stays as it is, tried again", error=str(error))

    async def _settle(self, gate: Gate, places: list[Place]) -> None:
        there = await self._work(gate.host_ends)
        present = {each.ifindex for each in there}
        self._ends = {place: end for place, end in self._ends.items() if place in places and end in present}
        admitted = {await self._find(gate, place) for place in places} - {0}
        await self._look_at(there, admitted)
        if await self._work(gate.admit, admitted | self._foreign):
            log.warning("somebody had taken the gate away: made anew", admitted=len(admitted | self._foreign))

    async def _find(self, gate: Gate, place: Place) -> int:
        if place not in self._ends:
            netns, which = place
            try:
                end = await self._work(gate.host_end, netns or self._isolator_netns, which)
            except (DatapathError, OSError):  # its container is on its way out
                return 0
            if end == 0:
                return 0
            self._ends[place] = end
        return self._ends[place]

    async def _look_at(self, there: list[HostEnd], admitted: set[int]) -> None:
        """Which of the others are no engine's. The engine is asked after the look: whose bridge it did not know by
        then has been there before it."""
        self._foreign &= {each.ifindex for each in there}
        unknown = [each for each in there if each.ifindex not in admitted | self._foreign]
        self._closed &= {each.ifindex for each in unknown}
        if not unknown or self._clock() < self._ask_again:
            return
        try:
            bridges = await self._work(self._runtime.bridges)
        except RuntimeAwayError:
            self._ask_again = self._clock() + ASK_AGAIN
            return
        self._foreign |= {each.ifindex for each in unknown if each.bridge not in bridges}
        self._tell_closed([each for each in unknown if each.bridge in bridges])

    def _tell_closed(self, closed: list[HostEnd]) -> None:
        """Once, of those that stay so: nobody else may know of them."""
        for each in closed:
            if each.ifindex not in self._closed:
                self._closed.add(each.ifindex)
            elif each.ifindex not in self._told:
                self._told.add(each.ifindex)
                log.warning("a port of the engine's is closed", port=each.name, bridge=each.bridge)
