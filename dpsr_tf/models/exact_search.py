"""Exact search over embeddings, and the order, ties and padding of every ranking. It needs NumPy only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dpsr_tf.data.store import RowsById
from dpsr_tf.data.user_requests import User

# Number of queries whose scores of all items are in memory at the same time.
_BATCH = 64

# Embeds queries: (queries [n], users [n] or None) -> float32 [n, heads, dim]. A query whose embedding is all zeros
# finds no items.
QueryEncoder = Callable[[Sequence[str], "Sequence[User] | None"], np.ndarray]


class ExactSearch:
    """Finds the items with the largest inner products by computing all of them.

    With several heads an item's score is its largest inner product over them, as at serving time (end of section 4.3),
    not the soft dot product of training.
    """

    def __init__(
        self,
        encode: QueryEncoder,
        item_ids: np.ndarray,
        item_embeddings: np.ndarray,
        personal: bool = False,
        validated: bool = False,
    ):
        """`item_ids` int64 [items], `item_embeddings` float32 [items, dim]; Retriever says what the two flags mean."""
        self._encode = encode
        self._item_ids, self._item_embeddings = np.asarray(item_ids), item_embeddings
        self._rows = RowsById(self._item_ids)
        self.personal, self.validated = personal, validated

    def __call__(self, queries: Sequence[str], users: Sequence[User] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Implements dpsr_tf.evaluation.retriever.Retriever."""
        ids, scores = no_results(len(queries), k)
        for begin in range(0, len(queries), _BATCH):
            heads = self._encode(queries[begin : begin + _BATCH], users[begin : begin + _BATCH] if users else None)
            products = functools.reduce(
                np.maximum, (heads[:, head] @ self._item_embeddings.T for head in range(heads.shape[1]))
            )
            for row in np.flatnonzero(heads.any(axis=(1, 2))):
                order = top_positions(self._item_ids, products[row], k)
                ids[begin + row, : len(order)] = self._item_ids[order]
                scores[begin + row, : len(order)] = products[row, order]
        return ids, scores

    def score(self, queries: Sequence[str], users: Sequence[User] | None, items: np.ndarray) -> np.ndarray:
        """Implements dpsr_tf.evaluation.retriever.Retriever."""
        result = np.empty(items.shape, np.float32)
        for begin in range(0, len(queries), _BATCH):
            heads = self._encode(queries[begin : begin + _BATCH], users[begin : begin + _BATCH] if users else None)
            rows = self._rows(items[begin : begin + _BATCH])
            products = np.matmul(self._item_embeddings[rows], heads.transpose(0, 2, 1)).max(axis=2)
            result[begin : begin + _BATCH] = np.where(rows >= 0, products, np.nan)
        return result


def best_of_blocks(
    heads: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Finds what ExactSearch finds, over items that come in blocks and are never in memory all at once.

    Args:
        heads: embeddings of queries, float32 [n, heads, dim]; zero for a query that finds nothing.
        blocks: ids int64 [m] and embeddings float32 [m, dim] of some items each.
        k: number of items to find for each query.

    Returns:
        Ids int64 [n, k] and scores float32 [n, k], padded as by `no_results`.
    """
    ids, scores = no_results(len(heads), k)
    for block_ids, embeddings in blocks:
        for begin in range(0, len(heads), _BATCH):
            part = heads[begin : begin + _BATCH]
            products = functools.reduce(np.maximum, (part[:, head] @ embeddings.T for head in range(part.shape[1])))
            # An item with the score of the last one may have a lower id.
            enters = ~(products < scores[begin : begin + _BATCH, -1:])
            for row in np.flatnonzero(enters.any(axis=1) & part.any(axis=(1, 2))):
                new, at = np.flatnonzero(enters[row]), begin + row
                found_ids = np.concatenate([ids[at], block_ids[new]])
                found_scores = np.concatenate([scores[at], products[row, new]])
                order = top_positions(found_ids, found_scores, k)
                ids[at], scores[at] = found_ids[order], found_scores[order]
    return ids, scores


def top_positions(ids: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    """Returns the positions of the k highest `scores` [n]. Ties go by ascending id, also at rank k; NaN comes last."""
    if k < len(scores):
        # Keep every item that ties with the k-th one, so that ids decide which of them are returned.
        kept = np.flatnonzero(~(scores < -np.partition(-scores, k - 1)[k - 1]))
    else:
        kept = np.arange(len(scores))
    return kept[np.lexsort((ids[kept], -scores[kept]))][:k]


def is_repeat(ids: np.ndarray) -> np.ndarray:
    """Returns bool [n, k]: whether the same id stands further left in its row of `ids` [n, k]."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    repeat = np.zeros(ids.shape, bool)
    np.put_along_axis(repeat, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeat


def no_results(num_queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an answer without items: ids -1 and scores -inf, [num_queries, k] each."""
    return np.full((num_queries, k), -1, np.int64), np.full((num_queries, k), -np.inf, np.float32)
