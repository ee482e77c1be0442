"""`python -m benchmarks life [--json]`: what the agent's life costs those who are connected, against its bars.

    connections   some of each kind and state, through each event: how many are lost
    udp           a stream of 1 kHz: its longest gap at a splice and at a restore
    scale         100 endpoints: the first start, a restart, memory, a restore
    hang          SIGSTOP: what goes on, what waits, what passes (benchmarks.hang)

A bar that is missed is told, and the exit code is 1.
"""

from __future__ import annotations

import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.connections import INSPECTED, KINDS, UDP, Crowd, prepare
from benchmarks.hang import HANGS, hang
from isolator.lab import PREFIX, STATE, Lab, run, wait_for

EACH = 25  # connections of a kind: 200 in all
UDP_ROUNDS = 5
SETTLE = 0.5  # s of the stream on both sides of an event
ENDPOINTS = 100

GAP_MS, LOST = 50.0, 0.0
SPLICED_S, ADOPTED_S, RESIDENT_MB = 10.0, 2.0, 150.0

Row = dict[str, str | float | None]


def row(suite: str, case: str, event: str, value: float | str, unit: str, bar: float | str | None) -> Row:
    """`bar`: the value may not be more than this number, or has to be this text; None: only told."""
    return {"suite": suite, "case": case, "event": event, "value": value, "unit": unit, "bar": bar}


def met(told: Row) -> bool:
    value, bar = told["value"], told.get("bar")
    if isinstance(bar, float) and isinstance(value, float):
        return value <= bar
    return bar is None or bar == value


# -- connections -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """`splices`: inspected connections that were open before are reset where the policy fails closed."""

    name: str
    happen: Callable[[Lab], None]
    splices: bool = False


def restart(how: int) -> Callable[[Lab], None]:
    def happen(lab: Lab) -> None:
        lab.stop_agent(how)
        lab.start_agent()

    return happen


def restore_all(lab: Lab) -> None:
    command = ("-m", "isolator.cli", "restore", "--all", "--socket", str(STATE / "isolator.sock"))
    subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=60)


EVENTS = (  # one that changes the maps' layout (an upgrade) belongs between SIGTERM and restore
    Event("splice", Lab.start_agent, splices=True),
    Event("kill -9, restart", restart(signal.SIGKILL)),
    Event("SIGTERM, restart", restart(signal.SIGTERM)),
    Event("restore", restore_all),
    Event("splice again", restart(signal.SIGTERM), splices=True),
)


@dataclass(frozen=True, slots=True)
class Series:
    """`before`: connections are opened before the first splice, otherwise behind it."""

    name: str
    failure: str
    before: bool

    def declared(self, event: Event, kind: str) -> bool:
        """Lost on purpose: nobody knows where the next request of such a connection begins."""
        return event.splices and self.failure == "closed" and kind in INSPECTED


SERIES = (
    Series("closed", "closed", before=True),
    Series("open", "open", before=True),
    Series("open, opened after the splice", "open", before=False),
)


def connections(each: int = EACH) -> Iterator[Row]:
    for series in SERIES:
        with Lab(Path("/tmp") / f"{PREFIX}-life", "off") as lab:
            prepare(lab, series.failure)
            events = EVENTS if series.before else EVENTS[1:]
            if not series.before:
                lab.start_agent()
            with Crowd(lab, each) as crowd:
                for event in events:
                    yield from through(lab, crowd, series, event, each)


def through(lab: Lab, crowd: Crowd, series: Series, event: Event, each: int) -> Iterator[Row]:
    print(f"{series.name}: {event.name}", file=sys.stderr)
    crowd.begin()
    event.happen(lab)
    lost = crowd.finish()
    for kind in (kind.kind for kind in KINDS):
        declared = series.declared(event, kind)
        count = float(len(lost.get(kind, [])))
        unit = f"reset of {each}, as declared" if declared else f"lost of {each}"
        yield row(
            "connections", f"{series.name}: {kind}", event.name, count, unit, None if declared else LOST
        )


# -- udp ---------------------------------------------------------------------------------------------------

# Arrival times are the kernel's (socket(7), SO_TIMESTAMPNS); a line in asks for the longest gap since the last one.
RECEIVER = """\
import select, socket, struct, sys
peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
peer.setsockopt(socket.SOL_SOCKET, 35, 1)
peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
peer.bind(("", int(sys.argv[1])))
last, longest = 0.0, 0.0
while True:
    ready = select.select([peer, sys.stdin], [], [])[0]
    if peer in ready:
        _, notes, _, _ = peer.recvmsg(64, 64)
        seconds, nanoseconds = struct.unpack("qq", notes[0][2][:16])
        now = seconds + nanoseconds * 1e-9
        longest, last = max(longest, now - last if last else 0.0), now
    elif sys.stdin.readline():
        print(longest * 1000, flush=True)
        longest = 0.0
    else:
        break
"""

SENDER = """\
import os, socket, sys, time
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
except OSError:
    pass
peer, at = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), time.monotonic()
while True:
    at += 0.001
    time.sleep(max(0.0, at - time.monotonic()))
    try:
        peer.sendto(b"tick", (sys.argv[1], int(sys.argv[2])))
    except OSError:
        pass
"""


class Stream:
    """1,000 packets a second from web to api."""

    def __init__(self, lab: Lab) -> None:
        self._receiver = lab.start("api", sys.executable, "-c", RECEIVER, str(UDP))
        time.sleep(SETTLE)
        lab.start("web", sys.executable, "-c", SENDER, "10.9.0.2", str(UDP))
        time.sleep(SETTLE)

    def gap(self, happen: Callable[[], None]) -> float:
        """ms; the longest time without a packet around something."""
        self._longest()
        time.sleep(SETTLE)
        happen()
        time.sleep(SETTLE)
        return self._longest()

    def _longest(self) -> float:
        assert self._receiver.stdin is not None and self._receiver.stdout is not None
        self._receiver.stdin.write("\n")
        self._receiver.stdin.flush()
        return float(self._receiver.stdout.readline())


def udp(rounds: int = UDP_ROUNDS) -> Iterator[Row]:
    gaps: dict[str, list[float]] = {}
    with Lab(Path("/tmp") / f"{PREFIX}-life", "off") as lab:
        prepare(lab, "closed")
        stream = Stream(lab)
        happenings: dict[str, Callable[[], None]] = {
            "nothing": lambda: time.sleep(1),
            "splice": lab.start_agent,
            "kill -9, restart": lambda: restart(signal.SIGKILL)(lab),
            "restore": lambda: restore_all(lab),
        }
        for number in range(rounds):
            print(f"udp {number + 1}/{rounds}", file=sys.stderr)
            for name, happen in happenings.items():
                gaps.setdefault(name, []).append(stream.gap(happen))
            lab.stop_agent(signal.SIGTERM)
    for name, values in gaps.items():
        bar = None if name == "nothing" else GAP_MS
        yield row("udp", "longest gap, median", name, round(statistics.median(values), 1), "ms", bar)
        yield row("udp", "longest gap, maximum", name, round(max(values), 1), "ms", bar)


# -- scale -------------------------------------------------------------------------------------------------

CONTAINER = """\
link set lo up
link add eth0 type veth peer name v{name} netns {host}
addr add 10.9.{number}.1/16 dev eth0
addr add fd00:9::{number}:1/64 dev eth0 nodad
link set eth0 up
route add default via 10.9.0.254 metric 7
"""


def populate(lab: Lab, count: int) -> None:
    """`count` more containers on the bridge, and a config that names them alone."""
    host, names = f"{PREFIX}-host", [f"c{number}" for number in range(1, count + 1)]
    for number, name in enumerate(names, 1):
        run("ip", "netns", "add", f"{PREFIX}-{name}")
        batch(f"{PREFIX}-{name}", CONTAINER.format(name=name, host=host, number=number))
    batch(host, "".join(f"link set v{name} master br0 up\n" for name in names))
    labels = "labels: {app: bookstore, role: api}"
    (lab.root / "isolator.yaml").write_text(
        f"runtime: {{kind: netns}}\nstate_dir: {STATE}\npolicies: [policies/]\nendpoints:\n"
        + "".join(f"  - {{name: {n}, netns: {PREFIX}-{n}, interface: eth0, {labels}}}\n" for n in names)
    )


def batch(netns: str, lines: str) -> None:
    subprocess.run(["ip", "-n", netns, "-batch", "-"], input=lines, text=True, check=True, timeout=60)


def scale(count: int = ENDPOINTS) -> Iterator[Row]:
    with Lab(Path("/tmp") / f"{PREFIX}-life", "off") as lab:
        populate(lab, count)
        case = f"{count} endpoints"
        yield row("scale", case, "first start", round(all_enforced(lab, count), 2), "s", SPLICED_S)
        for name, how in (("kill -9", signal.SIGKILL), ("SIGTERM", signal.SIGTERM)):
            began = time.monotonic()
            lab.stop_agent(how)
            yield row(
                "scale", case, f"{name}, until it is gone", round(time.monotonic() - began, 2), "s", None
            )
            yield row(
                "scale", case, f"restart after {name}", round(all_enforced(lab, count), 2), "s", ADOPTED_S
            )
        yield row("scale", case, "memory", resident(lab), "MB", RESIDENT_MB)
        began = time.monotonic()
        restore_all(lab)
        yield row("scale", case, "restore --all", round(time.monotonic() - began, 2), "s", None)


def all_enforced(lab: Lab, count: int) -> float:
    """Seconds from the agent's start until it says of every endpoint that it is enforced."""
    began = time.monotonic()
    lab.start_agent()

    def enforced() -> bool:
        states = [each["state"] for each in lab.ask("/v1/status").get("endpoints", [])]
        return states == ["enforced"] * count

    wait_for(enforced, "not all are enforced", 60)
    return time.monotonic() - began


def resident(lab: Lab) -> float:
    assert lab.agent is not None
    found = re.search(r"VmRSS:\s+([0-9]+) kB", Path(f"/proc/{lab.agent.pid}/status").read_text())
    assert found is not None
    return round(int(found[1]) / 1000, 1)


# -- hang --------------------------------------------------------------------------------------------------


def hangs() -> Iterator[Row]:
    for failure in ("closed", "open"):
        print(f"hang: {failure}", file=sys.stderr)
        with Lab(Path("/tmp") / f"{PREFIX}-life", "off") as lab:
            prepare(lab, failure)
            lab.start_agent()
            for seen in hang(lab, failure):
                yield row("hang", seen.what, failure, seen.seen, "", seen.expected)


# -- telling -----------------------------------------------------------------------------------------------

SUITES: dict[str, Callable[[], Iterator[Row]]] = {
    "connections": connections,
    "udp": udp,
    "scale": scale,
    "hang": hangs,
}


def life() -> list[Row]:
    return [told for suite in SUITES.values() for told in suite()]


def print_life(told: list[Row]) -> None:
    """A matrix of connections and one of what happens while the agent hangs; the rest line by line."""
    columns = list(dict.fromkeys(str(each["event"]) for each in told if each["suite"] == "connections"))
    matrix(told, "connections", f"lost of {EACH} (in brackets: reset, as declared)", columns)
    print(f"\n{'suite':<7} {'case':<21} {'event':<27} {'value':>8} {'unit':<4} {'bar':>6}")
    for each in told:
        if each["suite"] in ("udp", "scale"):
            bar = "-" if each["bar"] is None else f"{each['bar']:g}"
            mark = "" if met(each) else "  MISSED"
            print(
                f"{each['suite']:<7} {each['case']:<21} {each['event']:<27} {each['value']:>8} {each['unit']:<4}"
                f" {bar:>6}{mark}"
            )
    print()
    matrix(told, "hang", f"the agent hangs for {HANGS:g} s, with failure:", ["closed", "open"])
    missed = [each for each in told if not met(each)]
    print(f"\n{len(told) - len(missed)} of {len(told)} figures meet their bars")


def matrix(told: list[Row], suite: str, title: str, columns: list[str]) -> None:
    """Cases down, events across; `!` marks what misses its bar."""
    print(f"{title:<52}" + "".join(f"{name:>18}" for name in columns))
    cells: dict[str, dict[str, str]] = {}
    for each in told:
        if each["suite"] == suite:
            value = each["value"]
            text = f"{value:g}" if isinstance(value, float) else str(value)
            text = f"({text})" if "declared" in str(each["unit"]) else text
            cells.setdefault(str(each["case"]), {})[str(each["event"])] = text + ("" if met(each) else " !")
    for case, found in cells.items():
        print(f"{case:<52}" + "".join(f"{found.get(name, '-'):>18}" for name in columns))
