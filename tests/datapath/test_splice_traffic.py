"""Traffic through a splice: established TCP lives on through splice and restore, IPv4 and IPv6."""

from __future__ import annotations

import hashlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.datapath.journal import Journal
from isolator.datapath.netns import Netns
from isolator.datapath.splice import Splicer, SpliceRequest
from tests.datapath import splice_lab as lab

pytestmark = pytest.mark.root
REQUEST = SpliceRequest("web", lab.A, "eth0")
CHUNK = bytes(range(256)) * 64


@pytest.fixture
def splicer(tmp_path: Path) -> Iterator[Splicer]:
    with lab.two_containers():
        yield Splicer(lab.ISOLATOR, Journal(tmp_path))


def connection(
    family: socket.AddressFamily, server: str, bound_to: str = ""
) -> tuple[socket.socket, socket.socket]:
    """A TCP connection from B to A; the server's side may be bound to a device."""
    with Netns(lab.A) as netns, netns.entered():
        listener = socket.socket(family, socket.SOCK_STREAM)
    if bound_to:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, bound_to.encode())
    listener.bind((server, 7000))
    listener.listen()
    with Netns(lab.B) as netns, netns.entered():
        client = socket.socket(family, socket.SOCK_STREAM)
    client.connect((server, 7000))
    with listener:
        return client, listener.accept()[0]


class Stream(threading.Thread):
    """Sends chunks from one socket to the other without a pause; `finish` says whether all came through."""

    def __init__(self, sender: socket.socket, receiver: socket.socket) -> None:
        super().__init__()
        self.sender, self.receiver = sender, receiver
        self.stop = threading.Event()
        self.sent, self.received, self.bytes = hashlib.sha256(), hashlib.sha256(), 0
        self.reader = threading.Thread(target=self.read)

    def run(self) -> None:
        self.reader.start()
        while not self.stop.is_set():
            self.sender.sendall(CHUNK)
            self.sent.update(CHUNK)
        self.sender.shutdown(socket.SHUT_WR)

    def read(self) -> None:
        while data := self.receiver.recv(1 << 16):
            self.received.update(data)
            self.bytes += len(data)

    def finish(self) -> bool:
        self.stop.set()
        self.join()
        self.reader.join()
        return self.sent.digest() == self.received.digest()

    def await_progress(self) -> None:
        mark = self.bytes
        while self.bytes < mark + (1 << 20):
            time.sleep(0.005)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("family", "server"), [(socket.AF_INET, "10.31.0.1"), (socket.AF_INET6, "fd31::1")])
@pytest.mark.parametrize("bound_to", ["", "eth0"])
def test_established_tcp_survives_splice_and_restore(
    splicer: Splicer, family: socket.AddressFamily, server: str, bound_to: str
) -> None:
    client, accepted = connection(family, server, bound_to)
    with client, accepted:
        stream = Stream(client, accepted)
        stream.start()
        stream.await_progress()
        for _ in range(2):
            splicer.splice(REQUEST, lab.mirror)
            stream.await_progress()
            splicer.restore("web")
            stream.await_progress()
        assert stream.finish()


@pytest.mark.timeout(60)
def test_traffic_really_crosses_the_ports(splicer: Splicer) -> None:
    made = splicer.splice(REQUEST, lambda container_port, network_port: None)  # ports that forward nothing
    with pytest.raises(RuntimeError):
        lab.inside(lab.B, "ping -c1 -W1 10.31.0.1")
    with Netns(lab.ISOLATOR) as netns, netns.entered():
        lab.mirror(made.container_port, made.network_port)
    lab.inside(lab.B, "ping -c2 -i0.2 -W2 10.31.0.1")
    lab.inside(lab.A, "ping -c1 -W2 -s 8900 -M do 10.31.0.2")
    lab.inside(lab.B, "ping -6 -c1 -W2 fd31::1")


@pytest.mark.timeout(60)
def test_a_veth_whose_ends_share_an_ifindex_is_not_dark_for_a_second(splicer: Splicer) -> None:
    """linkwatch puts such a carrier off by up to 1 s; without settle_carrier some hundred probes are lost."""
    index = int(lab.inside(lab.A, "cat /sys/class/net/eth0/ifindex"))
    lab.batch(lab.HOST, "link del veth1")
    lab.batch(
        lab.HOST,
        f"link add veth1 index {index + 40} type veth peer name eth0 index {index + 40} netns {lab.A}",
    )
    lab.batch(lab.HOST, "link set veth1 master br0 up")
    lab.batch(lab.A, "link set eth0 up\naddr add 10.31.0.1/24 dev eth0")
    lab.await_addresses(lab.A)
    for change in (lambda: splicer.splice(REQUEST, lab.mirror), lambda: splicer.restore("web")):
        change()
        assert echoes(lost_before=50)


def echoes(lost_before: int) -> bool:
    """Whether an answer comes among so many pings, 10 ms apart."""
    with Netns(lab.B) as netns, netns.entered(), Netns(lab.A) as other:
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with other.entered():
            answering = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with asking, answering:
        answering.bind(("10.31.0.1", 7001))
        answering.settimeout(0.01)
        for number in itertools.count():
            asking.sendto(b"?", ("10.31.0.1", 7001))
            try:
                answering.recv(1)
            except TimeoutError:
                if number < lost_before:
                    continue
                return False
            return True
    return False
