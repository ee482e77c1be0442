"""Keep-alive HTTP while many other connections are open and idle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.load import LoadError, wrk
from benchmarks.place import HTTP, PAGE
from benchmarks.suites.base import ForAll, Mode, Point, Run
from isolator.lab import PREFIX

COUNTS = (10, 1_000, 6_000)
"""More need more open files a process than many a machine grants (20,000 here: a proxy takes two for each)."""

HOLD = """\
import socket, sys
host, port, path, count = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
head, open_ = f"GET {path} HTTP/1.1\\r\\nHost: api\\r\\n\\r\\n".encode(), []
for _ in range(count):
    peer = socket.create_connection((host, port), timeout=10)
    peer.sendall(head)
    assert peer.recv(65536).split()[1] == b"200"
    open_.append(peer)
print("open", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(run: Run, count: int) -> Iterator[None]:
    """So many connections, each answered once, then idle."""
    command = (sys.executable, "-c", HOLD, run.route.host, str(HTTP), PAGE, str(count))
    holder = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{PREFIX}-{run.route.client}", *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
    try:
        if holder.stdout.readline().strip() != "open":
            raise LoadError(f"{count} connections: {holder.stderr.read().strip().splitlines()[-1:]}")
        yield
    finally:
        holder.kill()
        holder.wait()
        for pipe in (holder.stdin, holder.stdout, holder.stderr):
            pipe.close()


def point(count: int) -> Point:
    metric = f"c32, {count} idle connections"

    def measure(run: Run) -> dict[str, float]:
        with held(run, count):
            return {metric: wrk(run.place, run.route, PAGE, 32, run.mode.seconds).rate}

    return Point({metric: "1/s"}, measure)


class Flows(ForAll):
    name = "flows"
    about = "Requests a second on 32 connections while others are open and idle."

    def points(self, mode: Mode) -> Sequence[Point]:
        return [point(count) for count in COUNTS] if mode.full else []
