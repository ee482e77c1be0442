"""Isolator: both containers are endpoints of one agent."""

from __future__ import annotations

import signal
from pathlib import Path

from benchmarks.place import BULK, HOLD, HTTP, UPLOAD, Place, Route, wait_answer
from benchmarks.policy import METHODS, PREFIX_ALLOWED, UPLOAD_PATH, more_paths, rule_path
from benchmarks.systems.base import Kind
from isolator import __version__
from isolator.lab import API, PREFIX, STATE, wait_for

POLICY = """\
kind: Policy
metadata: {{name: race}}
spec:
  select: {{app: bookstore, role: api}}
  mode: {mode}
  failure: closed
  ingress:
    - name: read
      from: [{{select: {{app: bookstore}}}}]
      ports: [{pages}]
      http:
        - {{methods: [{methods}], path: {prefix}**}}
{rules}    - name: upload
      from: [{{select: {{app: bookstore}}}}]
      ports: [{{port: {upload}, protocol: tcp}}]
      http:
        - {{methods: [POST], path: {upload_path}}}
    - name: bulk
      from: [{{select: {{app: bookstore}}}}]
      ports: [{{port: {bulk}, protocol: tcp}}]
"""


NEWCOMER = "newcomer"
"""An endpoint that the configuration knows and that is not there yet: until it is, an agent is not ready."""

NEWCOMER_LINE = (
    f"  - {{name: {NEWCOMER}, netns: {PREFIX}-{NEWCOMER}, interface: eth0, labels: {{app: bookstore}}}}\n"
)


class Isolator:
    """`root`: the folder of its configuration; `state`: its state folder."""

    state = STATE
    name, kind, layer7, refusal = "isolator", Kind.INLINE, True, "403"
    set_up = (
        "One agent, both containers spliced (the policy selects the server). The kernel decides layer 4 and requests "
        "that its automaton accepts, Python the others; bodies pass in the kernel. Offloads untouched, XDP off, "
        "flow log as in the default configuration."
    )

    def __init__(self) -> None:
        self._pid = 0
        self.root = Path()
        self._route = Route("web", API, "api")

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return __version__

    def config(self, rules: int = 0, policy: bool = True, extra: bool = False) -> str:
        methods = ", ".join(METHODS)
        return POLICY.format(
            mode="protect" if policy else "monitor",
            pages=", ".join(f"{{port: {port}, protocol: tcp}}" for port in (HTTP, *HOLD)),
            upload=UPLOAD,
            bulk=BULK,
            methods=methods,
            prefix=PREFIX_ALLOWED,
            upload_path=UPLOAD_PATH,
            rules="".join(
                f"        - {{methods: [{methods}], path: {path}**}}\n" for path in more_paths(rules, extra)
            ),
        )

    def start(self, place: Place, policy: bool = True) -> Route:
        self.root = place.lab.root
        (self.root / "policies" / "api.yaml").write_text(self.config(policy=policy))
        place.lab.start_agent()
        assert place.lab.agent is not None
        self._pid = place.lab.agent.pid
        wait_answer(place, self._route)
        with (self.root / "isolator.yaml").open("a") as file:
            file.write(NEWCOMER_LINE)
        return self._route

    def apply(self, place: Place, rules: int) -> None:
        self.edit(place, rules, False)
        path, expected = (rule_path(rules - 1), "404") if rules else (rule_path(0), "403")
        wait_for(
            lambda: place.lab.curl(self._route.client, self._route.url(path)) == expected,
            f"the policy with {rules} more rules is not taken up",
            120,
        )

    def edit(self, place: Place, rules: int, extra: bool) -> None:
        """The file is replaced; the agent looks for that once a second."""
        draft = self.root / "draft"
        draft.write_text(self.config(rules, extra=extra))
        draft.replace(self.root / "policies" / "api.yaml")

    def stop(self, place: Place) -> None:
        place.lab.stop_agent(signal.SIGTERM)

    def processes(self) -> list[int]:
        return [self._pid]
