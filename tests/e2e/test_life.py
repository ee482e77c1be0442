"""The agent dies, is ended, hangs, runs out of memory: what is connected goes on, and what needs it as declared.

The bars, with 200 connections, are measured by `make bench-life`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.connections import (
    INSPECTED,
    Connection,
    Crowd,
    Layer4,
    MidBody,
    prepare,
    request,
    write_policy,
)
from benchmarks.hang import FORBIDDEN, ODD, answer, asks, goes_on, hang
from benchmarks.life import restart, restore_all
from isolator.lab import PREFIX, STATE, Lab, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow]
EACH = 2
EVENTS = {"kill -9": restart(signal.SIGKILL), "SIGTERM": restart(signal.SIGTERM), "restore": restore_all}


@pytest.fixture(scope="module")
def place() -> Iterator[Lab]:
    with Lab(Path("/tmp") / f"{PREFIX}-life", "off") as made:
        prepare(made, "closed")
        yield made


@pytest.fixture
def lab(place: Lab) -> Iterator[Lab]:
    """The agent runs, all is spliced, what needs Python is closed without it."""
    write_policy(place, "closed")
    place.stop_agent(signal.SIGTERM)
    place.start_agent()
    yield place


Open = Callable[[type[Connection]], Connection]


@pytest.fixture
def connect() -> Iterator[Open]:
    """Opens a connection of a kind, and closes it after the test."""
    with contextlib.ExitStack() as opened:
        yield lambda kind: opened.enter_context(contextlib.closing(kind()))


def generation(lab: Lab) -> int:
    return int(lab.ask("/v1/status")["generation"])


# -- connections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS)
def test_every_connection_outlives(lab: Lab, event: str) -> None:
    with Crowd(lab, EACH) as crowd:
        crowd.begin()
        EVENTS[event](lab)
        assert crowd.finish() == {}


def test_what_was_open_before_a_splice(lab: Lab) -> None:
    """Nobody knows where the next request of an inspected one begins: it goes on where policy fails open."""
    restore_all(lab)
    with Crowd(lab, EACH) as crowd:
        crowd.begin()
        restart(signal.SIGTERM)(lab)
        assert {kind: len(lost) for kind, lost in crowd.finish().items()} == dict.fromkeys(INSPECTED, EACH)
        restore_all(lab)
        write_policy(lab, "open")
    with Crowd(lab, EACH) as crowd:
        crowd.begin()
        restart(signal.SIGTERM)(lab)
        assert crowd.finish() == {}


# -- ended -----------------------------------------------------------------------------------------------------


def test_sigterm_that_keeps(lab: Lab, connect: Open) -> None:
    """At once, without the heartbeat's bound: it has said that it goes. What an automaton accepts goes on."""
    plain, idle, upload = connect(Layer4), connect(Connection), connect(MidBody)
    upload.begin()
    time.sleep(0.2)
    lab.stop_agent(signal.SIGTERM)
    assert (goes_on(plain), goes_on(connect(Layer4))) == ("goes on", "goes on")
    upload.finish()
    assert asks(connect(Connection), request()) == "200"
    idle.socket.sendall(ODD)
    assert answer(idle, 0.5) == "nothing"
    lab.start_agent()
    assert answer(idle, 20) == "200"
    assert asks(idle, FORBIDDEN) == "403"


def test_sigterm_that_restores(lab: Lab, connect: Open) -> None:
    config = lab.root / "isolator.yaml"
    before = config.read_text()
    config.write_text(before + "on_exit: restore\n")
    try:
        restart(signal.SIGKILL)(lab)
        with Crowd(lab, EACH) as crowd:
            crowd.begin()
            lab.stop_agent(signal.SIGTERM)
            assert crowd.finish() == {}
        assert list((STATE / "journal").glob("*")) == []
        assert asks(connect(Connection), FORBIDDEN) == "200", "nobody is protected any more"
    finally:
        config.write_text(before)


# -- hangs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["closed", "open"])
def test_a_hanging_agent(lab: Lab, failure: str) -> None:
    if failure == "open":
        now = generation(lab)
        write_policy(lab, failure)
        wait_for(lambda: generation(lab) != now, "the policy is not noticed")
    seen = hang(lab, failure)
    assert {each.what: each.seen for each in seen} == {each.what: each.expected for each in seen}


# -- out of memory ---------------------------------------------------------------------------------------------

RULES = 40_000


def large_policy(lab: Lab) -> None:
    """More than there is memory for; it allows what the first one denies."""
    file = lab.root / "policies" / "api.yaml"
    lines = "".join(f", {{methods: [GET], path: /secret{number or ''}}}" for number in range(RULES))
    file.write_text(file.read_text().replace("path: /api/**}]", f"path: /api/**}}{lines}]"))


def reload_policy() -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "isolator.cli", "reload", "--socket", str(STATE / "isolator.sock"))
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_memory_that_runs_out_applies_nothing_by_half(lab: Lab, connect: Open) -> None:
    assert lab.agent is not None
    idle, before = connect(Connection), generation(lab)
    _, hard = resource.prlimit(lab.agent.pid, resource.RLIMIT_DATA)
    resource.prlimit(lab.agent.pid, resource.RLIMIT_DATA, (1 << 20, hard))  # nothing more than it has
    try:
        large_policy(lab)
        assert reload_policy().returncode == 1  # told, or there was no memory to tell it
    finally:
        resource.prlimit(lab.agent.pid, resource.RLIMIT_DATA, (hard, hard))
    assert generation(lab) == before
    assert (asks(idle, request()), asks(connect(Connection), FORBIDDEN)) == ("200", "403")
    assert reload_policy().returncode == 0
    assert asks(idle, FORBIDDEN) == "200"


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A child of our own memory cgroup (v1), so that the kernel has to choose among those in it alone."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":")[2] for line in lines if line.split(":")[1] == "memory"), None)
    if own is None:
        pytest.skip("no memory cgroup of version 1")
    group = Path("/sys/fs/cgroup/memory") / own.lstrip("/") / f"isolator-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")
    try:
        yield group
    finally:
        with contextlib.suppress(RuntimeError):
            wait_for(lambda: not (group / "cgroup.procs").read_text(), "somebody is left in the cgroup")
        group.rmdir()


def test_killed_by_the_kernel_for_its_memory(lab: Lab, connect: Open, memory_cgroup: Path) -> None:
    assert lab.agent is not None
    with Crowd(lab, 1) as crowd:
        crowd.begin()
        (memory_cgroup / "cgroup.procs").write_text(str(lab.agent.pid))
        (memory_cgroup / "memory.limit_in_bytes").write_text(str(4 << 20))
        large_policy(lab)
        assert lab.agent.wait(30) == -signal.SIGKILL
        assert (goes_on(connect(Layer4)), lab.ask("/v1/status")) == ("goes on", {})
        write_policy(lab, "closed")
        lab.start_agent()
        assert crowd.finish() == {}
    assert asks(connect(Connection), FORBIDDEN) == "403"
