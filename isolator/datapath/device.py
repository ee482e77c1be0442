"""One network device: its link attributes, ethtool settings and sysctls, read and written.

All of it in the calling thread's network namespace (/proc/sys/net follows the thread, too). Attribute
numbers: include/uapi/linux/if_link.h, ethtool commands: include/uapi/linux/ethtool.h.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolator.datapath.rtnl import (
    RTM_GETLINK,
    RTM_NEWLINK,
    NetlinkError,
    Rtnl,
    attribute,
    attributes,
    text,
    u32,
)

IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_TXQLEN = 1, 3, 4, 5, 10, 13
IFLA_LINKINFO, IFLA_IFALIAS, IFLA_GROUP, IFLA_NET_NS_FD, IFLA_EXT_MASK = 18, 20, 27, 28, 29
IFLA_TARGET_NETNSID = 46
IFLA_NUM_TX_QUEUES, IFLA_NUM_RX_QUEUES, IFLA_LINK_NETNSID, IFLA_NEW_IFINDEX = 31, 32, 37, 49
IFLA_PROP_LIST, IFLA_ALT_IFNAME, IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 52, 53, 1, 2, 1
RTM_NEWLINKPROP, RTM_DELLINKPROP = 108, 109
RTEXT_FILTER_SKIP_STATS = 8
IFLA_SIZES = (40, 41, 58, 63, 64)  # GSO_MAX_SEGS, GSO_, GRO_, GSO_IPV4_ and GRO_IPV4_MAX_SIZE

IFF_UP = 1
IFF_LOOPBACK = 8
# What `ip link set` can turn: up, debug, notrailers, noarp, promisc, allmulti, multicast, dynamic
SETTABLE_FLAGS = IFF_UP | 0x4 | 0x20 | 0x80 | 0x100 | 0x200 | 0x1000 | 0x8000

SIOCETHTOOL = 0x8946
ETHTOOL_GFEATURES, ETHTOOL_SFEATURES, ETHTOOL_GCHANNELS, ETHTOOL_SCHANNELS = 0x3A, 0x3B, 0x3C, 0x3D
FEATURE_WORDS = 4  # room for 128 features; Linux 6 has 64

SYSCTL_FOLDERS = ("ipv4/conf", "ipv4/neigh", "ipv6/conf", "ipv6/neigh")


MAC_TEXT = 17  # characters of a MAC as people write it; a name has IFNAMSIZ - 1 = 15


@dataclass(frozen=True, slots=True)
class Link:
    """A device as netlink shows it. `peer_netns`: this namespace's number for its peer's, None: the same."""

    index: int
    name: str
    mac: str
    mtu: int
    qlen: int
    flags: int
    group: int
    alias: str
    kind: str
    peer: int
    peer_netns: int | None
    master: int
    queues: tuple[int, int]  # send, receive
    sizes: dict[int, int]  # IFLA_SIZES → bytes or segments
    altnames: tuple[str, ...]

    @property
    def up(self) -> bool:
        return bool(self.flags & IFF_UP)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Link:
        sizes = {int(kind): int(size) for kind, size in fields["sizes"].items()}
        queues = (int(fields["queues"][0]), int(fields["queues"][1]))
        return cls(**{**fields, "sizes": sizes, "queues": queues, "altnames": tuple(fields["altnames"])})


def mac_text(mac: bytes) -> str:
    return mac.hex(":")


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def _number(found: dict[int, bytes], kind: int) -> int:
    return int(struct.unpack("=I", found[kind])[0]) if kind in found else 0


def _string(found: dict[int, bytes], kind: int) -> str:
    return found.get(kind, b"").rstrip(b"\0").decode(errors="surrogateescape")


def parse_link(body: bytes) -> Link:
    """The Link in an RTM_NEWLINK message."""
    _, _, index, flags, _ = IFINFO.unpack_from(body)
    found = dict(attributes(body, IFINFO.size))
    netns = found.get(IFLA_LINK_NETNSID)
    properties = attributes(found.get(IFLA_PROP_LIST, b""), 0)
    return Link(
        index=index,
        name=_string(found, IFLA_IFNAME),
        mac=mac_text(found.get(IFLA_ADDRESS, b"")),
        mtu=_number(found, IFLA_MTU),
        qlen=_number(found, IFLA_TXQLEN),
        flags=flags,
        group=_number(found, IFLA_GROUP),
        alias=_string(found, IFLA_IFALIAS),
        kind=_string(dict(attributes(found.get(IFLA_LINKINFO, b""), 0)), IFLA_INFO_KIND),
        peer=_number(found, IFLA_LINK),
        peer_netns=struct.unpack("=i", netns)[0] if netns else None,
        master=_number(found, IFLA_MASTER),
        queues=(_number(found, IFLA_NUM_TX_QUEUES), _number(found, IFLA_NUM_RX_QUEUES)),
        sizes={kind: _number(found, kind) for kind in IFLA_SIZES if kind in found},
        altnames=tuple(_string({0: name}, 0) for kind, name in properties if kind == IFLA_ALT_IFNAME),
    )


def find_link(rtnl: Rtnl, which: int | str, netns: int | None = None) -> Link | None:
    """The device of that ifindex, name or MAC (which is longer than any name), None where there is none.

    By ifindex also in another namespace, by the number that this one has for it.
    """
    if isinstance(which, str) and len(which) == MAC_TEXT:
        return next((link for link in all_links(rtnl) if link.mac == which.lower()), None)
    index = which if isinstance(which, int) else 0
    body = IFINFO.pack(0, 0, index, 0, 0) + u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
    if isinstance(which, str):
        body += text(IFLA_IFNAME, which)
    if netns is not None:
        body += struct.pack("=HHi", 8, IFLA_TARGET_NETNSID, netns)
    try:
        return parse_link(rtnl.get(RTM_GETLINK, body))
    except NetlinkError as error:
        if error.errno == errno.ENODEV:
            return None
        raise


def settle_carrier(rtnl: Rtnl, index: int, netns: int | None = None) -> None:
    """Have the kernel act now on a carrier that came back, in the namespace of that number.

    Else it may leave a veth end without a queue for up to a second, if both ends have the same ifindex in
    their namespaces (linkwatch_urgent_event, net/core/link_watch.c). Asking for the link makes it act
    (rtnl_getlink, net/core/rtnetlink.c). A device that has vanished needs nothing.
    """
    target = b"" if netns is None else struct.pack("=HHi", 8, IFLA_TARGET_NETNSID, netns)
    with contextlib.suppress(NetlinkError):
        rtnl.get(RTM_GETLINK, IFINFO.pack(0, 0, index, 0, 0) + target)


def all_links(rtnl: Rtnl) -> list[Link]:
    body = IFINFO.pack(0, 0, 0, 0, 0) + u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
    return [parse_link(message) for message in rtnl.dump(RTM_GETLINK, body)]


def set_link(rtnl: Rtnl, index: int, *changes: bytes, flags: int = 0, mask: int = 0) -> None:
    """Change attributes, and those flags that stand in `mask`, of one device."""
    rtnl.request(RTM_NEWLINK, IFINFO.pack(0, 0, index, flags, mask) + b"".join(changes))


def set_altname(rtnl: Rtnl, index: int, name: str, present: bool) -> None:
    kind = RTM_NEWLINKPROP if present else RTM_DELLINKPROP
    flags = 0x600 if present else 0  # NLM_F_CREATE | NLM_F_EXCL
    rtnl.request(
        kind,
        IFINFO.pack(0, 0, index, 0, 0) + attribute(IFLA_PROP_LIST | 0x8000, text(IFLA_ALT_IFNAME, name)),
        flags,
    )


# ethtool ----------------------------------------------------------------------------------------------------


def _ethtool(name: str, command: array.array[int]) -> None:
    address, _ = command.buffer_info()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCETHTOOL, struct.pack("=16sQ16x", name.encode(), address))


def _features(name: str) -> array.array[int]:
    """struct ethtool_gfeatures: command, words, then per word available, requested, active, never_changed."""
    command = array.array("I", [ETHTOOL_GFEATURES, FEATURE_WORDS] + [0] * 4 * FEATURE_WORDS)
    _ethtool(name, command)
    return command[: 2 + 4 * command[1]]


def requested_features(name: str) -> tuple[int, ...]:
    """What `ethtool -K` asked for, as words of 32 features."""
    return tuple(_features(name)[3::4])


def request_features(name: str, wanted: tuple[int, ...]) -> None:
    """Ask for exactly these, of those that can be changed at all."""
    now = _features(name)
    words = [(available, want) for available, want in zip(now[2::4], wanted, strict=True)]
    changed = [available & (want ^ have) for (available, want), have in zip(words, now[3::4], strict=True)]
    if any(changed):
        pairs = [number for valid, (_, want) in zip(changed, words, strict=True) for number in (valid, want)]
        _ethtool(name, array.array("I", [ETHTOOL_SFEATURES, len(words), *pairs]))


def channels(name: str) -> tuple[int, ...]:
    """Receive, send, other and combined queues in use."""
    command = array.array("I", [ETHTOOL_GCHANNELS] + [0] * 8)
    _ethtool(name, command)
    return tuple(command[5:])


def set_channels(name: str, wanted: tuple[int, ...]) -> None:
    if channels(name) != wanted:
        _ethtool(name, array.array("I", [ETHTOOL_SCHANNELS, 0, 0, 0, 0, *wanted]))


# sysctls ----------------------------------------------------------------------------------------------------


def _sysctl(name: str, key: str) -> Path:
    folder, _, leaf = key.rpartition("/")
    return Path("/proc/sys/net", folder, name, leaf)


def read_sysctls(name: str) -> dict[str, str]:
    """All settings of a device (or of `default`) that were ever set, keyed like `ipv4/conf/rp_filter`."""
    found = {}
    for folder in SYSCTL_FOLDERS:
        base = f"/proc/sys/net/{folder}/{name}"
        with contextlib.suppress(FileNotFoundError):
            for entry in sorted(os.listdir(base)):
                with contextlib.suppress(OSError):  # stable_secret that was never set: EIO
                    found[f"{folder}/{entry}"] = _read(f"{base}/{entry}")
    return found


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).decode().rstrip("\n")
    finally:
        os.close(fd)


def write_sysctl(name: str, key: str, value: str) -> None:
    """A setting this kernel does not have, or only shows, is left alone."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        _sysctl(name, key).write_text(value)
