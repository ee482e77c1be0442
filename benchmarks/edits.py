"""`python -m benchmarks.edits`: from an edit of a file, or a change of an endpoint, to its enforcement (root).

The agent's own parts in one process: the watch on the files, reading, compiling, and the kernel's maps; no traffic and
no containers. An edit counts from before the file is written, a change from when the agent knows of it; both until the
kernel has switched. Medians of several, one process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from ipaddress import IPv4Address
from pathlib import Path

import structlog

from isolator.control.config import PolicyFiles, load
from isolator.control.flowlog import FlowLog
from isolator.control.render import aligned
from isolator.control.watch import FileWatch
from isolator.core.inspector import Inspector
from isolator.core.model import Endpoint
from isolator.datapath.bpf import Datapath
from isolator.datapath.pins import unpin
from isolator.enforcement import Enforcement
from isolator.records import Recorder
from isolator.roster import Roster
from isolator.worker import Worker

RULES, PREFIXES, ENDPOINTS = 10_000, 50_000, 100
TIMES = 5
HEAD = "kind: Policy\nmetadata: {name: %s}\nspec:\n  select: {app: %s}\n  ingress:\n"


def cidr_rule(at: int, networks: int = 1) -> str:
    held = ", ".join(
        f"{{cidr: 10.{each >> 8}.{each & 255}.0/24}}" for each in range(at * networks, (at + 1) * networks)
    )
    return f"    - name: r{at}\n      from: [{held}]\n      ports: [{{port: {at + 1}, protocol: tcp}}]\n"


def paths(folder: Path, edit: int) -> None:
    """One rule with 10,000 lines of HTTP."""
    lines = "".join(f"        - {{methods: [GET], path: /items/{at + edit}/**}}\n" for at in range(RULES))
    rule = "    - name: web\n      ports: [{port: 80}]\n      http:\n"
    (folder / "p.yaml").write_text(HEAD % ("p", "shop") + rule + lines)


def networks(folder: Path, edit: int) -> None:
    """10,000 rules of layer 4 in one policy, a network and a port of its own each."""
    last = f"    - name: edit\n      from: [{{cidr: 192.0.2.{edit}/32}}]\n"
    (folder / "p.yaml").write_text(HEAD % ("p", "shop") + "".join(map(cidr_rule, range(RULES - 1))) + last)


def wide(folder: Path, edit: int) -> None:
    """10,000 rules of layer 4 that name 50,000 networks."""
    rules = []
    for at in range(RULES):
        each = range(at * 5, at * 5 + 5)
        held = ", ".join(f"{{cidr: 10.{n >> 12}.{n >> 4 & 255}.{(n & 15) * 16}/28}}" for n in each)
        rules.append(f"    - name: r{at}\n      from: [{held}]\n      ports: [{{port: {at + edit + 1}}}]\n")
    (folder / "p.yaml").write_text(HEAD % ("p", "shop") + "".join(rules))


def many(folder: Path, edit: int) -> None:
    """1,000 policies of 10 rules, a file each; one of them is edited."""
    for at in range(1000) if edit == 0 else (500,):
        rules = "".join(cidr_rule(each) for each in range(at * 10, at * 10 + 10))
        last = f"    - name: edit\n      from: [{{cidr: 192.0.2.{edit}/32}}]\n"
        (folder / f"p{at}.yaml").write_text(HEAD % (f"p{at}", f"a{at % 100}") + rules + last)


class Agent:
    """An Enforcement over a real datapath. Implements enforcement.Kernel."""

    def __init__(self, folder: Path, datapath: Datapath, app: Callable[[int], str]) -> None:
        self.datapath, self.app = datapath, app
        path = folder / "isolator.yaml"
        path.write_text(f"state_dir: {folder}/state\npolicies: [policies/]\nendpoints: []\n")
        files, self.roster, self.work = PolicyFiles(), Roster(), Worker()
        inspector = Inspector({}, 0)
        recorder = Recorder(FlowLog(), self.roster.endpoints, self.roster.owners)
        loaded = load(path, files)
        self.policy = Enforcement(path, loaded, self, self.roster, inspector, recorder, self.work, files)
        self.watch = FileWatch()
        for number in range(1, ENDPOINTS + 1):
            self.put(number)

    def put(self, number: int, label: str = "", address: int = 0) -> None:
        labels = {"app": self.app(number), "name": f"e{number}", **({"tier": label} if label else {})}
        at = IPv4Address(0xAC100000 + (address or number))
        self.roster.put(number, Endpoint(f"e{number}", labels), (at,))

    async def edited(self, write: Callable[[], None]) -> float:
        await self.work(self.watch.aim, self.policy.files)
        self.policy.files_changed()
        began, before = time.perf_counter(), self.datapath.generation
        writing = asyncio.get_running_loop().run_in_executor(None, write)
        while not await self.watch.burst(1) or not self.policy.files_changed():
            pass
        if errors := await self.policy.reload():
            raise SystemExit("\n".join(errors))
        took = time.perf_counter() - began
        await writing
        assert self.datapath.generation > before
        await self.policy.retire()
        return took

    async def changed(self, change: Callable[[], None]) -> float:
        began, before = time.perf_counter(), self.datapath.generation
        change()
        await self.policy.enforce()
        took = time.perf_counter() - began
        assert self.datapath.generation > before
        await self.policy.retire()
        return took

    async def whole(self, change: Callable[[], None]) -> float:
        """The same without what stands: all is compiled and written."""
        self.policy._standing = None
        return await self.changed(change)

    async def close(self) -> None:
        self.watch.close()
        await self.work.close()


async def edits(shape: Callable[[Path, int], None], folder: Path, datapath: Datapath) -> list[float]:
    policies = folder / "policies"
    policies.mkdir()
    shape(policies, 0)
    agent = Agent(folder, datapath, lambda number: f"a{number}" if shape is many else "shop")
    await agent.policy.enforce()
    await agent.policy.retire()

    def written(at: int) -> Callable[[], None]:
        return lambda: shape(policies, at)

    found = [await agent.edited(written(at + 1)) for at in range(TIMES)]
    await agent.close()
    return found


async def changes(folder: Path, datapath: Datapath) -> dict[str, list[float]]:
    (folder / "policies").mkdir()
    wide(folder / "policies", 0)
    agent = Agent(folder, datapath, lambda number: "shop")
    await agent.policy.enforce()
    await agent.policy.retire()
    found: dict[str, list[float]] = {}
    for at in range(TIMES):
        steps: dict[str, Callable[[], None]] = {
            "another address": lambda at=at: agent.put(7, address=1000 + at),  # type: ignore[misc]
            "another label": lambda at=at: agent.put(8, label=f"t{at}"),  # type: ignore[misc]
            "an endpoint more": lambda: agent.put(ENDPOINTS + 1),
            "and away again": lambda: agent.roster.remove(ENDPOINTS + 1),
        }
        for name, step in steps.items():
            found.setdefault(name, []).append(await agent.changed(step))
        found.setdefault("another address, all compiled", []).append(
            await agent.whole(lambda at=at: agent.put(7, address=2000 + at))  # type: ignore[misc]
        )
    await agent.close()
    return found


def places() -> Generator[tuple[Path, Datapath], None, None]:
    """A folder and maps of their own, each time."""
    at = 0
    while True:
        at += 1
        pins = Path(f"/sys/fs/bpf/isolator-edits-{os.getpid()}-{at}")
        with tempfile.TemporaryDirectory() as folder, Datapath.open(pins) as datapath:
            try:
                yield Path(folder), datapath
            finally:
                unpin(pins)


def row(what: str, found: list[float]) -> list[str]:
    shown = [f"{value * 1000:.1f} ms" for value in (statistics.median(found), min(found), max(found))]
    return [what, *shown]


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    rows = [["WHAT", "MEDIAN", "LEAST", "MOST"]]
    anew = places()
    for shape in (paths, networks, wide, many):
        rows.append(row(f"edit: {shape.__doc__}", asyncio.run(edits(shape, *next(anew)))))
    about = f"{ENDPOINTS} endpoints, {RULES} rules, {PREFIXES} networks"
    for name, found in asyncio.run(changes(*next(anew))).items():
        rows.append(row(f"{about}: {name}", found))
    anew.close()
    print(*aligned(rows), sep="\n")


if __name__ == "__main__":
    main()
