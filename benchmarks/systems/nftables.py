"""nftables on the bridge: bridge netfilter, hook forward, established connections first."""

from __future__ import annotations

from benchmarks.policy import allowed_ports, rule_source
from benchmarks.systems.filter import Filter

CONFIG = """\
table inet race
delete table inet race
table inet race {{
  chain forward {{
    type filter hook forward priority 0; policy {policy};
    ct state established,related accept
{rules}    tcp dport {{ {ports} }} accept
{last}  }}
}}
"""


class Nftables(Filter):
    name = "nftables"
    commands, loads = ("nft",), ("nft", "-f", "-")
    set_up = (
        "Layer 4 only. Family inet behind bridge-nf-call-iptables=1, established connections first; rules one by one, "
        "as iptables has them (one set of addresses and ports would be flat). conntrack's TIME_WAIT is 5 s."
    )

    def config(self, rules: int = 0, policy: bool = True, extra: bool = False) -> str:
        return CONFIG.format(
            policy="drop" if policy else "accept",
            rules="".join(
                f"    ip saddr {address} tcp dport {port} accept\n"
                for address, port in map(rule_source, range(rules))
            ),
            ports=", ".join(map(str, allowed_ports(extra))),
            last="    meta l4proto tcp reject with tcp reset\n" if policy else "",
        )
