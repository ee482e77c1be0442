"""What the kernel can do, tried out where it hurts nobody: in a network namespace that goes with the probe.

in_scratch_netns   a thread of its own stands in a new namespace, and both end together
datapath_loads     our programs through the verifier, attached to that namespace's lo, and a ring on it
bridge_firewall    a base chain of nf_tables' bridge family, through libnftables
attached_programs  what others have attached to the veths of the namespace we are in
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from pyroute2.netlink.rtnl import RTM_GETTFILTER  # type: ignore[import-untyped]

from isolator.datapath import device, nftables
from isolator.datapath.attach import XdpMode, attach_tc, attach_xdp, attached_xdp
from isolator.datapath.bpf import OBJECTS, TC_OBJECT, XDP_OBJECT
from isolator.datapath.device import Link
from isolator.datapath.libbpf import Object, library
from isolator.datapath.netns import CLONE_NEWNET
from isolator.datapath.ring import Ring, packet_socket
from isolator.datapath.rtnl import NetlinkError, Rtnl, attributes

Answer = TypeVar("Answer")

LO = 1  # lo's ifindex in every namespace
BRIDGE_CHAIN = "add table bridge t; add chain bridge t c { type filter hook prerouting priority 0; }"

TCMSG = struct.Struct("=BxxxiIII")  # tcmsg: family, ifindex, handle, parent, info
TC_H_CLSACT = 0xFFFF0000
HOOKS = {0xFFF2: "ingress", 0xFFF3: "egress"}  # TC_H_MIN_INGRESS, TC_H_MIN_EGRESS (linux/pkt_sched.h)
TCA_KIND, TCA_OPTIONS, TCA_BPF_NAME = 1, 2, 7
BPF_TCX = {46: "ingress", 47: "egress"}  # enum bpf_attach_type; Linux 6.6
QUERY_MAX = 64  # programs at one hook that are looked at


def in_scratch_netns(work: Callable[[], Answer]) -> Answer:
    """What `work` returns in a new network namespace, or raises; OSError where none can be made."""
    answers: list[Answer] = []
    failures: list[BaseException] = []

    def inside() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
                code = ctypes.get_errno()
                raise OSError(code, f"no network namespace can be made: {os.strerror(code)}")
            answers.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return answers[0]


def datapath_loads() -> None:
    """Verifier, BTF, ring buffer, tc, XDP, packet ring: all of it, as the agent does it; nothing is pinned.

    Raises a DatapathError or OSError of the first that fails. For `in_scratch_netns`.
    """
    with Object.open(OBJECTS / TC_OBJECT) as tc, Object.open(OBJECTS / XDP_OBJECT) as xdp:
        for item in (tc, xdp):
            item.load()
        attach_tc(LO, tc.program_fd("isolator_tc"))
        attach_xdp(LO, xdp.program_fd("isolator_xdp_generic"), XdpMode.GENERIC)
    with Ring(packet_socket(), "lo", block_count=1):
        pass


def bridge_firewall() -> None:
    """Raises NftablesError: no libnftables, or nf_tables has no bridge family. For `in_scratch_netns`."""
    nftables.run(BRIDGE_CHAIN)


# -- other users -------------------------------------------------------------------------------------------


def attached_programs() -> list[str]:
    """`vethX: tc ingress bpf NAME` and the like, of each veth in the calling thread's namespace."""
    with Rtnl() as rtnl:
        veths = [link for link in device.all_links(rtnl) if link.kind == "veth"]
        return [f"{link.name}: {what}" for link in veths for what in programs_of(rtnl, link)]


def programs_of(rtnl: Rtnl, link: Link) -> Iterator[str]:
    yield from tc_filters(rtnl, link.index)
    for kind, hook in BPF_TCX.items():
        if count := tcx_programs(link.index, kind):
            yield f"tcx {hook}, {count} program{'s' if count > 1 else ''}"
    for mode in (XdpMode.NATIVE, XdpMode.GENERIC):
        if attached_xdp(link.index, mode):
            yield f"{mode.name.lower()} XDP"


def tc_filters(rtnl: Rtnl, ifindex: int) -> list[str]:
    """The filters at clsact; each once, however many parts the kernel tells it in."""
    found: list[str] = []
    for minor, hook in HOOKS.items():
        try:
            answers = rtnl.dump(RTM_GETTFILTER, TCMSG.pack(0, ifindex, 0, TC_H_CLSACT | minor, 0))
        except NetlinkError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):  # no clsact
                raise
            continue
        for body in answers:
            if TCMSG.unpack_from(body)[2]:  # without a handle: the filter's chain, not yet itself
                found.append(f"tc {hook} {filter_name(body)}")
    return list(dict.fromkeys(found))


def filter_name(body: bytes) -> str:
    fields = dict(attributes(body, TCMSG.size))
    options = dict(attributes(fields.get(TCA_OPTIONS, b""), 0))
    words = (fields.get(TCA_KIND, b""), options.get(TCA_BPF_NAME, b"").partition(b":[")[0])  # NAME:[ID]
    return " ".join(word.rstrip(b"\0").decode(errors="replace") for word in words if word)


def tcx_programs(ifindex: int, kind: int) -> int:
    """How many programs are at a tcx hook. A kernel without tcx has none."""
    programs, count = (ctypes.c_uint32 * QUERY_MAX)(), ctypes.c_uint32(QUERY_MAX)
    result = library().bpf_prog_query(ifindex, kind, 0, None, programs, ctypes.byref(count))
    return int(count.value) if result == 0 else 0
