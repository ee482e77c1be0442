"""One bench for all tests here; each begins with an empty one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bpf.bench import Bench, bench


@pytest.fixture(scope="session")
def splice() -> Iterator[Bench]:
    with bench() as made:
        yield made


@pytest.fixture
def b(splice: Bench) -> Bench:
    splice.reset()
    return splice
