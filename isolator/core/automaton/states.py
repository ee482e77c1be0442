"""The automaton's vocabulary, and how it reads: the model of what bpf/isolator_automaton.h does, step by step.

A state looks at the byte at hand and says where to go on. An automaton ends in ACCEPT, behind the last byte of a
complete and allowed request without a body, or in REJECT: then Python reads the bytes. It never denies.

Three registers go with it: the outcome (which rules the request line leaves, `Alternative`), bits (which header
conditions hold) and the number of header lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import NamedTuple

from isolator.core.model import RuleRef
from parsers.http1 import HEADERS_MAX

HEAD_MAX = 1460
"""Bytes of a head that the kernel reads: one wire segment (R2)."""

STEPS_MAX = 512
"""Steps before ACCEPT that one head may take: what a packet may cost. Whoever needs more is read by Python."""

STRIDE = 16
"""Bytes that SKIP reads in one step; VALUE reads a word, or up to a tab."""

WORD_MAX, EDGES_MAX = 8, 4


class Kind(IntEnum):
    """What a state does (enum state_kind)."""

    REJECT = 0
    WORD = 1  # the next bytes are these: go on behind them; else `other`, with nothing read
    BRANCH = 2  # one byte out of up to four, each leads somewhere; else `other`, with nothing read
    TABLE = 3  # one byte, likewise, by a table
    SKIP = 4  # read on while bytes are of a class, then `next`
    ONE = 5  # one byte of a class, then `next`
    VALUE = 6  # the rest of a header line, its CRLF included, then `next`
    EFFECT = 7  # changes bits, reads nothing, then `next`
    ACCEPT = 8


class Octet(IntFlag):
    """Classes of bytes (the table `octets`)."""

    PLAIN = 1  # of a path segment that nothing normalises (parsers.path)
    SEGMENT = 2  # with which such a segment begins
    QUERY = 4
    TOKEN = 8  # RFC 9110 section 5.6.2
    HOST = 16  # of a label
    DIGIT = 32


def _classes(byte: int) -> Octet:
    character = chr(byte)
    alphanumeric = character.isascii() and character.isalnum()
    found = Octet(0)
    if alphanumeric or character in "_~-":
        found |= Octet.PLAIN | Octet.SEGMENT | Octet.HOST
    if character == ".":
        found |= Octet.PLAIN
    if 0x21 <= byte <= 0x7E and character != "#":
        found |= Octet.QUERY
    if alphanumeric or character in "!#$%&'*+-.^_`|~":
        found |= Octet.TOKEN
    if character.isascii() and character.isdigit():
        found |= Octet.DIGIT
    return found


OCTETS: tuple[Octet, ...] = tuple(_classes(byte) for byte in range(256))


def any_of(octets: Octet) -> str:
    """One byte of these classes, for Python's `re`."""
    return "[" + "".join(re.escape(chr(byte)) for byte in range(128) if OCTETS[byte] & octets) + "]"


PLAIN_SEGMENT = f"{any_of(Octet.SEGMENT)}{any_of(Octet.PLAIN)}*"
"""A path segment that nothing normalises, likewise."""


class State(NamedTuple):
    """One state; what a kind has no use for is 0. Numbers of states count from 1, 0 is REJECT.

    `outcome`: the register's new value on the way in, 0: as it is. `edges`: byte → state, of BRANCH and TABLE.
    `fold`: in a WORD, bits that are set in the bytes read before they are compared (letters of either case).
    EFFECT: if any bit of `unless` is set, REJECT; else `sets` is set, and `lines` header lines are counted.
    """

    kind: Kind
    next: int = 0
    other: int = 0
    outcome: int = 0
    word: bytes = b""
    fold: bytes = b""
    edges: tuple[tuple[int, int], ...] = ()
    octets: Octet = Octet(0)
    sets: int = 0
    unless: int = 0
    lines: int = 0


class Alternative(NamedTuple):
    """If all bits of `need` are set, `rule` (an index of Automaton.rules, from 1) has decided; 0: Python reads it."""

    need: int
    rule: int


Outcome = tuple[Alternative, ...]
"""Tried in order; none that fits: Python."""

ALTERNATIVES_MAX = 4
REJECTED = State(Kind.REJECT)


@dataclass(frozen=True, slots=True)
class Automaton:
    """`states[0]` is REJECT, `outcomes[0]` nobody's; `required`: bits without which nothing is accepted."""

    states: Sequence[State]
    start: int
    outcomes: Sequence[Outcome]
    required: int
    rules: tuple[RuleRef, ...]
    """Those that alternatives name, from 1."""
    left_out: tuple[str, ...] = field(default=())
    """What of the profile is read by Python alone, and why."""


class Stop(NamedTuple):
    """How a reading ended: the rule, or 0; the state in which it did, and how many bytes it had read."""

    rule: int
    state: int
    at: int


def run(automaton: Automaton, data: bytes) -> Stop:
    """What the kernel makes of one segment's payload."""
    at, number, outcome, bits, lines = 0, automaton.start, 0, 0, 0
    if len(data) > HEAD_MAX:
        return Stop(0, 0, 0)
    for _ in range(STEPS_MAX + 1):
        state = automaton.states[number]
        outcome = state.outcome or outcome
        following = 0
        match state.kind:
            case Kind.REJECT:
                return Stop(0, number, at)
            case Kind.ACCEPT:
                complete = at == len(data) and bits & automaton.required == automaton.required
                return Stop(_decide(automaton.outcomes[outcome], bits) if complete else 0, number, at)
            case Kind.WORD:
                read = data[at : at + len(state.word)]
                same = len(read) == len(state.word) and all(
                    byte | fold == wanted
                    for byte, fold, wanted in zip(read, state.fold, state.word, strict=True)
                )
                following = state.next if same else state.other
                at += len(read) if same else 0
            case Kind.BRANCH | Kind.TABLE:
                target = dict(state.edges).get(data[at]) if at < len(data) else None
                following = state.other if target is None else target
                at += target is not None
            case Kind.SKIP:
                end = at + STRIDE
                while at < end and at < len(data) and state.octets & OCTETS[data[at]]:
                    at += 1
                following = number if at == end else state.next
            case Kind.ONE:
                fits = at < len(data) and bool(state.octets & OCTETS[data[at]])
                following = state.next if fits else 0
                at += fits
            case Kind.VALUE:
                end = at + WORD_MAX
                while at < end and at < len(data) and _is_text(data[at]):
                    at += 1
                if at == end:
                    following = number
                elif data[at : at + 1] == b"\t":
                    following, at = number, at + 1
                elif data[at : at + 2] == b"\r\n" and lines < HEADERS_MAX:
                    following, at, lines = state.next, at + 2, lines + 1
            case Kind.EFFECT:
                lines += state.lines
                following = 0 if bits & state.unless or lines > HEADERS_MAX else state.next
                bits |= state.sets
        number = following
    return Stop(0, number, at)


def _is_text(byte: int) -> bool:
    """RFC 9110 section 5.5: of a value, no control character; the tab is read apart."""
    return byte >= 0x20 and byte != 0x7F


def _decide(outcome: Outcome, bits: int) -> int:
    return next((rule for need, rule in outcome if bits & need == need), 0)
