"""The worker: one thing after the other, and an end that waits."""

from __future__ import annotations

import asyncio
import time

import pytest

from isolator.worker import Worker


def test_one_thing_after_the_other() -> None:
    running, most = 0, 0

    def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.01)
        running -= 1
        return number

    async def run() -> list[int]:
        worker = Worker()
        done = await asyncio.gather(*(worker(work, number) for number in range(5)))
        await worker.close()
        return done

    assert asyncio.run(run()) == [0, 1, 2, 3, 4] and most == 1


def test_what_it_raises_is_raised_here() -> None:
    async def run() -> None:
        await Worker()(int, "x", base=10)

    with pytest.raises(ValueError, match="'x'"):
        asyncio.run(run())


def test_close_waits_for_what_runs_though_its_task_was_cancelled() -> None:
    done: list[str] = []

    def work() -> None:
        time.sleep(0.2)
        done.append("ended")

    async def run() -> None:
        worker = Worker()
        task = asyncio.create_task(worker(work))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(worker(done.append, "begun"))
        await asyncio.sleep(0)
        task.cancel()
        await worker.close()
        assert done == ["ended"]
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())
