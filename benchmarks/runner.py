"""A run: systems up → for each suite: check, rounds interleaved (direct, isolator, haproxy, …, direct, …), check.

The order of systems moves on by one from round to round, so that none always follows the same other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.enforcement import Ask, check
from benchmarks.load import BoundedError, LoadError
from benchmarks.place import Place, Route, pin_servers
from benchmarks.record import NOT_UP, Figures, Record, Row, describe, invalidate, rows
from benchmarks.suites import Mode, Point, Run, Suite
from benchmarks.systems import BASELINE, System

Tell = Callable[[str], None]


@dataclass(slots=True)
class Race:
    """`broken`: systems that are started without their policy, to see that the check catches it."""

    place: Place
    mode: Mode
    record: Record
    tell: Tell
    ask: Ask
    saved: Callable[[], None] = lambda: None
    broken: frozenset[str] = frozenset()
    routes: dict[str, Route] = field(default_factory=dict)
    systems: list[System] = field(default_factory=list)
    rules: dict[str, int] = field(default_factory=dict)

    def start(self, systems: Sequence[System]) -> None:
        """All up; who is not installed or does not come up is recorded as missing."""
        for system in systems:
            described = describe(system)
            if not described.missing:
                self.tell(f"starting {system.name}")
                try:
                    self.routes[system.name] = system.start(self.place, system.name not in self.broken)
                    self.systems.append(system)
                    self.rules[system.name] = 0
                except (RuntimeError, OSError) as error:
                    described.missing = f"{NOT_UP}: {error}"
                    with contextlib.suppress(RuntimeError, OSError):
                        system.stop(self.place)
            if described.missing:
                self.tell(f"{system.name} is missing: {described.missing}")
            self.record.systems = [d for d in self.record.systems if d.name != system.name] + [described]
        pin_servers(self.place, {pid for system in self.systems for pid in system.processes()})

    def stop(self) -> None:
        for system in self.systems:
            with contextlib.suppress(RuntimeError, OSError):
                system.stop(self.place)

    def run(self, suites: Sequence[Suite]) -> None:
        """A suite of which every system has its rows is not run again; one that is cut off leaves none."""
        for suite in suites:
            if not suite.points(self.mode):
                continue
            taking_part = self._taking_part(suite)
            if {system.name for system in taking_part} <= self.record.done(suite.name):
                self.tell(f"{suite.name}: there already")
                continue
            self._forget(suite)
            try:
                self._suite(suite, taking_part)
            except BaseException:
                self._forget(suite)
                raise
            self.record.suites[suite.name] = suite.about
            self.saved()

    def _forget(self, suite: Suite) -> None:
        self.record.rows = [row for row in self.record.rows if row.suite != suite.name]
        self.record.checks = [told for told in self.record.checks if told.suite != suite.name]

    def _taking_part(self, suite: Suite) -> list[System]:
        chosen = []
        for system in self.systems:
            why = suite.not_for(system)
            if not why:
                chosen.append(system)
            self._leave_out(suite, system, why)
        return chosen

    def _leave_out(self, suite: Suite, system: System, why: str, metric: str = "") -> None:
        said = {"suite": suite.name, "system": system.name, "why": f"{metric}: {why}" if metric else why}
        if why and said not in self.record.left_out:
            self.record.left_out.append(said)

    def _suite(self, suite: Suite, systems: list[System]) -> None:
        failed = self._check(suite, systems)
        points = suite.points(self.mode)
        for number, point in enumerate(points, 1):
            self.tell(f"{suite.name} {number}/{len(points)}: {', '.join(point.metrics)}")
            self.record.rows += self._point(suite, point, systems)
        failed |= self._check(suite, systems)
        for name in failed:
            invalidate(self.record.rows, name, suite.name)
        for system in systems:
            self._apply(system, 0)

    def _check(self, suite: Suite, systems: list[System]) -> set[str]:
        """Who does not enforce."""
        told = [
            each
            for system in systems
            for each in check(suite.name, system, self.routes[system.name], self.ask)
        ]
        self.record.checks += told
        for each in told:
            if not each.ok:
                self.tell(
                    f"NOT ENFORCED: {each.system}: {each.asked} was answered {each.seen}, not {each.expected}"
                )
        return {each.system for each in told if not each.ok}

    def _point(self, suite: Suite, point: Point, systems: list[System]) -> list[Row]:
        figures: Figures = {}
        errors: dict[str, str] = {}
        bounded: set[str] = set()
        systems = self._with_rules(suite, point, systems, errors)
        warm, rounds = (0, point.rounds) if point.rounds else (self.mode.warm, self.mode.rounds)
        for number in range(-warm, rounds if systems else 0):
            turn = number % len(systems)
            for system in systems[turn:] + systems[:turn]:
                if system.name in errors:
                    continue
                run = Run(self.place, system, self.routes[system.name], self.mode)
                try:
                    told = point.measure(run)
                except (LoadError, RuntimeError, OSError) as error:
                    self.tell(f"{system.name}: {error}")
                    errors[system.name] = str(error)
                    if isinstance(error, BoundedError):
                        bounded.add(system.name)
                        self._leave_out(suite, system, str(error), metric_of(point))
                    continue
                for metric, value in told.items() if number >= 0 else ():
                    figures.setdefault((system.name, metric), []).append(value)
        kept = {key: values for key, values in figures.items() if key[0] not in errors}
        made = rows(suite.name, point.metrics, kept)
        return made + [
            Row(suite.name, name, metric, None, unit, valid=False, error=why)
            for name, why in errors.items()
            if name not in bounded
            for metric, unit in point.metrics.items()
        ]

    def _with_rules(
        self, suite: Suite, point: Point, systems: list[System], errors: dict[str, str]
    ) -> list[System]:
        """Those that take part in a point, with its rules in force."""
        taking_part = []
        for system in systems:
            if why := point.not_for(system):
                self._leave_out(suite, system, why, metric_of(point))
                continue
            taking_part.append(system)
            try:
                self._apply(system, point.rules)
            except (RuntimeError, OSError) as error:
                errors[system.name] = f"{point.rules} rules: {error}"
        return taking_part

    def _apply(self, system: System, rules: int) -> None:
        if self.rules[system.name] == rules or system.name in self.broken:
            return
        system.apply(self.place, rules)
        self.rules[system.name] = rules


def metric_of(point: Point) -> str:
    return next(iter(point.metrics))


def in_order(systems: Sequence[System]) -> list[System]:
    """Direct first: no ratio without it."""
    return sorted(systems, key=lambda system: system.name != BASELINE)
