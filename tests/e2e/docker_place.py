"""A real engine and an agent for its containers: what tests of both ask and do."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolator.control.client import Client, ClientError
from isolator.lab import forget_agent, wait_for
from tests.e2e.docker_engine import Engine

ALLOWED, DENIED = "api/v1/books", "admin/secrets"
POLICY = """\
kind: Policy
metadata: {name: shop}
spec:
  select: {app: shop, role: api}
  ingress:
    - name: read-books
      from: [{select: {app: shop}}]
      ports: [{port: 80}]
      http: [{methods: [GET], path: /api/v1/**}]
"""
SERVER = ("/bin/httpd", "-f", "-p", "80", "-h", "/www")
IDLE = ("/bin/sleep", "3600")
API, WEB, OTHER = {"app": "shop", "role": "api"}, {"app": "shop", "role": "web"}, {"app": "other"}


@dataclass
class Place:
    engine: Engine
    root: Path
    state: Path
    agent: subprocess.Popen[bytes] | None = None

    def start_agent(self) -> None:
        with (self.root / "agent.log").open("ab") as log:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "isolator.daemon", "run", str(self.root / "isolator.yaml")],
                stdout=log, stderr=log,
            )  # fmt: skip
        wait_for(lambda: "endpoints" in self.status(), "the agent does not come up")

    def stop_agent(self, how: int = signal.SIGTERM) -> None:
        if self.agent is not None:
            self.agent.send_signal(how)
            self.agent.wait(20)
            self.agent = None

    def status(self) -> dict[str, Any]:
        try:
            return Client(self.state / "isolator.sock").status()
        except (ClientError, OSError):
            return {}

    def states(self) -> dict[str, str]:
        return {each["name"]: each["state"] for each in self.status().get("endpoints", [])}

    def labels(self, name: str) -> dict[str, str]:
        found = [each["labels"] for each in self.status().get("endpoints", []) if each["name"] == name]
        return found[0] if found else {}

    def settled(self, *names: str) -> None:
        """These are the endpoints, and all are enforced."""
        wait_for(
            lambda: self.states() == dict.fromkeys(names, "enforced"),
            f"{names}: not what {self.status()} says",
        )

    def pages(self, client: str, server: str) -> tuple[str, str]:
        address = self.engine.address(server)
        allowed, denied = (
            self.engine.fetch(client, f"http://{address}/{page}") for page in (ALLOWED, DENIED)
        )
        return allowed, denied

    def enforces(self, client: str, server: str) -> None:
        """The policy holds between the two. A container is found some time after its start: waited for."""
        wait_for(
            lambda: self.pages(client, server) == (ALLOWED, "403"),
            f"{server} is not protected: {self.status()}",
        )


@contextlib.contextmanager
def docker_place(root: Path, state: Path, policy: str = POLICY, more: str = "") -> Iterator[Place]:
    """An engine, and an agent with that policy. `more`: lines of its config."""
    engine = Engine(Path("/tmp/isolator-test-engine"), "isotest-engine")
    (root / "policy.yaml").write_text(policy)
    (root / "isolator.yaml").write_text(
        f"runtime: {{kind: docker, socket: {engine.socket}}}\nstate_dir: {state}\npolicies: [policy.yaml]\n{more}"
    )
    forget_agent(state)
    with engine:
        place = Place(engine, root, state)
        try:
            place.start_agent()
            yield place
        finally:
            place.stop_agent()
            forget_agent(state)
