"""`python -m benchmarks quick [--json]`: Isolator and HAProxy in the same place, beside the direct path.

Rounds are interleaved (direct, isolator, haproxy, direct, …) and medians told, with the ratio to direct: an absolute
figure of a shared machine says little. Every system first has to refuse a forbidden request.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from isolator.lab import ALLOWED, API, DENIED, PREFIX, STATE, Lab, run, wait_for

ROUNDS = 3
SECONDS = 2
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
  bind 10.9.0.3:{HAPROXY_PORT}
  acl read method GET HEAD
  acl books path_beg /api/v1/
  acl post method POST
  acl upload path /upload
  http-request deny unless read books or post upload
  use_backend uploads if upload
  default_backend api
backend api
  server api {API}:80
backend uploads
  server api {API}:8081
"""

Row = dict[str, str | float | None]
Measure = Callable[[Lab, str, str], float]  # the lab, base URL for requests, base URL for uploads → a figure


def wrk(lab: Lab, base: str, connections: int) -> str:
    command = ("wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", "--latency", base + ALLOWED)
    told = lab.inside("web", *command)
    if "Non-2xx" in told or "Socket errors" in told:
        raise RuntimeError(f"wrk: errors hide in the figure: {told}")
    return told


def requests_per_second(lab: Lab, base: str, upload: str) -> float:
    return found(r"Requests/sec:\s+([0-9.]+)", wrk(lab, base, 32))


def median_latency(lab: Lab, base: str, upload: str) -> float:
    """µs at one connection."""
    number, unit = re.findall(r"50%\s+([0-9.]+)(us|ms)", wrk(lab, base, 1))[0]
    return float(number) * (1000 if unit == "ms" else 1)


def bulk(lab: Lab, base: str, upload: str) -> float:
    """Gbit/s of one TCP flow that layer 4 allows."""
    told = lab.inside("web", "iperf3", "-c", API, "-p", "9091", "-t", str(SECONDS), "-J")
    return float(json.loads(told)["end"]["sum_received"]["bits_per_second"]) / 1e9


def upload_rate(lab: Lab, base: str, upload: str) -> float:
    """MB/s of one request with a body of 500 MB."""
    return posted(lab, upload, 500, 1)


def post_rate(lab: Lab, base: str, upload: str) -> float:
    """MB/s of 200 requests of 1 MB each on one connection."""
    return posted(lab, upload, 1, 200)


POSTS = """\
import http.client, sys, time
host, port, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20, int(sys.argv[4])
body, peer, began = bytes(size), http.client.HTTPConnection(host, port, timeout=60), time.perf_counter()
for _ in range(count):
    peer.request("POST", "/upload?sink", body, {"Host": "api"})
    answer = peer.getresponse()
    assert answer.status == 200, answer.status
    answer.read()
print(size * count / 1e6 / (time.perf_counter() - began))
"""


def posted(lab: Lab, upload: str, megabytes: int, count: int) -> float:
    host, _, port = upload.removeprefix("http://").partition(":")
    return float(lab.inside("web", sys.executable, "-c", POSTS, host, port, str(megabytes), str(count)))


def found(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no figure in: {text}")
    return float(match[1])


def resident(lab: Lab, base: str, upload: str) -> float:
    """MB of memory that the agent holds, after all of the above."""
    assert lab.agent is not None
    status = Path(f"/proc/{lab.agent.pid}/status").read_text()
    return found(r"VmRSS:\s+([0-9]+) kB", status) / 1000


def idle_cpu(lab: Lab, base: str, upload: str) -> float:
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


@contextmanager
def system(lab: Lab, name: str) -> Iterator[tuple[str, str]]:
    """The base URLs under which the client finds the server through this system."""
    direct = f"http://{API}", f"http://{API}:8081"
    if name == "direct":
        yield direct
        return
    if name == "haproxy":
        with haproxy(lab):
            through = f"http://10.9.0.3:{HAPROXY_PORT}"
            enforced(lab, through)
            yield through, through
        return
    lab.start_agent()
    try:
        enforced(lab, direct[0])
        yield direct
    finally:
        command = [sys.executable, "-m", "isolator.cli", "restore", "--all"]
        subprocess.run([*command, "--socket", str(STATE / "isolator.sock")], capture_output=True, check=True)
        lab.stop_agent(15)


@contextmanager
def haproxy(lab: Lab) -> Iterator[None]:
    config = lab.root / "haproxy.cfg"
    config.write_text(HAPROXY.format(root=lab.root))
    process = lab.start("intruder", "haproxy", "-f", str(config))
    try:
        url = f"http://10.9.0.3:{HAPROXY_PORT}{ALLOWED}"
        wait_for(lambda: lab.curl("web", url) == "200", "haproxy does not answer")
        yield
    finally:
        process.terminate()
        process.wait(10)


def enforced(lab: Lab, base: str) -> None:
    wait_for(lambda: lab.curl("web", base + ALLOWED) == "200", f"{base} does not answer")
    if lab.curl("web", base + DENIED) != "403":
        raise RuntimeError(f"{base} lets a forbidden request through: its figures would mean nothing")


# -- running -----------------------------------------------------------------------------------------------


def measure(lab: Lab) -> dict[tuple[str, str], list[float]]:
    figures: dict[tuple[str, str], list[float]] = {}
    for number in range(ROUNDS):
        for name in ("direct", "isolator", "haproxy"):
            with system(lab, name) as (base, upload):
                for suite, (_, _, one, systems) in SUITES.items():
                    if name in systems:
                        print(f"round {number + 1}/{ROUNDS} {name:<9} {suite}", file=sys.stderr)
                        figures.setdefault((suite, name), []).append(one(lab, base, upload))
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
    with Lab(Path("/tmp") / f"{PREFIX}-bench", "off") as lab:
        (lab.root / "nginx.conf").write_text(
            re.sub(
                r"access_log [^;]+;",
                "access_log off; keepalive_requests 100000000;",
                (lab.root / "nginx.conf").read_text(),
            )
        )
        run(
            "nsenter",
            f"--net=/run/netns/{PREFIX}-api",
            "nginx",
            "-c",
            str(lab.root / "nginx.conf"),
            "-s",
            "reload",
        )
        lab.start("api", "iperf3", "-s", "-p", "9091")
        return rows(measure(lab))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("set", choices=("quick",))
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    told = quick()
    if arguments.as_json:
        print(json.dumps(told, indent=1))
        return 0
    print(f"{'suite':<9} {'system':<9} {'metric':<11} {'value':>12} {'unit':<7} {'to direct':>9}")
    for row in told:
        print(
            f"{row['suite']:<9} {row['system']:<9} {row['metric']:<11} {row['value']:>12} {row['unit']:<7}"
            f" {row['ratio_to_direct'] or '-':>9}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
