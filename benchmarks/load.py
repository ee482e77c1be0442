"""Load generators and what they print. A figure in which an error hides is no figure: it raises LoadError."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.place import ASKING, BIG, BULK, HTTP, ON_FIRST, UPLOAD, Place, Route
from isolator.lab import PREFIX

BROWSER = (
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
    "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8",
    "Accept-Language: en-GB,en;q=0.9,de;q=0.8",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Cookie: session=8f14e45fceea167a5a36dedd4bea2543; theme=dark; consent=1; _ga=GA1.1.1234567890.1700000000",
    "Sec-Fetch-Dest: document",
    "Sec-Fetch-Mode: navigate",
    "Upgrade-Insecure-Requests: 1",
)
"""Heads of some 600 bytes, as a browser sends them."""


class LoadError(Exception):
    """A load generator failed, or its figure has errors in it."""


class BoundedError(LoadError):
    """More was asked for than a bound lets in: no failure, but a limit to be told."""


# -- wrk ---------------------------------------------------------------------------------------------------

DONE = """\
done = function(summary, latency, requests)
  local e = summary.errors
  print(string.format('RESULT {"requests":%d,"us":%d,"bytes":%d,"p50":%d,"p99":%d,"p999":%d,"status":%d,' ..
    '"connect":%d,"read":%d,"write":%d,"timeout":%d}', summary.requests, summary.duration, summary.bytes,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9), e.status, e.connect, e.read, e.write,
    e.timeout))
end
"""


@dataclass(frozen=True, slots=True)
class Wrk:
    """`status`: answers other than 2xx and 3xx. Latencies in µs."""

    requests: int
    seconds: float
    p50: float
    p99: float
    p999: float
    status: int
    socket_errors: int

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def parse_wrk(printed: str) -> Wrk:
    """What DONE printed."""
    found = re.search(r"^RESULT (\{.*\})$", printed, re.M)
    if found is None:
        raise LoadError(f"wrk: no result in: {printed.strip()[:300]}")
    told: dict[str, int] = json.loads(found[1])
    errors = sum(told[kind] for kind in ("connect", "read", "write", "timeout"))
    return Wrk(
        told["requests"], told["us"] / 1e6, told["p50"], told["p99"], told["p999"], told["status"], errors
    )


def clean(told: Wrk) -> Wrk:
    """The same, if every request was answered as it should be."""
    if told.status or told.socket_errors or not told.requests:
        raise LoadError(
            f"wrk: errors hide in the figure: {told.requests} answers, {told.status} of them neither 2xx nor 3xx, "
            f"{told.socket_errors} socket errors"
        )
    return told


def all_refused(told: Wrk) -> Wrk:
    """The same, if no request was let through."""
    if told.status != told.requests:
        raise LoadError(
            f"{told.requests - told.status} of {told.requests} forbidden requests were let through"
        )
    return told


def wrk_command(
    place: Place, url: str, connections: int, seconds: int, headers: Sequence[str] = ()
) -> tuple[str, ...]:
    script = place.lab.root / "done.lua"
    if not script.exists():
        script.write_text(DONE)
    said = [argument for header in headers for argument in ("-H", header)]
    return (*ASKING, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), *said, url)


def wrk(
    place: Place, route: Route, path: str, connections: int, seconds: int, headers: Sequence[str] = ()
) -> Wrk:
    command = wrk_command(place, route.url(path), connections, seconds, headers)
    return clean(parse_wrk(inside(place, route.client, *command)))


def inside(place: Place, name: str, *command: str) -> str:
    try:
        return place.lab.inside(name, *command)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        raise LoadError(str(error)[:300]) from error


def mixed(
    place: Place, route: Route, allowed: str, denied: str, connections: int, seconds: int
) -> tuple[Wrk, Wrk]:
    """Allowed and forbidden requests side by side, from two generators on one CPU."""
    commands = [wrk_command(place, route.url(path), connections, seconds) for path in (allowed, denied)]
    netns = f"--net=/run/netns/{PREFIX}-{route.client}"
    running = [
        subprocess.Popen(
            ["nsenter", netns, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    try:
        one, other = (process.communicate(timeout=seconds + 30)[0] for process in running)
    finally:
        for process in running:
            process.kill()
            process.wait()
    return clean(parse_wrk(one)), all_refused(parse_wrk(other))


# -- iperf3 ------------------------------------------------------------------------------------------------


def parse_iperf(printed: str) -> float:
    """Gbit/s received, of all flows."""
    try:
        told: dict[str, Any] = json.loads(printed)
    except ValueError as error:
        raise LoadError(f"iperf3: no JSON: {printed.strip()[:300]}") from error
    if "error" in told:
        raise LoadError(f"iperf3: {told['error']}")
    rate = float(told["end"]["sum_received"]["bits_per_second"]) / 1e9
    if not rate:
        raise LoadError("iperf3: nothing was received")
    return rate


def iperf(place: Place, route: Route, flows: int, seconds: int, reverse: bool = False) -> float:
    command = (
        *ON_FIRST,
        "iperf3",
        "-J",
        "-c",
        route.host,
        "-p",
        str(BULK),
        "-t",
        str(seconds),
        "-P",
        str(flows),
    )
    return parse_iperf(inside(place, route.client, *command, *(("-R",) if reverse else ())))


# -- one large body ----------------------------------------------------------------------------------------

POSTS = """\
import socket, sys, time
host, port, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20, int(sys.argv[4])
peer, block = socket.create_connection((host, port), timeout=60), bytes(1 << 20)
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
head = f"POST /upload?sink HTTP/1.1\\r\\nHost: api\\r\\nContent-Length: {size}\\r\\n\\r\\n".encode()
began, status = time.perf_counter(), "200"
for _ in range(count):
    peer.sendall(head)
    for _ in range(size >> 20):
        peer.sendall(block)
    seen = b""
    while b"\\r\\n\\r\\n" not in seen or len(seen.partition(b"\\r\\n\\r\\n")[2]) < 64:
        data = peer.recv(65536)
        assert data, seen
        seen += data
    if seen.split()[1] != b"200":
        status = seen.split()[1].decode()
print(status, size * count / 1e6 / (time.perf_counter() - began))
"""


def upload(place: Place, route: Route, megabytes: int, count: int = 1) -> float:
    """MB/s of `count` POSTs of so many MiB each, on one connection. The answer is a digest of 64 characters."""
    arguments = (route.host, str(UPLOAD), str(megabytes), str(count))
    told = inside(place, route.client, *ON_FIRST, sys.executable, "-c", POSTS, *arguments)
    return parse_transfer(told)


def download(place: Place, route: Route, megabytes: int) -> float:
    """MB/s of one GET, of so much of a file."""
    command = ("curl", "-s", "-m", "60", "-o", "/dev/null", "-r", f"0-{(megabytes << 20) - 1}")
    format_ = ("-w", "%{http_code} %{speed_download} %{size_download}")
    told = inside(place, route.client, *ON_FIRST, *command, *format_, route.url(BIG, HTTP)).split()
    if len(told) != 3 or int(told[2]) != megabytes << 20:
        raise LoadError(f"download: cut short: {' '.join(told)}")
    return parse_transfer(f"{told[0]} {float(told[1]) / 1e6}")


def parse_transfer(printed: str) -> float:
    """`STATUS MB/S` → MB/s."""
    status, _, rate = printed.strip().partition(" ")
    if status not in ("200", "206"):
        raise LoadError(f"answered {status or 'nothing'}")
    return float(rate)


# -- CPU ---------------------------------------------------------------------------------------------------


def busy_seconds() -> float:
    """CPU seconds of the whole machine, interrupts included (proc(5), /proc/stat): work in the kernel belongs to
    no process."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, _steal = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def process_seconds(pid: int) -> float:
    """User and system time of a process and its children (proc(5), /proc/<pid>/stat, fields 14 and 15)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(map(process_seconds, map(int, children)))
