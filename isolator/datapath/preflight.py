"""What the datapath needs of the machine, asked before anything is changed: one line for what is missing."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from isolator.datapath.errors import DatapathError
from isolator.datapath.libbpf import library
from isolator.datapath.netns import PINS

BPFFS = Path("/sys/fs/bpf")
BTF = Path("/sys/kernel/btf/vmlinux")
CAPABILITIES = {12: "CAP_NET_ADMIN", 13: "CAP_NET_RAW", 21: "CAP_SYS_ADMIN"}  # linux/capability.h

MARK = Path("/.dockerenv")  # an engine puts it into each container


class NotRootError(DatapathError):
    """The process lacks capabilities."""


class BtfMissingError(DatapathError):
    """The kernel gives no type information."""


class BpffsMissingError(DatapathError):
    """The BPF file system is not mounted and cannot be."""


class PinsPrivateError(DatapathError):
    """In a container: what is pinned would die with it, and take the containers' interfaces along."""


def preflight(pins: Path = BPFFS) -> None:
    """Root, BTF, libbpf, bpffs, pins, in this order; mounts bpffs where it is missing. Raises a DatapathError."""
    require_capabilities(Path("/proc/self/status").read_text())
    require_btf()
    library()
    require_bpffs(pins)
    require_shared_pins(Path("/proc/self/mountinfo").read_text(), MARK.exists())


def require_capabilities(status: str) -> None:
    """`status`: /proc/<pid>/status. Raises NotRootError."""
    line = next((line for line in status.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    effective = int(line.split()[1], 16)
    lacking = [name for bit, name in CAPABILITIES.items() if not effective >> bit & 1]
    if lacking:
        raise NotRootError(f"needs root: this process has no {', '.join(lacking)}; run it with sudo")


def require_btf(path: Path = BTF) -> None:
    if not path.exists():
        raise BtfMissingError(
            f"the kernel has no BTF ({path}); use one built with CONFIG_DEBUG_INFO_BTF=y, as Debian's are"
        )


def require_bpffs(pins: Path) -> None:
    """Mount bpffs at /sys/fs/bpf if the folder for pins would lie in none. Raises BpffsMissingError."""
    if filesystem_of(pins, Path("/proc/self/mountinfo").read_text()) == "bpf":
        return
    if not pins.is_relative_to(BPFFS):
        raise BpffsMissingError(f"{pins} is not on a BPF file system; choose a folder below {BPFFS}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(BPFFS), b"bpf", 0, None):
        reason = os.strerror(ctypes.get_errno())
        raise BpffsMissingError(f"cannot mount bpffs: {reason}; try `mount -t bpf bpf {BPFFS}`")


def require_shared_pins(mountinfo: str, in_container: bool) -> None:
    """In a container, /run/netns has to be a mount that the host shares (mount_namespaces(7)). Raises PinsPrivateError.

    It shows before the first pin only: the pin makes the folder a shared mount, whose peers there may be none.
    """
    if not in_container and filesystem_of(Path("/"), mountinfo) != "overlay":
        return
    fields = mount_of(PINS, mountinfo).partition(" - ")[0].split()
    if not any(field.startswith("shared:") for field in fields[6:]):
        raise PinsPrivateError(
            f"{PINS} is this container's own, and the containers' interfaces would die with it: "
            f"run it with -v {PINS}:{PINS}:rshared"
        )


def filesystem_of(path: Path, mountinfo: str) -> str:
    """The type of the file system that `path` is on or would be on (proc(5), /proc/<pid>/mountinfo)."""
    return next(iter(mount_of(path, mountinfo).partition(" - ")[2].split()), "")


def mount_of(path: Path, mountinfo: str) -> str:
    """The line of the mount that `path` is on or would be on; of several on one point the last, which hides others."""
    best, found = Path("/"), ""
    for line in mountinfo.splitlines():
        point = Path(line.split()[4])
        if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, found = point, line
    return found
