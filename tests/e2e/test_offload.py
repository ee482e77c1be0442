"""People see which requests the kernel decided, and why not the others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolator.demo import COUNTED_WITHIN, get
from isolator.lab import ALLOWED, API, DENIED, PREFIX, STATE, Lab, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(Path("/tmp") / f"{PREFIX}-offload", "off") as made:
        made.start_agent()
        yield made


def isolator(*arguments: str) -> str:
    command = [sys.executable, "-m", "isolator.cli", *arguments, "--socket", str(STATE / "isolator.sock")]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def offload() -> dict[str, Any]:
    time.sleep(COUNTED_WITHIN)
    seen: dict[str, Any] = json.loads(isolator("offload", "--json"))
    return seen


def read_books(seen: dict[str, Any]) -> dict[str, Any]:
    (found,) = (each for each in seen["profiles"] if "api-allow/read-books" in each["rules"])
    return dict(found)


def test_requests_are_counted_by_who_decided_them_and_through_policies(lab: Lab) -> None:
    assert lab.talk(*[get(ALLOWED)] * 5) == "200 200 200 200 200"
    assert lab.curl("web", f"http://{API}{DENIED}") == "403"
    assert lab.curl("web", f"http://{API}{ALLOWED}", "--http1.0", "-o", "/dev/null") == ""
    seen = offload()
    told = read_books(seen)
    assert told["requests"] == seen["requests"] == {"kernel": 5, "python": 2}
    assert told["why"] == {"denied": 1, "HTTP/1.0": 1}
    assert (told["endpoints"], told["ports"], told["left_out"]) == (["api"], ["ingress tcp/80"], [])
    assert seen["states"] > told["states"] > 10
    assert "requests: 71 % in the kernel" in isolator("status").splitlines()

    decided = [line.rpartition(" · ")[2] for line in isolator("flows").splitlines() if "GET" in line]
    assert decided == ["kernel"] * 5 + ["python", "python (HTTP/1.0)"]

    generation = lab.ask("/v1/status")["generation"]
    lab.talk(get(ALLOWED))
    lab.policy(path="/api/**")  # at once: what was not taken yet must not be lost
    wait_for(lambda: bool(lab.ask("/v1/status")["generation"] > generation), "the policy is not in force")
    assert lab.talk(get(ALLOWED)) == "200"
    lab.policy()
    wait_for(lambda: bool(lab.ask("/v1/status")["generation"] > generation + 1), "the policy is not in force")
    assert lab.talk(get(ALLOWED)) == "200"
    seen = offload()
    assert seen["requests"] == {"kernel": 8, "python": 2}
    assert read_books(seen)["requests"] == {"kernel": 7, "python": 2}  # the first profile's, again

    address = ["--unix-socket", str(STATE / "isolator.sock"), "http://isolator/metrics"]
    metrics = subprocess.run(["curl", "-s", *address], capture_output=True, text=True, check=True).stdout
    assert 'isolator_http_requests_total{by="kernel"} 8.0' in metrics
    assert 'isolator_http_requests_python_reasons_total{reason="VERSION"} 1.0' in metrics
    counted = (
        'isolator_decisions_total{policy="api-allow",reason="",rule="read-books",verdict="FORWARDED"} 9.0'
    )
    assert counted in metrics
