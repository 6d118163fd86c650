"""The retriever protocol: how evaluation asks anything that finds items for queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dpsr_tf.data.user_requests import User


class Retriever(Protocol):
    """Anything that finds items for queries: a baseline, a model, an index, a servable, a server.

    Three attributes are optional. `personal = True` says that the answers depend on the user; retrievers without it are
    given no users. `validated = True` says that a training looked at the validation fold of the held-out interactions.
    `score(queries, users, items)`, with items int64 [n, m], returns the score of each pair of query and
    item, float32 [n, m], whether or not the item would be retrieved. An item of -1 is padding; its score is ignored.
    Top-k among 1,024 items and AUC need `score`.
    """

    def __call__(self, queries: Sequence[str], users: Sequence[User] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Retrieves the k best items of each query.

        Args:
            queries: n texts.
            users: n users, or None if they are anonymous.
            k: number of items to return.

        Returns:
            Item ids int64 [n, k] and scores float32 [n, k], best first, padded with -1 and -inf.
        """
        ...


def ask(
    retriever: Retriever, queries: Sequence[str], users: Sequence[User] | None, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Calls the retriever, without users if it is not personal. Raises ValueError if a shape is wrong."""
    ids, scores = retriever(queries, users if is_personal(retriever) else None, k)
    if ids.shape != (len(queries), k) or scores.shape != ids.shape:
        raise ValueError(
            f"the retriever returned ids {list(ids.shape)} and scores {list(scores.shape)}, "
            f"expected both [{len(queries)}, {k}]"
        )
    return ids, scores


def is_validated(retriever: Retriever) -> bool:
    """Returns whether the training of the retriever looked at the validation fold of the held-out interactions."""
    return bool(getattr(retriever, "validated", False))


def is_personal(retriever: Retriever) -> bool:
    """Returns whether the answers of the retriever depend on the user."""
    return bool(getattr(retriever, "personal", False))
