"""The slow path on real veths, tc and ring: what reaches the other end, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from isolator.core.inspector import Inspector
from isolator.core.model import DropReason
from isolator.datapath.abi import POLICY_UNREAD
from tests.bpf.bench import DROP, INGRESS, POLICY, PROFILE, RESET, VNET_NONE, Entry
from tests.bpf.conversation import SERVER_ISN
from tests.bpf.frames import inbound, inbound6, outbound, tcp
from tests.datapath import slow_path
from tests.datapath.slow_path import Place

pytestmark = pytest.mark.root
GET = b"GET /api/v1/a HTTP/1.1\r\nHost: api\r\n\r\n"
DENIED = b"GET /admin HTTP/1.1\r\nHost: api\r\n\r\n"
POST = b"POST /api/v1/a HTTP/1.1\r\nHost: api\r\nContent-Length: 3000\r\n\r\n"
S = SERVER_ISN + 1


@pytest.fixture(scope="module")
def made() -> Iterator[Place]:
    with slow_path.place() as made:
        yield made


@pytest.fixture
def place(made: Place) -> Place:
    made.bench.reset()
    for flow in made.inspector.flows:
        made.inspector.forget(flow)
    made.inspector.prepare_policy(slow_path.PROFILES, made.bench.datapath.generation)
    made.served.clear()
    made.returned.clear()
    made.forwarder.drops.clear()
    return made


class Talk:
    """One connection from the network to port 80."""

    def __init__(self, place: Place, isn: int = 1000, port: int = 1000) -> None:
        self.place, self.isn, self.port = place, isn, port

    def connect(self) -> Talk:
        self.client(-1, b"", "S")
        self.server("SA", SERVER_ISN, 0)
        self.client(0, b"", "A")
        return self

    def client(self, at: int, data: bytes, flags: str = "PA") -> list[bytes]:
        """What reached the container: payloads."""
        self.place.served.clear()
        frame = inbound(tcp(self.port, 80, flags, self.isn + 1 + at, S if flags != "S" else 0) / data)
        self.place.send(VNET_NONE + bytes(frame))
        return [bytes(Ether(frame)[TCP].payload) for frame in self.place.served]

    def server(self, flags: str, seq: int, acked: int, data: bytes = b"") -> None:
        frame = outbound(tcp(80, self.port, flags, seq, self.isn + 1 + acked) / data)
        self.place.send(VNET_NONE + bytes(frame), from_container=True)


def came_back(place: Place) -> Packet:
    return Ether(place.returned[-1])


def test_an_allowed_request_reaches_the_server_and_a_denied_one_is_answered(place: Place) -> None:
    talk = Talk(place).connect()
    assert talk.client(0, GET) == [GET]
    talk.server("PA", S, len(GET), b"HTTP/1.1 204 No Content\r\n\r\n")
    place.returned.clear()
    reached = talk.client(len(GET), DENIED)
    assert b"".join(reached) == b""
    assert b"403 Forbidden" in bytes(came_back(place)[TCP].payload)


def test_the_257th_connection_on_the_same_ports_inherits_nothing(place: Place) -> None:
    """A punted frame carries 8 bits of its connection's number."""
    talk = Talk(place).connect()
    talk.client(0, POST + b"x")
    talk.client(len(POST) + 1, b"x" * 1400)
    talk.server("A", S, len(POST) + 1401)
    talk.client(len(POST) + 1401, b"", "R")
    for number in range(256):
        again = Talk(place, isn=1000 + len(POST) + number).connect()
        if number < 255:
            again.client(0, b"", "R")
    assert b"".join(again.client(0, DENIED)) == b""


def test_an_endpoint_that_returns_inherits_nothing(place: Place) -> None:
    Talk(place).connect().client(0, POST + b"x")
    place.bench.reset()
    place.inspector.prepare_policy(slow_path.PROFILES, place.bench.datapath.generation)
    assert b"".join(Talk(place, isn=1050).connect().client(0, DENIED)) == b""


def test_what_was_let_go_unread_is_reset_once_a_policy_has_to_read_it(place: Place) -> None:
    inspector, bench = place.inspector, place.bench
    monitored = [
        Entry(INGRESS, POLICY[0].verdict, 6, 80, 2, profile=PROFILE, flags=POLICY_UNREAD),
        *POLICY[1:],
    ]
    bench.policy(monitored)
    inspector.prepare_policy(slow_path.MONITORED, bench.datapath.generation)
    talk = Talk(place).connect()
    assert talk.client(0, b"\r\n" + GET) == [b"\r\n" + GET]
    assert talk.client(2 + len(GET), b"SSH-2.0") == [b"SSH-2.0"]
    bench.policy(POLICY)
    inspector.prepare_policy(slow_path.PROFILES, bench.datapath.generation)
    place.returned.clear()
    assert b"".join(talk.client(9 + len(GET), DENIED)) == b""
    assert "R" in came_back(place)[TCP].flags


def test_a_frame_that_makes_python_fail_takes_no_other_with_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison, good = Talk(place, port=1000).connect(), Talk(place, port=1001).connect()
    receive = Inspector.receive

    def failing(self: Inspector, flow: object, segment: object, packet: memoryview, *rest: object) -> object:
        if b"poison" in bytes(packet):
            raise ValueError("a defect")
        return receive(self, flow, segment, packet, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Inspector, "receive", failing)
    assert poison.client(0, b"GET /poison") == []
    assert place.forwarder.drops[DropReason.INTERNAL] == 1
    assert good.client(0, GET) == [GET]
    monkeypatch.undo()
    assert poison.client(0, GET) == [GET]


def test_what_layer_4_refuses_is_answered_where_policy_says_so(place: Place) -> None:
    place.bench.policy([Entry(INGRESS, RESET, peer=2, reason=DropReason.POLICY_DENY), Entry(INGRESS, DROP)])
    place.send(VNET_NONE + bytes(inbound(tcp(1000, 83))))
    assert came_back(place)[TCP].flags == "RA" and came_back(place)[TCP].ack == 1001
    place.send(VNET_NONE + bytes(inbound(UDP(sport=5, dport=6) / b"x")))
    assert (came_back(place)[ICMP].type, came_back(place)[IP].dst) == (3, "10.9.0.2")
    place.send(VNET_NONE + bytes(inbound6(UDP(sport=5, dport=6) / b"x")))
    assert came_back(place)[ICMPv6DestUnreach].code == 1
    count = len(place.returned)
    place.send(VNET_NONE + bytes(inbound(tcp(1000, 83, "RA", 5, 6))))
    assert len(place.returned) == count
