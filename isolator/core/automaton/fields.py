"""Header lines as states: which of them are read, which conditions of rules hold, and what Python has to see.

    line ─ watched name ":" ─ value ─▶ a bit is set ─▶ line
      ├── a name that frames, routes or changes the connection ─▶ Python
      ├── any other name ":" any value ─▶ line
      └── empty: the head ends

Whatever is watched and comes twice is Python's. Values are compared as the slow path does, without the blanks around
them; where there are more blanks than the one that everybody writes, Python looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import TypeVar

from isolator.core.automaton.assembler import Assembler, both_cases, branching, by_first, common_prefix
from isolator.core.automaton.hosts import HostNames
from isolator.core.automaton.states import Kind, Octet, State
from isolator.core.pattern import HostPattern

HOST_SEEN = 1
BITS_MAX = 32
VARIANTS_MAX = 4
"""Dashes in a watched name: each may come as `_`."""

REFUSED = (
    "content-length", "content_length", "transfer-encoding", "transfer_encoding",
    "upgrade", "expect", "te", "proxy-connection",
)  # fmt: skip
"""They frame a body, change the connection, or mean one of both to somebody."""

CONNECTION = ("keep-alive", "close")
"""Neither changes what the next bytes are; other options of a connection do."""

COMMON = ("accept", "accept-encoding", "accept-language", "user-agent", "cookie", "referer")
"""Names with nothing to decide that are read by words, since most heads have them."""

_T = TypeVar("_T")


class Conditions:
    """Bits for what rules ask of headers."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.values: dict[tuple[str, str], int] = {}
        self.hosts: dict[tuple[HostPattern, ...], int] = {}
        self._next = HOST_SEEN << 1

    def of_header(self, name: str, wanted: str | None) -> int | None:
        """None: it is not looked for here."""
        taken = name in REFUSED or name in ("host", "connection") or "_" in name
        if taken or name.count("-") > VARIANTS_MAX:
            return None
        seen = self._bit(self.names, name)
        if wanted is None or seen is None:
            return seen
        equal = self._bit(self.values, (name, wanted))
        return None if equal is None else seen | equal

    def of_hosts(self, hosts: tuple[HostPattern, ...]) -> int | None:
        """Whether one of them is asked for."""
        return self._bit(self.hosts, hosts)

    def _bit(self, bits: dict[_T, int], what: _T) -> int | None:
        if what not in bits:
            if self._next >= 1 << BITS_MAX:
                return None
            bits[what] = self._next
            self._next <<= 1
        return bits[what]


class Fields:
    """Builds the states for one profile's conditions; `start` is where a header line begins."""

    def __init__(self, assembler: Assembler, conditions: Conditions) -> None:
        self._assembler = assembler
        self._conditions = conditions
        self.start = assembler.reserve()
        self._any_value = assembler.add(State(Kind.VALUE, self.start))
        colon = assembler.branch({ord(":"): self._any_value})
        self._any_name = assembler.add(State(Kind.SKIP, colon, octets=Octet.TOKEN))
        assembler.put(self.start, self._line())

    def _line(self) -> State:
        watched: dict[str, int] = {
            **dict.fromkeys(COMMON, self._any_value),
            **dict.fromkeys(REFUSED, 0),
            "host": self._blank(self._host()),
            "connection": self._blank(self._connection()),
        }
        for name in self._conditions.names:
            for variant in _variants(name):
                watched[variant] = 0
            watched[name] = self._blank(self._watched(name))
        names = by_first({name.encode() + b":": to for name, to in watched.items()})
        first = {
            letter: self._assembler.choice(rests, self._any_name, fold=True)
            for letter, rests in names.items()
        }
        accept = self._assembler.add(State(Kind.ACCEPT))
        edges = both_cases(first) | {ord("\r"): self._assembler.literal(b"\n", accept)}
        token = State(Kind.ONE, self._any_name, octets=Octet.TOKEN)
        return branching(edges, self._assembler.add(token))

    # -- values ---------------------------------------------------------------------------------------------

    def _blank(self, value: int) -> int:
        """The blank before a value."""
        return self._assembler.literal(b" ", value, value)

    def _end(self, sets: int, unless: int) -> int:
        """Behind a value's last byte, the CR read."""
        effect = State(Kind.EFFECT, self.start, sets=sets, unless=unless, lines=1)
        return self._assembler.literal(b"\n", self._assembler.add(effect))

    def _connection(self) -> int:
        end = self._assembler.literal(b"\r", self._end(0, 0))
        keep, close = (self._assembler.literal(text.encode()[1:], end, fold=True) for text in CONNECTION)
        return self._assembler.branch(both_cases({ord("k"): keep, ord("c"): close}))

    def _watched(self, name: str) -> int:
        """The value of a header that rules ask for: which of theirs it is, if any."""
        seen = self._conditions.names[name]
        other = self._assembler.add(State(Kind.EFFECT, self.start, sets=seen, unless=seen))
        anything = self._assembler.add(State(Kind.VALUE, other))
        ends = {
            wanted.encode("latin-1"): self._end(seen | bit, seen)
            for (each, wanted), bit in self._conditions.values.items()
            if each == name and _is_a_value(wanted)
        }
        ends.setdefault(b"", self._end(seen, seen))
        return self._value(ends, anything)

    def _value(self, ends: Mapping[bytes, int], anything: int) -> int:
        """Rests of the values that are looked for. Blanks behind one, or where one could begin, are Python's."""
        shared = common_prefix(ends)
        if shared:
            rest = self._value({value[len(shared) :]: to for value, to in ends.items()}, anything)
            return self._assembler.literal(shared, rest, anything)
        edges = {
            letter: self._value({v[1:]: to for v, to in ends.items() if v[:1] == bytes([letter])}, anything)
            for letter in {value[0] for value in ends if value}
        }
        if b"" in ends:
            edges = {ord(" "): 0, ord("\t"): 0, **edges, ord("\r"): ends[b""]}
        return self._assembler.branch(edges, anything)

    # -- Host -----------------------------------------------------------------------------------------------

    def _host(self) -> int:
        def end(bits: int) -> int:
            return self._end(HOST_SEEN | bits, HOST_SEEN)

        return HostNames(self._assembler, self._conditions.hosts, end).start


def _variants(name: str) -> Iterable[str]:
    """Spellings that some take for the same name (RFC 3875 section 4.1.18)."""
    return map("".join, product(*(("-", "_") if letter == "-" else (letter,) for letter in name)))


def _is_a_value(wanted: str) -> bool:
    """Whether a header can have it."""
    printable = all(
        character == "\t" or (0x20 <= ord(character) <= 0xFF and character != "\x7f") for character in wanted
    )
    return printable and wanted == wanted.strip(" \t")
