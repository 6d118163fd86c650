"""Session AUC and NDCG of requests against loops over pairs and permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dpsr_tf.evaluation.ranking_metrics import ndcg, session_auc


def random_requests(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, 40)
    request = np.repeat(rng.permutation(40), lengths)
    n = len(request)
    # Few distinct scores, so that many are equal.
    return request, rng.integers(0, 4, n), rng.integers(0, 3, n).astype(float)


def rows_of(request):
    return [np.flatnonzero(request == number) for number in dict.fromkeys(request.tolist())]


@pytest.mark.parametrize("seed", range(5))
def test_session_auc_counts_pairs(seed):
    request, outcome, score = random_requests(seed)
    positive = outcome == 3
    expected = []
    for rows in rows_of(request):
        pairs = [(a, b) for a in rows for b in rows if positive[a] and not positive[b]]
        if pairs:
            expected.append(np.mean([(score[a] > score[b]) + 0.5 * (score[a] == score[b]) for a, b in pairs]))
    np.testing.assert_allclose(session_auc(request, positive, score), expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3, 10])
def test_ndcg_is_the_mean_over_all_orders_of_ties(seed, k):
    request, outcome, score = random_requests(seed)
    gain = 2.0**outcome - 1

    def dcg(order):
        return sum(gain[row] / np.log2(place + 2) for place, row in enumerate(order[:k]))

    expected = []
    for rows in rows_of(request):
        ideal = dcg(sorted(rows, key=lambda row: -gain[row]))
        orders = [
            p for p in itertools.permutations(rows) if all(score[a] >= score[b] for a, b in itertools.pairwise(p))
        ]
        if ideal > 0:
            expected.append(np.mean([dcg(order) for order in orders]) / ideal)
    np.testing.assert_allclose(ndcg(request, gain, score, k), expected)


def test_without_rows_there_is_nothing():
    nothing = np.zeros(0)
    assert len(session_auc(nothing.astype(int), nothing > 0, nothing)) == 0
    assert len(ndcg(nothing.astype(int), nothing, nothing, 5)) == 0
