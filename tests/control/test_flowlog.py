from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from isolator.control.flowlog import (
    DecidedBy,
    FlowLog,
    FlowRecord,
    FlowVerdict,
    Gap,
    HttpMessage,
    TokenBucket,
    timestamp,
)
from isolator.core.model import DropReason, RuleRef
from tests.control.fake_agent import ALLOWED, DENIED, LAYER4, RULE


def numbered(count: int) -> list[FlowRecord]:
    return [replace(DENIED, time=float(at)) for at in range(count)]


def test_record_of_a_request_has_every_field_of_the_contract() -> None:
    assert DENIED.as_json() == {
        "time": "2023-11-14T22:13:20.250000Z",
        "verdict": "DROPPED",
        "drop_reason": "HTTP_NO_RULE",
        "policy": "api-allow",
        "rule": "read-books",
        "direction": "ingress",
        "source": {
            "endpoint": "web",
            "labels": {"app": "bookstore", "role": "web"},
            "ip": "10.9.0.2",
            "port": 40000,
        },
        "destination": {
            "endpoint": "api",
            "labels": {"app": "bookstore", "role": "api"},
            "ip": "10.9.0.3",
            "port": 80,
        },
        "protocol": "tcp",
        "l7": {
            "protocol": "http",
            "http": {"method": "GET", "path": "/admin", "raw_path": "/api/../admin", "host": "api.local"},
        },
        "decided_by": "python",
        "why_python": None,
    }


def test_record_of_a_layer4_flow_has_the_same_keys() -> None:
    seen = LAYER4.as_json()
    assert seen.keys() == DENIED.as_json().keys()
    assert (seen["policy"], seen["rule"], seen["l7"]) == (None, None, None)
    assert seen["source"] == {"endpoint": None, "labels": {}, "ip": "192.0.2.1", "port": 5000}
    assert (seen["drop_reason"], seen["decided_by"]) == ("POLICY_DEFAULT", DecidedBy.KERNEL)


def test_what_could_not_be_read_is_null() -> None:
    assert HttpMessage().as_json()["http"] == {"method": None, "path": None, "raw_path": None, "host": None}


def test_times_are_utc_with_microseconds() -> None:
    assert timestamp(0.0) == "1970-01-01T00:00:00.000000Z"


def test_ring_forgets_the_oldest() -> None:
    log = FlowLog(capacity=3)
    for record in numbered(5):
        log.append(record)
    assert [record.time for record in log.last()] == [2, 3, 4]
    assert [record.time for record in log.last(2)] == [3, 4]
    assert log.last(0) == []
    assert len(log.last(99)) == 3


def test_last_counts_after_the_verdict() -> None:
    log = FlowLog()
    for record in (DENIED, ALLOWED, ALLOWED):
        log.append(record)
    assert log.last(1, FlowVerdict.DROPPED) == [DENIED]


def test_allowed_are_counted_always_and_recorded_up_to_a_rate() -> None:
    log = FlowLog(allowed_per_second=10, allowed_burst=5)
    wanted = [log.count(FlowVerdict.FORWARDED, 100.0, RULE) for _ in range(8)]
    assert wanted == [True] * 5 + [False] * 3
    assert log.count(FlowVerdict.FORWARDED, 100.125, RULE)
    assert not log.count(FlowVerdict.FORWARDED, 100.125, RULE)
    assert log.counter(FlowVerdict.FORWARDED, RULE).hits == 10
    assert log.allowed_unrecorded == 4


def test_denied_and_audited_are_recorded_without_a_rate() -> None:
    log = FlowLog(allowed_per_second=0, allowed_burst=0)
    for verdict in (FlowVerdict.DROPPED, FlowVerdict.AUDIT):
        assert all(log.count(verdict, 0.0, RULE, DropReason.HTTP_DENY) for _ in range(1000))
    assert log.allowed_unrecorded == 0


def test_counters_of_rules_that_are_gone_are_forgotten() -> None:
    log, gone = FlowLog(), RuleRef("old", "rule")
    log.count(FlowVerdict.DROPPED, 0.0, gone)
    log.count(FlowVerdict.DROPPED, 0.0, RULE)
    log.count(FlowVerdict.DROPPED, 0.0)
    log.forget({RULE})
    assert [counter.rule for counter in log.counters()] == [RULE, None]


@given(st.lists(st.floats(0, 1e9), max_size=50), st.floats(0, 1e3), st.floats(0, 1e3))
def test_bucket_never_gives_more_than_burst_and_rate(times: list[float], rate: float, burst: float) -> None:
    bucket = TokenBucket(rate, burst)
    given_out = sum(bucket.take(now) for now in sorted(times))
    span = max(times) - min(times) if times else 0.0
    assert given_out <= burst + rate * span + 1e-6 * (1 + rate * span)


def test_bucket_outlives_a_clock_that_steps_back() -> None:
    bucket = TokenBucket(1, 1)
    assert [bucket.take(now) for now in (1000.0, 0.0, 0.5, 1.5)] == [True, False, False, True]


def test_follower_is_woken_once_and_takes_in_order() -> None:
    log, wakes = FlowLog(), []
    follower = log.follow(lambda: wakes.append(1))
    assert follower.wait()
    records = numbered(3)
    for record in records:
        log.append(record)
    assert wakes == [1]
    assert not follower.wait()
    assert follower.take(2) == records[:2]
    assert follower.take(2) == records[2:]
    assert follower.take(2) == []


def test_slow_follower_loses_records_and_learns_where() -> None:
    log = FlowLog()
    follower = log.follow(lambda: None, capacity=2)
    records = numbered(6)
    for record in records[:4]:
        log.append(record)
    assert follower.take(1) == records[:1]
    log.append(records[4])
    assert follower.take(9) == [records[1], Gap(2), records[4]]
    assert log.last() == records[:5]


def test_gap_at_the_end_is_told_too() -> None:
    log = FlowLog()
    follower = log.follow(lambda: None, capacity=1)
    for record in numbered(3):
        log.append(record)
    assert [each.as_json() for each in follower.take(9)[1:]] == [{"lost": 2}]
    assert follower.take(9) == []


def test_follower_of_one_verdict_sees_no_other_and_counts_none_as_lost() -> None:
    log = FlowLog()
    follower = log.follow(lambda: None, FlowVerdict.DROPPED, capacity=1)
    for record in (ALLOWED, DENIED, ALLOWED):
        log.append(record)
    assert follower.take(9) == [DENIED]


def test_ended_follower_gets_nothing() -> None:
    log = FlowLog()
    follower = log.follow(lambda: None)
    log.unfollow(follower)
    log.append(DENIED)
    assert follower.take(9) == []
    assert log.followers == 0


@given(st.lists(st.one_of(st.none(), st.integers(1, 5)), max_size=80), st.integers(1, 4))
def test_records_and_gaps_add_up(steps: list[int | None], capacity: int) -> None:
    """None: a record comes; a number: the reader takes so many."""
    log, seen, put = FlowLog(), [], 0
    follower = log.follow(lambda: None, capacity=capacity)
    for step in [*steps, 999]:
        if step is None:
            log.append(replace(DENIED, time=float(put)))
            put += 1
        else:
            seen += follower.take(step)
    at = 0
    for each in seen:
        if isinstance(each, Gap):
            at += each.lost
        else:
            assert each.time == at
            at += 1
    assert at == put
