"""The loader: pins adopted and laid out anew, typed maps, attaching. What the programs do is in tests/bpf."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from isolator.core.model import Direction, DropReason, FlowFlag, Owner, Side, Verdict
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule
from isolator.datapath.abi import (
    STATES_MAX,
    DropCounter,
    Flow7,
    FlowKey,
    Half,
    PolicyValue,
    Port,
    Word,
    flow_key,
    identity_key,
    mapped,
)
from isolator.datapath.attach import XdpMode, attached_tc, attached_xdp
from isolator.datapath.bpf import OBJECTS, TC_OBJECT, Datapath, _encode
from isolator.datapath.errors import DatapathError
from isolator.datapath.libbpf import BpfError, LoadError, MapDefinition, Object, library, log_tail, open_pin
from isolator.datapath.maps import NOEXIST, wait_for_readers
from isolator.datapath.netns import Netns
from isolator.datapath.pins import in_force, layout_name, layouts, unpin
from tests.core.automaton.world import automaton_of, rule
from tests.other_layout import BOUND, build

pytestmark = pytest.mark.root
MAC = b"\x02\x00\x00\x00\x00\x01"
A, B, C = (mapped(ip_address(text)) for text in ("10.0.0.1", "10.0.0.2", "fd00::1"))
KEY = flow_key(7, A, B, 80, 1000, 6)
AUTOMATON = automaton_of(rule("read", HttpRule(frozenset({"GET"}), PathPattern("/a"))))
HALF = Half(Word(100, Owner.PYTHON, 0), 0, 0, 100, (), 0, b"", 0)
FLOW = Flow7(
    1, (2, 3), (4, 5), 6, 7, 8, 9, 0, 1, Direction.INGRESS, 1, FlowFlag(0), DropReason.NONE, 0, 3, (HALF, HALF)
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    rule: int
    port: int = 80
    endpoint: int = 7
    direction: int = 0
    peer: int = 0
    protocol: int = 6
    verdict: int = Verdict.ALLOW
    flags: int = 0
    reason: int = 0
    profile: int = 0


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(f"/sys/fs/bpf/isolator-test-loader-{os.getpid()}")
    yield path
    unpin(path)


@pytest.fixture
def datapath(folder: Path) -> Iterator[Datapath]:
    with Datapath.open(folder) as made:
        yield made


@pytest.fixture(scope="session")
def other_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("other"), BOUND)


# -- pins ------------------------------------------------------------------------------------------------


def test_a_restart_adopts_the_maps(folder: Path) -> None:
    with Datapath.open(folder) as first:
        first.set_addresses(7, [A, B])
        first.write_policy(first.next_generation(), [Entry(1)], [])
        first.maps["flows7"].update(KEY, FLOW.pack())
        names = {path.name for path in folder.iterdir()}
    with Datapath.open(folder) as second:
        assert second.generation == 1
        assert second.flow7(KEY) == FLOW
        second.set_addresses(7, [B, C])
        assert {key[4:] for key in second.maps["addresses"].keys()} == {B, C}  # noqa: SIM118
    assert {path.name for path in folder.iterdir()} == names and len(names) == 2


def test_tc_and_xdp_share_the_maps(datapath: Datapath) -> None:
    tc, xdp = datapath._objects
    for name, pinned in datapath.maps.items():
        ids = {_map_id(fd) for fd in (tc.map_fd(name), xdp.map_fd(name), pinned.fd)}
        assert len(ids) == 1


def _map_id(fd: int) -> str:
    return next(line for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if "map_id" in line)


def test_another_layout_is_laid_out_beside(folder: Path, other_layout: Path) -> None:
    with Datapath.open(folder) as old:
        old.set_addresses(7, [A])
        old.write_policy(1, [Entry(1)], [(ip_network("10.0.0.0/8"), 5)])
        old.maps["flows7"].update(KEY, FLOW.pack())
    with Datapath.open(folder, other_layout) as new:
        assert len(layouts(folder)) == 2
        assert new.maps["addresses"].definition.max_entries == 65537
        assert new.flow7(KEY) == FLOW, "equal structs are copied"
        assert len(list(new.maps["policy"].items())) == 1
        assert new.generation == 1, "or what was copied would not be in force"
        new.remove_other_layouts()
        assert layouts(folder) == [new._folder.path]


def test_half_made_pins_are_made_anew(folder: Path) -> None:
    with Object.open(OBJECTS / TC_OBJECT) as parsed:
        name = layout_name(parsed.definitions())
    (folder / name).mkdir(parents=True)
    with Datapath.open(folder):
        assert in_force(folder) == folder / name


def test_a_pin_that_is_something_else_is_replaced(folder: Path) -> None:
    with Datapath.open(folder) as first:
        path = first._folder.path
        (path / "ports").unlink()
        pinned = library().bpf_obj_pin(first.maps["endpoints"].fd, os.fsencode(path / "ports"))
        assert pinned == 0
    with Datapath.open(folder) as second:
        second.set_port(5, Port(6, 7, Side.CONTAINER, MAC))
        assert second.ports() == {5: Port(6, 7, Side.CONTAINER, MAC)}


def test_a_layouts_name_says_what_lies_in_it() -> None:
    one = MapDefinition("flows", 1, 4, 8, 16, 0)
    scratch = MapDefinition("some_scratch", 1, 4, 8, 16, 0)
    assert layout_name([one]) == layout_name([one, scratch]) != layout_name([replace(one, max_entries=17)])


def test_nothing_is_left_when_an_object_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BpfError, match=r"no BPF object .*isolator_tc.bpf.o \(build it with `make bpf`\)"):
        Datapath.open(folder, tmp_path)
    (tmp_path / TC_OBJECT).write_bytes(b"no ELF")
    with pytest.raises(BpfError, match="is not a BPF object"):
        Datapath.open(folder, tmp_path)
    assert not folder.exists()


def test_a_folder_that_cannot_hold_pins(tmp_path: Path) -> None:
    with pytest.raises(DatapathError, match="not on a BPF file system"):
        Datapath.open(tmp_path)


def test_the_verifiers_words_stand_in_the_error(tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text(
        'struct __sk_buff; __attribute__((section("tc"), used)) int bad(struct __sk_buff *skb)'
        '{ return *(volatile int *)0; } char l[] __attribute__((section("license"), used)) = "GPL";'
    )
    command = ["clang", "-w", "-O2", "-g", "-target", "bpf", "-c", source, "-o", tmp_path / "bad.o"]
    subprocess.run(command, check=True)
    with (
        Object.open(tmp_path / "bad.o") as parsed,
        pytest.raises(LoadError, match=r"refuses bad\.o.*invalid mem"),
    ):
        parsed.load()


def test_a_long_log_is_cut() -> None:
    assert log_tail(b"\n".join(b"%d" % n for n in range(99))).startswith("87 | 88 |")
    assert log_tail(b"") == "the verifier says nothing"


def test_no_pin(folder: Path) -> None:
    with pytest.raises(BpfError, match="cannot open pin"):
        open_pin(folder / "nothing")


# -- ports, endpoints, addresses -------------------------------------------------------------------------


def test_ports(datapath: Datapath) -> None:
    one, other = Port(6, 7, Side.CONTAINER, MAC), Port(5, 7, Side.NETWORK, MAC)
    datapath.set_port(5, one)
    datapath.set_port(6, other)
    assert datapath.ports() == {5: one, 6: other}
    datapath.delete_port(5)
    datapath.delete_port(5)
    assert datapath.ports() == {6: other}


def test_addresses_are_changed_by_their_difference(datapath: Datapath) -> None:
    def held(endpoint: int) -> set[bytes]:
        keys = datapath.maps["addresses"].keys()
        return {key[4:] for key in keys if struct.unpack("=I", key[:4])[0] == endpoint}

    datapath.set_addresses(7, [A, B])
    datapath.set_addresses(8, [A])
    datapath.set_addresses(7, [B, C])
    assert (held(7), held(8)) == ({B, C}, {A})
    datapath.forget_endpoint(7)
    assert (held(7), held(8)) == (set(), {A})


def test_a_quota_is_counted_anew_but_for_an_adopted_one(datapath: Datapath) -> None:
    datapath.maps["flows7"].update(KEY, FLOW.pack())
    datapath.set_endpoint(7, 10)
    assert datapath.flows7_used(7) == 1
    assert datapath.commands.delete(KEY, 1)
    assert datapath.flows7_used(7) == 0
    datapath.set_endpoint(7, 10)
    assert datapath.flows7_used(7) == 0


def test_a_forgotten_endpoint_has_no_flows(datapath: Datapath) -> None:
    datapath.maps["flows7"].update(KEY, FLOW.pack())
    datapath.forget_endpoint(7)
    assert list(datapath.flows7()) == []


def test_an_endpoints_flows_of_both_kinds_go_with_it(datapath: Datapath) -> None:
    other = flow_key(8, A, B, 80, 1000, 6)
    for name in ("flows7", "flows4"):
        flows = datapath.maps[name]
        flows.update_many((key, bytes(flows.definition.value_size)) for key in (KEY, other))
    datapath.forget_endpoint(7)
    assert [set(datapath.maps[name].keys()) for name in ("flows7", "flows4")] == [{other}, {other}]


def test_what_earlier_processes_left_of_others_goes(folder: Path) -> None:
    with Datapath.open(folder) as first:
        for number, ifindex in ((7, 5), (8, 6)):
            first.set_endpoint(number)
            first.set_addresses(number, [A, B])
            first.set_port(ifindex, Port(9, number, Side.CONTAINER, MAC))
            for name in ("flows7", "flows4"):
                flows = first.maps[name]
                flows.update(flow_key(number, A, B, 80, 1000, 6), bytes(flows.definition.value_size))
    with Datapath.open(folder) as second:
        second.forget_others({8})
        assert set(second.ports()) == {6}
        for name in ("endpoints", "addresses", "flows7", "flows4"):
            assert {struct.unpack("=I", key[:4])[0] for key in second.maps[name].keys()} == {8}, name  # noqa: SIM118
        second.set_addresses(7, [A])
        assert len(list(second.maps["addresses"].keys())) == 3


# -- policy ----------------------------------------------------------------------------------------------


def test_what_a_crash_left_of_a_policy_never_comes_into_force(folder: Path) -> None:
    with Datapath.open(folder) as first:
        first.write_policy(first.next_generation(), [Entry(1)], [((A, 128), 1)])
        died_at = first.next_generation()
        first.maps["policy"].update(*_encode(died_at, Entry(2, port=22), {}))
        first.maps["identities"].update(identity_key(died_at, B, 128), bytes(4))
    with Datapath.open(folder) as second:
        generation = second.next_generation()
        second.write_policy(generation, [Entry(3)], [((A, 128), 1)])
        second.retire()
        assert second.rule_hits() == {3: 0}
        assert len(list(second.maps["policy"].keys())) == len(list(second.maps["identities"].keys())) == 1


def test_no_generation_is_used_twice(datapath: Datapath) -> None:
    numbers = [datapath.next_generation() for _ in range(3)]
    datapath.write_policy(numbers[0], [Entry(1)], [])
    assert len({*numbers, datapath.next_generation()}) == 4


def test_policy_replaces_policy(datapath: Datapath) -> None:
    identities = [((A, 128), 1), (ip_network("10.0.0.0/8"), 2), (ip_network("::/0"), 3)]
    datapath.write_policy(1, [Entry(1), Entry(2, port=81)], identities)
    assert datapath.retire() == {}
    assert datapath.generation == 1 and len(list(datapath.maps["identities"].items())) == 3
    for key, value in list(datapath.maps["policy"].items()):
        datapath.maps["policy"].update(key, value[:-8] + struct.pack("=Q", 5))
    assert datapath.rule_hits() == {1: 5, 2: 5}
    datapath.write_policy(2, [Entry(9)], identities)
    assert datapath.generation == 2 and len(list(datapath.maps["policy"].keys())) == 3
    assert datapath.retire() == {1: 5, 2: 5} and datapath.retire() == {}
    assert datapath.rule_hits() == {9: 0}
    for generation in (3, 4):  # there are never more than two
        datapath.write_policy(generation, [Entry(9)], identities)
        assert len(list(datapath.maps["policy"].keys())) == 2
    datapath.retire()
    assert len(list(datapath.maps["identities"].items())) == 3


def test_many_entries(datapath: Datapath) -> None:
    entries = [Entry(number, port=1 + number % 60000, peer=number) for number in range(10000)]
    identities = [((b"\xfd" + bytes(11) + struct.pack("!I", number), 128), number) for number in range(10000)]
    datapath.write_policy(1, entries, identities)
    datapath.write_policy(2, [], [])
    hits = datapath.retire()
    assert len(hits) == 10000
    assert not list(datapath.maps["policy"].keys()) and not list(datapath.maps["identities"].keys())


def test_a_policy_that_does_not_fit_changes_nothing(datapath: Datapath) -> None:
    datapath.write_policy(1, [Entry(1)], [((A, 128), 1)])
    too_many = ((struct.pack("!QQ", 1, number), 128) for number in range(131073))
    with pytest.raises(BpfError, match=r"map identities: batch update .* failed.*131072 entries at most"):
        datapath.write_policy(2, [Entry(2)], ((prefix, 1) for prefix in too_many))
    assert datapath.generation == 1
    assert datapath.rule_hits() == {1: 0} and len(list(datapath.maps["identities"].items())) == 1


def test_generations_skip_zero(datapath: Datapath) -> None:
    assert datapath.next_generation() == 1
    datapath.control.generation = 0xFFFFFFFF
    assert datapath.next_generation() == 1


def test_waiting_for_readers() -> None:
    wait_for_readers()


# -- maps ------------------------------------------------------------------------------------------------


def test_a_map(datapath: Datapath) -> None:
    table = datapath.maps["endpoints"]
    one, other = struct.pack("=I", 1), struct.pack("=I", 2)
    table.update_many([(one, bytes(8)), (other, b"\1" * 8)])
    assert dict(table.items()) == {one: bytes(8), other: b"\1" * 8} and set(table.keys()) == {one, other}
    with pytest.raises(BpfError, match="map endpoints: update failed: File exists"):
        table.update(one, bytes(8), NOEXIST)
    with pytest.raises(ValueError, match="endpoints"):
        table.update(one, bytes(7))
    table.delete_many([struct.pack("=I", 9), one, struct.pack("=I", 8)])
    assert table.lookup(one) is None and table.lookup(other) == b"\1" * 8
    assert (table.delete(other), table.delete(other)) == (True, False)
    table.clear()
    assert not list(table.items())


def test_drops_are_summed_over_cpus(datapath: Datapath) -> None:
    table = datapath.maps["drops"]
    cpus = table.value_room // 24
    table.update(struct.pack("=I", DropReason.VLAN), struct.pack("=QQQ", 2, 100, 9) * cpus)
    assert datapath.drops() == {DropReason.VLAN: DropCounter(2 * cpus, 100 * cpus)}


def test_flows(datapath: Datapath) -> None:
    datapath.maps["flows7"].update(KEY, FLOW.pack())
    datapath.maps["flows4"].update(KEY, bytes(56))
    assert list(datapath.flows7()) == [(FlowKey(7, A, B, 80, 1000, 6), FLOW)]
    ((key, flow),) = datapath.flows4()
    assert key.pack() == KEY and flow.verdict is Verdict.NONE


# -- attaching -------------------------------------------------------------------------------------------


@pytest.fixture
def veth() -> Iterator[tuple[Netns, int]]:
    name = f"bpt-{os.getpid()}-attach"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        link = ["ip", "-n", name, "link", "add", "name", "one", "type", "veth", "peer", "name", "two"]
        subprocess.run(link, check=True)
        with Netns(name) as namespace, namespace.entered():
            yield namespace, socket.if_nametoindex("one")
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_attaching_again_replaces(datapath: Datapath, veth: tuple[Netns, int], folder: Path) -> None:
    _, port = veth
    assert attached_tc(port) is None
    datapath.attach_port(port)
    first = attached_tc(port)
    with Datapath.open(folder) as successor:
        successor.attach_port(port)
        second = attached_tc(port)
    assert first and second and first != second
    datapath.detach(port)
    datapath.detach(port)
    assert attached_tc(port) is None


@pytest.mark.parametrize("mode", [XdpMode.NATIVE, XdpMode.GENERIC])
def test_xdp(datapath: Datapath, veth: tuple[Netns, int], mode: XdpMode) -> None:
    _, port = veth
    datapath.attach_port(port, mode)
    datapath.attach_port(port, mode)
    assert attached_xdp(port, mode) and attached_tc(port)
    datapath.attach_port(port)
    assert attached_xdp(port, mode) is None and attached_tc(port)
    datapath.attach_port(port, mode)
    datapath.detach(port)
    assert attached_xdp(port, mode) is None and attached_tc(port) is None


def test_a_device_that_is_gone(datapath: Datapath, veth: tuple[Netns, int]) -> None:
    with pytest.raises(BpfError, match="device 9999"):
        datapath.attach_port(9999)
    datapath.detach(9999)


# -- a policy in force that is changed -----------------------------------------------------------------------


def in_maps(datapath: Datapath) -> tuple[set[int], set[int], int]:
    """Generations of selections and of policy entries, and how many prefixes there are."""
    selections, policy = ({int.from_bytes(key[:4], "little") for key, _ in datapath.maps[name].items()}
                      for name in ("selections", "policy"))  # fmt: skip
    return selections, policy, len(list(datapath.maps["identities"].items()))


def test_a_change_adds_to_what_is_there_and_switches_selections(datapath: Datapath) -> None:
    datapath.write_policy(1, [Entry(1, endpoint=70000)], [((A, 128), 1)], selections={(7, 0): 70000})
    datapath.retire()
    datapath.change_policy(
        2, [Entry(2, endpoint=70001)], {(A, 128): (1, 0), (B, 128): (0, 2)}, {(7, 0): 70001}
    )
    assert datapath.generation == 2 and in_maps(datapath) == ({1, 2}, {1}, 1)
    assert datapath.retire() == {} and in_maps(datapath) == ({2}, {1}, 1)
    assert set(datapath.rule_hits()) == {1, 2}
    datapath.write_policy(3, [Entry(3, endpoint=70000)], [], selections={(7, 0): 70000})
    datapath.retire()
    assert in_maps(datapath) == ({3}, {3}, 0)


def test_a_change_that_does_not_fit_leaves_what_was(datapath: Datapath) -> None:
    datapath.write_policy(1, [Entry(1, endpoint=70000)], [((A, 128), 1)], selections={(7, 0): 70000})
    before = sorted(datapath.maps["identities"].items())
    too_many = {(mapped(ip_address(at)), 128): (0, 3) for at in range(1 << 17)}
    with pytest.raises(BpfError, match="identities"):
        datapath.change_policy(2, [], {(A, 128): (1, 2), **too_many}, {(7, 0): 70000})
    assert datapath.generation == 1 and in_maps(datapath) == ({1}, {1}, 1)
    assert sorted(datapath.maps["identities"].items()) == before


def test_a_restart_adopts_a_changed_policy(folder: Path) -> None:
    with Datapath.open(folder) as first:
        first.write_policy(1, [Entry(1, endpoint=70000)], [((A, 128), 1)], selections={(7, 0): 70000})
        first.change_policy(2, [], {(B, 128): (0, 1)}, {(7, 0): 70000})
    with Datapath.open(folder) as second:
        assert second.generation == 2 and in_maps(second) == ({2}, {1}, 2)


def starts(datapath: Datapath) -> list[int]:
    values = (PolicyValue.unpack(value) for _, value in datapath.maps["policy"].items())
    return sorted(each.automaton for each in values if each.automaton)


def test_a_restart_knows_which_half_the_automata_in_force_are_in(folder: Path) -> None:
    entry, other = Entry(1, profile=1), Entry(2, profile=2, port=81)
    with Datapath.open(folder) as first:
        first.write_policy(1, [entry], [], {1: AUTOMATON})
        (start,) = starts(first)
        first.change_policy(2, [other], {}, {(7, 0): 7}, {2: AUTOMATON})
        assert [at // (STATES_MAX // 2) for at in starts(first)] == [1, 1] and start in starts(first)
    with Datapath.open(folder) as second:
        kept = second.maps["states"].lookup(start.to_bytes(4, "little"))
        second.write_policy(3, [entry], [], {1: AUTOMATON})
        assert [at // (STATES_MAX // 2) for at in starts(second)] == [0, 1, 1]
        assert second.maps["states"].lookup(start.to_bytes(4, "little")) == kept
    with Datapath.open(folder) as third:
        third.write_policy(4, [entry], [], {1: AUTOMATON})
        third.retire()
        assert [at // (STATES_MAX // 2) for at in starts(third)] == [1]
