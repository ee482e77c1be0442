"""Policies and endpoints to the entries of the kernel's policy map.

The kernel looks a new flow up in this order and takes the first entry it finds (bpf/isolator.h, policy_key):

    (peer, protocol, port) → (peer, protocol, 0) → (peer, 0, 0) → (0, 0, 0)

Precedence is settled here, so that the first hit is always the answer: for every identity and every
(protocol, port) that a rule covering it names, the outcome of *all* rules covering that point is computed. A
point whose outcome equals what the next lookup would find needs no entry of its own.

    rules, identities → who is covered → points of (protocol, port) → Outcome → PolicyEntry, Profile

An endpoint that no policy selects in a direction gets (0, 0, 0) ALLOW there; a selected one (0, 0, 0) DROP.
There is no entry for peer 0 but this: every address has an identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from isolator.core.identities import IDENTITIES_MAX, Address, Identities, IdentityPrefix, build_identities
from isolator.core.index import PeerIndex, SelectionIndex
from isolator.core.model import Direction, DropReason, Endpoint, Outsider, PolicyFlag, RuleRef, Verdict
from isolator.core.policy import Covering, Identity, Outcome, Policy, Profile, weigh

POLICY_MAX = 1048576
"""Entries the kernel's map holds (POLICY_MAX of the shared header): two generations at once, so half each."""

GENERATIONS = 2
"""A new generation is written beside the one in force."""


class PolicyTooLarge(Exception):  # noqa: N818 - named after what is the matter
    """The policies need more entries than the kernel's maps hold."""


class PolicyEntry(NamedTuple):
    """One entry of the kernel's policy map; peer, protocol and port 0 mean any. `rule` 0: none.

    A tuple, since there are hundreds of thousands, and a frozen dataclass takes six times as long to make.
    """

    endpoint: int
    direction: Direction
    peer: int
    protocol: int
    port: int
    verdict: Verdict
    flags: PolicyFlag
    reason: DropReason
    profile: int
    rule: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """All that a policy generation puts into the kernel, and what Python needs to understand its answers."""

    generation: int
    identities: tuple[IdentityPrefix, ...]
    entries: tuple[PolicyEntry, ...]
    profiles: dict[int, Profile] = field(hash=False)
    rules: dict[int, RuleRef] = field(hash=False)
    identity_names: dict[int, str] = field(hash=False)


class Point(NamedTuple):
    """What an entry answers for, within one endpoint and direction."""

    peer: int
    protocol: int
    port: int


ANYTHING = Point(0, 0, 0)
Answer = tuple[Verdict, PolicyFlag, DropReason, int, int]
"""A PolicyEntry from `verdict` on."""

Row = tuple[int, int, int, Verdict, PolicyFlag, DropReason, int, int]
"""A PolicyEntry from `peer` on: what endpoints that the same policies select share."""


def compile_policies(
    policies: Iterable[Policy],
    endpoints: Mapping[int, Endpoint],
    addresses: Mapping[int, Iterable[Address]],
    generation: int,
    outsiders: Iterable[Outsider] = (),
) -> Compiled:
    """`endpoints` and their `addresses` by number. Raises PolicyTooLarge. Same input, same numbers."""
    policies = tuple(policies)
    identities = build_identities(policies, endpoints, addresses, outsiders)
    require_room(len(identities.prefixes), 0)
    compiler = Compiler(policies, identities)
    entries: list[PolicyEntry] = []
    for number, endpoint in sorted(endpoints.items()):
        for direction in Direction:
            entries.extend(compiler.entries(number, endpoint, direction))
            require_room(0, len(entries))
    return Compiled(
        generation, identities.prefixes, tuple(entries),
        compiler.profiles, compiler.rules, dict(identities.names),
    )  # fmt: skip


def require_room(prefixes: int, entries: int) -> None:
    """Raises PolicyTooLarge where the kernel's maps do not hold two generations of so many."""
    if prefixes > (held := IDENTITIES_MAX // GENERATIONS):
        raise PolicyTooLarge(f"{prefixes} networks and addresses, of {held}: name fewer networks")
    if entries > (held := POLICY_MAX // GENERATIONS):
        raise PolicyTooLarge(f"more than {held} policy entries: name fewer networks and ports")


def entries_of(number: int, direction: Direction, rows: Iterable[Row]) -> list[PolicyEntry]:
    """`number`: what an entry has as its endpoint."""
    ends = (number, direction)
    return [PolicyEntry._make(ends + row) for row in rows]


class Compiler:
    """One compilation: numbers rules and profiles, and computes what endpoints share only once."""

    def __init__(self, policies: Sequence[Policy], identities: Identities) -> None:
        self.policies = policies
        self._selections = SelectionIndex(policies)
        self.peers = PeerIndex(identities.numbers)
        self._rule_numbers: dict[RuleRef, int] = {}
        self._profiles: dict[Outcome, Profile] = {}
        self._tables: dict[tuple[Direction, tuple[int, ...]], Table] = {}
        for policy in policies:
            for rule in (*(policy.ingress or ()), *(policy.egress or ())):
                self._rule_numbers.setdefault(RuleRef(policy.name, rule.name), len(self._rule_numbers) + 1)

    @property
    def profiles(self) -> dict[int, Profile]:
        return {profile.number: profile for profile in self._profiles.values()}

    @property
    def rules(self) -> dict[int, RuleRef]:
        return {number: ref for ref, number in self._rule_numbers.items()}

    def entries(self, number: int, endpoint: Endpoint, direction: Direction) -> list[PolicyEntry]:
        return entries_of(number, direction, self.table(endpoint, direction).rows)

    def table(self, endpoint: Endpoint, direction: Direction) -> Table:
        """The same for all endpoints that the same policies select."""
        selecting = self._selections.selecting(endpoint.labels, direction)
        if (direction, selecting) not in self._tables:
            self._tables[direction, selecting] = Table(self, direction, selecting)
        return self._tables[direction, selecting]

    def admit(self, peer: int, identity: Identity) -> None:
        """One more identity; what tables have to say of it, they are to be asked for."""
        self.peers.add(peer, identity)

    def answer(self, outcome: Outcome) -> Answer:
        decision = outcome.flow
        rule = self._rule_numbers[decision.rule] if decision.rule else 0
        profile = self._profile(outcome).number if outcome.inspects else 0
        return decision.verdict, outcome.flags, decision.reason, profile, rule

    def _profile(self, outcome: Outcome) -> Profile:
        if outcome not in self._profiles:
            self._profiles[outcome] = Profile(len(self._profiles) + 1, outcome)
        return self._profiles[outcome]


class Table:
    """What is said in one direction of those whom the policies at `selecting` select: `rows`, the default's first."""

    def __init__(self, compiler: Compiler, direction: Direction, selecting: tuple[int, ...]) -> None:
        self._compiler, self.direction = compiler, direction
        self._selecting = [compiler.policies[at] for at in selecting]
        self._every: list[Covering] = []
        self.first: dict[int, int] = {}  # policy → where its rules begin
        for at, policy in zip(selecting, self._selecting, strict=True):
            self.first[at] = len(self._every)
            self._every += (Covering(policy, rule) for rule in policy.rules(direction) or ())
        self._known: dict[tuple[int, ...], list[tuple[tuple[int, int], Answer]]] = {}
        self.rows: list[Row] = [(*ANYTHING, *compiler.answer(weigh(self._selecting, ())))]
        matching: dict[int, list[int]] = {}
        for at, each in enumerate(self._every):
            for peer in compiler.peers.matching(each.rule):
                matching.setdefault(peer, []).append(at)
        for peer in sorted(matching):  # whom no rule matches, the default answers for
            self.rows += self.of(peer, tuple(matching[peer]))

    def of(self, peer: int, alike: tuple[int, ...]) -> list[Row]:
        """The rows of an identity that these of its rules match, ascending, at least one."""
        if alike not in self._known:
            settled = settle(self._selecting, [self._every[at] for at in alike])
            self._known[alike] = [(pair, self._compiler.answer(outcome)) for pair, outcome in settled]
        return [(peer, *pair, *answer) for pair, answer in self._known[alike]]


def settle(
    selecting: Sequence[Policy], covering: Sequence[Covering]
) -> list[tuple[tuple[int, int], Outcome]]:
    """The (protocol, port) pairs, widest first, at which one peer's rules say something new."""
    at_match: dict[tuple[int, int], set[int]] = {}
    for at, each in enumerate(covering):
        for match in each.rule.ports:
            at_match.setdefault((match.protocol, match.port), set()).add(at)
    default = weigh(selecting, ())
    outcomes: dict[tuple[int, int], Outcome] = {}
    for pair in widest_first(at_match):
        found = set().union(*(at_match.get(wider, ()) for wider in (pair, *widened(pair))))
        outcome = weigh(selecting, (covering[at] for at in sorted(found))) if found else default
        if outcome != next((outcomes[wider] for wider in widened(pair) if wider in outcomes), default):
            outcomes[pair] = outcome
    return list(outcomes.items())


def widest_first(named: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs that rules name, and for each protocol its other ports, which are decided first."""
    pairs = {(0, 0), *named, *((protocol, 0) for protocol, _ in named)}
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def widened(pair: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Where the kernel looks after it has found nothing at `pair`, with the same peer."""
    protocol, port = pair
    if port:
        yield protocol, 0
    if protocol:
        yield 0, 0
