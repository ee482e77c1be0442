"""YAML files to plain values that still know where they stood.

YAML 1.2: `off`, `yes` and `no` are text. Besides what the syntax forbids, three things that YAML lets pass
and people do not mean are problems here: a key that stands twice, a key without a value, and a merge key.

    file → text ─┬─ plain: values (yaml_quick.py) ─────────┬→ Document
                 └─ else: nodes (ruamel.yaml) → values and ┘
                          for each path a mark

The marks of a plain document are read when somebody asks for the first one, which only what is wrong makes anybody do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scanner import Scanner

from isolator.control.problems import Problem
from isolator.control.yaml_quick import read_values

FILE_MAX = 4 << 20
"""Bytes of a file: some 50,000 rules."""

NODES_MAX = 1_000_000
"""Values of a file after its aliases are written out; nine lines of aliases can stand for a billion."""

DEPTH_MAX = 64
"""Values inside values. A policy has 8 levels."""

Path_ = tuple[str | int, ...]
Mark = tuple[int, int]
TAG = "tag:yaml.org,2002:"
INTEGER = re.compile(r"[-+]?[0-9]+")
PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")


class TooDeepError(Exception):
    """More than DEPTH_MAX values inside each other."""


class ShallowScanner(Scanner):
    """Gives up at the first bracket that is too deep: for each token in brackets ruamel looks at all around it, and
    before a key is out of the question it has read on for 1,024 characters."""

    def fetch_flow_collection_start(self, TokenClass: Any, to_push: str) -> None:  # noqa: N803 - ruamel's name
        if len(self.flow_context) >= DEPTH_MAX:
            raise TooDeepError
        super().fetch_flow_collection_start(TokenClass, to_push)


@dataclass(slots=True)
class Document:
    """One YAML document. `keys`, `values`: path → (line, column) from 1; `broken`: reported already. `marked`: it has
    no marks yet, and this reads it once more, with them."""

    file: str
    value: Any = None
    keys: dict[Path_, Mark] = field(default_factory=dict)
    values: dict[Path_, Mark] = field(default_factory=dict)
    broken: set[Path_] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    marked: Callable[[], Document] | None = None

    def line(self, path: Path_) -> int:
        """Where the value there stands."""
        self._mark()
        return self.values[path][0]

    def _mark(self) -> None:
        if self.marked is not None:
            document, self.marked = self.marked(), None
            self.keys, self.values = document.keys, document.values

    def problem(self, path: Path_, message: str, at_key: bool = False, warning: bool = False) -> Problem:
        """A problem at the value there, or at its key; at what surrounds it, if it is not there."""
        self._mark()
        while path not in self.values and path:
            path = path[:-1]
        marks = self.keys if at_key and path in self.keys else self.values
        return Problem(self.file, *marks.get(path, (1, 1)), message, warning)

    def is_broken(self, path: Path_) -> bool:
        """Whether this value or one around it is reported already."""
        return any(path[:length] in self.broken for length in range(len(path) + 1))


def read_documents(path: Path) -> tuple[list[Document], list[Problem]]:
    """The documents of a file. Never raises; what is wrong are problems."""
    data = read_file(path)
    return ([], [data]) if isinstance(data, Problem) else parse_documents(data, str(path))


def read_file(path: Path) -> bytes | Problem:
    try:
        with path.open("rb") as stream:
            data = stream.read(FILE_MAX + 1)
    except OSError as error:
        return Problem(str(path), 1, 1, unreadable(error))
    if len(data) > FILE_MAX:
        return Problem(str(path), 1, 1, f"larger than {FILE_MAX >> 20} MiB: split it into several files")
    return data


def unreadable(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file or folder: correct the path or make it"
    return f"cannot be read ({error.strerror}): check its kind and permissions"


def parse_documents(
    data: bytes, file: str, nodes_max: int = NODES_MAX
) -> tuple[list[Document], list[Problem]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        good = data[: error.start]
        line, column = good.count(b"\n") + 1, len(good) - (good.rfind(b"\n") + 1) + 1
        return [], [Problem(file, line, column, "this is not UTF-8: save it as UTF-8")]
    values = read_values(text, nodes_max, DEPTH_MAX, scalar)
    if not values:
        return parse_carefully(text, file, nodes_max)
    carefully = cache(partial(parse_carefully, text, file, nodes_max))

    def marked(at: int) -> Document:
        return carefully()[0][at]

    return [Document(file, value, marked=partial(marked, at)) for at, value in enumerate(values)], []


def parse_carefully(text: str, file: str, nodes_max: int) -> tuple[list[Document], list[Problem]]:
    yaml = YAML(typ="safe", pure=True)
    yaml.Scanner = ShallowScanner
    try:
        nodes = list(yaml.compose_all(text))
    except YAMLError as error:
        return [], [syntax_problem(error, text, file)]
    except ValueError as error:  # a %YAML directive's number
        return [], [Problem(file, 1, 1, f"this is not YAML ({error}): check its first lines")]
    except (TooDeepError, RecursionError):
        return [], [Problem(file, 1, 1, f"more than {DEPTH_MAX} values inside each other: it is too deep")]
    documents = [Builder(file, nodes_max).build(node) for node in nodes if not is_nothing(node)]
    problems = [problem for document in documents for problem in document.problems]
    if not documents:
        problems.append(Problem(file, 1, 1, "nothing in it: write a document, or remove it"))
    return documents, problems


def is_nothing(node: Node) -> bool:
    """What stands between two `---`, or behind the last."""
    return isinstance(node, ScalarNode) and node.tag == TAG + "null" and not node.value


def syntax_problem(error: YAMLError, text: str, file: str) -> Problem:
    if isinstance(error, ReaderError):
        position = error.position if isinstance(error.position, int) else 0
        before = text[:position]
        line, column = before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1
        return Problem(file, line, column, "a character that YAML does not allow: remove it")
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, [error.context, error.problem]))
        hint = (
            "a tab: indent with spaces"
            if "'\\t'" in what
            else f"this is not YAML ({what}): check quotes, brackets and indentation"
        )
        return Problem(file, mark.line + 1 if mark else 1, mark.column + 1 if mark else 1, hint)
    return Problem(file, 1, 1, f"this is not YAML: {error}")


class Builder:
    """Nodes to a Document."""

    def __init__(self, file: str, nodes_max: int) -> None:
        self._document = Document(file)
        self._nodes_max = nodes_max
        self._nodes = 0

    def build(self, node: Node) -> Document:
        self._document.value = self._value(node, ())
        return self._document

    def _complain(self, path: Path_, node: Node, message: str) -> None:
        self._document.problems.append(Problem(self._document.file, *mark_of(node), message))
        self._document.broken.add(path)

    def _value(self, node: Node, path: Path_) -> Any:
        self._document.values[path] = mark_of(node)
        self._nodes += 1
        if len(path) > DEPTH_MAX or self._nodes > self._nodes_max:
            if self._nodes <= self._nodes_max + 1:
                self._complain(path, node, "too deep or too large, through aliases perhaps: write it out")
            self._document.broken.add(path)
            return None
        if isinstance(node, MappingNode):
            return dict(self._items(node, path))
        if isinstance(node, SequenceNode):
            return [self._value(each, (*path, at)) for at, each in enumerate(node.value)]
        return self._scalar(node, path)

    def _items(self, node: MappingNode, path: Path_) -> Iterator[tuple[str, Any]]:
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, ScalarNode) or not isinstance(key, str):
                self._complain(
                    (*path, "?"), key_node, "a key is a single word or text, not a list or mapping"
                )
            elif key_node.tag == TAG + "merge":
                self._complain(
                    (*path, key), key_node, "merge keys (<<) are not supported: write the keys out"
                )
            elif (*path, key) in self._document.keys:
                line = self._document.keys[(*path, key)][0]
                message = f"'{key}' stands in line {line} already: keep one of them"
                self._document.problems.append(Problem(self._document.file, *mark_of(key_node), message))
            else:
                self._document.keys[(*path, key)] = mark_of(key_node)
                yield key, self._value(value_node, (*path, key))

    def _scalar(self, node: Node, path: Path_) -> Any:
        kind = str(node.tag).removeprefix(TAG)
        if kind == "null":
            self._empty(node, path)
            return None
        value = scalar(kind, node.value)
        if value is None:
            self._complain(path, node, f"the tag {node.tag} is not supported: remove it")
        return value

    def _empty(self, node: Node, path: Path_) -> None:
        if path in self._document.keys:
            self._document.values[path] = self._document.keys[path]
            message = f"'{path[-1]}' has no value: write one (a list may be []), or remove the key"
            self._document.problems.append(Problem(self._document.file, *self._document.keys[path], message))
            self._document.broken.add(path)
        else:
            self._complain(path, node, "an empty value: write one, or remove it")


def scalar(kind: str, text: str) -> str | bool | int | float | None:
    """The value of a scalar whose tag is of this kind; None: of no kind that is read."""
    match kind:
        case "bool":
            return text.lower() == "true"
        case "int" if INTEGER.fullmatch(text):
            return int(text) if len(text) < 20 else text
        case "int" if PREFIXED.fullmatch(text):
            return int(text, 0) if len(text) < 20 else text
        case "float" if (number := number_of(text)) is not None:
            return number
        case "str" | "int" | "float" | "timestamp":
            return text
    return None


def number_of(text: str) -> float | None:
    """None: it only says that it is one, by its tag."""
    try:
        return None if "_" in text else float(text.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return None


def mark_of(node: Node) -> Mark:
    return node.start_mark.line + 1, node.start_mark.column + 1
