"""The agent's image: built from the Dockerfile, run as README.md says, removed and run again under live connections.

Building needs the package registries that the machine is set up for. It takes some two minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import select
import shlex
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from isolator import __version__
from isolator.lab import wait_for
from tests.e2e.base_image import TAG, import_base
from tests.e2e.docker_engine import IMAGE, add, image
from tests.e2e.host_engine import BuildEngine, HostEngine

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.image, pytest.mark.timeout(900)]
ROOT = Path("/tmp/isolator-test-image")
NAME = "isolator"
SIZE_MAX = 220_000_000
ALLOWED, DENIED = "api/v1/books", "admin/secrets"
IDLE = ("/bin/sleep", "3600")
ECHO = ("/bin/busybox", "nc", "-ll", "-p", "7", "-e", "/bin/busybox", "cat")
WIRE = """\
kind: Policy
metadata: {name: wire}
spec:
  select: {app: wire}
  ingress: [{name: echo, from: [{select: {app: shop}}], ports: [{port: 7}]}]
"""


# -- what the documents say ----------------------------------------------------------------------------------


def readme() -> list[str]:
    """The words of README's `docker run`, after `run`."""
    section = Path("README.md").read_text().partition("### In a container")[2]
    (line,) = re.findall(r"^    docker run (-d --name isolator(?:.*\\\n)+.*)$", section, re.MULTILINE)
    return shlex.split(line.replace("\\\n", " "))


def compose() -> list[str]:
    """The same of compose.yaml's service, as the compose specification maps its keys to the options of `docker run`."""
    service = YAML(typ="safe").load(Path("deploy/compose.yaml"))["services"]["isolator"]
    assert service.pop("build") == ".."  # the repository
    words = ["-d", "--name", service.pop("container_name"), "--restart", service.pop("restart")]
    words += ["--stop-timeout", service.pop("stop_grace_period").removesuffix("s")]
    words += ["--network", service.pop("network_mode"), "--pid", service.pop("pid")]
    words += ["--read-only"] if service.pop("read_only") else []
    for key, option in {
        "cap_drop": "--cap-drop",
        "cap_add": "--cap-add",
        "security_opt": "--security-opt",
        "volumes": "-v",
    }.items():
        words += [word for value in service.pop(key) for word in (option, value)]
    words.append(service.pop("image"))
    assert not service, "keys that this test does not know"
    return words


def stack() -> list[str]:
    """The same of the launcher's script in stack.yaml."""
    service = YAML(typ="safe").load(Path("deploy/stack.yaml"))["services"]["isolator"]
    assert service["deploy"]["mode"] == "global"
    (script,) = service["command"]
    return shlex.split(script.partition("exec docker run ")[2].replace("\\\n", " "))


def options(words: list[str]) -> set[tuple[str, ...]]:
    """Options with their values, as a set: their order says nothing."""
    found, rest = set(), list(words)
    while rest:
        option = rest.pop(0)
        alone = option in ("-d", "--rm", "--read-only") or not option.startswith("-")
        found.add((option,) if alone else (option, rest.pop(0)))
    return found


def test_compose_file_and_stack_give_the_agent_what_the_readme_gives_it() -> None:
    said = options(readme())
    mine = {("-v", "./isolator:/etc/isolator:ro")}  # deploy/isolator, beside the file
    assert options(compose()) - mine == said - {("-v", "/etc/isolator:/etc/isolator:ro")}
    lives = {("-d",), ("--restart", "unless-stopped")}  # the service is in its place
    assert options(stack()) - {("--rm",)} == said - lives


def test_the_compose_file_is_one() -> None:
    subprocess.run(["docker-compose", "-f", "deploy/compose.yaml", "config", "-q"], check=True)


def test_each_capability_mount_and_option_is_explained() -> None:
    told = Path("docs/container.md").read_text()
    for option, *value in options(readme()) - {("-d",), (NAME,)}:
        assert f"`{' '.join((option, *value))}`" in told


# -- the host ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host() -> Iterator[HostEngine]:
    """A host with the built image, and the agent running on it before there is any container."""
    with BuildEngine(ROOT, "isotest-image") as builder:
        import_base(builder.client)
        builder.build(Path(), NAME)
    with HostEngine(ROOT, "isotest-image", {"isolator": Path("/etc/isolator-runc")}) as engine:
        engine.client.api.import_image_from_data(image(), *IMAGE.split(":"))
        engine.host("tee", "/etc/isolator/policies/wire.yaml", stdin=WIRE)
        engine.host("tee", "-a", "/etc/isolator/isolator.yaml", stdin="start_wait: 60\n")
        start_agent(engine)
        engine.run("api", "/bin/httpd", "-f", "-p", "80", "-h", "/www", labels={"app": "shop", "role": "api"})
        engine.run("web", *IDLE, labels={"app": "shop", "role": "web"})
        engine.run("echo", *ECHO, labels={"app": "wire"})
        yield engine


def start_agent(engine: HostEngine) -> None:
    engine.cli("run", *readme())
    wait_for(lambda: "endpoints" in status(engine), f"no agent: {engine.cli('logs', NAME)}", 30)


def status(engine: HostEngine) -> dict[str, Any]:
    """As the host sees it, over the socket in the shared folder."""
    try:
        found: dict[str, Any] = json.loads(engine.host(".venv/bin/isolator", "status", "--json", check=False))
    except ValueError:
        return {}
    return found


def settled(engine: HostEngine) -> None:
    def enforced() -> bool:
        states = {each["name"]: each["state"] for each in status(engine).get("endpoints", [])}
        return all(states.get(name) == "enforced" for name in ("api", "web", "echo"))

    wait_for(enforced, f"not all enforced: {status(engine)}")


def pages(engine: HostEngine) -> tuple[str, str]:
    address = engine.address("api")
    return engine.fetch("web", f"http://{address}/{ALLOWED}"), engine.fetch(
        "web", f"http://{address}/{DENIED}"
    )


class Conversation:
    """A TCP connection from web to echo that stays open."""

    def __init__(self, engine: HostEngine) -> None:
        sandbox = engine.client.containers.get("web").attrs["NetworkSettings"]["SandboxKey"]
        command = ["nsenter", f"--net={sandbox}", "/bin/busybox", "nc", engine.address("echo"), "7"]
        self._process = subprocess.Popen(
            engine.entered(*command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def says(self, text: str) -> str:
        """What comes back within ten seconds."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(text.encode())
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], 10)
        return process.stdout.read1(4096).decode() if ready else ""

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture
def conversation(host: HostEngine) -> Iterator[Conversation]:
    settled(host)
    made = Conversation(host)
    yield made
    made.close()


# -- the image -----------------------------------------------------------------------------------------------


def test_the_image_is_small_and_says_what_it_is(host: HostEngine) -> None:
    found = host.client.images.get(NAME).attrs
    assert found["Size"] < SIZE_MAX
    labels = found["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert (found["Config"]["StopSignal"], found["Config"]["Entrypoint"]) == ("SIGTERM", ["isolator"])


def test_no_compiler_in_it(host: HostEngine) -> None:
    tools = "for tool in gcc cc clang make ld as llc pip uv; do command -v $tool; done; exit 0"
    assert host.cli("run", "--rm", "--entrypoint", "sh", NAME, "-c", tools) == ""


# -- the agent in it -----------------------------------------------------------------------------------------


def test_it_protects_and_is_healthy(host: HostEngine) -> None:
    settled(host)
    assert pages(host) == (ALLOWED, "403")
    wait_for(lambda: health(host) == "healthy", f"it is {health(host)}", 60)


def health(engine: HostEngine) -> str:
    container = engine.client.containers.get(NAME)
    return str(container.attrs["State"]["Health"]["Status"])


def test_the_health_check_fails_without_an_answer(host: HostEngine) -> None:
    check = host.client.images.get(NAME).attrs["Config"]["Healthcheck"]["Test"][1:]
    with pytest.raises(AssertionError, match="no agent answers on /run/none/isolator"):
        host.cli("exec", "-e", "ISOLATOR_SOCKET=/run/none/isolator.sock", NAME, *check)
    assert host.cli("exec", NAME, *check).startswith("alive")


def test_it_has_the_documented_capabilities_and_no_more(host: HostEngine) -> None:
    pid = host.client.containers.get(NAME).attrs["State"]["Pid"]
    (bits,) = re.findall(r"^CapBnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    numbers = {"NET_ADMIN": 12, "NET_RAW": 13, "SYS_PTRACE": 19, "SYS_ADMIN": 21, "SYS_NICE": 23}
    added = [option[1] for option in options(readme()) if option[0] == "--cap-add"]
    assert int(bits, 16) == sum(1 << numbers[name] for name in added)


def test_its_root_cannot_be_written(host: HostEngine) -> None:
    for place in ("/x", "/tmp/x", "/opt/isolator/x", "/etc/isolator/x"):
        told = host.cli("exec", NAME, "sh", "-c", f"echo > {place}", check=False)
        assert "Read-only file system" in told


def test_the_doctor_has_nothing_to_object_to(host: HostEngine) -> None:
    found = json.loads(host.cli("exec", NAME, "isolator", "doctor", "--json"))
    assert [each for each in found if each["level"] != "ok"] == []
    seen = {each["check"]: each["seen"] for each in found}
    assert seen["netns pins"] == "what is pinned below /run/netns outlives the agent"
    assert seen["agent"].endswith("answers")


def test_the_doctor_sees_what_a_plain_container_lacks(host: HostEngine) -> None:
    told = host.cli("run", "--rm", "-v", "/run/netns:/run/netns", NAME, "doctor", "--json", check=False)
    levels = {each["check"]: each["level"] for each in json.loads(told)}
    failing = {name for name, level in levels.items() if level == "fail"}
    assert failing >= {"capabilities", "sysctls", "datapath", "netns pins"}


def test_it_is_removed_and_run_again_under_a_live_connection(
    host: HostEngine, conversation: Conversation
) -> None:
    assert conversation.says("one\n") == "one\n"
    pins = host.host("find", "/sys/fs/bpf/isolator")
    host.cli("rm", "-f", NAME)
    assert host.host("find", "/sys/fs/bpf/isolator") == pins
    links = host.host("nsenter", "--net=/run/netns/isolator", "ip", "-br", "link")
    assert len(links.splitlines()) == 1 + 2 + 3 * 2  # lo, the punt pair, three splices
    assert conversation.says("two\n") == "two\n"
    with contextlib.closing(Conversation(host)) as another:  # layer 4 decides without an agent
        assert another.says("three\n") == "three\n"
    assert pages(host) == ("000", "000")  # closed: what needs Python
    start_agent(host)
    settled(host)
    assert "spliced" not in host.cli("logs", NAME)  # all was taken up
    assert conversation.says("four\n") == "four\n"
    assert pages(host) == (ALLOWED, "403")


def try_out(engine: HostEngine, *command: str, without: str = "") -> str:
    """What a container with the documented options prints and ends with, while no agent runs."""
    left_out = ("-d", "--restart", "unless-stopped", NAME, "--name")
    words = [word.removesuffix(without) if without else word for word in readme() if word not in left_out]
    return engine.cli("run", "--rm", *words, NAME, *command, check=False)


def test_before_it_runs_a_second_time(host: HostEngine) -> None:
    """Without an agent: the doctor is content, and what is wrong is said in one line."""
    settled(host)
    host.cli("stop", NAME)
    found = json.loads(try_out(host, "doctor", "--json"))
    assert [each for each in found if each["level"] != "ok"] == []
    config = Path("deploy/isolator/isolator.yaml").read_text()
    host.host("tee", "/etc/isolator/wrong.yaml", stdin=config.replace("docker.sock", "nowhere.sock"))
    assert (
        "isolator: no Docker engine at /run/nowhere.sock: start it, or correct runtime.socket in the config"
        in try_out(host, "run", "-c", "/etc/isolator/wrong.yaml")
    )
    assert (
        "isolator: /run/netns is this container's own, and the containers' interfaces would die with it"
        in try_out(host, without=":rshared")
    )
    host.cli("start", NAME)
    settled(host)
    assert pages(host) == (ALLOWED, "403")


def test_a_start_waits_until_it_is_protected(host: HostEngine) -> None:
    """The runtime's script comes out of the image, as docs/container.md has it. Unanswered, it would wait a minute."""
    settled(host)
    script = host.cli("run", "--rm", NAME, "oci-runtime")
    host.host("tee", "/etc/isolator-runc", stdin=script)
    host.host("chmod", "+x", "/etc/isolator-runc")
    host.host(
        "timeout",
        "30",
        "/usr/bin/docker",
        "run",
        "-d",
        "--name",
        "late",
        "--runtime",
        "isolator",
        IMAGE,
        *IDLE,
    )
    states = {each["name"]: each["state"] for each in status(host)["endpoints"]}
    assert states["late"] == "enforced"
    host.cli("rm", "-f", "late")


def test_it_stops_on_the_signal_and_leaves_the_splices(host: HostEngine, conversation: Conversation) -> None:
    host.cli("stop", NAME)
    assert host.client.containers.get(NAME).attrs["State"]["ExitCode"] == 0
    assert conversation.says("five\n") == "five\n"
    host.cli("start", NAME)
    settled(host)
    assert conversation.says("six\n") == "six\n"


# -- the stack -----------------------------------------------------------------------------------------------


def test_a_swarm_starts_it_through_the_engine(host: HostEngine, conversation: Conversation) -> None:
    """The launcher's image is the engine's own `docker` on the base image: docker:cli is in a registry."""
    host.cli("rm", "-f", NAME)
    host.client.images.build(fileobj=launcher(), custom_context=True, tag="docker:cli", rm=True)
    host.cli("swarm", "init", "--advertise-addr", "127.0.0.1")
    host.cli("stack", "deploy", "--resolve-image", "never", "-c", "deploy/stack.yaml", NAME)
    wait_for(lambda: "endpoints" in status(host), "the stack brings no agent", 60)
    settled(host)
    assert conversation.says("seven\n") == "seven\n"
    assert pages(host) == (ALLOWED, "403")
    host.cli("stack", "rm", NAME)
    wait_for(
        lambda: NAME not in host.cli("ps", "-a", "--format", "{{.Names}}").split(), "the agent stays", 30
    )
    assert conversation.says("eight\n") == "eight\n"


def launcher() -> io.BytesIO:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        add(tar, "Dockerfile", f"FROM {TAG}\nCOPY docker /usr/local/bin/docker\n".encode(), 0o644)
        add(tar, "docker", Path("/usr/bin/docker").read_bytes(), 0o755)
    packed.seek(0)
    return packed
