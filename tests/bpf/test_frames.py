"""Packet in, packet out, verdict: frames and layer 4. What is not forwarded says why."""

from __future__ import annotations

import pytest
from scapy.layers.dot11 import LLC
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Timestamp
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6MLReport,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from tests.bpf.bench import (
    CONTAINER,
    CONTAINER6,
    CONTAINER_MAC,
    DENIED_PEER,
    GATEWAY_MAC,
    PEER,
    PEER6,
    STRANGER_MAC,
    Bench,
    gso,
)
from tests.bpf.frames import inbound, inbound6, outbound, outbound6, tcp

pytestmark = pytest.mark.root
ALL_ROUTERS = "ff02::2"


def send(b: Bench, frame: Packet | bytes) -> str:
    """Which end a frame comes from shows in its source MAC."""
    from_container = bytes(frame)[6:12] in (_mac(CONTAINER_MAC), _mac(STRANGER_MAC))
    return str(b.from_container(frame) if from_container else b.from_network(frame))


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def cut(frame: Packet, length: int) -> bytes:
    return bytes(frame)[:length]


def longer(frame: Packet) -> bytes:
    return bytes(frame) + b"behind"


SYN81 = tcp(1000, 81)
LONG = Raw(b"x" * 64)
FRAMES: list[tuple[str, Packet | bytes, str]] = [
    ("IPv4 header cut", cut(inbound(SYN81), 14 + 19), "drop MALFORMED"),
    ("version 6 in an IPv4 frame", bytes(inbound(SYN81, version=6)), "drop MALFORMED"),
    ("header of 4 words", bytes(inbound(SYN81, ihl=4)), "drop MALFORMED"),
    ("TCP header of 4 words", inbound(tcp(1000, 81, dataofs=4)), "drop MALFORMED"),
    ("TCP header longer than the packet", inbound(tcp(1000, 81, dataofs=15)), "drop MALFORMED"),
    ("IPv6 header cut", cut(inbound6(SYN81), 14 + 39), "drop MALFORMED"),
    ("ARP cut", cut(Ether(src=GATEWAY_MAC, dst=CONTAINER_MAC) / ARP(), 14 + 27), "drop MALFORMED"),
    ("ARP for another hardware", Ether(src=GATEWAY_MAC, dst=CONTAINER_MAC) / ARP(hwtype=6), "drop MALFORMED"),
    ("reverse ARP in ARP", Ether(src=GATEWAY_MAC, dst=CONTAINER_MAC) / ARP(op=3), "drop MALFORMED"),
    ("IPv4 length too long", inbound(SYN81 / LONG, len=500), "drop LENGTH_MISMATCH"),
    ("IPv4 length too short", inbound(SYN81 / LONG, len=60), "drop LENGTH_MISMATCH"),
    ("IPv4 length 0", inbound(SYN81 / LONG, len=0), "drop LENGTH_MISMATCH"),
    ("bytes behind IPv4", longer(inbound(tcp(1000, 81, "A") / LONG)), "drop LENGTH_MISMATCH"),
    ("IPv6 length too short", inbound6(SYN81 / LONG, plen=20), "drop LENGTH_MISMATCH"),
    ("IPv6 length 0, a jumbogram's", inbound6(SYN81 / LONG, plen=0), "drop LENGTH_MISMATCH"),
    ("padding of a short frame", cut(bytes(inbound(SYN81)) + bytes(6), 60), "container"),
    ("LLC", Ether(src=GATEWAY_MAC, dst=CONTAINER_MAC, type=60) / LLC() / LONG, "drop ETHERTYPE"),
    ("MPLS", Ether(src=GATEWAY_MAC, dst=CONTAINER_MAC, type=0x8847) / LONG, "drop ETHERTYPE"),
    ("EAPOL", Ether(src=CONTAINER_MAC, dst=GATEWAY_MAC, type=0x888E) / LONG, "drop ETHERTYPE"),
    ("VLAN tag", Ether(src=GATEWAY_MAC, dst=CONTAINER_MAC) / Dot1Q(vlan=5) / IP() / LONG, "drop VLAN"),
    ("priority tag", Ether(src=CONTAINER_MAC, dst=GATEWAY_MAC) / Dot1Q(vlan=0) / IP() / LONG, "drop VLAN"),
    ("two tags", Ether(src=GATEWAY_MAC, dst=CONTAINER_MAC) / Dot1Q() / Dot1Q() / IP() / LONG, "drop VLAN"),
    ("a MAC not the container's", outbound(tcp(1000, 90), mac=STRANGER_MAC), "drop FOREIGN_MAC"),
    ("to another MAC", inbound(SYN81, mac=STRANGER_MAC), "drop FOREIGN_DESTINATION"),
    ("a source not the container's", outbound(tcp(1000, 90), source="10.9.0.9"), "drop FOREIGN_SOURCE"),
    ("IPv6 source not its own", outbound(tcp(1, 90), PEER6, "fd00:9::9"), "drop FOREIGN_SOURCE"),
    ("first fragment", inbound(SYN81 / LONG, flags="MF"), "drop FRAGMENT"),
    ("later fragment", inbound(SYN81 / LONG, frag=1), "drop FRAGMENT"),
    ("IPv6 fragment", inbound6(IPv6ExtHdrFragment(m=1) / SYN81 / LONG), "drop FRAGMENT"),
    ("IPv6 atomic fragment", inbound6(IPv6ExtHdrFragment() / SYN81), "drop FRAGMENT"),
    ("IPv4 options", inbound(SYN81, options=IPOption_Timestamp()), "drop IP_OPTIONS"),
    ("hop by hop", inbound6(IPv6ExtHdrHopByHop() / SYN81), "drop EXTENSION_HEADER"),
    ("destination options", inbound6(IPv6ExtHdrDestOpt() / SYN81), "drop EXTENSION_HEADER"),
    ("routing header", inbound6(IPv6ExtHdrRouting() / SYN81), "drop EXTENSION_HEADER"),
    ("no next header", inbound6(LONG, nh=59), "drop EXTENSION_HEADER"),
    ("ICMPv6 in IPv4", inbound(ICMPv6EchoRequest(), proto=58), "drop PROTOCOL"),
    ("ICMP in IPv6", inbound6(ICMP(), nh=1), "drop PROTOCOL"),
    ("ICMP timestamp request", inbound(ICMP(type=13)), "drop PROTOCOL"),
    ("ICMP redirect", inbound(ICMP(type=5) / LONG), "drop PROTOCOL"),
    ("multicast listener report", inbound6(ICMPv6MLReport()), "drop PROTOCOL"),
    ("IGMP, which no rule allows", inbound(Raw(bytes(8)), proto=2), "drop POLICY_DEFAULT"),
]


@pytest.mark.parametrize(("frame", "expected"), [row[1:] for row in FRAMES], ids=[row[0] for row in FRAMES])
def test_frame(b: Bench, frame: Packet | bytes, expected: str) -> None:
    assert send(b, frame) == expected


def arp(source: str = CONTAINER_MAC, dst: str = "ff:ff:ff:ff:ff:ff", **fields: object) -> Packet:
    return Ether(src=source, dst=dst) / ARP(**{"hwsrc": source, "psrc": CONTAINER, "pdst": PEER, **fields})


def neighbour(message: Packet, source: str = CONTAINER6, to: str = PEER6, hlim: int = 255) -> Packet:
    return Ether(src=CONTAINER_MAC, dst=GATEWAY_MAC) / IPv6(src=source, dst=to, hlim=hlim) / message


def neighbour_in(message: Packet, hlim: int = 255, dst: str = CONTAINER_MAC) -> Packet:
    return Ether(src=GATEWAY_MAC, dst=dst) / IPv6(src=PEER6, dst=CONTAINER6, hlim=hlim) / message


NEIGHBOURS: list[tuple[str, Packet, str]] = [
    ("asks", arp(), "network"),
    ("asks, and is asked by broadcast", arp(GATEWAY_MAC, psrc=PEER, pdst=CONTAINER), "container"),
    ("answers", arp(dst=GATEWAY_MAC, op=2), "network"),
    ("announces itself", arp(pdst=CONTAINER), "network"),
    ("probes before it takes an address", arp(psrc="0.0.0.0"), "network"),
    ("claims another's address", arp(psrc=PEER), "drop NEIGHBOUR_SPOOF"),
    ("claims another's address in an answer", arp(op=2, psrc=PEER), "drop NEIGHBOUR_SPOOF"),
    ("claims for another MAC", arp(hwsrc=STRANGER_MAC), "drop NEIGHBOUR_SPOOF"),
    ("solicits", neighbour(ICMPv6ND_NS(tgt=PEER6)), "network"),
    ("detects duplicates", neighbour(ICMPv6ND_NS(tgt=CONTAINER6), source="::"), "network"),
    ("advertises itself", neighbour(ICMPv6ND_NA(tgt=CONTAINER6)), "network"),
    ("looks for routers", neighbour(ICMPv6ND_RS(), to=ALL_ROUTERS), "network"),
    ("advertises another", neighbour(ICMPv6ND_NA(tgt=PEER6)), "drop NEIGHBOUR_SPOOF"),
    ("plays the router", neighbour(ICMPv6ND_RA()), "drop NEIGHBOUR_SPOOF"),
    ("redirects", neighbour(ICMPv6ND_Redirect()), "drop NEIGHBOUR_SPOOF"),
    ("solicits as another", neighbour(ICMPv6ND_NS(tgt=PEER6), source="fd00:9::9"), "drop FOREIGN_SOURCE"),
    ("from beyond a router", neighbour(ICMPv6ND_NS(tgt=PEER6), hlim=254), "drop NEIGHBOUR_SPOOF"),
    ("is solicited", neighbour_in(ICMPv6ND_NS(tgt=CONTAINER6), dst="33:33:ff:00:00:01"), "container"),
    ("is answered", neighbour_in(ICMPv6ND_NA(tgt=PEER6)), "container"),
    ("hears a router", neighbour_in(ICMPv6ND_RA()), "container"),
    ("is redirected", neighbour_in(ICMPv6ND_Redirect()), "drop NEIGHBOUR_SPOOF"),
    ("hears a router from beyond one", neighbour_in(ICMPv6ND_RA(), hlim=64), "drop NEIGHBOUR_SPOOF"),
]


@pytest.mark.parametrize(
    ("frame", "expected"), [row[1:] for row in NEIGHBOURS], ids=[row[0] for row in NEIGHBOURS]
)
def test_neighbour(b: Bench, frame: Packet, expected: str) -> None:
    assert send(b, frame) == expected


def test_a_port_nobody_registered_is_closed(b: Bench) -> None:
    b.datapath.delete_port(b.network_port)
    assert send(b, inbound(SYN81)) == "drop NO_POLICY"


def test_without_a_policy_everything_is_closed(b: Bench) -> None:
    b.policy([])
    assert send(b, inbound(SYN81)) == "drop NO_POLICY"
    assert send(b, outbound(tcp(1000, 90))) == "drop NO_POLICY"


# -- layer 4: first packets, by policy -------------------------------------------------------------------

LAYER4: list[tuple[str, Packet, str]] = [
    ("allowed port", inbound(SYN81), "container"),
    ("allowed port, IPv6", inbound6(SYN81), "container"),
    ("deny rule", inbound(tcp(1000, 82)), "drop POLICY_DENY"),
    ("deny rule, IPv6", inbound6(tcp(1000, 82)), "drop POLICY_DENY"),
    ("deny rule that answers", inbound(tcp(1000, 83)), "punt RESET"),
    ("no rule", inbound(tcp(1000, 84)), "drop POLICY_DEFAULT"),
    ("peer of another identity", inbound(SYN81, source=DENIED_PEER), "drop POLICY_DEFAULT"),
    ("peer of the world", inbound(SYN81, source="192.0.2.1"), "drop POLICY_DEFAULT"),
    ("peer of the world, IPv6", inbound(SYN81, "2001:db8::1", CONTAINER6), "drop POLICY_DEFAULT"),
    ("TCP's port by UDP", inbound(UDP(sport=1000, dport=81)), "drop POLICY_DEFAULT"),
    ("UDP", inbound(UDP(sport=1000, dport=53) / b"query"), "container"),
    ("UDP, IPv6", inbound6(UDP(sport=1000, dport=53) / b"query"), "container"),
    ("UDP from the right port to another", inbound(UDP(sport=53, dport=1000)), "drop POLICY_DEFAULT"),
    ("echo request", inbound(ICMP(id=9)), "container"),
    ("echo request, IPv6", inbound6(ICMPv6EchoRequest(id=9)), "container"),
    ("echo reply nobody asked for", inbound(ICMP(type=0, id=9)), "drop ICMP_UNRELATED"),
    ("echo reply nobody asked for, IPv6", inbound6(ICMPv6EchoReply(id=9)), "drop ICMP_UNRELATED"),
    ("out, allowed port", outbound(tcp(1000, 90)), "network"),
    ("out, allowed port, IPv6", outbound6(tcp(1000, 90)), "network"),
    ("out, no rule", outbound(tcp(1000, 81)), "drop POLICY_DEFAULT"),
    ("out, another peer", outbound(tcp(1000, 90), to="192.0.2.1"), "drop POLICY_DEFAULT"),
    ("out, UDP", outbound(UDP(sport=1000, dport=53)), "network"),
    ("out, echo request", outbound(ICMP(id=9)), "network"),
    ("payload on a SYN", inbound(SYN81 / b"GET"), "drop SYN_PAYLOAD"),
    ("middle of a connection", inbound(tcp(40000, 81, "A")), "container"),
    ("middle of one that the container opened", inbound(tcp(90, 40000, "A")), "container"),
    ("middle of one that either may have opened", inbound(tcp(1000, 81, "A")), "drop POLICY_DEFAULT"),
    ("an IPv4 address in IPv6", inbound(tcp(1000, 81), source="::ffff:10.9.0.2", to=CONTAINER6), "drop MALFORMED"),
    ("middle of one that no rule allows", inbound(tcp(1000, 84, "A")), "drop POLICY_DEFAULT"),
    ("middle of an inspected one", inbound(tcp(1000, 80, "A") / b"GET / HTTP/1.1"), "punt STATE_LOST"),
    ("the same, from the container", outbound(tcp(80, 1000, "A")), "punt STATE_LOST"),
]  # fmt: skip


@pytest.mark.parametrize(("frame", "expected"), [row[1:] for row in LAYER4], ids=[row[0] for row in LAYER4])
def test_first_packet(b: Bench, frame: Packet, expected: str) -> None:
    assert send(b, frame) == expected


@pytest.mark.parametrize(
    "frame", [inbound(SYN81), inbound6(UDP(sport=1, dport=53) / b"x"), outbound(tcp(1000, 90)), arp()]
)
def test_what_is_forwarded_is_what_came(b: Bench, frame: Packet) -> None:
    container = frame.src == CONTAINER_MAC
    outcome = b.from_container(frame) if container else b.from_network(frame)
    assert outcome.frame == bytes(frame)


SEQUENCES: list[tuple[str, list[tuple[Packet, str]]]] = [
    ("the answer to an allowed connection", [
        (inbound(tcp(1000, 81)), "container"),
        (outbound(tcp(81, 1000, "SA")), "network"),
    ]),
    ("an answer opens nothing for its sender", [
        (inbound(tcp(1000, 81)), "container"),
        (outbound(tcp(81, 1000, "S")), "drop POLICY_DEFAULT"),
        (outbound(tcp(81, 1000, "A")), "network"),
    ]),
    ("the answer to a query", [
        (outbound(UDP(sport=1000, dport=53)), "network"),
        (inbound(UDP(sport=53, dport=1000)), "container"),
    ]),
    ("an echo and its reply", [
        (outbound(ICMP(id=9)), "network"),
        (inbound(ICMP(type=0, id=9)), "container"),
        (inbound(ICMP(type=0, id=8)), "drop ICMP_UNRELATED"),
    ]),
    ("a denied flow stays denied", [
        (inbound(tcp(1000, 82)), "drop POLICY_DENY"),
        (inbound(tcp(1000, 82, "A") / b"GET"), "drop POLICY_DENY"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("steps", [row[1] for row in SEQUENCES], ids=[row[0] for row in SEQUENCES])
def test_flow(b: Bench, steps: list[tuple[Packet, str]]) -> None:
    assert [send(b, frame) for frame, _ in steps] == [expected for _, expected in steps]


def test_a_changed_policy_holds_for_live_flows(b: Bench) -> None:
    assert send(b, inbound(SYN81)) == "container"
    b.policy([])
    assert send(b, inbound(tcp(1000, 81, "A"))) == "drop NO_POLICY"


def test_an_address_that_is_taken_back(b: Bench) -> None:
    assert send(b, outbound(tcp(1000, 90))) == "network"
    b.datapath.set_addresses(7, [])
    assert send(b, outbound(tcp(1000, 90, "A"))) == "drop FOREIGN_SOURCE"


# -- ICMP errors belong to the flow of their inner tuple -------------------------------------------------


def inner(source: str, to: str, sport: int, dport: int, kind: type[Packet] = TCP) -> Packet:
    return IP(src=source, dst=to) / kind(sport=sport, dport=dport)


def inner6(source: str, to: str, sport: int, dport: int) -> Packet:
    return IPv6(src=source, dst=to) / TCP(sport=sport, dport=dport)


MTU = ICMP(type=3, code=4, nexthopmtu=1400)
ERRORS: list[tuple[str, Packet, Packet, str]] = [
    ("path MTU of an answer", inbound(SYN81), inbound(MTU / inner(CONTAINER, PEER, 81, 1000)), "container"),
    ("from a router on the way", inbound(SYN81),
     inbound(MTU / inner(CONTAINER, PEER, 81, 1000), source="192.0.2.1"), "container"),
    ("of another connection", inbound(SYN81),
     inbound(MTU / inner(CONTAINER, PEER, 81, 1001)), "drop ICMP_UNRELATED"),
    ("of a packet that its receiver did not send", inbound(SYN81),
     inbound(MTU / inner(PEER, CONTAINER, 1000, 81)), "drop ICMP_UNRELATED"),
    ("of a denied connection", inbound(tcp(1000, 82)),
     inbound(MTU / inner(CONTAINER, PEER, 82, 1000)), "drop ICMP_UNRELATED"),
    ("container refuses a datagram", inbound(UDP(sport=1000, dport=53)),
     outbound(ICMP(type=3, code=3) / inner(PEER, CONTAINER, 1000, 53, UDP)), "network"),
    ("container refuses in another's name", inbound(UDP(sport=1000, dport=53)),
     outbound(ICMP(type=3, code=3) / inner(PEER, CONTAINER, 1000, 53, UDP), source="10.9.0.9"),
     "drop FOREIGN_SOURCE"),
    ("to another than the inner source", inbound(UDP(sport=1000, dport=53)),
     outbound(ICMP(type=3, code=3) / inner(PEER, CONTAINER, 1000, 53, UDP), to="10.9.0.8"),
     "drop ICMP_UNRELATED"),
    ("time exceeded of an echo", outbound(ICMP(id=9)),
     inbound(ICMP(type=11) / IP(src=CONTAINER, dst=PEER) / ICMP(id=9)), "container"),
    ("inner header cut", inbound(SYN81),
     inbound(MTU / Raw(bytes(inner(CONTAINER, PEER, 81, 1000))[:24])), "drop ICMP_UNRELATED"),
    ("packet too big", inbound6(SYN81),
     inbound6(ICMPv6PacketTooBig(mtu=1400) / inner6(CONTAINER6, PEER6, 81, 1000)), "container"),
    ("unreachable, of another connection", inbound6(SYN81),
     inbound6(ICMPv6DestUnreach() / inner6(CONTAINER6, PEER6, 82, 1000)), "drop ICMP_UNRELATED"),
    ("of an inspected connection", inbound(tcp(1000, 80)),
     inbound(MTU / inner(CONTAINER, PEER, 80, 1000)), "container"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "error", "expected"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS]
)
def test_icmp_error(b: Bench, first: Packet, error: Packet, expected: str) -> None:
    send(b, first)
    assert send(b, error) == expected


# -- GSO -------------------------------------------------------------------------------------------------


def big(payload: int, **ip: object) -> bytes:
    return bytes(inbound(tcp(1000, 81, "A", chksum=0) / Raw(b"x" * payload), **ip))


def test_a_super_packet_goes_on_whole(b: Bench) -> None:
    send(b, inbound(SYN81))
    assert str(b.from_network(big(9000), gso(54, 1448))) == "container"


@pytest.mark.parametrize("length", [0, 1500, 9041])
def test_a_super_packet_whose_length_disagrees(b: Bench, length: int) -> None:
    send(b, inbound(SYN81))
    assert str(b.from_network(big(9000, len=length), gso(54, 1448))) == "drop LENGTH_MISMATCH"


# -- what is reported ------------------------------------------------------------------------------------


def test_a_drop_is_reported_with_its_flow(b: Bench) -> None:
    reader = b.datapath.events()
    reader.read()
    send(b, inbound(tcp(1000, 82)))
    (event,) = reader.read()
    reader.close()
    assert (event.reason.name, event.rule, event.direction.name) == ("POLICY_DENY", 82, "INGRESS")
    assert (event.key.local_port, event.key.remote_port, event.key.protocol) == (82, 1000, 6)
    assert event.length == 54


def test_rules_count_what_they_decide(b: Bench) -> None:
    for port in (1000, 1001, 1002):
        send(b, inbound(tcp(port, 81)))
    send(b, inbound(tcp(1000, 82)))
    hits = b.policy([])
    assert (hits[81], hits[82], hits[53]) == (3, 1, 0)


def test_the_doorbell_rings_once(b: Bench) -> None:
    b.datapath.control.need_wakeup = True
    send(b, inbound(tcp(1000, 83)))
    assert not b.datapath.control.need_wakeup
