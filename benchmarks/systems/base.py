"""What a system of the race has to offer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

from benchmarks.place import Place, Route


class Kind(StrEnum):
    """How a system stands in the way: a terminating proxy ends the connection and opens one of its own."""

    NONE = "nothing"
    KERNEL = "kernel"
    INLINE = "inline"
    PROXY = "terminating proxy"


class System(Protocol):
    """An adapter: the policy in this system's language, and how to start and stop it.

    `refusal`: the status that a forbidden request gets, 000 for none.
    `set_up` says in the report what was done so that the comparison is fair.
    """

    name: str
    kind: Kind
    layer7: bool
    refusal: str
    set_up: str

    def missing(self) -> str:
        """Why it cannot take part; empty if it can."""
        ...

    def version(self) -> str: ...

    def config(self, rules: int = 0, policy: bool = True) -> str:
        """The policy translated. Without `policy`, everything is let through: to try the enforcement check."""
        ...

    def start(self, place: Place, policy: bool = True) -> Route:
        """Brings it up, with the policy in force when it returns."""
        ...

    def apply(self, place: Place, rules: int) -> None:
        """The policy with so many more rules, in force when it returns."""
        ...

    def stop(self, place: Place) -> None: ...

    def processes(self) -> list[int]:
        """Whose memory and CPU are the system's."""
        ...


@runtime_checkable
class Editable(System, Protocol):
    """A system whose policy can be edited while it runs, with an answer that shows when the edit holds."""

    def edit(self, place: Place, rules: int, extra: bool) -> None:
        """Writes the policy, with so many more rules and with what `extra` opens or without, and does what its
        operator would do to have it taken up. Does not wait until it is."""
        ...


def absent(*commands: str) -> str:
    """Which of these commands is not installed, said as a reason."""
    lacking = [command for command in commands if shutil.which(command, path=search_path()) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def search_path() -> str:
    """PATH, with where the harness's own Python keeps commands, and the system's."""
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def told_version(*command: str) -> str:
    """The first thing that looks like a version in what a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError:
        return "unknown"
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else "unknown"
