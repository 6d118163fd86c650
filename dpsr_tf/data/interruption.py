"""Ends a command on Ctrl-C or SIGTERM, also while a library runs that would swallow the exception."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def record_signals() -> Iterator[list[int]]:
    """Makes SIGTERM end the block with an exception, as Ctrl-C does, so that it can clean up.

    Yields:
        The numbers of the signals that came so far, for end_on_signal.
    """
    received: list[int] = []

    def end(number: int, _: object) -> None:
        received.append(number)
        _end(number)

    # A signal that is ignored, as under nohup, stays ignored.
    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def end_on_signal(received: Sequence[int]) -> Iterator[None]:
    """Ends the block with the exception of the first signal that came inside it, if any did.

    A signal that comes while DuckDB reads a Python object is lost otherwise: DuckDB takes the exception for an error of
    its own and raises duckdb.InvalidInputException, or nothing.
    """
    try:
        yield
    except BaseException:
        if received:
            _end(received[0])
        raise
    if received:
        _end(received[0])


def _end(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
