"""Starts that wait: an OCI runtime that asks the agent before a container's first instruction, and then is runc.

    engine ─ create ─▶ runc: namespaces, network; the container is there, and runs nothing yet
                       "ID PID" ─▶ FOLDER/asked (a FIFO) ─▶ agent: splice, admit
           ─ start  ─▶ FOLDER/ID is there, or FOLDER/wait seconds are over ◀──┘
                       runc: the first instruction

Without it a container runs at once, closed (isolator.datapath.gate) until it is spliced some 50 ms later: its first
SYN is lost then, and the second comes after a second. With it the first one passes. Nothing depends on it: where no
agent answers, the start goes on when the time is over, and the container is closed.

The script is plain sh, since it runs on the host, where the agent may be a container.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path

FOLDER = "starts"
"""Below the state folder."""

ASKED = re.compile(rb"([0-9a-f]{64}) ([0-9]{1,10})")

SCRIPT = """\
#!/bin/sh
# The OCI runtime of containers that start protected: waits for Isolator, then is {runc}. By `isolator oci-runtime`.
starts={starts}
for id; do :; done # the last word
ask() {{ # the engine's shim stands in the container's folder
  read -r pid <init.pid
  (exec >&3 2>/dev/null </dev/null && echo "$id $pid") & # where an agent hangs, the FIFO fills up
  asking=$!
}}
if [ -p "$starts/asked" ]; then
  exec 3<>"$starts/asked" # both ways: it must not block where nobody reads
  case " $* " in
  *" create "*)
    [ ! -e "$starts/$id" ] || rm -f "$starts/$id"
    {runc} "$@" 3>&- || exit
    ask # early: until the engine says start, most of it is done
    exit 0
    ;;
  *" start "*)
    asking= wait=5
    read -r wait <"$starts/wait"
    tries=0
    while [ ! -e "$starts/$id" ] && [ "$tries" -lt $((wait * 250)) ]; do
      [ $((tries % 250)) = 0 ] && ask # again each second: an agent may have been restarted
      tries=$((tries + 1))
      sleep 0.002
    done
    kill "$asking" 2>/dev/null
    ;;
  esac
  exec 3>&-
fi
exec {runc} "$@"
"""


def script(state_dir: Path, runc: str) -> str:
    return SCRIPT.format(starts=shlex.quote(str(state_dir / FOLDER)), runc=shlex.quote(runc))


class Starts:
    """The agent's end. `waiting`: the first process of each container that does not run yet, by the container's id.
    `unanswered`: those whose start still waits."""

    def __init__(self, state_dir: Path, wait: int) -> None:
        """`wait`: seconds that a start waits at the most."""
        self.folder = state_dir / FOLDER
        self.waiting: dict[str, int] = {}
        self.unanswered: set[str] = set()
        self._wait = wait
        self._rest = b""
        self._fd = -1

    @contextlib.contextmanager
    def listening(self) -> Iterator[int]:
        """Yields a file descriptor that is readable when somebody has asked. Raises OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for answer in self.folder.glob("[0-9a-f]" * 64):
            answer.unlink(missing_ok=True)
        (self.folder / "wait").write_text(f"{self._wait}\n")
        fifo = self.folder / "asked"
        if not fifo.is_fifo():
            fifo.unlink(missing_ok=True)
            os.mkfifo(fifo, 0o600)
        self._fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield self._fd
        finally:
            os.close(self._fd)

    def read(self) -> bool:
        """Whether somebody asked. What is no question is passed over."""
        try:
            *lines, self._rest = (self._rest + os.read(self._fd, 4096)).split(b"\n")
        except BlockingIOError:
            return False
        self._rest = self._rest[-100:]
        asked = [found for line in lines if (found := ASKED.fullmatch(line))]
        self.waiting.update((found[1].decode(), int(found[2])) for found in asked)
        self.unanswered.update(found[1].decode() for found in asked)
        return bool(asked)

    def answer(self, container: str) -> None:
        """Its way is open: it may run."""
        if container in self.unanswered:
            self.unanswered.discard(container)
            (self.folder / container).touch()

    def forget(self, running: Collection[str]) -> None:
        """Who runs by now, or whose first process has gone, waits no more."""
        for container, pid in list(self.waiting.items()):
            if container in running or not Path(f"/proc/{pid}").exists():
                self.waiting.pop(container, None)
                self.unanswered.discard(container)
                (self.folder / container).unlink(missing_ok=True)  # the answer was read


def sandbox_of_process(pid: int) -> Path | None:
    """Where the engine has mounted a process's network namespace: /proc/self/mountinfo names it by its inode."""
    try:
        namespace = os.readlink(f"/proc/{pid}/ns/net")  # net:[4026532000]
    except OSError:
        return None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if fields[3] == namespace:
            return Path(fields[4])
    return None
