"""The policy document: its models, its JSON Schema, and the way from it to `isolator.core.policy`.

    kind: Policy
    metadata: {name: api-allow}
    spec:
      select: {app: bookstore, role: api}
      ingress:
        - name: read-books
          from: [{select: {app: bookstore}}, {cidr: 10.9.0.0/16, except: [10.9.7.0/24]}]
          ports: [{port: 80, protocol: tcp}]
          http: [{methods: [GET, HEAD], path: /api/v1/**}]

What several values must be together is checked in `findings.py`, so that one mistake does not hide another.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from isolator.control.fields import (
    Cidr,
    HeaderName,
    HeaderValue,
    HostText,
    Labels,
    Method,
    Name,
    PathText,
    Port,
    parse_network,
    path_pattern,
)
from isolator.control.validation import Strict
from isolator.core.model import Direction
from isolator.core.pattern import HostPattern
from isolator.core.policy import (
    ANY_PORT,
    PROTOCOLS,
    Action,
    DenyWith,
    Failure,
    HttpRule,
    Mode,
    Peer,
    Policy,
    PortMatch,
    Range,
    Rule,
    Selected,
    World,
    labels_of,
)

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"


class PeerModel(Strict):
    """Who is at the other end: exactly one of `select`, `cidr` and `world`."""

    select: Labels | None = Field(
        None,
        description="Endpoints with all of these labels; {} is every endpoint.",
        examples=[{"app": "bookstore"}],
    )
    cidr: Cidr | None = Field(None, description="Addresses in this network, endpoints or not.")
    except_: list[Cidr] | None = Field(
        None, alias="except", description="Networks inside `cidr` that are left out."
    )
    world: Literal[True] | None = Field(None, description="Every address that is no endpoint's.")

    def to_core(self) -> Peer:
        if self.select is not None:
            return Selected(labels_of(self.select))
        if self.cidr is not None:
            return Range(parse_network(self.cidr), tuple(map(parse_network, self.except_ or ())))
        return World()


class PortModel(Strict):
    """The serving side's port. Without `port`: every port of the protocol."""

    port: Port | None = Field(None, description="1 to 65535; icmp has none.")
    protocol: Literal["tcp", "udp", "icmp"] = Field("tcp", description="icmp means ICMPv6 too.")

    def to_core(self) -> PortMatch:
        return PortMatch(PROTOCOLS[self.protocol], self.port or 0)


class HttpModel(Strict):
    """One kind of request: all that is named must match; {} is every request (but CONNECT)."""

    methods: list[Method] | None = Field(None, description="Left out: every method but CONNECT.")
    path: PathText | None = Field(
        None,
        description="Segments, `*` or `{name}` for any one, `/**` at the end for any rest (or none), or "
        "`regex:` and an expression for the whole path. The query is not part of it.",
    )
    hosts: list[HostText] | None = Field(
        None, description="Host names without port; `*.example.com` is any below."
    )
    headers: dict[HeaderName, HeaderValue] | None = Field(
        None, description="Name and exact value; true: the header is there."
    )

    def to_core(self) -> HttpRule:
        return HttpRule(
            frozenset(self.methods) if self.methods is not None else None,
            path_pattern(self.path) if self.path is not None else None,
            tuple(map(HostPattern, self.hosts or ())),
            tuple(
                (name.lower(), None if value is True else value)
                for name, value in (self.headers or {}).items()
            ),
        )


class RuleModel(Strict):
    """Peers, ports and requests, and what becomes of them."""

    name: Name | None = Field(None, description="Stands in logs and answers; left out: ingress[0] and so on.")
    ports: list[PortModel] | None = Field(None, description="Left out: every port and protocol.")
    action: Literal["allow", "deny", "audit"] = Field(
        "allow", description="deny beats allow, over all policies; audit is an allow that is recorded."
    )
    http: list[HttpModel] | None = Field(
        None, description="Read the requests; left out: layer 4 decides alone."
    )

    def peers(self) -> list[PeerModel] | None:
        raise NotImplementedError

    def to_core(self, direction: Direction, at: int) -> Rule:
        peers = self.peers()
        return Rule(
            self.name or f"{direction.name.lower()}[{at}]",
            Action(self.action),
            None if peers is None else tuple(peer.to_core() for peer in peers),
            (ANY_PORT,) if self.ports is None else tuple(port.to_core() for port in self.ports),
            None if self.http is None else tuple(line.to_core() for line in self.http),
        )


class IngressModel(RuleModel):
    """A rule for what reaches the endpoint."""

    from_: list[PeerModel] | None = Field(None, alias="from", description="Left out: everybody; []: nobody.")

    def peers(self) -> list[PeerModel] | None:
        return self.from_


class EgressModel(RuleModel):
    """A rule for what leaves the endpoint."""

    to: list[PeerModel] | None = Field(None, description="Left out: everybody; []: nobody.")

    def peers(self) -> list[PeerModel] | None:
        return self.to


class SpecModel(Strict):
    """Which endpoints, and what they may do."""

    select: Labels = Field(
        description="Labels that an endpoint must have; {} is every endpoint.",
        examples=[{"app": "bookstore", "role": "api"}],
    )
    mode: Literal["protect", "monitor"] = Field(
        "protect", description="monitor allows, and reports what protect would deny."
    )
    failure: Literal["closed", "open"] = Field(
        "closed", description="What becomes of traffic that has to be read while the agent is down."
    )
    deny_with: Literal["drop", "reset"] = Field(
        "drop", description="How layer 4 denies: in silence, or with a RST or ICMP error."
    )
    ingress: list[IngressModel] | None = Field(
        None, description="There: what no rule allows is denied in this direction."
    )
    egress: list[EgressModel] | None = Field(
        None, description="There: what no rule allows is denied in this direction."
    )


class MetadataModel(Strict):
    name: Name = Field(description="Unique over all policies.")


class PolicyModel(Strict):
    """Which endpoints may be reached by whom, and whom they may reach."""

    kind: Literal["Policy"]
    metadata: MetadataModel
    spec: SpecModel

    def to_core(self) -> Policy:
        spec = self.spec
        return Policy(
            self.metadata.name,
            labels_of(spec.select),
            Mode(spec.mode),
            Failure(spec.failure),
            DenyWith(spec.deny_with),
            core_rules(spec.ingress, Direction.INGRESS),
            core_rules(spec.egress, Direction.EGRESS),
        )


def core_rules(
    rules: list[IngressModel] | list[EgressModel] | None, direction: Direction
) -> tuple[Rule, ...] | None:
    return None if rules is None else tuple(rule.to_core(direction, at) for at, rule in enumerate(rules))


def policy_schema() -> dict[str, Any]:
    """The JSON Schema of a policy document, for editors."""
    return {"$schema": SCHEMA_ID, "title": "Isolator policy", **without_null(PolicyModel.model_json_schema())}


def without_null(schema: Any) -> Any:
    """pydantic says of what may be left out that it may be null; in a file it may not."""
    if isinstance(schema, list):
        return [without_null(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: without_null(value) for key, value in schema.items() if not (key == "default" and value is None)
    }
    options = [each for each in kept.get("anyOf", ()) if each != {"type": "null"}]
    if len(options) == 1:
        del kept["anyOf"]
        return {**options[0], **kept}
    return {**kept, "anyOf": options} if options else kept
