"""A splice on a bench: real ports, real programs, a frame in at one end, and what came of it.

    ends:      container ─┐                    ┌─ network        (AF_PACKET sockets)
    isolator:       container port       network port
                             punt pair ─ ring

Nothing here sends by itself: no ARP, no IPv6, no addresses. So a frame comes out at one of three places, or a
drop is counted, and `Bench.send` waits until one of these has happened.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from scapy.layers.l2 import Ether
from scapy.packet import Packet

from isolator.core.automaton.states import Automaton
from isolator.core.model import Direction, DropReason, PuntReason, Side, Verdict
from isolator.datapath.abi import FLOW7_LIVE, Flow7, Port, flow_key, mapped, parse_punt_context
from isolator.datapath.bpf import NO_AUTOMATA, Datapath, Prefix
from isolator.datapath.netns import Netns
from isolator.datapath.pins import unpin
from isolator.datapath.ring import Ring, packet_socket

CONTAINER_MAC, GATEWAY_MAC, STRANGER_MAC = "02:00:00:00:00:01", "02:00:00:00:00:fe", "02:00:00:00:00:66"
CONTAINER, CONTAINER6 = "10.9.0.1", "fd00:9::1"
PEER, PEER6, DENIED_PEER = "10.9.0.2", "fd00:9::2", "10.9.0.3"
ENDPOINT, PROFILE = 7, 5
VNET_NONE = bytes(10)
INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_NUMBERS = itertools.count()
_PATIENCE = 5.0  # seconds until a frame that shows up nowhere is a failure


@dataclass(frozen=True)
class Entry:
    """A policy entry as isolator.core.compile makes it."""

    direction: Direction
    verdict: Verdict
    protocol: int = 0
    port: int = 0
    peer: int = 0
    flags: int = 0
    reason: DropReason = DropReason.NONE
    profile: int = 0
    rule: int = 0
    endpoint: int = ENDPOINT


TCP, UDP, ICMP = 6, 17, 1
ALLOW, DROP, RESET, INSPECT = Verdict.ALLOW, Verdict.DROP, Verdict.RESET, Verdict.INSPECT
IDENTITIES: list[tuple[Prefix, int]] = [
    ((bytes(16), 0), 1),
    ((mapped(ip_address("10.9.0.0")), 96 + 16), 2),
    ((mapped(ip_address(DENIED_PEER)), 128), 3),
    ((mapped(ip_address("fd00:9::")), 64), 2),
]
POLICY = [
    Entry(INGRESS, INSPECT, TCP, 80, 2, profile=PROFILE, rule=80),
    Entry(INGRESS, ALLOW, TCP, 81, 2, rule=81),
    Entry(INGRESS, DROP, TCP, 82, 2, reason=DropReason.POLICY_DENY, rule=82),
    Entry(INGRESS, RESET, TCP, 83, 2, reason=DropReason.POLICY_DENY, rule=83),
    Entry(INGRESS, ALLOW, UDP, 53, 2, rule=53),
    Entry(INGRESS, ALLOW, ICMP, 0, 2, rule=1),
    Entry(INGRESS, DROP, reason=DropReason.POLICY_DEFAULT),
    Entry(EGRESS, ALLOW, TCP, 90, 2, rule=90),
    Entry(EGRESS, INSPECT, TCP, 91, 2, profile=PROFILE, rule=91),
    Entry(EGRESS, ALLOW, UDP, 53, 2, rule=54),
    Entry(EGRESS, ALLOW, ICMP, 0, 2, rule=2),
    Entry(EGRESS, DROP, reason=DropReason.POLICY_DEFAULT),
]


@dataclass
class Outcome:
    """`where`: container, network, punt or drop. `frame` without the vnet header. `reason` of a drop."""

    where: str
    frame: bytes = b""
    reason: DropReason = DropReason.NONE
    punt: PuntReason = PuntReason.NONE
    incarnation: int = 0
    side: Side | None = None

    @property
    def packet(self) -> Packet:
        return Ether(self.frame)

    def __str__(self) -> str:
        if self.where == "drop":
            return f"drop {self.reason.name}"
        return f"punt {self.punt.name}" if self.where == "punt" else self.where


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def namespaces(*names: str) -> Iterator[list[str]]:
    """Namespaces named bpt-<pid>-<number>-<name>, without IPv6, deleted at the end."""
    number = next(_NUMBERS)
    full = [f"bpt-{os.getpid()}-{number}-{name}" for name in names]
    with contextlib.ExitStack() as undo:
        for name in full:
            ip("netns", "add", name)
            undo.callback(ip, "netns", "del", name)
            quiet = [
                "sysctl",
                "-qw",
                "net.ipv6.conf.all.disable_ipv6=1",
                "net.ipv6.conf.default.disable_ipv6=1",
            ]
            subprocess.run(["nsenter", f"--net=/run/netns/{name}", *quiet], check=True)
        yield full


def pair(one: tuple[str, str], other: tuple[str, str], mtu: int = 1500) -> None:
    """A quiet veth pair; each end is (namespace, name)."""
    ip("-n", one[0], "link", "add", "name", one[1], "mtu", str(mtu), "type", "veth",
       "peer", "name", other[1], "mtu", str(mtu), "netns", other[0])  # fmt: skip
    for namespace, name in (one, other):
        ip("-n", namespace, "link", "set", "dev", name, "arp", "off", "multicast", "off", "up")


def tap(name: str) -> socket.socket:
    """Sends and receives whole frames with a vnet header, in the thread's namespace; does not hear itself."""
    tap = packet_socket()
    tap.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    tap.bind((name, 3))
    return tap


@dataclass
class Bench:
    datapath: Datapath
    container: socket.socket
    network: socket.socket
    ring: Ring
    container_port: int
    network_port: int
    punt_port: int
    namespace: Netns
    _counted: dict[DropReason, int] = field(default_factory=dict)

    # -- what stands before a test ------------------------------------------------------------------------

    def reset(self, policy: Iterable[Entry] = POLICY, flows7_max: int = 100) -> None:
        """No flows, this policy, the agent up."""
        path = self.datapath
        path.forget_endpoint(ENDPOINT)
        path.maps["flows4"].clear()
        path.set_endpoint(ENDPOINT, flows7_max)
        path.set_addresses(ENDPOINT, [mapped(ip_address(a)) for a in (CONTAINER, CONTAINER6)])
        for ifindex, peer, side in (
            (self.container_port, self.network_port, Side.CONTAINER),
            (self.network_port, self.container_port, Side.NETWORK),
        ):
            mac = bytes.fromhex(CONTAINER_MAC.replace(":", ""))
            path.set_port(ifindex, Port(peer, ENDPOINT, side, mac))
        self.policy(policy)
        path.control.punt_ifindex = self.punt_port
        path.control.frozen_until = 0
        self.agent(up=True)
        self._drain()
        self._counted = self._drops()

    def policy(
        self, entries: Iterable[Entry] = POLICY, automata: Mapping[int, Automaton] = NO_AUTOMATA
    ) -> dict[int, int]:
        self.datapath.write_policy(self.datapath.next_generation(), entries, IDENTITIES, automata)
        return self.datapath.retire()

    def agent(self, up: bool) -> None:
        self.datapath.control.heartbeat = time.monotonic_ns()
        self.datapath.control.heartbeat_max = 3600 * 10**9 if up else 0

    # -- a frame --------------------------------------------------------------------------------------------

    def from_network(self, frame: Packet | bytes, vnet: bytes = VNET_NONE) -> Outcome:
        return self.send(self.network, frame, vnet)

    def from_container(self, frame: Packet | bytes, vnet: bytes = VNET_NONE) -> Outcome:
        return self.send(self.container, frame, vnet)

    def send(self, tap: socket.socket, frame: Packet | bytes, vnet: bytes = VNET_NONE) -> Outcome:
        """Send, and wait for what comes of it."""
        tap.send(vnet + bytes(frame))
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if found := self._arrived():
                self._counted = self._drops()
                return found
            counted = self._drops()
            if new := [reason for reason, count in counted.items() if count != self._counted.get(reason, 0)]:
                self._counted = counted
                return self._arrived() or Outcome("drop", reason=new[0])
        raise AssertionError(
            f"a frame is neither forwarded, punted nor dropped for a reason: {bytes(frame).hex()}"
        )

    def _arrived(self) -> Outcome | None:
        for where, tap in (("container", self.container), ("network", self.network)):
            with contextlib.suppress(BlockingIOError):
                return Outcome(where, tap.recv(1 << 17)[10:])
        for frame in self.ring.poll(1):
            _, side, reason, incarnation = parse_punt_context(frame.context)
            return Outcome("punt", bytes(frame.packet), punt=reason, incarnation=incarnation, side=side)
        return None

    def _drain(self) -> None:
        while self._arrived():
            pass

    def _drops(self) -> dict[DropReason, int]:
        return {reason: counter.packets for reason, counter in self.datapath.drops().items()}

    # -- a flow ---------------------------------------------------------------------------------------------

    def flow7(self, key: bytes) -> Flow7:
        flow = self.datapath.flow7(key)
        assert flow is not None
        return flow


def key_of(
    local_port: int, remote_port: int, remote: str = PEER, local: str = CONTAINER, protocol: int = TCP
) -> bytes:
    return flow_key(
        ENDPOINT, mapped(ip_address(local)), mapped(ip_address(remote)), local_port, remote_port, protocol
    )


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """Build it, and take it down again whatever happens."""
    pins = Path(f"/sys/fs/bpf/isolator-test-{os.getpid()}-{next(_NUMBERS)}")
    with contextlib.ExitStack() as undo:
        isolator, ends = undo.enter_context(namespaces("isolator", "ends"))
        pair((isolator, "container-port"), (ends, "container"))
        pair((isolator, "network-port"), (ends, "network"))
        pair((isolator, "punt"), (isolator, "ring"), 65535)
        undo.callback(unpin, pins)
        datapath = undo.enter_context(Datapath.open(pins))
        with Netns(ends) as there, there.entered():
            taps = [undo.enter_context(contextlib.closing(tap(name))) for name in ("container", "network")]
        home = undo.enter_context(Netns(isolator))
        with home.entered():
            ring = undo.enter_context(Ring(packet_socket(), "ring"))
            index = {n: socket.if_nametoindex(n) for n in ("container-port", "network-port", "punt", "ring")}
            datapath.attach_port(index["container-port"])
            datapath.attach_port(index["network-port"])
            datapath.attach_doorbell(index["ring"])
        yield Bench(
            datapath, *taps, ring, index["container-port"], index["network-port"], index["punt"], home
        )  # fmt: skip


def gso(header: int, size: int, v6: bool = False) -> bytes:
    """A vnet header (linux/virtio_net.h): checksum to be completed at TCP's, segments of `size` bytes."""
    start = 54 if v6 else 34
    return struct.pack("<BBHHHH", 1, 4 if v6 else 1, header, size, start, 16)


def live(flow: Flow7) -> bool:
    return flow.state == FLOW7_LIVE
