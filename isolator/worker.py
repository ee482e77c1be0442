"""One thread for what blocks, so that the event loop goes on reading packets: one thing after the other."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def uncollected(work: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """Without looking for cycles meanwhile: among many new objects that live on it takes half of the time, in vain."""
    gc.disable()
    try:
        return work(*arguments, **named)
    finally:
        gc.enable()


class Worker:
    """`await worker(function, argument, …)`: runs it there. What it raises is raised here."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker")

    async def __call__(self, work: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, partial(work, *arguments, **named)
        )

    async def close(self) -> None:
        """Returns when what runs has ended; what has not begun never does."""
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
