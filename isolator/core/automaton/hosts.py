"""Host names as states: whatever RFC 9110 section 7.2 allows, and which patterns it matches.

A name has labels that are not empty, a dot at its end at most, and a port; addresses in brackets are Python's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from isolator.core.automaton.assembler import Assembler, both_cases, branching
from isolator.core.automaton.states import Kind, Octet, State
from isolator.core.pattern import HostPattern

PORT_DIGITS = 4
"""Of a port that is read here: none of them is beyond 65535."""

Positions = frozenset[tuple[int, int]]
"""(pattern, characters of it that were read)."""


class At(NamedTuple):
    """What was read: `names` may still become a pattern's whole name, `ends` a `*.` pattern's end.

    `before` the dot that was read last, these patterns matched."""

    names: Positions
    ends: Positions
    dot: bool
    before: frozenset[int] = frozenset()
    begun: bool = True


NOWHERE = At(frozenset(), frozenset(), dot=False)


class HostNames:
    """`hosts`: lists of patterns → their bits; `end` makes a state for "CR read, these bits hold"."""

    def __init__(
        self,
        assembler: Assembler,
        hosts: Mapping[tuple[HostPattern, ...], int],
        end: Callable[[int], int],
    ) -> None:
        self._assembler = assembler
        self._hosts = hosts
        self._end = end
        patterns = sorted({pattern.source for listed in hosts for pattern in listed})
        self._texts = [source.removeprefix("*") for source in patterns]
        self._whole = [not source.startswith("*") for source in patterns]
        self._sources = patterns
        self._known: dict[At, int] = {}
        self._dot: int | None = None
        self._label = assembler.reserve()  # of a name that is no pattern's, or no more
        assembler.put(self._label, State(Kind.SKIP, self._number(NOWHERE), octets=Octet.HOST))
        names = frozenset((each, 0) for each, whole in enumerate(self._whole) if whole)
        self.start = self._number(At(names, frozenset(), dot=True, begun=False))

    def _number(self, at: At) -> int:
        if at not in self._known:
            self._known[at] = self._assembler.reserve()
            self._assembler.put(self._known[at], self._state(at))
        return self._known[at]

    def _state(self, at: At) -> State:
        following = {
            self._texts[each][read] for each, read in at.names | at.ends if read < len(self._texts[each])
        }
        letters = sorted(following - {"."})
        edges = both_cases({ord(letter): self._number(self._step(at, letter)) for letter in letters})
        if not at.dot:
            edges[ord(".")] = self._number(self._step(at, "."))
        if at.begun:
            end = self._end(self._bits(at))
            edges |= {ord("\r"): end, ord(":"): self._port(end)}
        return branching(edges, self._other(at))

    def _other(self, at: At) -> int:
        """For a character that no pattern has here: a label's, and the first where one begins."""
        if at == NOWHERE:
            return 0
        if not at.dot:
            return self._label
        return self._assembler.add(State(Kind.ONE, self._label, octets=Octet.HOST))

    def _step(self, at: At, letter: str) -> At:
        ends = {(each, 0) for each, whole in enumerate(self._whole) if not whole} if letter == "." else set()
        dot = letter == "."
        return At(
            self._read(at.names, letter),
            self._read(at.ends | ends, letter),
            dot,
            self._matching(at) if dot else frozenset(),
        )

    def _read(self, positions: Positions | set[tuple[int, int]], letter: str) -> Positions:
        return frozenset(
            (each, read + 1)
            for each, read in positions
            if read < len(self._texts[each]) and self._texts[each][read] == letter
        )

    def _matching(self, at: At) -> frozenset[int]:
        """A dot at the end is the root's: the name before it counts."""
        if at.dot:
            return at.before
        return frozenset(each for each, read in at.names | at.ends if read == len(self._texts[each]))

    def _bits(self, at: At) -> int:
        matching = {self._sources[each] for each in self._matching(at)}
        return sum(bit for listed, bit in self._hosts.items() if matching & {each.source for each in listed})

    def _port(self, end: int) -> int:
        """One digit to PORT_DIGITS, then CR."""
        state = self._assembler.branch({ord("\r"): end})
        for _ in range(PORT_DIGITS - 1):
            digit = self._assembler.add(State(Kind.ONE, state, octets=Octet.DIGIT))
            state = self._assembler.branch({ord("\r"): end}, digit)
        return self._assembler.add(State(Kind.ONE, state, octets=Octet.DIGIT))
