from __future__ import annotations

import json
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isolator.control.agent_view import EndpointState
from isolator.control.client import AgentUnreachableError, Client, ClientError, RefusedError, UnixConnection
from isolator.control.server import SocketInUseError, listen
from tests.control.fake_agent import ALLOWED, DENIED, LAYER4, Served


def ask(agent: Served, method: str, target: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = UnixConnection(agent.socket, 10)
    try:
        connection.request(method, target, body)
        response = connection.getresponse()
        content = response.read()
        try:
            return response.status, json.loads(content)
        except ValueError:
            return response.status, content.decode()
    finally:
        connection.close()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not come to pass")


def test_socket_is_root_only(agent: Served) -> None:
    assert stat.S_IMODE(agent.socket.stat().st_mode) == 0o600


def test_status(agent: Served) -> None:
    status = Client(agent.socket).status()
    assert status["ready"] is True
    assert (status["pid"], status["generation"], status["started"]) == (
        4711,
        3,
        "2023-11-14T22:13:20.000000Z",
    )
    assert [(each["name"], each["state"]) for each in status["endpoints"]] == [
        ("api", "enforced"),
        ("web", "enforced"),
    ]


def test_one_endpoint_amiss_is_not_ready(agent: Served) -> None:
    agent.agent.state = EndpointState.WAITING
    assert Client(agent.socket).status()["ready"] is False


def test_endpoints_and_policies(agent: Served) -> None:
    client = Client(agent.socket)
    assert [each["netns"] for each in client.endpoints()] == ["demo-api", "demo-web"]
    assert [each["name"] for each in client.policies()] == ["api-allow"]


def test_flows_held(agent: Served) -> None:
    agent.put(DENIED, ALLOWED, LAYER4)
    client = Client(agent.socket)
    assert list(client.flows()) == [each.as_json() for each in (DENIED, ALLOWED, LAYER4)]
    assert list(client.flows(last=1)) == [LAYER4.as_json()]
    assert list(client.flows(last=1, verdict="FORWARDED")) == [ALLOWED.as_json()]
    assert list(client.flows(last=0)) == []


def test_flows_held_in_several_pieces(agent: Served) -> None:
    agent.put(*[DENIED] * 1000)
    assert len(list(Client(agent.socket).flows())) == 1000


def test_follow_gives_held_then_new(agent: Served) -> None:
    agent.put(DENIED, LAYER4)
    stream = Client(agent.socket).flows(last=1, follow=True)
    assert next(stream) == LAYER4.as_json()
    agent.put(ALLOWED)
    assert next(stream) == ALLOWED.as_json()
    stream.close()


def test_follower_that_goes_is_forgotten_without_another_record(agent: Served) -> None:
    agent.put(DENIED)
    stream = Client(agent.socket).flows(last=1, follow=True)
    next(stream)
    assert agent.agent.flow_log.followers == 1
    stream.close()
    until(lambda: agent.agent.flow_log.followers == 0)


def test_agent_that_stops_ends_its_followers(tmp_path: Path) -> None:
    from tests.control.fake_agent import served

    seen: list[dict[str, Any]] = []
    with served(tmp_path) as agent:
        agent.put(DENIED)
        reader = threading.Thread(target=lambda: seen.extend(Client(agent.socket).flows(last=1, follow=True)))
        reader.start()
        until(lambda: bool(seen) or agent.agent.flow_log.followers == 1)
    reader.join(10)
    assert not reader.is_alive()
    assert seen == [DENIED.as_json()]


def test_reload(agent: Served) -> None:
    assert Client(agent.socket).reload() == {"generation": 3}


def test_bad_files_are_all_told(agent: Served) -> None:
    agent.agent.reload_errors = ["a.yaml:1:2: unknown key", "b.yaml:3:4: wrong type"]
    with pytest.raises(RefusedError, match="the old policy stays in force") as caught:
        Client(agent.socket).reload()
    assert (caught.value.status, caught.value.details) == (422, agent.agent.reload_errors)


def test_reloads_do_not_overlap(agent: Served) -> None:
    threads = [threading.Thread(target=Client(agent.socket).reload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not agent.agent.overlapped


def test_restore(agent: Served) -> None:
    client = Client(agent.socket)
    assert client.restore(["api"]) == [{"name": "api", "error": None}]
    assert [each["name"] for each in client.restore(None)] == ["api", "web"]
    with pytest.raises(RefusedError, match="no endpoint is named nobody") as caught:
        client.restore(["api", "nobody"])
    assert caught.value.status == 404
    assert agent.agent.restored == ["api", "api", "web"]


def test_explain(agent: Served) -> None:
    question = {"source": "web", "destination": "api", "port": 80, "method": "GET", "path": "/api/v1/x"}
    answer = Client(agent.socket).explain(question)
    assert (answer["allowed"], answer["rule"]) == (True, "read-books")
    assert answer["considered"][0]["matched"] is True
    assert Client(agent.socket).explain({**question, "method": "PUT"})["allowed"] is False


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "error"),
    [
        ("GET", "/nothing", None, 404, "GET /nothing: not found"),
        ("GET", "/v1/reload", None, 405, "GET /v1/reload: method not allowed"),
        ("GET", "/v1/flows?last=-1", None, 400, "last=-1: it is a number of records, 0 or more"),
        ("GET", "/v1/flows?last=0_2", None, 400, "last=0_2: it is a number of records, 0 or more"),
        (
            "GET",
            "/v1/flows?verdict=maybe",
            None,
            400,
            "verdict=maybe: it is one of FORWARDED, DROPPED, AUDIT",
        ),
        ("GET", "/v1/flows?follow=yes", None, 400, "follow=yes: it is 0 or 1"),
        ("GET", "/v1/flows?lsat=1", None, 400, "unknown parameter lsat: known are follow, last, verdict"),
        ("POST", "/v1/restore", b"{}", 400, "the body is not what this call takes"),
        ("POST", "/v1/restore", b'{"names": [], "all": false}', 400, "the body is not what this call takes"),
        (
            "POST",
            "/v1/restore",
            b'{"names": ["a"], "all": true}',
            400,
            "the body is not what this call takes",
        ),
        ("POST", "/v1/restore", b'{"names": "api"}', 400, "the body is not what this call takes"),
        ("POST", "/v1/restore", b"[" * 40000, 400, "the body is not JSON"),
        ("POST", "/v1/restore", b"\xff\xfe", 400, "the body is not JSON"),
        ("POST", "/v1/restore", b" " * 70000, 413, "the body is over 65536 bytes"),
        ("POST", "/v1/explain", b'{"source": "web"}', 400, "the body is not what this call takes"),
        (
            "POST",
            "/v1/explain",
            b'{"source":"nobody","destination":"api","port":80}',
            400,
            "no endpoint is named nobody",
        ),
        (
            "POST",
            "/v1/explain",
            b'{"source":"web","destination":"api","port":70000}',
            400,
            "the body is not what this call takes",
        ),
        (
            "POST",
            "/v1/explain",
            b'{"source":"web","destination":"api","port":80,"method":"GET","path":"/bug"}',
            500,
            "internal error: RuntimeError: a bug",
        ),
    ],
)
def test_bad_request(
    agent: Served, method: str, target: str, body: bytes | None, status: int, error: str
) -> None:
    seen_status, answer = ask(agent, method, target, body)
    assert seen_status == status
    assert answer["error"].startswith(error)
    assert isinstance(answer["details"], list)


def test_garbage_harms_nobody(agent: Served) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(agent.socket))
        raw.sendall(b"\x16\x03\x01\x00\x00garbage\r\n\r\n")
        raw.settimeout(10)
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    assert Client(agent.socket).status()["ready"] is True


def test_metrics(agent: Served) -> None:
    agent.put(DENIED, DENIED, LAYER4)
    status, text = ask(agent, "GET", "/metrics")
    assert status == 200
    for line in (
        'isolator_decisions_total{policy="api-allow",reason="HTTP_NO_RULE",rule="read-books",'
        'verdict="DROPPED"} 2.0',
        'isolator_decisions_total{policy="",reason="POLICY_DEFAULT",rule="",verdict="DROPPED"} 1.0',
        'isolator_endpoints{state="enforced"} 2.0',
        'isolator_ring_frames_total{ring="1"} 6.0',
        "isolator_flows7 2.0",
    ):
        assert line in text.splitlines()


def test_no_agent(tmp_path: Path) -> None:
    with pytest.raises(AgentUnreachableError, match=r"no agent answers on .*: start one with"):
        Client(tmp_path / "nothing.sock").status()


def test_dead_agents_socket_says_the_same_and_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "isolator.sock"
    listen(path).close()
    with pytest.raises(AgentUnreachableError):
        Client(path).status()
    listen(path).close()
    assert [each.name for each in tmp_path.iterdir()] == ["isolator.sock"]


def test_second_agent_is_refused(agent: Served) -> None:
    with pytest.raises(SocketInUseError, match="another agent serves"):
        listen(agent.socket)
    assert Client(agent.socket).status()["ready"] is True


def test_agent_that_breaks_off_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "isolator.sock"
    with listen(path) as listener:

        def break_off() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=break_off)
        thread.start()
        with pytest.raises(ClientError, match="broke off"):
            Client(path).status()
        thread.join(10)
