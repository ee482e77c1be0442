"""The agent: the one place that builds everything and lets it run.

    config → is it a first start, and can every endpoint be spliced? → node (netns, maps, ring) → heartbeat
           → endpoints: adopt what an earlier process left, policy, splices → API
    then, in one event loop: the ring, kernel events, the heartbeat, changes of endpoints, addresses and files

The event loop owns all state. What blocks runs in one worker thread. What changes endpoints or policy holds one lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import structlog
import uvloop

from isolator import __version__
from isolator.admission import Admission
from isolator.control.agent_view import (
    AgentStatus,
    EndpointStatus,
    Metric,
    OffloadStatus,
    PolicyStatus,
    RestoreResult,
)
from isolator.control.config import Config, PolicyFiles, PolicySource, load
from isolator.control.engine import host_netns
from isolator.control.flowlog import FlowLog, FlowVerdict
from isolator.control.netns_runtime import NetnsRuntime
from isolator.control.problems import ConfigErrors, errors_in
from isolator.control.runtime import Runtime, RuntimeAwayError
from isolator.control.starts import Starts
from isolator.control.watch import FileWatch
from isolator.core.compile import PolicyTooLarge
from isolator.core.explain import Explanation, Question, explain
from isolator.core.inspector import Inspector
from isolator.datapath.abi import RequestEvent
from isolator.datapath.attach import XdpMode
from isolator.datapath.errors import DatapathError
from isolator.datapath.gate import Gate
from isolator.datapath.journal import Journal
from isolator.datapath.netns import SpliceError
from isolator.datapath.node import Names, Node
from isolator.datapath.preflight import preflight
from isolator.datapath.splice import EndpointGoneError, Splicer
from isolator.endpoints import Endpoints, Managed, mistakes
from isolator.enforcement import Enforcement
from isolator.records import Recorder
from isolator.roster import Roster
from isolator.worker import Worker

if TYPE_CHECKING:
    from isolator.control.server import ApiServer

BEAT_EVERY = 0.25  # s
TICK_EVERY = 0.02  # s, while a flow waits for time to pass
ADDRESSES_EVERY = 1.0  # s
FILES_EVERY = 5.0  # s, for changes of files that the kernel does not tell of
AGE_EVERY = 5.0  # s
COUNT_EVERY = 1.0  # s
NICE = -15  # packets wait for this process: where CPUs are scarce, it has to run as soon as one is there

ENGINE = "engine"  # in the state folder: the socket of the engine whose bridges have a gate

log = structlog.get_logger()


class AgentError(Exception):
    """The agent cannot run; each argument is a line that says why and what to do."""


class Agent:
    """Implements `control.agent_view.AgentView`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = PolicyFiles()
        loaded = load(path, files)
        self._names = Names.of(loaded.config.state_dir)
        self.flow_log = FlowLog()
        self._started = time.time()
        self._roster = Roster()
        self._recorder = Recorder(self.flow_log, self._roster.endpoints, self._roster.owners)
        self._inspector = Inspector({}, 0)
        xdp = XdpMode[loaded.config.xdp.upper()]
        self._node = Node(self._names, self._inspector, self._recorder.message, xdp)
        self._runtime = runtime_of(loaded.config)
        self._work = Worker()
        self._changing = asyncio.Lock()
        host = self._runtime.host
        self._gate = Gate(str(host), self._names.netns) if host is not None else None
        closed = loaded.config.new_containers == "closed"
        self._admission = Admission(self._gate, closed, self._names.netns, self._runtime, self._work)
        self._watch = FileWatch()
        self._policy = Enforcement(
            path, loaded, self._node, self._roster, self._inspector, self._recorder, self._work, files
        )
        self._endpoints = Endpoints(
            self._runtime, self._node, self._policy, self._roster, self._admission, self._work,
            self._changing, self._inspector.forget_endpoint,
            hand_over=lambda number: self._node.forwarder.release(number),
        )  # fmt: skip
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._ticking = False

    @property
    def config(self) -> Config:
        return self._policy.config

    # -- life -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises AgentError, RuntimeAwayError, DatapathError, PolicyTooLarge, OSError (a
        SocketInUseError is one)."""
        preflight(self._names.pins)
        with contextlib.suppress(PermissionError):  # without CAP_SYS_NICE it is slower, not worse
            os.setpriority(os.PRIO_PROCESS, 0, NICE)
        self._refuse_mistakes()
        with hold(self.config.state_dir), self._gate or contextlib.nullcontext(), self._node:
            if self._gate is not None:
                (self.config.state_dir / ENGINE).write_text(str(self.config.engine))
            api = asyncio.get_running_loop().run_in_executor(None, self._make_api)
            self._node.open()
            server = None
            try:
                self._listen()
                self._spawn(repeat(BEAT_EVERY, self._beat))
                await self._endpoints.take_up()
                server = await api
                await server.start()
                self._start_tasks()
                log.info("running", pid=os.getpid(), endpoints=len(self._endpoints), config=str(self.path))
                await self._stopping.wait()
                await self._restore_on_exit()
            finally:
                await self._wind_down(server)

    def _make_api(self) -> ApiServer:
        """In a thread: its libraries take half a second, in which the kernel can load programs and packets pass."""
        from isolator.control.api import create_app
        from isolator.control.server import ApiServer

        return ApiServer(create_app(self), self.config.socket)

    def _refuse_mistakes(self) -> None:
        """At a first start an endpoint of the config that cannot be spliced is a mistake; later, a container that is
        away."""
        if self._names.unused and self.config.endpoints:
            check = Splicer(self._names.netns, Journal(self._names.journal)).check
            if lines := mistakes(self._runtime, check):
                raise AgentError(*lines)

    def _listen(self) -> None:
        loop, node = asyncio.get_running_loop(), self._node
        events = node.datapath.events()
        loop.add_reader(node.ring.fileno(), self._drain)
        loop.add_reader(node.doorbell.fileno(), self._drain)
        loop.add_reader(node.datapath.maps["events"].fd, lambda: self._read_events(events))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self._reload_told()))
        node.beat()

    def _start_tasks(self) -> None:
        every = (
            (ADDRESSES_EVERY, self._endpoints.refresh),
            (0.0, self._watch_files),
            (AGE_EVERY, self._age),
            (COUNT_EVERY, self._count),
        )
        for seconds, work in every:
            self._spawn(repeat(seconds, work))
        self._spawn(self._endpoints.follow())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the agent failed", error=repr(task.exception()))

    def _stop(self) -> None:
        self._endpoints.stop()
        self._stopping.set()

    async def _restore_on_exit(self) -> None:
        if self.config.on_exit == "restore":
            results = await self.restore(None)
            for result in results:
                if result.error is not None:
                    log.error("not restored", endpoint=result.name, error=result.error)
            await self._admission.open()

    async def _wind_down(self, server: ApiServer | None) -> None:
        """What is under way ends first: a splice, a policy. Then the kernel is left to itself."""
        self._endpoints.stop()
        async with self._changing:
            for task in list(self._tasks):
                task.cancel()
        if server is not None:
            await server.stop()
        await self._work.close()
        self._watch.close()
        loop, node = asyncio.get_running_loop(), self._node
        for fd in (node.ring.fileno(), node.doorbell.fileno(), node.datapath.maps["events"].fd):
            loop.remove_reader(fd)
        node.datapath.control.need_wakeup = False
        node.datapath.control.heartbeat = 0  # down, from now on: nobody has to wait for the bound

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
            if isinstance(event, RequestEvent):
                rule = self._node.datapath.automata.rule_of(event.generation, event.event.rule)
                self._recorder.request(event, rule)
            else:
                self._recorder.event(event)

    async def _beat(self) -> None:
        self._node.beat()
        for rule, count in self._inspector.take_counts().items():
            self.flow_log.counter(FlowVerdict.FORWARDED, rule).hits += count

    async def _count(self) -> None:
        """Requests that the kernel accepted."""
        counts = await self._work(self._node.datapath.automata.take_counts)
        self._policy.offload.add(counts)
        for each in counts:
            self.flow_log.counter(FlowVerdict.FORWARDED, each.rule).hits += each.requests

    async def _age(self) -> None:
        """Forgets inspected flows that have ended or that nobody has used for long, and of the others the bytes
        that their server has acknowledged."""
        ended, going = await self._work(self._node.age, time.monotonic_ns())
        for key, incarnation in ended:
            if self._node.datapath.commands.delete(key, incarnation):
                self._inspector.forget_flow(key, incarnation)
        for key, incarnation, acked in going:
            self._inspector.acknowledged(key, incarnation, acked)
        self._inspector.forget_gone({*(key for key, _ in ended), *(key for key, *_ in going)})

    # -- files ----------------------------------------------------------------------------------------------

    async def _watch_files(self) -> None:
        """Again and again: a burst of changes, or the time to look in any case."""
        await self._work(self._watch.aim, self._policy.files)
        if not self._policy.files_changed():
            await self._watch.burst(FILES_EVERY)
        else:
            await self._reload_told()

    async def _reload_told(self) -> None:
        for error in await self.reload():
            log.error("not reloaded, the old policy stays in force", error=error)

    # -- AgentView ------------------------------------------------------------------------------------------

    async def reload(self) -> list[str]:
        async with self._changing:
            errors = await self._policy.reload()
            if not errors:
                await self._endpoints.configure(self.config.endpoints)
            return errors

    async def restore(self, names: Sequence[str] | None) -> list[RestoreResult]:
        return await self._endpoints.restore(names)

    def status(self) -> AgentStatus:
        trouble = [self._policy.trouble] if self._policy.trouble else []
        return AgentStatus(
            version=__version__,
            pid=os.getpid(),
            started=self._started,
            state_dir=str(self.config.state_dir),
            generation=self._node.datapath.generation,
            xdp=self.config.xdp,
            endpoints=[self._endpoint_status(managed) for managed in self._endpoints],
            policy_errors=[*self._policy.errors, *trouble],
            unprotectable=self._runtime.unprotectable(),
            requests=self._policy.offload.total,
        )

    def _endpoint_status(self, managed: Managed) -> EndpointStatus:
        configured = managed.configured
        selecting = self._policy.selecting(configured.labels)
        return EndpointStatus(
            name=configured.name,
            state=managed.state,
            labels=configured.labels,
            netns=str(configured.netns),
            interface=configured.interface,
            addresses=[str(address) for address in managed.addresses],
            policies=[source.policy.name for source in selecting],
            detail=managed.detail or closed_by_labels(selecting),
        )

    def policies(self) -> list[PolicyStatus]:
        selected: dict[str, list[str]] = {}
        for endpoint in self._roster.endpoints.values():
            for source in self._policy.selecting(endpoint.labels):
                selected.setdefault(source.policy.name, []).append(endpoint.name)
        return [
            PolicyStatus(
                name=source.policy.name,
                file=source.file,
                mode=source.policy.mode,
                failure=source.policy.failure,
                endpoints=selected.get(source.policy.name, []),
                document=source.document,
                problems=[str(problem) for problem in source.problems],
            )
            for source in self._policy.in_force
        ]

    def offload(self) -> OffloadStatus:
        datapath = self._node.datapath
        return self._policy.offload.status(
            self._roster.endpoints, self.config.l7, datapath.automata.without_room(datapath.generation)
        )

    def explain(self, question: Question) -> Explanation:
        policies = [source.policy for source in self._policy.in_force]
        return explain(
            policies, self._roster.endpoints, self._roster.addresses, question, self._roster.outsiders
        )

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
        requests = self._policy.offload.total
        decided = [({"by": "kernel"}, requests.kernel), ({"by": "python"}, requests.python)]
        yield Metric("http_requests", "HTTP requests decided, by whom.", "counter", decided)
        why = [({"reason": reason.name}, count) for reason, count in self._policy.offload.why.items()]
        yield Metric(
            "http_requests_python_reasons",
            "Why requests were decided in Python; of allowed ones a sample.",
            "counter",
            why,
        )
        yield Metric(
            "inspected_flows", "Connections that Python knows.", "gauge", [({}, len(self._inspector.flows))]
        )


def closed_by_labels(selecting: Iterable[PolicySource]) -> str | None:
    """Why an endpoint lets nothing in or out, where its labels are wrong."""
    errors = [error for source in selecting for error in errors_in(source.problems)]
    if not errors:
        return None
    more = f" (and {len(errors) - 1} more: isolator policy show)" if len(errors) > 1 else ""
    return f"closed: {errors[0]}{more}"


# -- parts -------------------------------------------------------------------------------------------------


def runtime_of(config: Config) -> Runtime:
    if config.runtime == "netns":
        return NetnsRuntime(config.endpoints)
    from isolator.control.docker_runtime import DockerRuntime  # its libraries take 20 MB

    return DockerRuntime(config.engine, Starts(config.state_dir, config.start_wait))


@contextlib.contextmanager
def hold(state_dir: Path) -> Iterator[None]:
    """One agent for each state folder. Raises AgentError if there is one already."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with open(state_dir / "agent.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AgentError(
                f"another agent runs on {state_dir}: stop it, or use another state_dir"
            ) from error
        write_pid(file)
        yield


def write_pid(file: IO[str]) -> None:
    file.truncate(0)  # only now: until it holds the lock it is another agent's
    file.write(f"{os.getpid()}\n")
    file.flush()


async def repeat(seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Forever. What one round raises is told, and the next one comes."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception as error:  # it runs as long as the agent: no round may be the last
            log.error("periodic work failed", work=getattr(work, "__name__", "work"), error=repr(error))
            await asyncio.sleep(BEAT_EVERY)  # some has no time of its own


def restore_without_agent(state_dir: Path, names: Sequence[str]) -> list[str]:
    """Puts back what a dead agent left, by its journal. What could not be, one line each."""
    failed: list[str] = []
    with hold(state_dir):
        splicer = Splicer(Names.of(state_dir).netns, Journal(Names.of(state_dir).journal))
        if not names:
            failed += [str(error) for error in splicer.journal.unreadable()]
        for name in names or [entry.name for entry in splicer.journal.entries()]:
            try:
                splicer.restore(name)
            except EndpointGoneError as error:
                log.info("gone", endpoint=name, detail=str(error))
            except SpliceError as error:
                failed.append(str(error))
        if not names and (engine := state_dir / ENGINE).exists():
            with Gate(str(host_netns(Path(engine.read_text()))), Names.of(state_dir).netns) as gate:
                gate.remove()
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
    except AgentError as error:
        failed = [str(line) for line in error.args]
    except (RuntimeAwayError, DatapathError, PolicyTooLarge, OSError) as error:
        failed = [str(error)]
    for line in failed:
        print(f"isolator: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
