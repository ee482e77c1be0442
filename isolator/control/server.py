"""Serves the control API on a unix socket, inside an event loop that belongs to somebody else."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

CONNECTIONS_MAX = 64
"""Requests served at once; further ones get 503. Followers are among them."""

STOP_SECONDS = 2
"""What a request under way is given to end before the server does."""

SOCKET_MODE = 0o600


class SocketInUseError(OSError):
    """Another agent answers on the socket. The text is meant for people."""


class ApiServer:
    """`start` returns once the socket accepts; `stop` ends streams, waits for the rest, removes it."""

    def __init__(self, app: Starlette, path: Path) -> None:
        self._app = app
        self._path = path
        self._server = EmbeddedServer(
            uvicorn.Config(
                app,
                loop="none",
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                limit_concurrency=CONNECTIONS_MAX,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises SocketInUseError, and OSError if the folder can't be written."""
        listener = listen(self._path)
        self._task = asyncio.get_running_loop().create_task(self._server.serve([listener]))

    async def stop(self) -> None:
        if self._task is None:
            return
        self._app.state.api.stop()
        self._server.end()
        await self._task
        self._task = None
        self._path.unlink(missing_ok=True)


class EmbeddedServer(uvicorn.Server):
    """uvicorn without its signal handlers (SIGTERM is the daemon's) and without its ten ticks a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ended = asyncio.Event()

    def end(self) -> None:
        self.should_exit = True
        self._ended.set()

    async def main_loop(self) -> None:
        await self._ended.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(path: Path) -> socket.socket:
    """A listening socket of mode 0600 at `path`; a dead agent's leftover there is replaced.

    It is bound under another name and renamed into place, so that nobody can open it before its mode is set.
    """
    if answers(path):
        raise SocketInUseError(f"another agent serves {path}: stop it, or use another state_dir")
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(fresh))
        fresh.chmod(SOCKET_MODE)
        listener.listen(CONNECTIONS_MAX)
        fresh.rename(path)
    except OSError:
        listener.close()
        fresh.unlink(missing_ok=True)
        raise
    return listener


def answers(path: Path) -> bool:
    """Somebody listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno == errno.EAGAIN
        return True
