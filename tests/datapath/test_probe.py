"""Probes of the kernel, and that they leave nothing behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from isolator.datapath import device, probe
from isolator.datapath.attach import XdpMode, attach_tc, attach_xdp
from isolator.datapath.bpf import OBJECTS, TC_OBJECT, XDP_OBJECT
from isolator.datapath.libbpf import Object, library
from isolator.datapath.nftables import NftablesError
from isolator.datapath.rtnl import Rtnl

pytestmark = pytest.mark.root


def test_a_scratch_namespace_is_another_and_errors_come_out_of_it() -> None:
    here = os.readlink("/proc/thread-self/ns/net")
    assert probe.in_scratch_netns(lambda: os.readlink("/proc/thread-self/ns/net")) != here
    with pytest.raises(ZeroDivisionError):
        probe.in_scratch_netns(lambda: 1 // 0)
    assert os.readlink("/proc/thread-self/ns/net") == here


def test_this_kernel_can_all_of_it_and_keeps_nothing() -> None:
    pins = sorted(Path("/sys/fs/bpf").iterdir())
    probe.in_scratch_netns(probe.datapath_loads)
    probe.in_scratch_netns(probe.bridge_firewall)
    assert sorted(Path("/sys/fs/bpf").iterdir()) == pins


def test_a_chain_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel without the bridge family does: in libnftables' own words."""
    monkeypatch.setattr(probe, "BRIDGE_CHAIN", "add chain bridge nowhere c")
    with pytest.raises(NftablesError, match="No such file or directory"):
        probe.in_scratch_netns(probe.bridge_firewall)


def test_what_others_attached_to_veths_is_found() -> None:
    assert probe.in_scratch_netns(attach_and_look) == [
        "others: tc ingress bpf isolator_tc",
        "others: tcx ingress, 1 program",
        "others: generic XDP",
    ]


def attach_and_look() -> list[str]:
    subprocess.run(["ip", "link", "add", "free", "type", "veth", "peer", "name", "others"], check=True)
    with Object.open(OBJECTS / TC_OBJECT) as tc, Object.open(OBJECTS / XDP_OBJECT) as xdp, Rtnl() as rtnl:
        for item in (tc, xdp):
            item.load()
        link = device.find_link(rtnl, "others")
        assert link is not None
        attach_tc(link.index, tc.program_fd("isolator_tc"))
        attach_xdp(link.index, xdp.program_fd("isolator_xdp_generic"), XdpMode.GENERIC)
        tcx = library().bpf_link_create(tc.program_fd("isolator_tc"), link.index, 46, None)
        assert tcx >= 0
        found = probe.attached_programs()
        os.close(tcx)
        return found
