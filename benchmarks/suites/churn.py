"""How long a change takes until it holds: a policy that is edited, a container that starts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.load import LoadError
from benchmarks.place import EXTRA, EXTRA_PORT, HTTP
from benchmarks.policy import ALLOWED, DENIED
from benchmarks.prober import Prober, probing
from benchmarks.suites.base import Mode, Point, Run
from benchmarks.systems import BASELINE, Editable, System
from benchmarks.systems.isolator import NEWCOMER
from isolator.lab import wait_for

RULES = 1_000
SILENT = 0.01  # s that a layer-4 system's prober waits for what may never come: so coarse are its figures
STARTED = "container start to allowed"


def edit(rules: int) -> Point:
    """Opens a path (layer 4: a port) and closes it again."""
    opening, closing = (f"edit to {what}, {rules} rules" for what in ("allowed", "denied"))

    def measure(run: Run) -> dict[str, float]:
        try:
            opened = edited(run, rules, True)
        finally:
            closed = edited(run, rules, False)
        return {opening: opened, closing: closed}

    return Point({opening: "ms", closing: "ms"}, measure, rules, takes=0.8)


def edited(run: Run, rules: int, extra: bool) -> float:
    """From the moment the edit begins to be written, the reload command included, in ms."""
    assert isinstance(run.system, Editable)
    wanted = "200" if extra else run.system.refusal
    port, within = (HTTP, 0.25) if run.system.layer7 else (EXTRA_PORT, SILENT)
    with probing(Prober(run.route.client, run.route.host, EXTRA, wanted, port, within)) as probe:
        before = probe.begin()
        began = time.monotonic_ns()
        run.system.edit(run.place, rules, extra)
        if before == wanted:
            raise LoadError(f"{EXTRA} was answered {before} before the edit")
        return (probe.seen() - began) / 1e6


def started(run: Run) -> dict[str, float]:
    """A new container, a client; from when its interface is up. What is forbidden it must never get."""
    prober = Prober(NEWCOMER, run.route.host, ALLOWED, "200", never=DENIED)
    with probing(prober) as probe, run.place.newcomer(NEWCOMER):
        began = time.monotonic_ns()
        probe.begin()
        took = (probe.seen() - began) / 1e6
    wait_for(lambda: not enforced(run), "the agent does not see that the container is gone")
    return {STARTED: took}


def enforced(run: Run) -> bool:
    endpoints = run.place.lab.ask("/v1/status")["endpoints"]
    return any(each["name"] == NEWCOMER and each["state"] == "enforced" for each in endpoints)


def not_started(system: System) -> str:
    return (
        ""
        if system.name == "isolator"
        else "its policy does not choose by container: somebody has to write addresses"
    )


class Churn:
    name = "churn"
    about = (
        "From the beginning of an edit of the policy, the system's own reload included, to the first answer from which "
        "on all show it; a new connection for every answer (layer 4: to within 10 ms). In full also from a container's "
        "start to its first allowed answer, in which time a forbidden one must not be answered."
    )

    def points(self, mode: Mode) -> Sequence[Point]:
        start = Point({STARTED: "ms"}, started, takes=1.5, not_for=not_started)
        return [edit(0), edit(RULES), start] if mode.full else [edit(0)]

    def not_for(self, system: System) -> str:
        if system.name == BASELINE:
            return "it has no policy"
        return (
            ""
            if isinstance(system, Editable)
            else "drops what is forbidden without an answer that would show it"
        )
