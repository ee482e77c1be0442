"""The control API: HTTP on a unix socket that only root can open. The CLI speaks it, and so may scripts.

    GET  /v1/status /v1/endpoints /v1/policies /v1/offload
    GET  /v1/flows?last=N&verdict=DROPPED&follow=1       one JSON record a line
    POST /v1/reload                                      422 with every error if the files are wrong
    POST /v1/restore   {"names": ["api"]} or {"all": true}
    POST /v1/explain   {"source": "web", "destination": "api", "port": 80, "method": "GET", "path": "/x"}
    GET  /metrics                                        Prometheus

Errors are `{"error": one line, "details": [more lines]}` with a status of 4xx or 5xx.
It runs in the agent's own event loop, so that long answers are given in pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import asdict
from json import JSONDecodeError, dumps, loads
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from isolator.control import metrics
from isolator.control.agent_view import AgentStatus, AgentView, UnknownNameError
from isolator.control.flowlog import FlowRecord, FlowVerdict, Gap, timestamp
from isolator.core.explain import Considered, Explanation, Question, QuestionError
from isolator.core.model import Decision, Verdict

BODY_MAX = 65536
"""Bytes of a request's body. The largest sensible one names some thousand endpoints."""

BATCH_RECORDS = 128
"""Records written in one go, about 1 ms of work; then the packets have their turn."""

BATCH_SECONDS = 0.02
"""Pause between a follower's batches: at most 6,400 records a second for one follower, the rest is a gap."""


class Refused(Exception):  # noqa: N818 (it is an answer, not a fault)
    """A request that can't be served: becomes the error answer."""

    def __init__(self, status: int, error: str, details: Iterable[str] = ()) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.details = list(details)


class RestoreBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    names: list[str] = Field(default_factory=list)
    all: bool = False

    @model_validator(mode="after")
    def one_of_both(self) -> RestoreBody:
        if bool(self.names) == self.all:
            raise ValueError('give either {"names": [...]} or {"all": true}')
        return self


class ExplainBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    source: str = Field(min_length=1)
    destination: str = Field(min_length=1)
    port: int = Field(ge=0, le=65535)
    protocol: str = Field(default="tcp", pattern="^(tcp|udp|icmp)$")
    method: str | None = None
    path: str | None = None
    host: str | None = None
    headers: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def method_with_path(self) -> ExplainBody:
        if (self.method is None) != (self.path is None):
            raise ValueError("give method and path together, or neither for layer 4")
        return self


Body = TypeVar("Body", bound=BaseModel)


class Api:
    """The handlers. Reload and restore are done one at a time, in the order they came."""

    def __init__(self, agent: AgentView) -> None:
        self._agent = agent
        self._registry = metrics.registry(agent)
        self._changes = asyncio.Lock()
        self._waiting: set[asyncio.Event] = set()
        self._stopping = False

    async def status(self, request: Request) -> Response:
        return JSONResponse(status_json(self._agent.status()))

    async def endpoints(self, request: Request) -> Response:
        return JSONResponse({"endpoints": [asdict(each) for each in self._agent.status().endpoints]})

    async def policies(self, request: Request) -> Response:
        return JSONResponse({"policies": [asdict(each) for each in self._agent.policies()]})

    async def offload(self, request: Request) -> Response:
        return JSONResponse(asdict(self._agent.offload()))

    async def flows(self, request: Request) -> Response:
        refuse_unknown(request, {"last", "verdict", "follow"})
        verdict = verdict_of(request.query_params.get("verdict"))
        follow = flag_of("follow", request.query_params.get("follow", "0"))
        last = count_of("last", request.query_params.get("last", "0" if follow else ""))
        lines = self._followed(last, verdict) if follow else self._held(last, verdict)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    async def reload(self, request: Request) -> Response:
        async with self._changes:
            errors = await self._agent.reload()
        if errors:
            raise Refused(422, "the files are wrong; the old policy stays in force", errors)
        return JSONResponse({"generation": self._agent.status().generation})

    async def restore(self, request: Request) -> Response:
        body = await read(request, RestoreBody)
        async with self._changes:
            results = await self._agent.restore(None if body.all else body.names)
        return JSONResponse({"results": [asdict(each) for each in results]})

    async def explain(self, request: Request) -> Response:
        body = await read(request, ExplainBody)
        question = Question(**body.model_dump(exclude_none=True))
        return JSONResponse(explanation_json(self._agent.explain(question)))

    async def metrics(self, request: Request) -> Response:
        return Response(metrics.exposition(self._registry), headers={"content-type": metrics.CONTENT_TYPE})

    def stop(self) -> None:
        """Ends every follower's stream."""
        self._stopping = True
        for event in self._waiting:
            event.set()

    async def _held(self, last: int | None, verdict: FlowVerdict | None) -> AsyncIterator[str]:
        for lines in batches(self._agent.flow_log.last(last, verdict)):
            yield lines
            await asyncio.sleep(0)

    async def _followed(self, last: int | None, verdict: FlowVerdict | None) -> AsyncIterator[str]:
        """The held records, then each new one as it comes, until the client goes or the agent stops."""
        log, event = self._agent.flow_log, asyncio.Event()
        held = batches(log.last(last, verdict))
        follower = log.follow(event.set, verdict)  # in one step with `last`: no record missed or told twice
        self._waiting.add(event)
        try:
            for lines in held:
                yield lines
                await asyncio.sleep(0)
            while not self._stopping:
                event.clear()
                if follower.wait():
                    await event.wait()
                taken = follower.take(BATCH_RECORDS)
                if taken:
                    yield ndjson(taken)
                    await asyncio.sleep(BATCH_SECONDS)
        finally:
            self._waiting.discard(event)
            log.unfollow(follower)


def create_app(agent: AgentView) -> Starlette:
    """The application; `app.state.api.stop()` ends the streams that would never end by themselves."""
    api = Api(agent)
    app = Starlette(
        routes=[
            Route("/v1/status", api.status),
            Route("/v1/endpoints", api.endpoints),
            Route("/v1/policies", api.policies),
            Route("/v1/offload", api.offload),
            Route("/v1/flows", api.flows),
            Route("/v1/reload", api.reload, methods=["POST"]),
            Route("/v1/restore", api.restore, methods=["POST"]),
            Route("/v1/explain", api.explain, methods=["POST"]),
            Route("/metrics", api.metrics),
        ],
        exception_handlers={
            Refused: refused,
            UnknownNameError: unknown_name,
            QuestionError: unusable,
            HTTPException: http_error,
            Exception: fault,
        },
    )
    app.state.api = api
    return app


def status_json(status: AgentStatus) -> dict[str, Any]:
    return {**asdict(status), "started": timestamp(status.started), "ready": status.ready}


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    decision = explanation.decision
    return {
        "allowed": explanation.allowed,
        "verdict": verdict_word(decision),
        "drop_reason": decision.reason.name if decision.reason else None,
        "policy": decision.rule.policy if decision.rule else None,
        "rule": decision.rule.rule if decision.rule else None,
        "summary": explanation.summary,
        "considered": [considered_json(each) for each in explanation.considered],
    }


def verdict_word(decision: Decision) -> str:
    """As in a flow record; DEPENDS: on the request, which the question did not give."""
    if decision.verdict is Verdict.INSPECT:
        return "DEPENDS"
    if decision.verdict is not Verdict.ALLOW:
        return FlowVerdict.DROPPED
    return FlowVerdict.AUDIT if decision.audit or decision.trial else FlowVerdict.FORWARDED


def considered_json(considered: Considered) -> dict[str, Any]:
    return {
        "policy": considered.ref.policy,
        "rule": considered.ref.rule,
        "direction": considered.direction.name.lower(),
        "action": considered.action,
        "mode": considered.mode.value,
        "matched": considered.matched,
        "decides": considered.decides,
        "why": considered.why,
    }


def batches(records: list[FlowRecord]) -> Iterator[str]:
    for at in range(0, len(records), BATCH_RECORDS):
        yield ndjson(records[at : at + BATCH_RECORDS])


def ndjson(records: Iterable[FlowRecord | Gap]) -> str:
    return "".join(dumps(record.as_json(), separators=(",", ":")) + "\n" for record in records)


async def read(request: Request, model: type[Body]) -> Body:
    """The request's body, checked; Refused with every fault in it."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_MAX:
            raise Refused(413, f"the body is over {BODY_MAX} bytes")
    try:
        return model.model_validate(loads(body))
    except (JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    except ValidationError as error:
        raise Refused(400, "the body is not what this call takes", faults(error)) from error


def faults(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in error.errors()]


def refuse_unknown(request: Request, known: set[str]) -> None:
    unknown = sorted(set(request.query_params) - known)
    if unknown:
        raise Refused(400, f"unknown parameter {unknown[0]}: known are {', '.join(sorted(known))}")


def verdict_of(text: str | None) -> FlowVerdict | None:
    if text is None:
        return None
    if text.upper() not in FlowVerdict.__members__:
        raise Refused(400, f"verdict={text}: it is one of {', '.join(FlowVerdict)}")
    return FlowVerdict(text.upper())


def count_of(name: str, text: str) -> int | None:
    """A count of records; empty: all."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Refused(400, f"{name}={text}: it is a number of records, 0 or more")
    return int(text)


def flag_of(name: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise Refused(400, f"{name}={text}: it is 0 or 1")
    return text == "1"


def answer(status: int, error: str, details: Iterable[str] = ()) -> Response:
    return JSONResponse({"error": error, "details": list(details)}, status_code=status)


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return answer(error.status, error.error, error.details)


async def unknown_name(request: Request, error: Exception) -> Response:
    return answer(404, str(error))


async def unusable(request: Request, error: Exception) -> Response:
    return answer(400, str(error))


async def http_error(request: Request, error: Exception) -> Response:
    """No such page, wrong method: in the shape of every other error."""
    assert isinstance(error, HTTPException)
    return answer(error.status_code, f"{request.method} {request.url.path}: {error.detail.lower()}")


async def fault(request: Request, error: Exception) -> Response:
    """A bug of the agent's. The traceback goes to the agent's log."""
    return answer(500, f"internal error: {type(error).__name__}: {error}")
