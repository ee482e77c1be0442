"""Sends numbered, checksummed frames of mixed sizes: `ring_load.py INTERFACE FLOW COUNT CPU`.

A frame: Ethernet header (local experimental EtherType), flow, number, length, CRC-32 of what follows.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import sys
import zlib

ETHERNET = bytes.fromhex("020000000002 020000000001 88b5")
HEADER = struct.Struct("=IIII")


def check(frame: memoryview) -> tuple[int, int]:
    """Flow and number of a frame that is whole. Raises AssertionError."""
    assert frame[:14] == ETHERNET
    flow, number, length, crc = HEADER.unpack_from(frame, 14)
    body = frame[14 + HEADER.size :]
    assert len(body) == length
    assert zlib.crc32(body) == crc
    return flow, number


def main(interface: str, flow: int, count: int, cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})  # a flow that changes CPUs may be reordered by the kernel
    choose = random.Random(flow)
    body = choose.randbytes(65000)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind((interface, 0))
        for number in range(count):
            sizes = (46, 46, 100, 700, 1480, 9000, 60000) if number % 16 == 0 else (46, 90, 1480)
            length = choose.choice(sizes)
            part = body[choose.randrange(65000 - length) :][:length]
            sock.send(ETHERNET + HEADER.pack(flow, number, length, zlib.crc32(part)) + part)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
