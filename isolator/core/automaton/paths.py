"""Path patterns as states, for the paths that have one reading alone: segments of letters, digits, `-_.~`.

Behind each "/" some nodes of a tree of segments are at hand, and lines whose `/**` has begun. The tree's literals are
read letter by letter; what is none of them may still be a `*`, or the rest of a `/**`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from isolator.core.automaton.assembler import Assembler, branching
from isolator.core.automaton.states import PLAIN_SEGMENT, Kind, Octet, State
from isolator.core.pattern import NAMED

DEPTH_MAX = 100
"""Branchings, one inside the other: what is deeper is Python's."""

_PLAIN_SEGMENT = re.compile(PLAIN_SEGMENT)

SLASH, BLANK, QUESTION = b"/ ?"


@dataclass(eq=False, slots=True)
class Node:
    """Where a pattern has come to, behind a segment. `ends`: lines whose pattern ends there, `rests`: in `/**`."""

    literals: dict[str, Node] = field(default_factory=dict)
    star: Node | None = None
    ends: set[int] = field(default_factory=set)
    rests: set[int] = field(default_factory=set)


Nodes = frozenset[Node]
Lines = frozenset[int]


def tree(patterns: Iterable[tuple[int, str]]) -> Node:
    """Of (line, pattern). A segment that no plain path can have leads nowhere."""
    root = Node()
    for line, source in patterns:
        *segments, last = source[1:].split("/")
        node = root
        for segment in segments:
            node = _child(node, segment)
        if last == "**":
            node.rests.add(line)
        else:
            _child(node, last).ends.add(line)
    return root


def _child(node: Node, segment: str) -> Node:
    if segment == "*" or NAMED.fullmatch(segment):
        node.star = node.star or Node()
        return node.star
    return node.literals.setdefault(segment, Node())


class Paths:
    """Builds the states for one tree. `outcome` gives the register's value for matching lines, 0: nothing is allowed;
    `version` is where a path's blank leads, `query` its question mark."""

    def __init__(
        self, assembler: Assembler, outcome: Callable[[Lines], int], version: int, query: int
    ) -> None:
        self._assembler = assembler
        self._outcome = outcome
        self._end = {BLANK: version, QUESTION: query}
        self._starts: dict[tuple[Nodes, Lines], int] = {}
        self.too_deep = False
        self._depth = 0
        self._rest, self._rest_within = self._rests()

    def start(self, root: Node) -> int:
        """Where a request target begins."""
        begun = frozenset(root.rests)
        return self._assembler.literal(b"/", self._segment(frozenset([root]), begun))

    # -- a rest ---------------------------------------------------------------------------------------------

    def _rests(self) -> tuple[int, int]:
        """Any plain path to its end: at a segment's beginning, and within one. The outcome stands."""
        add, reserved = self._assembler.add, self._assembler.reserve()
        behind = self._assembler.branch({SLASH: reserved, **self._end})
        within = add(State(Kind.SKIP, behind, octets=Octet.PLAIN))
        one = State(Kind.ONE, within, octets=Octet.SEGMENT)
        self._assembler.put(reserved, branching(self._end, add(one)))
        return reserved, within

    def _rest_with(self, outcome: int, within: bool = False) -> int:
        if not outcome:
            return 0
        state = self._assembler.states[self._rest_within if within else self._rest]
        return self._assembler.add(state._replace(outcome=outcome))

    # -- a segment ------------------------------------------------------------------------------------------

    def _segment(self, nodes: Nodes, begun: Lines) -> int:
        """At a segment's beginning. `begun`: lines whose `/**` has."""
        key = (nodes, begun)
        if key not in self._starts:
            self._starts[key] = self._begin(nodes, begun)
        return self._starts[key]

    def _begin(self, nodes: Nodes, begun: Lines) -> int:
        words: dict[str, set[Node]] = {}
        for node in nodes:
            for text, child in node.literals.items():
                words.setdefault(text, set()).add(child)
        stars = frozenset(node.star for node in nodes if node.star is not None)
        closing = words.pop("", set())  # a pattern that ends in "/"
        plain = {text: frozenset(found) for text, found in words.items() if _PLAIN_SEGMENT.fullmatch(text)}
        outcome = self._outcome(begun | _ends(closing))
        if not plain and not stars and not closing:
            return self._rest_with(outcome)
        segment = Segment(self._assembler, self, plain, stars, begun)
        first = segment.other()
        if first:
            first = self._assembler.add(State(Kind.ONE, first, octets=Octet.SEGMENT))
        edges = self._end if outcome else {}
        return segment.letters(sorted(plain), 0, first, edges, outcome)

    def behind(self, nodes: Nodes, begun: Lines) -> tuple[dict[int, int], int]:
        """Edges and outcome at a segment's end, with these nodes at hand."""
        begun = begun.union(*(node.rests for node in nodes))
        outcome = self._outcome(begun | _ends(nodes))
        further = any(node.literals or node.star for node in nodes)
        if further:
            after = self.deeper(lambda: self._segment(nodes, begun))
        elif (kept := self._outcome(begun)) == outcome:
            after = self._rest if kept else 0
        else:
            after = self._rest_with(kept)
        edges = dict(self._end) if outcome else {}
        if after:
            edges[SLASH] = after
        return edges, outcome

    def deeper(self, build: Callable[[], int]) -> int:
        """What `build` makes; REJECT where that would be too deep, or there is no room for more."""
        if self._assembler.tight:
            self._assembler.full = True
            return 0
        if self._depth >= DEPTH_MAX:
            self.too_deep = True
            return 0
        self._depth += 1
        try:
            return build()
        finally:
            self._depth -= 1

    def within_rest(self, begun: Lines) -> int:
        return self._rest_with(self._outcome(begun), within=True)


class Segment:
    """One segment: its literals, and what else it may be."""

    def __init__(
        self, assembler: Assembler, paths: Paths, words: Mapping[str, Nodes], stars: Nodes, begun: Lines
    ) -> None:
        self._assembler = assembler
        self._paths = paths
        self._words = words
        self._stars = stars
        self._begun = begun
        self._other: int | None = None

    def other(self) -> int:
        """Within a segment that is none of the literals, behind its first letter."""
        if self._other is None:
            if self._stars:
                edges, outcome = self._paths.behind(self._stars, self._begun)
                end = self._assembler.branch(edges, 0, outcome)
                self._other = self._assembler.add(State(Kind.SKIP, end, octets=Octet.PLAIN)) if edges else 0
            else:
                self._other = self._paths.within_rest(self._begun)
        return self._other

    def letters(
        self, words: Sequence[str], read: int, other: int, edges: Mapping[int, int], outcome: int
    ) -> int:
        """One of these words (sorted), of which `read` letters are; `edges` and `outcome` for the segment's end."""
        found = dict(edges)
        at = 0
        while at < len(words):
            until = at + 1
            while until < len(words) and words[until][read] == words[at][read]:
                until += 1
            found[ord(words[at][read])] = self._word(words[at:until], read + 1)
            at = until
        if not found:
            return other
        if len(found) == 1 and not outcome:
            ((byte, then),) = found.items()
            return self._assembler.literal(bytes([byte]), then, other)
        return self._assembler.branch(found, other, outcome)

    def _word(self, words: Sequence[str], read: int) -> int:
        """Letters that all of them share are read by words."""
        first, last = words[0], words[-1]
        until = read
        while until < len(first) and first[until] == last[until]:
            until += 1
        then = self._paths.deeper(lambda: self._fork(words, until))
        if not (then or self.other()):
            return 0
        return self._assembler.literal(first[read:until].encode(), then, self.other())

    def _fork(self, words: Sequence[str], read: int) -> int:
        """Behind `read` letters, where words part or one ends. What ends it is none of the letters of any other."""
        edges: dict[int, int] = {}
        outcome = 0
        if len(words[0]) == read:
            edges, outcome = self._paths.behind(self._words[words[0]] | self._stars, self._begun)
            if self.other():
                edges = {SLASH: 0, BLANK: 0, QUESTION: 0} | edges
            words = words[1:]
        return self.letters(words, read, self.other(), edges, outcome)


def _ends(nodes: Iterable[Node]) -> Lines:
    return frozenset().union(*(node.ends for node in nodes))
