"""The ICMP errors that refuse a packet, as scapy reads them."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from parsers.icmp import unreachable
from parsers.packet import VNET

A, B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
ETHER = Ether(src=A, dst=B)
QUERY = UDP(sport=5000, dport=53) / Raw(b"x" * 1400)


def summed_right(frame: bytes, *layers: type[Packet]) -> bool:
    packet = Ether(frame)
    for layer in layers:
        packet[layer].delfieldval("cksum" if layer is ICMPv6DestUnreach else "chksum")
    return bytes(packet) == frame


def test_ipv4() -> None:
    frame = ETHER / IP(src="10.0.0.1", dst="10.0.0.2") / QUERY
    built = unreachable(bytes(frame))
    assert built is not None
    error = Ether(built[VNET:])
    assert (error.src, error.dst, error[IP].src, error[IP].dst) == (B, A, "10.0.0.2", "10.0.0.1")
    assert (error[ICMP].type, error[ICMP].code) == (3, 13)
    assert bytes(error[ICMP].payload) == bytes(frame[IP])[:28]
    assert summed_right(built[VNET:], IP, ICMP)


def test_ipv6() -> None:
    frame = ETHER / IPv6(src="fd00::1", dst="fd00::2") / QUERY
    built = unreachable(bytes(frame))
    assert built is not None
    error = Ether(built[VNET:])
    assert (error[IPv6].src, error[IPv6].dst) == ("fd00::2", "fd00::1")
    assert (error[ICMPv6DestUnreach].type, error[ICMPv6DestUnreach].code) == (1, 1)
    assert built[VNET + 14 + 40 + 8 :] == bytes(frame[IPv6])[:1040]
    assert len(built) - VNET - 14 <= 1280
    assert summed_right(built[VNET:], ICMPv6DestUnreach)


@pytest.mark.parametrize("frame", [
    b"", bytes(20), ETHER / ARP(), ETHER / IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(),
    ETHER / IP(src="10.0.0.1", dst="10.0.0.2", frag=8) / QUERY, ETHER / IP(src="10.0.0.1", dst="224.0.0.1") / QUERY,
    Ether(src=A, dst="ff:ff:ff:ff:ff:ff") / IP(src="10.0.0.1", dst="10.0.0.255") / QUERY,
    ETHER / IPv6(src="fd00::1", dst="fd00::2") / ICMPv6EchoRequest(), ETHER / IPv6(src="::", dst="fd00::2") / TCP(),
    ETHER / IPv6(src="fd00::1", dst="ff02::1") / QUERY,
])  # fmt: skip
def test_what_is_not_answered(frame: Packet | bytes) -> None:
    assert unreachable(bytes(frame)) is None
