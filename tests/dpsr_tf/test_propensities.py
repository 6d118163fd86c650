"""Propensities from clicks: known curves come back, whatever was shown where, and logs that tell nothing are errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from test_request_log import LADDER, random_log
from test_request_log import write as write_shop

from dpsr_common.errors import CommandError
from dpsr_tf.data.propensities import estimate, propensities
from dpsr_tf.data.store import Store


def clicks_on(curve, seed, requests=20_000, pairs=500, spread=3.0):
    """Rows of a position-based click model in which better items are shown further up."""
    rng = np.random.default_rng(seed)
    relevance = rng.beta(1, 3, pairs)
    pair = rng.integers(0, pairs, (requests, len(curve)))
    rank = np.argsort(-(relevance[pair] * spread + rng.random(pair.shape)), axis=1)
    pair = np.take_along_axis(pair, rank, axis=1)
    clicked = rng.random(pair.shape) < curve * relevance[pair]
    position = np.broadcast_to(np.arange(1, len(curve) + 1), pair.shape)
    return pair.ravel(), position.ravel(), clicked.ravel()


def error(found, curve):
    """The mean error of a propensity, as a share of it."""
    return np.abs(np.log(found * curve[0] / curve)).mean()


PLACES = np.arange(1.0, 11)
CURVES = {
    "flat": np.full(10, 0.6),
    "power": 0.9 * PLACES**-0.7,
    "steep": PLACES**-1.5,
    "cliff": np.where(PLACES <= 4, 0.9, 0.3),
    "bottom": np.array([0.9, 0.6, 0.4, 0.3, 0.25, 0.25, 0.3, 0.4, 0.5, 0.6]),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves_come_back(name):
    """Click-through rates are wrong by far, because better items stand further up."""
    curve = CURVES[name]
    pair, position, clicked = clicks_on(curve, seed=3)
    found = estimate(pair, position, clicked)
    rate = np.bincount(position, clicked)[1:] / np.bincount(position)[1:]
    assert found.dtype == np.float64 and found.shape == (10,) and found[0] == 1
    assert error(found, curve) < 0.06 < 0.2 < error(rate / rate[0], curve)


def test_every_row_of_the_log_counts_once():
    """Order of rows, unknown positions and pairs that say nothing do not matter."""
    pair, position, clicked = clicks_on(CURVES["power"], seed=1, requests=2000)
    found = estimate(pair, position, clicked)
    order = np.random.default_rng(0).permutation(len(pair))
    np.testing.assert_allclose(estimate(pair[order], position[order], clicked[order]), found, atol=1e-5)
    more = np.concatenate([pair, pair, [1 << 40] * 3, [1 << 41] * 3])
    places = np.concatenate([position, np.zeros_like(position), [1, 2, 3], [2, 2, 2]])
    clicks = np.concatenate([clicked, ~clicked, [False] * 3, [True] * 3])
    np.testing.assert_allclose(estimate(more, places, clicks), found, atol=1e-5)


def test_positions_without_data_lie_between_their_neighbours():
    """Position 5 was never shown; positions 9 and 10 were never clicked."""
    curve = PLACES**-0.7
    pair, position, clicked = clicks_on(curve, seed=2)
    clicked &= position < 9
    rows = position != 5
    found = estimate(pair[rows], position[rows], clicked[rows])
    assert found[3] > found[4] > found[5]
    np.testing.assert_allclose(found[4], curve[4], rtol=0.05)
    assert np.all(np.isfinite(found)) and np.all(found > 0)
    assert np.all(found[8:] < 0.1)


def test_few_clicks_give_finite_numbers():
    """A log with one clicked pair."""
    found = estimate(np.zeros(4, np.int64), np.array([1, 1, 2, 255]), np.array([True, False, True, False]))
    assert found.shape == (255,) and np.all(np.isfinite(found)) and np.all(found > 0)


@pytest.mark.parametrize(
    ("position", "clicked"),
    [([1, 1, 1, 2], [True] * 4), ([1, 2, 1, 2], [False] * 4), ([0, 0, 0, 0], [True] * 4)],
)
def test_logs_that_tell_nothing_are_errors(position, clicked):
    with pytest.raises(CommandError, match="was shown at two positions for the same query"):
        estimate(np.array([0, 0, 0, 1]), np.array(position), np.array(clicked))


def store_of(folder, dpsr, log, *flags, ranking=True):
    path = write_shop(folder / "shop", log)
    if not ranking:
        schema = yaml.safe_load(path.read_text())
        del schema["ranking"]
        path.write_text(yaml.safe_dump(schema))
    dpsr("ingest", f"--schema={path}", f"--out={folder / 'store'}", *flags).succeeds()
    return Store(folder / "store")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_store_gives_the_numbers_of_its_log(tmp_path, dpsr, shards):
    """Each row of this log is a request of its own, so the arrays are the log itself."""
    log = random_log(seed=5, rows=600)
    for number, row in enumerate(log):
        # Clicks from position 4 on are rare.
        row |= {"session": f"s{number}", "type": "skip" if (row["position"] or 0) > 3 and number % 3 else row["type"]}
    store = store_of(tmp_path, dpsr, log, f"--shards={shards}")
    pairs = {}
    pair = [pairs.setdefault((row["query"], row["item_id"]), len(pairs)) for row in log]
    position = [row["position"] or 0 for row in log]
    clicked = [LADDER[row["type"]] > 0 for row in log]
    wanted = estimate(np.array(pair), np.array(position), np.array(clicked))
    assert wanted[:3].min() > 0.8 and wanted[3:].max() < 0.5
    np.testing.assert_allclose(propensities(store), wanted, rtol=0.05)


def test_a_store_without_positions_or_requests_is_an_error(tmp_path, dpsr):
    log = random_log(seed=1, rows=50)
    plain = store_of(tmp_path / "plain", dpsr, log, ranking=False)
    with pytest.raises(CommandError, match="holds no requests; add the section `ranking`"):
        propensities(plain)
    blind = store_of(tmp_path / "blind", dpsr, [row | {"position": None} for row in log])
    with pytest.raises(CommandError, match="does not say at which positions items were shown"):
        propensities(blind)


def test_the_generated_shop(tmp_path, dpsr):
    """The shop knows the truth, and shows popular items further up."""
    dpsr(
        "generate", f"--out={tmp_path / 'shop'}", "--items=300", "--users=100", "--interactions=10000", "--seed=4"
    ).succeeds()
    schema = tmp_path / "shop" / "schema.ranking.yaml"
    dpsr("ingest", f"--schema={schema}", f"--out={tmp_path / 'store'}").succeeds()
    truth = np.array(json.loads((tmp_path / "shop" / "truth.json").read_text())["propensities"])
    found = propensities(Store(tmp_path / "store"))
    assert error(found, truth) < 0.06
