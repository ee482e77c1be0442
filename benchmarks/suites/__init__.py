"""The suites, one subject a file."""

from __future__ import annotations

from benchmarks.suites.base import FULL, QUICK, Mode, Point, Run, Suite, lower_is_better
from benchmarks.suites.bulk import Bulk
from benchmarks.suites.churn import Churn
from benchmarks.suites.connect import Connect
from benchmarks.suites.cost import Cost
from benchmarks.suites.flows import Flows
from benchmarks.suites.http import Http
from benchmarks.suites.latency import Latency
from benchmarks.suites.mixed import Mixed
from benchmarks.suites.rules import Rules
from benchmarks.suites.transfer import Download, Upload

__all__ = ["FULL", "QUICK", "Mode", "Point", "Run", "Suite", "all_suites", "lower_is_better"]


def all_suites() -> list[Suite]:
    traffic: list[Suite] = [Bulk(), Http(), Latency(), Connect(), Upload(), Download()]
    return [*traffic, Rules(), Mixed(), Cost(), Churn(), Flows()]
