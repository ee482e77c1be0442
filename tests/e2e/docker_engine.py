"""A Docker engine of the tests' own: in a network namespace, with its own folders and socket, and one image.

No registry is reached: the image is busybox, imported. Where the engine is not installed the tests fail; they do
not pass over it.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker  # type: ignore[import-untyped]

from isolator.lab import wait_for

IMAGE = "isolator-test:1"
APPLETS = ("sh", "sleep", "httpd", "ip", "nc", "tftp", "timeout")


@dataclass
class Engine:
    """`netns`: where the engine's bridges are; `runtimes`: OCI runtimes beside runc. A context manager that leaves
    nothing behind."""

    root: Path
    netns: str
    runtimes: dict[str, Path] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    client: Any = None

    @property
    def socket(self) -> Path:
        return self.root / "d.sock"

    def __enter__(self) -> Engine:
        self.clear()
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        subprocess.run(["ip", "-n", self.netns, "link", "set", "lo", "up"], check=True)
        self.root.mkdir(parents=True)
        self.start()
        self.client.api.import_image_from_data(image(), repository=IMAGE.split(":")[0], tag="1")
        return self

    def start(self) -> None:
        arguments = {
            "--data-root": "data",
            "--exec-root": "exec",
            "--pidfile": "d.pid",
        }  # fmt: skip
        words = [word for key, name in arguments.items() for word in (key, str(self.root / name))]
        words += [
            word for name, path in self.runtimes.items() for word in ("--add-runtime", f"{name}={path}")
        ]
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.netns}", "dockerd", "-H", f"unix://{self.socket}",
                 "--shutdown-timeout", "2", *words],
                stdout=log, stderr=log,
            )  # fmt: skip
        wait_for(self._listens, "the engine does not come up", 60)
        self.client = docker.DockerClient(f"unix://{self.socket}", timeout=60)
        self.client.ping()

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def stop(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)
            self.process = None

    def __exit__(self, *_: object) -> None:
        if self.client is not None:
            for container in self.client.containers.list(all=True):
                with contextlib.suppress(docker.errors.APIError):
                    container.remove(force=True)
        self.stop()
        self.clear()

    def clear(self) -> None:
        """Takes away what this or an earlier run left: processes that name our folder, mounts, the namespace."""
        for pid in self._left():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if Path(f"/run/netns/{self.netns}").exists():
            subprocess.run(["ip", "netns", "del", self.netns], check=True)
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if line.split()[1].startswith(f"{self.root}/"):
                subprocess.run(["umount", "-l", line.split()[1]], check=False)
        shutil.rmtree(self.root, ignore_errors=True)

    def _left(self) -> list[int]:
        """Processes that name our folder, and what they have started: containers before their shims."""
        ours, parents = set(), {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(path.name)
                parents[pid] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if f"{self.root}/".encode() in (path / "cmdline").read_bytes():
                    ours.add(pid)
        return [pid for pid, parent in parents.items() if parent in ours] + sorted(ours)

    # -- containers ------------------------------------------------------------------------------------------

    def run(self, name: str, *command: str, image: str = IMAGE, **options: Any) -> Any:
        """A container in the background, by its name."""
        container = self.client.containers.run(image, list(command), name=name, detach=True, **options)
        container.reload()
        return container

    def make_image(self, tag: str, *changes: str) -> None:
        """The tests' image with a Dockerfile's instructions on top of it."""
        repository, _, version = tag.partition(":")
        self.client.api.import_image_from_data(
            image(), repository=repository, tag=version, changes=list(changes)
        )

    def address(self, name: str, network: str = "bridge") -> str:
        container = self.client.containers.get(name)
        return str(container.attrs["NetworkSettings"]["Networks"][network]["IPAddress"])

    def fetch(self, name: str, url: str) -> str:
        """What curl sees of a page from within the container's network: status and body; 000: no answer."""
        sandbox = self.client.containers.get(name).attrs["NetworkSettings"]["SandboxKey"]
        command = ["nsenter", f"--net={sandbox}", "curl", "-s", "-m", "2", "-w", "\n%{http_code}", url]
        body, _, status = subprocess.run(command, capture_output=True, text=True).stdout.rpartition("\n")
        return body if status == "200" else status


def image() -> bytes:
    """A root file system as a tar: busybox under its applets' names, and a page."""
    busybox, packed = Path("/bin/busybox").read_bytes(), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        add(tar, "bin/busybox", busybox, 0o755)
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for page in ("api/v1/books", "admin/secrets"):
            add(tar, f"www/{page}", page.encode(), 0o644)
    return packed.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))
