"""The losses over the negatives of DPSR section 4.4: the hinge loss of section 4.3, and softmax.

Their gradients are written by hand, because TensorFlow's own keep a [b, n] matrix for nearly every operation.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from dpsr_tf import ops

# Maps the gradient of a loss to the gradients of the positives' scores and of the negatives' scores.
Gradient = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def negative_weights(negative_mask: tf.Tensor, mixing_ratio: float) -> tf.Tensor:
    """Returns the weight of each item of the batch as a negative of each query (section 4.4.3).

    The random negatives of a query get the share `mixing_ratio` of the weight, its batch negatives the rest. Within a
    group, the weight is spread evenly over the items that the mask allows. The weights of a query sum to the number of
    its negatives: as if that many had been drawn, a share alpha of them at random. If one group is empty, the whole
    weight goes to the other, unless alpha is 0 or 1 and gives the other group nothing.

    Args:
        negative_mask: bool [b, b + r], True where item j may serve as a negative for query i; the first b items are
            the batch's positives, the other r the shared random negatives.
        mixing_ratio: alpha, 0 (batch negatives only) to 1 (random negatives only).

    Returns:
        float32 [b, b + r], zero where the mask is False.
    """
    return ops.load().dpsr_negative_weights(negative_mask, mixing_ratio=mixing_ratio)


def hinge_loss(
    positive_scores: tf.Tensor | None,
    scores: tf.Tensor,
    weights: tf.Tensor,
    margin: float,
    example_weights: tf.Tensor,
    num_hard_negatives: int = 0,
) -> tf.Tensor:
    """Returns the hinge loss: the sum over a pair's negatives of max(0, margin - positive + negative), averaged over b.

    This is the last formula of section 4.3. The sum can be limited to each pair's hardest negatives, which the paper
    does not do. With a small log most negatives are easy, and their number hides the few that teach the model to tell,
    for example, two sizes of one product apart.

    Args:
        positive_scores: float32 [b]. None means that they are the diagonal of `scores`, which is cheaper.
        scores: float32 [b, n], score of every item of the batch with every query.
        weights: float32 [b, n], weight of each item as a negative; zero where it is none.
        margin: delta.
        example_weights: float32 [b], weights of the positive pairs.
        num_hard_negatives: number of negatives of each pair, those with the largest terms, that count; 0 for all.

    Returns:
        float32 [].
    """
    if num_hard_negatives:
        if positive_scores is None:
            positive_scores = tf.linalg.diag_part(scores)
        terms = weights * tf.nn.relu(margin - positive_scores[:, tf.newaxis] + scores)
        count = tf.minimum(num_hard_negatives, tf.shape(terms)[1])
        hardest = tf.math.top_k(tf.stop_gradient(terms), count, sorted=False).indices
        scores, weights = (tf.gather(matrix, hardest, batch_dims=1) for matrix in (scores, weights))
    positive = [] if positive_scores is None else [positive_scores]
    return ops.load().dpsr_hinge_loss(scores, weights, example_weights, positive, margin=margin).loss


def mixed_hinge_loss(
    scores: tf.Tensor, negative_mask: tf.Tensor, mixing_ratio: float, margin: float, example_weights: tf.Tensor
) -> tf.Tensor:
    """Returns `hinge_loss` with the `negative_weights` of a mask, in one op: half the work for large batches.

    Args:
        scores: float32 [b, b + r], score of every item of the batch with every query; positives on the diagonal.
        negative_mask: bool [b, b + r], see `negative_weights`.
        mixing_ratio: alpha.
        margin: delta.
        example_weights: float32 [b], weights of the positive pairs.

    Returns:
        float32 [].
    """
    return (
        ops.load()
        .dpsr_mixed_hinge_loss(scores, negative_mask, example_weights, mixing_ratio=mixing_ratio, margin=margin)
        .loss
    )


@tf.RegisterGradient("DpsrMixedHingeLoss")
def _mixed_hinge_gradient(op: tf.Operation, upstream: tf.Tensor, unused: tf.Tensor) -> list[tf.Tensor | None]:
    return [upstream * op.outputs[1], None, None]


@tf.RegisterGradient("DpsrHingeLoss")
def _hinge_gradient(op: tf.Operation, upstream: tf.Tensor, *unused: tf.Tensor) -> list[tf.Tensor | None]:
    _, of_scores, *of_positive = op.outputs
    return [upstream * of_scores, None, None, *(upstream * gradient for gradient in of_positive)]


def softmax_loss(
    positive_logits: tf.Tensor, logits: tf.Tensor, weights: tf.Tensor, example_weights: tf.Tensor
) -> tf.Tensor:
    """Returns the softmax loss, averaged over b pairs: -log(exp(p) / (exp(p) + sum of weight * exp(negative))).

    p is the logit of the positive. With unclicked impressions as the only negatives this is DSSM's loss; with the
    weights of `negative_weights` it is sampled softmax. A pair without negatives adds nothing.

    Args:
        positive_logits: float [b], scores divided by the temperature, minus `log_q` if that correction is wanted.
        logits: float [b, n], logits of every item with every query.
        weights: float [b, n], weight of each item as a negative; zero where it is none.
        example_weights: float [b], weights of the positive pairs.

    Returns:
        float [].
    """
    shares = _shares(example_weights)

    @tf.custom_gradient
    def loss(positive: tf.Tensor, negative: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
        # An item that is no negative must not decide the maximum that is subtracted before exp.
        negative = tf.where(weights > 0, negative, negative.dtype.min)
        top = tf.maximum(positive, tf.reduce_max(negative, axis=1))
        terms = weights * tf.exp(negative - top[:, tf.newaxis])
        positive_term = tf.exp(positive - top)
        total = positive_term + tf.reduce_sum(terms, axis=1)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            scale = upstream * shares / total
            return scale * (positive_term - total), scale[:, tf.newaxis] * terms

        return tf.reduce_sum(shares * (tf.math.log(total) - positive + top)), gradient

    return loss(positive_logits, logits)


def log_q(shares: tf.Tensor, num_items: int, mixing_ratio: float, title_share: float | tf.Tensor = 0.0) -> tf.Tensor:
    """Returns the logarithm of how often an item is a negative, which sampled softmax subtracts from each logit.

    Every item is equally likely to be a random negative. An item is a batch negative as often as it is a positive.
    alpha mixes the two (section 4.4.3). Without the correction, popular items are pushed away too much (Yi et al.,
    RecSys 2019). A factor common to all items has no effect.

    Args:
        shares: float [n], share of the log's positive pairs that have this item.
        num_items: number of all items.
        mixing_ratio: alpha.
        title_share: share of the batch's pairs that have a title query, and so a random item.

    Returns:
        float [n], at least the logarithm of 0.01 / num_items, so that an item that is never a negative has a value too.
    """
    in_batch = (1 - title_share) * shares + title_share / num_items
    q = mixing_ratio / num_items + (1 - mixing_ratio) * in_batch
    return tf.math.log(tf.maximum(q, tf.cast(0.01 / num_items, q.dtype)))


def _shares(example_weights: tf.Tensor) -> tf.Tensor:
    """Returns the share of each pair in the average over the batch."""
    return example_weights / tf.cast(tf.size(example_weights), example_weights.dtype)
