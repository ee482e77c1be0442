from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from isolator.control.netns_runtime import NetnsRuntime, namespace_inode
from isolator.control.runtime import Change, Runtime, RuntimeEndpoint

PREFIX = "isort-"


@dataclass
class Configured:
    name: str
    netns: str
    interface: str = "eth0"
    labels: dict[str, str] = field(default_factory=dict)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two namespaces; a test may delete and add them under the same names."""
    names = [f"{PREFIX}a", f"{PREFIX}b"]
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        ip("netns", "add", name)
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def told(changes: list[Change]) -> list[tuple[str, str]]:
    return [(change.kind.value, change.endpoint.name) for change in changes]


def test_an_endpoint_whose_labels_are_policy_is_known_by_its_name(tmp_path: Path) -> None:
    label = {"isolator.allow.ingress": "[]"}
    runtime = NetnsRuntime(
        [Configured("a", "a", labels=label), Configured("b", "b", labels={"app": "x"})], tmp_path
    )
    assert [each.labels for each in runtime.missing()] == [{**label, "name": "a"}, {"app": "x"}]


def test_what_is_no_namespace_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    runtime = NetnsRuntime([Configured("a", "file"), Configured("b", "nothing")], folder=tmp_path)
    assert runtime.endpoints() == []
    assert [endpoint.name for endpoint in runtime.missing()] == ["a", "b"]
    assert namespace_inode(Path("/proc/self/ns/net")) is not None


@pytest.mark.root
def test_endpoints_that_come_and_go(namespaces: list[str]) -> None:
    first, second = namespaces
    runtime = NetnsRuntime([Configured("a", first), Configured("b", second), Configured("c", f"{PREFIX}no")])
    assert [endpoint.netns for endpoint in runtime.endpoints()] == [
        Path(f"/run/netns/{first}"),
        Path(f"/run/netns/{second}"),
    ]
    assert told(runtime.poll()) == []
    ip("netns", "del", first)
    assert told(runtime.poll()) == [("vanished", "a")]
    assert told(runtime.poll()) == []
    ip("netns", "add", first)
    assert told(runtime.poll()) == [("appeared", "a")]


@pytest.mark.root
def test_same_name_another_namespace_is_replaced(namespaces: list[str]) -> None:
    runtime = NetnsRuntime([Configured("a", namespaces[0])])
    runtime.endpoints()
    with Path(
        f"/run/netns/{namespaces[0]}"
    ).open():  # the old one lives on, so that its inode is not used again
        ip("netns", "del", namespaces[0])
        ip("netns", "add", namespaces[0])
        assert told(runtime.poll()) == [("replaced", "a")]


@pytest.mark.root
def test_a_new_config_is_told_as_changes(namespaces: list[str]) -> None:
    first, second = namespaces
    runtime = NetnsRuntime([Configured("a", first), Configured("b", second)])
    runtime.endpoints()
    gone = runtime.configure([Configured("a", first, labels={"role": "api"}), Configured("c", second)])
    assert gone == {"b"} and runtime.missing() == [RuntimeEndpoint("c", Path(f"/run/netns/{second}"), "eth0")]
    assert told(runtime.poll()) == [("vanished", "b"), ("relabelled", "a"), ("appeared", "c")]


@pytest.mark.root
def test_changes_without_end(namespaces: list[str]) -> None:
    runtime = NetnsRuntime([Configured("a", namespaces[0])], poll_seconds=0.01)
    as_runtime: Runtime = runtime
    assert [endpoint.name for endpoint in as_runtime.endpoints()] == ["a"]

    async def first_change() -> RuntimeEndpoint:
        async for change in as_runtime.changes():
            return change.endpoint
        raise AssertionError

    async def watch() -> str:
        watching = asyncio.create_task(first_change())
        await asyncio.sleep(0.05)
        ip("netns", "del", namespaces[0])
        return (await asyncio.wait_for(watching, 10)).name

    assert asyncio.run(watch()) == "a"
