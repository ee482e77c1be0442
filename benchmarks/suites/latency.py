"""How long one request takes: closed loop on one connection, and open loop at a fixed rate."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from benchmarks.load import LoadError, inside, wrk
from benchmarks.place import ASKING, HTTP, PAGE
from benchmarks.suites.base import ForAll, Mode, Point, Run

OPEN_RATE = 1000  # requests a second, of one sender

# A request's time counts from when it was due, not from when it could be sent: no coordinated omission.
OPEN_LOOP = """\
import json, socket, sys, time
host, port, path, rate, seconds = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), float(sys.argv[5])
peer = socket.create_connection((host, port), timeout=5)
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
head = f"GET {path} HTTP/1.1\\r\\nHost: api\\r\\n\\r\\n".encode()
taken, errors, begin = [], 0, time.perf_counter() + 0.05
for number in range(int(rate * seconds)):
    due = begin + number / rate
    while time.perf_counter() < due:
        pass
    peer.sendall(head)
    seen = b""
    while b"\\r\\n\\r\\n" not in seen:
        data = peer.recv(65536)
        assert data, "closed"
        seen += data
    top, _, body = seen.partition(b"\\r\\n\\r\\n")
    errors += top.split()[1] != b"200"
    left = int(top.lower().partition(b"content-length:")[2].split()[0]) - len(body)
    while left > 0:
        left -= len(peer.recv(65536))
    taken.append((time.perf_counter() - due) * 1e6)
taken.sort()
at = lambda share: taken[min(len(taken) - 1, int(len(taken) * share))]
print(json.dumps({"errors": errors, "p50": at(0.5), "p99": at(0.99), "p999": at(0.999)}))
"""


def closed(run: Run) -> dict[str, float]:
    told = wrk(run.place, run.route, PAGE, 1, run.mode.seconds)
    return {"c1 p50": told.p50, "c1 p99": told.p99, "c1 p99.9": told.p999}


def open_loop(run: Run) -> dict[str, float]:
    arguments = (run.route.host, str(HTTP), PAGE, str(OPEN_RATE), str(run.mode.seconds))
    told = json.loads(
        inside(run.place, run.route.client, *ASKING, sys.executable, "-c", OPEN_LOOP, *arguments)
    )
    if told["errors"]:
        raise LoadError(f"{told['errors']} requests were not answered 200")
    return {f"open p{name}": told[key] for name, key in (("50", "p50"), ("99", "p99"), ("99.9", "p999"))}


class Latency(ForAll):
    name = "latency"
    about = (
        f"Time of a request. Open: {OPEN_RATE} a second are due, whether or not the last one was answered."
    )

    def points(self, mode: Mode) -> Sequence[Point]:
        both = [
            Point(dict.fromkeys(("c1 p50", "c1 p99", "c1 p99.9"), "us"), closed),
            Point(dict.fromkeys(("open p50", "open p99", "open p99.9"), "us"), open_loop),
        ]
        return both if mode.full else both[:1]
