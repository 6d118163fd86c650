"""The losses of a rewriter: forward, backward and direct translation, and the cycle (arXiv 2103.00800, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dpsr_tf.config import Config
from dpsr_tf.models import decoding
from dpsr_tf.models.rewriter import UNKNOWN, Candidates, Encoded, Rewriter


class RewritingBatch(NamedTuple):
    """A training batch: b pairs of query and title, and p pairs of queries.

    Words are int32, padded with 0. What is read has words and their pieces [.., words, P]. What is written ends with
    END. They may have UNKNOWN words, which are not learned to be written.
    """

    query_words: tf.Tensor  # int32 [b, S], the query as it is read, with typing errors
    query_pieces: tf.Tensor  # int32 [b, S, P]
    query_target: tf.Tensor  # int32 [b, T]
    title_words: tf.Tensor  # int32 [b, S']
    title_pieces: tf.Tensor  # int32 [b, S', P]
    title_target: tf.Tensor  # int32 [b, T']
    weights: tf.Tensor  # float32 [b]
    pair_words: tf.Tensor  # int32 [p, S]
    pair_pieces: tf.Tensor  # int32 [p, S, P]
    pair_target: tf.Tensor  # int32 [p, T]
    pair_weights: tf.Tensor  # float32 [p]


def rewriter_loss(batch: RewritingBatch, rewriter: Rewriter, config: Config, step: tf.Tensor) -> tuple[tf.Tensor, dict]:
    """Builds the loss of a batch, and the metrics to watch.

    The loss is the sum of the mean losses of a written word in each direction, times their weights, and of the cycle's
    loss of a query, times its weight from `rewriter.cycle_start` on. A part whose weight is 0 is not computed.

    Args:
        batch: the examples.
        rewriter: the model.
        config: its section `rewriter` has the weights.
        step: the global step, int64 [].

    Returns:
        The loss, float32 [], and metrics by name: loss/forward, loss/backward, loss/direct, the mean loss of a word;
        words/direct, share of the words that are predicted right when all words before are known; loss/cycle.
    """
    own = config.rewriter
    of = {
        "forward": (own.forward_weight, batch.query_words, batch.query_pieces, batch.title_target, batch.weights),
        "backward": (own.backward_weight, batch.title_words, batch.title_pieces, batch.query_target, batch.weights),
        "direct": (own.direct_weight, batch.pair_words, batch.pair_pieces, batch.pair_target, batch.pair_weights),
    }
    used = {name: parts for name, parts in of.items() if parts[0]}
    targets = [target for _, _, _, target, _ in used.values()]
    places = [tf.where(tf.reshape(target > 0, [-1]))[:, 0] for target in targets]
    written = [tf.gather(tf.reshape(target, [-1]), place) for target, place in zip(targets, places, strict=True)]
    candidates, labels = rewriter.candidates(tf.concat(written, 0), own.sampled_words, 0)
    labels = tf.split(labels, [tf.size(part) for part in written], num=len(written))

    hidden, shares, encoded_of, padded_of = [], [], {}, {}
    for (name, parts), target, place, label in zip(used.items(), targets, places, labels, strict=True):
        _, words, pieces, _, weights = parts
        encoded = encoded_of[name] = rewriter.encode(name, words, pieces)
        # The place of each target among the candidates, [b, T]; 0 in padding.
        padded = tf.reshape(
            tf.scatter_nd(place[:, tf.newaxis], label, tf.size(target, tf.int64)[tf.newaxis]), tf.shape(target)
        )
        padded_of[name] = padded = tf.ensure_shape(padded, target.shape)
        states = rewriter.hidden(name, encoded, candidates.of(padded[:, :-1]))
        hidden.append(tf.gather(tf.reshape(states, [-1, rewriter.dim]), place))
        # An unknown word cannot be written. It is only what other words follow.
        known = tf.cast(tf.not_equal(tf.gather(tf.reshape(target, [-1]), place), UNKNOWN), tf.float32)
        of_word = tf.gather(weights, place // target.shape[1]) * known
        shares.append(tf.math.divide_no_nan(of_word, tf.reduce_sum(of_word)))
    logits = candidates.logits(tf.concat(hidden, 0))
    every = tf.concat(labels, 0)
    of_words = tf.nn.sparse_softmax_cross_entropy_with_logits(every, logits)
    right = tf.cast(tf.equal(tf.argmax(logits, 1, tf.int32), every), tf.float32)

    loss, metrics = tf.constant(0.0), {}
    sizes = [tf.size(part) for part in written]
    of_words, right = (tf.split(values, sizes, num=len(sizes)) for values in (of_words, right))
    for name, share, losses, rights in zip(used, shares, of_words, right, strict=True):
        metrics[f"loss/{name}"] = mean = tf.reduce_sum(share * losses)
        metrics[f"words/{name}"] = tf.reduce_sum(share * rights)
        loss += used[name][0] * mean
    if own.cycle_weight:
        # Before the cycle begins, it has no queries, and costs next to nothing.
        count = tf.where(step >= own.cycle_start, own.cycle_queries, 0)
        encoded = Encoded(*(part[:count] for part in encoded_of["forward"]))
        seed = tf.constant(config.train.seed << 32, tf.int64) + tf.cast(step, tf.int64)
        of_cycle = cycle_loss(
            rewriter, encoded, padded_of["backward"][:count], candidates, own.cycle_titles, own.cycle_top_words, seed
        )
        metrics["loss/cycle"] = of_cycle
        loss += own.cycle_weight * of_cycle
    return loss, metrics


def cycle_loss(
    rewriter: Rewriter,
    encoded: Encoded,
    queries: tf.Tensor,
    candidates: Candidates,
    titles: int,
    top: int,
    seed: tf.Tensor,
) -> tf.Tensor:
    """Returns the loss of the cycle query -> title -> query: the mean of -log sum over t of P(t | q) P(q | t).

    The sum is over titles t that the forward direction draws (`decoding.sample`). The draws themselves get no gradient,
    but both probabilities do.

    Args:
        rewriter: the model.
        encoded: the q queries, read in the forward direction.
        queries: places of candidates, int32 [q, T], each with its end and padded with 0.
        candidates: words that may be written, those of the queries among them.
        titles: number of titles for each query.
        top: see `decoding.sample`.
        seed: int64 [].

    Returns:
        float32 []; 0 without queries.
    """
    length, end = rewriter.spec.title_words, candidates.words.end
    step, state = rewriter.decoder("forward", encoded, candidates, length)
    drawn = tf.stop_gradient(decoding.sample(step, state, titles, length, candidates.words, seed, top).words)
    drawn = tf.reshape(tf.ensure_shape(drawn, [None, titles, length]), [-1, length])
    # A title's target has its end, too.
    last = tf.math.count_nonzero(drawn, 1, dtype=tf.int32)[:, tf.newaxis]
    places = tf.range(length + 1)[tf.newaxis]
    target = tf.where(tf.equal(places, last), end, tf.pad(drawn, [[0, 0], [0, 1]]))
    again = Encoded(*(tf.repeat(part, titles, 0) for part in encoded))
    there = log_probability(rewriter, "forward", again, target, places <= last, candidates)
    read = rewriter.encode_candidates("backward", drawn, candidates)
    queries = tf.repeat(queries, titles, 0)
    # The end may be candidate 0, like padding.
    words = tf.math.count_nonzero(queries, 1, dtype=tf.int32)[:, tf.newaxis] - int(end > 0)
    known = tf.range(queries.shape[1])[tf.newaxis] <= words
    back = log_probability(rewriter, "backward", read, queries, known, candidates)
    of_query = -tf.reduce_logsumexp(tf.reshape(there + back, [-1, titles]), 1)
    return tf.math.divide_no_nan(tf.reduce_sum(of_query), tf.cast(tf.size(of_query), tf.float32))


def log_probability(
    rewriter: Rewriter, direction: str, encoded: Encoded, target: tf.Tensor, known: tf.Tensor, candidates: Candidates
) -> tf.Tensor:
    """Returns the logarithm of the probability of texts, float32 [b].

    Args:
        rewriter: the model.
        direction: one of rewriter.DIRECTIONS.
        encoded: what was read, b texts.
        target: places of candidates, int32 [b, T], each text with its end.
        known: bool [b, T], false beyond the end.
        candidates: the words of the output layer.
    """
    states = rewriter.hidden(direction, encoded, candidates.of(target[:, :-1]))
    logits = candidates.logits(tf.reshape(states, [-1, rewriter.dim]))
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.reshape(target, [-1]), logits)
    return -tf.reduce_sum(tf.where(known, tf.reshape(losses, tf.shape(target)), 0.0), 1)
