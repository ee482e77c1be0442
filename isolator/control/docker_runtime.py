"""The runtime for a Docker engine: every running container's interfaces on its networks, with its labels.

    engine ── events ──▶ look again ──▶ containers, inspected ──▶ endpoints ──▶ what differs from the last look

An event says only that something has changed; what there is, is always asked for whole. So lost events, an
engine that was restarted and an agent that was away all end in the same way: the next look is right. It is
repeated every RECONCILE_SECONDS, also without an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import docker  # type: ignore[import-untyped]
import requests
import structlog
from docker.errors import DockerException  # type: ignore[import-untyped]

from isolator.control.docker_containers import (
    GWBRIDGE,
    Inspected,
    as_listed,
    bridge_of,
    described,
    endpoints_of,
    gateway_endpoints,
    gateways,
    is_without,
    name_of,
    own_labels,
    services,
    unprotectable,
    without_image_labels,
)
from isolator.control.engine import host_netns
from isolator.control.runtime import (
    Change,
    RuntimeAwayError,
    RuntimeEndpoint,
    changed,
)
from isolator.control.starts import Starts, sandbox_of_process
from isolator.core.model import Outsider

RECONCILE_SECONDS = 5.0
CALL_SECONDS = 10  # an engine that does not answer for so long counts as away
AGAIN_SECONDS = 1.0  # until an engine that is away is asked again
SETTLE_SECONDS = 0.005  # a start is several events: one look answers them
IMPATIENT_SECONDS = 2.0  # for answers that everybody waits for
HUNG_SECONDS = 10.0
IMAGES_MAX = 4096
OLDEST_API = (1, 41)  # Docker 20.10

log = structlog.get_logger()


class DockerRuntime:
    """Implements `runtime.Runtime` over one engine."""

    name = "docker"

    def __init__(self, socket_path: Path, starts: Starts) -> None:
        self._socket = socket_path
        self._starts = starts
        self._client: Any = None
        self._known: dict[str, RuntimeEndpoint] = {}
        self._seen: dict[str, tuple[Any, Inspected]] = {}  # by id: how it was listed, and what it is
        self._hung: dict[
            str, float
        ] = {}  # until when a container that the engine did not describe is not asked for
        self._images: dict[str, str] = {}  # by id: the reference that it was made with
        self._recalled: dict[tuple[str, str], str] = {}
        self._owners: dict[str, str] = {}  # the container's id by its endpoint's name
        self._sandboxes: dict[str, Path] = {}  # by id: of those whose start waits
        self._prepared: dict[str, Inspected] = {}  # what is about to run, by id
        self._joined: set[str] = set()  # ids of containers that joined or left a network since the last look
        self._happened = False  # an event of the engine since the last look
        self._image_labels: dict[str, dict[str, str]] = {}
        self._image_told: set[str] = set()  # ids of containers for which it was told that theirs do not count
        self._outsiders: tuple[Outsider, ...] = ()
        self._unprotectable: dict[str, str] = {}

    @property
    def host(self) -> Path:
        return host_netns(self._socket)

    def outsiders(self) -> tuple[Outsider, ...]:
        return self._outsiders

    def unprotectable(self) -> dict[str, str]:
        return self._unprotectable

    def recall(self, names: Mapping[tuple[str, str], str]) -> None:
        self._recalled = dict(names)

    def bridges(self) -> set[str]:
        with self._asking() as engine, in_seconds(engine, IMPATIENT_SECONDS):
            return {bridge_of(each) for each in engine.networks() if each["Driver"] == "bridge"} | {GWBRIDGE}

    def configure(self, configured: Sequence[Any]) -> set[str]:
        """Nothing is configured: the engine says what there is."""
        return set()

    def missing(self) -> list[RuntimeEndpoint]:
        return []

    def endpoints(self) -> list[RuntimeEndpoint]:
        """Blocks. Raises RuntimeAwayError."""
        self._known = self.look()
        return list(self._known.values())

    def look(self, starts_alone: bool = False) -> dict[str, RuntimeEndpoint]:
        """Every endpoint by name. Blocks; raises RuntimeAwayError. `starts_alone`: those that run are as they were."""
        with self._asking() as engine:
            running = [container for _, container in self._seen.values()]
            containers = running if starts_alone else self._running(engine)
            ids = {each["Id"] for each in containers}
            self._prepare(engine, ids)
            containers += self._starting(engine, ids)
            by_id = {each["Id"]: self._endpoints(each) for each in containers}
            self._image_told &= by_id.keys()
            found = [endpoint for its in by_id.values() for endpoint in its]
            others = gateways(containers)
            if any("com.docker.swarm.service.id" in (each["Config"]["Labels"] or {}) for each in containers):
                found += self._swarm_endpoints(engine, containers)
                others += self._services(engine)
        self._outsiders = tuple(others)
        self._report({name_of(each): reason for each in containers if (reason := unprotectable(each))})
        by_name = named(found, self._known, self._recalled)
        owners = {place_of(each): container for container, its in by_id.items() for each in its}
        self._owners = {name: owners.get(place_of(each), "") for name, each in by_name.items()}
        return by_name

    def _endpoints(self, container: Inspected) -> list[RuntimeEndpoint]:
        """One that is described in an odd way stays as it was, and is nobody else's trouble."""
        try:
            return endpoints_of(container)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            log.error(
                "the engine describes it in an odd way", container=container.get("Id"), error=repr(error)
            )
            return [
                each for name, each in self._known.items() if self._owners.get(name) == container.get("Id")
            ]

    @contextlib.contextmanager
    def _asking(self) -> Iterator[Any]:
        """The engine's API. Whatever goes wrong in the block is RuntimeAwayError."""
        if not self._socket.is_socket():
            raise RuntimeAwayError(
                f"no Docker engine at {self._socket}: start it, or correct runtime.socket in the config"
            )
        try:
            if self._client is None:
                self._client = docker.DockerClient(f"unix://{self._socket}", timeout=CALL_SECONDS)
                check_version(self._client.version())
            yield self._client.api
        except PermissionError as error:
            raise RuntimeAwayError(f"{self._socket} may not be opened: run the agent as root") from error
        except (DockerException, requests.RequestException, OSError) as error:
            self._client = None
            raise RuntimeAwayError(f"no Docker engine answers at {self._socket}: {error}") from error

    def _running(self, engine: Any) -> list[Inspected]:
        """Running and paused ones. Asks anew for those alone that are listed in another way than last time."""
        seen = {}
        for listed in engine.containers():
            look = {key: value for key, value in listed.items() if key != "Status"}  # `Up 5 seconds`
            before, container = self._seen.get(listed["Id"], (None, None))
            if look != before:
                try:
                    asked = self._inspected(engine, listed["Id"])
                except docker.errors.NotFound:  # gone meanwhile
                    continue
                container = asked or container or self._unseen(engine, listed)
                look = look if asked else {}
            if container is not None:
                seen[listed["Id"]] = look, container
        self._seen = seen
        return [container for _, container in seen.values()]

    def _inspected(self, engine: Any, container: str) -> Inspected | None:
        """None: the engine does not answer in time, since the container hangs in something. The others must not wait
        for it each time."""
        if time.monotonic() < self._hung.get(container, 0.0):
            return None
        try:
            with in_seconds(engine, IMPATIENT_SECONDS):
                found = self._vetted(engine, engine.inspect_container(container))
        except requests.ReadTimeout:
            log.warning("the engine does not describe it", container=container)
            self._hung[container] = time.monotonic() + HUNG_SECONDS
            return None
        self._hung.pop(container, None)
        self._remember_image(container, found["Config"]["Image"])
        return found

    def _unseen(self, engine: Any, listed: Mapping[str, Any]) -> Inspected | None:
        """One that an agent before has spliced, as far as the list shows it: to leave it out would be to say that it
        has gone."""
        networks = {
            name: each for name, each in (listed["NetworkSettings"]["Networks"] or {}).items() if each
        }
        macs = {each["MacAddress"] for each in networks.values()}
        sandbox = next((netns for netns, interface in self._recalled if interface in macs), None)
        if sandbox is None:
            return None
        settings = {"SandboxKey": sandbox, "Networks": networks}
        return self._vetted(engine, as_listed(listed, listed["Image"], settings))

    def _remember_image(self, container: str, image: str) -> None:
        self._images[container] = image
        if len(self._images) > IMAGES_MAX:
            del self._images[next(iter(self._images))]

    def _starting(self, engine: Any, running: set[str]) -> list[Inspected]:
        """Those whose start waits for us."""
        self._starts.forget(running)
        found: list[Inspected] = []
        for container, pid in list(self._starts.waiting.items()):
            known, sandbox = self._about_to_run(engine, container), sandbox_of_process(pid)
            if known is not None and is_without(known):
                self._starts.answer(container)
            elif known is not None and sandbox is not None:
                self._sandboxes[container] = sandbox
                settings = {**known["NetworkSettings"], "SandboxKey": str(sandbox)}
                found.append({**known, "NetworkSettings": settings})
        return found

    def _about_to_run(self, engine: Any, container: str) -> Inspected | None:
        """The engine does not describe a container before it runs: it is put together from how it is listed and from
        its networks. With the first of them joined its process is still to be made: there is time for that."""
        if container not in self._prepared:
            listed = engine.containers(all=True, filters={"id": container})
            image = self._images.get(container) or (listed[0]["Image"] if listed else "")
            if not listed or image.startswith("sha256:"):  # policy may select by what it was made with
                return None
            known = described(listed[0], image, engine.inspect_network)
            self._prepared[container] = self._vetted(engine, known)
        return self._prepared[container]

    def _prepare(self, engine: Any, running: set[str]) -> None:
        joined, self._joined = self._joined, set()
        for container in self._prepared.keys() & (running | joined):
            del self._prepared[container]
        for container in joined - running:
            self._about_to_run(engine, container)

    def opened(self, endpoints: Collection[RuntimeEndpoint]) -> None:
        self._sandboxes = {
            each: path for each, path in self._sandboxes.items() if each in self._starts.waiting
        }
        for container, sandbox in self._sandboxes.items():
            its = {name for name, owner in self._owners.items() if owner == container}
            if its and its <= {each.name for each in endpoints if each.netns == sandbox}:
                self._starts.answer(container)

    def _vetted(self, engine: Any, container: Inspected) -> Inspected:
        """`without_image_labels`; the image is asked for where it matters, and once."""
        if not container["Config"]["Labels"]:
            return container
        own = own_labels(container)
        vetted = without_image_labels(container, self._labels_of_image(engine, container["Image"]))
        dropped = own.keys() - own_labels(vetted).keys()
        if dropped and container["Id"] not in self._image_told:
            self._image_told.add(container["Id"])
            log.warning(
                "labels of its image do not count", container=name_of(container), labels=sorted(dropped)
            )
        return vetted

    def _labels_of_image(self, engine: Any, image: str) -> dict[str, str] | None:
        """None: the engine does not know it any more."""
        if image not in self._image_labels:
            try:
                config = engine.inspect_image(image).get("Config") or {}
            except docker.errors.NotFound:
                return None
            self._image_labels[image] = config.get("Labels") or {}
        return self._image_labels[image]

    def _swarm_endpoints(self, engine: Any, containers: Sequence[Inspected]) -> list[RuntimeEndpoint]:
        try:
            return gateway_endpoints(engine.inspect_network(GWBRIDGE), containers)
        except docker.errors.NotFound:
            return []

    def _services(self, engine: Any) -> list[Outsider]:
        """Managers know them; a worker does not, and its rules name their virtual addresses by CIDR."""
        try:
            return services(engine.services(), {each["Id"]: each["Name"] for each in engine.networks()})
        except docker.errors.APIError:
            return []

    def _report(self, unprotectable: dict[str, str]) -> None:
        for name in unprotectable.keys() - self._unprotectable.keys():
            log.warning("not protectable", container=name, reason=unprotectable[name])
        self._unprotectable = unprotectable

    async def changes(self) -> AsyncIterator[Change]:
        told, happened = asyncio.Event(), True
        with self._listening(told):
            while True:
                try:
                    after = await asyncio.to_thread(self.look, starts_alone=not happened)
                except RuntimeAwayError as error:  # its containers may well run on: nothing has vanished
                    log.warning("the engine is away", error=str(error))
                    await asyncio.sleep(AGAIN_SECONDS)
                    continue
                before, self._known = self._known, after
                for change in differences(before, after):
                    yield change
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(told.wait(), RECONCILE_SECONDS)
                    if self._happened:
                        await asyncio.sleep(SETTLE_SECONDS)
                happened = self._happened or not told.is_set()
                self._happened = False
                told.clear()

    @contextlib.contextmanager
    def _listening(self, told: asyncio.Event) -> Iterator[None]:
        """Sets `told` with each event, from a thread that outlives the engine's restarts."""
        loop, ended = asyncio.get_running_loop(), threading.Event()

        def event(told_of: Mapping[str, Any]) -> None:
            attributes = (told_of.get("Actor") or {}).get("Attributes") or {}
            if told_of.get("Type") == "network" and "container" in attributes:
                self._joined.add(attributes["container"])
            elif told_of.get("Type") == "container" and "image" in attributes:
                self._remember_image(told_of["Actor"].get("ID") or "", attributes["image"])
            self._happened = True
            told.set()

        def asked() -> None:
            if self._starts.read():
                told.set()

        def listen() -> None:
            while not ended.is_set():
                try:
                    client = docker.DockerClient(f"unix://{self._socket}", timeout=CALL_SECONDS)
                    with contextlib.closing(client):
                        for told_of in client.events(filters={"type": ["container", "network"]}, decode=True):
                            if ended.is_set():
                                return
                            loop.call_soon_threadsafe(event, told_of)
                except (DockerException, requests.RequestException, OSError, RuntimeError):
                    ended.wait(AGAIN_SECONDS)  # the reconciliation goes on, and says what is wrong

        threading.Thread(target=listen, daemon=True, name="docker events").start()
        with self._starts.listening() as fd:
            loop.add_reader(fd, asked)
            try:
                yield
            finally:
                loop.remove_reader(fd)
                ended.set()


@contextlib.contextmanager
def in_seconds(engine: Any, seconds: float) -> Iterator[None]:
    """The engine's answers in the block have to come sooner."""
    before, engine.timeout = engine.timeout, seconds
    try:
        yield
    finally:
        engine.timeout = before


def check_version(told: Mapping[str, Any]) -> None:
    """Raises DockerException for an engine that is too old."""
    api = tuple(int(part) for part in str(told.get("ApiVersion", "0.0")).split("."))
    if api < OLDEST_API:
        raise DockerException(
            f"it speaks API {told.get('ApiVersion')} (Docker {told.get('Version')}): Docker 20.10 or later is needed"
        )


def named(
    found: Sequence[RuntimeEndpoint],
    known: Mapping[str, RuntimeEndpoint],
    recalled: Mapping[tuple[str, str], str] = MappingProxyType({}),
) -> dict[str, RuntimeEndpoint]:
    """By name: the one under which an interface is known, or was known to an agent before, else its own; a name that is
    taken gets its MAC behind."""
    places = Counter((str(each.netns), each.interface) for each in found)
    names = {
        place_of(each): recalled[place]
        for each in found
        if (place := (str(each.netns), each.interface)) in recalled and places[place] == 1
    }
    names |= {place_of(each): name for name, each in known.items()}
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
