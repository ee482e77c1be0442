"""What is missing is said in one line, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from isolator.datapath.preflight import (
    BpffsMissingError,
    BtfMissingError,
    NotRootError,
    filesystem_of,
    preflight,
    require_bpffs,
    require_btf,
    require_capabilities,
)

MOUNTS = """\
22 28 0:20 / /sys rw,nosuid shared:7 - sysfs sysfs rw
25 22 0:22 / /sys/fs/bpf rw,nosuid shared:9 - bpf bpf rw,mode=700
28 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
29 28 0:25 / /run rw,nosuid - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/sys/fs/bpf/isolator", "bpf"),
        ("/sys/fs", "sysfs"),
        ("/run/x", "tmpfs"),
        ("/home", "ext4"),
        ("/", "ext4"),
    ],
)
def test_filesystem_of(path: str, kind: str) -> None:
    assert filesystem_of(Path(path), MOUNTS) == kind


def test_not_root() -> None:
    with pytest.raises(NotRootError, match="no CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN; run it with sudo"):
        require_capabilities("Name: x\nCapEff:\t0000000000000000\n")
    with pytest.raises(NotRootError, match="no CAP_SYS_ADMIN; "):
        require_capabilities("CapEff:\t0000000000003000\n")
    require_capabilities("CapEff:\t000001ffffffffff\n")


def test_no_btf(tmp_path: Path) -> None:
    with pytest.raises(BtfMissingError, match="CONFIG_DEBUG_INFO_BTF"):
        require_btf(tmp_path / "vmlinux")


def test_pins_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(BpffsMissingError, match="choose a folder below /sys/fs/bpf"):
        require_bpffs(tmp_path)


@pytest.mark.root
def test_this_machine() -> None:
    preflight()
