"""Metrics: ranked lists, top-k among 1,024 items, AUC, bootstrap intervals and paired tests.

The metrics of ranked lists are one number per query, so the figure of any slice or resample of the queries is a mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ir_measures
import numpy as np
import scipy.stats
from ir_measures import RR, P, R, nDCG

from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.models.exact_search import is_repeat

# Number of items among which top-k ranks a relevant item, itself included (section 6.2.1).
NUM_CANDIDATES = 1024
TOP_K = (1, 10)
CONFIDENCE = 0.95
# Limits of memory: size of a block of resampled numbers, and number of queries whose answers are texts at once.
_BLOCK = 10_000_000
_QUERIES = 4096


def counted(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns which places of the answers hold a valid result, bool [n, k].

    An id of -1, a repeat of an earlier item of the answer, and a score of NaN are not valid. Such a place stays empty:
    later items do not move up.
    """
    return (ids >= 0) & ~is_repeat(ids) & ~np.isnan(scores)


def ranked_metrics(
    ids: np.ndarray, scores: np.ndarray, judgments: Judgments, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Computes recall@k, precision@k, mrr@k and ndcg@k of each query for each of `ks`, by ir-measures (trec_eval).

    Items are ranked in the order of `ids`; of the scores only NaN matters (see `counted`). An item without a judgment
    is not relevant. The gain of NDCG is the grade, or 0 if it is negative or missing; the discount is log2(rank + 1).

    Args:
        ids: item ids int64 [n, m], m >= max(ks), padded with -1.
        scores: float [n, m].
        judgments: n queries.
        ks: cut-offs.

    Returns:
        name -> float64 [n].
    """
    parts = [
        _ranked_metrics(
            ids[begin : begin + _QUERIES],
            scores[begin : begin + _QUERIES],
            judgments.take(range(begin, min(begin + _QUERIES, len(ids)))),
            ks,
        )
        for begin in range(0, len(ids), _QUERIES)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _ranked_metrics(
    ids: np.ndarray, scores: np.ndarray, judgments: Judgments, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    relevant = {str(row): dict.fromkeys(map(str, items), 1) for row, items in enumerate(judgments.relevant)}
    gains = _integer_gains(judgments)
    holds = counted(ids, scores)
    run = {}
    for row, (row_ids, row_holds) in enumerate(zip(ids.tolist(), holds.tolist(), strict=True)):
        # An empty place holds a made-up item that is not judged. The scores fall with the place, so that the library
        # keeps the system's order also where the system's scores are equal.
        run[str(row)] = {
            str(item) if is_result else f"empty {place}": -float(place)
            for place, (item, is_result) in enumerate(zip(row_ids, row_holds, strict=True))
        }
    found: dict[Any, np.ndarray] = {}
    binary = [RR, *(measure @ k for k in ks for measure in (R, P))]
    graded = [nDCG @ k for k in ks]
    for measures, qrels in ((binary, relevant), (graded, gains)):
        for measure in measures:
            found[measure] = np.zeros(len(judgments.queries))
        for metric in ir_measures.iter_calc(measures, qrels, run):
            found[metric.measure][int(metric.query_id)] = metric.value
    named = {f"recall@{k}": found[R @ k] for k in ks}
    named |= {f"precision@{k}": found[P @ k] for k in ks}
    # The first relevant item counts if its rank, which is 1 / RR, is at most k.
    named |= {f"mrr@{k}": np.where(found[RR] * (k + 0.5) > 1, found[RR], 0.0) for k in ks}
    named |= {f"ndcg@{k}": found[nDCG @ k] for k in ks}
    return named


def _integer_gains(judgments: Judgments) -> dict[str, dict[str, int]]:
    """Returns the grades as whole numbers, as trec_eval needs them. A common factor does not change NDCG, a ratio."""
    if not judgments.grades:
        return {str(row): dict.fromkeys(map(str, items), 1) for row, items in enumerate(judgments.relevant)}
    values = np.array([grade for grades in judgments.grades for grade in grades.values()])
    values = np.maximum(values, 0)
    factor = next(
        (f for f in (1, 10, 100, 1000) if np.allclose(values * f, np.round(values * f), rtol=0, atol=1e-6)), 0
    )
    # trec_eval keeps a count of every grade up to the highest, so the highest grade must stay small.
    if not factor or values.max(initial=0) * factor > 10_000:
        factor = 10_000 / max(values.max(initial=0), 1e-30)
    return {
        str(row): {str(item): round(max(grade, 0.0) * factor) for item, grade in grades.items()}
        for row, grades in enumerate(judgments.grades)
    }


def has_candidates(judgments: Judgments, item_ids: np.ndarray) -> bool:
    """Returns whether there are 1,023 items for each query that are not relevant to it, as top-k needs."""
    return len(item_ids) - max(map(len, judgments.relevant)) >= NUM_CANDIDATES - 1


def top_k_candidates(judgments: Judgments, item_ids: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Draws 1,023 distinct items for each query, uniformly among those not relevant to it. Ids int64 [n, 1023]."""
    count = NUM_CANDIDATES - 1
    rng = np.random.default_rng([*seed, 1])
    ordered = np.sort(item_ids)
    candidates = np.empty((len(judgments.queries), count), np.int64)
    for row, relevant in enumerate(judgments.relevant):
        excluded = np.unique(np.searchsorted(ordered, relevant))
        free = rng.choice(len(ordered) - len(excluded), count, replace=False, shuffle=False)
        # Map the number of an item among those left to its number among all: add the excluded items before it.
        candidates[row] = ordered[free + np.searchsorted(excluded - np.arange(len(excluded)), free, side="right")]
    return candidates


def rank_within(relevant: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """Returns the probability that an item ranks within k among others; ties are resolved by chance, NaN is -inf.

    Args:
        relevant: scores float [n, items] of items, each of which is ranked alone among the others.
        others: scores float [n, m] of the other items.
        k: cut-off.

    Returns:
        float64 [n, items].
    """
    relevant, others = (np.where(np.isnan(scores), -np.inf, scores) for scores in (relevant, others))
    ordered = np.sort(others, axis=1)
    result = np.empty(relevant.shape)
    for row in range(len(relevant)):
        above = ordered.shape[1] - np.searchsorted(ordered[row], relevant[row], side="right")
        ties = ordered.shape[1] - np.searchsorted(ordered[row], relevant[row], side="left") - above
        # The rank is one of above + 1 .. above + ties + 1, all equally likely.
        result[row] = np.clip((k - above) / (ties + 1), 0, 1)
    return result


@dataclasses.dataclass(frozen=True)
class LabelledPairs:
    """The p judged pairs in ascending order of their scores, from which AUC is computed.

    Attributes:
        query: query of each pair, int64 [p]. Queries with a relevant item come first, as in Judgments, then the others.
        relevant: whether each pair is relevant, bool [p].
        begins: the first pair of each distinct score.
        num_queries: number of queries of both kinds.
    """

    query: np.ndarray
    relevant: np.ndarray
    begins: np.ndarray
    num_queries: int

    @staticmethod
    def of(query: np.ndarray, relevant: np.ndarray, scores: np.ndarray, num_queries: int) -> LabelledPairs:
        """Sorts pairs by their scores; NaN counts as -inf."""
        scores = np.where(np.isnan(scores), -np.inf, scores)
        order = np.argsort(scores, kind="stable")
        ordered = scores[order]
        begins = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.int64)
        return LabelledPairs(query[order], relevant[order], begins, num_queries)

    def auc_samples(self, inside: np.ndarray, samples: int, seed: int) -> np.ndarray:
        """Returns AUC for bootstrap samples of the queries that are `inside`, bool [num_queries]: float64 [samples].

        The same seed draws the same queries for all systems.
        """
        found = [np.zeros(0)]
        for drawn in resamples(int(inside.sum()), samples, seed):
            weights = np.zeros((len(drawn), self.num_queries))
            weights[:, inside] = drawn
            found.append(self.auc(weights))
        return np.concatenate(found)

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """Returns the probability that a relevant pair scores above one that is not; a tie counts half.

        The pairs of all queries are compared with each other.

        Args:
            weights: float [samples, num_queries], how often each query is in a sample.

        Returns:
            float64 [samples]; NaN if a sample lacks relevant pairs or pairs that are not relevant.
        """
        result = np.full(len(weights), np.nan)
        if not len(self.query):
            return result
        step = max(1, _BLOCK // len(self.query))
        for begin in range(0, len(weights), step):
            of_pair = weights[begin : begin + step, self.query].astype(np.float64)
            positive = np.add.reduceat(of_pair * self.relevant, self.begins, axis=1)
            negative = np.add.reduceat(of_pair * ~self.relevant, self.begins, axis=1)
            below = np.cumsum(negative, axis=1) - negative
            won = (positive * (below + negative / 2)).sum(axis=1)
            all_pairs = positive.sum(axis=1) * negative.sum(axis=1)
            np.divide(won, all_pairs, out=result[begin : begin + step], where=all_pairs > 0)
        return result


def resamples(count: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each of `count` queries is in each bootstrap sample, in blocks float64 [samples, count]."""
    rng = np.random.default_rng([seed, 2])
    step = max(1, _BLOCK // max(1, count))
    for begin in range(0, samples, step):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(step, samples - begin))
        yield drawn.astype(np.float64)


def bootstrap_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Returns the means of `values` [queries, metrics] over bootstrap samples of the queries: [samples, metrics]."""
    count = len(values)
    return np.concatenate([weights @ values / count for weights in resamples(count, samples, seed)])


def interval(samples: np.ndarray) -> list[float] | None:
    """Returns the percentile interval [low, high] of CONFIDENCE of `samples`; None if all samples are NaN."""
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return None
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return [float(low), float(high)]


def compare(
    system: Mapping[str, np.ndarray],
    baseline: Mapping[str, np.ndarray],
    samples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Compares two systems query by query, in each figure that both have.

    Returns:
        name -> `difference` of the means, its bootstrap `interval` (None without samples), and the two-sided p-values
        of the paired t-test, `p_t_test`, and of Wilcoxon's signed-rank test, `p_wilcoxon`. Both p-values are 1 if no
        query differs, and None if there is only one query.
    """
    names = [name for name in system if name in baseline]
    differences = np.stack([system[name] - baseline[name] for name in names], axis=1)
    means = bootstrap_means(differences, samples, seed) if samples else np.full((1, len(names)), np.nan)
    result: dict[str, dict[str, Any]] = {}
    for column, name in enumerate(names):
        difference = differences[:, column]
        p_t_test = p_wilcoxon = 1.0 if len(difference) > 1 else None
        if len(difference) > 1 and difference.any():
            # If all queries differ by the same amount, the statistic of the t-test is infinite.
            constant = np.ptp(difference) == 0
            p_t_test = 0.0 if constant else float(scipy.stats.ttest_1samp(difference, 0).pvalue)
            p_wilcoxon = float(scipy.stats.wilcoxon(difference, method="approx").pvalue)
        result[name] = {
            "difference": float(difference.mean()),
            "interval": interval(means[:, column]),
            "p_t_test": p_t_test,
            "p_wilcoxon": p_wilcoxon,
        }
    return result
