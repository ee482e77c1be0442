"""Where the maps are pinned, and what becomes of pins from another version.

    <folder>/v<ISOLATOR_LAYOUT>-<hash of the maps' definitions>/<map>

The folder's name says what lies in it: equal names, equal maps. Such maps are adopted as they are.
Another layout gets a folder of its own beside, made under a provisional name and renamed when it is complete;
the old one goes once the new programs are attached.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from isolator.datapath.abi import LAYOUT_VERSION
from isolator.datapath.libbpf import MapDefinition, MapType, map_definition, open_pin
from isolator.datapath.maps import Map

UNFINISHED = "new-"  # bpffs takes no names with a dot (kernel/bpf/inode.c, bpf_lookup)
_ENTRIES_COPYABLE = (MapType.HASH, MapType.LRU_HASH, MapType.LPM_TRIE, MapType.ARRAY)


def is_private(name: str) -> bool:
    """A program's own scratch memory: nothing to keep, nothing to share."""
    return name.endswith("scratch")


def layout_name(definitions: Iterable[MapDefinition]) -> str:
    shared = sorted(repr(d) for d in definitions if not is_private(d.name))
    return f"v{LAYOUT_VERSION}-{sha256(''.join(shared).encode()).hexdigest()[:10]}"


class PinFolder:
    """The folder for one layout. `fresh`: it did not exist, and is provisional until `finish`."""

    def __init__(self, root: Path, definitions: list[MapDefinition]) -> None:
        self._root = root
        self._final = root / layout_name(definitions)
        self._definitions = {d.name: d for d in definitions}
        remove_folder(self._unfinished)
        self.fresh = not self._final.exists()
        if self.fresh:
            self.path.mkdir(parents=True)
        else:
            self._drop_damaged()

    @property
    def _unfinished(self) -> Path:
        return self._final.with_name(UNFINISHED + self._final.name)

    @property
    def path(self) -> Path:
        return self._unfinished if self.fresh else self._final

    def _drop_damaged(self) -> None:
        """A pin that is not what the folder's name promises was put there by someone else."""
        for pin in list(self._final.iterdir()):
            fd = open_pin(pin)
            try:
                if self._definitions.get(pin.name) != map_definition(fd, pin.name):
                    pin.unlink()
            finally:
                os.close(fd)

    def finish(self) -> None:
        """Give the folder its name: from here on a restart adopts it."""
        if self.fresh:
            self._unfinished.rename(self._final)
            self.fresh = False

    def others(self) -> list[Path]:
        """Folders of other layouts, newest first."""
        found = [path for path in self._root.iterdir() if path.is_dir() and path != self.path]
        return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)

    def predecessor(self) -> Path | None:
        """A complete folder with the same structs in its maps, other bounds: its entries can be copied."""
        same = [
            p for p in self.others() if p.name.startswith(f"v{LAYOUT_VERSION}-") and p.suffix != UNFINISHED
        ]
        return same[0] if same else None


def copy_entries(old: Path, new: dict[str, Map]) -> None:
    """Copy what fits. Raises BpfError when a new map is too small."""
    for name, target in new.items():
        if target.definition.type not in _ENTRIES_COPYABLE or not (old / name).exists():
            continue
        fd = open_pin(old / name)
        try:
            source = Map.of(fd, name)
            if same_entries(source.definition, target.definition):
                target.update_many(source.items())
        finally:
            os.close(fd)


def same_entries(a: MapDefinition, b: MapDefinition) -> bool:
    return (a.key_size, a.value_size) == (b.key_size, b.value_size)


def remove_folder(path: Path) -> None:
    """Unpin everything in it. A map lives on while a program that is attached uses it."""
    if path.is_dir():
        for pin in path.iterdir():
            pin.unlink()
        path.rmdir()
