"""Bytes of the client's that come again: whether they are those that were forwarded, and what of them may go on."""

from __future__ import annotations

from isolator.core.flow import Flow
from isolator.core.model import DropReason
from parsers.reassembly import seq_le, seq_lt, seq_sub

_MASK = 0xFFFFFFFF


def in_window(flow: Flow, start: int, end: int) -> bool:
    """Whether bytes [start, end) lie in one pass window (bpf/isolator_flow7.h has the same)."""
    return any(seq_le(low, start) and seq_le(end, high) for low, high in flow.windows)


def known_bytes(flow: Flow, seq: int, old: bytes) -> DropReason:
    """Whether bytes below the boundary are those that were forwarded, or may be anything (R5)."""
    at, end = seq, (seq + len(old)) & _MASK
    if seq_lt(at, flow.acked):
        at = flow.acked
    while seq_lt(at, end):
        until = end
        for start, stop in flow.windows:
            if not seq_lt(at, start) and seq_lt(at, stop):
                at = stop
                break
            if seq_lt(at, start) and seq_lt(start, until):
                until = start
        else:
            offset = seq_sub(at, seq)
            equal = flow.record.matches(at, old[offset : offset + seq_sub(until, at)])
            if not equal:
                return DropReason.STATE_LOST if equal is None else DropReason.RECORD_MISMATCH
            at = until
    return DropReason.NONE


def cut_acknowledged(flow: Flow, seq: int, old: bytes) -> tuple[int, bytes]:
    """(sequence number, bytes) of what is not acknowledged yet: below that nothing goes on."""
    rest = old[max(seq_sub(flow.acked, seq), 0) :]
    return (seq + len(old) - len(rest)) & _MASK, rest
