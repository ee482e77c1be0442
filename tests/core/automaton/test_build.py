"""What the automaton accepts, the slow path allows, with the same rule and to the same byte."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolator.core.automaton.build import build
from isolator.core.automaton.states import HEAD_MAX, Automaton
from isolator.core.pattern import HostPattern, PathPattern
from isolator.core.policy import Action, HttpRule, Mode, Profile
from tests.core.automaton.world import allowed, automaton_of, fast, heads, profile, profiles, rule, slow

HOST = "Host: api.local"


def get(path: str, *fields: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", *(fields or (HOST,)), "", ""]).encode("latin-1")


def line(path: str | None = None, *methods: str, **headers: str | None) -> HttpRule:
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return HttpRule(frozenset(methods) or None, PathPattern(path) if path else None, headers=named)


def named(automaton: Automaton, data: bytes) -> str | None:
    found = fast(automaton, data)
    return None if found is None else found.rule


# -- never wider than the slow path ------------------------------------------------------------------------


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(profiles(), st.lists(heads(), min_size=5, max_size=15), st.integers(60, 2000), st.integers(0, 40))
def test_what_it_accepts_the_slow_path_allows(
    decides: Profile, tried: list[bytes], states: int, tables: int
) -> None:
    """Also where it has no room for all of the profile."""
    for automaton in (build(decides), build(decides, states, tables)):
        for head in tried:
            accepted = fast(automaton, head)
            decision = slow(decides, head)
            assert accepted is None or (
                decision is not None and allowed(decision) and decision.rule == accepted
            )


@settings(max_examples=200, deadline=None)
@given(profiles(), st.binary(max_size=80))
def test_any_bytes(decides: Profile, data: bytes) -> None:
    accepted, decision = fast(build(decides), data), slow(decides, data)
    assert accepted is None or (decision is not None and decision.rule == accepted)


# -- and wide enough ---------------------------------------------------------------------------------------

READ = rule("read", line("/api/v1/**", "GET", "HEAD"), line("/books", "GET"))
PATHS = {
    "/api/v1": "read", "/api/v1/": "read", "/api/v1/x/y.z": "read", "/api/v1/x?a=/../b": "read", "/api/v10": None,
    "/api/v1x": None, "/api": None, "/books": "read", "/books/": None, "/books?": "read", "/": None, "/api/v1//x": None,
    "/api/v1/../x": None, "/api/v1/%41": None, "/api/v1/.x": None, "/api/v1/a;b": None,
}  # fmt: skip


@pytest.mark.parametrize(("path", "expected"), PATHS.items())
def test_paths(path: str, expected: str | None) -> None:
    assert named(automaton_of(READ), get(path)) == expected


TREE = (
    rule("star", line("/shops/*/orders")),
    rule("one", line("/shops/paris/orders")),
    rule("rest", line("/shops/paris/**")),
    rule("slash", line("/x/")),
    rule("root", line("/")),
)
TREE_PATHS = {
    "/shops/rome/orders": "star", "/shops/paris/orders": "star", "/shops/paris/menu": "rest",
    "/shops/pari/orders": "star", "/shops/parisx/orders": "star", "/shops/rome/menu": None, "/shops/paris": "rest",
    "/shops//orders": None, "/x/": "slash", "/x": None, "/": "root",
}  # fmt: skip


@pytest.mark.parametrize(("path", "expected"), TREE_PATHS.items())
def test_the_first_rule_is_named(path: str, expected: str | None) -> None:
    assert named(automaton_of(*TREE), get(path)) == expected


def test_deny_is_pythons() -> None:
    automaton = automaton_of(READ, rule("secret", line("/api/v1/secret/**"), action=Action.DENY))
    assert named(automaton, get("/api/v1/secre")) == "read"
    assert named(automaton, get("/api/v1/secret")) is None
    assert named(automaton, get("/api/v1/secrets")) == "read"
    assert named(automaton, get("/api/v1/secret/x")) is None


def test_audit_and_denials_by_header_are_pythons() -> None:
    automaton = automaton_of(
        READ,
        rule("watch", line("/books/**"), action=Action.AUDIT),
        rule("debug", line(x_debug=None), action=Action.DENY),
    )
    assert named(automaton, get("/books")) is None
    assert named(automaton, get("/api/v1/x")) == "read"
    assert named(automaton, get("/api/v1/x", HOST, "X-Debug: 1")) is None


def test_methods() -> None:
    automaton = automaton_of(READ, rule("any", line("/any")), rule("purge", line("/purge", "PURGE")))
    assert named(automaton, get("/api/v1", method="HEAD")) == "read"
    assert named(automaton, get("/books", method="HEAD")) is None
    assert named(automaton, get("/any", method="DELETE")) == "any"
    assert named(automaton, get("/purge", method="PURGE")) is None


FIELDS = {
    ("Host: api.local", "User-Agent: curl/8", "Accept: */*"): True,
    ("Host: api.local:8080",): True,
    ("host:API.LOCAL.",): True,
    ("Host: api.local", "Connection: keep-alive"): True,
    ("Host: api.local", "Connection: close"): True,
    ("Host: api.local", "Connection: Upgrade"): False,
    ("Host: api.local", "Content-Length: 0"): False,
    ("Host: api.local", "Content-Type: x"): True,
    ("Host: api.local", "Transfer-Encoding: chunked"): False,
    ("Host: api.local", "Te: trailers"): False,
    ("Host: api.local", "Expect: 100-continue"): False,
    ("Host: api.local", "Upgrade: h2c"): False,
    ("Host: api.local", "Host: api.local"): False,
    ("Host: api.local", "Cookie: a=b\tc", "X-Empty:", "X-Latin: \xe9"): True,
    ("Accept: */*",): False,
    ("Host: [::1]",): False,
    ("Host: ",): False,
    ("Host: api.local", *["X: y"] * 70): True,
    ("Host: api.local", *["X: y"] * 100): False,
}


@pytest.mark.parametrize(("fields", "expected"), FIELDS.items())
def test_header_lines(fields: tuple[str, ...], expected: bool) -> None:
    assert (named(automaton_of(READ), get("/books", *fields)) == "read") is expected


TENANTS = (
    rule("a", line("/t", x_tenant="a")),
    rule("local", HttpRule(path=PathPattern("/t"), hosts=(HostPattern("*.local"), HostPattern("shop")))),
    rule("any", line("/t", x_tenant=None)),
)
CONDITIONS = {
    ("Host: x.org", "X-Tenant: a"): "a",
    ("Host: x.org", "X-Tenant: ab"): "any",
    ("Host: x.org", "X-Tenant: "): "any",
    ("Host: x.org",): None,
    ("Host: api.local",): "local",
    ("Host: api.local.:80",): "local",
    ("Host: shop",): "local",
    ("Host: local", "X-Tenant: b"): "any",
    ("Host: api.local", "X-Tenant: a"): "a",
    ("Host: x.org", "X-Tenant: a", "X-Tenant: a"): None,
    ("Host: x.org", "X_Tenant: a"): None,
}


@pytest.mark.parametrize(("fields", "expected"), CONDITIONS.items())
def test_conditions(fields: tuple[str, ...], expected: str | None) -> None:
    assert named(automaton_of(*TENANTS), get("/t", *fields)) == expected


def test_regular_expressions() -> None:
    automaton = automaton_of(
        rule("numbers", line("regex:/v[0-9]+/items(/[a-z]+)?")),
        rule("glob", line("/v1/**")),
        rule("all", line(None, "HEAD")),
    )
    assert named(automaton, get("/v12/items")) == "numbers"
    assert named(automaton, get("/v12/items/ab")) == "numbers"
    assert named(automaton, get("/v12/items/AB")) is None
    assert named(automaton, get("/v1/items/AB?x")) == "glob"
    assert named(automaton, get("/whatever/it.is", method="HEAD")) == "all"


# -- what does not fit -------------------------------------------------------------------------------------


def test_a_rule_that_cannot_be_followed_hides_only_what_comes_behind_it() -> None:
    automaton = automaton_of(
        rule("first", line("/a")),
        rule("odd", line("/b/**", content_length="0")),
        rule("last", line("/b/c"), line("/d")),
    )
    assert (named(automaton, get("/a")), named(automaton, get("/b/c")), named(automaton, get("/d"))) == (
        "first",
        None,
        "last",
    )
    assert automaton.left_out == ("shop/odd: a header that Python has to look at",)


def test_many_expressions_leave_the_rest_in_the_kernel() -> None:
    many = rule("many", *(line(f"regex:/r{number}/.*x.*") for number in range(70)))
    automaton = automaton_of(rule("plain", line("/a")), many, rule("behind", line("/b")))
    assert (named(automaton, get("/a")), named(automaton, get("/b"))) == ("plain", None)
    assert automaton.left_out == ("regular expressions that take too many states together",)


def test_a_pattern_too_long_for_an_expression_leaves_the_rest_in_the_kernel() -> None:
    automaton = automaton_of(
        rule("plain", line("/a")), rule("expression", line("regex:/b.*")), rule("long", line("/" + "c" * 300))
    )
    assert (named(automaton, get("/a")), named(automaton, get("/b"))) == ("plain", None)
    assert automaton.left_out == ("regular expressions that take too many states together",)


def test_without_room_some_rules_are_pythons() -> None:
    wide = profile(*(rule(f"r{number}", line(f"/rules/{number}/**")) for number in range(1000)))
    automaton = build(wide, states=500)
    found = sum(named(automaton, get(f"/rules/{number}/x")) == f"r{number}" for number in range(1000))
    assert 0 < found < 1000 and len(automaton.states) <= 500 and automaton.left_out


def test_ten_thousand_rules_take_as_many_states() -> None:
    automaton = build(profile(*(rule(f"r{number}", line(f"/rules/{number}/**")) for number in range(10_000))))
    assert named(automaton, get("/rules/9999/x")) == "r9999"
    assert (len(automaton.states) < 11_000, automaton.left_out) == (True, ())


def test_a_longer_head_is_pythons() -> None:
    fits = get("/books", HOST, "X: " + "y" * (HEAD_MAX - 4 - len(get("/books", HOST, "X: "))))
    assert named(automaton_of(READ), fits) == "read"
    assert named(automaton_of(READ), get("/books", HOST, "X: " + "y" * HEAD_MAX)) is None


def test_monitor_alone_is_followed() -> None:
    tried = build(profile(READ, mode=Mode.MONITOR))
    assert (named(tried, get("/books")), named(tried, get("/other"))) == ("read", None)
