"""Captures for the tests: conversations as frames, and files of them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from isolator.replay.capture import Captured
from parsers.packet import ACK, FIN, PSH, SYN, VNET, SegmentTemplate

API, WEB, STRANGER = b"\x0a\x09\x00\x03", b"\x0a\x09\x00\x02", b"\xc0\x00\x02\x01"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
START = 1_700_000_000 * 10**9  # ns
STEP = 1_000_000  # ns between two frames

Said = tuple[str, bytes] | tuple[str, bytes, int]
"""(`c` client or `s` server, payload, flags): a segment, in its sender's order."""


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: api\r\n\r\n".encode()


def conversation(
    said: Iterable[Said],
    client: bytes = WEB,
    server: bytes = API,
    ports: tuple[int, int] = (40000, 80),
    opened: bool = True,
    at: int = START,
    macs: bytes = bytes(12),
) -> list[Captured]:
    """`opened`: with its handshake. The client's numbers wrap around on the way."""
    there = SegmentTemplate(
        4, macs + b"\x08\x00", client, server, b"".join(port.to_bytes(2, "big") for port in ports)
    )
    ends = {"c": (there, "s"), "s": (there.reversed(), "c")}
    numbers = {"c": 0xFFFFFFC0, "s": 5000}
    handshake: list[Said] = [("c", b"", SYN), ("s", b"", SYN | ACK), ("c", b"", ACK)]
    frames = []
    for sender, payload, *rest in [*(handshake if opened else ()), *said]:
        flags = rest[0] if rest else PSH | ACK
        template, other = ends[sender]
        ack = numbers[other] if flags & ACK else 0
        built = template.build(numbers[sender], ack, int(flags), payload, mss=65535)[VNET:]
        frames.append(Captured(at + len(frames) * STEP, built, len(built)))
        numbers[sender] += len(payload) + bool(flags & SYN) + bool(flags & FIN)
    return frames


def asked(*paths: str) -> list[Said]:
    return [said for path in paths for said in (("c", get(path)), ("s", OK))]


def pcap(frames: Sequence[Captured], order: str = "<", nano: bool = False, link: int = 1) -> bytes:
    magic, unit = (0xA1B23C4D, 1) if nano else (0xA1B2C3D4, 1000)
    head = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 262144, link)
    return head + b"".join(
        struct.pack(order + "4I", each.time // 10**9, each.time % 10**9 // unit, len(each.data), each.length)
        + each.data
        for each in frames
    )


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + length + body + length


def pcapng(
    frames: Sequence[Captured], order: str = "<", interfaces: Sequence[tuple[int, bytes]] = ((1, b""),)
) -> bytes:
    """Frames go to the interfaces in turn; an interface is its link type and its options."""
    section = block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order)
    described = b"".join(
        block(1, struct.pack(order + "HHI", link, 0, 0) + options, order) for link, options in interfaces
    )
    packets = b""
    for at, each in enumerate(frames):
        stamp = each.time // 1000
        head = struct.pack(
            order + "5I", at % len(interfaces), stamp >> 32, stamp & 0xFFFFFFFF, len(each.data), each.length
        )
        packets += block(6, head + each.data, order)
    return section + described + packets


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
