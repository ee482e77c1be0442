"""What people do with containers all day, with a real engine; afterwards nothing is left that belongs to nothing.

`ISOLATOR_OPERATIONS`: how many random operations (`make operations`: 200).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker  # type: ignore[import-untyped]
import pytest

from isolator.datapath.gate import Gate
from isolator.datapath.netns import Netns
from isolator.datapath.nftables import run
from isolator.datapath.node import Names
from isolator.datapath.pins import layouts
from isolator.lab import wait_for
from tests.e2e.docker_place import ALLOWED, API, DENIED, IDLE, OTHER, POLICY, SERVER, WEB, Place, docker_place

pytestmark = [pytest.mark.root, pytest.mark.slow]
STATE = Path("/run/isolator-test-life")
OPERATIONS = int(os.environ.get("ISOLATOR_OPERATIONS", "40"))
CONTAINERS = int(os.environ.get("ISOLATOR_CONTAINERS", "8"))
PROBES = """\
---
kind: Policy
metadata: {name: probes}
spec:
  select: {probed: 'yes'}
  ingress:
    - name: health
      from: [{select: {entity: host}}]
      ports: [{port: 80}]
      http: [{methods: [GET], path: /api/v1/books}]
"""
COMPOSE = """\
version: "2.4"
services:
  api:
    image: isolator-test:1
    command: [/bin/httpd, -f, -p, "80", -h, /www]
    labels: {app: shop, role: api}
  web:
    image: isolator-test:1
    command: [/bin/sleep, "3600"]
    stop_signal: SIGKILL
    labels: {app: shop, role: web}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with docker_place(tmp_path_factory.mktemp("life"), STATE, POLICY + PROBES) as made:
        yield made


@pytest.fixture(autouse=True)
def clean(place: Place) -> Iterator[None]:
    yield
    for container in place.engine.client.containers.list(all=True):
        container.remove(force=True)
    place.settled()


def from_host(place: Place, url: str) -> str:
    """The status that the host's own curl sees."""
    command = ["nsenter", f"--net=/run/netns/{place.engine.netns}",
               "curl", "-s", "-m", "2", "-o", "/dev/null", "-w", "%{http_code}", url]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True).stdout


def nothing_is_left(place: Place) -> None:
    """Devices, map entries, journal and gate belong to endpoints, and to each one."""
    states = place.states()
    names, count = Names.of(STATE), len(states)
    links = json.loads(subprocess.check_output(["ip", "-j", "-n", names.netns, "link"]))
    assert len(links) == 3 + 2 * count, [each["ifname"] for each in links]
    assert len(list(names.journal.iterdir())) == count
    (folder,) = layouts(names.pins)
    numbers = {int(key[0], 0) for key in keys(folder / "endpoints")}
    assert len(numbers) == count and len(keys(folder / "ports")) == 2 * count
    for name in ("addresses", "flows4", "flows7"):
        assert {endpoint_of(key) for key in keys(folder / name)} <= numbers, name
    with Gate(place.engine.netns, names.netns) as gate, Netns(place.engine.netns) as host:
        ends = {each.name for each in gate.host_ends()}
        with host.entered():
            listed = run(f"list table bridge {names.netns.replace('-', '_')}")
    assert {*next(each["set"] for each in listed if "set" in each).get("elem", ())} == ends
    assert len(ends) == count


def keys(path: Path) -> list[list[str]]:
    """The keys of a pinned map, each as its bytes."""
    dumped = json.loads(subprocess.check_output(["bpftool", "-j", "map", "dump", "pinned", str(path)]))
    return [each["key"] for each in dumped]


def endpoint_of(key: list[str]) -> int:
    return int.from_bytes(bytes(int(each, 0) for each in key[:4]), "little")


# -- who is at the other end ---------------------------------------------------------------------------------


def test_the_hosts_probes_are_allowed_by_name_and_published_ports_show_the_gateway(place: Place) -> None:
    """Without such a rule the host is nobody's peer; another container behind a published port is the host too."""
    engine = place.engine
    engine.run("probed", *SERVER, labels={**API, "probed": "yes"}, ports={"80/tcp": 18080})
    engine.run("api", *SERVER, labels=API, ports={"80/tcp": 18081})
    engine.run("other", *IDLE, labels=OTHER)
    place.settled("probed", "api", "other")
    probed, api = (engine.address(name) for name in ("probed", "api"))
    wait_for(lambda: from_host(place, f"http://{probed}/{DENIED}") == "403", "the policy is not in force")
    for base in (probed, "172.17.0.1:18080"):
        assert from_host(place, f"http://{base}/{ALLOWED}") == "200"
        assert from_host(place, f"http://{base}/{DENIED}") == "403"
    for base in (api, "172.17.0.1:18081"):
        assert from_host(place, f"http://{base}/{ALLOWED}") == "000"
    assert engine.fetch("other", f"http://172.17.0.1:18080/{ALLOWED}") == ALLOWED
    assert engine.fetch("other", f"http://172.17.0.1:18081/{ALLOWED}") == "000"
    assert engine.fetch("other", f"http://{probed}/{ALLOWED}") == "000"


# -- a day's work --------------------------------------------------------------------------------------------


def test_compose_up_scale_down(place: Place) -> None:
    file = place.root / "compose.yaml"
    file.write_text(COMPOSE)

    def compose(*words: str) -> None:
        command = ["docker-compose", "-p", "shop", "-f", str(file), *words]
        host = {"DOCKER_HOST": f"unix://{place.engine.socket}"}
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **host})

    def fetched() -> tuple[str, str]:
        address = place.engine.address("shop_api_1", "shop_default")
        allowed, denied = (
            place.engine.fetch("shop_web_3", f"http://{address}/{p}") for p in (ALLOWED, DENIED)
        )
        return allowed, denied

    compose("up", "-d")
    place.settled("shop_api_1", "shop_web_1")
    labels = place.labels("shop_web_1")
    assert (labels["compose.project"], labels["compose.service"]) == ("shop", "web")
    compose("up", "-d", "--scale", "web=3")
    place.settled("shop_api_1", "shop_web_1", "shop_web_2", "shop_web_3")
    wait_for(lambda: fetched() == (ALLOWED, "403"), "the policy is not in force")
    nothing_is_left(place)
    compose("up", "-d", "--scale", "web=1", "--scale", "api=0")
    place.settled("shop_web_1")
    compose("down", "-t", "1")
    place.settled()
    nothing_is_left(place)


def test_containers_that_end_at_once(place: Place) -> None:
    """Some of them in the middle of their splice."""
    for number in range(10):
        place.engine.client.containers.run(
            "isolator-test:1", ["/bin/sleep", str(number * 0.02)], name=f"short{number}", detach=True
        )
    for container in place.engine.client.containers.list(all=True):
        container.wait(timeout=20)
    place.settled()
    nothing_is_left(place)


def test_who_is_excluded_is_left_alone_and_can_be_named(place: Place) -> None:
    engine = place.engine
    engine.run("api", *SERVER, labels=API)
    engine.run("web", *IDLE, labels={**WEB, "isolator.exclude": "true"})
    wait_for(
        lambda: place.states() == {"api": "enforced", "web": "exempt"}, f"not what {place.status()} says"
    )
    place.enforces("web", "api")


def test_random_operations_and_two_deaths_leave_nothing_behind_and_everybody_protected(place: Place) -> None:
    chance = random.Random(20261124)
    world = Containers(place)
    deaths = {OPERATIONS // 3, 2 * OPERATIONS // 3}
    for at in range(OPERATIONS):
        if at in deaths:
            place.stop_agent(signal.SIGKILL)
        elif at - 4 in deaths:  # a few operations with nobody there
            place.start_agent()
        world.operate(chance)
    for name in world.roles:
        world.start(name)
    servers = [name for name, role in world.roles.items() if role == "api"]
    for name in servers:
        world.enforces(name)
    wait_for(lambda: world.seen() == world.interfaces(), f"not what {place.status()} says")
    nothing_is_left(place)
    print(f"\n{OPERATIONS} operations, 2 x kill -9: {len(world.seen())} endpoints, {len(servers)} of them servers, "
          "all enforced, nothing left over")  # fmt: skip
    assert servers


class Containers:
    """Some containers and networks that a test plays with."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.engine = place.engine
        self.roles: dict[str, str] = {}
        self.made, self.probing = 0, False
        self.networks = [self.engine.client.networks.create(name) for name in ("blue", "green")]

    def operate(self, chance: random.Random) -> None:
        known = sorted(self.roles)
        operation = chance.choice((self.start, self.start, self.start, self.stop, self.restart, self.kill, self.connect,
                                   self.disconnect, self.pause, self.rename, self.remove))  # fmt: skip
        if operation == self.start and len(known) < 8:
            self.made += 1
            self.add(f"c{self.made}", chance.choice(("api", "web")))
        elif known:
            with_name = chance.choice(known)
            try:
                operation(with_name)
            except docker.errors.APIError as error:  # it is stopped, or there already: as people find out too
                assert error.status_code < 500 or "is not connected" in str(error), error

    def add(self, name: str, role: str) -> None:
        command = SERVER if role == "api" else IDLE
        self.engine.run(name, *command, labels={"app": "shop", "role": role}, stop_signal="SIGKILL")
        self.roles[name] = role

    def container(self, name: str) -> Any:
        return self.engine.client.containers.get(name)

    def start(self, name: str) -> None:
        self.container(name).start()

    def stop(self, name: str) -> None:
        self.container(name).stop(timeout=1)

    def restart(self, name: str) -> None:
        self.container(name).restart(timeout=1)

    def kill(self, name: str) -> None:
        self.container(name).kill()

    def connect(self, name: str) -> None:
        self.networks[len(name) % 2].connect(name)

    def disconnect(self, name: str) -> None:
        self.networks[len(name) % 2].disconnect(name)

    def pause(self, name: str) -> None:
        self.container(name).pause()
        self.container(name).unpause()

    def rename(self, name: str) -> None:
        self.container(name).rename(f"{name}x")
        self.roles[f"{name}x"] = self.roles.pop(name)

    def remove(self, name: str) -> None:
        self.container(name).remove(force=True)
        del self.roles[name]

    def interfaces(self) -> set[tuple[str, str, str]]:
        """What is to be enforced: MAC, network, and in which state."""
        return {
            (attachment["MacAddress"], network, "enforced")
            for each in self.engine.client.containers.list()
            for network, attachment in each.attrs["NetworkSettings"]["Networks"].items()
        }

    def seen(self) -> set[tuple[str, str, str]]:
        endpoints = self.place.status().get("endpoints", [])
        return {(each["interface"], each["labels"]["network"], each["state"]) for each in endpoints}

    def enforces(self, name: str) -> None:
        """A container of another app reaches nothing there."""
        if not self.probing:
            self.engine.run("probe", *IDLE, labels=OTHER)
            self.probing = True
        wait_for(lambda: self.place.pages("probe", name) == ("000", "000"), f"{name} is open to anybody")


def test_restore_all_without_an_agent_takes_the_gate_away(place: Place) -> None:
    engine = place.engine
    engine.run("web", *IDLE, labels=WEB)
    place.settled("web")
    place.stop_agent(signal.SIGKILL)
    engine.run("api", *SERVER, labels=API)
    assert engine.fetch("web", f"http://{engine.address('api')}/{ALLOWED}") == "000", "new, and nobody there"
    command = [
        sys.executable,
        "-m",
        "isolator.cli",
        "restore",
        "--all",
        "--socket",
        str(STATE / "isolator.sock"),
    ]
    subprocess.run(command, check=True)
    assert engine.fetch("web", f"http://{engine.address('api')}/{DENIED}") == DENIED
    place.start_agent()
    place.settled("web", "api")
    place.enforces("web", "api")


def test_many_containers(place: Place) -> None:
    """They are there before the agent; `make containers`: 100 of them."""
    place.stop_agent(signal.SIGTERM)
    names = [f"many{number}" for number in range(CONTAINERS)]
    for name in names:
        place.engine.run(name, *IDLE, labels=WEB, stop_signal="SIGKILL")
    times = []
    for _ in ("spliced", "adopted"):
        begin = time.monotonic()
        place.start_agent()
        wait_for(lambda: place.states() == dict.fromkeys(names, "enforced"), "not all are enforced", 60)
        times.append(time.monotonic() - begin)
        assert place.agent is not None
        status = Path(f"/proc/{place.agent.pid}/status").read_text()
        place.stop_agent(signal.SIGKILL)
    resident = int(status.partition("VmRSS:")[2].split()[0]) / 1024
    print(f"\n{CONTAINERS} containers: spliced {times[0]:.1f} s and adopted {times[1]:.1f} s after the agent's start, "
          f"agent {resident:.0f} MB")  # fmt: skip
    place.start_agent()
    nothing_is_left(place)


def test_a_renamed_container_keeps_its_splice_when_the_agent_is_restarted(place: Place) -> None:
    engine = place.engine
    engine.run("api", *SERVER, labels=API)
    engine.run("web", *IDLE, labels=WEB)
    place.settled("api", "web")
    engine.client.containers.get("api").rename("shop")
    place.stop_agent(signal.SIGKILL)
    spliced = (place.root / "agent.log").read_text().count("spliced")
    place.start_agent()
    place.settled("api", "web")
    assert place.labels("api")["name"] == "shop"
    assert place.pages("web", "shop") == (ALLOWED, "403")
    assert (place.root / "agent.log").read_text().count("spliced") == spliced


def test_an_excluded_container_that_leaves_its_network_and_joins_it_again(place: Place) -> None:
    """With the same address and MAC, at another port."""
    engine = place.engine
    engine.run("api", *SERVER, labels=API)
    network = engine.client.networks.create("again", driver="bridge")
    engine.run("web", *IDLE, labels={**WEB, "isolator.exclude": "true"})
    wait_for(
        lambda: place.states() == {"api": "enforced", "web": "exempt"}, f"not what {place.status()} says"
    )
    place.enforces("web", "api")
    bridge = engine.client.networks.get("bridge")
    assert place.agent is not None
    place.agent.send_signal(signal.SIGSTOP)
    bridge.disconnect("web")
    bridge.connect("web")
    place.agent.send_signal(signal.SIGCONT)
    place.enforces("web", "api")
    network.remove()


def test_a_container_that_gets_its_first_network_later(place: Place) -> None:
    engine = place.engine
    engine.run("late", *IDLE, labels=WEB, network_mode="none")
    engine.client.networks.get("none").disconnect("late")
    engine.client.networks.get("bridge").connect("late")
    place.settled("late")
