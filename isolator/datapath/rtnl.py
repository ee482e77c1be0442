"""Route netlink, byte for byte: a blocking socket, messages in, messages out.

Why not pyroute2's IPRoute: a splice must give back *every* attribute of an address or a route, also those a
library does not know, so messages are kept as the kernel sent them and sent back as they are (what `ip route
save` and `restore` do). Its 0.9 socket also starts an event loop of its own and forks to open a socket in
another namespace, which takes milliseconds of the link's dark time and doesn't go well with threads; and to
import it takes a fifth of what an agent that died has to be back in.

A socket belongs to the network namespace in which its thread stood when it was opened. Message layouts:
include/uapi/linux/{netlink,rtnetlink,if_link,if_addr,neighbour,nexthop}.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType

HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_DUMP_INTR = 0x10
NLM_F_ACK_TLVS = 0x200
NLA_TYPE_MASK = 0x3FFF
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 270, 10, 11, 12
RECEIVE_BYTES = 1 << 17
DUMP_ATTEMPTS = 10  # a dump that the kernel marks as interrupted by a change is taken again


class NetlinkError(OSError):
    """The kernel refused a request; says in its own words why, where it gave any."""


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute with its padding."""
    length = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def u32(kind: int, value: int) -> bytes:
    """An attribute that holds an unsigned 32-bit number."""
    return attribute(kind, struct.pack("=I", value))


def text(kind: int, value: str) -> bytes:
    """An attribute that holds a NUL-terminated string."""
    return attribute(kind, value.encode() + b"\0")


def attributes(body: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """The attributes of `body` from offset `at` on, as (type, value), in the kernel's order."""
    while at + ATTRIBUTE.size <= len(body):
        length, kind = ATTRIBUTE.unpack_from(body, at)
        if length < ATTRIBUTE.size:
            return
        yield kind & NLA_TYPE_MASK, body[at + ATTRIBUTE.size : at + length]
        at += _aligned(length)


class Rtnl:
    """A route netlink socket in the calling thread's network namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Rtnl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def request(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Ask for a change and wait for its acknowledgement; raises NetlinkError."""
        self._send(kind, body, flags | NLM_F_REQUEST | NLM_F_ACK)
        for _ in self._answers():
            pass

    def get(self, kind: int, body: bytes) -> bytes:
        """The one object that `body` names; raises NetlinkError."""
        self._send(kind, body, NLM_F_REQUEST | NLM_F_ACK)
        (found,) = [answer for answer, _ in self._answers()]
        return found

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Every object of a kind that `body` lets through, as the kernel's messages without nlmsghdr."""
        for _ in range(DUMP_ATTEMPTS):
            self._send(kind, body, NLM_F_REQUEST | NLM_F_DUMP)
            answers = list(self._answers())
            if not any(flags & NLM_F_DUMP_INTR for _, flags in answers):
                break
        return [answer for answer, _ in answers]

    def _send(self, kind: int, body: bytes, flags: int) -> None:
        self._sequence += 1
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, flags, self._sequence, 0) + body)

    def _answers(self) -> Iterator[tuple[bytes, int]]:
        """(body, flags) of each answer to the last request, up to its acknowledgement or end."""
        while True:
            data, at = self._socket.recv(RECEIVE_BYTES), 0
            while at < len(data):
                length, kind, flags, sequence, _ = HEADER.unpack_from(data, at)
                body = data[at + HEADER.size : at + length]
                at += _aligned(length)
                if sequence != self._sequence:
                    continue
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    _raise_refusal(kind, body, flags)
                    return
                yield body, flags


def _raise_refusal(kind: int, body: bytes, flags: int) -> None:
    """NLMSG_ERROR carries -errno, the request's header and, with NLM_F_ACK_TLVS, the kernel's reason."""
    code = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
    if code == 0:
        return
    told = b""
    if flags & NLM_F_ACK_TLVS:
        at = 4 + HEADER.size if kind == NLMSG_ERROR else 4
        told = dict(attributes(body, at)).get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0")
    raise NetlinkError(code, f"{os.strerror(code)}{': ' if told else ''}{told.decode(errors='replace')}")
