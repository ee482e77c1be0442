"""Why a request is Python's, held against what an automaton accepts."""

from __future__ import annotations

import pytest

from isolator.core.automaton.build import build
from isolator.core.automaton.misfit import Arrival, misfit
from isolator.core.automaton.states import run
from isolator.core.model import Decision, DropReason, RuleRef, Verdict
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule
from isolator.core.tally import Misfit, Tally
from isolator.offload import accepting
from parsers.http1 import parse_request
from tests.core.automaton.world import profile, rule

ANY = profile(rule("any", HttpRule(None, PathPattern("/**"))))
AUTOMATON = build(ANY)
RULES = accepting(AUTOMATON)
ARRIVAL = Arrival(100, whole=True, alone=True, lendable=True, asked=True)
ALLOWED = Decision(Verdict.ALLOW, rule=RuleRef("shop", "any"))
PLAIN = b"GET /a HTTP/1.1\r\nHost: api\r\n\r\n"


def why(head: bytes = PLAIN, arrival: Arrival = ARRIVAL, tally: Tally | None = None) -> Misfit:
    return misfit(parse_request(head), ALLOWED, arrival, tally or Tally(RULES))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"POST /a HTTP/1.1\r\nHost: api\r\nContent-Length: 3\r\n\r\n", Misfit.BODY),
        (b"POST /a HTTP/1.1\r\nHost: api\r\nContent-Length: 0\r\n\r\n", Misfit.BODY),
        (b"POST /a HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n", Misfit.BODY),
        (b"GET /a HTTP/1.1\r\nHost: api\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", Misfit.UPGRADE),
        (b"GET /a HTTP/1.1\r\nHost: api\r\nExpect: 100-continue\r\n\r\n", Misfit.EXPECT),
        (b"GET /a HTTP/1.0\r\nHost: api\r\n\r\n", Misfit.VERSION),
        (b"TRACE /a HTTP/1.1\r\nHost: api\r\n\r\n", Misfit.METHOD),
        (b"GET /a/%62 HTTP/1.1\r\nHost: api\r\n\r\n", Misfit.PATH),
        (b"GET /a/../b HTTP/1.1\r\nHost: api\r\n\r\n", Misfit.PATH),
        (b"GET http://api/a HTTP/1.1\r\nHost: api\r\n\r\n", Misfit.PATH),
        (b"GET /a HTTP/1.1\r\nHost: [::1]\r\n\r\n", Misfit.HEADER),
        (b"GET /a HTTP/1.1\r\nHost: api:50000\r\n\r\n", Misfit.HEADER),
        (b"GET /a HTTP/1.1\r\nHost: api\r\nTE: trailers\r\n\r\n", Misfit.HEADER),
        (b"GET /a HTTP/1.1\r\nHost: api\r\nConnection: close, x\r\n\r\n", Misfit.HEADER),
    ],
)  # fmt: skip
def test_of_the_request(head: bytes, reason: Misfit) -> None:
    assert not run(AUTOMATON, head).rule, "the kernel would accept it"
    assert why(head) is reason


@pytest.mark.parametrize(
    "head",
    [
        PLAIN,
        b"GET / HTTP/1.1\r\nHost: api.local:8080\r\n\r\n",
        b"DELETE /a/b.c/?x=%20/..&y HTTP/1.1\r\nHOST: API\r\nConnection: Close\r\n\r\n",
        b"GET /a? HTTP/1.1\r\nHost: api\r\nX-Trace: 1\r\nconnection: keep-alive\r\n\r\n",
    ],
)
def test_what_the_automaton_accepts_has_no_reason_of_its_own(head: bytes) -> None:
    assert run(AUTOMATON, head).rule
    assert why(head) is Misfit.OTHER


@pytest.mark.parametrize(
    ("arrival", "reason"),
    [
        (ARRIVAL._replace(length=1461), Misfit.LONG),
        (ARRIVAL._replace(alone=False), Misfit.PIPELINED),
        (ARRIVAL._replace(whole=False), Misfit.SEGMENTS),
        (ARRIVAL._replace(lendable=False), Misfit.NO_AUTOMATON),
        (ARRIVAL._replace(asked=False), Misfit.CONNECTION),
    ],
)
def test_of_how_it_came(arrival: Arrival, reason: Misfit) -> None:
    assert why(arrival=arrival) is reason


def test_of_the_profile() -> None:
    assert why(tally=Tally()) is Misfit.CONFIGURED
    assert why(tally=Tally(frozenset())) is Misfit.NO_AUTOMATON
    assert why(tally=Tally(frozenset({RuleRef("shop", "else")}))) is Misfit.RULE


def test_what_is_denied_or_audited_is_always_pythons() -> None:
    request, tally = parse_request(PLAIN), Tally(RULES)
    denied = Decision(Verdict.DROP, DropReason.HTTP_NO_RULE)
    assert misfit(request, denied, ARRIVAL, tally) is Misfit.DENIED
    assert misfit(request, Decision(Verdict.ALLOW, audit=True), ARRIVAL, tally) is Misfit.AUDITED
    assert misfit(None, ALLOWED, ARRIVAL, tally) is Misfit.UNREADABLE
