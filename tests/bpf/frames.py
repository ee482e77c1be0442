"""Frames as the tables write them: `inbound` comes from the network, `outbound` from the container."""

from __future__ import annotations

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from tests.bpf.bench import CONTAINER, CONTAINER6, CONTAINER_MAC, GATEWAY_MAC, PEER, PEER6


def inbound(
    rest: Packet, source: str = PEER, to: str = CONTAINER, mac: str = CONTAINER_MAC, **ip: object
) -> Packet:
    return Ether(src=GATEWAY_MAC, dst=mac) / network(source, to, **ip) / rest


def inbound6(rest: Packet, **ip: object) -> Packet:
    return inbound(rest, PEER6, CONTAINER6, **ip)


def outbound(
    rest: Packet, to: str = PEER, source: str = CONTAINER, mac: str = CONTAINER_MAC, **ip: object
) -> Packet:
    return Ether(src=mac, dst=GATEWAY_MAC) / network(source, to, **ip) / rest


def outbound6(rest: Packet, **ip: object) -> Packet:
    return outbound(rest, PEER6, CONTAINER6, **ip)


def network(source: str, to: str, **fields: object) -> Packet:
    kind = IPv6 if ":" in source else IP
    return kind(src=source, dst=to, **fields)


def tcp(source: int, to: int, flags: str = "S", seq: int = 1000, ack: int = 0, **fields: object) -> Packet:
    return TCP(sport=source, dport=to, flags=flags, seq=seq, ack=ack, **fields)


def checksums_are_right(frame: bytes) -> bool:
    """Whether scapy, computing them anew, comes to the same bytes."""
    packet = Ether(frame)
    for layer in (IP, TCP):
        if layer in packet:
            del packet[layer].chksum
    return bytes(packet) == frame
