"""Blocks against a kernel that the test plays store by store: every interleaving gives every frame once."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from isolator.datapath.ring import VNET, Blocks, Reading, RingStatistics

BLOCK = 1024
COUNT = 3
FIRST = 48
MAC = 92
KERNEL, USER = 0, 1
SEC, NSEC, SNAPLEN, LEN, MAC_NET = 4, 8, 12, 16, 24  # tpacket3_hdr, what is written after the data


@dataclass
class Slot:
    """A frame's place in the open block, and the stores that are still to come."""

    at: int
    payload: bytes
    stores: list[tuple[int, int]] = field(default_factory=list)


class FakeKernel:
    """net/packet/af_packet.c's side of the ring, one store at a time."""

    def __init__(self) -> None:
        self.memory = bytearray(BLOCK * COUNT)
        self.active = 0
        self.frozen = False
        self.filling: list[Slot] = []
        self.clock = 1_700_000_000
        self._open_block()

    def word(self, at: int) -> int:
        return int(struct.unpack_from("=I", self.memory, at)[0])

    def store(self, at: int, value: int) -> None:
        struct.pack_into("=I", self.memory, at, value)

    @property
    def base(self) -> int:
        return self.active * BLOCK

    def _open_block(self) -> None:
        self.frozen = False
        self.previous = self.at = self.base + FIRST
        for offset, value in ((12, 0), (16, FIRST), (20, FIRST)):  # num_pkts, offset_to_first_pkt, blk_len
            self.store(self.base + offset, value)

    def take(self, payload: bytes, context: int, order: list[int], whole: int | None = None) -> Slot | None:
        """prb_fill_curr_block, retiring a full block first. None: no block is free, the frame is dropped."""
        size = MAC + len(payload) + 7 & ~7
        if self.frozen:
            if self.word(self.base + 8) == USER:
                return None
            self._open_block()
        if self.at + size >= self.base + BLOCK:
            if self.filling:
                return None  # the kernel would spin until they are done
            self.retire()
            if self.frozen:
                return None
        slot = Slot(self.at, payload)
        self.store(self.at, size)
        self.store(self.at + 28, context)
        self.store(self.base + 12, self.word(self.base + 12) + 1)
        self.store(self.base + 20, self.word(self.base + 20) + size)
        self.previous = self.at
        self.at += size
        self.clock += 1
        values = {SEC: self.clock, NSEC: self.clock % 999 + 1, SNAPLEN: len(payload),
                  LEN: whole or len(payload), MAC_NET: MAC | MAC + 14 << 16}  # fmt: skip
        slot.stores = [(key, values[key]) for key in order]
        self.memory[slot.at + MAC - VNET : slot.at + MAC + len(payload)] = b"v" * VNET + payload
        self.filling.append(slot)
        return slot

    def step(self, slot: Slot) -> None:
        """One store of tpacket_rcv after the data; the compiler may order them as it likes."""
        offset, value = slot.stores.pop(0)
        self.store(slot.at + offset, value)
        if not slot.stores:
            self.filling.remove(slot)

    def abandon(self, slot: Slot) -> None:
        """virtio_net_hdr_from_skb failed: the place is taken and stays without a frame."""
        self.filling.remove(slot)

    def clear_last(self) -> None:
        """prb_close_block's first store."""
        self.store(self.previous, 0)

    def retire(self) -> None:
        self.clear_last()
        self.store(self.base + 8, USER)
        self.active = (self.active + 1) % COUNT
        if self.word(self.base + 8) == USER:
            self.frozen = True  # prb_freeze_queue
        else:
            self._open_block()


ORDER = [SEC, NSEC, SNAPLEN, LEN, MAC_NET]


class Interleavings(RuleBasedStateMachine):
    reading = Reading.OPEN

    def __init__(self) -> None:
        super().__init__()
        self.kernel = FakeKernel()
        self.statistics = RingStatistics()
        self.blocks = Blocks(self.kernel.memory, BLOCK, self.reading, self.statistics)
        self.expected: list[tuple[bytes, int]] = []
        self.taken: list[tuple[Slot, tuple[bytes, int]]] = []
        self.got = 0

    @rule(size=st.integers(14, 300), order=st.permutations(ORDER), cut=st.booleans())
    def take(self, size: int, order: list[int], cut: bool) -> None:
        context = len(self.taken) + 1
        payload = struct.pack("=I", context) + b"p" * (size - 4)
        slot = self.kernel.take(payload, context, order, size + 1 if cut and size % 3 == 0 else None)
        if slot is not None:
            if not (cut and size % 3 == 0):
                self.expected.append((payload, context))
            self.taken.append((slot, (payload, context)))

    @precondition(lambda self: self.kernel.filling)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.kernel.step(data.draw(st.sampled_from(self.kernel.filling)))

    @precondition(lambda self: self.kernel.filling)
    @rule()
    def fill(self) -> None:
        slot = self.kernel.filling[0]
        while slot.stores:
            self.kernel.step(slot)

    @precondition(lambda self: any(len(slot.stores) == len(ORDER) for slot in self.kernel.filling))
    @rule()
    def abandon(self) -> None:
        slot = next(slot for slot in self.kernel.filling if len(slot.stores) == len(ORDER))
        self.kernel.abandon(slot)
        content = next(content for taken, content in self.taken if taken is slot)
        if content in self.expected:
            self.expected.remove(content)

    @precondition(lambda self: not self.kernel.filling and not self.kernel.frozen)
    @rule(look=st.integers(0, 3))
    def retire(self, look: int) -> None:
        if self.kernel.at > self.kernel.base + FIRST:
            self.kernel.clear_last()
            self.poll(look)
            self.kernel.retire()

    @rule(budget=st.integers(1, 5))
    def poll(self, budget: int) -> None:
        if budget:
            waiting = self.blocks.waiting
            frames = self.blocks.poll(budget)
            assert waiting or not frames, "a frame that nobody would be woken for"
            for frame in frames:
                payload, context = self.expected[self.got]
                assert (bytes(frame.packet), frame.context) == (payload, context)
                assert bytes(frame.vnet_packet) == b"v" * VNET + payload
                assert frame.time > 1_700_000_000_000_000_000
                self.got += 1

    @invariant()
    def counts_agree(self) -> None:
        assert self.statistics.frames == self.got

    def teardown(self) -> None:
        """Once everything is filled and closed, everything was read, and the ring is empty."""
        while self.kernel.filling:
            self.fill()
        if not self.kernel.frozen and self.kernel.at > self.kernel.base + FIRST:
            self.kernel.retire()
        for _ in range(200):
            self.poll(5)
        assert self.got == len(self.expected)
        assert self.statistics.truncated + self.statistics.unfilled + self.got == len(self.taken)
        for start in range(0, BLOCK * COUNT, BLOCK):
            assert not any(self.kernel.memory[start + FIRST : start + BLOCK])


class ClosedInterleavings(Interleavings):
    reading = Reading.CLOSED


TestOpen = Interleavings.TestCase
TestClosed = ClosedInterleavings.TestCase
TestOpen.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestClosed.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


def _blocks(kernel: FakeKernel, reading: Reading) -> Blocks:
    return Blocks(kernel.memory, BLOCK, reading, RingStatistics())


def _fill(kernel: FakeKernel, payload: bytes) -> None:
    slot = kernel.take(payload, 7, ORDER)
    assert slot is not None
    while slot.stores:
        kernel.step(slot)


@pytest.mark.parametrize(("reading", "seen"), [(Reading.OPEN, 1), (Reading.CLOSED, 0)])
def test_an_open_block_is_read_only_in_open_mode(reading: Reading, seen: int) -> None:
    kernel = FakeKernel()
    blocks = _blocks(kernel, reading)
    _fill(kernel, b"a" * 60)
    assert len(blocks.poll()) == seen
    kernel.retire()
    assert len(blocks.poll()) == 1 - seen
    assert blocks.poll() == []


def test_frames_live_until_the_next_poll() -> None:
    kernel = FakeKernel()
    blocks = _blocks(kernel, Reading.OPEN)
    _fill(kernel, b"a" * 60)
    kernel.retire()
    (frame,) = blocks.poll()
    assert bytes(frame.packet) == b"a" * 60  # read to its end, and not handed back yet
    assert blocks.poll() == []
    assert bytes(frame.packet) == bytes(60)  # zeroed


def test_poll_goes_on_to_the_next_block_at_once() -> None:
    kernel = FakeKernel()
    blocks = _blocks(kernel, Reading.OPEN)
    _fill(kernel, b"a" * 60)
    assert len(blocks.poll()) == 1
    kernel.retire()
    _fill(kernel, b"b" * 60)
    (frame,) = blocks.poll()
    assert bytes(frame.packet) == b"b" * 60


@pytest.mark.parametrize("rest", range(8, 64, 8))
def test_a_block_filled_to_its_last_bytes(rest: int) -> None:
    """Where the next header would stand, the next block begins, or the ring ends: nothing is read there."""
    kernel = FakeKernel()
    blocks = _blocks(kernel, Reading.OPEN)
    for _ in range(2 * COUNT):
        _fill(kernel, b"a" * (BLOCK - FIRST - MAC - rest))
        assert len(blocks.poll()) == 1
        assert blocks.poll() == []
        kernel.retire()
        assert blocks.poll() == []
