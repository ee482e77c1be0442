"""What several values of a policy must be together.

These checks read the document as it stands, whatever else is wrong with it, so that everything is reported at
once; what is not even of the right kind is passed over here, because pydantic has told of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any, NamedTuple

from isolator.control.yaml_source import Path_

DIRECTIONS = {"ingress": "from", "egress": "to"}
KINDS = ("select", "cidr", "world")


class Finding(NamedTuple):
    path: Path_
    message: str
    warning: bool = False
    at_key: bool = False


def policy_findings(document: Any) -> Iterator[Finding]:
    spec = inside(document, "spec")
    if spec and not any(direction in spec for direction in DIRECTIONS):
        yield Finding(
            ("spec",), "neither ingress nor egress: this policy decides nothing; add one", warning=True
        )
    names: dict[str, str] = {}
    for direction, peers in DIRECTIONS.items():
        for at, rule in mappings(spec, direction):
            path: Path_ = ("spec", direction, at)
            yield from name_findings(rule, path, names)
            yield from peer_findings(rule, (*path, peers))
            yield from port_findings(rule, path)
            yield from http_findings(rule, path)


def name_findings(rule: dict[str, Any], path: Path_, names: dict[str, str]) -> Iterator[Finding]:
    name = rule.get("name")
    if not isinstance(name, str):
        return
    here = f"{path[-2]}[{path[-1]}]"
    if name in names:
        yield Finding(
            (*path, "name"), f"{names[name]} is named {name!r} already: give each rule a name of its own"
        )
    names.setdefault(name, here)


def peer_findings(rule: dict[str, Any], path: Path_) -> Iterator[Finding]:
    if rule.get(str(path[-1])) == []:
        yield Finding(
            path,
            "an empty list matches nobody, so this rule does nothing: name peers, or remove it for everybody",
            warning=True,
            at_key=True,
        )
    for at, peer in mappings(rule, str(path[-1])):
        kinds = [kind for kind in KINDS if kind in peer]
        if len(kinds) != 1:
            what = " and ".join(kinds) or "none of them"
            yield Finding((*path, at), f"a peer is one of {', '.join(KINDS)}, this has {what}: make it one")
        yield from except_findings(peer, (*path, at))


def except_findings(peer: dict[str, Any], path: Path_) -> Iterator[Finding]:
    excluded = peer.get("except")
    if excluded is None:
        return
    if "cidr" not in peer:
        yield Finding((*path, "except"), "'except' takes networks out of 'cidr': add that", at_key=True)
    for at, each in enumerate(excluded if isinstance(excluded, list) else ()):
        if lies_outside(each, peer.get("cidr")):
            yield Finding((*path, "except", at), f"{each} is not inside {peer['cidr']}: it takes nothing out")


def lies_outside(inner: Any, outer: Any) -> bool:
    try:
        small, large = ip_network(str(inner), strict=False), ip_network(str(outer), strict=False)
    except ValueError:
        return False
    return small.version != large.version or not small.subnet_of(large)  # type: ignore[arg-type]


def port_findings(rule: dict[str, Any], path: Path_) -> Iterator[Finding]:
    if rule.get("ports") == []:
        yield Finding(
            (*path, "ports"),
            "an empty list matches no port: name ports, or remove 'ports' for every port",
            at_key=True,
        )
    for at, port in mappings(rule, "ports"):
        protocol = port.get("protocol", "tcp")
        where = (*path, "ports", at, "protocol")
        if protocol == "icmp" and "port" in port:
            yield Finding((*path, "ports", at, "port"), "icmp has no ports: remove 'port'", at_key=True)
        if "http" in rule and protocol in ("udp", "icmp"):
            yield Finding(where, f"'http' reads TCP, not {protocol}: use protocol tcp, or remove 'http'")


def http_findings(rule: dict[str, Any], path: Path_) -> Iterator[Finding]:
    if rule.get("http") == []:
        yield Finding(
            (*path, "http"),
            "an empty list matches no request: add a line, or remove 'http' to decide by layer 4",
            at_key=True,
        )
    for at, line in mappings(rule, "http"):
        for key in ("methods", "hosts"):
            if line.get(key) == []:
                where = (*path, "http", at, key)
                yield Finding(
                    where, f"an empty list matches no request: remove '{key}' for every one", at_key=True
                )
        headers = [name.lower() for name in inside(line, "headers")]
        for name in {name for name in headers if headers.count(name) > 1}:
            yield Finding(
                (*path, "http", at, "headers"), f"header {name!r} stands twice: case does not count; keep one"
            )


def inside(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def mappings(value: Any, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The mappings in the list at `key`, each with its place."""
    found = value.get(key) if isinstance(value, dict) else None
    for at, each in enumerate(found if isinstance(found, list) else ()):
        if isinstance(each, dict):
            yield at, each
