"""Drawing with matplotlib without messages that a user of a command cannot act on."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_matplotlib() -> Iterator[None]:
    """Suppresses matplotlib's messages about missing fonts and characters, and about its own use of NumPy."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            # matplotlib uses NumPy in ways that NumPy 1.25 and later call deprecated.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib")
            yield
    finally:
        logger.setLevel(level)
