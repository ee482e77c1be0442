"""What the kernel tells of requests that it accepted, as flow records."""

from __future__ import annotations

import pytest

from isolator.control.flowlog import DecidedBy, FlowLog, FlowVerdict, HttpMessage
from isolator.core.model import Direction, DropReason, Endpoint, FlowFlag, RuleRef, Verdict
from isolator.datapath.abi import EVENT_REQUEST, Event, FlowKey, RequestEvent
from isolator.records import Recorder, host_of

LOCAL, REMOTE = bytes(10) + b"\xff\xff\x0a\x09\x00\x02", bytes(10) + b"\xff\xff\x0a\x09\x00\x01"
KEY = FlowKey(7, LOCAL, REMOTE, 80, 40000, 6)


def test_a_request_that_the_kernel_accepted() -> None:
    log = FlowLog()
    api = Endpoint("api", {"role": "api"})
    event = Event(
        1, KEY, 3, 2, 5, 120, EVENT_REQUEST, Verdict.ALLOW, DropReason.NONE, Direction.INGRESS, FlowFlag(0)
    )
    told = RequestEvent(
        event, 1, 4, b"GET /api/v1/books?page=2 HTTP/1.1\r\nAccept: */*\r\nHost: API.local:80\r\nX-Cut: o"
    )
    Recorder(log, {7: api}, {}).request(told, RuleRef("shop", "read"))
    (record,) = log.last()
    assert (record.verdict, record.decided_by) == (FlowVerdict.FORWARDED, DecidedBy.KERNEL)
    assert record.rule == RuleRef("shop", "read") and record.destination.endpoint == "api"
    assert record.l7 is not None
    assert (record.l7.method, record.l7.path, record.l7.host) == ("GET", "/api/v1/books", "api.local")


@pytest.mark.parametrize(
    ("fields", "host"),
    [(b"Host: a\r\n", "a"), (b"X: y\r\nHost: cut.of", None), (b"", None), (b"host:b:1\r\nX", "b")],
)
def test_a_host_that_may_be_cut_off(fields: bytes, host: str | None) -> None:
    assert host_of(fields) == host


HEAD = b"GET /api/v1/a?x=1 HTTP/1.1\r\nHost: api\r\n\r\n"


def recorded(recorder: Recorder, log: FlowLog, head: bytes) -> HttpMessage | None:
    event = Event(
        1, KEY, 3, 2, 5, 120, EVENT_REQUEST, Verdict.ALLOW, DropReason.NONE, Direction.INGRESS, FlowFlag(0)
    )
    recorder.request(RequestEvent(event, 1, 4, head), RuleRef("shop", "read"))
    return log.last()[-1].l7


@pytest.mark.parametrize(
    ("length", "path", "raw_path"),
    [(38, "/api/v1/a", "/api/v1/a"), (14, "/api/v1/a", "/api/v1/a"), (10, None, "/api/v")],
)
def test_of_a_cut_head_what_is_there(length: int, path: str | None, raw_path: str) -> None:
    log = FlowLog()
    assert recorded(Recorder(log, {}, {}), log, HEAD[:length]) == HttpMessage("GET", path, raw_path, None)


def test_many_cpus_do_not_fill_the_log() -> None:
    log = FlowLog()
    recorder = Recorder(log, {}, {})
    for _ in range(1000):
        recorded(recorder, log, HEAD)
    assert len(log.last()) < 250
    assert log.counters() == []
