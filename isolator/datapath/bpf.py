"""The kernel's half as one object: programs loaded, maps pinned, and each map under the name of its use.

Stages: `Datapath.open` loads both objects onto the pinned maps, the `attach_…` methods put the programs on
devices, `set_…` and `write_policy` fill the maps, and the readers at the end say what happened.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, Self

from isolator.core.automaton.states import Automaton
from isolator.core.model import DropReason
from isolator.datapath import attach
from isolator.datapath.abi import (
    ENDPOINT,
    REASONS_MAX,
    SELECTION,
    STATES_MAX,
    DropCounter,
    Flow4,
    Flow7,
    FlowKey,
    PolicyValue,
    Port,
    address_key,
    identity_key,
    policy_key,
    policy_value,
    prefix_of,
    selection_key,
)
from isolator.datapath.attach import XdpMode
from isolator.datapath.automata import AutomatonMaps
from isolator.datapath.doorbell import Control
from isolator.datapath.events import EventReader
from isolator.datapath.flow7 import FlowCommands
from isolator.datapath.libbpf import BpfError, Object
from isolator.datapath.maps import Map, wait_for_readers
from isolator.datapath.pins import CLASSIFIER, SLOT, PinFolder, is_laid_out, remove_folder
from isolator.datapath.preflight import require_bpffs
from isolator.datapath.upgrade import upgrade

OBJECTS = Path(__file__).parent / "objects"
TC_OBJECT, XDP_OBJECT = "isolator_tc.bpf.o", "isolator_xdp.bpf.o"
FLOWS7_QUOTA = 8192  # inspected flows of one endpoint, unless told otherwise
# A program that takes fragments must not run as generic XDP: tc then sees frames without Ethernet header
# (kernel 6.18; tests/bpf/test_xdp.py shows it).
_XDP_PROGRAM = {XdpMode.NATIVE: "isolator_xdp", XdpMode.GENERIC: "isolator_xdp_generic"}

Prefix = tuple[bytes, int]  # 16 bytes, bits of them
NO_AUTOMATA: Mapping[int, Automaton] = MappingProxyType({})
Selections = Mapping[tuple[int, int], int]  # endpoint, direction → number, in the place of an endpoint's
NO_SELECTIONS: Selections = MappingProxyType({})


class PolicyEntry(Protocol):
    """What isolator.core.compile makes of policies; peer, protocol and port 0 mean any."""

    @property
    def endpoint(self) -> int: ...
    @property
    def direction(self) -> int: ...
    @property
    def peer(self) -> int: ...
    @property
    def protocol(self) -> int: ...
    @property
    def port(self) -> int: ...
    @property
    def verdict(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def reason(self) -> int: ...
    @property
    def profile(self) -> int: ...
    @property
    def rule(self) -> int: ...


def _number(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _generation_of(key: bytes) -> int:
    """Of a selection's or a policy entry's key."""
    return int.from_bytes(key[:4], "little")


def _endpoint_of(key: bytes) -> int:
    """Whose entry it is: keys of flows, quotas and addresses begin with the endpoint."""
    return int.from_bytes(key[:4], "little")


class Datapath:
    """Programs and maps of one agent. For one thread; attach from a thread in the devices' namespace."""

    def __init__(self, tc: Object, xdp: Object, folder: PinFolder, maps: dict[str, Map]) -> None:
        self._objects = (tc, xdp)
        self._folder = folder
        self.maps = maps
        self.commands = FlowCommands(tc.program_fd("isolator_flow7"))
        self.control = Control(self.control_fd)
        self.control.frozen_until = 0  # of an upgrade that came to nothing
        self._addresses: dict[int, set[bytes]] = {}
        for key in maps["addresses"].keys():  # noqa: SIM118 - no dict
            self._addresses.setdefault(_endpoint_of(key), set()).add(key[4:])
        self._base = self._base_in_force()
        self.automata = AutomatonMaps(maps, self._half_in_force())
        self._delete_generations({self._base}, inside=False)  # of a process that died while it wrote
        self._delete_selections()
        self._stale_base = False
        self._last_generation = self.generation
        self._retired = True

    @classmethod
    def open(cls, pins: Path, objects: Path = OBJECTS) -> Self:
        """Load, and adopt what is pinned below `pins`; maps that are not there are made and pinned.

        Maps of another layout are moved. The ports run this version's tc program from then on, whatever they ran
        before, XDP once `attach_…` replaces it. Raises a DatapathError.
        """
        require_bpffs(pins)
        tc = Object.open(objects / TC_OBJECT)
        xdp = None
        try:
            xdp = Object.open(objects / XDP_OBJECT)
            made = cls(tc, xdp, *lay_out(tc, xdp, pins))
            if made._folder.predecessor:
                made.count_flows7()
            return made
        except BaseException:
            for item in (tc, xdp):
                if item:
                    item.close()
            raise

    def close(self) -> None:
        """Let go. Pinned maps and attached programs stay and work on."""
        self.control.close()
        for item in self._objects:
            item.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def remove_other_layouts(self) -> None:
        """Unpin maps of other versions."""
        for path in self._folder.others():
            remove_folder(path)

    def renew_ports(self, xdp: XdpMode) -> None:
        """After a change of layout: XDP programs of the old one go from every port, adopted or not."""
        if self._folder.others():
            for ifindex in self.ports():
                with contextlib.suppress(BpfError):  # it is gone; or whoever adopts it is told
                    self.attach_port(ifindex, xdp)

    # -- programs on devices -----------------------------------------------------------------------------

    def attach_port(self, ifindex: int, xdp: XdpMode = XdpMode.OFF) -> None:
        """Classify what arrives at a port. Replaces another version's program in one step."""
        attach.attach_tc(ifindex, self._objects[0].program_fd("isolator_port"))
        if xdp is XdpMode.OFF:
            attach.detach_xdp(ifindex)
        else:
            attach.attach_xdp(ifindex, self._objects[1].program_fd(_XDP_PROGRAM[xdp]), xdp)

    def attach_doorbell(self, ifindex: int) -> None:
        """At the reading end of the punt pair."""
        attach.attach_tc(ifindex, self._objects[0].program_fd("isolator_doorbell"))

    def detach(self, ifindex: int) -> None:
        """From a port or the punt pair; a device that is gone is no error."""
        attach.detach_tc(ifindex)
        attach.detach_xdp(ifindex)

    # -- ports, endpoints, addresses ---------------------------------------------------------------------

    def set_port(self, ifindex: int, port: Port) -> None:
        self.maps["ports"].update(_number(ifindex), port.pack())

    def delete_port(self, ifindex: int) -> None:
        self.maps["ports"].delete(_number(ifindex))

    def ports(self) -> dict[int, Port]:
        return {
            int.from_bytes(key, "little"): Port.unpack(value) for key, value in self.maps["ports"].items()
        }

    def set_endpoint(self, endpoint: int, flows7_max: int = FLOWS7_QUOTA) -> None:
        """Set an endpoint's quota. An adopted one of that size stays; else what it uses is counted anew."""
        if (value := self.maps["endpoints"].lookup(_number(endpoint))) and value[4:] == _number(flows7_max):
            return
        used = sum(1 for key in self.maps["flows7"].keys() if key[:4] == _number(endpoint))  # noqa: SIM118
        self.maps["endpoints"].update(_number(endpoint), ENDPOINT.struct.pack(used, flows7_max))

    def count_flows7(self) -> None:
        """Quotas give back what an upgrade found no place for."""
        used = Counter(_endpoint_of(key) for key in self.maps["flows7"].keys())  # noqa: SIM118
        for key, value in list(self.maps["endpoints"].items()):
            told, limit = ENDPOINT.struct.unpack(value)
            if told > used[_endpoint_of(key)]:
                self.maps["endpoints"].update(key, ENDPOINT.struct.pack(used[_endpoint_of(key)], limit))

    def flows7_used(self, endpoint: int) -> int:
        value = self.maps["endpoints"].lookup(_number(endpoint))
        return int(ENDPOINT.struct.unpack(value)[0]) if value else 0

    def set_addresses(self, endpoint: int, addresses: Iterable[bytes]) -> None:
        """The addresses (16 bytes each) that an endpoint may speak for. New ones first, then old ones go."""
        old, new = self._addresses.get(endpoint, set()), set(addresses)
        self.maps["addresses"].update_many((address_key(endpoint, a), _number(1)) for a in new - old)
        self.maps["addresses"].delete_many(address_key(endpoint, a) for a in old - new)
        self._addresses[endpoint] = new

    def forget_endpoint(self, endpoint: int) -> None:
        """Its addresses, its quota, its flows. Its ports are the splice's to delete."""
        self.set_addresses(endpoint, ())
        del self._addresses[endpoint]
        for name in ("flows7", "flows4"):
            flows = self.maps[name]
            flows.delete_many([key for key, _ in flows.items() if key[:4] == _number(endpoint)])
        self.maps["endpoints"].delete(_number(endpoint))

    def forget_others(self, endpoints: Collection[int]) -> None:
        """All that is in the maps of any but these endpoints: what earlier processes left."""
        for ifindex, port in self.ports().items():
            if port.endpoint not in endpoints:
                self.delete_port(ifindex)
        for name in ("flows7", "flows4", "endpoints", "addresses"):
            entries = self.maps[name]
            entries.delete_many([key for key, _ in entries.items() if _endpoint_of(key) not in endpoints])
        self._addresses = {number: held for number, held in self._addresses.items() if number in endpoints}

    # -- policy ------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Of the policy in force; 0: none was ever written, and everything is dropped."""
        return self.control.generation

    def next_generation(self) -> int:
        """A number that this process has not used, also not for a policy that could not be written."""
        self._last_generation = max(self._last_generation, self.generation) % 0xFFFFFFFF + 1
        return self._last_generation

    def write_policy(
        self,
        generation: int,
        entries: Iterable[PolicyEntry],
        identities: Iterable[tuple[Prefix | IPv4Network | IPv6Network, int]],
        automata: Mapping[int, Automaton] = NO_AUTOMATA,
        selections: Selections = NO_SELECTIONS,
    ) -> None:
        """Put a policy in force, in one step. The one before stays in the maps until `retire`. `automata`: by profile.
        `selections`: whose entries are an endpoint's; its own where there is none.

        Raises BpfError when a map is full: the policy that was in force still is, as `generation` says.
        """
        self.retire()  # the maps have room for two
        try:
            self.maps["identities"].update_many(
                (identity_key(generation, *_prefix(network)), _number(identity))
                for network, identity in identities
            )
            starts = self.automata.write(generation, automata)
            self.maps["policy"].update_many(_encode(generation, entry, starts) for entry in entries)
            self._write_selections(generation, generation, selections)
        except BpfError:
            self._delete_generations({generation}, inside=True)
            self._delete_selections()
            self.automata.discard()
            raise
        self.control.generation = generation
        self.automata.switch()
        self._base, self._stale_base, self._retired = generation, True, False

    def change_policy(
        self,
        generation: int,
        entries: Iterable[PolicyEntry],
        identities: Mapping[Prefix, tuple[int, int]],
        selections: Selections,
        automata: Mapping[int, Automaton] = NO_AUTOMATA,
    ) -> None:
        """Like `write_policy`, with what differs from the policy in force: what it has stays as it is.

        `entries`: of selections and of identities that nobody is sent to yet. `identities`: before and after, 0: none;
        each is an address of somebody, and changes in one step. `selections`: all. `automata`: of profiles that are
        not in force yet. Raises BpfError: the policy that was in force still is.
        """
        prefixes = self.maps["identities"]
        keys = {prefix: identity_key(self._base, *prefix) for prefix in identities}
        done: list[Prefix] = []
        try:
            starts = self.automata.add(automata)
            self.maps["policy"].update_many(_encode(self._base, entry, starts) for entry in entries)
            self._write_selections(generation, self._base, selections)
            for prefix, (_, after) in identities.items():
                if after:
                    prefixes.update(keys[prefix], _number(after))
                    done.append(prefix)
        except BpfError:
            for prefix in done:
                before = identities[prefix][0]
                prefixes.update(keys[prefix], _number(before)) if before else prefixes.delete(keys[prefix])
            self._delete_selections()
            raise
        prefixes.delete_many(keys[prefix] for prefix, (_, after) in identities.items() if not after)
        self.control.generation = generation
        self._retired = False

    def _write_selections(self, generation: int, base: int, selections: Selections) -> None:
        self.maps["selections"].update_many(
            (selection_key(generation, *whose), SELECTION.struct.pack(base, number))
            for whose, number in selections.items()
        )

    def _base_in_force(self) -> int:
        """The generation that the entries in force were written under."""
        for key, value in self.maps["selections"].items():
            if _generation_of(key) == self.generation:
                return int(SELECTION.struct.unpack(value)[0])
        return self.generation

    def _half_in_force(self) -> int:
        """Of the automata's maps: the one that the entries in force point to."""
        for key, value in self.maps["policy"].items():
            start = PolicyValue.unpack(value).automaton
            if start and _generation_of(key) == self._base:
                return start // (STATES_MAX // 2)
        return 0

    def _delete_selections(self) -> None:
        """Those of other generations than the one in force."""
        selections, now = self.maps["selections"], self.generation
        selections.delete_many([key for key, _ in selections.items() if _generation_of(key) != now])

    def retire(self) -> dict[int, int]:
        """Take the policies away that are no longer in force. Returns how many flows each of their rules decided.

        Blocks for some 15 ms after a change: whoever began to look something up by the old one ends first.
        """
        if self._retired:
            return {}
        wait_for_readers()
        hits = self._delete_generations({self._base}, inside=False) if self._stale_base else {}
        self._delete_selections()
        self._retired, self._stale_base = True, False
        return hits

    def _delete_generations(self, generations: set[int], inside: bool) -> dict[int, int]:
        hits: dict[int, int] = {}
        gone = []
        for key, value in self.maps["policy"].items():
            if (_generation_of(key) in generations) is inside:
                gone.append(key)
                found = PolicyValue.unpack(value)
                hits[found.rule] = hits.get(found.rule, 0) + found.hits
        self.maps["policy"].delete_many(gone)
        prefixes = self.maps["identities"]
        prefixes.delete_many(
            [
                key
                for key, _ in prefixes.items()
                if (int.from_bytes(key[4:8], "little") in generations) is inside
            ]
        )
        return hits

    def rule_hits(self) -> dict[int, int]:
        """Flows that each rule of the policy in force has decided so far."""
        hits: dict[int, int] = {}
        for key, value in self.maps["policy"].items():
            if _generation_of(key) == self._base:
                found = PolicyValue.unpack(value)
                hits[found.rule] = hits.get(found.rule, 0) + found.hits
        return hits

    # -- flows, drops, events ----------------------------------------------------------------------------

    def flow7(self, key: bytes) -> Flow7 | None:
        value = self.maps["flows7"].lookup(key)
        return Flow7.unpack(value) if value else None

    def flows7(self) -> Iterator[tuple[FlowKey, Flow7]]:
        """Inspected flows. To delete one, use `commands`: that gives its place in the quota back."""
        for key, value in self.maps["flows7"].items():
            yield FlowKey.unpack(key), Flow7.unpack(value)

    def flows4(self) -> Iterator[tuple[FlowKey, Flow4]]:
        for key, value in self.maps["flows4"].items():
            yield FlowKey.unpack(key), Flow4.unpack(value)

    def drops(self) -> dict[DropReason, DropCounter]:
        """Totals by reason, over all CPUs; reasons that never happened are left out."""
        totals = {}
        for number in range(1, REASONS_MAX):
            value = memoryview(self.maps["drops"].lookup(_number(number)) or b"")
            total = DropCounter(0, 0)
            for at in range(0, len(value), 24):
                total += DropCounter.unpack(value[at : at + 24])
            if total.packets:
                totals[DropReason(number)] = total
        return totals

    def events(self) -> EventReader:
        """A consumer of the kernel's events; there can be one."""
        ring = self.maps["events"]
        return EventReader(ring.fd, ring.definition.max_entries)

    @property
    def control_fd(self) -> int:
        return self.maps["control"].fd

    @property
    def doorbell_fd(self) -> int:
        return self.maps["doorbell"].fd

    def program_fd(self, name: str) -> int:
        """Of isolator_port, isolator_tc, isolator_doorbell, isolator_flow7, isolator_xdp or isolator_xdp_generic."""
        return next(item for item in self._objects if name in item.programs).program_fd(name)


def lay_out(tc: Object, xdp: Object, pins: Path) -> tuple[PinFolder, dict[str, Map]]:
    """Load both onto the layout of their maps, fill it from another one that is in force, and put it in force."""
    folder = PinFolder(pins, tc.definitions())
    tc.pin(CLASSIFIER, folder.classifier)
    for item in (tc, xdp):
        for definition in item.definitions():
            if is_laid_out(definition.name):
                item.pin(definition.name, folder.path / definition.name)
        item.load()
    maps = {d.name: Map(tc.map_fd(d.name), d) for d in tc.definitions() if is_laid_out(d.name)}
    classifier = Map.of(tc.map_fd(CLASSIFIER), CLASSIFIER)

    def switch() -> None:
        classifier.update(SLOT, _number(tc.program_fd("isolator_tc")))

    if folder.predecessor:
        upgrade(folder.predecessor, maps, switch)
    else:
        switch()
    return folder, maps


def _prefix(network: Prefix | IPv4Network | IPv6Network) -> Prefix:
    return network if isinstance(network, tuple) else prefix_of(network)


def _encode(generation: int, e: PolicyEntry, starts: Mapping[int, int]) -> tuple[bytes, bytes]:
    return (
        policy_key(generation, e.endpoint, e.direction, e.peer, e.protocol, e.port),
        policy_value(e.verdict, e.flags, e.reason, e.profile, e.rule, starts.get(e.profile, 0)),
    )
