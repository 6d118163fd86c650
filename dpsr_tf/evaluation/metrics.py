"""The figures: ranked lists, top-k among 1,024 items, AUC, coverage, intervals and paired tests.

All figures of ranked lists are one number a query, so that any slice and any resample of the queries is a mean.
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

# Section 6.2.1: a relevant item among so many in all.
NUM_CANDIDATES = 1024
TOP_K = (1, 10)
CONFIDENCE = 0.95
# Numbers of a resampled matrix, and queries whose answers are texts, that are in memory at once.
_BLOCK = 10_000_000
_QUERIES = 4096


def counted(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Which places of the answers [n, k] hold a result: bool.

    An id of -1 is none, nor is an item that stands further left already, nor one whose score is NaN. Such a place is
    lost: what comes after it does not move up.
    """
    return (ids >= 0) & ~is_repeat(ids) & ~np.isnan(scores)


def ranked_metrics(
    ids: np.ndarray, scores: np.ndarray, judgments: Judgments, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """recall@k, precision@k, mrr@k and ndcg@k of each query for each of `ks`, by ir-measures (trec_eval).

    The order is that of `ids`; scores play no part but for NaN (see `counted`). An item that nobody judged is not
    relevant. NDCG's gain is the grade, 0 where it is negative or missing; its discount log2(rank + 1).

    Args:
        ids: item ids int64 [n, at least max(ks)], -1 is none.
        scores: float [n, same].
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
        # A place that is lost holds an item that nobody knows. Falling numbers: the order is the system's, and equal
        # scores must not let the library choose another.
        run[str(row)] = {
            str(item) if is_result else f"lost {place}": -float(place)
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
    # The first relevant item counts if its rank, one over RR, is within k.
    named |= {f"mrr@{k}": np.where(found[RR] * (k + 0.5) > 1, found[RR], 0.0) for k in ks}
    named |= {f"ndcg@{k}": found[nDCG @ k] for k in ks}
    return named


def _integer_gains(judgments: Judgments) -> dict[str, dict[str, int]]:
    """Grades as trec_eval wants them, whole numbers. NDCG is a ratio: a common factor does not change it."""
    if not judgments.grades:
        return {str(row): dict.fromkeys(map(str, items), 1) for row, items in enumerate(judgments.relevant)}
    values = np.array([grade for grades in judgments.grades for grade in grades.values()])
    values = np.maximum(values, 0)
    factor = next(
        (f for f in (1, 10, 100, 1000) if np.allclose(values * f, np.round(values * f), rtol=0, atol=1e-6)), 0
    )
    if (
        not factor or values.max(initial=0) * factor > 10_000
    ):  # trec_eval keeps a count of every grade up to the highest
        factor = 10_000 / max(values.max(initial=0), 1e-30)
    return {
        str(row): {str(item): round(max(grade, 0.0) * factor) for item, grade in grades.items()}
        for row, grades in enumerate(judgments.grades)
    }


def has_candidates(judgments: Judgments, item_ids: np.ndarray) -> bool:
    """Whether the corpus has 1,023 items for each query that are not relevant to it: top-k compares like with like."""
    return len(item_ids) - max(map(len, judgments.relevant)) >= NUM_CANDIDATES - 1


def top_k_candidates(judgments: Judgments, item_ids: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """1,023 distinct items for each query, uniform among those that are not relevant to it: ids int64 [n, 1023]."""
    count = NUM_CANDIDATES - 1
    rng = np.random.default_rng([*seed, 1])
    ordered = np.sort(item_ids)
    candidates = np.empty((len(judgments.queries), count), np.int64)
    for row, relevant in enumerate(judgments.relevant):
        excluded = np.unique(np.searchsorted(ordered, relevant))
        free = rng.choice(len(ordered) - len(excluded), count, replace=False, shuffle=False)
        # The i-th of the items that are left: past every excluded one that has at most i others before it.
        candidates[row] = ordered[free + np.searchsorted(excluded - np.arange(len(excluded)), free, side="right")]
    return candidates


def rank_within(relevant: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """Probability that an item ranks within k among others, ties resolved by chance; NaN counts as -inf.

    Args:
        relevant: scores float [n, items], each ranked alone.
        others: scores float [n, m] of the items it is ranked among.
        k: places.

    Returns:
        float64 [n, items].
    """
    relevant, others = (np.where(np.isnan(scores), -np.inf, scores) for scores in (relevant, others))
    ordered = np.sort(others, axis=1)
    result = np.empty(relevant.shape)
    for row in range(len(relevant)):
        above = ordered.shape[1] - np.searchsorted(ordered[row], relevant[row], side="right")
        ties = ordered.shape[1] - np.searchsorted(ordered[row], relevant[row], side="left") - above
        # Its rank is one of above + 1 .. above + ties + 1, each as likely.
        result[row] = np.clip((k - above) / (ties + 1), 0, 1)
    return result


@dataclasses.dataclass(frozen=True)
class LabelledPairs:
    """Scores of judged pairs, p in all, in ascending order: what AUC is made of.

    Attributes:
        query: int64 [p]: queries with a relevant item come first, as in Judgments, then the unanswered ones.
        relevant: bool [p].
        begins: first pair of each distinct score.
        num_queries: queries of both kinds.
    """

    query: np.ndarray
    relevant: np.ndarray
    begins: np.ndarray
    num_queries: int

    @staticmethod
    def of(query: np.ndarray, relevant: np.ndarray, scores: np.ndarray, num_queries: int) -> LabelledPairs:
        """Sorts the pairs; a NaN score counts as -inf."""
        scores = np.where(np.isnan(scores), -np.inf, scores)
        order = np.argsort(scores, kind="stable")
        ordered = scores[order]
        begins = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.int64)
        return LabelledPairs(query[order], relevant[order], begins, num_queries)

    def auc_samples(self, inside: np.ndarray, samples: int, seed: int) -> np.ndarray:
        """AUC over bootstrap samples of the queries that are `inside`, bool [num_queries]: float64 [samples].

        The same seed draws the same queries, whatever the scores.
        """
        found = [np.zeros(0)]
        for drawn in resamples(int(inside.sum()), samples, seed):
            weights = np.zeros((len(drawn), self.num_queries))
            weights[:, inside] = drawn
            found.append(self.auc(weights))
        return np.concatenate(found)

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """Probability that a relevant pair scores above one that is not, ties half, over all pairs of all queries.

        Args:
            weights: float [samples, num_queries], how often each query is in a sample.

        Returns:
            float64 [samples]; NaN where a sample has no pairs of one of the two kinds.
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
    """How often each of `count` queries is in each of `samples` bootstrap samples: float64 [some, count] at a time."""
    rng = np.random.default_rng([seed, 2])
    step = max(1, _BLOCK // max(1, count))
    for begin in range(0, samples, step):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(step, samples - begin))
        yield drawn.astype(np.float64)


def bootstrap_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Means of `values` [queries, metrics] over bootstrap samples of the queries: [samples, metrics]."""
    count = len(values)
    return np.concatenate([weights @ values / count for weights in resamples(count, samples, seed)])


def interval(samples: np.ndarray) -> list[float] | None:
    """The bootstrap percentile interval of CONFIDENCE of `samples` [samples]; None where nothing is known."""
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
    """Paired comparison, query by query, of each figure that both have.

    Returns:
        name -> `difference` of the means, its bootstrap `interval` (None without samples), and the two-sided p-values
        of the paired t-test, `p_t_test`, and of Wilcoxon's signed-rank test, `p_wilcoxon`; both 1 where no query
        differs, None where there is one query only.
    """
    names = [name for name in system if name in baseline]
    differences = np.stack([system[name] - baseline[name] for name in names], axis=1)
    means = bootstrap_means(differences, samples, seed) if samples else np.full((1, len(names)), np.nan)
    result: dict[str, dict[str, Any]] = {}
    for column, name in enumerate(names):
        difference = differences[:, column]
        p_t_test = p_wilcoxon = 1.0 if len(difference) > 1 else None
        if len(difference) > 1 and difference.any():
            # Where all queries differ by the same the statistic is infinite.
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
