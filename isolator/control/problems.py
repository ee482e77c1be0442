"""What is wrong with a file, and where: `file:line:column: what, and what to do`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing to change in a file. Lines and columns count from 1."""

    file: str
    line: int
    column: int
    message: str
    warning: bool = False

    def __str__(self) -> str:
        kind = "warning: " if self.warning else ""
        return f"{self.file}:{self.line}:{self.column}: {kind}{self.message}"


class ConfigErrors(Exception):  # noqa: N818 - it carries many
    """Everything that is wrong with the files, at once, in the order of the files and lines."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(map(str, self.problems)))


def errors_in(problems: Iterable[Problem]) -> list[Problem]:
    return [problem for problem in problems if not problem.warning]


def raise_errors(problems: Iterable[Problem]) -> None:
    """Raises ConfigErrors unless there are only warnings."""
    if errors := errors_in(problems):
        raise ConfigErrors(errors)
