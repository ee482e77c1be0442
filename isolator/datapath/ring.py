"""The ring through which punted frames reach Python: TPACKET_V3 with PACKET_VNET_HDR, read without copying.

Stages: `packet_socket` (in the right network namespace) → `Ring` (maps it, binds it) → `Blocks.poll` (one
block after the other) → `Frame`. A frame's views point into the ring: they hold until the next `poll`, what
is kept longer is copied.

How a block is filled (net/packet/af_packet.c):

    prb_open_block       status KERNEL, num_pkts 0
    prb_fill_curr_block  a frame's place is taken: tp_next_offset, rxhash (under the queue's lock)
    tpacket_rcv          vnet header; data copied; then tp_len, tp_snaplen, tp_mac, tp_sec, tp_nsec
    prb_close_block      full, or its time is over: the last frame's tp_next_offset = 0, then status USER

A block's reader is woken when the block closes, a millisecond late. So `Reading.OPEN` reads frames of the
block that is still being filled. A frame is complete once every field that is written after its data is
nonzero. That is sound because (1) the bytes at which headers will stand are zero, as a block's used bytes are
zeroed before it is handed back, and (2) stores become visible in program order, which x86 promises.
tp_next_offset must be nonzero too: the frame whose tp_next_offset a closing block clears is left to the
block's count (num_pkts), so that none is skipped or read twice. Elsewhere `Reading.CLOSED` reads closed
blocks only.

The zeroing is needed in both: a frame whose vnet header the kernel could not make (tpacket_rcv:
virtio_net_hdr_from_skb failed) stays counted in its block, with whatever header stood there before.
"""

from __future__ import annotations

import contextlib
import mmap
import platform
import socket
import struct
import threading
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Self

from isolator.datapath.errors import DatapathError
from isolator.datapath.netns import Netns

VNET = 10  # struct virtio_net_hdr, in front of every frame
BLOCK_SIZE = 1 << 18  # three of the largest frames (GSO, 64 KiB)
BLOCK_COUNT = 32  # at a block a millisecond Python may be away for 32 ms; all 8 MiB are resident
RETIRE_MS = 1  # the least there is: an open block with a frame in it closes after this long

# <linux/if_packet.h>
PACKET_RX_RING = 5
PACKET_STATISTICS = 6
PACKET_VERSION = 10
PACKET_VNET_HDR = 15
PACKET_FANOUT = 18
PACKET_IGNORE_OUTGOING = 23
TPACKET_V3 = 2
TP_FT_REQ_FILL_RXHASH = 1
TP_STATUS_USER = 1
_SOL_PACKET = 263
_ETH_P_ALL = 3
_FRAME_SIZE = 2048  # V3 checks it and then ignores it

_REQUEST = struct.Struct("=7I")  # tpacket_req3
_STATISTICS = struct.Struct("=3I")  # tpacket_stats_v3: packets, drops, freezes
_BLOCK = struct.Struct("=8xIIII")  # tpacket_block_desc: block_status, num_pkts, offset_to_first_pkt, blk_len
_FRAME = struct.Struct("=IIIII4xH2xI")  # tpacket3_hdr: next_offset, sec, nsec, snaplen, len, mac, rxhash
_BLOCK_HEADER = 48  # sizeof(struct tpacket_block_desc): a block's first frame stands here
_STATUS = 8  # block_status within the block
_COUNT = 12  # num_pkts


class RingError(DatapathError):
    """The ring could not be set up."""


class Reading(Enum):
    """When a frame is read: as soon as it is complete, or once its block is closed."""

    OPEN = "open"
    CLOSED = "closed"

    @classmethod
    def best(cls) -> Reading:
        """OPEN where stores become visible in program order."""
        return cls.OPEN if platform.machine() in ("x86_64", "AMD64", "i686", "i386") else cls.CLOSED


class Frame:
    """One packet in the ring. Both views die at the next `poll`.

    `vnet_packet`: struct virtio_net_hdr and the Ethernet frame, as a sender takes it. `packet`: the Ethernet
    frame alone. `context`: the 32 bits that the punting program set (PUNT_CONTEXT). `time`: ns since the
    epoch.
    """

    __slots__ = ("context", "packet", "time", "vnet_packet")

    def __init__(self, vnet_packet: memoryview, packet: memoryview, context: int, time: int) -> None:
        self.vnet_packet = vnet_packet
        self.packet = packet
        self.context = context
        self.time = time


@dataclass(slots=True)
class RingStatistics:
    """Counts since the ring was made. Of them `drops` and `freezes` are the kernel's: no block was free."""

    frames: int = 0
    bytes: int = 0
    truncated: int = 0  # longer than a block: dropped here, never handed out
    unfilled: int = 0  # the kernel took a place and wrote no frame
    drops: int = 0
    freezes: int = 0


# -- the socket -------------------------------------------------------------------------------------------


def packet_socket(netns: Netns | None = None) -> socket.socket:
    """A raw packet socket with PACKET_VNET_HDR that receives nothing yet, in `netns` (None: the thread's).

    A socket stays in the network namespace in which it was made, wherever its thread goes. Raises OSError.
    """
    with contextlib.nullcontext() if netns is None else netns.entered():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        sock.setblocking(False)
        sock.setsockopt(_SOL_PACKET, PACKET_VNET_HDR, 1)  # before a ring: EBUSY after
    except OSError:
        sock.close()
        raise
    return sock


# -- the ring ---------------------------------------------------------------------------------------------


class Ring:
    """A TPACKET_V3 ring on one interface. A context manager; `fileno()` is for epoll.

    The file becomes readable when a block closes: within RETIRE_MS of a frame, whether the frame was read
    before or not, and stays so until `poll` has handed the block back. For less latency ring a doorbell
    (doorbell.py) or spin on `poll`.
    """

    def __init__(
        self,
        sock: socket.socket,
        interface: str,
        *,
        reading: Reading | None = None,
        block_size: int = BLOCK_SIZE,
        block_count: int = BLOCK_COUNT,
        retire_ms: int = RETIRE_MS,
        fanout: tuple[int, int] | None = None,
    ) -> None:
        """Takes over `sock` (from `packet_socket`) and binds it to `interface` of the socket's namespace.

        `reading`: None is the best that is sound on this machine. `fanout`: (group, PACKET_FANOUT mode), to
        share an interface among several rings. Raises RingError; the socket is closed then.
        """
        self._socket = sock
        self._statistics = RingStatistics()
        reading = reading or Reading.best()
        with contextlib.ExitStack() as undo:
            undo.callback(sock.close)
            if reading is Reading.OPEN and Reading.best() is not Reading.OPEN:
                raise RingError(f"open blocks can't be read on {platform.machine()}: use {Reading.CLOSED}")
            try:
                self._map = _map_ring(sock, block_size, block_count, retire_ms)
                undo.callback(self._map.close)
                sock.bind((interface, _ETH_P_ALL))
                if fanout is not None:
                    group, mode = fanout
                    sock.setsockopt(_SOL_PACKET, PACKET_FANOUT, group | mode << 16)
            except OSError as error:
                raise RingError(f"no ring on interface {interface!r}: {error}") from error
            undo.pop_all()
        self._blocks = Blocks(self._map, block_size, reading, self._statistics)
        self.poll = self._blocks.poll

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def waiting(self) -> bool:
        """Whether `poll` would find frames. Ends no frame's life."""
        return self._blocks.waiting

    def statistics(self) -> RingStatistics:
        """The counts so far. Asking the kernel resets its own, so they are summed up here."""
        answer = self._socket.getsockopt(_SOL_PACKET, PACKET_STATISTICS, _STATISTICS.size)
        _, drops, freezes = _STATISTICS.unpack(answer)
        self._statistics.drops += drops
        self._statistics.freezes += freezes
        return self._statistics

    def close(self) -> None:
        """Unmaps the ring. Where frames are still held, that waits for the last of their views to die."""
        self._blocks.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _map_ring(sock: socket.socket, block_size: int, block_count: int, retire_ms: int) -> mmap.mmap:
    frames = block_size // _FRAME_SIZE * block_count
    request = (block_size, block_count, _FRAME_SIZE, frames, retire_ms, 0, TP_FT_REQ_FILL_RXHASH)
    sock.setsockopt(_SOL_PACKET, PACKET_VERSION, TPACKET_V3)
    sock.setsockopt(_SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    sock.setsockopt(_SOL_PACKET, PACKET_RX_RING, _REQUEST.pack(*request))
    access = mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(sock.fileno(), block_size * block_count, mmap.MAP_SHARED, access)


# -- blocks -----------------------------------------------------------------------------------------------


class Blocks:
    """The blocks of a mapped ring, read in the order in which the kernel fills them.

    Works on any writable buffer, so that tests can play the kernel's part.
    """

    def __init__(
        self, buffer: mmap.mmap | bytearray, block_size: int, reading: Reading, statistics: RingStatistics
    ) -> None:
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._words = self._view.cast("I")
        self._block_size = block_size
        self._size = len(self._view)
        self._open = reading is Reading.OPEN
        self._statistics = statistics
        self._zeros = memoryview(bytes(block_size))  # never written, so all of it is the kernel's zero page
        self._enter(0)

    def _enter(self, start: int) -> None:
        self._start = start
        self._at = start + _BLOCK_HEADER  # of the next frame's header
        self._read = 0  # frames of this block that are done with

    def poll(self, budget: int = 64) -> list[Frame]:
        """1 to `budget` frames of one block; empty: there is none. Ends the life of all earlier frames."""
        words, status = self._words, (self._start + _STATUS) >> 2
        while True:
            closed = words[status] & TP_STATUS_USER
            if closed:
                fence()  # its contents are read after its status
                left = words[(self._start + _COUNT) >> 2] - self._read
                if left == 0:
                    self._hand_back()
                    status = (self._start + _STATUS) >> 2
                    continue
                frames = self._walk(min(budget, left), closed)
            elif self._open:
                return self._walk(budget, closed)
            else:
                return []
            if frames:
                return frames

    @property
    def waiting(self) -> bool:
        """Whether a frame stands where the next is read. A closed block that is read to its end counts too."""
        if self._words[(self._start + _STATUS) >> 2] & TP_STATUS_USER:
            return True
        return (
            self._open
            and self._at <= self._start + self._block_size - _FRAME.size
            and bool(all(_FRAME.unpack_from(self._buffer, self._at)[:6]))
        )

    def _walk(self, budget: int, closed: int) -> list[Frame]:
        """The next frames of the current block, at most `budget`; stops at one that is not complete."""
        buffer, view, unpack, at = self._buffer, self._view, _FRAME.unpack_from, self._at
        last = self._start + self._block_size - _FRAME.size  # behind it there is no room for a header
        frames: list[Frame] = []
        length = truncated = unfilled = 0
        for _ in range(budget):
            if at > last:
                break
            step, seconds, nanoseconds, snaplen, whole, mac, context = unpack(buffer, at)
            if not (step and seconds and nanoseconds and snaplen and whole and mac) and not closed:
                break
            if snaplen != whole:
                truncated += 1
            elif not mac:
                unfilled += 1
            else:
                begin, end = at + mac, at + mac + snaplen
                time = seconds * 1_000_000_000 + nanoseconds
                frames.append(Frame(view[begin - VNET : end], view[begin:end], context, time))
                length += snaplen
            at += step
        self._at = at
        self._read += len(frames) + truncated + unfilled
        statistics = self._statistics
        statistics.frames += len(frames)
        statistics.bytes += length
        statistics.truncated += truncated
        statistics.unfilled += unfilled
        return frames

    def _hand_back(self) -> None:
        """Zeroes the block's used bytes, then gives it to the kernel, and goes on to the next."""
        start = self._start
        _, _, first, used = _BLOCK.unpack_from(self._buffer, start)
        self._view[start + first : start + used] = self._zeros[first:used]
        fence()  # the zeros are there before the kernel may write
        self._words[(start + _STATUS) >> 2] = 0
        self._enter((start + self._block_size) % self._size)

    def release(self) -> None:
        """Lets go of the buffer."""
        self._words.release()
        self._view.release()


_LOCK = threading.Lock()


def fence() -> None:
    """What was read and written before is done before what comes after.

    Python has no fence of its own. A lock that is released and then taken is one: a locked instruction on
    x86, and on ARM a store-release followed by a load-acquire, which stay in order.
    """
    with _LOCK:
        pass
    with _LOCK:
        pass
