"""`python -m benchmarks.micro [--only TEXT] [-o FILE.json]`: what single steps cost, each alone (`make bench-micro`).

pyperf runs each in processes of its own. All its options work (`--rigorous`, `--affinity=1`), and so does
`python -m pyperf compare_to OLD.json NEW.json`. Map updates and the ring need root, and are said to be missing without.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pyperf  # type: ignore[import-untyped]

from isolator.control.render import aligned
from isolator.core.compile import compile_policies
from isolator.core.flow import Flow, FlowTable
from isolator.core.identities import Address
from isolator.core.inspector import Inspector
from isolator.core.model import Direction, Endpoint, PuntReason, Side
from isolator.core.pattern import PathPattern
from isolator.core.policy import Covering as Covers
from isolator.core.policy import HttpRule, Policy, PortMatch, Profile, Range, Rule, Selected, labels_of, weigh
from isolator.datapath.abi import identity_key, punt_context
from isolator.datapath.bpf import Datapath
from isolator.datapath.netns import Netns
from isolator.datapath.pins import unpin
from isolator.datapath.ring import Ring, packet_socket
from isolator.replay.flow7 import Flow7
from parsers.http1 import RequestDissector, parse_request
from parsers.packet import ACK, PSH, SYN, VNET, SegmentTemplate, parse_segment
from parsers.path import readings

PLAIN_HEAD = b"GET /api/v1/books HTTP/1.1\r\nHost: api.local\r\n\r\n"
BROWSER_HEAD = (
    b"GET /api/v1/books?page=2 HTTP/1.1\r\nHost: api.local\r\nConnection: keep-alive\r\n"
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0 Safari/537.36\r\n"
    b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8\r\n"
    b"Accept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: en-US,en;q=0.9,de;q=0.8\r\n"
    b"Referer: http://api.local/api/v1/books?page=1\r\nCookie: session=0123456789abcdef0123456789abcdef\r\n\r\n"
)
FLOWS = 10_000
BATCH = 256  # frames in the ring before it is walked: less than a block holds
MAP_BATCH = 4096
ETHERNET = bytes(12) + b"\x08\x00"
Bench = Callable[[int], float]
"""Loops to the seconds that they took."""


@dataclass(frozen=True)
class Micro:
    """`prepare` is called once in each process. `each`: how many things one loop does; it is told for one."""

    name: str
    prepare: Callable[[], Bench]
    each: int = 1
    root: bool = False


def repeated(call: Callable[[], object]) -> Bench:
    def bench(loops: int) -> float:
        began = time.perf_counter()
        for _ in range(loops):
            call()
        return time.perf_counter() - began

    return bench


# -- parsers -----------------------------------------------------------------------------------------------


def head(data: bytes) -> Bench:
    return repeated(lambda: RequestDissector().advance(data, 0))


def path(raw: bytes) -> Bench:
    return repeated(lambda: readings(raw))


def frame(version: int, payload: bytes = PLAIN_HEAD) -> bytes:
    size = 4 if version == 4 else 16
    kind = b"\x08\x00" if version == 4 else b"\x86\xdd"
    ports = (40000).to_bytes(2, "big") + (80).to_bytes(2, "big")
    ends = bytes([10, *bytes(size - 2), 1]), bytes([10, *bytes(size - 2), 2])
    return SegmentTemplate(version, bytes(12) + kind, *ends, ports).build(1, 1, ACK | PSH, payload)[VNET:]


def five_tuple(version: int) -> Bench:
    view = memoryview(frame(version))
    return repeated(lambda: parse_segment(view))


# -- core --------------------------------------------------------------------------------------------------


def profile(lines: int) -> Profile:
    """Of one rule with so many lines; the request matches the last."""
    told = [HttpRule(frozenset({"GET"}), PathPattern(f"/v{at}/**")) for at in range(lines - 1)]
    rule = Rule("read", ports=(PortMatch(6, 80),), http=(*told, HttpRule(None, PathPattern("/api/**"))))
    policy = Policy("api", ingress=(rule,))
    return Profile(1, weigh([policy], [Covers(policy, rule)]))


def opened(inspected: Profile) -> Flow7:
    """A connection whose handshake is done."""
    flow = Flow7(inspected.number, 1, Direction.INGRESS)
    there = SegmentTemplate(4, ETHERNET, b"\x0a\0\0\1", b"\x0a\0\0\2", b"\x9c\x40\0\x50")
    for template, seq, ack, flags, direction in (
        (there, 0, 0, SYN, Direction.INGRESS),
        (there.reversed(), 0, 1, SYN | ACK, Direction.EGRESS),
    ):
        view = memoryview(template.build(seq, ack, flags))[VNET:]
        flow.inspect(parse_segment(view), view, direction)
    return flow


def flow_table() -> Bench:
    table, inspected = FlowTable(), profile(1)
    pinned = opened(inspected)
    wires = [bytes([10, 0, at >> 8, at & 255, 10, 0, 0, 2, 156, 64, 0, 80]) for at in range(FLOWS)]
    for wire in wires:
        table.add(Flow(wire, 1, pinned, inspected), 3, wire)
    return repeated(lambda: table.find(3, wires[FLOWS // 2]))


def decide(lines: int) -> Bench:
    inspected, request = profile(lines), parse_request(PLAIN_HEAD)
    return repeated(lambda: inspected.decide(request))


def inspect() -> Bench:
    """One allowed request of a kept-alive connection: sequence, head, decision, commands. The head was seen before."""
    inspected = profile(1)
    inspector = Inspector({1: inspected}, 1)
    first = parse_segment(frame(4))
    flow = inspector.adopt(bytes(44), 3, first.key, opened(inspected))
    assert flow is not None
    context = punt_context(1, Side.NETWORK, PuntReason.PAYLOAD, 1)
    template = SegmentTemplate(4, ETHERNET, b"\x0a\0\0\1", b"\x0a\0\0\2", b"\x9c\x40\0\x50")

    def bench(loops: int) -> float:
        took = 0.0
        for at in range(loops):
            view = memoryview(template.build(flow.next, at, ACK | PSH, PLAIN_HEAD))[VNET:]
            began = time.perf_counter()
            inspector.receive(flow, parse_segment(view), view, context, 1.0)
            took += time.perf_counter() - began
            inspector.committed(flow, flow.next)
        return took

    return bench


def compiling(count: int, shared: bool = False) -> Bench:
    """So many endpoints, a policy each (or ten policies for all): two peers, a network, three rules."""
    endpoints = {
        at: Endpoint(f"e{at}", {"app": f"a{at % 10}", "name": f"e{at}"}) for at in range(1, count + 1)
    }
    addresses: dict[int, list[Address]] = {at: [IPv4Address(0x0A000000 + at)] for at in endpoints}
    made = []
    for at in range(1, (10 if shared else count) + 1):
        select = {"app": f"a{at % 10}"} if shared else {"name": f"e{at}"}
        peers = (
            Selected(labels_of({"name": f"e{at % count + 1}"})),
            Selected(labels_of({"app": f"a{at % 10}"})),
            Range(IPv4Network((0xC0A80000 + (at % 16 << 8), 24))),
        )
        rules = (
            Rule("read", peers=peers, ports=(PortMatch(6, 80),), http=(HttpRule(frozenset({"GET"})),)),
            Rule("dns", peers=peers[1:], ports=(PortMatch(17, 53), PortMatch(6, 53))),
            Rule("probe", peers=peers[2:], ports=(PortMatch(6, 8080),)),
        )
        made.append(Policy(f"p{at}", labels_of(select), ingress=rules, egress=rules[1:2]))
    return repeated(lambda: compile_policies(made, endpoints, addresses, 1))


# -- the kernel's ------------------------------------------------------------------------------------------


@cache
def undone() -> ExitStack:
    """Taken down when the process ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack


@cache
def datapath() -> Datapath:
    pins = Path(f"/sys/fs/bpf/isolator-micro-{os.getpid()}")
    undone().callback(unpin, pins)
    return undone().enter_context(Datapath.open(pins))


def map_update() -> Bench:
    identities = datapath().maps["identities"]
    key, value = identity_key(1, bytes(16), 128), bytes(4)
    return repeated(lambda: identities.update(key, value))


def map_updates() -> Bench:
    identities = datapath().maps["identities"]
    entries = [(identity_key(1, at.to_bytes(16, "big"), 128), bytes(4)) for at in range(MAP_BATCH)]
    return repeated(lambda: identities.update_many(entries))


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def ring_walk() -> Bench:
    """Reading frames that are there: no wake-up, no sending."""
    name = f"isomicro-{os.getpid()}"
    ip("netns", "add", name)
    undone().callback(ip, "netns", "del", name)
    quiet = ("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
    subprocess.run(["nsenter", f"--net=/run/netns/{name}", *quiet], check=True)
    ip("-n", name, "link", "add", "name", "there", "mtu", "65535", "type", "veth", "peer", "name", "ring")
    for end in ("there", "ring"):
        ip("-n", name, "link", "set", "dev", end, "arp", "off", "multicast", "off", "mtu", "65535", "up")
    with Netns(name) as namespace:
        sender = undone().enter_context(packet_socket(namespace))
        sender.bind(("there", 0))
        ring = undone().enter_context(Ring(packet_socket(namespace), "ring"))
    sent = bytes(VNET) + frame(4)

    def bench(loops: int) -> float:
        took = 0.0
        for _ in range(loops):
            for _ in range(BATCH):
                sender.send(sent)
            left, began = BATCH, time.perf_counter()
            while left > 0:
                left -= len(ring.poll(16))
            took += time.perf_counter() - began
        return took

    return bench


# -- all of them -------------------------------------------------------------------------------------------

MICROS = (
    Micro("http1: a plain head", lambda: head(PLAIN_HEAD)),
    Micro("http1: a browser's head", lambda: head(BROWSER_HEAD)),
    Micro("path: nothing to normalise", lambda: path(b"/api/v1/books")),
    Micro("path: escapes and dot segments", lambda: path(b"/api/%7ejoe/./x/../v1//b%6f%6fks")),
    Micro("packet: five-tuple, IPv4", lambda: five_tuple(4)),
    Micro("packet: five-tuple, IPv6", lambda: five_tuple(6)),
    Micro(f"flow table: find, of {FLOWS}", flow_table),
    Micro("policy: decide, 1 line", lambda: decide(1)),
    Micro("policy: decide, last of 100 lines", lambda: decide(100)),
    Micro("inspector: a request", inspect),
    Micro("compile: 10 endpoints, a policy each", lambda: compiling(10)),
    Micro("compile: 100 endpoints, a policy each", lambda: compiling(100)),
    Micro("compile: 1000 endpoints, a policy each", lambda: compiling(1000)),
    Micro("compile: 1000 endpoints, 10 policies", lambda: compiling(1000, shared=True)),
    Micro("map: one update", map_update, root=True),
    Micro(f"map: an entry of {MAP_BATCH} at once", map_updates, MAP_BATCH, root=True),
    Micro("ring: walk, a frame", ring_walk, BATCH, root=True),
)


def add_only(command: list[str], arguments: Any) -> None:
    command += ["--only", arguments.only]


def measure(runner: Any, micro: Micro) -> Any:
    """pyperf's figures; what a process that it made returns is not for us."""
    prepared = cache(micro.prepare)
    return runner.bench_time_func(micro.name, lambda loops: prepared()(loops), inner_loops=micro.each)


def seconds(value: float) -> str:
    for unit, size in (("s ", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def main() -> None:
    runner = pyperf.Runner(
        values=3, processes=5, warmups=1, min_time=0.05,
        program_args=("-m", "benchmarks.micro"), add_cmdline_args=add_only,
    )  # fmt: skip
    runner.argparser.set_defaults(quiet=True)
    runner.argparser.add_argument("--only", default="", help="those whose name has this in it")
    only = runner.parse_args().only
    rows, missing = [["WHAT", "MEDIAN", "SPREAD"]], []
    for micro in MICROS:
        if only not in micro.name:
            continue
        if micro.root and os.geteuid() != 0:
            missing.append(micro.name)
        elif (found := measure(runner, micro)) and not runner.args.worker:
            spread = found.median_abs_dev() / found.median()
            rows.append([micro.name, seconds(found.median()), f"± {spread:.0%}"])
    if not runner.args.worker:
        print(*aligned(rows), sep="\n")
        for name in missing:
            print(f"not measured, needs root: {name}")


if __name__ == "__main__":
    main()
