"""A profile's rules and the grammar of HTTP/1.1 (RFC 9112), in one automaton.

    method ─ path ─ [query] ─ version ─ header lines ─ the empty line

Methods that the same lines name share what is built of paths. It accepts less than the slow path does, and never
otherwise: a plain path, one Host, no body, nothing that changes the connection (`fields`). A profile that needs more
states than it may have keeps those that fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from isolator.core.automaton.assembler import Assembler
from isolator.core.automaton.expressions import Expressions
from isolator.core.automaton.fields import HOST_SEEN, Conditions, Fields
from isolator.core.automaton.paths import BLANK, QUESTION, Lines, Paths, tree
from isolator.core.automaton.rules import METHODS, PYTHON, Line, Rules, alternatives, ruling_of
from isolator.core.automaton.states import Automaton, Kind, Octet, Outcome, State
from isolator.core.pattern import REGEX
from isolator.core.policy import Outcome as PolicyOutcome
from isolator.core.policy import Profile, Ruling

STATES_MAX = 24_576
"""States of one profile. 10,000 rules of two segments each take half of them."""

TABLES_MAX = 4_096
"""And how many of them are tables."""

MODES = "policies in different modes decide together"


def build(profile: Profile, states: int = STATES_MAX, tables: int = TABLES_MAX) -> Automaton:
    """At most so many states and tables. One that accepts nothing has start 0."""
    ruling = ruling_of(profile)
    if ruling is None or not ruling.inspects:
        return Automaton([], 0, [], HOST_SEEN, (), (MODES,))
    return _Build(ruling, states, tables).automaton()


class Automata:
    """Those of a policy's profiles. What an outcome's automaton is, it stays: it is built once."""

    def __init__(self) -> None:
        self._by_outcome: dict[PolicyOutcome, Automaton] = {}

    def compile(self, profiles: Mapping[int, Profile]) -> dict[int, Automaton]:
        """By profile. Those of other profiles are forgotten."""
        wanted = {each.outcome for each in profiles.values()}
        self._by_outcome = {
            outcome: automaton for outcome, automaton in self._by_outcome.items() if outcome in wanted
        }
        return self.add(profiles)

    def add(self, profiles: Mapping[int, Profile]) -> dict[int, Automaton]:
        """Of more profiles. By profile."""
        for each in profiles.values():
            if each.outcome not in self._by_outcome:
                self._by_outcome[each.outcome] = build(each)
        return {number: self._by_outcome[each.outcome] for number, each in profiles.items()}


class _Build:
    def __init__(self, ruling: Ruling, states: int, tables: int) -> None:
        conditions = Conditions()
        self._rules = Rules(ruling, conditions)
        self._assembler = Assembler(states, tables)
        fields = Fields(self._assembler, conditions)
        self._version = self._assembler.literal(b"HTTP/1.1\r\n", fields.start)
        blank = self._assembler.branch({BLANK: self._version})
        self._query = self._assembler.add(State(Kind.SKIP, blank, octets=Octet.QUERY))
        self._outcomes: dict[Outcome, int] = {(): 0}
        self._known: dict[Lines, int] = {}
        self._targets: dict[tuple[int, ...], int] = {}

    def automaton(self) -> Automaton:
        words = {f"{method} ".encode(): to for method in METHODS if (to := self._target(method))}
        start = self._assembler.choice(words) if words else 0
        refs = tuple(ref for ref in self._rules.refs if ref is not None)
        left_out = dict.fromkeys(self._rules.left_out)
        if self._assembler.full:
            left_out["rules that found no room among the states"] = None
        return Automaton(
            self._assembler.states, start, list(self._outcomes), HOST_SEEN, refs, tuple(left_out)
        )

    def _target(self, method: str) -> int:
        """The states that read a request target with this method."""
        lines = self._rules.lines
        asked = tuple(at for at, line in enumerate(lines) if line.methods is None or method in line.methods)
        if not any(lines[at].rule for at in asked):
            return 0
        if asked not in self._targets:
            self._targets[asked] = self._paths({at: lines[at] for at in asked})
        return self._targets[asked]

    def _paths(self, asked: dict[int, Line]) -> int:
        always = frozenset(at for at, line in asked.items() if line.path is None)
        sources = {at: line.path.source for at, line in asked.items() if line.path is not None}
        regexes = frozenset(at for at, source in sources.items() if source.startswith(REGEX))
        if regexes:
            expressions = Expressions(sources)
            if expressions.explore():
                end = {BLANK: self._version, QUESTION: self._query}
                return expressions.start(self._assembler, lambda found: self._outcome(found | always), end)
            self._rules.left_out.append("regular expressions that take too many states together")
        for at in regexes:  # wherever one of them could decide, Python reads
            self._rules.lines[at] = replace(asked[at], rule=PYTHON, unread=True)
        paths = Paths(
            self._assembler, lambda found: self._outcome(found | always | regexes), self._version, self._query
        )
        started = paths.start(tree((at, source) for at, source in sources.items() if at not in regexes))
        if paths.too_deep:
            self._rules.left_out.append("paths that branch too often")
        return started

    def _outcome(self, lines: Lines) -> int:
        found = self._known.get(lines)
        if found is None:
            outcome = alternatives(self._rules.lines, lines)
            found = self._known[lines] = self._outcomes.setdefault(outcome, len(self._outcomes))
        return found
