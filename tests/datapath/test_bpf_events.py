"""The ring buffer's consumer, against memory laid out as kernel/bpf/ringbuf.c does."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

import pytest

from isolator.core.model import Direction, DropReason, Verdict
from isolator.datapath.abi import EVENT, flow_key
from isolator.datapath.events import BUSY, DISCARD, EventReader, RingBuffer

SIZE = mmap.PAGESIZE


class Producer:
    """The kernel's side: a file with the consumer's page, the producer's page and the data."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * mmap.PAGESIZE + 2 * SIZE)
        self.position = 0

    def put(self, payload: bytes, flags: int = 0) -> int:
        """Reserve and submit; returns where the header stands."""
        at = self.position % SIZE
        record = struct.pack("=II", len(payload) | flags, 0) + payload + bytes(-len(payload) % 8)
        for number, byte in enumerate(record):  # the data appears twice in a row: here it is written twice
            for copy in (0, SIZE):
                place = (at + number) % SIZE + copy
                os.pwrite(self.fd, bytes([byte]), 2 * mmap.PAGESIZE + place)
        self.position += len(record)
        os.pwrite(self.fd, struct.pack("=Q", self.position), mmap.PAGESIZE)
        return 2 * mmap.PAGESIZE + at

    def consumed(self) -> int:
        return int(struct.unpack("=Q", os.pread(self.fd, 8, 0))[0])


@pytest.fixture
def producer() -> Iterator[Producer]:
    made = Producer()
    yield made
    os.close(made.fd)


@pytest.fixture
def ring(producer: Producer) -> Iterator[RingBuffer]:
    made = RingBuffer(producer.fd, SIZE)
    yield made
    made.close()


def read(ring: RingBuffer, limit: int = 100) -> list[bytes]:
    return [bytes(record) for record in ring.records(limit)]


def test_records_in_order(ring: RingBuffer, producer: Producer) -> None:
    assert read(ring) == []
    producer.put(b"one")
    producer.put(b"two, longer")
    assert read(ring) == [b"one", b"two, longer"]
    assert read(ring) == [] and producer.consumed() == producer.position


def test_a_record_that_is_not_yet_submitted(ring: RingBuffer, producer: Producer) -> None:
    producer.put(b"one")
    at = producer.put(b"two", BUSY)
    producer.put(b"three")
    assert read(ring) == [b"one"]
    for place in (at, at + SIZE):
        os.pwrite(producer.fd, struct.pack("=I", 3), place)
    assert read(ring) == [b"two", b"three"]


def test_a_discarded_record(ring: RingBuffer, producer: Producer) -> None:
    producer.put(b"one", DISCARD)
    producer.put(b"two")
    assert read(ring) == [b"two"]
    producer.put(b"three", DISCARD)
    assert read(ring) == [] and producer.consumed() == producer.position


def test_around_the_end(ring: RingBuffer, producer: Producer) -> None:
    for number in range(100):
        payload = bytes([number]) * (97 + number)
        producer.put(payload)
        assert read(ring) == [payload]


def test_a_limit(ring: RingBuffer, producer: Producer) -> None:
    for text in (b"one", b"two", b"three"):
        producer.put(text)
    assert read(ring, 2) == [b"one", b"two"]
    assert read(ring, 2) == [b"three"]


def test_events(producer: Producer) -> None:
    key = flow_key(7, bytes(16), bytes(16), 80, 1000, 6)
    reader = EventReader(producer.fd, SIZE)
    producer.put(EVENT.struct.pack(1, key, 2, 3, 4, 60, 2, Verdict.DROP, DropReason.VLAN, 1, 0))
    producer.put(b"too short")
    (event,) = reader.read()
    reader.close()
    assert event.key.pack() == key and (event.time, event.rule, event.identity) == (1, 2, 3)
    assert (event.reason, event.direction, event.length) == (DropReason.VLAN, Direction.EGRESS, 60)
