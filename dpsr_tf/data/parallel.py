"""Work on several threads whose results come in the order of the input."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """A pool of threads."""

    def __init__(self, threads: int):
        """Starts a pool of `threads` threads."""
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Workers:
        """Returns the pool itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Waits for running work and drops the rest."""
        self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[T], R], values: Iterable[T]) -> Iterator[R]:
        """Applies a function to each value and yields the results in the order of the values.

        Unlike ThreadPoolExecutor.map it reads only a few values ahead, so that memory does not grow with their number.
        """
        waiting: collections.deque[Future[R]] = collections.deque()
        try:
            for value in values:
                waiting.append(self._pool.submit(function, value))
                if len(waiting) > self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
