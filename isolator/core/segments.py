"""Segments that are built here: in the client's name towards the server, in the server's name towards the client.

Both are modelled on the newest frame that the client sent (`remember`): its addresses, ports and MACs, its
window, and its timestamps, without which the receiver may refuse them (RFC 7323 section 3.2).
"""

from __future__ import annotations

from isolator.core.commands import Send
from isolator.core.flow import Flow
from parsers.packet import ACK, FIN, PSH, RST, SYN, Segment, SegmentTemplate

SEGMENT_MAX = 32768  # bytes of payload of one built segment; an IPv4 packet has room for 65,495
WINDOW = 65535  # of injected segments: unscaled, as good as any for a connection about to end
_MASK = 0xFFFFFFFF


def remember(flow: Flow, segment: Segment, packet: memoryview) -> None:
    """Keeps what segments built later need of the client's newest frame."""
    flow.template = SegmentTemplate.like(packet, segment)
    flow.timestamps = segment.timestamps(packet)
    flow.window = segment.window
    flow.client_at = segment.ack


def to_server(flow: Flow, seq: int, payload: bytes, flags: int) -> list[Send]:
    """As many segments as it takes; PSH and FIN stand on the last."""
    assert flow.template is not None
    sends = []
    for at in range(0, max(len(payload), 1), SEGMENT_MAX):
        part = payload[at : at + SEGMENT_MAX]
        last = at + SEGMENT_MAX >= len(payload)
        frame = flow.template.build(
            (seq + at) & _MASK, flow.client_at, flags if last else flags & ~(PSH | FIN), part,
            flow.window, flow.timestamps,
        )  # fmt: skip
        sends.append(Send(flow.endpoint, flow.initiator, frame))
    return sends


def to_client(flow: Flow, seq: int, ack: int, payload: bytes, flags: int, window: int = WINDOW) -> Send:
    """One segment of at most SEGMENT_MAX bytes."""
    assert flow.template is not None and len(payload) <= SEGMENT_MAX
    stamps = None if flow.timestamps is None else (flow.timestamps[1], flow.timestamps[0])
    frame = flow.template.reversed().build(seq, ack, flags, payload, window, stamps)
    return Send(flow.endpoint, flow.initiator.other, frame)


def resets(flow: Flow) -> list[Send]:
    """Ends both sides; each reset stands where its receiver waits (RFC 5961 section 3.2)."""
    return [
        to_client(flow, flow.client_at, flow.client_end or flow.next, b"", RST | ACK),
        *server_reset(flow),
    ]


def server_reset(flow: Flow) -> list[Send]:
    """The server waits at what it has acknowledged last, or at the boundary if it has more than that."""
    seqs = dict.fromkeys((flow.acked, flow.next))
    return [send for seq in seqs for send in to_server(flow, seq, b"", RST | ACK)]


def refusals(segment: Segment, packet: memoryview) -> tuple[bytes, bytes]:
    """Resets for a connection that cannot be, to a frame's sender and to its receiver (RFC 9293 section 3.5.2)."""
    template = SegmentTemplate.like(packet, segment)
    length = segment.payload_length + bool(segment.flags & SYN) + bool(segment.flags & FIN)
    end = (segment.seq + length) & _MASK
    back = template.reversed().build(segment.ack if segment.flags & ACK else 0, end, RST | ACK, b"", 0)
    return back, template.build(segment.seq, segment.ack, RST | ACK, b"", 0)
