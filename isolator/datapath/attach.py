"""Attaching programs to devices of the calling thread's network namespace: tc at clsact ingress, XDP.

Through libbpf's own netlink (tools/lib/bpf/netlink.c), which needs no event loop and follows the thread's
namespace. A tc filter has a fixed handle and priority, so that attaching again replaces the program in one
step and no packet meets a port without one.
"""

from __future__ import annotations

import ctypes
import errno
from ctypes import byref, c_int, c_size_t, c_uint32
from enum import Enum

from isolator.datapath.libbpf import BpfError, check, library

TC_PRIORITY, TC_HANDLE = 1, 0x150
_INGRESS, _EGRESS = 1, 2  # enum bpf_tc_attach_point
_REPLACE = 1  # BPF_TC_F_REPLACE


class XdpMode(Enum):
    """Where an XDP program runs. The values are XDP_FLAGS_… of linux/if_link.h."""

    OFF = 0
    GENERIC = 1 << 1  # SKB_MODE: any device, behind the skb's allocation
    NATIVE = 1 << 2  # DRV_MODE: in the driver


class _Hook(ctypes.Structure):  # struct bpf_tc_hook
    _fields_ = (
        ("sz", c_size_t),
        ("ifindex", c_int),
        ("attach_point", c_int),
        ("parent", c_uint32),
        ("end", c_size_t * 0),
    )


class _TcOptions(ctypes.Structure):  # struct bpf_tc_opts
    _fields_ = (
        ("sz", c_size_t),
        ("prog_fd", c_int),
        ("flags", c_uint32),
        ("prog_id", c_uint32),
        ("handle", c_uint32),
        ("priority", c_uint32),
        ("end", c_size_t * 0),
    )


def _hook(ifindex: int, point: int = _INGRESS) -> _Hook:
    return _Hook(sz=ctypes.sizeof(_Hook), ifindex=ifindex, attach_point=point)


def _tc_options(**fields: int) -> _TcOptions:
    return _TcOptions(sz=ctypes.sizeof(_TcOptions), handle=TC_HANDLE, priority=TC_PRIORITY, **fields)


def attach_tc(ifindex: int, program_fd: int) -> None:
    """Put a program at clsact ingress, in place of the one that was there. Raises BpfError."""
    hook = _hook(ifindex)
    created = library().bpf_tc_hook_create(byref(hook))
    if created != -errno.EEXIST:
        check(created, f"cannot add clsact to device {ifindex}")
    options = _tc_options(prog_fd=program_fd, flags=_REPLACE)
    check(library().bpf_tc_attach(byref(hook), byref(options)), f"cannot attach tc to device {ifindex}")


def attached_tc(ifindex: int) -> int | None:
    """The id of the program that attach_tc put there, or None."""
    options = _tc_options()
    result = library().bpf_tc_query(byref(_hook(ifindex)), byref(options))
    if result in (-errno.ENOENT, -errno.EINVAL):  # no such filter; no clsact at all
        return None
    check(result, f"cannot ask device {ifindex} for its tc program")
    return int(options.prog_id)


def detach_tc(ifindex: int) -> None:
    """Take the filter and clsact away; that there is none, or no such device, is no error."""
    hook = _hook(ifindex, _INGRESS | _EGRESS)
    _unless_gone(library().bpf_tc_hook_destroy(byref(hook)), f"cannot take clsact from device {ifindex}")


def attach_xdp(ifindex: int, program_fd: int, mode: XdpMode) -> None:
    """Put an XDP program on a device, in place of one that was there. Raises BpfError.

    Native and generic exclude each other (net/core/dev.c, dev_xdp_attach), so the other mode's goes first.
    """
    for other in (XdpMode.NATIVE, XdpMode.GENERIC):
        if other is not mode:
            _detach_xdp(ifindex, other)
    advice = "try datapath.xdp: generic" if mode is XdpMode.NATIVE else ""
    check(
        library().bpf_xdp_attach(ifindex, program_fd, mode.value, None),
        f"cannot attach {mode.name.lower()} XDP to device {ifindex}", advice,
    )  # fmt: skip


def attached_xdp(ifindex: int, mode: XdpMode) -> int | None:
    """The id of the XDP program in that mode, or None."""
    program = c_uint32()
    check(
        library().bpf_xdp_query_id(ifindex, mode.value, byref(program)),
        f"cannot ask device {ifindex} for XDP",
    )
    return program.value or None


def detach_xdp(ifindex: int) -> None:
    """Take XDP programs of either mode away; that there is none, or no such device, is no error."""
    for mode in (XdpMode.NATIVE, XdpMode.GENERIC):
        _detach_xdp(ifindex, mode)


def _detach_xdp(ifindex: int, mode: XdpMode) -> None:
    result = library().bpf_xdp_attach(ifindex, -1, mode.value, None)
    if result not in (-errno.EEXIST, -errno.EOPNOTSUPP):  # the other mode is there; no driver mode
        _unless_gone(result, f"cannot take XDP from device {ifindex}")


def _unless_gone(result: int, what: str) -> None:
    if result < 0 and -result not in (errno.ENOENT, errno.EINVAL, errno.ENODEV):
        raise BpfError(what, -result)
