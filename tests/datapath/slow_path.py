"""The bench with a forwarder on its ring: frames in, and what comes out at both ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from isolator.core.inspector import Inspector
from isolator.core.model import Decision, RuleRef, Verdict
from isolator.core.pattern import PathPattern
from isolator.core.policy import HttpRule, Outcome, Profile, Ruling
from isolator.datapath.doorbell import Doorbell
from isolator.datapath.forwarder import Forwarder
from isolator.datapath.ring import packet_socket
from isolator.datapath.sender import Sender
from parsers.packet import VNET, SegmentTemplate
from tests.bpf.bench import CONTAINER, CONTAINER_MAC, ENDPOINT, GATEWAY_MAC, PEER, PROFILE, Bench, bench


def octets(address: str) -> bytes:
    return bytes(int(part) for part in address.split("."))


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def template(port: int) -> SegmentTemplate:
    """The client's frames."""
    ports = port.to_bytes(2, "big") + (80).to_bytes(2, "big")
    return SegmentTemplate(
        4, mac(CONTAINER_MAC) + mac(GATEWAY_MAC) + b"\x08\x00", octets(PEER), octets(CONTAINER), ports
    )


# -- the place -----------------------------------------------------------------------------------------------


LINE = HttpRule(frozenset({"GET", "HEAD", "POST"}), PathPattern("/api/v1/**"))
RULE = RuleRef("api", "read")
RULING = Ruling(Decision(Verdict.INSPECT, rule=RULE), allows=((LINE, Decision(Verdict.ALLOW, rule=RULE)),))
PROFILES = {PROFILE: Profile(PROFILE, Outcome(RULING, RULING, False))}
MONITORED = {PROFILE: Profile(PROFILE, Outcome(Ruling(Decision(Verdict.ALLOW)), RULING, True))}


@dataclass
class Place:
    """The bench with a forwarder on its ring."""

    bench: Bench
    forwarder: Forwarder
    inspector: Inspector
    served: list[bytes] = field(default_factory=list)  # frames that reached the container
    returned: list[bytes] = field(default_factory=list)  # and the network

    def send(self, frame: bytes, from_container: bool = False) -> None:
        """`frame` with its vnet header; then all that comes of it."""
        tap = self.bench.container if from_container else self.bench.network
        tap.send(frame)
        self.forwarder.run()
        for where, frames in ((self.bench.container, self.served), (self.bench.network, self.returned)):
            while True:
                try:
                    frames.append(where.recv(1 << 17)[VNET:])
                except BlockingIOError:
                    break


@contextmanager
def place() -> Iterator[Place]:
    with ExitStack() as stack:
        b = stack.enter_context(bench())
        b.reset(flows7_max=10_000)
        inspector = Inspector(PROFILES, b.datapath.generation)

        def socket_there():  # type: ignore[no-untyped-def]  # noqa: ANN202
            with b.namespace.entered():
                return packet_socket()

        sender = stack.enter_context(Sender(socket_there))
        sender.add(b.container_port)
        sender.add(b.network_port)
        doorbell = Doorbell(b.datapath.doorbell_fd)
        stack.callback(doorbell.close)
        ports = {ENDPOINT: (b.container_port, b.network_port)}
        forwarder = Forwarder(
            b.datapath, b.ring, doorbell, sender, inspector, ports, lambda report, now: None
        )
        yield Place(b, forwarder, inspector)
