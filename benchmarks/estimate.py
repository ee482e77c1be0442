"""How long a run takes, from its points: said before it begins."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.suites import Mode, Point, Suite
from benchmarks.systems import System

AROUND = 0.4
"""s of a round besides its measurement: starting a load generator, connecting, reading what it printed."""

UP_AND_DOWN = 15  # s for the place and its systems
CHECKS = 0.15  # s of one system's checks around a suite
RULES = 0.0004  # s to bring one more rule into force and to take it back, the median of the systems


def minutes(suites: Sequence[Suite], systems: Sequence[System], mode: Mode) -> float:
    total = float(UP_AND_DOWN)
    for suite in suites:
        taking_part = [system for system in systems if not suite.not_for(system)]
        points = suite.points(mode)
        total += CHECKS * len(taking_part) * bool(points)
        total += sum(point_seconds(point, taking_part, mode) for point in points)
    return total / 60


def point_seconds(point: Point, systems: Sequence[System], mode: Mode) -> float:
    taking_part = sum(not point.not_for(system) for system in systems)
    rounds = point.rounds or mode.rounds + mode.warm
    return taking_part * (rounds * (AROUND + (point.takes or mode.seconds)) + point.rules * RULES)
