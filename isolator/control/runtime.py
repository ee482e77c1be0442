"""What a runtime (network namespaces by name, Docker, CRI) has to tell: which endpoints there are.

A runtime finds endpoints and follows their coming and going. It decides nothing and touches nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from isolator.core.identities import Address
from isolator.core.model import Outsider

OWN = "isolator."
"""Labels that begin so are ours: policy (`label_policy`), nothing to choose endpoints by."""

EXCLUDE = OWN + "exclude"
"""A container with this label, `true`, is left alone."""

UNTOLD = OWN + "untold"
"""A runtime's own: nobody can tell who wrote the others of ours; its value says why, and what to do."""


def is_own(label: str) -> bool:
    """In any case, so that a slip is told and not passed over."""
    return label.lower().startswith(OWN)


@dataclass(frozen=True, slots=True)
class RuntimeEndpoint:
    """An endpoint as its runtime names it. `netns`: a path for setns(2); `interface`: its name or MAC inside;
    `addresses`: as far as the runtime knows them; `exempt`: why it is to be left alone, if it is;
    `inherited`: keys of labels that are its image's."""

    name: str
    netns: Path
    interface: str
    labels: dict[str, str] = field(default_factory=dict, hash=False)
    addresses: tuple[Address, ...] = ()
    exempt: str | None = None
    inherited: frozenset[str] = frozenset()


class ChangeKind(StrEnum):
    APPEARED = "appeared"
    VANISHED = "vanished"
    REPLACED = "replaced"
    """The same name, another network namespace or interface: what was spliced goes, the new one has to be."""
    RELABELLED = "relabelled"
    """Only what is known of it changed, its labels above all: policy has to be looked at again, the splice stays."""


@dataclass(frozen=True, slots=True)
class Change:
    kind: ChangeKind
    endpoint: RuntimeEndpoint


def changed(
    before: Mapping[str, RuntimeEndpoint],
    after: Mapping[str, RuntimeEndpoint],
    moved: Callable[[str], bool],
) -> Iterator[Change]:
    """From one look to the next, by name; what is gone comes first. `moved`: one that is in both is elsewhere now."""
    for name, endpoint in before.items():
        if name not in after:
            yield Change(ChangeKind.VANISHED, endpoint)
    for name, endpoint in after.items():
        if name not in before:
            yield Change(ChangeKind.APPEARED, endpoint)
        elif moved(name):
            yield Change(ChangeKind.REPLACED, endpoint)
        elif before[name] != endpoint:
            yield Change(ChangeKind.RELABELLED, endpoint)


class RuntimeAwayError(Exception):
    """Nobody can tell which endpoints there are; the text says why, and what to do."""


class Runtime(Protocol):
    """Finds endpoints. Implementations: `netns_runtime.NetnsRuntime`."""

    @property
    def name(self) -> str:
        """The word for it in the config (`runtime.kind`)."""
        ...

    def endpoints(self) -> list[RuntimeEndpoint]:
        """The endpoints that exist now; may block. Raises RuntimeAwayError: at a start, whoever is spliced and not
        among them gets the network back, so that an empty answer must be a true one."""
        ...

    @property
    def host(self) -> Path | None:
        """The network namespace with the bridges of its containers, a path for setns(2); None: it has none."""
        ...

    def bridges(self) -> set[str]:
        """The names of its bridges there, asked now; may block. Raises RuntimeAwayError."""
        ...

    def outsiders(self) -> tuple[Outsider, ...]:
        """Gateways and services, as of the last look."""
        ...

    def unprotectable(self) -> dict[str, str]:
        """Containers without an interface of their own, and why that is, as of the last look."""
        ...

    def recall(self, names: Mapping[tuple[str, str], str]) -> None:
        """What an agent before called an endpoint, by namespace and interface: it is called so again."""
        ...

    def opened(self, endpoints: Collection[RuntimeEndpoint]) -> None:
        """These, and no others, have their way open: whoever waits for one need not wait any longer."""
        ...

    def missing(self) -> list[RuntimeEndpoint]:
        """Those that are configured and did not exist at the last `endpoints()` or change."""
        ...

    def configure(self, configured: Sequence[Any]) -> set[str]:
        """Takes the endpoints of a new config; returns the names that are no longer in it. The rest of what
        differs is told by `changes`."""
        ...

    def changes(self) -> AsyncIterator[Change]:
        """What differs from the last `endpoints()` or change, without end. Cancel it to stop."""
        ...
