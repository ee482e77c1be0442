"""The endpoints and what becomes of them: who is spliced, who is waited for, who is tried again.

                   appeared   replaced         vanished         interface gone   exempted           restore
    WAITING        → PENDING  → PENDING        → WAITING        ·                ·                  ·
    PENDING ⟲ due  → PENDING  → PENDING        → WAITING        ·                → EXEMPT           → RESTORED
    ENFORCED       ·          lose, → PENDING  lose, → WAITING  lose, → PENDING  release, → EXEMPT  release, → RESTORED
    FAILED ⟲ due   → PENDING  → PENDING        → WAITING        ·                → EXEMPT           → RESTORED
    EXEMPT         → PENDING  → PENDING        → WAITING        ·                ·                  ·
    RESTORED       → PENDING  → PENDING        → WAITING        ·                ·                  ·

    exempted: excluded, or selected by no policy where only those are protected. Claimed is the contrary, and leads
    from EXEMPT to PENDING. Both are looked at before anything is spliced, and with each change of policy or labels.

    due, from PENDING at once, from FAILED after a while:
        look    can it be spliced, and what are its addresses?        no  → FAILED, no policy is touched
        number  a number that no port carries, and its policy         no  → FAILED, the number is given back
        splice  the ports come up with policy in force                no  → FAILED, likewise
                                                                      yes → ENFORCED

An endpoint that has vanished and that the runtime does not call missing is no longer configured: it is dropped.
The runtime alone says which namespaces there are; that an interface went, or came back, is seen by looking.

One lock stands around each change, whoever brings it: the runtime, the clock, a command, a reload. Behind it the
state is looked at again, since it may have changed while the lock was waited for. What blocks runs in the worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Protocol

import structlog

from isolator.admission import Place
from isolator.control.agent_view import EndpointState, RestoreResult, UnknownNameError
from isolator.control.runtime import Change, ChangeKind, Runtime, RuntimeEndpoint
from isolator.core.identities import Address, Interface
from isolator.core.model import Endpoint, Outsider
from isolator.datapath.errors import DatapathError
from isolator.datapath.netns import NetnsMissingError, SpliceError
from isolator.datapath.splice import (
    EndpointGoneError,
    InterfaceMissingError,
    NotProtectableError,
    Recovered,
    Splice,
    SpliceRequest,
)
from isolator.roster import Roster, with_host
from isolator.worker import Worker

RETRY_FIRST, RETRY_MAX = 2.0, 30.0  # s between attempts on one endpoint, doubled from the first to the last
FOLLOW_AGAIN = 1.0  # s until a runtime that failed is asked again
NUMBER_MAX = 32767  # a frame's context has 15 bits for it

log = structlog.get_logger()


class Kernel(Protocol):
    """What this needs of the datapath (isolator.datapath.node.Node, which says what each does); all of it blocks."""

    def spliced(self) -> dict[tuple[str, str], str]: ...
    def recover(self) -> Recovered: ...
    def number_of(self, splice: Splice) -> int | None: ...
    def numbers(self) -> set[int]: ...
    def adopt(self, splice: Splice, number: int) -> None: ...
    def tidy(self, numbers: Collection[int]) -> None: ...
    def look(self, request: SpliceRequest) -> tuple[Address, ...]: ...
    def protect(self, request: SpliceRequest, number: int) -> Splice: ...
    def release(self, splice: Splice, number: int) -> None: ...
    def lose(self, splice: Splice, number: int) -> None: ...
    def addresses(self, splices: Iterable[Splice]) -> dict[str, tuple[Address, ...] | None]: ...
    def set_addresses(self, number: int, addresses: Iterable[Address]) -> None: ...


class Policy(Protocol):
    """What this needs of isolator.enforcement.Enforcement."""

    def exempts(self, labels: Mapping[str, str], inherited: Collection[str]) -> str | None: ...

    async def enforce(self) -> None: ...
    async def catch_up(self) -> None: ...
    async def retire(self) -> None: ...


class Gate(Protocol):
    """What this needs of isolator.admission.Admission."""

    async def shut(self) -> None: ...
    async def open(self) -> None: ...
    async def host_addresses(self) -> list[Interface]: ...
    async def admit(self, place: Place) -> None: ...
    async def expel(self, place: Place) -> None: ...
    async def settle(self, places: Iterable[Place]) -> None: ...


class Input(Enum):
    """What can happen to an endpoint."""

    APPEARED = auto()
    REPLACED = auto()
    VANISHED = auto()
    INTERFACE_GONE = auto()
    EXEMPTED = auto()
    CLAIMED = auto()
    RESTORE = auto()


class Effect(Enum):
    """What is done about it before the state changes."""

    NOTHING = auto()
    LOSE = auto()  # reap what is left of the splice, forget the number
    RELEASE = auto()  # put the container's network back; where that fails, the state stays


WAITING, PENDING, ENFORCED = EndpointState.WAITING, EndpointState.PENDING, EndpointState.ENFORCED
FAILED, EXEMPT, RESTORED = EndpointState.FAILED, EndpointState.EXEMPT, EndpointState.RESTORED
UNSPLICED = (WAITING, PENDING, FAILED, EXEMPT, RESTORED)

DETAILS = {
    WAITING: "its network namespace is not there",
    PENDING: "about to be spliced",
    ENFORCED: None,
    EXEMPT: "left alone",
    RESTORED: "restored: not protected until its container or the agent starts anew",
}

TRANSITIONS: dict[tuple[EndpointState, Input], tuple[Effect, EndpointState]] = {
    **{(state, Input.APPEARED): (Effect.NOTHING, PENDING) for state in UNSPLICED},
    **{(state, Input.REPLACED): (Effect.NOTHING, PENDING) for state in UNSPLICED},
    **{(state, Input.VANISHED): (Effect.NOTHING, WAITING) for state in UNSPLICED},
    **{(state, Input.EXEMPTED): (Effect.NOTHING, EXEMPT) for state in (PENDING, FAILED)},
    **{(state, Input.RESTORE): (Effect.NOTHING, RESTORED) for state in (PENDING, FAILED)},
    (EXEMPT, Input.CLAIMED): (Effect.NOTHING, PENDING),
    (ENFORCED, Input.REPLACED): (Effect.LOSE, PENDING),
    (ENFORCED, Input.VANISHED): (Effect.LOSE, WAITING),
    (ENFORCED, Input.INTERFACE_GONE): (Effect.LOSE, PENDING),
    (ENFORCED, Input.EXEMPTED): (Effect.RELEASE, EXEMPT),
    (ENFORCED, Input.RESTORE): (Effect.RELEASE, RESTORED),
}
"""What is not in it changes nothing."""


@dataclass(slots=True)
class Managed:
    """An endpoint. `number` 0: none. `splice` is there in ENFORCED alone."""

    configured: RuntimeEndpoint
    state: EndpointState = WAITING
    detail: str | None = DETAILS[WAITING]
    number: int = 0
    splice: Splice | None = None
    addresses: tuple[Address, ...] = ()
    retry_at: float = 0.0
    delay: float = RETRY_FIRST

    @property
    def name(self) -> str:
        return self.configured.name

    @property
    def request(self) -> SpliceRequest:
        c = self.configured
        return SpliceRequest(c.name, str(c.netns), c.interface)

    @property
    def place(self) -> Place | None:
        """What leads to its host end, if traffic may pass there. (In a splice: the network port.)"""
        if self.splice is not None:
            return "", self.splice.network_port
        return (
            (str(self.configured.netns), self.configured.interface)
            if self.state in (EXEMPT, RESTORED)
            else None
        )

    def is_due(self, now: float) -> bool:
        return self.state is PENDING or (self.state is FAILED and now >= self.retry_at)

    def is_at(self, splice: Splice) -> bool:
        """The splice is of the interface that is configured."""
        return (splice.netns, splice.interface) == (str(self.configured.netns), self.configured.interface)


class Endpoints:
    """All endpoints by name. `lock`: the agent's lock of changes; a reload holds it too, and calls `configure`.

    `forget_flows(number)`: what Python knows of an endpoint's connections goes with the endpoint. `hand_over(number)`:
    what it holds of them goes to their ends, before the endpoint gets its network back.
    """

    def __init__(
        self,
        runtime: Runtime,
        kernel: Kernel,
        policy: Policy,
        roster: Roster,
        gate: Gate,
        work: Worker,
        lock: asyncio.Lock,
        forget_flows: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
        hand_over: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._runtime, self._kernel, self._policy = runtime, kernel, policy
        self._roster, self._gate, self._work, self._lock = roster, gate, work, lock
        self._forget_flows, self._clock, self._hand_over = forget_flows, clock, hand_over
        self._managed: dict[str, Managed] = {}
        self._last_number = 0
        self._stopping = False

    def __iter__(self) -> Iterator[Managed]:
        return iter(list(self._managed.values()))

    def __len__(self) -> int:
        return len(self._managed)

    def stop(self) -> None:
        """Nothing new is begun from here on; `restore` still works."""
        self._stopping = True

    # -- the first look -------------------------------------------------------------------------------------

    async def take_up(self) -> None:
        """Adopts what an earlier agent left, puts policy in force, splices what is missing.

        Raises RuntimeAwayError, and what `Policy.enforce` raises: an agent that does not know its endpoints, or has
        no policy, does not start, and the kernel goes on as it was.
        """
        async with self._lock:
            await self._gate.shut()
            self._runtime.recall(await self._work(self._kernel.spliced))
            for endpoint in await self._work(self._runtime.endpoints):
                self._managed[endpoint.name] = Managed(endpoint, PENDING, DETAILS[PENDING])
            for endpoint in self._runtime.missing():
                self._managed[endpoint.name] = Managed(endpoint)
                log.warning("not there, and waited for", endpoint=endpoint.name, netns=str(endpoint.netns))
            await self._recover()
            await self._meet_outsiders()
            await self._policy.enforce()
            await self._review(self)
            await self._settle()

    async def _recover(self) -> None:
        found = await self._work(self._kernel.recover)
        for error in found.failed:
            log.error("a splice of an earlier run needs attention", error=str(error))
        mine = [s for s in found.adopted if s.name in self._managed and self._managed[s.name].is_at(s)]
        for splice in mine:
            await self._adopt(self._managed[splice.name], splice)
        for splice in found.adopted:
            if splice not in mine:
                await self._put_back(splice)
        await self._work(self._kernel.tidy, set(self._roster.endpoints))

    async def _adopt(self, managed: Managed, splice: Splice) -> None:
        """Under the number that its ports carry, so that its connections go on."""
        number = self._kernel.number_of(splice)
        if number is None or number in self._roster.endpoints:
            number = self._free_number()
        try:
            await self._work(self._kernel.adopt, splice, number)
        except Exception as error:
            # the others are adopted none the less; this one stays closed, and is tried again
            self._fail(managed, error)
        else:
            self._enforced(managed, number, splice)

    async def _put_back(self, splice: Splice) -> None:
        log.warning("no longer configured, put back", endpoint=splice.name, netns=splice.netns)
        number = self._kernel.number_of(splice)
        try:
            await self._gate.expel(("", splice.network_port))  # who it is, nobody knows
            await self._work(
                self._kernel.release, splice, 0 if number in self._roster.endpoints else number or 0
            )
        except Exception as error:  # it is cut off then, and nobody else's business
            log.error("not put back", endpoint=splice.name, error=str(error))

    # -- inputs ---------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Takes what the runtime tells, forever."""
        while True:
            try:
                async for change in self._runtime.changes():
                    await self._told(change)
            except Exception as error:  # a runtime that stumbles must not leave new containers unprotected
                log.error("the runtime failed, asked again", runtime=self._runtime.name, error=repr(error))
            await asyncio.sleep(FOLLOW_AGAIN)

    async def _told(self, change: Change) -> None:
        try:
            await self.change(change)
        except Exception as error:  # the changes that follow count all the more
            log.error("a change failed", endpoint=change.endpoint.name, kind=change.kind, error=repr(error))

    async def change(self, change: Change) -> None:
        async with self._lock:
            name, kind = change.endpoint.name, change.kind
            if self._stopping or (
                name not in self._managed and kind not in (ChangeKind.APPEARED, ChangeKind.REPLACED)
            ):
                return
            managed = self._managed.setdefault(name, Managed(change.endpoint))
            moved = kind is not ChangeKind.REPLACED or not await self._stands_in(managed, change.endpoint)
            if kind is not ChangeKind.RELABELLED and moved:
                await self._feed(managed, Input[kind.name])
            managed.configured = change.endpoint
            if managed.number:
                self._number(managed)
            await self._review([managed])
            if kind is ChangeKind.VANISHED and name not in {each.name for each in self._runtime.missing()}:
                del self._managed[name]
            await self._settle()

    async def _stands_in(self, managed: Managed, endpoint: RuntimeEndpoint) -> bool:
        """Whether the splice is that of the new place already: `refresh` was there before the runtime told it."""
        splice = managed.splice
        if splice is None or not replace(managed, configured=endpoint).is_at(splice):
            return False
        found = await self._work(self._kernel.addresses, [splice])
        return found.get(managed.name) is not None

    async def refresh(self) -> None:
        """Once a second: addresses come and go inside a container, interfaces too; what is due is tried again."""
        async with self._lock:
            if self._stopping:
                return
            splices = [each.splice for each in self._managed.values() if each.splice is not None]
            found = await self._work(self._kernel.addresses, splices)
            for name, addresses in found.items():
                managed = self._managed[name]
                if addresses is None:
                    await self._feed(managed, Input.INTERFACE_GONE)
                elif addresses != managed.addresses:
                    await self._readdress(managed, addresses)
            await self._meet_outsiders()
            await self._settle()

    async def _readdress(self, managed: Managed, addresses: tuple[Address, ...]) -> None:
        try:
            await self._work(self._kernel.set_addresses, managed.number, addresses)
        except Exception as error:  # the other endpoints' addresses are followed none the less
            log.error("its addresses are not brought up to date", endpoint=managed.name, error=str(error))
            return
        managed.addresses = addresses
        self._number(managed)

    async def configure(self, configured: Sequence[Any]) -> None:
        """A new config and policy; the caller holds the lock. Who is no longer in it gets the network back, and is
        dropped; what failed under the old ones is tried again soon."""
        for name in self._runtime.configure(configured):
            managed = self._managed.get(name)
            if managed is None:
                continue
            await self._feed(managed, Input.VANISHED)
            del self._managed[name]
        for managed in self._managed.values():
            managed.retry_at, managed.delay = self._clock(), RETRY_FIRST
        await self._review(self)
        await self._settle()

    async def restore(self, names: Sequence[str] | None) -> list[RestoreResult]:
        """Takes splices back (None: all). Raises UnknownNameError before anything is done."""
        async with self._lock:
            if unknown := [name for name in names or () if name not in self._managed]:
                there = ", ".join(self._managed) or "none"
                raise UnknownNameError(f"no endpoint {unknown[0]!r}; there are: {there}")
            wanted = list(self._managed) if names is None else list(dict.fromkeys(names))
            results = [await self._restore(self._managed[name]) for name in wanted]
            await self._policy.catch_up()
            await self._admit_all()
            return [result for result in results if result is not None]

    async def _restore(self, managed: Managed) -> RestoreResult | None:
        if (managed.state, Input.RESTORE) not in TRANSITIONS:
            return None
        try:
            await self._feed(managed, Input.RESTORE)
        except EndpointGoneError as error:
            await self._feed(managed, Input.INTERFACE_GONE)
            return RestoreResult(managed.name, str(error))
        except (DatapathError, OSError) as error:
            return RestoreResult(managed.name, str(error))
        return RestoreResult(managed.name)

    # -- outsiders, exemptions, the gate ---------------------------------------------------------------------

    async def _meet_outsiders(self) -> None:
        unspliced = (
            Outsider(each.name, each.configured.labels, each.configured.addresses or each.addresses)
            for each in self
            if not each.number
        )
        outsiders = (*unspliced, *self._runtime.outsiders())
        self._roster.put_outsiders(with_host(outsiders, await self._gate.host_addresses()))

    async def _review(self, several: Iterable[Managed]) -> None:
        """Who is left alone now, and who no longer is."""
        for managed in several:
            known = managed.configured
            reason = known.exempt or self._policy.exempts(known.labels, known.inherited)
            try:
                await self._feed(managed, Input.EXEMPTED if reason else Input.CLAIMED)
            except EndpointGoneError:
                await self._feed(managed, Input.INTERFACE_GONE)
            except (DatapathError, OSError) as error:
                log.error(
                    "it is to be left alone, and stays protected", endpoint=managed.name, error=str(error)
                )
            if managed.state is EXEMPT:
                managed.detail = reason
        await self._meet_outsiders()

    async def _admit_all(self) -> None:
        await self._gate.settle(each.place for each in self if each.place is not None)
        self._tell_opened()

    def _tell_opened(self) -> None:
        self._runtime.opened([each.configured for each in self if each.state in (ENFORCED, EXEMPT, RESTORED)])

    # -- transitions ----------------------------------------------------------------------------------------

    async def _feed(self, managed: Managed, happened: Input) -> None:
        effect, state = TRANSITIONS.get((managed.state, happened), (Effect.NOTHING, None))
        if managed.splice is not None and effect is not Effect.NOTHING:
            work = self._kernel.release if effect is Effect.RELEASE else self._kernel.lose
            try:
                if effect is Effect.RELEASE:
                    self._hand_over(managed.number)
                await self._work(work, managed.splice, managed.number)
            except Exception as error:  # what is lost is lost: the endpoint must not stay where it was
                if effect is Effect.RELEASE:
                    raise
                log.error("not all of it is put away", endpoint=managed.name, error=repr(error))
            self._unnumber(managed)
        if state is not None:
            log.info("endpoint", endpoint=managed.name, state=state.value)
            managed.state, managed.detail, managed.delay = state, DETAILS[state], RETRY_FIRST
            if state not in (EXEMPT, RESTORED):
                managed.addresses = ()  # no transition leads to ENFORCED

    async def _settle(self) -> None:
        """Splices what is due. Afterwards the policy in force is the roster's, and the gate is open to those whom it
        should be open to."""
        now = self._clock()
        if maybe := [managed for managed in self._managed.values() if managed.is_due(now)]:
            await self._review(maybe)
        due = [managed for managed in self._managed.values() if managed.is_due(now)]
        for managed in await self._numbered([each for each in due if await self._looked(each)]):
            if self._stopping:
                return
            await self._splice(managed)
        await self._policy.catch_up()
        await self._admit_all()
        await self._policy.retire()

    async def _looked(self, managed: Managed) -> bool:
        try:
            managed.addresses = await self._work(self._kernel.look, managed.request)
        except Exception as error:  # whatever it is, it is this endpoint's, and told of it
            self._fail(managed, error)
            return False
        return True

    async def _numbered(self, group: list[Managed]) -> list[Managed]:
        """Policy first, then the splice: closed or decided from the first packet on. Policy is written for all at
        once, and where that is refused, one by one: which of them is too much is found so."""
        try:
            for managed in group:
                managed.number = self._free_number()
                self._number(managed)
            if group:
                await self._policy.enforce()
        except Exception as error:  # no number must be left without its splice
            for managed in group:
                self._unnumber(managed)
            if len(group) > 1:
                return [each for managed in group for each in await self._numbered([managed])]
            self._fail(group[0], error)
            return []
        return group

    async def _splice(self, managed: Managed) -> None:
        try:
            splice = await self._work(self._kernel.protect, managed.request, managed.number)
        except Exception as error:  # likewise
            self._unnumber(managed)
            self._fail(managed, error)
            return
        self._enforced(managed, managed.number, splice)
        await self._gate.admit(("", splice.network_port))
        self._tell_opened()
        log.info("spliced", endpoint=splice.name, dark_ms=round(splice.dark * 1000, 1))

    def _enforced(self, managed: Managed, number: int, splice: Splice) -> None:
        managed.number, managed.splice, managed.addresses = number, splice, splice.addresses
        managed.state, managed.detail, managed.delay = ENFORCED, DETAILS[ENFORCED], RETRY_FIRST
        self._number(managed)

    def _fail(self, managed: Managed, error: Exception) -> None:
        """A namespace or interface that is not there costs nothing to look for: each time. The rest backs off."""
        if managed.detail != str(error):
            # of a namespace that went the runtime will say that it vanished
            tell = log.info if isinstance(error, NetnsMissingError) else log.error
            tell("not spliced, tried again", endpoint=managed.name, error=str(error))
        managed.state, managed.detail = FAILED, str(error)
        if isinstance(error, InterfaceMissingError | NetnsMissingError):
            managed.retry_at = self._clock()
            return
        managed.retry_at = self._clock() + managed.delay
        managed.delay = min(managed.delay * 2, RETRY_MAX)

    # -- numbers --------------------------------------------------------------------------------------------

    def _free_number(self) -> int:
        """The next one that neither an endpoint has nor a port carries: a used one comes again as late as it can."""
        used = self._roster.endpoints.keys() | self._kernel.numbers()
        for step in range(NUMBER_MAX):
            number = (self._last_number + step) % NUMBER_MAX + 1
            if number not in used:
                self._last_number = number
                return number
        raise DatapathError(f"{NUMBER_MAX} endpoints at the most on one node: protect fewer")

    def _number(self, managed: Managed) -> None:
        endpoint = Endpoint(managed.name, managed.configured.labels)
        self._roster.put(managed.number, endpoint, managed.addresses)

    def _unnumber(self, managed: Managed) -> None:
        if managed.number:
            self._roster.remove(managed.number)
            self._forget_flows(managed.number)
        managed.number, managed.splice = 0, None


# -- before the first start ----------------------------------------------------------------------------------


def mistakes(runtime: Runtime, check: Callable[[SpliceRequest], None]) -> list[str]:
    """One line for each endpoint that cannot be spliced as things are (`check`: Splicer.check)."""
    found = []
    for endpoint in (*runtime.endpoints(), *runtime.missing()):
        managed = Managed(endpoint)
        try:
            check(managed.request)
        except (SpliceError, OSError) as error:
            text = str(error).removeprefix(f"{endpoint.name}: ")
            found.append(f"{endpoint.name}: {text}{advice(error)}")
    return found


def advice(error: Exception) -> str:
    if isinstance(error, InterfaceMissingError):
        return "; correct `interface`, or connect the container first"
    if isinstance(error, NotProtectableError):
        return "; name an interface that is one end of a veth pair, or take the endpoint out of the config"
    if isinstance(error, NetnsMissingError):
        return " Start it, or correct `netns`"
    return ""
