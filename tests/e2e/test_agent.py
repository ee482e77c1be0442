"""The agent's life: what it refuses to start with, what comes and goes under it, how it dies and returns."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.datapath.netns import Netns
from isolator.lab import ALLOWED, API, DENIED, PREFIX, STATE, Lab, run, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow]
ISOLATOR = (sys.executable, "-m", "isolator.cli")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(Path("/tmp") / f"{PREFIX}-agent", "off") as made:
        made.start_agent()
        yield made


def refused(*command: str) -> str:
    """The one line with which `command` fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith("isolator: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def status(lab: Lab) -> dict[str, object]:
    return lab.ask("/v1/status")


def state_of(lab: Lab, name: str) -> str:
    """`none` where there is no such endpoint, or no agent."""
    known = status(lab).get("endpoints", [])
    return next((str(each["state"]) for each in known if each["name"] == name), "none")  # type: ignore[attr-defined]


# -- what it does not start with -----------------------------------------------------------------------------


def test_a_second_agent_on_the_same_state_is_refused(lab: Lab) -> None:
    line = refused(*ISOLATOR, "run", "-c", str(lab.root / "isolator.yaml"))
    assert "another agent runs on" in line and "stop it, or use another state_dir" in line
    assert status(lab)["ready"] and (STATE / "agent.lock").read_text() == f"{status(lab)['pid']}\n"


NO_BPFFS = 'while umount /sys/fs/bpf 2>/dev/null; do :; done; mount -t tmpfs none /sys/fs && exec "$@"'
WITHOUT = {
    "root": (("setpriv", "--bounding-set=-all"), "needs root"),
    "BTF": (
        ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /sys/kernel/btf && exec "$@"', "-"),
        "has no BTF",
    ),
    "bpffs": (("unshare", "-m", "sh", "-c", NO_BPFFS, "-"), "cannot mount bpffs"),
}


@pytest.mark.parametrize("lacking", WITHOUT)
def test_a_machine_that_lacks_something(lab: Lab, lacking: str) -> None:
    wrapper, words = WITHOUT[lacking]
    before = lab.network()
    assert words in refused(*wrapper, *ISOLATOR, "run", "-c", str(lab.root / "isolator.yaml"))
    assert lab.network() == before


@pytest.mark.parametrize(
    ("netns", "interface", "words"),
    [
        ("isodemo-nowhere", "eth0", "isodemo-nowhere"),
        (f"{PREFIX}-intruder", "eth7", "is missing; there are: lo, eth0"),
        (f"{PREFIX}-host", "br0", "not protectable: bridge, not veth"),
    ],
)
def test_an_endpoint_that_cannot_be(lab: Lab, tmp_path: Path, netns: str, interface: str, words: str) -> None:
    config = tmp_path / "isolator.yaml"
    config.write_text(
        f"runtime: {{kind: netns}}\nstate_dir: {tmp_path}/state\npolicies: [{lab.root}/policies/]\nendpoints:\n"
        f"  - {{name: good, netns: {PREFIX}-intruder, interface: eth0, labels: {{a: b}}}}\n"
        f"  - {{name: bad, netns: {netns}, interface: {interface}, labels: {{a: b}}}}\n"
    )
    before = lab.inside("intruder", "ip", "-d", "addr")
    line = refused(*ISOLATOR, "run", "-c", str(config))
    assert words in line and "bad" in line
    assert lab.inside("intruder", "ip", "-d", "addr") == before
    assert not list(Path("/sys/fs/bpf").glob(f"*{tmp_path.name}*"))


def test_a_bad_policy_leaves_the_old_one_in_force_and_is_told(lab: Lab) -> None:
    file = lab.root / "policies" / "api.yaml"
    good = file.read_text()
    file.write_text(good.replace("methods:", "method:"))
    wait_for(lambda: bool(status(lab)["policy_errors"]), "the bad policy is not noticed")
    (error, *_) = status(lab)["policy_errors"]  # type: ignore[misc]
    assert f"{file}:" in error and "method" in error
    told = subprocess.run(
        [*ISOLATOR, "reload", "--socket", str(STATE / "isolator.sock")], capture_output=True
    )
    assert told.returncode == 1 and b"api.yaml:" in told.stderr
    assert [lab.curl("web", f"http://{API}{path}") for path in (ALLOWED, DENIED)] == ["200", "403"]
    file.write_text(good)
    wait_for(lambda: not status(lab)["policy_errors"], "the good policy is not noticed")


def test_sighup_reads_the_files_again(lab: Lab) -> None:
    before = lab.log_text().count("policy in force")
    assert lab.agent is not None
    lab.agent.send_signal(signal.SIGHUP)
    wait_for(lambda: lab.log_text().count("policy in force") > before, "SIGHUP is not answered")


# -- what comes and goes -------------------------------------------------------------------------------------


def test_an_endpoint_that_vanishes_is_dropped_and_one_that_returns_is_spliced_again(lab: Lab) -> None:
    assert lab.curl("web", f"http://{API}{ALLOWED}") == "200"
    run("ip", "netns", "del", f"{PREFIX}-web")
    wait_for(lambda: state_of(lab, "web") == "waiting", "the vanished endpoint is not noticed")
    assert [path.name for path in (STATE / "journal").iterdir() if "web" in path.read_text()] == []
    ports = json.loads(run("ip", "-n", "isolator-demo-lab", "-j", "link", "show"))
    assert len(ports) == 1 + 2 + 2  # lo, the punt pair, the other endpoint
    lab.add("web", 1)
    wait_for(lambda: state_of(lab, "web") == "enforced", "the returned endpoint is not spliced")
    wait_for(lambda: lab.curl("web", f"http://{API}{ALLOWED}") == "200", "the returned endpoint is cut off")
    assert lab.curl("web", f"http://{API}{DENIED}") == "403"


def test_an_interface_that_is_made_anew_is_spliced_again(lab: Lab) -> None:
    """As `docker network disconnect` and `connect` do, and without either the endpoint must not stand open."""
    before = status(lab)["generation"]
    lab.inside("web", "ip", "link", "del", "eth0")
    wait_for(lambda: state_of(lab, "web") == "failed", "the interface is not missed")
    lab.add("web", 1)
    wait_for(lambda: state_of(lab, "web") == "enforced", "the interface is not spliced again")
    wait_for(lambda: lab.curl("web", f"http://{API}{ALLOWED}") == "200", "the returned endpoint is cut off")
    assert lab.curl("web", f"http://{API}{DENIED}") == "403"
    assert status(lab)["generation"] == before + 2, "one without it, one with it"  # type: ignore[operator]


def test_an_endpoint_that_is_taken_out_of_the_config_gets_its_network_back(lab: Lab) -> None:
    config = lab.root / "isolator.yaml"
    whole = config.read_text()
    config.write_text("".join(line for line in whole.splitlines(keepends=True) if "name: web" not in line))
    wait_for(lambda: state_of(lab, "web") == "none", "it is not dropped")
    assert not (STATE / "journal" / "web.json").exists()
    run("ip", "netns", "del", f"{PREFIX}-web")
    time.sleep(1.5)
    assert (state_of(lab, "web"), state_of(lab, "api")) == ("none", "enforced")
    lab.add("web", 1)
    config.write_text(whole)
    wait_for(lambda: state_of(lab, "web") == "enforced", "it is not taken up again")
    wait_for(lambda: lab.curl("web", f"http://{API}{ALLOWED}") == "200", "the returned endpoint is cut off")


def test_a_link_that_leads_nowhere_among_the_policies_is_told(lab: Lab) -> None:
    link = lab.root / "policies" / "next.yaml"
    link.symlink_to("nowhere.yaml")
    wait_for(lambda: bool(status(lab)["policy_errors"]), "the dangling link is not noticed")
    link.unlink()
    wait_for(lambda: not status(lab)["policy_errors"], "its removal is not noticed")


def test_a_restored_endpoint_stays_so_until_its_container_starts_anew(lab: Lab) -> None:
    subprocess.run(
        [*ISOLATOR, "restore", "web", "--socket", str(STATE / "isolator.sock")],
        check=True,
        capture_output=True,
    )
    time.sleep(2.5)
    assert state_of(lab, "web") == "restored"
    run("ip", "netns", "del", f"{PREFIX}-web")
    wait_for(lambda: state_of(lab, "web") == "waiting", "the vanished endpoint is not noticed")
    lab.add("web", 1)
    wait_for(lambda: state_of(lab, "web") == "enforced", "the returned endpoint is not spliced")


def test_a_later_start_waits_for_a_container_that_is_away_and_puts_back_what_is_not_its_own(lab: Lab) -> None:
    config = lab.root / "isolator.yaml"
    whole = config.read_text()
    lab.stop_agent(signal.SIGKILL)
    config.write_text(whole.replace("name: web, netns: isodemo-web", "name: absent, netns: isodemo-absent"))
    with (lab.root / "agent.log").open("a") as log:
        lab.agent = subprocess.Popen(
            [sys.executable, "-m", "isolator.daemon", "run", str(config)], stdout=log, stderr=log, text=True
        )
    wait_for(lambda: bool(status(lab)) and state_of(lab, "api") == "enforced", "it does not start")
    assert state_of(lab, "absent") == "waiting"
    assert [path.name for path in (STATE / "journal").iterdir()] == ["api.json"]
    config.write_text(whole)
    wait_for(lambda: state_of(lab, "web") == "enforced", "the endpoint is not taken up again")
    wait_for(lambda: lab.curl("web", f"http://{API}{ALLOWED}") == "200", "the returned endpoint is cut off")


# -- how it dies ---------------------------------------------------------------------------------------------


class Sink(threading.Thread):
    """A server in the api container that takes one connection's bytes and answers where a message ends."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        with Netns(f"{PREFIX}-api") as api, api.entered():
            self.listener = socket.create_server((API, port))
        self.seen = b""
        self.start()

    def run(self) -> None:
        peer, _ = self.listener.accept()
        with peer, contextlib.suppress(ConnectionResetError):  # how a denial ends the server's side
            while data := peer.recv(1 << 20):
                self.seen += data
                if self.seen.endswith(b"\r\n\r\n") and b"chunked" not in self.seen[-100:]:
                    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


def answer(sock: socket.socket) -> bytes:
    seen = b""
    while b"\r\n\r\n" not in seen:
        data = sock.recv(65536)
        assert data, seen
        seen += data
    return seen


def test_a_chunked_upload_goes_on_after_the_agent_was_killed(lab: Lab) -> None:
    """The state between two chunks, and in the middle of one, is pinned."""
    file = lab.root / "policies" / "api.yaml"
    file.write_text(file.read_text().replace("port: 80,", "port: 8083,").replace("HEAD", "POST"))
    subprocess.run(
        [*ISOLATOR, "reload", "--socket", str(STATE / "isolator.sock")], check=True, capture_output=True
    )
    sink = Sink(8083)
    with Netns(f"{PREFIX}-web") as web, web.entered():
        peer = socket.create_connection((API, 8083), timeout=20)
    first = b"GET /api/v1/a HTTP/1.1\r\nHost: api\r\n\r\n"
    head = b"POST /api/v1/c HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = (
        b"5\r\nhello\r\n",
        b"100000\r\n" + b"x" * 0x80000,
        b"y" * 0x80000,
        b"\r\n7\r\ngoodbye\r\n",
        b"0\r\n\r\n",
    )
    with peer:
        peer.sendall(first)
        assert b" 200 " in answer(peer)
        peer.sendall(head + chunks[0])
        peer.sendall(chunks[1])
        time.sleep(0.3)
        lab.stop_agent(signal.SIGKILL)
        peer.sendall(chunks[2])  # the rest of a chunk: in a pass window, so it arrives without an agent
        wait_for(lambda: sink.seen.endswith(chunks[2]), "what is granted does not pass")
        peer.sendall(chunks[3])  # waits for the agent
        time.sleep(2.5)
        assert sink.seen.endswith(chunks[2])
        lab.start_agent()
        peer.sendall(chunks[4])
        assert b" 200 " in answer(peer)
        peer.sendall(f"GET {DENIED} HTTP/1.1\r\nHost: api\r\n\r\n".encode())
        assert b" 403 " in answer(peer)
    sink.join(5)
    assert sink.seen == first + head + b"".join(chunks)
    sink.listener.close()
    lab.policy()


HASHED = """\
import hashlib, socket, sys
size, block = int(sys.argv[1]), bytes(range(256)) * 4096
peer, digest = socket.create_connection(("10.9.0.2", 8081), timeout=60), hashlib.sha256()
peer.sendall(f"POST /upload HTTP/1.1\\r\\nHost: api\\r\\nContent-Length: {size}\\r\\n\\r\\n".encode())
for number in range(size >> 20):
    data = number.to_bytes(8, "big") + block[8:]
    digest.update(data)
    peer.sendall(data)
seen = b""
while len(seen.partition(b"\\r\\n\\r\\n")[2]) < 64:
    seen += peer.recv(65536)
print(seen.endswith(digest.hexdigest().encode()))
"""


def test_a_body_over_4_gib_passes_whole(lab: Lab) -> None:
    """The sequence number wraps around on the way, and a pass window of 1 GiB is rolled on five times."""
    command = ("nsenter", f"--net=/run/netns/{PREFIX}-web", sys.executable, "-c", HASHED, str(4200 << 20))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "True", done.stderr


def test_restore_on_exit(lab: Lab) -> None:
    config = lab.root / "isolator.yaml"
    lab.stop_agent(signal.SIGTERM)
    config.write_text(config.read_text() + "on_exit: restore\n")
    lab.start_agent()
    assert lab.agent is not None
    lab.stop_agent(signal.SIGTERM)
    assert "veth" in lab.inside("web", "ip", "-d", "link", "show", "eth0")
    assert list((STATE / "journal").glob("*")) == []
    assert lab.curl("intruder", f"http://{API}{DENIED}") == "200"
