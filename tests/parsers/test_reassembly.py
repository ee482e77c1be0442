"""The first copy wins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsers.errors import HeldFull, OutOfWindow, Overlap
from parsers.reassembly import Reassembler, Record, seq_lt, seq_sub

BASE = 0xFFFFFFF0
TEXT = bytes(range(200))


@given(st.lists(st.tuples(st.integers(-20, 180), st.integers(0, 60)), max_size=30))
def test_any_cut_of_one_text_comes_back_in_order(cuts: list[tuple[int, int]]) -> None:
    stream, known = Reassembler(BASE), set[int]()
    for at, length in cuts:
        low = max(at, 0)
        piece = TEXT[low : at + length] if at + length > 0 else b""
        stream.insert((BASE + at) & 0xFFFFFFFF, bytes(min(max(-at, 0), length)) + piece)
        known.update(range(low, min(at + length, len(TEXT))))
    whole = next(n for n in range(len(TEXT) + 1) if n not in known)
    assert bytes(stream.data) == TEXT[:whole]
    assert stream.held == len(known)
    stream.consume(whole)
    assert not stream.data and stream.next == (BASE + whole) & 0xFFFFFFFF


def test_a_different_copy_changes_nothing() -> None:
    stream = Reassembler(10)
    stream.insert(12, b"cd")
    with pytest.raises(Overlap):
        stream.insert(10, b"abXY")
    stream.insert(10, b"ab")
    assert bytes(stream.data) == b"abcd"


def test_bounds() -> None:
    stream = Reassembler(0, 10)
    with pytest.raises(OutOfWindow):
        stream.insert(11, b"x")
    with pytest.raises(HeldFull):
        stream.insert(5, b"xxxxxx")
    assert stream.held == 0


def test_consuming_beyond_what_is_held() -> None:
    stream = Reassembler(0)
    stream.insert(0, b"ab")
    stream.insert(5, b"fghij")
    stream.consume(7)
    assert (stream.next, bytes(stream.data)) == (7, b"hij")


def test_record() -> None:
    record = Record()
    record.append(BASE, b"0123456789")
    record.append((BASE + 20) & 0xFFFFFFFF, b"abc")
    assert record.matches(BASE + 2, b"234") is True
    assert record.matches(BASE + 2, b"2x4") is False
    assert record.matches(BASE + 8, b"89ab") is None
    assert record.since(BASE + 4) == b"456789"
    record.acknowledge((BASE + 10) & 0xFFFFFFFF)
    assert len(record) == 3 and record.matches(BASE, b"0") is None


def test_numbers_compare_across_the_wrap() -> None:
    assert seq_lt(0xFFFFFFFF, 0) and not seq_lt(0, 0xFFFFFFFF) and seq_sub(1, 0xFFFFFFFF) == 2
