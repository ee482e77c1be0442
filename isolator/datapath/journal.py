"""The journal: what a splice has to put back, on disk before the first step that cannot be undone without it.

One JSON file per endpoint, written whole or not at all (temporary file, fsync, rename, fsync of the folder).
A file that cannot be read stands in the way of its own endpoint alone: `entries` passes over it. One that has not
changed since it was read is not read again: each splice looks at all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from isolator.datapath.netns import SpliceError
from isolator.datapath.snapshot import Snapshot

FORMAT = 1


class Phase(StrEnum):
    """How far a splice has come; whatever is not SPLICED was interrupted and is put back."""

    SPLICING = "splicing"
    SPLICED = "spliced"
    RESTORING = "restoring"


@dataclass(frozen=True, slots=True)
class Entry:
    """One endpoint's splice. Ports have their names from the first, their ifindexes later (0: not yet)."""

    name: str
    netns: str
    cookie: int  # of the container's netns
    boot: str  # ifindexes and cookies mean nothing after the next boot
    interface: str
    container_port_name: str
    network_port_name: str
    container_port: int
    network_port: int
    phase: Phase
    snapshot: Snapshot

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {"format": FORMAT, **fields, "snapshot": self.snapshot.to_json()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Entry:
        if fields.pop("format") != FORMAT:
            raise ValueError("another version's format")
        phase, snapshot = Phase(fields["phase"]), Snapshot.from_json(fields["snapshot"])
        return cls(**{**fields, "phase": phase, "snapshot": snapshot})


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Journal:
    """The entries under one folder, which is made with the first of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, tuple[tuple[int, int, int], Entry]] = {}  # by name, with the file's stamp

    def write(self, entry: Entry) -> None:
        """Replace the endpoint's entry; on return it is on disk."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(entry.name)
        draft = path.with_suffix(".draft")
        with draft.open("w") as file:
            file.write(json.dumps(entry.to_json()))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        self._sync()

    def read(self, name: str) -> Entry | None:
        """The endpoint's entry, None where there is none; raises SpliceError for one that cannot be read."""
        path = self._path(name)
        try:
            status = path.stat()
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            known = self._read.get(name)
            if known is None or known[0] != stamp:
                known = self._read[name] = (stamp, Entry.from_json(json.loads(path.read_text())))
            return known[1]
        except FileNotFoundError:
            self._read.pop(name, None)
            return None
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise SpliceError(
                f"{path}: no journal entry of this version ({error}); use the one that wrote it"
            ) from error

    def entries(self) -> Iterator[Entry]:
        """Those that can be read."""
        for name in self._names():
            with contextlib.suppress(SpliceError):
                entry = self.read(name)
                if entry is not None:
                    yield entry

    def unreadable(self) -> Iterator[SpliceError]:
        """One error for each file that `entries` passes over; it names the file."""
        for name in self._names():
            try:
                self.read(name)
            except SpliceError as error:
                yield error

    def remove(self, name: str) -> None:
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            return
        self._sync()

    def _names(self) -> list[str]:
        return [unquote(path.name.removesuffix(".json")) for path in sorted(self.folder.glob("*.json"))]

    def _path(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.json"

    def _sync(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
