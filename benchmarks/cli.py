"""`python -m benchmarks`: run, list, compare, plot; quick, life, model. Exits: 0 done, 1 the answer is no, 2 usage."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from benchmarks import compare as comparing
from benchmarks import record as records
from benchmarks import report
from benchmarks.estimate import minutes
from benchmarks.place import Place, Route, place
from benchmarks.record import Record, RecordError
from benchmarks.runner import Race, in_order
from benchmarks.suites import FULL, QUICK, Suite, all_suites
from benchmarks.systems import BASELINE, System, all_systems

app = typer.Typer(
    help="Isolator and what people would use instead, in the same place.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Systems = Annotated[str, typer.Option("--systems", help="Some systems only, as a,b; direct is always there.")]
Named = TypeVar("Named", System, Suite)


def fail(error: str) -> NoReturn:
    typer.echo(f"benchmarks: {error}", err=True)
    raise typer.Exit(1)


def chosen(every: Iterable[Named], names: Iterable[str], what: str) -> list[Named]:
    """Those with these names, all without names. A name that nobody has is wrong usage."""
    known = {each.name: each for each in every}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"no {what} {', '.join(unknown)}: there are {', '.join(known)}")
    return [each for each in known.values() if each.name in names] if names else list(known.values())


# -- run ---------------------------------------------------------------------------------------------------


@app.command()
def run(
    suites: Annotated[list[str] | None, typer.Argument(help="Suites; all without one.")] = None,
    systems: Systems = "",
    full: Annotated[bool, typer.Option("--full/--quick", help="Everything, or a few points of it.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Where the record goes.")] = None,
    report_: Annotated[
        Path | None, typer.Option("--report", help="A folder for report.md, report.html.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with the record: suites in it are not run again.")
    ] = False,
    break_: Annotated[
        str, typer.Option("--break", help="Start these without their policy: the check has to catch them.")
    ] = "",
) -> None:
    """Runs suites on systems. Exits 1 if one does not enforce the policy, or a measurement has errors."""
    names = {*filter(None, systems.split(",")), BASELINE} if systems else set()
    run_systems = in_order(chosen(all_systems(), sorted(names), "system"))
    run_suites = chosen(all_suites(), suites or [], "suite")
    mode = FULL if full else QUICK
    folder = report_ or Path("build/bench")
    file = json_ or folder / "record.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = resumed(file, mode.name) if resume and file.exists() else Record(records.about(mode))
    broken = frozenset(filter(None, break_.split(",")))
    chosen(run_systems, sorted(broken), "system")
    began = time.monotonic()

    def tell(line: str) -> None:
        typer.echo(f"{time.monotonic() - began:6.1f} s  {line}", err=True)

    present = [system for system in run_systems if not system.missing()]
    tell(f"{mode.name}: {minutes(run_suites, present, mode):.0f} minutes or so")
    interrupted = go(record, run_systems, run_suites, mode, file, broken, tell)
    print_record(record)
    for path in [file, *(report.write(record, folder) if report_ else [])]:
        typer.echo(f"written: {path}")
    for line in record.failed():
        typer.echo(f"FAILED: {line}", err=True)
    if interrupted:
        typer.echo(f"interrupted: what is done is in {file}; --resume goes on", err=True)
        raise typer.Exit(130)
    raise typer.Exit(int(bool(record.failed())))


def resumed(file: Path, mode: str) -> Record:
    """The record so far, if it is of this commit and mode."""
    try:
        record = records.load(file)
    except RecordError as error:
        fail(str(error))
    for what, now in (("mode", mode), ("commit", records.commit())):
        if record.about.get(what) != now:
            fail(f"{file} is of {what} {record.about.get(what)}, not {now}: nothing to go on with")
    return record


def go(
    record: Record, systems: list[System], suites: list[Suite], mode: Any, file: Path,
    broken: frozenset[str], tell: Any,
) -> bool:  # fmt: skip
    """The race; the place is taken down however it ends. True if it was interrupted."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with place() as made:
            race = Race(made, mode, record, tell, asker(made), lambda: record.save(file), broken)
            try:
                race.start(systems)
                race.run(suites)
            finally:
                race.stop()
    except KeyboardInterrupt:
        record.save(file)
        return True
    record.save(file)
    return False


def asker(made: Place) -> Any:
    def ask(route: Route, path: str, port: int, method: str) -> str:
        options = ("-m", "1", "-X", method, "-o", "/dev/null", "-w", "%{http_code}")
        return made.lab.curl(route.client, route.url(path, port), *options)

    return ask


def print_record(record: Record) -> None:
    for table in (report.headline(record), report.absolute(record)):
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        for row in table if len(table) > 1 else ():
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# -- list, compare, plot -----------------------------------------------------------------------------------


@app.command("list")
def list_() -> None:
    """Systems and suites there are, and what is missing here."""
    typer.echo("systems")
    for system in all_systems():
        missing = system.missing()
        state = f"missing: {missing}" if missing else system.version()
        layer = "-" if system.name == BASELINE else "layer 7" if system.layer7 else "layer 4"
        typer.echo(f"  {system.name:<10} {system.kind:<18} {layer:<8} {state}")
    typer.echo("suites")
    for suite in all_suites():
        counts = f"{len(suite.points(QUICK))} of {len(suite.points(FULL))} points"
        typer.echo(f"  {suite.name:<10} {counts:<16} {suite.about}")


@app.command()
def compare(old: Path, new: Path, as_json: Json = False) -> None:
    """Ratios to direct, old against new. Exits 1 if one got worse beyond the noise, or a figure is lost."""
    try:
        before, after = records.load(old), records.load(new)
    except RecordError as error:
        fail(str(error))
    changes, lost = comparing.compare(before, after), comparing.lost(before, after)
    if as_json:
        told = [{field: getattr(each, field) for field in each.__slots__} for each in changes]
        typer.echo(json.dumps({"changes": told, "lost": lost}, indent=1))
    else:
        for each in changes:
            where = f"{each.suite:<9} {each.system:<9} {each.metric:<34}"
            typer.echo(f"{where} {each.old:>9.3f} {each.new:>9.3f} {each.change:>+8.1%}  {each.verdict}")
        for line in lost:
            typer.echo(f"lost: {line}")
    raise typer.Exit(int(bool(lost) or any(each.verdict == "worse" for each in changes)))


@app.command()
def plot(
    file: Path, folder: Annotated[Path, typer.Option("--report", help="Where to.")] = Path("build/bench")
) -> None:
    """Report and plots from a record."""
    try:
        written = report.write(records.load(file), folder)
    except RecordError as error:
        fail(str(error))
    for path in written:
        typer.echo(f"written: {path}")


# -- aliases -----------------------------------------------------------------------------------------------


@app.command()
def quick(context: typer.Context) -> None:
    """The same as run --quick --report build/bench."""
    context.invoke(
        run,
        suites=None,
        systems="",
        full=False,
        json_=None,
        report_=Path("build/bench"),
        resume=False,
        break_="",
    )


@app.command()
def life(as_json: Json = False) -> None:
    """What the agent's life costs those who are connected, against its bars."""
    from benchmarks.life import life as measured
    from benchmarks.life import met, print_life

    told = measured()
    if as_json:
        typer.echo(json.dumps(told, indent=1))
    else:
        print_life(told)
    raise typer.Exit(int(not all(map(met, told))))


@app.command()
def model(
    containers: int = 500,
    rules: Annotated[int, typer.Option(help="HTTP rules of each container.")] = 20,
    as_json: Json = False,
) -> None:
    """What a request, a flow, a rule and an endpoint cost, and what a node carries by that (docs/scaling.md)."""
    from benchmarks import model as models

    each = models.measured()
    node = models.carried(each, containers, rules)
    if as_json:
        typer.echo(json.dumps({"constants": asdict(each), "node": asdict(node)}, indent=1))
        return
    for what, value, unit in models.table(each):
        typer.echo(f"{what:<72} {value:>10} {unit}")
    typer.echo(f"a node with {containers} containers of {rules} rules carries")
    for name, value in asdict(node).items():
        typer.echo(f"{name.replace('_', ' '):<72} {value:>10,.0f}")
