"""From one layout of the maps to another: what is moved, what is not, and who dies on the way.

The other layout is made of this one (tests/other_layout.py), so that an upgrade from it has something to find.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import structlog

from isolator.core.model import Side
from isolator.datapath import bpf, upgrade
from isolator.datapath.abi import FLOW4, Port, flow_key, mapped
from isolator.datapath.bpf import Datapath
from isolator.datapath.btf import Struct, map_types
from isolator.datapath.doorbell import Control
from isolator.datapath.libbpf import BpfError, open_pin
from isolator.datapath.maps import Map, wait_for_readers
from isolator.datapath.pins import in_force, layouts, unpin
from tests.datapath.test_bpf import FLOW, HALF, MAC, Entry
from tests.other_layout import PREFIXES, STRUCTS, build, put_in_force

pytestmark = pytest.mark.root
MOVED = ("ports", "addresses", "identities", "policy", "flows4", "flows7", "endpoints")
A, B = (mapped(ip_address(text)) for text in ("10.0.0.1", "10.0.0.2"))


def key(number: int) -> bytes:
    return flow_key(7, A, B, 80, number, 6)


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(f"/sys/fs/bpf/isolator-test-upgrade-{os.getpid()}")
    yield path
    unpin(path)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("structs"), STRUCTS)


@pytest.fixture
def filled(folder: Path) -> Path:
    with Datapath.open(folder) as made:
        made.set_port(5, Port(6, 7, Side.CONTAINER, MAC))
        made.set_endpoint(7)
        made.set_addresses(7, [A])
        made.write_policy(3, [Entry(1), Entry(2, port=81)], [(ip_network("10.0.0.0/8"), 5)])
        made.control.punt_ifindex, made.control.heartbeat, made.control.heartbeat_max = 4, 99, 88
        made.control.need_wakeup = True
        for number in (1, 2):
            half = replace(HALF, mode=4, remaining=number, record_seq=9, record=b"GET / HTTP/1.1")
            made.maps["flows7"].update(key(number), replace(FLOW, half=(half, HALF)).pack())
            made.maps["flows4"].update(key(100 + number), FLOW4.struct.pack(*range(1, 13)))
        made.set_endpoint(7, 50)  # counts them
    return folder


def contents(folder: Path) -> dict[str, dict[bytes, bytes]]:
    with Datapath.open(folder) as made:
        return {name: dict(made.maps[name].items()) for name in MOVED}


def map_in(layout: Path, name: str) -> Map:
    """The file descriptor stays open until the test's process ends."""
    return Map.of(open_pin(layout / name), name)


def pinned_types(folder: Path, name: str) -> Struct:
    layout = in_force(folder)
    assert layout is not None
    value = map_types(map_in(layout, name).fd, name)[1]
    assert isinstance(value, Struct)
    return value


# -- what is moved ---------------------------------------------------------------------------------------


def test_there_and_back_every_entry_is_as_it_was(filled: Path, other: Path) -> None:
    before, home = contents(filled), in_force(filled)
    put_in_force(filled, other)
    assert in_force(filled) != home and layouts(filled) == [in_force(filled)]
    assert pinned_types(filled, "flows7").offset("former") == 0
    with Datapath.open(filled) as back:
        assert {name: dict(back.maps[name].items()) for name in MOVED} == before
        control = back.control
        assert (control.generation, control.punt_ifindex) == (3, 4)
        assert (control.heartbeat, control.heartbeat_max) == (99, 88), "the agent is as dead as before"
        assert (control.need_wakeup, control.frozen_until) == (False, 0)
        assert in_force(filled) == home
        back.remove_other_layouts()
    assert layouts(filled) == [home]
    assert all(before[name] for name in MOVED)


def test_what_has_no_place_is_lost_alone_and_counted(filled: Path, other: Path) -> None:
    """`mode` has 16 bits there."""
    with Datapath.open(filled) as made:
        wide = replace(FLOW, half=(replace(HALF, mode=0x10000), HALF))
        made.maps["flows7"].update(key(3), wide.pack())
        made.set_endpoint(7, 51)
        assert made.flows7_used(7) == 3
    with structlog.testing.capture_logs() as logs:
        put_in_force(filled, other)
    assert [line["flows7"] for line in logs if line["event"] == "no place in the new layout"] == [1]
    assert [line["flows7"] for line in logs if line["event"] == "maps laid out anew"] == [2]
    with Datapath.open(filled) as back:
        assert {found.local_port for found, _ in back.flows7()} == {80} and back.flows7_used(7) == 2


def test_prefixes_of_other_fields_are_lost_alone(filled: Path, tmp_path: Path) -> None:
    """The policy that the agent writes brings them back."""
    before = contents(filled)
    with structlog.testing.capture_logs() as logs:
        put_in_force(filled, build(tmp_path, PREFIXES))
    assert [line["map"] for line in logs if line["log_level"] == "error"] == ["identities"]
    assert contents(filled) == before | {"identities": {}}


# -- what changes on the way -------------------------------------------------------------------------------


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Between the first copy and the last: when the flows have just been frozen."""
    done: list[bool] = []

    def wait() -> None:
        if not done:
            done.append(True)
            act()
        wait_for_readers()

    monkeypatch.setattr(upgrade, "wait_for_readers", wait)


def test_what_changed_after_the_first_copy_is_moved_as_it_is_then(
    filled: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, home = contents(filled), in_force(filled)
    assert home is not None
    live, changed = map_in(home, "flows7"), replace(FLOW, packets=(77, 78)).pack()

    def traffic() -> None:
        live.delete(key(1))
        live.update(key(2), changed)
        live.update(key(3), FLOW.pack())
        map_in(home, "flows4").update(key(103), FLOW4.struct.pack(*range(2, 14)))

    meanwhile(monkeypatch, traffic)
    put_in_force(filled, other)
    monkeypatch.undo()
    after = contents(filled)
    assert after["flows7"] == {key(2): changed, key(3): FLOW.pack()}
    assert after["flows4"] == before["flows4"] | {key(103): FLOW4.struct.pack(*range(2, 14))}


def test_a_freeze_that_ended_too_early_is_begun_again(
    filled: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(filled)
    monkeypatch.setattr(upgrade, "FREEZE_NS", 1)
    monkeypatch.setattr(upgrade, "MARGIN_NS", 0)
    with structlog.testing.capture_logs() as logs:
        put_in_force(filled, other)
    assert any("once more" in line["event"] for line in logs)
    assert contents(filled) == before


# -- who dies on the way -----------------------------------------------------------------------------------


def frozen_until(layout: Path | None) -> int:
    assert layout is not None
    control = Control(map_in(layout, "control").fd)
    try:
        return control.frozen_until
    finally:
        control.close()


def die_before_the_switch(folder: Path, other: Path) -> None:
    """An agent of the other version, killed when everything is copied and nothing is switched."""
    child = os.fork()
    if not child:
        real = bpf.upgrade
        bpf.upgrade = lambda old, new, switch: real(old, new, lambda: os._exit(9))
        put_in_force(folder, other)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_before_the_switch_the_old_layout_is_in_force_and_thaws(filled: Path, other: Path) -> None:
    before, home = contents(filled), in_force(filled)
    die_before_the_switch(filled, other)
    assert in_force(filled) == home and len(layouts(filled)) == 2
    assert 0 < frozen_until(home) < time.monotonic_ns() + upgrade.FREEZE_NS
    with Datapath.open(filled) as same:  # an agent of the old version
        assert same.control.frozen_until == 0
        same.remove_other_layouts()
    assert layouts(filled) == [home] and contents(filled) == before


def test_killed_before_the_switch_the_next_one_does_it_anew(filled: Path, other: Path) -> None:
    before, home = contents(filled), in_force(filled)
    die_before_the_switch(filled, other)
    assert home is not None
    map_in(home, "flows7").delete(key(1))  # traffic went on in the old maps
    put_in_force(filled, other)
    assert in_force(filled) != home
    assert contents(filled)["flows7"] == {key(2): before["flows7"][key(2)]}


def test_killed_after_the_switch_the_new_layout_is_in_force(filled: Path, other: Path) -> None:
    """The old one's pins still stand beside it: they are out of date, and nobody believes them."""
    before, home = contents(filled), in_force(filled)
    assert home is not None
    put_in_force(filled, other, tidy=False)
    assert in_force(filled) != home and len(layouts(filled)) == 2
    map_in(home, "flows7").delete(key(1))
    assert contents(filled) == before and in_force(filled) == home


def test_an_error_before_the_switch_ends_the_freeze(
    filled: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = in_force(filled)

    def fail() -> None:
        raise BpfError("no more")

    meanwhile(monkeypatch, fail)
    with pytest.raises(BpfError, match="no more"):
        put_in_force(filled, other)
    assert in_force(filled) == home and frozen_until(home) == 0
