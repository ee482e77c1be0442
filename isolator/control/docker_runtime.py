"""The runtime for a Docker engine: every running container's interfaces on its networks, with its labels.

    engine ── events ──▶ look again ──▶ containers, inspected ──▶ endpoints ──▶ what differs from the last look

An event says only that something has changed; what there is, is always asked for whole. So lost events, an
engine that was restarted and an agent that was away all end in the same way: the next look is right. It is
repeated every RECONCILE_SECONDS, also without an event.

An endpoint is one interface: a container on one network has its name, each further network of it makes an
endpoint NAME@NETWORK. It keeps that name as long as it lives, whatever its container is called by then: only the
labels follow. The engine does not tell an interface's name inside: its MAC names it.

Labels are the container's own, and these, which stand for what the engine knows (a container's label of the
same name does not count):

    name, image, network            as `docker ps` and `docker network ls` show them
    compose.project, compose.service
    swarm.service, swarm.task
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker  # type: ignore[import-untyped]
import requests
import structlog
from docker.errors import DockerException  # type: ignore[import-untyped]

from isolator.control.runtime import Change, RuntimeAwayError, RuntimeEndpoint, changed

RECONCILE_SECONDS = 5.0
CALL_SECONDS = 10  # an engine that does not answer for so long counts as away
AGAIN_SECONDS = 1.0  # until an engine that is away is asked again
SETTLE_SECONDS = 0.05  # a start is several events: one look answers them

EXCLUDE = "isolator.exclude"
"""A container with this label, `true`, is left alone."""

KNOWN = {
    "compose.project": "com.docker.compose.project",
    "compose.service": "com.docker.compose.service",
    "swarm.service": "com.docker.swarm.service.name",
    "swarm.task": "com.docker.swarm.task.name",
}
RESERVED = frozenset({"name", "image", "network", *KNOWN})

Inspected = Mapping[str, Any]  # a container as GET /containers/{id}/json describes it

log = structlog.get_logger()


# -- what a container is -------------------------------------------------------------------------------------


def endpoints_of(container: Inspected) -> list[RuntimeEndpoint]:
    """Its interfaces that can be protected, in the order of their networks' names."""
    if unprotectable(container) is not None:
        return []
    name, own = container["Name"].lstrip("/"), first_network(container)
    return [
        RuntimeEndpoint(
            name if network == own else f"{name}@{network}",
            Path(container["NetworkSettings"]["SandboxKey"]),
            attachment["MacAddress"],
            labels_of(container, name, network),
        )
        for network, attachment in sorted(attachments(container).items())
    ]


def attachments(container: Inspected) -> dict[str, Any]:
    """Network → what the engine says of the container's place in it; without networks that are not joined yet."""
    networks = container["NetworkSettings"]["Networks"] or {}
    return {name: each for name, each in networks.items() if each and each.get("MacAddress")}


def first_network(container: Inspected) -> str:
    """The one that it was made with: it stays when others are joined and left."""
    joined, mode = sorted(attachments(container)), container["HostConfig"]["NetworkMode"]
    mode = "bridge" if mode == "default" else mode
    return mode if mode in joined else joined[0] if joined else ""


def labels_of(container: Inspected, name: str, network: str) -> dict[str, str]:
    own = container["Config"]["Labels"] or {}
    labels = {key: value for key, value in own.items() if key not in RESERVED}
    labels |= {short: own[long] for short, long in KNOWN.items() if long in own}
    return {**labels, "name": name, "image": container["Config"]["Image"], "network": network}


def unprotectable(container: Inspected) -> str | None:
    """Why none of its interfaces can be protected; None: they can."""
    mode = container["HostConfig"]["NetworkMode"]
    if (container["Config"]["Labels"] or {}).get(EXCLUDE, "").lower() == "true":
        return f"it has the label {EXCLUDE}"
    hostname = os.environ.get("HOSTNAME", "")  # in a container: the beginning of its id
    if len(hostname) >= 12 and container["Id"].startswith(hostname):
        return "it is the agent's own"
    if mode == "host":
        return "it is on the host's network"
    if mode == "none":
        return "it has no network"
    if mode.startswith("container:"):
        return "it shares another container's network, and is protected with it"
    return None


# -- what there is -------------------------------------------------------------------------------------------


class DockerRuntime:
    """Implements `runtime.Runtime` over one engine."""

    name = "docker"

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._client: Any = None
        self._known: dict[str, RuntimeEndpoint] = {}
        self._reported: set[str] = set()

    def configure(self, configured: Sequence[Any]) -> set[str]:
        """Nothing is configured: the engine says what there is."""
        return set()

    def missing(self) -> list[RuntimeEndpoint]:
        return []

    def endpoints(self) -> list[RuntimeEndpoint]:
        """Blocks. Raises RuntimeAwayError."""
        self._known = self.look()
        return list(self._known.values())

    def look(self) -> dict[str, RuntimeEndpoint]:
        """Every endpoint by name. Blocks; raises RuntimeAwayError."""
        found: list[RuntimeEndpoint] = []
        for container in self._running():
            self._report(container)
            found += endpoints_of(container)
        return named(found, self._known)

    def _running(self) -> Iterator[Inspected]:
        if not self._socket.is_socket():
            raise RuntimeAwayError(
                f"no Docker engine at {self._socket}: start it, or correct runtime.socket in the config"
            )
        try:
            if self._client is None:
                self._client = docker.DockerClient(f"unix://{self._socket}", timeout=CALL_SECONDS)
            for each in self._client.api.containers():  # running and paused ones
                with contextlib.suppress(docker.errors.NotFound):  # gone meanwhile
                    yield self._client.api.inspect_container(each["Id"])
        except (DockerException, requests.RequestException, OSError) as error:
            self._client = None
            raise RuntimeAwayError(f"no Docker engine answers at {self._socket}: {error}") from error

    def _report(self, container: Inspected) -> None:
        reason = unprotectable(container)
        if reason is not None and container["Id"] not in self._reported:
            self._reported.add(container["Id"])
            log.warning("not protected", container=container["Name"].lstrip("/"), reason=reason)

    async def changes(self) -> AsyncIterator[Change]:
        told = asyncio.Event()
        with self._listening(told):
            while True:
                try:
                    after = await asyncio.to_thread(self.look)
                except RuntimeAwayError as error:  # its containers may well run on: nothing has vanished
                    log.warning("the engine is away", error=str(error))
                    await asyncio.sleep(AGAIN_SECONDS)
                    continue
                before, self._known = self._known, after
                for change in differences(before, after):
                    yield change
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(told.wait(), RECONCILE_SECONDS)
                    await asyncio.sleep(SETTLE_SECONDS)
                told.clear()

    @contextlib.contextmanager
    def _listening(self, told: asyncio.Event) -> Iterator[None]:
        """Sets `told` with each event, from a thread that outlives the engine's restarts."""
        loop, ended = asyncio.get_running_loop(), threading.Event()

        def listen() -> None:
            while not ended.is_set():
                try:
                    client = docker.DockerClient(f"unix://{self._socket}", timeout=CALL_SECONDS)
                    for _ in client.events(filters={"type": ["container", "network"]}):
                        if ended.is_set():
                            return
                        loop.call_soon_threadsafe(told.set)
                except (DockerException, requests.RequestException, OSError, RuntimeError):
                    ended.wait(AGAIN_SECONDS)  # the reconciliation goes on, and says what is wrong

        threading.Thread(target=listen, daemon=True, name="docker events").start()
        try:
            yield
        finally:
            ended.set()


def named(
    found: Sequence[RuntimeEndpoint], known: Mapping[str, RuntimeEndpoint]
) -> dict[str, RuntimeEndpoint]:
    """By name: the one under which an interface is known, else its own; a name that is taken gets its MAC behind."""
    names = {place_of(each): name for name, each in known.items()}
    by_name = {}
    for each in found:
        if (name := names.get(place_of(each))) is not None:
            by_name[name] = replace(each, name=name)
    for each in found:
        if place_of(each) not in names:
            name = each.name if each.name not in by_name else f"{each.name}@{each.interface}"
            by_name[name] = replace(each, name=name)
    return by_name


def place_of(endpoint: RuntimeEndpoint) -> tuple[Path, str, str]:
    return endpoint.netns, endpoint.interface, endpoint.labels["network"]


def differences(
    before: Mapping[str, RuntimeEndpoint], after: Mapping[str, RuntimeEndpoint]
) -> Iterator[Change]:
    def moved(name: str) -> bool:
        earlier, endpoint = before[name], after[name]
        return (earlier.netns, earlier.interface) != (endpoint.netns, endpoint.interface)

    return changed(before, after, moved)
