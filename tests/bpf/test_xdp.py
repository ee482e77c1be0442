"""XDP in front of tc: drops what flows4 says is dropped, and changes nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from isolator.core.model import DropReason
from isolator.datapath.abi import PORT_XDP_FORWARD
from isolator.datapath.attach import XdpMode
from isolator.datapath.libbpf import run_program
from tests.bpf.bench import STRANGER_MAC, Bench
from tests.bpf.conversation import HEAD, SERVER_ISN, Conversation
from tests.bpf.frames import inbound, inbound6, outbound, tcp
from tests.bpf.test_frames import FRAMES, LAYER4, send

pytestmark = pytest.mark.root
XDP_PASS = 2


@pytest.fixture(params=[XdpMode.NATIVE, XdpMode.GENERIC], ids=lambda mode: mode.name.lower())
def x(b: Bench, request: pytest.FixtureRequest) -> Iterator[Bench]:
    ports = (b.container_port, b.network_port)
    with b.namespace.entered():
        for port in ports:
            b.datapath.attach_port(port, request.param)
    yield b
    with b.namespace.entered():
        for port in ports:
            b.datapath.attach_port(port)


def test_verdicts_are_the_same(x: Bench) -> None:
    for name, frame, expected in FRAMES + LAYER4:
        x.reset()
        assert (name, send(x, frame)) == (name, expected)


@pytest.mark.parametrize("make", [inbound, inbound6])
def test_a_denied_flow_is_dropped_before_tc(x: Bench, make: object) -> None:
    frame = make(tcp(1000, 82))  # type: ignore[operator]
    assert [send(x, frame) for _ in range(3)] == ["drop POLICY_DENY"] * 3
    ((_, flow),) = x.datapath.flows4()
    assert flow.packets == (3, 0) and flow.reason is DropReason.POLICY_DENY


def test_an_inspected_flow_is_tcs(x: Bench) -> None:
    c = Conversation(x).handshake()
    c.allow_head()
    assert str(c.client("PA", c.start, SERVER_ISN + 1, HEAD)) == "container"
    assert str(c.client("PA", c.at(len(HEAD)), SERVER_ISN + 1, HEAD)) == "punt PAYLOAD"


@pytest.mark.parametrize("x", [XdpMode.GENERIC], indirect=True)  # a native redirect is lost on veth
def test_what_it_forwards_is_addressed_to_the_container(x: Bench) -> None:
    port = x.datapath.ports()[x.network_port]
    x.datapath.set_port(x.network_port, replace(port, flags=PORT_XDP_FORWARD))
    assert send(x, inbound(tcp(1000, 81))) == "container"
    assert send(x, inbound(tcp(1000, 81, "A"))) == "container"
    assert send(x, inbound(tcp(1000, 81, "A"), mac=STRANGER_MAC)) == "drop FOREIGN_DESTINATION"


def test_it_decides_nothing_by_itself(b: Bench) -> None:
    program = b.datapath.program_fd("isolator_xdp")
    with b.namespace.entered():
        for frame in (inbound(tcp(1000, 82)), outbound(tcp(1000, 90)), inbound(tcp(1000, 81))):
            assert run_program(program, bytes(frame)).retval == XDP_PASS
