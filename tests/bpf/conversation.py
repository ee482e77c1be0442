"""A TCP connection as a transcript: who sends what, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass

from scapy.packet import Packet, Raw

from isolator.core.model import Direction, Owner
from isolator.datapath.abi import Flow7, Half
from isolator.datapath.flow7 import Answer
from tests.bpf.bench import CONTAINER, CONTAINER6, PEER, PEER6, VNET_NONE, Bench, Outcome, key_of
from tests.bpf.frames import inbound, outbound, tcp

CLIENT_ISN, SERVER_ISN = 1000, 5000
HEAD = b"GET /books HTTP/1.1\r\nHost: api.local\r\n\r\n"


@dataclass
class Conversation:
    """Ingress: a peer connects to the container. Egress: the container connects to a peer."""

    b: Bench
    direction: Direction = Direction.INGRESS
    v6: bool = False
    client_port: int = 1000
    server_port: int = 80
    isn: int = CLIENT_ISN

    @property
    def key(self) -> bytes:
        local, remote = (CONTAINER6, PEER6) if self.v6 else (CONTAINER, PEER)
        if self.direction is Direction.INGRESS:
            return key_of(self.server_port, self.client_port, remote, local)
        return key_of(self.client_port, self.server_port, remote, local)

    @property
    def flow(self) -> Flow7:
        return self.b.flow7(self.key)

    @property
    def half(self) -> Half:
        """The inspected one."""
        return self.flow.client

    # -- the ends ------------------------------------------------------------------------------------------

    def client(
        self, flags: str, seq: int, ack: int = 0, data: bytes = b"", vnet: bytes = VNET_NONE, **ip: object
    ) -> Outcome:
        packet = tcp(self.client_port, self.server_port, flags, seq, ack)
        return self._send(packet / Raw(data) if data else packet, self.direction, vnet, ip)

    def server(self, flags: str, seq: int, ack: int = 0, data: bytes = b"") -> Outcome:
        packet = tcp(self.server_port, self.client_port, flags, seq, ack)
        return self._send(packet / Raw(data) if data else packet, self.direction.other, VNET_NONE, {})

    def _send(self, packet: Packet, direction: Direction, vnet: bytes, ip: dict[str, object]) -> Outcome:
        peer, own = (PEER6, CONTAINER6) if self.v6 else (PEER, CONTAINER)
        if direction is Direction.INGRESS:
            return self.b.from_network(inbound(packet, peer, own, **ip), vnet)
        return self.b.from_container(outbound(packet, peer, own, **ip), vnet)

    # -- what often comes first ----------------------------------------------------------------------------

    def handshake(self) -> Conversation:
        assert self.client("S", self.isn).where in ("container", "network")
        assert self.server("SA", SERVER_ISN, self.start).where in ("container", "network")
        assert self.client("A", self.start, SERVER_ISN + 1).where in ("container", "network")
        return self

    @property
    def start(self) -> int:
        """Sequence number of the client's first byte."""
        return (self.isn + 1) & 0xFFFFFFFF

    def at(self, offset: int) -> int:
        return (self.start + offset) & 0xFFFFFFFF

    # -- Python's side -------------------------------------------------------------------------------------

    def commit(
        self, following: int, expect: int | None = None, incarnation: int | None = None, **what: object
    ) -> Answer:
        """Move the boundary to `following` bytes behind the start; the gate stays open."""
        expected = self.half.next if expect is None else expect
        return self.b.datapath.commands.commit(
            self.key,
            self.direction,
            self.flow.incarnation if incarnation is None else incarnation,
            expected,
            self.at(following),
            **{"gate": False, **what},
        )  # type: ignore[arg-type]

    def own(self, owner: Owner, server: bool = False) -> Answer:
        direction = self.direction.other if server else self.direction
        return self.b.datapath.commands.own(self.key, direction, self.flow.incarnation, owner)

    def allow_head(self, head: bytes = HEAD) -> None:
        """What Python does with an allowed head: record it, move on, let the rest be."""
        assert self.commit(len(head), record=(self.start, head))
