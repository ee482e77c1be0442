"""From layout to layout: what has a place keeps its value, and nothing is lost in silence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.datapath.btf import Array, Field, Kind, Number, Opaque, Struct, Type
from isolator.datapath.translate import Translation, UntranslatableError

U8, U16, U32, U64, S8, S32 = Number(1), Number(2), Number(4), Number(8), Number(1, True), Number(4, True)


def laid_out(*fields: tuple[str, Type], gap: int = 0) -> Struct:
    """Fields one behind the other, `gap` bytes before each."""
    found, at = [], 0
    for name, kind in fields:
        at += gap
        found.append(Field(name, at, kind))
        at += kind.size
    return Struct(at, tuple(found))


def translate(old: Type, new: Type, data: bytes) -> bytes | None:
    return Translation.between(old, new)(data)


CASES: list[tuple[str, Type, Type, bytes, bytes | None]] = [
    ("the same", U32, U32, b"abcd", b"abcd"),
    ("wider", U16, U32, b"\x34\x12", b"\x34\x12\0\0"),
    ("wider, signed", S8, S32, b"\xfe", b"\xfe\xff\xff\xff"),
    ("narrower, and it fits", U32, U8, b"\xff\0\0\0", b"\xff"),
    ("narrower, and it does not", U32, U8, b"\0\x01\0\0", None),
    ("narrower, signed", S32, S8, b"\xff\xff\xff\xff", b"\xff"),
    ("narrower, signed, and it does not", S32, S8, b"\x80\0\0\0", None),
    ("negative has no place in unsigned", S8, U32, b"\xff", None),
    ("the sign alone is other: the bytes are meant", S8, U8, b"\xff", b"\xff"),
    ("a longer array", Array(U8, 2), Array(U8, 4), b"ab", b"ab\0\0"),
    ("a shorter array", Array(U8, 4), Array(U8, 2), b"ab\0\0", b"ab"),
    ("a shorter array, and something in its end", Array(U8, 4), Array(U8, 2), b"ab\0c", None),
    ("an array of wider", Array(U8, 2), Array(U16, 3), b"ab", b"a\0b\0\0\0"),
    ("a union", Opaque(Kind.UNION, 4), Opaque(Kind.UNION, 4), b"abcd", b"abcd"),
    ("another order", laid_out(("a", U8), ("b", U16)), laid_out(("b", U16), ("a", U8)), b"abc", b"bca"),
    ("a new field", laid_out(("b", U8)), laid_out(("a", U16), ("b", U8)), b"b", b"\0\0b"),
    ("a field that is no more", laid_out(("a", U16), ("b", U8)), laid_out(("b", U8)), b"aab", b"b"),
    ("a struct in an array", Array(laid_out(("a", U8)), 2), Array(laid_out(("n", U8), ("a", U8)), 2), b"ab", b"\0a\0b"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "data", "expected"), CASES, ids=[case[0] for case in CASES])
def test_translation(name: str, old: Type, new: Type, data: bytes, expected: bytes | None) -> None:
    assert translate(old, new, data) == expected


@pytest.mark.parametrize(
    ("old", "new"), [(U32, Array(U8, 4)), (Opaque(Kind.UNION, 4), Opaque(Kind.UNION, 8)), (laid_out(("a", U8)), U8)]
)  # fmt: skip
def test_a_field_of_another_kind_has_no_translation(old: Type, new: Type) -> None:
    with pytest.raises(UntranslatableError, match=r"^half\.field is of another kind"):
        Translation.between(
            laid_out(("half", laid_out(("field", old)))), laid_out(("half", laid_out(("field", new))))
        )


def test_what_is_left_out_is_zero() -> None:
    both = laid_out(("a", U8), ("b", U8))
    assert Translation.between(both, both, {"a"})(b"ab") == b"\0b"
    assert Translation.between(both, both).is_copy and not Translation.between(both, both, {"a"}).is_copy


def test_the_same_type_is_copied_with_what_lies_between_its_fields() -> None:
    assert translate(laid_out(("a", U8), gap=2), laid_out(("a", U8), gap=2), b"xya") == b"xya"


# -- any layouts -------------------------------------------------------------------------------------------
# A value is what a layout means: a number, a list, or a dict of fields. Two layouts of one shape hold the same ones.

Shape = Any  # int: bits of a number · (shape, count) · {name: shape}
SHAPES = st.recursive(
    st.sampled_from([8, 16, 32]),
    lambda inner: st.tuples(inner, st.integers(1, 3)) | st.dictionaries(st.sampled_from("abcdef"), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn, shape: Shape) -> Type:
    """One that holds every value of the shape: numbers wide enough, arrays long enough, fields in any order."""
    if isinstance(shape, int):
        return Number(draw(st.sampled_from([size for size in (1, 2, 4, 8) if size * 8 >= shape])))
    if isinstance(shape, tuple):
        return Array(draw(layouts(shape[0])), shape[1] + draw(st.integers(0, 2)))
    names = draw(st.permutations([*shape, *draw(st.sets(st.sampled_from("xyz")))]))
    fields = [(name, draw(layouts(shape[name])) if name in shape else U32) for name in names]
    return laid_out(*fields, gap=draw(st.integers(0, 3)))


def values(shape: Shape) -> st.SearchStrategy[Any]:
    if isinstance(shape, int):
        return st.integers(0, 2**shape - 1)
    if isinstance(shape, tuple):
        return st.lists(values(shape[0]), min_size=shape[1], max_size=shape[1])
    return st.fixed_dictionaries({name: values(each) for name, each in shape.items()})


def encode(kind: Type, value: Any) -> bytes:
    if isinstance(kind, Number):
        return int(value or 0).to_bytes(kind.size, "little")
    data = bytearray(kind.size)
    if isinstance(kind, Array):
        for index, each in enumerate(value or []):
            at = index * kind.element.size
            data[at : at + kind.element.size] = encode(kind.element, each)
    else:
        assert isinstance(kind, Struct)
        for field in kind.fields:
            each = (value or {}).get(field.name)
            data[field.at : field.at + field.type.size] = encode(field.type, each)
    return bytes(data)


@given(st.data())
def test_a_value_is_the_same_in_any_layout_that_has_room_for_it(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    old, new, value = data.draw(layouts(shape)), data.draw(layouts(shape)), data.draw(values(shape))
    assert translate(old, new, encode(old, value)) == encode(new, value)


@given(st.integers(0, 2**64 - 1), st.sampled_from([U8, U16, U32, U64]), st.sampled_from([U8, U16, U32, U64]))
def test_a_number_is_moved_or_lost_and_never_changed(number: int, old: Number, new: Number) -> None:
    number %= 1 << old.size * 8
    found = translate(old, new, number.to_bytes(old.size, "little"))
    assert (found is None) == (number >= 1 << new.size * 8)
    assert found is None or int.from_bytes(found, "little") == number
