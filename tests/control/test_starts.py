"""Starts that wait: the script as sh runs it, around a runc that tells how it was called; and the agent's end of it."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from isolator.control.starts import Starts, sandbox_of_process, script
from isolator.lab import wait_for

ID = "4f" * 32
RUNC = '#!/bin/sh\necho "runc $*"\necho problem >&2\ncase "$*" in *bad*) exit 7;; esac\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the engine's shim stands, with the script and its runc."""
    (tmp_path / "runc").write_text(RUNC)
    (tmp_path / "isolator-runc").write_text(script(tmp_path / "a state", str(tmp_path / "runc")))
    (tmp_path / "init.pid").write_text(str(os.getpid()))
    for name in ("runc", "isolator-runc"):
        (tmp_path / name).chmod(0o755)
    return tmp_path


def call(folder: Path, *words: str) -> tuple[int, str, str, float]:
    begin = time.monotonic()
    done = subprocess.run(
        [folder / "isolator-runc", *words], cwd=folder, capture_output=True, text=True, timeout=30
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - begin


def asked(starts: Starts) -> bool:
    """It is asked in the background."""
    wait_for(starts.read, "nobody asked")
    return True


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("command", ["create", "kill", "delete"])
def test_it_is_runc(folder: Path, command: str, there: bool) -> None:
    starts = Starts(folder / "a state", 1)
    with starts.listening() if there else open(os.devnull):
        assert call(folder, "--log", "a b", command, ID)[:3] == (
            0,
            f"runc --log a b {command} {ID}\n",
            "problem\n",
        )
        assert call(folder, command, "bad", ID)[:2] == (7, f"runc {command} bad {ID}\n")


def test_a_start_waits_for_the_answer(folder: Path) -> None:
    starts = Starts(folder / "a state", 20)
    with starts.listening() as fd:
        call(folder, "create", ID)
        assert asked(starts) and starts.waiting == {ID: os.getpid()} and starts.unanswered == {ID}
        late = threading.Timer(0.3, starts.answer, [ID])
        late.start()
        code, told, _, seconds = call(folder, "start", ID)
        assert (code, told) == (0, f"runc start {ID}\n") and 0.3 <= seconds < 10
        starts.forget({ID})
        assert not starts.waiting and not (starts.folder / ID).exists()
        os.set_blocking(fd, False)


def test_a_start_that_is_answered_before_does_not_wait(folder: Path) -> None:
    starts = Starts(folder / "a state", 20)
    with starts.listening():
        call(folder, "create", ID)
        assert asked(starts)
        starts.answer(ID)
        assert call(folder, "start", ID)[3] < 10


def test_an_answer_of_an_earlier_start_does_not_count(folder: Path) -> None:
    starts = Starts(folder / "a state", 1)
    with starts.listening():
        (starts.folder / ID).touch()
        call(folder, "create", ID)
        assert call(folder, "start", ID)[3] > 0.5


def test_without_an_answer_it_goes_on_also_where_nobody_reads_and_all_is_full(folder: Path) -> None:
    starts = Starts(folder / "a state", 1)
    with starts.listening() as fd:
        while True:
            try:
                os.write(fd, b"x" * 4096)
            except BlockingIOError:
                break
        for command in ("create", "start"):
            code, told, _, seconds = call(folder, command, ID)
            assert (code, told) == (0, f"runc {command} {ID}\n") and seconds < 10
        while True:
            try:
                os.read(fd, 65536)
            except BlockingIOError:
                break


def test_without_an_agent_ever_it_does_not_wait(folder: Path) -> None:
    assert call(folder, "start", ID)[:2] == (0, f"runc start {ID}\n")


def test_what_is_no_question_is_passed_over(tmp_path: Path) -> None:
    starts = Starts(tmp_path, 1)
    with starts.listening() as fd:
        for noise in (
            b"\n",
            b"x" * 300 + b"\n",
            ID.encode() + b" 99999999999\n",
            b"\xff\n",
            b"../../etc 1\n",
        ):
            os.write(fd, noise)
        assert not starts.read() and not starts.waiting
        os.write(fd, f"{ID} 1\n".encode())
        assert asked(starts) and starts.waiting == {ID: 1}
        starts.answer("f" * 64)
        assert not (starts.folder / ("f" * 64)).exists()


def test_whose_process_has_gone_waits_no_more(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    starts = Starts(tmp_path, 1)
    starts.waiting[ID] = process.pid
    starts.forget(())
    assert not starts.waiting and sandbox_of_process(process.pid) is None
