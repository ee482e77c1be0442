"""A system, a suite and a record of the tests' own: no network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from benchmarks.place import Place, Route
from benchmarks.record import Record
from benchmarks.runner import Race
from benchmarks.suites.base import Mode, Point, Run
from benchmarks.systems import Kind, System

MODE = Mode("quick", rounds=3, seconds=1, megabytes=1, warm=1)


@dataclass
class Fake:
    """Answers as a system with a policy does, `broken` one without."""

    name: str
    layer7: bool = True
    broken: bool = False
    absent: str = ""
    kind: Kind = Kind.PROXY
    set_up: str = "none"
    refusal: str = "403"
    applied: list[int] = field(default_factory=list)

    def missing(self) -> str:
        return self.absent

    def version(self) -> str:
        return "1.0"

    def config(self, rules: int = 0, policy: bool = True) -> str:
        return f"{self.name}: {rules}"

    def start(self, place: Place, policy: bool = True) -> Route:
        self.broken = self.broken or not policy
        return Route("client", self.name, "server")

    def apply(self, place: Place, rules: int) -> None:
        self.applied.append(rules)

    def stop(self, place: Place) -> None: ...

    def processes(self) -> list[int]:
        return []


@dataclass
class Figures:
    """A suite that hands out figures: a value a round of each system; a text is an error."""

    values: dict[str, list[Any]]
    name: str = "http"
    about: str = "figures"
    only: str = ""
    asked: list[str] = field(default_factory=list)
    rules: int = 0

    def points(self, mode: Mode) -> list[Point]:
        return [Point({"rate": "1/s"}, self.measure, self.rules)]

    def measure(self, run: Run) -> dict[str, float]:
        self.asked.append(run.system.name)
        value = self.values[run.system.name][self.asked.count(run.system.name) - 1]
        if isinstance(value, Exception):
            raise value
        if isinstance(value, str):
            raise RuntimeError(value)
        return {"rate": value}

    def not_for(self, system: System) -> str:
        return "not its race" if system.name == self.only else ""


@dataclass
class NoLab:
    processes: list[Any] = field(default_factory=list)
    root: Path = Path("/nonexistent")


def race(systems: list[Fake], broken: frozenset[str] = frozenset(), record: Record | None = None) -> Race:
    """Up and ready. A request for what is forbidden is answered 200 by who is broken."""
    by_name = {system.name: system for system in systems}

    def ask(route: Route, path: str, port: int, method: str) -> str:
        system = by_name[route.host]
        forbidden = path.startswith("/admin") or method == "POST" if system.layer7 else port != 80
        return system.refusal if forbidden and not system.broken else "200"

    made = Race(
        Place(cast(Any, NoLab())),
        MODE,
        record or Record({"mode": "quick"}),
        lambda line: None,
        ask,
        broken=broken,
    )
    made.start(systems)
    return made
