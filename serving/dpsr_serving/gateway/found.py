"""The interface of inverted indexes, and the lists that sources find."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpsr_serving.gateway.catalogue import Catalogue, Condition

Filters = Mapping[str, Any] | tuple[Condition, ...] | None

# The largest k of one search.
MAX_K = 10_000


@dataclasses.dataclass(frozen=True)
class Found:
    """What a source found, best first.

    Attributes:
        ids: int64 [m], distinct.
        scores: float32 [m], descending.
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        """Returns the number of items."""
        return len(self.ids)

    @classmethod
    def nothing(cls) -> Found:
        """Returns an empty list."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.float32))


class InvertedIndex(Protocol):
    """Finds items by words. Implementations are thread-safe."""

    catalogue: Catalogue

    def search(self, texts: Sequence[tuple[str, float]], k: int, filters: Filters = None) -> Found:
        """Finds the best k items.

        Args:
            texts: a query and its rewrites, each with a weight above 0. An item is found if it has a word of any of
                them. Its score is the weighted sum of its BM25 scores for the texts.
            k: largest number of items, 1 to MAX_K.
            filters: as Catalogue.conditions reads them, or its result.

        Raises:
            ValueError: a filter is wrong, or k is out of range.
            CommandError: the engine does not answer.
        """
        ...

    def prepare(self, texts: Sequence[tuple[str, float]], k: int, filters: Filters = None) -> Callable[[], Found]:
        """Returns a function that searches, with the arguments and the errors of `search`.

        What Python does before, which takes little time, is done at once: several threads of Python disturb each other.
        The function spends its time in the engine, or waits for it.
        """
        ...

    def identifier(self, text: str) -> NDArray[np.int64]:
        """Returns the ids of the items of which `text` is the exact identifier; [] if there is none."""
        ...

    def tokens(self, text: str) -> list[str]:
        """Returns the words that a search for `text` looks up, for people."""
        ...


def check_k(k: int) -> None:
    """Raises ValueError unless k is in range."""
    if not 0 < k <= MAX_K:
        raise ValueError(f"k={k}: expected 1 to {MAX_K:,}")
