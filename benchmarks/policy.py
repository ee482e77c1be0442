"""The one policy that every system gets, in its own language.

    port 80          GET, HEAD under /api/v1/
    port 8081        POST to /upload
    port 9091        any TCP
    everything else  denied

With `rules`, so many more paths are allowed: /rules/0/, /rules/1/ … For layer 4, so many more sources and ports.
"""

from __future__ import annotations

from benchmarks.place import PAGE

ALLOWED, DENIED = PAGE, "/admin/secrets"
PREFIX_ALLOWED, UPLOAD_PATH = "/api/v1/", "/upload"
METHODS = ("GET", "HEAD")


def rule_path(number: int) -> str:
    return f"/rules/{number}/"


def rule_source(number: int) -> tuple[str, int]:
    """An address that nobody here has, and a port."""
    return f"10.{100 + number // 65536}.{number // 256 % 256}.{number % 256}", 10_000 + number % 50_000
