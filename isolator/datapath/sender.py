"""Sends frames out of ports: PACKET_VNET_HDR, so that GSO and partial checksums stay whole, and no qdisc.

One bound socket for each port, because `send` on a bound socket is the fastest call that CPython has:
`sendto` looks the interface's name up with an ioctl each time (half as long again), and through ctypes the
call's arguments cost as much. It is opened with the first frame: to close one takes the kernel an RCU grace period
(packet_release), some 10 ms, and a process that is killed closes them one after the other before it is gone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

PACKET_QDISC_BYPASS = 20  # <linux/if_packet.h>
SO_SNDBUFFORCE = 32
SEND_BUFFER = 4 << 20  # bytes under way per port; a veth takes a frame over at once, a queued device may not
CLOSING = 32  # threads
_SOL_PACKET = 263
_SOCKADDR_LL = struct.Struct("=HHiHBB8s")


class Sender:
    """Sends out of the ports that were added. A context manager.

    `frames` counts what was sent, `errors` what was not, by errno: ENOBUFS or EAGAIN (queue full), ENETDOWN
    or ENXIO (the port is down or gone), EINVAL (the vnet header contradicts the frame), EMSGSIZE (longer than
    the MTU), ENODEV (a port that was never added).
    """

    def __init__(self, open_socket: Callable[[], socket.socket]) -> None:
        """`open_socket` makes a packet socket in the ports' network namespace: see ring.packet_socket."""
        self._open_socket = open_socket
        self._ports: set[int] = set()
        self._sockets: dict[int, socket.socket] = {}
        self._send: dict[int, Callable[[bytes | memoryview], int]] = {}
        self.frames = 0
        self.errors: Counter[int] = Counter()

    def add(self, ifindex: int) -> None:
        """Makes a port known. Again for a device that came back: the old socket stays with the old device."""
        self.remove(ifindex)
        self._ports.add(ifindex)

    def remove(self, ifindex: int) -> None:
        """Forgets a port; one that is not known is no error."""
        self._ports.discard(ifindex)
        self._send.pop(ifindex, None)
        sock = self._sockets.pop(ifindex, None)
        if sock is not None:
            sock.close()

    def send(self, ifindex: int, vnet_frame: bytes | memoryview) -> bool:
        """Sends struct virtio_net_hdr and an Ethernet frame. False: not sent, and counted in `errors`."""
        try:
            (self._send.get(ifindex) or self._open(ifindex))(vnet_frame)
        except OSError as error:
            self.errors[error.errno or errno.EIO] += 1
            return False
        self.frames += 1
        return True

    def _open(self, ifindex: int) -> Callable[[bytes | memoryview], int]:
        if ifindex not in self._ports:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        sock = self._open_socket()
        try:
            sock.setsockopt(_SOL_PACKET, PACKET_QDISC_BYPASS, 1)
            sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
            _bind(sock, ifindex)
        except OSError:
            sock.close()
            raise
        self._sockets[ifindex] = sock
        self._send[ifindex] = sock.send
        return sock.send

    def close(self) -> None:
        """All at once: their grace periods are one."""
        with ThreadPoolExecutor(max_workers=CLOSING) as threads:
            list(threads.map(self.remove, list(self._sockets)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bind(sock: socket.socket, ifindex: int) -> None:
    """Binds by number: socket.bind takes a name, and names are those of the thread's namespace.

    Protocol 0: the socket receives nothing (packet_do_bind registers no hook), and a frame's protocol is read
    from its Ethernet header (packet_parse_headers).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    address = _SOCKADDR_LL.pack(socket.AF_PACKET, 0, ifindex, 0, 0, 0, b"")
    if libc.bind(sock.fileno(), address, len(address)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
