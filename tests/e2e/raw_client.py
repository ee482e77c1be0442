"""A TCP client made by hand: nothing is sent that the test does not send, and nobody's kernel interferes.

It speaks from an address that nobody owns, through a packet socket in a namespace on the bridge.
"""

from __future__ import annotations

import random
import select
import socket
import time

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from isolator.datapath.netns import Netns

QUIET = 0.15  # s without a frame: then nothing more is coming
_MASK = 0xFFFFFFFF
_P_IP = 0x0800


class RawClient:
    """One connection. `at` in what follows is a distance from the first byte; bytes are sent as told, unchecked."""

    def __init__(
        self,
        netns: str,
        mac: str,
        server_mac: str,
        address: str,
        server: str,
        port: int,
        isn: int | None = None,
    ) -> None:
        with Netns(netns) as there, there.entered():
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_P_IP))
            self.socket.bind(("eth0", _P_IP))
        self.socket.setblocking(False)
        self.ethernet = Ether(src=mac, dst=server_mac)
        self.network = IP(src=address, dst=server)
        self.port = port
        self.isn = random.randrange(1 << 32) if isn is None else isn
        self.ack = 0
        self.clock = 100_000  # TSval
        self.echo = 0  # TSecr
        self.seen = b""
        self.reset = False
        self.acked = 0  # how far the server has acknowledged, from the first byte

    def close(self) -> None:
        self.socket.close()

    # -- sending ---------------------------------------------------------------------------------------------

    def segment(
        self, at: int, payload: bytes = b"", flags: str = "PA", age: int = 0, **fields: object
    ) -> Packet:
        """`age`: how much older than the newest its timestamp is."""
        stamps = [("NOP", None), ("NOP", None), ("Timestamp", (self.clock - age, self.echo))]
        options = fields.pop("options", stamps)
        values = {"seq": (self.isn + 1 + at) & _MASK, "ack": self.ack, "window": 65535, **fields}
        return TCP(sport=self.port, dport=80, flags=flags, options=options, **values) / payload

    def put(self, transport: Packet, **ip: object) -> None:
        network = self.network.copy()
        for name, value in ip.items():
            setattr(network, name, value)
        self.frame(self.ethernet / network / transport)

    def frame(self, frame: Packet) -> None:
        self.clock += 1
        self.socket.send(bytes(frame))

    def send(self, at: int, payload: bytes = b"", flags: str = "PA", **fields: object) -> None:
        self.put(self.segment(at, payload, flags, **fields))  # type: ignore[arg-type]

    def connect(self) -> bool:
        self.send(-1, b"", "S", ack=0)
        self.listen(until=lambda: self.ack != 0)
        if self.ack:
            self.send(0, b"", "A")
        return self.ack != 0

    # -- receiving -------------------------------------------------------------------------------------------

    def listen(self, seconds: float = 1.0, until: object = None) -> bytes:
        """Takes and acknowledges what comes, until nothing more does; all that was seen so far."""
        deadline = time.monotonic() + seconds
        quiet = QUIET if until is None else seconds
        while time.monotonic() < deadline:
            if not select.select([self.socket], [], [], quiet)[0]:
                break
            frame = Ether(self.socket.recv(1 << 17))
            if TCP in frame and frame[TCP].dport == self.port and frame[IP].src == self.network.dst:
                self._take(frame)
                if callable(until) and until():
                    break
        return self.seen

    def _take(self, frame: Packet) -> None:
        tcp = frame[TCP]
        length = frame[IP].len - frame[IP].ihl * 4 - tcp.dataofs * 4
        payload = bytes(tcp.payload)[:length]
        self.echo = next((value[0] for name, value in tcp.options if name == "Timestamp"), self.echo)
        self.reset |= "R" in tcp.flags
        if "A" in tcp.flags:
            self.acked = (tcp.ack - self.isn - 1) & _MASK
        if "S" in tcp.flags:
            self.ack = (tcp.seq + 1) & _MASK
        elif tcp.seq == self.ack and (payload or "F" in tcp.flags):
            self.seen += payload
            self.ack = (self.ack + len(payload) + ("F" in tcp.flags)) & _MASK
            self.send(self.acked, b"", "A")
