"""What labels may take together: who was there first keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from ipaddress import ip_address

import pytest

from isolator.control import label_budget
from isolator.control.label_budget import Labelled, first_come, give_way, is_open, within_budget
from isolator.control.label_policy import label_policies
from isolator.core.compile import GENERATIONS, POLICY_MAX, compile_policies
from isolator.core.identities import Address
from isolator.core.model import Endpoint

ALLOW = "isolator.allow.ingress"


def greedy(at: int) -> Endpoint:
    """As much as one container's labels can name."""
    ports = [{"port": 1000 + each} for each in range(63)]
    networks = [{"cidr": f"10.{at}.{each}.0/24"} for each in range(64)]
    rules = [{"ports": ports}, {"from": networks, "ports": ports[:1]}]
    return Endpoint(f"greedy{at:02}", {"name": f"greedy{at:02}", ALLOW: json.dumps(rules)})


def small(at: int) -> Endpoint:
    rule = "[{from: [{cidr: 192.0.2.0/24}], ports: [{port: 80}]}]"
    return Endpoint(f"small{at}", {"name": f"small{at}", ALLOW: rule})


def fit(all_of_them: Iterable[Endpoint], before: Labelled) -> Labelled:
    """What is in force then. The compiler takes it."""
    endpoints = dict(enumerate(all_of_them, 1))
    addresses: dict[int, list[Address]] = {number: [ip_address(f"172.17.0.{number}")] for number in endpoints}
    read = label_policies(endpoints.values(), {})
    fitting = within_budget(first_come(read, before), [], endpoints, addresses)
    compiled = compile_policies([each.policy for each in fitting.values()], endpoints, addresses, 1)
    assert len(compiled.entries) < POLICY_MAX // GENERATIONS
    return fitting


def opened(labelled: Labelled) -> list[str]:
    return sorted(each.policy.name.removeprefix("label:") for each in labelled.values() if is_open(each))


@pytest.mark.parametrize(("bound", "value", "why"), [
    ("NETWORKS_MAX", 200, " networks of all labels, of 200"),
    ("ENTRIES_MAX", 41000, " entries of all labels, of 41000"),
])  # fmt: skip
def test_a_newcomer_without_room_is_closed_and_takes_nothing_from_others(
    monkeypatch: pytest.MonkeyPatch, bound: str, value: int, why: str
) -> None:
    monkeypatch.setattr(label_budget, bound, value)
    first = [greedy(5), greedy(6), greedy(7)]
    held = fit(first, {})
    assert opened(held) == ["greedy05", "greedy06", "greedy07"]
    crowd = [*(greedy(at) for at in range(5)), *first, small(1)]
    then = fit(crowd, held)
    assert opened(then) == ["greedy05", "greedy06", "greedy07", "small1"]
    closed = [each for each in then.values() if not is_open(each)]
    assert len(closed) == 5
    for each in closed:
        (problem,) = each.problems
        assert "no room in the kernel: " in problem.message and why in problem.message
        assert each.policy.ingress == each.policy.egress and len(each.policy.ingress or ()) == 1
    assert opened(fit([*crowd, small(2)], then)) == [*opened(then), "small2"]
    assert "greedy00" in opened(fit([greedy(0), small(1), small(2)], then)), "there is room again"


def test_a_newcomers_networks_push_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody's entries grow with them."""
    monkeypatch.setattr(label_budget, "ENTRIES_MAX", 24600)
    first = [greedy(1), greedy(2)]
    held = fit(first, {})
    assert opened(held) == ["greedy01", "greedy02"] == opened(fit([greedy(0), *first], held))


def test_a_dozen_greedy_ones_leave_room_for_the_others() -> None:
    crowd = [*(greedy(at) for at in range(12)), *(small(at) for at in range(10))]
    names = opened(fit(crowd, {}))
    assert [each for each in names if each.startswith("small")] == [f"small{at}" for at in range(10)]
    assert 0 < len(names) - 10 < 12


def test_newcomers_give_way_by_halves_and_nobody_else() -> None:
    held = fit([small(0)], {})
    read = first_come(label_policies([small(at) for at in range(4)], {}), held)
    left = []
    fewer: Labelled | None = read
    while fewer is not None:
        left.append(opened(fewer))
        fewer = give_way(fewer, held)
    assert left == [["small0", "small1", "small2", "small3"], ["small0", "small1"], ["small0"]]
