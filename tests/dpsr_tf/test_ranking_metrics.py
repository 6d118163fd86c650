"""Session AUC, NDCG and MRR of requests against loops over pairs and permutations; calibration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dpsr_tf.evaluation.ranking_metrics import Calibration, IsotonicCurve, ndcg, reciprocal_ranks, session_auc


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
    assert len(ndcg(nothing.astype(int), nothing, nothing, 5)) == 0
    assert len(reciprocal_ranks(nothing.astype(int), nothing > 0, nothing)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_reciprocal_ranks_are_the_mean_over_all_orders_of_ties(seed):
    request, outcome, score = random_requests(seed)
    positive, expected = outcome >= 2, []
    for rows in rows_of(request):
        orders = [
            p for p in itertools.permutations(rows) if all(score[a] >= score[b] for a, b in itertools.pairwise(p))
        ]
        if positive[rows].any():
            expected.append(np.mean([1 / (1 + min(np.flatnonzero(positive[list(order)]))) for order in orders]))
    np.testing.assert_allclose(reciprocal_ranks(request, positive, score), expected)


def test_the_isotonic_curve_pools_what_falls_and_never_says_never():
    score = np.array([1.0, 2, 2, 3, 4, 5])
    positive = np.array([False, True, True, False, True, True])
    curve = IsotonicCurve.fit(score, positive)
    # The scores 2 and 3 have 2 of 3; the lowest and the highest are kept away from 0 and 1.
    np.testing.assert_allclose(curve(np.array([2.0, 2.5, 3])), 2 / 3)
    np.testing.assert_allclose(curve(np.array([-9.0, 1, 5, 99])), [1 / 8, 1 / 8, 7 / 8, 7 / 8])
    assert curve(np.array([1.5])) == pytest.approx((1 / 8 + 2 / 3) / 2), "straight between two points"
    rng = np.random.default_rng(1)
    wild = IsotonicCurve.fit(rng.normal(size=200), rng.random(200) < 0.3)
    assert (np.diff(wild.probability) >= 0).all() and wild.probability.min() > 0 and wild.probability.max() < 1


def test_calibration_is_the_gap_in_bins_and_the_log_loss():
    rng = np.random.default_rng(2)
    request, probability = np.repeat(np.arange(100), 10), rng.uniform(0.05, 0.95, 1000)
    positive = rng.random(1000) < probability**2
    base = np.full(1000, 0.4)
    found = Calibration.of(request, positive, probability, base).figures()
    bins = np.array_split(np.argsort(probability), Calibration.BINS)
    expected = sum(len(rows) / 1000 * abs(probability[rows].mean() - positive[rows].mean()) for rows in bins)
    assert found["ece"] == pytest.approx(expected) and expected > 0.1
    loss = -np.mean(np.where(positive, np.log(probability), np.log(1 - probability)))
    of_base = -np.mean(np.where(positive, np.log(0.4), np.log(0.6)))
    assert found["log_loss"] == pytest.approx(loss) and found["log_loss_gain"] == pytest.approx(1 - loss / of_base)
    low, high = np.quantile(
        Calibration.of(request, positive, probability, base).samples(200, 1)["log_loss"], [0.02, 0.98]
    )
    assert low < loss < high and high - low < 0.2
    honest = Calibration.of(request, rng.random(1000) < probability, probability, base).figures()
    assert honest["ece"] < 0.06


def test_equal_probabilities_are_in_one_bin():
    positive = np.arange(40) % 4 == 0
    same = Calibration.of(np.repeat(np.arange(4), 10), positive, np.full(40, 0.25), np.full(40, 0.25))
    assert same.figures() == {"ece": pytest.approx(0), "log_loss": pytest.approx(0.5623, abs=1e-4), "log_loss_gain": 0}
