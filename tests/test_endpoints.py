"""The endpoints' life: what comes to them, in which order, and what is there then."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address, ip_interface

import pytest

from isolator.control.agent_view import EndpointState, UnknownNameError
from isolator.control.runtime import Change, RuntimeAwayError
from isolator.core.model import Outsider
from isolator.datapath.netns import NetnsMissingError, SpliceError
from isolator.datapath.splice import (
    EndpointGoneError,
    InterfaceMissingError,
    NotProtectableError,
    Recovered,
    SpliceRequest,
)
from isolator.endpoints import RETRY_MAX, TRANSITIONS, Input, mistakes
from tests.endpoint_world import (
    APPEARED,
    ENFORCED,
    EXEMPT,
    FAILED,
    PENDING,
    RELABELLED,
    REPLACED,
    RESTORED,
    VANISHED,
    WAITING,
    FakeRuntime,
    World,
    address,
    endpoint,
    splice,
)  # fmt: skip


def test_every_state_has_an_answer_to_what_a_runtime_tells() -> None:
    for state in EndpointState:
        for told in (Input.APPEARED, Input.REPLACED, Input.VANISHED):
            known = (state, told) in TRANSITIONS
            assert known == ((state, told) != (ENFORCED, Input.APPEARED))
    assert all(after is not ENFORCED for _, after in TRANSITIONS.values())  # only a splice leads there


# -- the start ----------------------------------------------------------------------------------------------


def test_a_start() -> None:
    world = World("a", "b", "c", there=("a", "b"))
    world.play()
    assert world.states == {"a": ENFORCED, "b": ENFORCED, "c": WAITING}
    assert world.policy.written == [["a", "b"]]  # once, and before the first splice
    assert [done for done in world.kernel.done if "protect" in done] == ["protect a", "protect b"]
    world.sound()


def test_what_is_adopted_keeps_its_number_and_what_is_no_longer_configured_is_put_back() -> None:
    world = World("a", "b", there=("a", "b"))
    world.kernel.found = Recovered(adopted=[splice("a"), splice("z", 200)])
    world.kernel.ports = {"a": 7, "z": 1}
    world.play()
    assert world.kernel.done[:2] == ["adopt a", "release z"]
    assert world.kernel.ports == {"a": 7, "b": 1} and world.kernel.tidied == {7}
    world.sound()


def test_a_number_that_a_port_still_carries_is_nobody_elses() -> None:
    world = World("b", there=("b",))
    world.kernel.found = Recovered(adopted=[splice("z")])
    world.kernel.ports = {"z": 1}
    world.kernel.refuses["release z"] = SpliceError("z: not restored")
    world.play()
    assert world.kernel.ports == {"z": 1, "b": 2}


def test_one_number_on_two_splices_is_told_apart() -> None:
    world = World("a", "b", there=("a", "b"))
    world.kernel.found = Recovered(adopted=[splice("a"), splice("b", 200)])
    world.kernel.ports = {"a": 1, "b": 1}
    world.play()
    assert sorted(world.kernel.ports.values()) == [1, 2]
    world.sound()


def test_a_splice_of_another_interface_is_not_the_endpoints() -> None:
    world = World("a", there=("a",))
    world.kernel.found = Recovered(adopted=[splice("a", interface="eth1")])
    world.kernel.ports = {"a": 7}
    world.play()
    assert world.kernel.done == ["release a", "look a", "protect a"]
    world.sound()


def test_one_that_cannot_be_adopted_does_not_keep_the_others_from_it() -> None:
    world = World("a", "b", there=("a", "b"))
    world.kernel.found = Recovered(adopted=[splice("a"), splice("b", 200)])
    world.kernel.ports = {"a": 1, "b": 2}
    world.kernel.refuses["adopt a"] = SpliceError("a: no XDP")
    world.play()
    assert world.states == {"a": FAILED, "b": ENFORCED} and world.kernel.tidied == {2}


def test_a_policy_that_is_too_large_with_one_of_them_leaves_the_others_protected() -> None:
    world = World("a", "b", "c", there=("a", "b", "c"))
    world.policy.most = 2
    world.play()
    assert world.states == {"a": ENFORCED, "b": ENFORCED, "c": FAILED}
    world.sound()


def test_a_start_without_the_runtime_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("a", there=("a",))
    world.kernel.found = Recovered(adopted=[splice("a")])

    def away() -> None:
        raise RuntimeAwayError("no engine: start it")

    monkeypatch.setattr(world.runtime, "endpoints", away)
    with pytest.raises(RuntimeAwayError):
        world.play()
    assert world.kernel.done == [] and world.kernel.tidied is None and world.policy.written == []


# -- what meets ----------------------------------------------------------------------------------------------


def test_two_that_come_at_once_have_two_numbers() -> None:
    world = World("a", "b", "c")
    world.kernel.there = {name: (address(name),) for name in "abc"}
    world.play(world.at_once(*(world.change(APPEARED, name) for name in "abc"), world.refresh()))
    assert sorted(world.kernel.ports.values()) == [1, 2, 3]
    world.sound()


def test_a_retry_meets_a_container_that_comes() -> None:
    world = World("a", "b", there=("a",))
    del world.kernel.there["a"]
    world.play(
        world.do(lambda: world.kernel.there.update(a=(address("a"),), b=(address("b"),))),
        world.at_once(
            world.refresh(60), world.change(APPEARED, "b"), world.change(REPLACED, "a"), world.refresh(60)
        ),
    )
    assert world.kernel.done.count("protect b") == 1
    world.sound()


def test_an_endpoint_that_appears_while_it_is_tried_again_is_spliced_once() -> None:
    world = World("a")
    world.kernel.there["a"] = (address("a"),)
    world.play(world.at_once(world.change(APPEARED, "a"), world.refresh(60), world.change(APPEARED, "a")))
    assert world.kernel.done == ["look a", "protect a"]
    world.sound()


def test_a_loss_that_is_seen_from_two_sides_is_one() -> None:
    world = World("a", "b", there=("a", "b"))
    world.play(
        world.do(lambda: world.kernel.there.pop("a")),
        world.at_once(world.refresh(), world.change(VANISHED, "a"), world.refresh()),
    )
    assert world.states == {"a": WAITING, "b": ENFORCED}
    assert world.kernel.done.count("lose a") == 1 and world.forgotten == [1]
    world.sound()


def test_a_restore_meets_a_container_that_vanishes() -> None:
    world = World("a", there=("a",))
    world.play(
        world.at_once(lambda: world.endpoints.restore(["a"]), world.change(VANISHED, "a"), world.refresh())
    )
    assert world.states == {"a": WAITING} and world.kernel.done.count("lose a") == 0
    world.sound()


def test_a_dropped_endpoint_meets_its_return() -> None:
    world = World("a", there=("a",))
    lock = world.endpoints._lock

    async def reload() -> None:
        async with lock:
            await world.endpoints.configure([])

    world.play(world.at_once(reload, world.change(VANISHED, "a"), world.refresh()))
    assert world.states == {} and world.kernel.ports == {}
    world.sound()


# -- what comes and goes -------------------------------------------------------------------------------------


def test_a_number_comes_again_as_late_as_it_can() -> None:
    world = World("a", there=("a",))
    world.play(world.change(REPLACED, "a"), world.change(REPLACED, "a"))
    assert world.kernel.ports == {"a": 3} and world.forgotten == [1, 2]
    world.sound()


def test_a_new_container_that_was_seen_before_it_was_told_is_spliced_once() -> None:
    world = World("a", there=("a",))
    told = Change(REPLACED, endpoint("a", role="api"))
    world.play(
        world.do(lambda: world.kernel.cookies.update(a=1)),
        world.refresh(),
        lambda: world.endpoints.change(told),
    )
    assert world.kernel.done == ["look a", "protect a", "lose a", "look a", "protect a"]
    assert world.roster.endpoints[2].labels == {"role": "api"}
    world.sound()


def test_an_interface_that_is_made_anew_is_spliced_at_the_next_look() -> None:
    world = World("a", there=("a",))
    world.play(
        world.do(lambda: world.kernel.there.pop("a")),
        world.refresh(1),
        world.do(lambda: world.states == {"a": FAILED} or pytest.fail("not told")),
        *(world.refresh(1) for _ in range(50)),
        world.do(lambda: world.kernel.there.update(a=(address("a"),))),
        world.refresh(1),
    )
    assert world.states == {"a": ENFORCED}
    world.sound()


def test_what_cannot_be_spliced_is_tried_ever_more_rarely_and_costs_no_policy() -> None:
    world = World("a", "b", there=("a", "b"))
    world.kernel.refuses["look b"] = NotProtectableError("b: not protectable: macvlan")
    world.play(*(world.refresh(1) for _ in range(120)))
    looks = world.kernel.done.count("look b")
    assert looks == 1 + 4 + len(range(30, 120, int(RETRY_MAX)))  # at once, after 2, 4, 8, 16, then each 30 s
    assert world.policy.written == [["a"]] and world.states == {"a": ENFORCED, "b": FAILED}


def test_a_new_policy_is_a_reason_to_try_again() -> None:
    world = World("a", "b", there=("a", "b"))
    world.policy.most = 1
    world.play(
        *(world.refresh(31) for _ in range(5)),
        world.do(lambda: setattr(world.policy, "most", 2)),
        lambda: world.endpoints.configure(["a", "b"]),
        world.refresh(1),
    )
    assert world.states == {"a": ENFORCED, "b": ENFORCED}
    world.sound()


def test_another_namespace_is_tried_at_once_and_a_namespace_that_goes_is_waited_for() -> None:
    world = World("a", there=("a",))
    world.kernel.refuses["protect a"] = SpliceError("a: not spliced")
    world.play(
        *(world.refresh(31) for _ in range(5)),
        world.do(world.kernel.refuses.clear),
        world.refresh(1),
        world.do(lambda: world.states == {"a": FAILED} or pytest.fail("too early")),
        world.change(REPLACED, "a"),
        world.do(lambda: world.states == {"a": ENFORCED} or pytest.fail("not tried")),
        world.do(lambda: world.kernel.there.pop("a")),
        world.refresh(1),
        world.change(VANISHED, "a"),
        world.refresh(60),
    )
    assert world.states == {"a": WAITING} and world.policy.in_force == {}
    world.sound()


def test_addresses_and_labels_are_followed() -> None:
    world = World("a", "b", there=("a", "b"))
    other = (address("a"), address("a", 5))
    world.play(
        world.do(lambda: world.kernel.there.update(a=other)),
        world.refresh(),
        world.change(RELABELLED, "b", role="api"),
        world.change(RELABELLED, "unknown"),
        world.refresh(),
    )
    assert world.policy.in_force[1][1] == other and world.policy.in_force[2][0].labels == {"role": "api"}
    assert world.roster.owners["10.0.0.5"].name == "a" and len(world.policy.written) == 3
    world.sound()


def test_what_is_no_longer_configured_gets_its_network_back_and_is_dropped() -> None:
    world = World("a", "b", "c", there=("a", "b"))
    world.kernel.refuses["look b"] = NotProtectableError("b: not protectable")
    world.play(
        lambda: world.endpoints.configure([]),
        world.change(VANISHED, "a"),
        world.change(VANISHED, "b"),
        world.refresh(60),
    )
    assert world.states == {} and world.kernel.ports == {}
    world.sound()


def test_one_that_nobody_configured_comes_and_goes() -> None:
    """As containers do that are chosen by their labels."""
    world = World()
    world.kernel.there["a"] = (address("a"),)
    world.play(
        world.change(APPEARED, "a"),
        world.do(world.sound),
        world.do(lambda: world.states == {"a": ENFORCED} or pytest.fail("not spliced")),
        world.change(VANISHED, "a"),
    )
    assert world.states == {}


def test_one_that_cannot_be_put_away_keeps_neither_itself_nor_others_where_they_are() -> None:
    world = World("a", "b", there=("a", "b"))
    world.kernel.refuses["lose a"] = OSError("stuck")
    world.play(world.change(REPLACED, "a"), world.refresh(60))
    assert world.states == {"a": ENFORCED, "b": ENFORCED}

    world = World("a", "b", there=("a", "b"))
    world.kernel.refuses["lose a"] = OSError("stuck")
    world.play(lambda: world.endpoints.configure([]))
    assert world.states == {}


# -- commands, and the end -----------------------------------------------------------------------------------


def test_a_restored_endpoint_stays_so_until_its_container_starts_anew() -> None:
    world = World("a", "b", "c", "d", there=("a", "b", "d"))
    world.kernel.refuses["look d"] = NotProtectableError("d: not protectable")
    results: list[object] = []

    async def restore() -> None:
        results.extend((each.name, each.error) for each in await world.endpoints.restore(None))

    world.play(restore, world.refresh(60), world.change(REPLACED, "b"))
    assert results == [("a", None), ("b", None), ("d", None)]
    assert world.states == {"a": RESTORED, "b": ENFORCED, "c": WAITING, "d": RESTORED}
    world.sound()


def test_a_restore_that_fails_changes_nothing_and_one_of_a_gone_container_is_its_loss() -> None:
    world = World("a", "b", there=("a", "b"))
    world.kernel.refuses["release a"] = SpliceError("a: not restored; run restore again")
    world.kernel.refuses["release b"] = EndpointGoneError("b: gone")
    results: list[object] = []

    async def restore() -> None:
        results.extend((each.name, each.error) for each in await world.endpoints.restore(["a", "b", "a"]))
        with pytest.raises(UnknownNameError, match="no endpoint 'x'; there are: a, b"):
            await world.endpoints.restore(["a", "x"])

    world.play(restore)
    assert results == [("a", "a: not restored; run restore again"), ("b", "b: gone")]
    assert world.states == {"a": ENFORCED, "b": PENDING} and world.kernel.ports == {"a": 1}


def test_after_a_stop_nothing_is_begun() -> None:
    world = World("a", "b", there=("a",))
    world.kernel.there["b"] = (address("b"),)
    world.play(
        world.do(world.endpoints.stop),
        world.change(APPEARED, "b"),
        world.refresh(60),
        lambda: world.endpoints.restore(None),
    )
    assert world.kernel.ports == {} and world.kernel.done == ["look a", "protect a", "release a"]


def test_the_follower_outlives_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isolator.endpoints.FOLLOW_AGAIN", 0.001)
    world = World("a", "b")
    world.kernel.there = {"a": (address("a"),), "b": (address("b"),)}
    world.kernel.refuses["look a"] = RuntimeError("a bug")
    world.runtime.told = [
        Change(APPEARED, endpoint("a")), OSError("the runtime's socket"), Change(APPEARED, endpoint("b")),
    ]  # fmt: skip

    async def follow() -> None:
        following = asyncio.create_task(world.endpoints.follow())
        while world.states != {"a": FAILED, "b": ENFORCED}:
            await asyncio.sleep(0.005)
        following.cancel()

    world.play(lambda: asyncio.wait_for(follow(), 5))
    world.sound()


# -- before a first start ------------------------------------------------------------------------------------


def test_mistakes_are_told_all_at_once_one_line_each() -> None:
    errors = {
        "b": InterfaceMissingError("b: eth7 in /run/netns/b is missing; there are: lo, eth0"),
        "c": NotProtectableError("c: br0 in /run/netns/c: not protectable: bridge, not veth"),
        "d": NetnsMissingError(
            "network namespace /run/netns/d: none at /run/netns/d; is the container running?"
        ),
    }

    def check(request: SpliceRequest) -> None:
        if request.name in errors:
            raise errors[request.name]

    lines = mistakes(FakeRuntime("a", "b", "c", "d", there=("a", "b", "c")), check)
    assert [line.split(":")[0] for line in lines] == ["b", "c", "d"]
    assert lines[0].startswith("b: eth7 in /run/netns/b is missing; there are: lo, eth0; correct")
    assert lines[2].endswith("is the container running? Start it, or correct `netns`")


# -- who is left alone, and who else there is ----------------------------------------------------------------


def test_who_is_exempt_is_not_spliced_and_passes_the_gate() -> None:
    world = World("a", "b", there=("a", "b"))
    world.policy.exempt = {"": "no policy selects it"}
    world.play(world.change(RELABELLED, "a", role="api"), world.change(RELABELLED, "a"))
    assert world.states == {"a": EXEMPT, "b": EXEMPT} and world.kernel.ports == {}
    assert [done for done in world.kernel.done if "b" in done] == []
    assert world.kernel.done[-1] == "release a"
    assert sorted(str(place) for place in world.gate.admitted) == [
        "('/run/netns/a', 'eth0')", "('/run/netns/b', 'eth0')",
    ]  # fmt: skip
    assert {each.detail for each in world.endpoints} == {"no policy selects it"}


def test_a_new_config_exempts_and_claims() -> None:
    world = World("a", there=("a",))
    seen: list[EndpointState] = []

    async def configure() -> None:
        await world.endpoints.configure(["a"])
        seen.append(world.states["a"])

    world.play(
        world.do(lambda: world.policy.exempt.update({"": "excluded"})), configure,
        world.do(world.policy.exempt.clear), configure,
    )  # fmt: skip
    assert seen == [EXEMPT, ENFORCED]
    world.sound()


def test_a_runtimes_own_reason_counts_without_any_policy() -> None:
    world = World("a", there=("a",))
    alone = replace(endpoint("a"), exempt="it has the label isolator.exclude")

    async def tell() -> None:
        await world.endpoints.change(Change(RELABELLED, alone))

    world.play(tell)
    (only,) = world.endpoints
    assert (only.state, only.detail) == (EXEMPT, "it has the label isolator.exclude")


def test_one_that_cannot_be_released_stays_protected() -> None:
    world = World("a", there=("a",))
    world.kernel.refuses["release a"] = SpliceError("a: not restored")
    world.play(
        world.do(lambda: world.policy.exempt.update({"": "excluded"})), world.change(RELABELLED, "a", x="y")
    )
    assert world.states == {"a": ENFORCED}
    world.sound()


def test_an_exempt_endpoint_that_goes_and_comes_back() -> None:
    world = World("a", there=("a",))
    world.policy.exempt = {"": "excluded"}
    world.play(world.change(VANISHED, "a"), world.change(APPEARED, "a"), world.change(REPLACED, "a"))
    assert world.states == {"a": EXEMPT} and world.kernel.done == []


def test_rules_can_name_who_is_exempt_the_host_and_its_gateways() -> None:
    world = World("a", there=("a",))
    world.policy.exempt = {"": "excluded"}
    world.gate.host = [ip_interface(each) for each in ("10.1.0.1/32", "10.2.0.1/31", "127.0.0.1/8")]
    world.runtime.known = (
        Outsider("gateway of back", {"entity": "gateway", "network": "back"}, (ip_address("10.2.0.1"),)),
        Outsider("gateway of far", {"entity": "gateway", "network": "far"}, (ip_address("10.3.0.1"),)),
    )
    alone = replace(endpoint("a", app="web"), addresses=(ip_address("10.9.0.1"),))

    async def tell() -> None:
        await world.endpoints.change(Change(RELABELLED, alone))

    world.play(tell)
    assert {
        each.name: (each.labels, [str(a) for a in each.addresses]) for each in world.roster.outsiders
    } == {
        "a": ({"app": "web"}, ["10.9.0.1"]),
        "gateway of back": ({"entity": "host", "network": "back"}, ["10.2.0.1"]),
        "gateway of far": ({"entity": "gateway", "network": "far"}, ["10.3.0.1"]),
        "host": ({"entity": "host"}, ["10.1.0.1", "255.255.255.255"]),
    }
    assert world.roster.owners["10.9.0.1"].name == "a"


def test_the_gate_is_shut_before_anything_else_and_opened_to_each_as_it_is_spliced() -> None:
    world = World("a", "b", there=("a", "b"))
    world.kernel.refuses["protect b"] = SpliceError("b: busy")
    world.play()
    assert world.gate.calls == ["shut", "admit ('', 101)"]
    assert world.gate.admitted == [("", 101)]  # b is closed
