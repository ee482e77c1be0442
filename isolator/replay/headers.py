"""A frame's headers as the kernel reads them (bpf/isolator_packet.h, read_packet), with the same drop reasons.

What needs MAC addresses or the kernel's own tables (ARP, neighbour discovery) is not judged offline.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from isolator.core.model import DropReason
from parsers.errors import DissectError
from parsers.packet import Segment, parse_segment

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
ETHERNET_MIN = 60
_MAPPED = bytes(10) + b"\xff\xff"
_FRAGMENT = 44
_EXTENSIONS = frozenset({0, 43, 60, 59, 135, 139, 140})
_ECHO_REQUESTS, _ECHOES, _ERRORS = (8, 128), (0, 8, 128, 129), (3, 11, 12)
_ERRORS6 = range(1, 5)


@dataclass(slots=True)
class Headers:
    """`source`, `destination`: 16 bytes, IPv4 mapped. `reason`: dropped whoever is meant. `opens`: it may open a flow.
    `inner`: where the packet stands that an ICMP error speaks of. `neighbour`: of neighbour discovery."""

    source: bytes
    destination: bytes
    protocol: int = 0
    reason: DropReason = DropReason.NONE
    source_port: int = 0
    destination_port: int = 0
    opens: bool = False
    segment: Segment | None = None
    inner: int = 0
    neighbour: bool = False


def read_headers(frame: memoryview) -> Headers | None:
    """None: not IP, or no whole IP header."""
    kind = bytes(frame[12:14])
    if kind == b"\x08\x00" and len(frame) >= 34 and frame[14] >> 4 == 4:
        return _ipv4(frame)
    if kind == b"\x86\xdd" and len(frame) >= 54 and frame[14] >> 4 == 6:
        return _ipv6(frame)
    return None


def _ipv4(frame: memoryview) -> Headers:
    source, destination = _MAPPED + bytes(frame[26:30]), _MAPPED + bytes(frame[30:34])
    found = Headers(source, destination, frame[23])
    total, fragment = struct.unpack_from("!H2xH", frame, 16)
    if frame[14] != 0x45:
        found.reason = DropReason.MALFORMED if frame[14] < 0x45 else DropReason.IP_OPTIONS
    elif fragment & 0x3FFF:
        found.reason = DropReason.FRAGMENT
    elif total < 20 or not _lengths_agree(frame, total):
        found.reason = DropReason.LENGTH_MISMATCH
    else:
        _transport(frame, found, 34, 4)
    return found


def _ipv6(frame: memoryview) -> Headers:
    found = Headers(bytes(frame[22:38]), bytes(frame[38:54]), frame[20])
    if not _lengths_agree(frame, int.from_bytes(frame[18:20], "big") + 40):
        found.reason = DropReason.LENGTH_MISMATCH
    elif found.protocol == _FRAGMENT:
        found.reason = DropReason.FRAGMENT
    elif found.protocol in _EXTENSIONS:
        found.reason = DropReason.EXTENSION_HEADER
    elif _MAPPED in (found.source[:12], found.destination[:12]):
        found.reason = DropReason.MALFORMED
    else:
        _transport(frame, found, 54, 6)
    return found


def _lengths_agree(frame: memoryview, said: int) -> bool:
    there = len(frame) - 14
    return said == there or (len(frame) <= ETHERNET_MIN and said < there)


def _transport(frame: memoryview, found: Headers, at: int, version: int) -> None:
    if found.protocol == TCP:
        try:
            found.segment = parse_segment(frame)
        except DissectError:
            found.reason = DropReason.MALFORMED
    elif found.protocol in (UDP, ICMP, ICMPV6) and len(frame) < at + 8:
        found.reason = DropReason.MALFORMED
    elif found.protocol in (ICMP, ICMPV6):
        if (found.protocol == ICMP) != (version == 4):
            found.reason = DropReason.PROTOCOL
        else:
            _icmp(frame, found, at, version)
        return
    found.opens = True
    if found.protocol in (TCP, UDP) and not found.reason:
        found.source_port, found.destination_port = struct.unpack_from("!HH", frame, at)


def _icmp(frame: memoryview, found: Headers, at: int, version: int) -> None:
    kind = frame[at]
    found.source_port = found.destination_port = int.from_bytes(frame[at + 4 : at + 6], "big")
    if kind in (_ECHOES[:2] if version == 4 else _ECHOES[2:]):
        found.opens = kind in _ECHO_REQUESTS
    elif kind in (_ERRORS if version == 4 else _ERRORS6):
        found.inner = at + 8
    elif version == 6 and 133 <= kind <= 137:
        found.neighbour = True
    else:
        found.reason = DropReason.PROTOCOL


def inner_of(frame: memoryview, found: Headers) -> Headers | None:
    """The tuple that an ICMP error speaks of (RFC 792, RFC 4443 section 3)."""
    at = found.inner
    if found.protocol == ICMP:
        if (
            len(frame) < at + 28
            or frame[at] != 0x45
            or int.from_bytes(frame[at + 6 : at + 8], "big") & 0x1FFF
        ):
            return None
        source, destination = (_MAPPED + bytes(frame[at + n : at + n + 4]) for n in (12, 16))
        inner, ports = Headers(source, destination, frame[at + 9]), at + 20
    else:
        if len(frame) < at + 48 or frame[at] >> 4 != 6:
            return None
        source, destination = bytes(frame[at + 8 : at + 24]), bytes(frame[at + 24 : at + 40])
        inner, ports = Headers(source, destination, frame[at + 6]), at + 40
    if inner.protocol in (TCP, UDP):
        inner.source_port, inner.destination_port = struct.unpack_from("!HH", frame, ports)
    elif inner.protocol in (ICMP, ICMPV6):
        inner.source_port = inner.destination_port = int.from_bytes(frame[ports + 4 : ports + 6], "big")
    return inner
