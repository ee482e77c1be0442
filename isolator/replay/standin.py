"""The kernel's classification of a frame at one port, in memory (bpf/isolator_tc.bpf.c: flow, new_flow).

    headers → flow4 settled? → flow7? → policy → forward · drop · punt

Policy does not change during a replay, the agent is never away, and nobody answers a refusal. MAC addresses, ARP and
neighbour discovery are not looked at, and quotas do not exist. `now` is the frame's time, ns.
"""

from __future__ import annotations

from dataclasses import dataclass

from isolator.core.compile import Compiled, PolicyEntry
from isolator.core.model import Direction, DropReason, PolicyFlag, Verdict
from isolator.datapath.abi import HALF_FIN, HALF_RST, FlowKey
from isolator.replay.flow7 import FORWARD, Flow7, Flows7, Kind, Step, dropped
from isolator.replay.headers import TCP, Headers, inner_of
from isolator.replay.policy_table import PolicyTable
from parsers.packet import ACK, SYN

IDLE_NS = 180 * 10**9  # UDP, ICMP and others: after this a flow is a new one
EPHEMERAL_MIN = 32768
LINGER_NS = 10 * 10**9  # after which an ended connection is forgotten
FORGET_NS = 3600 * 10**9  # a connection without packets


@dataclass(slots=True)
class Flow4:
    entry: PolicyEntry
    verdict: Verdict
    last_seen: int
    passed_open: bool = False

    @property
    def initiator(self) -> Direction:
        return self.entry.direction


@dataclass(frozen=True, slots=True)
class Classified:
    """`decided`: layer 4's entry for a flow that is new with this frame; `flow`: the inspected one.
    `repeated`: what was decided before."""

    key: FlowKey
    step: Step
    decided: PolicyEntry | None = None
    flow: Flow7 | None = None
    repeated: bool = False


class StandIn:
    """Flows by their packed key, as in the maps flows4 and flows7."""

    def __init__(self, compiled: Compiled) -> None:
        self.table = PolicyTable(compiled)
        self.flows4: dict[bytes, Flow4] = {}
        self.pinned = Flows7()

    def classify(
        self, number: int, direction: Direction, headers: Headers, frame: memoryview, now: int
    ) -> Classified:
        key = key_of(number, direction, headers)
        if headers.reason:
            return Classified(key, dropped(headers.reason))
        if headers.neighbour:
            return Classified(key, FORWARD)
        if headers.inner:
            return Classified(key, self._icmp_error(number, direction, headers, frame))
        packed = key.pack()
        f4 = self.flows4.get(packed)
        if f4 is not None and is_settled(f4, headers, direction, now):
            f4.last_seen = now
            return Classified(key, acted(f4.verdict, f4.entry.reason), repeated=True)
        if f4 is None and headers.segment is not None:
            flow = self.pinned.flows.get(packed)
            if flow is not None:
                return self._inspected(key, flow, direction, headers, frame, now)
        return self._new_flow(key, packed, direction, headers, frame, f4, now)

    def _icmp_error(self, number: int, direction: Direction, headers: Headers, frame: memoryview) -> Step:
        """It passes where the flow it speaks of does, and speaks to its end alone."""
        inner = inner_of(frame, headers)
        if inner is None or inner.source != headers.destination:
            return dropped(DropReason.ICMP_UNRELATED)
        key = key_of(number, direction.other, inner).pack()  # the inner packet went the other way
        f4 = self.flows4.get(key)
        passes = f4.verdict is Verdict.ALLOW if f4 is not None else key in self.pinned.flows
        return FORWARD if passes else dropped(DropReason.ICMP_UNRELATED)

    def _inspected(
        self, key: FlowKey, flow: Flow7, direction: Direction, headers: Headers, frame: memoryview, now: int
    ) -> Classified:
        assert headers.segment is not None
        flow.last_seen = now
        return Classified(key, flow.inspect(headers.segment, frame, direction), flow=flow)

    def _new_flow(
        self,
        key: FlowKey,
        packed: bytes,
        direction: Direction,
        headers: Headers,
        frame: memoryview,
        f4: Flow4 | None,
        now: int,
    ) -> Classified:
        """Asks policy, and remembers the answer. `f4` is the entry that no longer answers, if any."""
        tcp, first = headers.segment is not None, is_first_syn(headers)
        opens = headers.opens and (not tcp or first)
        recent = f4 is not None and now - f4.last_seen < IDLE_NS
        passed = f4 is not None and f4.verdict is Verdict.ALLOW
        if headers.segment is not None and headers.segment.flags & SYN and headers.segment.payload_length:
            return Classified(key, dropped(DropReason.SYN_PAYLOAD))
        # the other end's packet may open a flow of its own, but what answers one opens none
        if f4 is not None and (f4.initiator is direction or not opens or (not tcp and recent and passed)):
            entry = self.table.decide(key, f4.initiator)
        elif opens:
            entry = self.table.decide(key, direction)
        elif tcp:
            entry = self._midstream(key)
        else:
            return Classified(key, dropped(DropReason.ICMP_UNRELATED))
        verdict, open_passed = entry.verdict, False
        if verdict is Verdict.INSPECT:
            if first and entry.direction is direction:
                if recent and passed and f4 is not None and f4.initiator is not direction:
                    return Classified(key, dropped(DropReason.TCP_STATE))
                self.flows4.pop(packed, None)
                flow = Flow7(entry.profile, self.table.generation, entry.direction)
                self.pinned.flows[packed] = flow
                return self._inspected(key, flow, direction, headers, frame, now)
            if not entry.flags & (PolicyFlag.FAIL_OPEN | PolicyFlag.TRIAL):
                return Classified(key, dropped(DropReason.STATE_LOST))
            verdict, open_passed = Verdict.ALLOW, True
        if f4 is None or f4.initiator is entry.direction or verdict is Verdict.ALLOW:
            self.flows4[packed] = Flow4(entry, verdict, now, open_passed)
        return Classified(key, acted(verdict, entry.reason), decided=entry)

    def _midstream(self, key: FlowKey) -> PolicyEntry:
        """Nobody saw its beginning: the end with the ephemeral port opened it, else the stricter answer holds."""
        by_peer, by_own = (self.table.decide(key, direction) for direction in Direction)
        opened_by_peer = (key.remote_port >= EPHEMERAL_MIN) - (key.local_port >= EPHEMERAL_MIN)
        if by_peer.verdict is Verdict.INSPECT:
            return by_peer
        if (
            by_own.verdict is Verdict.INSPECT
            or opened_by_peer < 0
            or (not opened_by_peer and by_peer.verdict is Verdict.ALLOW)
        ):
            return by_own
        return by_peer

    def age(self, now: int) -> list[tuple[bytes, int]]:
        """Forgets layer 4's idle flows; the inspected ones that nobody will miss are returned: (key, incarnation)."""
        self.flows4 = {key: each for key, each in self.flows4.items() if now - each.last_seen < FORGET_NS}
        return [
            (key, flow.incarnation)
            for key, flow in self.pinned.flows.items()
            if now - flow.last_seen > (LINGER_NS if is_ended(flow) else FORGET_NS)
        ]


def key_of(number: int, direction: Direction, headers: Headers) -> FlowKey:
    ends = (headers.source, headers.destination, headers.source_port, headers.destination_port)
    if direction is Direction.INGRESS:
        ends = (ends[1], ends[0], ends[3], ends[2])
    return FlowKey(number, *ends, headers.protocol)


def acted(verdict: Verdict, reason: DropReason) -> Step:
    return FORWARD if verdict is Verdict.ALLOW else (Kind.DROP, reason)


def is_first_syn(headers: Headers) -> bool:
    return headers.segment is not None and headers.segment.flags & (SYN | ACK) == SYN


def is_settled(flow: Flow4, headers: Headers, direction: Direction, now: int) -> bool:
    """Whether the entry answers for this packet, or policy has to be asked again."""
    if headers.protocol == TCP:
        return not is_first_syn(headers) or (flow.initiator is direction and not flow.passed_open)
    if flow.initiator is not direction and flow.verdict is not Verdict.ALLOW:
        return not headers.opens
    return now - flow.last_seen < IDLE_NS


def is_ended(flow: Flow7) -> bool:
    flags = [half.flags for half in flow.half]
    return not flow.live or any(each & HALF_RST for each in flags) or all(each & HALF_FIN for each in flags)
