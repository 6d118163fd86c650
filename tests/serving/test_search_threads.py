"""The threads that search the inverted index: results, errors, deadlines, limits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from processes import PATIENCE_S

from dpsr_serving.gateway.search_threads import SearchThreads, ThreadsBusyError


def with_threads(test: Callable[[SearchThreads], Awaitable[Any]], threads: int = 1, waiting: int = 1) -> Any:
    async def run() -> Any:
        made = SearchThreads(threads, waiting)
        try:
            return await test(made)
        finally:
            made.close()

    return asyncio.run(run())


async def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done() and time.monotonic() < end:
        await asyncio.sleep(0.005)
    assert done()


def test_results_errors_and_cpu_time() -> None:
    def spin() -> str:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        return threading.current_thread().name

    def fail() -> None:
        raise OSError("the disk is gone")

    async def test(threads: SearchThreads) -> None:
        assert await threads.run(spin, PATIENCE_S) == "inverted-0"
        assert threads.cpu_s >= 0.02
        with pytest.raises(OSError, match="the disk is gone"):
            await threads.run(fail, PATIENCE_S)
        assert await threads.run(lambda: 7, PATIENCE_S) == 7  # the thread goes on after an error

    with_threads(test)


def test_work_that_is_late_and_too_much_work() -> None:
    release = threading.Event()
    begun: list[int] = []

    async def test(threads: SearchThreads) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await threads.run(lambda: release.wait(PATIENCE_S), 0.02)  # goes on in the thread
        with pytest.raises(asyncio.TimeoutError):
            await threads.run(lambda: begun.append(1), 0.02)  # waits for the thread
        with pytest.raises(ThreadsBusyError, match="2 searches"):
            await threads.run(lambda: begun.append(2), PATIENCE_S)
        release.set()
        await until(lambda: not threads._under_way)
        assert not begun  # nobody waited for it any more when the thread was free
        await threads.run(lambda: begun.append(3), PATIENCE_S)
        assert begun == [3]

    try:
        with_threads(test)
    finally:
        release.set()


def test_a_request_that_is_given_up_frees_its_place() -> None:
    async def test(threads: SearchThreads) -> None:
        release = threading.Event()
        task = asyncio.create_task(threads.run(lambda: release.wait(PATIENCE_S), PATIENCE_S))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
        await until(lambda: not threads._under_way)

    with_threads(test, waiting=0)
