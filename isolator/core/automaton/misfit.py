"""Why a request that Python decided was not the kernel's: the first reason that holds.

It tells what can be told from the parsed request. What an automaton refuses for anything else (blanks around a value,
the client not having seen the last answer whole) is OTHER.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from isolator.core.automaton.fields import CONNECTION, REFUSED
from isolator.core.automaton.hosts import PORT_DIGITS
from isolator.core.automaton.rules import METHODS
from isolator.core.automaton.states import HEAD_MAX, PLAIN_SEGMENT, Octet, any_of
from isolator.core.model import Decision, Verdict
from isolator.core.tally import Misfit, Tally
from parsers.http1 import Request

_PLAIN_TARGET = re.compile(rf"/(?:{PLAIN_SEGMENT}(?:/{PLAIN_SEGMENT})*/?)?(?:\?{any_of(Octet.QUERY)}*)?")


class Arrival(NamedTuple):
    """How a request came. `length`: of its head, 0 where it is not known alone; `whole`: in one frame; `alone`: no
    other was under way; `lendable`: its connection has an automaton; `asked`: the kernel had the connection."""

    length: int
    whole: bool
    alone: bool
    lendable: bool
    asked: bool


def misfit(request: Request | None, decision: Decision, arrival: Arrival, tally: Tally) -> Misfit:
    if decision.verdict is not Verdict.ALLOW:
        return Misfit.DENIED
    if decision.audit or decision.trial:
        return Misfit.AUDITED
    if request is None:
        return Misfit.UNREADABLE
    found = next(_of_request(request), None) or next(_of_arrival(arrival), None)
    return found or _of_profile(decision, arrival, tally)


def _of_request(request: Request) -> Iterator[Misfit]:
    if request.body is not None or request.chunked:
        yield Misfit.BODY
    if request.upgrade is not None:
        yield Misfit.UPGRADE
    if request.expect_continue:
        yield Misfit.EXPECT
    if request.version != (1, 1):
        yield Misfit.VERSION
    if request.method not in METHODS:
        yield Misfit.METHOD
    if not _PLAIN_TARGET.fullmatch(request.target):
        yield Misfit.PATH
    if _reads_header(request):
        yield Misfit.HEADER


def _reads_header(request: Request) -> bool:
    if not request.host or request.host.startswith("[") or len(str(request.port or "")) > PORT_DIGITS:
        return True
    return any(
        name in REFUSED or (name == "connection" and value.lower() not in CONNECTION)
        for name, value in request.headers
    )


def _of_arrival(arrival: Arrival) -> Iterator[Misfit]:
    if arrival.length > HEAD_MAX:
        yield Misfit.LONG
    if not arrival.alone:
        yield Misfit.PIPELINED
    if not arrival.whole:
        yield Misfit.SEGMENTS


def _of_profile(decision: Decision, arrival: Arrival, tally: Tally) -> Misfit:
    if tally.rules is None:
        return Misfit.CONFIGURED
    if decision.rule not in tally.rules:
        return Misfit.RULE if tally.rules else Misfit.NO_AUTOMATON
    if not arrival.lendable:
        return Misfit.NO_AUTOMATON
    return Misfit.OTHER if arrival.asked else Misfit.CONNECTION
