"""A record as Markdown and as one HTML file: what a person reads of a run.

how it was run · headline (ratios to direct) · plots · figures · checks · systems and their configurations ·
what is left out · published figures
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.plots import plots
from benchmarks.published import PUBLISHED
from benchmarks.record import NOISY, Record, Row
from benchmarks.suites import lower_is_better
from benchmarks.systems import BASELINE

LIMITS = (
    "One machine carries client, server and system, so what a system takes is missing elsewhere: with few CPUs a "
    "terminating proxy competes with both ends.",
    "There is no network card and no wire: veth pairs have no bandwidth, no latency and no loss of their own.",
    "A shared machine's absolute figures say little; ratios measured in interleaved rounds say more.",
    "HTTP/1.1 without TLS. HTTP/2 and gRPC are not in these suites yet.",
    "Layer-4 systems see no paths: they do less, and are there to show what layer 7 costs.",
)
METHOD = (
    "All systems are up all the time, between clients and servers of one kind; rounds are interleaved (direct, "
    "isolator, haproxy, …, direct, …), in an order that moves on by one from round to round.",
    "A value is the median of the rounds; a ratio is the median of the rounds' own ratios to direct; a spread is the "
    f"interquartile range of those ratios by their median. Above {NOISY:.0%} a row is marked noisy (~).",
    "Where bytes are counted, clients run on the first CPU and servers on the last. Where requests are counted, too, "
    "if there are three CPUs or more; with two nobody is pinned, since the system needs one as well. Systems have one "
    "worker and run where the scheduler puts them. Keep-alive on both sides of a proxy. Nobody writes an access log.",
    "Before and after each suite every system is asked for what the policy forbids, and must refuse, and for what it "
    "allows. A system that fails loses its rows in the suite (!), and the run ends with exit code 1.",
    "Answers other than 2xx and socket errors make an error, not a figure.",
    "A terminating proxy ends the client's connection and opens its own: the server sees the proxy's address.",
)

Table = list[Sequence[str]]


# -- tables ------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def mark(row: Row) -> str:
    return (" ~" if row.noisy else "") + ("" if row.valid else " !")


def present(record: Record) -> list[str]:
    return [system.name for system in record.systems if not system.missing]


def headline(record: Record) -> Table:
    """Metrics down, systems across: ratios to direct."""
    names = [name for name in present(record) if name != BASELINE]
    table: Table = [("suite", "metric", "better", *names)]
    for suite, metric, unit in metrics(record):
        cells = []
        for name in names:
            row = find(record, suite, name, metric)
            ratio = row.ratio_to_direct if row else None
            cells.append("-" if row is None or ratio is None else f"{ratio:.2f}{mark(row)}")
        if any(cell != "-" for cell in cells):
            table.append((suite, metric, better(unit), *cells))
    return table


def absolute(record: Record) -> Table:
    """Metrics that direct has no figure for, down; systems across: the values themselves."""
    names = [name for name in present(record) if name != BASELINE]
    table: Table = [("suite", "metric", "better", *names)]
    for suite, metric, unit in metrics(record):
        found = {name: find(record, suite, name, metric) for name in names}
        if any(row and row.ratio_to_direct is not None for row in found.values()):
            continue
        cells = [
            "-" if not row or row.value is None else f"{number(row.value)} {unit}{mark(row)}"
            for row in found.values()
        ]
        if any(each != "-" for each in cells):
            table.append((suite, metric, better(unit), *cells))
    return table


def better(unit: str) -> str:
    return "lower" if lower_is_better(unit) else "higher"


def figures(record: Record) -> Table:
    table: Table = [("suite", "system", "metric", "value", "unit", "to direct", "spread", "")]
    for row in record.rows:
        table.append(
            (
                row.suite, row.system, row.metric, number(row.value), row.unit, number(row.ratio_to_direct),
                "-" if row.spread is None else f"{row.spread:.1%}", row.error or mark(row).strip(),
            )
        )  # fmt: skip
    return table


def checks(record: Record) -> Table:
    """One line a system: how often its checks held."""
    table: Table = [("system", "asked", "expected", "seen", "held")]
    asked = dict.fromkeys((check.system, check.asked, check.expected) for check in record.checks)
    for system, what, expected in asked:
        these = [each for each in record.checks if (each.system, each.asked) == (system, what)]
        seen = ", ".join(dict.fromkeys(each.seen for each in these))
        table.append((system, what, expected, seen, f"{sum(each.ok for each in these)} of {len(these)}"))
    return table


def metrics(record: Record) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((row.suite, row.metric, row.unit) for row in record.rows))


def find(record: Record, suite: str, system: str, metric: str) -> Row | None:
    same = (suite, system, metric)
    return next((row for row in record.rows if (row.suite, row.system, row.metric) == same), None)


def run_as(record: Record) -> Table:
    noise = record.noise()
    facts = [(key.replace("_", " "), str(value)) for key, value in record.about.items()]
    told = "-" if noise is None else f"{noise:.1%} (median spread of direct)"
    return [("what", "is"), *facts, ("noise", told)]


# -- the document ------------------------------------------------------------------------------------------


class Heading(str):
    __slots__ = ()


class Code(str):
    __slots__ = ()


class Picture(str):
    """SVG."""

    __slots__ = ()


class Items(tuple[str, ...]):
    __slots__ = ()


Piece = str | Table | Items


def document(record: Record) -> Iterator[Piece]:
    failed = record.failed()
    yield Heading("The run")
    if failed:
        yield "**This run failed:**"
        yield Items(failed)
    yield run_as(record)
    missing = [f"{s.name} is missing: {s.missing}" for s in record.systems if s.missing]
    if missing:
        yield Items(missing)
    yield Heading("Ratios to direct")
    yield "~ noisy · ! not valid, the policy was not enforced · - not measured. 1.00 is as fast as no isolation at all."
    yield headline(record)
    if len(values := absolute(record)) > 1:
        yield Heading("Where direct has no figure: values, not ratios")
        yield values
    for title, svg in plots(record):
        yield Heading(title)
        yield Picture(svg)
    yield Heading("All figures")
    yield Items([f"{name}: {text}" for name, text in record.suites.items()])
    yield figures(record)
    if record.left_out:
        yield "Left out:"
        yield Items([f"{each['system']} in {each['suite']}: {each['why']}" for each in record.left_out])
    yield Heading("Is the policy enforced?")
    yield checks(record)
    yield Heading("Method")
    yield Items(METHOD)
    yield Heading("What this does not show")
    yield Items(LIMITS)
    yield Heading("Systems and their configurations")
    for system in record.systems:
        layer = "layer 7" if system.layer7 else "layer 4"
        kind = f"{system.kind}, {layer}" if system.name != BASELINE else "no isolation"
        yield f"**{system.name}** {system.version} ({kind}). {system.set_up}"
        if system.config:
            yield Code(system.config)
    yield Heading("Published figures of others: not measured here")
    yield [
        ("system", "published", "workload", "source"),
        *((each.system, each.figure, each.workload, each.source) for each in PUBLISHED),
    ]


TITLE = "Isolator and what people would use instead"


def markdown(record: Record) -> str:
    return "\n\n".join([f"# {TITLE}", *map(piece_as_markdown, document(record))]) + "\n"


def piece_as_markdown(piece: Piece) -> str:
    if isinstance(piece, Heading):
        return f"## {piece}"
    if isinstance(piece, Code):
        return f"```\n{piece}\n```"
    if isinstance(piece, Picture):
        return "(The plot is in the HTML file.)"
    if isinstance(piece, Items):
        return "\n".join(f"- {item}" for item in piece)
    if isinstance(piece, str):
        return piece
    head, *lines = ([str(cell).replace("|", "\\|") for cell in row] for row in piece)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines))


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: #1b1f24 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
table { display: block; overflow-x: auto }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: left } th { background: #f4f5f7 }
pre { background: #f4f5f7; padding: 1em; overflow-x: auto; font-size: 12px; max-height: 30em }
svg { max-width: 100%; height: auto }
"""


def page(record: Record) -> str:
    body = "\n".join(map(piece_as_html, document(record)))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style>'
        f"<body><h1>{TITLE}</h1>\n{body}\n</body></html>\n"
    )


def piece_as_html(piece: Piece) -> str:
    if isinstance(piece, Picture):
        return f"<figure>{piece[piece.index('<svg') :]}</figure>"
    if isinstance(piece, Items):
        return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in piece) + "</ul>"
    if isinstance(piece, str):
        text = html.escape(piece)
        if isinstance(piece, Heading):
            return f"<h2>{text}</h2>"
        if isinstance(piece, Code):
            return f"<details><summary>configuration</summary><pre>{text}</pre></details>"
        first, bold, rest = text.partition("**")
        strong, _, rest = rest.partition("**")
        return f"<p>{first}{f'<strong>{strong}</strong>' if bold else ''}{rest}</p>"
    head, *lines = piece
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = ("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in lines)
    return f"<table><tr>{top}</tr>{''.join(rows)}</table>"


def write(record: Record, folder: Path) -> list[Path]:
    """report.md and report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / "report.md": markdown(record), folder / "report.html": page(record)}
    for file, text in files.items():
        file.write_text(text)
    return list(files)
