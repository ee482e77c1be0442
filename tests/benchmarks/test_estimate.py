"""How long a run takes is told from its points."""

from __future__ import annotations

import pytest

from benchmarks.estimate import AROUND, minutes, point_seconds
from benchmarks.suites import FULL, QUICK, Point, all_suites
from benchmarks.systems import all_systems
from tests.benchmarks.world import MODE, Fake

SYSTEMS = [Fake("direct"), Fake("a"), Fake("b")]


@pytest.mark.parametrize(
    ("point", "seconds"),
    [
        (Point({}, lambda run: {}), 3 * 4 * (AROUND + 1)),
        (Point({}, lambda run: {}, rounds=1, takes=20), 3 * (AROUND + 20)),
        (Point({}, lambda run: {}, not_for=lambda system: "no" * (system.name == "a")), 2 * 4 * (AROUND + 1)),
    ],
)
def test_a_point(point: Point, seconds: float) -> None:
    """MODE: three rounds of 1 s, and one to warm up."""
    assert point_seconds(point, SYSTEMS, MODE) == pytest.approx(seconds)


def test_modes_keep_their_time() -> None:
    """Here, with all systems: quick under 6 minutes, full under 45."""
    assert minutes(all_suites(), all_systems(), QUICK) < 6
    assert minutes(all_suites(), all_systems(), FULL) < 45
