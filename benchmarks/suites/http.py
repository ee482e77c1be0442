"""Keep-alive HTTP (wrk, one thread) by number of connections, size of the head and size of the answer."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.load import BROWSER, wrk
from benchmarks.place import PAGE
from benchmarks.suites.base import ForAll, Mode, Point, Run


def point(connections: int, browser: bool, path: str) -> Point:
    metric = f"c{connections}, {'browser' if browser else 'small'} head, {path.rpartition('/')[2]}"

    def measure(run: Run) -> dict[str, float]:
        headers = BROWSER if browser else ()
        return {metric: wrk(run.place, run.route, path, connections, run.mode.seconds, headers).rate}

    return Point({metric: "1/s"}, measure)


class Http(ForAll):
    name = "http"
    about = "Requests a second on kept-alive connections."

    def points(self, mode: Mode) -> Sequence[Point]:
        if not mode.full:
            return [point(32, False, PAGE)]
        few = [point(connections, False, PAGE) for connections in (1, 32, 256)]
        return [*few, point(32, True, PAGE), point(32, False, "/api/v1/100k")]
