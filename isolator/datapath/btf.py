"""Types as BTF describes them: what the fields of a map's keys and values are, and where they stand.

    map ─ bpf_map_info ─▶ BTF ─ parse ─▶ type ids ─ `Btf.type` ─▶ Number | Array | Struct | Opaque

Source: Documentation/bpf/btf.rst, include/uapi/linux/btf.h. Only what a map's entry can be made of is told apart:
qualifiers and typedefs are looked through, what else there is of a known size is `Opaque`.
"""

from __future__ import annotations

import ctypes
import os
import struct
from ctypes import byref, c_char, c_uint32, c_uint64
from dataclasses import dataclass
from enum import IntEnum

from isolator.datapath.errors import DatapathError
from isolator.datapath.libbpf import check, library, map_information

_MAGIC = 0xEB9F
_HEADER = struct.Struct(
    "=HBBIIIII"
)  # magic, version, flags, length of this; types and strings: offset, length
_TYPE = struct.Struct("=III")  # name, info (members, kind, kind flag), size or type
_MEMBER = struct.Struct("=III")  # name, type, offset in bits
_ARRAY = struct.Struct("=III")  # element's type, index's type, elements
_INT = struct.Struct("=I")  # encoding << 24 | offset << 16 | bits
_SIGNED = 1  # BTF_INT_SIGNED
_DEPTH_MAX = 32  # types inside types; a map's entry needs a handful


class BtfError(DatapathError):
    """What should be BTF is none, or describes a type that does not end."""


class Kind(IntEnum):
    """BTF_KIND_…"""

    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


_TRANSPARENT = {Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG}
# What follows a type: bytes for each member, or bytes at all.
_PER_MEMBER = {
    Kind.STRUCT: 12, Kind.UNION: 12, Kind.ENUM: 8, Kind.FUNC_PROTO: 8, Kind.DATASEC: 12, Kind.ENUM64: 12,
}  # fmt: skip
_FOLLOWING = {Kind.INT: 4, Kind.ARRAY: 12, Kind.VAR: 4, Kind.DECL_TAG: 4}
_POINTER_SIZE = 8


# -- types -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Number:
    """An integer or an enum; `size` in bytes."""

    size: int
    signed: bool = False


@dataclass(frozen=True, slots=True)
class Array:
    element: Type
    count: int

    @property
    def size(self) -> int:
        return self.element.size * self.count


@dataclass(frozen=True, slots=True)
class Field:
    """`at`: bytes from the struct's beginning."""

    name: str
    at: int
    type: Type


@dataclass(frozen=True, slots=True)
class Struct:
    """Fields in order; those of a struct or union without a name stand among them, at their places."""

    size: int
    fields: tuple[Field, ...]

    def offset(self, name: str) -> int | None:
        """Where a field of its own stands; None: there is none of that name."""
        return next((field.at for field in self.fields if field.name == name), None)


@dataclass(frozen=True, slots=True)
class Opaque:
    """Bytes whose meaning does not matter here: a union, a float, a pointer."""

    kind: Kind
    size: int


Type = Number | Array | Struct | Opaque


# -- reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Raw:
    name: str
    kind: Kind
    members: int
    bitfields: bool
    size: int  # or the type that it refers to
    following: bytes


class Btf:
    """One object's types by number. 0 is void."""

    def __init__(self, types: list[_Raw], strings: bytes) -> None:
        self._types, self._strings = types, strings

    @classmethod
    def parse(cls, data: bytes) -> Btf:
        """Raises BtfError."""
        try:
            magic, _, _, header, types_at, types_size, strings_at, strings_size = _HEADER.unpack_from(data)
            if magic != _MAGIC:
                raise BtfError(f"no BTF: it begins with {magic:#x}")
            types = data[header + types_at : header + types_at + types_size]
            strings = data[header + strings_at : header + strings_at + strings_size]
            return cls(list(_read(types, strings)), strings)
        except (struct.error, ValueError, IndexError) as error:
            raise BtfError(f"no BTF: {error}") from None

    def type(self, number: int) -> Type:
        """Raises BtfError for what no map's entry is made of: bit fields, functions, types without a size."""
        return self._type(number, _DEPTH_MAX)

    def _type(self, number: int, depth: int) -> Type:
        if not depth or not 0 < number <= len(self._types):
            raise BtfError(f"type {number} is none, or does not end")
        raw = self._types[number - 1]
        if raw.kind in _TRANSPARENT:
            return self._type(raw.size, depth - 1)
        if raw.kind is Kind.INT:
            return Number(raw.size, bool(_INT.unpack(raw.following)[0] >> 24 & _SIGNED))
        if raw.kind in (Kind.ENUM, Kind.ENUM64):
            return Number(raw.size, raw.bitfields)  # here the kind flag says that it is signed
        if raw.kind is Kind.ARRAY:
            element, _, count = _ARRAY.unpack(raw.following)
            return Array(self._type(element, depth - 1), count)
        if raw.kind is Kind.STRUCT:
            return Struct(raw.size, tuple(self._fields(raw, depth - 1)))
        if raw.kind in (Kind.UNION, Kind.FLOAT):
            return Opaque(raw.kind, raw.size)
        if raw.kind is Kind.PTR:
            return Opaque(raw.kind, _POINTER_SIZE)
        raise BtfError(f"type {number} {raw.name!r}: no map's entry is a {raw.kind.name}")

    def _fields(self, raw: _Raw, depth: int) -> list[Field]:
        found: list[Field] = []
        for name_at, number, bits in _MEMBER.iter_unpack(raw.following):
            name, width = _name(self._strings, name_at), bits >> 24 if raw.bitfields else 0
            at = bits & 0xFFFFFF if raw.bitfields else bits
            if width or at % 8:
                raise BtfError(f"{raw.name}.{name} is a bit field")
            inner = self._type(number, depth)
            if not name and isinstance(inner, Struct):
                found += [Field(each.name, at // 8 + each.at, each.type) for each in inner.fields]
            else:
                found.append(Field(name, at // 8, inner))
        return found


def _read(types: bytes, strings: bytes) -> list[_Raw]:
    found: list[_Raw] = []
    at = 0
    while at < len(types):
        name, info, size = _TYPE.unpack_from(types, at)
        at += _TYPE.size
        kind, members = Kind(info >> 24 & 0x1F), info & 0xFFFF
        length = _PER_MEMBER.get(kind, 0) * members + _FOLLOWING.get(kind, 0)
        following = types[at : at + length]
        if len(following) < length:
            raise ValueError(f"type {len(found) + 1} is cut off")
        at += length
        found.append(_Raw(_name(strings, name), kind, members, bool(info >> 31), size, following))
    return found


def _name(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()


# -- of a map --------------------------------------------------------------------------------------------


class _BtfInfo(ctypes.Structure):  # the beginning of struct bpf_btf_info (linux/bpf.h)
    _fields_ = (("btf", c_uint64), ("btf_size", c_uint32), ("id", c_uint32))


def map_types(fd: int, name: str) -> tuple[Type, Type]:
    """What a map's keys and values are. Raises BtfError, or BpfError where the kernel does not tell."""
    info = map_information(fd, name)
    if not info.btf_id:
        raise BtfError(f"map {name} says nothing of its types")
    btf_fd = check(library().bpf_btf_get_fd_by_id(info.btf_id), f"cannot open the BTF of map {name}")
    try:
        btf = Btf.parse(_blob(btf_fd, name))
    finally:
        os.close(btf_fd)
    return btf.type(info.btf_key_type_id), btf.type(info.btf_value_type_id)


def _blob(fd: int, name: str) -> bytes:
    info, length = _BtfInfo(), c_uint32(ctypes.sizeof(_BtfInfo))
    what = f"cannot read the BTF of map {name}"
    check(library().bpf_obj_get_info_by_fd(fd, byref(info), byref(length)), what)
    room = (c_char * info.btf_size)()
    info = _BtfInfo(btf=ctypes.addressof(room), btf_size=len(room))
    check(library().bpf_obj_get_info_by_fd(fd, byref(info), byref(length)), what)
    return bytes(room)
