"""Where a denial may stand: right behind the answers to the requests that were allowed before it.

Answers pass in the kernel unseen. What is known of them when a request is denied: how far the server's half has
come, and how the answer that began at the mark began (its first bytes are kept). From that `locate` tells whether
they are complete, and if not, gives the dissector that finds their end in what is still to come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from isolator.core.model import Decision, DropReason
from parsers.errors import DissectError
from parsers.http1 import AnswerDissector, Request


@dataclass(frozen=True, slots=True)
class Located:
    """`done`: complete where the server's half stands. Otherwise `dissector` goes on at sequence number `at`,
    with `begun` the bytes from there on that have passed; without a dissector nobody can tell."""

    done: bool
    dissector: AnswerDissector | None = None
    at: int = 0
    begun: bytes = b""


UNKNOWN = Located(done=False)


def locate(mark: int, beginning: bytes, server_at: int, methods: Sequence[str]) -> Located:
    """How far the answers to `methods` are, which begin at `mark`, when the server's half stands at `server_at`."""
    passed = (server_at - mark) & 0xFFFFFFFF
    beginning = beginning[:passed]
    dissector = AnswerDissector(deque(methods))
    at = 0
    try:
        while dissector.outstanding:
            if at >= passed:
                return Located(False, dissector, (mark + at) & 0xFFFFFFFF)
            if at >= len(beginning):
                return UNKNOWN
            piece = dissector.advance(beginning, at)
            if piece is None:
                if len(beginning) < passed:
                    return UNKNOWN
                return Located(False, dissector, (mark + at) & 0xFFFFFFFF, beginning[at:])
            at += piece.length
    except DissectError:
        return UNKNOWN
    if at > passed:  # the rest of the last body is still to come; nothing else is
        return Located(False, dissector, (mark + at) & 0xFFFFFFFF)
    return Located(True) if at == passed else UNKNOWN


_WHY = {
    DropReason.HTTP_MALFORMED: "the request is malformed",
    DropReason.HTTP_AMBIGUOUS: "two servers could read the request differently",
    DropReason.HTTP_TOO_LONG: "the request's head is too long",
    DropReason.HTTP_UPGRADE: "the request asks for another protocol",
    DropReason.HTTP_NO_RULE: "no rule allows the request",
    DropReason.HTTP_DENY: "a rule denies the request",
}


def denial(decision: Decision, request: Request | None) -> bytes:
    """The answer to a denied request: 403, the policy and the rule named (RFC 9110 section 15.5.4)."""
    why = _WHY.get(decision.reason, "the policy denies it")
    source = (
        f"policy {decision.rule.policy}, rule {decision.rule.rule}" if decision.rule else "no policy's rule"
    )
    body = f"Denied by Isolator: {why} ({decision.reason.name}; {source}).\n".encode()
    head = (
        "HTTP/1.1 403 Forbidden\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n"
        f"X-Isolator-Reason: {decision.reason.name}\r\n"
        f"X-Isolator-Rule: {decision.rule or 'none'}\r\n\r\n"
    ).encode("latin-1", "replace")
    if request is not None and request.method == "HEAD":  # RFC 9110 section 9.3.2
        return head
    return head + body
