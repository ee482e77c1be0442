"""The runtime for network namespaces by name (`ip netns`), as the config lists them.

A namespace is there when its name is a mount of nsfs: `ip netns add` first creates an empty file and mounts
the namespace over it a moment later (iproute2, ip/ipnetns.c), so that the file alone says nothing. Which
namespace it is, is told by its inode number: a name that was deleted and made again has another.

It polls: a stat(2) of some 2 µs each is simpler than any event the kernel has for mounts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from isolator.control.runtime import Change, RuntimeEndpoint, changed, is_own
from isolator.core.model import Outsider

NETNS_FOLDER = Path("/run/netns")
"""Where iproute2 mounts named network namespaces."""

POLL_SECONDS = 0.5
"""How soon a coming or going is noticed. Until then an endpoint's own ports hold it closed."""


class NetnsEndpointConfig(Protocol):
    """The part of the config's `endpoints` that this runtime reads."""

    @property
    def name(self) -> str: ...
    @property
    def netns(self) -> str: ...
    @property
    def interface(self) -> str: ...
    @property
    def labels(self) -> dict[str, str]: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """An endpoint and the namespace that its name stood for when it was looked at."""

    endpoint: RuntimeEndpoint
    inode: int

    def same_place(self, other: Seen) -> bool:
        """Nothing of it has to be spliced anew."""
        mine, theirs = self.endpoint, other.endpoint
        return (mine.netns, mine.interface, self.inode) == (theirs.netns, theirs.interface, other.inode)


class NetnsRuntime:
    """Implements `runtime.Runtime` over configured endpoints."""

    name = "netns"

    def __init__(
        self,
        configured: Sequence[NetnsEndpointConfig],
        folder: Path = NETNS_FOLDER,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._folder = folder
        self._poll_seconds = poll_seconds
        self._configured: tuple[RuntimeEndpoint, ...] = ()
        self._known: dict[str, Seen] = {}
        self.configure(configured)

    def configure(self, configured: Sequence[NetnsEndpointConfig]) -> set[str]:
        before = {endpoint.name for endpoint in self._configured}
        self._configured = tuple(
            RuntimeEndpoint(each.name, self._folder / each.netns, each.interface, labels_of(each))
            for each in configured
        )
        return before - {endpoint.name for endpoint in self._configured}

    def endpoints(self) -> list[RuntimeEndpoint]:
        self._known = present(self._configured)
        return [seen.endpoint for seen in self._known.values()]

    @property
    def host(self) -> None:
        """Its endpoints may hang anywhere."""
        return

    def bridges(self) -> set[str]:
        return set()

    def outsiders(self) -> tuple[Outsider, ...]:
        return ()

    def unprotectable(self) -> dict[str, str]:
        return {}

    def recall(self, names: Mapping[tuple[str, str], str]) -> None:
        """The config names them."""

    def opened(self, endpoints: Collection[RuntimeEndpoint]) -> None:
        """Nobody waits."""

    def missing(self) -> list[RuntimeEndpoint]:
        return [endpoint for endpoint in self._configured if endpoint.name not in self._known]

    def poll(self) -> list[Change]:
        """What differs from the last look, in the order of the config; what is gone comes first."""
        before, after = self._known, present(self._configured)
        self._known = after
        return list(
            changed(
                {name: seen.endpoint for name, seen in before.items()},
                {name: seen.endpoint for name, seen in after.items()},
                lambda name: not before[name].same_place(after[name]),
            )
        )

    async def changes(self) -> AsyncIterator[Change]:
        while True:
            for change in self.poll():
                yield change
            await asyncio.sleep(self._poll_seconds)


def labels_of(configured: NetnsEndpointConfig) -> dict[str, str]:
    """Where some of them are policy, its endpoint is known by its name."""
    labels = dict(configured.labels)
    return {**labels, "name": configured.name} if any(map(is_own, labels)) else labels


def present(endpoints: Iterable[RuntimeEndpoint]) -> dict[str, Seen]:
    """Those whose namespace is there, by name."""
    inodes = ((endpoint, namespace_inode(endpoint.netns)) for endpoint in endpoints)
    return {endpoint.name: Seen(endpoint, inode) for endpoint, inode in inodes if inode is not None}


def namespace_inode(path: Path) -> int | None:
    """The inode of the network namespace mounted at `path`; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino if status.st_dev == os.stat("/proc/self/ns/net").st_dev else None
