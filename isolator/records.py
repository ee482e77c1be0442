"""Decisions and kernel events, told as flow records."""

from __future__ import annotations

import time
from collections.abc import Mapping
from ipaddress import IPv6Address

from isolator.control.flowlog import (
    ALLOWED_BURST,
    ALLOWED_PER_SECOND,
    DecidedBy,
    FlowLog,
    FlowRecord,
    FlowVerdict,
    HttpMessage,
    Peer,
    TokenBucket,
)
from isolator.core.commands import Report
from isolator.core.model import Decision, Direction, Endpoint, PolicyFlag, RuleRef, Verdict
from isolator.core.tally import Misfit
from isolator.datapath.abi import Event, FlowKey, RequestEvent

_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}


class Recorder:
    """Writes the flow log. `endpoints` by number and `owners` (endpoint by address) are the roster's."""

    def __init__(
        self, log: FlowLog, endpoints: Mapping[int, Endpoint], owners: Mapping[str, Endpoint]
    ) -> None:
        self._log = log
        self._endpoints = endpoints
        self._owners = owners
        self.rules: Mapping[int, RuleRef] = {}
        self._requests = TokenBucket(ALLOWED_PER_SECOND, ALLOWED_BURST)  # each CPU may tell of as many

    def message(self, report: Report, now: float) -> None:
        """One request that Python decided. Allowed ones are counted where they are decided."""
        decision, request, flow = report.decision, report.request, report.flow
        verdict = verdict_of(decision)
        if verdict is not FlowVerdict.FORWARDED:
            self._log.count(verdict, now, decision.rule, decision.reason)
        l7 = HttpMessage()
        if request is not None:
            l7 = HttpMessage(request.method, request.path, request.raw_path, request.host)
        key = FlowKey.unpack(flow.key)
        self._append(key, flow.initiator, now, verdict, decision, l7, DecidedBy.PYTHON, report.why)

    def request(self, told: RequestEvent, rule: RuleRef | None) -> None:
        """One request that the kernel accepted; they are counted elsewhere. Its path is plain, or it would not be."""
        event = told.event
        now = wall_clock(event.time)
        if not self._requests.take(now):
            return
        line, _, fields = told.head.partition(b"\r\n")
        method, _, rest = line.decode("latin-1").partition(" ")
        path, ended, _ = rest.replace("?", " ", 1).partition(" ")
        l7 = HttpMessage(method, path if ended else None, path, host_of(fields))
        decision = Decision(Verdict.ALLOW, rule=rule)
        self._append(
            event.key,
            event.direction,
            now,
            FlowVerdict.FORWARDED,
            decision,
            l7,
            DecidedBy.KERNEL,
        )

    def event(self, event: Event) -> None:
        """A new flow that the kernel decided, or a packet that it dropped."""
        flags = PolicyFlag(event.flags & (PolicyFlag.AUDIT | PolicyFlag.TRIAL))
        decision = Decision(
            event.verdict,
            event.reason,
            self.rules.get(event.rule),
            audit=bool(flags & PolicyFlag.AUDIT),
            trial=bool(flags & PolicyFlag.TRIAL),
        )
        self.flow(event.key, event.direction, decision, wall_clock(event.time))

    def flow(self, key: FlowKey, direction: Direction, decision: Decision, now: float) -> None:
        """What layer 4 decided."""
        verdict = verdict_of(decision)
        if self._log.count(verdict, now, decision.rule, decision.reason):
            self._append(key, direction, now, verdict, decision, None, DecidedBy.KERNEL)

    def _append(
        self,
        key: FlowKey,
        direction: Direction,
        now: float,
        verdict: FlowVerdict,
        decision: Decision,
        l7: HttpMessage | None,
        by: DecidedBy,
        why: Misfit | None = None,
    ) -> None:
        own = self._endpoints.get(key.endpoint)
        local = peer(key.local, key.local_port, own)
        remote = peer(key.remote, key.remote_port, self._owners.get(address_text(key.remote)))
        source, destination = (remote, local) if direction is Direction.INGRESS else (local, remote)
        protocol = _PROTOCOLS.get(key.protocol, str(key.protocol))
        self._log.append(
            FlowRecord(
                now,
                verdict,
                direction,
                source,
                destination,
                protocol,
                by,
                decision.reason,
                decision.rule,
                l7,
                why,
            )
        )


def wall_clock(monotonic: int) -> float:
    """Seconds of CLOCK_REALTIME, for ns of CLOCK_MONOTONIC."""
    return time.time() - (time.monotonic_ns() - monotonic) / 1e9


def host_of(fields: bytes) -> str | None:
    """The Host of header lines that may be cut off at the end."""
    for line in fields.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        if name.lower() == b"host":
            return value.strip().decode("latin-1").lower().partition(":")[0]
    return None


def verdict_of(decision: Decision) -> FlowVerdict:
    if decision.verdict in (Verdict.DROP, Verdict.RESET):
        return FlowVerdict.DROPPED
    return FlowVerdict.AUDIT if decision.audit or decision.trial else FlowVerdict.FORWARDED


def peer(address: bytes, port: int, endpoint: Endpoint | None) -> Peer:
    name, labels = (endpoint.name, endpoint.labels) if endpoint else (None, None)
    return Peer(address_text(address), port or None, name, labels)


def address_text(address: bytes) -> str:
    """IPv4 as IPv4, though it stands mapped in 16 bytes."""
    full = IPv6Address(address)
    return str(full.ipv4_mapped or full)
