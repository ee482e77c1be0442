"""What the tests of ring, sender and doorbell stand on: namespaces, veth pairs, and a bpf(2) of their own."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pyroute2 import IPRoute  # type: ignore[import-untyped]

from isolator.datapath.netns import Netns

PUNT_MTU = 65535
_NUMBERS = itertools.count()


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Net:
    """A network namespace of the tests' own, without IPv6, so that nothing is sent that no test sent."""

    def __init__(self) -> None:
        self.name = f"rgt-{os.getpid()}-{next(_NUMBERS)}"
        self.path = Path("/run/netns") / self.name
        ip("netns", "add", self.name)
        self.netns = Netns(self.name)
        self.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
        ip("-n", self.name, "link", "set", "dev", "lo", "up")

    def run(self, *words: str) -> str:
        command = ["nsenter", f"--net={self.path}", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def ifindex(self, interface: str) -> int:
        return int(ip("-n", self.name, "-o", "link", "show", "dev", interface).split(":")[0])

    def delete(self) -> None:
        self.netns.close()
        ip("netns", "del", self.name)


@contextlib.contextmanager
def nets(count: int) -> Iterator[list[Net]]:
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            net = Net()
            stack.callback(net.delete)
            made.append(net)
        yield made


def pair(one: Net, name: str, other: Net, other_name: str, mtu: int = PUNT_MTU) -> None:
    """A veth pair, both ends up."""
    size = str(mtu)
    ip("-n", one.name, "link", "add", "name", name, "mtu", size, "type", "veth",
       "peer", "name", other_name, "mtu", size, "netns", other.name)  # fmt: skip
    ip("-n", one.name, "link", "set", "dev", name, "up")
    ip("-n", other.name, "link", "set", "dev", other_name, "up")


# -- bpf(2) -----------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
MAP_CREATE, PROG_LOAD, OBJ_PIN, PROG_TEST_RUN = 0, 5, 6, 10
ARRAY, RINGBUF, MMAPABLE = 2, 27, 1 << 10
SCHED_CLS = 3


def bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    result: int = _libc.syscall(_SYS_BPF, command, buffer, len(buffer))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def create_map(kind: int, key: int, value: int, entries: int, flags: int = 0) -> int:
    return bpf(MAP_CREATE, struct.pack("=5I", kind, key, value, entries, flags))


def _op(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, target | source << 4, offset, value)


def load_bell(control_fd: int, doorbell_fd: int, need_wakeup: int) -> int:
    """The program behind the ring: rings the doorbell once a sleep, and shoots every frame."""
    shot, force_wakeup, ringbuf_output = 2, 2, 130
    code = b"".join(
        (
            _op(0x18, 6, 2, 0, control_fd) + _op(0, 0, 0, 0, need_wakeup),  # r6 = &control.need_wakeup
            _op(0x61, 1, 6),  # r1 = *(u32 *)r6
            _op(0x15, 1, 0, 9, 0),  # if (!r1) goto out
            _op(0x7A, 10, 0, -8, 0),  # *(u64 *)(r10 - 8) = 0
            _op(0x18, 1, 1, 0, doorbell_fd) + _op(0),
            _op(0xBF, 2, 10) + _op(0x07, 2, 0, 0, -8),
            _op(0xB7, 3, 0, 0, 8) + _op(0xB7, 4, 0, 0, force_wakeup),
            _op(0x85, 0, 0, 0, ringbuf_output),
            _op(0x55, 0, 0, 1, 0),  # if (r0) goto out
            _op(0x62, 6, 0, 0, 0),  # *(u32 *)r6 = 0
            _op(0xB7, 0, 0, 0, shot) + _op(0x95),  # out: return TC_ACT_SHOT
        )
    )
    return _load(code)


def load_punt(context: int, ifindex: int) -> int:
    """What the classifier does to punt: sets the frame's hash, redirects it to the punt pair."""
    redirect, set_hash = 23, 48
    code = b"".join(
        (
            _op(0xB4, 2, 0, 0, context),  # w2 = context
            _op(0x85, 0, 0, 0, set_hash),  # r1 is the frame
            _op(0xB7, 1, 0, 0, ifindex) + _op(0xB7, 2, 0, 0, 0),
            _op(0x85, 0, 0, 0, redirect) + _op(0x95),
        )
    )
    return _load(code)


def _load(code: bytes) -> int:
    instructions, license_ = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQ", SCHED_CLS, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(license_)
    )
    return bpf(PROG_LOAD, attributes)


def attach_ingress(net: Net, interface: str, program_fd: int) -> None:
    clsact_ingress = 0xFFFFFFF2
    index = net.ifindex(interface)
    with net.netns.entered():
        link = IPRoute()
    with link:
        link.tc("add", "clsact", index=index)
        link.tc("add-filter", "bpf", index=index, fd=program_fd, name="rgt", parent=clsact_ingress,
                direct_action=True, classid=1)  # fmt: skip


def test_run(program_fd: int) -> int:
    """Runs the program on one empty frame. Returns its verdict."""
    frame = ctypes.create_string_buffer(64)
    attributes = ctypes.create_string_buffer(
        struct.pack("=IIIIQ", program_fd, 0, 64, 0, ctypes.addressof(frame)).ljust(128, b"\0"), 128
    )
    if _libc.syscall(_SYS_BPF, PROG_TEST_RUN, attributes, len(attributes)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    verdict: int = struct.unpack_from("=I", attributes, 4)[0]
    return verdict


test_run.__test__ = False  # type: ignore[attr-defined]
