"""The kernel's events: a consumer of the BPF ring buffer `events`.

The ring buffer's layout is kernel/bpf/ringbuf.c's: one page with the consumer's position, one page with the
producer's, then the data twice in a row, so that no record is cut at the end. A record is an 8-byte header
(length with two flag bits, page offset) and its bytes, padded to 8.

Positions are read and written through a memoryview of 8-byte items: one machine word each, never byte by
byte. x86 keeps the producer's order of stores; a machine that does not would need barriers here.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from isolator.datapath.abi import EVENT, REQUEST_EVENT, Event, RequestEvent

BUSY = 1 << 31  # BPF_RINGBUF_BUSY_BIT: reserved, not yet submitted
DISCARD = 1 << 30  # BPF_RINGBUF_DISCARD_BIT
HEADER = 8  # BPF_RINGBUF_HDR_SZ
READ_MAX = 4096  # records per call: bounds the time one read may take


class RingBuffer:
    """Reads records. `fd` is readable (poll, epoll) when there are some."""

    def __init__(self, fd: int, size: int) -> None:
        """`size`: bytes of data, the map's max_entries."""
        self.fd = fd
        self._mask = size - 1
        self._consumer_map = mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer_map = mmap.mmap(
            fd, mmap.PAGESIZE + 2 * size, prot=mmap.PROT_READ, offset=mmap.PAGESIZE
        )
        self._consumer = memoryview(self._consumer_map).cast("Q")
        whole = memoryview(self._producer_map)
        self._producer = whole[: mmap.PAGESIZE].cast("Q")
        self._data = whole[mmap.PAGESIZE :]
        self._headers = self._data.cast("I")
        whole.release()

    def records(self, limit: int = READ_MAX) -> Iterator[memoryview]:
        """Records submitted so far, oldest first, `limit` at most. Each view is valid until the next step."""
        position, end = self._consumer[0], self._producer[0]
        while position < end and limit:
            at = position & self._mask
            header = self._headers[at // 4]
            if header & BUSY:
                return
            length = header & (DISCARD - 1)
            if not header & DISCARD:
                yield self._data[at + HEADER : at + HEADER + length]
                limit -= 1
            position += HEADER + (length + 7 & ~7)
            self._consumer[0] = position

    def close(self) -> None:
        """Unmap. The file descriptor belongs to whoever opened it."""
        for view in (self._consumer, self._producer, self._headers, self._data):
            view.release()
        self._consumer_map.close()
        self._producer_map.close()


class EventReader:
    """New flows and drops, as the kernel reports them: at a bounded rate, and while there is room."""

    def __init__(self, fd: int, size: int) -> None:
        self._ring = RingBuffer(fd, size)
        self.fd = fd

    def read(self, limit: int = READ_MAX) -> list[Event | RequestEvent]:
        return [unpack(record) for record in self._ring.records(limit) if len(record) >= EVENT.size]

    def close(self) -> None:
        self._ring.close()


def unpack(record: memoryview) -> Event | RequestEvent:
    """`record`: at least an event; only a request is longer."""
    return RequestEvent.unpack(record) if len(record) >= REQUEST_EVENT.size else Event.unpack(record)
