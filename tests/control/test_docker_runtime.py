"""What the engine's descriptions of containers come to. A real engine: tests/e2e/test_docker.py."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import requests
from docker.errors import DockerException, NotFound  # type: ignore[import-untyped]

from isolator.control import docker_runtime
from isolator.control.docker_containers import (
    bridge_of,
    endpoints_of,
    gateway_endpoints,
    gateways,
    services,
    unprotectable,
    without_image_labels,
)
from isolator.control.docker_runtime import DockerRuntime, check_version, differences, named
from isolator.control.label_policy import label_policy
from isolator.control.runtime import RuntimeAwayError
from isolator.control.starts import Starts
from isolator.core.model import Outsider

WEB: dict[str, Any] = {
    "Id": "4f" * 32,
    "Name": "/web",
    "Config": {"Image": "nginx:1", "Labels": {"app": "shop", "name": "forged", "com.docker.compose.project": "p"}},
    "HostConfig": {"NetworkMode": "default"},
    "NetworkSettings": {
        "SandboxKey": "/run/docker/netns/4f4f4f4f4f4f",
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
        "web", "02:42:ac:11:00:02", Path("/run/docker/netns/4f4f4f4f4f4f"),
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


@pytest.mark.parametrize("mode", ["host", "none", "container:abc"])
def test_who_has_no_interface_of_its_own_makes_none_and_one_on_the_hosts_network_is_told(mode: str) -> None:
    none = {"none": {"MacAddress": ""}}
    container = web(
        HostConfig__NetworkMode=mode, **{"NetworkSettings__Networks": none} if mode == "none" else {}
    )
    assert endpoints_of(container) == []
    assert (unprotectable(container) is not None) == (mode == "host")


def test_who_is_left_alone_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {each.exempt for each in endpoints_of(WEB)} == {None}
    excluded = web(Config__Labels={"isolator.exclude": "true"})
    assert {each.exempt for each in endpoints_of(excluded)} == {"it has the label isolator.exclude"}
    monkeypatch.setenv("HOSTNAME", "4f" * 6)
    assert {each.exempt for each in endpoints_of(WEB)} == {"it is the agent's own"}


# -- whose labels they are -----------------------------------------------------------------------------------

MODE, EXCLUDED = {"isolator.mode": "monitor"}, {"isolator.exclude": "true"}


@pytest.mark.parametrize(("own", "image", "left"), [
    (MODE, {}, MODE),
    (MODE, MODE, {}),
    (MODE, {"isolator.mode": "protect"}, MODE),
    (MODE | EXCLUDED, EXCLUDED, MODE),
    ({"app": "shop"} | EXCLUDED, {"app": "shop"} | EXCLUDED, {"app": "shop"}),
    ({"Isolator.Mode": "x"}, {"Isolator.Mode": "x"}, {}),
    (EXCLUDED, None, {}),
])  # fmt: skip
def test_policy_that_an_image_carries_does_not_count(
    own: dict[str, str], image: dict[str, str] | None, left: dict[str, str]
) -> None:
    container = web(Config__Labels=own)
    assert without_image_labels(container, image)["Config"]["Labels"] == left
    assert container["Config"]["Labels"] == own


def test_policy_of_a_container_whose_image_is_gone_is_a_mistake() -> None:
    labels = without_image_labels(web(Config__Labels=MODE), None)["Config"]["Labels"]
    source = label_policy({**labels, "name": "web"})
    assert source is not None and "label isolator.untold:1:1: its image is gone" in str(source.problems[-1])


class FakeEngine:
    """What DockerRuntime asks the SDK for: one container that is about to run or runs, and its image unless that is
    gone."""

    def __init__(self, labels: dict[str, str], image: dict[str, str] | None) -> None:
        self.labels, self.image, self.asked, self.looks = labels, image, 0, 0
        self.runs = False
        self.timeout = 1.0
        self.api = self

    def containers(self, all: bool = False, filters: object = None) -> list[dict[str, Any]]:
        """Each look finds it changed."""
        self.looks += 1
        listed = {
            "Id": WEB["Id"], "State": self.looks, "Names": ["/web"], "Image": "nginx:1", "ImageID": "sha256:1",
            "Labels": self.labels, "HostConfig": WEB["HostConfig"], "NetworkSettings": WEB["NetworkSettings"],
        }  # fmt: skip
        return [listed] if self.runs or all else []

    def inspect_network(self, name: str) -> dict[str, Any]:
        attachment = WEB["NetworkSettings"]["Networks"][name]
        return {"Containers": {WEB["Id"]: {**attachment, "IPv4Address": "172.17.0.2/16", "IPv6Address": ""}}}

    def inspect_container(self, _: str) -> dict[str, Any]:
        return {**web(Config__Labels=self.labels), "Image": "sha256:1"}

    def inspect_image(self, image: str) -> dict[str, Any]:
        assert image == "sha256:1"
        self.asked += 1
        if self.image is None:
            raise NotFound("no such image")
        return {"Config": {"Labels": self.image}}


@pytest.mark.parametrize(("labels", "image", "left", "asked"), [
    ({}, None, set(), 0),
    ({"app": "shop"}, {}, set(), 1),
    ({"app": "shop"}, None, set(), 3),
    (EXCLUDED, EXCLUDED, set(), 1),
    (MODE, MODE, set(), 1),
    (MODE, {}, {"isolator.mode"}, 1),
    (MODE, None, {"isolator.mode", "isolator.untold"}, 3),
])  # fmt: skip
def test_the_image_is_asked_for_where_it_matters_and_once(
    labels: dict[str, str], image: dict[str, str] | None, left: set[str], asked: int,
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of a container whose start waits for us and of one that runs."""
    monkeypatch.setattr(
        docker_runtime, "sandbox_of_process", lambda _: Path("/run/docker/netns/4f4f4f4f4f4f")
    )
    starts = Starts(tmp_path, 1)
    starts.waiting[WEB["Id"]] = os.getpid()
    runtime = DockerRuntime(tmp_path / "d.sock", starts)
    engine = runtime._client = FakeEngine(labels, image)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "d.sock"))
        for runs in (False, False, True, True):
            engine.runs = runs
            found = runtime.endpoints()
            assert [each.name for each in found] == ["web@back", "web"]
            assert {key for key in found[0].labels if key.startswith("isolator.")} == left
            assert (not starts.waiting) == runs
    assert engine.asked == asked
    assert capsys.readouterr().out.count("labels of its image do not count") == (image == labels)


# -- who else is there ---------------------------------------------------------------------------------------


def test_a_networks_gateway_is_an_outsider_with_its_networks_name() -> None:
    gateway = {"MacAddress": "02:42:ac:12:00:02", "Gateway": "172.18.0.1", "IPv6Gateway": "fd00::1"}
    assert gateways([web(NetworkSettings__Networks__back=gateway), WEB]) == [
        Outsider("gateway of back", {"entity": "gateway", "network": "back"},
                 (ip_address("172.18.0.1"), ip_address("fd00::1")))
    ]  # fmt: skip


def test_a_services_virtual_address_has_the_labels_of_its_tasks() -> None:
    """Fed with what a Swarm manager's API answers: this kernel may have no vxlan, and then no Swarm network."""
    described = {
        "Spec": {
            "Name": "shop_api",
            "TaskTemplate": {"ContainerSpec": {"Image": "api:1", "Labels": {"app": "shop", "name": "x"}}},
        },
        "Endpoint": {"VirtualIPs": [{"NetworkID": "n1", "Addr": "10.0.1.2/24"}]},
    }
    none = {"Spec": {"Name": "job", "TaskTemplate": {}}}
    assert services([described, none], {"n1": "shop_net"}) == [
        Outsider(
            "service shop_api@shop_net",
            {"app": "shop", "swarm.service": "shop_api", "image": "api:1", "network": "shop_net"},
            (ip_address("10.0.1.2"),),
        )
    ]


def test_a_swarm_containers_way_out_is_an_endpoint_and_the_meshs_own_is_left_alone() -> None:
    """Likewise."""
    task = web(NetworkSettings__SandboxID="abcdef012345" + "0" * 52)
    network = {
        "Name": "docker_gwbridge",
        "Containers": {
            "t": {"Name": "gateway_abcdef012345", "MacAddress": "02:42:ac:13:00:03", "IPv4Address": "172.19.0.3/16"},
            "i": {"Name": "gateway_ingress_sbox", "MacAddress": "02:42:ac:13:00:02", "IPv4Address": "172.19.0.2/16"},
            "u": {"Name": "gateway_ffffffffffff", "MacAddress": "02:42:ac:13:00:04", "IPv4Address": "172.19.0.4/16"},
        },
    }  # fmt: skip
    way_out, ingress = gateway_endpoints(network, [task])
    assert (way_out.name, way_out.interface, way_out.exempt) == (
        "web@docker_gwbridge", "02:42:ac:13:00:03", None,
    )  # fmt: skip
    assert way_out.labels["app"] == "shop" and way_out.addresses == (ip_address("172.19.0.3"),)
    assert (str(ingress.netns), ingress.exempt) == ("/run/docker/netns/ingress_sbox", "it is Swarm's own")


def test_bridges_have_the_name_that_was_given_or_their_networks_id() -> None:
    assert bridge_of({"Id": "0123456789abcdef", "Options": None}) == "br-0123456789ab"
    named_one = {"Id": "0123456789abcdef", "Options": {"com.docker.network.bridge.name": "docker0"}}
    assert bridge_of(named_one) == "docker0"


def test_an_engine_that_is_too_old_is_refused() -> None:
    check_version({"ApiVersion": "1.41", "Version": "20.10.24"})
    with pytest.raises(DockerException, match=r"20\.10 or later"):
        check_version({"ApiVersion": "1.40", "Version": "19.03.1"})


# -- from look to look ---------------------------------------------------------------------------------------


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
        DockerRuntime(tmp_path / "none.sock", Starts(tmp_path, 1)).endpoints()


class FakeApi:
    """An engine whose one container is described by `describe`."""

    def __init__(self, describe: Callable[[], dict[str, Any]]) -> None:
        self.describe, self.timeout, self.asked = describe, 1.0, 0
        self.image: dict[str, str] = {}
        self.listed: dict[str, Any] = {
            "Id": WEB["Id"], "State": "running", "Names": ["/web"], "Image": "nginx:1", "ImageID": "sha256:1",
            "Labels": {}, "HostConfig": WEB["HostConfig"], "NetworkSettings": WEB["NetworkSettings"],
        }  # fmt: skip
        self.api = self

    def containers(self, all: bool = False, filters: object = None) -> list[dict[str, Any]]:
        return [{**self.listed, "Look": object()}]

    def inspect_container(self, _: str) -> dict[str, Any]:
        self.asked += 1
        return {"Image": "sha256:1", **self.describe()}

    def inspect_image(self, _: str) -> dict[str, Any]:
        return {"Config": {"Labels": self.image}}

    def inspect_network(self, name: str) -> dict[str, Any]:
        attachment = {"MacAddress": "02:42:ac:11:00:02", "IPv4Address": "172.17.0.2/16", "IPv6Address": ""}
        return {"Containers": {WEB["Id"]: attachment}}


Looking = Callable[[Callable[[], dict[str, Any]]], tuple[DockerRuntime, FakeApi]]


@pytest.fixture
def looking(tmp_path: Path) -> Iterator[Looking]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "d.sock"))

        def made(describe: Callable[[], dict[str, Any]]) -> tuple[DockerRuntime, FakeApi]:
            runtime = DockerRuntime(tmp_path / "d.sock", Starts(tmp_path, 1))
            runtime._client = engine = FakeApi(describe)
            return runtime, engine

        yield made


def hung() -> dict[str, Any]:
    raise requests.ReadTimeout


def test_an_endpoint_is_called_as_an_agent_before_called_it(looking: Looking) -> None:
    """Whatever its container is called by now: else its splice would be nobody's, and be put back."""
    runtime, _ = looking(lambda: web(Name="/renamed"))
    runtime.recall({("/run/docker/netns/4f4f4f4f4f4f", "02:42:ac:11:00:02"): "web"})
    assert {each.name for each in runtime.endpoints()} == {"renamed@back", "web"}
    assert {each.labels["name"] for each in runtime.endpoints()} == {"renamed"}


def test_a_container_that_the_engine_does_not_describe_is_there_all_the_same(looking: Looking) -> None:
    runtime, engine = looking(hung)
    assert runtime.endpoints() == [], "nobody knows where it is"
    runtime.recall({("/run/docker/netns/4f4f4f4f4f4f", "02:42:ac:11:00:02"): "web"})
    found = {each.name: each for each in runtime.endpoints()}
    assert str(found["web"].netns) == "/run/docker/netns/4f4f4f4f4f4f"
    assert engine.asked == 1, "not each time: everybody waits for it"
    runtime._hung.clear()
    engine.describe = lambda: web(Config__Labels={"app": "late"})
    assert {each.name: each.labels.get("app") for each in runtime.endpoints()}["web"] == "late"


def test_an_odd_description_is_nobody_elses_trouble(looking: Looking) -> None:
    runtime, engine = looking(lambda: WEB)
    before = runtime.endpoints()
    engine.describe = lambda: web(NetworkSettings__Networks={"bridge": {"MacAddress": 7, "IPAddress": "x"}})
    assert runtime.endpoints() == before
    engine.describe = lambda: web(Config__Labels={"isolator.exclude": None})
    assert [each.exempt for each in runtime.endpoints()] == [None, None]


def test_labels_of_the_image_are_told_apart(looking: Looking) -> None:
    runtime, engine = looking(lambda: web(Config__Labels={"app": "registry", "mine": "1"}))
    engine.image = {"app": "registry", "mine": "2"}
    assert {each.inherited for each in runtime.endpoints()} == {frozenset({"app"})}


def test_what_is_about_to_run_from_an_image_that_was_retagged_is_not_guessed(looking: Looking) -> None:
    """Policy may select by the reference; the list shows another image's id."""
    runtime, engine = looking(lambda: WEB)
    engine.listed["Image"] = "sha256:1"
    assert runtime._about_to_run(engine, WEB["Id"]) is None
    runtime._remember_image(WEB["Id"], "nginx:1")
    known = runtime._about_to_run(engine, WEB["Id"])
    assert known is not None and known["Config"]["Image"] == "nginx:1"


def test_a_start_is_answered_for_the_sandbox_that_waits(looking: Looking) -> None:
    runtime, _ = looking(lambda: WEB)
    runtime.endpoints()
    starts = runtime._starts
    starts.folder.mkdir()
    starts.waiting[WEB["Id"]] = 1
    starts.unanswered.add(WEB["Id"])
    runtime._sandboxes[WEB["Id"]] = Path("/run/docker/netns/new")
    before = endpoints_of(WEB)
    runtime.opened(before)
    assert starts.unanswered, "those are of the start before"
    runtime.opened([replace(each, netns=Path("/run/docker/netns/new")) for each in before])
    assert not starts.unanswered
