"""The Internet checksum (RFC 1071)."""

from __future__ import annotations

Octets = bytes | bytearray | memoryview


def ones_sum(data: Octets, start: int = 0) -> int:
    """One's complement sum of big-endian 16-bit words, folded to 16 bits; an odd last byte is padded with zero.

    A number is congruent modulo 0xffff to the sum of its 16-bit digits, and Python divides long numbers in C.
    """
    number = int.from_bytes(data, "big") << (8 if len(data) & 1 else 0)
    total = number + start
    return total % 0xFFFF or (0xFFFF if total else 0)


def internet_checksum(data: Octets, start: int = 0) -> int:
    """What stands in a header's checksum field over `data`, whose own field is zero."""
    return ~ones_sum(data, start) & 0xFFFF
