"""Metrics against a second implementation, on random answers with gaps, repeats, NaN and ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.evaluation.measure import Options, measure_all
from dpsr_tf.evaluation.metrics import bootstrap_means, interval


class Table:
    """A retriever that answers from a table and scores pairs by a matrix [queries, items]."""

    def __init__(self, ids, scores, pairs):
        self._ids, self._scores, self._pairs = ids, scores, pairs

    def __call__(self, queries, users, k):
        rows = [int(query) for query in queries]
        return self._ids[rows, :k], self._scores[rows, :k]

    def score(self, queries, users, items):
        rows = np.array([int(query) for query in queries])
        return self._pairs[rows[:, None], np.maximum(items, 0)]


def by_hand(ids, scores, relevant, grades, k):
    """Returns recall, precision, mrr and ndcg of one query."""
    places, seen = [], set()
    for item, score in zip(ids.tolist(), scores.tolist(), strict=True):
        lost = item < 0 or item in seen or math.isnan(score)
        seen.add(item)
        places.append(None if lost else item)
    head = places[:k]
    hits = [item in relevant for item in head]
    gain = [max(grades.get(item, 0), 0) / math.log2(place + 2) for place, item in enumerate(head) if item is not None]
    ideal = sorted((max(grade, 0) for grade in grades.values()), reverse=True)[:k]
    best = sum(grade / math.log2(place + 2) for place, grade in enumerate(ideal))
    return (
        sum(hits) / len(relevant),
        sum(hits) / k,
        1 / (hits.index(True) + 1) if any(hits) else 0,
        sum(gain) / best if best else 0,
    )


@pytest.mark.parametrize("seed", range(8))
def test_all_figures_of_random_answers(seed):
    rng = np.random.default_rng([seed, 41])
    items, n, depth = 2000, 60, 30
    # Whole grades, halves, and grades that no decimal factor makes whole.
    scale = [1, 0.5, 1 / 3][seed % 3]
    judged = [rng.choice(items, rng.integers(1, 12), replace=False).tolist() for _ in range(n)]
    grades = [{item: float(rng.integers(-1, 4)) * scale for item in mine} for mine in judged]
    for mine in grades:
        mine[next(iter(mine))] = 3 * scale
    relevant = [[item for item, grade in mine.items() if grade >= 2 * scale] for mine in grades]
    ids = rng.integers(-1, items, (n, depth))
    for row in range(n):  # most answers hold something that was judged, some of it again
        for place in rng.integers(0, depth, 8):
            ids[row, place] = rng.choice(judged[row])
    ids[5] = -1
    scores = rng.normal(size=(n, depth)).astype(np.float32)
    scores[rng.random((n, depth)) < 0.1] = np.nan
    pairs = rng.integers(0, 6, (n, items)).astype(np.float32)  # ties everywhere
    pairs[rng.random((n, items)) < 0.02] = np.nan
    judgments = Judgments("table", [str(i) for i in range(n)], relevant, grades=grades)
    corpus = Corpus(np.arange(items), [""] * items, rng.integers(0, 9, items).astype(np.float32))
    options = Options(ks=(1, 7, depth), bootstrap=0, latency_queries=0)
    report = measure_all({"table": Table(ids, scores, pairs)}, judgments, corpus, options)
    found = report["systems"]["table"]
    for k in options.ks:
        hand = np.mean([by_hand(ids[q], scores[q], set(relevant[q]), grades[q], k) for q in range(n)], axis=0)
        for name, value in zip(("recall", "precision", "mrr", "ndcg"), hand, strict=True):
            assert found[f"{name}@{k}"] == pytest.approx(value, abs=2e-4 if name == "ndcg" else 1e-9), (name, k)
    value = np.where(np.isnan(pairs), -np.inf, pairs)
    good = np.array([value[q, item] for q in range(n) for item in relevant[q]])
    bad = np.array([value[q, item] for q in range(n) for item in grades[q] if item not in set(relevant[q])])
    won = (good[:, None] > bad).mean() + (good[:, None] == bad).mean() / 2
    assert found["auc"] == pytest.approx(won)


def test_top_k_is_the_chance_that_a_draw_gives():
    """The number of the 1,023 drawn items that score higher has a hypergeometric distribution."""
    items, n = 5000, 40
    rng = np.random.default_rng(3)
    pairs = np.stack([rng.permutation(items) for _ in range(n)]).astype(np.float32)
    relevant = [[int(np.flatnonzero(pairs[q] == items - 1 - above)[0])] for q, above in enumerate(range(0, 80, 2))]
    expected = {}
    for k in (1, 10):
        chance = [scipy.stats.hypergeom(items - 1, above, 1023).cdf(k - 1) for above in range(0, 80, 2)]
        expected[k] = np.mean(chance)
    nothing = np.full((n, 1), -1), np.zeros((n, 1), np.float32)
    judgments = Judgments("table", [str(i) for i in range(n)], relevant)
    corpus = Corpus(np.arange(items), [""] * items, np.zeros(items, np.float32))
    found = {1: [], 10: []}
    for seed in range(30):
        options = Options(ks=(1,), bootstrap=0, latency_queries=0, seed=seed)
        figures = measure_all({"t": Table(*nothing, pairs)}, judgments, corpus, options)["systems"]["t"]
        for k, values in found.items():
            values.append(figures[f"top-{k}"])
    for k, values in found.items():
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert abs(np.mean(values) - expected[k]) < 5 * error, k
        assert error < 0.02, "a test that can fail"


def test_intervals_hold_the_truth_nineteen_times_of_twenty():
    rng = np.random.default_rng(8)
    truth, inside, runs = 0.3, 0, 400
    for run in range(runs):
        values = (rng.random((150, 1)) < truth).astype(float)
        low, high = interval(bootstrap_means(values, 300, run)[:, 0])
        inside += low <= truth <= high
    # 95 % less what percentile intervals are known to lack; five standard errors either way.
    assert 0.89 < inside / runs < 0.99
