"""The agent: the one place that builds everything and lets it run.

    config → node (netns, maps, ring) → adopt what an earlier process left → policy → splices → API
    then, in one event loop: the ring, kernel events, the heartbeat, changes of endpoints, addresses and files

The event loop owns all state. What blocks (splicing, writing a policy) runs in a worker thread, one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import structlog
import uvloop

from isolator import __version__
from isolator.control.agent_view import (
    AgentStatus,
    EndpointState,
    EndpointStatus,
    Metric,
    PolicyStatus,
    RestoreResult,
    UnknownNameError,
)
from isolator.control.api import create_app
from isolator.control.config import Config, PolicySource, load
from isolator.control.flowlog import FlowLog, FlowVerdict
from isolator.control.netns_runtime import NetnsRuntime
from isolator.control.problems import ConfigErrors
from isolator.control.runtime import Change, ChangeKind, RuntimeEndpoint
from isolator.control.server import ApiServer, SocketInUseError
from isolator.core.compile import PolicyTooLarge, compile_policies
from isolator.core.explain import Explanation, Question, explain
from isolator.core.inspector import Inspector
from isolator.core.model import Direction, Endpoint
from isolator.datapath.abi import mapped
from isolator.datapath.attach import XdpMode
from isolator.datapath.errors import DatapathError
from isolator.datapath.journal import Journal
from isolator.datapath.netns import SpliceError
from isolator.datapath.node import Names, Node
from isolator.datapath.preflight import preflight
from isolator.datapath.splice import Address, EndpointGoneError, Splice, Splicer, SpliceRequest
from isolator.records import Recorder

BEAT_EVERY = 0.25  # s
TICK_EVERY = 0.02  # s, while a flow waits for time to pass
ADDRESSES_EVERY = 1.0  # s
FILES_EVERY = 1.0  # s
AGE_EVERY = 5.0  # s
RETRY_EVERY = 2.0  # s between attempts to splice an endpoint whose splice failed

log = structlog.get_logger()


class AgentError(Exception):
    """The agent cannot run; the text says why and what to do."""


@dataclass(slots=True)
class Managed:
    """A configured endpoint."""

    configured: RuntimeEndpoint
    number: int = 0
    state: EndpointState = EndpointState.WAITING
    splice: Splice | None = None
    addresses: tuple[Address, ...] = ()
    detail: str | None = "its network namespace is not there"
    retry_at: float = field(default=0.0)

    @property
    def request(self) -> SpliceRequest:
        c = self.configured
        return SpliceRequest(c.name, str(c.netns), c.interface)


class Agent:
    """Implements `control.agent_view.AgentView`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = load(path)
        self.config, self._sources = loaded.config, loaded.sources
        self.flow_log = FlowLog()
        self._started = time.time()
        self._managed: dict[str, Managed] = {}
        self._numbered: dict[int, Endpoint] = {}
        self._owners: dict[str, Endpoint] = {}
        self._recorder = Recorder(self.flow_log, self._numbered, self._owners)
        self._inspector = Inspector({}, 0)
        self._node = Node(
            Names.of(self.config.state_dir),
            self._inspector,
            self._recorder.message,
            XdpMode[self.config.xdp.upper()],
        )
        self._runtime = NetnsRuntime(self.config.endpoints)
        self._policy_errors: list[str] = []
        self._working = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._ticking = False

    # -- life -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises AgentError, DatapathError, SocketInUseError, OSError."""
        preflight(Names.of(self.config.state_dir).pins)
        with hold(self.config.state_dir), self._node:
            self._node.open()
            self._listen()
            await self._take_up()
            server = ApiServer(create_app(self), self.config.socket)
            await server.start()
            self._start_tasks()
            log.info("running", pid=os.getpid(), endpoints=len(self._managed), config=str(self.path))
            await self._stopping.wait()
            await self._wind_down(server)

    def _listen(self) -> None:
        loop, node = asyncio.get_running_loop(), self._node
        events = node.datapath.events()
        loop.add_reader(node.ring.fileno(), self._drain)
        loop.add_reader(node.doorbell.fileno(), self._drain)
        loop.add_reader(node.datapath.maps["events"].fd, lambda: self._read_events(events))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self._reload_told()))
        node.beat()

    def _start_tasks(self) -> None:
        every = (
            (BEAT_EVERY, self._beat),
            (ADDRESSES_EVERY, self._refresh),
            (FILES_EVERY, self._watch_files()),
            (AGE_EVERY, self._age),
        )
        for seconds, work in every:
            self._spawn(repeat(seconds, work))
        self._spawn(self._follow_runtime())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the agent failed", error=repr(task.exception()))

    async def _wind_down(self, server: ApiServer) -> None:
        if self.config.on_exit == "restore":
            await self.restore(None)
        for task in list(self._tasks):
            task.cancel()
        await server.stop()
        loop = asyncio.get_running_loop()
        for fd in (
            self._node.ring.fileno(),
            self._node.doorbell.fileno(),
            self._node.datapath.maps["events"].fd,
        ):
            loop.remove_reader(fd)
        self._node.datapath.control.need_wakeup = False
        self._node.datapath.control.heartbeat = 0  # down, from now on: nobody has to wait for the bound

    # -- the packets' loop ----------------------------------------------------------------------------------

    def _drain(self) -> None:
        if self._node.forwarder.run():
            asyncio.get_running_loop().call_soon(self._drain)
        self._arm()

    def _arm(self) -> None:
        if self._inspector.waiting and not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(TICK_EVERY, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self._node.forwarder.tick(time.time())
        self._arm()

    def _read_events(self, events: Any) -> None:
        for event in events.read():
            self._recorder.event(event)

    async def _beat(self) -> None:
        self._node.beat()
        for rule, count in self._inspector.take_counts().items():
            self.flow_log.counter(FlowVerdict.FORWARDED, rule).hits += count

    async def _age(self) -> None:
        """Forgets inspected flows that have ended, or that nobody has used for long."""
        async with self._working:
            ended = await asyncio.to_thread(self._node.ended_flows, time.monotonic_ns())
        for key, incarnation in ended:
            self._node.datapath.commands.delete(key, incarnation)
            self._inspector.flows.remove(key)

    # -- endpoints ------------------------------------------------------------------------------------------

    async def _take_up(self) -> None:
        """Adopts what an earlier agent left, puts policy in force, splices what is missing."""
        for configured in self._runtime.endpoints():
            self._managed[configured.name] = Managed(configured, detail="about to be spliced")
        for missing in self._runtime.missing():
            self._managed[missing.name] = Managed(missing)
        found = await asyncio.to_thread(self._node.recover)
        for splice in found.adopted:
            self._adopt(splice)
        for error in found.failed:
            log.error("a splice of an earlier run needs attention", error=str(error))
        await self._enforce()
        for managed in self._managed.values():
            if managed.splice is None and managed.detail == "about to be spliced":
                await self._protect(managed)

    def _adopt(self, splice: Splice) -> None:
        managed = self._managed.get(splice.name)
        number = self._node.number_of(splice)
        if managed is None or number is None:
            log.warning("left spliced, though no longer configured: isolator restore", endpoint=splice.name)
            return
        self._node.adopt(splice, number)
        self._spliced(managed, number, splice)

    def _spliced(self, managed: Managed, number: int, splice: Splice) -> None:
        managed.number, managed.splice, managed.addresses = number, splice, splice.addresses
        managed.state, managed.detail = EndpointState.ENFORCED, None
        self._number(managed)

    def _number(self, managed: Managed) -> None:
        endpoint = Endpoint(managed.configured.name, managed.configured.labels)
        self._numbered[managed.number] = endpoint
        for address in managed.addresses:
            self._owners[str(address)] = endpoint

    def _unnumber(self, managed: Managed) -> None:
        self._numbered.pop(managed.number, None)
        for address in managed.addresses:
            self._owners.pop(str(address), None)
        managed.number, managed.splice, managed.addresses = 0, None, ()

    async def _protect(self, managed: Managed) -> None:
        """Policy first, then the splice: closed or decided from the first packet on."""
        managed.number = next(number for number in range(1, 32768) if number not in self._numbered)
        try:
            managed.addresses = await asyncio.to_thread(self._node.addresses_now, managed.request)
            self._number(managed)
            await self._enforce()
            async with self._working:
                splice = await asyncio.to_thread(self._node.protect, managed.request, managed.number)
        except (SpliceError, OSError) as error:
            self._unnumber(managed)
            managed.state, managed.detail = EndpointState.FAILED, str(error)
            managed.retry_at = time.monotonic() + RETRY_EVERY
            log.error("not spliced", endpoint=managed.configured.name, error=str(error))
            await self._enforce()
            return
        before = managed.addresses
        self._spliced(managed, managed.number, splice)
        log.info("spliced", endpoint=splice.name, dark_ms=round(splice.dark * 1000, 1))
        if before != splice.addresses:
            await self._enforce()

    async def _lose(self, managed: Managed) -> None:
        """The container went, and its interface with it."""
        log.info("endpoint vanished", endpoint=managed.configured.name)
        number = managed.number
        async with self._working:
            with contextlib.suppress(SpliceError):
                await asyncio.to_thread(self._node.splicer.restore, managed.configured.name)
            self._node.forget(number)
        self._unnumber(managed)
        managed.state, managed.detail = EndpointState.WAITING, "its network namespace is not there"
        await self._enforce()

    async def _follow_runtime(self) -> None:
        async for change in self._runtime.changes():
            await self._change(change)

    async def _change(self, change: Change) -> None:
        managed = self._managed.setdefault(change.endpoint.name, Managed(change.endpoint))
        if change.kind in (ChangeKind.VANISHED, ChangeKind.REPLACED) and managed.splice is not None:
            await self._lose(managed)
        managed.configured = change.endpoint
        if change.kind in (ChangeKind.APPEARED, ChangeKind.REPLACED):
            if managed.splice is None:
                await self._protect(managed)
        elif change.kind is ChangeKind.RELABELLED and managed.splice is not None:
            self._number(managed)
            await self._enforce()

    async def _refresh(self) -> None:
        """Addresses come and go inside a container; a failed splice is tried again."""
        changed = False
        for managed in list(self._managed.values()):
            if managed.state is EndpointState.FAILED and time.monotonic() >= managed.retry_at:
                managed.retry_at = time.monotonic() + RETRY_EVERY
                await self._protect(managed)
            elif managed.splice is not None:
                changed |= await self._refresh_addresses(managed, managed.splice)
        if changed:
            await self._enforce()

    async def _refresh_addresses(self, managed: Managed, splice: Splice) -> bool:
        try:
            addresses = await asyncio.to_thread(self._node.splicer.addresses, splice)
        except EndpointGoneError:
            await self._lose(managed)
            return False
        except (SpliceError, OSError):
            return False
        if addresses == managed.addresses or managed.splice is not splice:
            return False
        for address in managed.addresses:
            self._owners.pop(str(address), None)
        managed.addresses = addresses
        self._number(managed)
        self._node.datapath.set_addresses(managed.number, [mapped(address) for address in addresses])
        return True

    # -- policy ---------------------------------------------------------------------------------------------

    async def _enforce(self) -> None:
        """Compiles what is known now and puts it in force, in one step."""
        async with self._working:
            datapath = self._node.datapath
            compiled = compile_policies(
                [source.policy for source in self._sources],
                dict(self._numbered),
                self._numbered_addresses(),
                datapath.next_generation(),
            )
            self._inspector.prepare_policy(compiled.profiles, compiled.generation)
            self._recorder.rules = compiled.rules
            await asyncio.to_thread(
                datapath.write_policy,
                compiled.generation,
                compiled.entries,
                [((each.address, each.prefixlen), each.identity) for each in compiled.identities],
            )

    async def reload(self) -> list[str]:
        try:
            loaded = load(self.path)
        except ConfigErrors as error:
            self._policy_errors = [str(problem) for problem in error.problems]
            return self._policy_errors
        config = loaded.config
        fixed = fixed_settings(self.config, config)
        if fixed:
            self._policy_errors = [
                f"{self.path}: {name} cannot change while running: restart the agent" for name in fixed
            ]
            return self._policy_errors
        self._policy_errors = []
        before, self._sources = self._sources, loaded.sources
        try:
            await self._enforce()
        except (PolicyTooLarge, DatapathError) as error:
            self._sources = before
            await self._enforce()
            self._policy_errors = [f"{self.path}: {error}"]
            return self._policy_errors
        gone = {m.name for m in self.config.endpoints} - {m.name for m in config.endpoints}
        self.config = config
        self._runtime.configure(config.endpoints)
        for name in gone:
            await self._drop_configured(name)
        log.info("policy in force", generation=self._node.datapath.generation, policies=len(loaded.sources))
        return []

    async def _drop_configured(self, name: str) -> None:
        managed = self._managed.get(name)
        if managed is not None and managed.splice is not None:
            await self._restore_one(managed)
        self._managed.pop(name, None)

    async def _reload_told(self) -> None:
        for error in await self.reload():
            log.error("not reloaded, the old policy stays in force", error=error)

    def _watch_files(self) -> Callable[[], Coroutine[Any, Any, None]]:
        seen = stamps(self.path, self.config)

        async def look() -> None:
            nonlocal seen
            now = stamps(self.path, self.config)
            if now != seen:
                seen = now
                await self._reload_told()

        return look

    # -- AgentView ------------------------------------------------------------------------------------------

    def status(self) -> AgentStatus:
        return AgentStatus(
            version=__version__,
            pid=os.getpid(),
            started=self._started,
            state_dir=str(self.config.state_dir),
            generation=self._node.datapath.generation,
            xdp=self.config.xdp,
            endpoints=[self._endpoint_status(managed) for managed in self._managed.values()],
            policy_errors=self._policy_errors,
        )

    def _endpoint_status(self, managed: Managed) -> EndpointStatus:
        configured = managed.configured
        return EndpointStatus(
            name=configured.name,
            state=managed.state,
            labels=configured.labels,
            netns=str(configured.netns),
            interface=configured.interface,
            addresses=[str(address) for address in managed.addresses],
            policies=[s.policy.name for s in self._sources if selects(s, configured.labels)],
            detail=managed.detail,
        )

    def policies(self) -> list[PolicyStatus]:
        return [
            PolicyStatus(
                name=source.policy.name,
                file=source.file,
                mode=source.policy.mode,
                failure=source.policy.failure,
                endpoints=[e.name for e in self._numbered.values() if selects(source, e.labels)],
                document=source.document,
            )
            for source in self._sources
        ]

    def explain(self, question: Question) -> Explanation:
        return explain(
            [source.policy for source in self._sources], self._numbered, self._numbered_addresses(), question
        )

    def _numbered_addresses(self) -> dict[int, tuple[Address, ...]]:
        known = {managed.number: managed.addresses for managed in self._managed.values()}
        return {number: known.get(number, ()) for number in self._numbered}

    async def restore(self, names: Sequence[str] | None) -> list[RestoreResult]:
        unknown = [name for name in names or () if name not in self._managed]
        if unknown:
            raise UnknownNameError(
                f"no endpoint {unknown[0]!r}; there are: {', '.join(self._managed) or 'none'}"
            )
        wanted = list(self._managed) if names is None else list(names)
        spliced = [self._managed[name] for name in wanted if self._managed[name].splice is not None]
        return [await self._restore_one(managed) for managed in spliced]

    async def _restore_one(self, managed: Managed) -> RestoreResult:
        name = managed.configured.name
        try:
            async with self._working:
                await asyncio.to_thread(self._node.release, name, managed.number)
        except SpliceError as error:
            return RestoreResult(name, str(error))
        self._unnumber(managed)
        managed.state, managed.detail = (
            EndpointState.WAITING,
            "restored: not protected until the agent restarts",
        )
        await self._enforce()
        return RestoreResult(name)

    def metrics(self) -> Iterable[Metric]:
        node = self._node
        ring = node.ring.statistics()
        yield Metric("ring_frames", "Frames read from the ring.", "counter", [({}, ring.frames)])
        yield Metric("ring_drops", "Frames the kernel found no room for.", "counter", [({}, ring.drops)])
        yield Metric("ring_freezes", "Times the ring was full.", "counter", [({}, ring.freezes)])
        drops = [({"reason": reason.name}, count.packets) for reason, count in node.datapath.drops().items()]
        yield Metric("kernel_drops", "Packets the kernel dropped, by reason.", "counter", drops)
        slow = [({"reason": reason.name}, count) for reason, count in node.forwarder.drops.items()]
        yield Metric("slow_path_drops", "Frames Python dropped, by reason.", "counter", slow)
        yield Metric(
            "inspected_flows", "Connections that Python knows.", "gauge", [({}, len(self._inspector.flows))]
        )


# -- parts -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hold(state_dir: Path) -> Any:
    """One agent for each state folder. Raises AgentError if there is one already."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with open(state_dir / "agent.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AgentError(
                f"another agent runs on {state_dir}: stop it, or use another state_dir"
            ) from error
        write_pid(file)
        yield


def write_pid(file: IO[str]) -> None:
    file.write(f"{os.getpid()}\n")
    file.flush()


def selects(source: PolicySource, labels: dict[str, str]) -> bool:
    return any(source.policy.selects(labels, direction) for direction in Direction)


async def repeat(seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Forever. What one round raises is told, and the next one comes."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except (DatapathError, OSError) as error:
            log.error("periodic work failed", work=getattr(work, "__name__", "work"), error=str(error))


def fixed_settings(old: Config, new: Config) -> list[str]:
    """Settings that differ and that a running agent cannot change."""
    pairs = {
        "runtime": (old.runtime, new.runtime),
        "state_dir": (old.state_dir, new.state_dir),
        "datapath": (old.xdp, new.xdp),
    }
    return [name for name, (before, after) in pairs.items() if before != after]


def stamps(path: Path, config: Config) -> dict[Path, tuple[int, int]]:
    """Modification time and size of every file that the policy depends on."""
    files = [path]
    for entry in config.policies:
        files += sorted(entry.iterdir()) if entry.is_dir() else [entry]
    found = {}
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            found[file] = (status.st_mtime_ns, status.st_size)
    return found


def restore_without_agent(state_dir: Path, names: Sequence[str]) -> list[str]:
    """Puts back what a dead agent left, by its journal. What could not be, one line each."""
    failed = []
    with hold(state_dir):
        splicer = Splicer(Names.of(state_dir).netns, Journal(Names.of(state_dir).journal))
        for name in names or [entry.name for entry in splicer.journal.entries()]:
            try:
                splicer.restore(name)
            except EndpointGoneError as error:
                log.info("gone", endpoint=name, detail=str(error))
            except SpliceError as error:
                failed.append(str(error))
    return failed


def main(arguments: Sequence[str]) -> int:
    """`run CONFIG`, or `restore STATE_DIR [NAME…]`; what goes wrong is one line each."""
    try:
        if arguments[0] == "run":
            uvloop.run(Agent(Path(arguments[1])).run())
            return 0
        failed = restore_without_agent(Path(arguments[1]), arguments[2:])
    except ConfigErrors as error:
        failed = [str(problem) for problem in error.problems]
    except (AgentError, DatapathError, PolicyTooLarge, SocketInUseError, OSError) as error:
        failed = [str(error)]
    for line in failed:
        print(f"isolator: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
