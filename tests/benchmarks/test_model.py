"""What is read of the kernel, and what a node carries by the constants."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.model import UNITS, Constants, carried, memlocks, table

CONSTANTS = Constants(
    agent_mb=50, maps_mb=40, request_us=20, flow_us=80, idle_flow_python_bytes=1000, idle_flow_map_bytes=3000,
    rule_us=100, rule_python_bytes=500, endpoint_python_kb=100, endpoint_map_kb=2,
)  # fmt: skip


def test_maps_are_counted_once_and_programs_not() -> None:
    one = "pos:\t0\nmap_type:\t1\nmemlock:\t4096\nmap_id:\t7\n"
    other = one.replace("4096", "100").replace("\t7", "\t8")
    assert memlocks([one, one, other, "prog_type:\t3\nmemlock:\t9\n", ""]) == {"7": 4096, "8": 100}


def test_carried() -> None:
    node = carried(CONSTANTS, containers=500, rules=20)
    assert (node.requests, node.new_flows_cpu) == (50_000, 10_000)
    assert node.new_flows_table == pytest.approx(8 * node.new_flows_endpoint)
    assert node.agent_mb == pytest.approx(50 + 500 * (0.1 + 0.01) + 65.536)
    assert node.maps_mb == pytest.approx(40 + 1 + 196.608)
    assert node.reload_s == pytest.approx(1)


def test_a_slower_path_carries_less() -> None:
    assert carried(replace(CONSTANTS, request_us=40), 1, 1).requests == 25_000


def test_every_constant_has_its_line() -> None:
    assert len(table(CONSTANTS)) == len(UNITS) == 10
