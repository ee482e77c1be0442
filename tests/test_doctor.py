"""Each check of `isolator doctor`: what it says of a machine that lacks something. And all of them here."""

from __future__ import annotations

import fcntl
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isolator import doctor
from isolator.cli import app
from isolator.control.config import Config
from isolator.datapath import probe
from isolator.datapath.nftables import NftablesError
from isolator.doctor import CHECKS, Finding, Level, Machine, examine
from tests.control.fake_agent import served

HOST = """\
28 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
29 28 0:25 / /run rw,nosuid shared:5 - tmpfs tmpfs rw
"""
CONTAINER = """\
60 59 0:50 / / ro,relatime - overlay overlay ro
61 60 0:25 /netns /run/netns rw,nosuid shared:5 - tmpfs tmpfs rw
"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine on which nothing fails."""
    files = {
        "proc/sys/kernel/osrelease": "6.1.0-18-amd64\n",
        "proc/sys/net/ipv4/conf/default/rp_filter": "0\n",
        "proc/self/status": "Name:\tx\nCapEff:\t000001ffffffffff\n",
        "proc/self/attr/current": "unconfined\n",
        "proc/self/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
        "proc/self/mountinfo": f"{HOST}30 28 0:30 / {tmp_path}/sys/fs/bpf rw shared:9 - bpf bpf rw\n",
        "sys/kernel/btf/vmlinux": "",
        "sys/fs/bpf/x": "",
        "run/x": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Machine(tmp_path)


HARMLESS = [name for name in CHECKS if name not in ("datapath", "nf_tables", "engine", "tc, XDP")]


@pytest.mark.parametrize("name", HARMLESS)
def test_a_sound_machine(machine: Machine, name: str) -> None:
    finding = CHECKS[name](machine)
    assert (finding.check, finding.level, finding.advice) == (name, Level.OK, "")


@pytest.mark.parametrize(
    ("name", "file", "text", "level", "seen", "advice"),
    [
        ("kernel", "proc/sys/kernel/osrelease", "5.10.0-28-amd64", "fail", "5.10.0", "5.14 or later"),
        ("kernel", "proc/sys/kernel/osrelease", "4.19", "fail", "4.19", "5.14 or later"),
        ("capabilities", "proc/self/status", "CapEff:\t0", "fail", "no CAP_NET_ADMIN, ", "--cap-add SYS_ADMIN"),
        ("capabilities", "proc/self/status", "CapEff:\t00203000", "warn", "no CAP_SYS_PTRACE, CAP_", "SYS_NICE"),
        ("apparmor", "proc/self/attr/current", "docker-default (enforce)\n", "fail", "docker-", "apparmor=unconfined"),
        ("bpffs", "proc/self/mountinfo", HOST, "warn", "not mounted", "mount -t bpf"),
        ("netns pins", "proc/self/mountinfo", CONTAINER.replace("shared:5 ", ""), "fail", "container's own", "rshared"),
    ],
)  # fmt: skip
def test_what_is_missing_and_what_to_do(
    machine: Machine, name: str, file: str, text: str, level: str, seen: str, advice: str
) -> None:
    (machine.root / file).write_text(text)
    finding = CHECKS[name](machine)
    assert finding.level == level
    assert seen in finding.seen
    assert advice in finding.advice


def test_pins_that_a_container_shares_with_its_host(machine: Machine) -> None:
    (machine.root / "proc/self/mountinfo").write_text(CONTAINER)
    assert CHECKS["netns pins"](machine).level is Level.OK


def test_a_container_without_the_hosts_processes(machine: Machine) -> None:
    (machine.root / ".dockerenv").touch()
    assert CHECKS["processes"](machine).level is Level.WARN
    (machine.root / "proc/2").mkdir()
    (machine.root / "proc/2/comm").write_text("kthreadd\n")
    assert CHECKS["processes"](machine).level is Level.OK


def test_no_btf(machine: Machine) -> None:
    (machine.root / "sys/kernel/btf/vmlinux").unlink()
    assert CHECKS["btf"](machine).level is Level.FAIL


def test_sysctls_that_cannot_be_written(machine: Machine) -> None:
    (machine.root / "proc/sys/net/ipv4/conf/default/rp_filter").unlink()
    finding = CHECKS["sysctls"](machine)
    assert (finding.level, finding.advice) == (Level.FAIL, "--security-opt systempaths=unconfined")


@pytest.mark.parametrize(
    ("lines", "seen"),
    [
        ("cgroup x cgroup rw 0 0\ncgroup2 x cgroup2 rw 0 0\n", "v1 and v2"),
        ("cgroup x cgroup rw", "v1"),
        ("", "none"),
    ],
)
def test_cgroup(machine: Machine, lines: str, seen: str) -> None:
    (machine.root / "proc/self/mounts").write_text(lines)
    assert CHECKS["cgroup"](machine).seen.startswith(seen)


@pytest.mark.parametrize(
    ("part", "check", "level"),
    [("datapath_loads", "datapath", Level.FAIL), ("bridge_firewall", "nf_tables", Level.WARN)],
)
def test_a_kernel_that_refuses(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, part: str, check: str, level: Level
) -> None:
    def refuse() -> None:
        raise NftablesError("the kernel refuses")

    def here(work: Callable[[], None]) -> None:
        work()

    monkeypatch.setattr(probe, part, refuse)
    monkeypatch.setattr(probe, "in_scratch_netns", here)
    finding = CHECKS[check](machine)
    assert (finding.level, finding.seen, bool(finding.advice)) == (level, "the kernel refuses", True)


def test_a_gate_that_the_config_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(work: Callable[[], None]) -> None:
        raise NftablesError("no bridge family")

    monkeypatch.setattr(probe, "in_scratch_netns", refuse)
    for runtime, new, level in (
        ("docker", "closed", "fail"),
        ("docker", "open", "warn"),
        ("netns", "closed", "warn"),
    ):
        config = Config(tmp_path, runtime, tmp_path, tmp_path, (), "off", "keep", "all", (), new, 5, ())  # type: ignore[arg-type]
        assert CHECKS["nf_tables"](Machine(tmp_path, config)).level == level


def test_others_programs_are_listed_and_no_failure(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "attached_programs", lambda: ["veth1: native XDP", "veth2: tc ingress bpf x"])
    assert CHECKS["tc, XDP"](machine) == Finding(
        "tc, XDP", Level.OK, "veth1: native XDP; veth2: tc ingress bpf x", "nothing: they stay as they are"
    )


# -- the engine ----------------------------------------------------------------------------------------------


@contextmanager
def engine(path: Path, answer: str) -> Iterator[None]:
    """Answers one request on a unix socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        path.parent.mkdir(parents=True, exist_ok=True)
        listener.bind(str(path))
        listener.listen()

        def answer_one() -> None:
            with listener.accept()[0] as connection:
                connection.recv(4096)
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\n\r\n"
                connection.sendall((head + answer).encode())

        thread = threading.Thread(target=answer_one, daemon=True)
        thread.start()
        yield
        thread.join(10)


@pytest.mark.parametrize(
    ("version", "level"),
    [("20.10.24+dfsg1", Level.OK), ("28.2.2", Level.OK), ("19.03.15", Level.WARN), ("1.13.1", Level.WARN)],
)
def test_an_engines_version(machine: Machine, version: str, level: Level) -> None:
    with engine(machine.engine, json.dumps({"Version": version})):
        finding = CHECKS["engine"](machine)
    assert (finding.level, version in finding.seen) == (level, True)


def test_what_is_no_engine(machine: Machine) -> None:
    assert CHECKS["engine"](machine).level is Level.WARN  # no socket at all
    with engine(machine.engine, "[]"):
        assert CHECKS["engine"](machine).level is Level.WARN


def test_an_engine_that_the_config_wants(tmp_path: Path) -> None:
    config = Config(
        tmp_path, "docker", tmp_path / "none.sock", tmp_path, (), "off", "keep", "all", (), "closed", 5, ()
    )
    finding = CHECKS["engine"](Machine(tmp_path, config))
    assert finding == Finding(
        "engine",
        Level.FAIL,
        f"no socket at {tmp_path}/none.sock",
        "start the engine, or correct runtime.socket",
    )


# -- an agent, its folder, its config ------------------------------------------------------------------------


def test_an_agent_that_runs(tmp_path: Path) -> None:
    config = Config(tmp_path, "netns", tmp_path, tmp_path, (), "off", "keep", "all", (), "closed", 5, ())
    machine = Machine(tmp_path, config)
    assert CHECKS["agent"](machine).seen == f"none runs on {tmp_path}"
    (tmp_path / "agent.lock").write_text("123\n")
    with (tmp_path / "agent.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        finding = CHECKS["agent"](machine)
        assert (finding.level, finding.seen[:8]) == (Level.FAIL, "pid 123:")
        with served(tmp_path):
            assert CHECKS["agent"](machine).seen == f"pid 123 runs on {tmp_path} and answers"


def test_a_state_dir_that_cannot_be_written(tmp_path: Path) -> None:
    config = Config(
        tmp_path, "netns", tmp_path, Path("/proc/isolator"), (), "off", "keep", "all", (), "closed", 5, ()
    )
    assert CHECKS["state_dir"](Machine(tmp_path, config)).level is Level.FAIL


def test_a_bad_config_is_a_failure_and_the_rest_is_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {"python": CHECKS["python"]})
    (tmp_path / "isolator.yaml").write_text("state_dir: run\n")
    first, *rest = examine(tmp_path / "isolator.yaml")
    assert (first.check, first.level) == ("config", Level.FAIL)
    assert f"{tmp_path}/isolator.yaml:1:12: 'state_dir': an absolute path" in first.seen
    assert [each.check for each in rest] == ["python"]


def test_a_check_that_breaks_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(machine: Machine) -> Finding:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(doctor, "CHECKS", {"broken": broken})
    *_, finding = examine(None)
    assert (finding.check, finding.level, "Input/output error" in finding.seen) == (
        "broken",
        Level.FAIL,
        True,
    )


# -- the command ---------------------------------------------------------------------------------------------


def test_exit_codes_and_forms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "PLACES", ())
    monkeypatch.setattr(doctor, "CHECKS", {"x": lambda machine: Finding("x", Level.WARN, "this", "that")})
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.exit_code, result.stdout.splitlines()[-1].split()) == (0, ["x", "warn", "this", "that"])
    monkeypatch.setattr(doctor, "CHECKS", {"x": lambda machine: Finding("x", Level.FAIL, "this", "that")})
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)[1] == {"check": "x", "level": "fail", "seen": "this", "advice": "that"}


@pytest.mark.root
def test_this_machine() -> None:
    """What the tests run on can run the agent."""
    found = {each.check: each for each in examine(None)}
    assert list(found) == ["config", *CHECKS]
    assert not [each for each in found.values() if each.level is Level.FAIL]
    assert {found[name].level for name in ("datapath", "nf_tables", "bpffs", "capabilities")} == {Level.OK}
