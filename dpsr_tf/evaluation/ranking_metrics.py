"""Metrics of rankings of the items shown in requests: what was ordered or clicked should come first.

Rows are items shown; the rows of a request stand together. Items with equal scores count as if chance ordered them.
"""

from __future__ import annotations

import numpy as np


def session_auc(request: np.ndarray, positive: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Returns the AUC of each request that has a positive item and another one.

    It is the share of pairs of a positive item and another one in which the positive one has the higher score; equal
    scores count half. The paper's session AUC (section 3 of the paper on DPR) is the mean, with orders as positives.

    Args:
        request: int [n], the rows of a request stand together.
        positive: bool [n].
        score: float [n], without NaN.

    Returns:
        float64 [requests with both kinds of items], in the order of their rows.
    """
    group = _groups(request)
    groups = int(group[-1]) + 1 if len(group) else 0
    rank = _ranks(group, score)
    positives = np.bincount(group, positive, groups)
    others = np.bincount(group, ~positive, groups)
    sums = np.bincount(group, np.where(positive, rank, 0), groups)
    both = (positives > 0) & (others > 0)
    wins = sums - positives * (positives + 1) / 2
    return wins[both] / (positives * others)[both]


def ndcg(request: np.ndarray, gain: np.ndarray, score: np.ndarray, k: int) -> np.ndarray:
    """Returns the NDCG@k of each request that has an item with a gain above 0.

    The discount of place p, from 1 on, is 1 / log2(p + 1). Items with equal scores share the mean of their discounts.

    Args:
        request: int [n], the rows of a request stand together.
        gain: float [n], 0 or more; for example 2^outcome - 1.
        score: float [n], without NaN.
        k: number of places that count.

    Returns:
        float64 [requests with a gain], in the order of their rows.
    """
    group = _groups(request)
    groups = int(group[-1]) + 1 if len(group) else 0
    ideal = _discounted(group, gain, gain, k, groups)
    found = _discounted(group, gain, score, k, groups)
    some = ideal > 0
    return found[some] / ideal[some]


def _discounted(group: np.ndarray, gain: np.ndarray, score: np.ndarray, k: int, groups: int) -> np.ndarray:
    order = np.lexsort((-score, group))
    ordered_group, ordered_score = group[order], score[order]
    place = _places(ordered_group)
    discount = np.where(place < k, 1 / np.log2(place + 2), 0)
    ties = _groups_of(ordered_group, ordered_score)
    mean = np.bincount(ties, discount) / np.maximum(np.bincount(ties), 1)
    return np.bincount(ordered_group, gain[order] * mean[ties], groups)


def _ranks(group: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Returns the rank of each score in its group, from 1 for the lowest on; equal scores get the mean of theirs."""
    order = np.lexsort((score, group))
    place = _places(group[order]) + 1
    ties = _groups_of(group[order], score[order])
    rank = np.empty(len(group))
    rank[order] = (np.bincount(ties, place) / np.maximum(np.bincount(ties), 1))[ties]
    return rank


def _groups(request: np.ndarray) -> np.ndarray:
    """Numbers the requests of rows that stand together, from 0 on."""
    return np.cumsum(np.diff(request, prepend=request[:1]) != 0)


def _groups_of(group: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Numbers runs of equal scores within groups, from 0 on."""
    new = np.ones(len(group), bool)
    new[1:] = (group[1:] != group[:-1]) | (score[1:] != score[:-1])
    return np.cumsum(new) - 1


def _places(group: np.ndarray) -> np.ndarray:
    """Returns the place of each row in its group, from 0 on; the rows of a group stand together."""
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(begins, np.diff(np.append(begins, len(group))))
