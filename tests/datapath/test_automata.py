"""Counts of what the kernel accepted: none is lost where a half is overwritten, and each is its generation's."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import pytest

from isolator.core.automaton.build import build
from isolator.core.automaton.states import Automaton
from isolator.core.model import RuleRef
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule
from isolator.datapath import automata as module
from isolator.datapath.abi import STATES_MAX
from isolator.datapath.automata import Accepted, AutomatonMaps
from isolator.datapath.libbpf import BpfError
from tests.core.automaton.world import profile, rule

READ = RuleRef("shop", "read")
AUTOMATON = build(profile(rule("read", HttpRule(frozenset({"GET"}), PathPattern("/a")))))


class FakeMap:
    """Of isolator.datapath.maps.Map what is used here: an array."""

    value_room = 16  # two CPUs

    def __init__(self) -> None:
        self.values: dict[int, bytes] = {}

    def update_many(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        self.values |= {int.from_bytes(key, "little"): value for key, value in entries}

    def sums(self, first: int, count: int) -> array[int]:
        return array("Q", (sum(array("Q", self.values[first + at])) for at in range(count)))

    def hit(self, counter: int) -> None:
        self.values[counter] = array("Q", [sum(array("Q", self.values[counter])) + 1, 0]).tobytes()


@pytest.fixture
def maps() -> dict[str, Any]:
    return {name: FakeMap() for name in ("states", "tables", "outcomes", "requests")}


def counter_of(maps: dict[str, Any], automata: AutomatonMaps, generation: int) -> int:
    return next(at for at in maps["requests"].values if automata.rule_of(generation, at) == READ)


def write(automata: AutomatonMaps, generation: int, what: dict[int, Automaton]) -> dict[int, int]:
    starts = automata.write(generation, what)
    automata.switch()
    return starts


def test_counts_of_both_halves_and_of_one_that_is_overwritten(maps: dict[str, Any]) -> None:
    automata = AutomatonMaps(maps)
    write(automata, 1, {1: AUTOMATON})
    first = counter_of(maps, automata, 1)
    maps["requests"].hit(first)
    assert automata.take_counts() == [Accepted(1, 1, READ, 1)]
    maps["requests"].hit(first)
    write(automata, 2, {4: AUTOMATON})
    maps["requests"].hit(counter_of(maps, automata, 2))
    maps["requests"].hit(first)
    write(automata, 3, {5: AUTOMATON})
    assert automata.take_counts() == [Accepted(1, 1, READ, 2), Accepted(2, 4, READ, 1)]
    assert automata.take_counts() == []


def test_a_rule_is_one_policys(maps: dict[str, Any]) -> None:
    automata = AutomatonMaps(maps)
    write(automata, 1, {1: AUTOMATON})
    first = counter_of(maps, automata, 1)
    write(automata, 3, {})
    write(automata, 5, {1: AUTOMATON})
    assert (automata.rule_of(1, first), automata.rule_of(3, first), automata.rule_of(5, first)) == (
        None,
        None,
        READ,
    )
    assert automata.without_room(1) == []


def test_a_change_writes_behind_what_is_there(maps: dict[str, Any]) -> None:
    automata = AutomatonMaps(maps)
    before = write(automata, 1, {1: AUTOMATON})[1]
    states, counter = dict(maps["states"].values), counter_of(maps, automata, 1)
    maps["requests"].hit(counter)
    starts = automata.add({1: AUTOMATON, 2: AUTOMATON})
    assert starts[1] == before and starts[2] > before and starts[2] - before == len(AUTOMATON.states) - 1
    assert states.items() <= maps["states"].values.items() and len(maps["states"].values) == 2 * len(states)
    second = max(maps["requests"].values)
    maps["requests"].hit(second)
    assert (automata.rule_of(4, counter), automata.rule_of(4, second)) == (READ, READ)
    assert automata.take_counts() == [Accepted(1, 1, READ, 1), Accepted(1, 2, READ, 1)]
    assert automata.take_counts() == []


def half_of(start: int) -> int:
    return start // (STATES_MAX // 2)


def test_whole_policies_take_turns_whatever_is_changed_between_them(maps: dict[str, Any]) -> None:
    automata, halves = AutomatonMaps(maps, half=1), []
    for generation in (1, 4, 6):
        halves.append(half_of(write(automata, generation, {1: AUTOMATON})[1]))
        assert half_of(automata.add({2: AUTOMATON})[2]) == halves[-1]
    assert halves == [0, 1, 0]


def test_what_could_not_be_written_does_not_count_as_a_turn(maps: dict[str, Any]) -> None:
    automata = AutomatonMaps(maps)
    before = write(automata, 1, {1: AUTOMATON})[1]
    counter = counter_of(maps, automata, 1)
    for generation in (2, 3):
        assert half_of(automata.write(generation, {1: AUTOMATON})[1]) != half_of(before)
        automata.discard()
    assert automata.rule_of(4, counter) == READ, "a change of the first one"
    assert half_of(automata.add({2: AUTOMATON})[2]) == half_of(before)


def test_nothing_is_added_to_what_another_process_wrote(maps: dict[str, Any]) -> None:
    assert AutomatonMaps(maps, half=1).add({1: AUTOMATON}) == {} and not maps["states"].values


def test_counts_go_on_after_an_error_in_a_change(
    maps: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    automata = AutomatonMaps(maps)
    write(automata, 1, {1: AUTOMATON})
    update = maps["states"].update_many

    def refuse(entries: Iterable[tuple[bytes, bytes]]) -> None:
        update(entries)
        monkeypatch.setattr(maps["states"], "update_many", fail)

    def fail(entries: Iterable[tuple[bytes, bytes]]) -> None:
        raise BpfError("map states", 7)

    monkeypatch.setattr(maps["states"], "update_many", refuse)
    with pytest.raises(BpfError):
        automata.add({2: AUTOMATON, 3: AUTOMATON})
    maps["requests"].hit(counter_of(maps, automata, 1))
    assert automata.take_counts() == [Accepted(1, 1, READ, 1)]


def test_a_change_without_room(maps: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    automata = AutomatonMaps(maps)
    write(automata, 1, {1: AUTOMATON})
    monkeypatch.setattr(module, "REQUESTS_MAX", 2)
    assert set(automata.add({2: AUTOMATON})) == {1} and automata.without_room(2) == [2]
