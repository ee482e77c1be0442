"""From one layout of a map's entries to another, field by field, by name.

| the old field | becomes |
|---|---|
| of the same type | its bytes |
| a number of another width | the number, if it fits |
| an array | element by element; what a shorter one has no room for must be zero |
| a struct | field by field |
| a union, a float, a pointer | its bytes, if the size is the same |
| in the new layout alone | zero |
| in the old layout alone | nothing |

A field that changed its kind makes a layout `Untranslatable`; a value that does not fit, one entry. A field that gets
another meaning must get another name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from isolator.datapath.btf import Array, Number, Opaque, Struct, Type
from isolator.datapath.errors import DatapathError


class UntranslatableError(DatapathError):
    """No entry of the old layout can be one of the new."""


@dataclass(slots=True)
class Translation:
    """What is done for one entry. Offsets and sizes in bytes; `copies` and `numbers` go from old to new."""

    old_size: int
    new_size: int
    copies: list[tuple[int, int, int]] = field(default_factory=list)  # from, to, size
    numbers: list[tuple[int, Number, int, Number]] = field(default_factory=list)
    roomless: list[tuple[int, int]] = field(default_factory=list)  # of the old: from, to; must be zero

    @classmethod
    def between(cls, old: Type, new: Type, without: Collection[str] = ()) -> Translation:
        """`without`: fields that are zero in the new entry. Raises UntranslatableError, with the field."""
        made = cls(old.size, new.size)
        if without and isinstance(old, Struct):
            old = Struct(old.size, tuple(each for each in old.fields if each.name not in without))
        made._add(old, 0, new, 0, "")
        return made

    @property
    def is_copy(self) -> bool:
        """An entry is the same bytes in both."""
        return self.old_size == self.new_size and self.copies == [(0, 0, self.old_size)]

    def __call__(self, old: bytes) -> bytes | None:
        """The new entry, or None where something of the old would be lost."""
        if self.is_copy:
            return old
        if any(old.count(0, at, end) < end - at for at, end in self.roomless):
            return None
        new = bytearray(self.new_size)
        for at, to, size in self.copies:
            new[to : to + size] = old[at : at + size]
        try:
            for at, was, to, is_now in self.numbers:
                number = int.from_bytes(old[at : at + was.size], "little", signed=was.signed)
                new[to : to + is_now.size] = number.to_bytes(is_now.size, "little", signed=is_now.signed)
        except OverflowError:
            return None
        return bytes(new)

    # -- built once for a pair of types --------------------------------------------------------------------

    def _add(self, old: Type, at: int, new: Type, to: int, path: str) -> None:
        if old == new:
            self._copy(at, to, old.size)
        elif isinstance(old, Number) and isinstance(new, Number):
            if old.size == new.size:  # char to __u8: the bytes are meant
                self._copy(at, to, old.size)
            else:
                self.numbers.append((at, old, to, new))
        elif isinstance(old, Array) and isinstance(new, Array):
            self._add_array(old, at, new, to, path)
        elif isinstance(old, Struct) and isinstance(new, Struct):
            for mine in old.fields:
                for theirs in new.fields:
                    if mine.name == theirs.name:
                        self._add(mine.type, at + mine.at, theirs.type, to + theirs.at, f"{path}.{mine.name}")
        elif isinstance(old, Opaque) and isinstance(new, Opaque) and old.size == new.size:
            self._copy(at, to, old.size)
        else:
            raise UntranslatableError(f"{path.lstrip('.') or 'it'} is of another kind")

    def _add_array(self, old: Array, at: int, new: Array, to: int, path: str) -> None:
        count = min(old.count, new.count)
        if old.element == new.element:
            self._copy(at, to, old.element.size * count)
        else:
            for index in range(count):
                step, stride = index * old.element.size, index * new.element.size
                self._add(old.element, at + step, new.element, to + stride, f"{path}[{index}]")
        if old.count > count:
            self.roomless.append((at + count * old.element.size, at + old.size))

    def _copy(self, at: int, to: int, size: int) -> None:
        """What is next to the copy before, in both, goes with it."""
        if self.copies:
            before, there, length = self.copies[-1]
            if (before + length, there + length) == (at, to):
                self.copies[-1] = (before, there, length + size)
                return
        self.copies.append((at, to, size))
