"""Who may match at all, found without asking everybody: or compiling would grow with policies times endpoints.

An index only narrows down. Whether a policy selects and a peer matches is asked of them, as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from isolator.core.model import Direction
from isolator.core.policy import Identity, Network, Peer, Policy, Range, Rule, Selected, World

Label = tuple[str, str]
Place = tuple[int, Direction, int]
"""Of a rule: policy, direction, which."""


class SelectionIndex:
    """Policies by one label that their selection needs: the one that the fewest others need."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = policies
        needed: dict[Label, int] = {}
        for policy in policies:
            for label in policy.select:
                needed[label] = needed.get(label, 0) + 1
        self._everybody: list[int] = []
        self._by_label: dict[Label, list[int]] = {}
        for at, policy in enumerate(policies):
            if policy.select:
                rarest = min(policy.select, key=lambda label: (needed[label], label))
                self._by_label.setdefault(rarest, []).append(at)
            else:
                self._everybody.append(at)

    def selecting(self, labels: Mapping[str, str], direction: Direction) -> tuple[int, ...]:
        """Of the policies that select an endpoint with these labels, where they stand; ascending."""
        found = [*self._everybody, *(at for label in labels.items() for at in self._by_label.get(label, ()))]
        return tuple(sorted(at for at in found if self._policies[at].selects(labels, direction)))


class PeerIndex:
    """Identities by what peers name of them. Each peer is compared once, however many rules name it."""

    def __init__(self, numbers: Mapping[Identity, int]) -> None:
        self._identities = {number: identity for identity, number in numbers.items()}
        self._by_label: dict[Label, list[int]] = {}
        self._by_network: dict[Network, list[int]] = {}
        self._owned: list[int] = []
        self._world: list[int] = []
        for number, identity in self._identities.items():
            self._file(number, identity)
        self._matching: dict[tuple[Peer, bool], tuple[int, ...]] = {}

    def add(self, number: int, identity: Identity) -> None:
        self._identities[number] = identity
        self._file(number, identity)
        self._matching.clear()

    def _file(self, number: int, identity: Identity) -> None:
        (self._owned if identity.owners else self._world).append(number)
        for label in set().union(*identity.owners):
            self._by_label.setdefault(label, []).append(number)
        for network in identity.networks:
            self._by_network.setdefault(network, []).append(number)

    def matching(self, rule: Rule) -> Iterable[int]:
        """The numbers of the identities that the rule's peers match."""
        if rule.peers is None:
            return self._identities
        return set().union(*(self._of_peer(peer, rule.denies) for peer in rule.peers))

    def _of_peer(self, peer: Peer, widest: bool) -> tuple[int, ...]:
        found = self._matching.get((peer, widest))
        if found is None:
            found = tuple(
                number for number in self._candidates(peer) if peer.matches(self._identities[number], widest)
            )
            self._matching[peer, widest] = found
        return found

    def _candidates(self, peer: Peer) -> Iterable[int]:
        match peer:
            case Selected(labels) if labels:
                return min((self._by_label.get(label, ()) for label in labels), key=len)
            case Selected():
                return self._owned
            case Range(network):
                return self._by_network.get(network, ())
            case World():
                return self._world
        return self._identities


class RuleIndex:
    """Rules by what their peers name: those that match one identity, without asking all."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._everybody: list[Place] = []
        self._owned: list[Place] = []
        self._world: list[Place] = []
        self._by_label: dict[Label, list[Place]] = {}
        self._by_network: dict[Network, list[Place]] = {}
        self._rules: dict[Place, Rule] = {}
        needed: dict[Label, int] = {}
        for at, policy in enumerate(policies):
            for direction in Direction:
                for which, rule in enumerate(policy.rules(direction) or ()):
                    self._rules[at, direction, which] = rule
                    for peer in rule.peers or ():
                        for label in peer.labels if isinstance(peer, Selected) else ():
                            needed[label] = needed.get(label, 0) + 1
        for place, rule in self._rules.items():
            for file in self._files(rule, needed):
                file.append(place)

    def _files(self, rule: Rule, needed: Mapping[Label, int]) -> Iterator[list[Place]]:
        if rule.peers is None:
            yield self._everybody
        for peer in rule.peers or ():
            match peer:
                case Selected(labels) if labels:
                    rarest = min(labels, key=lambda label: (needed[label], label))
                    yield self._by_label.setdefault(rarest, [])
                case Selected():
                    yield self._owned
                case Range(network):
                    yield self._by_network.setdefault(network, [])
                case World():
                    yield self._world

    def matching(self, identity: Identity) -> dict[tuple[int, Direction], list[int]]:
        """By policy and direction the rules that match, ascending."""
        labels, networks = set().union(*identity.owners), identity.networks
        files = [
            self._everybody,
            self._owned if identity.owners else self._world,
            *(self._by_label.get(label, ()) for label in labels),
            *(self._by_network.get(network, ()) for network in networks),
        ]
        found: dict[tuple[int, Direction], list[int]] = {}
        for at, direction, which in sorted(set().union(*files)):
            if self._rules[at, direction, which].matches_peer(identity):
                found.setdefault((at, direction), []).append(which)
        return found
