"""Keep-alive HTTP while many other connections are open and idle."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from benchmarks.load import BoundedError, wrk
from benchmarks.place import HOLD, HTTP, PAGE, holding_server
from benchmarks.suites.base import ForAll, Mode, Point, Run
from benchmarks.systems import Kind, System
from isolator.lab import PREFIX

COUNTS = (10, 1_000, 6_000)
"""Up to what one process with 20,000 open files can hold (a proxy takes two for each), and what Isolator has room
for: 8,192 inspected flows an endpoint, those that ended up to 15 s ago among them."""

MANY = 100_000
"""More than one process can hold: held by several, on ports behind which stand several."""

ROUNDS = 3
FORGOTTEN_AFTER = 20  # s after which nobody here remembers a connection that has ended (Isolator: 15)
SHARE = 16_000  # connections of one holder

HOLDER = """\
import socket, struct, sys
host, ports, path, count = sys.argv[1], list(map(int, sys.argv[2].split(","))), sys.argv[3], int(sys.argv[4])
head, open_, why = f"GET {path} HTTP/1.1\\r\\nHost: api\\r\\n\\r\\n".encode(), [], ""
try:
    for number in range(count):
        peer = socket.create_connection((host, ports[number % len(ports)]), timeout=5)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves no TIME_WAIT
        peer.sendall(head)
        assert (seen := peer.recv(65536)).split()[1:2] == [b"200"], seen[:80]
        open_.append(peer)
except (OSError, AssertionError) as error:
    why = str(error)
print(len(open_), why, flush=True)
sys.stdin.read()
"""


def shares(count: int) -> list[int]:
    """What each holder holds: as few of them as can."""
    holders = -(-count // SHARE)
    return [count // holders + (number < count % holders) for number in range(holders)]


def opened(told: Sequence[str], count: int) -> None:
    """Raises unless the holders' lines, `NUMBER WHY`, add up to `count`."""
    lines = [line.strip().partition(" ") for line in told]
    if (held := sum(int(number or 0) for number, _, _ in lines)) < count:
        why = next((why for _, _, why in lines if why), "a holder ended")
        raise BoundedError(f"{held:,} of {count:,} connections were let in ({why})")


@contextmanager
def holder(run: Run, ports: Sequence[int], count: int) -> Iterator[subprocess.Popen[str]]:
    command = (sys.executable, "-c", HOLDER, run.route.host, ",".join(map(str, ports)), PAGE, str(count))
    process = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{PREFIX}-{run.route.client}", *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def held(run: Run, count: int, ports: Sequence[int]) -> Iterator[None]:
    """So many connections, each answered once, then idle."""
    with ExitStack() as stack:
        holders = [stack.enter_context(holder(run, ports, share)) for share in shares(count)]
        opened([each.stdout.readline() for each in holders if each.stdout is not None], count)
        yield


def metric(count: int) -> str:
    return f"c32, {count} idle connections"


def rate(run: Run) -> float:
    return wrk(run.place, run.route, PAGE, 32, run.mode.seconds).rate


def few(count: int) -> Point:
    def measure(run: Run) -> dict[str, float]:
        with held(run, count, (HTTP,)):
            return {metric(count): rate(run)}

    def twice(run: Run) -> dict[str, float]:
        """A table may still be full of connections that have ended."""
        try:
            return measure(run)
        except BoundedError:
            time.sleep(FORGOTTEN_AFTER)
            return measure(run)

    return Point({metric(count): "1/s"}, twice, rounds=ROUNDS, takes=2 + count / 8_000)


def many(count: int) -> Point:
    def measure(run: Run) -> dict[str, float]:
        run.place.lab.inside(run.route.client, "sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65535")
        try:
            with holding_server(run.place, run.route), held(run, count, HOLD):
                return {metric(count): rate(run)}
        except BoundedError:
            time.sleep(FORGOTTEN_AFTER)
            raise

    return Point({metric(count): "1/s"}, measure, rounds=1, takes=count / 5_000, not_for=not_many)


def not_many(system: System) -> str:
    return "limit of open files: one worker takes two a connection" if system.kind is Kind.PROXY else ""


class Flows(ForAll):
    name = "flows"
    about = (
        f"Requests a second on 32 connections while others are open and idle. {MANY:,}: one round. A system that "
        f"refuses up to {max(COUNTS):,} is asked once more after {FORGOTTEN_AFTER} s."
    )

    def points(self, mode: Mode) -> Sequence[Point]:
        return [many(MANY), *map(few, COUNTS)] if mode.full else []
