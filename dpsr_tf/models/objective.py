"""The training objective (Algorithm 1, lines 5 to 7): puts towers, scores, negatives and loss of a batch together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import tensorflow as tf

from dpsr_tf.config import UNCLICKED, Config, TrainConfig
from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.models.features import ItemFeatures, QueryFeatures
from dpsr_tf.models.losses import hinge_loss, mixed_hinge_loss, negative_weights, softmax_loss
from dpsr_tf.models.quantizer_layer import QuantizerLayer, TeacherItems, quantizer_loss, quantizer_metrics
from dpsr_tf.models.two_tower import TwoTower, head_scores

if TYPE_CHECKING:
    from dpsr_tf.data.examples_dataset import Batch

# k of the metric recall@10.
RECALL_AT = 10


def build_loss(
    config: Config,
    batch: Batch,
    towers: TwoTower,
    item_log_q: tf.Tensor | None = None,
    quantizer: QuantizerLayer | None = None,
    teacher: TeacherItems | None = None,
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Builds the loss of a batch of b positive pairs, and the metrics to watch.

    The negatives of a pair are the batch's other positives and the random negatives, weighted by `mixing_ratio`
    (section 4.4.3), and the pair's own negatives, each with `own_negative_weight`. `type_weights` and `type_margins`
    make a ladder of orders, carts, clicks, unclicked impressions, and random items.

    With a quantizer, the loss is that of the towers that go on training plus the quantizer's. Frozen towers get no
    gradient, and their own loss is left out. The objective `ranking` is the model's own loss over T(items), plus the
    same loss over their coarse centroids if there are several.

    Args:
        config: its section `train` chooses the loss, its section `quantizer` the quantizer's.
        batch: the examples. The shapes of its masks give b, r and the number of own negatives.
        towers: made with `config.model`.
        item_log_q: losses.log_q of the batch's n items, float32 [n]; needed for `train.log_q_correction` only. Own
            negatives are not drawn from q, so their values are not read.
        quantizer: made with `config.quantizer`, or None.
        teacher: the best items of each query, for the objective `distillation`, or None.

    Returns:
        The loss, float32 [], and metrics by name, float32 [] each:
        margin_violations: share of the negatives whose score is closer to the positive's than the margin.
        recall@10: share of the pairs whose positive ranks in the top 10 among its negatives, last among equals.
        norm/query, norm/item: mean length of the embeddings before normalisation.
        head_usage/<i>: share of the pairs whose positive is nearest to head i; for several heads only.
        quantizer/...: see quantizer_loss; with a quantizer only.

    Raises:
        ValueError: `log_q_correction` is on and `item_log_q` is missing.
    """
    query = towers.query_embedding(QueryFeatures.of(batch))  # [b, m, d]
    items = towers.item_embedding(ItemFeatures.of(batch))  # [n, d]
    coarse: tf.Tensor | None = None
    of_quantizer: tuple[tf.Tensor, dict[str, tf.Tensor]] | None = None
    if quantizer is not None:
        num_shared = tf.shape(batch.negative_mask)[1]
        if config.quantizer.towers == "frozen":
            query = tf.stop_gradient(query)
        if config.quantizer.towers != "both":
            items = tf.stop_gradient(items)
        if config.quantizer.objective == "ranking":
            quantized = quantizer(items, batch.item_rows)
            of_quantizer = tf.constant(0.0), quantizer_metrics(quantizer, quantized)
            if config.quantizer.lists > 1:
                # The lists that a search probes are those whose centroids score best, so these are to rank, too. Their
                # gradient passes to the items as that of T does.
                coarse = quantized.coarse + items - tf.stop_gradient(items)
            items = quantized.full
        else:
            of_quantizer = quantizer_loss(
                config.quantizer,
                quantizer,
                query,
                items[:num_shared],
                teacher,
                config.train.softmax_temperature,
                batch.item_rows[:num_shared],
                towers.config.temperature,
            )
    loss, found = _model_loss(config, batch, towers, query, items, item_log_q)
    if coarse is not None:
        loss += _model_loss(config, batch, towers, query, coarse, item_log_q)[0]
    if of_quantizer is not None and config.quantizer.objective != "ranking":
        weighted = config.quantizer.weight * of_quantizer[0]
        loss = weighted if config.quantizer.towers == "frozen" else loss + weighted

    # Metrics count the negatives that enter the loss: with alpha 1, no other positive of the batch does.
    counted = found.mask & (found.weights > 0)
    count = tf.reduce_sum(tf.cast(counted, tf.float32))
    positive = found.positive_scores[:, tf.newaxis]
    violations = counted & (found.scores > positive - config.train.margin)
    before = tf.reduce_sum(tf.cast(found.mask & (found.scores >= positive), tf.int32), axis=1)
    metrics = {
        "margin_violations": tf.math.divide_no_nan(tf.reduce_sum(tf.cast(violations, tf.float32)), count),
        f"recall@{RECALL_AT}": tf.reduce_mean(tf.cast(before < RECALL_AT, tf.float32)),
        "norm/query": towers.norms["query"],
        "norm/item": towers.norms["item"],
    }
    if towers.config.num_heads > 1:
        best = tf.argmax(head_scores(query, tf.slice(items, [0, 0], [tf.shape(query)[0], -1])), axis=1)
        usage = tf.reduce_mean(tf.one_hot(best, towers.config.num_heads), axis=0)
        metrics |= {f"head_usage/{head}": usage[head] for head in range(towers.config.num_heads)}
    if of_quantizer is not None:
        metrics |= of_quantizer[1]
    return loss, metrics


class _Ranked(NamedTuple):
    """Scores of b queries with their candidates, of which there are n."""

    positive_scores: tf.Tensor  # float32 [b]
    scores: tf.Tensor  # float32 [b, n]
    mask: tf.Tensor  # bool [b, n], which candidates are negatives
    weights: tf.Tensor  # float32 [b, n], their weights in the loss


def _model_loss(
    config: Config,
    batch: Batch,
    towers: TwoTower,
    query: tf.Tensor,
    items: tf.Tensor,
    item_log_q: tf.Tensor | None,
) -> tuple[tf.Tensor, _Ranked]:
    """Returns the loss that section `train` names, for query vectors [b, m, d] and item vectors [n, d]."""
    train = config.train
    b, num_shared = tf.unstack(tf.shape(batch.negative_mask))
    positives = tf.slice(items, [0, 0], [b, -1])
    # Computed apart from `scores`, because TensorFlow's gradient of a diagonal is a second [b, b + r] matrix.
    positive_scores = towers.pair_scores(query, positives)  # [b]
    shared = items[:num_shared] if train.num_own_negatives else items
    scores = towers.scores(query, shared)  # [b, b + r]
    mask = batch.negative_mask
    weights = negative_weights(mask, train.mixing_ratio)
    own_scores: tf.Tensor | None = None
    if train.num_own_negatives:
        own = tf.reshape(items[num_shared:], [b, train.num_own_negatives, towers.config.embedding_dim])
        own_scores = towers.own_scores(query, own)  # [b, o]
        scores = tf.concat([scores, own_scores], axis=1)
        mask = tf.concat([mask, batch.own_negative_mask], axis=1)
        own_weights = train.own_negative_weight * tf.cast(batch.own_negative_mask, tf.float32)
        weights = tf.concat([weights, own_weights], axis=1)
    example_weights = batch.weights
    if train.type_weights:
        of_types = [train.type_weights.get(name, 1.0) for name in EVENT_TYPES]
        example_weights *= tf.gather(tf.constant(of_types, tf.float32), batch.types)

    counts: tf.Tensor | None = None
    if train.loss == "hinge":
        loss = _hinge(train, batch, positive_scores, scores, weights, mask, example_weights)
    else:
        positive_logits, logits = positive_scores / train.softmax_temperature, scores / train.softmax_temperature
        if train.log_q_correction:
            if item_log_q is None:
                raise ValueError("train.log_q_correction is on, but no item_log_q is given")
            # Each logit loses the logarithm of how often its item is expected among the candidates: n q for an item
            # that is drawn n times from q, and 1 for an own negative, whatever its q.
            log_n = tf.math.log(tf.reduce_sum(weights[:, :num_shared], axis=1, keepdims=True))  # [b, 1]
            # Without shared negatives nothing is drawn from q.
            counts = tf.where(tf.math.is_finite(log_n), log_n + item_log_q[tf.newaxis, :num_shared], 0.0)
            positive_logits -= tf.linalg.diag_part(counts)
            logits -= tf.pad(counts, [[0, 0], [0, train.num_own_negatives]])
        loss = softmax_loss(positive_logits, logits, weights, example_weights)
    if train.type_weights.get(UNCLICKED) and own_scores is not None:
        loss += _unclicked_loss(train, batch, own_scores, scores[:, :num_shared], weights[:, :num_shared], counts)
    return loss, _Ranked(positive_scores, scores, mask, weights)


def _hinge(
    train: TrainConfig,
    batch: Batch,
    positive_scores: tf.Tensor,
    scores: tf.Tensor,
    weights: tf.Tensor,
    mask: tf.Tensor,
    example_weights: tf.Tensor,
) -> tf.Tensor:
    if train.type_margins:
        # A score less its own margin, so that the loss needs none: max(0, (margin - positive) - (margin_j - score_j)).
        of_types = [train.margin_of(name) for name in EVENT_TYPES]
        positive_scores -= tf.gather(tf.constant(of_types, tf.float32), batch.types)
        of_columns = tf.range(tf.shape(scores)[1]) >= tf.shape(batch.negative_mask)[1]
        scores -= tf.where(of_columns, train.margin_of(UNCLICKED), 0.0)
        return hinge_loss(positive_scores, scores, weights, 0.0, example_weights, train.num_hard_negatives)
    if not (train.num_hard_negatives or train.num_own_negatives):
        return mixed_hinge_loss(scores, mask, train.mixing_ratio, train.margin, example_weights)
    positives_apart = positive_scores if train.num_hard_negatives else None
    return hinge_loss(positives_apart, scores, weights, train.margin, example_weights, train.num_hard_negatives)


def _unclicked_loss(
    train: TrainConfig,
    batch: Batch,
    own_scores: tf.Tensor,
    scores: tf.Tensor,
    weights: tf.Tensor,
    counts: tf.Tensor | None,
) -> tf.Tensor:
    """Returns the loss with unclicked impressions as positives and the shared items as negatives.

    Whoever ranked the list thought that they answer the query. So they are better than random items.

    Args:
        own_scores: float32 [b, o], scores of the impressions.
        scores, weights: float32 [b, b + r], of the shared items.
        counts: float32 [b, b + r], what log_q_correction takes off the logits of the shared items, or None.
    """
    losses = []
    there = train.type_weights[UNCLICKED] * tf.cast(batch.own_negative_mask, tf.float32)
    for positive, example_weights in zip(tf.unstack(own_scores, axis=1), tf.unstack(there, axis=1), strict=True):
        example_weights *= batch.weights
        if train.loss == "hinge":
            margin = train.margin_of(UNCLICKED)
            losses.append(hinge_loss(positive, scores, weights, margin, example_weights, train.num_hard_negatives))
        else:
            logits = scores / train.softmax_temperature
            logits = logits if counts is None else logits - counts
            losses.append(softmax_loss(positive / train.softmax_temperature, logits, weights, example_weights))
    return tf.add_n(losses)
