"""The stand-in against the kernel: the same frames through the tc program and the forwarder, and through a replay.

What reaches the server, and what is decided, must be the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from isolator.core.commands import Report
from isolator.core.compile import compile_policies
from isolator.core.model import Direction, Endpoint
from isolator.core.policy import Policy, PortMatch, Rule, labels_of
from isolator.replay.capture import Captured
from isolator.replay.engine import Replay, Sent
from parsers.packet import ACK, FIN, PSH, RST, SYN, VNET, parse_segment
from tests.bpf.bench import CONTAINER, CONTAINER_MAC, GATEWAY_MAC, PEER
from tests.datapath import slow_path
from tests.datapath.slow_path import LINE, Place, mac, octets
from tests.replay.captures import OK, Said, conversation, get

pytestmark = pytest.mark.root
CONVERSATIONS = 600
POST = b"POST /api/v1/up HTTP/1.1\r\nHost: api\r\nContent-Length: 40\r\n\r\n"
PAYLOADS = (
    get("/api/v1/a"), get("/api/v1/a"), get("/api/v1/b") * 2, get("/api/v1/a")[:20], get("/api/v1/a")[20:],
    POST, POST + b"x" * 40, b"y" * 20, get("/admin"), b"\x16\x03\x01", b"",
)  # fmt: skip
FLAGS = (PSH | ACK,) * 12 + (FIN | ACK, RST, RST | ACK, SYN, 0)
UNFINISHED = bytes([1, *bytes(5), 34, 0, 16, 0])  # struct virtio_net_hdr: TCP's checksum is to be completed
Outcome = tuple[list[tuple[int, bytes]], list[str]]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with slow_path.place() as made:
        made.inspector._report_all = True
        yield made


def talk(dice: random.Random) -> list[Said]:
    """Requests, answers, and what else ends may send."""
    said: list[Said] = []
    for _ in range(dice.randrange(1, 9)):
        said.append(("c", dice.choice(PAYLOADS), dice.choice(FLAGS)))
        if dice.random() < 0.6:
            said.append(("s", dice.choice((OK, OK[:30], b"")), dice.choice(FLAGS[:14])))
    return said


def mixed(frames: list[Captured], dice: random.Random) -> list[Captured]:
    """Some come again, or other than before, and some late."""
    late = list(frames)
    for at in range(len(late)):
        if dice.random() < 0.15:
            again = late[at]
            if dice.random() < 0.3 and len(again.data) > 54:
                again = again._replace(data=again.data[:-1] + b"Z")
            late.insert(dice.randrange(at, len(late) + 1), again)
        if dice.random() < 0.1 and at + 1 < len(late):
            late[at], late[at + 1] = late[at + 1], late[at]
    return late


def told(report: Report) -> str:
    path = report.request.path if report.request else "-"
    return f"{report.decision.verdict.name} {report.decision.reason.name} {path}"


def payloads(frames: list[bytes]) -> list[tuple[int, bytes]]:
    segments = [(frame, parse_segment(frame)) for frame in frames]
    return [(s.seq, bytes(frame[s.payload_at : s.payload_end])) for frame, s in segments if s.payload_length]


class Kept(list[Sent]):
    """What was sent, also what has been taken since."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Sent] = []

    def append(self, item: Sent) -> None:
        super().append(item)
        self.all.append(item)


def in_the_kernel(place: Place, frames: list[Captured]) -> Outcome:
    reports: list[str] = []
    place.forwarder._report = lambda report, now: reports.append(told(report))
    place.served.clear()
    for frame in frames:
        from_container = parse_segment(frame.data).source_port(frame.data) == 80
        place.send(UNFINISHED + frame.data, from_container)
    return payloads(place.served), reports


def replayed(frames: list[Captured]) -> Outcome:
    endpoints = {1: Endpoint("api", {"role": "api"})}
    addresses = {1: (ip_address(CONTAINER),)}
    read = Rule("read", ports=(PortMatch(6, 80),), http=(LINE,))
    policy = Policy("api", labels_of({"role": "api"}), ingress=(read,), egress=())
    replay = Replay(
        compile_policies([policy], endpoints, addresses, 1), endpoints, addresses, lambda record: None
    )
    reports: list[str] = []
    replay._forwarder._report = lambda report, now: reports.append(told(report))
    replay._pinned.sent = sent = Kept()
    for frame in frames:
        replay.feed(frame)
    served = [data[VNET:] for port, data, _ in sent.all if port & 1 == Direction.INGRESS]
    return payloads(served), reports


def test_the_same_reaches_the_server(place: Place) -> None:
    dice = random.Random(7)
    macs = mac(CONTAINER_MAC) + mac(GATEWAY_MAC)
    decided = set()
    for at in range(CONVERSATIONS):
        ports = (10000 + at, 80)
        frames = mixed(conversation(talk(dice), octets(PEER), octets(CONTAINER), ports, macs=macs), dice)
        there = in_the_kernel(place, frames)
        assert replayed(frames) == there, (at, frames)
        decided.update(report.rpartition(" ")[0] for report in there[1])
    assert decided >= {"ALLOW NONE", "DROP HTTP_NO_RULE", "DROP HTTP_MALFORMED", "DROP RECORD_MISMATCH"}
