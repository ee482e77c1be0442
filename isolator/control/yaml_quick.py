"""The plain part of YAML, read by libyaml: some sixty times as fast as the reader that knows where everything stood.

    text → events (libyaml) → values          or None: it takes the careful reader (yaml_source.py)

It says nothing of what is wrong or where, and gives up at whatever is not plain: what the careful reader would
complain of, and what libyaml, which is of YAML 1.1, may take for something else (directives, tags, anchors, block
scalars, scalars of several lines). What it does read is what the careful reader reads: tests/control/test_yaml_quick.py
compares them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import yaml
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.resolver import VersionedResolver

NOT_PLAIN = re.compile(
    r"[^\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\uf900-\ufdcf\ufdf0-\ufefe\uff00-\uffef]"
    r"|^[%.]|^---."
    r"|[\"'\]}]:[^ \n]",
    re.M,
)
"""Other line ends, tabs, control characters · directives, ends of documents, a document on its marker's line · keys in
quotes with the value close behind, which the two read differently in a list."""

TYPED = re.compile(r"(?:[-+.0-9][^/]*|true|false|null|[~<=!&*].*|)", re.I)
"""Plain scalars that may be no text (YAML 1.2, as ruamel.yaml reads it). Addresses with a length are frequent."""

PORT = re.compile(r"[1-9][0-9]{0,4}")

ESCAPES = re.compile(r'[^\\]|\\[\\"]')


class NotPlainError(Exception):
    """Something that only the careful reader reads."""


def read_values(
    text: str, nodes_max: int, depth_max: int, scalar: Callable[[str, str], Any]
) -> list[Any] | None:
    """The documents' values. `scalar(kind, text)`: the value of a plain scalar whose tag is of this kind."""
    if NOT_PLAIN.search(text):
        return None
    try:
        return Reading(text, nodes_max, depth_max, scalar).documents()
    except (yaml.YAMLError, NotPlainError):
        return None


@lru_cache(4096)
def kind_of(text: str) -> str:
    """Of a plain scalar: `str`, `int`, `bool` and so on."""
    return str(RESOLVER.resolve(ScalarNode, text, (True, False))).rpartition(":")[2]


RESOLVER = VersionedResolver()


class Reading:
    """One text's events, walked once."""

    def __init__(self, text: str, nodes_max: int, depth_max: int, scalar: Callable[[str, str], Any]) -> None:
        self._parser = yaml.CSafeLoader(text)
        self._text, self._left, self._depth, self._typed = text, nodes_max, depth_max, scalar

    def documents(self) -> list[Any]:
        found = []
        self._parser.get_event()
        while not isinstance(self._parser.get_event(), yaml.StreamEndEvent):
            found.append(self._value(self._parser.get_event(), 0))
            self._parser.get_event()
        return found

    def _value(self, event: Any, depth: int) -> Any:
        self._left -= 1
        if self._left < 0 or depth >= self._depth or isinstance(event, yaml.AliasEvent):
            raise NotPlainError
        if event.anchor is not None or event.tag is not None:
            raise NotPlainError
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        return (
            self._mapping(depth + 1) if isinstance(event, yaml.MappingStartEvent) else self._list(depth + 1)
        )

    def _list(self, depth: int) -> list[Any]:
        found = []
        while not isinstance(event := self._parser.get_event(), yaml.SequenceEndEvent):
            found.append(self._value(event, depth))
        return found

    def _mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := self._parser.get_event(), yaml.MappingEndEvent):
            key = self._key(event)
            if key in found:
                raise NotPlainError
            found[key] = self._value(self._parser.get_event(), depth)
        return found

    def _key(self, event: Any) -> str:
        if not isinstance(event, yaml.ScalarEvent) or event.anchor is not None or event.tag is not None:
            raise NotPlainError
        self._check(event)
        if not event.style and kind_of(event.value) == "merge":
            raise NotPlainError
        return str(event.value)

    def _scalar(self, event: Any) -> Any:
        self._check(event)
        text = event.value
        if event.style or not TYPED.fullmatch(text):
            return text
        if PORT.fullmatch(text):
            return int(text)
        value = self._typed(kind_of(text), text)
        if value is None:
            raise NotPlainError
        return value

    def _check(self, event: Any) -> None:
        """On one line, and what stands there is what is meant."""
        begin, end, style = event.start_mark, event.end_mark, event.style
        raw = self._text[begin.index : end.index]
        if raw == event.value and not style:
            return
        if begin.line != end.line or style not in ("'", '"') or (style == '"' and ESCAPES.sub("", raw)):
            raise NotPlainError
