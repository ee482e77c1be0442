"""Who decides a profile's requests, and why it was not the kernel."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum

from isolator.core.model import RuleRef


class Misfit(StrEnum):
    """Why a request was Python's. As people read it."""

    DENIED = "denied"
    AUDITED = "audited"
    UNREADABLE = "not HTTP"
    BODY = "a body"
    UPGRADE = "an upgrade"
    EXPECT = "Expect"
    VERSION = "HTTP/1.0"
    METHOD = "another method"
    PATH = "a path to be normalised"
    HEADER = "a header line that Python reads"
    LONG = "a head longer than one segment"
    PIPELINED = "pipelined"
    SEGMENTS = "in several segments"
    CONFIGURED = "datapath.l7: python"
    RULE = "its rule is left out of the automaton"
    NO_AUTOMATON = "no automaton"
    CONNECTION = "its connection was with Python"
    OTHER = "other"


class Tally:
    """Of one profile; it outlives policy generations that leave the profile as it is.

    `rules`: those that its automaton can accept by; None: no automaton was wanted."""

    __slots__ = ("kernel", "python", "rules", "why")

    def __init__(self, rules: frozenset[RuleRef] | None = None) -> None:
        self.rules = rules
        self.kernel = 0
        self.python = 0
        self.why: Counter[Misfit] = Counter()
        """Of those that were looked at: everything denied or audited, and allowed ones at a bounded rate."""
