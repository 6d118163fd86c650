"""The losses of a ranker, over the items of each request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from dpsr_tf.models.features import RankingBatch
    from dpsr_tf.models.ranker import Ranker


def ranker_loss(
    batch: RankingBatch, ranker: Ranker, propensities: np.ndarray | None = None
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Builds the loss of a batch, and the metrics to watch.

    Args:
        batch: whole requests.
        ranker: its section `ranker` of the config chooses the loss.
        propensities: float [positions], the chance that a user looks at a position in relation to position 1; None if
            `propensity_weights` is off. Positions beyond the last have its value, unknown ones 1.

    Returns:
        The loss, float32 [], and metrics by name: the share of the pairs with different outcomes that are in the right
        order.
    """
    config, splits = ranker.ranker, batch.lists.candidates.row_splits
    scores = ranker.scores(batch.lists)
    gains = tf.gather(tf.constant(config.gains, tf.float32), batch.outcomes)
    weights = None
    if config.propensity_weights:
        if propensities is None:
            raise ValueError("ranker.propensity_weights is on, but no propensities are given")
        inverse = np.minimum(1 / np.concatenate([[1.0], propensities]), config.most_propensity_weight)
        places = tf.minimum(batch.positions, len(inverse) - 1)
        weights = tf.gather(tf.constant(inverse, tf.float32), places)
    logits = scores + ranker.position_bias(batch.positions) if config.position else scores
    loss = (pairwise_loss if config.loss == "pairwise" else listwise_loss)(logits, gains, splits, weights)
    s, g, real = (_padded(values, splits) for values in (scores, gains, tf.ones_like(scores)))
    preferred = (g[:, :, tf.newaxis] > g[:, tf.newaxis, :]) & (real[:, tf.newaxis, :] > 0)
    right = preferred & (s[:, :, tf.newaxis] > s[:, tf.newaxis, :])
    pairs, right_pairs = (tf.reduce_sum(tf.cast(mask, tf.float32)) for mask in (preferred, right))
    return loss, {"right_pairs": tf.math.divide_no_nan(right_pairs, pairs)}


def pairwise_loss(
    scores: tf.Tensor, gains: tf.Tensor, row_splits: tf.Tensor, weights: tf.Tensor | None = None
) -> tf.Tensor:
    """Returns the cross entropy of preferences (the paper on DSR and DPR, section 3; RankNet, Burges et al. 2005).

    For items i and j of a request with gains g_i > g_j, the chance that i is preferred is sigmoid(s_i - s_j). The loss
    is the mean of -log of it over all such pairs of the batch, each with weight (g_i - g_j) w_i.

    Args:
        scores: float32 [n], items of a request one after another.
        gains: float32 [n], the gain of each item's outcome.
        row_splits: int64 [b + 1], which items belong to which request.
        weights: float32 [n], weight of an item where it is the preferred one; 1 by default. They get no gradient.

    Returns:
        float32 []; 0 for a batch without pairs.
    """
    s, g, w = (_padded(values, row_splits) for values in (scores, gains, _ones(scores, weights)))
    real = _padded(tf.ones_like(scores), row_splits)
    difference = g[:, :, tf.newaxis] - g[:, tf.newaxis, :]
    both = real[:, :, tf.newaxis] * real[:, tf.newaxis, :]
    weight = tf.stop_gradient(tf.nn.relu(difference) * w[:, :, tf.newaxis] * both)
    terms = weight * tf.nn.softplus(s[:, tf.newaxis, :] - s[:, :, tf.newaxis])
    return tf.math.divide_no_nan(tf.reduce_sum(terms), tf.reduce_sum(weight))


def listwise_loss(
    scores: tf.Tensor, gains: tf.Tensor, row_splits: tf.Tensor, weights: tf.Tensor | None = None
) -> tf.Tensor:
    """Returns the cross entropy of a softmax over each request's scores (ListNet's top one, Cao et al. 2007).

    The target of an item is its share of the request's sum of g_i w_i. The loss is the mean over requests with any.

    Args:
        scores: float32 [n], items of a request one after another.
        gains: float32 [n], 0 or more.
        row_splits: int64 [b + 1], which items belong to which request.
        weights: float32 [n], as in pairwise_loss.

    Returns:
        float32 []; 0 for a batch without gains.
    """
    s, g, w = (_padded(values, row_splits) for values in (scores, gains, _ones(scores, weights)))
    real = _padded(tf.ones_like(scores), row_splits) > 0
    # Padding must not count in the softmax.
    logs = tf.nn.log_softmax(tf.where(real, s, -1e9 * tf.ones_like(s)))
    target = tf.stop_gradient(g * w)
    total = tf.reduce_sum(target, axis=1)
    of_request = tf.math.divide_no_nan(-tf.reduce_sum(target * tf.where(real, logs, tf.zeros_like(logs)), 1), total)
    return tf.math.divide_no_nan(tf.reduce_sum(of_request), tf.reduce_sum(tf.cast(total > 0, tf.float32)))


def _ones(scores: tf.Tensor, weights: tf.Tensor | None) -> tf.Tensor:
    return tf.ones_like(scores) if weights is None else weights


def _padded(values: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
    """Returns values [n] as one row for each request, [b, longest], padded with zeros."""
    return tf.RaggedTensor.from_row_splits(values, row_splits, validate=False).to_tensor()
