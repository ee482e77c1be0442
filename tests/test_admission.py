"""Who passes the gate: endpoints by their host ends, strangers by their bridge."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

import pytest

from isolator.admission import Admission
from isolator.control.runtime import RuntimeAwayError
from isolator.core.identities import Interface
from isolator.datapath.gate import HostEnd
from isolator.datapath.netns import NetnsMissingError
from isolator.datapath.nftables import NftablesError
from isolator.worker import Worker
from tests.endpoint_world import FakeRuntime


class FakeKernelGate:
    """Implements admission.Gate. `ends`: host end by (netns, device)."""

    def __init__(self) -> None:
        self.there = [
            HostEnd(10, "vetha", "docker0"),
            HostEnd(11, "vethb", "docker0"),
            HostEnd(20, "vethl", "lxcbr0"),
        ]
        self.ends: dict[tuple[str, int | str], int] = {("isolator", 4): 10, ("/run/netns/b", "eth0"): 11}
        self.admitted: set[int] = set()
        self.asked = 0
        self.refuses = False

    def shut(self) -> None: ...
    def remove(self) -> None:
        self.admitted = {each.ifindex for each in self.there}

    def addresses(self) -> list[Interface]:
        raise OSError("busy")

    def host_ends(self) -> list[HostEnd]:
        return self.there

    def host_end(self, netns: str, which: int | str) -> int:
        self.asked += 1
        if netns == "gone":
            raise NetnsMissingError("gone")
        return self.ends.get((netns, which), 0)

    def admit(self, wanted: Collection[int]) -> bool:
        if self.refuses:
            raise NftablesError("busy")
        self.admitted = set(wanted)
        return False

    def admit_one(self, ifindex: int) -> None:
        self.admitted.add(ifindex)

    def expel(self, ifindex: int) -> None:
        self.admitted.discard(ifindex)


class Clock:
    now = 0.0


clock = Clock()


class Bridges(FakeRuntime):
    away = False

    def bridges(self) -> set[str]:
        if self.away:
            raise RuntimeAwayError("away")
        return {"docker0"}


def play(
    *steps: Callable[[Admission, FakeKernelGate, Bridges], Awaitable[None]], closed: bool = True
) -> None:
    async def run() -> None:
        gate, runtime, work = FakeKernelGate(), Bridges(), Worker()
        clock.now = 0.0
        admission = Admission(gate, closed, "isolator", runtime, work, lambda: clock.now)
        for step in steps:
            await step(admission, gate, runtime)
        await work.close()

    asyncio.run(run())


def test_endpoints_and_strangers_pass_and_other_containers_do_not() -> None:
    async def settle(admission: Admission, gate: FakeKernelGate, runtime: Bridges) -> None:
        await admission.settle([("", 4)])
        assert gate.admitted == {10, 20}
        await admission.settle(
            [("", 4), ("/run/netns/b", "eth0"), ("gone", "eth0"), ("/run/netns/c", "eth0")]
        )
        assert gate.admitted == {10, 11, 20}

    play(settle)


def test_what_is_known_is_not_asked_again_and_what_went_is_forgotten() -> None:
    async def settle(admission: Admission, gate: FakeKernelGate, runtime: Bridges) -> None:
        for _ in range(3):
            await admission.settle([("", 4)])
        assert gate.asked == 1
        gate.there = [HostEnd(11, "vethb", "docker0")]
        await admission.settle([])
        assert gate.admitted == set()
        await admission.settle([("", 4)])
        assert gate.asked == 2

    play(settle)


def test_while_the_engine_is_away_no_stranger_is_new_and_the_known_ones_stay() -> None:
    async def settle(admission: Admission, gate: FakeKernelGate, runtime: Bridges) -> None:
        runtime.away = True
        await admission.settle([("", 4)])
        assert gate.admitted == {10}
        runtime.away = False
        await admission.settle([("", 4)])
        assert gate.admitted == {10}, "not asked again at once: it may block"
        clock.now = 11.0
        await admission.settle([("", 4)])
        runtime.away = True
        await admission.settle([])
        assert gate.admitted == {20}

    play(settle)


def test_an_endpoint_is_admitted_at_once_and_trouble_is_told_and_tried_again() -> None:
    async def admit(admission: Admission, gate: FakeKernelGate, runtime: Bridges) -> None:
        await admission.admit(("gone", "eth0"))
        await admission.admit(("", 4))
        assert gate.admitted == {10}
        gate.refuses = True
        await admission.settle([])
        gate.refuses = False
        await admission.settle([])
        assert gate.admitted == {20}
        assert await admission.host_addresses() == []

    play(admit)


def test_without_a_gate_all_pass() -> None:
    async def settle(admission: Admission, gate: FakeKernelGate, runtime: Bridges) -> None:
        await admission.shut()
        await admission.settle([])
        await admission.admit(("", 4))
        assert gate.admitted == {10, 11, 20}

    play(settle, closed=False)


def test_an_interface_that_went_and_came_back_is_looked_for_anew() -> None:
    """Same namespace, same MAC, another host end."""

    async def settle(admission: Admission, gate: FakeKernelGate, runtime: Bridges) -> None:
        await admission.settle([("/run/netns/b", "eth0")])
        assert gate.admitted == {11, 20}
        gate.there = [HostEnd(12, "vethc", "docker0")]
        gate.ends["/run/netns/b", "eth0"] = 12
        await admission.settle([("/run/netns/b", "eth0")])
        assert gate.admitted == {12}

    play(settle)


def test_who_is_expelled_is_closed() -> None:
    async def expel(admission: Admission, gate: FakeKernelGate, runtime: Bridges) -> None:
        await admission.admit(("", 4))
        await admission.expel(("", 4))
        assert gate.admitted == set()
        await admission.expel(("", 5))

    play(expel)


def test_a_port_that_stays_closed_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    async def settle(admission: Admission, gate: FakeKernelGate, runtime: Bridges) -> None:
        await admission.settle([("", 4)])
        assert "vethb" not in capsys.readouterr().out
        for _ in range(3):
            await admission.settle([("", 4)])
        assert capsys.readouterr().out.count("vethb") == 1

    play(settle)
