"""Metrics of rankings of the items shown in requests: what was ordered or clicked should come first.

Rows are items shown; the rows of a request stand together. Items with equal scores count as if chance ordered them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats

from dpsr_tf.evaluation import metrics


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


def reciprocal_ranks(request: np.ndarray, positive: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Returns 1 / the place of the first positive item, of each request that has one.

    Among items with equal scores, it is the mean over all their orders.

    Args:
        request: int [n], the rows of a request stand together.
        positive: bool [n].
        score: float [n], without NaN.

    Returns:
        float64 [requests with a positive item], in the order of their rows.
    """
    group = _groups(request)
    order = np.lexsort((-score, group))
    group, positive = group[order], positive[order]
    place, ties = _places(group), _groups_of(group, score[order])
    wins = np.bincount(ties, positive).astype(np.int64)
    first = np.unique(ties, return_index=True)[1]
    # The first run of equal scores with a positive item, of each request.
    runs = np.flatnonzero(wins)
    runs = runs[np.unique(group[first[runs]], return_index=True)[1]]
    size, before = np.bincount(ties)[runs], place[first[runs]]
    found = 1 / (before + 1.0)
    for row in np.flatnonzero(size > 1):
        # The chance that the first of k positive items among m is at place i, by the hypergeometric distribution.
        m, k = int(size[row]), int(wins[runs[row]])
        i = np.arange(m - k + 1)
        none_before = np.cumprod(np.concatenate([[1.0], (m - k - i[:-1]) / (m - i[:-1])]))
        found[row] = np.sum(none_before * k / (m - i) / (before[row] + i + 1))
    return found


class IsotonicCurve(NamedTuple):
    """A rising curve from scores to probabilities: isotonic regression, and straight lines between its points."""

    score: np.ndarray  # float64 [points], ascending
    probability: np.ndarray  # float64 [points]

    @staticmethod
    def fit(score: np.ndarray, positive: np.ndarray) -> IsotonicCurve:
        """Fits the curve to n scores, float [n], and what came of them, bool [n].

        No probability is nearer to 0 or 1 than 1 / (n + 2): what has never been seen is not impossible.
        """
        points, place, count = np.unique(score, return_inverse=True, return_counts=True)
        share = np.bincount(place, positive) / count
        fitted = scipy.optimize.isotonic_regression(share, weights=count).x
        least = 1 / (len(score) + 2)
        return IsotonicCurve(points, np.clip(fitted, least, 1 - least))

    def __call__(self, score: np.ndarray) -> np.ndarray:
        """Returns probabilities, float64 [n]; beyond the ends of the curve those of its ends."""
        return np.interp(score, self.score, self.probability)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How well probabilities fit what came of n items, summed by request.

    Attributes:
        items: float64 [requests], items of each request.
        loss, base_loss: float64 [requests], their log loss, and that of the base rate.
        expected, observed: float64 [requests, bins], sums of probabilities and positive items in bins of equal numbers
            of items, by their probability.
    """

    items: np.ndarray
    loss: np.ndarray
    base_loss: np.ndarray
    expected: np.ndarray
    observed: np.ndarray

    BINS: ClassVar[int] = 10

    @staticmethod
    def of(request: np.ndarray, positive: np.ndarray, probability: np.ndarray, base: np.ndarray) -> Calibration:
        """Sums over requests.

        Args:
            request: int [n], the rows of a request stand together.
            positive: bool [n].
            probability: float [n], above 0 and below 1.
            base: float [n], the base rate, above 0 and below 1.
        """
        group = _groups(request)
        groups, bins = int(group[-1]) + 1, Calibration.BINS
        # Items with equal probabilities are in the same bin.
        middle = scipy.stats.rankdata(probability) - 0.5
        place = group * bins + np.minimum((middle * bins / len(group)).astype(np.int64), bins - 1)

        def sums(values: np.ndarray) -> np.ndarray:
            return np.bincount(place, values, groups * bins).reshape(groups, bins)

        def loss(chance: np.ndarray) -> np.ndarray:
            return np.bincount(group, -np.log(np.where(positive, chance, 1 - chance)), groups)

        return Calibration(
            np.bincount(group).astype(np.float64), loss(probability), loss(base), sums(probability), sums(positive)
        )

    def figures(self) -> dict[str, float]:
        """Returns `ece`, `log_loss` and `log_loss_gain`."""
        found = self._figures(np.ones((1, len(self.items))))
        return {name: float(values[0]) for name, values in found.items()}

    def samples(self, samples: int, seed: int) -> dict[str, np.ndarray]:
        """Returns the figures of bootstrap samples of the requests, float64 [samples] by name."""
        found = [self._figures(weights) for weights in metrics.resamples(len(self.items), samples, seed)]
        return {name: np.concatenate([one[name] for one in found]) for name in (found[0] if found else ())}

    def _figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        items, loss, base = (weights @ values for values in (self.items, self.loss, self.base_loss))
        gaps = np.abs(weights @ self.expected - weights @ self.observed)
        return {"ece": gaps.sum(axis=1) / items, "log_loss": loss / items, "log_loss_gain": 1 - loss / base}


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
