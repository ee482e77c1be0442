"""pcap and pcapng files to frames, each with its time. dpkt knows the headers; damage is found here.

    file → magic ─┬─ pcap: header → (record header, bytes)*
                  └─ pcapng: blocks: section → interfaces → packets
    → Captured(ns since 1970, bytes, length on the wire)

Formats: draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng. Of link types Ethernet alone is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import dpkt.pcap  # type: ignore[import-untyped]
import dpkt.pcapng  # type: ignore[import-untyped]

ETHERNET = 1  # LINKTYPE_ETHERNET
FRAME_MAX = 262144  # bytes; libpcap's MAXIMUM_SNAPLEN: a record that claims more is damaged
BLOCK_MAX = 1 << 24  # bytes of a pcapng block, with its options
_PCAPNG = 0x0A0D0D0A
_NANO = (dpkt.pcap.TCPDUMP_MAGIC_NANO, dpkt.pcap.PMUDPCT_MAGIC_NANO)
_LITTLE = (dpkt.pcap.PMUDPCT_MAGIC, dpkt.pcap.PMUDPCT_MAGIC_NANO, dpkt.pcap.PACPDOM_MAGIC)
_LINK_BITS = 0xFFFF  # what stands above says how long a checksum behind the frame is
_SIMPLE_PACKET = 3


class CaptureError(Exception):
    """The file cannot be read, or not further."""


class Captured(NamedTuple):
    """`time` in ns since 1970. `length` bytes were on the wire; fewer in `data`: the capture cut it."""

    time: int
    data: bytes
    length: int


def read_capture(path: Path) -> Iterator[Captured]:
    """The frames in the file's order. Raises CaptureError, also after frames were given."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            if int.from_bytes(magic, "big") == _PCAPNG:
                yield from _pcapng(file)
            else:
                yield from _pcap(file)
    except OSError as error:
        raise CaptureError(f"{path}: {error.strerror}") from error
    except CaptureError as error:
        raise CaptureError(f"{path}: {error}") from None


def _taken(file: BinaryIO, size: int, number: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise CaptureError(f"ends in the middle of frame {number}")
    return data


def _check_link(link: int) -> None:
    if link & _LINK_BITS != ETHERNET:
        raise CaptureError(
            f"link type {link & _LINK_BITS}, and only Ethernet (1) is read: capture on one interface, not on `any`"
        )


# -- pcap --------------------------------------------------------------------------------------------------


def _pcap(file: BinaryIO) -> Iterator[Captured]:
    head = file.read(dpkt.pcap.FileHdr.__hdr_len__)
    magic = int.from_bytes(head[:4], "big")
    if magic not in dpkt.pcap.MAGIC_TO_PKT_HDR or len(head) < dpkt.pcap.FileHdr.__hdr_len__:
        raise CaptureError("neither pcap nor pcapng")
    little = magic in _LITTLE
    _check_link((dpkt.pcap.LEFileHdr if little else dpkt.pcap.FileHdr)(head).linktype)
    unit = 1 if magic in _NANO else 1000
    size = dpkt.pcap.MAGIC_TO_PKT_HDR[magic].__hdr_len__
    fields = struct.Struct("<4I" if little else ">4I")  # dpkt's PktHdr, without its 3 µs
    number = 0
    while header := file.read(size):
        number += 1
        if len(header) < size:
            raise CaptureError(f"ends in the middle of frame {number}")
        seconds, fraction, there, length = fields.unpack_from(header)
        if there > FRAME_MAX:
            raise CaptureError(f"frame {number} claims {there} bytes: the file is damaged there")
        yield Captured(seconds * 10**9 + fraction * unit, _taken(file, there, number), length)


# -- pcapng ------------------------------------------------------------------------------------------------


class _Interface(NamedTuple):
    link: int
    units: int  # a second has
    offset: int  # s


def _pcapng(file: BinaryIO) -> Iterator[Captured]:
    interfaces: list[_Interface] = []
    little, number = True, 0
    while head := file.read(8):
        if int.from_bytes(head[:4], "big") == _PCAPNG:
            little, interfaces = _byte_order(file), []
        if len(head) < 8:
            raise CaptureError(f"ends in the middle of a block behind frame {number}")
        kind, length = struct.unpack("<II" if little else ">II", head)
        if not 12 <= length <= BLOCK_MAX or length % 4:
            raise CaptureError(f"a block of {length} bytes behind frame {number}: the file is damaged there")
        block = head + _taken(file, length - 8, number + 1)
        try:
            if kind == dpkt.pcapng.PCAPNG_BT_IDB:
                interfaces.append(_interface(block, little))
            elif kind == dpkt.pcapng.PCAPNG_BT_EPB:
                number += 1
                yield _packet(block, interfaces, little)
            elif kind in (dpkt.pcapng.PCAPNG_BT_PB, _SIMPLE_PACKET):
                raise CaptureError("packets without an interface or a time: convert it (editcap -F pcap)")
        except (dpkt.Error, struct.error, IndexError, ValueError):
            raise CaptureError(f"a block behind frame {number} is damaged") from None


def _byte_order(file: BinaryIO) -> bool:
    """Whether the section is little endian; the file stands where it stood."""
    magic = file.read(4)
    file.seek(-len(magic), 1)
    if magic not in (b"\x4d\x3c\x2b\x1a", b"\x1a\x2b\x3c\x4d"):
        raise CaptureError("a pcapng section without a byte order: the file is damaged there")
    return magic == b"\x4d\x3c\x2b\x1a"


def _interface(block: bytes, little: bool) -> _Interface:
    of = dpkt.pcapng.InterfaceDescriptionBlockLE if little else dpkt.pcapng.InterfaceDescriptionBlock
    read = of(block)
    units, offset = 10**6, 0
    for option in read.opts:
        if option.code == dpkt.pcapng.PCAPNG_OPT_IF_TSRESOL:
            units = (2 if option.data[0] & 0x80 else 10) ** (option.data[0] & 0x7F)
        elif option.code == dpkt.pcapng.PCAPNG_OPT_IF_TSOFFSET:
            offset = int.from_bytes(option.data[:8], "little" if little else "big", signed=True)
    return _Interface(read.linktype, units, offset)


def _packet(block: bytes, interfaces: list[_Interface], little: bool) -> Captured:
    number, high, low, there, length = struct.unpack_from("<5I" if little else ">5I", block, 8)
    if there > min(FRAME_MAX, len(block) - 32):
        raise ValueError
    interface = interfaces[number]
    _check_link(interface.link)
    ticks = high << 32 | low
    return Captured(
        interface.offset * 10**9 + ticks * 10**9 // interface.units, block[28 : 28 + there], length
    )
