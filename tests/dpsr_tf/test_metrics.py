"""Metrics by hand and against other formulas, also with ties, gaps, repeats and NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytrec_eval
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.judgments import Judgments

NAN, INF = float("nan"), float("inf")


def judged(relevant, grades=(), **more):
    return Judgments("judgments.tsv", [str(i) for i in range(len(relevant))], relevant, grades=list(grades), **more)


def ranked(found, relevant, grades=(), ks=(1, 3), scores=None):
    """Returns the metrics of one query."""
    ids = np.array([found + [-1] * (max(ks) - len(found))])
    scores = np.zeros(ids.shape) if scores is None else np.array([scores + [-INF] * (max(ks) - len(scores))])
    values = metrics.ranked_metrics(ids, scores, judged([relevant], grades), ks)
    assert all(one.shape == (1,) for one in values.values())
    return {name: one[0] for name, one in values.items()}


def dcg(*gains):
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))


# Ranked lists, by hand.


@pytest.mark.parametrize(
    ("found", "relevant", "recall", "precision", "mrr", "ndcg"),
    [
        ([1, 2, 3], [1], 1, 1 / 3, 1, 1),
        ([9, 1, 8], [1], 1, 1 / 3, 1 / 2, dcg(0, 1)),
        ([9, 8, 1], [1, 2], 1 / 2, 1 / 3, 1 / 3, dcg(0, 0, 1) / dcg(1, 1)),
        ([2, 9, 1], [1, 2], 1, 2 / 3, 1, dcg(1, 0, 1) / dcg(1, 1)),
        ([2, 1, 3], [1, 2, 3, 4, 5], 3 / 5, 1, 1, 1),
        ([], [1], 0, 0, 0, 0),
        ([9], [1], 0, 0, 0, 0),
        ([1], [1], 1, 1 / 3, 1, 1),  # of three places, two stay empty
        ([0], [0], 1, 1 / 3, 1, 1),
        ([7, 2**40], [2**40], 1, 1 / 3, 1 / 2, dcg(0, 1)),
    ],
)
def test_ranked_metrics_of_one_query(found, relevant, recall, precision, mrr, ndcg):
    values = ranked(found, relevant)
    expected = {"recall@3": recall, "precision@3": precision, "mrr@3": mrr, "ndcg@3": ndcg}
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_each_cut_off_ends_at_its_place():
    ids = np.array([[*range(100, 109), 1, *range(200, 290)]])
    values = metrics.ranked_metrics(ids, np.zeros(ids.shape), judged([[1]]), (9, 10, 100))
    assert [values[f"mrr@{k}"][0] for k in (9, 10, 100)] == [0, 0.1, 0.1]
    assert [values[f"recall@{k}"][0] for k in (9, 10, 100)] == [0, 1, 1]
    assert [values[f"precision@{k}"][0] for k in (9, 10, 100)] == pytest.approx([0, 0.1, 0.01])


def test_one_number_a_query_and_none_is_lost():
    ids = np.array([[1, -1], [-1, -1], [9, 3]])
    values = metrics.ranked_metrics(ids, np.zeros(ids.shape), judged([[1], [2], [3]]), (2,))
    assert values["recall@2"].tolist() == [1, 0, 1]
    assert values["mrr@2"].tolist() == [1, 0, 0.5]


def test_figures_do_not_depend_on_how_many_queries_are_in_memory(monkeypatch):
    rng = np.random.default_rng(0)
    ids, relevant = rng.integers(0, 20, (50, 5)), [sorted(set(rng.integers(0, 20, 4).tolist())) for _ in range(50)]
    judgments = judged(relevant, [{item: 1.0 + item / 3 for item in items} for items in relevant])
    whole = metrics.ranked_metrics(ids, np.zeros(ids.shape), judgments, (1, 5))
    monkeypatch.setattr(metrics, "_QUERIES", 7)
    parts = metrics.ranked_metrics(ids, np.zeros(ids.shape), judgments, (1, 5))
    assert 0 < whole["ndcg@5"].mean() < 1
    for name, values in whole.items():
        np.testing.assert_allclose(values, parts[name], atol=1e-3, err_msg=name)


@pytest.mark.parametrize("scale", [1, 0.01, 1e6, 1 / 3])
def test_ndcg_takes_grades_as_gains(scale):
    grades = {1: 3.0 * scale, 2: 2.33 * scale, 3: 1.0 * scale, 4: -INF, 5: -2.0 * scale}
    values = ranked([3, 4, 1], [1, 2], [grades])
    assert values["ndcg@3"] == pytest.approx(dcg(1, 0, 3) / dcg(3, 2.33, 1), abs=2e-4)
    assert values["recall@3"] == 0.5, "relevance is not the grade"
    assert ranked([5, 4], [1], [grades])["ndcg@3"] == 0


def test_the_order_is_that_of_the_ids_whatever_the_scores():
    assert ranked([9, 1], [1], scores=[0.0, 0.0])["mrr@3"] == 0.5
    assert ranked([9, 1], [1], scores=[1.0, 2.0])["mrr@3"] == 0.5


@pytest.mark.parametrize(
    ("found", "scores", "recall", "mrr"),
    [
        ([1, 1, 1], [3.0, 2.0, 1.0], 1 / 2, 1),  # a repeat is not found again
        ([9, 9, 1], [3.0, 2.0, 1.0], 1 / 2, 1 / 3),  # and what follows does not move up
        ([-1, 1], [1.0, 1.0], 1 / 2, 1 / 2),
        ([1, 2], [NAN, 1.0], 1 / 2, 1 / 2),  # an item whose score is NaN is not found
        ([1, 2], [NAN, NAN], 0, 0),
    ],
)
def test_repeats_gaps_and_nan_are_lost_places(found, scores, recall, mrr):
    values = ranked(found, [1, 2], scores=scores)
    assert (values["recall@3"], values["mrr@3"]) == pytest.approx((recall, mrr))


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_ranked_metrics_equal_their_formulas_and_trec_eval(seed):
    rng = np.random.default_rng(seed)
    n, k, items = 6, 20, 40
    ids = np.stack([rng.permutation(items)[:k] for _ in range(n)])
    grades = [dict(enumerate(rng.integers(0, 4, items).astype(float).tolist())) for _ in range(n)]
    relevant = [sorted(item for item, grade in one.items() if grade >= 2) for one in grades]
    values = metrics.ranked_metrics(ids, np.zeros(ids.shape), judged(relevant, grades), (5, 20))
    for at in (5, 20):
        hit = np.array([np.isin(row, items_) for row, items_ in zip(ids, relevant, strict=True)])[:, :at]
        gains = np.array([[one[item] for item in row] for row, one in zip(ids.tolist(), grades, strict=True)])[:, :at]
        ideal = np.array([sorted(one.values(), reverse=True)[:at] for one in grades])
        discount = 1 / np.log2(np.arange(at) + 2)
        first = np.where(hit.any(axis=1), 1 / (1 + hit.argmax(axis=1)), 0)
        np.testing.assert_allclose(values[f"recall@{at}"], hit.sum(axis=1) / [len(r) for r in relevant])
        np.testing.assert_allclose(values[f"precision@{at}"], hit.sum(axis=1) / at)
        np.testing.assert_allclose(values[f"mrr@{at}"], first)
        np.testing.assert_allclose(values[f"ndcg@{at}"], (gains @ discount) / (ideal @ discount))
    qrels = {str(row): {str(i): int(grade) for i, grade in one.items()} for row, one in enumerate(grades)}
    run = {str(row): {str(i): 1.0 / (rank + 1) for rank, i in enumerate(one)} for row, one in enumerate(ids.tolist())}
    found = pytrec_eval.RelevanceEvaluator(qrels, ["recall_5,20", "P_5,20", "ndcg_cut_5,20"], relevance_level=2)
    theirs = found.evaluate(run)
    for ours, their in (("recall@5", "recall_5"), ("precision@20", "P_20"), ("ndcg@5", "ndcg_cut_5")):
        np.testing.assert_allclose(values[ours], [theirs[str(row)][their] for row in range(n)], err_msg=ours)


# Top-k among 1,024 items.


@pytest.mark.parametrize(
    ("own", "others", "k", "probability"),
    [
        (5.0, [1.0, 2.0, 3.0], 1, 1),
        (0.0, [1.0, 2.0, 3.0], 3, 0),
        (0.0, [1.0, 2.0, 3.0], 4, 1),
        (2.0, [1.0, 2.0, 3.0], 1, 0),
        (2.0, [1.0, 2.0, 3.0], 2, 1 / 2),  # its rank is 2 or 3
        (2.0, [1.0, 2.0, 3.0], 3, 1),
        (1.0, [1.0, 1.0, 1.0], 1, 1 / 4),
        (1.0, [1.0, 1.0, 1.0], 3, 3 / 4),
        (NAN, [1.0, 2.0], 2, 0),
        (NAN, [NAN, 2.0], 2, 1 / 2),
        (1.0, [NAN, NAN, -INF], 1, 1),
        (INF, [INF, 1.0], 1, 1 / 2),
    ],
)
def test_rank_within(own, others, k, probability):
    assert metrics.rank_within(np.array([[own]]), np.array([others]), k) == pytest.approx(probability)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 5), st.integers(1, 13))
def test_rank_within_is_the_share_of_all_orders_of_the_ties(others, own, k):
    above, ties = sum(o > own for o in others), sum(o == own for o in others)
    ranks = [above + 1 + place for place in range(ties + 1)]
    expected = sum(rank <= k for rank in ranks) / len(ranks)
    got = metrics.rank_within(np.array([[float(own)]]), np.array([others], float), k)
    assert got == pytest.approx(expected)


def test_candidates_are_distinct_not_relevant_and_uniform():
    item_ids = np.random.default_rng(0).permutation(1100) * 3
    relevant = [sorted(item_ids[:7].tolist()), [int(item_ids.max())], [0], sorted(item_ids[-70:].tolist())]
    counts = np.zeros(3300, int)
    for seed in range(60):
        found = metrics.top_k_candidates(judged(relevant), item_ids, [seed])
        assert found.shape == (4, 1023)
        for row, own in zip(found, relevant, strict=True):
            assert len(set(row.tolist())) == 1023
            assert not set(row.tolist()) & set(own)
            assert np.isin(row, item_ids).all()
        counts += np.bincount(found[0], minlength=3300)
    # 1,023 of the 1,093 items that are left, 60 times: each 56 times, standard deviation 1.9
    drawn = counts[np.setdiff1d(item_ids, relevant[0])]
    assert drawn.sum() == 60 * 1023
    assert drawn.min() > 56.2 - 6 * 1.9 and drawn.max() <= 60
    assert drawn.std() < 2.4


def test_candidates_are_seeded():
    draws = [metrics.top_k_candidates(judged([[1], [2]]), np.arange(5000), [seed]) for seed in (1, 1, 2)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()
    assert (draws[0][0] != draws[0][1]).any()


@pytest.mark.parametrize(("items", "enough"), [(1023, False), (1025, True), (1024, False)])
def test_a_small_corpus_has_no_candidates(items, enough):
    assert metrics.has_candidates(judged([[1, 2], [3]]), np.arange(items)) == enough


def test_the_smallest_corpus_with_candidates():
    found = metrics.top_k_candidates(judged([[1, 1024]]), np.arange(1025), [1])
    assert sorted(found[0].tolist()) == [0, *range(2, 1024)]


# AUC.


def auc(query, labels, scores, weights=None):
    pairs = metrics.LabelledPairs.of(np.array(query), np.array(labels, bool), np.array(scores, float), max(query) + 1)
    return pairs.auc(np.ones((1, pairs.num_queries)) if weights is None else np.array(weights, float))


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([1, 0], [2, 1], 1),
        ([1, 0], [1, 2], 0),
        ([1, 0], [1, 1], 0.5),
        ([1, 1, 0, 0], [4, 2, 3, 1], 3 / 4),
        ([1, 1, 0, 0], [4, 2, 2, 1], 3.5 / 4),
        ([1, 0, 0], [NAN, 1, NAN], 0.25),
        ([1, 0], [NAN, -INF], 0.5),
    ],
)
def test_auc_by_hand(labels, scores, expected):
    assert auc([0] * len(labels), labels, scores) == pytest.approx(expected)


def test_auc_is_over_all_pairs_of_all_queries_and_not_defined_with_one_kind():
    assert auc([0, 1], [1, 0], [2, 1]) == 1
    assert np.isnan(auc([0, 1], [1, 1], [2, 1]))
    assert np.isnan(auc([0, 1], [1, 0], [2, 1], [[1, 0]]))
    empty = metrics.LabelledPairs.of(np.zeros(0, int), np.zeros(0, bool), np.zeros(0), 1)
    assert np.isnan(empty.auc(np.ones((2, 1)))).all()


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_auc_equals_the_rank_sum_statistic_also_with_weights(seed):
    rng = np.random.default_rng(seed)
    query, labels = rng.integers(0, 5, 40), rng.random(40) < 0.4
    query[-1], labels[:2] = 4, (True, False)
    scores, weights = rng.integers(0, 9, 40), rng.integers(0, 3, 5)
    weights[query[:2]] = 1
    repeated = np.repeat(np.arange(40), weights[query])
    positive, negative = (scores[repeated][labels[repeated] == label] for label in (True, False))
    statistic = scipy.stats.mannwhitneyu(positive, negative).statistic
    expected = statistic / (len(positive) * len(negative))
    assert auc(query, labels, scores, [weights]) == pytest.approx(expected)


# Intervals and tests.


def test_resamples_draw_as_many_queries_as_there_are():
    drawn = np.concatenate(list(metrics.resamples(50, 300, 7)))
    assert drawn.shape == (300, 50)
    assert (drawn.sum(axis=1) == 50).all()
    assert drawn.var() == pytest.approx(1, abs=0.1), "with replacement"
    again = np.concatenate(list(metrics.resamples(50, 300, 7)))
    assert (drawn == again).all()
    assert (drawn != np.concatenate(list(metrics.resamples(50, 300, 8)))).any()


def test_resamples_do_not_depend_on_how_many_are_in_memory(monkeypatch):
    whole = np.concatenate(list(metrics.resamples(20, 30, 7)))
    monkeypatch.setattr(metrics, "_BLOCK", 70)
    parts = list(metrics.resamples(20, 30, 7))
    assert len(parts) == 10
    assert (np.concatenate(parts) == whole).all()


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3, 2, (4000, 1))
    low, high = metrics.interval(metrics.bootstrap_means(values, 4000, 1)[:, 0])
    error = values.std() / math.sqrt(4000)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=error / 6)


def test_interval_of_nothing():
    assert metrics.interval(np.array([NAN, NAN])) is None
    assert metrics.interval(np.array([NAN, 1.0])) == [1, 1]


def test_auc_samples_are_of_the_queries_inside():
    pairs = metrics.LabelledPairs.of(np.array([0, 0, 1, 1]), np.array([1, 0, 1, 0], bool), np.array([2, 1, 1, 2]), 2)
    assert (pairs.auc_samples(np.array([True, False]), 10, 1) == 1).all()
    assert (pairs.auc_samples(np.array([False, True]), 10, 1) == 0).all()
    assert set(np.round(pairs.auc_samples(np.array([True, True]), 50, 1), 3)) >= {0, 0.5, 1}


def test_compare():
    rng = np.random.default_rng(0)
    baseline = rng.random(200)
    better = baseline + rng.normal(0.1, 0.05, 200)
    found = metrics.compare({"recall@10": better, "mine": better}, {"recall@10": baseline, "yours": baseline}, 500, 1)
    assert list(found) == ["recall@10"]
    one = found["recall@10"]
    assert one["difference"] == pytest.approx((better - baseline).mean())
    assert one["interval"][0] < one["difference"] < one["interval"][1]
    assert one["interval"][1] - one["interval"][0] == pytest.approx(2 * 1.96 * 0.05 / math.sqrt(200), rel=0.2)
    assert one["p_t_test"] == pytest.approx(scipy.stats.ttest_rel(better, baseline).pvalue)
    assert 0 < one["p_wilcoxon"] < 1e-6


@pytest.mark.parametrize(
    ("difference", "p"), [([0.0] * 9, 1.0), ([0.5], None), ([0.0], None), ([0.1, -0.1], 1.0), ([0.0, 0.0, 1.0], 0.4)]
)
def test_compare_where_little_differs(difference, p):
    baseline = np.full(len(difference), 0.25)
    one = metrics.compare({"mrr@10": baseline + difference}, {"mrr@10": baseline}, 0, 1)["mrr@10"]
    assert one["interval"] is None
    assert one["difference"] == pytest.approx(np.mean(difference))
    assert one["p_t_test"] == (p if p is None else pytest.approx(p, abs=0.03))
    assert (one["p_wilcoxon"] is None) == (p is None)


def test_compare_where_all_differ_alike():
    one = metrics.compare({"m": np.full(30, 0.5)}, {"m": np.full(30, 0.25)}, 100, 1)["m"]
    assert one["interval"] == pytest.approx([0.25, 0.25])
    assert one["p_t_test"] == 0 and one["p_wilcoxon"] < 1e-5
