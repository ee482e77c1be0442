"""Is the policy in force? What it allows has to pass, what it forbids has to fail, or the figures mean nothing."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.place import FORBIDDEN_PORT, HTTP, Route
from benchmarks.policy import ALLOWED, DENIED
from benchmarks.record import Check
from benchmarks.systems import BASELINE, System

Ask = Callable[[Route, str, int, str], str]
"""(route, path, port, method) → the status, 000 without an answer."""


def check(suite: str, system: System, route: Route, ask: Ask) -> list[Check]:
    """A layer-7 system has to refuse a path and a method, a layer-4 system a port."""
    allowed = ask(route, ALLOWED, HTTP, "GET")
    told = [Check(suite, system.name, f"GET {ALLOWED}", "200", allowed, allowed == "200")]
    if system.name == BASELINE:
        return told
    if system.layer7:
        forbidden = [(DENIED, HTTP, "GET"), (ALLOWED, HTTP, "POST")]
    else:
        forbidden = [(ALLOWED, FORBIDDEN_PORT, "GET")]
    for path, port, method in forbidden:
        seen = ask(route, path, port, method)
        asked = f"{method} {path}" + (f" on port {port}" if port != HTTP else "")
        told.append(Check(suite, system.name, asked, system.refusal, seen, seen == system.refusal))
    return told
