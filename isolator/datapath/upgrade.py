"""From the layout in force to another one, while traffic goes on.

    copy        all of it, and then once more what has changed meanwhile
    freeze      no inspected flow changes in the old maps: its packets are dropped, layer 4 goes on
    copy        flows7 and quotas: what has changed still
    switch      one store, and every port runs the new layout's program
    copy        flows4: what has changed still

Until the switch the old layout is in force and complete: whoever dies before it has changed nothing, and the freeze
ends by itself. Policy, ports, addresses and control are copied once: only an agent changes them, and there is one.
`events`, `doorbell` and `drops` are not moved: events not read yet are lost, counters of drops begin anew.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import structlog

from isolator.datapath.btf import BtfError, Struct, map_types
from isolator.datapath.errors import DatapathError
from isolator.datapath.libbpf import MapType, open_pin
from isolator.datapath.maps import Map, wait_for_readers
from isolator.datapath.translate import Translation, UntranslatableError

SETTLED = ("ports", "addresses", "identities", "policy", "selections", "control")
LIVE = ("flows4", "endpoints", "flows7")  # the programs change them
NOT_MOVED = {"control": {"need_wakeup", "frozen_until"}}  # fields: of the old agent's sleep, of this freeze
FREEZE_NS = 2_000_000_000  # after this it ends by itself
MARGIN_NS = FREEZE_NS // 2  # the switch has to happen so long before that

log = structlog.get_logger()


class FreezeError(DatapathError):
    """The old layout's inspected flows cannot be frozen."""


class Upgrade:
    """One move. `old`: maps of the layout in force by name, `new`: those that take its place, empty."""

    def __init__(self, old: dict[str, Map], new: dict[str, Map]) -> None:
        self._old, self._new = old, new
        self._translations = {
            name: translations(old[name], new[name]) for name in SETTLED + LIVE if name in old
        }
        self._moved: Counter[str] = Counter()
        # old key → hash of what was copied
        self._marks: dict[str, dict[bytes, int]] = {name: {} for name in LIVE}
        self._lost: dict[str, set[bytes]] = {name: set() for name in SETTLED + LIVE}  # old keys

    def run(self, switch: Callable[[], None]) -> None:
        """`switch` puts the new layout's program on the ports. Raises DatapathError; then the old is in force."""
        for name in SETTLED:
            self._new[name].update_many(self._translated(name, self._entries(name)))
        for name in LIVE + LIVE:
            self._copy(name)
        took = self._move_inspected(switch)
        wait_for_readers()
        self._copy("flows4")
        self._tell(took)

    def _move_inspected(self, switch: Callable[[], None]) -> int:
        """How long they were frozen, ns. Once more where that ended too early: the copy may be out of date."""
        bound = FREEZE_NS
        while True:
            with frozen(self._old["control"], bound) as until:
                wait_for_readers()
                self._copy("endpoints")
                self._copy("flows7")
                if time.monotonic_ns() < until - MARGIN_NS:
                    switch()
                    return time.monotonic_ns() - (until - bound)
            log.warning("inspected flows take long to move, once more", seconds=bound / 1e9)
            bound *= 2

    def _tell(self, took: int) -> None:
        for name in LIVE:
            self._moved[name] = len(self._marks[name]) - len(self._lost[name])
        told = {name: self._moved[name] for name in ("ports", "policy", "flows4", "flows7")}
        log.info("maps laid out anew", **told, frozen_ms=round(took / 1e6, 1))
        if lost := {name: len(keys) for name, keys in self._lost.items() if keys}:
            log.warning("no place in the new layout", **lost)

    # -- one map --------------------------------------------------------------------------------------------

    def _entries(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        return self._old[name].items() if name in self._old else iter(())

    def _copy(self, name: str) -> None:
        """What is not as it was when it was copied last: new, changed or gone."""
        before, now = self._marks[name], {}

        def changed() -> Iterator[tuple[bytes, bytes]]:
            for key, value in self._entries(name):
                now[key] = mark = hash(value)
                if before.get(key) != mark:
                    yield key, value

        self._new[name].update_many(self._translated(name, changed()))
        self._marks[name], gone = now, before.keys() - now.keys()
        self._lost[name] -= gone
        if stale := gone | (self._lost[name] & before.keys()):
            self._new[name].delete_many(key for key in map(self._key_of(name), stale) if key is not None)

    def _translated(self, name: str, entries: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        lost, found = self._lost[name], self._translations.get(name)
        for old_key, old_value in entries:
            key, value = (found[0](old_key), found[1](old_value)) if found else (None, None)
            if key is None or value is None:
                lost.add(old_key)
            else:
                lost.discard(old_key)
                self._moved[name] += 1
                yield key, value

    def _key_of(self, name: str) -> Callable[[bytes], bytes | None]:
        found = self._translations.get(name)
        return found[0] if found else lambda key: None


def upgrade(old: Path, new: dict[str, Map], switch: Callable[[], None]) -> None:
    """From the maps pinned in `old` to `new`. Raises DatapathError; then the old layout is in force as before."""
    with ExitStack() as stack:
        maps = {}
        for pin in old.iterdir():
            fd = open_pin(pin)
            stack.callback(os.close, fd)
            maps[pin.name] = Map.of(fd, pin.name)
        log.info("another layout of maps is in force", layout=old.name)
        Upgrade(maps, new).run(switch)


def translations(source: Map, target: Map) -> tuple[Translation, Translation] | None:
    """For keys and for values; None: nothing of this map has a place in the new layout."""
    name = source.definition.name
    try:
        if source.definition.type != target.definition.type:
            raise UntranslatableError("it is a map of another kind")
        (old_key, old_value), (new_key, new_value) = map_types(source.fd, name), map_types(target.fd, name)
        key = Translation.between(old_key, new_key)
        if source.definition.type == MapType.LPM_TRIE and not key.is_copy:
            raise UntranslatableError("a prefix of other fields is another prefix")
        return key, Translation.between(old_value, new_value, NOT_MOVED.get(name, ()))
    except (UntranslatableError, BtfError) as error:
        log.error("a map cannot be moved into the new layout", map=name, error=str(error))
        return None


@contextmanager
def frozen(control: Map, bound: int) -> Iterator[int]:
    """The old layout's inspected flows do not change until the time that it gives: CLOCK_MONOTONIC, ns.

    An error ends it at once. Raises FreezeError or BtfError.
    """
    _, layout = map_types(control.fd, "control")
    at = layout.offset("frozen_until") if isinstance(layout, Struct) else None
    if at is None or at % 8:
        raise FreezeError("the maps in force cannot be upgraded: run `isolator restore` first")
    with mmap.mmap(control.fd, mmap.PAGESIZE) as page, memoryview(page) as view, view.cast("Q") as words:
        until = words[at // 8] = time.monotonic_ns() + bound
        try:
            yield until
        except BaseException:
            words[at // 8] = 0
            raise
