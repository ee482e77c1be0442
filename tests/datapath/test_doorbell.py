"""Doorbell and control word against a real BPF program: one bell a sleep, and none while Python is awake."""

from __future__ import annotations

import mmap
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from isolator.datapath.abi import CONTROL
from isolator.datapath.doorbell import Control, Doorbell, DoorbellError
from tests.datapath.ring_testbed import ARRAY, MMAPABLE, RINGBUF, create_map, load_bell, test_run

pytestmark = pytest.mark.root


@dataclass
class Bell:
    doorbell: Doorbell
    control: Control
    program: int
    poller: select.epoll

    def awake(self) -> bool:
        return bool(self.poller.poll(0.05))


@pytest.fixture
def bell() -> Iterator[Bell]:
    control_fd = create_map(ARRAY, 4, CONTROL.size, 1, MMAPABLE)
    doorbell_fd = create_map(RINGBUF, 0, 0, mmap.PAGESIZE)
    program = load_bell(control_fd, doorbell_fd, CONTROL.offsets["need_wakeup"])
    poller = select.epoll()
    bell = Bell(Doorbell(doorbell_fd), Control(control_fd), program, poller)
    poller.register(bell.doorbell.fileno(), select.EPOLLIN)
    yield bell
    poller.close()
    bell.doorbell.close()
    bell.control.close()
    for fd in (control_fd, doorbell_fd, program):
        os.close(fd)


def test_one_bell_a_sleep(bell: Bell) -> None:
    assert not bell.awake()
    test_run(bell.program)  # awake: no bell
    assert not bell.awake() and not bell.doorbell.rung

    for _ in range(3000):  # more records than the buffer holds: clear() gives their room back
        bell.control.need_wakeup = True
        test_run(bell.program)
        assert bell.doorbell.rung and not bell.control.need_wakeup
        test_run(bell.program)  # the second frame finds the word cleared
        bell.doorbell.clear()
        assert not bell.doorbell.rung

    bell.control.need_wakeup = True
    test_run(bell.program)
    assert bell.awake()
    bell.doorbell.clear()
    assert not bell.awake()


def test_a_bell_that_fails_leaves_the_word_set(bell: Bell) -> None:
    for _ in range(mmap.PAGESIZE // 16 + 10):
        bell.control.need_wakeup = True
        test_run(bell.program)
    assert bell.control.need_wakeup  # the buffer is full: nothing was rung, and nothing is said to be
    bell.doorbell.clear()
    test_run(bell.program)
    assert bell.awake() and not bell.control.need_wakeup


def test_control_words_do_not_touch_each_other(bell: Bell) -> None:
    control = bell.control
    control.heartbeat = 2**64 - 1
    control.heartbeat_max = 3 << 32
    control.generation = 2**32 - 1
    control.punt_ifindex = 77
    control.need_wakeup = True
    assert (control.heartbeat, control.heartbeat_max) == (2**64 - 1, 3 << 32)
    assert (control.generation, control.punt_ifindex, control.need_wakeup) == (2**32 - 1, 77, True)
    control.need_wakeup = False
    assert (control.generation, control.punt_ifindex, control.need_wakeup) == (2**32 - 1, 77, False)


def test_the_wrong_map_is_one_clear_error() -> None:
    fd = create_map(ARRAY, 4, CONTROL.size, 1)  # not mmapable
    try:
        with pytest.raises(DoorbellError, match="control map"):
            Control(fd)
        with pytest.raises(DoorbellError, match="doorbell's map"):
            Doorbell(fd)
    finally:
        os.close(fd)
