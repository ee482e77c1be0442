"""Inspected flows as Python sees them, and the table that finds them by what stands in a frame.

A flow's state:

    OPEN ──denied──▶ DRAINING ──answers done──▶ ANSWERED ──acknowledged──▶ CLOSED
      │                  │                         ▲                         ▲
      ├──denied, nothing under way─────────────────┘                         │
      │                  └──the server closes──▶ ENDING ──delivered──────────┤
      └──mismatch, not HTTP, state lost──────────────────────────────────────┘

OPEN      requests are decided one by one
DRAINING  the request is denied; answers to earlier ones are still on their way to the client, through Python
ENDING    the server closed behind them, so that no denial can follow: they are delivered, then both ends reset
ANSWERED  the denial stands right behind them, and is sent again until the client acknowledges it
CLOSED    whatever comes is swallowed or reset, until the flow is forgotten
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from enum import Enum, auto
from typing import Protocol

from isolator.core.model import Decision, Direction, Owner
from isolator.core.policy import Profile
from parsers.http1 import AnswerDissector, Mode, Request, RequestDissector
from parsers.packet import SegmentTemplate
from parsers.reassembly import Reassembler, Record

HELD_MAX = (
    65536  # bytes of a direction that wait for their verdict; a head has 16 KiB, the rest is pipelining
)
RESETS_MAX = 16  # of a closed flow, in answer to what still comes


class HalfState(Protocol):
    """One direction as it is pinned in the kernel (struct half)."""

    @property
    def next(self) -> int: ...
    @property
    def owner(self) -> Owner: ...
    @property
    def acked(self) -> int: ...
    @property
    def mode(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    @property
    def windows(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def record_seq(self) -> int: ...
    @property
    def record(self) -> bytes: ...
    @property
    def gate(self) -> int: ...
    @property
    def alone(self) -> str | None: ...


class FlowState(Protocol):
    """An inspected flow as it is pinned in the kernel (struct flow7)."""

    @property
    def profile(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def automaton(self) -> int: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def initiator(self) -> Direction: ...
    @property
    def live(self) -> bool: ...
    @property
    def client(self) -> HalfState: ...
    @property
    def server(self) -> HalfState: ...


class State(Enum):
    OPEN = auto()
    DRAINING = auto()
    ENDING = auto()
    ANSWERED = auto()
    CLOSED = auto()


class Flow:
    """One inspected connection. Sequence numbers are the wire's, modulo 2^32."""

    __slots__ = (
        "acked",
        "answer",
        "answer_at",
        "answers",
        "answers_at",
        "answers_data",
        "client_at",
        "client_end",
        "client_fin",
        "decision",
        "dissector",
        "endpoint",
        "fin_at",
        "generation",
        "held_since",
        "incarnation",
        "initiator",
        "key",
        "lendable",
        "lent",
        "mark_ack",
        "more",
        "profile",
        "promised",
        "record",
        "request",
        "requests",
        "resends",
        "resets",
        "returned",
        "server_at",
        "server_needed",
        "state",
        "stream",
        "template",
        "timestamps",
        "unanswered",
        "until",
        "wake_at",
        "window",
        "windows",
        "wire",
    )

    def __init__(self, key: bytes, endpoint: int, pinned: FlowState, profile: Profile) -> None:
        client = pinned.client
        self.key = key
        self.endpoint = endpoint
        self.initiator = Direction(pinned.initiator)
        self.renew(pinned, profile)
        self.incarnation = pinned.incarnation
        # denied or reset by an agent before this one: what it meant to say is lost
        self.state = State.CLOSED if client.owner is Owner.CLOSED else State.OPEN
        self.returned = True  # the kernel had it, and did not accept what comes now
        self.wire: list[tuple[int, bytes]] = []  # where the table finds it

        # the client's half
        self.stream = Reassembler(client.next, HELD_MAX)
        self.dissector = RequestDissector(Mode(client.mode), client.remaining)
        self.record = Record()
        self.promised: int | None = None  # held bytes up to here were acknowledged in the server's name
        if client.record and client.record_seq == client.next:
            self.stream.insert(client.next, client.record)
            self.promised = (client.next + len(client.record)) & 0xFFFFFFFF
        elif client.record:
            self.record.append(client.record_seq, client.record)
        self.windows: deque[tuple[int, int]] = deque(client.windows)
        self.acked = client.acked
        self.fin_at: int | None = None  # where the client's FIN stands
        self.held_since: float | None = None
        self.more = False  # held bytes that were not read for want of time
        # the client's newest frame (isolator.core.segments)
        self.template: SegmentTemplate | None = None
        self.timestamps: tuple[int, int] | None = None
        self.window = 0
        self.client_at = 0  # what the client has acknowledged

        # the answers
        self.requests = 0  # allowed so far
        fresh = client.acked == client.next and not self.record and not pinned.server.record
        self.unanswered: list[str] | None = (
            [] if fresh else None
        )  # methods since the mark; None: nobody knows
        self.mark_ack: int | None = None  # what the client had acknowledged when the mark was set
        if client.alone is not None:  # the last request was the kernel's
            self.requests, self.unanswered = 1, [client.alone]
            self.mark_ack = pinned.server.record_seq

        # the end (isolator.core.closing)
        self.decision: Decision | None = None
        self.request: Request | None = None
        self.server_at = pinned.server.next
        self.answers: AnswerDissector | None = None
        self.answers_at = 0  # where the next piece of the answers begins
        self.answers_data = b""  # bytes before server_at that are no whole piece yet
        self.answer = b""  # the denial
        self.answer_at = 0
        self.client_end = 0  # up to where the client's bytes have been taken
        self.client_fin = False
        self.server_needed = False  # it may have to send earlier answers again
        self.resends = 0
        self.resets = RESETS_MAX  # that may still be sent
        self.until = 0.0  # s; patience ends
        self.wake_at: float | None = None  # s; when time has to be looked at

    def renew(self, pinned: FlowState, profile: Profile) -> None:
        """What a changed policy changes of a flow that is known."""
        self.profile, self.generation = profile, pinned.generation
        self.lendable = bool(pinned.automaton)  # the kernel can decide some of its requests
        # and may: `next` can be beyond what is known here
        self.lent = pinned.client.owner in (Owner.KERNEL, Owner.BUSY)

    @property
    def next(self) -> int:
        return self.stream.next


class FlowTable:
    """Flows by (endpoint and side, addresses and ports as on the wire), both directions."""

    def __init__(self) -> None:
        self._flows: dict[tuple[int, bytes], Flow] = {}
        self._all: dict[bytes, Flow] = {}

    def find(self, where: int, wire: bytes) -> Flow | None:
        """`where`: the low 16 bits of a frame's context, endpoint << 1 | side."""
        return self._flows.get((where, wire))

    def add(self, flow: Flow, where: int, wire: bytes) -> None:
        """Makes the flow findable by frames like this one and by those of the other direction."""
        self.remove(flow.key)
        flow.wire = [(where, wire), (where ^ 1, _reversed(wire))]
        for name in flow.wire:
            self._flows[name] = flow
        self._all[flow.key] = flow

    def get(self, key: bytes) -> Flow | None:
        """By its pinned key (struct flow_key)."""
        return self._all.get(key)

    def remove(self, key: bytes) -> None:
        flow = self._all.pop(key, None)
        for name in flow.wire if flow is not None else ():
            self._flows.pop(name, None)

    def __iter__(self) -> Iterator[Flow]:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)


def _reversed(wire: bytes) -> bytes:
    """The same two ends, seen from the other: addresses of 4 or 16 bytes each, then two ports."""
    size = (len(wire) - 4) // 2
    return wire[size : 2 * size] + wire[:size] + wire[-2:] + wire[-4:-2]
