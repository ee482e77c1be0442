"""Counts of what the kernel accepted: none is lost where a half is overwritten, and each is its generation's."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import pytest

from isolator.core.automaton.build import build
from isolator.core.model import RuleRef
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule
from isolator.datapath.automata import Accepted, AutomatonMaps
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


def test_counts_of_both_halves_and_of_one_that_is_overwritten(maps: dict[str, Any]) -> None:
    automata = AutomatonMaps(maps)
    automata.write(1, {1: AUTOMATON})
    first = counter_of(maps, automata, 1)
    maps["requests"].hit(first)
    assert automata.take_counts() == [Accepted(1, 1, READ, 1)]
    maps["requests"].hit(first)
    automata.write(2, {4: AUTOMATON})
    maps["requests"].hit(counter_of(maps, automata, 2))
    maps["requests"].hit(first)
    automata.write(3, {5: AUTOMATON})
    assert automata.take_counts() == [Accepted(1, 1, READ, 2), Accepted(2, 4, READ, 1)]
    assert automata.take_counts() == []


def test_a_rule_is_one_generations(maps: dict[str, Any]) -> None:
    automata = AutomatonMaps(maps)
    automata.write(1, {1: AUTOMATON})
    first = counter_of(maps, automata, 1)
    automata.write(3, {1: AUTOMATON})
    assert (automata.rule_of(1, first), automata.rule_of(3, first)) == (None, READ)
    assert automata.without_room(1) == []
