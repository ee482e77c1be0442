"""A record as pictures (matplotlib, SVG): one a question that a person has."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.record import Record, Row
from benchmarks.systems import BASELINE

COLOURS = {
    "direct": "#8a8f98", "isolator": "#d1495b", "isolator-python": "#e8998d", "haproxy": "#30638e", "nginx": "#3c8d5a",
    "envoy": "#7a4ea3", "suricata": "#c98a1b", "iptables": "#5f9ea0", "nftables": "#3a7d7c",
}  # fmt: skip
WIDE = 8.0
PREFERRED = (("http", "c32, small head, 1k"), ("connect", "new connections"))


def plots(record: Record) -> Iterator[tuple[str, str]]:
    """(title, SVG) of each plot for which there are rows."""
    chosen: dict[str, Callable[[Any, Record], bool]] = {
        "Requests a second": lambda ax, r: bars(ax, r, "http", "1/s"),
        "Time of a request, one connection": latencies,
        "New connections a second": lambda ax, r: bars(ax, r, "connect", "1/s"),
        "Bulk throughput": lambda ax, r: bars(ax, r, "bulk", "Gbit/s"),
        "New connections against the number of rules": by_rules,
        "CPU seconds of the machine for a million requests": cpu,
    }
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "race", "axes.spines.top": False, "axes.spines.right": False}):
        for title, draw in chosen.items():
            figure, ax = plt.subplots(figsize=(WIDE, 3.6), layout="constrained")
            if draw(ax, record):
                out = io.StringIO()
                figure.savefig(out, format="svg", metadata={"Date": None})
                yield title, out.getvalue()
            plt.close(figure)


def usable(record: Record, suite: str) -> list[Row]:
    return [row for row in record.rows if row.suite == suite and row.valid and row.value is not None]


def bars(ax: Any, record: Record, suite: str, unit: str, metric: str = "") -> bool:
    """A bar a system, of the suite's preferred or first metric, with the ratio at its end."""
    rows = usable(record, suite)
    if not rows:
        return False
    wanted = metric or dict(PREFERRED).get(suite) or rows[0].metric
    rows = [row for row in rows if row.metric == wanted] or [r for r in rows if r.metric == rows[0].metric]
    rows.sort(key=lambda row: row.value or 0)
    drawn = ax.barh(
        [row.system for row in rows], [row.value for row in rows], color=[COLOURS.get(r.system) for r in rows]
    )
    told = ["" if r.system == BASELINE else f" {r.ratio_to_direct:.2f} of direct" for r in rows]
    ax.bar_label(drawn, told, fontsize=9)
    ax.margins(x=0.18)
    ax.set_xlabel(f"{rows[0].metric} ({unit})")
    return True


def latencies(ax: Any, record: Record) -> bool:
    """A curve a system through p50, p99, p99.9."""
    rows = [row for row in usable(record, "latency") if row.metric.startswith("c1 ")]
    for system in dict.fromkeys(row.system for row in rows):
        points = {row.metric[3:]: row.value for row in rows if row.system == system}
        ax.plot(list(points), list(points.values()), marker="o", label=system, color=COLOURS.get(system))
    if rows:
        ax.set_yscale("log")
        ax.set_ylabel("µs (log)")
        ax.legend(fontsize=8, ncols=2)
    return bool(rows)


def by_rules(ax: Any, record: Record) -> bool:
    """A curve a system; without rules, the connect suite's figure."""
    rows = [row for row in usable(record, "rules") if row.metric.startswith("new connections")]
    none = {row.system: row.value for row in usable(record, "connect")}
    for system in dict.fromkeys(row.system for row in rows):
        counts = {
            int(re.findall(r"(\d+) rules", row.metric)[0]): row.value for row in rows if row.system == system
        }
        if 0 not in counts and system in none:
            counts[0] = none[system]
        at = sorted(counts)
        ax.plot(at, [counts[n] for n in at], marker="o", label=system, color=COLOURS.get(system))
    if rows:
        ax.set_xscale("symlog", linthresh=10)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("rules that are not the one needed")
        ax.set_ylabel("1/s")
        ax.legend(fontsize=8, ncols=2)
    return bool(rows)


def cpu(ax: Any, record: Record) -> bool:
    return bars(ax, record, "cost", "CPU s", "a million requests")
