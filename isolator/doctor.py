"""`isolator doctor`: whether the agent can work on this machine, and what to do where it cannot.

    examine ── the config, if there is one ──▶ each check in the order of CHECKS ──▶ Findings

A check reads or tries one thing and leaves nothing behind. Nothing that is spliced, attached or running is touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from http.client import HTTPException
from pathlib import Path
from typing import Any

from isolator.control.client import Client, ClientError, UnixConnection
from isolator.control.config import Config, load
from isolator.control.problems import ConfigErrors
from isolator.datapath import probe
from isolator.datapath.errors import DatapathError
from isolator.datapath.libbpf import library
from isolator.datapath.netns import PINS
from isolator.datapath.preflight import (
    BPFFS,
    BTF,
    CAPABILITIES,
    MARK,
    filesystem_of,
    require_shared_pins,
)

KERNEL_MIN = (5, 14)  # SO_NETNS_COOKIE
ENGINE_MIN = (20, 10)
ENGINE_SECONDS = 5.0
PLACES = (Path("isolator.yaml"), Path("/etc/isolator/isolator.yaml"))
"""Where a config is looked for that is not named."""

USEFUL = {19: "CAP_SYS_PTRACE", 23: "CAP_SYS_NICE"}  # linux/capability.h
WITHOUT = {
    "CAP_SYS_PTRACE": "starts through `isolator oci-runtime` wait in vain",
    "CAP_SYS_NICE": "packets wait longer where CPUs are scarce",
}


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    """The agent works, but not all of it, or not as well as it could."""
    FAIL = "fail"
    """The agent does not work, or what it protects does not outlive it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table: `seen` is what there is, `advice` what to do (empty: nothing)."""

    check: str
    level: Level
    seen: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        return {"check": self.check, "level": self.level, "seen": self.seen, "advice": self.advice}


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the checks look. Tests put folders of their own here."""

    root: Path = Path("/")
    config: Config | None = None

    def read(self, path: str) -> str:
        """A file below /proc or /sys; empty where there is none."""
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return ""

    @property
    def in_container(self) -> bool:
        return (self.root / MARK.relative_to("/")).exists()

    @property
    def state_dir(self) -> Path:
        return self.config.state_dir if self.config else self.root / "run/isolator"

    @property
    def engine(self) -> Path:
        return self.config.engine if self.config else self.root / "var/run/docker.sock"

    @property
    def wants_engine(self) -> bool:
        return self.config is not None and self.config.runtime == "docker"


Check = Callable[[Machine], Finding]


def examine(path: Path | None) -> Iterator[Finding]:
    """Every check's finding, as it is made. `path`: the config; None: one of PLACES, or the defaults."""
    config, finding = read_config(path)
    yield finding
    machine = Machine(config=config)
    for name, check in CHECKS.items():
        try:
            yield check(machine)
        except (DatapathError, OSError) as error:
            yield Finding(name, Level.FAIL, str(error), "see what it says; are you root?")


def read_config(path: Path | None) -> tuple[Config | None, Finding]:
    found = path or next((place for place in PLACES if place.exists()), None)
    if found is None:
        return None, Finding("config", Level.OK, "none: the defaults are examined", "name one with --config")
    try:
        loaded = load(found)
    except ConfigErrors as error:
        more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
        return None, Finding(
            "config", Level.FAIL, f"{error.problems[0]}{more}", "correct it; defaults from here on"
        )
    count = len(loaded.sources)
    return loaded.config, Finding("config", Level.OK, f"{found}, {count} polic{'y' if count == 1 else 'ies'}")


# -- the machine -------------------------------------------------------------------------------------------


def check_python(machine: Machine) -> Finding:
    level = Level.OK if sys.version_info >= (3, 11) else Level.FAIL
    return Finding(
        "python", level, platform.python_version(), "" if level is Level.OK else "use 3.11 or later"
    )


def check_kernel(machine: Machine) -> Finding:
    release = machine.read("proc/sys/kernel/osrelease").strip()
    if numbers(release) < KERNEL_MIN:
        return Finding("kernel", Level.FAIL, release, "use Linux 5.14 or later")
    return Finding("kernel", Level.OK, release)


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def check_btf(machine: Machine) -> Finding:
    path = machine.root / BTF.relative_to("/")
    if not path.exists():
        return Finding(
            "btf", Level.FAIL, f"no {path}", "use a kernel with CONFIG_DEBUG_INFO_BTF=y, as Debian's are"
        )
    return Finding("btf", Level.OK, str(path))


def check_capabilities(machine: Machine) -> Finding:
    effective = int((re.findall(r"^CapEff:\s*(\w+)", machine.read("proc/self/status"), re.M) or ["0"])[0], 16)
    lacking = [name for bit, name in CAPABILITIES.items() if not effective >> bit & 1]
    if lacking:
        advice = "run it as root, or in a container with " + " ".join(
            f"--cap-add {name.removeprefix('CAP_')}" for name in lacking
        )
        return Finding("capabilities", Level.FAIL, f"no {', '.join(lacking)}", advice)
    wanting = [name for bit, name in USEFUL.items() if not effective >> bit & 1]
    if wanting:
        advice = "; ".join(
            f"--cap-add {name.removeprefix('CAP_')}: without, {WITHOUT[name]}" for name in wanting
        )
        return Finding("capabilities", Level.WARN, f"no {', '.join(wanting)}", advice)
    return Finding("capabilities", Level.OK, ", ".join((*CAPABILITIES.values(), *USEFUL.values())))


def check_processes(machine: Machine) -> Finding:
    """The kernel's second process is seen in the first pid namespace alone."""
    if machine.in_container and machine.read("proc/2/comm").strip() != "kthreadd":
        advice = "--pid host: without, starts through `isolator oci-runtime` wait in vain"
        return Finding("processes", Level.WARN, "the host's are not seen", advice)
    return Finding("processes", Level.OK, "the host's are seen")


def check_apparmor(machine: Machine) -> Finding:
    profile = machine.read("proc/self/attr/current").strip("\0\n ")
    if profile.startswith("docker-default"):
        return Finding(
            "apparmor", Level.FAIL, f"{profile} denies mounts", "--security-opt apparmor=unconfined"
        )
    return Finding("apparmor", Level.OK, profile or "none")


def check_sysctls(machine: Machine) -> Finding:
    path = machine.root / "proc/sys/net/ipv4/conf/default/rp_filter"
    if not os.access(path, os.W_OK):
        return Finding(
            "sysctls", Level.FAIL, f"{path} cannot be written", "--security-opt systempaths=unconfined"
        )
    return Finding("sysctls", Level.OK, "/proc/sys/net can be written")


def check_cgroup(machine: Machine) -> Finding:
    kinds = {
        line.split()[2] for line in machine.read("proc/self/mounts").splitlines() if len(line.split()) > 2
    }
    version = {(True, True): "v1 and v2", (True, False): "v1", (False, True): "v2"}.get(
        ("cgroup" in kinds, "cgroup2" in kinds), "none mounted"
    )
    return Finding("cgroup", Level.OK, f"{version}; either will do")


# -- the kernel's parts ------------------------------------------------------------------------------------


def check_libbpf(machine: Machine) -> Finding:
    try:
        library()
    except DatapathError as error:
        return Finding("libbpf", Level.FAIL, str(error), "install libbpf1, 1.1 or later")
    return Finding("libbpf", Level.OK, "libbpf.so.1")


def check_datapath(machine: Machine) -> Finding:
    try:
        probe.in_scratch_netns(probe.datapath_loads)
    except (DatapathError, OSError) as error:
        return Finding(
            "datapath", Level.FAIL, str(error), "the kernel must allow this: see kernel, btf, capabilities"
        )
    return Finding("datapath", Level.OK, "programs load; tc, XDP, ring buffer and TPACKET_V3 work")


def check_bridge_firewall(machine: Machine) -> Finding:
    try:
        probe.in_scratch_netns(probe.bridge_firewall)
    except (DatapathError, OSError) as error:
        needed = (
            machine.config is not None and machine.config.new_containers == "closed" and machine.wants_engine
        )
        advice = "install libnftables1, load nf_tables_bridge, or set `new_containers: open`"
        return Finding("nf_tables", Level.FAIL if needed else Level.WARN, str(error), advice)
    return Finding("nf_tables", Level.OK, "libnftables.so.1, bridge family")


def check_bpffs(machine: Machine) -> Finding:
    path = machine.root / BPFFS.relative_to("/")
    if filesystem_of(path, machine.read("proc/self/mountinfo")) != "bpf":
        return Finding("bpffs", Level.WARN, f"not mounted at {path}", f"on the host: mount -t bpf bpf {path}")
    try:
        with tempfile.TemporaryDirectory(prefix="isolator-doctor-", dir=path):
            pass
    except OSError as error:
        return Finding("bpffs", Level.FAIL, f"{path}: {error.strerror}", "mount it writable")
    return Finding("bpffs", Level.OK, f"{path}, writable")


def check_pins(machine: Machine) -> Finding:
    try:
        require_shared_pins(machine.read("proc/self/mountinfo"), machine.in_container)
    except DatapathError as error:
        return Finding("netns pins", Level.FAIL, *str(error).split(": "))
    return Finding("netns pins", Level.OK, f"what is pinned below {PINS} outlives the agent")


# -- who else is there -------------------------------------------------------------------------------------


def check_engine(machine: Machine) -> Finding:
    bad = Level.FAIL if machine.wants_engine else Level.WARN
    if not machine.engine.is_socket():
        advice = (
            "start the engine, or correct runtime.socket"
            if machine.wants_engine
            else "fine without containers"
        )
        return Finding("engine", bad, f"no socket at {machine.engine}", advice)
    try:
        version = engine_version(machine.engine)
    except (OSError, HTTPException, ValueError) as error:
        return Finding("engine", bad, f"{machine.engine} does not answer: {error}", "start the engine")
    if numbers(version) < ENGINE_MIN:
        return Finding("engine", bad, f"Docker {version}", "use Docker 20.10 or later")
    return Finding("engine", Level.OK, f"Docker {version} at {machine.engine}")


def engine_version(socket: Path) -> str:
    """As the engine tells it. Raises OSError, HTTPException or ValueError."""
    connection = UnixConnection(socket, ENGINE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", "/version", headers={"host": "docker"})
        answer: Any = json.loads(connection.getresponse().read())
    if not isinstance(answer, dict) or "Version" not in answer:
        raise ValueError("it tells no version")
    return str(answer["Version"])


def check_attached(machine: Machine) -> Finding:
    found = probe.attached_programs()
    if not found:
        return Finding("tc, XDP", Level.OK, "nobody has attached anything to a veth here")
    return Finding("tc, XDP", Level.OK, "; ".join(found), "nothing: they stay as they are")


def check_agent(machine: Machine) -> Finding:
    lock = machine.state_dir / "agent.lock"
    pid = holder(lock)
    if pid is None:
        return Finding("agent", Level.OK, f"none runs on {machine.state_dir}")
    try:
        Client(machine.state_dir / "isolator.sock", ENGINE_SECONDS).status()
    except ClientError as error:
        return Finding(
            "agent", Level.FAIL, f"pid {pid}: {error}", "wait if it has just started, else restart it"
        )
    return Finding("agent", Level.OK, f"pid {pid} runs on {machine.state_dir} and answers")


def holder(lock: Path) -> str | None:
    """Who holds it; None: nobody."""
    try:
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "?"
    except FileNotFoundError:
        pass
    return None


def check_state_dir(machine: Machine) -> Finding:
    folder = next(each for each in (machine.state_dir, *machine.state_dir.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(
            "state_dir", Level.FAIL, f"{folder}: {error.strerror}", "make it writable, or mount one"
        )
    return Finding("state_dir", Level.OK, f"{machine.state_dir} can be written")


CHECKS: dict[str, Check] = {
    "python": check_python,
    "kernel": check_kernel,
    "btf": check_btf,
    "capabilities": check_capabilities,
    "processes": check_processes,
    "apparmor": check_apparmor,
    "sysctls": check_sysctls,
    "cgroup": check_cgroup,
    "libbpf": check_libbpf,
    "datapath": check_datapath,
    "nf_tables": check_bridge_firewall,
    "bpffs": check_bpffs,
    "netns pins": check_pins,
    "engine": check_engine,
    "tc, XDP": check_attached,
    "agent": check_agent,
    "state_dir": check_state_dir,
}
"""By the name in the table, in its order."""
