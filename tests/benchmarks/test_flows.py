"""Who holds how many idle connections, and what is said where a bound lets in fewer."""

from __future__ import annotations

import pytest

from benchmarks.load import BoundedError
from benchmarks.suites.base import FULL, QUICK
from benchmarks.suites.flows import MANY, SHARE, Flows, opened, shares
from benchmarks.systems import all_systems


@pytest.mark.parametrize("count", [10, 6_000, SHARE, SHARE + 1, MANY])
def test_shares(count: int) -> None:
    told = shares(count)
    assert sum(told) == count
    assert max(told) <= SHARE and max(told) - min(told) <= 1


def test_opened() -> None:
    opened(["60 \n", "40 \n"], 100)
    with pytest.raises(BoundedError, match=r"90 of 100 connections were let in \(timed out\)"):
        opened(["60 \n", "30 timed out\n"], 100)
    with pytest.raises(BoundedError, match="a holder ended"):
        opened(["60 \n", ""], 100)


def test_proxies_are_left_out_of_more_than_they_can_hold() -> None:
    many = Flows().points(FULL)[0]
    left_out = {system.name: many.not_for(system) for system in all_systems() if many.not_for(system)}
    assert set(left_out) == {"haproxy", "nginx", "envoy"}
    assert all(why.startswith("limit of open files") for why in left_out.values())
    assert Flows().points(QUICK) == []
