"""Where the maps are pinned, and which of several layouts is in force.

    <folder>/classifier                                               the program that every port runs
    <folder>/v<ISOLATOR_LAYOUT>-<hash of the maps' definitions>/<map>

A layout's folder says by its name what lies in it: equal names, equal maps. In force is the one whose maps the program
in `classifier` uses. Such maps are adopted as they are. Another layout gets a folder of its own beside, and comes into
force by the one store that puts its program there; what stands beside without being in force is half made or done with.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from isolator.datapath.abi import LAYOUT_VERSION
from isolator.datapath.libbpf import MapDefinition, map_definition, map_information, maps_of, open_pin
from isolator.datapath.maps import Map

CLASSIFIER = "classifier"  # the map; it belongs to no layout
SLOT = bytes(4)  # its only key


def is_private(name: str) -> bool:
    """A program's own scratch memory: nothing to keep, nothing to share."""
    return name.endswith("scratch")


def is_laid_out(name: str) -> bool:
    """Whether the map belongs to a layout and is pinned in its folder."""
    return not is_private(name) and name != CLASSIFIER


def layout_name(definitions: Iterable[MapDefinition]) -> str:
    shared = sorted(repr(d) for d in definitions if is_laid_out(d.name))
    return f"v{LAYOUT_VERSION}-{sha256(''.join(shared).encode()).hexdigest()[:10]}"


class PinFolder:
    """The folder for one layout. `fresh`: nothing was adopted; `predecessor`: the layout in force, if it is another."""

    def __init__(self, root: Path, definitions: list[MapDefinition]) -> None:
        self._root = root
        self._definitions = {d.name: d for d in definitions}
        self.path = root / layout_name(definitions)
        current = in_force(root)
        self.fresh = current != self.path
        self.predecessor = current if self.fresh else None
        if self.fresh:
            remove_folder(self.path)
            self.path.mkdir(parents=True)
        else:
            self._drop_damaged()

    @property
    def classifier(self) -> Path:
        return self._root / CLASSIFIER

    def _drop_damaged(self) -> None:
        """A pin that is not what the folder's name promises was put there by someone else."""
        for pin in list(self.path.iterdir()):
            fd = open_pin(pin)
            try:
                if self._definitions.get(pin.name) != map_definition(fd, pin.name):
                    pin.unlink()
            finally:
                os.close(fd)

    def others(self) -> list[Path]:
        """Folders of other layouts."""
        return [path for path in layouts(self._root) if path != self.path]


def layouts(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def in_force(root: Path) -> Path | None:
    """The layout whose maps the ports' program uses; None: no program was put there yet. Raises BpfError."""
    used = _used(root / CLASSIFIER)
    return next((path for path in layouts(root) if any(_map_id(pin) in used for pin in path.iterdir())), None)


def _used(classifier: Path) -> set[int]:
    if not classifier.exists():
        return set()
    fd = open_pin(classifier)
    try:
        program = Map.of(fd, CLASSIFIER).lookup(SLOT)
    finally:
        os.close(fd)
    return maps_of(int.from_bytes(program, "little")) if program else set()


def _map_id(pin: Path) -> int:
    fd = open_pin(pin)
    try:
        return int(map_information(fd, pin.name).id)
    finally:
        os.close(fd)


def remove_folder(path: Path) -> None:
    """Unpin everything in it. A map lives on while a program that is attached uses it."""
    if path.is_dir():
        for pin in path.iterdir():
            pin.unlink()
        path.rmdir()


def unpin(root: Path) -> None:
    """Take all pins of an agent away, of every layout. A port that is still attached then lets nothing through."""
    for path in layouts(root):
        remove_folder(path)
    remove_folder(root)
