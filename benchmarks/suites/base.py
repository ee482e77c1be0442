"""What a suite has to offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.place import Place, Route
from benchmarks.systems import System


@dataclass(frozen=True, slots=True)
class Mode:
    """How much is run. `warm` rounds are thrown away at each point."""

    name: str
    rounds: int
    seconds: int
    megabytes: int
    warm: int

    @property
    def full(self) -> bool:
        return self.name == "full"


QUICK = Mode("quick", rounds=3, seconds=1, megabytes=256, warm=0)
FULL = Mode("full", rounds=5, seconds=1, megabytes=1024, warm=0)


@dataclass(frozen=True, slots=True)
class Run:
    """One round of one system."""

    place: Place
    system: System
    route: Route
    mode: Mode


def everybody(system: System) -> str:
    return ""


Measure = Callable[[Run], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Point:
    """What is measured in one go: `measure` gives a value for each of `metrics` (metric → unit).

    `rules`: with so many more rules. `rounds`: so many, without a warm-up, instead of the mode's. `takes`: seconds
    of a round, where they are not the mode's. `not_for`: why a system of the suite has no place here.
    """

    metrics: dict[str, str]
    measure: Measure
    rules: int = 0
    rounds: int = 0
    takes: float = 0
    not_for: Callable[[System], str] = everybody


class Suite(Protocol):
    name: str
    about: str

    def points(self, mode: Mode) -> Sequence[Point]: ...

    def not_for(self, system: System) -> str:
        """Why a system has no place in it; empty if it has."""
        ...


class ForAll:
    """A suite in which every system has a place."""

    def not_for(self, system: System) -> str:
        return ""


LOWER_IS_BETTER = ("us", "ms", "s", "MB", "CPU s", "%")


def lower_is_better(unit: str) -> bool:
    return unit in LOWER_IS_BETTER
