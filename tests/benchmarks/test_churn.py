"""An edit and when it shows: what the prober prints, who takes part."""

from __future__ import annotations

import json

import pytest

from benchmarks.load import LoadError
from benchmarks.prober import Prober, first_seen
from benchmarks.suites.base import FULL, QUICK
from benchmarks.suites.churn import Churn
from benchmarks.systems import Editable, System, all_systems

PROBER = Prober("web", "10.9.0.2", "/extra/page", "403", never="/admin")
SYSTEMS = {system.name: system for system in all_systems()}


def printed(first: int, seen: str = "403", leaked: int = 0) -> str:
    return json.dumps({"first": first, "seen": seen, "leaked": leaked})


def test_when_it_showed() -> None:
    assert first_seen(printed(5_000_000), PROBER) == 5_000_000


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (printed(0, "200"), "answered 200 for 60 s, not 403"),
        (printed(5, leaked=2), "/admin was answered 200"),
    ],
)
def test_what_never_showed_or_leaked_is_no_figure(line: str, why: str) -> None:
    with pytest.raises(LoadError, match=why):
        first_seen(line, PROBER)


def test_who_takes_part() -> None:
    left_out = {name for name, system in SYSTEMS.items() if Churn().not_for(system)}
    assert left_out == {"direct", "suricata"}
    start = Churn().points(FULL)[-1]
    assert {name for name in SYSTEMS if not start.not_for(SYSTEMS[name])} == {"isolator"}
    assert len(Churn().points(QUICK)) == 1


@pytest.mark.parametrize("name", [name for name in SYSTEMS if not Churn().not_for(SYSTEMS[name])])
def test_the_edit_opens_what_was_closed(name: str) -> None:
    """In the configuration, or in the file that stands beside HAProxy's."""
    system: System = SYSTEMS[name]
    assert isinstance(system, Editable)
    if name != "haproxy":
        opened = system.config(extra=True)  # type: ignore[call-arg]
        what = "/extra/" if system.layer7 else "9090"
        assert what in opened and what not in system.config()
