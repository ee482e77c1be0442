"""An agent of another version takes over, and its maps are laid out otherwise: no connection notices.

The other layout comes first: what this version has pinned is moved there, and the ports run its programs; then this
version starts, and upgrades from it. Connections of every kind live through both.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isolator.datapath.netns import Netns
from isolator.datapath.node import Names
from isolator.datapath.pins import in_force
from isolator.lab import API, DENIED, PREFIX, STATE, Lab, wait_for
from tests.other_layout import STRUCTS, build, put_in_force

pytestmark = [pytest.mark.root, pytest.mark.slow]
INSPECTED, PLAIN = 8083, 9091  # the policy's ports: with http rules, and without
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # asm-generic/socket.h
PINS = Names.of(STATE).pins
GET = b"GET /api/v1/a HTTP/1.1\r\nHost: api\r\n\r\n"
POST = b"POST /api/v1/c HTTP/1.1\r\nHost: api\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
UPLOAD = 64 << 20  # bytes


class Server(threading.Thread):
    """In the api container: takes connections, keeps what each client sent, and answers where a message ends."""

    def __init__(self, port: int, answers: Callable[[bytes, int, bytes], bytes | None]) -> None:
        super().__init__(daemon=True)
        with Netns(f"{PREFIX}-api") as api, api.entered():
            self.listener = socket.create_server((API, port))
        self.answers = answers
        self.seen: dict[int, bytearray] = {}  # by the client's port
        self.peers: dict[int, socket.socket] = {}
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, (_, port) = self.listener.accept()
                threading.Thread(target=self.serve, args=(peer, port), daemon=True).start()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)  # or `accept` would hold on to it
        self.join(5)
        self.listener.close()

    def serve(self, peer: socket.socket, port: int) -> None:
        seen, begun = self.seen.setdefault(port, bytearray()), 0
        self.peers[port] = peer
        with peer, contextlib.suppress(ConnectionResetError):  # how a denial ends the server's side
            while data := peer.recv(1 << 20):
                seen += data
                if answer := self.answers(bytes(seen[begun : begun + 4096]), len(seen) - begun, data[-5:]):
                    begun = len(seen)
                    peer.sendall(answer)

    def deafen(self, client: socket.socket, deaf: bool = True) -> None:
        """What comes for this connection is dropped before TCP sees it, and so is not acknowledged."""
        nothing = ctypes.create_string_buffer(
            struct.pack("=HBBI", 0x06, 0, 0, 0), 8
        )  # BPF_RET | BPF_K, 0 bytes
        program = struct.pack("@HP", 1, ctypes.addressof(nothing))
        peer = self.peers[client.getsockname()[1]]
        peer.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER if deaf else SO_DETACH_FILTER, program)

    def of(self, client: socket.socket) -> bytes:
        return bytes(self.seen.get(client.getsockname()[1], b""))


def whole(beginning: bytes, size: int, end: bytes) -> bytes | None:
    """The answer to a message of `size` bytes so far, if that is all of it."""
    head, ended, _ = beginning.partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    if not ended or (b"chunked" in head and end != b"0\r\n\r\n"):
        return None
    return OK if size - len(head) - 4 >= int(length[1] if length else 0) else None


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(Path("/tmp") / f"{PREFIX}-upgrade", "off") as made:
        file = made.root / "policies" / "api.yaml"
        file.write_text(file.read_text().replace("port: 80,", f"port: {INSPECTED},").replace("HEAD", "POST"))
        made.start_agent()
        yield made


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("structs"), STRUCTS)


@pytest.fixture
def server(lab: Lab) -> Iterator[Server]:
    made = Server(INSPECTED, whole)
    yield made
    made.close()


@pytest.fixture
def echo(lab: Lab) -> Iterator[Server]:
    made = Server(PLAIN, lambda data, size, end: data)
    yield made
    made.close()


def connect(port: int) -> socket.socket:
    with Netns(f"{PREFIX}-web") as web, web.entered():
        return socket.create_connection((API, port), timeout=30)


def ask(client: socket.socket, request: bytes = GET) -> bytes:
    client.sendall(request)
    return answer(client)


def answer(client: socket.socket) -> bytes:
    seen = b""
    while b"\r\n\r\n" not in seen:
        data = client.recv(65536)
        assert data, seen
        seen += data
    return seen


def echoes(client: socket.socket) -> bool:
    client.sendall(b"ping")
    return client.recv(100) == b"ping"


class Upload(threading.Thread):
    """A body of known length; a few megabytes a second, while `paced`."""

    def __init__(self, client: socket.socket) -> None:
        super().__init__(daemon=True)
        self.client, self.paced, self.sent, self.answer = client, True, 0, b""
        self.start()

    def run(self) -> None:
        self.client.sendall(POST + b"Content-Length: %d\r\n\r\n" % UPLOAD)
        while self.sent < UPLOAD:
            self.client.sendall(self.sent.to_bytes(8, "big") * 8192)
            self.sent += 65536
            time.sleep(0.01 if self.paced else 0)
        self.answer = answer(self.client)


def upgrade(lab: Lab, other: Path, how: int, between: Callable[[], None]) -> None:
    """The agent ends, the other layout comes into force, `between`; then the agent starts and upgrades from it."""
    home = in_force(PINS)
    lab.stop_agent(how)
    put_in_force(PINS, other)
    assert in_force(PINS) != home
    between()
    lab.start_agent()
    assert in_force(PINS) == home and lab.log_text().count("maps laid out anew")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_no_connection_is_lost(lab: Lab, other: Path, server: Server, echo: Server, how: int) -> None:
    with contextlib.ExitStack() as stack:

        def opened(port: int = INSPECTED) -> socket.socket:
            return stack.enter_context(connect(port))

        idle = [opened() for _ in range(10)]
        assert all(ask(each) == OK for each in idle)
        fresh, half, later, chunked, mute = (opened() for _ in range(5))
        assert ask(later) == OK
        half.sendall(GET[:11])
        later.sendall(GET[:30])
        chunked.sendall(CHUNKED + b"100000\r\n" + b"x" * 0x80000)
        plain, upload = opened(PLAIN), Upload(opened())
        assert echoes(plain)
        assert ask(mute) == OK
        server.deafen(mute)
        mute.sendall(GET)
        time.sleep(0.3)  # the halves of heads are acknowledged by now

        def between() -> None:
            """The other layout's programs, no agent: layer 4, and what was granted."""
            before = upload.sent
            wait_for(lambda: upload.sent > before + (1 << 20), "the upload does not go on")
            chunked.sendall(b"y" * 0x40000)
            wait_for(lambda: server.of(chunked).endswith(b"y" * 0x40000), "what is granted does not pass")
            assert echoes(plain) and echoes(opened(PLAIN))

        upgrade(lab, other, how, between)
        assert upload.sent < UPLOAD, "it was over before"
        server.deafen(mute, deaf=False)
        assert answer(mute) == OK and server.of(mute) == GET + GET
        assert echoes(plain) and echoes(opened(PLAIN))
        assert all(ask(each) == OK for each in idle)
        assert ask(fresh) == OK
        half.sendall(GET[11:])
        later.sendall(GET[30:])
        assert (answer(half), answer(later)) == (OK, OK)
        assert (server.of(half), server.of(later)) == (GET, GET + GET)
        assert ask(chunked, b"y" * 0x40000 + b"\r\n0\r\n\r\n") == OK
        upload.paced = False
        upload.join(60)
        assert upload.answer == OK
        for each in (idle[0], later, upload.client, chunked):
            assert b" 403 " in ask(each, f"GET {DENIED} HTTP/1.1\r\nHost: api\r\n\r\n".encode())
        assert not any(DENIED.encode() in seen for seen in server.seen.values())
