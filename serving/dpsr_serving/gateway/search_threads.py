"""Threads that search the inverted index for an event loop.

A ThreadPoolExecutor does the same, but its futures have locks and callbacks of their own, and asyncio wraps them in
others. Every request would pay for that twice.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class ThreadsBusyError(Exception):
    """Too many searches are under way or wait for a thread."""


class SearchThreads:
    """A fixed number of threads. Create and use it within one event loop.

    Attributes:
        cpu_s: seconds of CPU time that the work took, all threads together.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        """`waiting`: number of searches that may wait for a thread."""
        self.cpu_s = 0.0
        self._most = threads + waiting
        self._under_way = 0  # or waiting for a thread
        self._is_closed = False
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._threads = [
            threading.Thread(target=self._work, name=f"inverted-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, work: Callable[[], T], timeout_s: float) -> T:
        """Returns the result of `work`, which a thread calls.

        Work that is late goes on in its thread, because nothing can stop it; work that did not begin yet is left out.

        Raises:
            ThreadsBusyError: there is too much to do already.
            TimeoutError: it took longer than `timeout_s`. So does work that raises.
        """
        if self._under_way >= self._most:
            words = f"{self._under_way} searches of the inverted index are under way or wait for a thread"
            raise ThreadsBusyError(words)
        self._under_way += 1
        done: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put((work, done))
        timer = self._loop.call_later(timeout_s, _expire, done)
        try:
            return await done
        finally:
            timer.cancel()

    def close(self) -> None:
        """Ends the threads when they have done what is under way. Work that waits is not done any more."""
        self._is_closed = True
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, done = job
            start, result, error = time.thread_time(), None, None
            if not (done.done() or self._is_closed):
                try:
                    result = work()
                except BaseException as raised:
                    error = raised
            cpu_s = time.thread_time() - start
            try:
                self._loop.call_soon_threadsafe(self._finish, done, result, error, cpu_s)
            except RuntimeError:  # the loop is closed
                return

    def _finish(self, done: asyncio.Future[Any], result: Any, error: BaseException | None, cpu_s: float) -> None:
        self._under_way -= 1
        self.cpu_s += cpu_s
        if done.done():  # late, or its request is gone
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)


def _expire(done: asyncio.Future[Any]) -> None:
    if not done.done():
        done.set_exception(asyncio.TimeoutError())
