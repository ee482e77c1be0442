"""The end of a flow: a denial behind the earlier answers, or a reset, then silence (R10).

From the moment of a denial no byte of the client's reaches the server. While answers to earlier requests are under
way, the server's half comes through Python until the client has them; the denial takes its place right behind
them, and is sent again until the client has acknowledged it. The server is reset as soon as nobody needs it to send
anything again. The states and their order stand in isolator.core.flow.
"""

from __future__ import annotations

from collections.abc import Callable

from isolator.core.answers import denial, locate
from isolator.core.commands import Command, Delete, Drop, Forward, Own, Read, Report, Send
from isolator.core.flow import Flow, FlowState, State
from isolator.core.known import cut_acknowledged, known_bytes
from isolator.core.model import Decision, DropReason, Owner, Verdict
from isolator.core.segments import SEGMENT_MAX, remember, resets, server_reset, to_client, to_server
from parsers.errors import DissectError
from parsers.http1 import Mode, Request
from parsers.packet import ACK, FIN, PSH, RST, Segment
from parsers.reassembly import seq_le, seq_lt, seq_sub

RESEND_AFTER = 0.3  # s, doubled each time
RESENDS_MAX = 6
QUIET_AFTER = 0.2  # s without a byte from the server: then answers nobody can follow count as complete
DRAIN_WITHIN = 60.0  # s for the earlier answers
LINGER = 2.0  # s in which a closed flow swallows what still comes
CLIENT_FIN_WITHIN = 10.0  # s for the client to close its side, then it is reset

_MASK = 0xFFFFFFFF


def deny(flow: Flow, seen: int, decision: Decision, request: Request | None, now: float) -> list[Command]:
    """`seen`: bytes of the client's beyond the boundary that are in hand; they are taken, and go nowhere."""
    if decision.reason is DropReason.NOT_HTTP:
        return abort(flow, DropReason.NOT_HTTP, now)
    flow.state = State.DRAINING
    flow.decision, flow.request = decision, request
    flow.client_end = (flow.next + seen) & _MASK
    if flow.fin_at is not None and flow.fin_at == flow.client_end:
        flow.client_end, flow.client_fin = (flow.client_end + 1) & _MASK, True
    flow.wake_at = flow.until = now + DRAIN_WITHIN
    if flow.dissector.mode != Mode.HEAD and flow.unanswered:
        # refused within a message: it will not be answered
        flow.unanswered.pop()
        flow.requests -= 1
    return [
        Own(flow, flow.initiator, Owner.CLOSED),
        Own(flow, flow.initiator.other, Owner.PYTHON),
        Report(flow, decision, request),
        Read(flow),
    ]


def abort(flow: Flow, reason: DropReason, now: float) -> list[Command]:
    """Resets both ends, once it is known where the server waits."""
    flow.state = State.CLOSED
    flow.wake_at = now + LINGER
    return [
        Own(flow, flow.initiator, Owner.CLOSED),
        Own(flow, flow.initiator.other, Owner.PYTHON),
        Report(flow, Decision(Verdict.DROP, reason), None),
        Read(flow),
    ]


def resume(flow: Flow, pinned: FlowState, now: float) -> list[Command]:
    """Where the server's half stands, read after its owner became Python: what is missing of the answers?"""
    if flow.state is State.CLOSED:
        return [*resets(flow)]
    server = pinned.server
    flow.server_at = server.next
    if flow.requests == 0 and flow.unanswered is not None:
        return _answer(flow, server.next, now)
    if flow.unanswered == []:
        if server.next == server.record_seq:
            return _answer(flow, server.next, now)
        flow.wake_at = now + QUIET_AFTER
        return []
    located = locate(server.record_seq, server.record, server.next, flow.unanswered or ["GET"])
    if located.done:
        return _answer(flow, server.next, now)
    if located.dissector is not None:
        flow.answers, flow.answers_at, flow.answers_data = located.dissector, located.at, located.begun
    elif flow.client_at == server.next:  # it had all that was sent before it asked on: it waited for the end
        return _answer(flow, server.next, now)
    else:
        flow.wake_at = now + QUIET_AFTER
    return []


def receive(flow: Flow, segment: Segment, packet: memoryview, from_client: bool, now: float) -> list[Command]:
    """One frame of a flow that is not open."""
    if from_client:
        remember(flow, segment, packet)
        if segment.flags & RST:
            return _client_gone(flow, segment, now)
    return _HANDLERS[flow.state, from_client](flow, segment, packet, now)


def tick(flow: Flow, now: float) -> list[Command]:
    if flow.state is State.CLOSED:
        return [Delete(flow)]
    if flow.state is State.ANSWERED:
        return _again(flow, now)
    if now >= flow.until:
        return abort(flow, DropReason.FLOW_CLOSED, now)
    if flow.state is State.DRAINING and flow.answers is None and flow.client_at == flow.server_at:
        return _answer(flow, flow.server_at, now)
    flow.wake_at = flow.until if flow.answers is not None or flow.state is State.ENDING else now + QUIET_AFTER
    return []


def _client_gone(flow: Flow, segment: Segment, now: float) -> list[Command]:
    """The client has reset its connection, where the server would believe it: the server's ends with it."""
    if flow.state is State.CLOSED or not (
        seq_le(flow.next, segment.seq) and seq_le(segment.seq, flow.client_end)
    ):
        return [Drop(DropReason.FLOW_CLOSED)]
    needed = flow.state is not State.ANSWERED or flow.server_needed
    flow.state, flow.wake_at = State.CLOSED, now + LINGER
    return [*server_reset(flow)] if needed else []


# -- draining: the earlier answers -------------------------------------------------------------------------


def _client_drains(flow: Flow, segment: Segment, packet: memoryview, now: float) -> list[Command]:
    """The client's acknowledgements go on, and what was allowed and comes again or late; nothing else of it."""
    _take(flow, segment)
    return [*_allowed(flow, segment, packet)]


def _allowed(flow: Flow, segment: Segment, packet: memoryview) -> list[Send]:
    """The frame's bytes below the boundary, if they are what was forwarded or granted; an acknowledgement at least."""
    lead = seq_sub(flow.next, segment.seq)
    old = bytes(packet[segment.payload_at : segment.payload_end])[: max(lead, 0)]
    if old and known_bytes(flow, segment.seq, old) is DropReason.NONE:
        at, rest = cut_acknowledged(flow, segment.seq, old)
        if rest:
            return to_server(flow, at, rest, PSH | ACK)
    return to_server(flow, flow.next, b"", ACK)


def _server_drains(flow: Flow, segment: Segment, packet: memoryview, now: float) -> list[Command]:
    """Forwards the answers' bytes in order, up to the end of the last one."""
    if segment.flags & RST:
        flow.state, flow.wake_at = State.CLOSED, now + CLIENT_FIN_WITHIN
        return [Forward()]
    lead = seq_sub(flow.server_at, segment.seq)
    if lead < 0:  # a hole before it: the server will send it again
        return [Drop(DropReason.OUT_OF_WINDOW)]
    data = bytes(packet[segment.payload_at + lead : segment.payload_end])
    flow.server_at = (flow.server_at + len(data)) & _MASK
    end = _follow(flow, data, now) if data else None
    if end is None:
        if segment.flags & FIN and segment.seq + segment.payload_length & _MASK == flow.server_at:
            flow.state = State.ENDING
        return [Forward()]
    answer = _answer(flow, end, now)
    if end == flow.server_at and not segment.flags & FIN:
        return [Forward(), *answer]
    passed = data[: seq_sub(end, flow.server_at) + len(data)]
    start = (flow.server_at - len(data)) & _MASK
    cut: list[Command] = [
        to_client(flow, (start + at) & _MASK, flow.client_end, passed[at : at + SEGMENT_MAX], PSH | ACK)
        for at in range(0, len(passed), SEGMENT_MAX)
    ]
    return cut + answer


def _follow(flow: Flow, data: bytes, now: float) -> int | None:
    """Where the last answer ends, once it does. What nobody can follow has ended when it is quiet."""
    if flow.answers is not None:
        try:
            return _dissect(flow, data)
        except DissectError:
            flow.answers = None
    flow.wake_at = now + QUIET_AFTER
    return None


def _dissect(flow: Flow, data: bytes) -> int | None:
    """Reads on in the answers; the sequence number at which the last one ends, once it does."""
    assert flow.answers is not None
    flow.answers_data += data
    at = 0
    start = (flow.server_at - len(flow.answers_data)) & _MASK
    ahead = seq_sub(flow.answers_at, start)  # a body that began earlier reaches up to here
    if ahead > 0:
        at = ahead
    while flow.answers.outstanding and at < len(flow.answers_data):
        piece = flow.answers.advance(flow.answers_data, at)
        if piece is None:
            break
        at += piece.length
    flow.answers_at = (start + at) & _MASK
    flow.answers_data = flow.answers_data[at:]
    if flow.answers.outstanding or seq_lt(flow.server_at, flow.answers_at):
        return None
    return flow.answers_at


# -- ending: the server has closed, so no denial can follow -------------------------------------------------


def _client_ends(flow: Flow, segment: Segment, packet: memoryview, now: float) -> list[Command]:
    """Once the client has all of it, FIN included, both ends are reset: its last request has no answer."""
    if not seq_le(flow.client_at, flow.server_at):
        return abort(flow, DropReason.FLOW_CLOSED, now)
    return _client_drains(flow, segment, packet, now)


def _server_ends(flow: Flow, segment: Segment, packet: memoryview, now: float) -> list[Command]:
    end = (segment.seq + segment.payload_length) & _MASK
    return [Forward()] if seq_le(end, flow.server_at) else [Drop(DropReason.OUT_OF_WINDOW)]


# -- answered: the denial ----------------------------------------------------------------------------------


def _answer(flow: Flow, at: int, now: float) -> list[Command]:
    """Puts the denial at `at` of the server's half."""
    assert flow.decision is not None
    flow.state = State.ANSWERED
    flow.answer, flow.answer_at = denial(flow.decision, flow.request), at
    flow.resends = 0
    flow.wake_at = now + RESEND_AFTER
    flow.server_needed = True
    return [_denial(flow), *_release_server(flow)]


def _release_server(flow: Flow) -> list[Command]:
    """Resets the server once the client has the earlier answers; until then it may have to send them again."""
    if not flow.server_needed or seq_lt(flow.client_at, flow.answer_at):
        return []
    flow.server_needed = False
    return [
        Own(flow, flow.initiator.other, Owner.CLOSED),
        *server_reset(flow),
    ]


def _denial(flow: Flow) -> Command:
    return to_client(flow, flow.answer_at, flow.client_end, flow.answer, PSH | ACK | FIN)


def _answer_end(flow: Flow) -> int:
    return (flow.answer_at + len(flow.answer) + 1) & _MASK


def _again(flow: Flow, now: float) -> list[Command]:
    flow.resends += 1
    if flow.resends > RESENDS_MAX:
        flow.state, flow.wake_at = State.CLOSED, now + LINGER
        return [
            to_client(flow, flow.client_at, flow.client_end, b"", RST | ACK),
            *(server_reset(flow) if flow.server_needed else ()),
        ]
    flow.wake_at = now + RESEND_AFTER * 2**flow.resends
    return [_denial(flow)]


def _client_answered(flow: Flow, segment: Segment, packet: memoryview, now: float) -> list[Command]:
    """Takes what the client still sends, and acknowledges it, until it has the denial and closes too."""
    commands = _release_server(flow)
    fresh = _take(flow, segment)
    if not seq_lt(flow.client_at, _answer_end(flow)):
        flow.state = State.CLOSED
        flow.wake_at = now + (LINGER if flow.client_fin else CLIENT_FIN_WITHIN)
    elif flow.server_needed:
        commands += _allowed(flow, segment, packet)
    if fresh or segment.payload_length or segment.flags & FIN:
        commands.append(to_client(flow, _answer_end(flow), flow.client_end, b"", ACK))
    return commands


def _server_answered(flow: Flow, segment: Segment, packet: memoryview, now: float) -> list[Command]:
    """Of the server only what it sends again of the earlier answers."""
    end = (segment.seq + segment.payload_length) & _MASK
    if not flow.server_needed or segment.flags & (FIN | RST) or seq_lt(flow.answer_at, end):
        return [Drop(DropReason.FLOW_CLOSED)]
    return [Forward()]


def _take(flow: Flow, segment: Segment) -> bool:
    """Moves `client_end` past what the segment brings in sequence; nothing of it is kept."""
    end = (segment.seq + segment.payload_length + bool(segment.flags & FIN)) & _MASK
    if flow.client_fin or seq_lt(flow.client_end, segment.seq) or not seq_lt(flow.client_end, end):
        return False
    flow.client_end = end
    flow.client_fin = bool(segment.flags & FIN)
    return True


# -- closed ------------------------------------------------------------------------------------------------


def _client_closed(flow: Flow, segment: Segment, packet: memoryview, now: float) -> list[Command]:
    """After a denial the client's FIN is still acknowledged; otherwise it is reset again, where it waits."""
    if flow.wake_at is None:
        flow.wake_at = now + LINGER
    if flow.answer:
        return _client_answered(flow, segment, packet, now)
    if flow.resets <= 0:
        return [Drop(DropReason.FLOW_CLOSED)]
    flow.resets -= 1
    end = (segment.seq + segment.payload_length + bool(segment.flags & FIN)) & _MASK
    return [to_client(flow, segment.ack, end, b"", RST | ACK)]


def _server_closed(flow: Flow, segment: Segment, packet: memoryview, now: float) -> list[Command]:
    """Nothing passes. A server that was not hit by the reset says where it waits (RFC 5961 section 3.2)."""
    if flow.answer or flow.template is None or flow.resets <= 0 or segment.flags & RST:
        return [Drop(DropReason.FLOW_CLOSED)]
    flow.resets -= 1
    return [*to_server(flow, segment.ack, b"", RST | ACK)]


_Handler = Callable[[Flow, Segment, memoryview, float], list[Command]]
_HANDLERS: dict[tuple[State, bool], _Handler] = {
    (State.DRAINING, True): _client_drains,
    (State.DRAINING, False): _server_drains,
    (State.ENDING, True): _client_ends,
    (State.ENDING, False): _server_ends,
    (State.ANSWERED, True): _client_answered,
    (State.ANSWERED, False): _server_answered,
    (State.CLOSED, True): _client_closed,
    (State.CLOSED, False): _server_closed,
}
