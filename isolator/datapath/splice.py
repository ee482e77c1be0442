"""The splice: puts Isolator between the two halves of a container's veth pair, and takes it out again.

    container netns            isolator netns                       host netns
    eth0 (new veth) ─────────  container port │ network port ────── host end (untouched)
    same name, ifindex, MAC …                   (the original eth0)

Stages of a splice; the link is dark from `move_out` to `neighbours`, mostly for the kernel's namespace move:
    journal      snapshot and names on disk
    move_out     the original eth0 goes to the isolator netns, gets its port name and a MAC of its own
    create       a new pair, made in place (to move one costs 15 ms, to make one 2 ms), with the old ifindex
    attach       the caller's programs and maps, on ports that are down: no packet passes undecided
    settings, ports_up, link_up, addresses, routes, neighbours
    settle       what can wait until traffic flows
    commit       journalled as whole
Whatever fails, also a crash, is answered by `_put_back`, which asks the kernel how far things are and is the
second half of a restore as well. Each stage can be made to fail by its name (`Splicer.before`), for tests.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address

from isolator.datapath import device, snapshot
from isolator.datapath.attach import detach_xdp
from isolator.datapath.device import IFF_LOOPBACK, IFF_UP, IFINFO, Link
from isolator.datapath.errors import DatapathError
from isolator.datapath.journal import Entry, Journal, Phase, boot_id
from isolator.datapath.netns import Netns, NetnsMissingError, SpliceError, pinned_netns
from isolator.datapath.rtnl import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    RTM_DELLINK,
    RTM_NEWLINK,
    NetlinkError,
    Rtnl,
    attribute,
    text,
    u32,
)
from isolator.datapath.snapshot import Snapshot

Address = IPv4Address | IPv6Address
Attach = Callable[[int, int], None]
"""Called with the ifindexes of container port and network port, both final and both down, in the calling
thread, which stands in the isolator netns. Attaches programs, fills maps; if it raises, all is put back."""

DRESSING = ("settings", "ports_up", "link_up", "addresses", "routes", "neighbours", "settle")
STAGES = ("journal", "move_out", "create", "attach", *DRESSING, "commit")
RESTORE_STAGES = ("journal", "remove", "move_back", *(s for s in DRESSING if s != "ports_up"), "forget")


class InterfaceMissingError(SpliceError):
    """The namespace has no such interface."""


class NotProtectableError(SpliceError):
    """The interface is not one end of a veth pair that can be taken apart."""


class AlreadySplicedError(SpliceError):
    """The interface is in a splice now."""


class EndpointGoneError(SpliceError):
    """The container, or its interface, is no more; what was left of the splice is deleted."""


@dataclass(frozen=True, slots=True)
class SpliceRequest:
    """What to splice: `name` is the endpoint's, `netns` a name under /run/netns or a path."""

    name: str
    netns: str
    interface: str = "eth0"


@dataclass(frozen=True, slots=True)
class Splice:
    """A splice in place. Ports are ifindexes in the isolator netns; `cookie`: which namespace `netns` was;
    `dark`: seconds without link (or 0)."""

    name: str
    netns: str
    interface: str
    container_port: int
    network_port: int
    container_ifindex: int
    mac: str
    addresses: tuple[Address, ...]
    cookie: int
    dark: float = 0.0


@dataclass(slots=True)
class Recovered:
    """What a new process found in the journal."""

    adopted: list[Splice] = field(default_factory=list)
    put_back: list[str] = field(default_factory=list)  # interrupted, now as before
    gone: list[str] = field(default_factory=list)  # containers that are no more; leftovers deleted
    failed: list[SpliceError] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Side:
    """A namespace and a netlink socket in it."""

    netns: Netns
    rtnl: Rtnl


class Splicer:
    """Makes, adopts and restores splices whose ports live in one pinned isolator netns.

    Blocking, and without state of its own but the journal: call it from plain code or a worker thread, also
    for several endpoints at once, but one endpoint from one thread at a time. `before(stage)` runs before
    each stage; what it raises is the stage's failure.
    """

    def __init__(
        self, isolator_netns: str, journal: Journal, before: Callable[[str], None] = lambda stage: None
    ) -> None:
        self.isolator_netns = isolator_netns
        self.journal = journal
        self.before = before

    def splice(self, request: SpliceRequest, attach: Attach) -> Splice:
        """Put the splice in place, or leave everything as it was and raise SpliceError."""
        self._clear_way(request)
        with self._sides(request.netns) as (container, isolator):
            if container.netns.cookie == isolator.netns.cookie:
                raise NotProtectableError(
                    f"{request.name}: not protectable: {request.netns} is the isolator netns itself"
                )
            link = _protectable(request, container.rtnl)
            if _is_port(link, container, isolator):
                raise NotProtectableError(
                    f"{request.name}: {request.interface} in {request.netns} is spliced already, and its journal entry"
                    " is lost: restart the container"
                )
            with container.netns.entered():
                before = snapshot.take_snapshot(container.rtnl, link)
            entry = _new_entry(request, container.netns.cookie, before)
            try:
                return _Splicing(self, entry, container, isolator, attach).run()
            except BaseException as error:
                self._roll_back(entry, container, isolator, error)
                if isinstance(error, OSError | DatapathError):
                    raise SpliceError(f"{request.name}: not spliced, all is as before: {error}") from error
                raise

    def check(self, request: SpliceRequest) -> None:
        """Raise the SpliceError with which `splice` would refuse; changes nothing."""
        with Netns(request.netns) as container, _rtnl_in(container) as rtnl:
            _protectable(request, rtnl)

    def restore(self, name: str) -> None:
        """The exact inverse. Raises SpliceError; EndpointGoneError if the container is no more."""
        entry = self._entry(name)
        try:
            with self._sides(entry.netns) as (container, isolator):
                if not _is_there(entry, container, isolator):
                    raise NetnsMissingError(f"{name}: its interface is no more")
                if entry.phase is Phase.SPLICED:
                    entry = self._prepare_restore(entry, container)
                try:
                    self._put_back(entry, container, isolator)
                except OSError:  # every stage looks at what is there: go on from where it failed
                    self._put_back(entry, container, isolator)
        except NetnsMissingError as error:
            self._reap(entry)
            raise EndpointGoneError(f"{name}: {error}; leftovers deleted") from error
        except OSError as error:
            raise SpliceError(f"{name}: not restored: {error}; run restore again") from error

    def adopt(self, name: str) -> Splice:
        """The splice that an earlier process made, if it is whole.

        An interrupted one is put back: SpliceError says so. Of one without its container the leftovers are
        deleted: EndpointGoneError.
        """
        entry = self._entry(name)
        try:
            with self._sides(entry.netns) as (container, isolator):
                if not _is_there(entry, container, isolator):
                    raise NetnsMissingError(f"{name}: its interface is no more")
                if entry.phase is Phase.SPLICED and _is_whole(entry, container, isolator):
                    return _splice_of(entry, container)
                self._put_back(entry, container, isolator)
        except NetnsMissingError as error:
            self._reap(entry)
            raise EndpointGoneError(f"{name}: {error}; leftovers deleted") from error
        except OSError as error:
            raise SpliceError(f"{name}: interrupted splice cannot be put back: {error}") from error
        raise SpliceError(f"{name}: the splice was interrupted; all is put back")

    def recover(self) -> Recovered:
        """Adopt, put back or reap every splice in the journal: the first thing a new process does."""
        found = Recovered(failed=list(self.journal.unreadable()))
        for entry in list(self.journal.entries()):
            try:
                found.adopted.append(self.adopt(entry.name))
            except EndpointGoneError:
                found.gone.append(entry.name)
            except SpliceError as error:
                if self.journal.read(entry.name) is None:
                    found.put_back.append(entry.name)
                else:
                    found.failed.append(error)
        return found

    def addresses(self, splice: Splice) -> tuple[Address, ...]:
        """The interface's addresses now, IPv4 first, in about 0.4 ms. Raises EndpointGoneError."""
        try:
            with Netns(splice.netns) as netns, _rtnl_in(netns) as rtnl:
                link = device.find_link(rtnl, splice.container_ifindex)
                same = (
                    netns.cookie == splice.cookie
                )  # or a new container's interface passes for the old one's
                if same and link is not None and link.peer == splice.container_port:
                    return _addresses(rtnl, splice.container_ifindex)
        except NetnsMissingError as error:
            raise EndpointGoneError(f"{splice.name}: {error}") from error
        raise EndpointGoneError(f"{splice.name}: {splice.interface} is no more in {splice.netns}")

    # parts

    @contextlib.contextmanager
    def _sides(self, netns: str) -> Iterator[tuple[_Side, _Side]]:
        with ExitStack() as stack:
            inner = stack.enter_context(Netns(netns))
            outer = stack.enter_context(pinned_netns(self.isolator_netns))
            yield (
                _Side(inner, stack.enter_context(_rtnl_in(inner))),
                _Side(outer, stack.enter_context(_rtnl_in(outer))),
            )

    def _entry(self, name: str) -> Entry:
        entry = self.journal.read(name)
        if entry is None:
            raise SpliceError(f"{name}: no splice of that name in {self.journal.folder}")
        return entry

    def _clear_way(self, request: SpliceRequest) -> None:
        """What an earlier run left is reaped or put back first; a whole splice refuses the request."""
        self.journal.read(request.name)  # one that cannot be read refuses it too: who knows what stands there
        for entry in self.journal.entries():
            same_device = entry.netns == request.netns and entry.interface == request.interface
            if entry.name == request.name or same_device:
                with contextlib.suppress(EndpointGoneError):
                    if entry.phase is Phase.SPLICED:
                        self.adopt(entry.name)
                        raise AlreadySplicedError(
                            f"{request.name}: already spliced, as {entry.name}; restore it first"
                        )
                    self.restore(entry.name)

    def _prepare_restore(self, entry: Entry, container: _Side) -> Entry:
        """The interface's present state is what the original gets; its link attributes it has kept itself."""
        now = device.find_link(container.rtnl, entry.snapshot.link.index)
        if now is None:  # its port is there: root in the container moved the interface elsewhere
            raise NetnsMissingError(f"{entry.name}: its interface is no more")
        with container.netns.entered():
            present = snapshot.take_snapshot(container.rtnl, now)
        link = replace(entry.snapshot.link, flags=now.flags, name=now.name)
        restoring = replace(entry, phase=Phase.RESTORING, snapshot=replace(present, link=link))
        self.before("journal")
        self.journal.write(restoring)
        return restoring

    def _roll_back(self, entry: Entry, container: _Side, isolator: _Side, cause: BaseException) -> None:
        """With the faults of the tests kept out: they are meant for the way there."""
        try:
            Splicer(self.isolator_netns, self.journal)._put_back(entry, container, isolator)
        except OSError as error:
            raise SpliceError(f"{entry.name}: {cause}; and not put back: {error}; run restore") from cause

    def _put_back(self, entry: Entry, container: _Side, isolator: _Side) -> None:
        """From wherever a splice or a restore stands to the container as it was, and no entry."""
        wanted = entry.snapshot
        self.before("remove")
        with isolator.netns.entered():
            pair = device.find_link(isolator.rtnl, entry.container_port_name)
            if pair is not None:
                _delete_link(isolator.rtnl, pair.index)
            self.before("move_back")
            original = device.find_link(isolator.rtnl, entry.network_port_name)
            if original is not None:
                detach_xdp(
                    original.index
                )  # tc programs go with the move, XDP would come along (net/core/dev.c)
                _move_back(isolator.rtnl, original.index, wanted.link, container.netns)
        if device.find_link(container.rtnl, wanted.link.index) is not None:
            with container.netns.entered():
                _dress(container.rtnl, wanted, self.before)
        self.before("forget")
        self.journal.remove(entry.name)

    def _reap(self, entry: Entry) -> None:
        """Delete what a container that is no more left in the isolator netns; the host end goes with it."""
        with pinned_netns(self.isolator_netns) as netns, _rtnl_in(netns) as rtnl:
            for name in (entry.container_port_name, entry.network_port_name):
                left = device.find_link(rtnl, name)
                if left is not None:
                    _delete_link(rtnl, left.index)
        self.journal.remove(entry.name)


class _Splicing:
    """One splice on its way: `run` goes through the stages in their order."""

    def __init__(
        self, splicer: Splicer, entry: Entry, container: _Side, isolator: _Side, attach: Attach
    ) -> None:
        self.splicer, self.entry = splicer, entry
        self.container, self.isolator, self.attach = container, isolator, attach
        self.wanted = entry.snapshot

    def run(self) -> Splice:
        before = self.splicer.before
        before("journal")
        self.splicer.journal.write(self.entry)
        dark_since = time.monotonic()
        with self.container.netns.entered():
            before("move_out")
            self._move_out()
            before("create")
            self._create()
        with self.isolator.netns.entered():
            before("attach")
            self._attach()
        with self.container.netns.entered():
            before("settings")
            snapshot.restore_settings(self.container.rtnl, self.wanted)
            before("ports_up")
            self._ports_up()
            _go_live(self.container.rtnl, self.wanted, before, self._settle_ports)
            dark = time.monotonic() - dark_since
            before("settle")
            snapshot.settle(self.container.rtnl, self.wanted)
        before("commit")
        self.entry = replace(self.entry, phase=Phase.SPLICED)
        self.splicer.journal.write(self.entry)
        return replace(_splice_of(self.entry, self.container), dark=dark)

    def _move_out(self) -> None:
        """One message: namespace, name and MAC; the port needs a MAC of its own, or the bridge side loops."""
        link = self.wanted.link
        for name in link.altnames:  # they would clash with another container's in the isolator netns
            device.set_altname(self.container.rtnl, link.index, name, False)
        device.set_link(
            self.container.rtnl,
            link.index,
            u32(device.IFLA_NET_NS_FD, self.isolator.netns.fd),
            text(device.IFLA_IFNAME, self.entry.network_port_name),
            attribute(device.IFLA_ADDRESS, _random_mac()),
            mask=IFF_UP,
        )

    def _create(self) -> None:
        """The new pair: our end with all that a link message carries, its peer made in the isolator netns."""
        link = self.wanted.link
        common = u32(device.IFLA_MTU, link.mtu) + b"".join(
            u32(kind, size) for kind, size in link.sizes.items()
        )
        peer = (
            IFINFO.pack(0, 0, 0, 0, 0)
            + text(device.IFLA_IFNAME, self.entry.container_port_name)
            + u32(device.IFLA_NET_NS_FD, self.isolator.netns.fd)
            + common
        )
        data = attribute(device.IFLA_INFO_DATA, attribute(device.VETH_INFO_PEER, peer))
        ours = (
            text(device.IFLA_IFNAME, link.name)
            + attribute(device.IFLA_ADDRESS, device.mac_bytes(link.mac))
            + u32(device.IFLA_TXQLEN, link.qlen)
            + u32(device.IFLA_GROUP, link.group)
            + u32(device.IFLA_NUM_TX_QUEUES, link.queues[0])
            + u32(device.IFLA_NUM_RX_QUEUES, link.queues[1])
            + attribute(device.IFLA_LINKINFO, text(device.IFLA_INFO_KIND, "veth") + data)
        )
        body = IFINFO.pack(0, 0, link.index, 0, 0) + common + ours
        self.container.rtnl.request(RTM_NEWLINK, body, NLM_F_CREATE | NLM_F_EXCL)

    def _attach(self) -> None:
        container_port = device.find_link(self.isolator.rtnl, self.entry.container_port_name)
        network_port = device.find_link(self.isolator.rtnl, self.entry.network_port_name)
        if container_port is None or network_port is None:
            raise SpliceError("the container vanished meanwhile")
        self.entry = replace(self.entry, container_port=container_port.index, network_port=network_port.index)
        self.attach(container_port.index, network_port.index)

    def _ports_up(self) -> None:
        for index in (self.entry.container_port, self.entry.network_port):
            device.set_link(self.isolator.rtnl, index, flags=IFF_UP, mask=IFF_UP)

    def _settle_ports(self) -> None:
        for index in (self.entry.container_port, self.entry.network_port):
            device.settle_carrier(self.isolator.rtnl, index)


def _protectable(request: SpliceRequest, rtnl: Rtnl) -> Link:
    """The interface, one end of a veth pair that nothing else stands on. `rtnl`: in its namespace."""
    where = f"{request.name}: {request.interface} in {request.netns}"
    link = device.find_link(rtnl, request.interface)
    if link is None:
        have = ", ".join(other.name for other in device.all_links(rtnl))
        raise InterfaceMissingError(f"{where} is missing; there are: {have}")
    if link.kind != "veth":
        kind = link.kind or ("loopback" if link.flags & IFF_LOOPBACK else "a physical device")
        raise NotProtectableError(f"{where}: not protectable: {kind}, not veth")
    if sum(other.mac == request.interface for other in device.all_links(rtnl)) > 1:
        raise NotProtectableError(
            f"{where}: not protectable: two interfaces have this MAC; give one of them another (--mac-address)"
        )
    for other in device.all_links(rtnl):
        if other.peer == link.index and other.peer_netns is None:
            raise NotProtectableError(
                f"{where}: not protectable: {other.name} stands on it or is its other end"
            )
        if other.index == link.master:
            raise NotProtectableError(f"{where}: not protectable: it is a port of {other.name}")
    return link


def _is_port(link: Link, container: _Side, isolator: _Side) -> bool:
    """Whether its other end is a port of the isolator netns: the same device, seen from here and from there."""
    if link.peer_netns is None:
        return False
    there = device.find_link(container.rtnl, link.peer, link.peer_netns)
    port = device.find_link(isolator.rtnl, link.peer)
    return there is not None and port is not None and (there.name, there.mac) == (port.name, port.mac)


def _go_live(
    rtnl: Rtnl, wanted: Snapshot, before: Callable[[str], None], linked: Callable[[], None] = lambda: None
) -> None:
    before("link_up")
    snapshot.bring_up(rtnl, wanted)
    linked()
    device.settle_carrier(rtnl, wanted.link.index)
    device.settle_carrier(rtnl, wanted.link.peer, wanted.link.peer_netns)
    before("addresses")
    snapshot.restore_addresses(rtnl, wanted)
    before("routes")
    snapshot.restore_routes(rtnl, wanted)
    before("neighbours")
    snapshot.restore_neighbours(rtnl, wanted)


def _dress(rtnl: Rtnl, wanted: Snapshot, before: Callable[[str], None]) -> None:
    """Everything a snapshot says, onto the device with its ifindex."""
    before("settings")
    snapshot.restore_settings(rtnl, wanted)
    _go_live(rtnl, wanted, before)
    before("settle")
    snapshot.settle(rtnl, wanted)


def _new_entry(request: SpliceRequest, cookie: int, before: Snapshot) -> Entry:
    """Ports are named after endpoint and container: a container that returns never meets its old ports."""
    digest = hashlib.blake2s(
        f"{request.name}/{cookie}/{before.link.index}".encode(), digest_size=5
    ).hexdigest()
    return Entry(
        name=request.name,
        netns=request.netns,
        cookie=cookie,
        boot=boot_id(),
        interface=request.interface,
        container_port_name=f"c-{digest}",
        network_port_name=f"n-{digest}",
        container_port=0,
        network_port=0,
        phase=Phase.SPLICING,
        snapshot=before,
    )


def _is_there(entry: Entry, container: _Side, isolator: _Side) -> bool:
    """Whether the container is the one that was spliced, and its interface, or the original of it, exists."""
    if entry.boot != boot_id() or entry.cookie != container.netns.cookie:
        return False
    if device.find_link(isolator.rtnl, entry.container_port_name) is not None:
        return True
    if (
        entry.phase is Phase.SPLICED
    ):  # someone deleted our pair: a runtime that took the container off its network
        return False
    names = (
        device.find_link(container.rtnl, entry.snapshot.link.index),
        device.find_link(isolator.rtnl, entry.network_port_name),
    )
    return any(names)


def _is_whole(entry: Entry, container: _Side, isolator: _Side) -> bool:
    inner = device.find_link(container.rtnl, entry.snapshot.link.index)
    ports = [
        device.find_link(isolator.rtnl, name) for name in (entry.container_port_name, entry.network_port_name)
    ]
    indexes = [port.index for port in ports if port is not None]
    return (
        inner is not None
        and inner.peer == entry.container_port
        and indexes == [entry.container_port, entry.network_port]
    )


def _splice_of(entry: Entry, container: _Side) -> Splice:
    link = entry.snapshot.link
    return Splice(
        name=entry.name,
        netns=entry.netns,
        interface=entry.interface,
        container_port=entry.container_port,
        network_port=entry.network_port,
        container_ifindex=link.index,
        mac=link.mac,
        addresses=_addresses(container.rtnl, link.index),
        cookie=entry.cookie,
    )


def _addresses(rtnl: Rtnl, index: int) -> tuple[Address, ...]:
    return tuple(ip_address(snapshot.address_bytes(body)) for body in snapshot.dump_addresses(rtnl, index))


def _rtnl_in(netns: Netns) -> Rtnl:
    with netns.entered():
        return Rtnl()


def _random_mac() -> bytes:
    """Locally administered, unicast (IEEE 802 section 8.4)."""
    return bytes([0x02]) + os.urandom(5)


def _delete_link(rtnl: Rtnl, index: int) -> None:
    """A device that went by itself meanwhile, with its namespace, is as good as deleted."""
    try:
        rtnl.request(RTM_DELLINK, IFINFO.pack(0, 0, index, 0, 0))
    except NetlinkError as error:
        if error.errno != errno.ENODEV:
            raise


def _move_back(rtnl: Rtnl, index: int, link: Link, home: Netns) -> None:
    device.set_link(
        rtnl,
        index,
        u32(device.IFLA_NET_NS_FD, home.fd),
        u32(device.IFLA_NEW_IFINDEX, link.index),
        text(device.IFLA_IFNAME, link.name),
        attribute(device.IFLA_ADDRESS, device.mac_bytes(link.mac)),
        mask=IFF_UP,
    )
