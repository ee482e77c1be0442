"""Nobody between the two: the baseline."""

from __future__ import annotations

from benchmarks.place import Place, Route, wait_answer
from benchmarks.systems.base import Kind


class Direct:
    name, kind, layer7, refusal = "direct", Kind.NONE, False, ""
    set_up = "Client and server on one bridge, no isolation. Every ratio is to this."

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return "-"

    def config(self, rules: int = 0, policy: bool = True) -> str:
        return ""

    def start(self, place: Place, policy: bool = True) -> Route:
        route = Route("client", place.container("plain"), "plain")
        wait_answer(place, route)
        return route

    def apply(self, place: Place, rules: int) -> None: ...

    def stop(self, place: Place) -> None: ...

    def processes(self) -> list[int]:
        return []
