"""iptables on the bridge, as Docker has it: bridge netfilter, FORWARD, established connections first."""

from __future__ import annotations

from benchmarks.policy import allowed_ports, rule_source
from benchmarks.systems.filter import Filter

ESTABLISHED = "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
ALLOW = "-A FORWARD -p tcp -m multiport --dports {} -j ACCEPT"


class Iptables(Filter):
    name = "iptables"
    commands, loads = ("iptables", "iptables-restore"), ("iptables-restore",)
    set_up = (
        "Layer 4 only: it sees ports, no paths. bridge-nf-call-iptables=1, established connections are accepted by "
        "the first rule, so more rules cost new connections alone. conntrack's TIME_WAIT is 5 s."
    )

    def config(self, rules: int = 0, policy: bool = True, extra: bool = False) -> str:
        more = [
            f"-A FORWARD -s {address} -p tcp --dport {port} -j ACCEPT"
            for address, port in map(rule_source, range(rules))
        ]
        allow = ALLOW.format(",".join(map(str, allowed_ports(extra))))
        last = ["-A FORWARD -p tcp -j REJECT --reject-with tcp-reset", "-A FORWARD -j DROP"] if policy else []
        return "\n".join(["*filter", ":FORWARD ACCEPT", ESTABLISHED, *more, allow, *last, "COMMIT", ""])
