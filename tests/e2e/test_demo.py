"""The demo's checks, with each kind of XDP: real veths, ring, BPF, nginx and curl."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.root
@pytest.mark.parametrize("xdp", ["off", "native", "generic"])
def test_every_check_of_the_demo_passes(xdp: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "isolator.demo", "--json", "--xdp", xdp],
        capture_output=True,
        text=True,
        timeout=240,
    )
    told = json.loads(done.stdout)
    assert [check for check in told["checks"] if not check["ok"]] == [], done.stderr
    assert told["total"] >= 14
    assert done.returncode == 0
