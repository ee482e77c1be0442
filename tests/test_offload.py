"""Counts of requests: what stays through generations, and what they are told by."""

from __future__ import annotations

from isolator.control.agent_view import Requests
from isolator.core.automaton.build import Automata
from isolator.core.model import Direction, Endpoint, RuleRef
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule, Policy, PortMatch, Rule, labels_of
from isolator.core.standing import Standing
from isolator.core.tally import Misfit
from isolator.datapath.automata import Accepted
from isolator.offload import NO_ROOM, Generation, Offload

API = {1: Endpoint("api", {"app": "api"})}
READ = RuleRef("shop", "read")


def standing(path: str = "/a/**") -> Standing:
    line = HttpRule(frozenset({"GET"}), PathPattern(path))
    policy = Policy("shop", ingress=(Rule("read", ports=(PortMatch(6, 80),), http=(line,)),))
    return Standing([policy], API, {})


def put(offload: Offload, generation: int, path: str = "/a/**") -> Generation:
    return put_standing(offload, generation, standing(path))


def put_standing(offload: Offload, generation: int, made: Standing) -> Generation:
    automata, whole = Automata().compile(made.profiles), made.whole
    prepared = offload.prepared(generation, made.profiles, automata, whole.entries, whole.tables)
    offload.put_in_force(prepared)
    return prepared


def change(offload: Offload, made: Standing, there: dict[int, Endpoint]) -> Generation:
    change = made.change(there, {})
    assert change is not None
    new = offload.in_force.new(made.profiles)
    prepared = offload.changed(new, Automata().add(new), change.entries, change.tables)
    offload.put_in_force(prepared)
    return prepared


def test_a_profile_that_stays_keeps_its_counts() -> None:
    offload = Offload()
    (profile,) = put(offload, 1).profiles.values()
    profile.tally.python += 2
    profile.tally.why[Misfit.BODY] += 1
    offload.add([Accepted(1, profile.number, READ, 5)])
    (again,) = put(offload, 2).profiles.values()
    assert again.tally is profile.tally
    status = offload.status(API, "auto", ())
    (told,) = status.profiles
    assert (told.requests, told.why) == (Requests(5, 2), {"a body": 1})
    assert (told.rules, told.endpoints, told.ports) == (["shop/read"], ["api"], ["ingress tcp/80"])
    assert told.states == status.states > 10 and told.left_out == []


def test_one_that_goes_stays_in_the_total() -> None:
    offload = Offload()
    (profile,) = put(offload, 1).profiles.values()
    profile.tally.python += 2
    profile.tally.why[Misfit.DENIED] += 2
    for generation in range(2, 7):
        put(offload, generation, f"/{generation}")
        offload.add([Accepted(generation - 1, profile.number, READ, 5)])  # late
        assert offload.total == Requests(5 * (generation - 1), 2)
    offload.add([Accepted(1, profile.number, READ, 1)])
    assert offload.total == Requests(26, 2) and offload.why == {Misfit.DENIED: 2}


def test_what_has_no_room_and_what_is_not_wanted() -> None:
    offload = Offload()
    (number,) = put(offload, 1).profiles
    (told,) = offload.status(API, "auto", [number]).profiles
    assert (told.states, told.left_out) == (0, [NO_ROOM])
    made = standing()
    offload.put_in_force(offload.prepared(2, made.profiles, {}, made.whole.entries, made.whole.tables))
    (told,) = offload.status(API, "python", ()).profiles
    assert (told.states, told.left_out) == (0, [])


def test_changes_go_on_with_what_they_change() -> None:
    offload = Offload()
    lines = {name: HttpRule(frozenset({"GET"}), PathPattern(f"/{name}")) for name in ("a", "b")}
    made = Standing(
        [
            Policy(
                name, labels_of({"app": name}), ingress=(Rule("r", ports=(PortMatch(6, 80),), http=(line,)),)
            )
            for name, line in lines.items()
        ],
        {1: Endpoint("first", {"app": "a"})},
        {},
    )
    (profile,) = put_standing(offload, 1, made).profiles.values()
    for at in range(2, 9):
        there = {1: Endpoint("first", {"app": "a"}), at: Endpoint(f"e{at}", {"app": "b" if at % 2 else "a"})}
        changed = change(offload, made, there)
        assert changed.profiles[profile.number] is profile
    offload.add([Accepted(1, profile.number, RuleRef("a", "r"), 5)])
    first, second = offload.status(there, "auto", ()).profiles
    assert (first.endpoints, first.requests) == (["e8", "first"], Requests(5, 0))
    assert (second.endpoints, second.rules) == ([], ["b/r"]) and second.states
    assert {use[1] for use in offload.in_force.uses[profile.number]} == {Direction.INGRESS}


def test_before_there_is_any_policy() -> None:
    assert Offload().status(API, "auto", ()).profiles == []
