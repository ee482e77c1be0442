"""What the terminating proxies share: a container of their own, one process, a file or two of configuration."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from benchmarks.place import Place, Route, wait_answer
from benchmarks.policy import rule_path
from benchmarks.systems.base import Kind, absent, search_path, told_version
from isolator.lab import wait_for

PLAIN = "PLAIN"
"""Stands in a configuration for the server's address until that is known."""


class Proxy:
    """Subclasses say `name`, `commands`, `asks_version`, `set_up`, `config`, `command` and `reload`."""

    name: str
    kind = Kind.PROXY
    layer7, refusal = True, "403"
    set_up: str
    commands: tuple[str, ...]
    asks_version: tuple[str, ...]

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._route: Route | None = None

    def missing(self) -> str:
        return absent(*self.commands)

    def version(self) -> str:
        return told_version(found(self.commands[0]), *self.asks_version)

    def config(self, rules: int = 0, policy: bool = True, extra: bool = False) -> str:
        raise NotImplementedError

    def command(self, folder: Path) -> tuple[str, ...]:
        """What runs it on `folder`/config."""
        raise NotImplementedError

    def reload(self, place: Place, folder: Path) -> None:
        """Has what was written taken up while it runs."""
        raise NotImplementedError

    def start(self, place: Place, policy: bool = True) -> Route:
        self._route = Route("client", place.container(self.name), "plain")
        self._run(place, 0, policy)
        return self._route

    def apply(self, place: Place, rules: int) -> None:
        self.stop(place)
        self._run(place, rules, True)
        assert self._route is not None
        if rules:
            url = self._route.url(rule_path(rules - 1))
            wait_for(
                lambda: place.lab.curl("client", url) == "404", f"{self.name}: {rules} rules are not there"
            )

    def edit(self, place: Place, rules: int, extra: bool) -> None:
        self.reload(place, self._written(place, rules, True, extra))

    def _written(self, place: Place, rules: int, policy: bool, extra: bool = False) -> Path:
        folder = place.lab.root / self.name
        folder.mkdir(exist_ok=True)
        config = self.config(rules, policy, extra).replace(PLAIN, place.container("plain"))
        self.write(folder, config, rules, extra)
        return folder

    def _run(self, place: Place, rules: int, policy: bool) -> None:
        folder = self._written(place, rules, policy)
        self._process = place.start(self.name, *self.command(folder))
        assert self._route is not None
        wait_answer(place, self._route)

    def write(self, folder: Path, config: str, rules: int, extra: bool) -> None:
        (folder / "config").write_text(config.replace("FOLDER", str(folder)))

    def stop(self, place: Place) -> None:
        if self._process is not None:
            place.end(self._process)
            self._process = None

    def processes(self) -> list[int]:
        return [self._process.pid] if self._process is not None else []


def found(command: str) -> str:
    return shutil.which(command, path=search_path()) or command
