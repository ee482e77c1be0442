"""Containers of a real Docker engine: found, spliced and enforced by label; come, go, and come back."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.control.client import Client
from isolator.datapath.node import Names
from isolator.lab import wait_for
from tests.e2e.docker_place import API, IDLE, OTHER, SERVER, WEB, Place, docker_place

pytestmark = [pytest.mark.root, pytest.mark.slow]
STATE = Path("/run/isolator-test-docker")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with docker_place(tmp_path_factory.mktemp("docker"), STATE) as made:
        yield made


def test_containers_are_protected_by_their_labels(place: Place) -> None:
    engine = place.engine
    engine.run("api", *SERVER, labels=API)
    engine.run("web", *IDLE, labels=WEB)
    engine.run("other", *IDLE, labels=OTHER)
    engine.run("on-host", *IDLE, network_mode="host")
    place.settled("api", "web", "other")
    place.enforces("web", "api")
    assert place.pages("other", "api") == ("000", "000")
    assert "on-host" in (place.root / "agent.log").read_text()


def test_a_renamed_container_stays_protected_and_its_labels_follow(place: Place) -> None:
    """Also its connections: nothing is spliced anew."""
    spliced = (place.root / "agent.log").read_text().count("spliced")
    place.engine.client.containers.get("web").rename("shop-web")
    wait_for(lambda: place.labels("web").get("name") == "shop-web", "the new name is not noticed")
    assert place.states() == dict.fromkeys(("api", "web", "other"), "enforced")
    place.engine.client.containers.get("shop-web").rename("web")
    wait_for(lambda: place.labels("web").get("name") == "web", "the old name is not noticed")
    assert (place.root / "agent.log").read_text().count("spliced") == spliced


def test_a_paused_container_stays_protected(place: Place) -> None:
    container = place.engine.client.containers.get("api")
    container.pause()
    container.unpause()
    place.enforces("web", "api")


def test_a_restarted_container_is_protected_again(place: Place) -> None:
    place.engine.client.containers.get("api").restart(timeout=1)
    place.settled("api", "web", "other")
    place.enforces("web", "api")


def test_a_container_that_goes_leaves_nothing(place: Place) -> None:
    place.engine.client.containers.get("other").remove(force=True)
    place.settled("api", "web")
    links = subprocess.run(
        ["ip", "-n", Names.of(STATE).netns, "-br", "link"], capture_output=True, text=True, check=True
    ).stdout
    assert len(links.splitlines()) == 1 + 2 + 4  # lo, the punt pair, two splices


def test_each_network_of_a_container_is_an_endpoint(place: Place) -> None:
    network = place.engine.client.networks.create("back")
    network.connect("api")
    place.settled("api", "web", "api@back")
    network.disconnect("api")
    place.settled("api", "web")
    network.remove()
    place.enforces("web", "api")


def test_what_came_and_went_while_the_agent_was_away(place: Place) -> None:
    place.stop_agent(signal.SIGKILL)
    place.engine.client.containers.get("api").remove(force=True)
    place.engine.run("api2", *SERVER, labels=API)
    place.start_agent()
    place.settled("api2", "web")
    place.enforces("web", "api2")


def test_the_engine_is_restarted(place: Place) -> None:
    """Its containers die with it; those that come back are protected again."""
    place.engine.stop()
    place.engine.start()
    for name in ("api2", "web"):
        place.engine.client.containers.get(name).start()
    place.settled("api2", "web")
    place.enforces("web", "api2")


READ_BOOKS = """\
- name: read-books
  from: [{select: {role: web}}]
  ports: [{port: 80}]
  http: [{methods: [GET], path: /api/v1/**}]
"""


def test_labels_carry_a_policy(place: Place) -> None:
    """One that is wrong closes its container, and says why; the others go on."""
    place.engine.run("labelled", *SERVER, labels={"isolator.allow.ingress": READ_BOOKS})
    place.engine.run("broken", *SERVER, labels={"isolator.allow.ingress": "- form: []", **API})
    place.settled("api2", "web", "labelled", "broken")
    place.enforces("web", "labelled")
    assert place.pages("api2", "labelled") == ("000", "000")
    assert place.pages("web", "broken") == ("000", "000"), "whatever the file's policy allows"
    place.enforces("web", "api2")
    detail = {each["name"]: each["detail"] for each in place.status()["endpoints"]}
    told = "container broken, label isolator.allow.ingress:1:3: unknown key 'form'"
    assert detail["labelled"] is None and detail["broken"].startswith(f"closed: {told}")
    shown = {each["name"]: each for each in Client(STATE / "isolator.sock").policies()}
    assert shown["label:broken"]["problems"][0].startswith(told)
    assert shown["label:labelled"]["file"] == "container labelled, label isolator.allow.ingress"
    assert shown["label:labelled"]["endpoints"] == ["labelled"]
    assert (place.root / "agent.log").read_text().count(told) == 1


def test_an_image_writes_no_policy_and_excludes_nobody(place: Place) -> None:
    place.engine.make_image("sly:1", "LABEL isolator.exclude=true isolator.allow.ingress=[{}]")
    place.engine.run("sly", *SERVER, image="sly:1", labels=API)
    wait_for(lambda: place.states().get("sly") == "enforced", f"it is left alone: {place.status()}")
    place.enforces("web", "sly")
    assert "isolator.exclude" not in place.labels("sly") and place.labels("sly")["role"] == "api"
