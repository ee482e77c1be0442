"""Whose requests the kernel decides and whose Python, by profile; it outlives policies.

    a whole policy ─ prepared (worker) ─┐
    a change of it ─ changed (worker) ──┴▶ Generation ─ put_in_force ─▶ view, total
                                              ▲
    the kernel's counts ─ add ────────────────┘      Python counts by itself (Profile.tally)

A policy and its changes are one Generation. The last three are kept: the kernel's counts come late, and frames may be
under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from isolator.control.agent_view import OffloadStatus, ProfileStatus, Requests
from isolator.core.automaton.states import Automaton
from isolator.core.compile import PolicyEntry
from isolator.core.model import Direction, Endpoint, RuleRef
from isolator.core.policy import Outcome, Profile, protocol_name
from isolator.core.standing import Tables
from isolator.core.tally import Misfit, Tally
from isolator.datapath.abi import STATES_MAX
from isolator.datapath.automata import Accepted

KEPT = 3
NO_ROOM = "all of it: no room among the states of all profiles"

Use = tuple[int, Direction, int, int]
"""entry's endpoint, direction, protocol, port"""


@dataclass(frozen=True, slots=True)
class Generation:
    """`number`: that the policy was written as a whole under. `automata` is empty with `datapath.l7: python`. `uses`:
    by profile, what it is for."""

    number: int
    profiles: dict[int, Profile]
    automata: dict[int, Automaton]
    uses: dict[int, set[Use]]
    tables: Tables

    def new(self, profiles: Mapping[int, Profile]) -> dict[int, Profile]:
        """Those that a change has added."""
        return {number: each for number, each in profiles.items() if number not in self.profiles}


class Offload:
    """`prepared` is for the worker, all else for the event loop."""

    def __init__(self) -> None:
        self._generations: dict[int, Generation] = {}  # the last is in force
        self._gone = Requests()
        self._why_gone: Counter[Misfit] = Counter()

    def prepared(
        self,
        number: int,
        profiles: Mapping[int, Profile],
        automata: Mapping[int, Automaton],
        entries: Iterable[PolicyEntry],
        tables: Tables,
    ) -> Generation:
        """A whole policy. Profiles that stay as they are keep their tally."""
        return Generation(
            number, self._tallied(profiles, automata), dict(automata), uses_of(entries, {}), tables
        )

    def changed(
        self,
        profiles: Mapping[int, Profile],
        automata: Mapping[int, Automaton],
        entries: Iterable[PolicyEntry],
        tables: Tables,
    ) -> Generation:
        """The one in force with these profiles, automata and entries more. `tables`: all."""
        before = self.in_force
        return Generation(
            before.number,
            before.profiles | self._tallied(profiles, automata),
            {**before.automata, **automata},
            uses_of(entries, before.uses),
            tables,
        )

    @property
    def in_force(self) -> Generation:
        """Once there is one."""
        return next(reversed(self._generations.values()))

    def _tallied(
        self, profiles: Mapping[int, Profile], automata: Mapping[int, Automaton]
    ) -> dict[int, Profile]:
        if not profiles:
            return {}
        kept: dict[Outcome, Tally] = {
            profile.outcome: profile.tally
            for generation in tuple(self._generations.values())
            for profile in generation.profiles.values()
        }
        return {
            number: replace(
                profile, tally=kept.get(profile.outcome) or Tally(accepting(automata.get(number)))
            )
            for number, profile in profiles.items()
        }

    def put_in_force(self, generation: Generation) -> None:
        self._generations[generation.number] = generation  # a change has all that was there before it
        before = self._tallies()
        for number in list(self._generations)[:-KEPT]:
            del self._generations[number]
        here = {id(tally) for tally in self._tallies()}
        for tally in before:
            if id(tally) not in here:
                self._gone += Requests(tally.kernel, tally.python)
                self._why_gone += tally.why

    def add(self, counts: Iterable[Accepted]) -> None:
        """What the kernel has accepted."""
        for each in counts:
            generation = self._generations.get(each.generation)
            profile = generation.profiles.get(each.profile) if generation else None
            if profile is not None:
                profile.tally.kernel += each.requests
            else:
                self._gone += Requests(each.requests, 0)

    @property
    def total(self) -> Requests:
        """Since the agent's start."""
        return sum((Requests(each.kernel, each.python) for each in self._tallies()), self._gone)

    @property
    def why(self) -> Counter[Misfit]:
        """Of requests that were looked at."""
        return sum((tally.why for tally in self._tallies()), self._why_gone.copy())

    def _tallies(self) -> list[Tally]:
        found = {
            id(profile.tally): profile.tally
            for generation in self._generations.values()
            for profile in generation.profiles.values()
        }
        return list(found.values())

    # -- told -----------------------------------------------------------------------------------------------

    def status(
        self, endpoints: Mapping[int, Endpoint], l7: str, without_room: Iterable[int]
    ) -> OffloadStatus:
        """`endpoints` by number."""
        without = set(without_room)
        states, profiles = 0, []
        if self._generations:
            generation = self.in_force
            names: dict[tuple[int, Direction], list[str]] = {}
            for (number, direction), table in generation.tables.items():
                if number in endpoints:
                    names.setdefault((table, direction), []).append(endpoints[number].name)
            profiles = [
                profile_status(generation, number, names, number in without) for number in generation.profiles
            ]
            states = sum(each.states for each in profiles)
        return OffloadStatus(l7, self.total, states, STATES_MAX // 2, profiles)


def accepting(automaton: Automaton | None) -> frozenset[RuleRef] | None:
    """The rules that an automaton can accept by."""
    if automaton is None:
        return None
    named = {each.rule for outcome in automaton.outcomes for each in outcome}
    return frozenset(automaton.rules[number - 1] for number in named if number)


def uses_of(entries: Iterable[PolicyEntry], before: Mapping[int, set[Use]]) -> dict[int, set[Use]]:
    """And those before."""
    more: dict[int, set[Use]] = {}
    for e in entries:
        if e.profile:
            more.setdefault(e.profile, set()).add((e.endpoint, e.direction, e.protocol, e.port))
    return {**before, **{profile: before.get(profile, set()) | uses for profile, uses in more.items()}}


def profile_status(
    generation: Generation, number: int, names: Mapping[tuple[int, Direction], list[str]], without_room: bool
) -> ProfileStatus:
    """`names`: of a table's endpoints."""
    profile, automaton = generation.profiles[number], generation.automata.get(number)
    uses = generation.uses.get(number, set())
    tally = profile.tally
    written = automaton is not None and automaton.start and not without_room
    return ProfileStatus(
        rules=list(dict.fromkeys(str(rule) for rule in rules_of(profile.outcome))),
        endpoints=sorted({name for use in uses for name in names.get(use[:2], ())}),
        ports=sorted({port_text(*use[1:]) for use in uses}),
        requests=Requests(tally.kernel, tally.python),
        why=dict(tally.why.most_common()),
        states=len(automaton.states) - 1 if automaton is not None and written else 0,
        left_out=[*(automaton.left_out if automaton else ()), *([NO_ROOM] if without_room else [])],
    )


def rules_of(outcome: Outcome) -> Iterator[RuleRef]:
    for ruling in (outcome.enforced, outcome.trial):
        decisions = [decision for _, decision in (*ruling.denies, *ruling.allows)]
        for decision in (*decisions, *([ruling.plain] if ruling.plain else [])):
            if decision.rule is not None:
                yield decision.rule


def port_text(direction: Direction, protocol: int, port: int) -> str:
    return f"{direction.name.lower()} {protocol_name(protocol)}/{port or 'any'}"
