"""What the engine's descriptions of containers come to. A real engine: tests/e2e/test_docker.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from isolator.control.docker_runtime import DockerRuntime, differences, endpoints_of, named, unprotectable
from isolator.control.runtime import RuntimeAwayError

WEB: dict[str, Any] = {
    "Id": "4f" * 32,
    "Name": "/web",
    "Config": {"Image": "nginx:1", "Labels": {"app": "shop", "name": "forged", "com.docker.compose.project": "p"}},
    "HostConfig": {"NetworkMode": "default"},
    "NetworkSettings": {
        "SandboxKey": "/var/run/docker/netns/4f4f4f4f4f4f",
        "Networks": {
            "bridge": {"MacAddress": "02:42:ac:11:00:02", "IPAddress": "172.17.0.2"},
            "back": {"MacAddress": "02:42:ac:12:00:02", "IPAddress": "172.18.0.2"},
        },
    },
}  # fmt: skip


def web(**changes: Any) -> dict[str, Any]:
    """`HostConfig__NetworkMode="host"` changes that one value."""
    container = copy.deepcopy(WEB)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = container
        for each in parents:
            place = place[each]
        place[last] = value
    return container


def test_each_network_makes_an_endpoint() -> None:
    back, own = endpoints_of(WEB)
    assert (own.name, own.interface, own.netns) == (
        "web", "02:42:ac:11:00:02", Path("/var/run/docker/netns/4f4f4f4f4f4f"),
    )  # fmt: skip
    assert (back.name, back.interface, back.labels["network"]) == ("web@back", "02:42:ac:12:00:02", "back")


def test_labels_are_its_own_and_what_the_engine_knows() -> None:
    (*_, own) = endpoints_of(WEB)
    assert own.labels == {
        "app": "shop", "com.docker.compose.project": "p", "compose.project": "p",
        "name": "web", "image": "nginx:1", "network": "bridge",
    }  # fmt: skip


def test_a_network_that_is_not_joined_yet_makes_none() -> None:
    (own,) = endpoints_of(web(NetworkSettings__Networks__back={"MacAddress": ""}))
    assert own.name == "web"
    assert endpoints_of(web(NetworkSettings__Networks=None)) == []


@pytest.mark.parametrize(("changes", "reason"), [
    ({"HostConfig__NetworkMode": "host"}, "host's network"),
    ({"HostConfig__NetworkMode": "none"}, "no network"),
    ({"HostConfig__NetworkMode": "container:abc"}, "another container's network"),
    ({"Config__Labels": {"isolator.exclude": "true"}}, "isolator.exclude"),
])  # fmt: skip
def test_what_cannot_be_protected_says_why(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(unprotectable(web(**changes)))
    assert endpoints_of(web(**changes)) == []


def test_the_agents_own_container_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unprotectable(WEB) is None
    monkeypatch.setenv("HOSTNAME", "4f" * 6)
    assert "own" in str(unprotectable(WEB))


def test_differences() -> None:
    before = {each.name: each for each in endpoints_of(WEB)}
    restarted = {each.name: each for each in endpoints_of(web(NetworkSettings__SandboxKey="/ns/other"))}
    relabelled = {each.name: each for each in endpoints_of(web(Config__Labels={"app": "other"}))}
    kinds = [[f"{c.kind} {c.endpoint.name}" for c in differences(before, after)]
             for after in (before, {}, restarted, relabelled)]  # fmt: skip
    assert kinds == [
        [], ["vanished web@back", "vanished web"], ["replaced web@back", "replaced web"],
        ["relabelled web@back", "relabelled web"],
    ]  # fmt: skip
    assert [change.kind for change in differences({}, before)] == ["appeared", "appeared"]


def test_an_endpoint_keeps_its_name_and_a_name_that_is_taken_is_told_apart() -> None:
    known = named(endpoints_of(WEB), {})
    assert list(known) == ["web@back", "web"]
    renamed = endpoints_of(web(Name="/shop"))
    other = endpoints_of(web(NetworkSettings__SandboxKey="/ns/other"))
    again = named([*renamed, *other], known)
    assert (again["web"].labels["name"], again["web"].netns) == ("shop", known["web"].netns)
    assert set(again) == {"web@back", "web", "web@back@02:42:ac:12:00:02", "web@02:42:ac:11:00:02"}
    assert [change.kind for change in differences(known, {name: again[name] for name in known})] == [
        "relabelled"
    ] * 2


def test_one_mac_on_two_networks_is_two_endpoints() -> None:
    same = {"MacAddress": "02:42:ac:11:00:02", "IPAddress": "172.18.0.2"}
    found = endpoints_of(web(NetworkSettings__Networks__back=same))
    known = named(found, {})
    assert list(differences(known, named(found, known))) == []


def test_an_engine_that_is_away_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(RuntimeAwayError, match=r"none.sock: start it, or correct runtime.socket"):
        DockerRuntime(tmp_path / "none.sock").endpoints()
