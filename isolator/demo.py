"""The demo: three network namespaces on a bridge, a policy, real traffic, and what came of it.

lab → agent → checks, each with what was expected and seen → all taken down
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from isolator.control.client import Client
from isolator.lab import ALLOWED, API, API6, DENIED, PREFIX, STATE, Lab, wait_for

UPLOAD_MB = 200
COUNTED_WITHIN = 2.5  # s, by the agent

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


def offloaded(lab: Lab) -> Iterator[Check]:
    """What is allowed and plain never comes to Python."""
    client = Client(STATE / "isolator.sock")
    before = client.offload()["requests"]
    lab.talk(*[get(ALLOWED)] * 3)
    time.sleep(COUNTED_WITHIN)
    after = client.offload()["requests"]
    seen = " ".join(str(after[by] - before[by]) for by in ("kernel", "python"))
    yield Check("three allowed requests: by the kernel, by Python", "3 0", seen)
    told = [flow for flow in client.flows() if flow["decided_by"] == "kernel" and flow["l7"]]
    yield Check(
        "the kernel's are in the flow log", ALLOWED, told[-1]["l7"]["http"]["path"] if told else "nothing"
    )


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
    yield Check("agent killed: what the kernel can decide goes on", "200", ask(ALLOWED))
    lab.start_agent()
    yield Check("agent back: the connection lives on", "200 200", f"{before} {ask(ALLOWED)}")
    generation = lab.ask("/v1/status")["generation"]
    lab.policy(path="/api/v2/**")
    wait_for(
        lambda: bool(lab.ask("/v1/status")["generation"] != generation), "the edited policy is not in force"
    )
    yield Check("policy edited: the live connection's next request", "403", ask(ALLOWED))


def closed_after(lab: Lab) -> str:
    """A request that no automaton accepts, once the agent's heartbeat is older than its bound."""
    time.sleep(2.5)
    return lab.curl("web", f"http://{API}{ALLOWED}", "--http1.0", "-o", "/dev/null", "-w", "%{http_code}")


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
    for part in (requests, tricks, offloaded, transfers, changes, killed_transfer, monitored):
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
