"""Questions and answers."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.core.explain import Explanation, Question, QuestionError, explain
from isolator.core.model import Direction, Endpoint, Outsider, Verdict
from isolator.core.pattern import PathPattern
from isolator.core.policy import (
    Action,
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
from tests.core.requests import Ask
from tests.core.test_compile import ADDRESSES, ASKS, ENDPOINTS, allowed, policies

HTTP = PortMatch(6, 80)
SHOP = Selected(labels_of({"app": "shop"}))
POLICIES = [
    Policy(
        "api-allow",
        select=labels_of({"role": "api"}),
        ingress=(
            Rule(
                "read", Action.ALLOW, (SHOP,), (HTTP,), (HttpRule(frozenset({"GET"}), PathPattern("/v1/**")),)
            ),
            Rule("no-admin", Action.DENY, None, (HTTP,), (HttpRule(path=PathPattern("/v1/admin/**")),)),
            Rule("office", Action.AUDIT, (Range(ip_network("192.0.2.0/24")),)),
        ),
        egress=(),
    ),
    Policy("spies", labels_of({"role": "spy"}), Mode.MONITOR, egress=()),
]


def ask(
    source: str, destination: str, port: int = 80, method: str | None = None, path: str = "/", **more: str
) -> Explanation:
    return explain(
        POLICIES, ENDPOINTS, ADDRESSES, Question(source, destination, port, "tcp", method, path, **more)
    )


ANSWERS = [
    (("web", "api", 80, "GET", "/v1/x"), True, "api ingress: allowed by api-allow/read"),
    (("web", "api", 80, "GET", "/v1/a/../admin"), False,
     "api ingress: denied: by api-allow/no-admin (HTTP_DENY)"),
    (("web", "api", 80, "POST", "/v1/x"), False,
     "api ingress: denied: no rule allows the request (HTTP_NO_RULE); nearest is api-allow/read"),
    (("web", "api", 80), True,
     "api ingress: depends on the request (rule api-allow/read); give a method and a path"),
    (("web", "api", 443), False,
     "api ingress: denied: no rule allows it (POLICY_DEFAULT); selected by api-allow"),
    (("192.0.2.7", "api", 22), True, "api ingress: allowed by api-allow/office, and recorded"),
    (("spy", "web", 80), True,
     "spy egress: allowed by monitor mode, would be denied: "
     "no rule allows it (POLICY_DEFAULT); selected by spies"),
    (("api", "world", 80), False,
     "api egress: denied: no rule allows it (POLICY_DEFAULT); selected by api-allow"),
    (("web", "world", 80), True, "web egress: allowed, no policy selects it in this direction"),
    (("world", "8.8.8.8", 80), True, "neither world nor 8.8.8.8 is an endpoint: no policy applies"),
    (("10.0.0.2", "10.0.0.1", 80, "GET", "/v1/x"), True, "api ingress: allowed by api-allow/read"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "passes", "summary"), ANSWERS)
def test_answers(asked: tuple[str, str, int], passes: bool, summary: str) -> None:
    answer = ask(*asked)
    assert (answer.allowed, answer.summary) == (passes, summary)


def test_every_rule_is_considered() -> None:
    answer = ask("web", "api", 80, "POST", "/v1/admin")
    assert [(str(each.ref), each.matched, each.decides, each.why) for each in answer.considered] == [
        ("api-allow/read", False, False, "the request matches no line of its http: line 1 differs in method"),
        ("api-allow/no-admin", True, True, "peer and port match, and line 1 of its http"),
        ("api-allow/office", False, False, "the source is none of its peers: cidr 192.0.2.0/24"),
    ]
    assert [half.direction for half in answer.halves] == [Direction.EGRESS, Direction.INGRESS]
    other = ask("web", "api", 443).considered
    assert other[0].why == "tcp/443 is none of its ports: tcp/80"


WRONG = [
    (Question("nobody", "api", 80), "no endpoint and no address: 'nobody'; there are: api, bare, spy, web"),
    (Question("web", "api", 0), "port 0 is none"),
    (Question("web", "api", 80, "sctp"), "unknown protocol"),
    (Question("web", "api", 80, "udp", "GET"), "HTTP goes over tcp"),
    (Question("web", "api", 80, "tcp", "GET", "/a%2fb"), "every such request is refused"),
]


@pytest.mark.parametrize(("question", "message"), WRONG)
def test_wrong_questions(question: Question, message: str) -> None:
    with pytest.raises(QuestionError) as raised:
        explain(POLICIES, ENDPOINTS, ADDRESSES, question)
    assert message in str(raised.value)


def test_request_parts() -> None:
    hosts = Policy("p", ingress=(Rule("r", http=(HttpRule(headers=(("x-tenant", "acme"),)),)),))
    question = Question("web", "api", 80, "tcp", "GET", "/é", "API.local:8080", {"X-Tenant": "acme"})
    assert explain([hosts], ENDPOINTS, ADDRESSES, question).allowed
    assert not explain([hosts], ENDPOINTS, ADDRESSES, Question("web", "api", 80, "tcp", "GET", "/")).allowed
    upgrade = Question(
        "web", "api", 80, "tcp", "GET", "/", None, {"x-tenant": "acme", "Upgrade": "websocket"}
    )
    assert "HTTP_UPGRADE" in explain([hosts], ENDPOINTS, ADDRESSES, upgrade).summary
    icmp = Question("web", "api", 0, "icmp")
    assert not explain([hosts], ENDPOINTS, ADDRESSES, icmp).allowed
    assert not explain(
        [hosts], ENDPOINTS, ADDRESSES, Question("web", "api", 1, "tcp", "CONNECT", "h:1")
    ).allowed


def test_an_endpoint_without_addresses_is_known_by_its_labels() -> None:
    endpoints = {1: Endpoint("a", {"app": "shop"}), 2: Endpoint("b", {"role": "api"})}
    assert explain(POLICIES, endpoints, {}, Question("a", "b", 80, "tcp", "GET", "/v1/x")).allowed


@settings(deadline=None)
@given(st.lists(policies, max_size=3), st.sampled_from([ask for ask in ASKS if not ask.upgrade]))
def test_agrees_with_every_rule_by_itself(made: list[Policy], request_: Ask) -> None:
    for port in (80, 443):
        question = Question("web", "spy", port, "tcp", request_.method, request_.path, "api.local")
        passes = True
        for direction, number, peer in (Direction.EGRESS, 2, "10.9.7.3"), (Direction.INGRESS, 3, "10.0.0.2"):
            enforcing = [
                policy for policy in made
                if policy.mode is Mode.PROTECT and policy.selects(ENDPOINTS[number].labels, direction)
            ]  # fmt: skip
            passes &= allowed(enforcing, direction, ip_address(peer), 6, port, request_)
        answer = explain(made, ENDPOINTS, ADDRESSES, question)
        assert answer.allowed is passes
        assert (answer.decision.verdict is Verdict.ALLOW) is passes


def test_outsiders_can_be_asked_about() -> None:
    host = Outsider("host", {"entity": "host"}, (ip_address("192.0.2.7"),))
    question = Question("host", "api", 22)
    assert explain(POLICIES, ENDPOINTS, ADDRESSES, question, [host]).halves[0].decision.rule is not None
    with pytest.raises(QuestionError, match="there are: api, bare, host, spy, web"):
        explain(POLICIES, ENDPOINTS, ADDRESSES, Question("nobody", "api", 22), [host])


@pytest.mark.parametrize("group", ["multicast", "224.0.0.251", "ff02::fb"])
def test_multicast_is_not_the_world(group: str) -> None:
    def allowed(peer: Peer) -> bool:
        policy = Policy("p", egress=(Rule("r", peers=(peer,)),))
        return explain([policy], ENDPOINTS, ADDRESSES, Question("spy", group, 5353, "udp")).allowed

    assert not allowed(World()) and not allowed(Selected(labels_of({})))
    assert allowed(Selected(labels_of({"entity": "multicast"})))
