"""What a container's interface is to its namespace, taken whole and put back onto another device.

Stages of putting back, each of which changes only what is missing, so that any of them may run again:
    restore_settings    sysctls, offloads, names, while the device is down
    bring_up            flags
    restore_addresses   IPv6 with NODAD, or an address stays tentative for 1.5 s
    restore_routes      next hops, then routes, those without a gateway first
    restore_neighbours
    settle              NODAD off again, sysctls with side effects, away with what the kernel made too much

Messages are kept as the kernel dumped them, without what it only reports. Policy rules are not here: they
belong to the namespace and outlive the device (tests/datapath/test_splice.py shows it). Not kept: multicast
memberships, the container's own queueing disciplines, the `temporary` mark of an IPv6 privacy address.
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from isolator.datapath import device
from isolator.datapath.device import Link
from isolator.datapath.rtnl import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_REPLACE,
    RTM_DELADDR,
    RTM_DELROUTE,
    RTM_GETADDR,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTM_NEWADDR,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    NetlinkError,
    Rtnl,
    attribute,
    attributes,
    text,
    u32,
)

AF_INET, AF_INET6 = 2, 10
IFADDR = struct.Struct("=BBBBi")  # family, prefix length, flags, scope, index
IFA_ADDRESS, IFA_LOCAL, IFA_CACHEINFO, IFA_FLAGS = 1, 2, 6, 8
IFA_F_SECONDARY, IFA_F_NODAD, IFA_F_DADFAILED, IFA_F_TENTATIVE = 0x01, 0x02, 0x08, 0x40
RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst, src, tos, table, protocol, scope, type, flags
RTA_OIF, RTA_GATEWAY, RTA_MULTIPATH, RTA_CACHEINFO, RTA_TABLE, RTA_VIA = 4, 5, 9, 12, 15, 18
RTA_ENCAP_TYPE, RTA_ENCAP, RTA_EXPIRES, RTA_NH_ID = 21, 22, 23, 30
RTN_NEXTHOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, index
KEPT_ROUTE_FLAGS = 0x2 | 0x4  # RTNH_F_PERVASIVE, ONLINK; the rest is state, and refused (fib_create_info)
RT_TABLE_LOCAL, RTPROT_KERNEL = 255, 2
USER_HZ = 100
NDMSG = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
NDA_DST, NDA_CACHEINFO, NDA_PROBES = 1, 3, 4
NUD_KNOWN = 0x02 | 0x04 | 0x08 | 0x10  # reachable, stale, delay, probe
NUD_STALE, NUD_NOARP, NUD_PERMANENT = 0x04, 0x40, 0x80
NTF_PROXY = 0x08
NHMSG = struct.Struct("=BBBBI")  # family, scope, protocol, reserved, flags
RTM_NEWNEXTHOP, RTM_GETNEXTHOP = 104, 106
NHA_GROUP = 2
NHA_SETTABLE = {1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16}  # rtm_nh_policy_new in net/ipv4/nexthop.c
SETTLE_SECONDS = 1.0  # the kernel's own IPv6 routes come from a work queue, in well under a millisecond
# Written last: the interface's MTU sets the first, the others make the kernel generate addresses.
LATE_SYSCTLS = ("ipv6/conf/mtu", "ipv6/conf/stable_secret", "ipv6/conf/addr_gen_mode")
GENERATE_NOTHING = "1"  # IN6_ADDR_GEN_MODE_NONE


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One interface. `features`: requested, words of 32. Messages without nlmsghdr, ready to be sent."""

    link: Link
    features: tuple[int, ...]
    channels: tuple[int, ...]
    sysctls: dict[str, str]
    default_sysctls: dict[str, str]  # what a new device begins with
    addresses: tuple[bytes, ...]
    nexthops: tuple[bytes, ...]
    routes: tuple[bytes, ...]
    neighbours: tuple[bytes, ...]

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        messages = {name: [message.hex() for message in fields[name]] for name in _MESSAGES}
        return {**fields, **messages, "link": asdict(self.link)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Snapshot:
        messages = {name: tuple(bytes.fromhex(message) for message in fields[name]) for name in _MESSAGES}
        numbers = {name: tuple(fields[name]) for name in ("features", "channels")}
        return cls(**{**fields, **messages, **numbers, "link": Link.from_json(fields["link"])})


_MESSAGES = ("addresses", "nexthops", "routes", "neighbours")


def take_snapshot(rtnl: Rtnl, link: Link) -> Snapshot:
    """The interface as it is now, in the calling thread's namespace."""
    return Snapshot(
        link=link,
        features=device.requested_features(link.name),
        channels=device.channels(link.name),
        sysctls=device.read_sysctls(link.name),
        default_sysctls=device.read_sysctls("default"),
        addresses=tuple(dump_addresses(rtnl, link.index)),
        nexthops=tuple(dump_nexthops(rtnl)),
        routes=tuple(dump_routes(rtnl)),
        neighbours=tuple(dump_neighbours(rtnl, link.index)),
    )


# reading ----------------------------------------------------------------------------------------------------


def _without(body: bytes, header: int, *kinds: int) -> bytes:
    """A message without some of its attributes."""
    kept = [attribute(kind, value) for kind, value in attributes(body, header) if kind not in kinds]
    return body[:header] + b"".join(kept)


def dump_addresses(rtnl: Rtnl, index: int) -> list[bytes]:
    """IPv4 in the kernel's order, then IPv6 backwards: sent again like this, they come out in the old order.

    IPv4 appends, IPv6 puts a new address before those of its scope (ipv6_link_dev_addr, net/ipv6/addrconf.c).
    """
    four, six = (
        rtnl.dump(RTM_GETADDR, IFADDR.pack(family, 0, 0, 0, index)) for family in (AF_INET, AF_INET6)
    )
    return [_address(message) for message in four + six[::-1]]


def _address(body: bytes, add: int = 0, drop: int = IFA_F_TENTATIVE | IFA_F_DADFAILED) -> bytes:
    """The message with flags added and dropped (they stand in the header and, all of them, in IFA_FLAGS)."""
    family, prefix, short_flags, scope, index = IFADDR.unpack_from(body)
    found = dict(attributes(body, IFADDR.size))
    flags = struct.unpack("=I", found[IFA_FLAGS])[0] if IFA_FLAGS in found else short_flags
    flags = flags & ~drop | add
    head = IFADDR.pack(family, prefix, flags & 0xFF, scope, index)
    return head + _without(body, IFADDR.size, IFA_FLAGS)[IFADDR.size :] + u32(IFA_FLAGS, flags)


def address_bytes(body: bytes) -> bytes:
    """The interface's own address in an address message: 4 or 16 bytes."""
    found = dict(attributes(body, IFADDR.size))
    return found.get(IFA_LOCAL) or found[IFA_ADDRESS]


def prefix_length(body: bytes) -> int:
    """Of the network in an address message."""
    _, prefix, *_ = IFADDR.unpack_from(body)
    return int(prefix)


def _address_key(body: bytes) -> tuple[int, int, bytes, bytes]:
    return body[0], body[1], address_bytes(body), dict(attributes(body, IFADDR.size)).get(IFA_ADDRESS, b"")


def dump_routes(rtnl: Rtnl) -> list[bytes]:
    """Every table's routes, IPv4 then IPv6, of all devices: an address takes others' routes with it."""
    families = (
        rtnl.dump(RTM_GETROUTE, RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)) for family in (AF_INET, AF_INET6)
    )
    return [_route(message) for messages in families for message in messages]


def _route(body: bytes) -> bytes:
    """A route as it can be added: no state, no cache counters but the time it expires."""
    *head, flags = RTMSG.unpack_from(body)
    found = dict(attributes(body, RTMSG.size))
    dropped = {RTA_CACHEINFO}
    if RTA_NH_ID in found:  # the next hop object says these, and the kernel refuses both
        dropped |= {RTA_OIF, RTA_GATEWAY, RTA_MULTIPATH, RTA_VIA, RTA_ENCAP_TYPE, RTA_ENCAP}
    parts = [RTMSG.pack(*head, flags & KEPT_ROUTE_FLAGS)]
    for kind, value in attributes(body, RTMSG.size):
        if kind not in dropped:
            parts.append(attribute(kind, _multipath(value) if kind == RTA_MULTIPATH else value))
    expires = struct.unpack_from("=8xi", found[RTA_CACHEINFO])[0] if RTA_CACHEINFO in found else 0
    if expires > 0:
        parts.append(u32(RTA_EXPIRES, max(1, expires // USER_HZ)))
    return b"".join(parts)


def _multipath(value: bytes) -> bytes:
    """RTA_MULTIPATH with the state taken out of each next hop's flags."""
    out, at = bytearray(value), 0
    while at + RTN_NEXTHOP.size <= len(out):
        length, flags, _, _ = RTN_NEXTHOP.unpack_from(out, at)
        out[at + 2] = flags & KEPT_ROUTE_FLAGS
        at += max(RTN_NEXTHOP.size, (length + 3) & ~3)
    return bytes(out)


def _route_key(body: bytes) -> bytes:
    return _without(body, RTMSG.size, RTA_EXPIRES)


def dump_nexthops(rtnl: Rtnl) -> list[bytes]:
    """Next hop objects, single ones before groups of them."""
    found = map(_nexthop, rtnl.dump(RTM_GETNEXTHOP, bytes(NHMSG.size)))
    return sorted(found, key=lambda body: NHA_GROUP in dict(attributes(body, NHMSG.size)))


def _nexthop(body: bytes) -> bytes:
    """Without scope, which the kernel works out itself and refuses (rtm_to_nh_config), and state."""
    family, _, protocol, _, flags = NHMSG.unpack_from(body)
    kept = (attribute(kind, value) for kind, value in attributes(body, NHMSG.size) if kind in NHA_SETTABLE)
    return NHMSG.pack(family, 0, protocol, 0, flags & KEPT_ROUTE_FLAGS) + b"".join(kept)


def dump_neighbours(rtnl: Rtnl, index: int) -> list[bytes]:
    """Permanent entries and proxies first; what was learned comes back as stale, confirmed when used."""
    found = rtnl.dump(RTM_GETNEIGH, NDMSG.pack(0, 0, 0, 0, 0)) + rtnl.dump(
        RTM_GETNEIGH, NDMSG.pack(0, 0, 0, NTF_PROXY, 0)
    )
    ours = [body for body in found if NDMSG.unpack_from(body)[1] == index]
    return sorted(
        filter(None, map(_neighbour, ours)), key=lambda body: NDMSG.unpack_from(body)[2] == NUD_STALE
    )


def _neighbour(body: bytes) -> bytes | None:
    family, index, state, flags, kind = NDMSG.unpack_from(body)
    address = dict(attributes(body, NDMSG.size)).get(NDA_DST, b"")
    multicast = address[:1] == b"\xff" if family == AF_INET6 else address[:1] >= b"\xe0"
    if state & NUD_NOARP and (multicast or not address):  # the kernel's own, made at need
        return None
    if state & NUD_KNOWN:
        state = NUD_STALE
    elif not state & (NUD_PERMANENT | NUD_NOARP) and not flags & NTF_PROXY:
        return None  # incomplete, failed
    head = NDMSG.pack(family, index, state, flags, kind)
    return head + _without(body, NDMSG.size, NDA_CACHEINFO, NDA_PROBES)[NDMSG.size :]


def _neighbour_key(body: bytes) -> tuple[int, int, bytes]:
    family, _, _, flags, _ = NDMSG.unpack_from(body)
    return family, flags & NTF_PROXY, dict(attributes(body, NDMSG.size)).get(NDA_DST, b"")


def _missing(wanted: Iterable[bytes], present: Iterable[bytes], key: Callable[[bytes], Any]) -> list[bytes]:
    have = {key(body) for body in present}
    return [body for body in wanted if key(body) not in have]


# putting back -----------------------------------------------------------------------------------------------


def restore_settings(rtnl: Rtnl, wanted: Snapshot) -> None:
    """Sysctls that differ from a new device's, offloads, queues, names. The device is down, or whole."""
    link = wanted.link
    now = device.find_link(rtnl, link.index)
    if now is not None and not now.up and "ipv6/conf/addr_gen_mode" in wanted.sysctls:
        device.write_sysctl(link.name, "ipv6/conf/addr_gen_mode", GENERATE_NOTHING)
    for key, value in wanted.sysctls.items():
        if key not in LATE_SYSCTLS and wanted.default_sysctls.get(key) != value:
            device.write_sysctl(link.name, key, value)
    device.request_features(link.name, wanted.features)
    device.set_channels(link.name, wanted.channels)
    if link.alias and now is not None and now.alias != link.alias:
        device.set_link(rtnl, link.index, text(device.IFLA_IFALIAS, link.alias))
    for name in link.altnames:
        if now is not None and name not in now.altnames:
            device.set_altname(rtnl, link.index, name, True)


def bring_up(rtnl: Rtnl, wanted: Snapshot) -> None:
    """Up, if it was up, with the flags it had."""
    device.set_link(rtnl, wanted.link.index, flags=wanted.link.flags, mask=device.SETTABLE_FLAGS)


def restore_addresses(rtnl: Rtnl, wanted: Snapshot) -> None:
    present = dump_addresses(rtnl, wanted.link.index)
    for body in _missing(wanted.addresses, present, _address_key):
        rtnl.request(RTM_NEWADDR, _address(body, add=IFA_F_NODAD if body[0] == AF_INET6 else 0), NLM_F_CREATE)


def restore_routes(rtnl: Rtnl, wanted: Snapshot) -> None:
    for body in _missing(wanted.nexthops, dump_nexthops(rtnl), bytes):
        rtnl.request(RTM_NEWNEXTHOP, body, NLM_F_CREATE | NLM_F_REPLACE)
    missing = [
        body for body in _missing(wanted.routes, dump_routes(rtnl), _route_key) if not _kernels_own(body)
    ]
    for body in sorted(missing, key=_needs_gateway):
        _add_route(rtnl, body)


def _kernels_own(body: bytes) -> bool:
    """An IPv6 local, anycast or multicast route that the kernel keeps for an address: never ours to make."""
    return body[0] == AF_INET6 and body[4] == RT_TABLE_LOCAL and body[5] == RTPROT_KERNEL


def _needs_gateway(body: bytes) -> bool:
    kinds = dict(attributes(body, RTMSG.size))
    return any(kind in kinds for kind in (RTA_GATEWAY, RTA_VIA, RTA_MULTIPATH, RTA_NH_ID))


def _add_route(rtnl: Rtnl, body: bytes) -> None:
    """Append, as the kernel does (fib_magic); an IPv6 multipath route of which a leg is left is replaced."""
    try:
        rtnl.request(RTM_NEWROUTE, body, NLM_F_CREATE | (NLM_F_APPEND if body[0] == AF_INET else 0))
    except NetlinkError as error:
        if error.errno != errno.EEXIST or body[0] == AF_INET:
            raise
        rtnl.request(RTM_NEWROUTE, body, NLM_F_CREATE | NLM_F_REPLACE)


def restore_neighbours(rtnl: Rtnl, wanted: Snapshot) -> None:
    """What a permanent entry says is put back over anything learned meanwhile."""
    present = dump_neighbours(rtnl, wanted.link.index)
    learned = {_neighbour_key(body) for body in present}
    for body in wanted.neighbours:
        stale = NDMSG.unpack_from(body)[2] == NUD_STALE
        if body not in present and not (stale and _neighbour_key(body) in learned):
            rtnl.request(RTM_NEWNEIGH, body, NLM_F_CREATE | NLM_F_REPLACE)


def settle(rtnl: Rtnl, wanted: Snapshot) -> None:
    """With the link up and working: what is left until nothing tells the interface from what it was."""
    for body in wanted.addresses:
        if body[0] == AF_INET6:
            rtnl.request(RTM_NEWADDR, body, NLM_F_REPLACE)  # inet6_addr_modify sets the flags anew
    _settle_sysctls(wanted)
    present = dump_addresses(rtnl, wanted.link.index)
    for body in _missing(present, wanted.addresses, _address_key):
        rtnl.request(RTM_DELADDR, body)
    _await_kernel_routes(rtnl, wanted)
    for body in _missing(dump_routes(rtnl), wanted.routes, _route_key):
        if dict(attributes(body, RTMSG.size)).get(RTA_OIF) == struct.pack("=I", wanted.link.index):
            rtnl.request(RTM_DELROUTE, body)
    restore_routes(rtnl, wanted)


def _settle_sysctls(wanted: Snapshot) -> None:
    now = device.read_sysctls(wanted.link.name)
    differing = [key for key, value in wanted.sysctls.items() if now.get(key) != value]
    for key in sorted(differing, key=lambda key: LATE_SYSCTLS.index(key) if key in LATE_SYSCTLS else -1):
        device.write_sysctl(wanted.link.name, key, wanted.sysctls[key])


def _await_kernel_routes(rtnl: Rtnl, wanted: Snapshot) -> None:
    """Wait until the kernel has made its own routes for the addresses; a link that is down has none."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while wanted.link.up and time.monotonic() < deadline:
        if not any(map(_kernels_own, _missing(wanted.routes, dump_routes(rtnl), _route_key))):
            return
        time.sleep(0.001)
