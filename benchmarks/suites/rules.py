"""What rules cost: so many more allowed paths, or sources and ports, before the one that matters."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.load import wrk
from benchmarks.place import PAGE
from benchmarks.suites.base import ForAll, Mode, Point, Run
from benchmarks.suites.connect import connects

COUNTS = (0, 10, 100, 1_000, 10_000)
QUICK_COUNT = 1_000
ROUNDS, SECONDS = 3, 1  # ten points: cheap ones


def new(rules: int) -> Point:
    metric = f"new connections, {rules} rules"
    return Point({metric: "1/s"}, lambda run: {metric: connects(run, SECONDS)}, rules, ROUNDS, SECONDS)


def kept(rules: int) -> Point:
    metric = f"c32, {rules} rules"

    def measure(run: Run) -> dict[str, float]:
        return {metric: wrk(run.place, run.route, PAGE, 32, SECONDS).rate}

    return Point({metric: "1/s"}, measure, rules, ROUNDS, SECONDS)


class Rules(ForAll):
    name = "rules"
    about = "The connect and http suites again with more rules, none of which is the one that is needed."

    def points(self, mode: Mode) -> Sequence[Point]:
        if not mode.full:
            return [new(QUICK_COUNT)]
        return [make(count) for count in COUNTS for make in (new, kept)]
