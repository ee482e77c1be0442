"""Frames of a capture through the endpoints they cross, and what was decided as flow records.

    frame → source's egress ─▶ destination's ingress, each: stand-in for the kernel ─┬─ forward
                                                                                     ├─ drop
                                                                                     └─ Forwarder ─▶ what it sends

The Forwarder and the Inspector are those of the agent; what the Forwarder would put on a port goes on to the next
endpoint here. `now` is the frame's time, and the waiting in between is made up for, fifty times a second.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from isolator.control.flowlog import FlowLog, FlowRecord
from isolator.core.commands import Report
from isolator.core.compile import Compiled, PolicyEntry
from isolator.core.identities import Address
from isolator.core.inspector import Inspector
from isolator.core.model import (
    Decision,
    Direction,
    DropReason,
    Endpoint,
    PolicyFlag,
    PuntReason,
    Side,
    Verdict,
)
from isolator.datapath.abi import FlowKey, mapped, punt_context
from isolator.datapath.forwarder import Forwarder
from isolator.datapath.ring import Frame
from isolator.records import Recorder
from isolator.replay.capture import Captured
from isolator.replay.flow7 import Flow7, Flows7, Kind
from isolator.replay.headers import Headers, read_headers
from isolator.replay.standin import Classified, StandIn, key_of
from parsers.packet import VNET, tcp_checksum_unfinished

TICK_NS = 20_000_000  # as the daemon asks for flows that have waited
AGE_NS = 10 * 10**9  # how often flows are forgotten that have ended
CROSSINGS_MAX = 64  # that one captured frame may bring about
_PLAIN = bytes(VNET)
_UNFINISHED = bytes([1]) + bytes(VNET - 1)  # VIRTIO_NET_HDR_F_NEEDS_CSUM


class Sink(FlowLog):
    """A flow log that keeps nothing and wants every record."""

    def __init__(self, sink: Callable[[FlowRecord], None]) -> None:
        super().__init__(capacity=0)
        self._sink = sink

    def append(self, record: FlowRecord) -> None:
        self._sink(record)

    def count(self, *_: object, **__: object) -> bool:
        return True


@dataclass(slots=True)
class Tally:
    """What a replay came to.

    `unrelated`: frames between addresses that no endpoint has. `unread`: neither IPv4 nor IPv6. `cut`: not whole in the
    capture, so not decided. `answers`: to what was dropped on its way. `waiting`: connections with bytes that wait for
    others. `drops`: frames that go nowhere, by reason. `first`, `last`: ns since 1970.
    """

    frames: int = 0
    octets: int = 0
    unrelated: int = 0
    unread: int = 0
    cut: int = 0
    answers: int = 0
    messages: int = 0
    flows: int = 0
    waiting: int = 0
    drops: Counter[DropReason] = field(default_factory=Counter)
    first: int | None = None
    last: int = 0


Sent = tuple[int, bytes, Headers | None]
"""(endpoint << 1 | direction, frame with its vnet header, its headers where they were read)."""

Crossing = tuple[int, Direction, bytes, Headers]


@dataclass(slots=True)
class _Pinned:
    """What the Forwarder takes for the kernel's maps, the ring and the ports."""

    commands: Flows7
    sent: list[Sent] = field(default_factory=list)
    need_wakeup: bool = False
    waiting: bool = False

    @property
    def control(self) -> _Pinned:
        return self

    def flow7(self, key: bytes) -> Flow7 | None:
        return self.commands.flows.get(key)

    def poll(self, budget: int) -> list[Frame]:
        return []

    def clear(self) -> None:
        pass

    def send(self, ifindex: int, vnet_frame: bytes | memoryview) -> None:
        self.sent.append((ifindex, bytes(vnet_frame), None))


class Replay:
    """Feed it frames in their order; `sink` gets a record of each message and of each new flow."""

    def __init__(
        self,
        compiled: Compiled,
        endpoints: Mapping[int, Endpoint],
        addresses: Mapping[int, tuple[Address, ...]],
        sink: Callable[[FlowRecord], None],
    ) -> None:
        self.tally = Tally()
        self._owners = {mapped(each): number for number, having in addresses.items() for each in having}
        owners = {str(each): endpoints[number] for number, having in addresses.items() for each in having}
        self._recorder = Recorder(Sink(sink), endpoints, owners)
        self._recorder.rules = compiled.rules
        self._kernel = StandIn(compiled)
        self._inspector = Inspector(compiled.profiles, compiled.generation, report_all=True)
        self._pinned = _Pinned(self._kernel.pinned)
        ports = {
            number: (number << 1 | Direction.INGRESS, number << 1 | Direction.EGRESS) for number in endpoints
        }
        self._forwarder = Forwarder(
            self._pinned, self._pinned, self._pinned, self._pinned, self._inspector, ports, self._message
        )
        self._ticked = self._aged = 0
        self._refused: set[FlowKey] = set()  # what no other endpoint got to see
        self._told: set[tuple[bytes, DropReason]] = set()

    def feed(self, captured: Captured) -> None:
        """One frame, after whatever time alone has brought about until then."""
        tally, now = self.tally, captured.time
        tally.frames += 1
        tally.octets += captured.length
        tally.first = now if tally.first is None else tally.first
        tally.last = max(tally.last, now)
        self._tick(now)
        self._age(now)
        if len(captured.data) < captured.length:
            tally.cut += 1
            return
        headers = read_headers(memoryview(captured.data))
        if headers is None:
            tally.unread += 1
            return
        source, destination = (self._owners.get(each) for each in (headers.source, headers.destination))
        if source == destination:  # of nobody, or of one that speaks with itself
            tally.unrelated += 1
            return
        if key_of(0, Direction.INGRESS, headers) in self._refused:
            tally.answers += 1
            return
        direction = Direction.EGRESS if source is not None else Direction.INGRESS
        number = source if source is not None else destination
        assert number is not None
        self._go_on(deque([(number, direction, _PLAIN + captured.data, headers)]), now)

    def finish(self) -> Tally:
        """Once the capture has ended."""
        self.tally.waiting = sum(1 for flow in self._inspector.flows if flow.held_since is not None)
        self.tally.drops += self._forwarder.drops
        self._forwarder.drops.clear()
        return self.tally

    # -- time ------------------------------------------------------------------------------------------------

    def _tick(self, now: int) -> None:
        if not self._inspector.waiting or now < self._ticked:
            self._ticked = now - now % TICK_NS
            return
        while self._inspector.waiting and self._ticked + TICK_NS <= now:
            self._ticked += TICK_NS
            self._forwarder.tick(self._ticked * 1e-9)
            self._go_on(deque(), self._ticked)

    def _age(self, now: int) -> None:
        """As the daemon does: what has ended is forgotten, of the others what the server has acknowledged."""
        if now - self._aged < AGE_NS:
            return
        self._aged = now
        flows, inspector = self._kernel.pinned, self._inspector
        for key, incarnation in self._kernel.age(now):
            flows.delete(key, incarnation)
            inspector.forget_flow(key, incarnation)
        for key, flow in flows.flows.items():
            inspector.acknowledged(key, flow.incarnation, flow.client.acked)

    # -- one crossing after the other ------------------------------------------------------------------------

    def _go_on(self, waiting: deque[Crossing], now: int) -> None:
        for _ in range(CROSSINGS_MAX):
            self._collect(waiting)
            if not waiting:
                return
            self._cross(*waiting.popleft(), now)
        self._pinned.sent.clear()

    def _collect(self, waiting: deque[Crossing]) -> None:
        """What left an endpoint for the network arrives at the next, if there is one."""
        for port, vnet_frame, known in self._pinned.sent:
            if port & 1 == Direction.EGRESS:
                headers = known or read_headers(memoryview(vnet_frame)[VNET:])
                following = self._owners.get(headers.destination) if headers is not None else None
                if headers is not None and following is not None and following != port >> 1:
                    waiting.append((following, Direction.INGRESS, vnet_frame, headers))
        self._pinned.sent.clear()

    def _cross(
        self, number: int, direction: Direction, vnet_frame: bytes, headers: Headers, now: int
    ) -> None:
        frame = memoryview(vnet_frame)[VNET:]
        found = self._kernel.classify(number, direction, headers, frame, now)
        kind, reason = found.step
        if found.decided is not None:
            self._flow(found, found.decided, now)
        if kind is Kind.FORWARD:
            self._pinned.sent.append((number << 1 | direction, vnet_frame, headers))
        elif kind is Kind.PUNT:
            assert found.flow is not None and headers.segment is not None and isinstance(reason, PuntReason)
            side = Side.CONTAINER if direction is Direction.EGRESS else Side.NETWORK
            context = punt_context(number, side, reason, found.flow.incarnation)
            if not vnet_frame[0] and tcp_checksum_unfinished(frame, headers.segment):
                vnet_frame = _UNFINISHED + vnet_frame[VNET:]
            whole = memoryview(vnet_frame)
            self._punt(Frame(whole, whole[VNET:], context, now))
        elif kind is Kind.DROP:
            assert isinstance(reason, DropReason)
            self._dropped(found, direction, reason, now)

    def _punt(self, frame: Frame) -> None:
        try:
            self._forwarder.handle(frame)
        except Exception as error:  # as the agent does
            self._forwarder.fail(frame, error)

    # -- records ---------------------------------------------------------------------------------------------

    def _message(self, report: Report, now: float) -> None:
        self.tally.messages += 1
        self._recorder.message(report, now)

    def _flow(self, found: Classified, entry: PolicyEntry, now: int) -> None:
        self.tally.flows += 1
        decision = Decision(
            entry.verdict,
            entry.reason,
            self._recorder.rules.get(entry.rule),
            audit=bool(entry.flags & PolicyFlag.AUDIT),
            trial=bool(entry.flags & PolicyFlag.TRIAL),
        )
        self._recorder.flow(found.key, entry.direction, decision, now * 1e-9)

    def _dropped(self, found: Classified, direction: Direction, reason: DropReason, now: int) -> None:
        """Each reason is told once of a flow; what comes behind a denial is no news."""
        self.tally.drops[reason] += 1
        if found.decided is not None and found.decided.direction is direction is Direction.EGRESS:
            self._refused.add(replace(found.key, endpoint=0))
        name = (found.key.pack(), reason)
        known = found.decided is not None or found.repeated or name in self._told
        if known or reason is DropReason.FLOW_CLOSED:
            return
        self._told.add(name)
        self._recorder.flow(found.key, direction, Decision(Verdict.DROP, reason), now * 1e-9)
