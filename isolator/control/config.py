"""isolator.yaml and the policies it names: files to models, everything that is wrong at once.

    load(path) ─┬─ the config: its own problems
                └─ each policy file: its documents' problems → what holds over all of them (names)
       → Loaded, or ConfigErrors with every Problem, `file:line:column: what, and what to do`

Paths in the config are relative to its folder. A folder stands for the *.yaml and *.yml files in it, in the
order of their names, without those in folders below and those that begin with a dot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from isolator.control.fields import Interface, Labels, Name, Netns, checked, wrong
from isolator.control.findings import inside, mappings, policy_findings
from isolator.control.problems import ConfigErrors, Problem, raise_errors
from isolator.control.schema import PolicyModel
from isolator.control.validation import Strict, validate
from isolator.control.yaml_source import Document, Path_, parse_documents, read_documents, read_file
from isolator.core.policy import Policy

STATE_DIR_MAX = 90
"""Characters: a unix socket's path has 107 (sun_path of unix(7)), `/isolator.sock` is a part of it."""

SUFFIXES = (".yaml", ".yml")


def check_state_dir(value: str) -> None:
    if not value.startswith("/") or len(value) > STATE_DIR_MAX or Path(value) == Path("/"):
        raise wrong(
            f"an absolute path of {STATE_DIR_MAX} characters at the most, like /run/isolator: not {value!r}"
        )


def check_file(value: str) -> None:
    if not value:
        raise wrong("an empty path: name a file or folder")


def check_socket(value: str) -> None:
    if not value.startswith("/"):
        raise wrong(f"an absolute path, like /var/run/docker.sock: not {value!r}")


class RuntimeModel(Strict):
    """Where endpoints come from. `netns`: from `endpoints` below; `docker`: from the engine behind `socket`."""

    kind: Literal["netns", "docker"] = "netns"
    socket: Annotated[str, checked(check_socket)] = "/var/run/docker.sock"


class DatapathModel(Strict):
    """How packets are forwarded. `xdp`: a program at the ports that drops early (bpf/isolator_xdp.bpf.c). `l7`: who
    decides requests, the kernel where it can and else Python, or Python alone."""

    xdp: Literal["off", "native", "generic"] = "off"
    l7: Literal["auto", "python"] = "auto"


class EndpointModel(Strict):
    """One endpoint of the netns runtime: `netns` as in `ip netns list`, and the interface inside."""

    name: Name
    netns: Netns
    interface: Interface = "eth0"
    labels: Labels = Field(default_factory=dict)


class ConfigModel(Strict):
    """isolator.yaml."""

    runtime: RuntimeModel = RuntimeModel()
    state_dir: Annotated[str, checked(check_state_dir)]
    policies: list[Annotated[str, checked(check_file)]] = Field(default_factory=list)
    datapath: DatapathModel = DatapathModel()
    on_exit: Literal["keep", "restore"] = "keep"
    protect: Literal["all", "selected"] = "all"
    exclude: list[Labels] = Field(default_factory=list)
    new_containers: Literal["closed", "open"] = "closed"
    start_wait: Annotated[int, Field(ge=0, le=60)] = 5
    endpoints: list[EndpointModel] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Config:
    """The agent's configuration. `policies`: files and folders, as to be opened from the working folder.

    `engine`: the Docker engine's socket. `protect`: every endpoint, or those that a policy selects; `exclude`: none
    that has all of one of these labels. `new_containers`: whether a container of an engine is cut off until it is
    protected or known to be left alone; `start_wait`: seconds that a start through the OCI runtime waits for that.
    `on_exit`: whether SIGTERM leaves the splices (`keep`) or takes them back
    (`restore`).
    """

    path: Path
    runtime: Literal["netns", "docker"]
    engine: Path
    state_dir: Path
    policies: tuple[Path, ...]
    xdp: Literal["off", "native", "generic"]
    on_exit: Literal["keep", "restore"]
    protect: Literal["all", "selected"]
    exclude: tuple[dict[str, str], ...]
    new_containers: Literal["closed", "open"]
    start_wait: int
    endpoints: tuple[EndpointModel, ...]
    l7: Literal["auto", "python"] = "auto"

    @property
    def socket(self) -> Path:
        """The control socket."""
        return self.state_dir / "isolator.sock"


@dataclass(frozen=True, slots=True)
class PolicySource:
    """A policy, and the document it was read from. `file` as it is named in messages. `problems`: what is wrong with
    the labels that it is made of; a file with errors makes none."""

    policy: Policy
    file: str
    document: dict[str, Any] = field(hash=False)
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the files say. `warnings`: what is allowed and hardly meant."""

    config: Config
    sources: tuple[PolicySource, ...]
    warnings: tuple[Problem, ...]

    @property
    def policies(self) -> list[Policy]:
        return [source.policy for source in self.sources]


# -- the config and all it names ---------------------------------------------------------------------------


def load(path: Path | str, files: PolicyFiles | None = None) -> Loaded:
    """The config and its policies. `files` knows those that were read before. Raises ConfigErrors with the problems
    of all files."""
    config, named, problems = read_config(Path(path))
    sources, found = (files or PolicyFiles()).read(named)
    problems += found
    if config is None:
        raise ConfigErrors([problem for problem in problems if not problem.warning])
    raise_errors(problems)
    return Loaded(config, tuple(sources), tuple(problems))


def load_config(path: Path | str) -> Config:
    """The config alone; the policies it names must be there, and are not read. Raises ConfigErrors."""
    config, _, problems = read_config(Path(path))
    if config is None:
        raise ConfigErrors(problems)
    raise_errors(problems)
    return config


def load_policies(paths: Iterable[Path | str]) -> list[Policy]:
    """The policies in these files and folders. Raises ConfigErrors."""
    sources, problems = check_policies(paths)
    raise_errors(problems)
    return [source.policy for source in sources]


def check_policies(paths: Iterable[Path | str]) -> tuple[list[PolicySource], list[Problem]]:
    """The sound policies in these files and folders, and all problems and warnings."""
    named = [Path(path) for path in paths]
    missing = [Problem(str(path), 1, 1, problem) for path in named if (problem := unusable(path))]
    sources, problems = read_policies([path for path in named if not unusable(path)])
    return sources, missing + problems


# -- isolator.yaml -----------------------------------------------------------------------------------------


def read_config(path: Path) -> tuple[Config | None, list[Path], list[Problem]]:
    """The config, the policy files and folders that are there (also of a bad config), and what is wrong."""
    documents, problems = read_documents(path)
    if len(documents) > 1:
        problems.append(
            documents[1].problem((), "a second document: a config is one; remove '---' and what follows")
        )
    if not documents:
        return None, [], problems
    document = documents[0]
    model, found = validate(document, ConfigModel)
    problems += [*found, *duplicate_endpoints(document)]
    if model is not None and model.runtime.kind == "docker" and model.endpoints:
        problems.append(
            document.problem(("endpoints",), "the docker runtime finds endpoints by itself: remove these")
        )
    for at, labels in enumerate(model.exclude if model is not None else ()):
        if not labels:
            problems.append(
                document.problem(("exclude", at), "{} is every container: name a label, or stop the agent")
            )
    named: list[Path] = []
    for at, text in texts(document.value, "policies"):
        policies = path.parent / text
        if problem := unusable(policies):
            problems.append(document.problem(("policies", at), f"{policies}: {problem}"))
        else:
            named.append(policies)
    return to_config(model, path) if model else None, named, sorted(problems)


def to_config(model: ConfigModel, path: Path) -> Config:
    return Config(
        path,
        model.runtime.kind,
        Path(model.runtime.socket),
        Path(model.state_dir),
        tuple(path.parent / text for text in model.policies),
        model.datapath.xdp,
        model.on_exit,
        model.protect,
        tuple(model.exclude),
        model.new_containers,
        model.start_wait,
        tuple(model.endpoints),
        model.datapath.l7,
    )


def texts(value: Any, key: str) -> Iterator[tuple[int, str]]:
    found = value.get(key) if isinstance(value, dict) else None
    for at, each in enumerate(found if isinstance(found, list) else ()):
        if isinstance(each, str) and each:
            yield at, each


def duplicate_endpoints(document: Document) -> Iterator[Problem]:
    """Names and interfaces that stand twice: an endpoint is one interface, and is known by its name."""
    places: dict[tuple[str, ...], Path_] = {}
    for at, endpoint in mappings(document.value, "endpoints"):
        path: Path_ = ("endpoints", at)
        name, netns, interface = (endpoint.get(key) for key in ("name", "netns", "interface"))
        claims: dict[tuple[str, ...], tuple[Path_, str]] = {}
        if isinstance(name, str):
            claims["name", name] = ((*path, "name"), f"the name {name!r}: give each endpoint its own")
        if isinstance(netns, str):
            what = f"{interface or 'eth0'} in netns {netns!r}: remove one of them"
            claims["interface", netns, str(interface or "eth0")] = (path, what)
        for key, (where, what) in claims.items():
            if key in places:
                yield document.problem(where, f"the endpoint in line {document.line(places[key])} has {what}")
            places.setdefault(key, where)


# -- policies ----------------------------------------------------------------------------------------------


def unusable(path: Path) -> str | None:
    """What is wrong with a policy path before it is read."""
    try:
        if not path.exists():
            return "there is no such file or folder: correct the path or make it"
        if path.is_dir() and not files_in(path):
            return "the folder holds no .yaml or .yml file: put a policy there, or remove it from the list"
    except OSError as error:
        return f"cannot be read ({error.strerror}): check its permissions"
    return None


def files_in(path: Path) -> list[Path]:
    """The file itself, or a folder's policy files by name."""
    if not path.is_dir():
        return [path]
    return sorted(
        each for each in path.iterdir() if each.suffix in SUFFIXES and not each.name.startswith(".")
    )


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """What one file says by itself."""

    data: bytes
    documents: list[Document] = field(default_factory=list)
    sources: list[PolicySource] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class PolicyFiles:
    """Reads policies, again and again: a file that says what it said last time is not parsed anew, and its sources are
    the same objects. For one thread."""

    def __init__(self) -> None:
        self._known: dict[Path, PolicyFile] = {}

    def read(self, paths: Sequence[Path]) -> tuple[list[PolicySource], list[Problem]]:
        files = dict.fromkeys(file for path in paths for file in files_in(path))
        self._known = {file: self._file(file) for file in files}
        found = list(self._known.values())
        problems = [problem for each in found for problem in each.problems]
        problems += duplicate_policies(document for each in found for document in each.documents)
        return [source for each in found for source in each.sources], sorted(problems)

    def _file(self, file: Path) -> PolicyFile:
        data = read_file(file)
        if isinstance(data, Problem):
            return PolicyFile(b"", problems=[data])
        known = self._known.get(file)
        return known if known is not None and known.data == data else policy_file(data, str(file))


def policy_file(data: bytes, file: str) -> PolicyFile:
    documents, problems = parse_documents(data, file)
    read = PolicyFile(data, documents, [], problems)
    for document in documents:
        model, found = validate(document, PolicyModel)
        found += findings(document)
        read.problems.extend(found)
        if model is not None and not document.problems and all(each.warning for each in found):
            read.sources.append(PolicySource(model.to_core(), document.file, document.value))
    return read


def read_policies(paths: Sequence[Path]) -> tuple[list[PolicySource], list[Problem]]:
    return PolicyFiles().read(paths)


def findings(document: Document) -> list[Problem]:
    return [
        document.problem(finding.path, finding.message, finding.at_key, finding.warning)
        for finding in policy_findings(document.value)
        if not document.is_broken(finding.path)
    ]


def duplicate_policies(documents: Iterable[Document]) -> Iterator[Problem]:
    first: dict[str, Document] = {}
    for document in documents:
        name = inside(document.value, "metadata").get("name")
        if not isinstance(name, str):
            continue
        path: Path_ = ("metadata", "name")
        if name in first:
            place = f"{first[name].file}:{first[name].line(path)}"
            yield document.problem(path, f"{place} is policy {name!r} already: name each policy differently")
        first.setdefault(name, document)
