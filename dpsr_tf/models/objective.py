"""What training minimises (Algorithm 1, lines 5 to 7): towers, scores, negatives and loss of a batch put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from dpsr_tf.config import Config
from dpsr_tf.models.features import ItemFeatures, QueryFeatures
from dpsr_tf.models.losses import hinge_loss, mixed_hinge_loss, negative_weights, softmax_loss
from dpsr_tf.models.two_tower import TwoTower, head_scores

if TYPE_CHECKING:
    from dpsr_tf.data.examples_dataset import Batch

# Of the metric recall@10.
RECALL_AT = 10


def build_loss(
    config: Config, batch: Batch, towers: TwoTower, item_log_q: tf.Tensor | None = None
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Loss of a batch of b positive pairs, and what to watch.

    The negatives of a pair are the batch's other positives and the shared random ones, weighted by `mixing_ratio`
    (section 4.4.3), and its own ones, each with `own_negative_weight`.

    Args:
        config: `train` says which loss.
        batch: the examples; b, r and the number of own negatives are those of its masks.
        towers: made with `config.model`.
        item_log_q: float32 [n] of the batch's items, losses.log_q; only for `train.log_q_correction`.

    Returns:
        The loss, float32 [], and metrics by name, float32 [] each:
        margin_violations: share of the negatives that come closer to the positive than the margin.
        recall@10: share of the pairs whose positive ranks in the first 10 among its negatives, behind its equals.
        norm/query, norm/item: mean length of embeddings before they are normalised.
        head_usage/<i>: share of the pairs whose positive is nearest to head i, where there is more than one.

    Raises:
        ValueError: `log_q_correction` is on and `item_log_q` is missing.
    """
    train = config.train
    b, num_shared = tf.unstack(tf.shape(batch.negative_mask))
    query = towers.query_embedding(QueryFeatures.of(batch))  # [b, m, d]
    items = towers.item_embedding(ItemFeatures.of(batch))  # [n, d]
    positives = tf.slice(items, [0, 0], [b, -1])
    # Not the diagonal of `scores`: TensorFlow's gradient of that would be a second [b, b + r] matrix.
    positive_scores = towers.pair_scores(query, positives)  # [b]
    shared = items[:num_shared] if train.num_own_negatives else items
    scores = towers.scores(query, shared)  # [b, b + r]
    mask = batch.negative_mask
    weights = negative_weights(mask, train.mixing_ratio)
    if train.num_own_negatives:
        own = tf.reshape(items[num_shared:], [b, train.num_own_negatives, towers.config.embedding_dim])
        scores = tf.concat([scores, towers.own_scores(query, own)], axis=1)
        mask = tf.concat([mask, batch.own_negative_mask], axis=1)
        own_weights = train.own_negative_weight * tf.cast(batch.own_negative_mask, tf.float32)
        weights = tf.concat([weights, own_weights], axis=1)

    if train.loss == "hinge" and not (train.num_hard_negatives or train.num_own_negatives):
        loss = mixed_hinge_loss(scores, mask, train.mixing_ratio, train.margin, batch.weights)
    elif train.loss == "hinge":
        positives_apart = positive_scores if train.num_hard_negatives else None
        loss = hinge_loss(positives_apart, scores, weights, train.margin, batch.weights, train.num_hard_negatives)
    else:
        positive_logits, logits = positive_scores / train.softmax_temperature, scores / train.softmax_temperature
        if train.log_q_correction:
            if item_log_q is None:
                raise ValueError("train.log_q_correction is on, but no item_log_q is given")
            positive_logits -= item_log_q[:b]
            columns = tf.broadcast_to(item_log_q[:num_shared], tf.shape(batch.negative_mask))
            logits -= tf.concat([columns, tf.reshape(item_log_q[num_shared:], [b, train.num_own_negatives])], axis=1)
        loss = softmax_loss(positive_logits, logits, weights, batch.weights)

    # What counts in the loss: with alpha 1 no item of the batch does.
    counted = mask & (weights > 0)
    count = tf.reduce_sum(tf.cast(counted, tf.float32))
    violations = counted & (scores > positive_scores[:, tf.newaxis] - train.margin)
    before = tf.reduce_sum(tf.cast(mask & (scores >= positive_scores[:, tf.newaxis]), tf.int32), axis=1)
    metrics = {
        "margin_violations": tf.math.divide_no_nan(tf.reduce_sum(tf.cast(violations, tf.float32)), count),
        f"recall@{RECALL_AT}": tf.reduce_mean(tf.cast(before < RECALL_AT, tf.float32)),
        "norm/query": towers.norms["query"],
        "norm/item": towers.norms["item"],
    }
    if towers.config.num_heads > 1:
        best = tf.argmax(head_scores(query, positives), axis=1)
        usage = tf.reduce_mean(tf.one_hot(best, towers.config.num_heads), axis=0)
        metrics |= {f"head_usage/{head}": usage[head] for head in range(towers.config.num_heads)}
    return loss, metrics
