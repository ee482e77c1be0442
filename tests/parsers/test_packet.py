"""Segments read and built; scapy is the oracle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsers.errors import DissectError
from parsers.packet import ACK, FIN, PSH, VNET, SegmentTemplate, parse_segment, tcp_checksum_ok


def frame(version: int, payload: bytes = b"hello", **tcp: object) -> bytes:
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether

    network = IP(src="10.9.0.1", dst="10.9.0.2") if version == 4 else IPv6(src="fd00::1", dst="fd00::2")
    ports = {"sport": 40000, "dport": 80, "seq": 7, "ack": 9, "flags": "PA"}
    ether = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    return bytes(ether / network / TCP(**{**ports, **tcp}) / payload)


@pytest.mark.parametrize("version", [4, 6])
def test_a_segment_is_read(version: int) -> None:
    data = frame(version, options=[("Timestamp", (11, 12))])
    segment = parse_segment(memoryview(data))
    assert (segment.seq, segment.ack, segment.flags) == (7, 9, PSH | ACK)
    assert data[segment.payload_at : segment.payload_end] == b"hello"
    assert (segment.source_port(data), segment.destination_port(data)) == (40000, 80)
    assert segment.timestamps(data) == (11, 12)
    assert tcp_checksum_ok(data, segment)
    assert not tcp_checksum_ok(data[:-1] + b"O", segment)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("payload", [b"", b"x", b"abc" * 400])
def test_a_built_segment_is_what_scapy_reads(version: int, payload: bytes) -> None:
    from scapy.layers.inet import TCP
    from scapy.layers.l2 import Ether

    data = frame(version)
    template = SegmentTemplate.like(data, parse_segment(data))
    built = template.reversed().build(100, 200, ACK | FIN, payload, 500, (1, 2))
    whole = Ether(built[VNET:])
    assert (whole.src, whole[TCP].sport, whole[TCP].seq, whole[TCP].ack) == (
        "02:00:00:00:00:02",
        80,
        100,
        200,
    )
    assert bytes(whole[TCP].payload) == payload and dict(whole[TCP].options)["Timestamp"] == (1, 2)
    del whole[TCP].chksum  # the kernel completes it: over the pseudo header's sum that stands there
    expected = Ether(bytes(whole))
    start = parse_segment(built[VNET:]).l4
    from parsers.checksum import internet_checksum

    completed = internet_checksum(built[VNET + start :])
    assert completed == expected[TCP].chksum
    if version == 4:
        assert Ether(built[VNET:]).payload.chksum == expected.payload.chksum


@given(st.binary(max_size=120))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for begin in (b"", bytes(12) + b"\x08\x00\x45", bytes(12) + b"\x86\xdd\x60"):
        try:
            segment = parse_segment(begin + data)
        except DissectError:
            continue
        assert segment.payload_at <= segment.payload_end <= len(begin + data)
        segment.timestamps(begin + data)
