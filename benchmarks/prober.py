"""A prober inside a network namespace: asks on fresh connections, a few hundred times a second, when answers change.

Started without waiting, it enters the namespace when told to (a line on its input): starting Python takes longer than
much of what is measured. It answers with its first status, and in the end with one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.load import LoadError
from benchmarks.place import HTTP
from isolator.lab import PREFIX

AGREE = 0.2  # s
"""For so long answers have to agree before the first of them counts: in a reload, old and new take turns (nginx starts
new workers 100 ms before it ends the old ones)."""

PATIENCE = 60  # s

PROBE = """\
import ctypes, json, os, socket, sys, time
netns, host, port, path, wanted, never = sys.argv[1:7]
within, agree, patience = map(float, sys.argv[7:])
head = "GET %s HTTP/1.1\\r\\nHost: api\\r\\nConnection: close\\r\\n\\r\\n"
def ask(path):
    try:
        with socket.create_connection((host, int(port)), timeout=within) as peer:
            peer.sendall((head % path).encode())
            return (peer.recv(65536) or b"- 000").split()[1].decode()
    except OSError:
        return "000"
sys.stdin.readline()
if ctypes.CDLL(None, use_errno=True).setns(os.open(netns, os.O_RDONLY), 0x40000000):
    raise OSError(ctypes.get_errno(), "setns")
print(ask(path), flush=True)
first = asked = leaked = 0
until = time.monotonic() + patience
while not first or asked < first + agree * 1e9:
    asked, seen = time.monotonic_ns(), ask(path)
    if seen != wanted:
        first = 0
        if time.monotonic() > until:
            break
    elif not first:
        first = asked if seen == "000" else time.monotonic_ns()
    leaked += bool(never) and ask(never) == "200"
    time.sleep(0.001)
print(json.dumps({"first": first, "seen": seen, "leaked": leaked}))
"""


@dataclass(slots=True)
class Prober:
    """`client`: in whose namespace. `wanted`: the status that ends it, 000 for no answer, which counts from when it was
    asked. `within`: s that an answer may take. `never`: a path asked for in between."""

    client: str
    host: str
    path: str
    wanted: str
    port: int = HTTP
    within: float = 0.25
    never: str = ""

    def command(self) -> tuple[str, ...]:
        where = (f"/run/netns/{PREFIX}-{self.client}", self.host, str(self.port))
        what = (self.path, self.wanted, self.never, *map(str, (self.within, AGREE, PATIENCE)))
        return (sys.executable, "-c", PROBE, *where, *what)


@dataclass(slots=True)
class Probing:
    prober: Prober
    process: subprocess.Popen[str]

    def begin(self) -> str:
        """Enters the namespace; the first status."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self._line()

    def seen(self) -> int:
        """When the first answer came from which on all are as wanted, in ns of the monotonic clock."""
        return first_seen(self._line(), self.prober)

    def _line(self) -> str:
        assert self.process.stdout is not None and self.process.stderr is not None
        if not (line := self.process.stdout.readline().strip()):
            raise LoadError(f"prober: {self.process.stderr.read().strip()[-300:]}")
        return line


@contextmanager
def probing(prober: Prober) -> Iterator[Probing]:
    process = subprocess.Popen(
        prober.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield Probing(prober, process)
    finally:
        process.kill()
        process.communicate()


def first_seen(printed: str, prober: Prober) -> int:
    """What PROBE printed last → when."""
    told = json.loads(printed)
    if told["leaked"]:
        raise LoadError(f"{prober.never} was answered 200, {told['leaked']} times")
    if not told["first"]:
        raise LoadError(f"{prober.path} was answered {told['seen']} for {PATIENCE} s, not {prober.wanted}")
    return int(told["first"])
