"""debian:12-slim without a registry: a minimal tree made with the machine's own package settings, imported.

Those settings (apt's sources, pip's and uv's index, the certificates they are reached with) go into the image of the
test, so that its build reaches the same places. None of them stands in a file here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TAG = "debian:12-slim"
TARBALL = Path("build/debian-12-slim.tar")
SUITE = "bookworm"
CERTIFICATES = "/etc/ssl/machine.pem"
SETTINGS = [
    "etc/apt/sources.list",
    "etc/apt/sources.list.d",
    "etc/apt/keyrings",
    "usr/share/keyrings",
    "etc/apt/auth.conf.d",
    "etc/pip.conf",
    "etc/uv",
    "root/.config/pip",
    "root/.config/uv",
]
SLIM = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "var/lib/apt/lists",
    "var/cache/apt/archives",
]
"""What debian:12-slim leaves out besides, and no package of ours needs."""
VARIABLES = [
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "UV_INDEX_URL",
    "UV_DEFAULT_INDEX",
    "UV_INDEX",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
]


def import_base(client: Any) -> None:
    """Imports the image; the tarball is made once."""
    if not TARBALL.exists():
        make(TARBALL)
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    variables |= {"SSL_CERT_FILE": CERTIFICATES, "PIP_CERT": CERTIFICATES}
    client.api.import_image_from_file(
        str(TARBALL), *TAG.split(":"), changes=[f"ENV {name}={value}" for name, value in variables.items()]
    )


def make(tarball: Path) -> None:
    root = tarball.with_suffix("")
    shutil.rmtree(root, ignore_errors=True)
    tarball.parent.mkdir(exist_ok=True)
    try:
        bootstrap(root)
        for name in SLIM:
            shutil.rmtree(root / name, ignore_errors=True)
            (root / name).mkdir()
        for name in SETTINGS:
            copy(Path("/", name), root / name)
        (root / "etc/apt/apt.conf.d/machine").write_text(apt_settings())
        copy(Path("/etc/ssl/certs/ca-certificates.crt"), root / CERTIFICATES[1:])
        unfinished = tarball.with_suffix(".unfinished")
        subprocess.run(["tar", "-C", str(root), "-cf", str(unfinished), "."], check=True)
        unfinished.rename(tarball)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def bootstrap(root: Path) -> None:
    command = ["debootstrap", "--variant=minbase", SUITE, str(root), *list(mirrors())[:1]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if done.returncode:
        raise AssertionError(f"debootstrap failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def mirrors() -> Iterator[str]:
    """The archives that the machine's apt installs this release from; none: debootstrap's own."""
    for path in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        for stanza in path.read_text().split("\n\n"):
            fields = dict(re.findall(r"^(\w[\w-]*):[ \t]*(.*)$", stanza, re.MULTILINE))
            if SUITE in fields.get("Suites", "").split() and "deb" in fields.get("Types", ""):
                yield fields["URIs"].split()[0]
    for path in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.list"))):
        if path.exists():
            yield from re.findall(rf"^deb\s+(?:\[.*?\]\s+)?(\S+)\s+{SUITE}\s", path.read_text(), re.MULTILINE)


def apt_settings() -> str:
    """How the machine's apt reaches its sources."""
    told = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    kept = ("Acquire::Check-", "Acquire::http", "Acquire::Retries")
    return "".join(line for line in told.splitlines(keepends=True) if line.startswith(kept))


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
