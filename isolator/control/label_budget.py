"""What all label policies may take of the kernel's maps together: who starts a container must not take the room, and
so the protection, of the others.

    label policies, those in force first → how many of them fit, by networks and entries → the others are closed

Entries are counted at the most that they can be: compiling is what takes long.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from isolator.control.config import PolicySource
from isolator.control.label_policy import closed, own_labels
from isolator.control.problems import Problem, errors_in
from isolator.core.compile import GENERATIONS, POLICY_MAX
from isolator.core.identities import Address, build_identities
from isolator.core.model import Endpoint, Outsider
from isolator.core.policy import Identity, LabelSet, Peer, Policy, Rule

NETWORKS_MAX = 512
"""Different networks of all label policies: everybody's entries are multiples of the networks there are."""

ENTRIES_MAX = POLICY_MAX // GENERATIONS // 2
"""Entries of all label policies: half of those of a generation. The other half is the files'."""

Labelled = dict[LabelSet, PolicySource]


def is_open(source: PolicySource) -> bool:
    """Whether it says what its labels say."""
    return not errors_in(source.problems)


def first_come(read: Mapping[LabelSet, PolicySource], before: Mapping[LabelSet, PolicySource]) -> Labelled:
    """Those in force and open first: no newcomer takes their place. Of the newcomers the small ones first: one that
    asks for much takes no other's."""
    held = dict.fromkeys(own for own in read if own in before and is_open(before[own]))
    new = sorted((own for own in read if own not in held), key=lambda own: size(read[own].policy))
    return {own: read[own] for own in (*held, *new)}


def size(policy: Policy) -> int:
    rules = rules_of(policy)
    return len(set(policy.networks())) + sum(
        len(rule.ports) * max(1, len(rule.peers or ())) for rule in rules
    )


def within_budget(
    labelled: Labelled,
    files: Sequence[Policy],
    endpoints: Mapping[int, Endpoint],
    addresses: Mapping[int, Iterable[Address]],
    outsiders: Sequence[Outsider] = (),
) -> Labelled:
    """`labelled` in its order: as many as fit are as they are, the others closed."""
    asking = [own for own, source in labelled.items() if is_open(source)]
    copies = Counter(own_labels(endpoint.labels) for endpoint in endpoints.values())

    def exceeds(count: int) -> str:
        policies = [labelled[own].policy for own in asking[:count]]
        networks = len({network for policy in policies for network in policy.networks()})
        if networks > NETWORKS_MAX:
            return f"{networks} networks of all labels, of {NETWORKS_MAX}"
        covered = Covered(build_identities([*files, *policies], endpoints, addresses, outsiders).numbers)
        entries = sum(
            copies[own] * len(rule.ports) * covered.by(rule)
            for own in asking[:count]
            for rule in rules_of(labelled[own].policy)
        )
        return f"{entries} entries of all labels, of {ENTRIES_MAX}" if entries > ENTRIES_MAX else ""

    if not asking or not exceeds(len(asking)):
        return labelled
    fitting = bisect_left(range(1, len(asking) + 1), True, key=lambda count: bool(exceeds(count)))
    text = exceeds(fitting + 1)
    return {**labelled, **{own: no_room(labelled[own], text) for own in asking[fitting:]}}


def give_way(labelled: Labelled, before: Mapping[LabelSet, PolicySource]) -> Labelled | None:
    """With half of the newcomers closed, the last ones: where files and labels do not fit together. None: there
    are no more newcomers."""
    new = [own for own in labelled if is_open(labelled[own]) and not (own in before and is_open(before[own]))]
    if not new:
        return None
    text = "with it all policies together do not fit"
    return {**labelled, **{own: no_room(labelled[own], text) for own in new[len(new) // 2 :]}}


def no_room(source: PolicySource, text: str) -> PolicySource:
    policy = source.policy
    container = policy.name.partition(":")[2]
    hint = "name fewer ports and networks, or put this policy into a file"
    problem = Problem(source.file, 1, 1, f"no room in the kernel: {text}: {hint}")
    return closed(policy.name, container, policy.select, source.file, [problem])


def rules_of(policy: Policy) -> tuple[Rule, ...]:
    return *(policy.ingress or ()), *(policy.egress or ())


class Covered:
    """How many identities a rule's peers cover, at the most."""

    def __init__(self, identities: Iterable[Identity]) -> None:
        self._identities = tuple(identities)
        self._counts: dict[tuple[Peer, bool], int] = {}

    def by(self, rule: Rule) -> int:
        everybody = len(self._identities)
        if rule.peers is None:
            return everybody
        return min(everybody, sum(self._by(peer, rule.denies) for peer in rule.peers))

    def _by(self, peer: Peer, denies: bool) -> int:
        if (peer, denies) not in self._counts:
            found = sum(peer.matches(identity, denies) for identity in self._identities)
            self._counts[peer, denies] = found
        return self._counts[peer, denies]
