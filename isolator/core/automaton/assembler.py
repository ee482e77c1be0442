"""States are numbered as they are made; equal ones are one, so that what is built from its ends is minimal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from isolator.core.automaton.states import EDGES_MAX, REJECTED, WORD_MAX, Kind, State


class Assembler:
    """`room`: how many states there may be, and how many of them tables. What finds no room becomes REJECT, so that
    the automaton accepts less, and `full` is set."""

    def __init__(self, room: int, tables: int) -> None:
        self.states: list[State] = [REJECTED]
        self.full = False
        self._numbers: dict[State, int] = {REJECTED: 0}
        self._room = room
        self._tables = tables
        self._reserve = (room // 8, tables // 8)

    @property
    def tight(self) -> bool:
        """What is left is for what leads to the states that are there: they are built from their ends."""
        states, tables = self._reserve
        return len(self.states) > self._room - states or self._tables <= tables

    def add(self, state: State) -> int:
        """The number of such a state."""
        number = self._numbers.get(state)
        if number is None:
            number = self._numbers[state] = self.reserve()
            self.put(number, state)
        return number

    def reserve(self) -> int:
        """A number for a state that is known later: it leads back to itself."""
        if len(self.states) >= self._room:
            self.full = True
            return 0
        self.states.append(REJECTED)
        return len(self.states) - 1

    def put(self, number: int, state: State) -> None:
        if state.kind is Kind.TABLE:
            if not self._tables:
                self.full = True
                return
            self._tables -= 1
        if number:
            self.states[number] = state

    def branch(self, edges: Mapping[int, int], other: int = 0, outcome: int = 0) -> int:
        return self.add(branching(edges, other, outcome))

    def literal(self, text: bytes, then: int, other: int = 0, *, fold: bool = False) -> int:
        """These bytes, then `then`. `fold`: letters in either case, `text` in lower case."""
        for end in range(len(text), 0, -WORD_MAX):
            word = text[max(end - WORD_MAX, 0) : end]
            then = self.add(State(Kind.WORD, then, other, word=word, fold=folds(word, fold)))
        return then

    def choice(self, words: Mapping[bytes, int], other: int = 0, *, fold: bool = False) -> int:
        """One of these words, none of which begins another, each leading on. Where it is none of them, `other`
        reads again what was read of it here, all but its first byte."""
        if b"" in words:
            return words[b""]
        shared = common_prefix(words)
        if shared:
            rest = self.choice({word[len(shared) :]: to for word, to in words.items()}, other, fold=fold)
            return self.literal(shared, rest, other, fold=fold)
        parts = {first: self.choice(rests, other, fold=fold) for first, rests in by_first(words).items()}
        return self.branch(both_cases(parts) if fold else parts, other)


def by_first(words: Mapping[bytes, int]) -> dict[int, dict[bytes, int]]:
    """The rests of words by their first byte."""
    parts: dict[int, dict[bytes, int]] = {}
    for word, to in sorted(words.items()):
        parts.setdefault(word[0], {})[word[1:]] = to
    return parts


def common_prefix(words: Iterable[bytes]) -> bytes:
    first, last = min(words), max(words)
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((at for at, (a, b) in pairs if a != b), min(len(first), len(last)))]


def branching(edges: Mapping[int, int], other: int = 0, outcome: int = 0) -> State:
    kind = Kind.BRANCH if len(edges) <= EDGES_MAX else Kind.TABLE
    return State(kind, other=other, outcome=outcome, edges=tuple(sorted(edges.items())))


def folds(word: bytes, fold: bool) -> bytes:
    return bytes(0x20 * (fold and chr(byte).isalpha()) for byte in word)


def both_cases(edges: Mapping[int, int]) -> dict[int, int]:
    """Edges on lower-case letters hold for capitals as well."""
    return {each: to for byte, to in edges.items() for each in {byte, ord(chr(byte).upper())}}
