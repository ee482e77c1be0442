"""No start gap: what containers do from their first instruction on, with the agent running, hung, dead, restarting.

The servers' own records are the oracle. `ISOLATOR_STARTS`: how many starts of each kind (`make starts`: 50).
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import docker  # type: ignore[import-untyped]
import pytest

from isolator.control.client import Client, ClientError
from isolator.control.starts import script
from isolator.datapath.gate import Gate
from isolator.datapath.netns import Netns
from isolator.datapath.node import Names
from isolator.lab import forget_agent, wait_for
from tests.e2e.docker_engine import IMAGE, Engine

pytestmark = [pytest.mark.root, pytest.mark.slow]
STATE = Path("/run/isolator-test-starts")
STARTS = int(os.environ.get("ISOLATOR_STARTS", "8"))
HOST, HTTP, UDP = "172.17.0.1", 8080, 8081
CONFIG = """\
runtime: {{kind: docker, socket: {socket}}}
state_dir: {state}
policies: [policy.yaml]
start_wait: 1
"""
POLICY = """\
kind: Policy
metadata: {name: job}
spec:
  select: {app: job}
  egress:
    - to: [{select: {entity: host}}]
      ports: [{port: 8080}]
      http: [{methods: [GET], path: /allowed/*}]
"""
ASK = "printf 'GET {path} HTTP/1.0\\r\\nHost: h\\r\\n\\r\\n' | nc -w {wait} 172.17.0.1 8080"
FLOOD = f"while :; do {ASK} & timeout 1 tftp -g -l /dev/null -r {{path}} 172.17.0.1 8081 & sleep 0.01; done"


@dataclass
class Servers:
    """On the host, for everybody: a web server and a UDP port. `paths`, `datagrams`: what came, with its time."""

    paths: list[tuple[float, str]] = field(default_factory=list)
    datagrams: list[bytes] = field(default_factory=list)

    def serve(self, netns: str) -> None:
        paths = self.paths

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                paths.append((time.time(), self.path))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None: ...

        with Netns(netns) as host, host.entered():
            server = Quiet(("0.0.0.0", HTTP), Handler)
            self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.udp.bind(("0.0.0.0", UDP))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        while True:
            self.datagrams.append(self.udp.recv(100))

    def seen(self, path: str) -> list[float]:
        return [when for when, each in list(self.paths) if each == path]


@dataclass
class Place:
    engine: Engine
    root: Path
    servers: Servers
    agent: subprocess.Popen[bytes] | None = None

    def start_agent(self, wait: bool = True) -> None:
        with (self.root / "agent.log").open("ab") as log:
            command = [sys.executable, "-m", "isolator.daemon", "run", str(self.root / "isolator.yaml")]
            self.agent = subprocess.Popen(command, stdout=log, stderr=log)
        if wait:
            wait_for(self.is_up, "the agent does not come up")

    def is_up(self) -> bool:
        try:
            return bool(Client(STATE / "isolator.sock").status()["pid"])
        except (ClientError, OSError):
            return False

    def end_agent(self, how: int = signal.SIGKILL) -> None:
        if self.agent is not None:
            self.agent.send_signal(how)
            self.agent.wait(20)
            self.agent = None

    def no_gate(self) -> None:
        with Gate(self.engine.netns, Names.of(STATE).netns) as gate:
            gate.remove()

    def container(self, name: str, command: str, runtime: str) -> docker.models.containers.Container:
        return self.engine.client.containers.create(
            IMAGE, ["/bin/sh", "-c", command], name=name, labels={"app": "job"}, runtime=runtime
        )

    def flood(self, path: str, runtime: str, seconds: float = 0.5) -> None:
        """A container whose first instruction, and every later one, is a forbidden request or datagram."""
        container = self.container(
            path.strip("/").replace("/", "-"), FLOOD.format(path=path, wait=1), runtime
        )
        container.start()
        time.sleep(seconds)
        container.remove(force=True)

    def ask(self, path: str, runtime: str) -> tuple[float, float | None]:
        """A container whose first instruction is a request: how long its start took, and until it was answered."""
        container = self.container(path.strip("/").replace("/", "-"), ASK.format(path=path, wait=10), runtime)
        begin = time.time()
        container.start()
        took = time.time() - begin
        container.wait(timeout=30)
        container.remove(force=True)
        seen = self.servers.seen(path)
        return took, seen[0] - begin if seen else None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("starts")
    runtime = root / "isolator-runc"
    runtime.write_text(script(STATE, "runc"))
    runtime.chmod(0o755)
    engine = Engine(Path("/tmp/isolator-test-engine"), "isotest-engine", {"isolator": runtime})
    (root / "policy.yaml").write_text(POLICY)
    (root / "isolator.yaml").write_text(CONFIG.format(socket=engine.socket, state=STATE))
    forget_agent(STATE)
    with engine:
        made = Place(engine, root, Servers())
        made.servers.serve(engine.netns)
        try:
            made.start_agent()
            yield made
        finally:
            made.end_agent(signal.SIGTERM)
            forget_agent(STATE)


def test_nothing_forbidden_gets_through_from_the_first_instruction_on(place: Place) -> None:
    """With the agent running, hung, dead, and on its way up; with the waiting runtime and without."""
    for number in range(STARTS):
        condition, runtime = (
            ("running", "hung", "dead", "restarting")[number % 4],
            ("runc", "isolator")[number // 4 % 2],
        )
        if condition == "hung":
            assert place.agent is not None
            place.agent.send_signal(signal.SIGSTOP)
        elif condition != "running":
            place.end_agent()
            if condition == "restarting":
                place.start_agent(wait=False)
        place.flood(f"/forbidden/{condition}/{number}", runtime)
        if condition == "hung":
            assert place.agent is not None
            place.agent.send_signal(signal.SIGCONT)
        elif condition == "dead":
            place.start_agent()
        wait_for(place.is_up, "the agent does not come up")
    print(f"\n{STARTS} starts, forbidden requests at the server: {len(place.servers.paths)}, "
          f"datagrams: {len(place.servers.datagrams)}")  # fmt: skip
    assert place.servers.paths == [] and place.servers.datagrams == []


def test_what_is_allowed_passes_from_the_first_instruction_on(place: Place) -> None:
    """Beside the same starts with neither agent nor gate, in turns."""
    found: dict[str, list[tuple[float, float]]] = {"runc": [], "isolator": [], "unprotected": []}
    for turn in range(0, STARTS, 4):
        for kind, times in found.items():
            if kind == "unprotected":
                place.end_agent(signal.SIGTERM)
                place.no_gate()
                (STATE / "starts" / "asked").unlink()
            for number in range(turn, min(turn + 4, STARTS)):
                took, answered = place.ask(
                    f"/allowed/{kind}-{number}", "isolator" if kind == "unprotected" else kind
                )
                assert answered is not None, f"{kind}: start {number} had no answer"
                times.append((took, answered))
        place.start_agent()
    for kind, times in found.items():
        start, answer = (statistics.median(each) * 1000 for each in zip(*times, strict=True))
        print(
            f"\n{kind:<12} start {start:4.0f} ms, first answer after {answer:4.0f} ms (medians of {STARTS})",
            end="",
        )
    print()


def test_the_tests_own_flood_gets_through_where_nobody_protects(place: Place) -> None:
    place.end_agent(signal.SIGTERM)
    place.no_gate()
    place.flood("/forbidden/unprotected", "runc")
    assert place.servers.seen("/forbidden/unprotected") and any(
        b"/forbidden/unprotected" in each for each in place.servers.datagrams
    )
    place.start_agent()
