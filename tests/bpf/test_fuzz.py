"""Ten thousand random and mutated frames: no crash, nothing for the stack, nothing out that no rule allows.

What may come out is judged by an oracle that reads the frame by itself and knows the bench's policy.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from isolator.datapath.libbpf import BpfError, run_program
from tests.bpf.bench import (
    CONTAINER,
    CONTAINER6,
    CONTAINER_MAC,
    DENIED_PEER,
    EGRESS,
    GATEWAY_MAC,
    INGRESS,
    PEER,
    PEER6,
    VNET_NONE,
    Bench,
    gso,
)
from tests.bpf.frames import inbound, inbound6, outbound, outbound6, tcp

pytestmark = pytest.mark.root
FRAMES = 10_000
SHOT, REDIRECT = 2, 7  # TC_ACT_… (linux/pkt_cls.h)
ETHERNET_MIN = 60

BODY = Raw(b"GET /secret HTTP/1.1\r\nHost: a\r\n\r\n")
SEEDS = [
    bytes(frame)
    for frame in (
        *(inbound(tcp(1000, port, flags) / BODY) for port in range(79, 85) for flags in ("A", "FA", "PA")),
        *(inbound(tcp(1000, port)) for port in range(79, 93)),
        *(outbound(tcp(1000, port)) for port in range(79, 93)),
        *(outbound(tcp(port, 1000, "SA", 5000, 1001)) for port in (80, 81, 82)),
        *(inbound(tcp(port, 1000, "SA", 5000, 1001)) for port in (90, 91, 92)),
        inbound(tcp(1000, 81), source=DENIED_PEER),
        inbound6(tcp(1000, 80)),
        inbound6(tcp(1000, 80, "A", 1001) / BODY),
        inbound6(UDP(sport=1, dport=53) / BODY),
        outbound6(tcp(1000, 90)),
        outbound6(ICMPv6EchoRequest()),
        outbound(UDP(sport=1, dport=53) / BODY),
        outbound(ICMP()),
        inbound(ICMP(type=3, code=4) / IP(src=CONTAINER, dst=PEER) / TCP(sport=81, dport=1000)),
        inbound6(ICMPv6PacketTooBig() / IPv6(src=CONTAINER6, dst=PEER6) / TCP(sport=80, dport=1000)),
        Ether(src=CONTAINER_MAC, dst=GATEWAY_MAC) / ARP(hwsrc=CONTAINER_MAC, psrc=CONTAINER, pdst=PEER),
        Ether(src=CONTAINER_MAC, dst=GATEWAY_MAC) / IPv6(src=CONTAINER6, hlim=255) / ICMPv6ND_NS(tgt=PEER6),
        Ether(src=GATEWAY_MAC, dst=CONTAINER_MAC)
        / Dot1Q(vlan=1)
        / IP(src=PEER, dst=CONTAINER)
        / TCP(dport=81),
    )
]
INTERESTING = [
    12,
    13,
    14,
    16,
    17,
    20,
    21,
    23,
    34,
    35,
    36,
    37,
    38,
    39,
    46,
    47,
]  # type, lengths, flags, ports, offset


def frames(seed: int) -> Iterator[tuple[bytes, bytes]]:
    """(frame, vnet header): seeds as they are, mutated once or some times, and noise behind a right MAC."""
    dice = random.Random(seed)
    for _ in range(FRAMES):
        frame = bytearray(dice.choice(SEEDS))
        if dice.random() < 0.1:
            frame[14:] = dice.randbytes(dice.randrange(200))
        for _ in range(dice.choice((0, 1, 1, 2, 5))):
            mutate(frame, dice)
        offload = gso(dice.randrange(14, 80), dice.randrange(1, 2000)) if dice.random() < 0.05 else VNET_NONE
        yield bytes(frame), offload


def mutate(frame: bytearray, dice: random.Random) -> None:
    kind = dice.randrange(5)
    at = dice.choice(INTERESTING) if dice.random() < 0.6 else dice.randrange(14, max(len(frame), 15))
    if kind == 0:
        del frame[max(at, 14) :]
    elif kind == 1:
        frame += dice.randbytes(dice.randrange(1, 40))
    elif at < len(frame):
        frame[at] = dice.choice(
            (0, 1, 5, 80, 81, 90, 255, frame[at] ^ 1 << dice.randrange(8), dice.randrange(256))
        )


# -- the oracle ------------------------------------------------------------------------------------------

OWN = {ip_address(CONTAINER), ip_address(CONTAINER6)}
PEERS = [ip_network("10.9.0.0/16"), ip_network("fd00:9::/64")]


def may_come_out(frame: bytes, direction: int) -> bool:
    """Whether the bench's policy lets such a frame reach that end."""
    kind = struct.unpack_from("!H", frame, 12)[0]
    if direction == EGRESS and frame[6:12] != bytes.fromhex(CONTAINER_MAC.replace(":", "")):
        return False
    if kind == 0x0806:
        return len(frame) >= 42 and (
            direction == INGRESS or ip_address(frame[28:32]) in (*OWN, ip_address(0))
        )
    if kind == 0x0800:
        length, protocol = struct.unpack_from("!H", frame, 16)[0], frame[23]
        whole = frame[14] == 0x45 and not struct.unpack_from("!H", frame, 20)[0] & 0x3FFF
        source, to, l4 = ip_address(frame[26:30]), ip_address(frame[30:34]), 34
    elif kind == 0x86DD:
        length, protocol = 40 + struct.unpack_from("!H", frame, 18)[0], frame[20]
        whole = frame[14] >> 4 == 6
        source, to, l4 = ip_address(frame[22:38]), ip_address(frame[38:54]), 54
    else:
        return False
    agrees = length == len(frame) - 14 or (len(frame) <= ETHERNET_MIN and length < len(frame) - 14)
    local, remote = (source, to) if direction == EGRESS else (to, source)
    if protocol in (1, 58) and (protocol == 58) == (kind == 0x86DD) and whole and agrees:
        return icmp_may(protocol, frame[l4], direction, local, remote)
    if not whole or not agrees or (direction == EGRESS and local not in OWN):
        return False
    known = any(remote in peers for peers in PEERS)
    return known and transport_may(protocol, frame[l4:], direction, 14 + length - l4)


def icmp_may(protocol: int, kind: int, direction: int, local: object, remote: object) -> bool:
    """Echoes of peers, errors, and neighbour discovery; the tables look at those in detail."""
    if direction == EGRESS and local not in OWN and not (kind in (133, 135) and local == ip_address("::")):
        return False
    errors, echoes = ((3, 11, 12), (0, 8)) if protocol == 1 else ((1, 2, 3, 4), (128, 129))
    if kind in echoes:
        return any(remote in peers for peers in PEERS)  # type: ignore[operator]
    return kind in errors or (protocol == 58 and 133 <= kind <= 136)


def transport_may(protocol: int, rest: bytes, direction: int, length: int) -> bool:
    source, to = struct.unpack_from("!HH", rest)
    if protocol == 17:
        return 53 in (source, to)
    if protocol != 6:
        return False
    payload = length - (rest[12] >> 4) * 4
    local, remote = (source, to) if direction == EGRESS else (to, source)
    if local == 81 or remote == 90:
        return True
    inspected = (local == 80 and direction == INGRESS) or (remote == 91 and direction == EGRESS)
    if inspected:
        return payload == 0  # nothing was ever allowed
    return local == 80 or remote == 91


# -- the tests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1])
def test_nothing_comes_out_that_no_rule_allows(b: Bench, seed: int) -> None:
    came_out = {"container": 0, "network": 0, "punt": 0}
    before = sum(b._drops().values())
    for frame, offload in frames(seed):
        sock = b.container if frame[6:12] == bytes.fromhex(CONTAINER_MAC.replace(":", "")) else b.network
        with contextlib.suppress(OSError):  # an offload that the packet socket itself refuses
            sock.send(offload + frame)
        while outcome := b._arrived():
            came_out[outcome.where] += 1
            if outcome.where != "punt":
                direction = INGRESS if outcome.where == "container" else EGRESS
                assert may_come_out(outcome.frame, direction), f"{outcome}: {outcome.frame.hex()}"
    assert min(came_out.values()) > 100, "the fuzzer has to reach every end"
    assert sum(b._drops().values()) - before > 1000


@pytest.mark.parametrize("seed", [2])
def test_nothing_is_handed_to_the_stack(b: Bench, seed: int) -> None:
    program = b.datapath.program_fd("isolator_tc")
    seen = set()
    with b.namespace.entered():
        for number, (frame, _) in enumerate(frames(seed)):
            ifindex = (b.container_port, b.network_port, socket.if_nametoindex("lo"))[number % 3]
            with contextlib.suppress(BpfError):  # the test run itself refuses a cut IP header
                seen.add(run_program(program, frame, skb_context(ifindex)).retval)
    assert seen == {SHOT, REDIRECT}


def skb_context(ifindex: int) -> bytes:
    """struct __sk_buff (linux/bpf.h), 192 bytes, of a test run: only some fields may be set."""
    context = bytearray(192)
    struct.pack_into("=I", context, 40, ifindex)
    return bytes(context)
