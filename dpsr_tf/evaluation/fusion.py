"""Fusion: several retrievers combined into one ranked list."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpsr_tf.data.user_requests import User
from dpsr_tf.evaluation.retriever import Retriever, ask, is_personal, is_validated
from dpsr_tf.models.exact_search import is_repeat, no_results, top_positions


class Fusion:
    """Several retrievers combined into one. Each is asked for `depth` items, or for k if that is more.

    Without weights this is reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009): an item's score is the
    sum over the retrievers of 1 / (60 + rank). With weights an item's score is the weighted sum of its scores; the
    scores that a retriever returned for a query are scaled to 0 .. 1 (to 1 if they are all equal). A retriever that did
    not return an item adds nothing to its score.
    """

    RANK_CONSTANT = 60

    def __init__(self, parts: Sequence[Retriever], weights: Sequence[float] | None = None, depth: int = 1000):
        """Takes the retrievers and a weight for each of them; no weights means reciprocal rank fusion."""
        self._parts, self._weights, self._depth = parts, weights, depth
        self.personal = any(is_personal(part) for part in parts)
        self.validated = any(is_validated(part) for part in parts)

    def __call__(self, queries: Sequence[str], users: Sequence[User] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retriever."""
        depth = max(k, self._depth)
        all_ids, all_shares = [], []
        for row, part in enumerate(self._parts):
            found, part_scores = ask(part, queries, users, depth)
            counts = (found >= 0) & ~is_repeat(found) & ~np.isnan(part_scores)
            if self._weights is None:
                share = np.broadcast_to(1 / (self.RANK_CONSTANT + 1 + np.arange(depth)), found.shape)
            else:
                share = self._weights[row] * _to_unit(part_scores, counts)
            all_ids.append(np.where(counts, found, -1))
            all_shares.append(share)
        united, shares = np.concatenate(all_ids, axis=1), np.concatenate(all_shares, axis=1)
        ids, scores = no_results(len(queries), k)
        for row in range(len(queries)):
            there = united[row] >= 0
            items, which = np.unique(united[row][there], return_inverse=True)
            # Sum in float32: sums of the same numbers in another order then tie.
            sums = np.bincount(which, shares[row][there], len(items)).astype(np.float32)
            order = top_positions(items, sums, k)
            ids[row, : len(order)], scores[row, : len(order)] = items[order], sums[order]
        return ids, scores


def _to_unit(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Scales the scores of each row to 0 .. 1, by those that `counts` marks."""
    finite = np.clip(scores.astype(np.float64), -1e30, 1e30)
    low = np.where(counts, finite, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    high = np.where(counts, finite, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    width = np.where(high > low, high - low, 1)
    return np.where(high > low, (finite - np.where(counts.any(axis=1, keepdims=True), low, 0)) / width, 1)
