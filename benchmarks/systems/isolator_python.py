"""Isolator without its automaton: Python decides every request. An agent of its own, with two containers of its own."""

from __future__ import annotations

from pathlib import Path

from benchmarks.place import Place, Route, wait_answer
from benchmarks.systems.isolator import Isolator
from isolator.lab import PREFIX, ask_agent, forget_agent, run_agent, wait_for

STATE = Path("/run/isolator-demo-python")
CLIENT, SERVER = "python-web", "python-api"

CONFIG = f"""\
runtime: {{kind: netns}}
state_dir: {STATE}
policies: [policies/]
datapath: {{xdp: off, l7: python}}
endpoints:
  - {{name: api, netns: {PREFIX}-{SERVER}, interface: eth0, labels: {{app: bookstore, role: api}}}}
  - {{name: web, netns: {PREFIX}-{CLIENT}, interface: eth0, labels: {{app: bookstore, role: web}}}}
"""


class IsolatorPython(Isolator):
    name = "isolator-python"
    state = STATE
    set_up = "As isolator, with `datapath: {l7: python}`: no request is decided in the kernel."

    def start(self, place: Place, policy: bool = True) -> Route:
        forget_agent(self.state)
        self.root = place.lab.root / self.name
        (self.root / "policies").mkdir(parents=True, exist_ok=True)
        (self.root / "isolator.yaml").write_text(CONFIG)
        (self.root / "policies" / "api.yaml").write_text(self.config(policy=policy))
        place.container(CLIENT)
        self._route = Route(CLIENT, place.server(SERVER), SERVER)
        wait_answer(place, self._route)
        self._agent = run_agent(self.root)
        self._pid = self._agent.pid
        place.lab.processes.append(self._agent)
        wait_for(self._is_ready, "the agent without automata does not get ready")
        wait_answer(place, self._route)
        return self._route

    def _is_ready(self) -> bool:
        return bool(ask_agent(self.state, "/v1/status").get("ready"))

    def stop(self, place: Place) -> None:
        place.end(self._agent)
        forget_agent(self.state)
