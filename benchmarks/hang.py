"""What goes on while the agent hangs (SIGSTOP), and what after it: the table of invariant 11.

established connections ─ SIGSTOP ─ a request within the bound ─ the heartbeat's bound is over ─
everything else ─ SIGCONT ─ what waited
"""

from __future__ import annotations

import signal
import socket
import time
from dataclasses import dataclass

from benchmarks.connections import BODY, DENIED_PORT, HALF, LAYER4, Connection, Layer4, Lost, MidBody, request
from isolator.daemon import BEAT_EVERY
from isolator.datapath.netns import Netns
from isolator.datapath.node import HEARTBEAT_MAX
from isolator.lab import API, PREFIX, Lab

HANGS = 5.0  # s
PATIENCE = 1.0  # s until an answer that does not come counts as waiting
FORBIDDEN = request("GET", "/secret")
ODD = request("GET", "/api/life", "TE: trailers")
"""Allowed, and no automaton accepts it: Python has to decide."""

# what: (with failure: closed, with failure: open). `waits`, `passes`: what needs Python; a number is an answer.
EXPECTED = {
    "layer 4, established": ("goes on", "goes on"),
    "layer 4, new connection": ("goes on", "goes on"),
    "layer 4, denied": ("denied", "denied"),
    "upload in its pass window": ("goes on", "goes on"),
    "request that the kernel decides": ("passes", "passes"),
    "request, before the bound is over": ("waits", "passes"),
    "request on an established connection": ("waits", "passes"),
    "request on a new connection": ("waits", "passes"),
    "forbidden request on a new connection": ("waits", "passes"),
    "SIGCONT: request, before the bound was over": ("200", "-"),
    "SIGCONT: request on an established connection": ("200", "-"),
    "SIGCONT: request on a new connection": ("200", "-"),
    "SIGCONT: forbidden request": ("403", "-"),
    "SIGCONT: idle connection, first request": ("200", "200"),
    "SIGCONT: idle connection, then a forbidden one": ("403", "403"),
    "SIGCONT: forbidden request on a new connection": ("403", "403"),
}


@dataclass(frozen=True, slots=True)
class Seen:
    what: str
    expected: str
    seen: str


class Quiet(Connection):
    """An inspected connection without a request yet."""

    def ask(self) -> None: ...

    def finish(self) -> None:
        super().ask()


def hang(lab: Lab, failure: str) -> list[Seen]:
    """With the agent running, and the policy's failure mode that."""
    assert lab.agent is not None
    idle, early, busy, plain, upload = Connection(), Connection(), Connection(), Layer4(), MidBody()
    upload.begin()
    time.sleep(0.2)
    lab.agent.send_signal(signal.SIGSTOP)
    stopped, told = time.monotonic(), {}
    try:
        early.socket.sendall(ODD)
        time.sleep(HEARTBEAT_MAX / 1e9 + 0.5)
        told["layer 4, established"] = goes_on(plain)
        told["layer 4, new connection"] = "goes on" if connects(LAYER4) else "denied"
        told["layer 4, denied"] = "goes on" if connects(DENIED_PORT) else "denied"
        upload.socket.sendall(BODY[HALF:])
        told["upload in its pass window"] = "goes on" if answer(upload, 5) == "200" else "waits"
        fast, fresh, forbidden = Quiet(), Quiet(), Quiet()
        asked = {
            "request that the kernel decides": (fast, request()),
            "request on an established connection": (busy, ODD),
            "request on a new connection": (fresh, ODD),
            "forbidden request on a new connection": (forbidden, FORBIDDEN),
        }
        for connection, head in asked.values():
            connection.socket.sendall(head)
        for what, (connection, _) in {"request, before the bound is over": (early, b""), **asked}.items():
            told[what] = "passes" if answer(connection, PATIENCE) == "200" else "waits"
        time.sleep(max(0.0, stopped + HANGS - time.monotonic()))
    finally:
        lab.agent.send_signal(signal.SIGCONT)
    after = {
        "SIGCONT: request, before the bound was over": (early, told["request, before the bound is over"]),
        "SIGCONT: request on an established connection": (busy, told["request on an established connection"]),
        "SIGCONT: request on a new connection": (fresh, told["request on a new connection"]),
        "SIGCONT: forbidden request": (forbidden, told["forbidden request on a new connection"]),
    }
    for what, (connection, before) in after.items():
        told[what] = answer(connection, 20) if before == "waits" else "-"
    lab.wait_ready()
    time.sleep(2 * BEAT_EVERY)  # until then the heartbeat is as old as it was
    told["SIGCONT: idle connection, first request"] = asks(idle, request())
    told["SIGCONT: idle connection, then a forbidden one"] = asks(idle, FORBIDDEN)
    last = Quiet()
    told["SIGCONT: forbidden request on a new connection"] = asks(last, FORBIDDEN)
    for connection in (idle, early, busy, plain, upload, fast, fresh, forbidden, last):
        connection.close()
    which = 0 if failure == "closed" else 1
    return [Seen(what, expected[which], told[what]) for what, expected in EXPECTED.items()]


def asks(connection: Connection, head: bytes) -> str:
    connection.socket.sendall(head)
    return answer(connection, 20)


def answer(connection: Connection, seconds: float) -> str:
    """The status of what comes next, `nothing`, or `lost`."""
    connection.socket.settimeout(seconds)
    try:
        return str(connection.status())
    except TimeoutError:
        return "nothing"
    except (OSError, Lost):
        return "lost"


def goes_on(connection: Connection) -> str:
    try:
        connection.ask()
    except (OSError, Lost) as error:
        return str(error)
    return "goes on"


def connects(port: int) -> bool:
    with Netns(f"{PREFIX}-web") as web, web.entered():
        peer = socket.socket()
    with peer:
        peer.settimeout(PATIENCE)
        try:
            peer.connect((API, port))
        except OSError:
            return False
        return True
