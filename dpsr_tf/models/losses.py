"""The loss of DPSR section 4.3 over the negatives of section 4.4."""

from __future__ import annotations

import tensorflow as tf


def negative_weights(negative_mask: tf.Tensor, mixing_ratio: float) -> tf.Tensor:
    """Weight of each item of the batch as a negative of each query (section 4.4.3).

    A query's random negatives share `mixing_ratio`, its batch negatives the rest, each group evenly among the items
    that the mask allows, the whole multiplied by their number: as if that many negatives had been drawn, a share
    alpha of them at random. Where a query has none of one group, the whole weight goes to the other, unless alpha gives
    that other one nothing: 0 and 1 are exact.

    Args:
        negative_mask: bool [b, b + r], True where item j may serve as a negative for query i; the first b items are
            the batch's positives, the other r the shared random negatives.
        mixing_ratio: alpha, 0 (batch negatives only) to 1 (random negatives only).

    Returns:
        float32 [b, b + r], zero where the mask is False.
    """
    valid = tf.cast(negative_mask, tf.float32)
    b = tf.shape(valid)[0]
    in_batch, random = valid[:, :b], valid[:, b:]
    batch_count = tf.reduce_sum(in_batch, axis=1, keepdims=True)
    random_count = tf.reduce_sum(random, axis=1, keepdims=True)
    batch_share = (1.0 - mixing_ratio) * tf.cast(batch_count > 0, tf.float32)
    random_share = mixing_ratio * tf.cast(random_count > 0, tf.float32)
    scale = tf.math.divide_no_nan(batch_count + random_count, batch_share + random_share)
    return tf.concat(
        [
            in_batch * tf.math.divide_no_nan(scale * batch_share, batch_count),
            random * tf.math.divide_no_nan(scale * random_share, random_count),
        ],
        axis=1,
    )


def hinge_loss(
    positive_scores: tf.Tensor,
    scores: tf.Tensor,
    weights: tf.Tensor,
    margin: float,
    example_weights: tf.Tensor,
    num_hard_negatives: int = 0,
) -> tf.Tensor:
    """For each positive pair the sum over its negatives of max(0, margin - positive + negative), averaged over b.

    Section 4.3, the last formula. The sum may be cut to each pair's hardest negatives, which the paper does not do:
    with a small log most negatives are easy, and what tells two sizes of one product apart drowns in their number.

    Args:
        positive_scores: float32 [b].
        scores: float32 [b, n], of every item of the batch with every query.
        weights: float32 [b, n], how much each item counts as a negative; zero where it does not.
        margin: delta.
        example_weights: float32 [b], of the positive pairs.
        num_hard_negatives: how many negatives of each pair count, those with the largest terms; 0 is all.

    Returns:
        float32 [].
    """
    terms = weights * tf.nn.relu(margin - positive_scores[:, tf.newaxis] + scores)
    if num_hard_negatives:
        terms = tf.math.top_k(terms, tf.minimum(num_hard_negatives, tf.shape(terms)[1]), sorted=False).values
    return tf.reduce_mean(example_weights * tf.reduce_sum(terms, axis=1))
