"""isolator.yaml and policy files: what they say, and every problem at its line and column."""

from __future__ import annotations

import contextlib
import json
from ipaddress import ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml.scanner import Scanner

from isolator.control.config import (
    Config,
    ConfigErrors,
    Loaded,
    check_policies,
    load,
    load_config,
    load_policies,
)
from isolator.control.yaml_source import DEPTH_MAX, parse_documents
from isolator.core.pattern import HostPattern, PathPattern
from isolator.core.policy import (
    Action,
    DenyWith,
    Failure,
    HttpRule,
    Mode,
    Policy,
    PortMatch,
    Range,
    Rule,
    Selected,
    World,
    labels_of,
)

CONFIG = """\
runtime: {kind: netns}
state_dir: /run/isolator-demo
policies: [policies/]
datapath: {xdp: off}
endpoints:
  - {name: api,  netns: demo-api,  interface: eth0, labels: {app: bookstore, role: api}}
  - {name: web,  netns: demo-web}
"""

POLICY = """\
kind: Policy
metadata: {name: api-allow}
spec:
  select: {app: bookstore, role: api}
  mode: protect
  failure: closed
  ingress:
    - name: read-books
      from: [{select: {app: bookstore}}, {cidr: 10.9.0.0/16, except: [10.9.7.0/24]}, {world: true}]
      ports: [{port: 80, protocol: tcp}]
      action: allow
      http:
        - {methods: [GET, HEAD], path: /api/v1/**}
        - {methods: [POST], path: "/orders/{id}", hosts: [api.local], headers: {X-Tenant: acme, x-key: true}}
    - {from: [], ports: [{protocol: icmp}], action: deny}
  egress: []
"""

OTHER = """\
kind: Policy
metadata: {name: other}
spec: {select: {}, mode: monitor, failure: open, deny_with: reset, egress: [{action: audit}]}
"""


def write(folder: Path, **files: str) -> Path:
    """Files by name, `_` for `/` and `.yaml` added; returns isolator.yaml's path."""
    for name, text in files.items():
        path = folder / f"{name.replace('_', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / "isolator.yaml"


def told(path: Path, folder: Path) -> list[str]:
    """Every line that `load` complains with, without the folder."""
    with pytest.raises(ConfigErrors) as raised:
        load(path)
    assert str(raised.value) == "\n".join(map(str, raised.value.problems))
    return [str(problem).replace(f"{folder}/", "") for problem in raised.value.problems]


def problems(folder: Path, text: str) -> list[str]:
    """Problems and warnings of one policy file, `line:column: message`."""
    path = folder / "p.yaml"
    path.write_text(text)
    _, found = check_policies([path])
    return [str(problem).removeprefix(f"{path}:") for problem in found]


# -- what is right -----------------------------------------------------------------------------------------


def test_the_contract(tmp_path: Path) -> None:
    path = write(tmp_path, isolator=CONFIG, policies_api=POLICY, policies_other=OTHER)
    loaded = load(path)
    config = loaded.config
    assert (config.runtime, config.xdp, config.on_exit) == ("netns", "off", "keep")
    assert config.socket == Path("/run/isolator-demo/isolator.sock")
    assert config.policies == (tmp_path / "policies",)
    assert [(e.name, e.netns, e.interface, e.labels) for e in config.endpoints] == [
        ("api", "demo-api", "eth0", {"app": "bookstore", "role": "api"}),
        ("web", "demo-web", "eth0", {}),
    ]
    first = HttpRule(frozenset({"GET", "HEAD"}), PathPattern("/api/v1/**"))
    second = HttpRule(
        frozenset({"POST"}),
        PathPattern("/orders/{id}"),
        (HostPattern("api.local"),),
        (("x-tenant", "acme"), ("x-key", None)),
    )
    books = Selected(labels_of({"app": "bookstore"}))
    office = Range(ip_network("10.9.0.0/16"), (ip_network("10.9.7.0/24"),))
    assert loaded.policies == [
        Policy(
            "api-allow",
            labels_of({"app": "bookstore", "role": "api"}),
            ingress=(
                Rule("read-books", Action.ALLOW, (books, office, World()), (PortMatch(6, 80),), (first, second)),
                Rule("ingress[1]", Action.DENY, (), (PortMatch(1),)),
            ),
            egress=(),
        ),
        Policy(
            "other", labels_of({}), Mode.MONITOR, Failure.OPEN, DenyWith.RESET, None, (Rule("egress[0]", Action.AUDIT),)
        ),
    ]  # fmt: skip
    assert [(source.file, source.document["kind"]) for source in loaded.sources] == [
        (str(tmp_path / "policies/api.yaml"), "Policy"),
        (str(tmp_path / "policies/other.yaml"), "Policy"),
    ]
    assert [(each.line, each.column) for each in loaded.warnings] == [(15, 8)]


def test_the_least_config(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, isolator="state_dir: /run/x\n"))
    assert (config.policies, config.endpoints, config.runtime) == ((), (), "netns")


@pytest.mark.parametrize("xdp", ["off", "native", "generic"])
def test_off_is_text(tmp_path: Path, xdp: str) -> None:
    path = write(tmp_path, isolator=f"state_dir: /run/x\ndatapath: {{xdp: {xdp}}}\non_exit: restore\n")
    assert load_config(path).xdp == xdp
    assert load_config(path).on_exit == "restore"


def test_files_folders_documents(tmp_path: Path) -> None:
    write(tmp_path, a=POLICY + "---\n" + OTHER.replace("other", "second") + "---\n", d_b=OTHER)
    (tmp_path / "d" / "note.txt").write_text("not read")
    (tmp_path / "d" / ".hidden.yaml").write_text("not: read")
    found = load_policies([tmp_path / "a.yaml", tmp_path / "d", tmp_path / "d" / "b.yaml"])
    assert [policy.name for policy in found] == ["api-allow", "second", "other"]


def test_aliases_are_followed(tmp_path: Path) -> None:
    text = "state_dir: /x\nendpoints: [{name: a, netns: a, labels: &l {app: x}}, {name: b, netns: b, labels: *l}]"
    assert load_config(write(tmp_path, isolator=text)).endpoints[1].labels == {"app": "x"}


# -- what is wrong with the config -------------------------------------------------------------------------


def test_everything_at_once_over_all_files(tmp_path: Path) -> None:
    config = """\
runtime: {kind: podman}
state_dirs: /run/x
policies: [nope/, policies/, empty]
datapath: {xdp: of, xpd: off}
endpoints:
  - {name: api, netns: demo-api, labels: {app: 1, "-x": y}}
  - {name: api, netns: demo-api, lables: {}}
  - {name: 5, netns: a/b, interface: averyveryverylongname}
  - x
datapath: {}
on_exit:
"""
    (tmp_path / "empty").mkdir()
    path = write(tmp_path, isolator=config, policies_a=OTHER, policies_b=OTHER, policies_c="a: [\n")
    assert told(path, tmp_path) == [
        "isolator.yaml:1:1: 'state_dir' is missing in the document: add it",
        "isolator.yaml:1:17: 'runtime.kind' cannot be 'podman': write one of netns, docker",
        "isolator.yaml:2:1: unknown key 'state_dirs' in the document: did you mean 'state_dir'? "
        "Known here: datapath, endpoints, exclude, new_containers, on_exit, policies, protect, runtime, start_wait, "
        "state_dir",
        "isolator.yaml:3:12: nope: there is no such file or folder: correct the path or make it",
        "isolator.yaml:3:30: empty: the folder holds no .yaml or .yml file: "
        "put a policy there, or remove it from the list",
        "isolator.yaml:4:17: 'datapath.xdp' cannot be 'of': did you mean off? It is one of off, native, generic",
        "isolator.yaml:4:21: unknown key 'xpd' in 'datapath': did you mean 'xdp'? Known here: l7, xdp",
        "isolator.yaml:6:48: 'endpoints[0].labels.app' is text, not the number 1: put it in quotes, \"1\"",
        "isolator.yaml:6:51: 'endpoints[0].labels.-x': a label's key has letters, digits and inside also "
        "'.', '_', '-', '/': not '-x'",
        "isolator.yaml:7:5: the endpoint in line 6 has eth0 in netns 'demo-api': remove one of them",
        "isolator.yaml:7:12: the endpoint in line 6 has the name 'api': give each endpoint its own",
        "isolator.yaml:7:34: unknown key 'lables' in 'endpoints[1]': did you mean 'labels'? "
        "Known here: interface, labels, name, netns",
        "isolator.yaml:8:12: 'endpoints[2].name' is text, not the number 5: put it in quotes, \"5\"",
        "isolator.yaml:8:22: 'endpoints[2].netns': a network namespace's name as in 'ip netns list', not 'a/b'",
        "isolator.yaml:8:38: 'endpoints[2].interface': an interface's name has 1 to 15 characters, "
        "no '/', ':' or space: not 'averyveryverylongname'",
        "isolator.yaml:9:5: 'endpoints[3]' is a mapping, not the text 'x': "
        "write {key: value} or lines of 'key: value'",
        "isolator.yaml:10:1: 'datapath' stands in line 4 already: keep one of them",
        "isolator.yaml:11:1: 'on_exit' has no value: write one (a list may be []), or remove the key",
        "policies/b.yaml:2:18: policies/a.yaml:2 is policy 'other' already: name each policy differently",
        "policies/c.yaml:2:1: this is not YAML (while parsing a flow node expected the node content, "
        "but found '<stream end>'): check quotes, brackets and indentation",
    ]


CONFIG_ERRORS = [
    ("", "1:1: nothing in it: write a document, or remove it"),
    ("- a\n", "1:1: the document is a mapping, not a list"),
    ("state_dir: run\n", "1:12: 'state_dir': an absolute path of 90 characters at the most"),
    ("state_dir: /\n", "1:12: 'state_dir': an absolute path"),
    (f"state_dir: /{'x' * 100}\n", "1:12: 'state_dir': an absolute path"),
    ("state_dir: /x\n---\nstate_dir: /y\n", "3:1: a second document"),
    ("state_dir: /x\npolicies: p\n", "2:11: 'policies' is a list, not the text 'p'"),
    ("state_dir: /x\npolicies: ['']\n", "2:12: 'policies[0]': an empty path"),
    ("state_dir: /x\ndatapath: {xdp: false}\n", "2:17: 'datapath.xdp' cannot be False"),
    (
        "state_dir: /x\nendpoints: [{name: a, netns: b, interface: lo}]\n",
        "2:44: 'endpoints[0].interface': 'lo'",
    ),
    ("state_dir: /x\nendpoints: [{name: a}]\n", "2:13: 'netns' is missing in 'endpoints[0]': add it"),
    ("state_dir: /x\n\tpolicies: []\n", "2:1: a tab: indent with spaces"),
    ("state_dir: 'x\n", "2:1: this is not YAML"),
    ("state_dir: \x07\n", "1:12: a character that YAML does not allow"),
    ("state_dir: !!python/name:x y\n", "1:12: the tag tag:yaml.org,2002:python/name:x is not supported"),
    ("state_dir: !!float x\n", "1:12: 'state_dir': an absolute path"),
    ("%YAML 1.1\n---\nstate_dir: 1:30.5\n", "3:12: 'state_dir': an absolute path"),
    (f"%YAML 1.{'1' * 5000}\n---\na\n", "1:1: this is not YAML (Exceeds the limit"),
    ("? [a]\n: b\n", "1:3: a key is a single word"),
    ("state_dir: /x\n<<: {on_exit: keep}\n", "2:1: merge keys (<<) are not supported"),
    ("state_dir: /x\nendpoints: &a [*a]\n", "too deep or too large"),
    ("state_dir: *nowhere\n", "1:12: this is not YAML"),
    ("a: " + "[" * 5000, "too deep"),
    ("state_dir: /x\nprotect: some\n", "2:10: 'protect' cannot be 'some': write one of all, selected"),
    ("state_dir: /x\nexclude: [{app: x}, {}]\n", "2:21: {} is every container"),
    ("state_dir: /x\nnew_containers: shut\n", "2:17: 'new_containers' cannot be 'shut'"),
]


@pytest.mark.parametrize(("text", "message"), CONFIG_ERRORS)
def test_config_errors(tmp_path: Path, text: str, message: str) -> None:
    lines = told(write(tmp_path, isolator=text), tmp_path)
    assert any(message in line for line in lines), lines


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "isolator.yaml"
    path.write_bytes(b"state_dir: /x\nname: \xff\n")
    assert told(path, tmp_path) == ["isolator.yaml:2:7: this is not UTF-8: save it as UTF-8"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert told(tmp_path / "isolator.yaml", tmp_path) == [
        "isolator.yaml:1:1: there is no such file or folder: correct the path or make it"
    ]
    assert "cannot be read (Is a directory)" in told(tmp_path, tmp_path)[0]


@pytest.mark.parametrize("text", ["[" * 4000, "{" * 4000, '["]",' * 1500, "[{}," * 2000, "[? " * 2500])
def test_brackets_are_not_read_beyond_the_depth(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """For each token ruamel looks at every bracket around it."""
    opened = []
    fetch = Scanner.fetch_flow_collection_start

    def counted(scanner: Any, *arguments: Any) -> None:
        opened.append(len(scanner.flow_context))
        fetch(scanner, *arguments)

    monkeypatch.setattr(Scanner, "fetch_flow_collection_start", counted)
    _, (problem,) = parse_documents(text.encode(), "p.yaml")
    assert "more than 64 values inside each other" in problem.message and max(opened) < DEPTH_MAX


def test_many_aliases_do_not_take_all_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    told_lines = told(write(tmp_path, isolator="\n".join(lines)), tmp_path)
    assert any("too deep or too large" in line for line in told_lines)


# -- what is wrong with policies ---------------------------------------------------------------------------

HEAD = "kind: Policy\nmetadata: {name: p}\nspec:\n  select: {}\n  ingress:\n"  # rules from line 6 on

RULE_ERRORS = [
    ("{from: [{cidr: 10.0.0.1/8}]}", "6:22: 'from[0].cidr': 10.0.0.1/8 names an address inside a network: "
     "write 10.0.0.0/8, or 10.0.0.1"),
    ("{from: [{cidr: 10.0.0.0/33}]}", "'10.0.0.0/33' is no network: write one like 10.9.0.0/16"),
    ("{from: [{cidr: '::ffff:10.0.0.0/104'}]}", "is IPv4 written as IPv6"),
    ("{from: [{cidr: 10.0.0.0/8, except: [11.0.0.0/8]}]}", "6:43: 11.0.0.0/8 is not inside 10.0.0.0/8"),
    ("{from: [{cidr: 10.0.0.0/8, except: ['fd00::/8']}]}", "fd00::/8 is not inside 10.0.0.0/8"),
    ("{from: [{select: {}, except: [10.0.0.0/8]}]}", "6:28: 'except' takes networks out of 'cidr': add that"),
    ("{from: [{select: {}, world: true}]}", "6:15: a peer is one of select, cidr, world, this has select and world"),
    ("{from: [{}]}", "6:15: a peer is one of select, cidr, world, this has none of them"),
    ("{from: [{world: false}]}", "6:23: 'from[0].world' cannot be False: write true"),
    ("{from: []}", "6:8: warning: an empty list matches nobody"),
    ("{from: [{select: {app: true}}]}", "'from[0].select.app' is text, not the truth value true"),
    ("{from: [{select: {a b: c}}]}", "a label's key has letters"),
    ("{to: [{world: true}]}", "6:8: unknown key 'to' in 'spec.ingress[0]': did you mean 'from'?"),
    ("{ports: [{port: 0}]}", "'ports[0].port': a port is 1 to 65535, not 0"),
    ("{ports: [{port: 65536}]}", "6:23: 'ports[0].port': a port is 1 to 65535, not 65536"),
    ("{ports: [{port: '80'}]}", "is a whole number, not the text '80': write one without quotes"),
    ("{ports: [{port: 80, protocol: tpc}]}", "'ports[0].protocol' cannot be 'tpc': did you mean tcp?"),
    ("{ports: [{port: 8, protocol: icmp}]}", "6:17: icmp has no ports: remove 'port'"),
    ("{ports: []}", "6:8: an empty list matches no port"),
    ("{ports: 80}", "'spec.ingress[0].ports' is a list, not the number 80"),
    ("{action: permit}", "'spec.ingress[0].action' cannot be 'permit': write one of allow, deny, audit"),
    ("{http: [{}], ports: [{protocol: udp}]}", "6:39: 'http' reads TCP, not udp"),
    ("{http: []}", "6:8: an empty list matches no request"),
    ("{http: [{methods: []}]}", "an empty list matches no request: remove 'methods'"),
    ("{http: [{methods: [get]}]}", "methods are case-sensitive (RFC 9110 section 9.1): write GET"),
    ("{http: [{methods: ['*']}]}", "remove 'methods'"),
    ("{http: [{methods: [G T]}]}", "'G T' is no HTTP method"),
    ("{http: [{method: [GET]}]}", "unknown key 'method' in 'ingress[0].http[0]': did you mean 'methods'?"),
    ("{http: [{path: api}]}", "6:22: 'http[0].path': a path begins with '/': write /api or regex:"),
    ("{http: [{path: 'regex:/(a'}]}", "bad regular expression: '(' without ')' (at character 4)"),
    ("{http: [{path: 'regex:/(a+)+?'}]}", "bad regular expression: the whole path is matched"),
    ("{http: [{hosts: ['a:80']}]}", "a host is a name or address without port"),
    ("{http: [{headers: {host: x}}]}", "the Host header is matched by 'hosts'"),
    ("{http: [{headers: {x: 5}}]}", "a header is compared with text: put it in quotes, \"5\""),
    ("{http: [{headers: {x: a, X: b}}]}", "header 'x' stands twice"),
    ("{http: [{headers: {a b: c}}]}", "'a b' is no header's name"),
    ("{name: a b}", "6:14: 'spec.ingress[0].name': a name has letters, digits"),
    ("{name: a}\n    - {name: a}", "7:14: ingress[0] is named 'a' already"),
    ("{name: a}\n  egress: [{name: a}]", "7:19: ingress[0] is named 'a' already"),
    ("{name: 'ingress[0]'}", "a name has letters, digits"),
    ("x", "'spec.ingress[0]' is a mapping, not the text 'x'"),
    ("", "an empty value: write one, or remove it"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "message"), RULE_ERRORS)
def test_rule_errors(tmp_path: Path, rule: str, message: str) -> None:
    found = problems(tmp_path, f"{HEAD}    - {rule}\n")
    assert len(found) == 1 and message in found[0], found


POLICY_ERRORS = [
    ("kind: Policy\nmetadata: {name: p}\nspec: {select: {}}\n", "3:7: warning: neither ingress nor egress"),
    (
        "kind: Polcy\nmetadata: {name: p}\nspec: {select: {}, egress: []}\n",
        "1:7: 'kind' cannot be 'Polcy': write Policy",
    ),
    (
        "metadata: {name: p}\nspec: {select: {}, egress: []}\n",
        "1:1: 'kind' is missing in the document: add it",
    ),
    ("kind: Policy\nmetadata: {}\nspec: {select: {}, egress: []}\n", "2:11: 'name' is missing in 'metadata'"),
    ("kind: Policy\nmetadata: {name: p}\nspec: {egress: []}\n", "3:7: 'select' is missing in 'spec': add it"),
    ("kind: Policy\nmetadata: {name: p}\nspec: {select: {}, egress: }\n", "3:20: 'egress' has no value"),
    (
        "kind: Policy\nmetadata: {name: p}\nspec: {select: {}, egress: [], mode: protct}\n",
        "did you mean protect?",
    ),
    ("kind: Policy\nmetadata: {name: p}\nspec: {select: {}, egress: [], failure: yes}\n", "cannot be 'yes'"),
]


@pytest.mark.parametrize(("text", "message"), POLICY_ERRORS)
def test_policy_errors(tmp_path: Path, text: str, message: str) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1 and message in found[0], found


def test_a_bad_policy_is_not_among_the_sound_ones(tmp_path: Path) -> None:
    write(tmp_path, d_a=OTHER, d_b=f"{HEAD}    - {{http: []}}\n")
    sources, found = check_policies([tmp_path / "d", tmp_path / "none"])
    assert [source.policy.name for source in sources] == ["other"]
    assert len(found) == 2
    with pytest.raises(ConfigErrors):
        load_policies([tmp_path / "d"])


def test_types(tmp_path: Path) -> None:
    """What the daemon relies on."""
    loaded = load(str(write(tmp_path, isolator="state_dir: /run/x\n")))
    assert isinstance(loaded, Loaded) and isinstance(loaded.config, Config) and loaded.warnings == ()


WORDS = [
    "spec",
    "ingress",
    "from",
    "ports",
    "http",
    "name",
    "kind",
    "Policy",
    "except",
    "cidr",
    "metadata",
    "policies",
]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WORDS)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(values, st.sampled_from(["spec", "ingress", "rule", "peer", "port", "http", "document"]))
def test_whatever_stands_there_ends_in_problems(value: object, where: str) -> None:
    rule: dict[str, object] = {"name": "r"}
    rule |= {"rule": {"action": value}, "peer": {"from": [value]}, "port": {"ports": [value]}}.get(where, {})
    rule |= {"http": [value]} if where == "http" else {}
    spec = {"select": {}, "ingress": value if where == "ingress" else [rule]}
    policy = {"kind": "Policy", "metadata": {"name": "p"}, "spec": value if where == "spec" else spec}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.yaml"
        path.write_text(json.dumps(value if where == "document" else policy))
        sources, found = check_policies([path])
        assert sources or found
        with contextlib.suppress(ConfigErrors):
            load(path)


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.integers(0, len(POLICY)))
def test_whatever_bytes_end_in_problems(noise: bytes, at: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.yaml"
        path.write_bytes(POLICY.encode()[:at] + noise + POLICY.encode()[at:])
        check_policies([path])
        with contextlib.suppress(ConfigErrors):
            load(path)
