"""The words everything else is said in: directions, verdicts, reasons, endpoints, flows' names.

The numbers are those of bpf/isolator.h; tests/core/test_model.py compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple


class Direction(IntEnum):
    """Direction of a packet, seen from the endpoint: ingress goes to the container."""

    INGRESS = 0
    EGRESS = 1

    @property
    def other(self) -> Direction:
        return Direction(1 - self)


class Side(IntEnum):
    """Which end of a splice a port is. What arrives at the container port is egress."""

    CONTAINER = 0
    NETWORK = 1


class Verdict(IntEnum):
    NONE = 0
    ALLOW = 1
    DROP = 2
    RESET = 3
    INSPECT = 4


class DropReason(IntEnum):
    """Why something was dropped: one number in C, Python, metrics and on screen."""

    NONE = 0
    MALFORMED = 1
    LENGTH_MISMATCH = 2
    ETHERTYPE = 3
    VLAN = 4
    FOREIGN_MAC = 5
    FOREIGN_DESTINATION = 6
    FOREIGN_SOURCE = 7
    FRAGMENT = 8
    IP_OPTIONS = 9
    EXTENSION_HEADER = 10
    NEIGHBOUR_SPOOF = 11
    ICMP_UNRELATED = 12
    PROTOCOL = 13
    POLICY_DENY = 16
    POLICY_DEFAULT = 17
    NO_POLICY = 18
    TCP_FLAGS = 24
    SYN_PAYLOAD = 25
    TCP_STATE = 26
    FLOW_CLOSED = 27
    RECORD_MISMATCH = 28
    URGENT = 29
    STATE_LOST = 30
    OUT_OF_WINDOW = 31
    BAD_CHECKSUM = 32
    HELD_FULL = 33
    FLOWS_FULL = 34
    AGENT_DOWN = 40
    SNAPLEN = 41
    INTERNAL = 42
    UPGRADE = 43
    HTTP_DENY = 48
    HTTP_NO_RULE = 49
    HTTP_MALFORMED = 50
    HTTP_AMBIGUOUS = 51
    HTTP_UPGRADE = 52
    HTTP_TOO_LONG = 53
    NOT_HTTP = 54


class PuntReason(IntEnum):
    """Why a frame came to Python."""

    NONE = 0
    PAYLOAD = 1
    CLOSED = 2
    MISMATCH = 3
    REVERSE = 4
    RESET = 5
    STATE_LOST = 6


class Owner(IntEnum):
    """Who may move a half's boundary (R0)."""

    KERNEL = 0
    BUSY = 1
    PYTHON = 2
    CLOSED = 3


class PolicyFlag(IntFlag):
    AUDIT = 1
    TRIAL = 2
    FAIL_OPEN = 4
    UNREAD = 8


class FlowFlag(IntFlag):
    AUDIT = 1
    FAIL_OPEN = 4
    PASSED_OPEN = 8
    DENIED = 16
    PLAIN = 32


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A container's interface as a network peer: chosen by its labels, never by its addresses."""

    name: str
    labels: dict[str, str] = field(hash=False)


ENTITY = "entity"
"""The label of who is no workload: `host`, `gateway`, `multicast`. Only a selection that names it chooses them."""


@dataclass(frozen=True, slots=True)
class Outsider:
    """Somebody whom policies can name and who is not protected here: the host, a gateway, a service, a container
    that was left alone."""

    name: str
    labels: dict[str, str] = field(hash=False)
    addresses: tuple[IPv4Address | IPv6Address, ...]


class RuleRef(NamedTuple):
    """Where a decision comes from. `rule` is the rule's name, or `ingress[0]` for one without."""

    policy: str
    rule: str

    def __str__(self) -> str:
        return f"{self.policy}/{self.rule}"


@dataclass(frozen=True, slots=True)
class Decision:
    """What policy says of a message or a flow.

    `audit`: allowed, and recorded. `trial`: allowed by monitor mode, would be dropped for `reason`.
    """

    verdict: Verdict
    reason: DropReason = DropReason.NONE
    rule: RuleRef | None = None
    audit: bool = False
    trial: bool = False
