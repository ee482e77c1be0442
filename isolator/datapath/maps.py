"""BPF maps by file descriptor: keys and values as bytes, one or many at a time.

What the bytes mean is abi.py's business, and who may write which map is bpf.py's.
"""

from __future__ import annotations

import ctypes
import errno
import platform
from array import array
from collections.abc import Iterable, Iterator
from ctypes import byref, c_uint32
from itertools import islice
from typing import Self, TypeVar

from isolator.datapath.libbpf import (
    BpfError,
    MapDefinition,
    MapType,
    library,
    map_definition,
    possible_cpus,
)

BATCH = 4096  # entries per batch call: bounds how long the kernel is busy at a stretch
BATCH_BYTES = 1 << 20  # and the buffers for what it reads
ANY, NOEXIST, EXIST = 0, 1, 2  # BPF_ANY … (linux/bpf.h)
_MEMBARRIER = {"x86_64": 324, "aarch64": 283}  # __NR_membarrier
_MEMBARRIER_GLOBAL = 1
_PER_CPU = (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY)


class Map:
    """One map. The file descriptor belongs to whoever opened it. For one thread: lookups share a buffer."""

    __slots__ = ("_delete", "_lookup", "_update", "_value", "definition", "fd", "value_room")

    def __init__(self, fd: int, definition: MapDefinition) -> None:
        self.fd = fd
        self.definition = definition
        size = definition.value_size
        # a per-CPU value is given back once per possible CPU, each rounded up to 8 bytes
        self.value_room = (size + 7 & ~7) * possible_cpus() if definition.type in _PER_CPU else size
        self._value = ctypes.create_string_buffer(max(self.value_room, 1))
        lib = library()
        self._lookup, self._update = lib.bpf_map_lookup_elem, lib.bpf_map_update_elem
        self._delete = lib.bpf_map_delete_elem

    @classmethod
    def of(cls, fd: int, name: str) -> Self:
        return cls(fd, map_definition(fd, name))

    # -- one entry ---------------------------------------------------------------------------------------

    def lookup(self, key: bytes) -> bytes | None:
        """The value (per CPU: all of them in a row), or None."""
        result = self._lookup(self.fd, key, self._value)
        if result == 0:
            return self._value.raw[: self.value_room]
        if result == -errno.ENOENT:
            return None
        raise self._error("lookup", result)

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        """Raises BpfError: E2BIG or ENOSPC when the map is full, EEXIST with NOEXIST."""
        self._sizes(key, value)
        if result := self._update(self.fd, key, value, flags):
            raise self._error("update", result)

    def delete(self, key: bytes) -> bool:
        """False: it was not there."""
        result = self._delete(self.fd, key)
        if result not in (0, -errno.ENOENT):
            raise self._error("delete", result)
        return bool(result == 0)

    # -- all of them -------------------------------------------------------------------------------------

    def keys(self) -> Iterator[bytes]:
        """Key after key. One deleted meanwhile makes the kernel start over: a key may come twice."""
        following = ctypes.create_string_buffer(self.definition.key_size)
        advance, key = library().bpf_map_get_next_key, None
        while (result := advance(self.fd, key, following)) == 0:
            key = following.raw
            yield key
        if result != -errno.ENOENT:
            raise self._error("next key", result)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry, read in batches (not for per-CPU maps). What changes meanwhile may come, or not."""
        room = max(1, min(BATCH, BATCH_BYTES // self.value_room, self.definition.max_entries))
        token, started = ctypes.create_string_buffer(max(self.definition.key_size, 4)), False
        keys, values = self._room(room)
        while True:
            count = c_uint32(room)
            result = library().bpf_map_lookup_batch(
                self.fd, token if started else None, token, keys.obj, values.obj, byref(count), None
            )
            if result == -errno.ENOSPC:  # a hash bucket longer than the room
                room *= 2
                keys, values = self._room(room)
                continue
            if result not in (0, -errno.ENOENT):
                raise self._error("batch lookup", result)
            yield from self._cut(keys, values, count.value)
            if result:
                return
            started = True

    def _room(self, entries: int) -> tuple[memoryview, memoryview]:
        """Buffers for so many keys and values."""
        sizes = (self.definition.key_size, self.value_room)
        keys, values = (memoryview(ctypes.create_string_buffer(size * entries)).cast("B") for size in sizes)
        return keys, values

    def _cut(self, keys: memoryview, values: memoryview, count: int) -> Iterator[tuple[bytes, bytes]]:
        k, v = self.definition.key_size, self.value_room
        for at in range(count):
            yield bytes(keys[at * k : (at + 1) * k]), bytes(values[at * v : (at + 1) * v])

    def update_many(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Batched. Raises BpfError; then some of the entries may be there."""
        for chunk in _chunks(entries):
            keys, values = b"".join(key for key, _ in chunk), b"".join(value for _, value in chunk)
            count = c_uint32(len(chunk))
            result = library().bpf_map_update_batch(self.fd, keys, values, byref(count), None)
            if result:
                raise self._error(f"batch update (entry {count.value} of {len(chunk)})", result)

    def delete_many(self, keys: Iterable[bytes]) -> None:
        """Batched; keys that are not there do not matter."""
        for chunk in _chunks(list(keys)):  # all before the first goes: they may come from the map itself
            while chunk:
                count = c_uint32(len(chunk))
                result = library().bpf_map_delete_batch(self.fd, b"".join(chunk), byref(count), None)
                if result not in (0, -errno.ENOENT):
                    raise self._error("batch delete", result)
                chunk = chunk[count.value + 1 :] if result else []

    def sums(self, first: int, count: int) -> array[int]:
        """Of a per-CPU array of 64-bit counters: entries [first, first + count), each over all CPUs."""
        if not count:
            return array("Q")
        keys, values = self._room(count)
        token = ctypes.create_string_buffer((first - 1).to_bytes(4, "little"), 4)
        given = c_uint32(count)
        result = library().bpf_map_lookup_batch(
            self.fd, token, token, keys.obj, values.obj, byref(given), None
        )
        if result not in (0, -errno.ENOENT) or given.value != count:
            raise self._error("batch lookup", result)
        cpus = self.value_room // 8
        each = array("Q", bytes(values))
        return array("Q", map(sum, zip(*(each[cpu::cpus] for cpu in range(cpus)), strict=True)))

    def clear(self) -> None:
        self.delete_many(list(self.keys()))

    def _sizes(self, key: bytes, value: bytes) -> None:
        """The kernel copies as much as the map says: a short buffer would be read beyond its end."""
        if len(key) != self.definition.key_size or len(value) != self.value_room:
            raise ValueError(f"{self.definition.name}: {len(key)} bytes of key, {len(value)} of value")

    def _error(self, what: str, result: int) -> BpfError:
        full = (
            f"{self.definition.max_entries} entries at most" if -result in (errno.E2BIG, errno.ENOSPC) else ""
        )
        return BpfError(f"map {self.definition.name}: {what} failed", -result, full)


_T = TypeVar("_T")


def _chunks(entries: Iterable[_T]) -> Iterator[list[_T]]:
    source = iter(entries)
    while chunk := list(islice(source, BATCH)):
        yield chunk


def wait_for_readers() -> None:
    """Return when no program runs any more that began before: membarrier(2) waits for an RCU grace period.

    What a program read before it, such as a generation, it goes by until it ends.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_MEMBARRIER[platform.machine()], _MEMBARRIER_GLOBAL, 0, 0):
        raise BpfError("membarrier failed", ctypes.get_errno())
