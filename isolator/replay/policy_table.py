"""A compiled policy asked as the kernel asks it (bpf/isolator_flow4.h: decide, policy_at).

remote address → longest prefix → identity → (peer, protocol, port), widened three times → PolicyEntry
"""

from __future__ import annotations

from isolator.core.compile import Compiled, PolicyEntry
from isolator.core.model import Direction, DropReason, PolicyFlag, RuleRef, Verdict
from isolator.datapath.abi import FlowKey
from isolator.replay.headers import ICMP, ICMPV6, TCP, UDP

_Point = tuple[int, Direction, int, int, int]  # endpoint, direction, peer, protocol, port


class PolicyTable:
    """What the maps `identities` and `policy` answer. Each address is looked up once."""

    def __init__(self, compiled: Compiled) -> None:
        self.generation = compiled.generation
        self.rules: dict[int, RuleRef] = compiled.rules
        self._entries: dict[_Point, PolicyEntry] = {
            (each.endpoint, each.direction, each.peer, each.protocol, each.port): each
            for each in compiled.entries
        }
        self._prefixes: dict[int, dict[int, int]] = {}
        for address, length, identity in compiled.identities:
            of_length = self._prefixes.setdefault(length, {})
            of_length[int.from_bytes(address, "big") >> (128 - length)] = identity
        self._lengths = sorted(self._prefixes, reverse=True)
        self._known: dict[bytes, int] = {}

    def identity(self, address: bytes) -> int:
        """Of 16 bytes; every address has one."""
        found = self._known.get(address)
        if found is None:
            value = int.from_bytes(address, "big")
            found = next(
                (
                    identity
                    for length in self._lengths
                    if (identity := self._prefixes[length].get(value >> (128 - length))) is not None
                ),
                0,
            )
            self._known[address] = found
        return found

    def decide(self, key: FlowKey, initiator: Direction) -> PolicyEntry:
        """For a flow that `initiator` opens. Both ICMPs are one protocol to policy; http rules allow TCP alone."""
        peer = self.identity(key.remote)
        protocol = ICMP if key.protocol == ICMPV6 else key.protocol
        port = 0
        if protocol in (TCP, UDP):
            port = key.local_port if initiator is Direction.INGRESS else key.remote_port
        found = self._at(key.endpoint, initiator, peer, protocol, port)
        if found is None:
            return PolicyEntry(
                key.endpoint, initiator, peer, protocol, port,
                Verdict.DROP, PolicyFlag(0), DropReason.NO_POLICY, 0, 0,
            )  # fmt: skip
        if found.verdict is Verdict.INSPECT and protocol != TCP:
            return found._replace(verdict=Verdict.DROP, reason=DropReason.POLICY_DEFAULT)
        return found

    def _at(
        self, endpoint: int, direction: Direction, peer: int, protocol: int, port: int
    ) -> PolicyEntry | None:
        get = self._entries.get
        return (
            get((endpoint, direction, peer, protocol, port))
            or get((endpoint, direction, peer, protocol, 0))
            or get((endpoint, direction, peer, 0, 0))
            or get((endpoint, direction, 0, 0, 0))
        )
