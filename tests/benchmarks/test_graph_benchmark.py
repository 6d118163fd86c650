"""The part of benchmarks/graph.py that trains and measures LightGCN."""

from __future__ import annotations

import gzip
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
graph = importlib.import_module("graph")

RNG = np.random.default_rng(5)
# 60 users and 40 items. Users with even numbers want items with even numbers, and others want others.
PAIRS = tuple(np.array([(user, item) for user in range(60) for item in range(user % 2, 40, 2) if RNG.random() < 0.6]).T)


def pair_set(pairs: tuple[np.ndarray, np.ndarray]) -> set[tuple[int, int]]:
    return set(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True))


def test_a_share_of_the_items_of_each_user_is_held_back():
    left, held = graph.hold_back(PAIRS, 0.25, graph.chance(PAIRS, 1))
    assert pair_set(left) | pair_set(held) == pair_set(PAIRS) and not pair_set(left) & pair_set(held)
    np.testing.assert_array_equal(np.bincount(held[0]), np.round(0.25 * np.bincount(PAIRS[0])))
    # At least one is held back, and another seed holds back others.
    assert (np.bincount(graph.hold_back(PAIRS, 0.001, graph.chance(PAIRS, 1))[1][0]) == 1).all()
    assert pair_set(graph.hold_back(PAIRS, 0.25, graph.chance(PAIRS, 2))[1]) != pair_set(held)


def test_items_that_are_alike_are_held_back_together(monkeypatch):
    monkeypatch.setattr(graph, "DIM", 2)
    # Users of both kinds, who also want some items of the other kind.
    others = [(user, item) for user in range(60) for item in range((user + 1) % 2, 40, 2) if RNG.random() < 0.25]
    own = [(user, item) for user in range(60) for item in range(user % 2, 40, 2) if RNG.random() < 0.8]
    pairs = tuple(np.array(own + others).T)
    left, held = graph.hold_back(pairs, 0.25, graph.likeness(pairs, 1))
    assert pair_set(left) | pair_set(held) == pair_set(pairs) and not pair_set(left) & pair_set(held)
    of_one_kind, by_chance = (
        [len(set((items % 2).tolist())) == 1 for items in graph.by_user(graph.hold_back(pairs, 0.25, order)[1], 60)]
        for order in (graph.likeness(pairs, 1), graph.chance(pairs, 1))
    )
    assert sum(of_one_kind) > 2 * sum(by_chance)


def test_recall_and_ndcg_of_known_lists():
    found = np.array([[3, 1, 2], [0, 5, 6], [7, 8, 9]])
    # The second user wants more items than a list has, and the third wants none.
    recall, ndcg = graph.recall_and_ndcg(found, [np.array([1, 9]), np.array([0, 6, 10, 11, 12]), np.array([], int)])
    second, third = 1 / np.log2(3), 1 / np.log2(4)
    np.testing.assert_allclose(recall, [1 / 2, 2 / 5])
    np.testing.assert_allclose(ndcg, [second / (1 + second), (1 + third) / (1 + second + third)])


def test_the_score_is_the_cosine_and_a_share_of_the_logarithm_of_the_pairs():
    users, items = RNG.normal(size=(4, 3)), RNG.normal(size=(6, 3))
    prior = graph.prior(np.array([0, 0, 0, 2, 5, 5]), 0.5)
    np.testing.assert_allclose(prior, 0.5 * np.log([3, 1, 1, 1, 1, 2]))
    of_users, of_items = graph.with_prior(users, items, prior)
    cosines = (users @ items.T) / np.linalg.norm(users, axis=1)[:, np.newaxis] / np.linalg.norm(items, axis=1)
    np.testing.assert_allclose(of_users @ of_items.T, cosines + prior, atol=1e-5)


def test_items_of_the_training_are_not_found():
    users, items = np.eye(2, dtype=np.float32), np.array([[3, 0], [2, 3], [1, 2], [0, 1]], np.float32)
    found = graph.top_items(users, items, [np.array([0]), np.array([2, 3])], 2)
    np.testing.assert_array_equal(found, [[1, 2], [1, 0]])


@pytest.mark.parametrize("change", [{"parts": 3}, {"parts": 1}, {"parts": 3, "spectrum": False}])
def test_a_training_finds_what_was_held_back(monkeypatch, change):
    monkeypatch.setattr(graph, "PAIRS", 32)
    monkeypatch.setattr(graph, "NEGATIVES", 64)
    left, held = graph.hold_back(PAIRS, 0.2, graph.chance(PAIRS, 1))
    users, items = graph.train_light_gcn(left, 1, replace(graph.LIGHT_GCN, **change))
    assert users.shape == (60, graph.DIM) and items.shape == (40, graph.DIM)
    scored = graph.with_prior(users, items, graph.prior(left[1], graph.LIGHT_GCN.popularity))
    # A user has about 10 items of its kind left.
    recall, _ = graph.recall_and_ndcg(graph.top_items(*scored, graph.by_user(left, 60), 12), graph.by_user(held, 60))
    assert recall.mean() > 0.95


@pytest.mark.long
@pytest.mark.slow
def test_both_parts_of_gowalla_report_what_they_measure(monkeypatch, tmp_path):
    monkeypatch.setattr(graph, "PAIRS", 32)
    monkeypatch.setattr(graph, "NEGATIVES", 64)
    (tmp_path / "gowalla").mkdir()
    splits = graph.hold_back(PAIRS, 0.2, graph.chance(PAIRS, 1))
    for name, pairs in zip(("train", "test"), splits, strict=True):
        lines = [" ".join(map(str, (user, *items))) for user, items in enumerate(graph.by_user(pairs, 60))]
        with gzip.open(tmp_path / "gowalla" / f"{name}.txt.gz", "wt") as file:
            file.write("\n".join(lines))
    result = graph.report.Report("graph", 1, {})
    graph.gowalla(result, tmp_path, tmp_path)
    assert 0.9 < result.bars["gowalla_recall20"] <= 1 and 0.5 < result.bars["gowalla_ndcg20"] <= 1
    # The settings are compared without the test file.
    (tmp_path / "gowalla" / "test.txt.gz").unlink()
    graph.gowalla_settings(result, tmp_path)
    rows = [row for row in result.rows if row["workload"] == "gowalla, held back by chance"]
    assert len(rows) == len(graph.VARIANTS) * len(graph.POPULARITIES) * 2
    assert len([row for row in result.rows if row["workload"] == "gowalla, held back alike"]) == len(rows)
    # At random: 0.6 and 0.2.
    least = {"recall@20": 0.9, "ndcg@20": 0.3}
    assert [row for row in rows if not least[row["metric"]] < row["value"] <= 1] == []
