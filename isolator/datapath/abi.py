"""Layouts that C and Python share: bpf/isolator.h in Python's words.

Each `Layout` names a struct of the header and its fields in the header's order; tests/datapath/test_abi.py
compares every offset and size with what the compiler makes of the header. The numbers of enums live in
isolator.core.model. Below the layouts stand the values they decode to, and what encodes keys and entries.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from isolator.core.automaton.states import ALTERNATIVES_MAX, EDGES_MAX
from isolator.core.model import Direction, DropReason, FlowFlag, Owner, PuntReason, Side, Verdict

LAYOUT_VERSION = 4  # ISOLATOR_LAYOUT
RECORD_MAX = 1460
WINDOWS_MAX = 4
WINDOW_BYTES_MAX = 1 << 30
REASONS_MAX = 64
STATES_MAX, TABLES_MAX, OUTCOMES_MAX, REQUESTS_MAX = 65536, 16384, 32768, 65536
TABLE_OTHER = 0xFFFF
REQUEST_HEAD = 256
EVENT_INTERVAL_NS = 1_000_000
Octets = bytes | bytearray | memoryview

ENDPOINT_MAX = 32767  # what PUNT_CONTEXT has room for

PORT_XDP_FORWARD = 1
POLICY_AUDIT, POLICY_TRIAL, POLICY_FAIL_OPEN, POLICY_UNREAD = 1, 2, 4, 8
FLOW_AUDIT, FLOW_FAIL_OPEN, FLOW_PASSED_OPEN, FLOW_DENIED, FLOW_PLAIN = 1, 4, 8, 16, 32
HALF_FIN, HALF_RST, HALF_ALONE, HALF_FIN_ACKED, HALF_HEAD = 1, 2, 4, 8, 16
FLOW7_LIVE, FLOW7_PENDING = 1, 2
FLOW7_COMMIT, FLOW7_OWN, FLOW7_DELETE, FLOW7_OPEN, FLOW7_TAKE = 1, 2, 3, 4, 5
COMMIT_RECORD, COMMIT_WINDOW, COMMIT_MARK, COMMIT_FIN, COMMIT_GATE, COMMIT_LEND = 1, 2, 4, 8, 16, 32
FLOW7_OK, FLOW7_GONE, FLOW7_STALE = 0, 1, 2
EVENT_FLOW, EVENT_DROP, EVENT_REQUEST = 1, 2, 3


class Layout:
    """One C struct, naturally aligned: field name → struct format ("2Q", "16s", "3x" for padding)."""

    __slots__ = ("name", "offsets", "size", "sizes", "struct")

    def __init__(self, name: str, **fields: str) -> None:
        self.name = name
        self.offsets: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        form, at, widest = "=", 0, 1
        for field, code in fields.items():
            alignment = struct.calcsize("=" + code[-1])
            gap = -at % alignment
            widest = max(widest, alignment)
            self.offsets[field] = at + gap
            self.sizes[field] = struct.calcsize("=" + code)
            form += f"{gap}x{code}"
            at += gap + self.sizes[field]
        self.struct = struct.Struct(f"{form}{-at % widest}x")
        self.size = self.struct.size


FLOW_KEY_SIZE = 44
HALF_SIZE = 72 + RECORD_MAX + 4

PORT = Layout("port", peer_ifindex="I", endpoint="I", side="B", flags="B", mac="6s")
ADDRESS_KEY = Layout("address_key", endpoint="I", address="16s")
IDENTITY_KEY = Layout("identity_key", prefixlen="I", generation="I", address="16s")
POLICY_KEY = Layout(
    "policy_key", generation="I", endpoint="I", peer="I", port="H", protocol="B", direction="B"
)
POLICY_VALUE = Layout(
    "policy_value",
    verdict="B", flags="B", reason="B", pad="x", profile="I", rule="I", automaton="I", hits="Q",
)  # fmt: skip
SELECTION_KEY = Layout("selection_key", generation="I", endpoint="I", direction="I")
SELECTION = Layout("selection", base="I", number="I")
FLOW_KEY = Layout(
    "flow_key",
    endpoint="I", local="16s", remote="16s", local_port="H", remote_port="H", protocol="B", pad="3x",
)  # fmt: skip
FLOW4 = Layout(
    "flow4",
    packets="2Q", bytes="2Q", last_seen="Q", generation="I", rule="I", identity="I",
    verdict="B", reason="B", initiator="B", flags="B",
)  # fmt: skip
HALF = Layout(
    "half",
    word="Q", remaining="Q", mode="I", acked="I", windows=f"{2 * WINDOWS_MAX}I", window_at="I",
    record_seq="I", record_len="H", flags="B", gate="B", pad="4x", record=f"{RECORD_MAX + 4}s",
)  # fmt: skip
FLOW7 = Layout(
    "flow7",
    last_seen="Q", packets="2Q", bytes="2Q", profile="I", rule="I", generation="I", identity="I",
    pending_seq="I", incarnation="I", initiator="B", state="B", flags="B", reason="B", start="I",
    automaton="I", server_start="I", half=f"{2 * HALF_SIZE}s",
)  # fmt: skip
FLOW7_COMMAND = Layout(
    "flow7_command",
    key=f"{FLOW_KEY_SIZE}s", op="B", direction="B", flags="B", owner="B", incarnation="I", expect_next="I",
    next="I", mode="I", remaining="Q", window_from="I", window_to="I", record_seq="I", record_len="H", pad="2x",
    result="I", acked="I", other_next="I", other_record_len="I",
    half_next="I", half_owner="I", record=f"{RECORD_MAX + 4}s",
)  # fmt: skip
ENDPOINT = Layout("endpoint", flows7="I", flows7_max="I")
EVENT = Layout(
    "event",
    time="Q", key=f"{FLOW_KEY_SIZE}s", rule="I", identity="I", ifindex="I", length="I",
    type="B", verdict="B", reason="B", direction="B", flags="B", pad="3x",
)  # fmt: skip
REQUEST_EVENT = Layout(
    "request_event",
    time="Q", rest=f"{EVENT.size - 8}s", profile="I", generation="I", head_len="I", pad="4x", head=f"{REQUEST_HEAD}s",
)  # fmt: skip
STATE = Layout(
    "state",
    kind="B", count="B", next="H", other="H", table="H", outcome="I", bytes=f"{EDGES_MAX}s", set="2Q",
)  # fmt: skip
TABLE = Layout("table", next="128H")
OUTCOME = Layout("outcome", need=f"{ALTERNATIVES_MAX}I", rule=f"{ALTERNATIVES_MAX}I")
DROP_COUNTER = Layout("drop_counter", packets="Q", bytes="Q", last_event="Q")
CONTROL = Layout(
    "control",
    heartbeat="Q", heartbeat_max="Q", frozen_until="Q", need_wakeup="I", generation="I", punt_ifindex="I", pad="4x",
)  # fmt: skip

LAYOUTS = (
    PORT, ADDRESS_KEY, IDENTITY_KEY, SELECTION_KEY, SELECTION, POLICY_KEY, POLICY_VALUE, FLOW_KEY, FLOW4, HALF,
    FLOW7, FLOW7_COMMAND, ENDPOINT, EVENT, DROP_COUNTER, CONTROL, STATE, TABLE, OUTCOME,
)  # fmt: skip

_NUMBER = struct.Struct("=I")
_TUPLE = struct.Struct(">16s16sHHB3x")  # a flow's key behind its endpoint, ports as on the wire
assert _NUMBER.size + _TUPLE.size == FLOW_KEY.size == FLOW_KEY_SIZE and HALF.size == HALF_SIZE
_MAPPED = bytes(10) + b"\xff\xff"


# -- keys -------------------------------------------------------------------------------------------------


def flow_key(
    endpoint: int, local: Octets, remote: Octets, local_port: int, remote_port: int, protocol: int
) -> bytes:
    """A flow's key (44 bytes) in flows4 and flows7. Addresses are 16 bytes, IPv4 mapped into IPv6."""
    return _NUMBER.pack(endpoint) + _TUPLE.pack(local, remote, local_port, remote_port, protocol)


@dataclass(frozen=True, slots=True)
class FlowKey:
    """A flow's name: the endpoint's side is `local`, whichever way a packet goes."""

    endpoint: int
    local: bytes
    remote: bytes
    local_port: int
    remote_port: int
    protocol: int

    @classmethod
    def unpack(cls, data: Octets) -> FlowKey:
        view = memoryview(data)
        return cls(_NUMBER.unpack_from(view)[0], *_TUPLE.unpack_from(view, _NUMBER.size))

    def pack(self) -> bytes:
        return flow_key(
            self.endpoint, self.local, self.remote, self.local_port, self.remote_port, self.protocol
        )


def address_key(endpoint: int, address: bytes) -> bytes:
    return ADDRESS_KEY.struct.pack(endpoint, address)


def identity_key(generation: int, address: bytes, prefixlen: int) -> bytes:
    """`prefixlen` counts bits of the 16-byte address (an IPv4 /24 is a /120), behind the generation's 32."""
    return IDENTITY_KEY.struct.pack(32 + prefixlen, generation, address)


def prefix_of(network: IPv4Network | IPv6Network) -> tuple[bytes, int]:
    """A network as the identities map has it: 16 bytes, and the prefix's length in bits of those."""
    if network.version == 4:
        return _MAPPED + network.network_address.packed, 96 + network.prefixlen
    return network.network_address.packed, network.prefixlen


def mapped(address: IPv4Address | IPv6Address) -> bytes:
    """16 bytes; IPv4 mapped into IPv6 (RFC 4291 section 2.5.5.2)."""
    return _MAPPED + address.packed if address.version == 4 else address.packed


def selection_key(generation: int, endpoint: int, direction: int) -> bytes:
    return SELECTION_KEY.struct.pack(generation, endpoint, direction)


def policy_key(generation: int, endpoint: int, direction: int, peer: int, protocol: int, port: int) -> bytes:
    """`port` in host order; peer, protocol and port 0 mean any."""
    return POLICY_KEY.struct.pack(generation, endpoint, peer, port, protocol, direction)


def policy_value(
    verdict: int, flags: int = 0, reason: int = 0, profile: int = 0, rule: int = 0, automaton: int = 0
) -> bytes:
    return POLICY_VALUE.struct.pack(verdict, flags, reason, profile, rule, automaton, 0)


# -- the 32 bits that go with a punted frame --------------------------------------------------------------


def punt_context(endpoint: int, side: int, reason: int, incarnation: int) -> int:
    """PUNT_CONTEXT: what the ring hands up as `tp_rxhash`."""
    return ((endpoint << 1 | side) & 0xFFFF) | reason << 16 | (incarnation & 0xFF) << 24


def parse_punt_context(context: int) -> tuple[int, Side, PuntReason, int]:
    """(endpoint, side, reason, low 8 bits of the incarnation). ValueError for a reason nobody defined."""
    return (context & 0xFFFF) >> 1, Side(context & 1), PuntReason(context >> 16 & 0xFF), context >> 24


# -- values -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Port:
    """One end of a splice as the programs see it. `mac` is the container's."""

    peer_ifindex: int
    endpoint: int
    side: Side
    mac: bytes
    flags: int = 0

    def pack(self) -> bytes:
        return PORT.struct.pack(self.peer_ifindex, self.endpoint, self.side, self.flags, self.mac)

    @classmethod
    def unpack(cls, data: Octets) -> Port:
        peer, endpoint, side, flags, mac = PORT.struct.unpack(data)
        return cls(peer, endpoint, Side(side), mac, flags)


@dataclass(frozen=True, slots=True)
class PolicyValue:
    verdict: Verdict
    flags: int
    reason: DropReason
    profile: int
    rule: int
    automaton: int
    hits: int

    @classmethod
    def unpack(cls, data: Octets) -> PolicyValue:
        verdict, flags, reason, profile, rule, automaton, hits = POLICY_VALUE.struct.unpack(data)
        return cls(Verdict(verdict), flags, DropReason(reason), profile, rule, automaton, hits)


@dataclass(frozen=True, slots=True)
class Flow4:
    """A flow that layer 4 decided. `packets` and `octets` by direction, `last_seen` CLOCK_MONOTONIC in ns."""

    packets: tuple[int, int]
    octets: tuple[int, int]
    last_seen: int
    generation: int
    rule: int
    identity: int
    verdict: Verdict
    reason: DropReason
    initiator: Direction
    flags: FlowFlag

    @classmethod
    def unpack(cls, data: Octets) -> Flow4:
        p0, p1, b0, b1, seen, generation, rule, identity, verdict, reason, initiator, flags = (
            FLOW4.struct.unpack(data)
        )
        return cls(
            (p0, p1), (b0, b1), seen, generation, rule, identity,
            Verdict(verdict), DropReason(reason), Direction(initiator), FlowFlag(flags),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Word:
    """A half's state word (R0)."""

    next: int
    owner: Owner
    punts: int

    @classmethod
    def unpack(cls, word: int) -> Word:
        return cls(word & 0xFFFFFFFF, Owner(word >> 32 & 3), word >> 34)

    def pack(self) -> int:
        return self.next | self.owner << 32 | self.punts << 34


@dataclass(frozen=True, slots=True)
class Half:
    """One direction of an inspected flow. `windows` lists the [from, to) that are not empty, oldest first."""

    word: Word
    remaining: int
    mode: int
    acked: int
    windows: tuple[tuple[int, int], ...]
    record_seq: int
    record: bytes
    flags: int
    gate: int = 0

    @property
    def next(self) -> int:
        return self.word.next

    @property
    def owner(self) -> Owner:
        return self.word.owner

    @property
    def alone(self) -> str | None:
        """The last request's method, if the kernel accepted it: the answer begins at the other's record_seq."""
        if not self.flags & HALF_ALONE:
            return None
        return "HEAD" if self.flags & HALF_HEAD else "GET"  # what any other's answer looks like

    @classmethod
    def unpack(cls, data: Octets) -> Half:
        word, remaining, mode, acked, *rest = HALF.struct.unpack(data)
        spans = [(rest[at], rest[at + 1]) for at in range(0, 2 * WINDOWS_MAX, 2)]
        window_at, record_seq, record_len, flags, gate, record = rest[2 * WINDOWS_MAX :]
        oldest = window_at % WINDOWS_MAX
        windows = tuple(span for span in spans[oldest:] + spans[:oldest] if span[0] != span[1])
        return cls(
            Word.unpack(word), remaining, mode, acked, windows, record_seq, record[:record_len], flags, gate
        )

    def pack(self) -> bytes:
        """For tests, and to bring a flow back after its maps were laid out anew."""
        spans = [number for window in self.windows for number in window]
        spans += [0] * (2 * WINDOWS_MAX - len(spans))
        return HALF.struct.pack(
            self.word.pack(), self.remaining, self.mode, self.acked, *spans, len(self.windows) % WINDOWS_MAX,
            self.record_seq, len(self.record), self.flags, self.gate, self.record,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flow7:
    """An inspected flow; `half`, `packets` and `octets` by direction."""

    last_seen: int
    packets: tuple[int, int]
    octets: tuple[int, int]
    profile: int
    rule: int
    generation: int
    identity: int
    pending_seq: int
    incarnation: int
    initiator: Direction
    state: int
    flags: FlowFlag
    reason: DropReason
    start: int
    automaton: int
    half: tuple[Half, Half]
    server_start: int = 0

    @property
    def live(self) -> bool:
        return bool(self.state & FLOW7_LIVE)

    @property
    def pending(self) -> bool:
        return bool(self.state & FLOW7_PENDING)

    @property
    def client(self) -> Half:
        """The half that is inspected."""
        return self.half[self.initiator]

    @property
    def server(self) -> Half:
        return self.half[self.initiator.other]

    @classmethod
    def unpack(cls, data: Octets) -> Flow7:
        (
            seen, p0, p1, b0, b1, profile, rule, generation, identity, pending_seq, incarnation,
            initiator, state, flags, reason, start, automaton, server_start, halves,
        ) = FLOW7.struct.unpack(data)  # fmt: skip
        return cls(
            seen, (p0, p1), (b0, b1), profile, rule, generation, identity, pending_seq, incarnation,
            Direction(initiator), state, FlowFlag(flags), DropReason(reason), start, automaton,
            (Half.unpack(halves[:HALF_SIZE]), Half.unpack(halves[HALF_SIZE:])), server_start,
        )  # fmt: skip

    def pack(self) -> bytes:
        return FLOW7.struct.pack(
            self.last_seen, *self.packets, *self.octets, self.profile, self.rule, self.generation,
            self.identity, self.pending_seq, self.incarnation, self.initiator, self.state, self.flags,
            self.reason, self.start, self.automaton, self.server_start, self.half[0].pack() + self.half[1].pack(),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """What the kernel reports: a new flow, or a drop. `time` is CLOCK_MONOTONIC in ns, `length` bytes."""

    time: int
    key: FlowKey
    rule: int
    identity: int
    ifindex: int
    length: int
    type: int
    verdict: Verdict
    reason: DropReason
    direction: Direction
    flags: FlowFlag

    @classmethod
    def unpack(cls, data: Octets) -> Event:
        time, key, rule, identity, ifindex, length, kind, verdict, reason, direction, flags = (
            EVENT.struct.unpack_from(data)
        )
        return cls(
            time, FlowKey.unpack(key), rule, identity, ifindex, length, kind,
            Verdict(verdict), DropReason(reason), Direction(direction), FlowFlag(flags),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """A request that the kernel accepted. `event.rule` is its index into `requests`, `head` at most its beginning."""

    event: Event
    profile: int
    generation: int
    head: bytes

    @classmethod
    def unpack(cls, data: Octets) -> RequestEvent:
        *_, profile, generation, length, head = REQUEST_EVENT.struct.unpack_from(data)
        return cls(Event.unpack(data), profile, generation, head[:length])


@dataclass(frozen=True, slots=True)
class DropCounter:
    packets: int
    octets: int

    @classmethod
    def unpack(cls, data: Octets) -> DropCounter:
        """Of one CPU."""
        packets, length, _ = DROP_COUNTER.struct.unpack(data)
        return cls(packets, length)

    def __add__(self, other: DropCounter) -> DropCounter:
        return DropCounter(self.packets + other.packets, self.octets + other.octets)


if sys.byteorder != "little":  # the programs are built for bpfel only
    raise ImportError("isolator's datapath needs a little-endian machine")
