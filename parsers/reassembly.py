"""TCP payload put in order. For every byte the first copy that came wins; a different later one is an error.

Sequence numbers are modulo 2^32 and compare by their signed distance (RFC 9293 section 3.4).
"""

from __future__ import annotations

from parsers.checksum import Octets
from parsers.errors import HeldFull, OutOfWindow, Overlap

PIECES_MAX = 64  # behind holes; each new segment is compared with all of them
RECORD_MAX = 1 << 20  # bytes that a Record keeps at most; who appends looks at its length before

_MASK = 0xFFFFFFFF


def seq_sub(a: int, b: int) -> int:
    """a - b as a signed distance, -2^31 … 2^31 - 1."""
    return ((a - b + 0x80000000) & _MASK) - 0x80000000


def seq_lt(a: int, b: int) -> bool:
    return (a - b) & 0x80000000 != 0


def seq_le(a: int, b: int) -> bool:
    return not seq_lt(b, a)


class Reassembler:
    """One direction's bytes from `next` on that are not decided yet."""

    __slots__ = ("_pieces", "data", "held", "held_max", "next")

    def __init__(self, next: int, held_max: int = 65536) -> None:
        self.next = next
        self.held_max = held_max
        self.data = bytearray()  # contiguous from `next`
        self.held = 0  # bytes in all, those behind a hole included
        self._pieces: list[
            tuple[int, bytes]
        ] = []  # (offset from next, bytes) behind a hole, ascending, disjoint

    def insert(self, seq: int, data: Octets) -> None:
        """Raises Overlap, OutOfWindow, HeldFull; then nothing has changed. Bytes below `next` are ignored."""
        at = seq_sub(seq, self.next)
        piece = bytes(data)
        if at < 0:
            piece, at = piece[-at:], 0
        if not piece:
            return
        if at + len(piece) > self.held_max:
            if at > self.held_max:
                raise OutOfWindow(f"{at} bytes ahead")
            raise HeldFull(f"more than {self.held_max} bytes would have to wait")
        self._check(at, piece)
        if at > len(self.data) and len(self._pieces) >= PIECES_MAX:
            raise HeldFull(f"more than {PIECES_MAX} pieces would have to wait")
        self._add(at, piece)

    def _parts(self) -> list[tuple[int, bytes]]:
        return [(0, bytes(self.data)), *self._pieces] if self.data else list(self._pieces)

    def _check(self, at: int, piece: bytes) -> None:
        end = at + len(piece)
        for start, kept in self._parts():
            low, high = max(at, start), min(end, start + len(kept))
            if low < high and piece[low - at : high - at] != kept[low - start : high - start]:
                raise Overlap("a retransmission that differs from the first copy")

    def _add(self, at: int, piece: bytes) -> None:
        merged: list[tuple[int, bytes]] = []
        for start, part in sorted([*self._parts(), (at, piece)]):
            if merged and start <= merged[-1][0] + len(merged[-1][1]):
                base, kept = merged[-1]
                merged[-1] = (
                    base,
                    kept + part[base + len(kept) - start :] if start + len(part) > base + len(kept) else kept,
                )
            else:
                merged.append((start, part))
        self._set(merged)

    def _set(self, parts: list[tuple[int, bytes]]) -> None:
        self.data = bytearray(parts.pop(0)[1]) if parts and parts[0][0] == 0 else bytearray()
        self._pieces = parts
        self.held = len(self.data) + sum(len(part) for _, part in parts)

    def consume(self, count: int) -> None:
        """Moves `next` by `count`, which may lie beyond what is held: what was held before it is let go."""
        self.next = (self.next + count) & _MASK
        if not self.held:
            return
        parts = []
        for start, part in self._parts():
            start -= count
            if start < 0:
                part, start = part[-start:], 0
            if part:
                parts.append((start, part))
        self._set(parts)


class Record:
    """Bytes that were forwarded and are not acknowledged yet, in pieces, with holes where windows were."""

    __slots__ = ("_length", "_pieces")

    def __init__(self) -> None:
        self._pieces: list[tuple[int, bytes]] = []  # (sequence number, bytes), ascending
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, seq: int, data: Octets) -> None:
        """Behind everything that is there."""
        if data:
            self._pieces.append((seq, bytes(data)))
            self._length += len(data)

    def acknowledge(self, ack: int) -> None:
        """Lets go of whole pieces below `ack`."""
        pieces = self._pieces
        while pieces and not seq_lt(ack, (pieces[0][0] + len(pieces[0][1])) & _MASK):
            self._length -= len(pieces.pop(0)[1])

    def matches(self, seq: int, data: Octets) -> bool | None:
        """Whether these bytes are those that stand here; None: not all of them are covered."""
        rest = bytes(data)
        for start, kept in self._pieces:
            if not rest:
                break
            at = seq_sub(seq, start)
            if at < 0 or at >= len(kept):
                continue
            part = kept[at : at + len(rest)]
            if rest[: len(part)] != part:
                return False
            rest, seq = rest[len(part) :], (seq + len(part)) & _MASK
        return None if rest else True

    def since(self, seq: int) -> bytes:
        """The bytes from `seq` on, up to the first hole."""
        found = b""
        for start, kept in self._pieces:
            at = seq_sub((seq + len(found)) & _MASK, start)
            if 0 <= at < len(kept):
                found += kept[at:]
        return found
