"""Namespaces: pinned like `ip netns add` does it, opened by name or path, entered for a block."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.datapath.netns import Netns, NetnsMissingError, netns_path, pinned_netns, unpin_netns

pytestmark = pytest.mark.root
NAME = f"spt-pin-{os.getpid()}"


@pytest.fixture
def name() -> Iterator[str]:
    yield NAME
    subprocess.run(["ip", "netns", "del", NAME], capture_output=True)
    netns_path(NAME).unlink(missing_ok=True)


def here() -> str:
    return os.readlink("/proc/thread-self/ns/net")


def test_made_once_found_again_and_seen_by_ip(name: str) -> None:
    with pinned_netns(name) as first, pinned_netns(name) as second, Netns(f"/run/netns/{name}") as by_path:
        assert first.cookie == second.cookie == by_path.cookie
    assert name in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert "inet6" not in subprocess.run(["ip", "-n", name, "addr"], capture_output=True, text=True).stdout


def test_a_pin_that_a_crash_left_half_made_is_completed(name: str) -> None:
    netns_path(name).touch()
    with pytest.raises(NetnsMissingError):
        Netns(name)
    with pinned_netns(name) as netns:
        assert netns.cookie


def test_gone_after_unpin_and_new_when_made_again(name: str) -> None:
    with pinned_netns(name) as netns:
        first = netns.cookie
    unpin_netns(name)
    with pytest.raises(NetnsMissingError, match=f"network namespace {name}: none at /run/netns/{name}"):
        Netns(name)
    unpin_netns(name)
    with pinned_netns(name) as netns:
        assert netns.cookie != first


def test_only_the_calling_thread_goes_in_and_comes_back_also_after_an_error(name: str) -> None:
    home, elsewhere = here(), []
    leave, entered = threading.Event(), threading.Event()

    def stand_in_it(netns: Netns) -> None:
        with netns.entered():
            entered.set()
            leave.wait()
            elsewhere.append(here())

    with pinned_netns(name) as netns:
        other = threading.Thread(target=stand_in_it, args=[netns])
        other.start()
        entered.wait()
        assert here() == home
        leave.set()
        other.join()
        with pytest.raises(ZeroDivisionError), netns.entered():
            assert here() != home
            with netns.entered():
                assert here() != home
            assert here() != home
            raise ZeroDivisionError
    assert here() == home
    assert elsewhere != [home]


def test_no_descriptor_is_left_open(name: str) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    pinned_netns(name).close()
    before = count()
    for _ in range(3):
        with pinned_netns(name) as netns, netns.entered():
            pass
        with pytest.raises(NetnsMissingError):
            Netns("/etc/hostname")
    assert count() == before
