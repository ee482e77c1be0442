"""The demo: three network namespaces on a bridge, a policy, real traffic, and what came of it.

lab (namespaces, nginx, an upload server) → agent → checks, each with what was expected and seen → all taken down
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isolator.datapath.bpf import unpin
from isolator.datapath.netns import unpin_netns
from isolator.datapath.node import Names

STATE = Path("/run/isolator-demo-lab")  # its own: an agent that follows the README is left alone
PREFIX = "isodemo"
API, API6 = "10.9.0.2", "[fd00:9::2]"
ALLOWED, DENIED = "/api/v1/books", "/admin/secrets"
UPLOAD_MB = 200

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
  access_log {root}/access.log; client_body_temp_path {root}/body; proxy_temp_path {root}/proxy;
  fastcgi_temp_path {root}/fastcgi; uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;
  server {{ listen 80; listen [::]:80; listen 8080; listen 9090; location / {{ return 200 "books\\n"; }}
           location /big {{ root {root}; }} }}
}}
"""

UPLOAD_SERVER = """\
import hashlib, http.server
class Upload(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        digest, left = hashlib.sha256(), int(self.headers["content-length"])
        while left and (data := self.rfile.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
        answer = digest.hexdigest().encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *arguments): pass
http.server.ThreadingHTTPServer(("10.9.0.2", 8081), Upload).serve_forever()
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

LIVE = """\
import socket, sys
peer = socket.create_connection(("10.9.0.2", 80), timeout=10)
for line in sys.stdin:
    try:
        peer.sendall(f"GET {line.strip()} HTTP/1.1\\r\\nHost: api\\r\\n\\r\\n".encode())
        print(peer.recv(65536).split()[1].decode(), flush=True)
    except (OSError, IndexError) as error:
        print(type(error).__name__, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    expected: str
    seen: str

    @property
    def ok(self) -> bool:
        return self.expected == self.seen


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
        self.clear()

    def clear(self) -> None:
        """Takes away what this or an earlier run left."""
        names = Names.of(STATE)
        unpin_netns(names.netns)
        unpin(names.pins)
        shutil.rmtree(STATE, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)
        for name in ("host", "web", "api", "intruder"):
            if Path(f"/run/netns/{PREFIX}-{name}").exists():
                run("ip", "netns", "del", f"{PREFIX}-{name}")

    def _build(self) -> None:
        host = f"{PREFIX}-host"
        for name in ("host", "web", "api", "intruder"):
            run("ip", "netns", "add", f"{PREFIX}-{name}")
            run("ip", "-n", f"{PREFIX}-{name}", "link", "set", "lo", "up")
        run("ip", "-n", host, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", host, "link", "set", "br0", "up")
        for number, name in enumerate(("web", "api", "intruder"), 1):
            own = f"{PREFIX}-{name}"
            run(
                "ip",
                "-n",
                own,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"v{name}",
                "netns",
                host,
            )
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
        (self.root / "nginx.conf").write_text(NGINX.format(root=self.root))
        self.start("api", "nginx", "-c", str(self.root / "nginx.conf"))
        self.start("api", sys.executable, "-c", UPLOAD_SERVER)
        wait_for(lambda: self.curl("web", f"http://{API}{ALLOWED}") == "200", "nginx does not answer")
        wait_for(lambda: "tentative" not in self.network(), "IPv6 addresses stay tentative")
        (self.root / "access.log").write_text("")

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
        with (self.root / "agent.log").open("a") as log:
            command = [sys.executable, "-m", "isolator.daemon", "run", str(self.root / "isolator.yaml")]
            self.agent = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        self.wait_ready()

    def wait_ready(self) -> None:
        wait_for(lambda: bool(self.ask("/v1/status").get("ready")), "the agent does not get ready")

    def stop_agent(self, how: int) -> None:
        if self.agent is not None and self.agent.poll() is None:
            self.agent.send_signal(how)
            self.agent.wait(20)
        self.agent = None

    def ask(self, target: str) -> dict[str, Any]:
        from isolator.control.client import Client, ClientError

        with contextlib.suppress(ClientError, OSError):
            client = Client(STATE / "isolator.sock")
            return client.status() if target == "/v1/status" else {"flows": list(client.flows())}
        return {}

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


def wait_for(condition: Callable[[], bool], otherwise: str, seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(otherwise)
        time.sleep(0.05)


# -- the checks --------------------------------------------------------------------------------------------


def get(path: str) -> str:
    return f"GET {path} HTTP/1.1\\r\\nHost: api\\r\\n\\r\\n"


def requests(lab: Lab) -> Iterator[Check]:
    """What one request, or a few on one connection, come to."""
    web = f"http://{API}"
    yield Check("allowed GET", "200", lab.curl("web", web + ALLOWED))
    yield Check(
        "allowed HEAD", "200", lab.curl("web", web + ALLOWED, "-I", "-o", "/dev/null", "-w", "%{http_code}")
    )
    yield Check("denied path", "403", lab.curl("web", web + DENIED))
    answer = lab.curl("web", web + DENIED, "-o", "-")
    yield Check(
        "the answer names policy and rule", "True", str("policy api-allow, rule read-books" in answer)
    )
    method = lab.curl("web", web + ALLOWED, "-X", "DELETE", "-o", "/dev/null", "-w", "%{http_code}")
    yield Check("denied method", "403", method)
    yield Check(
        "IPv6 allowed, denied",
        "200 403",
        " ".join(lab.curl("web", f"http://{API6}{p}") for p in (ALLOWED, DENIED)),
    )
    yield Check("denied peer", "000", lab.curl("intruder", web + ALLOWED))
    yield Check("layer-4 port open", "200", lab.curl("web", f"http://{API}:9090/"))
    yield Check("layer-4 port closed", "000", lab.curl("web", f"http://{API}:8080/"))
    yield Check(
        "kept-alive, third request denied", "200 200 403", lab.talk(get(ALLOWED), get(ALLOWED), get(DENIED))
    )
    yield Check(
        "pipelined, second request denied", "200 403", lab.talk(get(ALLOWED) + get(DENIED) + get(ALLOWED))
    )
    yield Check(
        "head in four segments",
        "200",
        lab.talk("GET /api/v1/b", "ooks HTTP/1.1\\r", "\\nHost: api\\r\\n", "Connection: close\\r\\n\\r\\n"),
    )
    framing = "Transfer-Encoding: chunked\\r\\nContent-Length: 5\\r\\n\\r\\n0\\r\\n\\r\\n"
    chunked = "POST /orders HTTP/1.1\\r\\nHost: api\\r\\n" + framing
    yield Check("request smuggling refused", "403", lab.talk(chunked + get(DENIED)))


def tricks(lab: Lab) -> Iterator[Check]:
    for path in (
        "/api/v1/../../admin/secrets", "/api/v1/%2e%2e/%2e%2e/admin/secrets", "/api/v1/..%2f..%2fadmin/secrets",
        "/api/v1/%252e%252e/admin", "/%61dmin/secrets", "//admin/secrets", "/api/v1/..;/admin",
    ):  # fmt: skip
        yield Check(f"path trick {path}", "403", lab.curl("web", f"http://{API}{path}"))
    yield Check("encoded twin of an allowed path", "200", lab.curl("web", f"http://{API}/api/v1/%62ooks"))


def transfers(lab: Lab) -> Iterator[Check]:
    source = lab.root / "upload"
    digest = hashlib.sha256()
    with source.open("wb") as file:
        for _ in range(UPLOAD_MB):
            block = os.urandom(1 << 20)
            digest.update(block)
            file.write(block)
    seen = lab.curl(
        "web", f"http://{API}:8081/upload", "-m", "60", "-X", "POST", "-H", "Expect:", "-T", str(source)
    )
    yield Check(f"{UPLOAD_MB} MB upload arrives", digest.hexdigest(), seen)


def changes(lab: Lab) -> Iterator[Check]:
    """The policy and the agent change under live connections."""
    live = lab.start("web", sys.executable, "-c", LIVE)

    def ask(path: str) -> str:
        assert live.stdin is not None and live.stdout is not None
        live.stdin.write(path + "\n")
        live.stdin.flush()
        return live.stdout.readline().strip()

    before = ask(ALLOWED)
    lab.stop_agent(signal.SIGKILL)
    open_port = lab.curl("web", f"http://{API}:9090/")
    yield Check("agent killed: layer 4 goes on", "200", open_port)
    yield Check("agent killed: what needs it is closed", "000", closed_after(lab))
    lab.start_agent()
    yield Check("agent back: the connection lives on", "200 200", f"{before} {ask(ALLOWED)}")
    generation = lab.ask("/v1/status")["generation"]
    lab.policy(path="/api/v2/**")
    wait_for(
        lambda: bool(lab.ask("/v1/status")["generation"] != generation), "the edited policy is not in force"
    )
    yield Check("policy edited: the live connection's next request", "403", ask(ALLOWED))


def closed_after(lab: Lab) -> str:
    """A request once the agent's heartbeat is older than its bound."""
    time.sleep(2.5)
    return lab.curl("web", f"http://{API}{ALLOWED}")


def killed_transfer(lab: Lab) -> Iterator[Check]:
    """The agent dies and returns while an upload runs: the body is in a pass window, the kernel's."""
    lab.policy()
    time.sleep(1.5)
    source = lab.root / "upload"
    url = f"http://{API}:8081/upload"
    command = (
        "curl",
        "-s",
        "-m",
        "60",
        "--limit-rate",
        "60M",
        "-X",
        "POST",
        "-H",
        "Expect:",
        "-T",
        str(source),
        url,
    )
    upload = lab.start("web", *command)
    time.sleep(0.7)
    lab.stop_agent(signal.SIGKILL)
    seen, _ = upload.communicate(timeout=60)
    yield Check(
        "agent killed during an upload: it arrives",
        hashlib.sha256(source.read_bytes()).hexdigest(),
        seen.strip(),
    )
    lab.start_agent()


def monitored(lab: Lab) -> Iterator[Check]:
    lines = lab.served()
    yield Check(
        "denied requests in the server's log",
        "0",
        str(sum("admin" in line or "DELETE" in line for line in lines)),
    )
    lab.policy(mode="monitor")
    time.sleep(2)
    yield Check("monitor mode lets pass", "200", lab.curl("web", f"http://{API}{DENIED}"))
    audits = [f for f in lab.ask("/v1/flows")["flows"] if f.get("verdict") == "AUDIT" and f.get("l7")]
    yield Check(
        "monitor mode reports", "HTTP_NO_RULE", str(audits[-1]["drop_reason"] if audits else "nothing")
    )


def restored(lab: Lab, before: str) -> Iterator[Check]:
    done = subprocess.run(
        [sys.executable, "-m", "isolator.cli", "restore", "--all", "--socket", str(STATE / "isolator.sock")],
        capture_output=True, text=True,
    )  # fmt: skip
    yield Check("restore says", "0", str(done.returncode))
    yield Check(
        "restore leaves the network as it was", "equal", "equal" if lab.network() == before else "different"
    )
    yield Check("and traffic flows", "200", lab.curl("intruder", f"http://{API}{ALLOWED}"))


def checks(lab: Lab) -> Iterator[Check]:
    before = lab.network()
    lab.start_agent()
    for part in (requests, tricks, transfers, changes, killed_transfer, monitored):
        yield from part(lab)
    yield from restored(lab, before)


# -- telling -----------------------------------------------------------------------------------------------


def demo(xdp: str, as_json: bool) -> int:
    seen: list[Check] = []
    with Lab(Path("/tmp") / f"{PREFIX}-files", xdp) as lab:
        try:
            for check in checks(lab):
                seen.append(check)
                if not as_json:
                    print(line(check), flush=True)
        except RuntimeError as error:
            seen.append(Check("the demo itself", "no error", str(error)))
            print(f"isolator: {error}\n{lab.log_text()}", file=sys.stderr)
    passed = sum(check.ok for check in seen)
    if as_json:
        rows = [{**asdict(check), "ok": check.ok} for check in seen]
        print(json.dumps({"checks": rows, "passed": passed, "total": len(seen)}))
    else:
        print(f"\n{passed} of {len(seen)} checks passed")
    return 0 if passed == len(seen) else 1


def line(check: Check) -> str:
    mark = (
        ("\033[32mok\033[0m  " if check.ok else "\033[31mFAIL\033[0m")
        if sys.stdout.isatty()
        else "ok  "
        if check.ok
        else "FAIL"
    )
    expected = check.expected if len(check.expected) < 20 else check.expected[:8] + "…"
    seen = "" if check.ok else f"  seen {check.seen or 'nothing'}"
    return f"{mark} {check.name:<55} {expected}{seen}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="isolator demo", description="Shows what Isolator does, on this machine."
    )
    parser.add_argument("--xdp", choices=("off", "native", "generic"), default="off")
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print(
            "isolator: the demo needs root, for network namespaces and BPF: run it as root", file=sys.stderr
        )
        return 1
    return demo(arguments.xdp, arguments.as_json)


if __name__ == "__main__":
    sys.exit(main())
