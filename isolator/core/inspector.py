"""The slow path's decisions: a punted frame in, commands out. No I/O, no clock.

A client's frame of an open flow passes these stages, in this order:

    order   what is old must equal what was forwarded; what is new is put in sequence
    judge   the dissector cuts it into pieces, policy decides each head
    accept  the boundary moves on (Commit), then the bytes go (Forward the frame itself, or Send a new one)
    deny    nothing further passes; isolator.core.closing answers

Whatever is not proven is held or refused: an incomplete head waits, bounded; what contradicts earlier bytes ends
the connection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from isolator.core import closing
from isolator.core.automaton.misfit import Arrival, misfit
from isolator.core.commands import Command, Commit, Drop, Forward, Read, Report
from isolator.core.flow import Flow, FlowState, FlowTable, State
from isolator.core.judge import Judge, Judged
from isolator.core.known import cut_acknowledged, in_window, known_bytes
from isolator.core.model import Decision, DropReason, PuntReason, RuleRef
from isolator.core.policy import Profile
from isolator.core.segments import remember, to_client, to_server
from isolator.core.tally import Misfit
from parsers.errors import HeldFull, OutOfWindow, Overlap
from parsers.http1 import Mode, Request
from parsers.packet import ACK, FIN, PSH, RST, Segment
from parsers.reassembly import seq_lt, seq_sub

RECORD_UNACKED_MAX = 262_144  # bytes forwarded and not yet acknowledged, per flow: beyond it the client waits
WINDOWS_UNACKED_MAX = 1024  # pass windows not yet acknowledged, per flow: likewise
ACK_AFTER = 0.02  # s; an incomplete head is acknowledged then, or Nagle's algorithm holds its rest back
HEAD_WITHIN = 60.0  # s; a head that takes longer ends the connection
RESEND_AFTER = 0.3  # s, doubled each time: bytes acknowledged in the server's name are ours to deliver
RESENDS_MAX = 8
LEAVE_WITHIN = 1.0  # s that a restore may take; one that failed goes on as before then
UNANSWERED_MAX = 1024  # requests whose answers are followed; of more, nobody knows where they end
PROMISE_WINDOW = 1024  # unscaled, in acknowledgements in the server's name: what follows has to be held
REPORTS_PER_SECOND = 100.0  # records of allowed requests; all are counted, the others always recorded
REPORTS_BURST = 200.0

_MASK = 0xFFFFFFFF

Fresh = tuple[bytes, bool]  # new bytes at the boundary, and whether the frame in hand carries just these


class Inspector:
    """Decides what becomes of punted frames of inspected flows. `report_all`: no allowed request goes unreported."""

    def __init__(self, profiles: Mapping[int, Profile], generation: int, *, report_all: bool = False) -> None:
        self.flows = FlowTable()
        self.counts: Counter[RuleRef] = Counter()
        self._waking: set[Flow] = set()
        self._report_all = report_all
        self._reports, self._reported = REPORTS_BURST, 0.0
        self._policies: dict[int, Mapping[int, Profile]] = {}  # by generation
        self._judge = Judge()
        self._gone: set[bytes] = set()  # flows that the kernel did not know when it was asked last
        self._leaving: dict[int, float] = {}  # endpoints → until when nothing more is promised for them
        self.generation = 0
        self.prepare_policy(profiles, generation)

    # -- policy ---------------------------------------------------------------------------------------------

    def prepare_policy(self, profiles: Mapping[int, Profile], generation: int) -> None:
        """Before the kernel changes over. Frames that it punted under an older one are decided by that one."""
        self._policies[generation] = profiles
        self.generation = generation
        self._judge.forget()

    def policy_in_force(self, generation: int) -> None:
        """After the kernel has: of older ones only the one before is kept, for frames that are under way."""
        before = max((each for each in self._policies if each != generation), default=generation)
        self._policies = {each: self._policies[each] for each in {before, generation}}

    def discard_policy(self, generation: int) -> None:
        """The kernel did not."""
        self._policies.pop(generation, None)
        self.generation = max(self._policies, default=0)
        self._judge.forget()

    # -- flows ----------------------------------------------------------------------------------------------

    def find(self, where: int, wire: bytes, incarnation: int) -> Flow | None:
        """The flow of a frame, unless less is known of it than the frame implies (`incarnation`: 8 bits)."""
        flow = self.flows.find(where, wire)
        if flow is None or flow.incarnation & 0xFF != incarnation:
            return None
        return flow if flow.generation == self.generation or flow.state is not State.OPEN else None

    def adopt(self, key: bytes, where: int, wire: bytes, pinned: FlowState) -> Flow | None:
        """Takes up a flow as it is pinned in the kernel, or brings one that is known up to date."""
        profile = self._policies.get(pinned.generation, {}).get(pinned.profile)
        if not pinned.live or profile is None:
            return None
        flow = self.flows.find(where, wire)
        if flow is not None:
            known = flow.incarnation == pinned.incarnation
            if known and (flow.state is not State.OPEN or flow.next == pinned.client.next):
                flow.renew(pinned, profile)
                return flow
            self.forget(flow)
        flow = Flow(key, where >> 1, pinned, profile)
        self.flows.add(flow, where, wire)
        return flow

    def forget(self, flow: Flow) -> None:
        self._waking.discard(flow)
        self.flows.remove(flow.key)

    def forget_flow(self, key: bytes, incarnation: int) -> None:
        """The kernel has."""
        flow = self.flows.get(key)
        if flow is not None and flow.incarnation == incarnation:
            self.forget(flow)

    def forget_gone(self, there: Collection[bytes]) -> None:
        """`there`: keys of the flows that the kernel knows. What it has not known twice is over: both ends closed."""
        gone = {flow.key for flow in self.flows} - set(there)
        for key in gone & self._gone:
            if (flow := self.flows.get(key)) is not None:
                self.forget(flow)
        self._gone = gone

    def forget_endpoint(self, number: int) -> None:
        """Its flows are no more; another endpoint may get the number."""
        self._leaving.pop(number, None)
        for flow in self.flows:
            if flow.endpoint == number:
                self.forget(flow)

    def acknowledged(self, key: bytes, incarnation: int, acked: int) -> None:
        """What the kernel knows of a flow that may have been quiet since: lets go of what is kept for it."""
        flow = self.flows.get(key)
        if flow is not None and flow.incarnation == incarnation:
            self.committed(flow, acked)

    def committed(self, flow: Flow, acked: int) -> None:
        """A Commit took effect, or a Read; the server has acknowledged the client's half up to `acked`."""
        if seq_lt(flow.acked, acked):
            flow.acked = acked
            flow.record.acknowledge(acked)
            while flow.windows and not seq_lt(acked, flow.windows[0][1]):
                flow.windows.popleft()

    def resume(self, flow: Flow, pinned: FlowState, now: float) -> list[Command]:
        """What a Read brought."""
        self.committed(flow, pinned.client.acked)
        if flow.state is not State.OPEN:
            return self._scheduled(flow, closing.resume(flow, pinned, now))
        act = self._deliver if flow.held_since is None else self._promise
        return self._scheduled(flow, act(flow, now))

    # -- frames ---------------------------------------------------------------------------------------------

    def receive(
        self, flow: Flow, segment: Segment, packet: memoryview, context: int, now: float
    ) -> list[Command]:
        """One punted frame of `flow`. `now`: the frame's timestamp in seconds."""
        from_client = (context & 1 ^ 1) == flow.initiator  # side NETWORK is ingress, CONTAINER is egress
        if flow.state is not State.OPEN:
            return self._scheduled(flow, closing.receive(flow, segment, packet, from_client, now))
        if not from_client:
            return [Forward()]
        if context >> 16 & 0xFF == PuntReason.MISMATCH:
            remember(flow, segment, packet)
            return self._scheduled(flow, closing.abort(flow, DropReason.RECORD_MISMATCH, now))
        commands, fresh = self._order(flow, segment, packet, now)
        if fresh is not None:
            data, whole = fresh
            judged = self._judge(flow, data)
            if whole and judged.end < len(data):
                remember(flow, segment, packet)
            commands += self._decide(flow, data, judged, whole, segment.ack, now)
        if flow.stream.held and flow.held_since is None:  # behind a hole; it is waited for as long
            flow.held_since = now
            flow.wake_at = now + HEAD_WITHIN / 4
        return self._scheduled(flow, commands)

    def due(self, now: float) -> list[Flow]:
        """Flows that waited for this moment; to be asked for some fifty times a second, and then to be woken."""
        return [flow for flow in self._waking if flow.wake_at is None or flow.wake_at <= now]

    def wake(self, flow: Flow, now: float) -> list[Command]:
        """What time alone brings about."""
        self._waking.discard(flow)
        flow.wake_at = None
        commands = self._waited(flow, now) if flow.state is State.OPEN else closing.tick(flow, now)
        return self._scheduled(flow, commands)

    @property
    def waiting(self) -> bool:
        """Whether any flow waits for time to pass: then `tick` has to be called."""
        return bool(self._waking)

    def take_counts(self) -> Counter[RuleRef]:
        """Requests allowed by each rule since the last call."""
        counts, self.counts = self.counts, Counter()
        return counts

    def _scheduled(self, flow: Flow, commands: list[Command]) -> list[Command]:
        if flow.wake_at is not None:
            self._waking.add(flow)
        return commands

    # -- order ----------------------------------------------------------------------------------------------

    def _order(
        self, flow: Flow, segment: Segment, packet: memoryview, now: float
    ) -> tuple[list[Command], Fresh | None]:
        """What becomes of the frame's old bytes, and the new ones that are next to be judged, if any."""
        stream = flow.stream
        lead = seq_sub(stream.next, segment.seq)
        if lead > 0 and flow.windows and self._is_granted(flow, segment):
            return [Commit(flow, flow.next, flow.next), Forward()], None
        data = bytes(packet[segment.payload_at : segment.payload_end])
        if lead == 0 and data and not stream.held and not segment.flags & (FIN | RST):
            return ([Drop(DropReason.HELD_FULL)], None) if self._is_full(flow) else ([], (data, True))
        remember(flow, segment, packet)
        if segment.flags & RST:
            return [Drop(DropReason.TCP_FLAGS) if data else Forward()], None
        if lead > 0:
            known = known_bytes(flow, segment.seq, data[:lead])
            if known is not DropReason.NONE:
                return closing.abort(flow, known, now), None
        if 0 <= len(data) <= lead:
            return self._nothing_new(flow, segment, data), None
        if self._is_full(flow):
            return [Drop(DropReason.HELD_FULL)], None
        again = self._again(flow, segment.seq, data[:lead], ACK) if lead > 0 else []
        commands, fresh = self._insert(flow, segment, data, now)
        return again + commands, fresh

    def _is_granted(self, flow: Flow, segment: Segment) -> bool:
        """All of it lies in one pass window, and ends nothing: most of a body that comes through here."""
        end = (segment.seq + segment.payload_length) & _MASK
        if segment.flags & (FIN | RST) or end == segment.seq or seq_lt(segment.seq, flow.acked):
            return False
        return in_window(flow, segment.seq, end)

    def _insert(
        self, flow: Flow, segment: Segment, data: bytes, now: float
    ) -> tuple[list[Command], Fresh | None]:
        """Puts new bytes in sequence, behind those that wait."""
        stream = flow.stream
        if segment.flags & FIN:
            flow.fin_at = (segment.seq + len(data)) & _MASK
        try:
            stream.insert(segment.seq, data)
        except Overlap:
            return closing.abort(flow, DropReason.RECORD_MISMATCH, now), None
        except OutOfWindow:
            return [Drop(DropReason.OUT_OF_WINDOW)], None
        except HeldFull:
            return [Drop(DropReason.HELD_FULL)], None
        ready = bytes(stream.data)
        return [], (ready, False) if ready else None

    def _again(self, flow: Flow, seq: int, old: bytes, flags: int) -> list[Command]:
        """Bytes below the boundary that are sent again; of what was acknowledged nothing goes on."""
        at, rest = cut_acknowledged(flow, seq, old)
        same = Commit(flow, flow.next, flow.next, fin=bool(flags & FIN))
        return [same, *to_server(flow, at, rest, flags | (PSH if rest else 0))]

    def _nothing_new(self, flow: Flow, segment: Segment, data: bytes) -> list[Command]:
        """A retransmission, an acknowledgement or a FIN without new bytes. Of what was acknowledged nothing goes on."""
        if not data and not segment.flags & FIN:
            return [Forward()]
        end = (segment.seq + len(data)) & _MASK
        if segment.flags & FIN:
            if seq_lt(flow.next, end):  # bytes before it are held or missing: it goes with them
                flow.fin_at = end
                return []
            # not at the end and not in a body: it would cut a message that was read
            if end != flow.next and not in_window(flow, end, (end + 1) & _MASK):
                return [Drop(DropReason.TCP_STATE)]
        if data and not segment.flags & FIN and not seq_lt(segment.seq, flow.acked):
            return [Commit(flow, flow.next, flow.next), Forward()]
        return self._again(flow, segment.seq, data, ACK | segment.flags & FIN)

    def _is_full(self, flow: Flow) -> bool:
        return len(flow.record) > RECORD_UNACKED_MAX or len(flow.windows) > WINDOWS_UNACKED_MAX

    # -- judge, accept, deny --------------------------------------------------------------------------------

    def _decide(
        self, flow: Flow, data: bytes, judged: Judged, whole: bool, ack: int, now: float
    ) -> list[Command]:
        """`whole`: these bytes are the frame in hand; otherwise they stand in the stream."""
        commands: list[Command] = []
        if judged.end:
            self._accept(flow, data, whole, ack, judged, commands, now)
        for decision, request in judged.decided:
            self._report(flow, decision, request, judged, whole, now, commands)
        flow.returned = False
        left = len(data) - judged.end
        flow.more = judged.more
        if left <= 0:
            flow.held_since = None
            return commands
        if judged.denied is not None:
            self._denied(flow)
            return commands + closing.deny(flow, left, judged.denied, judged.request, now)
        if whole:
            flow.stream.insert(flow.next, data[judged.end :])
        if flow.fin_at is not None and flow.fin_at == (flow.next + left) & _MASK and not judged.more:
            return commands + closing.abort(flow, DropReason.HTTP_MALFORMED, now)  # it will never be complete
        return commands + self._hold(flow, judged, left, now)

    def _hold(self, flow: Flow, judged: Judged, left: int, now: float) -> list[Command]:
        """Bytes that wait for their rest; sent again, they are acknowledged again."""
        if flow.held_since is None or judged.end:
            flow.held_since = now
        if judged.more:
            flow.wake_at = now
        elif flow.promised == (flow.next + left) & _MASK:
            flow.wake_at = now + HEAD_WITHIN / 4
            return [to_client(flow, flow.client_at, flow.promised, b"", ACK, PROMISE_WINDOW)]
        else:
            flow.wake_at = now + ACK_AFTER
        return []

    def _accept(
        self,
        flow: Flow,
        data: bytes,
        whole: bool,
        ack: int,
        judged: Judged,
        commands: list[Command],
        now: float,
    ) -> None:
        """Moves the boundary, then sends: the frame itself where all of it passes, else what passes of it."""
        expect = flow.next
        following = (expect + judged.end) & _MASK
        record = data[: judged.recorded]
        flow.record.append(expect, record)
        if judged.window is not None:
            flow.windows.append(judged.window)
        passed = data[: judged.end]
        ends = flow.fin_at == (expect + len(passed)) & _MASK
        mark = self._marks(flow, ack, judged)
        flow.stream.consume(judged.end)
        lend = judged.end == len(data) and not ends and self._can_lend(flow)
        commands.append(Commit(flow, expect, following, record, judged.window, mark, ends, lend))
        if whole and judged.end >= len(data):
            commands.append(Forward())
            return
        commands += to_server(flow, expect, passed, PSH | ACK | (FIN if ends else 0))
        if flow.promised is not None:
            flow.resends, flow.wake_at = 0, now + RESEND_AFTER

    def _can_lend(self, flow: Flow) -> bool:
        """Whether the kernel may decide what follows: it knows all that Python does, and nothing waits here (R7)."""
        return (
            flow.lendable
            and flow.dissector.mode is Mode.HEAD
            and not flow.stream.held
            and flow.promised is None
            and flow.fin_at is None
            and flow.unanswered is not None
            and len(flow.unanswered) == 1
        )

    def _marks(self, flow: Flow, ack: int, judged: Judged) -> bool:
        """Whether the answers to these requests begin where the server stands now: not if the client sent them
        before it had seen anything of the answer to the last ones."""
        if not judged.methods:
            return False
        flow.requests += len(judged.methods)
        if flow.unanswered and flow.mark_ack == ack:
            flow.unanswered += judged.methods
            if len(flow.unanswered) > UNANSWERED_MAX:
                flow.unanswered = None
            return False
        flow.unanswered = list(judged.methods)
        flow.mark_ack = ack
        return True

    def _denied(self, flow: Flow) -> None:
        tally = flow.profile.tally
        tally.python += 1
        tally.why[Misfit.DENIED] += 1

    def _report(
        self,
        flow: Flow,
        decision: Decision,
        request: Request | None,
        judged: Judged,
        whole: bool,
        now: float,
        commands: list[Command],
    ) -> None:
        flow.profile.tally.python += 1
        if decision.rule is not None and not decision.trial:
            self.counts[decision.rule] += 1
        if not (decision.audit or decision.trial or self._report_all):
            self._reports += max(0.0, now - self._reported) * REPORTS_PER_SECOND
            self._reported = now
            if self._reports < 1.0:
                return
            self._reports = min(self._reports, REPORTS_BURST) - 1.0
        commands.append(Report(flow, decision, request, self._why(flow, decision, request, judged, whole)))

    def _why(
        self, flow: Flow, decision: Decision, request: Request | None, judged: Judged, whole: bool
    ) -> Misfit | None:
        """Asked of what is reported alone: the slow path has no time for it otherwise."""
        if self._report_all:
            return None
        several = len(judged.decided) > 1 or judged.denied is not None
        alone = not several and len(flow.unanswered or ()) <= 1
        arrival = Arrival(0 if several else judged.recorded, whole, alone, flow.lendable, flow.returned)
        why = misfit(request, decision, arrival, flow.profile.tally)
        flow.profile.tally.why[why] += 1
        return why

    # -- held bytes -----------------------------------------------------------------------------------------

    def _waited(self, flow: Flow, now: float) -> list[Command]:
        """An incomplete head waits for its rest: acknowledged in the server's name, or the rest may never come."""
        if flow.more:
            data = bytes(flow.stream.data)
            return self._decide(flow, data, self._judge(flow, data), False, flow.client_at, now)
        if flow.held_since is None:
            return [] if flow.promised is None else [Read(flow)]
        if now - flow.held_since > HEAD_WITHIN:
            return closing.abort(flow, DropReason.HTTP_TOO_LONG, now)
        flow.wake_at = now + HEAD_WITHIN / 4
        return [Read(flow)] if self._to_promise(flow) else []

    def _to_promise(self, flow: Flow) -> int | None:
        """Up to where held bytes should be acknowledged; None: they are, or there are none."""
        end = (flow.next + len(flow.stream.data)) & _MASK
        return end if flow.stream.data and flow.promised != end else None

    def _promise(self, flow: Flow, now: float) -> list[Command]:
        """Pins what is held, then acknowledges it: from there on the client need not send it again."""
        end = self._to_promise(flow)
        if end is None or now < self._leaving.get(flow.endpoint, 0.0):
            return []
        if flow.acked != flow.next:
            # bytes of a granted body may be missing, and nobody vouches for those; and the record is in use
            flow.wake_at = now + (RESEND_AFTER if flow.windows else ACK_AFTER)
            return []
        flow.promised = end
        pinned = Commit(flow, flow.next, flow.next, bytes(flow.stream.data))
        return [pinned, to_client(flow, flow.client_at, end, b"", ACK, PROMISE_WINDOW)]

    def release(self, endpoint: int, now: float) -> list[Command]:
        """Its container is about to get its network back: what only Python still holds goes to the server, undecided
        as what follows it, and nothing more is acknowledged here. A head that was read in part is none yet."""
        self._leaving[endpoint] = now + LEAVE_WITHIN
        commands: list[Command] = []
        for flow in self.flows:
            held = bytes(flow.stream.data)
            if (
                flow.endpoint == endpoint
                and flow.state is State.OPEN
                and flow.promised
                and held
                and flow.template
            ):
                commands += to_server(flow, flow.next, held, PSH | ACK)
        return commands

    def _deliver(self, flow: Flow, now: float) -> list[Command]:
        """What was promised to the client must reach the server: sent again until the server says so."""
        if flow.promised is None or not seq_lt(flow.acked, flow.promised):
            flow.promised = None
            return []
        flow.resends += 1
        if flow.resends > RESENDS_MAX:
            return closing.abort(flow, DropReason.STATE_LOST, now)
        flow.wake_at = now + RESEND_AFTER * 2**flow.resends
        return [*to_server(flow, flow.acked, flow.record.since(flow.acked), PSH | ACK)]
