"""A request for tests of policy: the part of parsers.http1.Request that rules look at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    method: str = "GET"
    path: str = "/"
    host: str | None = "api.local"
    headers: tuple[tuple[str, str], ...] = ()
    upgrade: str | None = None
    readings: tuple[str, ...] = ()

    @property
    def connect(self) -> bool:
        return self.method == "CONNECT"
