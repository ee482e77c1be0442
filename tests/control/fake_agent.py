"""An agent that only answers: what the control socket's tests serve."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import uvloop

from isolator.control.agent_view import (
    AgentStatus,
    EndpointState,
    EndpointStatus,
    Metric,
    OffloadStatus,
    PolicyStatus,
    ProfileStatus,
    Requests,
    RestoreResult,
    UnknownNameError,
)
from isolator.control.api import create_app
from isolator.control.flowlog import DecidedBy, FlowLog, FlowRecord, FlowVerdict, HttpMessage, Peer
from isolator.control.server import ApiServer
from isolator.core.explain import Considered, Explanation, Half, Question, QuestionError
from isolator.core.model import Decision, Direction, DropReason, RuleRef, Verdict
from isolator.core.policy import Mode
from isolator.core.tally import Misfit

RULE = RuleRef("api-allow", "read-books")
WEB = Peer("10.9.0.2", 40000, "web", {"app": "bookstore", "role": "web"})
API = Peer("10.9.0.3", 80, "api", {"app": "bookstore", "role": "api"})

DENIED = FlowRecord(
    time=1_700_000_000.25,
    verdict=FlowVerdict.DROPPED,
    direction=Direction.INGRESS,
    source=WEB,
    destination=API,
    protocol="tcp",
    decided_by=DecidedBy.PYTHON,
    reason=DropReason.HTTP_NO_RULE,
    rule=RULE,
    l7=HttpMessage("GET", "/admin", "/api/../admin", "api.local"),
)
ALLOWED = replace(
    DENIED,
    verdict=FlowVerdict.FORWARDED,
    reason=DropReason.NONE,
    l7=HttpMessage("GET", "/api/v1/books", "/api/v1/books", "api.local"),
    why=Misfit.BODY,
)
LAYER4 = FlowRecord(
    time=1_700_000_001.0,
    verdict=FlowVerdict.DROPPED,
    direction=Direction.INGRESS,
    source=Peer("192.0.2.1", 5000),
    destination=API,
    protocol="tcp",
    decided_by=DecidedBy.KERNEL,
    reason=DropReason.POLICY_DEFAULT,
)


class FakeAgent:
    """Implements AgentView over values that a test may set."""

    def __init__(self) -> None:
        self.flow_log = FlowLog()
        self.state = EndpointState.ENFORCED
        self.reload_errors: list[str] = []
        self.restored: list[str] = []
        self.requests = Requests()
        self.busy = 0
        self.overlapped = False

    def status(self) -> AgentStatus:
        labels = {"app": "bookstore"}
        api = EndpointStatus(
            "api", EndpointState.ENFORCED, labels, "demo-api", "eth0", ["10.9.0.3"], ["api-allow"]
        )
        web = EndpointStatus("web", self.state, labels, "demo-web", "eth0", ["10.9.0.2"])
        return AgentStatus(
            "0.1.0", 4711, 1_700_000_000.0, "/run/x", 3, "off", [api, web], requests=self.requests
        )

    def offload(self) -> OffloadStatus:
        why = {Misfit.BODY: 2, Misfit.DENIED: 1}
        left_out = ["api-allow/team: a header that Python has to look at"]
        profile = ProfileStatus([str(RULE)], ["api"], ["ingress tcp/80"], Requests(97, 3), why, 41, left_out)
        unused = ProfileStatus(["a/1", "a/2", "a/3", "a/4"], [], [], Requests(), {}, 0, [])
        return OffloadStatus("auto", Requests(197, 3), 41, 65536, [profile, unused])

    def policies(self) -> list[PolicyStatus]:
        document = {"kind": "Policy", "metadata": {"name": "api-allow"}, "spec": {"select": {"role": "api"}}}
        return [PolicyStatus("api-allow", "policies/api.yaml", "protect", "closed", ["api"], document)]

    def explain(self, question: Question) -> Explanation:
        if question.source not in ("web", "api", "world"):
            raise QuestionError(f"no endpoint is named {question.source}: there are api, web")
        if question.path == "/bug":
            raise RuntimeError("a bug")
        reads = question.method == "GET"
        considered = Considered(RULE, Direction.INGRESS, "allow", Mode.PROTECT, reads, "method", reads)
        decision, summary = Decision(Verdict.DROP, DropReason.HTTP_NO_RULE), "no rule allows it"
        if reads:
            decision, summary = Decision(Verdict.ALLOW, rule=RULE), "allowed by api-allow/read-books"
        half = Half(Direction.INGRESS, "api", decision, (considered,), summary)
        return Explanation(decision, (half,), summary)

    async def reload(self) -> list[str]:
        self.busy += 1
        self.overlapped |= self.busy > 1
        await asyncio.sleep(0.01)
        self.busy -= 1
        return self.reload_errors

    async def restore(self, names: Sequence[str] | None) -> list[RestoreResult]:
        wanted = ["api", "web"] if names is None else list(names)
        for name in wanted:
            if name not in ("api", "web"):
                raise UnknownNameError(f"no endpoint is named {name}: there are api, web")
        self.restored += wanted
        failed = "its namespace is gone" if self.state is EndpointState.FAILED else None
        return [RestoreResult(name, failed if name == "web" else None) for name in wanted]

    def metrics(self) -> Iterable[Metric]:
        yield Metric("ring_frames", "Frames punted.", "counter", [({"ring": "0"}, 5.0), ({"ring": "1"}, 6.0)])
        yield Metric("flows7", "Inspected flows.", "gauge", [({}, 2.0)])

    def put(self, record: FlowRecord) -> None:
        if self.flow_log.count(record.verdict, record.time, record.rule, record.reason):
            self.flow_log.append(record)


class Served:
    """A fake agent and its socket; the loop runs in a thread, `do` runs a function in it."""

    def __init__(self, agent: FakeAgent, socket: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.agent = agent
        self.socket = socket
        self._loop = loop

    def put(self, *records: FlowRecord) -> None:
        async def put_all() -> None:
            for record in records:
                self.agent.put(record)

        asyncio.run_coroutine_threadsafe(put_all(), self._loop).result(5)


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """A FakeAgent on a real unix socket in `folder`."""
    agent, socket = FakeAgent(), folder / "isolator.sock"
    started, ended, loops = threading.Event(), asyncio.Event(), []

    async def serve() -> None:
        server = ApiServer(create_app(agent), socket)
        await server.start()
        loops.append(asyncio.get_running_loop())
        started.set()
        await ended.wait()
        await server.stop()

    thread = threading.Thread(target=uvloop.run, args=(serve(),))
    thread.start()
    assert started.wait(10)
    try:
        yield Served(agent, socket, loops[0])
    finally:
        loops[0].call_soon_threadsafe(ended.set)
        thread.join(10)
    assert not thread.is_alive()
    assert not socket.exists()
