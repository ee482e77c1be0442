"""How the kernel wakes a sleeping Python, and what else both sides keep in the control map.

Before it sleeps Python sets `need_wakeup`, polls the ring once more, and waits for the doorbell. The tc
program behind the ring sees the word, writes one record into the doorbell's BPF ring buffer and, only if that
succeeded, clears the word. So a bell is rung once a sleep, and frames that find Python awake cost nothing.
A frame stands in the ring before the program runs: taps come before tc (__netif_receive_skb_core).
"""

from __future__ import annotations

import mmap

from isolator.datapath.abi import CONTROL
from isolator.datapath.errors import DatapathError
from isolator.datapath.ring import fence

_PAGE = mmap.PAGESIZE


class DoorbellError(DatapathError):
    """A map can't be mapped: not of the kind that is needed, or no permission."""


class Doorbell:
    """The consumer's side of a BPF ring buffer whose records say nothing: only that there is one matters.

    Layout (kernel/bpf/ringbuf.c): page 0 begins with the consumer's position, ours to write; page 1 with the
    producer's, which is read-only. Both are 64-bit and only grow. The file is readable while they differ.
    """

    def __init__(self, map_fd: int) -> None:
        """Keeps no hold of `map_fd`, which must outlive the doorbell for `fileno`."""
        self._fd = map_fd
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            self._consumer_page = mmap.mmap(map_fd, _PAGE, mmap.MAP_SHARED, writable)
            self._producer_page = mmap.mmap(map_fd, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ, offset=_PAGE)
        except OSError as error:
            raise DoorbellError(f"the doorbell's map can't be mapped: {error}") from error
        self._consumer = memoryview(self._consumer_page).cast("Q")
        self._producer = memoryview(self._producer_page).cast("Q")

    def fileno(self) -> int:
        return self._fd

    @property
    def rung(self) -> bool:
        return self._producer[0] != self._consumer[0]

    def clear(self) -> None:
        """Takes every record. Clear first, then poll the ring: a frame after that rings again."""
        self._consumer[0] = self._producer[0]
        fence()

    def close(self) -> None:
        self._consumer.release()
        self._producer.release()
        self._consumer_page.close()
        self._producer_page.close()


class Control:
    """struct control (bpf/isolator.h), mapped. Each word is read and written by one access, never torn."""

    def __init__(self, map_fd: int) -> None:
        """`map_fd`: an array map made with BPF_F_MMAPABLE; may be closed afterwards."""
        try:
            self._map = mmap.mmap(map_fd, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise DoorbellError(f"the control map can't be mapped: {error}") from error
        self._view = memoryview(self._map)
        self._words = self._view.cast("I")
        self._longs = self._view.cast("Q")

    @property
    def heartbeat(self) -> int:
        """CLOCK_MONOTONIC in ns, of the agent's last sign of life."""
        return self._longs[_HEARTBEAT]

    @heartbeat.setter
    def heartbeat(self, now: int) -> None:
        self._longs[_HEARTBEAT] = now

    @property
    def heartbeat_max(self) -> int:
        """ns; with a heartbeat older than this the agent is down."""
        return self._longs[_HEARTBEAT_MAX]

    @heartbeat_max.setter
    def heartbeat_max(self, age: int) -> None:
        self._longs[_HEARTBEAT_MAX] = age

    @property
    def frozen_until(self) -> int:
        """CLOCK_MONOTONIC in ns; until then no inspected flow changes: its packets are dropped."""
        return self._longs[_FROZEN_UNTIL]

    @frozen_until.setter
    def frozen_until(self, until: int) -> None:
        self._longs[_FROZEN_UNTIL] = until

    @property
    def need_wakeup(self) -> bool:
        """Python sleeps, or is about to: ring the doorbell once."""
        return self._words[_NEED_WAKEUP] != 0

    @need_wakeup.setter
    def need_wakeup(self, asleep: bool) -> None:
        self._words[_NEED_WAKEUP] = asleep
        fence()  # or the poll that follows could read the ring before the kernel sees this word

    @property
    def generation(self) -> int:
        """The policy in force."""
        return self._words[_GENERATION]

    @generation.setter
    def generation(self, generation: int) -> None:
        self._words[_GENERATION] = generation

    @property
    def punt_ifindex(self) -> int:
        """Frames for Python are redirected to this interface."""
        return self._words[_PUNT_IFINDEX]

    @punt_ifindex.setter
    def punt_ifindex(self, ifindex: int) -> None:
        self._words[_PUNT_IFINDEX] = ifindex

    def close(self) -> None:
        self._words.release()
        self._longs.release()
        self._view.release()
        self._map.close()


_HEARTBEAT = CONTROL.offsets["heartbeat"] // 8
_HEARTBEAT_MAX = CONTROL.offsets["heartbeat_max"] // 8
_FROZEN_UNTIL = CONTROL.offsets["frozen_until"] // 8
_NEED_WAKEUP = CONTROL.offsets["need_wakeup"] // 4
_GENERATION = CONTROL.offsets["generation"] // 4
_PUNT_IFINDEX = CONTROL.offsets["punt_ifindex"] // 4
