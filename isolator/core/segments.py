"""Segments that are built here: in the client's name towards the server, in the server's name towards the client.

Both are modelled on the newest frame that the client sent (`remember`): its addresses, ports and MACs, its
window, and its timestamps, without which the receiver may refuse them (RFC 7323 section 3.2).
"""

from __future__ import annotations

from isolator.core.commands import Send
from isolator.core.flow import Flow
from parsers.packet import ACK, FIN, RST, SYN, Segment, SegmentTemplate

WINDOW = 65535  # of injected segments: unscaled, as good as any for a connection about to end


def remember(flow: Flow, segment: Segment, packet: memoryview) -> None:
    """Keeps what segments built later need of the client's newest frame."""
    flow.template = SegmentTemplate.like(packet, segment)
    flow.timestamps = segment.timestamps(packet)
    flow.window = segment.window
    flow.client_at = segment.ack


def to_server(flow: Flow, seq: int, payload: bytes, flags: int) -> Send:
    assert flow.template is not None
    frame = flow.template.build(seq, flow.client_at, flags, payload, flow.window, flow.timestamps)
    return Send(flow.endpoint, flow.initiator, frame)


def to_client(flow: Flow, seq: int, ack: int, payload: bytes, flags: int) -> Send:
    assert flow.template is not None
    stamps = None if flow.timestamps is None else (flow.timestamps[1], flow.timestamps[0])
    frame = flow.template.reversed().build(seq, ack, flags, payload, WINDOW, stamps)
    return Send(flow.endpoint, flow.initiator.other, frame)


def resets(flow: Flow) -> list[Send]:
    """Ends both sides; each reset stands exactly where its receiver waits (RFC 5961 section 3.2)."""
    return [
        to_client(flow, flow.client_at, flow.client_end or flow.next, b"", RST | ACK),
        to_server(flow, flow.next, b"", RST | ACK),
    ]


def refusals(segment: Segment, packet: memoryview) -> tuple[bytes, bytes]:
    """Resets for a connection that cannot be, to a frame's sender and to its receiver (RFC 9293 section 3.5.2)."""
    template = SegmentTemplate.like(packet, segment)
    length = segment.payload_length + bool(segment.flags & SYN) + bool(segment.flags & FIN)
    end = (segment.seq + length) & 0xFFFFFFFF
    back = template.reversed().build(segment.ack if segment.flags & ACK else 0, end, RST | ACK, b"", 0)
    return back, template.build(segment.seq, segment.ack, RST | ACK, b"", 0)
