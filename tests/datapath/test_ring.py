"""The ring on real veth pairs: each frame once and whole, both CPUs sending; TCP with GSO through it all."""

from __future__ import annotations

import functools
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isolator.datapath.ring import Frame, Reading, Ring, RingError, packet_socket
from isolator.datapath.sender import Sender
from tests.datapath import ring_load
from tests.datapath.ring_testbed import Net, attach_ingress, load_punt, nets, pair

pytestmark = pytest.mark.root
EXPERIMENTAL = bytes.fromhex("02000000000202000000000188b5")
BOTH = pytest.mark.parametrize("reading", list(Reading))


@pytest.fixture
def punt() -> Iterator[Net]:
    """A namespace with a punt pair: what goes out of `punt0` arrives at `punt1`."""
    with nets(1) as (net,):
        pair(net, "punt0", net, "punt1")
        yield net


def _load(net: Net, flow: int, count: int) -> subprocess.Popen[bytes]:
    cpus = sorted(os.sched_getaffinity(0))
    words = ["punt0", str(flow), str(count), str(cpus[flow % len(cpus)])]
    return subprocess.Popen(
        ["nsenter", f"--net={net.path}", sys.executable, str(Path(ring_load.__file__)), *words]
    )


@BOTH
@pytest.mark.parametrize("block_size", [1 << 17, 1 << 20])
def test_every_frame_arrives_once_and_whole(punt: Net, reading: Reading, block_size: int) -> None:
    flows, count = 4, 15_000
    following = [0] * flows
    with Ring(packet_socket(punt.netns), "punt1", reading=reading, block_size=block_size) as ring:
        senders = [_load(punt, flow, count) for flow in range(flows)]
        deadline, quiet = time.monotonic() + 60, 0
        while quiet < 3:
            frames = ring.poll()
            for frame in frames:
                flow, number = ring_load.check(frame.packet)
                assert number >= following[flow], "read twice, or out of order"
                following[flow] = number + 1
            if not frames and all(sender.poll() is not None for sender in senders):
                quiet += 1
                time.sleep(0.02)  # past the retire time
            assert time.monotonic() < deadline
        statistics = ring.statistics()
    assert [sender.wait() for sender in senders] == [0] * flows
    assert statistics.frames + statistics.drops == flows * count
    assert statistics.truncated == statistics.unfilled == 0


@BOTH
def test_nothing_is_lost_to_a_reader_that_keeps_up(punt: Net, reading: Reading) -> None:
    with (
        Ring(packet_socket(punt.netns), "punt1", reading=reading) as ring,
        Sender(functools.partial(packet_socket, punt.netns)) as sender,
    ):
        port = punt.ifindex("punt0")
        sender.add(port)
        got: list[int] = []
        for number in range(20_000):
            assert sender.send(port, bytes(10) + EXPERIMENTAL + number.to_bytes(4, "big") + bytes(60))
            if number % 100 == 0:
                got += [int.from_bytes(frame.packet[14:18], "big") for frame in ring.poll(1000)]
        while len(got) < 20_000:
            got += [int.from_bytes(frame.packet[14:18], "big") for frame in ring.poll(1000)]
        assert got == list(range(20_000))
        assert ring.statistics().drops == 0


def test_a_full_ring_drops_counts_and_recovers(punt: Net) -> None:
    with (
        Ring(packet_socket(punt.netns), "punt1", block_size=1 << 16, block_count=2) as ring,
        Sender(functools.partial(packet_socket, punt.netns)) as sender,
    ):
        port = punt.ifindex("punt0")
        sender.add(port)
        for number in range(200):
            sender.send(port, bytes(10) + EXPERIMENTAL + number.to_bytes(4, "big") + bytes(1400))
        first = _drain(ring)
        for number in range(200, 210):
            sender.send(port, bytes(10) + EXPERIMENTAL + number.to_bytes(4, "big") + bytes(1400))
        second = _drain(ring)
        statistics = ring.statistics()
    assert first == list(range(len(first))) and len(first) < 200
    assert second == list(range(200, 210))
    assert statistics.drops == 200 - len(first)
    assert statistics.freezes > 0
    assert statistics.frames == len(first) + 10


def test_a_frame_longer_than_a_block_is_dropped_and_counted(punt: Net) -> None:
    with (
        Ring(packet_socket(punt.netns), "punt1", block_size=1 << 15, block_count=4) as ring,
        Sender(functools.partial(packet_socket, punt.netns)) as sender,
    ):
        port = punt.ifindex("punt0")
        sender.add(port)
        for size in (100, 40_000, 200):
            sender.send(port, bytes(10) + EXPERIMENTAL + (1).to_bytes(4, "big") + bytes(size))
        assert _drain(ring) == [1, 1]
        assert ring.statistics().truncated == 1


def test_frame_fields(punt: Net) -> None:
    with (
        Ring(packet_socket(punt.netns), "punt1") as ring,
        Sender(functools.partial(packet_socket, punt.netns)) as sender,
    ):
        port = punt.ifindex("punt0")
        sender.add(port)
        before = time.time_ns()
        sender.send(port, bytes(10) + EXPERIMENTAL + b"hello" + bytes(60))
        frame = _next(ring)
        assert bytes(frame.packet) == EXPERIMENTAL + b"hello" + bytes(60)
        assert bytes(frame.vnet_packet[10:]) == bytes(frame.packet)
        assert before - 10**8 <= frame.time <= time.time_ns()
        assert frame.context == frame.context & 0xFFFFFFFF


def test_the_file_wakes_its_reader_when_a_block_closes(punt: Net) -> None:
    with (
        Ring(packet_socket(punt.netns), "punt1", reading=Reading.CLOSED) as ring,
        Sender(functools.partial(packet_socket, punt.netns)) as sender,
    ):
        port = punt.ifindex("punt0")
        sender.add(port)
        poller = select.epoll()
        poller.register(ring.fileno(), select.EPOLLIN)
        try:
            assert poller.poll(0) == []
            sender.send(port, bytes(10) + EXPERIMENTAL + bytes(60))
            assert poller.poll(10) == [(ring.fileno(), select.EPOLLIN)]
            assert len(ring.poll()) == 1
            assert ring.poll() == []  # the block is handed back: quiet again
            assert poller.poll(0.02) == []
        finally:
            poller.close()


def test_what_leaves_by_the_ring_s_interface_is_not_read(punt: Net) -> None:
    with (
        Ring(packet_socket(punt.netns), "punt1") as ring,
        Sender(functools.partial(packet_socket, punt.netns)) as sender,
    ):
        port = punt.ifindex("punt1")
        sender.add(port)
        sender.send(port, bytes(10) + EXPERIMENTAL + bytes(60))
        time.sleep(0.01)
        assert ring.poll() == []


def test_frames_held_over_close_stay_readable(punt: Net) -> None:
    with Sender(functools.partial(packet_socket, punt.netns)) as sender:
        ring = Ring(packet_socket(punt.netns), "punt1")
        port = punt.ifindex("punt0")
        sender.add(port)
        sender.send(port, bytes(10) + EXPERIMENTAL + b"hello" + bytes(60))
        frame = _next(ring)
        ring.close()
        assert bytes(frame.packet[14:19]) == b"hello"


def test_rings_share_an_interface_by_fanout(punt: Net) -> None:
    with (
        Ring(packet_socket(punt.netns), "punt1", fanout=(7, 1)) as one,  # PACKET_FANOUT_LB: round robin
        Ring(packet_socket(punt.netns), "punt1", fanout=(7, 1)) as other,
        Sender(functools.partial(packet_socket, punt.netns)) as sender,
    ):
        port = punt.ifindex("punt0")
        sender.add(port)
        for number in range(10):
            sender.send(port, bytes(10) + EXPERIMENTAL + number.to_bytes(4, "big") + bytes(60))
        seen = _drain(one), _drain(other)
    assert sorted(seen[0] + seen[1]) == list(range(10))
    assert len(seen[0]) == len(seen[1]) == 5


def test_bad_set_up_is_one_clear_error(punt: Net) -> None:
    with pytest.raises(RingError, match="no ring on interface 'nowhere'"):
        Ring(packet_socket(punt.netns), "nowhere")
    with pytest.raises(RingError, match="Invalid argument"):
        Ring(packet_socket(punt.netns), "punt1", block_size=5000)


@pytest.mark.parametrize("context", [1, 0x7FFFFFFF, -1])
def test_a_punted_frame_brings_its_context(punt: Net, context: int) -> None:
    pair(punt, "port0", punt, "port1")
    program = load_punt(context, punt.ifindex("punt0"))
    attach_ingress(punt, "port1", program)
    os.close(program)
    with (
        Ring(packet_socket(punt.netns), "punt1") as ring,
        Sender(functools.partial(packet_socket, punt.netns)) as sender,
    ):
        port = punt.ifindex("port0")
        sender.add(port)
        sender.send(port, bytes(10) + EXPERIMENTAL + b"hello" + bytes(60))
        frame = _next(ring)
        assert frame.context == context & 0xFFFFFFFF
        assert bytes(frame.packet) == EXPERIMENTAL + b"hello" + bytes(60)


@BOTH
def test_tcp_with_gso_through_ring_and_sender(reading: Reading) -> None:
    """client - port0 | ring and sender | port1 - server: the hash agrees, and frames are super-packets."""
    total = 20_000_000
    with nets(3) as (client, middle, server):
        pair(client, "eth0", middle, "port0", 1500)
        pair(server, "eth0", middle, "port1", 1500)
        client.run("ip", "addr", "add", "10.77.0.1/24", "dev", "eth0")
        server.run("ip", "addr", "add", "10.77.0.2/24", "dev", "eth0")
        with Wire(middle, reading) as wire:
            digest = _receive(server)
            sent = subprocess.run(
                ["nsenter", f"--net={client.path}", sys.executable, "-c", _SEND, str(total)],
                check=True, capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert digest() == sent.stdout.strip()
        assert wire.longest > 20_000
        assert wire.kinds >= {0, 1}  # VIRTIO_NET_HDR_GSO_NONE, _TCPV4
        assert not wire.errors


class Wire:
    """Two ports, two rings, one thread that sends what either reads out of the other."""

    def __init__(self, net: Net, reading: Reading) -> None:
        self.longest, self.kinds = 0, set[int]()
        self.sender = Sender(functools.partial(packet_socket, net.netns))
        self.rings = [Ring(packet_socket(net.netns), f"port{n}", reading=reading) for n in (0, 1)]
        self.ports = [net.ifindex("port1"), net.ifindex("port0")]
        for port in self.ports:
            self.sender.add(port)
        self._stop = False
        self._thread = threading.Thread(target=self._run)

    @property
    def errors(self) -> dict[int, int]:
        return dict(self.sender.errors)

    def _run(self) -> None:
        while not self._stop:
            select.select(self.rings, [], [], 0.001)
            for ring, port in zip(self.rings, self.ports, strict=True):
                while frames := ring.poll():
                    for frame in frames:
                        self.longest = max(self.longest, len(frame.packet))
                        self.kinds.add(frame.vnet_packet[1])
                        self.sender.send(port, frame.vnet_packet)

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()
        self.sender.close()
        for ring in self.rings:
            ring.close()


_SEND = """
import hashlib, random, socket, sys
data = random.Random(1).randbytes(1 << 20)
digest, left = hashlib.sha256(), int(sys.argv[1])
with socket.create_connection(("10.77.0.2", 8000), timeout=30) as sock:
    while left:
        part = data[:left]
        sock.sendall(part)
        digest.update(part)
        left -= len(part)
print(digest.hexdigest())
"""
_RECEIVE = """
import hashlib, socket
with socket.create_server(("10.77.0.2", 8000)) as listener:
    print("ready", flush=True)
    sock, _ = listener.accept()
    digest = hashlib.sha256()
    with sock:
        while part := sock.recv(1 << 18):
            digest.update(part)
print(digest.hexdigest())
"""


def _receive(net: Net) -> Callable[[], str]:
    """Starts a server. Returns what waits for its end and says the digest of what it got."""
    process = subprocess.Popen(
        ["nsenter", f"--net={net.path}", sys.executable, "-c", _RECEIVE], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"

    def digest() -> str:
        return process.communicate(timeout=30)[0].strip()

    return digest


def _drain(ring: Ring) -> list[int]:
    """The numbers of all frames that arrive until the ring stays quiet."""
    numbers: list[int] = []
    for _ in range(10):
        while frames := ring.poll():
            numbers += [int.from_bytes(frame.packet[14:18], "big") for frame in frames]
        time.sleep(0.005)
    return numbers


def _next(ring: Ring) -> Frame:
    deadline = time.monotonic() + 10
    while not (frames := ring.poll(1)):
        assert time.monotonic() < deadline
    return frames[0]
