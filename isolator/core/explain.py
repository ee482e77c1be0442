"""Why a connection or a request is allowed or denied: every rule looked at, and what it lacked.

    question → the source's egress, then the destination's ingress → each rule: why (not) → the outcome of all

Both directions have to allow it. The outcome comes from `isolator.core.policy.weigh`, the same that the
compiler puts into the kernel; here it is asked for one pair of addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

from isolator.core.identities import MULTICAST, NOBODY, Address, identify, owners_of
from isolator.core.model import Decision, Direction, DropReason, Endpoint, Outsider, RuleRef, Verdict
from isolator.core.policy import (
    PROTOCOLS,
    UDP,
    Covering,
    Identity,
    Mode,
    Outcome,
    Policy,
    PortMatch,
    Rule,
    weigh,
)
from parsers.errors import DissectError
from parsers.path import readings

WORLD, GROUP = "world", "multicast"
TCP_OR_UDP = (PROTOCOLS["tcp"], UDP)


class QuestionError(ValueError):
    """The question cannot be asked: an endpoint nobody knows, a path no server may read."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request made up for the question. `path` normalised, `readings` what else it may be; `headers` with
    lower-case names."""

    method: str
    path: str
    readings: tuple[str, ...] = ()
    host: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def upgrade(self) -> str | None:
        return next((value for name, value in self.headers if name == "upgrade"), None)

    @property
    def connect(self) -> bool:
        return self.method == "CONNECT"


@dataclass(frozen=True, slots=True)
class Question:
    """May `source` reach `destination`? Each is an endpoint's name, an address, or `world`.

    Without `method` the question is one of layer 4. `port` 0 for a protocol without ports.
    """

    source: str
    destination: str
    port: int = 0
    protocol: str = "tcp"
    method: str | None = None
    path: str = "/"
    host: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Considered:
    """One rule, and why it matched or did not. `decides`: the decision names it."""

    ref: RuleRef
    direction: Direction
    action: str
    mode: Mode
    matched: bool
    why: str
    decides: bool = False


@dataclass(frozen=True, slots=True)
class Half:
    """One end's say. `decision.verdict` INSPECT: it depends on the request, and none was given."""

    direction: Direction
    endpoint: str
    decision: Decision
    considered: tuple[Considered, ...]
    summary: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """`decision` and `summary` are those of the half that settles it (`weight`)."""

    decision: Decision
    halves: tuple[Half, ...]
    summary: str

    @property
    def allowed(self) -> bool:
        return self.decision.verdict in (Verdict.ALLOW, Verdict.INSPECT)

    @property
    def considered(self) -> tuple[Considered, ...]:
        return tuple(each for half in self.halves for each in half.considered)


@dataclass(frozen=True, slots=True)
class Party:
    """One end: what rules see of it as a peer, and the endpoint, if it is one."""

    name: str
    identity: Identity
    endpoint: Endpoint | None


def explain(
    policies: Iterable[Policy],
    endpoints: Mapping[int, Endpoint],
    addresses: Mapping[int, Sequence[Address]],
    question: Question,
    outsiders: Iterable[Outsider] = (),
) -> Explanation:
    """Raises QuestionError. An endpoint or outsider stands for the first of its addresses."""
    policies, outsiders = tuple(policies), tuple(outsiders)
    protocol = PROTOCOLS.get(question.protocol.lower(), 0)
    if not protocol:
        raise QuestionError(f"unknown protocol {question.protocol!r}: tcp, udp or icmp")
    if not 0 <= question.port <= 65535 or (protocol in TCP_OR_UDP and not question.port):
        raise QuestionError(f"port {question.port} is none: give 1 to 65535")
    if question.method is not None and question.protocol.lower() != "tcp":
        raise QuestionError("HTTP goes over tcp")
    request = requested(question)
    source, destination = (
        party(name, policies, endpoints, addresses, outsiders)
        for name in (question.source, question.destination)
    )
    point = PortMatch(protocol, question.port if protocol in TCP_OR_UDP else 0)
    halves = tuple(
        half(policies, direction, own.endpoint, other.identity, point, request)
        for direction, own, other in (
            (Direction.EGRESS, source, destination),
            (Direction.INGRESS, destination, source),
        )
        if own.endpoint is not None
    )
    return concluded(halves, source.name, destination.name)


def concluded(halves: tuple[Half, ...], source: str, destination: str) -> Explanation:
    if not halves:
        summary = f"neither {source} nor {destination} is an endpoint: no policy applies"
        return Explanation(Decision(Verdict.ALLOW), halves, summary)
    first = max(halves, key=lambda each: weight(each.decision))
    return Explanation(first.decision, halves, first.summary)


def weight(decision: Decision) -> int:
    """Which half's decision is the answer: a drop, then what depends, then what monitor mode reports."""
    if decision.verdict in (Verdict.DROP, Verdict.RESET):
        return 4
    if decision.verdict is Verdict.INSPECT:
        return 3
    return 2 if decision.trial else int(decision.rule is not None)


def requested(question: Question) -> Asked | None:
    if question.method is None:
        return None
    try:
        path, *others = (question.path,) if targets_no_path(question) else readings(question.path.encode())
    except DissectError as error:
        raise QuestionError(f"{question.path}: every such request is refused: {error}") from error
    headers = tuple((name.lower(), value) for name, value in question.headers.items())
    host = question.host or next((value for name, value in headers if name == "host"), None)
    return Asked(question.method, path, tuple(others), without_port(host.lower()) if host else None, headers)


def targets_no_path(question: Question) -> bool:
    """RFC 9112 sections 3.2.3 and 3.2.4: CONNECT host:port, OPTIONS *."""
    return question.method == "CONNECT" or (question.method == "OPTIONS" and question.path == "*")


def without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and (port.isdigit() or not port) and ("]" in name or ":" not in name) else host


def party(
    name: str,
    policies: Iterable[Policy],
    endpoints: Mapping[int, Endpoint],
    addresses: Mapping[int, Sequence[Address]],
    outsiders: Sequence[Outsider],
) -> Party:
    owners = owners_of(endpoints, addresses, outsiders)
    for number, endpoint in endpoints.items():
        if endpoint.name == name:
            its = addresses.get(number, ())
            if not its:
                return Party(name, Identity(frozenset({frozenset(endpoint.labels.items())})), endpoint)
            return Party(name, identify(its[0], policies, owners), endpoint)
    for outsider in outsiders:
        if outsider.name == name and outsider.addresses:
            return Party(name, identify(outsider.addresses[0], policies, owners), None)
    if name in (WORLD, GROUP):
        return Party(name, Identity(MULTICAST if name == GROUP else NOBODY), None)
    try:
        address = ip_address(name)
    except ValueError:
        names = [endpoint.name for endpoint in endpoints.values()] + [each.name for each in outsiders]
        known = ", ".join(sorted(names)) or "none"
        raise QuestionError(f"no endpoint and no address: {name!r}; there are: {known}") from None
    having = [number for number in endpoints if address in addresses.get(number, ())]
    return Party(
        name, identify(address, policies, owners), endpoints[having[0]] if len(having) == 1 else None
    )


# -- one end -----------------------------------------------------------------------------------------------


def half(
    policies: Iterable[Policy],
    direction: Direction,
    endpoint: Endpoint,
    peer: Identity,
    point: PortMatch,
    request: Asked | None,
) -> Half:
    selecting = [policy for policy in policies if policy.selects(endpoint.labels, direction)]
    every = [Covering(policy, rule) for policy in selecting for rule in policy.rules(direction) or ()]
    outcome = weigh(selecting, (each for each in every if covers(each.rule, peer, point)))
    decision = outcome.flow
    if outcome.inspects and request is not None:
        decision = outcome.decide(request)
    considered = tuple(consider(each, direction, peer, point, request, decision) for each in every)
    summary = f"{endpoint.name} {direction.name.lower()}: {told(decision, selecting, outcome)}"
    return Half(direction, endpoint.name, decision, considered, summary)


def covers(rule: Rule, peer: Identity, point: PortMatch) -> bool:
    return rule.matches_peer(peer) and rule.matches_port(point.protocol, point.port)


def consider(
    covering: Covering,
    direction: Direction,
    peer: Identity,
    point: PortMatch,
    request: Asked | None,
    decision: Decision,
) -> Considered:
    matched, why = compared(covering.rule, direction, peer, point, request)
    return Considered(
        covering.ref, direction, covering.rule.action.value, covering.policy.mode,
        matched, why, matched and decision.rule == covering.ref,
    )  # fmt: skip


def compared(
    rule: Rule, direction: Direction, peer: Identity, point: PortMatch, request: Asked | None
) -> tuple[bool, str]:
    end = "source" if direction is Direction.INGRESS else "destination"
    if not rule.matches_peer(peer):
        return (
            False,
            f"the {end} is none of its peers: {'; '.join(map(str, rule.peers or ())) or 'it has none'}",
        )
    if not rule.matches_port(point.protocol, point.port):
        return False, f"{point} is none of its ports: {', '.join(map(str, rule.ports))}"
    if rule.http is None:
        return True, "peer and port match"
    if request is None:
        return True, "peer and port match; it goes by the request"
    misses = [line.mismatch(request, rule.denies) for line in rule.http]
    if None in misses:
        return True, f"peer and port match, and line {misses.index(None) + 1} of its http"
    return False, f"the request matches no line of its http: {lacking(misses)}"


def lacking(misses: Iterable[str | None]) -> str:
    return (
        ", ".join(f"line {at} differs in {miss}" for at, miss in enumerate(misses, start=1)) or "it has none"
    )


def told(decision: Decision, selecting: Sequence[Policy], outcome: Outcome) -> str:
    """The decision in words."""
    if not selecting:
        return "allowed, no policy selects it in this direction"
    if decision.trial:
        return f"allowed by monitor mode, would be denied: {denied(decision, selecting)}"
    if decision.verdict is Verdict.INSPECT:
        return f"depends on the request (rule {decision.rule}); give a method and a path"
    if decision.verdict is Verdict.ALLOW:
        return (
            f"allowed by {decision.rule}{', and recorded' if decision.audit else ''}"
            if decision.rule
            else ("allowed, every policy that selects it is in monitor mode")
        )
    return f"denied: {denied(decision, selecting)}"


def denied(decision: Decision, selecting: Sequence[Policy]) -> str:
    match decision.reason:
        case DropReason.POLICY_DEFAULT:
            names = ", ".join(policy.name for policy in selecting)
            return f"no rule allows it ({decision.reason.name}); selected by {names}"
        case DropReason.HTTP_NO_RULE:
            return f"no rule allows the request ({decision.reason.name}); nearest is {decision.rule}"
        case DropReason.HTTP_UPGRADE:
            return f"it asks for an Upgrade ({decision.reason.name})"
    return f"by {decision.rule} ({decision.reason.name})"
