"""What the control API needs of the agent, and nothing more. The daemon implements `AgentView`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from isolator.control.flowlog import FlowLog
from isolator.core.explain import Explanation, Question


class EndpointState(StrEnum):
    WAITING = "waiting"
    """Configured, and its container is not there."""
    PENDING = "pending"
    """Its container is there, and is about to be spliced."""
    ENFORCED = "enforced"
    """In place, its policy in the kernel."""
    FAILED = "failed"
    """Could not be spliced; `detail` says why. Everything was put back, and it is tried again."""
    EXEMPT = "exempt"
    """Left alone, for the reason in `detail`: no policy selects it, or it is excluded. Rules can name it as a peer."""
    RESTORED = "restored"
    """Taken back on request: not protected until its container or the agent starts anew."""


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """An endpoint as it stands. `policies`: the names of those that select it."""

    name: str
    state: EndpointState
    labels: dict[str, str] = field(default_factory=dict)
    netns: str = ""
    interface: str = ""
    addresses: list[str] = field(default_factory=list)
    policies: list[str] = field(default_factory=list)
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Requests:
    """HTTP requests by who decided them."""

    kernel: int = 0
    python: int = 0

    def __add__(self, other: Requests) -> Requests:
        return Requests(self.kernel + other.kernel, self.python + other.python)


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """`started`: seconds since 1970. `policy_errors`: what the last reload found wrong, one line each.
    `unprotectable`: containers that have no interface to protect, and why. `requests`: since the agent's start."""

    version: str
    pid: int
    started: float
    state_dir: str
    generation: int
    xdp: str
    endpoints: list[EndpointStatus]
    policy_errors: list[str] = field(default_factory=list)
    unprotectable: dict[str, str] = field(default_factory=dict)
    requests: Requests = field(default_factory=Requests)

    @property
    def ready(self) -> bool:
        """Every endpoint that is to be protected is spliced and enforced."""
        return all(each.state in (EndpointState.ENFORCED, EndpointState.EXEMPT) for each in self.endpoints)


@dataclass(frozen=True, slots=True)
class PolicyStatus:
    """A policy in force. `file`: where it was read; `endpoints`: those it selects; `document`: as written;
    `problems`: of the labels that it was read from, one line each. With an error among them it closes its container."""

    name: str
    file: str
    mode: str
    failure: str
    endpoints: list[str]
    document: dict[str, Any]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ProfileStatus:
    """Rules that decide requests together. `ports`: `ingress tcp/80`. `why`: reasons why requests were Python's, of
    those that were looked at (allowed ones at a bounded rate). `left_out`: of the automaton, and why."""

    rules: list[str]
    endpoints: list[str]
    ports: list[str]
    requests: Requests
    why: dict[str, int]
    states: int
    left_out: list[str]


@dataclass(frozen=True, slots=True)
class OffloadStatus:
    """Who decides requests. `l7`: as configured; `states`: of all automata, `states_max`: for which there is room."""

    l7: str
    requests: Requests
    states: int
    states_max: int
    profiles: list[ProfileStatus]


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What became of one endpoint; `error` None: its network is as it was before the splice."""

    name: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """A Prometheus family. `name` without `isolator_` and `_total`; each sample: its labels and its value."""

    name: str
    help: str
    kind: str
    samples: Sequence[tuple[dict[str, str], float]]


class UnknownNameError(Exception):
    """A command names an endpoint that is not there. The text is meant for people."""


class AgentView(Protocol):
    """The agent, seen from its control socket. Called in the agent's event loop; nothing may block it."""

    @property
    def flow_log(self) -> FlowLog: ...

    def status(self) -> AgentStatus: ...

    def policies(self) -> list[PolicyStatus]: ...

    def offload(self) -> OffloadStatus: ...

    def explain(self, question: Question) -> Explanation:
        """Raises core.explain.QuestionError."""
        ...

    async def reload(self) -> list[str]:
        """Reads config and policies again. Returns what is wrong, one line each; if anything is, the old
        policy stays in force."""
        ...

    async def restore(self, names: Sequence[str] | None) -> list[RestoreResult]:
        """Takes splices back (None: all). Raises UnknownNameError before anything is done."""
        ...

    def metrics(self) -> Iterable[Metric]:
        """Gauges and counters beyond those of the flow log."""
        ...
