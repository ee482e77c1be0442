"""What the command line shows: tables and colour on a terminal, aligned plain text in a pipe.

Whatever came off a wire (paths, hosts) is shown with its control characters escaped: a request must not be
able to write to the terminal of whoever reads the log.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer

from isolator.control.runtime import is_own

COLOURS = {
    "enforced": "green",
    "pending": "yellow",
    "restored": "yellow",
    "waiting": "yellow",
    "failed": "red",
    "FORWARDED": "green",
    "AUDIT": "yellow",
    "DROPPED": "red",
    "DEPENDS": "yellow",
    "yes": "green",
    "ok": "green",
    "warn": "yellow",
    "fail": "red",
}
"""Words that have a colour wherever they stand in a cell of their own."""


def printable(text: str) -> str:
    """`text` with everything that is not printable as `\\x1b` or `\\u202e`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows of plain text under their columns' names."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        rich_table(columns, cells)
        return
    for line in aligned([columns, *cells]):
        typer.echo(line)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def rich_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
    Console().print(shown)


def labels(given: dict[str, str]) -> str:
    """Without those that are policy: `isolator policy show` has them."""
    return ",".join(f"{key}={value}" for key, value in sorted(given.items()) if not is_own(key))


def endpoint_rows(endpoints: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    for each in endpoints:
        yield [
            each["name"],
            each["state"],
            " ".join(each["addresses"]) or "-",
            " ".join(each["policies"]) or "-",
            each["detail"] or "",
        ]


def unprotectable_rows(found: dict[str, str]) -> Iterator[list[str]]:
    for name, reason in sorted(found.items()):
        yield [name, "unprotectable", "-", "-", reason]


def share(requests: dict[str, int]) -> str:
    """Of requests, how many the kernel decided: `97 %`. Rounded down, so that 100 % is all of them."""
    total = requests["kernel"] + requests["python"]
    return f"{requests['kernel'] * 100 // total} %" if total else "-"


OFFLOAD_COLUMNS = [
    "RULES",
    "ENDPOINTS",
    "PORTS",
    "KERNEL",
    "PYTHON",
    "IN KERNEL",
    "STATES",
    "WHY PYTHON",
    "LEFT OUT",
]
NAMED_MAX = 3
"""Names in one cell; of more, their number."""


def offload_rows(profiles: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    for each in profiles:
        requests = each["requests"]
        yield [
            some(each["rules"]),
            some(each["endpoints"]),
            some(each["ports"]),
            str(requests["kernel"]),
            str(requests["python"]),
            share(requests),
            str(each["states"]),
            reasons(each["why"]),
            "; ".join(each["left_out"]) or "-",
        ]


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return ", ".join(names[:NAMED_MAX]) + more or "-"


def reasons(why: dict[str, int]) -> str:
    """The three most frequent ones: `a body 62 %, denied 30 %`."""
    total = sum(why.values())
    top = sorted(why.items(), key=lambda item: -item[1])[:NAMED_MAX]
    return ", ".join(f"{reason} {count * 100 // total} %" for reason, count in top) or "-"


def flow_line(record: dict[str, Any], decided: bool = False) -> str:
    """One record as one line: time, verdict, who to whom, what, why; `decided`: by whom, and why not in the kernel.

    `22:13:20.250 DROPPED   ingress web:40000 -> api:80 tcp GET /admin · HTTP_NO_RULE · api-allow/read-books · python`
    """
    verdict = typer.style(f"{record['verdict']:<9}", fg=COLOURS.get(record["verdict"]))
    ends = f"{end(record['source'])} -> {end(record['destination'])}"
    clock = record["time"][11:23]
    told = [f"{clock} {verdict} {record['direction']:<7} {ends} {record['protocol']}{message(record['l7'])}"]
    if record["drop_reason"]:
        told.append(record["drop_reason"])
    if record["policy"]:
        told.append(printable(f"{record['policy']}/{record['rule'] or '-'}"))
    if decided:
        told.append(decider(record))
    return " · ".join(told)


def decider(record: dict[str, Any]) -> str:
    why, by = record["why_python"], str(record["decided_by"])
    return by if why in (None, "denied") else f"{by} ({why})"


def end(peer: dict[str, Any]) -> str:
    name = printable(peer["endpoint"] or peer["ip"])
    if peer["port"] is None:
        return name
    return f"[{name}]:{peer['port']}" if ":" in name else f"{name}:{peer['port']}"


def message(l7: dict[str, Any] | None) -> str:
    """` GET /path`; the path as it stood on the wire, and how it was read if that differs."""
    if l7 is None:
        return ""
    http = l7["http"]
    raw, path = http["raw_path"] or "", http["path"]
    read_as = f" (read as {path})" if path is not None and path != raw.partition("?")[0] else ""
    return printable(f" {http['method'] or '?'} {raw}{read_as}")
