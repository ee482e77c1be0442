"""One node's datapath, put together: the isolator netns, programs and maps, the punt pair with its ring, splices.

    Node.open      netns → pins and programs → punt pair → ring, doorbell, sender → forwarder
    Node.recover   what the journal holds; then `adopt` or `release` each splice, and `tidy` the maps
    Node.look      whether an endpoint can be spliced, and its addresses
    Node.protect   splice an endpoint; its ports are known to the kernel before their links are up
    Node.release   put the container's network back as it was; `lose`: as far as there is anything to put back
    Node.close     let go: everything pinned stays and works on

Splicing blocks for some 20 ms: all but open, close and beat are for one worker thread, one at a time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Self

from isolator.core.inspector import Inspector
from isolator.core.model import Side
from isolator.datapath import device, snapshot
from isolator.datapath.abi import HALF_FIN, HALF_RST, Flow7, Port, mapped
from isolator.datapath.attach import XdpMode
from isolator.datapath.bpf import Datapath
from isolator.datapath.doorbell import Doorbell
from isolator.datapath.errors import DatapathError
from isolator.datapath.forwarder import Forwarder, Reporter
from isolator.datapath.journal import Journal
from isolator.datapath.netns import Netns, SpliceError, pinned_netns
from isolator.datapath.ring import Ring, packet_socket
from isolator.datapath.rtnl import NLM_F_CREATE, NLM_F_EXCL, RTM_NEWLINK, Rtnl, attribute, text, u32
from isolator.datapath.sender import Sender
from isolator.datapath.splice import (
    Address,
    AlreadySplicedError,
    EndpointGoneError,
    Recovered,
    Splice,
    Splicer,
    SpliceRequest,
)

PUNT, RING = "punt", "ring"  # the punt pair: frames are redirected to one end and read at the other
PUNT_MTU = 65535  # any container's frame fits
PENDING_NS = 30 * 10**9  # a SYN that nobody answered
LINGER_NS = 10 * 10**9  # after both FINs, or a RST: the last acknowledgements pass
HALF_CLOSED_NS = 3600 * 10**9
IDLE_NS = (
    5 * 24 * 3600 * 10**9
)  # as long as Linux keeps an idle connection (nf_conntrack_tcp_timeout_established)
HEARTBEAT_MAX = 2_000_000_000  # ns without a sign of the agent, then it counts as down


@dataclass(frozen=True, slots=True)
class Names:
    """Where an agent's things are: its namespace, its pins, its journal. All derive from the state folder."""

    netns: str
    pins: Path
    journal: Path

    @classmethod
    def of(cls, state_dir: Path) -> Names:
        name = (
            "-".join(part for part in state_dir.parts if part not in ("/", "run", "var", "tmp")) or "isolator"
        )
        name = name if name.startswith("isolator") else f"isolator-{name}"
        return cls(name, Path("/sys/fs/bpf") / name, state_dir / "journal")

    @property
    def unused(self) -> bool:
        """No agent ran here since the machine was booted, or since its pins were taken away."""
        return not (self.pins.is_dir() and any(self.pins.iterdir()))


class Node:
    """All of the kernel's side of one agent."""

    def __init__(
        self, names: Names, inspector: Inspector, report: Reporter, xdp: XdpMode = XdpMode.OFF
    ) -> None:
        self.names = names
        self.inspector = inspector
        self.xdp = xdp
        self.ports: dict[int, tuple[int, int]] = {}  # endpoint → ifindex towards the container, the network
        self._report = report
        self._stack = ExitStack()
        self.splicer = Splicer(names.netns, Journal(names.journal))

    # -- setting up -----------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Makes what is missing and takes up what an earlier process left. Raises DatapathError or OSError."""
        with ExitStack() as stack:
            self._netns = stack.enter_context(pinned_netns(self.names.netns))
            self.datapath = stack.enter_context(Datapath.open(self.names.pins))
            with self._netns.entered():
                punt_ifindex, ring_ifindex = punt_pair()
                self.datapath.renew_ports(self.xdp)
                self.datapath.attach_doorbell(ring_ifindex)
                self.ring = stack.enter_context(Ring(packet_socket(), RING))
            self.doorbell = Doorbell(self.datapath.doorbell_fd)
            stack.callback(self.doorbell.close)
            self.sender = stack.enter_context(Sender(self._socket))
            self.datapath.control.punt_ifindex = punt_ifindex
            self.datapath.control.heartbeat_max = HEARTBEAT_MAX
            self.forwarder = Forwarder(
                self.datapath, self.ring, self.doorbell, self.sender, self.inspector, self.ports, self._report
            )
            self._stack = stack.pop_all()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of it all. What is pinned, and every splice, works on without us."""
        self._stack.close()

    def _socket(self):  # type: ignore[no-untyped-def]  # noqa: ANN202 - socket.socket, without importing socket
        with self._netns.entered():
            return packet_socket()

    def beat(self) -> None:
        """The heartbeat: says that punted frames will be read."""
        self.datapath.control.heartbeat = time.monotonic_ns()

    # -- splices --------------------------------------------------------------------------------------------

    def spliced(self) -> dict[tuple[str, str], str]:
        """The endpoint's name by namespace and interface, of every splice in the journal."""
        return {(entry.netns, entry.interface): entry.name for entry in self.splicer.journal.entries()}

    def recover(self) -> Recovered:
        """Adopts, puts back or reaps what the journal holds."""
        return self.splicer.recover()

    def number_of(self, splice: Splice) -> int | None:
        """The endpoint number under which an earlier process filled the maps for this splice."""
        port = self.datapath.ports().get(splice.container_port)
        return port.endpoint if port else None

    def numbers(self) -> set[int]:
        """Endpoint numbers that ports carry."""
        return {port.endpoint for port in self.datapath.ports().values()}

    def tidy(self, numbers: Collection[int]) -> None:
        """Forgets all that earlier processes left of other endpoints, and their versions' maps."""
        self.datapath.forget_others(numbers)
        self.datapath.remove_other_layouts()

    def look(self, request: SpliceRequest) -> tuple[Address, ...]:
        """The addresses of an interface that is not spliced yet. Raises SpliceError where it cannot be."""
        self.splicer.check(request)
        with Netns(request.netns) as netns, netns.entered(), Rtnl() as rtnl:
            link = device.find_link(rtnl, request.interface)
            if link is None:
                return ()
            return tuple(
                ip_address(snapshot.address_bytes(b)) for b in snapshot.dump_addresses(rtnl, link.index)
            )

    def protect(self, request: SpliceRequest, number: int) -> Splice:
        """Splices an endpoint, or adopts its splice where there is one. Raises SpliceError, and then all is as
        before."""
        self.forget(number)

        def attach(container_port: int, network_port: int) -> None:
            entry = self.splicer.journal.read(request.name)
            assert entry is not None  # written before the first step
            addresses = [ip_address(snapshot.address_bytes(body)) for body in entry.snapshot.addresses]
            self.introduce(number, container_port, network_port, entry.snapshot.link.mac, addresses)

        try:
            try:
                return self.splicer.splice(request, attach)
            except AlreadySplicedError:
                return self._take_over(request.name, number)
        except BaseException:
            self.forget(number)
            raise

    def _take_over(self, name: str, number: int) -> Splice:
        """A splice that is in place and that nobody here knows of, whatever number its ports carry."""
        splice = self.splicer.adopt(name)
        former = self.number_of(splice)
        self.adopt(splice, number)
        if former is not None and former != number and former not in self.ports:
            self.datapath.forget_endpoint(former)
        return splice

    def introduce(
        self,
        number: int,
        container_port: int,
        network_port: int,
        mac: str,
        addresses: list[Address] | tuple[Address, ...],
    ) -> None:
        """Makes an endpoint's ports known to maps, programs and sender. Stand in the isolator netns."""
        octets = device.mac_bytes(mac)
        self.datapath.set_endpoint(number)
        self.datapath.set_addresses(number, [mapped(address) for address in addresses])
        self.datapath.set_port(container_port, Port(network_port, number, Side.CONTAINER, octets))
        self.datapath.set_port(network_port, Port(container_port, number, Side.NETWORK, octets))
        for ifindex in (container_port, network_port):
            self.datapath.attach_port(ifindex, self.xdp)
            self.sender.add(ifindex)
        self.ports[number] = (container_port, network_port)

    def adopt(self, splice: Splice, number: int) -> None:
        """Takes a splice up that is in place, under that number, with this version's programs."""
        with self._netns.entered():
            self.introduce(number, splice.container_port, splice.network_port, splice.mac, splice.addresses)

    def addresses(self, splices: Iterable[Splice]) -> dict[str, tuple[Address, ...] | None]:
        """The addresses by endpoint, as they are now. None: the interface is no more. Left out: nobody knows."""
        found: dict[str, tuple[Address, ...] | None] = {}
        for splice in splices:
            with contextlib.suppress(SpliceError, OSError):
                try:
                    found[splice.name] = self.splicer.addresses(splice)
                except EndpointGoneError:
                    found[splice.name] = None
        return found

    def set_addresses(self, number: int, addresses: Iterable[Address]) -> None:
        """The addresses that an endpoint may speak for."""
        self.datapath.set_addresses(number, [mapped(address) for address in addresses])

    def release(self, splice: Splice, number: int) -> None:
        """The exact inverse of `protect`. Raises SpliceError; the splice goes on then, as far as it stands."""
        try:
            self._put_back(splice)
        except EndpointGoneError:
            raise
        except SpliceError:
            with contextlib.suppress(OSError, DatapathError):
                self.adopt(splice, number)
            raise
        self.forget(number)

    def lose(self, splice: Splice, number: int) -> None:
        """What is left of a splice whose container went goes too; the endpoint is forgotten in any case."""
        try:
            with contextlib.suppress(SpliceError):
                self._put_back(splice)
        finally:
            self.forget(number)

    def _put_back(self, splice: Splice) -> None:
        self.splicer.restore(splice.name)  # programs go with the ports, at the last moment
        for ifindex in (splice.container_port, splice.network_port):
            self.datapath.delete_port(ifindex)

    def age(self, now: int) -> tuple[list[tuple[bytes, int]], list[tuple[bytes, int, int]]]:
        """Inspected flows that have ended: (key, incarnation), and the others: with the client's half's `acked`.

        `now`: CLOCK_MONOTONIC, ns.
        """
        ended, going = [], []
        for key, flow in self.datapath.flows7():
            if is_ended(flow, now - flow.last_seen):
                ended.append((key.pack(), flow.incarnation))
            else:
                going.append((key.pack(), flow.incarnation, flow.client.acked))
        return ended, going

    def forget(self, number: int) -> None:
        """Takes an endpoint out of the maps, with its flows."""
        for ifindex in self.ports.pop(number, ()):
            self.datapath.delete_port(ifindex)
            self.sender.remove(ifindex)
        self.datapath.forget_endpoint(number)


def is_ended(flow: Flow7, age: int) -> bool:
    """Whether nobody will miss the flow: `age` ns since its last packet."""
    if not flow.live:
        return age > PENDING_NS
    flags = [half.flags for half in flow.half]
    if any(each & HALF_RST for each in flags) or all(each & HALF_FIN for each in flags):
        return age > LINGER_NS
    return age > (HALF_CLOSED_NS if any(flags) else IDLE_NS)


def punt_pair() -> tuple[int, int]:
    """The ifindexes of punt end and ring end, made where missing. In the calling thread's namespace."""
    with Rtnl() as rtnl:
        if device.find_link(rtnl, PUNT) is None:
            peer = (
                device.IFINFO.pack(0, 0, 0, 0, 0)
                + text(device.IFLA_IFNAME, RING)
                + u32(device.IFLA_MTU, PUNT_MTU)
            )
            data = attribute(device.IFLA_INFO_DATA, attribute(device.VETH_INFO_PEER, peer))
            body = (
                device.IFINFO.pack(0, 0, 0, 0, 0)
                + text(device.IFLA_IFNAME, PUNT)
                + u32(device.IFLA_MTU, PUNT_MTU)
                + attribute(device.IFLA_LINKINFO, text(device.IFLA_INFO_KIND, "veth") + data)
            )
            rtnl.request(RTM_NEWLINK, body, NLM_F_CREATE | NLM_F_EXCL)
        indexes = []
        for name in (PUNT, RING):
            link = device.find_link(rtnl, name)
            assert link is not None
            device.set_link(rtnl, link.index, flags=device.IFF_UP, mask=device.IFF_UP)
            indexes.append(link.index)
        for index in indexes:
            device.settle_carrier(rtnl, index)
    return indexes[0], indexes[1]
