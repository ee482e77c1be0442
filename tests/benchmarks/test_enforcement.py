"""Real systems, with their policy and without: the check has to tell them apart."""

from __future__ import annotations

import pytest

from benchmarks.cli import asker
from benchmarks.enforcement import check
from benchmarks.place import place
from benchmarks.systems import all_systems

pytestmark = pytest.mark.root


@pytest.mark.parametrize("policy", [True, False], ids=["policy", "policy off"])
def test_a_broken_system_is_caught(policy: bool) -> None:
    """Every system that is installed here, all up at once as in a race."""
    held: dict[str, bool] = {}
    with place() as made:
        systems = [system for system in all_systems() if not system.missing()]
        try:
            for system in systems:
                route = system.start(made, policy)
                held[system.name] = all(each.ok for each in check("", system, route, asker(made)))
        finally:
            for system in systems:
                system.stop(made)
    assert held.pop("direct"), "it has no policy"
    assert held and held == dict.fromkeys(held, policy)
