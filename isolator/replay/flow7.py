"""An inspected flow as the kernel would have it pinned, and the kernel's part of its packets, in memory.

The rules are those of bpf/isolator_flow7.h and isolator_commands.h, with the agent there all the time. Left out: the
client's record and the gate, which save Python work and decide nothing; quotas; what fails open.
"""

from __future__ import annotations

from collections import deque
from enum import Enum, auto

from isolator.core.model import Direction, DropReason, Owner, PuntReason
from isolator.datapath.abi import HALF_FIN, HALF_RST, RECORD_MAX, WINDOWS_MAX
from isolator.datapath.flow7 import Answer, Outcome
from parsers.packet import ACK, FIN, RST, SYN, URG, Segment, tcp_checksum_ok, tcp_checksum_unfinished
from parsers.reassembly import seq_le, seq_lt

_MASK = 0xFFFFFFFF


class Kind(Enum):
    FORWARD = auto()
    CUT = auto()  # an acknowledgement is all that goes on
    DROP = auto()
    PUNT = auto()


Step = tuple[Kind, DropReason | PuntReason | None]
FORWARD: Step = (Kind.FORWARD, None)
_CUT: Step = (Kind.CUT, None)
_PUNT: Step = (Kind.PUNT, PuntReason.PAYLOAD)


def dropped(reason: DropReason) -> Step:
    return Kind.DROP, reason


class Half:
    """struct half."""

    alone = None  # Python decides every head
    __slots__ = (
        "acked",
        "flags",
        "gate",
        "mode",
        "next",
        "owner",
        "record",
        "record_seq",
        "remaining",
        "spans",
    )

    def __init__(self) -> None:
        self.next = self.acked = 0
        self.owner = Owner.KERNEL
        self.begin(0, Owner.KERNEL)

    def begin(self, number: int, owner: Owner) -> None:
        self.next = self.acked = self.record_seq = number
        self.owner = owner
        self.mode = self.remaining = self.flags = self.gate = 0
        self.record = b""
        self.spans: deque[tuple[int, int]] = deque(maxlen=WINDOWS_MAX)

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        return tuple(self.spans)

    def acknowledge(self, ack: int) -> None:
        if self.flags & HALF_FIN and ack == (self.next + 1) & _MASK:  # the FIN counts as a byte
            ack = self.next
        if seq_lt(self.acked, ack) and seq_le(ack, self.next):
            self.acked = ack

    def passes(self, start: int, end: int) -> bool:
        return any(seq_le(low, start) and seq_le(end, high) for low, high in self.spans)


class Flow7:
    """struct flow7. `half` by direction; the initiator's is inspected."""

    automaton = 0
    __slots__ = (
        "generation",
        "half",
        "incarnation",
        "initiator",
        "last_seen",
        "live",
        "pending",
        "profile",
        "start",
    )

    def __init__(self, profile: int, generation: int, initiator: Direction) -> None:
        self.profile, self.generation, self.initiator = profile, generation, initiator
        self.incarnation = self.start = self.last_seen = 0
        self.live = False
        self.pending: int | None = None  # the number of a SYN that waits for its answer
        self.half = (Half(), Half())

    @property
    def client(self) -> Half:
        return self.half[self.initiator]

    @property
    def server(self) -> Half:
        return self.half[self.initiator.other]

    # -- a packet ----------------------------------------------------------------------------------------------

    def inspect(self, segment: Segment, frame: memoryview, direction: Direction) -> Step:
        from_client = direction is self.initiator
        if segment.flags & SYN:
            return self._syn(segment, from_client)
        if not self.live:  # a refusal, or an end that gives up
            refusal = segment.flags & RST and not segment.payload_length
            return FORWARD if refusal else dropped(DropReason.TCP_STATE)
        if segment.flags & (FIN | RST) and not (
            tcp_checksum_ok(frame, segment) or tcp_checksum_unfinished(frame, segment)
        ):
            return dropped(DropReason.BAD_CHECKSUM)
        return self._from_client(segment) if from_client else self._from_server(segment, frame)

    def _syn(self, segment: Segment, from_client: bool) -> Step:
        if segment.flags & (FIN | RST):
            return dropped(DropReason.TCP_FLAGS)
        if segment.payload_length:
            return dropped(DropReason.SYN_PAYLOAD)
        if from_client is bool(segment.flags & ACK):
            return dropped(DropReason.TCP_STATE)
        if from_client:
            if not self._is_repeated(segment):
                self.pending = segment.seq
        elif self.pending is not None and segment.ack == (self.pending + 1) & _MASK:
            self._incarnate(segment)
        return FORWARD

    def _is_repeated(self, segment: Segment) -> bool:
        """The answer to it would move the boundary back over bytes under way."""
        client = self.client
        return (
            self.live
            and (segment.seq + 1) & _MASK == self.start == client.acked
            and client.next != self.start
            and not client.flags & HALF_RST
            and not self.server.flags & (HALF_FIN | HALF_RST)
        )

    def _incarnate(self, segment: Segment) -> None:
        self.client.begin(segment.ack, Owner.PYTHON)
        self.server.begin((segment.seq + 1) & _MASK, Owner.KERNEL)
        self.start = segment.ack
        self.incarnation += 1
        self.pending, self.live = None, True

    def _from_server(self, segment: Segment, frame: memoryview) -> Step:
        server = self.server
        if server.owner is Owner.CLOSED:
            return dropped(DropReason.FLOW_CLOSED)
        if segment.flags & ACK:
            self.client.acknowledge(segment.ack)
        if server.owner is Owner.PYTHON:
            return Kind.PUNT, PuntReason.REVERSE
        server.flags |= HALF_RST if segment.flags & RST else 0
        server.flags |= HALF_FIN if segment.flags & FIN else 0
        if segment.payload_length:
            if not server.record and segment.seq == server.record_seq:
                until = min(segment.payload_end, segment.payload_at + RECORD_MAX)
                server.record = bytes(frame[segment.payload_at : until])
            end = (segment.seq + segment.payload_length) & _MASK
            if seq_lt(server.next, end):
                server.next = end
        return FORWARD

    def _from_client(self, segment: Segment) -> Step:
        client = self.client
        end = (segment.seq + segment.payload_length) & _MASK
        if client.owner is Owner.CLOSED:
            return Kind.PUNT, PuntReason.CLOSED
        if segment.payload_length and segment.flags & URG:
            return dropped(DropReason.URGENT)
        if segment.flags & RST:  # only one that the server would believe stops the flow (RFC 5961 section 3)
            if segment.payload_length:
                return dropped(DropReason.TCP_FLAGS)
            if seq_le(client.acked, segment.seq) and seq_le(segment.seq, client.next):
                client.flags |= HALF_RST
            return FORWARD
        step = FORWARD
        if segment.payload_length:
            step = self._payload(segment, end)
        elif segment.flags & FIN and seq_lt(client.next, segment.seq):
            step = _PUNT
        if step is FORWARD and segment.flags & FIN:
            if seq_lt(end, client.next) and not client.passes(end, (end + 1) & _MASK):
                return dropped(DropReason.TCP_STATE)  # it would cut a message that was read
            if seq_le(end, client.next):
                client.flags |= HALF_FIN
        return step

    def _payload(self, segment: Segment, end: int) -> Step:
        client = self.client
        if seq_le(end, client.acked):
            return _PUNT if segment.flags & FIN else _CUT
        if seq_lt(client.next, end) and client.flags & (HALF_FIN | HALF_RST):
            return dropped(DropReason.TCP_STATE)
        known = seq_le(end, client.next) and seq_le(client.acked, segment.seq)
        return FORWARD if known and client.passes(segment.seq, end) else _PUNT


class Flows7:
    """The map `flows7`, and what the program isolator_flow7 does to it (isolator.datapath.flow7.FlowCommands)."""

    def __init__(self) -> None:
        self.flows: dict[bytes, Flow7] = {}

    def commit(
        self,
        key: bytes,
        direction: Direction,
        incarnation: int,
        expect_next: int,
        following: int,
        *,
        mode: int = 0,
        remaining: int = 0,
        window: tuple[int, int] | None = None,
        record: tuple[int, bytes] | None = None,
        mark: bool = False,
        fin: bool = False,
        lend: bool = False,
    ) -> Answer:
        flow = self.flows.get(key)
        if flow is None:
            return _GONE
        half, other = flow.half[direction], flow.half[direction.other]
        if (
            flow.incarnation != incarnation
            or half.next != expect_next
            or half.owner is not Owner.PYTHON
            or seq_lt(following, expect_next)
            or seq_lt(following, half.acked)
        ):
            return Answer(Outcome.STALE, half.acked, other.next, len(other.record))
        if following != expect_next:
            while half.spans and seq_le(half.spans[0][1], half.acked):
                half.spans.popleft()
        if window is not None:
            half.spans.append(window)
        if mark:
            other.record, other.record_seq = b"", other.next
        half.mode, half.remaining, half.next = mode, remaining, following
        half.flags |= HALF_FIN if fin else 0
        return Answer(Outcome.OK, half.acked, other.next, len(other.record))

    def own(self, key: bytes, direction: Direction, incarnation: int, owner: Owner) -> Answer:
        flow = self.flows.get(key)
        if flow is None:
            return _GONE
        if flow.incarnation != incarnation:
            return Answer(Outcome.STALE, 0, 0, 0)
        flow.half[direction].owner = owner
        return Answer(Outcome.OK, 0, 0, 0)

    def take(self, key: bytes, direction: Direction, incarnation: int) -> Answer:
        """Python has it: there are no automata here."""
        flow = self.flows.get(key)
        return Answer(Outcome.OK, 0, 0, 0, flow.half[direction].next) if flow else _GONE

    def open_gate(self, key: bytes, direction: Direction, incarnation: int) -> Answer:
        """There is none: nothing overtakes anything in a capture."""
        return Answer(Outcome.OK, 0, 0, 0)

    def delete(self, key: bytes, incarnation: int) -> Answer:
        flow = self.flows.get(key)
        if flow is None or flow.incarnation != incarnation:
            return _GONE
        del self.flows[key]
        return Answer(Outcome.OK, 0, 0, 0)


_GONE = Answer(Outcome.GONE, 0, 0, 0)
