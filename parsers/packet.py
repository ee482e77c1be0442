"""A TCP segment in an Ethernet frame: read once, by fixed offsets, and built.

`parse_segment` is the only gate: IPv4 without options or IPv6 without extension headers, TCP, lengths that agree.
Behind it the fields of a Segment cannot fail. Frames stand without struct virtio_net_hdr when read, with it when
built (Linux, include/uapi/linux/virtio_net.h).
"""

from __future__ import annotations

import struct

from parsers.checksum import Octets, internet_checksum, ones_sum
from parsers.errors import PacketMalformed

VNET = 10  # sizeof(struct virtio_net_hdr)
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32

_ETHERNET = 14
_IPV4_TCP = struct.Struct("!12xHBxH2xHxB10xHHIIBBH")  # from the start of the frame, IPv4 without options
_IPV6_TCP = struct.Struct("!12xHB3xHB33xHHIIBBH")
_HEADER_MIN4, _HEADER_MIN6 = _ETHERNET + 40, _ETHERNET + 60
_MAPPED = bytes(10) + b"\xff\xff"
_TCP = 6
_PADDED = 60  # shorter Ethernet frames come padded from real wires

_VNET = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
_NEEDS_CSUM, _GSO_NONE, _GSO_TCPV4, _GSO_TCPV6 = 1, 0, 1, 4
_IPV4 = struct.Struct("!BBHHHBBH")
_TCP_HEADER = struct.Struct("!IIBBHHH")
_TIMESTAMPS = struct.Struct("!BBBBII")


class Segment:
    """Where things stand in a frame. `key`: source and destination address and port, straight from the wire."""

    __slots__ = ("ack", "flags", "key", "l4", "payload_at", "payload_end", "seq", "version", "window")

    l3 = _ETHERNET

    def __init__(
        self, key: bytes, version: int, l4: int, payload_at: int, payload_end: int,
        seq: int, ack: int, flags: int, window: int,
    ) -> None:  # fmt: skip
        self.key = key
        self.version = version
        self.l4 = l4
        self.payload_at = payload_at
        self.payload_end = payload_end
        self.seq = seq
        self.ack = ack
        self.flags = flags
        self.window = window

    @property
    def payload_length(self) -> int:
        return self.payload_end - self.payload_at

    def source(self, frame: Octets) -> bytes:
        """16 bytes; IPv4 mapped into IPv6 (RFC 4291 section 2.5.5.2)."""
        return _MAPPED + bytes(frame[26:30]) if self.version == 4 else bytes(frame[22:38])

    def destination(self, frame: Octets) -> bytes:
        return _MAPPED + bytes(frame[30:34]) if self.version == 4 else bytes(frame[38:54])

    def source_port(self, frame: Octets) -> int:
        return int.from_bytes(frame[self.l4 : self.l4 + 2], "big")

    def destination_port(self, frame: Octets) -> int:
        return int.from_bytes(frame[self.l4 + 2 : self.l4 + 4], "big")

    def timestamps(self, frame: Octets) -> tuple[int, int] | None:
        """TSval and TSecr, if the option is there (RFC 7323 section 3.2)."""
        options = bytes(frame[self.l4 + 20 : self.payload_at])
        at = 0
        while at < len(options):
            kind = options[at]
            if kind == 0:
                return None
            if kind == 1:
                at += 1
                continue
            if at + 1 >= len(options) or options[at + 1] < 2:
                return None
            if kind == 8 and options[at + 1] == 10 and at + 10 <= len(options):
                return struct.unpack_from("!II", options, at + 2)
            at += options[at + 1]
        return None


def parse_segment(frame: Octets) -> Segment:
    """Raises PacketMalformed for whatever is not one whole TCP segment."""
    try:
        kind, first, total, fragment, protocol, _, _, seq, ack, offset, flags, window = _IPV4_TCP.unpack_from(
            frame
        )
    except struct.error:
        raise PacketMalformed("shorter than its headers") from None
    if kind == 0x0800:
        if first != 0x45 or fragment & 0x3FFF or protocol != _TCP:
            raise PacketMalformed("not IPv4 with TCP, without options, in one piece")
        version, l4, key = 4, 34, bytes(frame[26:38])
    elif kind == 0x86DD:
        if len(frame) < _HEADER_MIN6:
            raise PacketMalformed("shorter than its headers")
        _, first, total, protocol, _, _, seq, ack, offset, flags, window = _IPV6_TCP.unpack_from(frame)
        if first >> 4 != 6 or protocol != _TCP:
            raise PacketMalformed("not IPv6 with TCP, without extension headers")
        version, l4, key = 6, 54, bytes(frame[22:58])
        total += 40
    else:
        raise PacketMalformed("neither IPv4 nor IPv6")
    end = total + _ETHERNET
    payload_at = l4 + (offset >> 4) * 4
    if payload_at < l4 + 20 or payload_at > end or (end != len(frame) and not end < len(frame) <= _PADDED):
        raise PacketMalformed("lengths disagree")
    return Segment(key, version, l4, payload_at, end, seq, ack, flags, window)


def _pseudo_sum(frame: Octets, version: int, length: int) -> int:
    """Of the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1), not folded."""
    addresses = frame[26:34] if version == 4 else frame[22:54]
    return int.from_bytes(addresses, "big") % 0xFFFF + _TCP + length


def tcp_checksum_ok(frame: Octets, segment: Segment) -> bool:
    start = _pseudo_sum(frame, segment.version, segment.payload_end - segment.l4)
    return ones_sum(bytes(frame[segment.l4 : segment.payload_end]), start) == 0xFFFF


def tcp_checksum_unfinished(frame: Octets, segment: Segment) -> bool:
    """Whether the field holds the pseudo header's sum alone, as a sender leaves it to its device to complete."""
    start = _pseudo_sum(frame, segment.version, segment.payload_end - segment.l4)
    return ones_sum(b"", start) == int.from_bytes(frame[segment.l4 + 16 : segment.l4 + 18], "big")


class SegmentTemplate:
    """Headers of a connection's one direction, from which further segments of it are built."""

    __slots__ = ("_destination", "_ethernet", "_ports", "_source", "_version")

    def __init__(
        self, version: int, ethernet: bytes, source: bytes, destination: bytes, ports: bytes
    ) -> None:
        self._version = version
        self._ethernet = ethernet  # destination MAC, source MAC, EtherType
        self._source = source
        self._destination = destination
        self._ports = ports

    @classmethod
    def like(cls, frame: Octets, segment: Segment) -> SegmentTemplate:
        size = 4 if segment.version == 4 else 16
        at = 26 if segment.version == 4 else 22
        source, destination = bytes(frame[at : at + size]), bytes(frame[at + size : at + 2 * size])
        ports = bytes(frame[segment.l4 : segment.l4 + 4])
        return cls(segment.version, bytes(frame[:_ETHERNET]), source, destination, ports)

    def reversed(self) -> SegmentTemplate:
        """The other direction's."""
        e, p = self._ethernet, self._ports
        return SegmentTemplate(
            self._version, e[6:12] + e[:6] + e[12:], self._destination, self._source, p[2:] + p[:2]
        )

    def build(
        self,
        seq: int,
        ack: int,
        flags: int,
        payload: Octets = b"",
        window: int = 65535,
        timestamps: tuple[int, int] | None = None,
        mss: int = 1220,
    ) -> bytes:
        """struct virtio_net_hdr and the frame. The kernel completes the checksum, and cuts at `mss` bytes.

        1220 bytes is what any path takes: IPv6's least MTU less its headers (RFC 8200 section 5).
        """
        options = _TIMESTAMPS.pack(1, 1, 8, 10, *timestamps) if timestamps else b""
        header = 20 + len(options)
        length = header + len(payload)
        network = self._network(length)
        l4 = _ETHERNET + len(network)
        check = self._pseudo(length)
        tcp = self._ports + _TCP_HEADER.pack(
            seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, header << 2, flags, window, check, 0
        )
        gso, size = _GSO_NONE, 0
        if len(payload) > mss:
            gso, size = (_GSO_TCPV4 if self._version == 4 else _GSO_TCPV6), mss
        vnet = _VNET.pack(_NEEDS_CSUM, gso, l4 + header, size, l4, 16)
        return b"".join((vnet, self._ethernet, network, tcp, options, payload))

    def _network(self, length: int) -> bytes:
        if self._version == 6:
            return struct.pack("!IHBB", 6 << 28, length, _TCP, 64) + self._source + self._destination
        addresses = self._source + self._destination
        head = _IPV4.pack(0x45, 0, 20 + length, 0, 0x4000, 64, _TCP, 0)
        check = internet_checksum(head + addresses)
        return head[:10] + check.to_bytes(2, "big") + addresses

    def _pseudo(self, length: int) -> int:
        total = int.from_bytes(self._source + self._destination, "big") + _TCP + length
        return total % 0xFFFF or 0xFFFF
