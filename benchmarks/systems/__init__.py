"""The systems of the race, one adapter a file."""

from __future__ import annotations

from benchmarks.systems.base import Editable, Kind, System
from benchmarks.systems.direct import Direct
from benchmarks.systems.envoy import Envoy
from benchmarks.systems.haproxy import Haproxy
from benchmarks.systems.iptables import Iptables
from benchmarks.systems.isolator import Isolator
from benchmarks.systems.isolator_python import IsolatorPython
from benchmarks.systems.nftables import Nftables
from benchmarks.systems.nginx import Nginx
from benchmarks.systems.suricata import Suricata

__all__ = ["BASELINE", "Editable", "Kind", "System", "all_systems"]

BASELINE = "direct"


def all_systems() -> list[System]:
    return [
        Direct(),
        Isolator(),
        IsolatorPython(),
        Haproxy(),
        Nginx(),
        Envoy(),
        Suricata(),
        Iptables(),
        Nftables(),
    ]
