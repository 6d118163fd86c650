"""The losses of a ranker against NumPy, with their gradients."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest
import tensorflow as tf

from dpsr_tf.config import RankerConfig
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.models.features import RankingBatch
from dpsr_tf.models.ranking_losses import listwise_loss, pairwise_loss, ranker_loss

v1 = tf.compat.v1
SPLITS = np.array([0, 4, 4, 5, 8], np.int64)
GAINS = np.array([0, 1, 3, 0, 2, 1, 1, 0], np.float32)


def pairwise(scores, gains, splits, weights):
    total = mass = 0.0
    for begin, end in itertools.pairwise(splits):
        for i in range(begin, end):
            for j in range(begin, end):
                if gains[i] > gains[j]:
                    weight = (gains[i] - gains[j]) * weights[i]
                    total += weight * -np.log(1 / (1 + np.exp(scores[j] - scores[i])))
                    mass += weight
    return total / mass


def listwise(scores, gains, splits, weights):
    losses = []
    for begin, end in itertools.pairwise(splits):
        s, target = scores[begin:end], (gains * weights)[begin:end]
        if target.sum() > 0:
            losses.append(-(target / target.sum() * (s - np.log(np.exp(s).sum()))).sum())
    return np.mean(losses)


@pytest.mark.parametrize(("loss", "expected"), [(pairwise_loss, pairwise), (listwise_loss, listwise)])
def test_values_and_gradients(loss, expected):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=8)
    for weights in (np.ones(8), rng.uniform(0.5, 4, 8)):
        with tf.Graph().as_default(), v1.Session() as session:
            x = v1.placeholder(tf.float32, [None])
            value = loss(x, tf.constant(GAINS), tf.constant(SPLITS), tf.constant(weights, tf.float32))
            found, gradient = session.run([value, tf.convert_to_tensor(tf.gradients(value, x)[0])], {x: scores})
        np.testing.assert_allclose(found, expected(scores, GAINS, SPLITS, weights), rtol=1e-5)
        numeric = np.empty(8)
        for i in range(8):
            up, down = scores.copy(), scores.copy()
            up[i], down[i] = up[i] + 1e-5, down[i] - 1e-5
            change = expected(up, GAINS, SPLITS, weights) - expected(down, GAINS, SPLITS, weights)
            numeric[i] = change / 2e-5
        np.testing.assert_allclose(gradient, numeric, atol=1e-5)
        assert abs(gradient).max() > 0.01


@pytest.mark.parametrize("loss", [pairwise_loss, listwise_loss])
def test_nothing_to_prefer_is_no_loss(loss):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None])
        value = loss(x, tf.zeros([8]), tf.constant(SPLITS))
        found, gradient = session.run([value, tf.convert_to_tensor(tf.gradients(value, x)[0])], {x: np.arange(8)})
    assert found == 0 and not gradient.any()


def test_positions_and_propensities_of_a_batch():
    """Positions bias the logits of training, and inverse propensities weigh the preferred item."""
    scores = np.random.default_rng(2).normal(size=8).astype(np.float32)
    outcomes, positions = np.array([0, 1, 3, 0, 2, 1, 0, 0], np.int32), np.array([1, 3, 2, 4, 1, 9, 0, 1], np.int32)
    bias = np.array([0, 0.5, 0.25, 0, -1, 0, 0, 0, 0, -2], np.float32)
    config = RankerConfig(gains=(0, 1, 2, 4), position=True, propensity_weights=True, most_propensity_weight=3)
    ranker = types.SimpleNamespace(
        ranker=config,
        scores=lambda lists: tf.constant(scores),
        position_bias=lambda places: tf.gather(tf.constant(bias), places),
    )
    with tf.Graph().as_default(), v1.Session() as session:
        lists = types.SimpleNamespace(candidates=Tokens(None, tf.constant(SPLITS)))
        batch = RankingBatch(lists, tf.constant(outcomes), tf.constant(positions), tf.constant([0]))
        found, metrics = session.run(ranker_loss(batch, ranker, np.array([1, 0.5, 0.4, 0.1])))
    # Position 9 is beyond the last one, whose weight is cut at 3; an unknown position has weight 1.
    weights = np.array([1, 2.5, 2, 3, 1, 3, 1, 1])
    gains = np.array(config.gains)[outcomes]
    np.testing.assert_allclose(found, pairwise(scores + bias[positions], gains, SPLITS, weights), rtol=1e-5)
    # The metric is about scores, which have no bias.
    pairs = [
        scores[i] > scores[j]
        for begin, end in itertools.pairwise(SPLITS)
        for i in range(begin, end)
        for j in range(begin, end)
        if gains[i] > gains[j]
    ]
    np.testing.assert_allclose(metrics["right_pairs"], np.mean(pairs), rtol=1e-6)
