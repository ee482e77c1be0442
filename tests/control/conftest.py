from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.control.fake_agent import Served, served


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as running:
        yield running
