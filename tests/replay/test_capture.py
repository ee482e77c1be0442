"""Capture files: each kind gives the same frames, and damage is told."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolator.replay.capture import Captured, CaptureError, read_capture
from tests.replay.captures import START, asked, block, conversation, pcap, pcapng, written

FRAMES = conversation(asked("/a"))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "kind",
    [pcap, pcapng, lambda frames, order: pcap(frames, order, nano=True)],
    ids=["pcap", "pcapng", "nano"],
)
def test_frames_are_read_in_their_order(tmp_path: Path, order: str, kind: Callable[..., bytes]) -> None:
    assert list(read_capture(written(tmp_path / "x", kind(FRAMES, order)))) == FRAMES


def test_nanoseconds_are_kept(tmp_path: Path) -> None:
    frame = FRAMES[0]._replace(time=START + 123_456_789)
    assert list(read_capture(written(tmp_path / "x", pcap([frame], nano=True)))) == [frame]


def test_each_interface_has_its_own_clock(tmp_path: Path) -> None:
    """Options 9, if_tsresol (2^-10 s), and 14, if_tsoffset (100 s)."""
    options = struct.pack("<HHB3xHHqHH", 9, 1, 0x8A, 14, 8, 100, 0, 0)
    data = pcapng([FRAMES[0]._replace(time=2048 * 1000)] * 2, interfaces=[(1, b""), (1, options)])
    assert [each.time for each in read_capture(written(tmp_path / "x", data))] == [2_048_000, 102 * 10**9]


def test_each_section_has_its_own_interfaces(tmp_path: Path) -> None:
    slow = struct.pack("<HHB3xHH", 9, 1, 3, 0, 0)  # if_tsresol: ms
    one = [FRAMES[0]._replace(time=2_000_000)]
    data = pcapng(one, interfaces=[(1, slow)]) + pcapng(one, ">")
    assert [each.time for each in read_capture(written(tmp_path / "x", data))] == [2 * 10**9, 2_000_000]


def test_a_frame_that_was_cut_says_how_long_it_was(tmp_path: Path) -> None:
    cut = Captured(START, FRAMES[0].data[:20], 54)
    for kind in (pcap, pcapng):
        assert list(read_capture(written(tmp_path / "x", kind([cut])))) == [cut]


SIMPLE = pcapng([]) + block(3, struct.pack("<I", 4) + bytes(4))
DAMAGED = pcap([FRAMES[0], FRAMES[0]._replace(data=b"")])[:-16] + struct.pack("<4I", 0, 0, 1 << 30, 0)


@pytest.mark.parametrize(
    ("data", "frames", "told"),
    [
        (b"", 0, "neither pcap nor pcapng"),
        (b"kind: Policy\nmetadata: {}\n", 0, "neither pcap nor pcapng"),
        (pcap([])[:20], 0, "neither pcap nor pcapng"),
        (pcap(FRAMES, link=113), 0, "link type 113, and only Ethernet"),
        (pcapng(FRAMES, interfaces=[(113, b"")]), 0, "link type 113, and only Ethernet"),
        (pcap(FRAMES)[:-3], len(FRAMES) - 1, f"ends in the middle of frame {len(FRAMES)}"),
        (pcap(FRAMES[:2])[: 24 + 16 + 54 + 7], 1, "ends in the middle of frame 2"),
        (pcapng(FRAMES)[:-3], len(FRAMES) - 1, f"ends in the middle of frame {len(FRAMES)}"),
        (DAMAGED, 1, "frame 2 claims 1073741824 bytes"),
        (pcapng([]) + struct.pack("<II", 6, 7), 0, "a block of 7 bytes"),
        (pcapng(FRAMES[:1], interfaces=[(1, b"")])[:28] + pcapng(FRAMES[:1])[48:], 0, "is damaged"),
        (SIMPLE, 0, "packets without an interface or a time"),
    ],
)
def test_what_cannot_be_read_is_told_behind_what_could(
    tmp_path: Path, data: bytes, frames: int, told: str
) -> None:
    path = written(tmp_path / "x.pcap", data)
    given = []
    with pytest.raises(CaptureError, match=told) as error:
        for each in read_capture(path):
            given.append(each)
    assert str(error.value).startswith(f"{path}: ")
    assert len(given) == frames


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="No such file"):
        list(read_capture(tmp_path / "none"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([pcap(FRAMES[:3]), pcapng(FRAMES[:3])]),
    st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), max_size=3),
)
def test_any_bytes_end_in_frames_or_an_error(
    tmp_path: Path, data: bytes, changes: list[tuple[int, bytes]]
) -> None:
    for at, put in changes:
        data = data[:at] + put + data[at + len(put) :]
    with contextlib.suppress(CaptureError):
        list(read_capture(written(tmp_path / "x", data)))
