"""What a run leaves: where and how it was run, checks, rows. One JSON file, written after every suite."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.suites import Mode
from benchmarks.systems import BASELINE, System

NOISY = 0.10
"""A spread above this makes a row noisy: another run need not agree with it within 10 %."""


NOT_UP = "did not come up"
"""Begins the reason of a system that is installed and is missing all the same: that fails a run."""


class RecordError(Exception):
    """A file is not a record, or not one that this run can go on with."""


@dataclass(slots=True)
class Row:
    """`ratio_to_direct`: median of the rounds' own ratios. `spread`: of those ratios (of values, for direct), the
    interquartile range by the median. Without a value: `error` says why."""

    suite: str
    system: str
    metric: str
    value: float | None
    unit: str
    ratio_to_direct: float | None = None
    spread: float | None = None
    noisy: bool = False
    valid: bool = True
    rounds: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One request of the enforcement check: what was asked, what had to be seen and what was."""

    suite: str
    system: str
    asked: str
    expected: str
    seen: str
    ok: bool


@dataclass(slots=True)
class Described:
    """A system as the report prints it. `missing`: why it took no part."""

    name: str
    kind: str
    layer7: bool
    version: str
    set_up: str
    config: str
    missing: str = ""


@dataclass(slots=True)
class Record:
    about: dict[str, Any]
    systems: list[Described] = field(default_factory=list)
    suites: dict[str, str] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def save(self, file: Path) -> None:
        draft = file.with_name(file.name + ".draft")
        draft.write_text(json.dumps(asdict(self), indent=1) + "\n")
        draft.replace(file)

    def done(self, suite: str) -> set[str]:
        """Systems of which this suite has rows, none of them an error."""
        rows = [row for row in self.rows if row.suite == suite]
        return {row.system for row in rows} - {row.system for row in rows if row.error}

    def failed(self) -> list[str]:
        """What makes the run fail."""
        checks = [
            f"{c.system}, {c.suite}: {c.asked}: {c.seen}, not {c.expected}" for c in self.checks if not c.ok
        ]
        down = [f"{s.name}: {s.missing}" for s in self.systems if s.missing.startswith(NOT_UP)]
        return down + checks + [f"{r.system}, {r.suite}, {r.metric}: {r.error}" for r in self.rows if r.error]

    def noise(self) -> float | None:
        """The median spread of direct's own rows: what this machine's figures are worth."""
        spreads = [row.spread for row in self.rows if row.system == BASELINE and row.spread is not None]
        return statistics.median(spreads) if spreads else None


def load(file: Path) -> Record:
    try:
        told = json.loads(file.read_text())
        return Record(
            about=told["about"],
            systems=[Described(**each) for each in told["systems"]],
            suites=told["suites"],
            left_out=told["left_out"],
            checks=[Check(**each) for each in told["checks"]],
            rows=[Row(**each) for each in told["rows"]],
        )
    except OSError as error:
        raise RecordError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file}: not a record of the benchmarks: {error}") from error


def describe(system: System) -> Described:
    missing = system.missing()
    version = "" if missing else system.version()
    return Described(
        system.name, system.kind, system.layer7, version, system.set_up, system.config().strip(), missing
    )


def about(mode: Mode) -> dict[str, Any]:
    """The machine, the versions, the commit, the method."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+([0-9]+)", Path("/proc/meminfo").read_text())
    return {
        "mode": mode.name,
        "rounds": mode.rounds,
        "seconds": mode.seconds,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "cpus": os.cpu_count(),
        "cpu": model[1] if model else "unknown",
        "memory_gb": round(int(memory[1]) / 1e6, 1) if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """Of the tree that is measured; `+` where it has changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


# -- rounds to rows ----------------------------------------------------------------------------------------

Figures = dict[tuple[str, str], list[float]]
"""(system, metric) → a value a round."""


def spread(values: list[float]) -> float | None:
    """Interquartile range by the median."""
    middle = statistics.median(values) if values else 0
    if len(values) < 2 or not middle:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return round((high - low) / middle, 4)


def rows(suite: str, units: dict[str, str], figures: Figures) -> list[Row]:
    """One row for each system and metric. Figures of a round stand at the same place in every list."""
    told = []
    for (system, metric), values in figures.items():
        base = figures.get((BASELINE, metric))
        ratios = None
        if base is not None and len(base) == len(values) and all(base):
            ratios = [value / against for value, against in zip(values, base, strict=True)]
        of = values if system == BASELINE or ratios is None else ratios
        told.append(
            Row(
                suite, system, metric, significant(statistics.median(values)), units[metric],
                significant(statistics.median(ratios)) if ratios else None,
                spread(of), (spread(of) or 0) > NOISY, True, len(values),
            )
        )  # fmt: skip
    return told


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def invalidate(rows_: Iterable[Row], system: str, suite: str) -> None:
    for row in rows_:
        if (row.system, row.suite) == (system, suite):
            row.valid = False
