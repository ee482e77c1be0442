"""What load generators print: a figure, or an error where one hides in it."""

from __future__ import annotations

import json

import pytest

from benchmarks.load import LoadError, Wrk, all_refused, clean, parse_iperf, parse_transfer, parse_wrk

RESULT = (
    'RESULT {"requests":%d,"us":2000000,"bytes":5,"p50":100,"p99":200,"p999":300,"status":%d,"connect":0,"read":%d,'
    '"write":0,"timeout":0}'
)
PRINTED = f"Running 2s test\n  1 threads and 32 connections\nRequests/sec: 1\n{RESULT}\n"


def test_wrk() -> None:
    told = parse_wrk(PRINTED % (1000, 0, 0))
    assert told == Wrk(1000, 2.0, 100, 200, 300, 0, 0)
    assert told.rate == 500
    assert clean(told) is told


@pytest.mark.parametrize("seen", [(1000, 1, 0), (1000, 0, 1), (0, 0, 0)])
def test_wrk_with_errors_is_no_figure(seen: tuple[int, int, int]) -> None:
    with pytest.raises(LoadError, match="errors hide"):
        clean(parse_wrk(PRINTED % seen))


def test_wrk_that_printed_no_result() -> None:
    with pytest.raises(LoadError, match="unable to connect"):
        parse_wrk("unable to connect to 10.9.0.2:80 Connection refused")


def test_refused_means_all() -> None:
    all_refused(parse_wrk(PRINTED % (1000, 1000, 3)))
    with pytest.raises(LoadError, match="1 of 1000 forbidden requests"):
        all_refused(parse_wrk(PRINTED % (1000, 999, 0)))


def test_iperf() -> None:
    told = {"end": {"sum_received": {"bits_per_second": 18.5e9}, "sum_sent": {"bits_per_second": 20e9}}}
    assert parse_iperf(json.dumps(told)) == 18.5


@pytest.mark.parametrize(
    ("printed", "why"),
    [
        ('{"start": {}, "end": {}, "error": "unable to connect to server"}', "unable to connect"),
        ('{"end": {"sum_received": {"bits_per_second": 0}}}', "nothing was received"),
        ("", "no JSON"),
    ],
)
def test_iperf_with_errors_is_no_figure(printed: str, why: str) -> None:
    with pytest.raises(LoadError, match=why):
        parse_iperf(printed)


def test_transfer() -> None:
    assert parse_transfer("200 1500.5\n") == 1500.5
    for printed in ("403 20000", "", "413 1"):
        with pytest.raises(LoadError, match="answered"):
            parse_transfer(printed)
