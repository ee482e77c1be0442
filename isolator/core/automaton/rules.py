"""A profile's rules, as far as the kernel can follow them: lines in the order in which the slow path asks them.

A line that needs something that no state can look for still stands in its place: where it could decide, Python reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from isolator.core.automaton.fields import Conditions
from isolator.core.automaton.states import ALTERNATIVES_MAX, Alternative, Outcome
from isolator.core.model import Decision, RuleRef, Verdict
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule, Profile, Ruling

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
"""That are read here: every parser knows them, and none changes what follows on the connection."""

PYTHON = 0
"""In the place of a rule: what comes to this line, Python reads."""


@dataclass(frozen=True, slots=True)
class Line:
    """`methods` None: all. `path` None: any. `need`: bits of its header conditions. `rule`: an index from 1, or PYTHON.
    `unread`: whether it matches cannot be told here."""

    methods: frozenset[str] | None
    path: PathPattern | None
    need: int
    rule: int
    unread: bool = False


class Rules:
    """The lines of a ruling, and the rules they name: `refs[0]` is nobody."""

    def __init__(self, ruling: Ruling, conditions: Conditions) -> None:
        self.refs: list[RuleRef | None] = [None]
        self.left_out: list[str] = []
        self._numbers: dict[RuleRef, int] = {}
        self._conditions = conditions
        self.lines: list[Line] = [
            self._line(http, decision) for http, decision in (*ruling.denies, *ruling.allows)
        ]
        if ruling.plain is not None:
            self.lines.append(Line(None, None, 0, self._rule(ruling.plain)))

    def _line(self, http: HttpRule, decision: Decision) -> Line:
        needs = [self._conditions.of_header(name, wanted) for name, wanted in http.headers]
        if http.hosts:
            needs.append(self._conditions.of_hosts(http.hosts))
        unread = None in needs
        if unread:
            self.left_out.append(f"{decision.rule}: a header that Python has to look at")
        need = 0
        for bits in needs:
            need |= bits or 0
        return Line(http.methods, http.path, need, PYTHON if unread else self._rule(decision), unread)

    def _rule(self, decision: Decision) -> int:
        if decision.verdict is not Verdict.ALLOW or decision.audit or decision.rule is None:
            return PYTHON
        if decision.rule not in self._numbers:
            self._numbers[decision.rule] = len(self.refs)
            self.refs.append(decision.rule)
        return self._numbers[decision.rule]


def alternatives(lines: Sequence[Line], matching: Iterable[int]) -> Outcome:
    """What is left to decide by headers, where these lines' methods and paths match. Empty: Python reads it."""
    found: list[Alternative] = []
    for at in sorted(matching):
        line = lines[at]
        found.append(Alternative(0, PYTHON) if line.unread else Alternative(line.need, line.rule))
        if not found[-1].need:
            break
        if len(found) == ALTERNATIVES_MAX - 1:
            found.append(Alternative(0, PYTHON))
            break
    if any(each.rule for each in found):
        return tuple(found)
    return ()


def ruling_of(profile: Profile) -> Ruling | None:
    """The one ruling that decides what the profile allows; None: policies in several modes decide together."""
    outcome = profile.outcome
    if outcome.trial is outcome.enforced:
        return outcome.enforced
    if outcome.enforced.flow.verdict is Verdict.ALLOW and outcome.trial.inspects:
        return outcome.trial  # nothing is enforced: what the trial allows is allowed in its name
    return None
