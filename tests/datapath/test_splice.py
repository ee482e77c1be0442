"""The splice and its inverse, by what `ip`, `ethtool` and `sysctl` show before and after."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from isolator.datapath.journal import Journal
from isolator.datapath.netns import Netns, NetnsMissingError, SpliceError
from isolator.datapath.splice import (
    RESTORE_STAGES,
    STAGES,
    AlreadySplicedError,
    EndpointGoneError,
    InterfaceMissingError,
    NotProtectableError,
    Splice,
    Splicer,
    SpliceRequest,
)
from tests.datapath import splice_lab as lab

pytestmark = pytest.mark.root
REQUEST = SpliceRequest("web", lab.A, "eth0")


@pytest.fixture
def containers() -> Iterator[None]:
    with lab.two_containers():
        yield


@pytest.fixture
def splicer(tmp_path: Path, containers: None) -> Splicer:
    return Splicer(lab.ISOLATOR, Journal(tmp_path / "journal"))


class Fault(Exception):  # noqa: N818 -- a test's own
    pass


def failing_at(stage: str, times: int = 1) -> object:
    left = [times]

    def before(reached: str) -> None:
        if reached == stage and left[0]:
            left[0] -= 1
            raise OSError(5, f"made to fail at {stage}")

    return before


def unlike(before: dict[str, str], after: dict[str, str]) -> dict[str, tuple[str, str]]:
    """What differs, line by line."""
    return {
        command: ("\n".join(sorted(set(before[command].splitlines()) - set(after[command].splitlines()))),
                  "\n".join(sorted(set(after[command].splitlines()) - set(before[command].splitlines()))))
        for command in before if before[command] != after[command]
    }  # fmt: skip


def without_qdisc(differing: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """A link that is down keeps the name of the queue it once had; one that was moved while down has none yet."""
    return {
        command: (gone, come)
        for command, (gone, come) in differing.items()
        if (command, gone, come) != ("tc qdisc show", "qdisc noqueue 0: dev eth0 root refcnt 2", "")
        and gone.replace("qdisc noqueue", "qdisc noop") != come.replace("qdisc noqueue", "qdisc noop")
    }


def ports() -> list[str]:
    return [
        line
        for line in lab.run(f"ip -n {lab.ISOLATOR} -o link").splitlines()
        if "veth" in line or "@" in line
    ]


def test_restore_is_the_inverse(splicer: Splicer) -> None:
    lab.furnish()
    before = lab.inventory()
    made = splicer.splice(REQUEST, lab.mirror)
    spliced = lab.inventory()
    assert {str(address) for address in made.addresses if not address.is_link_local} == {
        "10.31.0.1", "10.31.0.101", "10.31.0.102", "172.31.9.1", "172.31.10.1", "fd31::1", "fd32::7", "fd33::8",
    }  # fmt: skip
    assert list(unlike(before, spliced)) == ["ip -d addr", "ip -d link"]  # the other end, and no more
    for gone, come in unlike(before, spliced).values():
        assert all("eth0@" in line or "link-netns" in line for line in (gone + "\n" + come).splitlines())
    splicer.restore("web")
    assert unlike(before, lab.inventory()) == {}
    assert ports() == []
    assert splicer.journal.read("web") is None


@pytest.mark.parametrize("settings", [
    "addr flush dev eth0",
    "-6 addr flush dev eth0",
    "link set eth0 mtu 1000",
    "link set eth0 promisc on allmulticast on arp off",
    "link set eth0 name net1.5",
    "-4 route flush table all dev eth0",
    "-6 route del fd31::/64 dev eth0",
], ids=lambda settings: settings.replace(" ", "-"))  # fmt: skip
def test_odd_interfaces_come_back_as_they_were(splicer: Splicer, settings: str) -> None:
    lab.batch(lab.A, settings)
    request = SpliceRequest("odd", lab.A, "net1.5" if "net1.5" in settings else "eth0")
    before = lab.inventory()
    splicer.splice(request, lab.mirror)
    splicer.restore("odd")
    assert without_qdisc(unlike(before, lab.inventory())) == {}


def test_an_interface_that_is_down_stays_down(splicer: Splicer) -> None:
    """But for `qdisc noop` where `noqueue` stood: the kernel gives a device its queue when it comes up."""
    lab.batch(lab.A, "link set eth0 down")
    before = lab.inventory()
    splicer.splice(REQUEST, lab.mirror)
    splicer.restore("web")
    after = lab.inventory()
    for found in (before, after):
        found["tc qdisc show"] = ""
        for command in ("ip -d addr", "ip -d link"):
            found[command] = found[command].replace("qdisc noop state", "qdisc noqueue state")
    assert unlike(before, after) == {}


@pytest.mark.parametrize("setting", [
    "ipv6.conf.eth0.disable_ipv6=1", "ipv6.conf.default.disable_ipv6=1", "ipv6.conf.all.accept_dad=1",
    "ipv6.conf.eth0.accept_dad=1",
    "ipv6.conf.eth0.addr_gen_mode=1", "ipv6.conf.eth0.stable_secret=fe80::1234", "ipv6.conf.all.forwarding=1",
])  # fmt: skip
def test_ipv6_settings_come_back(splicer: Splicer, setting: str) -> None:
    lab.inside(lab.A, f"sysctl -q -w net.{setting}")
    before = lab.inventory()
    splicer.splice(REQUEST, lab.mirror)
    assert "tentative" not in lab.inside(lab.A, "ip addr")
    assert [c for c in unlike(before, lab.inventory()) if "addr" not in c and "link" not in c] == []
    splicer.restore("web")
    assert unlike(before, lab.inventory()) == {}


def test_ports_are_silent_and_have_their_own_names_and_macs(splicer: Splicer) -> None:
    mac = lab.run(f"ip -n {lab.A} -br link show eth0").split()[2]
    seen = []

    def attach(container_port: int, network_port: int) -> None:
        seen.append((container_port, network_port, lab.run("ip -o link")))

    made = splicer.splice(REQUEST, attach)
    ((container_port, network_port, links),) = seen
    assert (made.container_port, made.network_port, made.mac) == (container_port, network_port, mac)
    assert links.count("state DOWN") >= 2
    assert "state UP" not in links
    assert mac not in links
    up = lab.run(f"ip -n {lab.ISOLATOR} -d -o addr")
    assert "inet6" not in up
    assert lab.run(f"ip -n {lab.ISOLATOR} -o link").count("LOWER_UP") == 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_failing_stage_puts_everything_back(splicer: Splicer, stage: str) -> None:
    lab.furnish()
    before = lab.inventory()
    splicer.before = failing_at(stage)
    with pytest.raises(SpliceError, match=f"web: not spliced, all is as before: .*{stage}"):
        splicer.splice(REQUEST, lab.mirror)
    assert unlike(before, lab.inventory()) == {}
    assert ports() == []
    assert splicer.journal.read("web") is None
    splicer.splice(REQUEST, lab.mirror)


def test_what_attach_raises_puts_everything_back(splicer: Splicer) -> None:
    before = lab.inventory()

    def attach(container_port: int, network_port: int) -> None:
        raise Fault

    with pytest.raises(Fault):
        splicer.splice(REQUEST, attach)
    assert unlike(before, lab.inventory()) == {}


@pytest.mark.parametrize("stage", RESTORE_STAGES)
def test_a_restore_goes_on_after_a_failing_stage(splicer: Splicer, stage: str) -> None:
    lab.furnish()
    before = lab.inventory()
    splicer.splice(REQUEST, lab.mirror)
    splicer.before = failing_at(stage, times=1 if stage == "journal" else 2)  # the rest is tried twice
    with pytest.raises(SpliceError, match=r"web: not restored: .*; run restore again"):
        splicer.restore("web")
    splicer.restore("web")
    assert unlike(before, lab.inventory()) == {}
    assert ports() == []


CRASH = """
import os, sys
from pathlib import Path
from isolator.datapath.journal import Journal
from isolator.datapath.splice import Splicer, SpliceRequest
from tests.datapath import splice_lab as lab
def before(stage):
    if stage == sys.argv[3]: os._exit(9)
splicer = Splicer(lab.ISOLATOR, Journal(Path(sys.argv[1])), before)
if sys.argv[2] == "splice": splicer.splice(SpliceRequest("web", lab.A), lab.mirror)
else: splicer.restore("web")
"""


def crash(splicer: Splicer, what: str, stage: str) -> None:
    arguments = [sys.executable, "-c", CRASH, str(splicer.journal.folder), what, stage]
    assert subprocess.run(arguments, cwd=Path(__file__).parents[2]).returncode == 9


@pytest.mark.parametrize(("what", "stage"), [("splice", stage) for stage in STAGES if stage != "journal"]
                         + [("restore", stage) for stage in RESTORE_STAGES if stage != "journal"])  # fmt: skip
def test_a_new_process_puts_back_what_a_crash_left(splicer: Splicer, what: str, stage: str) -> None:
    lab.furnish()
    before = lab.inventory()
    if what == "restore":
        splicer.splice(REQUEST, lab.mirror)
    crash(splicer, what, stage)
    found = splicer.recover()
    assert (found.put_back, found.adopted, found.gone, found.failed) == (["web"], [], [], [])
    assert unlike(before, lab.inventory()) == {}
    assert ports() == []
    splicer.splice(REQUEST, lab.mirror)


def test_a_new_process_adopts_a_whole_splice(splicer: Splicer) -> None:
    made = splicer.splice(REQUEST, lab.mirror)
    found = Splicer(lab.ISOLATOR, Journal(splicer.journal.folder)).recover()
    (adopted,) = found.adopted
    assert (adopted.container_port, adopted.network_port, adopted.addresses, adopted.mac) == (
        made.container_port, made.network_port, made.addresses, made.mac)  # fmt: skip
    with pytest.raises(AlreadySplicedError, match="already spliced, as web"):
        splicer.splice(REQUEST, lab.mirror)
    with pytest.raises(AlreadySplicedError, match="other: already spliced, as web"):
        splicer.splice(SpliceRequest("other", lab.A), lab.mirror)


@pytest.mark.parametrize("going", [
    f"ip netns del {lab.A}",  # the container stops
    f"ip -n {lab.A} link del eth0",  # docker network disconnect
    f"ip -n {lab.HOST} link del veth1",  # the runtime deletes its end
])  # fmt: skip
def test_leftovers_of_a_vanished_container_are_reaped(splicer: Splicer, going: str) -> None:
    made = splicer.splice(REQUEST, lab.mirror)
    lab.run(going)
    if "veth1" not in going:
        with pytest.raises(EndpointGoneError):
            splicer.addresses(made)
        assert splicer.recover().gone == ["web"]
    else:
        assert splicer.recover().put_back == ["web"]
    assert ports() == []
    assert "veth1" not in lab.run(f"ip -n {lab.HOST} link")
    assert splicer.journal.read("web") is None


def test_a_restore_of_an_interface_that_was_moved_away_reaps(splicer: Splicer) -> None:
    """As root in the container can."""
    splicer.splice(REQUEST, lab.mirror)
    lab.run(f"ip -n {lab.A} link set eth0 netns {lab.B} name stolen")
    with pytest.raises(EndpointGoneError):
        splicer.restore("web")
    assert ports() == [] and splicer.journal.read("web") is None


def test_an_entry_that_cannot_be_read_stands_in_its_own_way_alone(splicer: Splicer) -> None:
    splicer.splice(REQUEST, lab.mirror)
    (splicer.journal.folder / "web.json").write_text("{")
    splicer.splice(SpliceRequest("b", lab.B), lab.mirror)
    with pytest.raises(SpliceError, match=r"web\.json: no journal entry"):
        splicer.splice(REQUEST, lab.mirror)
    found = splicer.recover()
    assert [splice.name for splice in found.adopted] == ["b"]
    assert "web.json" in str(found.failed[0])


def test_a_returned_container_is_spliced_again(splicer: Splicer) -> None:
    first = splicer.splice(REQUEST, lab.mirror)
    lab.run(f"ip netns del {lab.A}; ip netns add {lab.A}")
    lab.run(f"ip -n {lab.HOST} link add veth1b type veth peer name eth0 netns {lab.A}")
    lab.batch(lab.A, "link set eth0 up\naddr add 10.31.0.1/24 dev eth0")
    (link,) = json.loads(lab.inside(lab.A, "ip -j link show eth0"))
    same = replace(first, container_port=link["link_index"], container_ifindex=link["ifindex"])
    for known in (first, same):  # ifindexes come again, a namespace's cookie does not
        with pytest.raises(EndpointGoneError):
            splicer.addresses(known)
    again = splicer.splice(REQUEST, lab.mirror)
    assert len(ports()) == 2
    assert again.network_port != first.network_port or again.mac != first.mac


def test_addresses_follow_the_container(splicer: Splicer) -> None:
    made = splicer.splice(REQUEST, lab.mirror)
    lab.batch(lab.A, "addr add 10.31.0.55/24 dev eth0\naddr del fd31::1/64 dev eth0")
    now = {str(address) for address in splicer.addresses(made) if not address.is_link_local}
    assert now == {"10.31.0.1", "10.31.0.55"}
    splicer.restore("web")
    assert "10.31.0.55" in lab.inside(lab.A, "ip addr")


@pytest.mark.parametrize(("setup", "request_", "error", "message"), [
    ("", ("x", "spt-none", "eth0"), NetnsMissingError, "network namespace spt-none: none at /run/netns/spt-none"),
    ("", ("x", "/run/spt-none", "eth0"), NetnsMissingError, "none at /run/spt-none"),
    ("", ("x", "/etc/hostname", "eth0"), NetnsMissingError, "none at /etc/hostname"),
    ("", ("x", lab.A, "eth7"), InterfaceMissingError, "x: eth7 in spt-a-.* is missing; there are: lo, eth0"),
    ("", ("x", lab.A, "lo"), NotProtectableError, "not protectable: loopback, not veth"),
    ("link add mv0 link eth0 type macvlan", ("x", lab.A, "mv0"), NotProtectableError, "macvlan, not veth"),
    ("link add mv0 link eth0 type macvlan", ("x", lab.A, "eth0"), NotProtectableError, "mv0 stands on it"),
    ("link add p0 type veth peer name p1", ("x", lab.A, "p0"), NotProtectableError, "p1 stands on it or is its other"),
    ("link add br9 type bridge", ("x", lab.A, "br9"), NotProtectableError, "bridge, not veth"),
    ("link add p0 address 02:00:00:00:00:77 type veth peer name p1 address 02:00:00:00:00:77",
     ("x", lab.A, "02:00:00:00:00:77"), NotProtectableError, "two interfaces have this MAC"),
])  # fmt: skip
def test_what_cannot_be_spliced_is_refused_in_one_line(
    splicer: Splicer, setup: str, request_: tuple[str, str, str], error: type[SpliceError], message: str
) -> None:
    if setup:
        lab.batch(lab.A, setup)
    before = lab.inventory()
    for attempt in (splicer.check, lambda request: splicer.splice(request, lab.mirror)):
        with pytest.raises(error, match=message) as caught:
            attempt(SpliceRequest(*request_))
        assert "\n" not in str(caught.value)
    assert unlike(before, lab.inventory()) == {}
    assert list(splicer.journal.entries()) == []


def test_the_thread_is_at_home_afterwards_and_other_threads_never_left(splicer: Splicer) -> None:
    home = os.readlink("/proc/thread-self/ns/net")

    async def from_a_worker_thread() -> Splice:
        return await asyncio.to_thread(splicer.splice, REQUEST, lab.mirror)

    asyncio.run(from_a_worker_thread())
    splicer.restore("web")
    assert os.readlink("/proc/thread-self/ns/net") == home
    with Netns(lab.A) as netns, pytest.raises(Fault), netns.entered():
        raise Fault
    assert os.readlink("/proc/thread-self/ns/net") == home


def test_many_splices_at_once(splicer: Splicer) -> None:
    async def both() -> list[Splice]:
        requests = (SpliceRequest("a", lab.A), SpliceRequest("b", lab.B))
        return await asyncio.gather(*(asyncio.to_thread(splicer.splice, r, lab.mirror) for r in requests))

    made = uvloop.run(both())
    assert len({port for each in made for port in (each.container_port, each.network_port)}) == 4
    assert len(ports()) == 4
    lab.inside(lab.A, "ping -c1 -W2 10.31.0.2")


def test_stages_are_those_that_run(splicer: Splicer) -> None:
    reached: list[str] = []
    splicer.before = reached.append
    splicer.splice(REQUEST, lab.mirror)
    assert tuple(reached) == STAGES
    reached.clear()
    splicer.restore("web")
    assert tuple(reached) == RESTORE_STAGES
