"""From a recorded run: file, comparison, report, command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import record as records
from benchmarks import report
from benchmarks.cli import app, chosen, resumed
from benchmarks.compare import compare, lost
from benchmarks.record import Record, RecordError
from benchmarks.systems import all_systems
from tests.benchmarks.world import Fake, Figures, race

cli = CliRunner()


@pytest.fixture
def recorded() -> Record:
    record = Record({"mode": "quick", "commit": "abc", "cpus": 2})
    systems = [Fake("direct"), Fake("isolator"), Fake("haproxy"), Fake("gone", absent="not installed: gone")]
    made = race(systems, broken=frozenset({"haproxy"}), record=record)
    values = {"direct": [1.0] * 4, "isolator": [0.8] * 4, "haproxy": [0.4] * 4}
    made.run([Figures(values), Figures(values, name="connect", only="haproxy")])
    return record


def test_file(recorded: Record, tmp_path: Path) -> None:
    recorded.save(tmp_path / "r.json")
    assert records.load(tmp_path / "r.json") == recorded


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"about": {}, "rows": [{"odd": 1}]}'])
def test_not_a_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(RecordError, match="not a record"):
        records.load(tmp_path / "r.json")


def test_report(recorded: Record, tmp_path: Path) -> None:
    files = report.write(recorded, tmp_path)
    markdown, page = (file.read_text() for file in files)
    for text in (markdown, page):
        assert "0.80" in text and "0.40 !" in text
        assert "gone is missing: not installed: gone" in text
        assert "haproxy in connect: not its race" in text
        assert "not measured here" in text and "https://istio.io" in text
        assert "haproxy: 0" in text, "its configuration"
        assert "This run failed" in text
    assert page.count("<svg") == 2, "requests, connections"
    assert "DOCTYPE svg" not in page


def test_the_table_names_who_refused_how_often(recorded: Record) -> None:
    rows = report.checks(recorded)
    assert ("haproxy", "GET /admin/secrets", "403", "200", "0 of 2") in rows
    assert ("isolator", "GET /admin/secrets", "403", "403", "4 of 4") in rows


def test_where_direct_has_no_figure_values_stand_and_no_ratios() -> None:
    made = race([Fake("direct"), Fake("isolator"), Fake("haproxy")])
    values = {"isolator": [7.0, 800.0, 800.0, 800.0], "haproxy": [7.0, 30.0, 30.0, 30.0]}
    made.run([Figures(values, name="churn", only="direct")])
    assert report.headline(made.record)[1:] == []
    assert report.absolute(made.record)[1:] == [("churn", "rate", "higher", "800 1/s", "30 1/s")]
    before = replace(
        made.record, rows=[replace(row, unit="ms", value=row.value / 2) for row in made.record.rows]
    )
    after = replace(made.record, rows=[replace(row, unit="ms") for row in made.record.rows])
    assert {each.verdict for each in compare(before, after)} == {"worse"}
    assert compare(after, after)[0].old == 800


def scaled(record: Record, by: float, **changed: object) -> Record:
    rows = [
        replace(row, ratio_to_direct=(row.ratio_to_direct or 0) * by, **changed)  # type: ignore[arg-type]
        if row.system == "isolator"
        else row
        for row in record.rows
    ]
    return replace(record, rows=rows)


@pytest.mark.parametrize(
    ("by", "changed", "verdict"),
    [
        (0.8, {}, "worse"),
        (1.2, {}, "better"),
        (1.05, {}, "same"),
        (0.8, {"noisy": True}, "noisy"),
        (0.8, {"unit": "us"}, "better"),
    ],
)
def test_compare(recorded: Record, by: float, changed: dict[str, object], verdict: str) -> None:
    told = compare(recorded, scaled(recorded, by, **changed))
    assert {each.verdict for each in told if each.system == "isolator"} == {verdict}
    assert "direct" not in {each.system for each in told}


def test_compare_without_a_valid_figure(recorded: Record) -> None:
    after = scaled(recorded, 1, valid=False)
    assert compare(recorded, after) == []
    assert lost(recorded, after) == ["http, isolator, rate", "connect, isolator, rate"]


def test_commands(recorded: Record, tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    recorded.save(old)
    scaled(recorded, 0.5).save(new)
    assert cli.invoke(app, ["compare", str(old), str(old)]).exit_code == 0
    worse = cli.invoke(app, ["compare", str(old), str(new)])
    assert (worse.exit_code, "worse" in worse.output) == (1, True)
    assert cli.invoke(app, ["plot", str(old), "--report", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "report.html").exists()
    assert cli.invoke(app, ["plot", str(tmp_path / "none")]).exit_code == 1


def test_resume_wants_the_same_commit_and_mode(recorded: Record, tmp_path: Path) -> None:
    """Not by way of `run`: where this fails, it must not start a race."""
    file = tmp_path / "r.json"
    recorded.about["commit"] = records.commit()
    recorded.save(file)
    assert resumed(file, "quick") == recorded
    for what, value in (("commit", "another"), ("mode", "full")):
        replace(recorded, about={**recorded.about, what: value}).save(file)
        with pytest.raises(typer.Exit):
            resumed(file, "quick")


def test_a_name_that_nobody_has_is_wrong_usage() -> None:
    assert [system.name for system in chosen(all_systems(), ["nginx", "direct"], "system")] == [
        "direct",
        "nginx",
    ]
    assert len(chosen(all_systems(), [], "system")) == len(all_systems())
    with pytest.raises(typer.BadParameter, match="no system nosuch: there are direct, "):
        chosen(all_systems(), ["nosuch"], "system")
