"""A compiled policy that can be changed: where endpoints, labels or addresses differ, only what they touch is computed.

    policies, who is there → Standing → `whole`: entries by table, prefixes, and whose table is which
    who is there now → `change` ─┬─ addresses whose owners differ → prefixes, and perhaps new identities
                                 ├─ new identities → their entries in every table (nobody was sent to them before)
                                 └─ endpoints with other labels → their tables, made where they are new

A table holds what endpoints share that the same policies select, so its entries multiply with tables, not endpoints.
Numbers of identities and tables only grow: what is out of use stays until the policy is compiled as a whole again, and
that is when `change` says None: a table may have no room for what is out of use for ever.
A new identity's entries must be there before a prefix leads to it, a new table's before an endpoint is sent there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from isolator.core.compile import Compiler, PolicyEntry, PolicyTooLarge, Table, entries_of, require_room
from isolator.core.identities import (
    Address,
    Families,
    build_identities,
    mapped_prefix,
    unmapped,
    unowned,
)
from isolator.core.index import RuleIndex
from isolator.core.model import Direction, Endpoint, Outsider, RuleRef
from isolator.core.policy import Identity, LabelSet, Policy, Profile, labels_of

TABLE_FIRST = 1 << 16
"""Numbers of tables: those of endpoints are smaller, and both stand in one place (struct policy_key)."""

UNUSED_MAX = 4096
"""New identities until all are counted anew: most of the old ones are out of use by then."""

Prefix = tuple[bytes, int]
Tables = dict[tuple[int, Direction], int]
Holder = tuple[LabelSet, dict[Address, None]]


@dataclass(frozen=True, slots=True)
class Whole:
    """All that the kernel needs. `tables`: an endpoint's in a direction; entries name it as their endpoint."""

    entries: list[PolicyEntry]
    identities: dict[Prefix, int]
    tables: Tables


@dataclass(frozen=True, slots=True)
class Change:
    """What differs. `identities`: before and after, 0: none. `tables`: all of them."""

    entries: list[PolicyEntry]
    identities: dict[Prefix, tuple[int, int]]
    tables: Tables


class Standing:
    """Raises PolicyTooLarge. After an error in `change`, or where its result is not put in force, it is of no use."""

    def __init__(
        self,
        policies: Sequence[Policy],
        endpoints: Mapping[int, Endpoint],
        addresses: Mapping[int, Iterable[Address]],
        outsiders: Iterable[Outsider] = (),
    ) -> None:
        outsiders = tuple(outsiders)
        self.policies = tuple(policies)
        identities = build_identities(self.policies, endpoints, addresses, outsiders)
        self._named = {network for policy in self.policies for network in policy.networks()}
        self._families = Families(self._named)
        self._prefixes = {(each.address, each.prefixlen): each.identity for each in identities.prefixes}
        self._numbers = dict(identities.numbers)
        self._first_count = len(self._numbers)
        self._compiler = Compiler(self.policies, identities)
        self._rules: RuleIndex | None = None
        self._holders = holders(endpoints, addresses, outsiders)
        self._owners: dict[Address, list[LabelSet]] = {}
        for labels, held in self._holders.values():
            for address in held:
                self._owners.setdefault(address, []).append(labels)
        self._numbered: dict[int, Table] = {}
        self._number_of: dict[int, int] = {}  # id of a table → its number
        self._size = 0
        self._endpoints: dict[int, tuple[Endpoint, dict[Direction, int]]] = {}
        self._fit()
        entries = [
            entry for number, endpoint in sorted(endpoints.items()) for entry in self._place(number, endpoint)
        ]
        self.whole = Whole(entries, dict(self._prefixes), self._tables())

    @property
    def profiles(self) -> dict[int, Profile]:
        return self._compiler.profiles

    @property
    def rules(self) -> dict[int, RuleRef]:
        return self._compiler.rules

    def prepare(self) -> None:
        """What only changes need. It takes long, and may be done when nobody waits."""
        if self._rules is None:
            self._rules = RuleIndex(self.policies)

    def change(
        self,
        endpoints: Mapping[int, Endpoint],
        addresses: Mapping[int, Iterable[Address]],
        outsiders: Iterable[Outsider] = (),
    ) -> Change | None:
        """None: it has grown too large by changes, and is to be made anew."""
        self.prepare()
        now = holders(endpoints, addresses, tuple(outsiders))
        touched, self._holders = self._move(self._holders, now), now
        try:
            return self._change(touched, endpoints)
        except PolicyTooLarge:
            return None

    def _change(self, touched: Iterable[Address], endpoints: Mapping[int, Endpoint]) -> Change | None:
        new: list[tuple[int, Identity]] = []
        moved = {prefix: ends for address in touched for prefix, ends in self._readdress(address, new)}
        entries = [entry for number, identity in new for entry in self._admit(number, identity)]
        for number in self._endpoints.keys() - endpoints.keys():
            del self._endpoints[number]
        for number, endpoint in endpoints.items():
            if number not in self._endpoints or self._endpoints[number][0] != endpoint:
                entries += self._place(number, endpoint)
        if len(self._numbers) > self._first_count + UNUSED_MAX:
            return None
        self._fit()
        return Change(entries, moved, self._tables())

    # -- addresses ------------------------------------------------------------------------------------------

    def _move(self, before: Mapping[object, Holder], now: Mapping[object, Holder]) -> dict[Address, None]:
        """Brings the owners up to date. The addresses that may have others now."""
        touched: dict[Address, None] = {}
        for key in {**before, **now}:
            was, is_ = before.get(key), now.get(key)
            if was == is_:
                continue
            kept = was[1].keys() & is_[1].keys() if was and is_ and was[0] == is_[0] else set()
            for labels, held in filter(None, [was]):
                for address in held.keys() - kept:
                    self._owners[address].remove(labels)
                    touched[address] = None
            for labels, held in filter(None, [is_]):
                for address in held.keys() - kept:
                    self._owners.setdefault(address, []).append(labels)
                    touched[address] = None
        return touched

    def _readdress(
        self, address: Address, new: list[tuple[int, Identity]]
    ) -> Iterator[tuple[Prefix, tuple[int, int]]]:
        owned = frozenset(self._owners.get(address, ()))
        if not owned:
            self._owners.pop(address, None)
        held = self._families.holding(address.version, int(address), address.max_prefixlen)
        named = any(network.prefixlen == network.max_prefixlen for network in held)
        after = 0
        if owned or named:
            identity = Identity(owned if owned else unowned(address), held)
            after = self._numbers.get(identity, 0)
            if not after:
                after = self._numbers[identity] = len(self._numbers) + 1
                new.append((after, identity))
        place = mapped_prefix(address.version, int(address), address.max_prefixlen, 0)
        prefix = (place.address, place.prefixlen)
        before = self._prefixes.get(prefix, 0)
        if before != after:
            if after:
                self._prefixes[prefix] = after
            else:
                del self._prefixes[prefix]
            yield prefix, (before, after)

    # -- tables ---------------------------------------------------------------------------------------------

    def _admit(self, peer: int, identity: Identity) -> Iterator[PolicyEntry]:
        assert self._rules is not None
        self._compiler.admit(peer, identity)
        matching = self._rules.matching(identity)
        for number, table in self._numbered.items():
            alike = [
                first + which
                for at, first in table.first.items()
                for which in matching.get((at, table.direction), ())
            ]
            if alike:
                rows = table.of(peer, tuple(alike))
                self._size += len(rows)
                yield from entries_of(number, table.direction, rows)

    def _place(self, number: int, endpoint: Endpoint) -> Iterator[PolicyEntry]:
        found = {}
        for direction in Direction:
            table = self._compiler.table(endpoint, direction)
            if id(table) not in self._number_of:
                self._number_of[id(table)] = at = TABLE_FIRST + len(self._numbered)
                self._numbered[at] = table
                self._size += len(table.rows)
                yield from entries_of(at, direction, table.rows)
                self._fit()
            found[direction] = self._number_of[id(table)]
        self._endpoints[number] = (endpoint, found)

    def _tables(self) -> Tables:
        return {
            (number, direction): table
            for number, (_, found) in self._endpoints.items()
            for direction, table in found.items()
        }

    def _fit(self) -> None:
        require_room(len(self._prefixes), self._size)


def holders(
    endpoints: Mapping[int, Endpoint],
    addresses: Mapping[int, Iterable[Address]],
    outsiders: Sequence[Outsider],
) -> dict[object, Holder]:
    """Who has which addresses, each under a name that it keeps."""
    found: dict[object, Holder] = {}
    for number, endpoint in endpoints.items():
        found[number] = labels_of(endpoint.labels), dict.fromkeys(map(unmapped, addresses.get(number, ())))
    for each in outsiders:
        name, labels = (each.name, 0), labels_of(each.labels)
        while name in found:
            name = (each.name, name[1] + 1)
        found[name] = labels, dict.fromkeys(map(unmapped, each.addresses))
    return found
