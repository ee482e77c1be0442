"""The model's numbers are those of bpf/isolator.h, and none is missing on either side."""

from __future__ import annotations

from enum import IntEnum

import pytest

from isolator.core.automaton import states
from isolator.core.automaton.states import Kind
from isolator.core.model import (
    Direction,
    DropReason,
    FlowFlag,
    Owner,
    PolicyFlag,
    PuntReason,
    RuleRef,
    Side,
    Verdict,
)
from parsers.http1 import HEADERS_MAX
from tests.header import numbers

ENUMS: list[tuple[type[IntEnum], str]] = [
    (Side, "SIDE_"),
    (Verdict, "VERDICT_"),
    (DropReason, "REASON_"),
    (PuntReason, "PUNT_"),
    (Owner, "OWNER_"),
    (PolicyFlag, "POLICY_"),
    (FlowFlag, "FLOW_"),
    (Kind, "STATE_"),
]
NOT_MEMBERS = {"POLICY_MAX"}


@pytest.mark.parametrize(("enum", "prefix"), ENUMS, ids=lambda value: getattr(value, "__name__", value))
def test_enum_has_the_headers_numbers(enum: type[IntEnum], prefix: str) -> None:
    header = {
        name.removeprefix(prefix): value
        for name, value in numbers().items()
        if name.startswith(prefix) and name not in NOT_MEMBERS
    }
    assert {member.name: member.value for member in enum} == header


def test_an_automatons_bounds_are_the_headers() -> None:
    bounds = ("STEPS_MAX", "STRIDE", "EDGES_MAX", "ALTERNATIVES_MAX")
    assert {name: getattr(states, name) for name in bounds} == {name: numbers()[name] for name in bounds}
    assert (numbers()["RECORD_MAX"], numbers()["LINES_MAX"]) == (states.HEAD_MAX, HEADERS_MAX)


def test_directions() -> None:
    assert (numbers()["INGRESS"], numbers()["EGRESS"]) == (Direction.INGRESS, Direction.EGRESS)
    assert Direction.INGRESS.other is Direction.EGRESS and Direction.EGRESS.other is Direction.INGRESS


def test_a_rule_is_named_by_its_policy() -> None:
    assert str(RuleRef("api-allow", "ingress[0]")) == "api-allow/ingress[0]"
