"""The gate: no bridge takes a frame from a container, or gives it one, before the container is admitted.

A table of nftables' bridge family in the host's network namespace (where the engine has its bridges):

    prerouting    iifname "veth*" iif != @admitted  drop
    postrouting   oifname "veth*" oif != @admitted  drop

A new container's host end is a new device, and in no set: it is closed by the kernel, whether an agent runs or not.
Ifindexes are given out once, so that nobody inherits a place in the set. Two lookups for each frame, however many
containers there are. Other tables are not touched; where another one drops a frame, it stays dropped.

A bridge takes frames to 01:80:c2:00:00:00 … 0f to itself, past those hooks (br_handle_frame, net/bridge/br_input.c);
the host believes what is in them: two further tables, inet and arp, drop such frames from any veth. Nobody sends IP or
ARP there (IEEE 802.1Q, table 8-1).

Host ends that are no engine's (of LXC, of a CNI bridge) begin with veth as well: the agent admits them by their
bridge. nftables could tell bridges apart itself (`meta ibrname`), but not on every kernel.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_interface
from types import TracebackType
from typing import Any, Self

from isolator.core.identities import Interface
from isolator.datapath import device, nftables, snapshot
from isolator.datapath.netns import Netns
from isolator.datapath.nftables import NftablesError
from isolator.datapath.rtnl import Rtnl, attributes, u32

FAMILIES, RULES = ("bridge", "inet", "arp"), 4
FIRST, LAST = -400, 400  # priorities: before and after everybody else's bridge chains
RESERVED = "01:80:c2:00:00:00"
VETH = "veth"  # how an engine's host ends begin
RTM_GETNSID, NETNSA_NSID, NETNSA_FD = 90, 1, 3  # include/uapi/linux/net_namespace.h
NSID = struct.Struct("=i")
RTGENMSG = struct.pack("=Bxxx", 0)


@dataclass(frozen=True, slots=True)
class HostEnd:
    """A device at a bridge of the host that is called veth-something."""

    ifindex: int
    name: str
    bridge: str


class Gate:
    """The gate of one agent, and the host's network namespace. Blocks: call it from the worker's thread.

    `host`: that namespace, a name or path. `table`: nftables' name for it. Nothing is changed before `shut`.
    """

    def __init__(self, host: str, table: str) -> None:
        self._host = host
        self._name = re.sub(r"[^A-Za-z0-9_]", "_", table)
        self._table = f"bridge {self._name}"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Raises SpliceError where there is no such namespace."""
        with ExitStack() as stack:
            self._netns = stack.enter_context(Netns(self._host))
            with self._netns.entered():
                self._rtnl = stack.enter_context(Rtnl())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- the host -------------------------------------------------------------------------------------------

    def host_ends(self) -> list[HostEnd]:
        links = device.all_links(self._rtnl)
        names = {link.index: link.name for link in links}
        return [
            HostEnd(link.index, link.name, names.get(link.master, ""))
            for link in links
            if link.master and link.name.startswith(VETH)
        ]

    def host_end(self, netns: str, which: int | str) -> int:
        """The ifindex of the host end whose peer is this device (ifindex, name or MAC); 0: none of them is.

        Raises NetnsMissingError.
        """
        with Netns(netns) as inside:
            with inside.entered(), Rtnl() as rtnl:
                peer = device.find_link(rtnl, which)
            links = device.all_links(
                self._rtnl
            )  # the kernel numbers a peer's namespace when it shows the link
            number = self._number(inside)
        if peer is None:
            return 0
        wanted = number, peer.index, "veth"
        return next((each.index for each in links if (each.peer_netns, each.peer, each.kind) == wanted), 0)

    def _number(self, netns: Netns) -> int:
        """The host's number for another namespace (-1: it has none)."""
        body = RTGENMSG + u32(NETNSA_FD, netns.fd)
        found = dict(attributes(self._rtnl.get(RTM_GETNSID, body), len(RTGENMSG)))
        return int(NSID.unpack(found[NETNSA_NSID])[0])

    def addresses(self) -> list[Interface]:
        """Every address of the host itself, its bridges' among them, with its network's length."""
        return [
            ip_interface((snapshot.address_bytes(body), snapshot.prefix_length(body)))
            for body in snapshot.dump_addresses(self._rtnl, 0)
        ]

    # -- the table ------------------------------------------------------------------------------------------

    def shut(self) -> None:
        """Who is admitted stays so; where the gate is new, whoever is there: nobody is cut off by its coming.

        Raises NftablesError where the kernel cannot do it, with advice.
        """
        admitted = self._admitted()
        if admitted is None:
            admitted = {each.ifindex for each in self.host_ends()}
        try:
            self._run(self._anew(admitted))
        except NftablesError as error:
            raise NftablesError(
                f"new containers cannot be kept closed, nftables has no bridge family here: {error}; load or build"
                " nf_tables_bridge, or set `new_containers: open`"
            ) from error

    def admit(self, wanted: Collection[int]) -> bool:
        """These and no others. Returns whether the gate was gone (flushed by somebody) and had to be made anew."""
        admitted = self._admitted()
        if admitted is None:
            self._run(self._anew(wanted))
            return True
        commands = self._elements("add", set(wanted) - admitted) + self._elements(
            "delete", admitted - set(wanted)
        )
        if commands:
            self._run(commands)
        return False

    def admit_one(self, ifindex: int) -> None:
        """Also this one."""
        self._run(self._elements("add", [ifindex]))

    def expel(self, ifindex: int) -> None:
        """No longer this one."""
        self._run(self._elements("add", [ifindex]) + self._elements("delete", [ifindex]))

    def remove(self) -> None:
        """No gate: everybody is admitted from now on."""
        self._run(self._cleared())

    def _cleared(self) -> str:
        tables = (f"{family} {self._name}" for family in FAMILIES)
        return "".join(f"add table {table}\ndelete table {table}\n" for table in tables)

    def _admitted(self) -> set[int] | None:
        """None: there is no gate. An element whose device is gone is shown by its number, others by their names."""
        try:
            listed = [each for family in FAMILIES for each in self._run(f"list table {family} {self._name}")]
        except NftablesError:
            return None
        names = {link.name: link.index for link in device.all_links(self._rtnl)}
        found = next((each["set"] for each in listed if "set" in each), None)
        rules = sum(1 for each in listed if "rule" in each)
        if found is None or rules != RULES:
            return None
        elements = (str(each) for each in found.get("elem", ()))
        return {
            names[each] if each in names else int(each)
            for each in elements
            if each in names or each.isdigit()
        }

    def _anew(self, admitted: Iterable[int]) -> str:
        table, inet, arp = (f"{family} {self._name}" for family in FAMILIES)
        return (
            f"{self._cleared()}add table {table}\nadd table {inet}\nadd table {arp}\n"
            f"add chain {inet} enter {{ type filter hook prerouting priority {FIRST}; }}\n"
            f'add rule {inet} enter iifname "{VETH}*" ether daddr and ff:ff:ff:ff:ff:f0 == {RESERVED} counter drop\n'
            f"add chain {arp} enter {{ type filter hook input priority {FIRST}; }}\n"
            f'add rule {arp} enter iifname "{VETH}*" @ll,0,44 0x0180c200000 counter drop\n'
            f"add set {table} admitted {{ type iface_index; }}\n"
            f"{self._elements('add', admitted)}"
            f"add chain {table} enter {{ type filter hook prerouting priority {FIRST}; }}\n"
            f"add chain {table} leave {{ type filter hook postrouting priority {LAST}; }}\n"
            f'add rule {table} enter iifname "{VETH}*" iif != @admitted counter drop\n'
            f'add rule {table} leave oifname "{VETH}*" oif != @admitted counter drop\n'
        )

    def _elements(self, verb: str, ifindexes: Iterable[int]) -> str:
        listed = ", ".join(map(str, sorted(ifindexes)))
        return f"{verb} element {self._table} admitted {{ {listed} }}\n" if listed else ""

    def _run(self, commands: str) -> list[dict[str, Any]]:
        with self._netns.entered():
            return nftables.run(commands)
