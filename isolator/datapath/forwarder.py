"""The slow path's loop: frames out of the ring, the inspector's commands done.

    ring → five-tuple → flow (adopted from its pinned state where it is new here) → inspector → commands → done

A frame that cannot be read, whose checksum is wrong or whose flow nobody knows goes nowhere: the sender will send
it again, and by then more may be known. One that makes Python itself fail is dropped and counted (INTERNAL); what was
believed of its flow is forgotten, and read again from the kernel with the next one.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

from isolator.core.commands import Command, Commit, Delete, Drop, Forward, Own, Read, Report, Send
from isolator.core.flow import Flow, FlowState
from isolator.core.inspector import Inspector
from isolator.core.model import Direction, DropReason, Owner, PuntReason
from isolator.core.segments import refusals
from isolator.datapath.abi import RECORD_MAX, flow_key
from isolator.datapath.flow7 import Answer, Outcome
from isolator.datapath.ring import Frame
from parsers.errors import DissectError
from parsers.icmp import unreachable
from parsers.packet import Segment, parse_segment, tcp_checksum_ok

SPIN = 40e-6  # s that the loop waits for a frame before it sleeps: a wake-up costs about as much
TURN = 2e-3  # s after which other work of the process has its turn
GATE_SHUT = 5e-3  # s at the most that a granted body comes through Python, so that nothing of it is overtaken
BATCH = 16  # frames taken from the ring at once: all of them are handled before the clock is looked at
REFUSALS_PER_SECOND = 1000  # resets and ICMP errors for what layer 4 refuses (RFC 4443 section 2.4 f)
_TCP = 6
_CHECKSUM_KNOWN = 3  # VIRTIO_NET_HDR_F_NEEDS_CSUM | F_DATA_VALID: the kernel made or checked it

log = structlog.get_logger()

Reporter = Callable[[Report, float], None]


class Commands(Protocol):
    """What the forwarder asks of inspected flows (isolator.datapath.flow7.FlowCommands)."""

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
    ) -> Answer: ...
    def take(self, key: bytes, direction: Direction, incarnation: int) -> Answer: ...
    def own(self, key: bytes, direction: Direction, incarnation: int, owner: Owner) -> Answer: ...
    def open_gate(self, key: bytes, direction: Direction, incarnation: int) -> Answer: ...
    def delete(self, key: bytes, incarnation: int) -> Answer: ...


class Wakeup(Protocol):
    need_wakeup: bool


class Pinned(Protocol):
    """What the forwarder needs of the kernel's maps (isolator.datapath.bpf.Datapath)."""

    @property
    def commands(self) -> Commands: ...
    @property
    def control(self) -> Wakeup: ...
    def flow7(self, key: bytes) -> FlowState | None: ...


class Frames(Protocol):
    """What it needs of the ring (isolator.datapath.ring.Ring)."""

    @property
    def waiting(self) -> bool: ...
    def poll(self, budget: int) -> list[Frame]: ...


class Bell(Protocol):
    """And of the doorbell (isolator.datapath.doorbell.Doorbell)."""

    def clear(self) -> None: ...


class Ports(Protocol):
    """Where frames leave (isolator.datapath.sender.Sender)."""

    def send(self, ifindex: int, vnet_frame: bytes | memoryview) -> object: ...


class Forwarder:
    """Owns the ring's reading end. `ports`: endpoint → ifindex by direction of what is sent there."""

    def __init__(
        self,
        pinned: Pinned,
        ring: Frames,
        doorbell: Bell,
        sender: Ports,
        inspector: Inspector,
        ports: Mapping[int, tuple[int, int]],
        report: Reporter,
    ) -> None:
        self._pinned = pinned
        self._ring = ring
        self._doorbell = doorbell
        self._sender = sender
        self._inspector = inspector
        self._ports = ports
        self._report = report
        self._refused_at, self._refusals = 0, 0
        self._gated: dict[Flow, float] = {}  # flows with a shut gate → when it is opened at the latest
        self.drops: Counter[DropReason] = Counter()

    # -- the loop -------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Handles what is there, then sleeps. True: its turn is over and more is waiting; call it again."""
        control, poll, handle = self._pinned.control, self._ring.poll, self.handle
        self._doorbell.clear()
        control.need_wakeup = False
        began = quiet_since = time.perf_counter()
        while True:
            frames = poll(BATCH)
            for frame in frames:
                try:
                    handle(frame)
                except Exception as error:  # no packet may end the agent, or take others with it
                    self.fail(frame, error)
            now = time.perf_counter()
            if self._gated:
                self._open_gates(now, drained=not frames)
            if frames:
                quiet_since = now
                if now - began > TURN:
                    return True
            elif now - quiet_since > SPIN:
                break
        control.need_wakeup = True
        return self._ring.waiting  # what came while the bell was being set would not have rung

    def _open_gates(self, now: float, drained: bool) -> None:
        """Nothing is under way here any more: granted bodies may go by in the kernel, and overtake nothing."""
        for flow, latest in list(self._gated.items()):
            if drained or latest < now:
                del self._gated[flow]
                self._pinned.commands.open_gate(flow.key, flow.initiator, flow.incarnation)

    def tick(self, now: float) -> None:
        """`now`: seconds, of the clock that stamps frames (CLOCK_REALTIME)."""
        for flow in self._inspector.due(now):
            try:
                self._do(self._inspector.wake(flow, now), None, now)
            except Exception as error:  # one flow's must not be the others'
                self._failed(error)
                self._inspector.forget(flow)

    def release(self, endpoint: int) -> None:
        """Before its container gets its network back: hands over what is held."""
        now = time.time()
        self._do(self._inspector.release(endpoint, now), None, now)

    def fail(self, frame: Frame, error: Exception) -> None:
        """A frame that Python failed on, and what was believed of its flow."""
        self._failed(error)
        with contextlib.suppress(DissectError):
            flow = self._inspector.flows.find(frame.context & 0xFFFF, parse_segment(frame.packet).key)
            if flow is not None:
                self._inspector.forget(flow)

    def _failed(self, error: Exception) -> None:
        """Told the 1st, 2nd, 4th, 8th … time."""
        self.drops[DropReason.INTERNAL] += 1
        count = self.drops[DropReason.INTERNAL]
        if count & (count - 1) == 0:
            log.error("the slow path failed", count=count, exc_info=error)

    # -- one frame ------------------------------------------------------------------------------------------

    def handle(self, frame: Frame) -> None:
        """What `run` does with each; what it raises, `fail` is for."""
        packet, context = frame.packet, frame.context
        reason = context >> 16 & 0xFF
        if reason in (PuntReason.RESET, PuntReason.STATE_LOST):
            self._refuse(packet, context, both=reason == PuntReason.STATE_LOST)
            return
        try:
            segment = parse_segment(packet)
        except DissectError:
            self.drops[DropReason.MALFORMED] += 1
            return
        if not frame.vnet_packet[0] & _CHECKSUM_KNOWN and not tcp_checksum_ok(packet, segment):
            self.drops[DropReason.BAD_CHECKSUM] += 1
            return
        inspector = self._inspector
        flow = inspector.find(context & 0xFFFF, segment.key, context >> 24) or self._adopt(
            segment, packet, context
        )
        if flow is not None and flow.lent:
            flow = self._take_back(flow, segment, packet, context)
        if flow is None:
            self.drops[DropReason.TCP_STATE] += 1
            return
        now = frame.time * 1e-9
        self._do(inspector.receive(flow, segment, packet, context, now), frame, now)

    def _adopt(self, segment: Segment, packet: memoryview, context: int) -> Flow | None:
        endpoint, network_side = (context & 0xFFFF) >> 1, context & 1
        ends = (
            (segment.source(packet), segment.source_port(packet)),
            (segment.destination(packet), segment.destination_port(packet)),
        )
        (local, local_port), (remote, remote_port) = reversed(ends) if network_side else ends
        key = flow_key(endpoint, local, remote, local_port, remote_port, _TCP)
        pinned = self._pinned.flow7(key)
        if pinned is None or pinned.incarnation & 0xFF != context >> 24:
            return None
        flow = self._inspector.adopt(key, context & 0xFFFF, segment.key, pinned)
        if flow is not None and pinned.client.gate:  # shut by an agent before this one, or a moment ago
            self._gated.setdefault(flow, time.perf_counter() + GATE_SHUT)
        return flow

    def _take_back(self, flow: Flow, segment: Segment, packet: memoryview, context: int) -> Flow | None:
        """A flow that the kernel was deciding is Python's again, as it stands there now (R7)."""
        answer = self._pinned.commands.take(flow.key, flow.initiator, flow.incarnation)
        if answer and answer.next == flow.next:
            flow.lent, flow.returned = False, True
            self._inspector.committed(flow, answer.acked)
            return flow
        self._inspector.forget(flow)
        found = self._adopt(segment, packet, context) if answer else None
        return None if found is None or found.lent else found

    def _refuse(self, packet: memoryview, context: int, both: bool) -> None:
        """Answers the sender of a frame with a reset or an ICMP error; a connection cut off is told to both ends."""
        ports = self._ports.get((context & 0xFFFF) >> 1)
        second = int(time.monotonic())
        if second != self._refused_at:
            self._refused_at, self._refusals = second, 0
        self._refusals += 1
        if ports is None or self._refusals > REFUSALS_PER_SECOND:
            return
        direction = Direction.INGRESS if context & 1 else Direction.EGRESS
        try:
            back, on = refusals(parse_segment(packet), packet)
        except DissectError:
            error = unreachable(packet)
            if error is not None:
                self._sender.send(ports[direction.other], error)
            return
        self._sender.send(ports[direction.other], back)
        if both:
            self._sender.send(ports[direction], on)

    # -- commands -------------------------------------------------------------------------------------------

    def _do(self, commands: list[Command], frame: Frame | None, now: float) -> None:
        """In order; a Commit that fails voids the rest, and what was believed of the flow."""
        for command in commands:
            if isinstance(command, Commit):
                if not self._commit(command):
                    return
            elif isinstance(command, Forward):
                assert frame is not None
                self._forward(frame)
            elif isinstance(command, Send):
                ports = self._ports.get(command.endpoint)
                if ports is not None:
                    self._sender.send(ports[command.direction], command.frame)
            elif isinstance(command, Report):
                self._report(command, now)
            else:
                self._rare(command, frame, now)

    def _forward(self, frame: Frame) -> None:
        """Sends the very bytes that were inspected, out of the ring."""
        ports = self._ports.get((frame.context & 0xFFFF) >> 1)
        if ports is not None:
            self._sender.send(ports[0 if frame.context & 1 else 1], frame.vnet_packet)

    def _commit(self, c: Commit) -> bool:
        flow = c.flow
        answer = self._pinned.commands.commit(
            flow.key, flow.initiator, flow.incarnation, c.expect, c.next,
            mode=flow.dissector.mode, remaining=flow.dissector.remaining,
            window=c.window, mark=c.mark, fin=c.fin, lend=c.lend,
            record=(c.expect, c.record) if c.record is not None and len(c.record) <= RECORD_MAX else None,
        )  # fmt: skip
        if answer.outcome is Outcome.OK:
            # whatever has become of it meanwhile: it is taken back, and read, with the next frame
            flow.lent = c.lend
            self._inspector.committed(flow, answer.acked)
            if c.window is not None:
                self._gated[flow] = time.perf_counter() + GATE_SHUT
            return True
        self._inspector.forget(flow)
        self.drops[DropReason.TCP_STATE] += 1
        return False

    def _rare(self, command: Own | Read | Delete | Drop, frame: Frame | None, now: float) -> None:
        if isinstance(command, Drop):
            self.drops[command.reason] += 1
        elif isinstance(command, Own):
            flow = command.flow
            self._pinned.commands.own(flow.key, command.half, flow.incarnation, command.owner)
        elif isinstance(command, Read):
            flow, pinned = command.flow, self._pinned.flow7(command.flow.key)
            if pinned is not None and pinned.incarnation == flow.incarnation:
                self._do(self._inspector.resume(flow, pinned, now), frame, now)
            else:
                self._inspector.forget(flow)
        else:
            self._pinned.commands.delete(command.flow.key, command.flow.incarnation)
            self._inspector.forget(command.flow)
