"""CPU seconds and memory."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.load import busy_seconds, iperf, process_seconds, wrk
from benchmarks.place import PAGE, resident
from benchmarks.suites.base import ForAll, Mode, Point, Run


def of_requests(run: Run) -> dict[str, float]:
    """Of the whole machine: client, server, kernel and system."""
    before = busy_seconds()
    told = wrk(run.place, run.route, PAGE, 32, run.mode.seconds)
    cost = (busy_seconds() - before) / told.requests * 1e6
    return {"a million requests": cost, "memory": sum(map(resident, run.system.processes()))}


def of_bytes(run: Run) -> dict[str, float]:
    before, began = busy_seconds(), time.monotonic()
    rate = iperf(run.place, run.route, 1, run.mode.seconds)
    sent = rate * 1e9 / 8 * min(run.mode.seconds, time.monotonic() - began)
    return {"a terabyte": (busy_seconds() - before) / sent * 1e12}


def idle(run: Run) -> dict[str, float]:
    """% of one CPU that the system's processes take without traffic."""
    before, began = sum(map(process_seconds, run.system.processes())), time.monotonic()
    time.sleep(run.mode.seconds)
    taken = sum(map(process_seconds, run.system.processes())) - before
    return {"idle": 100 * taken / (time.monotonic() - began)}


class Cost(ForAll):
    name = "cost"
    about = (
        "CPU seconds of the whole machine, client and server included, since work in the kernel belongs to no process; "
        "resident memory of the system's processes after load (0: it has none), and what they take of a CPU while idle."
    )

    def points(self, mode: Mode) -> Sequence[Point]:
        points = [
            Point({"a million requests": "CPU s", "memory": "MB"}, of_requests),
            Point({"a terabyte": "CPU s"}, of_bytes),
            Point({"idle": "%"}, idle),
        ]
        return points if mode.full else points[:1]
