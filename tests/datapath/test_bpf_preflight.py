"""What is missing is said in one line, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from isolator.datapath.preflight import (
    BpffsMissingError,
    BtfMissingError,
    NotRootError,
    PinsPrivateError,
    filesystem_of,
    preflight,
    require_bpffs,
    require_btf,
    require_capabilities,
    require_shared_pins,
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


CONTAINER = """\
60 59 0:50 / / ro,relatime - overlay overlay ro
61 60 0:25 /netns /run/netns rw,nosuid{} - tmpfs tmpfs rw
"""


@pytest.mark.parametrize("tag", ["", " master:5"])
def test_pins_that_would_die_with_their_container(tag: str) -> None:
    with pytest.raises(PinsPrivateError, match="run it with -v /run/netns:/run/netns:rshared"):
        require_shared_pins(CONTAINER.format(tag), in_container=False)
    with pytest.raises(PinsPrivateError):
        require_shared_pins(CONTAINER.format(tag).replace("overlay", "btrfs"), in_container=True)


def test_pins_that_outlive_it() -> None:
    require_shared_pins(CONTAINER.format(" shared:5"), in_container=True)
    require_shared_pins(
        CONTAINER.format("").replace("overlay", "ext4"), in_container=False
    )  # a host makes it shared


@pytest.mark.root
def test_this_machine() -> None:
    preflight()
