"""Two containers on a bridge, for the splice tests, in namespaces of this process: spt-a-PID, spt-b-PID, spt-host-PID,
and spt-isolator-PID for the ports. A child process works in its parent's.

The stand-in for the BPF programs sends whatever arrives at one port out of the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator

OWNER = os.environ.setdefault("SPLICE_LAB", str(os.getpid()))
A, B, HOST, ISOLATOR = (f"spt-{name}-{OWNER}" for name in ("a", "b", "host", "isolator"))
INVENTORY = (
    "ip -d addr", "ip -d link", "ip route show table all", "ip -6 route show table all", "ip nexthop", "ip rule",
    "ip -6 rule", "ip neigh show nud permanent", "ip -6 neigh show proxy", "ip neigh show proxy", "ethtool -k eth0",
    "ethtool -l eth0", "tc qdisc show", "sysctl -a --pattern '^net.ipv[46].(conf|neigh)'",
)  # fmt: skip


def run(command: str) -> str:
    done = subprocess.run(command, shell=True, text=True, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")
    return done.stdout


def inside(netns: str, command: str) -> str:
    return run(f"nsenter --net=/run/netns/{netns} {command}")


def batch(netns: str, commands: str) -> None:
    """`ip` commands, one a line."""
    for line in filter(None, map(str.strip, commands.splitlines())):
        run(f"ip -n {netns} {line}")


def inventory(netns: str = A) -> dict[str, str]:
    """All that a user can see of a namespace's network; only what counts by itself is taken out."""
    return {command: _still(inside(netns, f"{command} 2>/dev/null || true")) for command in INVENTORY}


def _still(text: str) -> str:
    text = re.sub(r"(valid_lft|preferred_lft|expires) \d+sec", r"\1 Nsec", text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def await_addresses(netns: str, seconds: float = 10.0) -> None:
    """Until no address is tentative any more and eth0 is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        links = json.loads(inside(netns, "ip -j addr show dev eth0"))
        if links[0]["operstate"] == "UP" and not any(a.get("tentative") for a in links[0]["addr_info"]):
            return
        time.sleep(0.05)
    raise TimeoutError(inside(netns, "ip addr"))


def mirror(container_port: int, network_port: int) -> None:
    """Attach for a splice: runs inside the isolator netns, both ports down."""
    for here, there in ((container_port, network_port), (network_port, container_port)):
        names = {link["ifindex"]: link["ifname"] for link in json.loads(run("ip -j link"))}
        run(f"tc qdisc add dev {names[here]} clsact")
        run(
            f"tc filter add dev {names[here]} ingress protocol all u32 match u32 0 0"
            f" action mirred egress redirect dev {names[there]}"
        )


@contextlib.contextmanager
def two_containers() -> Iterator[None]:
    take_down()
    try:
        for netns in (A, B, HOST):
            run(f"ip netns add {netns}")
            run(f"ip -n {netns} link set lo up")
            inside(netns, "sysctl -q -w net.ipv6.conf.default.accept_dad=0")  # saves 2 s a test
        batch(HOST, "link add br0 type bridge\nlink set br0 up mtu 9000")
        for number, netns in ((1, A), (2, B)):
            batch(HOST, f"link add veth{number} mtu 9000 type veth peer name eth0 mtu 9000 netns {netns}")
            batch(HOST, f"link set veth{number} master br0 up")
            batch(
                netns,
                f"link set eth0 up\naddr add 10.31.0.{number}/24 dev eth0\naddr add fd31::{number}/64 dev eth0",
            )
        await_addresses(A)
        await_addresses(B)
        yield
    finally:
        take_down()


def take_down() -> None:
    for netns in (A, B, HOST, ISOLATOR):
        subprocess.run(["ip", "netns", "del", netns], capture_output=True)


def furnish() -> None:
    """Everything that has to come back, on the first container's eth0."""
    batch(
        A,
        """
        link set eth0 txqueuelen 777 alias front
        link property add dev eth0 altname outer
        addr add 10.31.0.101/24 dev eth0 label eth0:one
        addr add 10.31.0.102/32 dev eth0 scope link
        addr add 172.31.9.1/30 broadcast 172.31.9.3 dev eth0 valid_lft 3000 preferred_lft 2000
        addr add 172.31.10.1 peer 172.31.10.2/32 dev eth0 metric 77
        addr add fd32::7/80 dev eth0 nodad
        addr add fd33::8/64 dev eth0 noprefixroute valid_lft 3000 preferred_lft 0
        route add default via 10.31.0.2 metric 50 mtu 1400 advmss 1300
        route add default via 10.31.0.254 metric 60
        route add 192.0.2.0/24 src 10.31.0.101 nexthop via 10.31.0.2 weight 2 nexthop via 10.31.0.3 weight 5
        route add 198.51.100.0/24 via 10.31.7.9 dev eth0 table 100 onlink
        route add blackhole 203.0.113.0/24
        route add 203.0.113.128/25 dev lo src 10.31.0.101
        rule add iif eth0 table 100 priority 1000
        rule add from 10.31.0.101 lookup 100 priority 1001
        rule add oif eth0 fwmark 7 table 100 priority 1002
        -6 route add default via fd31::2 metric 99 mtu 1300
        -6 route add 2001:db8:1::/48 via fd31::2 expires 1000
        -6 route add 2001:db8:2::/48 nexthop via fd31::2 nexthop via fd31::3 weight 4
        -6 route add 2001:db8:3::/48 dev eth0 table 101 hoplimit 9 pref high
        -6 route add unreachable 2001:db8:4::/48
        -6 rule add oif eth0 table 101 priority 2000
        nexthop add id 5 via 10.31.0.5 dev eth0
        nexthop add id 6 via 10.31.0.6 dev eth0
        nexthop add id 7 group 5,3/6
        route add 192.0.2.128/25 nhid 7
        neigh add 10.31.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent
        neigh add fd31::77 lladdr 02:00:00:00:00:78 dev eth0 nud permanent router
        neigh add proxy 10.31.0.78 dev eth0
        neigh add proxy fd31::78 dev eth0
        """,
    )
    inside(A, "ethtool -K eth0 tx off rx-gro-list on 2>/dev/null")
    await_addresses(A)
    for setting in (
        "ipv4.conf.eth0.rp_filter=2", "ipv4.conf.eth0.arp_announce=2", "ipv4.conf.eth0.forwarding=1",
        "ipv6.conf.eth0.accept_ra=0", "ipv6.conf.eth0.hop_limit=33", "ipv6.conf.eth0.mtu=8000",
        "ipv4.neigh.eth0.gc_stale_time=123", "ipv6.neigh.eth0.base_reachable_time_ms=45678",
        "ipv4.neigh.eth0.unres_qlen_bytes=100000", "ipv4.conf.default.rp_filter=1",
    ):  # fmt: skip
        inside(A, f"sysctl -q -w net.{setting}")
