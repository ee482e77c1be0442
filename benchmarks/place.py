"""Where the race is run: one lab, all systems up in it at once, each between a client and a server of one kind.

    br0 ─┬─ client ───────────────── plain      direct
         ├─ web ──── isolator ────── api        isolator: both are its endpoints
         └─ client ─ a proxy's own ─ plain      terminating proxies, each in a container of its own
    a lane of its own for what filters on the bridge or stands in the wire:
    NAME-client ─ bridge of NAME-host ─ NAME-server

Where bytes are counted, clients run on the first CPU and servers on the last, or the scheduler's moods decide. Where
requests are counted, too, if there are three CPUs or more; with two, a system would have to share one with a pinned
end whichever way it turns, so nobody is pinned. Systems run where the scheduler puts them.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from isolator.lab import PREFIX, Lab, run, wait_for

HTTP, UPLOAD, BULK, FORBIDDEN_PORT = 80, 8081, 9091, 8080
"""Ports of every server. Nobody may connect to the last, though a server listens there."""

PAGE, BIG = "/api/v1/1k", "/api/v1/big"
EXTRA, EXTRA_PORT = "/extra/page", 9090
"""What an edit of the policy opens and closes: a page for layer 7, a port for layer 4."""

NEWCOMER_NUMBER = 200
"""Of the address of a container that starts while others run."""

HOLD = (8082, 8083, 8084, 8085)
"""Behind these stand servers of many processes, for more idle connections than one may have open files."""

SIZES = {PAGE: 1 << 10, "/api/v1/100k": 100 << 10, BIG: 1 << 30, EXTRA: 1 << 10}
FIRST, LAST = 0, (os.cpu_count() or 1) - 1
ON_FIRST, ON_LAST = (("taskset", "-c", str(cpu)) for cpu in (FIRST, LAST))
PINNED = LAST > 1
ASKING: tuple[str, ...] = ON_FIRST if PINNED else ()
"""Before a command that sends requests."""

SERVER = """\
daemon off; worker_processes 1; pid {root}/nginx.pid; error_log {root}/error.log crit;
events {{ worker_connections 16000; }}
http {{
  access_log off; sendfile on; tcp_nopush on; open_file_cache max=100; open_file_cache_valid 1h;
  keepalive_requests 1000000000; keepalive_timeout 1h;
  client_body_temp_path {root}/body; proxy_temp_path {root}/proxy;
  fastcgi_temp_path {root}/fastcgi; uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;
  server {{ listen 80 backlog=4096; listen 8080; listen 9090 backlog=4096; root {root};
           location = /api/v1/books {{ return 200 "books\\n"; }} }}
}}
"""

HOLDING = """\
daemon off; worker_processes 8; pid {root}/nginx.pid; error_log {root}/error.log crit;
events {{ worker_connections 16000; }}
http {{
  access_log off; keepalive_timeout 1h; root {pages};
  server {{ LISTEN }}
}}
""".replace("LISTEN", " ".join(f"listen {port} reuseport backlog=4096;" for port in HOLD))


@dataclass(frozen=True, slots=True)
class Route:
    """Who asks, and at which address a system lets it reach which server. Names are those of the lab."""

    client: str
    host: str
    server: str

    def url(self, path: str, port: int = HTTP) -> str:
        return f"http://{self.host}:{port}{path}"


@dataclass(slots=True)
class Place:
    """The lab with the plain client and server, and what systems add to it."""

    lab: Lab
    numbers: int = 3
    lanes: int = 0
    hosts: dict[str, str] = field(default_factory=dict)

    def container(self, name: str) -> str:
        """One more on the bridge of all; its address."""
        if name not in self.hosts:
            self.numbers += 1
            self.lab.add(name, self.numbers)
            self.hosts[name] = f"10.9.0.{self.numbers}"
        return self.hosts[name]

    @contextmanager
    def newcomer(self, name: str) -> Iterator[None]:
        """A container that comes and goes, always at the same address."""
        self.lab.add(name, NEWCOMER_NUMBER)
        try:
            yield
        finally:
            self.ip("host", f"link del v{name}")
            run("ip", "netns", "del", f"{PREFIX}-{name}")

    def server(self, name: str) -> str:
        """A container with the servers of all in it; its address."""
        address = self.container(name)
        self.serve(name)
        return address

    def root(self, name: str) -> Path:
        """Where a server's files are."""
        return self.lab.root if name == "api" else self.lab.root / name

    def serve(self, name: str) -> None:
        if name != "api":
            self.lab.serve(name, SERVER)
        pages(self.root(name))
        self.lab.start(name, *ON_LAST, "iperf3", "-s", "-p", str(BULK))

    def lane(self, name: str, bridged: bool = True) -> Route:
        """A client and a server of their own, on a bridge of their own. Not `bridged`: the server's
        end, `vserver`, hangs loose beside `vclient`, and whoever stands between them forwards."""
        self.lanes += 1
        host, ends = f"{name}-host", {"client": 1, "server": 2}
        for each in ("host", *ends):
            run("ip", "netns", "add", f"{PREFIX}-{name}-{each}")
            run("ip", "-n", f"{PREFIX}-{name}-{each}", "link", "set", "lo", "up")
        self.ip(host, "link add br0 type bridge")
        self.ip(host, "link set br0 up")
        for each, number in ends.items():
            own = f"{name}-{each}"
            self.ip(own, f"link add eth0 type veth peer name v{each} netns {PREFIX}-{host}")
            self.ip(own, f"addr add 10.9.{20 + self.lanes}.{number}/24 dev eth0")
            self.ip(own, "link set eth0 up")
            self.ip(host, f"link set v{each} {'master br0 ' if bridged or each == 'client' else ''}up")
        self.serve(f"{name}-server")
        return Route(f"{name}-client", f"10.9.{20 + self.lanes}.2", f"{name}-server")

    def ip(self, name: str, arguments: str) -> None:
        run("ip", "-n", f"{PREFIX}-{name}", *arguments.split())

    def start(self, name: str, *command: str) -> subprocess.Popen[str]:
        return self.lab.start(name, *command)

    def end(self, process: subprocess.Popen[str]) -> None:
        self.lab.processes.remove(process)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if process.poll() is None:
            process.kill()
            process.wait(10)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def holding_server(made: Place, route: Route) -> Iterator[None]:
    """Behind HOLD, beside a route's server, as long as it is needed."""
    root = made.lab.root / f"{route.server}-holding"
    root.mkdir(exist_ok=True)
    (root / "nginx.conf").write_text(HOLDING.format(root=root, pages=made.root(route.server)))
    process = made.start(route.server, "nginx", "-c", str(root / "nginx.conf"))
    try:
        wait_for(lambda: (root / "nginx.pid").exists(), "the holding server does not start")
        yield
    finally:
        made.end(process)


def pages(root: Path) -> None:
    """Sparse: what is in them does not matter."""
    for path, size in SIZES.items():
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as opened:
            opened.truncate(size)


def pin(pid: int, cpu: int) -> None:
    """A process and its children, onto one CPU."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(pid, {cpu})
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            pin(int(child), cpu)


def resident(pid: int) -> float:
    """MB of a process and its children."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    found = re.search(r"VmRSS:\s+([0-9]+) kB", status)
    return int(found[1]) / 1000 * bool(found) + sum(map(resident, map(int, children))) if found else 0.0


@contextmanager
def place() -> Iterator[Place]:
    """The plain client and server; torn down whatever happens."""
    with Lab(Path("/tmp") / f"{PREFIX}-bench", "off", SERVER) as lab:
        made = Place(lab)
        made.container("client")
        made.server("plain")
        made.serve("api")
        yield made


def pin_servers(made: Place, systems: set[int]) -> None:
    """What serves in the place onto the last CPU."""
    for process in made.lab.processes:
        arguments = process.args if isinstance(process.args, list) else []
        if process.pid not in systems and (PINNED or "nginx" not in arguments):
            pin(process.pid, LAST)


def wait_answer(made: Place, route: Route, path: str = PAGE) -> None:
    wait_for(
        lambda: made.lab.curl(route.client, route.url(path)) == "200",
        f"{route.host} does not answer {route.client}",
        20,
    )
