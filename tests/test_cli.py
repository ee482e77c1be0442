from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from isolator.cli import app
from isolator.control.agent_view import EndpointState, PolicyStatus, Requests
from isolator.control.flowlog import HttpMessage, Peer
from isolator.control.label_policy import label_policy
from isolator.control.render import labels, message
from tests.control.fake_agent import ALLOWED, DENIED, LAYER4, Served, served


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as running:
        yield running


def isolator(*arguments: str, agent: Served | None = None) -> Result:
    """Runs the command line; the agent's socket goes where the contract puts it, after the command."""
    socket = [] if agent is None else ["--socket", str(agent.socket)]
    return CliRunner().invoke(app, [*arguments, *socket])


def test_status_of_a_ready_agent(agent: Served) -> None:
    result = isolator("status", agent=agent)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:] == [
        "ENDPOINT  STATE     ADDRESSES  POLICIES   DETAIL",
        "api       enforced  10.9.0.3   api-allow",
        "web       enforced  10.9.0.2   -",
    ]


def test_status_of_one_that_is_not_ready(agent: Served) -> None:
    agent.agent.state = EndpointState.WAITING
    result = isolator("status", "--wait", "0.2", agent=agent)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "not ready: web"


def test_status_says_how_many_requests_the_kernel_decides(agent: Served) -> None:
    agent.agent.requests = Requests(1999, 1)
    assert isolator("status", agent=agent).stdout.splitlines()[-1] == "requests: 99 % in the kernel"


def test_offload(agent: Served) -> None:
    result = isolator("offload", agent=agent)
    assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
        "197 requests decided in the kernel, 3 in Python: 98 % in the kernel; datapath.l7 auto, 41 of 65536 states",
        "RULES ENDPOINTS PORTS KERNEL PYTHON IN KERNEL STATES WHY PYTHON LEFT OUT",
        "api-allow/read-books api ingress tcp/80 97 3 97 % 41 a body 66 %, denied 33 %"
        " api-allow/team: a header that Python has to look at",
        "a/1, a/2, a/3 and 1 more - - 0 0 - 0 - -",
    ]


def test_offload_json(agent: Served) -> None:
    seen = json.loads(isolator("offload", "--json", agent=agent).stdout)
    assert seen["requests"] == {"kernel": 197, "python": 3}
    assert seen["profiles"][0]["why"] == {"a body": 2, "denied": 1}


def test_status_json(agent: Served) -> None:
    result = isolator("status", "--json", agent=agent)
    assert json.loads(result.stdout)["ready"] is True


def test_socket_before_the_command_and_in_the_environment(agent: Served) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["--socket", str(agent.socket), "status"]).exit_code == 0
    assert runner.invoke(app, ["status"], env={"ISOLATOR_SOCKET": str(agent.socket)}).exit_code == 0


@pytest.mark.parametrize("command", ["status", "endpoints", "flows", "offload", "policy show", "reload"])
def test_no_agent_is_one_clear_line(tmp_path: Path, command: str) -> None:
    result = isolator(*command.split(), "--socket", str(tmp_path / "none.sock"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"isolator: no agent answers on {tmp_path}/none.sock: start one with "
        "`isolator run -c isolator.yaml`, or name its socket with --socket\n"
    )


def test_the_health_check_asks_only_whether_the_agent_answers(agent: Served, tmp_path: Path) -> None:
    agent.agent.state = EndpointState.WAITING
    for socket, code in ((agent.socket, 0), (tmp_path / "none.sock", 1)):
        check = [sys.executable, "-m", "isolator.control.client"]
        environment = {**os.environ, "ISOLATOR_SOCKET": str(socket)}
        assert subprocess.run(check, env=environment, capture_output=True).returncode == code


def test_endpoints(agent: Served) -> None:
    result = isolator("endpoints", agent=agent)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].split() == [
        "api",
        "demo-api/eth0",
        "app=bookstore",
        "enforced",
        "10.9.0.3",
        "api-allow",
    ]
    assert [each["name"] for each in json.loads(isolator("endpoints", "--json", agent=agent).stdout)] == [
        "api",
        "web",
    ]


def test_flows(agent: Served) -> None:
    agent.put(DENIED, ALLOWED, LAYER4)
    result = isolator("flows", agent=agent)
    assert result.stdout.splitlines() == [
        "22:13:20.250 DROPPED   ingress web:40000 -> api:80 tcp GET /api/../admin (read as /admin)"
        " · HTTP_NO_RULE · api-allow/read-books · python",
        "22:13:20.250 FORWARDED ingress web:40000 -> api:80 tcp GET /api/v1/books · api-allow/read-books"
        " · python (a body)",
        "22:13:21.000 DROPPED   ingress 192.0.2.1:5000 -> api:80 tcp · POLICY_DEFAULT · kernel",
    ]


def test_flows_json_is_one_record_a_line(agent: Served) -> None:
    agent.put(DENIED, ALLOWED, LAYER4)
    result = isolator("flows", "--json", "--last", "1", "--verdict", "dropped", agent=agent)
    assert [json.loads(line) for line in result.stdout.splitlines()] == [LAYER4.as_json()]


def test_a_request_cannot_write_to_the_terminal() -> None:
    evil = HttpMessage("GET", None, "/\x1b]0;owned\x07\r\n\u202e", None)
    assert message(evil.as_json()) == r" GET /\x1b]0;owned\x07\r\n\u202e"


def test_labels_that_are_policy_are_shown_as_policy() -> None:
    given = {"isolator.allow.ingress": "[]", "b": "2", "a": "1"}
    assert labels(given) == "a=1,b=2"
    assert Peer("10.0.0.1", 80, "api", given).as_json()["labels"] == {"a": "1", "b": "2"}


def test_policy_show(agent: Served) -> None:
    result = isolator("policy", "show", "api-allow", agent=agent)
    assert result.stdout.splitlines()[:2] == ["# policies/api.yaml, selects api", "kind: Policy"]
    missing = isolator("policy", "show", "nope", agent=agent)
    assert (missing.exit_code, missing.stderr) == (
        1,
        "isolator: no policy is named nope: there are api-allow\n",
    )


def test_policy_show_of_one_that_wrong_labels_make(agent: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a label holds must not write to the terminal, nor into the document."""
    source = label_policy({"name": "api", "isolator.mode": "x"})
    assert source is not None
    wrong = PolicyStatus(
        "label:api",
        source.file,
        "protect",
        "closed",
        ["api"],
        source.document,
        [f"{source.problems[0]}\x1b[2J\nkind: Other"],
    )
    monkeypatch.setattr(agent.agent, "policies", lambda: [wrong])
    assert isolator("policy", "show", agent=agent).stdout.splitlines() == [
        "# container api, label isolator.mode, selects api",
        "# container api, label isolator.mode:1:1: 'isolator.mode' cannot be 'x': write one of protect, monitor"
        r"\x1b[2J\nkind: Other",
        "kind: Policy", "metadata:", "  name: label:api", "spec:", "  select:", "    name: api", "  mode: protect",
        "  ingress:", "    - name: wrong-labels", "      action: deny",
        "  egress:", "    - name: wrong-labels", "      action: deny",
    ]  # fmt: skip


GOOD = """\
kind: Policy
metadata: {name: api-allow}
spec:
  select: {app: bookstore}
  ingress: [{name: read, from: [{world: true}], ports: [{port: 80}], http: [{methods: [GET]}]}]
"""


def test_policy_check(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    result = isolator("policy", "check", str(tmp_path))
    assert (result.exit_code, result.stdout) == (0, "1 policy, no error\n")


def test_policy_check_tells_every_error_at_its_place(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(GOOD.replace("select:", "selekt:").replace("port: 80", "port: http"))
    result = isolator("policy", "check", str(bad))
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert any(line.startswith(f"{bad}:4:3: ") and "selekt" in line for line in lines)
    assert any(line.startswith(f"{bad}:5:") and "port" in line for line in lines)


def test_policy_check_of_nothing(tmp_path: Path) -> None:
    assert isolator("policy", "check", str(tmp_path / "none.yaml")).exit_code == 1


def test_policy_schema() -> None:
    result = isolator("policy", "schema")
    assert "spec" in json.loads(result.stdout)["properties"]


@pytest.mark.parametrize(("method", "code", "first"), [("GET", 0, "FORWARDED"), ("PUT", 1, "DROPPED")])
def test_explain(agent: Served, method: str, code: int, first: str) -> None:
    result = isolator(
        *["explain", "--from", "web", "--to", "api", "--port", "80", "--header", "X-Tenant=acme"],
        method,
        "/api/v1/x",
        agent=agent,
    )
    assert result.exit_code == code
    assert result.stdout.startswith(f"{first}: ")
    assert "api-allow/read-books" in result.stdout


def test_explain_of_an_unknown_endpoint(agent: Served) -> None:
    result = isolator(*["explain", "--from", "nobody", "--to", "api", "--port", "80"], agent=agent)
    assert (result.exit_code, result.stderr) == (
        1,
        "isolator: no endpoint is named nobody: there are api, web\n",
    )


def test_reload(agent: Served) -> None:
    assert isolator("reload", agent=agent).stdout == "policy generation 3 is in force\n"
    agent.agent.reload_errors = ["a.yaml:1:2: unknown key"]
    result = isolator("reload", agent=agent)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "isolator: the files are wrong; the old policy stays in force",
        "  a.yaml:1:2: unknown key",
    ]


def test_restore(agent: Served) -> None:
    assert isolator("restore", "api", agent=agent).stdout == "api: restored\n"
    agent.agent.state = EndpointState.FAILED
    result = isolator("restore", "--all", agent=agent)
    assert (result.exit_code, result.stdout, result.stderr) == (
        1,
        "api: restored\n",
        "web: its namespace is gone\n",
    )


class ReplacedError(Exception):
    """Stands for the process that execv would have begun."""


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def execv(program: str, arguments: list[str]) -> None:
        raise ReplacedError(*arguments[1:])

    monkeypatch.setattr(os, "execv", execv)


@pytest.mark.parametrize(
    ("command", "process"),
    [
        ("run -c x.yaml", "-m isolator.daemon run x.yaml"),
        ("demo", "-m isolator.demo --xdp off"),
        ("demo --json --xdp native", "-m isolator.demo --xdp native --json"),
        ("restore --all --socket {}/s", "-m isolator.daemon restore {}"),
        ("restore api --socket {}/s", "-m isolator.daemon restore {} api"),
    ],
)
def test_these_become_another_process(replaced: None, tmp_path: Path, command: str, process: str) -> None:
    result = isolator(*command.format(tmp_path).split())
    assert isinstance(result.exception, ReplacedError)
    assert list(result.exception.args) == process.format(tmp_path).split()


@pytest.mark.parametrize(
    "command",
    [
        "nothing",
        "restore",
        "restore api --all",
        "flows --last -1",
        "flows --verdict maybe",
        "explain --from a --to b",
        "explain --from a --to b --port 70000",
        "explain --from a --to b --port 80 GET",
        "explain --from a --to b --port 80 --protocol sctp",
        "explain --from a --to b --port 80 --header x",
        "demo --xdp maybe",
        "policy check",
    ],
)
def test_usage(command: str) -> None:
    result = isolator(*command.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


def test_help_loads_nothing_heavy() -> None:
    """Keeps `--help` quick, and what a command line costs small."""
    heavy = [
        "scapy",
        "docker",
        "pyroute2",
        "uvicorn",
        "starlette",
        "prometheus_client",
        "h2",
        "dpkt",
        "asyncio",
    ]
    code = f"import sys, isolator.cli; print([m for m in {heavy} if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout == "[]\n"


def test_completion_is_there() -> None:
    assert "--install-completion" in isolator("--help").stdout
