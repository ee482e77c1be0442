"""The ICMP error that refuses a packet: "administratively prohibited" (RFC 1122 section 3.2.2.1, RFC 4443 3.1)."""

from __future__ import annotations

import struct

from parsers.checksum import Octets, internet_checksum

_VNET_NONE = bytes(10)  # struct virtio_net_hdr: nothing left to do
_ETHERNET = 14
_QUOTED4 = 8  # bytes behind the IP header, RFC 792
_QUOTED6 = 1000  # as much as fits the least MTU of 1280, RFC 4443 section 2.4 c
_UNREACHABLE4, _PROHIBITED4 = 3, 13
_UNREACHABLE6, _PROHIBITED6 = 1, 1
_ICMP4, _ICMP6 = 1, 58


def unreachable(frame: Octets) -> bytes | None:
    """struct virtio_net_hdr and the frame for the sender of `frame`; None for what is not to be answered.

    Not answered: broadcasts and multicasts, ICMP itself, fragments but the first, what is cut short (RFC 1122
    section 3.2.2, RFC 4443 section 2.4 e).
    """
    if len(frame) < _ETHERNET + 20 or frame[0] & 1:
        return None
    kind = bytes(frame[12:14])
    if kind == b"\x08\x00":
        return _unreachable4(frame)
    return _unreachable6(frame) if kind == b"\x86\xdd" and len(frame) >= _ETHERNET + 40 else None


def _back(frame: Octets) -> bytes:
    return _VNET_NONE + bytes(frame[6:12]) + bytes(frame[:6]) + bytes(frame[12:14])


def _unreachable4(frame: Octets) -> bytes | None:
    header = (frame[14] & 0xF) * 4
    fragment = (frame[20] & 0x1F) << 8 | frame[21]
    if frame[23] == _ICMP4 or fragment or header < 20 or frame[30] >= 224 or frame[26] >= 224:
        return None
    quoted = bytes(frame[_ETHERNET : _ETHERNET + header + _QUOTED4])
    icmp = _summed(struct.pack("!BBHI", _UNREACHABLE4, _PROHIBITED4, 0, 0) + quoted, b"")
    head = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(icmp), 0, 0, 64, _ICMP4)
    addresses = bytes(frame[30:34]) + bytes(frame[26:30])
    check = internet_checksum(head + bytes(2) + addresses).to_bytes(2, "big")
    return _back(frame) + head + check + addresses + icmp


def _unreachable6(frame: Octets) -> bytes | None:
    source, destination = bytes(frame[22:38]), bytes(frame[38:54])
    if frame[20] == _ICMP6 or source[0] == 0xFF or destination[0] == 0xFF or not any(source):
        return None
    quoted = bytes(frame[_ETHERNET : _ETHERNET + 40 + _QUOTED6])
    icmp = struct.pack("!BBHI", _UNREACHABLE6, _PROHIBITED6, 0, 0) + quoted
    icmp = _summed(icmp, destination + source + struct.pack("!II", len(icmp), _ICMP6))
    return _back(frame) + struct.pack("!IHBB", 6 << 28, len(icmp), _ICMP6, 64) + destination + source + icmp


def _summed(icmp: bytes, pseudo: bytes) -> bytes:
    return icmp[:2] + internet_checksum(pseudo + icmp).to_bytes(2, "big") + icmp[4:]
