"""The flow log: what was decided, kept in memory, followed live, never in the path's way.

A decision's way through: `FlowLog.hit` counts it and says whether a record of it is wanted;
`FlowLog.append` puts the record into the ring and offers it to each follower. Everything denied or audited is
wanted; allowed messages are wanted up to a rate, and counted always. Nothing here waits: the ring forgets its
oldest record, a follower that is too slow loses records and is told how many, and where.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from isolator.control.runtime import is_own
from isolator.core.model import Direction, DropReason, RuleRef
from isolator.core.tally import Misfit

RECORDS_MAX = 4096
"""Records kept in memory. About 1 KB each at the most: 4 MB."""

FOLLOWER_RECORDS_MAX = 4096
"""Records that wait for one follower. Beyond it records are lost to that follower, and counted."""

ALLOWED_PER_SECOND = 100.0
"""Allowed messages recorded in the long run. A busy endpoint allows tens of thousands a second."""

ALLOWED_BURST = 200.0
"""Allowed messages recorded at once after a quiet time: enough to see each request of a trial by hand."""

RULES_MAX = 65536
"""Counters kept; further ones count into nothing. `FlowLog.forget` drops those of rules that are gone."""


class FlowVerdict(StrEnum):
    """What became of a message or a flow. AUDIT: forwarded, and a rule or monitor mode wants it seen."""

    FORWARDED = "FORWARDED"
    DROPPED = "DROPPED"
    AUDIT = "AUDIT"


class DecidedBy(StrEnum):
    KERNEL = "kernel"
    PYTHON = "python"


@dataclass(frozen=True, slots=True)
class Peer:
    """One end of a flow. `endpoint` and `labels` are None for an address that is no endpoint's. As JSON without the
    labels that are policy."""

    ip: str
    port: int | None = None
    endpoint: str | None = None
    labels: dict[str, str] | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "endpoint": self.endpoint,
            "labels": {key: value for key, value in (self.labels or {}).items() if not is_own(key)},
            "ip": self.ip,
            "port": self.port,
        }


@dataclass(frozen=True, slots=True)
class HttpMessage:
    """What a request was decided by: `path` is normalised, `raw_path` as it stood on the wire.

    What could not be read (a drop for HTTP_MALFORMED, say) leaves None.
    """

    method: str | None = None
    path: str | None = None
    raw_path: str | None = None
    host: str | None = None

    def as_json(self) -> dict[str, Any]:
        http = {"method": self.method, "path": self.path, "raw_path": self.raw_path, "host": self.host}
        return {"protocol": "http", "http": http}


@dataclass(frozen=True, slots=True)
class FlowRecord:
    """One decided message, or one new flow. `time`: seconds since 1970, the frame's own.

    `reason` of an AUDIT record is the drop that protect mode would have made (NONE for an audit rule).
    `why`: of a request that Python decided, and the kernel could not.
    """

    time: float
    verdict: FlowVerdict
    direction: Direction
    source: Peer
    destination: Peer
    protocol: str
    decided_by: DecidedBy
    reason: DropReason = DropReason.NONE
    rule: RuleRef | None = None
    l7: HttpMessage | None = None
    why: Misfit | None = None

    def as_json(self) -> dict[str, Any]:
        """The record as other programs read it; every key is always there."""
        return {
            "time": timestamp(self.time),
            "verdict": self.verdict.value,
            "drop_reason": self.reason.name if self.reason else None,
            "policy": self.rule.policy if self.rule else None,
            "rule": self.rule.rule if self.rule else None,
            "direction": self.direction.name.lower(),
            "source": self.source.as_json(),
            "destination": self.destination.as_json(),
            "protocol": self.protocol,
            "l7": self.l7.as_json() if self.l7 else None,
            "decided_by": self.decided_by.value,
            "why_python": self.why.value if self.why else None,
        }


def timestamp(seconds: float) -> str:
    """RFC 3339, UTC, microseconds: `2024-05-01T12:00:00.000250Z`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class TokenBucket:
    """`rate` tokens a second, `burst` at the most. A clock that steps back adds nothing and stops nothing."""

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at: float | None = None

    def take(self, now: float) -> bool:
        """Takes a token if there is one. `now` in seconds, of any one clock."""
        elapsed = 0.0 if self._at is None else now - self._at
        self._at = now
        self._tokens = min(self._burst, self._tokens + max(0.0, elapsed) * self._rate)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


@dataclass(frozen=True, slots=True)
class Gap:
    """Stands in a follower's records where `lost` of them are missing."""

    lost: int

    def as_json(self) -> dict[str, Any]:
        return {"lost": self.lost}


class Follower:
    """One reader's queue. The writer never waits for it: when it is full, records are lost and counted.

    `wake` is called once when something comes after the reader had said that it waits (`wait`).
    """

    def __init__(self, wake: Callable[[], None], verdict: FlowVerdict | None, capacity: int) -> None:
        self._wake = wake
        self._verdict = verdict
        self._capacity = capacity
        self._queue: deque[FlowRecord | Gap] = deque()
        self._lost = 0
        self._waits = False

    def offer(self, record: FlowRecord) -> None:
        """The writer's side."""
        if self._verdict is not None and record.verdict is not self._verdict:
            return
        if len(self._queue) >= self._capacity:
            self._lost += 1
        else:
            self._close_gap()
            self._queue.append(record)
        if self._waits:
            self._waits = False
            self._wake()

    def wait(self) -> bool:
        """Asks to be woken; False if there is something to take already.

        The wish stands before the queue is looked at, so that no record falls between the two.
        """
        self._waits = True
        return not self._queue

    def take(self, most: int) -> list[FlowRecord | Gap]:
        """At most `most` records and gaps, oldest first (and one gap more, if it is the last thing known)."""
        taken = [self._queue.popleft() for _ in range(min(most, len(self._queue)))]
        if not self._queue:
            self._close_gap()
            taken.extend(self._queue)
            self._queue.clear()
        return taken

    def _close_gap(self) -> None:
        if self._lost:
            self._queue.append(Gap(self._lost))
            self._lost = 0


class DecisionCounter:
    """Decisions of one kind. `rule` None: no rule decided (default deny, a frame without a policy)."""

    __slots__ = ("hits", "reason", "rule", "verdict")

    def __init__(self, verdict: FlowVerdict, rule: RuleRef | None, reason: DropReason) -> None:
        self.verdict = verdict
        self.rule = rule
        self.reason = reason
        self.hits = 0


class FlowLog:
    """Counters, ring and followers. All of one thread: the event loop's."""

    def __init__(
        self,
        capacity: int = RECORDS_MAX,
        allowed_per_second: float = ALLOWED_PER_SECOND,
        allowed_burst: float = ALLOWED_BURST,
    ) -> None:
        self._records: deque[FlowRecord] = deque(maxlen=capacity)
        self._followers: tuple[Follower, ...] = ()
        self._bucket = TokenBucket(allowed_per_second, allowed_burst)
        self._counters: dict[tuple[FlowVerdict, RuleRef | None, DropReason], DecisionCounter] = {}
        self.allowed_unrecorded = 0
        """Allowed messages that were counted and, for the rate, not recorded."""

    def counter(
        self, verdict: FlowVerdict, rule: RuleRef | None = None, reason: DropReason = DropReason.NONE
    ) -> DecisionCounter:
        """The counter of such decisions. Keep it while the policy is in force: it saves `hit` a look-up."""
        key = (verdict, rule, reason)
        counter = self._counters.get(key)
        if counter is None:
            counter = DecisionCounter(verdict, rule, reason)
            if len(self._counters) < RULES_MAX:
                self._counters[key] = counter
        return counter

    def hit(self, counter: DecisionCounter, now: float) -> bool:
        """Counts one decision made at `now`. True: a record of it is wanted (build one and `append` it)."""
        counter.hits += 1
        if counter.verdict is not FlowVerdict.FORWARDED or self._bucket.take(now):
            return True
        self.allowed_unrecorded += 1
        return False

    def count(
        self,
        verdict: FlowVerdict,
        now: float,
        rule: RuleRef | None = None,
        reason: DropReason = DropReason.NONE,
    ) -> bool:
        """`hit` for who keeps no counter."""
        return self.hit(self.counter(verdict, rule, reason), now)

    def append(self, record: FlowRecord) -> None:
        self._records.append(record)
        for follower in self._followers:
            follower.offer(record)

    def last(self, count: int | None = None, verdict: FlowVerdict | None = None) -> list[FlowRecord]:
        """The newest `count` records of that verdict (None: all that are held), oldest first."""
        records = [record for record in tuple(self._records) if verdict is None or record.verdict is verdict]
        return records if count is None else records[max(0, len(records) - count) :]

    def counters(self) -> list[DecisionCounter]:
        """What was counted so far, by verdict, rule and reason."""
        return list(self._counters.values())

    def forget(self, in_force: set[RuleRef]) -> None:
        """Drops the counters of rules that are no longer in force."""
        for key, counter in tuple(self._counters.items()):
            if counter.rule is not None and counter.rule not in in_force:
                del self._counters[key]

    def follow(
        self,
        wake: Callable[[], None],
        verdict: FlowVerdict | None = None,
        capacity: int = FOLLOWER_RECORDS_MAX,
    ) -> Follower:
        """A new follower, from the next record on. End it with `unfollow`."""
        follower = Follower(wake, verdict, capacity)
        self._followers = (*self._followers, follower)
        return follower

    def unfollow(self, follower: Follower) -> None:
        self._followers = tuple(each for each in self._followers if each is not follower)

    @property
    def followers(self) -> int:
        return len(self._followers)
