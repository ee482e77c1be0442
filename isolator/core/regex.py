"""Regular expressions that take linear time: what `regex:` in a path pattern may say.

Python's `re` backtracks: `(a+)+x` against some forty letters takes years, and a path is chosen by whoever
sends it. Here a pattern becomes an automaton, built as far as the paths seen need it (Thompson 1968; Cox,
"Regular Expression Matching Can Be Simple And Fast"), so each character costs at most one look at each of
STATES_MAX positions, whatever came before it.

    parse → syntax tree → NFA (positions with empty moves) → sets of positions, as they come up

The language, always against the whole path:

    expression = branch *( "|" branch )
    branch     = *( atom [ "*" / "+" / "?" / "{m}" / "{m,}" / "{m,n}" ] )
    atom       = "." / character / "\\" escape / "[" ["^"] ranges "]" / "(" ["?:"] expression ")"

Escapes are `\\d \\D \\w \\W \\s \\S` (ASCII) and `\\` before punctuation. `^` may open the pattern and `$`
may end it; both say nothing new. Not supported, and an error: look-around, back-references, flags, lazy and
possessive repeats.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

STATES_MAX = 256
"""Positions of the NFA: what one character of a path may cost. A repeat counts as if written out."""

REPEAT_MAX = 64
"""The largest number in `{m,n}`."""

MOVES_MAX = 1024
"""Moves kept between sets of positions; beyond it they are found anew. A set takes 8 KB at the most."""

DEPTH_MAX = 32
"""Groups inside groups."""

Ranges = tuple[tuple[int, int], ...]
LAST = 0x10FFFF
CLASSES: dict[str, Ranges] = {
    "d": ((0x30, 0x39),),
    "w": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    "s": ((0x09, 0x0D), (0x20, 0x20)),
}
LAZY = "the whole path is matched, so a lazy or possessive repeat says nothing: remove the second sign"


class RegexError(ValueError):
    """The pattern is not in the language; the text names the offset where that shows."""


# -- the syntax tree --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Characters:
    """One character out of these ranges of code points."""

    ranges: Ranges

    def holds(self, character: str) -> bool:
        code = ord(character)
        return any(low <= code <= high for low, high in self.ranges)


@dataclass(frozen=True, slots=True)
class Sequence:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    branches: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`most` None: without end."""

    part: Node
    least: int
    most: int | None


Node = Characters | Sequence | Choice | Repeat
ANY = Characters(((0, LAST),))


def inverted(ranges: Ranges) -> Ranges:
    gaps, at = [], 0
    for low, high in sorted(ranges):
        if low > at:
            gaps.append((at, low - 1))
        at = max(at, high + 1)
    return (*gaps, (at, LAST)) if at <= LAST else tuple(gaps)


# -- text to tree -----------------------------------------------------------------------------------------


class Parser:
    """Recursive descent over the grammar above."""

    def __init__(self, source: str) -> None:
        self._text = source[source.startswith("^") :]
        self._shift = len(source) - len(self._text)
        if self._text.endswith("$") and not self._text.endswith("\\$"):
            self._text = self._text[:-1]
        self._at = 0
        self._depth = 0

    def parse(self) -> Node:
        node = self._expression()
        if self._at < len(self._text):
            raise self._error("')' without '('")
        return node

    def _error(self, message: str) -> RegexError:
        return RegexError(f"{message} (at character {self._at + self._shift + 1})")

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        character = self._next()
        if not character:
            raise self._error("the expression ends too early")
        self._at += 1
        return character

    def _skip(self, wanted: str) -> bool:
        found = self._text.startswith(wanted, self._at)
        self._at += len(wanted) * found
        return found

    def _expression(self) -> Node:
        branches = [self._branch()]
        while self._skip("|"):
            branches.append(self._branch())
        return branches[0] if len(branches) == 1 else Choice(tuple(branches))

    def _branch(self) -> Node:
        parts: list[Node] = []
        while self._next() and self._next() not in "|)":
            parts.append(self._repeated(self._atom()))
        return Sequence(tuple(parts))

    def _repeated(self, atom: Node) -> Node:
        if self._skip("*"):
            node = Repeat(atom, 0, None)
        elif self._skip("+"):
            node = Repeat(atom, 1, None)
        elif self._skip("?"):
            node = Repeat(atom, 0, 1)
        elif self._skip("{"):
            node = Repeat(atom, *self._bounds())
        else:
            return atom
        if self._next() and self._next() in "*+?{":
            raise self._error(LAZY)
        return node

    def _bounds(self) -> tuple[int, int | None]:
        text, closed, _ = self._text[self._at :].partition("}")
        least, comma, most = text.partition(",")
        numbers = [least] if not most else [least, most]
        if not closed or not all(number.isascii() and number.isdigit() for number in numbers):
            raise self._error("after '{' comes {m}, {m,} or {m,n}; a brace that means itself is '\\{'")
        bounds = (int(least), int(most) if most else None if comma else int(least))
        if max(bounds[0], bounds[1] or 0) > REPEAT_MAX or (bounds[1] is not None and bounds[1] < bounds[0]):
            raise self._error(f"a repeat's numbers go up, and to {REPEAT_MAX} at the most")
        self._at += len(text) + 1
        return bounds

    def _atom(self) -> Node:
        character = self._take()
        if character == ".":
            return ANY
        if character == "[":
            return self._set()
        if character == "(":
            return self._group()
        if character == "\\":
            return Characters(self._escape())
        if character in "*+?{}]":
            self._at -= 1
            raise self._error(f"nothing to repeat before '{character}'; to mean itself it is '\\{character}'")
        if character in "^$":
            self._at -= 1
            raise self._error(f"'{character}' belongs to the ends: the whole path is matched anyway")
        return Characters(((ord(character), ord(character)),))

    def _group(self) -> Node:
        if not self._skip("?:") and self._next() == "?":
            raise self._error("look-around, flags and named groups are not supported: use (…) or (?:…)")
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise self._error(f"more than {DEPTH_MAX} groups inside each other")
        node = self._expression()
        if not self._skip(")"):
            raise self._error("'(' without ')'")
        self._depth -= 1
        return node

    def _escape(self) -> Ranges:
        character = self._take()
        if character.lower() in CLASSES:
            ranges = CLASSES[character.lower()]
            return ranges if character in CLASSES else inverted(ranges)
        if character.isalnum():
            self._at -= 1
            raise self._error(f"'\\{character}' is not supported: \\d \\w \\s, or \\ before a sign")
        return ((ord(character), ord(character)),)

    def _set(self) -> Node:
        negated = self._skip("^")
        ranges: list[tuple[int, int]] = []
        while not self._skip("]"):
            low = self._member()
            if self._next() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                ranges.append(self._range(low, self._member()))
            else:
                ranges.extend(low)
        if not ranges:
            raise self._error("an empty set: a ']' that means itself is '\\]'")
        return Characters(inverted(tuple(ranges)) if negated else tuple(ranges))

    def _member(self) -> Ranges:
        character = self._take()
        return self._escape() if character == "\\" else ((ord(character), ord(character)),)

    def _range(self, low: Ranges, high: Ranges) -> tuple[int, int]:
        if len(low) > 1 or len(high) > 1 or low[0][0] != low[0][1] or low[0][0] > high[0][0]:
            raise self._error("a range goes from a character to a later one")
        return low[0][0], high[0][1]


# -- tree to positions ------------------------------------------------------------------------------------


class Nfa:
    """Positions 0 … n; each has empty moves, or one character set and the position behind it."""

    def __init__(self, node: Node) -> None:
        self._empty: list[list[int]] = []
        self._reads: list[tuple[Characters, int] | None] = []
        self.start = self._position()
        self.end = self._build(node, self.start)

    def _position(self) -> int:
        if len(self._empty) >= STATES_MAX:
            raise RegexError(f"too large: more than {STATES_MAX} positions; use smaller repeats")
        self._empty.append([])
        self._reads.append(None)
        return len(self._empty) - 1

    def _build(self, node: Node, at: int) -> int:
        """Adds `node` behind position `at`; returns the position behind it. `at` has nothing to read yet."""
        match node:
            case Characters():
                end = self._position()
                self._reads[at] = (node, end)
            case Sequence(parts):
                end = self._fresh(at)
                for part in parts:
                    end = self._build(part, end)
            case Choice(branches):
                ends = [self._build(branch, self._fresh(at)) for branch in branches]
                end = self._position()
                for each in ends:
                    self._empty[each].append(end)
            case Repeat(part, least, most):
                end = self._build_repeat(part, least, most, at)
        return end

    def _fresh(self, at: int) -> int:
        position = self._position()
        self._empty[at].append(position)
        return position

    def _build_repeat(self, part: Node, least: int, most: int | None, at: int) -> int:
        for _ in range(least):
            at = self._fresh(self._build(part, at))
        if most is None:
            loop = self._fresh(at)
            self._empty[self._build(part, self._fresh(loop))].append(loop)
            return self._fresh(loop)
        exits = [at]
        for _ in range(most - least):
            at = self._build(part, self._fresh(at))
            exits.append(at)
        end = self._position()
        for each in exits:
            self._empty[each].append(end)
        return end

    def closure(self, positions: Iterable[int]) -> frozenset[int]:
        seen: set[int] = set()
        todo = list(positions)
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo.extend(self._empty[at])
        return frozenset(seen)

    def tells(self, character: str) -> tuple[bool, ...]:
        return tuple(read is not None and read[0].holds(character) for read in self._reads)

    def step(self, positions: frozenset[int], character: str) -> frozenset[int]:
        reads = (self._reads[at] for at in positions)
        return self.closure(read[1] for read in reads if read is not None and read[0].holds(character))


# -- matching ---------------------------------------------------------------------------------------------


class Regex:
    """A compiled pattern. Raises RegexError. Patterns with the same text are equal."""

    __slots__ = ("_moves", "_nfa", "_start", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self._nfa = Nfa(Parser(source).parse())
        self._start = self._nfa.closure([self._nfa.start])
        self._moves: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def matches(self, text: str) -> bool:
        """Whether the whole of `text` is in the pattern's language."""
        return self._nfa.end in self._run(text)

    def may_begin(self, prefix: str) -> bool:
        """Whether anything that begins with `prefix` can match."""
        return bool(self._run(prefix))

    # -- step by step -----------------------------------------------------------------------------------

    @property
    def start(self) -> frozenset[int]:
        """Where nothing is read yet."""
        return self._start

    def step(self, positions: frozenset[int], character: str) -> frozenset[int]:
        return self._nfa.step(positions, character)

    def accepts(self, positions: frozenset[int]) -> bool:
        return self._nfa.end in positions

    def tells(self, character: str) -> tuple[bool, ...]:
        """What of the pattern the character is part of: those that are part of the same are alike."""
        return self._nfa.tells(character)

    def _run(self, text: str) -> frozenset[int]:
        moves = self._moves
        at = self._start
        for character in text:
            after = moves.get((at, character))
            if after is None:
                if len(moves) >= MOVES_MAX:
                    moves.clear()
                after = moves[at, character] = self._nfa.step(at, character)
            at = after
        return at

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Regex) and other.source == self.source

    def __hash__(self) -> int:
        return hash(self.source)
