"""Counts of requests: what stays through generations, and what they are told by."""

from __future__ import annotations

from isolator.control.agent_view import Requests
from isolator.core.automaton.build import Automata
from isolator.core.compile import Compiled, compile_policies
from isolator.core.model import Endpoint, RuleRef
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule, Policy, PortMatch, Rule
from isolator.core.tally import Misfit
from isolator.datapath.automata import Accepted
from isolator.offload import NO_ROOM, Generation, Offload

API = {1: Endpoint("api", {"app": "api"})}
READ = RuleRef("shop", "read")


def compiled(generation: int, path: str = "/a/**") -> Compiled:
    line = HttpRule(frozenset({"GET"}), PathPattern(path))
    policy = Policy("shop", ingress=(Rule("read", ports=(PortMatch(6, 80),), http=(line,)),))
    return compile_policies([policy], API, {}, generation)


def put(offload: Offload, generation: int, path: str = "/a/**") -> Generation:
    made, automata = compiled(generation, path), Automata()
    automata.compile(made.profiles)
    prepared = offload.prepared(made, automata.by_profile)
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
    offload.put_in_force(offload.prepared(compiled(2), {}))
    (told,) = offload.status(API, "python", ()).profiles
    assert (told.states, told.left_out) == (0, [])


def test_before_there_is_any_policy() -> None:
    assert Offload().status(API, "auto", ()).profiles == []
