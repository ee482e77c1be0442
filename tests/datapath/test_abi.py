"""Python's layouts are the compiler's, and what is packed comes back."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.core.model import Direction, DropReason, FlowFlag, Owner, PuntReason, Side, Verdict
from isolator.datapath import abi
from isolator.datapath.abi import LAYOUTS, Flow4, Flow7, FlowKey, Half, Layout, Port, Word
from tests.header import evaluate, numbers

U8, U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
ADDRESS = st.binary(min_size=16, max_size=16)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_is_the_headers(layout: Layout) -> None:
    struct = f"struct {layout.name}"
    asked = {"": f"sizeof({struct})"}
    for field in layout.offsets:
        asked[field] = f"offsetof({struct}, {field})"
        asked[f"{field} size"] = f"sizeof((({struct} *)0)->{field})"
    found = evaluate(asked)
    assert found.pop("") == layout.size
    assert {field: found[field] for field in layout.offsets} == layout.offsets
    assert {field: found[f"{field} size"] for field in layout.sizes} == layout.sizes


def test_every_number_is_the_headers() -> None:
    header = numbers()
    renamed = {
        "LAYOUT_VERSION": "ISOLATOR_LAYOUT",
        "ENDPOINT_MAX": None,
        "FLOW_KEY_SIZE": None,
        "HALF_SIZE": None,
    }
    mine = {name: value for name, value in vars(abi).items() if name.isupper() and isinstance(value, int)}
    for name, value in mine.items():
        counterpart = renamed.get(name, name)
        assert counterpart is None or header[counterpart] == value, name


CONTEXTS = [
    (0, Side.CONTAINER, PuntReason.NONE, 0),
    (1, Side.NETWORK, PuntReason.PAYLOAD, 7),
    (abi.ENDPOINT_MAX, Side.NETWORK, PuntReason.STATE_LOST, 255),
    (300, Side.CONTAINER, PuntReason.RESET, 0x1FF),
]


@pytest.mark.parametrize(("endpoint", "side", "reason", "incarnation"), CONTEXTS)
def test_punt_context(endpoint: int, side: Side, reason: PuntReason, incarnation: int) -> None:
    ours = abi.punt_context(endpoint, side, reason, incarnation)
    theirs = evaluate({"": f"PUNT_CONTEXT({endpoint}, {side}, {reason}, {incarnation})"})[""]
    assert ours == theirs
    assert abi.parse_punt_context(ours) == (endpoint, side, reason, incarnation & 0xFF)


@given(next=U32, owner=st.sampled_from(Owner), punts=st.integers(0, 2**30 - 1))
def test_state_word(next: int, owner: Owner, punts: int) -> None:
    word = Word(next, owner, punts)
    assert Word.unpack(word.pack()) == word


def test_state_word_is_the_headers() -> None:
    theirs = evaluate({"": "WORD(0xfffffffe, OWNER_PYTHON, 5)"})[""]
    assert Word.unpack(theirs) == Word(0xFFFFFFFE, Owner.PYTHON, 5)


@given(endpoint=U32, local=ADDRESS, remote=ADDRESS, ports=st.tuples(U16, U16), protocol=U8)
def test_flow_key(endpoint: int, local: bytes, remote: bytes, ports: tuple[int, int], protocol: int) -> None:
    key = FlowKey(endpoint, local, remote, *ports, protocol)
    assert FlowKey.unpack(key.pack()) == key and len(key.pack()) == abi.FLOW_KEY.size


def test_flow_key_has_ports_as_on_the_wire() -> None:
    key = abi.flow_key(1, bytes(16), bytes(16), 80, 0x1234, 6)
    at = abi.FLOW_KEY.offsets
    assert key[at["local_port"] :][:2] == b"\x00\x50" and key[at["remote_port"] :][:2] == b"\x12\x34"


HALVES = st.builds(
    Half,
    word=st.builds(Word, U32, st.sampled_from(Owner), st.integers(0, 2**30 - 1)),
    remaining=U64,
    mode=U32,
    acked=U32,
    windows=st.lists(st.tuples(U32, U32).filter(lambda w: w[0] != w[1]), max_size=4).map(tuple),
    record_seq=U32,
    record=st.binary(max_size=abi.RECORD_MAX),
    flags=U8,
)
FLOWS7 = st.builds(
    Flow7,
    last_seen=U64,
    packets=st.tuples(U64, U64),
    octets=st.tuples(U64, U64),
    profile=U32,
    rule=U32,
    generation=U32,
    identity=U32,
    pending_seq=U32,
    incarnation=U32,
    initiator=st.sampled_from(Direction),
    state=st.integers(0, 3),
    flags=st.just(FlowFlag.FAIL_OPEN),
    reason=st.sampled_from(DropReason),
    start=U32,
    automaton=U32,
    half=st.tuples(HALVES, HALVES),
)


@given(FLOWS7)
def test_inspected_flow(flow: Flow7) -> None:
    assert Flow7.unpack(flow.pack()) == flow
    assert flow.client is flow.half[flow.initiator] and flow.server is flow.half[1 - flow.initiator]


def test_windows_come_oldest_first() -> None:
    half = bytearray(
        Half(Word(0, Owner.KERNEL, 0), 0, 0, 0, ((1, 2), (3, 4), (5, 6), (7, 8)), 0, b"", 0).pack()
    )
    half[abi.HALF.offsets["window_at"]] = 6  # two more were written since
    assert Half.unpack(half).windows == ((5, 6), (7, 8), (1, 2), (3, 4))


def test_layer_4_flow() -> None:
    data = abi.FLOW4.struct.pack(1, 2, 3, 4, 5, 6, 7, 8, Verdict.DROP, DropReason.POLICY_DENY, 1, 1)
    expected = Flow4(
        (1, 2), (3, 4), 5, 6, 7, 8, Verdict.DROP, DropReason.POLICY_DENY, Direction.EGRESS, FlowFlag.AUDIT
    )
    assert Flow4.unpack(data) == expected


def test_port() -> None:
    port = Port(7, 3, Side.NETWORK, b"\x02\x00\x00\x00\x00\x01", abi.PORT_XDP_FORWARD)
    assert Port.unpack(port.pack()) == port


NETWORKS = [
    ("10.9.0.0/16", bytes(10) + b"\xff\xff\x0a\x09\x00\x00", 112),
    ("0.0.0.0/0", bytes(10) + b"\xff\xff\x00\x00\x00\x00", 96),
    ("::/0", bytes(16), 0),
    ("2001:db8::/32", b"\x20\x01\x0d\xb8" + bytes(12), 32),
]


@pytest.mark.parametrize(("network", "address", "length"), NETWORKS)
def test_prefix(network: str, address: bytes, length: int) -> None:
    assert abi.prefix_of(ip_network(network)) == (address, length)


def test_mapped_address() -> None:
    assert abi.mapped(ip_address("10.9.0.1")) == bytes(10) + b"\xff\xff\x0a\x09\x00\x01"
    assert abi.mapped(ip_address("::1")) == bytes(15) + b"\x01"
