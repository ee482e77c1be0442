"""Connections in a certain state each, that have to outlive what happens to the agent.

    begin     the state is taken: a head half sent, a chunk half sent, …
    (event)
    finish    the rest follows, and the server's answer says by its digest that every byte came

The server stands in the api container: inspected on LAYER7, decided by layer 4 alone on LAYER4.
"""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from isolator.datapath.netns import Netns
from isolator.lab import API, PREFIX, Lab, wait_for

LAYER7, LAYER4, DENIED_PORT, UDP = 8083, 9091, 9092, 9999
SILENCED = "10.9.0.101"  # a second address of web, to which the server can be kept from answering
WITHIN = 25.0  # s; TCP sends again after 0.2, 0.4, 0.8 … s, the seventh time after 12.8 s
STEP = 0.05  # s between what a running connection sends
BODY = bytes(range(256)) * 512
HALF = len(BODY) // 2

SERVER = f"""\
import asyncio, hashlib
async def serve(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\\r\\n\\r\\n")).lower()
            body = hashlib.sha256()
            if b"upgrade: websocket" in head:
                writer.write(b"HTTP/1.1 101 Switching Protocols\\r\\n\\r\\n")
                while data := await reader.read(65536):
                    writer.write(data)
                return
            if b"chunked" in head:
                while size := int(await reader.readline(), 16):
                    body.update(await reader.readexactly(size))
                    await reader.readexactly(2)
                await reader.readline()
            elif b"content-length:" in head:
                size = int(head.partition(b"content-length:")[2].split()[0])
                body.update(await reader.readexactly(size))
            answer = body.hexdigest().encode()
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(answer), answer))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()
async def main():
    for port in ({LAYER7}, {LAYER4}, {DENIED_PORT}):
        await asyncio.start_server(serve, "", port, backlog=512)
    await asyncio.Event().wait()
asyncio.run(main())
"""

POLICY = f"""\
kind: Policy
metadata: {{name: life}}
spec:
  select: {{role: api}}
  failure: FAILURE
  ingress:
    - name: read
      from: [{{select: {{app: bookstore}}}}]
      ports: [{{port: {LAYER7}, protocol: tcp}}]
      http: [{{methods: [GET, POST], path: /api/**}}]
    - name: plain
      from: [{{select: {{app: bookstore}}}}]
      ports: [{{port: {LAYER4}, protocol: tcp}}, {{port: {UDP}, protocol: udp}}]
"""


def prepare(lab: Lab, failure: str) -> None:
    """The server, the second address and the policy; before the agent starts."""
    lab.start("api", "python3", "-c", SERVER)
    lab.inside("web", "ip", "addr", "add", f"{SILENCED}/24", "dev", "eth0")
    write_policy(lab, failure)


def write_policy(lab: Lab, failure: str) -> None:
    (lab.root / "policies" / "api.yaml").write_text(POLICY.replace("FAILURE", failure))


def silence(lab: Lab, yes: bool) -> None:
    """Keeps the server's acknowledgements and answers from SILENCED, or lets them go again."""
    lab.inside("api", "ip", "route", "add" if yes else "del", "blackhole", SILENCED)


def request(method: str = "GET", path: str = "/api/life", *headers: str) -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: api", *headers, "", "")).encode()


def digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


class Lost(Exception):  # noqa: N818 - named after what is the matter
    """The connection did not outlive it."""


class Connection:
    """One connection of a kind. `begin` and `finish` raise Lost or OSError."""

    kind = "idle"
    port = LAYER7
    source = ""

    def __init__(self) -> None:
        with Netns(f"{PREFIX}-web") as web, web.entered():
            self.socket = socket.socket()
        self.socket.settimeout(WITHIN)
        if self.source:
            self.socket.bind((self.source, 0))
        self.socket.connect((API, self.port))
        self.ask()

    def close(self) -> None:
        self.socket.close()

    def begin(self) -> None: ...

    def finish(self) -> None:
        self.ask()

    def ask(self) -> None:
        self.socket.sendall(request())
        self.expect(b"")

    def status(self) -> int:
        """Of the next answer; its body is read and thrown away."""
        return self._answer()[0]

    def expect(self, body: bytes) -> None:
        status, told = self._answer()
        if status != 200 or told != digest(body):
            raise Lost(f"answered {status} {told[:80]!r}")

    def _answer(self) -> tuple[int, bytes]:
        seen = b""
        while b"\r\n\r\n" not in seen:
            seen += self._read()
        head, _, body = seen.partition(b"\r\n\r\n")
        length = (
            int(head.lower().partition(b"content-length:")[2].split()[0]) if b"101" not in head[:12] else 0
        )
        while len(body) < length:
            body += self._read()
        return int(head.split()[1]), body

    def _read(self) -> bytes:
        data = self.socket.recv(65536)
        if not data:
            raise Lost("closed")
        return data


class MidHead(Connection):
    """Half a head, which waits in the agent for its rest."""

    kind = "mid-head"

    def begin(self) -> None:
        self.socket.sendall(request()[:15])

    def finish(self) -> None:
        self.socket.sendall(request()[15:])
        self.expect(b"")


class UnacknowledgedHead(Connection):
    """A head that was let through and that the server could not acknowledge yet."""

    kind = "unacknowledged head"
    source = SILENCED

    def begin(self) -> None:
        self.socket.sendall(request())

    def finish(self) -> None:
        self.expect(b"")


class MidBody(Connection):
    """Half a body of declared length: the rest is in a pass window."""

    kind = "mid-body"
    head = request("POST", "/api/life", f"Content-Length: {len(BODY)}")

    def begin(self) -> None:
        self.socket.sendall(self.head + BODY[:HALF])

    def finish(self) -> None:
        self.socket.sendall(BODY[HALF:])
        self.expect(BODY)


class MidChunk(MidBody):
    """The second chunk half sent: its rest is in a pass window, what follows needs Python."""

    kind = "mid-chunk"
    head = request("POST", "/api/life", "Transfer-Encoding: chunked") + b"5\r\nfirst\r\n%x\r\n" % len(BODY)

    def finish(self) -> None:
        self.socket.sendall(BODY[HALF:] + b"\r\n4\r\nlast\r\n0\r\n\r\n")
        self.expect(b"first" + BODY + b"last")


class Running(Connection):
    """Sends a step each STEP seconds, from `begin` until `finish`."""

    def begin(self) -> None:
        self.stopping = threading.Event()
        self.failed: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while self.step() and not self.stopping.wait(STEP):
                pass
        except (OSError, Lost) as error:
            self.failed = error

    def step(self) -> bool:
        raise NotImplementedError

    def finish(self) -> None:
        self.stopping.set()
        self.thread.join()
        if self.failed is not None:
            raise Lost(str(self.failed))


class Upload(Running):
    """A body of declared length that goes on all the time."""

    kind = "running upload"
    size = 1 << 10  # of a step
    steps = 2000

    def begin(self) -> None:
        self.sent = 0
        self.socket.sendall(request("POST", "/api/life", f"Content-Length: {self.size * self.steps}"))
        super().begin()

    def step(self) -> bool:
        self.socket.sendall(BODY[: self.size])
        self.sent += 1
        return self.sent < self.steps

    def finish(self) -> None:
        super().finish()
        self.socket.sendall(BODY[: self.size] * (self.steps - self.sent))
        self.expect(BODY[: self.size] * self.steps)


class Layer4(Connection):
    """Idle, on a port that layer 4 decides."""

    kind = "layer 4, idle"
    port = LAYER4


class WebSocket(Running):
    """A tunnel after an upgrade, with something in it all the time, in both directions."""

    kind = "WebSocket"
    port = LAYER4

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.socket.sendall(request("GET", "/ws", "Connection: Upgrade", "Upgrade: websocket"))
        if self.status() != 101:
            raise Lost("no tunnel")

    def step(self) -> bool:
        self.number += 1
        sent = self.number.to_bytes(8, "big")
        self.socket.sendall(sent)
        seen = b""
        while len(seen) < len(sent):
            seen += self._read()
        if seen != sent:
            raise Lost(f"sent {sent!r}, came back as {seen!r}")
        return True

    def finish(self) -> None:
        super().finish()
        self.step()


KINDS: tuple[type[Connection], ...] = (
    Connection, MidHead, UnacknowledgedHead, MidBody, MidChunk, Upload, Layer4, WebSocket,
)  # fmt: skip
INSPECTED = tuple(kind.kind for kind in KINDS if kind.port == LAYER7)


class Crowd:
    """`each` connections of every kind."""

    def __init__(self, lab: Lab, each: int) -> None:
        self.lab = lab
        wait_for(self._answers, "the server does not answer")
        with ThreadPoolExecutor(16) as threads:
            self.all = list(threads.map(lambda kind: kind(), [kind for kind in KINDS for _ in range(each)]))

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.all:
            connection.close()

    def _answers(self) -> bool:
        try:
            Layer4().close()
        except (OSError, Lost):
            return False
        return True

    def begin(self) -> None:
        silenced = [each for each in self.all if each.source]
        _each("begin", [each for each in self.all if not each.source])
        time.sleep(0.2)  # heads are held, windows are open
        silence(self.lab, True)
        _each("begin", silenced)
        time.sleep(0.2)

    def finish(self) -> dict[str, list[str]]:
        """What was lost, by kind: why. It is replaced by a new one."""
        silence(self.lab, False)
        lost: dict[str, list[str]] = {}
        for number, why in enumerate(_each("finish", self.all)):
            if why:
                lost.setdefault(self.all[number].kind, []).append(why)
                self.all[number].close()
                self.all[number] = type(self.all[number])()
        return lost


def _each(what: str, connections: Iterable[Connection]) -> list[str]:
    def one(connection: Connection) -> str:
        try:
            getattr(connection, what)()
        except (OSError, Lost) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(64) as threads:
        return list(threads.map(one, connections))
