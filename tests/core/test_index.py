"""The indexes change nothing: the compiler with them, and with everybody asked, comes to the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.core import compile as compiler
from isolator.core.compile import Compiled, compile_policies
from isolator.core.index import PeerIndex, SelectionIndex
from isolator.core.model import Direction, Outsider
from isolator.core.policy import Identity, Policy, Rule, Selected, labels_of
from tests.core.test_compile import ADDRESSES, ENDPOINTS, policies

OUTSIDERS = [Outsider("host", {"entity": "host", "app": "shop"}, (ip_address("10.0.0.77"),))]


class EverySelection(SelectionIndex):
    def __init__(self, policies: Sequence[Policy]) -> None:
        self.every = policies

    def selecting(self, labels: Mapping[str, str], direction: Direction) -> tuple[int, ...]:
        return tuple(at for at, each in enumerate(self.every) if each.selects(labels, direction))


class EveryPeer(PeerIndex):
    def __init__(self, numbers: Mapping[Identity, int]) -> None:
        self.numbers = numbers

    def matching(self, rule: Rule) -> Iterable[int]:
        return [number for identity, number in self.numbers.items() if rule.matches_peer(identity)]


def compiled(made: list[Policy]) -> Compiled:
    return compile_policies(made, ENDPOINTS, ADDRESSES, 1, OUTSIDERS)


@settings(max_examples=300, deadline=None)
@given(st.lists(policies, max_size=5))
def test_the_same_entries_in_the_same_order_with_the_same_numbers(made: list[Policy]) -> None:
    with (
        patch.object(compiler, "SelectionIndex", EverySelection),
        patch.object(compiler, "PeerIndex", EveryPeer),
    ):
        expected = compiled(made)
    found = compiled(made)
    assert found == expected
    assert list(found.profiles) == list(expected.profiles)


def test_only_those_are_asked_that_may_match() -> None:
    """One of a hundred policies, and one of a hundred identities."""
    asked: list[Policy] = []

    class Asked(Policy):
        def selects(self, labels: Mapping[str, str], direction: Direction) -> bool:
            asked.append(self)
            return Policy.selects(self, labels, direction)

    made = [Asked(f"p{at}", labels_of({"app": "shop", "name": f"e{at}"}), ingress=()) for at in range(100)]
    found = SelectionIndex(made).selecting({"app": "shop", "name": "e7"}, Direction.INGRESS)
    assert (found, asked) == ((7,), [made[7]])
    identities = {
        Identity(frozenset({labels_of({"app": "shop", "name": f"e{at}"})})): at for at in range(1, 101)
    }
    peer = Selected(labels_of({"app": "shop", "name": "e7"}))
    index = PeerIndex(identities)
    assert len(list(index._candidates(peer))) == 1
    assert list(index.matching(Rule("r", peers=(peer,)))) == [7]
