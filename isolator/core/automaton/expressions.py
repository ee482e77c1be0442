"""Path patterns together with regular expressions, as states: all of them read a path at once.

A state is one set of positions for each pattern (isolator.core.regex). Characters that no pattern tells apart are one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from isolator.core.automaton.assembler import Assembler, branching
from isolator.core.automaton.states import OCTETS, Octet
from isolator.core.pattern import REGEX, glob_expression
from isolator.core.regex import Regex, RegexError

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
    """A pattern of either kind. Raises RegexError: a long one has too many positions for this."""
    return Regex(source[len(REGEX) :] if source.startswith(REGEX) else glob_expression(source))


class Expressions:
    """`patterns` by line. `explore` says whether they are few enough, then `start` makes their states."""

    def __init__(self, patterns: Mapping[int, str]) -> None:
        self._patterns = patterns
        self._regexes: list[Regex] = []
        self._moves: dict[At, dict[str, At]] = {}

    def explore(self) -> bool:
        """Whether there is room for them."""
        if len(self._patterns) > EXPRESSIONS_MAX:
            return False
        try:
            self._regexes = [as_regex(source) for source in self._patterns.values()]
        except RegexError:
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
        return self._step([regex.start for regex in self._regexes], "/")

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
            moves |= dict.fromkeys(group, self._step(at.sets, group[0]))
        if not at.begins:
            moves["/"] = self._step(at.sets, "/")
        return moves

    def _step(self, sets: Sequence[Positions], character: str) -> At:
        pairs = zip(self._regexes, sets, strict=True)
        return At(tuple(regex.step(held, character) for regex, held in pairs), begins=character == "/")

    def start(
        self, assembler: Assembler, outcome: Callable[[frozenset[int]], int], end: Mapping[int, int]
    ) -> int:
        """Where a request target begins. `end`: where its blank or question mark leads."""
        numbers = {at: assembler.reserve() for at in self._moves}
        for at, number in numbers.items():
            pairs = zip(self._patterns, self._regexes, at.sets, strict=True)
            allowed = outcome(frozenset(line for line, regex, held in pairs if regex.accepts(held)))
            edges = {ord(character): numbers[to] for character, to in self._moves[at].items()}
            if any(at.sets) or allowed:
                assembler.put(number, branching(edges | dict(end) if allowed else edges, outcome=allowed))
        return assembler.literal(b"/", numbers[self._beginning])
