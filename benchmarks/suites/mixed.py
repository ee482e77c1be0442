"""Allowed requests while others are refused all the time."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.load import mixed, wrk
from benchmarks.policy import ALLOWED, DENIED
from benchmarks.suites.base import Mode, Point, Run
from benchmarks.systems import BASELINE, System

CONNECTIONS = 16


def measure(run: Run) -> dict[str, float]:
    """The direct path refuses nothing: there, the same number of connections asks for what is allowed."""
    if run.system.name == BASELINE:
        rate = wrk(run.place, run.route, ALLOWED, 2 * CONNECTIONS, run.mode.seconds).rate
        return {"allowed": rate / 2, "refused": rate / 2}
    good, refused = mixed(run.place, run.route, ALLOWED, DENIED, CONNECTIONS, run.mode.seconds)
    return {"allowed": good.rate, "refused": refused.rate}


class Mixed:
    name = "mixed"
    about = (
        f"Two generators of {CONNECTIONS} connections at once, one asking for what is forbidden. Direct: half of "
        "what 32 connections get."
    )

    def points(self, mode: Mode) -> Sequence[Point]:
        return [Point({"allowed": "1/s", "refused": "1/s"}, measure)]

    def not_for(self, system: System) -> str:
        if system.name == "suricata":
            return "drops what is forbidden without an answer, so that nothing is left to count"
        return "" if system.layer7 or system.name == BASELINE else "layer 4 only: it refuses no request"
