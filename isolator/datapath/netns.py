"""Network namespaces: open one by name or path, stand in it for a while, pin a new one.

`Netns.entered()` moves the calling thread alone, so it works in plain code and in a worker thread of an event
loop. Never hold it across an `await`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from isolator.datapath.errors import DatapathError

PINS = Path("/run/netns")
CLONE_NEWNET = 0x40000000
MS_BIND, MS_REC, MS_SHARED = 0x1000, 0x4000, 0x100000
MNT_DETACH = 2
NS_GET_NSTYPE = 0xB703  # include/uapi/linux/nsfs.h
SO_NETNS_COOKIE = 71  # Linux 5.14; a number no other namespace of this boot ever has
NETNS_SYSCTLS = (  # of the isolator netns: a port that spoke IPv6 would teach the bridge its MAC
    ("net/ipv6/conf/default/disable_ipv6", "1"),
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/addr_gen_mode", "1"),
)

_libc = ctypes.CDLL(None, use_errno=True)


class SpliceError(DatapathError):
    """Root of all that goes wrong around namespaces and splices: one line that says what, and what to do."""


class NetnsMissingError(SpliceError):
    """No network namespace stands at a name or path."""


def _checked(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


_pinning = threading.Lock()


def netns_path(name: str) -> Path:
    """Where a namespace stands: a path as it is, a name under /run/netns as `ip netns` has it."""
    return Path(name) if "/" in name else PINS / name


class Netns:
    """An open network namespace. `cookie` tells it from every other one of this boot.

    Raises NetnsMissingError where there is none at `name` (a name under /run/netns, or a path).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = -1
        path = netns_path(name)
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            is_netns = fcntl.ioctl(self.fd, NS_GET_NSTYPE) == CLONE_NEWNET
        except OSError as error:
            self.close()
            if error.errno not in (errno.ENOENT, errno.ENOTTY, errno.ENOTDIR, errno.ESRCH):
                raise SpliceError(
                    f"network namespace {name}: cannot open {path}: {error.strerror}"
                ) from error
            is_netns = False
        if not is_netns:
            self.close()
            raise NetnsMissingError(f"network namespace {name}: none at {path}; is the container running?")
        with self.entered():
            self.cookie = _cookie()

    def __enter__(self) -> Netns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread stands here inside the block: new sockets and /proc/sys/net are this one's."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _checked(_libc.setns(self.fd, CLONE_NEWNET), f"setns {self.name}")
            try:
                yield
            finally:
                _checked(_libc.setns(home, CLONE_NEWNET), "setns back home")
        finally:
            os.close(home)


def _cookie() -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        number: int = struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0]
    return number


def pinned_netns(name: str) -> Netns:
    """The isolator netns of that name, made and pinned like `ip netns add` where missing: it outlives us.

    IPv6 is off in it. Raises SpliceError where it cannot be made (no root).
    """
    try:
        with _pinning:  # two threads would each make one, and the second's would hide the first's
            try:
                netns = Netns(name)
            except NetnsMissingError:
                _pin(netns_path(name))
                netns = Netns(name)
        with netns.entered():
            for path, value in NETNS_SYSCTLS:
                with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
                    Path("/proc/sys", path).write_text(value)
    except OSError as error:
        raise SpliceError(f"network namespace {name}: cannot be made: {error}; are you root?") from error
    return netns


def unpin_netns(name: str) -> None:
    """Let a pinned namespace go; the kernel deletes it with every device in it. None there: nothing to do."""
    path = netns_path(name)
    _libc.umount2(os.fsencode(path), MNT_DETACH)
    path.unlink(missing_ok=True)


def _pin(path: Path) -> None:
    """As iproute2's netns_add: /run/netns is a shared mount, so the pin shows in the host's mounts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.fsencode(path.parent)
    if _libc.mount(b"", folder, b"none", MS_SHARED | MS_REC, None) != 0:
        _checked(_libc.mount(folder, folder, b"none", MS_BIND | MS_REC, None), f"bind {path.parent}")
        _checked(_libc.mount(b"", folder, b"none", MS_SHARED | MS_REC, None), f"share {path.parent}")
    path.touch(mode=0o444)
    failures: list[OSError] = []

    def make() -> None:
        try:
            _checked(_libc.unshare(CLONE_NEWNET), "unshare")
            _checked(
                _libc.mount(b"/proc/thread-self/ns/net", os.fsencode(path), b"none", MS_BIND, None), "bind"
            )
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=make)  # its namespace dies with it, but for the pin
    thread.start()
    thread.join()
    if failures:
        path.unlink(missing_ok=True)
        raise failures[0]
