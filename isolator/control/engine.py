"""Where an engine is. Its libraries are not needed for that."""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path

PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid


def host_netns(socket_path: Path) -> Path:
    """The network namespace in which the engine behind a socket has its bridges: that of the process that listens
    there (SO_PEERCRED, unix(7)), or, where that cannot be seen, our own."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(socket_path))
        pid, _, _ = PEERCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEERCRED.size))
        path = Path(f"/proc/{pid}/ns/net")
        if pid and path.exists():
            return path
    return Path("/proc/self/ns/net")
