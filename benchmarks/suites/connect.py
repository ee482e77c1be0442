"""A new connection for every request."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.load import wrk
from benchmarks.place import PAGE
from benchmarks.suites.base import ForAll, Mode, Point, Run

CONNECTIONS = 16


def connects(run: Run, seconds: int) -> float:
    return wrk(run.place, run.route, PAGE, CONNECTIONS, seconds, ("Connection: close",)).rate


class Connect(ForAll):
    name = "connect"
    about = f"New connections a second, one request on each, {CONNECTIONS} at a time."

    def points(self, mode: Mode) -> Sequence[Point]:
        def measure(run: Run) -> dict[str, float]:
            return {"new connections": connects(run, run.mode.seconds)}

        return [Point({"new connections": "1/s"}, measure)]
