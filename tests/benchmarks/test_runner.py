"""A run: interleaved, checked; who does not enforce is caught; what is there already is not run again."""

from __future__ import annotations

import pytest

from benchmarks.load import BoundedError
from benchmarks.record import Record
from benchmarks.suites.base import Point
from tests.benchmarks.world import Fake, Figures, race

DIRECT = {"direct": [1.0, 100.0, 110.0, 90.0]}  # the first is the warm-up


def test_medians_of_the_rounds_own_ratios() -> None:
    made = race([Fake("direct"), Fake("a")])
    made.run([Figures({**DIRECT, "a": [1.0, 50.0, 56.0, 44.0]})])
    direct, a = made.record.rows
    assert (direct.value, direct.ratio_to_direct, direct.spread, direct.noisy) == (100.0, 1.0, 0.1, False)
    assert (a.value, a.ratio_to_direct, a.rounds, a.valid) == (50.0, 0.5, 3, True)
    assert made.record.failed() == []


def test_rounds_are_interleaved_and_the_order_moves_on() -> None:
    suite = Figures({name: [1.0] * 4 for name in ("direct", "a", "b")})
    race([Fake("direct"), Fake("a"), Fake("b")]).run([suite])
    rounds = [suite.asked[at : at + 3] for at in range(0, 12, 3)]
    assert all(sorted(each) == ["a", "b", "direct"] for each in rounds)
    assert [each[0] for each in rounds] == ["b", "direct", "a", "b"]


def test_a_wide_spread_is_noisy() -> None:
    made = race([Fake("direct"), Fake("a")])
    made.run([Figures({"direct": [1.0] * 4, "a": [1.0, 1.0, 2.0, 3.0]})])
    assert [row.noisy for row in made.record.rows] == [False, True]


@pytest.mark.parametrize("layer7", [True, False])
def test_a_system_without_its_policy_is_caught(layer7: bool) -> None:
    made = race([Fake("direct"), Fake("a", layer7), Fake("b")], broken=frozenset({"a"}))
    made.run([Figures({**DIRECT, "a": [1.0] * 4, "b": [1.0] * 4})])
    assert {row.system: row.valid for row in made.record.rows} == {"direct": True, "a": False, "b": True}
    assert made.record.failed() and all(line.startswith("a, http: ") for line in made.record.failed())


def test_layer_4_is_asked_for_a_port_and_layer_7_for_a_path_and_a_method() -> None:
    made = race([Fake("direct"), Fake("four", layer7=False), Fake("seven")])
    made.run([Figures({name: [1.0] * 4 for name in ("direct", "four", "seven")})])
    asked = {name: {c.asked for c in made.record.checks if c.system == name} for name in ("four", "seven")}
    assert asked["four"] == {"GET /api/v1/1k", "GET /api/v1/1k on port 8080"}
    assert asked["seven"] == {"GET /api/v1/1k", "GET /admin/secrets", "POST /api/v1/1k"}


def test_a_policy_that_is_lost_on_the_way_is_caught() -> None:
    system = Fake("a")
    made = race([Fake("direct"), system])
    suite = Figures({**DIRECT, "a": [1.0] * 4})
    measure = suite.measure

    def losing(run: object) -> dict[str, float]:
        system.broken = True
        return measure(run)  # type: ignore[arg-type]

    suite.measure = losing  # type: ignore[method-assign]
    made.run([suite])
    assert [row.valid for row in made.record.rows if row.system == "a"] == [False]


def test_an_error_is_no_figure() -> None:
    made = race([Fake("direct"), Fake("a")])
    made.run([Figures({**DIRECT, "a": [1.0, 1.0, "reset", 1.0]})])
    row = made.record.rows[-1]
    assert (row.system, row.value, row.valid, row.error) == ("a", None, False, "reset")
    assert made.record.failed() == ["a, http, rate: reset"]


def test_rules_are_taken_up_and_taken_back() -> None:
    system = Fake("a")
    made = race([Fake("direct"), system])
    made.run([Figures({**DIRECT, "a": [1.0] * 4}, rules=100)])
    assert system.applied == [100, 0]


def test_who_is_missing_or_left_out_is_said_so() -> None:
    made = race([Fake("direct"), Fake("a", absent="not installed: a"), Fake("b")])
    made.run([Figures({**DIRECT}, only="b")])
    assert [(s.name, s.missing) for s in made.record.systems if s.missing] == [("a", "not installed: a")]
    assert made.record.left_out == [{"suite": "http", "system": "b", "why": "not its race"}]
    assert {row.system for row in made.record.rows} == {"direct"}


def test_a_bound_is_left_out_and_no_failure() -> None:
    made = race([Fake("direct"), Fake("a")])
    made.run([Figures({**DIRECT, "a": [1.0, BoundedError("8,192 of 100,000")]})])
    assert made.record.left_out == [{"suite": "http", "system": "a", "why": "rate: 8,192 of 100,000"}]
    assert ({row.system for row in made.record.rows}, made.record.failed()) == ({"direct"}, [])


def test_a_point_may_leave_a_system_out_and_have_rounds_of_its_own() -> None:
    made = race([Fake("direct"), Fake("a")])
    suite = Figures({"direct": [5.0]})
    point = Point(
        {"rate": "1/s"}, suite.measure, rounds=1, not_for=lambda system: "no" * (system.name == "a")
    )
    suite.points = lambda mode: [point]  # type: ignore[method-assign]
    made.run([suite])
    assert made.record.left_out == [{"suite": "http", "system": "a", "why": "rate: no"}]
    assert [(row.system, row.value, row.rounds) for row in made.record.rows] == [("direct", 5.0, 1)]


def test_what_is_there_is_not_run_again() -> None:
    systems = [Fake("direct"), Fake("a")]
    record = Record({"mode": "quick"})
    race(systems, record=record).run([Figures({**DIRECT, "a": [1.0] * 4})])
    again = Figures({})
    race(systems, record=record).run([again])
    assert again.asked == []


def test_a_suite_with_an_error_in_it_is_run_again() -> None:
    systems = [Fake("direct"), Fake("a")]
    record = Record({"mode": "quick"})
    race(systems, record=record).run([Figures({**DIRECT, "a": [1.0, "reset"]})])
    race(systems, record=record).run([Figures({**DIRECT, "a": [1.0, 50.0, 50.0, 50.0]})])
    assert [(row.system, row.error) for row in record.rows] == [("direct", ""), ("a", "")]
    assert record.failed() == []


def test_a_suite_that_is_cut_off_leaves_nothing() -> None:
    made = race([Fake("direct"), Fake("a")])

    class CutOff(Figures):
        def measure(self, run: object) -> dict[str, float]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.run([CutOff({})])
    assert (made.record.rows, made.record.checks, made.record.suites) == ([], [], {})
