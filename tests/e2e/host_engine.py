"""Engines for the agent's image: one that builds it, and one that stands for a host that runs it.

    base image ──▶ BuildEngine: docker build ──▶ the same data ──▶ HostEngine: docker run, as documented

The build needs what the machine reaches (package registries), so its engine is in the machine's own network, and is
told to leave that alone: no bridge, no firewall rules, no forwarding. The host engine has a network namespace as in
docker_engine.py, and a mount namespace besides, with a /run, an /etc and a bpffs of its own: in there the documented
paths are what they are on a host, shared mounts included, and nothing of the machine is touched.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import docker  # type: ignore[import-untyped]

from isolator.lab import wait_for
from tests.e2e.docker_engine import Engine

UNTOUCHED = (
    "--bridge=none",
    "--iptables=false",
    "--ip6tables=false",
    "--ip-forward=false",
    "--ip-masq=false",
)

PREPARE = """\
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t bpf bpf /sys/fs/bpf
mkdir /run/lock /run/etc
cp -a /etc/. /run/etc
cp -rT deploy/isolator /run/etc/isolator
mount --bind /run/etc /etc
mount --make-rshared /
exec dockerd -H unix:///run/docker.sock -H unix://{root}/d.sock --pidfile {root}/d.pid --data-root {root}/data \
  --shutdown-timeout 2 {runtimes}
"""
"""As systemd leaves a host: every mount is shared, /run is a tmpfs, /sys/fs/bpf a bpffs. /etc is a copy."""


class BuildEngine(Engine):
    """In the machine's network. The context manager keeps `root/data`; `clear` takes it away."""

    def __enter__(self) -> BuildEngine:
        self.clear()
        self.root.mkdir(parents=True)
        self.launch(
            "dockerd", "-H", f"unix://{self.socket}", "--pidfile", f"{self.root}/d.pid",
            "--data-root", f"{self.root}/data", "--exec-root", f"{self.root}/exec", *UNTOUCHED,
        )  # fmt: skip
        return self

    def launch(self, *command: str) -> None:
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(self._listens, f"the engine does not come up: {self.root}/log", 60)
        self.client = docker.DockerClient(f"unix://{self.socket}", timeout=600)
        self.client.ping()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _left(self) -> list[int]:
        """Also what is in the namespace: shims and agents of a host engine do not name our folder."""
        told = subprocess.run(["ip", "netns", "pids", self.netns], capture_output=True, text=True).stdout
        inside = [int(pid) for pid in told.split()]
        children: list[int] = []
        for pid in inside:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                for path in Path(f"/proc/{pid}/task").glob("*/children"):
                    children += map(int, path.read_text().split())
        return [*children, *super()._left(), *inside]

    def build(self, context: Path, tag: str) -> str:
        """Builds the Dockerfile in `context`; returns what the build said. Raises BuildError."""
        _, told = self.client.images.build(
            path=str(context), tag=tag, network_mode="host", rm=True, forcerm=True
        )
        return "".join(str(line.get("stream", "")) for line in told)


class HostEngine(BuildEngine):
    """A host with an engine, over the data that a BuildEngine left in the same folder."""

    def __enter__(self) -> HostEngine:
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        subprocess.run(["ip", "-n", self.netns, "link", "set", "lo", "up"], check=True)
        self.start()
        return self

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        enter = [
            "nsenter",
            f"--net=/run/netns/{self.netns}",
            "unshare",
            "--mount",
            "--propagation",
            "unchanged",
        ]
        runtimes = " ".join(f"--add-runtime {name}={path}" for name, path in self.runtimes.items())
        prepare = PREPARE.format(root=self.root, runtimes=runtimes)
        self.launch(*enter, "sh", "-ec", prepare)

    def __exit__(self, *arguments: object) -> None:
        Engine.__exit__(self, *arguments)

    # -- on the host -----------------------------------------------------------------------------------------

    def entered(self, *command: str) -> list[str]:
        """The command on the host: in the engine's mount and network namespaces."""
        assert self.process is not None
        return ["nsenter", "-t", str(self.process.pid), "--mount", "--net", f"--wd={Path.cwd()}", *command]

    def host(self, *command: str, check: bool = True, stdin: str = "") -> str:
        """What a command prints on the host."""
        done = subprocess.run(
            self.entered(*command), input=stdin, capture_output=True, text=True, timeout=120
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def cli(self, *words: str, check: bool = True) -> str:
        """The docker command on the host, of the same release as the engine."""
        return self.host("/usr/bin/docker", *words, check=check)

    def fetch(self, name: str, url: str) -> str:
        sandbox = self.client.containers.get(name).attrs["NetworkSettings"]["SandboxKey"]
        told = self.host(
            "nsenter", f"--net={sandbox}", "curl", "-s", "-m", "2", "-w", "\n%{http_code}", url, check=False
        )
        body, _, status = told.rpartition("\n")
        return body if status == "200" else status
