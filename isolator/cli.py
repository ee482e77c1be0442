"""The command line. Exit codes: 0 done, 1 the answer is no (or it can't be done), 2 usage.

Commands talk to the agent over its control socket; `run` and `demo` replace this process with one that has
not loaded the command line's libraries, so that the agent stays small. Imports stand where they are used:
`--help` must be quick.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from isolator.control.client import DEFAULT_SOCKET, AgentUnreachableError, Client, ClientError

POLL_SECONDS = 0.1
"""How often `status --wait` asks."""


class OneLineErrors(TyperGroup):
    """A ClientError ends a command with its lines on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ClientError as error:
            fail(error.error, error.details)


app = typer.Typer(
    cls=OneLineErrors,
    help="Lets through between containers only what the policy allows, down to the HTTP method and path.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)
policy = typer.Typer(help="Check, show and describe policies.", no_args_is_help=True)
app.add_typer(policy, name="policy")

Socket = Annotated[
    Path | None,
    typer.Option(
        help="The agent's control socket.", envvar="ISOLATOR_SOCKET", show_default=str(DEFAULT_SOCKET)
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def fail(error: str, details: list[str] | None = None) -> NoReturn:
    """One clear line on stderr (and what belongs to it), exit code 1."""
    typer.secho(f"isolator: {error}", fg="red", err=True)
    for line in details or []:
        typer.echo(f"  {line}", err=True)
    raise typer.Exit(1)


def client(ctx: typer.Context, given: Path | None) -> Client:
    return Client(socket_path(ctx, given))


def socket_path(ctx: typer.Context, given: Path | None) -> Path:
    """The socket named after the command, before it, in the environment, or the default one."""
    named: Path | None = given or ctx.obj
    return named or DEFAULT_SOCKET


def become(module: str, *arguments: str) -> NoReturn:
    """Replaces this process by `python -m module`: same pid, none of the libraries loaded here."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


@app.callback()
def options(ctx: typer.Context, socket: Socket = None) -> None:
    ctx.obj = socket


@app.command()
def run(
    config: Annotated[Path, typer.Option("--config", "-c", help="The agent's config.")] = Path(
        "isolator.yaml"
    ),
) -> None:
    """Run the agent in the foreground until SIGTERM or Ctrl-C."""
    become("isolator.daemon", "run", str(config))


@app.command()
def status(
    ctx: typer.Context,
    as_json: Json = False,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for every endpoint to be enforced.")
    ] = 0.0,
    socket: Socket = None,
) -> None:
    """Show the agent's state; exit 0 once every configured endpoint is spliced and enforced, else 1."""
    seen = wait_until_ready(client(ctx, socket), wait)
    if as_json:
        print_json(seen)
    else:
        show_status(seen)
    raise typer.Exit(0 if seen["ready"] else 1)


def wait_until_ready(agent: Client, seconds: float) -> dict[str, Any]:
    """The status, once it is ready or the time is over. An agent that is not up yet is waited for, too."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            seen = agent.status()
            if seen["ready"] or time.monotonic() >= deadline:
                return seen
        except ClientError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(POLL_SECONDS)


def show_status(seen: dict[str, Any]) -> None:
    from isolator.control import render

    typer.echo(
        f"isolator {seen['version']}, pid {seen['pid']}, policy generation {seen['generation']}, "
        f"xdp {seen['xdp']}, since {seen['started'][:19]}Z"
    )
    render.table(
        ["ENDPOINT", "STATE", "ADDRESSES", "POLICIES", "DETAIL"],
        [*render.endpoint_rows(seen["endpoints"]), *render.unprotectable_rows(seen["unprotectable"])],
    )
    if any(seen["requests"].values()):
        typer.echo(f"requests: {render.share(seen['requests'])} in the kernel")
    for line in seen["policy_errors"]:
        typer.secho(f"not in force: {line}", fg="yellow")
    if not seen["ready"]:
        late = ", ".join(
            each["name"] for each in seen["endpoints"] if each["state"] not in ("enforced", "exempt")
        )
        typer.secho(f"not ready: {late}", fg="yellow")


@app.command()
def endpoints(ctx: typer.Context, as_json: Json = False, socket: Socket = None) -> None:
    """List the endpoints, with their labels, namespaces and the policies that select them."""
    found = client(ctx, socket).endpoints()
    if as_json:
        print_json(found)
        return
    from isolator.control import render

    rows = (
        [name, where, render.labels(each["labels"]), *rest]
        for each in found
        for name, *rest in render.endpoint_rows([each])
        for where in [f"{each['netns']}/{each['interface']}"]
    )
    render.table(["ENDPOINT", "INTERFACE", "LABELS", "STATE", "ADDRESSES", "POLICIES", "DETAIL"], rows)


@app.command()
def flows(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with each new record.")] = False,
    last: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="The newest N held records. Default: all; with --follow: none."
        ),
    ] = None,
    verdict: Annotated[
        str | None, typer.Option(metavar="FORWARDED|DROPPED|AUDIT", help="Only records of this verdict.")
    ] = None,
    socket: Socket = None,
) -> None:
    """Show decided messages and new flows, oldest first."""
    if verdict is not None and verdict.upper() not in ("FORWARDED", "DROPPED", "AUDIT"):
        raise typer.BadParameter("it is one of FORWARDED, DROPPED, AUDIT", param_hint="--verdict")
    try:
        for record in client(ctx, socket).flows(last, verdict, follow):
            show_flow(record, as_json, decided=True)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def show_flow(record: dict[str, Any], as_json: bool, decided: bool = False) -> None:
    """A gap goes to stderr, so that stdout holds records alone."""
    from isolator.control import render

    if "lost" in record:
        typer.secho(f"{record['lost']} records lost here: read faster, or ask for one --verdict", err=True)
    else:
        typer.echo(json.dumps(record) if as_json else render.flow_line(record, decided))
    sys.stdout.flush()


@app.command()
def offload(ctx: typer.Context, as_json: Json = False, socket: Socket = None) -> None:
    """Show which requests the kernel decides itself, which Python does, and why."""
    seen = client(ctx, socket).offload()
    if as_json:
        print_json(seen)
        return
    from isolator.control import render

    requests = seen["requests"]
    typer.echo(
        f"{requests['kernel']} requests decided in the kernel, {requests['python']} in Python: "
        f"{render.share(requests)} in the kernel; datapath.l7 {seen['l7']}, "
        f"{seen['states']} of {seen['states_max']} states"
    )
    render.table(render.OFFLOAD_COLUMNS, render.offload_rows(seen["profiles"]))


@policy.command("check")
def policy_check(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH…", help="Policy files or folders of them.")],
) -> None:
    """Check policies without an agent; every error as file:line:column."""
    from isolator.control.config import check_policies
    from isolator.control.problems import errors_in

    found, problems = check_policies(paths)
    for problem in problems:
        typer.echo(str(problem), err=True)
    if errors_in(problems):
        raise typer.Exit(1)
    typer.echo(f"{len(found)} {'policy' if len(found) == 1 else 'policies'}, no error")


@policy.command("show")
def policy_show(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME…]")] = None,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Show the policies in force, as written."""
    found = client(ctx, socket).policies()
    known = {each["name"] for each in found}
    for name in names or []:
        if name not in known:
            fail(f"no policy is named {name}: there are {', '.join(sorted(known)) or 'none'}")
    shown = [each for each in found if not names or each["name"] in names]
    if as_json:
        print_json(shown)
    else:
        typer.echo("---\n".join(policy_text(each) for each in shown), nl=False)


def policy_text(shown: dict[str, Any]) -> str:
    from io import StringIO

    from ruamel.yaml import YAML

    from isolator.control import render

    writer, text = YAML(), StringIO()
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.dump(shown["document"], text)
    head = [
        f"{shown['file']}, selects {', '.join(shown['endpoints']) or 'no endpoint'}",
        *shown["problems"],
    ]
    lines = [*(f"# {line}" for line in head), *text.getvalue().removesuffix("\n").split("\n")]
    return "".join(f"{render.printable(line)}\n" for line in lines)


@policy.command("schema")
def policy_schema() -> None:
    """Print the JSON Schema of a policy, for editors."""
    from isolator.control.schema import policy_schema as schema

    print_json(schema())


@app.command()
def explain(
    ctx: typer.Context,
    source: Annotated[str, typer.Option("--from", help="An endpoint's name, an address, or world.")],
    destination: Annotated[str, typer.Option("--to", help="Likewise.")],
    port: Annotated[int, typer.Option(min=0, max=65535)],
    method: Annotated[str | None, typer.Argument(help="Of an HTTP request; none: layer 4 alone.")] = None,
    path: Annotated[str | None, typer.Argument(help="Its path, as a client would send it.")] = None,
    protocol: Annotated[str, typer.Option(metavar="tcp|udp|icmp")] = "tcp",
    host: Annotated[str | None, typer.Option(help="Its Host.")] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of its headers.")
    ] = None,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Say which rule decides, and why the others do not; exit 0 if it is allowed, 1 if not."""
    if (method is None) != (path is None):
        raise typer.BadParameter("give METHOD and PATH together", param_hint="METHOD PATH")
    if protocol not in ("tcp", "udp", "icmp"):
        raise typer.BadParameter("it is one of tcp, udp, icmp", param_hint="--protocol")
    question = {
        "source": source,
        "destination": destination,
        "port": port,
        "protocol": protocol,
        "method": method,
        "path": path,
        "host": host,
        "headers": dict(split_header(each) for each in header or []),
    }
    answer = client(ctx, socket).explain(question)
    if as_json:
        print_json(answer)
    else:
        show_explanation(answer)
    raise typer.Exit(0 if answer["allowed"] else 1)


def split_header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise typer.BadParameter(f"{text}: it is NAME=VALUE", param_hint="--header")
    return name.lower(), value


def show_explanation(answer: dict[str, Any]) -> None:
    from isolator.control import render

    verdict = typer.style(answer["verdict"], fg=render.COLOURS.get(answer["verdict"]))
    typer.echo(f"{verdict}: {render.printable(answer['summary'])}")
    rows = (
        [
            f"{each['policy']}/{each['rule']}",
            each["direction"],
            each["action"],
            yes(each["matched"]),
            each["why"],
        ]
        for each in answer["considered"]
    )
    render.table(["RULE", "DIRECTION", "ACTION", "MATCHES", "WHY"], rows)


def yes(value: bool) -> str:
    return "yes" if value else "no"


@app.command()
def replay(
    capture: Annotated[Path, typer.Argument(metavar="FILE.pcap", help="pcap or pcapng, of Ethernet.")],
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The config; its policies and endpoints' labels hold.")
    ] = Path("isolator.yaml"),
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ADDRESS",
            help="Whose address it was in the capture, by the config's names. Repeat it.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line.")] = False,
) -> None:
    """Say what the policies make of a recorded capture: no agent, no root, the frames' own time."""
    from isolator.control.problems import ConfigErrors
    from isolator.core.compile import PolicyTooLarge
    from isolator.replay import command
    from isolator.replay.capture import CaptureError

    try:
        given = command.owners([split_address(each) for each in endpoint or []])
        replaying = command.prepare(config, given, lambda record: show_flow(record.as_json(), as_json))
    except ConfigErrors as error:
        fail("the files are wrong", [str(problem) for problem in error.problems])
    except (command.UnknownEndpointError, PolicyTooLarge) as error:
        fail(str(error))
    began = time.perf_counter()
    try:
        for frame in command.read_capture(capture):
            replaying.feed(frame)
    except CaptureError as error:
        stopped: str | None = str(error)
    except (KeyboardInterrupt, BrokenPipeError):
        raise typer.Exit(1) from None
    else:
        stopped = None
    told = command.told(replaying.finish(), time.perf_counter() - began)
    for line in [json.dumps(told)] if as_json else command.lines(told):
        typer.echo(line, err=True)
    if stopped:
        fail(stopped)


def split_address(text: str) -> tuple[str, str]:
    name, separator, address = text.partition("=")
    if not (name and separator and address):
        raise typer.BadParameter(f"{text}: it is NAME=ADDRESS", param_hint="--endpoint")
    return name, address


@app.command()
def reload(ctx: typer.Context, socket: Socket = None) -> None:
    """Read config and policies again; a bad file keeps the old policy in force."""
    typer.echo(f"policy generation {client(ctx, socket).reload()['generation']} is in force")


@app.command()
def restore(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME…]", help="Endpoints.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    socket: Socket = None,
) -> None:
    """Give endpoints their own network back, exactly as it was; works without an agent too."""
    if bool(names) == everything:
        raise typer.BadParameter("name endpoints, or give --all", param_hint="NAME… | --all")
    try:
        results = client(ctx, socket).restore(names)
    except AgentUnreachableError:
        state_dir = socket_path(ctx, socket).parent
        if not state_dir.is_dir():
            raise
        become("isolator.daemon", "restore", str(state_dir), *(names or []))
    for each in results:
        typer.echo(f"{each['name']}: {each['error'] or 'restored'}", err=each["error"] is not None)
    raise typer.Exit(1 if any(each["error"] for each in results) else 0)


@app.command("oci-runtime")
def oci_runtime(
    ctx: typer.Context,
    runc: Annotated[str, typer.Option(help="The runtime that it goes on with.")] = "runc",
    socket: Socket = None,
) -> None:
    """Print an OCI runtime for the engine: containers started with it wait until they are protected, then run."""
    from isolator.control.starts import script

    typer.echo(script(socket_path(ctx, socket).parent, runc), nl=False)


@app.command()
def demo(
    as_json: Json = False,
    xdp: Annotated[str, typer.Option(metavar="off|native|generic", help="Where XDP is attached.")] = "off",
) -> None:
    """Build three namespaces, a policy and real traffic, and check what gets through."""
    if xdp not in ("off", "native", "generic"):
        raise typer.BadParameter("it is one of off, native, generic", param_hint="--xdp")
    become("isolator.demo", "--xdp", xdp, *(["--json"] if as_json else []))


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="The agent's config; default: isolator.yaml here or in /etc/isolator."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether the agent can work on this machine, and what to do; exit 1 if something fails."""
    from isolator.control import render
    from isolator.doctor import Level, examine

    found = list(examine(config))
    if as_json:
        print_json([each.as_json() for each in found])
    else:
        render.table(
            ["CHECK", "LEVEL", "SEEN", "WHAT TO DO"], ([e.check, e.level, e.seen, e.advice] for e in found)
        )
    raise typer.Exit(1 if any(each.level is Level.FAIL for each in found) else 0)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(f"isolator {installed('isolator')}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
