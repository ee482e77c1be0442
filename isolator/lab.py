"""A place to try things: network namespaces on a bridge with real servers in them, and one agent.

    host ── br0 ─┬─ web       10.9.0.1   a client
                 ├─ api       10.9.0.2   nginx on 80, 8080, 9090; uploads on 8081
                 └─ intruder  10.9.0.3   no endpoint

The demo, the benchmarks and the end-to-end tests stand on it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isolator.datapath.netns import unpin_netns
from isolator.datapath.node import Names
from isolator.datapath.pins import unpin

STATE = Path("/run/isolator-demo-lab")  # its own: an agent that follows the README is left alone
PREFIX = "isodemo"
API, API6 = "10.9.0.2", "[fd00:9::2]"
ALLOWED, DENIED = "/api/v1/books", "/admin/secrets"

CONFIG = f"""\
runtime: {{kind: netns}}
state_dir: {STATE}
policies: [policies/]
datapath: {{xdp: XDP}}
endpoints:
  - {{name: api, netns: {PREFIX}-api, interface: eth0, labels: {{app: bookstore, role: api}}}}
  - {{name: web, netns: {PREFIX}-web, interface: eth0, labels: {{app: bookstore, role: web}}}}
"""

POLICY = """\
kind: Policy
metadata: {name: api-allow}
spec:
  select: {app: bookstore, role: api}
  mode: MODE
  failure: closed
  ingress:
    - name: read-books
      from: [{select: {app: bookstore}}]
      ports: [{port: 80, protocol: tcp}]
      http:
        - {methods: [GET, HEAD], path: PATH}
    - name: upload
      from: [{select: {app: bookstore}}]
      ports: [{port: 8081, protocol: tcp}]
      http:
        - {methods: [POST], path: /upload}
    - name: metrics
      from: [{select: {app: bookstore}}]
      ports: [{port: 9090, protocol: tcp}, {port: 9091, protocol: tcp}]
"""

NGINX = """\
daemon off; worker_processes 1; pid {root}/nginx.pid; error_log {root}/error.log;
events {{ worker_connections 256; }}
http {{
  log_format own '$remote_addr $remote_port "$request" $status';
  access_log {root}/access.log own; client_body_temp_path {root}/body; proxy_temp_path {root}/proxy;
  fastcgi_temp_path {root}/fastcgi; uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;
  server {{ listen 80; listen [::]:80; listen 8080; listen 9090; location / {{ return 200 "books\\n"; }}
           location /big {{ root {root}; }} }}
}}
"""

# Answers with the body's digest; asked for /upload?sink it only counts, as fast as Python can read.
UPLOAD_SERVER = """\
import hashlib, http.server
class Upload(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    def do_POST(self):
        digest, left, room = hashlib.sha256(), int(self.headers["content-length"]), memoryview(bytearray(1 << 20))
        while left and (count := self.rfile.readinto(room[:left])):
            if self.path == "/upload":
                digest.update(room[:count])
            left -= count
        answer = digest.hexdigest().encode()
        self.wfile.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(answer), answer))
    def log_message(self, *arguments): pass
http.server.ThreadingHTTPServer(("", 8081), Upload).serve_forever()
"""

TALK = """\
import socket, sys, time
peer = socket.create_connection(("10.9.0.2", 80), timeout=3)
for part in sys.argv[1:]:
    peer.sendall(part.encode().decode("unicode_escape").encode("latin-1"))
    time.sleep(0.2)
seen = b""
try:
    while data := peer.recv(65536):
        seen += data
except OSError:
    pass
print(" ".join(word.split()[1] for word in seen.decode("latin-1").split("HTTP/1.1")[1:] for word in ["x" + word]))
"""


def run(*command: str) -> str:
    """Runs to its end; what it printed. Raises with stderr where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


# -- the lab -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Lab:
    """Namespaces host, web, api, intruder; servers; one agent. A context manager."""

    root: Path
    xdp: str
    nginx: str = NGINX
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    agent: subprocess.Popen[str] | None = None

    def __enter__(self) -> Lab:
        self.clear()
        try:
            self._build()
            self._serve()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_agent(signal.SIGTERM)
        for process in self.processes:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self.clear()

    def clear(self) -> None:
        """Takes away what this or an earlier run left."""
        forget_agent(STATE)
        for file in self.root.glob("**/nginx.pid"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(file.read_text())
                if str(self.root).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGTERM)
        shutil.rmtree(self.root, ignore_errors=True)
        for path in Path("/run/netns").glob(f"{PREFIX}-*"):
            run("ip", "netns", "del", path.name)

    def _build(self) -> None:
        host = f"{PREFIX}-host"
        for name in ("host", "web", "api", "intruder"):
            run("ip", "netns", "add", f"{PREFIX}-{name}")
            run("ip", "-n", f"{PREFIX}-{name}", "link", "set", "lo", "up")
        run("ip", "-n", host, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", host, "link", "set", "br0", "up")
        for number, name in enumerate(("web", "api", "intruder"), 1):
            self.add(name, number)

    def add(self, name: str, number: int) -> None:
        """A container on the bridge; its namespace is made where it is missing."""
        own, host = f"{PREFIX}-{name}", f"{PREFIX}-host"
        if not Path(f"/run/netns/{own}").exists():
            run("ip", "netns", "add", own)
            run("ip", "-n", own, "link", "set", "lo", "up")
        veth = f"link add eth0 type veth peer name v{name} netns {host}"
        run("ip", "-n", own, *veth.split())
        run("ip", "-n", host, "link", "set", f"v{name}", "master", "br0", "up")
        run("ip", "-n", own, "addr", "add", f"10.9.0.{number}/24", "dev", "eth0")
        run("ip", "-n", own, "addr", "add", f"fd00:9::{number}/64", "dev", "eth0", "nodad")
        run("ip", "-n", own, "link", "set", "eth0", "up")
        run("ip", "-n", own, "route", "add", "default", "via", "10.9.0.254", "metric", "7")

    def _serve(self) -> None:
        (self.root / "policies").mkdir(parents=True)
        (self.root / "isolator.yaml").write_text(CONFIG.replace("XDP", self.xdp))
        self.policy()
        with (self.root / "big").open("wb") as file:
            file.truncate(2 << 30)
        self.serve("api", self.nginx)
        wait_for(lambda: self.curl("web", f"http://{API}{ALLOWED}") == "200", "nginx does not answer")
        wait_for(lambda: "tentative" not in self.network(), "IPv6 addresses stay tentative")
        (self.root / "access.log").write_text("")

    def serve(self, name: str, config: str) -> None:
        """nginx and the upload server in a container."""
        root = self.root if name == "api" else self.root / name
        root.mkdir(exist_ok=True)
        (root / "nginx.conf").write_text(config.format(root=root))
        self.start(name, "nginx", "-c", str(root / "nginx.conf"))
        self.start(name, sys.executable, "-c", UPLOAD_SERVER)

    def policy(self, mode: str = "protect", path: str = "/api/v1/**") -> None:
        """Writes the policy whole, as an editor does."""
        draft = self.root / "draft"
        draft.write_text(POLICY.replace("MODE", mode).replace("PATH", path))
        draft.replace(self.root / "policies" / "api.yaml")

    def start(self, name: str, *command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{PREFIX}-{name}", *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def inside(self, name: str, *command: str) -> str:
        return run("nsenter", f"--net=/run/netns/{PREFIX}-{name}", *command)

    def curl(self, name: str, url: str, *options: str) -> str:
        """The status, 000 without an answer; with options, whatever those print."""
        command = [
            "curl",
            "-s",
            "--path-as-is",
            "-m",
            "3",
            *(options or ("-o", "/dev/null", "-w", "%{http_code}")),
        ]
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{PREFIX}-{name}", *command, url], capture_output=True, text=True
        )
        return done.stdout.strip()

    def talk(self, *parts: str) -> str:
        return self.inside("web", sys.executable, "-c", TALK, *parts).strip()

    def served(self) -> list[str]:
        time.sleep(0.2)
        return (self.root / "access.log").read_text().splitlines()

    # the agent

    def start_agent(self) -> None:
        self.agent = run_agent(self.root)
        self.wait_ready()

    def wait_ready(self) -> None:
        wait_for(lambda: bool(self.ask("/v1/status").get("ready")), "the agent does not get ready")

    def stop_agent(self, how: int) -> None:
        if self.agent is not None and self.agent.poll() is None:
            self.agent.send_signal(how)
            self.agent.wait(20)
        self.agent = None

    def ask(self, target: str) -> dict[str, Any]:
        return ask_agent(STATE, target)

    def log_text(self) -> str:
        return (self.root / "agent.log").read_text()

    def network(self) -> str:
        """Everything that a restore has to give back, as text."""
        commands = (
            "ip -d addr",
            "ip route show table all",
            "ip -6 route show table all",
            "ip rule",
            "ethtool -k eth0",
        )
        return "".join(self.inside(name, *command.split()) for name in ("web", "api") for command in commands)


def run_agent(folder: Path) -> subprocess.Popen[str]:
    """Of the folder's isolator.yaml; it logs beside it."""
    with (folder / "agent.log").open("a") as log:
        command = [sys.executable, "-m", "isolator.daemon", "run", str(folder / "isolator.yaml")]
        return subprocess.Popen(command, stdout=log, stderr=log, text=True)


def ask_agent(state_dir: Path, target: str) -> dict[str, Any]:
    """Of the agent there, /v1/status or /v1/flows; empty, where none answers."""
    from isolator.control.client import Client, ClientError

    with contextlib.suppress(ClientError, OSError):
        client = Client(state_dir / "isolator.sock")
        return client.status() if target == "/v1/status" else {"flows": list(client.flows())}
    return {}


def forget_agent(state_dir: Path) -> None:
    """Ends an agent that a run which was cut off left on this state folder, and takes all away that it made."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((state_dir / "agent.lock").read_text())
        if b"isolator.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not Path(f"/proc/{pid}").exists(), f"agent {pid} does not end")
    names = Names.of(state_dir)
    unpin_netns(names.netns)
    unpin(names.pins)
    shutil.rmtree(state_dir, ignore_errors=True)


def wait_for(condition: Callable[[], bool], otherwise: str, seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(otherwise)
        time.sleep(0.05)
