"""BTF: that of the maps says what the header says, and whatever bytes there are, reading ends."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.datapath import abi
from isolator.datapath.abi import Layout
from isolator.datapath.bpf import Datapath
from isolator.datapath.btf import Array, Btf, BtfError, Field, Kind, Number, Opaque, Struct, Type, map_types
from isolator.datapath.libbpf import BpfError
from isolator.datapath.pins import unpin

U8, U16, U32, U64 = (Number(size) for size in (1, 2, 4, 8))


class Builder:
    """BTF by hand: each method adds a type and returns its number."""

    def __init__(self) -> None:
        self.types, self.strings, self.count = b"", b"\0", 0

    def add(
        self, kind: int, name: str = "", size: int = 0, members: int = 0, more: bytes = b"", flag: int = 0
    ) -> int:
        at = 0
        if name:
            at, self.strings = len(self.strings), self.strings + name.encode() + b"\0"
        self.types += struct.pack("=III", at, members | kind << 24 | flag << 31, size) + more
        self.count += 1
        return self.count

    def integer(self, size: int, signed: bool = False) -> int:
        return self.add(Kind.INT, f"int{size}", size, more=struct.pack("=I", signed << 24 | size * 8))

    def struct(self, size: int, *fields: tuple[str, int, int], kind: int = Kind.STRUCT, flag: int = 0) -> int:
        more = b""
        for name, number, bits in fields:
            at = 0
            if name:
                at, self.strings = len(self.strings), self.strings + name.encode() + b"\0"
            more += struct.pack("=III", at, number, bits)
        return self.add(kind, "some", size, len(fields), more, flag)

    def blob(self) -> bytes:
        sizes = (0, len(self.types), len(self.types), len(self.strings))
        return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, *sizes) + self.types + self.strings


# -- by hand ---------------------------------------------------------------------------------------------


def test_numbers_arrays_and_what_is_looked_through() -> None:
    b = Builder()
    u32, s16 = b.integer(4), b.integer(2, signed=True)
    alias = b.add(Kind.CONST, size=b.add(Kind.VOLATILE, size=b.add(Kind.TYPEDEF, "alias", u32)))
    array = b.add(Kind.ARRAY, more=struct.pack("=III", alias, u32, 5))
    enum = b.add(Kind.ENUM, "e", 4, 1, struct.pack("=II", 0, 7))
    wide = b.add(Kind.ENUM64, "w", 8, 1, struct.pack("=III", 0, 7, 0), flag=1)
    btf = Btf.parse(b.blob())
    assert [btf.type(n) for n in (u32, s16, array, enum, wide)] == [
        U32, Number(2, True), Array(U32, 5), U32, Number(8, True),
    ]  # fmt: skip


def test_fields_of_a_struct_without_a_name_are_the_outer_ones() -> None:
    b = Builder()
    u32 = b.integer(4)
    inner = b.struct(8, ("x", u32, 0), ("y", u32, 32))
    union = b.struct(4, ("a", u32, 0), kind=Kind.UNION)
    pointer = b.add(Kind.PTR, size=u32)
    outer = b.struct(32, ("first", u32, 0), ("", inner, 32), ("u", union, 96), ("p", pointer, 128))
    found = Btf.parse(b.blob()).type(outer)
    assert found == Struct(32, (
        Field("first", 0, U32), Field("x", 4, U32), Field("y", 8, U32),
        Field("u", 12, Opaque(Kind.UNION, 4)), Field("p", 16, Opaque(Kind.PTR, 8)),
    ))  # fmt: skip
    assert isinstance(found, Struct) and (found.offset("y"), found.offset("z")) == (8, None)


def test_what_is_no_entry_is_refused() -> None:
    b = Builder()
    u32 = b.integer(4)
    bits = b.struct(4, ("narrow", u32, 3 << 24), flag=1)
    function = b.add(Kind.FUNC_PROTO, size=u32)
    endless = b.struct(8, ("itself", b.count + 1, 0))
    btf = Btf.parse(b.blob())
    for number, words in (
        (bits, "bit field"),
        (function, "FUNC_PROTO"),
        (endless, "not end"),
        (0, "none"),
        (99, "none"),
    ):
        with pytest.raises(BtfError, match=words):
            btf.type(number)


def wrapped(types: bytes, strings: bytes) -> bytes:
    made = Builder()
    made.types, made.strings = types, b"\0" + strings
    return made.blob()


@given(st.binary(max_size=60) | st.builds(wrapped, st.binary(max_size=120), st.binary(max_size=20)))
def test_any_bytes_end_in_types_or_an_error(data: bytes) -> None:
    with contextlib.suppress(BtfError):
        Btf.parse(data)


@given(st.data())
def test_a_cut_anywhere_is_an_error_or_fewer_types(data: st.DataObject) -> None:
    b = Builder()
    last = b.struct(8, ("one", b.integer(4), 0), ("two", b.integer(4), 32))
    blob = b.blob()
    with pytest.raises(BtfError):
        Btf.parse(blob[: data.draw(st.integers(0, len(blob) - 1))]).type(last)


# -- of our maps -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datapath() -> Iterator[Datapath]:
    folder = Path(f"/sys/fs/bpf/isolator-test-btf-{os.getpid()}")
    try:
        with Datapath.open(folder) as made:
            yield made
    finally:
        unpin(folder)


MAPS = [
    ("ports", None, abi.PORT),
    ("addresses", abi.ADDRESS_KEY, None),
    ("identities", abi.IDENTITY_KEY, None),
    ("policy", abi.POLICY_KEY, abi.POLICY_VALUE),
    ("flows4", abi.FLOW_KEY, abi.FLOW4),
    ("flows7", abi.FLOW_KEY, abi.FLOW7),
    ("endpoints", None, abi.ENDPOINT),
    ("control", None, abi.CONTROL),
]


@pytest.mark.root
@pytest.mark.parametrize(("name", "key", "value"), MAPS, ids=[name for name, *_ in MAPS])
def test_a_map_says_what_the_header_says(
    datapath: Datapath, name: str, key: Layout | None, value: Layout | None
) -> None:
    for found, expected in zip(map_types(datapath.maps[name].fd, name), (key, value), strict=True):
        assert offsets(found) == (expected.offsets if expected else {}) and found.size == (
            expected.size if expected else 4
        )
    if name == "flows7":
        half = next(f.type for f in map_types(datapath.maps[name].fd, name)[1].fields if f.name == "half")  # type: ignore[union-attr]
        assert isinstance(half, Array) and half.count == 2 and offsets(half.element) == abi.HALF.offsets


def offsets(found: Type) -> dict[str, int]:
    return {field.name: field.at for field in found.fields} if isinstance(found, Struct) else {}


@pytest.mark.root
def test_a_map_without_types(datapath: Datapath) -> None:
    with pytest.raises(BtfError, match="says nothing"):
        map_types(datapath._objects[0].map_fd("classifier"), "classifier")
    with pytest.raises(BpfError, match="map nothing"):
        map_types(0, "nothing")
