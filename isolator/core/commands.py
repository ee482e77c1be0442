"""What the inspector asks of the datapath. It decides; the datapath alone acts, in the order given.

A Commit that fails (the flow is gone, or a new incarnation took its place) voids the commands after it.
"""

from __future__ import annotations

from typing import NamedTuple

from isolator.core.flow import Flow
from isolator.core.model import Decision, Direction, DropReason, Owner
from isolator.core.tally import Misfit
from parsers.http1 import Request


class Commit(NamedTuple):
    """Move the client's boundary: bytes [expect, next) are decided. Comes before the bytes are sent.

    `fin`: the half ends at `next`; `lend`: the kernel may decide what follows (R7). With next where it was it asks
    whether the flow is still the one that is meant: nothing old is sent on to a new connection.
    """

    flow: Flow
    expect: int
    next: int
    record: bytes | None = None
    window: tuple[int, int] | None = None
    mark: bool = False
    fin: bool = False
    lend: bool = False


class Forward(NamedTuple):
    """Send the very frame that is in hand, whole."""


class Send(NamedTuple):
    """Send a frame that was built here: vnet header and Ethernet frame, towards `direction` of the endpoint."""

    endpoint: int
    direction: Direction
    frame: bytes


class Own(NamedTuple):
    """Set who owns one half of the flow."""

    flow: Flow
    half: Direction
    owner: Owner


class Read(NamedTuple):
    """Read the flow's pinned state and hand it to `Inspector.resume`."""

    flow: Flow


class Delete(NamedTuple):
    """Forget the flow, here and in the kernel."""

    flow: Flow


class Report(NamedTuple):
    """One decided message, for the flow log. `why` it was not the kernel's, None where there is no kernel."""

    flow: Flow
    decision: Decision
    request: Request | None
    why: Misfit | None = None


class Drop(NamedTuple):
    """Count a frame that goes nowhere."""

    reason: DropReason


Command = Commit | Forward | Send | Own | Read | Delete | Report | Drop
