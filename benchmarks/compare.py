"""Two records side by side: which ratios to direct moved by more than the noise allows."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.record import NOISY, Record, Row
from benchmarks.suites import lower_is_better
from benchmarks.systems import BASELINE

Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Change:
    """`change`: of the ratio to direct (of the value, where there is none), 0.1 for 10 % more."""

    suite: str
    system: str
    metric: str
    old: float
    new: float
    change: float
    noisy: bool
    verdict: str


def compare(old: Record, new: Record) -> list[Change]:
    """Rows that both have, in the new one's order. Direct is left out: it is the measure of the others."""
    before = {key(row): row for row in old.rows}
    told = []
    for row in new.rows:
        other = before.get(key(row))
        if other is None or row.system == BASELINE:
            continue
        was, now = figure(other), figure(row)
        if not was or now is None:
            continue
        change = now / was - 1
        noisy = row.noisy or other.noisy
        verdict = judge(change, row.unit, noisy)
        told.append(Change(*key(row), was, now, round(change, 4), noisy, verdict))
    return told


def key(row: Row) -> Key:
    return row.suite, row.system, row.metric


def figure(row: Row) -> float | None:
    if not row.valid:
        return None
    return row.value if row.ratio_to_direct is None else row.ratio_to_direct


def judge(change: float, unit: str, noisy: bool) -> str:
    if abs(change) <= NOISY:
        return "same"
    if noisy:
        return "noisy"
    return "better" if (change < 0) == lower_is_better(unit) else "worse"


def lost(old: Record, new: Record) -> list[str]:
    """What has a figure in the old one and none in the new."""
    now = {key(row) for row in new.rows if figure(row) is not None}
    return [", ".join(key(row)) for row in old.rows if figure(row) is not None and key(row) not in now]
