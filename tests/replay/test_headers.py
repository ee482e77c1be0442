"""Headers, by the kernel's own table of frames (tests/bpf/test_frames.py)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.packet import Packet

from isolator.core.model import DropReason
from isolator.replay.headers import inner_of, read_headers
from tests.bpf.test_frames import FRAMES
from tests.replay.captures import asked, conversation

READ = {"MALFORMED", "LENGTH_MISMATCH", "FRAGMENT", "IP_OPTIONS", "EXTENSION_HEADER", "PROTOCOL"}
UNREADABLE = ("header cut", "version 6", "ARP")
ROWS = [
    row for row in FRAMES if row[2].removeprefix("drop ") in READ and not any(u in row[0] for u in UNREADABLE)
]


@pytest.mark.parametrize(("frame", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_the_reasons_are_the_kernels(frame: Packet | bytes, expected: str) -> None:
    headers = read_headers(memoryview(bytes(frame)))
    assert headers is not None
    assert f"drop {headers.reason.name}" == expected


@pytest.mark.parametrize(
    "frame", [row[1] for row in FRAMES if "header cut" in row[0] or "version 6" in row[0] or row[0] == "LLC"]
)
def test_without_a_whole_ip_header_there_are_none(frame: Packet | bytes) -> None:
    assert read_headers(memoryview(bytes(frame))) is None


def test_padding_of_a_short_frame_is_no_payload() -> None:
    frame = conversation([])[0].data
    headers = read_headers(memoryview(frame + bytes(60 - len(frame))))
    assert headers is not None and headers.segment is not None
    assert (headers.reason, headers.segment.payload_length) == (DropReason.NONE, 0)


@given(st.binary(max_size=120), st.sampled_from([b"\x08\x00\x45", b"\x86\xdd\x60"]))
def test_any_bytes_end_in_headers_or_none(rest: bytes, kind: bytes) -> None:
    view = memoryview(bytes(12) + kind + rest)
    headers = read_headers(view)
    if headers is not None and headers.inner:
        inner_of(view, headers)


@given(st.integers(0, 200), st.binary(min_size=1, max_size=6))
def test_damage_is_no_error(at: int, put: bytes) -> None:
    data = conversation(asked("/a"))[3].data
    read_headers(memoryview((data[:at] + put + data[at + len(put) :])[: len(data)]))
