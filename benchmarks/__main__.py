"""`python -m benchmarks quick [--json]`: Isolator and HAProxy in the same place, beside the direct path.
`python -m benchmarks life [--json]`: what the agent's life costs those who are connected (benchmarks.life).

    direct    client ─── plain          two containers that nobody protects
    isolator  web ─────── api           two endpoints, through the agent's policy
    haproxy   client ─── proxy ─── plain

All on one bridge and there all the time, the agent too; rounds are interleaved (direct, isolator, haproxy, direct, …)
and medians told, with the ratio to direct: an absolute figure of a shared machine says little. Where bytes are counted,
clients run on the first CPU and servers on the last, or the scheduler's moods decide. Every system first has to
refuse a forbidden request.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.life import life, met, print_life
from isolator.lab import ALLOWED, API, DENIED, NGINX, PREFIX, Lab, wait_for

ROUNDS = 5
SECONDS = 1
PLAIN, PROXY = "10.9.0.5", "10.9.0.6"
ON_FIRST = ("taskset", "-c", "0")
ON_LAST = ("taskset", "-c", str((os.cpu_count() or 1) - 1))
IDLE_SECONDS = 5
HAPROXY_PORT = 8000
HAPROXY = f"""\
global
  nbthread 1
  pidfile {{root}}/haproxy.pid
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
  http-reuse always
frontend front
  bind {PROXY}:{HAPROXY_PORT}
  acl read method GET HEAD
  acl books path_beg /api/v1/
  acl post method POST
  acl upload path /upload
  http-request deny unless read books or post upload
  use_backend uploads if upload
  default_backend api
backend api
  server api {PLAIN}:80
backend uploads
  server api {PLAIN}:8081
"""

Row = dict[str, str | float | None]
Measure = Callable[["Lab", "System"], float]


# -- what is measured --------------------------------------------------------------------------------------


def wrk(lab: Lab, system: System, connections: int) -> str:
    command = ("wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", "--latency", system.base + ALLOWED)
    told = lab.inside(system.client, *command)
    if "Non-2xx" in told or "Socket errors" in told:
        raise RuntimeError(f"wrk: errors hide in the figure: {told}")
    return told


def requests_per_second(lab: Lab, system: System) -> float:
    return found(r"Requests/sec:\s+([0-9.]+)", wrk(lab, system, 32))


def median_latency(lab: Lab, system: System) -> float:
    """µs at one connection."""
    number, unit = re.findall(r"50%\s+([0-9.]+)(us|ms)", wrk(lab, system, 1))[0]
    return float(number) * (1000 if unit == "ms" else 1)


def bulk(lab: Lab, system: System) -> float:
    """Gbit/s of one TCP flow that layer 4 allows."""
    command = ("iperf3", "-c", system.host, "-p", "9091", "-t", str(SECONDS), "-J")
    told = lab.inside(system.client, *ON_FIRST, *command)
    return float(json.loads(told)["end"]["sum_received"]["bits_per_second"]) / 1e9


def upload_rate(lab: Lab, system: System) -> float:
    """MB/s of one request with a body of 500 MB."""
    return posted(lab, system, 500, 1)


def post_rate(lab: Lab, system: System) -> float:
    """MB/s of 200 requests of 1 MB each on one connection."""
    return posted(lab, system, 1, 200)


POSTS = """\
import socket, sys, time
host, port, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20, int(sys.argv[4])
peer, block = socket.create_connection((host, port), timeout=60), bytes(1 << 20)
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
head = f"POST /upload?sink HTTP/1.1\\r\\nHost: api\\r\\nContent-Length: {size}\\r\\n\\r\\n".encode()
began = time.perf_counter()
for _ in range(count):
    peer.sendall(head)
    for _ in range(size >> 20):
        peer.sendall(block)
    seen = b""
    while b"\\r\\n\\r\\n" not in seen or len(seen.partition(b"\\r\\n\\r\\n")[2]) < 64:
        seen += peer.recv(65536)
    assert seen.split()[1] == b"200", seen
print(size * count / 1e6 / (time.perf_counter() - began))
"""


def posted(lab: Lab, system: System, megabytes: int, count: int) -> float:
    arguments = (system.host, str(system.upload_port), str(megabytes), str(count))
    return float(lab.inside(system.client, *ON_FIRST, sys.executable, "-c", POSTS, *arguments))


def found(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no figure in: {text}")
    return float(match[1])


def resident(lab: Lab, system: System) -> float:
    """MB of memory that the agent holds, after all of the above."""
    assert lab.agent is not None
    status = Path(f"/proc/{lab.agent.pid}/status").read_text()
    return found(r"VmRSS:\s+([0-9]+) kB", status) / 1000


def idle_cpu(lab: Lab, system: System) -> float:
    """% of one CPU that the agent takes without traffic."""
    assert lab.agent is not None
    before = cpu_seconds(lab.agent.pid)
    time.sleep(IDLE_SECONDS)
    return 100 * (cpu_seconds(lab.agent.pid) - before) / IDLE_SECONDS


def cpu_seconds(pid: int) -> float:
    """User and system time (proc(5), /proc/<pid>/stat, fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


SUITES: dict[str, tuple[str, str, Measure, tuple[str, ...]]] = {
    "bulk": ("throughput", "Gbit/s", bulk, ("direct", "isolator")),
    "http": ("requests", "1/s", requests_per_second, ("direct", "isolator", "haproxy")),
    "latency": ("p50", "us", median_latency, ("direct", "isolator", "haproxy")),
    "upload": ("throughput", "MB/s", upload_rate, ("direct", "isolator", "haproxy")),
    "posts": ("throughput", "MB/s", post_rate, ("direct", "isolator", "haproxy")),
    "memory": ("resident", "MB", resident, ("isolator",)),
    "idle": ("cpu", "%", idle_cpu, ("isolator",)),
}


# -- systems -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class System:
    """Where the client is, which host it asks, and at which ports it finds pages and uploads."""

    name: str
    client: str
    host: str
    port: int = 80
    upload_port: int = 8081

    @property
    def base(self) -> str:
        return f"http://{self.host}:{self.port}"


DIRECT = System("direct", "client", PLAIN)
ISOLATOR = System("isolator", "web", API)
THROUGH_HAPROXY = System("haproxy", "client", PROXY, HAPROXY_PORT, HAPROXY_PORT)
SYSTEMS = (DIRECT, ISOLATOR, THROUGH_HAPROXY)


@contextmanager
def place() -> Iterator[Lab]:
    """The lab with all systems up."""
    nginx = re.sub(r"access_log [^;]+;", "access_log off; keepalive_requests 100000000;", NGINX)
    with Lab(Path("/tmp") / f"{PREFIX}-bench", "off", nginx) as lab:
        for number, name in enumerate(("client", "plain", "proxy"), 4):
            lab.add(name, number)
        lab.serve("plain", nginx)
        for name in ("plain", "api"):
            lab.start(name, *ON_LAST, "iperf3", "-s", "-p", "9091")
        config = lab.root / "haproxy.cfg"
        config.write_text(HAPROXY.format(root=lab.root))
        lab.start("proxy", "haproxy", "-f", str(config))
        lab.start_agent()
        enforced(lab, ISOLATOR)
        enforced(lab, THROUGH_HAPROXY)
        yield lab


def enforced(lab: Lab, system: System) -> None:
    wait_for(
        lambda: lab.curl(system.client, system.base + ALLOWED) == "200", f"{system.name} does not answer"
    )
    if lab.curl(system.client, system.base + DENIED) != "403":
        raise RuntimeError(f"{system.name} lets a forbidden request through: its figures would mean nothing")


# -- running -----------------------------------------------------------------------------------------------


def measure(lab: Lab) -> dict[tuple[str, str], list[float]]:
    figures: dict[tuple[str, str], list[float]] = {}
    for suite, (_, _, one, names) in SUITES.items():
        for number in range(ROUNDS):
            print(f"{suite} {number + 1}/{ROUNDS}", file=sys.stderr)
            for system in SYSTEMS:
                if system.name in names:
                    figures.setdefault((suite, system.name), []).append(one(lab, system))
    return figures


def rows(figures: dict[tuple[str, str], list[float]]) -> list[Row]:
    """Medians; `ratio_to_direct` is the median of the rounds' own ratios."""
    told: list[Row] = []
    for (suite, name), values in figures.items():
        metric, unit, _, _ = SUITES[suite]
        direct = figures.get((suite, "direct"))
        ratios = [value / base for value, base in zip(values, direct, strict=True)] if direct else None
        told.append(
            {
                "suite": suite,
                "system": name,
                "metric": metric,
                "value": round(statistics.median(values), 3),
                "unit": unit,
                "ratio_to_direct": round(statistics.median(ratios), 3) if ratios else None,
            }
        )
    return sorted(told, key=lambda row: list(SUITES).index(str(row["suite"])))


def quick() -> list[Row]:
    with place() as lab:
        return rows(measure(lab))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("set", choices=("quick", "life"))
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    make, show = (quick, print_quick) if arguments.set == "quick" else (life, print_life)
    told = make()
    if arguments.as_json:
        print(json.dumps(told, indent=1))
    else:
        show(told)
    return int(not all(map(met, told)))


def print_quick(told: list[Row]) -> None:
    print(f"{'suite':<9} {'system':<9} {'metric':<11} {'value':>12} {'unit':<7} {'to direct':>9}")
    for row in told:
        print(
            f"{row['suite']:<9} {row['system']:<9} {row['metric']:<11} {row['value']:>12} {row['unit']:<7}"
            f" {row['ratio_to_direct'] or '-':>9}"
        )


if __name__ == "__main__":
    sys.exit(main())
