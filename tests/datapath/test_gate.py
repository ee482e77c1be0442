"""The gate on real bridges: who passes, and what of it outlives everything."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from scapy.layers.inet import UDP  # type: ignore[import-untyped]
from scapy.layers.inet6 import IPv6  # type: ignore[import-untyped]
from scapy.layers.l2 import ARP, Ether  # type: ignore[import-untyped]

from isolator.datapath.gate import Gate
from isolator.datapath.netns import Netns
from isolator.datapath.nftables import NftablesError, run

pytestmark = [pytest.mark.root]
HOST = "isotest-gate"


def ip(netns: str, command: str) -> None:
    subprocess.run(["ip", "-n", netns, *command.split()], check=True)


@dataclass
class Bridge:
    """A namespace with a bridge, 10.77.0.1; `container` adds one at it, whose host end has that name."""

    gate: Gate
    containers: list[str]

    def container(self, host_end: str, prefix: str = "veth") -> int:
        netns, number = f"{HOST}-{len(self.containers)}", len(self.containers) + 2
        subprocess.run(["ip", "netns", "add", netns], check=True)
        self.containers.append(netns)
        ip(HOST, f"link add {prefix}{host_end} type veth peer name eth0 netns {netns}")
        ip(HOST, f"link set {prefix}{host_end} master br0 up")
        ip(netns, f"addr add 10.77.0.{number}/24 dev eth0")
        ip(netns, "link set eth0 up")
        return self.gate.host_end(netns, "eth0")

    def reaches(self, number: int, target: str) -> bool:
        command = [
            "nsenter",
            f"--net=/run/netns/{self.containers[number]}",
            "ping",
            "-c1",
            "-W1",
            "-q",
            target,
        ]
        return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    subprocess.run(["ip", "netns", "del", HOST], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "add", HOST], check=True)
    ip(HOST, "link add br0 type bridge")
    ip(HOST, "addr add 10.77.0.1/24 dev br0")
    ip(HOST, "link set br0 up")
    containers: list[str] = []
    try:
        with Gate(HOST, "isotest-gate") as gate:
            yield Bridge(gate, containers)
    finally:
        for netns in (*containers, HOST):
            subprocess.run(["ip", "netns", "del", netns], check=False)


def test_who_was_there_passes_and_who_comes_later_does_not_until_admitted(bridge: Bridge) -> None:
    first = bridge.container("a")
    bridge.gate.shut()
    second = bridge.container("b")
    assert bridge.reaches(0, "10.77.0.1") and not bridge.reaches(1, "10.77.0.1")
    assert not bridge.reaches(0, "10.77.0.3")  # it hears nobody, too
    bridge.gate.admit_one(second)
    assert bridge.reaches(1, "10.77.0.1") and bridge.reaches(0, "10.77.0.3")
    bridge.gate.admit({second})
    assert not bridge.reaches(0, "10.77.0.1") and first != second


def test_host_ends_are_found_by_their_peer_and_tell_their_bridge(bridge: Bridge) -> None:
    end = bridge.container("a")
    bridge.container("b")
    (found,) = [each for each in bridge.gate.host_ends() if each.ifindex == end]
    assert (found.name, found.bridge) == ("vetha", "br0")
    assert bridge.gate.host_end(bridge.containers[0], "eth9") == 0
    assert bridge.gate.host_end(bridge.containers[0], "lo") == 0


def test_the_hosts_addresses_tell_their_networks(bridge: Bridge) -> None:
    ip(HOST, "addr add fd77::1/64 dev br0 nodad")
    ip(HOST, "addr add 10.78.0.1 peer 10.78.0.2 dev br0")
    told = [str(each) for each in bridge.gate.addresses() if not each.ip.is_link_local]
    assert sorted(told) == ["10.77.0.1/24", "10.78.0.1/32", "fd77::1/64"]


def test_devices_that_are_no_container_are_not_its_business(bridge: Bridge) -> None:
    bridge.gate.shut()
    bridge.container("vm", prefix="tap")
    assert bridge.reaches(0, "10.77.0.1")


def test_it_stays_when_its_maker_goes_and_is_taken_up_as_it_is(bridge: Bridge) -> None:
    bridge.gate.shut()
    end = bridge.container("a")
    bridge.container("b")
    bridge.gate.admit_one(end)
    with Gate(HOST, "isotest-gate") as successor:
        successor.shut()
        assert bridge.reaches(0, "10.77.0.1") and not bridge.reaches(1, "10.77.0.1")
        successor.remove()
    assert bridge.reaches(1, "10.77.0.1")
    bridge.gate.remove()  # none there: nothing to do


def test_a_gate_that_somebody_took_away_or_changed_is_made_anew(bridge: Bridge) -> None:
    bridge.gate.shut()
    with Netns(HOST) as host, host.entered():
        run("flush ruleset")
    assert bridge.gate.admit({7}) is True
    with Netns(HOST) as host, host.entered():
        run("flush chain bridge isotest_gate enter")
    assert bridge.gate.admit({7}) is True and bridge.gate.admit({7}) is False
    bridge.container("a")
    assert not bridge.reaches(0, "10.77.0.1")


def test_an_element_goes_also_when_its_device_has_gone(bridge: Bridge) -> None:
    bridge.gate.shut()
    end = bridge.container("a")
    bridge.gate.admit({end})
    ip(HOST, "link del vetha")
    bridge.gate.admit(set())
    with Netns(HOST) as host, host.entered():
        (listed,) = [each["set"] for each in run("list table bridge isotest_gate") if "set" in each]
    assert "elem" not in listed


def test_other_peoples_rules_are_left_alone(bridge: Bridge) -> None:
    mine = "add table bridge mine\nadd chain bridge mine c { type filter hook prerouting priority 0; }\n"
    with Netns(HOST) as host, host.entered():
        run(mine)
        bridge.gate.shut()
        bridge.gate.admit({3})
        bridge.gate.remove()
        assert [each["table"]["name"] for each in run("list tables") if "table" in each] == ["mine"]


def test_commands_that_the_kernel_refuses_are_an_error_and_do_nothing(bridge: Bridge) -> None:
    with Netns(HOST) as host, host.entered():
        with pytest.raises(NftablesError, match="syntax error"):
            run("add table bridge half\nadd nonsense\n")
        with pytest.raises(NftablesError):
            run("add table bridge half\nadd rule bridge none none drop\n")
        assert run("list tables")[1:] == []


@pytest.mark.parametrize("last", [0x03, 0x0E])
def test_frames_that_the_bridge_takes_to_itself_do_not_pass_either(bridge: Bridge, last: int) -> None:
    """UDP and ARP in frames to 01:80:c2:00:00:0x, for the address that the host end itself has."""
    destination = f"01:80:c2:00:00:{last:02x}"
    bridge.container("a")
    ip(HOST, "addr add fe80::77/64 dev vetha nodad")
    ip(HOST, "addr add 10.99.0.1/24 dev vetha")
    with Netns(HOST) as host, host.entered():
        heard = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        heard.bind(("::", 9998))
        heard.settimeout(0.5)
    with Netns(bridge.containers[0]) as inside, inside.entered():
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
        wire.bind(("eth0", 0))
        wire.settimeout(0.5)
        mac = wire.getsockname()[4].hex(":")
    ethernet = Ether(dst=destination, src=mac)
    udp = bytes(ethernet / IPv6(src="fe80::1234", dst="fe80::77") / UDP(sport=7, dport=9998) / b"question")
    arp = bytes(ethernet / ARP(hwsrc=mac, psrc="10.99.0.2", pdst="10.99.0.1"))

    def talks() -> tuple[bool, bool]:
        found = []
        for frame, answer in ((udp, heard), (arp, wire)):
            wire.send(frame)
            try:
                found.append(bool(answer.recv(200)))
            except TimeoutError:
                found.append(False)
        return found[0], found[1]

    with heard, wire:
        assert talks() == (True, True), "where nobody stands in the way"
        bridge.gate.admit(())
        assert talks() == (False, False)
