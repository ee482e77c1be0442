"""Policies as the rest of the program knows them, and what a set of rules says of one request.

A packet's way through: the compiler (`isolator.core.compile`) finds which rules cover a peer and a port and
puts their `Ruling` into the kernel, or, where a request must be read, into a `Profile`. The inspector then
asks `Profile.decide(request)`, message by message.

    rules that cover the flow → Ruling ─┬─ layer 4: ALLOW, DROP, RESET
                                        └─ INSPECT: for each request
        1. a deny rule matches it            → DROP, HTTP_DENY
        2. it asks for an Upgrade            → DROP, HTTP_UPGRADE (the bytes after it could not be read)
        3. an allow or audit rule matches it → ALLOW
        4. a rule without `http` allows all  → ALLOW
        5. else                              → DROP, HTTP_NO_RULE

Deny beats allow over all policies; audit is an allow that is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from typing import Protocol

from isolator.core.model import ENTITY, Decision, Direction, DropReason, PolicyFlag, RuleRef, Verdict
from isolator.core.pattern import HostPattern, PathPattern, without_parameters
from isolator.core.tally import Tally

Network = IPv4Network | IPv6Network
LabelSet = frozenset[tuple[str, str]]

TCP, UDP, ICMP = (
    6,
    17,
    1,
)  # IANA protocol numbers; ICMP stands for ICMPv6 too, as in the kernel's policy lookup
PROTOCOLS = {"any": 0, "icmp": ICMP, "tcp": TCP, "udp": UDP}


class Action(StrEnum):
    ALLOW = "allow"
    DENY = "deny"
    AUDIT = "audit"


class Mode(StrEnum):
    PROTECT = "protect"
    MONITOR = "monitor"


class Failure(StrEnum):
    """What becomes of traffic that needs Python while the agent is down."""

    CLOSED = "closed"
    OPEN = "open"


class DenyWith(StrEnum):
    """How layer 4 denies: in silence, or with a RST or an ICMP error."""

    DROP = "drop"
    RESET = "reset"


def labels_of(labels: Mapping[str, str]) -> LabelSet:
    return frozenset(labels.items())


def entity_of(labels: LabelSet) -> LabelSet:
    return frozenset(each for each in labels if each[0] == ENTITY)


# -- who ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Identity:
    """What policies can know of an address: whose it is, and which of their networks it lies in.

    `owners`: the label sets of the endpoints with this address; none: it is the world's. More than one owner
    happens (link-local addresses; the same address in two networks): then an allow needs all of them to
    match, a deny any of them.
    """

    owners: frozenset[LabelSet] = frozenset()
    networks: frozenset[Network] = frozenset()


@dataclass(frozen=True, slots=True)
class Selected:
    """Peers by label: every endpoint whose labels include these. No labels: every endpoint.

    Who has the label ENTITY is meant only where it is named: `{}` is not the host.
    """

    labels: LabelSet

    def matches(self, identity: Identity, widest: bool) -> bool:
        having = [self.labels <= owner and entity_of(owner) <= self.labels for owner in identity.owners]
        return any(having) if widest else bool(having) and all(having)

    def __str__(self) -> str:
        return f"select {{{', '.join(f'{key}: {value}' for key, value in sorted(self.labels))}}}"


@dataclass(frozen=True, slots=True)
class Range:
    """Peers by address, endpoints or not."""

    network: Network
    excluded: tuple[Network, ...] = ()

    def matches(self, identity: Identity, widest: bool) -> bool:
        return self.network in identity.networks and identity.networks.isdisjoint(self.excluded)

    def __str__(self) -> str:
        excluded = f" except {', '.join(map(str, self.excluded))}" if self.excluded else ""
        return f"cidr {self.network}{excluded}"


@dataclass(frozen=True, slots=True)
class World:
    """Any address that is no endpoint's, not the host's, a gateway's or a service's, and no multicast group's."""

    def matches(self, identity: Identity, widest: bool) -> bool:
        return not identity.owners

    def __str__(self) -> str:
        return "world"


Peer = Selected | Range | World


# -- what --------------------------------------------------------------------------------------------------


def protocol_name(number: int) -> str:
    """As policies write it."""
    return next((name for name, each in PROTOCOLS.items() if each == number), str(number))


@dataclass(frozen=True, slots=True)
class PortMatch:
    """The serving side's port; 0: any. `protocol` is IANA's number; 0: any, and then the port is 0 too."""

    protocol: int
    port: int = 0

    def covers(self, protocol: int, port: int) -> bool:
        """`port` 0: a port that no rule names, or a protocol without ports."""
        return self.protocol in (0, protocol) and self.port in (0, port)

    def __str__(self) -> str:
        name = protocol_name(self.protocol)
        return f"{name}/{self.port}" if self.port else name


ANY_PORT = PortMatch(0)


class HttpRequest(Protocol):
    """The part of `parsers.http1.Request` that rules look at."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def readings(self) -> tuple[str, ...]: ...
    @property
    def host(self) -> str | None: ...
    @property
    def headers(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def upgrade(self) -> str | None: ...
    @property
    def connect(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class HttpRule:
    """One line of a rule's `http`: all that it names must match; None or empty: anything.

    `headers`: lower-case name and exact value; None: any value, as long as the header is there.
    """

    methods: frozenset[str] | None = None
    path: PathPattern | None = None
    hosts: tuple[HostPattern, ...] = ()
    headers: tuple[tuple[str, str | None], ...] = ()

    def matches(self, request: HttpRequest, widest: bool = False) -> bool:
        """`widest` is a deny rule's way to read what is open: repeated headers, CONNECT."""
        return self.mismatch(request, widest) is None

    def mismatch(self, request: HttpRequest, widest: bool = False) -> str | None:
        """The first part that does not match: method, path, host or a header; None if all do."""
        if self.methods is None:
            if request.connect and not widest:
                return "method (CONNECT has to be named)"
        elif request.method not in self.methods:
            return "method"
        if self.path is not None and not matches_path(self.path, request, widest):
            return "path"
        if self.hosts and not self._matches_host(request.host, widest):
            return "host"
        for name, wanted in self.headers:
            if not matches_header(request, name, wanted, widest):
                return f"header {name}"
        return None

    def _matches_host(self, host: str | None, widest: bool) -> bool:
        """Without a host the server takes the one that it likes."""
        return widest if host is None else any(pattern.matches(host) for pattern in self.hosts)


def matches_path(pattern: PathPattern, request: HttpRequest, widest: bool) -> bool:
    """Servers differ in how they read some paths: an allow needs all readings right, a deny one."""
    if not request.readings:
        return matches_reading(pattern, request.path, widest)
    found = (matches_reading(pattern, path, widest) for path in (request.path, *request.readings))
    return any(found) if widest else all(found)


def matches_reading(pattern: PathPattern, path: str, widest: bool) -> bool:
    """And in what path parameters are."""
    matches, cut = pattern.matches(path), without_parameters(path)
    if cut == path:
        return matches
    return (
        (matches or cut is None or pattern.matches(cut))
        if widest
        else (matches and cut is not None and pattern.matches(cut))
    )


def matches_header(request: HttpRequest, name: str, wanted: str | None, widest: bool) -> bool:
    """Servers differ in which of several values they take: an allow needs all of them right, a deny one.

    For some `_` in a name is `-` (RFC 3875 section 4.1.18), for others it is not: to have the header, an allow
    needs it spelt as the rule has it."""
    values = [value for each, value in request.headers if each.replace("_", "-") == name]
    if not widest and all(each != name for each, _ in request.headers):
        return False
    if wanted is None or not values:
        return bool(values)
    return wanted in values if widest else all(value == wanted for value in values)


# -- the document ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rule:
    """`peers` None: everybody; empty: nobody. `http` None: layer 4 decides alone; else it is of TCP only."""

    name: str
    action: Action = Action.ALLOW
    peers: tuple[Peer, ...] | None = None
    ports: tuple[PortMatch, ...] = (ANY_PORT,)
    http: tuple[HttpRule, ...] | None = None

    def __post_init__(self) -> None:
        if self.http is not None and any(match.protocol not in (0, TCP) for match in self.ports):
            raise ValueError(f"rule {self.name}: HTTP goes over TCP")
        if self.http is not None:
            object.__setattr__(self, "ports", tuple(PortMatch(TCP, match.port) for match in self.ports))

    @property
    def denies(self) -> bool:
        return self.action is Action.DENY

    def matches_peer(self, identity: Identity) -> bool:
        return self.peers is None or any(peer.matches(identity, self.denies) for peer in self.peers)

    def matches_port(self, protocol: int, port: int) -> bool:
        return any(match.covers(protocol, port) for match in self.ports)


@dataclass(frozen=True, slots=True)
class Policy:
    """`ingress` and `egress` None: this policy says nothing of the direction; empty: nothing is allowed."""

    name: str
    select: LabelSet = frozenset()
    mode: Mode = Mode.PROTECT
    failure: Failure = Failure.CLOSED
    deny_with: DenyWith = DenyWith.DROP
    ingress: tuple[Rule, ...] | None = None
    egress: tuple[Rule, ...] | None = None

    def rules(self, direction: Direction) -> tuple[Rule, ...] | None:
        return self.ingress if direction is Direction.INGRESS else self.egress

    def selects(self, labels: Mapping[str, str], direction: Direction) -> bool:
        return self.rules(direction) is not None and labels.items() >= self.select

    def networks(self) -> Iterable[Network]:
        """Every network that a rule names."""
        for rule in (*(self.ingress or ()), *(self.egress or ())):
            for peer in rule.peers or ():
                if isinstance(peer, Range):
                    yield peer.network
                    yield from peer.excluded


@dataclass(frozen=True, slots=True)
class Covering:
    """A rule that covers a flow, and the policy it stands in."""

    policy: Policy
    rule: Rule

    @property
    def ref(self) -> RuleRef:
        return RuleRef(self.policy.name, self.rule.name)


# -- decisions ---------------------------------------------------------------------------------------------

HttpLine = tuple[HttpRule, Decision]


@dataclass(frozen=True, slots=True)
class Ruling:
    """What a set of rules says of a flow. Every possible decision is made beforehand.

    Without INSPECT `flow` is final. With it, `flow.rule` is a rule with `http`, to be named where no line
    matches; `denies` and `allows` hold its and the others' lines, audit before allow; `plain` is the decision
    of a rule without `http`, if one covers the flow.
    """

    flow: Decision
    denies: tuple[HttpLine, ...] = ()
    allows: tuple[HttpLine, ...] = ()
    plain: Decision | None = None

    @property
    def inspects(self) -> bool:
        return self.flow.verdict is Verdict.INSPECT

    @property
    def drops(self) -> bool:
        return self.flow.verdict in (Verdict.DROP, Verdict.RESET)

    def decide(self, request: HttpRequest) -> Decision:
        if not self.inspects:
            return self.flow
        for line, decision in self.denies:
            if line.matches(request, widest=True):
                return decision
        if request.upgrade is not None and (self.plain is None or self.denies):
            return self.refuse(DropReason.HTTP_UPGRADE)
        for line, decision in self.allows:
            if line.matches(request):
                return decision
        if self.plain is not None and not (request.connect and self.denies):
            return self.plain
        return self.refuse(DropReason.HTTP_NO_RULE)

    def refuse(self, reason: DropReason) -> Decision:
        """The decision for what no line can be compared with. It may pass only where no line denies."""
        if not self.inspects:
            return self.flow
        if self.plain is not None and not self.denies:
            return self.plain
        return Decision(Verdict.DROP, reason, self.flow.rule)


def rule_on(covering: Iterable[Covering], selecting: Iterable[Policy]) -> Ruling:
    """What the rules `covering` a flow say together, in policies `selecting` its endpoint.

    No policy selects it: allowed. A rule without `http` that denies: dropped, whatever the others say.
    """
    covering, selecting = tuple(covering), tuple(selecting)
    if not selecting:
        return Ruling(Decision(Verdict.ALLOW))
    for each in covering:
        if each.rule.denies and each.rule.http is None:
            return Ruling(Decision(drop_verdict([each.policy]), DropReason.POLICY_DENY, each.ref))
    passing = sorted((each for each in covering if not each.rule.denies), key=audit_first)
    plain = next((passed(each) for each in passing if each.rule.http is None), None)
    denying = [each for each in covering if each.rule.denies]
    reading = next((each for each in (*passing, *denying) if each.rule.http is not None), None)
    if reading is not None:
        return Ruling(Decision(Verdict.INSPECT, rule=reading.ref), lines(denying), lines(passing), plain)
    if plain is not None:
        return Ruling(plain)
    return Ruling(Decision(drop_verdict(selecting), DropReason.POLICY_DEFAULT))


def drop_verdict(policies: Iterable[Policy]) -> Verdict:
    resets = any(policy.deny_with is DenyWith.RESET for policy in policies)
    return Verdict.RESET if resets else Verdict.DROP


def audit_first(covering: Covering) -> bool:
    return covering.rule.action is not Action.AUDIT


def passed(covering: Covering) -> Decision:
    return Decision(Verdict.ALLOW, rule=covering.ref, audit=covering.rule.action is Action.AUDIT)


def lines(covering: Iterable[Covering]) -> tuple[HttpLine, ...]:
    return tuple((line, line_decision(each)) for each in covering for line in each.rule.http or ())


def line_decision(covering: Covering) -> Decision:
    if covering.rule.denies:
        return Decision(Verdict.DROP, DropReason.HTTP_DENY, covering.ref)
    return passed(covering)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Two rulings on one flow: `enforced` by the policies in protect mode, `trial` by all of them.

    What is enforced decides; where it allows and the trial would not, that is said (`Decision.trial`).
    `fail_open`: with the agent down, what needs Python passes: every enforcing policy says `open`, or none
    reads requests.
    """

    enforced: Ruling
    trial: Ruling
    fail_open: bool

    @property
    def monitor(self) -> bool:
        """Nothing of it is enforced."""
        return self.enforced.flow.verdict is Verdict.ALLOW

    @property
    def inspects(self) -> bool:
        return not self.enforced.drops and (self.enforced.inspects or self.trial.inspects)

    @property
    def flow(self) -> Decision:
        """Of the whole flow; INSPECT: message by message."""
        if self.inspects:
            return Decision(Verdict.INSPECT, rule=self.enforced.flow.rule or self.trial.flow.rule)
        return combined(self.enforced.flow, self.trial.flow)

    @property
    def flags(self) -> PolicyFlag:
        decision = self.flow
        flags = PolicyFlag.AUDIT if decision.audit else PolicyFlag(0)
        if decision.trial:
            flags |= PolicyFlag.TRIAL
        if self.inspects and self.fail_open:
            flags |= PolicyFlag.FAIL_OPEN
        if self.inspects and self.refuse(DropReason.NOT_HTTP).verdict is Verdict.ALLOW:
            flags |= PolicyFlag.UNREAD
        return flags

    def decide(self, request: HttpRequest) -> Decision:
        return combined(self.enforced.decide(request), self.trial.decide(request))

    def refuse(self, reason: DropReason) -> Decision:
        return combined(self.enforced.refuse(reason), self.trial.refuse(reason))


def combined(enforced: Decision, trial: Decision) -> Decision:
    if enforced.verdict is not Verdict.ALLOW:
        return enforced
    if trial.verdict is not Verdict.ALLOW:
        return replace(enforced, reason=trial.reason, rule=trial.rule, trial=True)
    return trial


def weigh(selecting: Iterable[Policy], covering: Iterable[Covering]) -> Outcome:
    """The outcome for a flow that the rules `covering` match, at an endpoint that the policies select."""
    selecting, covering = tuple(selecting), tuple(covering)
    enforcing = [policy for policy in selecting if policy.mode is Mode.PROTECT]
    enforced = rule_on((each for each in covering if each.policy.mode is Mode.PROTECT), enforcing)
    fail_open = not enforced.inspects or all(policy.failure is Failure.OPEN for policy in enforcing)
    if len(enforcing) == len(selecting):
        return Outcome(enforced, enforced, fail_open)
    return Outcome(enforced, rule_on(covering, selecting), fail_open)


@dataclass(frozen=True, slots=True)
class Profile:
    """What the kernel's INSPECT entries point at. `number` is from 1; one number, one outcome."""

    number: int
    outcome: Outcome
    default: Decision = field(init=False)
    """For what is not HTTP."""
    tally: Tally = field(default_factory=Tally, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "default", self.refuse(DropReason.NOT_HTTP))

    @property
    def fail_open(self) -> bool:
        return self.outcome.fail_open

    @property
    def monitor(self) -> bool:
        """Nothing of it is enforced."""
        return self.outcome.monitor

    def decide(self, request: HttpRequest) -> Decision:
        """ALLOW or DROP, with the rule's name, the reason of a drop, and what monitor mode reports."""
        enforced = self.outcome.enforced.decide(request)
        if enforced.verdict is not Verdict.ALLOW or self.outcome.trial is self.outcome.enforced:
            return enforced
        return combined(enforced, self.outcome.trial.decide(request))

    def refuse(self, reason: DropReason) -> Decision:
        """For what cannot be decided because it cannot be read (malformed, ambiguous, too long)."""
        return self.outcome.refuse(reason)
