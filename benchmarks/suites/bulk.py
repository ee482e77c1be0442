"""One and eight TCP flows as fast as they go (iperf3), on a port that layer 4 allows."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.load import iperf
from benchmarks.suites.base import ForAll, Mode, Point, Run


def point(flows: int, reverse: bool) -> Point:
    metric = f"{'down' if reverse else 'up'}, {flows} flow{'s' if flows > 1 else ''}"

    def measure(run: Run) -> dict[str, float]:
        return {metric: iperf(run.place, run.route, flows, run.mode.seconds, reverse)}

    return Point({metric: "Gbit/s"}, measure)


class Bulk(ForAll):
    name = "bulk"
    about = "TCP throughput on an allowed port. Up: from client to server."

    def points(self, mode: Mode) -> Sequence[Point]:
        both = [(1, False), (1, True), (8, False), (8, True)]
        return [point(flows, reverse) for flows, reverse in (both if mode.full else both[:1])]
