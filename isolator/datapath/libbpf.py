"""A small binding to libbpf.so.1 (1.1 or later): objects, programs, test runs.

Stages: `Object.open` reads an ELF object, `pin`/`reuse` say which maps outlive the process, `load` gives
everything to the kernel, `map_fd`/`program_fd` name what came of it. Map access is in maps.py, attaching in
attach.py. libbpf's own printing is off; what the verifier said stands in the error.

Calls go through PyDLL, which keeps the GIL: a map update takes the kernel well under a microsecond, and
giving the GIL away and getting it back costs more than that.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, Self

from isolator.datapath.errors import DatapathError

LOG_BYTES = 1 << 18  # room for the end of the verifier's log of a refused program
MAPS_MAX = 64  # that one program uses (MAX_USED_MAPS, include/linux/bpf_verifier.h)
LOG_LINES = 12  # of it shown in an error: the verdict stands at the end


class BpfError(DatapathError):
    """A call of bpf(2) or libbpf failed. `errno` is the kernel's."""

    def __init__(self, what: str, error: int = 0, advice: str = "") -> None:
        self.errno = error
        reason = f": {os.strerror(error)}" if error else ""
        super().__init__(f"{what}{reason}{f' ({advice})' if advice else ''}")


class LibbpfMissingError(BpfError):
    """libbpf.so.1 cannot be loaded."""


class LoadError(BpfError):
    """The kernel refused an object. `log` is the end of the verifier's log."""

    def __init__(self, what: str, error: int, log: str) -> None:
        self.log = log
        super().__init__(what, error, log)


class MapType(IntEnum):
    """enum bpf_map_type (linux/bpf.h), those that are used here."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11
    RINGBUF = 27


@dataclass(frozen=True, slots=True)
class MapDefinition:
    """What must be equal for a pinned map to be the same map."""

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


class _OpenOptions(ctypes.Structure):  # struct bpf_object_open_opts
    _fields_ = (
        ("sz", c_size_t),
        ("object_name", c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", c_char_p),
        ("pad", c_uint32),
        ("kconfig", c_char_p),
        ("btf_custom_path", c_char_p),
        ("kernel_log_buf", c_void_p),
        ("kernel_log_size", c_size_t),
        ("kernel_log_level", c_uint32),
        ("end", c_size_t * 0),
    )


class TestRunOptions(ctypes.Structure):
    """struct bpf_test_run_opts (bpf/bpf.h)."""

    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class MapInfo(ctypes.Structure):
    """The beginning of struct bpf_map_info (linux/bpf.h)."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", c_char * 16),
        ("ifindex", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("btf_id", c_uint32),  # 0: it was made without
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
    )


class _ProgramInfo(ctypes.Structure):  # the beginning of struct bpf_prog_info (linux/bpf.h)
    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_char * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
    )


_FD, _POINTER, _TEXT = c_int, c_void_p, c_char_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "libbpf_set_print": (_POINTER, (_POINTER,)),
    "bpf_object__open_file": (_POINTER, (_TEXT, _POINTER)),
    "bpf_object__load": (c_int, (_POINTER,)),
    "bpf_object__close": (None, (_POINTER,)),
    "bpf_object__next_map": (_POINTER, (_POINTER, _POINTER)),
    "bpf_object__next_program": (_POINTER, (_POINTER, _POINTER)),
    "bpf_map__name": (_TEXT, (_POINTER,)),
    "bpf_map__type": (c_int, (_POINTER,)),
    "bpf_map__key_size": (c_uint32, (_POINTER,)),
    "bpf_map__value_size": (c_uint32, (_POINTER,)),
    "bpf_map__max_entries": (c_uint32, (_POINTER,)),
    "bpf_map__map_flags": (c_uint32, (_POINTER,)),
    "bpf_map__is_internal": (ctypes.c_bool, (_POINTER,)),
    "bpf_map__fd": (_FD, (_POINTER,)),
    "bpf_map__set_pin_path": (c_int, (_POINTER, _TEXT)),
    "bpf_map__reuse_fd": (c_int, (_POINTER, _FD)),
    "bpf_program__name": (_TEXT, (_POINTER,)),
    "bpf_program__fd": (_FD, (_POINTER,)),
    "bpf_prog_query": (c_int, (c_int, c_int, c_uint32, _POINTER, _POINTER, POINTER(c_uint32))),
    "bpf_prog_test_run_opts": (c_int, (_FD, _POINTER)),
    "bpf_obj_get": (_FD, (_TEXT,)),
    "bpf_obj_pin": (c_int, (_FD, _TEXT)),
    "bpf_prog_get_fd_by_id": (_FD, (c_uint32,)),
    "bpf_btf_get_fd_by_id": (_FD, (c_uint32,)),
    "bpf_obj_get_info_by_fd": (c_int, (_FD, _POINTER, POINTER(c_uint32))),
    "bpf_map_lookup_elem": (c_int, (_FD, _POINTER, _POINTER)),
    "bpf_map_update_elem": (c_int, (_FD, _POINTER, _POINTER, c_uint64)),
    "bpf_map_delete_elem": (c_int, (_FD, _POINTER)),
    "bpf_map_get_next_key": (c_int, (_FD, _POINTER, _POINTER)),
    "bpf_map_update_batch": (c_int, (_FD, _POINTER, _POINTER, POINTER(c_uint32), _POINTER)),
    "bpf_map_delete_batch": (c_int, (_FD, _POINTER, POINTER(c_uint32), _POINTER)),
    "bpf_map_lookup_batch": (
        c_int,
        (_FD, _POINTER, _POINTER, _POINTER, _POINTER, POINTER(c_uint32), _POINTER),
    ),
    "bpf_tc_hook_create": (c_int, (_POINTER,)),
    "bpf_tc_hook_destroy": (c_int, (_POINTER,)),
    "bpf_tc_attach": (c_int, (_POINTER, _POINTER)),
    "bpf_tc_detach": (c_int, (_POINTER, _POINTER)),
    "bpf_tc_query": (c_int, (_POINTER, _POINTER)),
    "bpf_xdp_attach": (c_int, (c_int, _FD, c_uint32, _POINTER)),
    "bpf_xdp_query_id": (c_int, (c_int, c_int, POINTER(c_uint32))),
    "libbpf_num_possible_cpus": (c_int, ()),
}


@cache
def library() -> Any:
    """libbpf with typed functions, silent. Raises LibbpfMissingError."""
    try:
        lib = ctypes.PyDLL("libbpf.so.1")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise LibbpfMissingError(f"no libbpf.so.1: {error}", advice="install the package libbpf1") from None
    lib.libbpf_set_print(None)
    return lib


def check(result: int, what: str, advice: str = "") -> int:
    """libbpf 1.x returns -errno. Raises BpfError."""
    if result < 0:
        raise BpfError(what, -result, advice)
    return result


# -- objects ----------------------------------------------------------------------------------------------


class Object:
    """An ELF object on its way into the kernel. File descriptors belong to it and end with `close`."""

    def __init__(self, path: Path, handle: int, log: ctypes.Array[c_char]) -> None:
        self.path = path
        self._handle = handle
        self._log = log
        self._maps = {name: item for item, name in self._walk("map")}
        self._programs = {name: item for item, name in self._walk("program")}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and parse; nothing reaches the kernel yet. Raises BpfError."""
        if not path.exists():
            raise BpfError(f"no BPF object {path}", advice="build it with `make bpf`")
        log = (c_char * LOG_BYTES)()
        options = _OpenOptions(sz=ctypes.sizeof(_OpenOptions), kernel_log_size=LOG_BYTES, kernel_log_level=0)
        options.kernel_log_buf = ctypes.addressof(log)
        handle = library().bpf_object__open_file(os.fsencode(path), byref(options))
        if not handle:
            raise BpfError(f"{path} is not a BPF object")
        return cls(path, handle, log)

    def _walk(self, kind: str) -> Iterator[tuple[int, str]]:
        advance = getattr(library(), f"bpf_object__next_{kind}")
        name = getattr(library(), f"bpf_{kind}__name")
        item = advance(self._handle, None)
        while item:
            yield item, name(item).decode()
            item = advance(self._handle, item)

    def definitions(self) -> list[MapDefinition]:
        """Of all maps that the source declares (not of .rodata and the like), by name."""
        lib = library()
        return [
            MapDefinition(
                name,
                lib.bpf_map__type(item),
                lib.bpf_map__key_size(item),
                lib.bpf_map__value_size(item),
                lib.bpf_map__max_entries(item),
                lib.bpf_map__map_flags(item),
            )
            for name, item in sorted(self._maps.items())
            if not lib.bpf_map__is_internal(item)
        ]

    def pin(self, name: str, path: Path) -> None:
        """`load` takes the map from this pin if it is there, and pins it there if not."""
        check(library().bpf_map__set_pin_path(self._maps[name], os.fsencode(path)), f"cannot pin map {name}")

    def reuse(self, name: str, fd: int) -> None:
        """`load` takes this map instead of making one."""
        check(library().bpf_map__reuse_fd(self._maps[name], fd), f"cannot reuse map {name}")

    def load(self) -> None:
        """Create maps, verify programs. Raises LoadError with the end of the verifier's log."""
        result = library().bpf_object__load(self._handle)
        if result < 0:
            raise LoadError(f"the kernel refuses {self.path.name}", -result, log_tail(self._log.value))

    def map_fd(self, name: str) -> int:
        return check(library().bpf_map__fd(self._maps[name]), f"no map {name} in {self.path.name}")

    def program_fd(self, name: str) -> int:
        if name not in self._programs:
            raise BpfError(f"no program {name} in {self.path.name}", advice="build it anew with `make bpf`")
        return check(library().bpf_program__fd(self._programs[name]), f"program {name} is not loaded")

    @property
    def programs(self) -> list[str]:
        return list(self._programs)

    def close(self) -> None:
        """Close every file descriptor. What is attached or pinned stays."""
        if self._handle:
            library().bpf_object__close(self._handle)
        self._handle = 0
        self._maps, self._programs = {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def log_tail(log: bytes) -> str:
    lines = [line for line in log.decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-LOG_LINES:]) or "the verifier says nothing"


# -- pins -------------------------------------------------------------------------------------------------


def open_pin(path: Path) -> int:
    """A new file descriptor for what is pinned there. Raises BpfError (ENOENT: nothing is)."""
    return check(library().bpf_obj_get(os.fsencode(path)), f"cannot open pin {path}")


def map_information(fd: int, name: str) -> MapInfo:
    """What the kernel says of a map. `name` because the kernel keeps 15 characters only. Raises BpfError."""
    info = MapInfo()
    length = c_uint32(ctypes.sizeof(info))
    check(library().bpf_obj_get_info_by_fd(fd, byref(info), byref(length)), f"cannot read about map {name}")
    return info


def map_definition(fd: int, name: str) -> MapDefinition:
    """What must be equal for it to be the same map. Raises BpfError."""
    info = map_information(fd, name)
    return MapDefinition(name, info.type, info.key_size, info.value_size, info.max_entries, info.map_flags)


def maps_of(program_id: int) -> set[int]:
    """The ids of the maps that a loaded program uses. Raises BpfError."""
    fd = check(library().bpf_prog_get_fd_by_id(program_id), f"cannot open program {program_id}")
    try:
        ids = (c_uint32 * MAPS_MAX)()
        info = _ProgramInfo(nr_map_ids=MAPS_MAX, map_ids=ctypes.addressof(ids))
        length = c_uint32(ctypes.sizeof(info))
        told = library().bpf_obj_get_info_by_fd(fd, byref(info), byref(length))
        check(told, f"cannot read about program {program_id}")
        return set(ids[: info.nr_map_ids])
    finally:
        os.close(fd)


# -- running a program without a packet -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """What a test run came to: the program's return value, the packet and the context behind it."""

    retval: int
    data: bytes
    context: bytes


def run_program(program_fd: int, data: bytes, context: bytes = b"", room: int = 512) -> Run:
    """BPF_PROG_TEST_RUN with a packet (kernel: net/bpf/test_run.c).

    `data` starts at the Ethernet header; `room` is for what the program adds. Raises BpfError: EINVAL for
    less than 14 bytes, or for a context with fields that may not be set.
    """
    given = ctypes.create_string_buffer(data, len(data))
    out = ctypes.create_string_buffer(len(data) + room)
    options = TestRunOptions(sz=ctypes.sizeof(TestRunOptions), data_size_in=len(data), data_size_out=len(out))
    options.data_in, options.data_out = ctypes.addressof(given), ctypes.addressof(out)
    context_in = ctypes.create_string_buffer(context, max(len(context), 1))
    context_out = ctypes.create_string_buffer(max(len(context), 1))
    if context:
        options.ctx_in, options.ctx_out = ctypes.addressof(context_in), ctypes.addressof(context_out)
        options.ctx_size_in = options.ctx_size_out = len(context)
    check(library().bpf_prog_test_run_opts(program_fd, byref(options)), "test run failed")
    return Run(options.retval, out.raw[: options.data_size_out], context_out.raw[: options.ctx_size_out])


def possible_cpus() -> int:
    """How many values a per-CPU map's entry has."""
    return check(library().libbpf_num_possible_cpus(), "cannot count CPUs")


def missing(error: BpfError) -> bool:
    """The key, or the pin, is not there."""
    return error.errno == errno.ENOENT
