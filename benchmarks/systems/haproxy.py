"""HAProxy: HTTP mode, one thread."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.place import BULK, HTTP, UPLOAD, Place
from benchmarks.policy import METHODS, PREFIX_ALLOWED, UPLOAD_PATH, more_paths
from benchmarks.systems.proxy import PLAIN, Proxy

CONFIG = f"""\
global
  nbthread 1
  maxconn 9500
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  http-reuse always
frontend pages
  bind :{HTTP}
  acl read method {" ".join(METHODS)}
  acl path path_beg -f FOLDER/paths
  http-request deny unless read path
  default_backend pages
frontend uploads
  bind :{UPLOAD}
  acl post method POST
  acl path path {UPLOAD_PATH}
  http-request deny unless post path
  default_backend uploads
listen bulk
  bind :{BULK}
  mode tcp
  server server {PLAIN}:{BULK}
backend pages
  server server {PLAIN}:{HTTP}
backend uploads
  server server {PLAIN}:{UPLOAD}
"""


class Haproxy(Proxy):
    name = "haproxy"
    commands, asks_version = ("haproxy",), ("-v",)
    set_up = (
        "One thread, keep-alive to the server (http-reuse always), no log. Allowed paths are one pattern file, which "
        "HAProxy keeps as a prefix tree. Bulk in TCP mode."
    )

    def __init__(self) -> None:
        super().__init__()
        self._replaced: subprocess.Popen[str] | None = None

    def config(self, rules: int = 0, policy: bool = True, extra: bool = False) -> str:
        if policy:
            return CONFIG
        return "".join(line for line in CONFIG.splitlines(True) if "http-request deny" not in line)

    def write(self, folder: Path, config: str, rules: int, extra: bool) -> None:
        super().write(folder, config, rules, extra)
        paths = (PREFIX_ALLOWED, *more_paths(rules, extra))
        (folder / "paths").write_text("".join(f"{path}\n" for path in paths))

    def command(self, folder: Path) -> tuple[str, ...]:
        return ("haproxy", "-db", "-q", "-f", str(folder / "config"))

    def reload(self, place: Place, folder: Path) -> None:
        """A second process takes the sockets over and tells the first to finish (-sf)."""
        self._forget_replaced(place)
        self._replaced = self._process
        assert self._replaced is not None
        self._process = place.start(self.name, *self.command(folder), "-sf", str(self._replaced.pid))

    def stop(self, place: Place) -> None:
        super().stop(place)
        self._forget_replaced(place)

    def _forget_replaced(self, place: Place) -> None:
        if self._replaced is not None:
            place.end(self._replaced)
            self._replaced = None
