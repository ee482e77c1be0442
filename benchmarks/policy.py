"""The one policy that every system gets, in its own language.

    port 80          GET, HEAD under /api/v1/ (8082 to 8085 as well: for idle connections)
    port 8081        POST to /upload
    port 9091        any TCP
    everything else  denied

With `rules`, so many more paths are allowed: /rules/0/, /rules/1/ … For layer 4, so many more sources and ports.
With `extra`, /extra/ as well; for layer 4, port 9090.
"""

from __future__ import annotations

from benchmarks.place import BULK, EXTRA_PORT, HOLD, HTTP, PAGE, UPLOAD

ALLOWED, DENIED = PAGE, "/admin/secrets"
PREFIX_ALLOWED, UPLOAD_PATH, EXTRA_PREFIX = "/api/v1/", "/upload", "/extra/"
METHODS = ("GET", "HEAD")


def rule_path(number: int) -> str:
    return f"/rules/{number}/"


def more_paths(rules: int, extra: bool) -> list[str]:
    """What is allowed besides PREFIX_ALLOWED."""
    return [*map(rule_path, range(rules)), *([EXTRA_PREFIX] if extra else [])]


def allowed_ports(extra: bool) -> list[int]:
    """For layer 4."""
    return [HTTP, UPLOAD, BULK, *HOLD, *([EXTRA_PORT] if extra else [])]


def rule_source(number: int) -> tuple[str, int]:
    """An address that nobody here has, and a port."""
    return f"10.{100 + number // 65536}.{number // 256 % 256}.{number % 256}", 10_000 + number % 50_000
