"""`python -m benchmarks model`: the constants of docs/scaling.md, measured; and what a node would carry by them.

One agent between two containers, as in the race, that decides every request in Python: its CPU and memory, and that of
its maps, by proc(5). The kernel's own work is in none of the figures.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.load import process_seconds, wrk
from benchmarks.place import HTTP, PAGE, Place, Route, place, resident
from benchmarks.suites import FULL, Run
from benchmarks.suites.flows import FORGOTTEN_AFTER, held
from benchmarks.systems.isolator_python import IsolatorPython
from isolator.control.config import load
from isolator.datapath.bpf import FLOWS7_QUOTA
from isolator.datapath.node import LINGER_NS
from isolator.lab import PREFIX, ask_agent, wait_for

FLOWS, ENDPOINTS, RULES = 4_000, 20, 1_000
REQUESTS, CONNECTS = 9, 3  # rounds of a second; the median counts
FLOWS7_MAX = 65_536  # bpf/isolator.h
AGE_EVERY = 5  # s, isolator.daemon: so often ended flows are looked for


@dataclass(frozen=True, slots=True)
class Constants:
    """Of one agent. Memory of maps is what the kernel has allocated for them (`memlock` of their fdinfo)."""

    agent_mb: float
    maps_mb: float
    request_us: float
    flow_us: float
    idle_flow_python_bytes: float
    idle_flow_map_bytes: float
    rule_us: float
    rule_python_bytes: float
    endpoint_python_kb: float
    endpoint_map_kb: float


UNITS = {
    "agent_mb": ("the agent, two endpoints, no traffic: resident", "MB"),
    "maps_mb": ("its maps, empty", "MB"),
    "request_us": ("a request on a kept-alive connection, its head decided in Python", "µs of CPU"),
    "flow_us": ("a new inspected connection, besides its request", "µs of CPU"),
    "idle_flow_python_bytes": ("an idle inspected connection: Python", "bytes"),
    "idle_flow_map_bytes": ("an idle inspected connection: maps", "bytes"),
    "rule_us": ("an HTTP rule, each time the files are read", "µs of CPU"),
    "rule_python_bytes": ("an HTTP rule", "bytes"),
    "endpoint_python_kb": ("an endpoint", "kB"),
    "endpoint_map_kb": ("an endpoint: maps", "kB"),
}


# -- measuring ---------------------------------------------------------------------------------------------


def measured() -> Constants:
    with place() as made:
        system = IsolatorPython()
        route = system.start(made)
        try:
            return constants(made, system, route)
        finally:
            system.stop(made)


def constants(made: Place, system: IsolatorPython, route: Route) -> Constants:
    """Memory first: what load has once allocated stays with the process."""
    (pid,) = system.processes()
    time.sleep(2)
    agent, maps = resident(pid), map_bytes(pid) / 1e6
    endpoints = growth(pid, lambda: more_endpoints(made, system))
    rules = growth(pid, lambda: system.apply(made, RULES))[0]
    system.apply(made, 0)
    with held(Run(made, system, route, FULL), 1, (HTTP,)):
        before = memory(pid)
        with held(Run(made, system, route, FULL), FLOWS, (HTTP,)):
            flows = difference(memory(pid), before)
    request = statistics.median(cpu_us(pid, made, route, 32) for _ in range(REQUESTS))
    new = statistics.median(new_us(pid, made, route) for _ in range(CONNECTS))
    return Constants(
        agent, maps, request, new - request,
        flows[0] / FLOWS, flows[1] / FLOWS,
        rule_us(system), rules / RULES,
        endpoints[0] / ENDPOINTS / 1e3, endpoints[1] / ENDPOINTS / 1e3,
    )  # fmt: skip


def memory(pid: int) -> tuple[float, float]:
    """Bytes: resident, and of the maps."""
    return resident(pid) * 1e6, map_bytes(pid)


def difference(after: tuple[float, float], before: tuple[float, float]) -> tuple[float, float]:
    return after[0] - before[0], after[1] - before[1]


def growth(pid: int, step: Callable[[], object]) -> tuple[float, float]:
    before = memory(pid)
    step()
    return difference(memory(pid), before)


def map_bytes(pid: int) -> float:
    """Of all BPF maps that a process has open, each once."""
    infos = []
    for file in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            infos.append(file.read_text())
        except OSError:  # closed meanwhile
            continue
    return float(sum(memlocks(infos).values()))


def memlocks(infos: list[str]) -> dict[str, int]:
    """fdinfo of descriptors → bytes by map (kernel/bpf/syscall.c, bpf_map_show_fdinfo)."""
    told = {}
    for info in infos:
        found = dict(re.findall(r"^(\w+):\s+(\S+)$", info, re.M))
        if "map_id" in found and "map_type" in found:
            told[found["map_id"]] = int(found["memlock"])
    return told


def cpu_us(pid: int, made: Place, route: Route, connections: int, *headers: str) -> float:
    """For each request of one second's."""
    before = process_seconds(pid)
    told = wrk(made, route, PAGE, connections, 1, headers)
    return (process_seconds(pid) - before) / told.requests * 1e6


def new_us(pid: int, made: Place, route: Route) -> float:
    """With a connection for each, after the table has forgotten the last ones."""
    time.sleep(FORGOTTEN_AFTER)
    return cpu_us(pid, made, route, 16, "Connection: close")


def rule_us(system: IsolatorPython) -> float:
    """Reading and checking the policy's file; the agent then compiles it (benchmarks.micro), too."""
    took = []
    for rules in (0, RULES):
        (system.root / "policies" / "api.yaml").write_text(system.config(rules))
        began = time.process_time()
        load(system.root / "isolator.yaml")
        took.append(time.process_time() - began)
    return (took[1] - took[0]) / RULES * 1e6


def more_endpoints(made: Place, system: IsolatorPython) -> None:
    """So many containers more, all selected by the policy."""
    names = [f"more{number}" for number in range(ENDPOINTS)]
    for name in names:
        made.container(name)
    with (system.root / "isolator.yaml").open("a") as file:
        for name in names:
            labels = "{app: bookstore, role: api}"
            file.write(f"  - {{name: {name}, netns: {PREFIX}-{name}, interface: eth0, labels: {labels}}}\n")
    wait_for(lambda: set(names) <= enforced(system), "the endpoints are not enforced", 60)


def enforced(system: IsolatorPython) -> set[str]:
    told = ask_agent(system.state, "/v1/status").get("endpoints", [])
    return {each["name"] for each in told if each["state"] == "enforced"}


# -- by the constants --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Carried:
    """What a node carries until the first of its parts is full. Rates a second."""

    requests: float
    new_flows_cpu: float
    new_flows_endpoint: float
    new_flows_table: float
    inspected_flows: int
    full_endpoints: int
    agent_mb: float
    maps_mb: float
    reload_s: float


def carried(each: Constants, containers: int, rules: int) -> Carried:
    """`rules`: HTTP rules of each container. One Python process, so no number of cores is in it.

    A place in the table of inspected flows is given back at once where both ends have closed. Counted here are flows
    that end with a reset: theirs is, when they have lingered, and been looked for.
    """
    place_taken = LINGER_NS / 1e9 + AGE_EVERY / 2
    return Carried(
        requests=1e6 / each.request_us,
        new_flows_cpu=1e6 / (each.flow_us + each.request_us),
        new_flows_endpoint=FLOWS7_QUOTA / place_taken,
        new_flows_table=FLOWS7_MAX / place_taken,
        inspected_flows=FLOWS7_MAX,
        full_endpoints=FLOWS7_MAX // FLOWS7_QUOTA,
        agent_mb=each.agent_mb
        + containers * (each.endpoint_python_kb / 1e3 + rules * each.rule_python_bytes / 1e6)
        + FLOWS7_MAX * each.idle_flow_python_bytes / 1e6,
        maps_mb=each.maps_mb
        + containers * each.endpoint_map_kb / 1e3
        + FLOWS7_MAX * each.idle_flow_map_bytes / 1e6,
        reload_s=containers * rules * each.rule_us / 1e6,
    )


def table(each: Constants) -> list[tuple[str, str, str]]:
    return [
        (UNITS[field.name][0], f"{getattr(each, field.name):,.3g}", UNITS[field.name][1])
        for field in fields(each)
    ]
