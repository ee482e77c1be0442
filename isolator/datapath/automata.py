"""Automata in the kernel's maps: states, tables, outcomes, and a counter for each rule that accepts requests.

The maps have two halves. A whole policy is written into the one that is not in use, so that no packet reads states of
two; what is in a half is overwritten once nobody reads it any more (Datapath.retire). A change of the policy in force
is written behind what is in its half: entries that stay in force keep pointing there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from isolator.core.automaton.states import (
    ALTERNATIVES_MAX,
    EDGES_MAX,
    OCTETS,
    Automaton,
    Kind,
    Octet,
    State,
)
from isolator.core.model import RuleRef
from isolator.datapath.abi import (
    OUTCOME,
    OUTCOMES_MAX,
    REQUESTS_MAX,
    STATE,
    STATES_MAX,
    TABLE,
    TABLE_OTHER,
    TABLES_MAX,
)
from isolator.datapath.maps import Map

_SETS: dict[Octet, tuple[int, int]] = {
    octet: (
        sum(1 << byte for byte in range(64) if OCTETS[byte] & octet),
        sum(1 << byte - 64 for byte in range(64, 128) if OCTETS[byte] & octet),
    )
    for octet in Octet
}


class Accepted(NamedTuple):
    """How many requests a rule has accepted. `generation`: that its policy was written as a whole under; `profile` is
    the policy's."""

    generation: int
    profile: int
    rule: RuleRef
    requests: int


@dataclass(slots=True)
class Room:
    """What a half has left: the next index of each map, and where the half ends. Index 0 is nobody's."""

    states: int
    tables: int
    outcomes: int
    requests: int
    half: int

    @classmethod
    def of(cls, half: int) -> Room:
        first = 1 - half
        return cls(
            half * STATES_MAX // 2 + first, half * TABLES_MAX // 2, half * OUTCOMES_MAX // 2 + first,
            half * REQUESTS_MAX // 2 + first, half,
        )  # fmt: skip

    def has(self, automaton: Automaton) -> bool:
        """The last state of all would be TABLE_OTHER."""
        tables = sum(state.kind is Kind.TABLE for state in automaton.states)
        end = self.half + 1
        return (
            self.states + len(automaton.states) <= end * STATES_MAX // 2
            and self.tables + tables <= end * TABLES_MAX // 2
            and self.outcomes + len(automaton.outcomes) <= end * OUTCOMES_MAX // 2
            and self.requests + len(automaton.rules) <= end * REQUESTS_MAX // 2
        )


@dataclass(slots=True)
class Written:
    """One policy's automata: where each profile's begins, and who is counted where. `generation`: the first of them."""

    generation: int
    room: Room
    first: int
    starts: dict[int, int] = field(default_factory=dict)
    counted: list[tuple[int, RuleRef]] = field(default_factory=list)
    """(profile, rule) by counter, the first at `first`."""
    seen: array[int] = field(default_factory=lambda: array("Q"))
    without_room: list[int] = field(default_factory=list)


class AutomatonMaps:
    """The maps `states`, `tables`, `outcomes` and `requests`. For one thread."""

    def __init__(self, maps: Mapping[str, Map], half: int = 0) -> None:
        """`half`: the one in use, by whoever wrote there."""
        self._maps, self._half = maps, half
        self._halves: dict[int, Written] = {}
        self._unread: list[Accepted] = []

    def write(self, generation: int, automata: Mapping[int, Automaton]) -> dict[int, int]:
        """Into the half that is not in use; nobody may be reading there. Then `switch` or `discard`. Returns the state
        in which each profile's automaton begins: what finds no room is left out. Raises BpfError."""
        half = 1 - self._half
        self._unread += self._count(self._halves.get(half))
        room = Room.of(half)
        written = self._halves[half] = Written(generation, room, room.requests)
        self._append(written, automata)
        return written.starts

    def switch(self) -> None:
        """What was written is in use."""
        self._half = 1 - self._half

    def discard(self) -> None:
        """It never came into use."""
        self._halves.pop(1 - self._half, None)

    def add(self, automata: Mapping[int, Automaton]) -> dict[int, int]:
        """Behind what is in use, as far as there is room. Returns where all begin, like `write`. Raises BpfError."""
        written = self._halves.get(self._half)
        if written is None:  # another process wrote what is there: nobody knows where it ends
            return {}
        self._append(
            written, {number: each for number, each in automata.items() if number not in written.starts}
        )
        return written.starts

    def _append(self, written: Written, automata: Mapping[int, Automaton]) -> None:
        """One after the other: after an error those before it are there."""
        requests = self._maps["requests"]
        for profile, automaton in sorted(automata.items()):
            if not automaton.start:
                continue
            if not written.room.has(automaton):
                written.without_room.append(profile)
                continue
            first, count = written.room.requests, len(automaton.rules)
            requests.update_many(_numbered(first, [bytes(requests.value_room)] * count))
            written.starts[profile] = self._write(automaton, written.room)
            written.counted += [(profile, rule) for rule in automaton.rules]
            written.seen.extend([0] * count)

    def _write(self, automaton: Automaton, room: Room) -> int:
        encoding = Encoding(automaton, room)
        self._maps["tables"].update_many(_numbered(room.tables, encoding.tables))
        self._maps["outcomes"].update_many(_numbered(room.outcomes, encoding.outcomes()))
        self._maps["states"].update_many(_numbered(room.states, encoding.states))
        start = encoding.number(automaton.start)
        room.states += len(encoding.states)
        room.tables += len(encoding.tables)
        room.outcomes += len(automaton.outcomes) - 1
        room.requests += len(automaton.rules)
        return start

    def rule_of(self, generation: int, counter: int) -> RuleRef | None:
        """Whose requests are counted at this index."""
        written = self._of(generation)
        at = counter - written.first if written else -1
        return written.counted[at][1] if written and 0 <= at < len(written.counted) else None

    def without_room(self, generation: int) -> list[int]:
        """Profiles whose automata found no room."""
        written = self._of(generation)
        return list(written.without_room) if written else []

    def _of(self, generation: int) -> Written | None:
        """The policy that this generation is of, or is a change of."""
        before = [each for each in tuple(self._halves.values()) if each.generation <= generation]
        return max(before, key=lambda each: each.generation, default=None)

    def take_counts(self) -> list[Accepted]:
        """Requests accepted since the last call, of both halves."""
        taken, self._unread = self._unread, []
        return taken + [each for written in self._halves.values() for each in self._count(written)]

    def _count(self, written: Written | None) -> list[Accepted]:
        if written is None:
            return []
        before, written.seen = (
            written.seen,
            self._maps["requests"].sums(written.first, len(written.counted)),
        )
        return [
            Accepted(written.generation, profile, rule, now - then)
            for (profile, rule), then, now in zip(written.counted, before, written.seen, strict=True)
            if now != then
        ]


class Encoding:
    """An automaton as the maps have it. States are numbered from `room.states`; 0 stays 0."""

    def __init__(self, automaton: Automaton, room: Room) -> None:
        self._automaton = automaton
        self._states = room.states - 1
        self._tables = room.tables
        self._outcomes = room.outcomes - 1
        self._requests = room.requests - 1
        self.tables: list[bytes] = []
        self.states = [self._state(state) for state in automaton.states[1:]]

    def number(self, state: int) -> int:
        return self._states + state if state else 0

    def _state(self, state: State) -> bytes:
        table, low, high, count, edges = 0, 0, 0, 0, bytes(EDGES_MAX)
        match state.kind:
            case Kind.WORD:
                count = len(state.word)
                low, high = int.from_bytes(state.word, "little"), int.from_bytes(state.fold, "little")
            case Kind.BRANCH:
                count = len(state.edges)
                edges = bytes(byte for byte, _ in state.edges).ljust(EDGES_MAX, b"\0")
                low = sum(self.number(to) << 16 * at for at, (_, to) in enumerate(state.edges))
            case Kind.TABLE:
                table = self._tables + len(self.tables)
                self.tables.append(self._table(state))
            case Kind.SKIP | Kind.ONE:
                low, high = _SETS[state.octets]
            case Kind.EFFECT:
                count, low = state.lines, state.sets | state.unless << 32
            case Kind.ACCEPT:
                low = self._automaton.required
        return STATE.struct.pack(
            state.kind, count, self.number(state.next), self.number(state.other), table,
            self._outcomes + state.outcome if state.outcome else 0, edges, low, high,
        )  # fmt: skip

    def _table(self, state: State) -> bytes:
        following = [TABLE_OTHER] * 128
        for byte, to in state.edges:
            following[byte] = self.number(to)
        return TABLE.struct.pack(*following)

    def outcomes(self) -> list[bytes]:
        """Without the first, which is nobody's."""
        encoded = []
        for outcome in self._automaton.outcomes[1:]:
            needs = [need for need, _ in outcome] + [0] * (ALTERNATIVES_MAX - len(outcome))
            rules = [self._requests + rule if rule else 0 for _, rule in outcome]
            encoded.append(OUTCOME.struct.pack(*needs, *rules, *[0] * (ALTERNATIVES_MAX - len(outcome))))
        return encoded


def _numbered(first: int, values: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    return ((number.to_bytes(4, "little"), value) for number, value in enumerate(values, first))
