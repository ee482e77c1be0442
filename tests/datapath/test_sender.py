"""The sender on a veth pair: what it sends arrives, what it can't send is counted by errno, never raised."""

from __future__ import annotations

import errno
import functools
import socket
import struct
from collections.abc import Iterator

import pytest

from isolator.datapath.ring import packet_socket
from isolator.datapath.sender import Sender
from tests.datapath.ring_testbed import Net, ip, nets, pair

pytestmark = pytest.mark.root
FRAME = bytes(10) + bytes.fromhex("02000000000202000000000188b5") + b"hello" + bytes(60)


@pytest.fixture
def net() -> Iterator[Net]:
    with nets(1) as (net,):
        pair(net, "port0", net, "port1", 1500)
        yield net


@pytest.fixture
def sender(net: Net) -> Iterator[Sender]:
    with Sender(functools.partial(packet_socket, net.netns)) as sender:
        sender.add(net.ifindex("port0"))
        yield sender


def _listen(net: Net, interface: str) -> socket.socket:
    sock = packet_socket(net.netns)
    sock.settimeout(5)
    sock.bind((interface, 3))
    return sock


def test_bytes_and_views_arrive_as_they_are(net: Net, sender: Sender) -> None:
    with _listen(net, "port1") as listener:
        for frame in (FRAME, memoryview(FRAME), memoryview(b"xx" + FRAME)[2:]):
            assert sender.send(net.ifindex("port0"), frame)
            assert listener.recv(2000) == FRAME
    assert sender.frames == 3
    assert not sender.errors


def test_each_port_gets_its_own(net: Net, sender: Sender) -> None:
    sender.add(net.ifindex("port1"))
    with _listen(net, "port1") as one, _listen(net, "port0") as other:
        sender.send(net.ifindex("port0"), FRAME)
        sender.send(net.ifindex("port1"), FRAME + b"!")
        assert _incoming(one) == FRAME
        assert _incoming(other) == FRAME + b"!"


def _incoming(listener: socket.socket) -> bytes:
    """The next frame that arrived, not one that left."""
    while True:
        frame, address = listener.recvfrom(2000)
        if address[2] != socket.PACKET_OUTGOING:
            return frame


@pytest.mark.parametrize(
    ("frame", "number"),
    [
        (FRAME + bytes(1500), errno.EMSGSIZE),
        (FRAME[:12], errno.EINVAL),
        (b"", errno.EINVAL),
        (struct.pack("=BBHHHH", 0, 9, 54, 1400, 0, 0) + FRAME[10:], errno.EINVAL),  # no such GSO kind
        (struct.pack("=BBHHHH", 1, 0, 0, 0, 5000, 6) + FRAME[10:], errno.EINVAL),  # checksum beyond the end
    ],
)
def test_what_cannot_be_sent_is_counted(net: Net, sender: Sender, frame: bytes, number: int) -> None:
    assert not sender.send(net.ifindex("port0"), frame)
    assert sender.errors == {number: 1}
    assert sender.send(net.ifindex("port0"), FRAME)
    assert sender.frames == 1


def test_a_port_that_is_down_gone_or_unknown(net: Net, sender: Sender) -> None:
    port = net.ifindex("port0")
    assert not sender.send(12345, FRAME)
    ip("-n", net.name, "link", "set", "dev", "port0", "down")
    assert not sender.send(port, FRAME)
    ip("-n", net.name, "link", "del", "port0")
    assert not sender.send(port, FRAME)
    sender.remove(port)
    assert not sender.send(port, FRAME)
    assert sender.errors == {errno.ENODEV: 2, errno.ENETDOWN: 1, errno.ENXIO: 1}


def test_an_ifindex_that_comes_back_is_added_again(net: Net, sender: Sender) -> None:
    port = net.ifindex("port0")
    assert sender.send(port, FRAME)
    ip("-n", net.name, "link", "del", "port0")
    words = f"link add name port0 index {port} type veth peer name port1"
    ip("-n", net.name, *words.split())
    for end in ("port0", "port1"):
        ip("-n", net.name, "link", "set", "dev", end, "up")
    assert not sender.send(port, FRAME)
    sender.add(port)
    assert sender.send(port, FRAME)


def test_a_port_that_was_added_and_is_not_there(sender: Sender) -> None:
    sender.add(12345)
    assert not sender.send(12345, FRAME)
    assert sender.errors == {errno.ENODEV: 1}


def test_a_port_has_a_socket_from_its_first_frame_until_it_is_removed(net: Net, sender: Sender) -> None:
    """Closed one after the other, 200 of them keep a process that was killed from ending for seconds."""
    port = net.ifindex("port0")
    sender.add(net.ifindex("port1"))
    assert not sender._sockets
    sender.send(port, FRAME)
    assert list(sender._sockets) == [port]
    sender.remove(port)
    assert not sender._sockets


def test_the_sender_s_socket_receives_nothing(net: Net, sender: Sender) -> None:
    sender.send(net.ifindex("port0"), FRAME)
    (sock,) = sender._sockets.values()
    with Sender(functools.partial(packet_socket, net.netns)) as other:
        other.add(net.ifindex("port1"))
        other.send(net.ifindex("port1"), FRAME)
    with pytest.raises(BlockingIOError):
        sock.recv(2000)
