"""A node's datapath with real containers: what the maps hold of an endpoint, before, while and after it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from isolator.core.inspector import Inspector
from isolator.datapath.abi import flow_key, mapped
from isolator.datapath.attach import XdpMode, attached_tc, attached_xdp
from isolator.datapath.errors import DatapathError
from isolator.datapath.journal import Journal
from isolator.datapath.netns import Netns, SpliceError
from isolator.datapath.node import Names, Node
from isolator.datapath.pins import layouts, unpin
from isolator.datapath.splice import InterfaceMissingError, Splicer, SpliceRequest
from tests.datapath import splice_lab as lab
from tests.other_layout import BOUND, build, put_in_force

pytestmark = pytest.mark.root
WEB = SpliceRequest("web", lab.A)
ONE = mapped(ip_address("10.31.0.1"))


@pytest.fixture
def names(tmp_path: Path) -> Iterator[Names]:
    pins = Path(f"/sys/fs/bpf/isolator-test-node-{os.getpid()}")
    with lab.two_containers():
        yield Names(lab.ISOLATOR, pins, tmp_path / "journal")
    unpin(pins)


def node(names: Names, xdp: XdpMode = XdpMode.OFF) -> Node:
    return Node(names, Inspector({}, 0), lambda report, now: None, xdp).open()


def endpoints_in(node: Node) -> dict[str, set[int]]:
    """Whose entries the maps hold."""
    found = {
        name: {int.from_bytes(key[:4], "little") for key, _ in node.datapath.maps[name].items()}
        for name in ("endpoints", "addresses", "flows7", "flows4")
    }
    return {"ports": node.numbers(), **found}


def empty(node: Node) -> bool:
    return not any(endpoints_in(node).values())


def leave_flows(node: Node, number: int) -> None:
    key = flow_key(number, ONE, ONE, 80, 1000, 6)
    for name in ("flows7", "flows4"):
        flows = node.datapath.maps[name]
        flows.update(key, bytes(flows.definition.value_size))


def test_protect_and_release(names: Names) -> None:
    assert names.unused
    with node(names) as made:
        assert not names.unused
        addresses = made.look(WEB)
        leave_flows(made, 7)  # of somebody who had the number before
        splice = made.protect(WEB, 7)
        assert set(splice.addresses) == set(addresses)
        assert endpoints_in(made) == {
            "ports": {7},
            "endpoints": {7},
            "addresses": {7},
            "flows7": set(),
            "flows4": set(),
        }
        leave_flows(made, 7)
        made.release(splice, 7)
        assert empty(made)
    assert not list(names.journal.glob("*"))


def test_what_is_spliced_already_is_taken_over_under_the_new_number(names: Names) -> None:
    with node(names) as first:
        made = first.protect(WEB, 7)
    with node(names) as second:
        leave_flows(second, 7)
        again = second.protect(WEB, 9)
        assert (again.container_port, again.network_port) == (made.container_port, made.network_port)
        assert set.union(*endpoints_in(second).values()) == {9}
        with pytest.raises(SpliceError, match="other"):
            second.protect(SpliceRequest("other", lab.A), 10)
        assert set.union(*endpoints_in(second).values()) == {9}


def test_a_new_process_forgets_what_it_does_not_adopt(names: Names) -> None:
    with node(names) as first:
        first.protect(WEB, 7)
        first.protect(SpliceRequest("api", lab.B), 8)
        leave_flows(first, 8)
    lab.run(f"ip netns del {lab.B}")
    with node(names) as second:
        found = second.recover()
        assert found.gone == ["api"]
        (splice,) = found.adopted
        second.adopt(splice, second.number_of(splice) or 0)
        second.tidy({7})
        assert set.union(*endpoints_in(second).values()) == {7}


@pytest.mark.parametrize(
    ("before", "after"), [(XdpMode.NATIVE, XdpMode.GENERIC), (XdpMode.GENERIC, XdpMode.NATIVE)]
)
def test_a_kept_splice_gets_the_other_kind_of_xdp(names: Names, before: XdpMode, after: XdpMode) -> None:
    with node(names, before) as first:
        splice = first.protect(WEB, 7)
    with node(names, after) as second:
        second.adopt(splice, 7)
        with second._netns.entered():
            assert attached_xdp(splice.network_port, after)
            assert attached_xdp(splice.network_port, before) is None


def test_after_another_layout_no_port_keeps_its_programs(names: Names, tmp_path: Path) -> None:
    """Whether it is adopted or not: they would go by maps that nobody writes any more."""
    with node(names, XdpMode.NATIVE) as first:
        splice = first.protect(WEB, 7)
        with first._netns.entered():
            before = attached_xdp(splice.network_port, XdpMode.NATIVE)
    put_in_force(names.pins, build(tmp_path / "bound", BOUND))
    with node(names, XdpMode.NATIVE) as second:
        with second._netns.entered():
            after = attached_xdp(splice.network_port, XdpMode.NATIVE)
        assert before and after and before != after
        second.tidy({7})
        assert len(layouts(names.pins)) == 1


@pytest.mark.parametrize("xdp", [XdpMode.NATIVE, XdpMode.GENERIC])
def test_a_restore_without_an_agent_leaves_no_program(names: Names, xdp: XdpMode) -> None:
    before = lab.inventory()
    with node(names, xdp) as made:
        made.protect(WEB, 7)
    Splicer(names.netns, Journal(names.journal)).restore("web")
    assert "xdp" not in lab.inside(lab.A, "ip -d link show eth0")
    assert "clsact" not in lab.inside(lab.A, "tc qdisc show")
    assert lab.inventory() == before


def test_an_interface_that_its_container_moves_away_is_lost(names: Names) -> None:
    with node(names) as made:
        splice = made.protect(WEB, 7)
        lab.run(f"ip -n {lab.A} link set eth0 netns {lab.B} name stolen")
        assert made.addresses([splice]) == {"web": None}
        made.lose(splice, 7)
        assert empty(made)
        assert not list(names.journal.glob("*"))
        with pytest.raises(InterfaceMissingError):
            made.look(WEB)


def test_a_splice_whose_journal_is_lost_is_not_spliced_again(names: Names) -> None:
    with node(names) as made:
        made.protect(WEB, 7)
        for content in ("{", None):
            for path in names.journal.glob("*"):
                path.write_text(content) if content else path.unlink()
            with pytest.raises(DatapathError, match=r"web\.json|spliced already"):
                made.protect(WEB, 8)
            assert len(lab.run(f"ip -n {lab.ISOLATOR} -br link").splitlines()) == 1 + 2 + 2
        made.protect(SpliceRequest("api", lab.B), 8)


def test_packets_pass_until_the_ports_go(names: Names) -> None:
    """A restore first writes down what there is, and the link need not be dark for that."""
    with node(names) as made:
        splice = made.protect(WEB, 7)
        seen = {}

        def look(stage: str) -> None:
            if stage == "remove":
                with Netns(names.netns) as netns, netns.entered():
                    seen.update({port: attached_tc(port) for port in made.ports[7]})

        made.splicer.before = look
        made.release(splice, 7)
    assert len(seen) == 2 and None not in seen.values()
