"""benchmarks/ranker_position.py: its estimators on clicks with known propensities, and its truth against the shop's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

report = pytest.importorskip("report")
pytest.importorskip("lightgbm")
benchmark = pytest.importorskip("ranker_position")

from dpsr_tf.data.store import Store  # noqa: E402
from dpsr_tf.shop.parameters import Parameters  # noqa: E402
from dpsr_tf.shop.world import make_world  # noqa: E402

CURVE = np.array([1, 0.6, 0.45, 0.35, 0.3])


@pytest.fixture(scope="module")
def clicks():
    """Better pairs stand further up; every pair has its relevance as its one feature."""
    rng = np.random.default_rng(1)
    relevance = rng.beta(1, 3, 300)
    pair = rng.integers(0, 300, (8000, 5))
    pair = np.take_along_axis(pair, np.argsort(-(3 * relevance[pair] + rng.random(pair.shape)), axis=1), axis=1)
    position = np.broadcast_to(np.arange(1, 6), pair.shape)
    clicked = rng.random(pair.shape) < CURVE * relevance[pair]
    return benchmark.Clicks(pair.ravel(), position.ravel(), clicked.ravel()), relevance[pair].reshape(-1, 1)


def error(found):
    return np.abs(np.log(found / found[0] / CURVE))[1:].mean()


def test_every_method_but_plain_rates_finds_the_truth(clicks):
    clicks, feature = clicks
    assert error(benchmark.of_rates(clicks)) > 0.2
    assert error(benchmark.of_all_pairs(clicks)) < 0.08
    assert error(benchmark.of_cells(clicks)) < 0.08
    # With items in the order of their relevance, regression EM takes relevance for position, but sees that it counts.
    assert (np.diff(benchmark.of_regression_em(clicks, feature, seed=1)) < -0.05).all()
    np.testing.assert_allclose(benchmark.falling(np.array([1, 0.2, 0.4, 0.1]), np.ones(4)), [1, 0.3, 0.3, 0.1])


def test_thinned_clicks_follow_the_curve(clicks):
    clicks, _ = clicks
    thinned = clicks.thinned(np.array([1, 0.5, 1, 0, 1]), seed=1)
    kept = np.bincount(clicks.position, thinned.clicked) / np.maximum(np.bincount(clicks.position, clicks.clicked), 1)
    np.testing.assert_allclose(kept[1:], [1, 0.5, 1, 0, 1], atol=0.04)


def test_rankers_and_truth_of_a_small_shop(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "TREES", 5)
    monkeypatch.setattr(benchmark, "SIZE", {"items": 300, "users": 60, "interactions": 2000})
    result = report.Report("ranker_position", 1, report.hardware())
    benchmark.measure_rankers(result, tmp_path, [1], False, 0)
    value = {(row["impl"], row["metric"]): row["value"] for row in result.rows}
    assert {f"lightgbm, {variant}" for variant in benchmark.VARIANTS} < {impl for impl, _ in value}
    # Clicks are as biased as the order shown.
    assert value["shown order", "ndcg5_clicks"] > 0.5
    assert all(0.3 < value[f"lightgbm, {v}", "ndcg10_preference"] < 1 for v in benchmark.VARIANTS)

    # What is true of an item of the world is said of the same item of the store.
    folder = tmp_path / "sorted-1"
    store = Store(folder / "store")
    truth = benchmark.Truth(folder / "shop", store, seed=1)
    world = make_world(Parameters(**truth.facts["parameters"]))
    assert [world.items.titles[row] for row in truth._item] == store.titles()
