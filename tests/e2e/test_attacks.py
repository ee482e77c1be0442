"""Raw packets against a real nginx behind a real agent; nginx's own log says what was served.

Each attack is carried out three times: straight at the server, which shows what it would serve; through Isolator,
where nothing forbidden may be served; and through Isolator with every forbidden request replaced by an allowed
one of the same length, which must be served: an agent that lets nothing through would pass the second alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from scapy.layers.inet import fragment
from scapy.layers.l2 import Dot1Q

from isolator.lab import PREFIX, Lab
from tests.e2e.raw_client import RawClient

pytestmark = [pytest.mark.root, pytest.mark.slow]
ATTACKER, MAC = "10.9.0.77", "02:00:00:00:00:77"
POLICY = """\
kind: Policy
metadata: {name: api-allow}
spec:
  select: {role: api}
  ingress:
    - name: read-books
      from: [{cidr: 10.9.0.77/32}, {select: {}}]
      ports: [{port: 80, protocol: tcp}]
      http: [{methods: [GET], path: /api/v1/**}, {methods: [POST], path: /api/v1/**}]
"""


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", "Host: api", *headers, "", "")).encode()


def post(body: bytes, header: str) -> bytes:
    return f"POST /api/v1/p HTTP/1.1\r\nHost: api\r\n{header}\r\n\r\n".encode() + body


GOOD = get("/api/v1/good")
EVIL, TWIN = get("/admin/evil"), get("/api/v1/twn")
assert len(EVIL) == len(TWIN) < len(GOOD)


@dataclass(frozen=True)
class Attack:
    """`run(client, request)` tries to get `request` served. `direct`: whether a server without Isolator serves
    it; `twin`: whether the twin has to be served through Isolator (not where the means itself is refused)."""

    name: str
    run: Callable[[RawClient, bytes], None]
    direct: bool = True
    twin: bool = True
    isn: int | None = None


ATTACKS: list[Attack] = []


def attack(
    name: str, direct: bool = True, twin: bool = True, isn: int | None = None
) -> Callable[[Callable[[RawClient, bytes], None]], None]:
    def add(run: Callable[[RawClient, bytes], None]) -> None:
        ATTACKS.append(Attack(name, run, direct, twin, isn))

    return add


def one_served(c: RawClient) -> None:
    """An allowed request and its answer: the connection is live."""
    c.send(0, GOOD)
    c.listen()


# -- plain ways ----------------------------------------------------------------------------------------------


@attack("by itself")
def _(c: RawClient, request: bytes) -> None:
    c.send(0, request)


@attack("second on a kept-alive connection")
def _(c: RawClient, request: bytes) -> None:
    one_served(c)
    c.send(len(GOOD), request)


@attack("pipelined in one segment")
def _(c: RawClient, request: bytes) -> None:
    c.send(0, GOOD + request + GOOD)


@attack("byte by byte")
def _(c: RawClient, request: bytes) -> None:
    for at in range(len(request)):
        c.send(at, request[at : at + 1])


@attack("backwards")
def _(c: RawClient, request: bytes) -> None:
    for at in reversed(range(0, len(request), 7)):
        c.send(at, request[at : at + 7])


@attack("over the wrap of the sequence number", isn=0xFFFFFFFF - len(GOOD) - 10)
def _(c: RawClient, request: bytes) -> None:
    one_served(c)
    c.send(len(GOOD), request)


@attack("with a FIN on it")
def _(c: RawClient, request: bytes) -> None:
    c.send(0, request, "FPA")


@attack("behind a body that was said to be shorter")
def _(c: RawClient, request: bytes) -> None:
    c.send(0, post(b"0123456789", "Content-Length: 10") + request)


@attack("behind the last chunk")
def _(c: RawClient, request: bytes) -> None:
    c.send(0, post(b"3\r\nabc\r\n0\r\n\r\n", "Transfer-Encoding: chunked") + request)


@attack("in a second segment, right behind a body")
def _(c: RawClient, request: bytes) -> None:
    first = post(b"01234", "Content-Length: 10")
    c.send(0, first)
    c.listen(0.1)
    c.send(len(first), b"56789" + request)


# -- the same bytes twice, and not the same --------------------------------------------------------------------


@attack("a retransmission with a longer tail")
def _(c: RawClient, request: bytes) -> None:
    c.send(0, GOOD)
    c.send(0, GOOD + request)


@attack("what the server refused for its old timestamp, sent again otherwise")
def _(c: RawClient, request: bytes) -> None:
    """RFC 7323 section 5.3: the server takes none of the first, and all of the second."""
    first = GOOD if request is EVIL else request
    c.send(0, first, age=50_000)
    c.listen(0.2)
    c.send(0, request)


@attack("what the server refused for its acknowledgement, sent again otherwise")
def _(c: RawClient, request: bytes) -> None:
    first = GOOD if request is EVIL else request
    c.send(0, first, ack=(c.ack + 100_000) & 0xFFFFFFFF)
    c.listen(0.2)
    c.send(0, request)


@attack("what the server refused for its checksum, sent again otherwise")
def _(c: RawClient, request: bytes) -> None:
    c.send(0, GOOD, chksum=0xBEEF)
    c.send(0, request)


@attack("what the server refused for an MD5 signature, sent again otherwise")
def _(c: RawClient, request: bytes) -> None:
    """RFC 2385: a segment that is signed where nobody agreed on it is dropped."""
    first = GOOD if request is EVIL else request
    c.send(0, first, options=[(19, bytes(16)), ("NOP", None), ("NOP", None)])
    c.listen(0.2)
    c.send(0, request)


@attack("held bytes, overwritten", twin=False)
def _(c: RawClient, request: bytes) -> None:
    """The rest of an allowed head first, then a forbidden beginning with an overlap that differs."""
    c.send(4, GOOD[4:20])
    c.send(0, request)
    c.send(20, GOOD[20:])


@attack("a hole, filled with two different copies")
def _(c: RawClient, request: bytes) -> None:
    c.send(10, request[10:])
    c.send(0, request[:10])
    c.send(0, GOOD[:10])


# -- connections ---------------------------------------------------------------------------------------------


@attack("on the SYN", direct=False, twin=False)
def _(c: RawClient, request: bytes) -> None:
    c.put(c.segment(-1, request, "S"))


@attack("after a SYN in the middle of a live connection")
def _(c: RawClient, request: bytes) -> None:
    one_served(c)
    c.send(len(GOOD) - 1, b"", "S")  # its first byte would stand at the boundary
    c.listen(0.2)
    c.send(len(GOOD), request)


@attack("after a reset that the server does not believe")
def _(c: RawClient, request: bytes) -> None:
    one_served(c)
    c.send(len(GOOD) + 100, b"", "R")
    c.send(len(GOOD), request)


@attack("after a reset with a wrong checksum")
def _(c: RawClient, request: bytes) -> None:
    one_served(c)
    c.send(len(GOOD), b"", "R", chksum=0xBEEF)
    c.send(len(GOOD), request)


@attack("after a FIN with a wrong checksum")
def _(c: RawClient, request: bytes) -> None:
    one_served(c)
    c.send(len(GOOD), b"", "FA", chksum=0xBEEF)
    c.send(len(GOOD), request)


@attack("behind a FIN", direct=False, twin=False)
def _(c: RawClient, request: bytes) -> None:
    c.send(0, GOOD, "FPA")
    c.send(len(GOOD) + 1, request)


@attack("after its own denial")
def _(c: RawClient, request: bytes) -> None:
    c.send(0, request)
    c.listen(0.2)
    for at in (len(request), 0, len(GOOD)):
        c.send(at, request)


# -- packets -------------------------------------------------------------------------------------------------


@attack("in fragments", twin=False)
def _(c: RawClient, request: bytes) -> None:
    whole = c.network / c.segment(0, request)
    for part in fragment(whole, 24):
        c.frame(c.ethernet / part)


@attack("with an IP option", twin=False)
def _(c: RawClient, request: bytes) -> None:
    from scapy.layers.inet import IPOption_NOP

    c.put(c.segment(0, request), options=[IPOption_NOP()] * 4)


@attack("as urgent data", twin=False)
def _(c: RawClient, request: bytes) -> None:
    c.send(0, request, "PAU", urgptr=1)


@attack("in a VLAN", direct=False, twin=False)
def _(c: RawClient, request: bytes) -> None:
    c.frame(c.ethernet / Dot1Q(vlan=1) / c.network / c.segment(0, request))


@attack("with an IP length that hides it", direct=False, twin=False)
def _(c: RawClient, request: bytes) -> None:
    c.put(c.segment(0, request), len=40)


# -- what must not stall -----------------------------------------------------------------------------------------


@attack("behind a keep-alive probe")
def _(c: RawClient, request: bytes) -> None:
    """RFC 9293 section 3.8.4: one byte of garbage below what was acknowledged; it has to be answered."""
    one_served(c)
    c.send(len(GOOD) - 1, b"\0", "A")
    c.listen(0.2)
    c.send(len(GOOD), request)


@attack("two writes that come again as one")
def _(c: RawClient, request: bytes) -> None:
    c.send(0, request[:20])
    c.send(20, request[20:])
    c.send(0, request)


@attack("one write that comes again in parts")
def _(c: RawClient, request: bytes) -> None:
    c.send(0, request)
    c.send(0, request[:11])
    c.send(11, request[11:])


# -- running -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(Path("/tmp") / f"{PREFIX}-attacks", "off") as made:
        (made.root / "policies" / "api.yaml").write_text(POLICY)
        made.inside("intruder", "ip", "link", "set", "eth0", "promisc", "on")
        made.inside(
            "api", "ip", "neigh", "replace", ATTACKER, "lladdr", MAC, "dev", "eth0", "nud", "permanent"
        )
        yield made


def carry_out(lab: Lab, request: bytes, ports: Iterator[int]) -> dict[str, bool]:
    """Every attack with `request`: whether it was served, by the server's own log."""
    server_mac = lab.inside("api", "ip", "-br", "link", "show", "eth0").split()[2]
    used = {}
    for each in ATTACKS:
        port = used[each.name] = next(ports)
        client = RawClient(f"{PREFIX}-intruder", MAC, server_mac, ATTACKER, "10.9.0.2", port, each.isn)
        try:
            assert client.connect(), each.name
            each.run(client, request)
            client.listen()
        finally:
            client.send(client.acked, b"", "R")
            client.close()
    time.sleep(0.3)
    path = request.split()[1].decode()
    lines = [line for line in lab.served() if f" {path} " in line]
    return {name: any(f" {port} " in line for line in lines) for name, port in used.items()}


def test_no_attack_gets_a_forbidden_request_served(lab: Lab) -> None:
    ports = itertools.count(20000)
    direct = carry_out(lab, EVIL, ports)
    lab.start_agent()
    evil, twins = carry_out(lab, EVIL, ports), carry_out(lab, TWIN, ports)
    assert {name for name, served in evil.items() if served} == set()
    assert {a.name for a in ATTACKS if direct[a.name] != a.direct} == set(), "an attack is not what it says"
    assert {a.name for a in ATTACKS if twins[a.name] != a.twin} == set()
