"""Decisions on requests: tables of rules and requests."""

from __future__ import annotations

import pytest

from isolator.core.model import DropReason, RuleRef, Verdict
from isolator.core.pattern import HostPattern, PathPattern
from isolator.core.policy import (
    Action,
    Covering,
    DenyWith,
    Failure,
    HttpRule,
    Mode,
    Policy,
    PortMatch,
    Profile,
    Rule,
    weigh,
)
from tests.core.requests import Ask

GET = frozenset({"GET"})


def line(path: str | None = None, *methods: str, **headers: str | None) -> HttpRule:
    return HttpRule(
        frozenset(methods) or None,
        PathPattern(path) if path else None,
        headers=tuple((name.replace("_", "-"), value) for name, value in headers.items()),
    )


def rule(name: str, *lines: HttpRule, action: Action = Action.ALLOW) -> Rule:
    return Rule(name, action, ports=(PortMatch(6, 80),), http=lines or None)


def profile(*rules: Rule, mode: Mode = Mode.PROTECT, also: Policy | None = None) -> Profile:
    policies = [Policy("p", mode=mode, ingress=rules), *([also] if also else [])]
    covering = [Covering(policy, each) for policy in policies for each in policy.ingress or ()]
    return Profile(1, weigh(policies, covering))


READ = rule("read", line("/api/**", "GET", "HEAD"))
NO_ADMIN = rule("no-admin", line("/api/admin/**"), action=Action.DENY)
PLAIN = rule("plain")
WATCH = rule("watch", line("/api/watched"), action=Action.AUDIT)
TUNNEL = rule("tunnel", line(None, "CONNECT"))

NO_HOST = rule("no-host", HttpRule(hosts=(HostPattern("admin.local"),)), action=Action.DENY)
TENANT = rule("tenant", line(x_tenant="a"))
NOT_B = rule("not-b", line(x_tenant="b"), action=Action.DENY)

DECISIONS = [
    ((READ,), Ask(path="/api/x"), "ALLOW", "NONE", "read"),
    ((READ,), Ask("HEAD", "/api"), "ALLOW", "NONE", "read"),
    ((READ,), Ask("POST", "/api/x"), "DROP", "HTTP_NO_RULE", "read"),
    ((READ,), Ask(path="/x"), "DROP", "HTTP_NO_RULE", "read"),
    ((READ, NO_ADMIN), Ask(path="/api/admin"), "DROP", "HTTP_DENY", "no-admin"),
    ((READ, NO_ADMIN), Ask(path="/api/x"), "ALLOW", "NONE", "read"),
    ((PLAIN, NO_ADMIN), Ask(path="/api/admin;v=1/x"), "DROP", "HTTP_DENY", "no-admin"),
    ((PLAIN, NO_ADMIN), Ask(path="/api/admin%3Bv/x"), "DROP", "HTTP_DENY", "no-admin"),
    ((PLAIN, NO_ADMIN), Ask(path="/api/..%3B/x"), "DROP", "HTTP_DENY", "no-admin"),
    ((rule("one", line("/o/{id}")),), Ask(path="/o/;x"), "DROP", "HTTP_NO_RULE", "one"),
    ((rule("one", line("/o/{id}")),), Ask(path="/o/7;x"), "ALLOW", "NONE", "one"),
    ((NO_ADMIN,), Ask(path="/api/x"), "DROP", "HTTP_NO_RULE", "no-admin"),
    ((PLAIN, NO_ADMIN), Ask(path="/any"), "ALLOW", "NONE", "plain"),
    ((PLAIN, NO_ADMIN), Ask(path="/api/admin/x"), "DROP", "HTTP_DENY", "no-admin"),
    ((PLAIN, READ), Ask("POST", "/any"), "ALLOW", "NONE", "plain"),
    ((READ,), Ask(path="/api/x", upgrade="websocket"), "DROP", "HTTP_UPGRADE", "read"),
    ((PLAIN, NO_ADMIN), Ask(upgrade="h2c"), "DROP", "HTTP_UPGRADE", "no-admin"),
    ((PLAIN, READ), Ask(upgrade="h2c"), "ALLOW", "NONE", "plain"),
    ((rule("all", line()),), Ask("CONNECT", ""), "DROP", "HTTP_NO_RULE", "all"),
    ((TUNNEL,), Ask("CONNECT", ""), "ALLOW", "NONE", "tunnel"),
    ((PLAIN, rule("d", line(), action=Action.DENY)), Ask("CONNECT", ""), "DROP", "HTTP_DENY", "d"),
    ((PLAIN, NO_ADMIN), Ask("CONNECT", ""), "DROP", "HTTP_NO_RULE", "no-admin"),
    ((READ,), Ask(path="/api/x", readings=("/api/y/../x",)), "ALLOW", "NONE", "read"),
    ((READ,), Ask(path="/api/x", readings=("/x/../api/x",)), "DROP", "HTTP_NO_RULE", "read"),
    ((PLAIN, NO_ADMIN), Ask(path="/api/x", readings=("/api/admin/../x",)), "DROP", "HTTP_DENY", "no-admin"),
    ((PLAIN, NO_HOST), Ask(host=None), "DROP", "HTTP_DENY", "no-host"),
    ((PLAIN, NO_HOST), Ask(host="admin.local"), "DROP", "HTTP_DENY", "no-host"),
    ((PLAIN, NO_HOST), Ask(host="api.local"), "ALLOW", "NONE", "plain"),
    ((TENANT,), Ask(headers=(("x-tenant", "a"),)), "ALLOW", "NONE", "tenant"),
    ((TENANT,), Ask(headers=(("x_tenant", "a"),)), "DROP", "HTTP_NO_RULE", "tenant"),
    ((TENANT,), Ask(headers=(("x-tenant", "a"), ("x_tenant", "b"))), "DROP", "HTTP_NO_RULE", "tenant"),
    ((PLAIN, NOT_B), Ask(headers=(("x_tenant", "b"),)), "DROP", "HTTP_DENY", "not-b"),
]


@pytest.mark.parametrize(("rules", "request_", "verdict", "reason", "named"), DECISIONS)
def test_decide(rules: tuple[Rule, ...], request_: Ask, verdict: str, reason: str, named: str) -> None:
    decision = profile(*rules).decide(request_)
    assert decision.verdict is Verdict[verdict]
    assert decision.reason is DropReason[reason]
    assert decision.rule == RuleRef("p", named)
    assert not decision.trial and not decision.audit


def test_audit_is_told_before_allow() -> None:
    assert profile(READ, WATCH).decide(Ask(path="/api/watched")).rule == RuleRef("p", "watch")
    assert profile(READ, WATCH).decide(Ask(path="/api/watched")).audit
    assert not profile(READ, WATCH).decide(Ask(path="/api/x")).audit


DEFAULTS = [
    ((READ,), "DROP", "NOT_HTTP"),
    ((PLAIN, READ), "ALLOW", "NONE"),
    ((PLAIN, NO_ADMIN), "DROP", "NOT_HTTP"),  # what cannot be read could be what is denied
]


@pytest.mark.parametrize(("rules", "verdict", "reason"), DEFAULTS)
def test_what_is_not_http(rules: tuple[Rule, ...], verdict: str, reason: str) -> None:
    default = profile(*rules).default
    assert (default.verdict, default.reason) == (Verdict[verdict], DropReason[reason])
    assert profile(*rules).refuse(DropReason.HTTP_AMBIGUOUS).verdict is Verdict[verdict]


def test_monitor_allows_and_says_what_protect_would_do() -> None:
    watched = profile(READ, NO_ADMIN, mode=Mode.MONITOR)
    assert watched.monitor and watched.fail_open
    denied = watched.decide(Ask(path="/api/admin"))
    assert (denied.verdict, denied.reason, denied.rule, denied.trial) == (
        Verdict.ALLOW, DropReason.HTTP_DENY, RuleRef("p", "no-admin"), True,
    )  # fmt: skip
    assert watched.decide(Ask(path="/api/x")).trial is False
    assert watched.default.trial and watched.default.verdict is Verdict.ALLOW


def test_protect_decides_and_monitor_is_tried_beside_it() -> None:
    trial = Policy("t", mode=Mode.MONITOR, ingress=(NO_ADMIN, rule("more", line("/more"))))
    both = profile(READ, also=trial)
    assert not both.monitor
    assert both.decide(Ask(path="/api/admin")).trial
    assert both.decide(Ask(path="/api/admin")).rule == RuleRef("t", "no-admin")
    assert both.decide(Ask(path="/more")).verdict is Verdict.DROP  # a trial allows nothing
    assert both.decide(Ask(path="/api/x")) == profile(READ).decide(Ask(path="/api/x"))


HEADERS = [
    ({"x-tenant": "acme"}, [("x-tenant", "acme")], True, True),
    ({"x-tenant": "acme"}, [("x-tenant", "evil")], False, False),
    ({"x-tenant": "acme"}, [], False, False),
    ({"x-tenant": "acme"}, [("x-tenant", "acme"), ("x-tenant", "evil")], False, True),
    ({"x-tenant": None}, [("x-tenant", "")], True, True),
    ({"x-tenant": None}, [("y", "1")], False, False),
]


@pytest.mark.parametrize(("wanted", "having", "allow", "deny"), HEADERS)
def test_headers(
    wanted: dict[str, str | None], having: list[tuple[str, str]], allow: bool, deny: bool
) -> None:
    http = HttpRule(headers=tuple(wanted.items()))
    assert http.matches(Ask(headers=tuple(having))) is allow
    assert http.matches(Ask(headers=tuple(having)), widest=True) is deny


def test_hosts_need_a_host() -> None:
    http = HttpRule(hosts=(HostPattern("api.local"), HostPattern("*.example.com")))
    assert http.matches(Ask(host="api.local")) and http.matches(Ask(host="a.example.com"))
    assert not http.matches(Ask(host=None)) and not http.matches(Ask(host="example.com"))


def test_mismatch_names_the_part() -> None:
    http = HttpRule(GET, PathPattern("/a"), (HostPattern("h"),), (("x", "1"),))
    asks = [Ask("POST"), Ask(path="/b"), Ask(path="/a"), Ask(path="/a", host="h")]
    assert [http.mismatch(ask) for ask in asks] == ["method", "path", "host", "header x"]
    assert http.mismatch(Ask(path="/a", host="h", headers=(("x", "1"),))) is None


def outcome_of(*policies: Policy) -> tuple[str, str]:
    covering = [Covering(policy, each) for policy in policies for each in policy.ingress or ()]
    flow = weigh(policies, covering).flow
    return flow.verdict.name, flow.reason.name


def test_layer_4() -> None:
    deny = Rule("d", Action.DENY)
    assert outcome_of() == ("ALLOW", "NONE")
    assert outcome_of(Policy("p", ingress=())) == ("DROP", "POLICY_DEFAULT")
    assert outcome_of(Policy("p", ingress=(Rule("a"),))) == ("ALLOW", "NONE")
    assert outcome_of(Policy("p", ingress=(Rule("a"), READ, deny))) == ("DROP", "POLICY_DENY")
    assert outcome_of(Policy("p", ingress=(Rule("a"),)), Policy("q", ingress=(deny,))) == (
        "DROP",
        "POLICY_DENY",
    )
    assert outcome_of(Policy("p", deny_with=DenyWith.RESET, ingress=(deny,))) == ("RESET", "POLICY_DENY")
    assert outcome_of(Policy("p", deny_with=DenyWith.RESET, ingress=())) == ("RESET", "POLICY_DEFAULT")
    assert outcome_of(Policy("p", mode=Mode.MONITOR, ingress=(deny,))) == ("ALLOW", "POLICY_DENY")


@pytest.mark.parametrize(
    ("failures", "fail_open"),
    [("open", True), ("closed", False), ("open closed", False), ("open open", True)],
)
def test_one_closed_policy_closes(failures: str, fail_open: bool) -> None:
    policies = [
        Policy(f"p{at}", failure=Failure(each), ingress=(READ,)) for at, each in enumerate(failures.split())
    ]
    covering = [Covering(policy, READ) for policy in policies]
    assert weigh(policies, covering).fail_open is fail_open


def test_http_is_tcp() -> None:
    assert Rule("r", http=()).ports == (PortMatch(6),)
    with pytest.raises(ValueError, match="TCP"):
        Rule("r", ports=(PortMatch(17, 53),), http=())
