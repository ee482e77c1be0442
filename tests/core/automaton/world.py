"""Profiles and heads for tests of the automaton, and what the slow path says of a head."""

from __future__ import annotations

from hypothesis import strategies as st

from isolator.core.automaton.build import build
from isolator.core.automaton.states import Automaton, run
from isolator.core.model import Decision, RuleRef, Verdict
from isolator.core.pattern import HostPattern, PathPattern
from isolator.core.policy import Action, Covering, HttpRule, Mode, Policy, Profile, Rule, weigh
from parsers.errors import DissectError
from parsers.http1 import Mode as Reading
from parsers.http1 import Request, RequestDissector

PATHS = (
    "/", "/**", "/a", "/a/", "/a/**", "/a/*", "/a/*/c", "/{id}", "/{id}/**", "/a/b", "/ab", "/ab/c/**", "/api/v1/**",
    "/api/v1/orders/{id}", "/api/v2/orders", "/api/**", "/.well-known/x", "/a.b/c", "/é", "/a/{id}/c/**",
    "regex:/a[0-9]+", "regex:/(a|ab)*/c.*", "regex:/api/v[12]/.*", "regex:/.*",
)  # fmt: skip
HOSTS = ("api.local", "*.local", "shop.api.local", "local")
HEADERS: tuple[tuple[str, str | None], ...] = (
    ("x-team", "red"), ("x-team", "blue"), ("x-team", None), ("x-trace", None), ("authorization", None),
    ("content-length", None), ("x-te", "r"), ("accept", "a b"), ("connection", "close"),
)  # fmt: skip
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PURGE")

lines = st.builds(
    HttpRule,
    methods=st.none() | st.frozensets(st.sampled_from(METHODS), min_size=1, max_size=3),
    path=st.none() | st.sampled_from(PATHS).map(PathPattern),
    hosts=st.lists(st.sampled_from(HOSTS).map(HostPattern), max_size=2, unique=True).map(tuple),
    headers=st.lists(st.sampled_from(HEADERS), max_size=2, unique_by=lambda each: each[0]).map(tuple),
)
plain_lines = st.builds(
    HttpRule,
    methods=st.none() | st.frozensets(st.sampled_from(METHODS[:3]), min_size=1, max_size=2),
    path=st.sampled_from(PATHS).map(PathPattern),
)


def rule(name: str, *http: HttpRule, action: Action = Action.ALLOW) -> Rule:
    return Rule(name, action, http=http or None)


def profile(*rules: Rule, mode: Mode = Mode.PROTECT) -> Profile:
    policy = Policy("shop", mode=mode, ingress=rules)
    return Profile(1, weigh([policy], [Covering(policy, each) for each in rules]))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    drawn = draw(st.lists(st.lists(plain_lines | lines, min_size=1, max_size=3), min_size=1, max_size=5))
    rules = [
        rule(f"r{at}", *http, action=draw(st.sampled_from([Action.ALLOW] * 5 + [Action.DENY, Action.AUDIT])))
        for at, http in enumerate(drawn)
    ]
    if draw(st.integers(0, 9)) == 0:
        rules.append(rule("plain"))
    mode = draw(st.sampled_from([Mode.PROTECT] * 4 + [Mode.MONITOR]))
    return profile(*rules, mode=mode)


_SEGMENTS = ("a", "b", "ab", "api", "v1", "v2", "orders", "c", "a1", "a17", "17", ".well-known", "a.b")
_ODD_SEGMENTS = ("..", ".", "", "%41", "x;y", "é")
_paths = st.lists(st.sampled_from(_SEGMENTS * 3 + _ODD_SEGMENTS), max_size=5).map(
    lambda parts: "/" + "/".join(parts)
)
_queries = st.sampled_from(["", "", "", "?", "?a=b", "?a=%20&c=/../x", "?a#b", "?a?b", '?"<>{}'])
_HOST_VALUES = [
    *["api.local"] * 4, "API.local", "api.local.", "shop.api.local:80", "local", "x.local", "x.local.:8080", ".local",
    "a..b", "", "10.9.0.2", "api.local:99999", "api.local:123456", "api.local:", "[::1]", "a b", "_x~", "local.",
]  # fmt: skip
_HOST_NAMES = ["Host: ", "host:", "HOST: ", "Host:  "]
_hosts = st.builds(str.__add__, st.sampled_from(_HOST_NAMES), st.sampled_from(_HOST_VALUES))
_FIELDS = [
    "X-Team: red", "x-team:red", "x-team:  red", "X-Team: red ", "X_Team: red", "X-Team: redd", "X-Team: re",
    "X-Team: blue", "X-Team:", "X-Team: ", "X-Trace: 1", "Authorization: Basic x", "Accept: */*", "Accept: a b",
    "accept: a b\t", "User-Agent: x\tz", "Connection: keep-alive", "Connection: close", "connection:KEEP-ALIVE",
    "Connection: upgrade", "Connection: close, x", "Upgrade: h2c", "Content-Length: 0", "Content-Length: 3",
    "Content_Length: 3", "Transfer-Encoding: chunked", "TE: trailers", "Expect: 100-continue", "Te-x: 1", "Tea: 1",
    "Contents: x", "Content-Type: x", "Cookie: a=b; c=d", "Host: api.local", "Hos: x", "Hosts: x",
    "Proxy-Connection: x", "X-Te: r", "X-Te: q", " folded: x", "a b: c", "no colon", ": empty", "a\x01: b",
    "a: \x01", "a: \x7f", "a: \xe9", "a:", "A-B_c.d!~: x", "(x): y", "Referer: http://x/" + "y" * 40,
    "X: " + "z" * 17, "X: " + "z" * 31 + "\t", "x-" + "n" * 30 + ": v",
]  # fmt: skip


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Mostly heads that could be allowed; some of them against the grammar, and some not whole."""
    method = draw(st.sampled_from(METHODS[:2] * 6 + METHODS + ("GE", "get", "GETS")))
    version = draw(st.sampled_from(["HTTP/1.1"] * 12 + ["HTTP/1.0", "HTTP/1.2", "http/1.1", "HTTP/2.0"]))
    target = draw(_paths) + draw(_queries)
    fields = draw(st.lists(st.sampled_from(_FIELDS), max_size=3))
    for _ in range(draw(st.sampled_from([1] * 12 + [0, 2]))):
        fields.insert(draw(st.integers(0, len(fields))), draw(_hosts))
    text = "\r\n".join([f"{method} {target} {version}", *fields, "", ""])
    data = text.encode("latin-1", "replace")
    match draw(st.integers(0, 11)):
        case 0:
            return data[: draw(st.integers(0, len(data)))]
        case 1:
            at = draw(st.integers(0, len(data)))
            return data[:at] + draw(st.binary(max_size=2)) + data[at + draw(st.integers(0, 1)) :]
        case 2:
            return data + draw(st.sampled_from([b"G", b"\r\n", data]))
    return data


def slow(decides: Profile, data: bytes) -> Decision | None:
    """What the slow path decides of these bytes, if they are one whole request without a body; None: they are not."""
    dissector = RequestDissector()
    try:
        piece = dissector.advance(data)
    except DissectError:
        return None
    if piece is None or piece.length != len(data) or dissector.mode != Reading.HEAD:
        return None
    assert isinstance(piece.message, Request)
    return decides.decide(piece.message)


def fast(automaton: Automaton, data: bytes) -> RuleRef | None:
    """The rule by which the automaton accepts."""
    rule = run(automaton, data).rule
    return automaton.rules[rule - 1] if rule else None


def automaton_of(*rules: Rule) -> Automaton:
    return build(profile(*rules))


def allowed(decision: Decision | None) -> bool:
    return (
        decision is not None
        and decision.verdict is Verdict.ALLOW
        and not decision.audit
        and not decision.trial
    )
