"""Path patterns together with regular expressions, as states: all of them read a path at once.

A state is one set of positions for each pattern (isolator.core.regex). Characters that no pattern tells apart are one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from isolator.core.automaton.assembler import Assembler
from isolator.core.automaton.states import OCTETS, Kind, Octet, State
from isolator.core.pattern import NAMED, REGEX
from isolator.core.regex import Regex

EXPRESSIONS_MAX = 64
"""Patterns that are read together."""

SETS_MAX = 256
"""States of all of them together: each may take a table."""

PLAIN = [chr(byte) for byte in range(128) if OCTETS[byte] & Octet.PLAIN]
SEGMENT = frozenset(chr(byte) for byte in range(128) if OCTETS[byte] & Octet.SEGMENT)
Positions = frozenset[int]


class At(NamedTuple):
    """`begins`: a segment does."""

    sets: tuple[Positions, ...]
    begins: bool


def as_regex(source: str) -> Regex:
    """A pattern of either kind. Only for plain paths: what they cannot hold may come out otherwise."""
    if source.startswith(REGEX):
        return Regex(source[len(REGEX) :])
    *segments, last = source[1:].split("/")
    text = "".join("/" + _segment(segment) for segment in segments)
    return Regex(text + "(/.*)?" if last == "**" else f"{text}/{_segment(last)}")


def _segment(segment: str) -> str:
    return "[^/]+" if segment == "*" or NAMED.fullmatch(segment) else re.sub(r"(\W)", r"\\\1", segment)


class Expressions:
    """`patterns` by line. `explore` says whether they are few enough, then `start` makes their states."""

    def __init__(self, patterns: Mapping[int, str]) -> None:
        self._lines = list(patterns)
        self._regexes = [as_regex(source) for source in patterns.values()]
        self._moves: dict[At, dict[str, At]] = {}

    def explore(self) -> bool:
        """Whether there is room for them."""
        if len(self._regexes) > EXPRESSIONS_MAX:
            return False
        alike = self._alike()
        todo = [self._beginning]
        while todo:
            at = todo.pop()
            if at in self._moves:
                continue
            if len(self._moves) == SETS_MAX:
                return False
            self._moves[at] = moves = self._from(at, alike)
            todo += moves.values()
        return True

    @property
    def _beginning(self) -> At:
        sets = tuple(regex.step(regex.start, "/") for regex in self._regexes)
        return At(sets, begins=True)

    def _alike(self) -> list[str]:
        """Characters in groups that no pattern tells apart."""
        groups: dict[object, str] = {}
        for character in PLAIN:
            told = (character in SEGMENT, *(regex.tells(character) for regex in self._regexes))
            groups[told] = groups.get(told, "") + character
        return list(groups.values())

    def _from(self, at: At, alike: Sequence[str]) -> dict[str, At]:
        moves: dict[str, At] = {}
        for group in alike:
            if at.begins and group[0] not in SEGMENT:
                continue
            sets = tuple(
                regex.step(held, group[0]) for regex, held in zip(self._regexes, at.sets, strict=True)
            )
            moves |= dict.fromkeys(group, At(sets, begins=False))
        if not at.begins:
            sets = tuple(regex.step(held, "/") for regex, held in zip(self._regexes, at.sets, strict=True))
            moves["/"] = At(sets, begins=True)
        return moves

    def start(
        self, assembler: Assembler, outcome: Callable[[frozenset[int]], int], end: Mapping[int, int]
    ) -> int:
        """Where a request target begins. `end`: where its blank or question mark leads."""
        numbers = {at: assembler.reserve() for at in self._moves}
        for at, number in numbers.items():
            pairs = zip(self._lines, self._regexes, at.sets, strict=True)
            allowed = outcome(frozenset(line for line, regex, held in pairs if regex.accepts(held)))
            edges = {ord(character): numbers[to] for character, to in self._moves[at].items()}
            everything = tuple(sorted((edges | dict(end) if allowed else edges).items()))
            if any(at.sets) or allowed:
                assembler.put(number, State(Kind.TABLE, outcome=allowed, edges=everything))
        return assembler.literal(b"/", numbers[self._beginning])
