"""Decoding in the graph: beam search, greedy decoding and sampling, of stock TensorFlow ops.

Shapes: b texts, n sequences for each text, v words that can be written, length the largest number of words of a
sequence. Words are int32 from 0 to v - 1. One of them, `end`, ends a sequence, and some others may be forbidden.

A decoder is given as a function `step`. It takes the last word of each sequence, int32 [b, n] (None before the first
word), the state of the decoder, and the number of words so far, int32 []. It returns logits, float32 [b, n, v], and the
next state. A state is a structure (tf.nest) of tensors [b, n, ...], whose shapes do not change from step to step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

State = Any
Step = Callable[[tf.Tensor | None, State, tf.Tensor], tuple[tf.Tensor, State]]

_NEVER = float("-inf")


class Decoded(NamedTuple):
    """Sequences of words, without `end`."""

    words: tf.Tensor  # int32 [b, n, length], padded with 0
    # float32 [b, n], logarithm of the decoder's probability of the sequence and its end; -inf where there is none
    log_probabilities: tf.Tensor


class Words(NamedTuple):
    """Which of the v words a sequence may have."""

    end: int  # ends a sequence; never its first word
    reserved: int = 0  # the words 0, ..., reserved - 1 are never written


def beam_search(
    step: Step,
    state: State,
    beams: int | tf.Tensor,
    length: int,
    words: Words,
    original: tf.Tensor | None = None,
) -> Decoded:
    """Returns likely sequences, the most probable one first. One beam is greedy decoding.

    After each word the `beams` most probable beginnings of each text go on. A sequence that has `length` words ends.

    Args:
        step: the decoder.
        state: its state before the first word, of one sequence for each text.
        beams: n, 1 or more; int32 [] if it is a tensor.
        length: the largest number of words.
        words: what may be written.
        original: int32 [b, any]. If given, a sequence has no word twice, or as often as the original of its text has
            it. The log probabilities remain those of the decoder.
    """
    n = tf.convert_to_tensor(beams, tf.int32)
    logits, state = step(None, state, tf.constant(0))
    b, v = tf.shape(logits)[0], tf.shape(logits)[2]
    never_first = _forbidden(v, words.reserved, words.end)
    total, first = _best(tf.nn.log_softmax(logits[:, 0]) + never_first, n)
    state = _taken(state, tf.zeros_like(first))
    may, only_end = _forbidden(v, words.reserved), _forbidden(v, words.reserved, words.end, only=True)

    def body(position: tf.Tensor, last: tf.Tensor, found: _Found, state: State) -> tuple[Any, ...]:
        logits, state = step(last, state, position)
        # As many more as there are words that may be forbidden.
        k = n if original is None else n + length
        scores, following = _best(
            tf.nn.log_softmax(logits) + tf.where(position < length, may, only_end), k
        )  # [b, n, k]
        if original is not None:
            scores += _repeated(following, found.words, original)
        # A sequence that has ended goes on as itself, once.
        stays = tf.where(tf.equal(tf.range(k), 0), 0.0, _NEVER)
        ended = found.ended[:, :, tf.newaxis]
        scores = found.total[:, :, tf.newaxis] + tf.where(ended, stays, scores)
        following = tf.where(ended, words.end, following)
        total, place = tf.math.top_k(tf.reshape(scores, [b, n * k]), n)
        parent = place // k
        word = tf.gather(tf.reshape(following, [b, n * k]), place, batch_dims=1)
        ended = tf.gather(found.ended, parent, batch_dims=1) | tf.equal(word, words.end) | tf.equal(total, _NEVER)
        texts = tf.gather(found.words, parent, batch_dims=1)
        texts = _written(texts, word, position, ended)
        return position + 1, word, _Found(texts, total, ended), _taken(state, parent)

    start = _Found(tf.zeros([b, n, length], tf.int32), total, tf.equal(total, _NEVER))
    start = start._replace(words=_written(start.words, first, tf.constant(0), start.ended))
    found = _loop(body, first, start, state, length)
    return Decoded(tf.where(found.total[:, :, tf.newaxis] > _NEVER, found.words, 0), found.total)


def sample(
    step: Step,
    state: State,
    count: int | tf.Tensor,
    length: int,
    words: Words,
    seed: tf.Tensor,
    top: int = 0,
    temperature: float = 1.0,
    original: tf.Tensor | None = None,
) -> Decoded:
    """Draws sequences word by word (top-n sampling). Some of them may be equal.

    A word is drawn from the `top` most probable ones, by their probabilities. The noise depends on the seed, the number
    of the sequence and the position, but not on the text. So what a text gets does not depend on the other texts of the
    batch.

    Args:
        step, state, length, words, original: as in `beam_search`.
        count: n, the number of sequences for each text, 1 or more; int32 [] if it is a tensor.
        seed: int64 []. The same seed gives the same sequences.
        top: the number of most probable words that one is drawn from; 0 takes all.
        temperature: logits are divided by this before a word is drawn. It does not change the log probabilities.
    """
    n = tf.convert_to_tensor(count, tf.int32)
    logits, state = step(None, state, tf.constant(0))
    b, v = tf.shape(logits)[0], tf.shape(logits)[2]
    width = tf.minimum(top, v) if top else v
    seed = tf.cast(seed, tf.int64)

    def drawn(
        logits: tf.Tensor, forbidden: tf.Tensor, position: tf.Tensor, written: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Draws n words from logits [b, 1 or n, v]: words [b, n], and their log probabilities."""
        logs = tf.nn.log_softmax(logits)
        values, ids = tf.math.top_k(logs + forbidden, width)
        if original is not None and written is not None:
            fresh = values + _repeated(ids, written, original)
            # Where nothing else is left, words repeat themselves.
            values = tf.where(tf.reduce_any(fresh > _NEVER, 2, keepdims=True), fresh, values)
        uniform = tf.random.stateless_uniform(
            [n, width], tf.stack([seed, tf.cast(position, tf.int64)]), minval=1e-30, maxval=1.0
        )
        # The largest of logits with Gumbel noise is a draw from their softmax.
        place = tf.argmax(values / temperature - tf.math.log(-tf.math.log(uniform)), axis=-1, output_type=tf.int32)
        shape = tf.stack([b, n, width])
        values, ids = tf.broadcast_to(values, shape), tf.broadcast_to(ids, shape)
        return tf.gather(ids, place, batch_dims=2), tf.gather(values, place, batch_dims=2)

    first, total = drawn(logits, _forbidden(v, words.reserved, words.end), tf.constant(0))
    state = _taken(state, tf.zeros_like(first))
    may, only_end = _forbidden(v, words.reserved), _forbidden(v, words.reserved, words.end, only=True)

    def body(position: tf.Tensor, last: tf.Tensor, found: _Found, state: State) -> tuple[Any, ...]:
        logits, state = step(last, state, position)
        word, logs = drawn(logits, tf.where(position < length, may, only_end), position, found.words)
        total = found.total + tf.where(found.ended, 0.0, logs)
        ended = found.ended | tf.equal(word, words.end)
        return position + 1, word, _Found(_written(found.words, word, position, ended), total, ended), state

    start = _Found(tf.zeros([b, n, length], tf.int32), total, tf.zeros_like(first, tf.bool))
    start = start._replace(words=_written(start.words, first, tf.constant(0), start.ended))
    found = _loop(body, first, start, state, length)
    return Decoded(found.words, found.total)


def distinct(decoded: Decoded, original: tf.Tensor, count: int | tf.Tensor) -> Decoded:
    """Returns the most probable sequences, each once, without the original.

    Args:
        decoded: n sequences for each text.
        original: int32 [b, any], words of the texts, padded with 0.
        count: number of sequences that are returned; int32 [] if it is a tensor. If there are fewer, the others have
            log probability -inf and no words.
    """
    words, logs = decoded
    length = words.shape[2]
    n, count = tf.shape(words)[1], tf.convert_to_tensor(count, tf.int32)
    width = max(length, original.shape[1])
    of_text, of_original = (
        tf.pad(x, [[0, 0]] * (x.shape.rank - 1) + [[0, width - x.shape[-1]]]) for x in (words, original)
    )
    same = tf.reduce_all(tf.equal(of_text, of_original[:, tf.newaxis]), 2)
    # Whether a sequence before this one is equal.
    equal = tf.reduce_all(tf.equal(words[:, :, tf.newaxis], words[:, tf.newaxis]), 3)
    earlier = tf.range(n)[:, tf.newaxis] > tf.range(n)[tf.newaxis]
    logs = tf.where(same | tf.reduce_any(equal & earlier, 2), _NEVER, logs)
    kept = tf.minimum(count, n)
    logs, place = tf.math.top_k(logs, kept)
    words = tf.gather(words, place, batch_dims=1)
    words = tf.where(logs[:, :, tf.newaxis] > _NEVER, words, 0)
    missing = [[0, 0], [0, count - kept]]
    return Decoded(
        tf.ensure_shape(tf.pad(words, [*missing, [0, 0]]), [None, None, length]),
        tf.pad(logs, missing, constant_values=_NEVER),
    )


class _Found(NamedTuple):
    """Sequences so far."""

    words: tf.Tensor  # int32 [b, n, length]
    total: tf.Tensor  # float32 [b, n], log probabilities
    ended: tf.Tensor  # bool [b, n]


def _loop(body: Callable[..., tuple[Any, ...]], first: tf.Tensor, start: _Found, state: State, length: int) -> _Found:
    """Runs `body` for the positions 1, ..., length, or until all sequences have ended."""

    def goes_on(position: tf.Tensor, last: tf.Tensor, found: _Found, state: State) -> tf.Tensor:
        return tf.logical_not(tf.reduce_all(found.ended))

    loop = (tf.constant(1), first, start, state)
    shapes = tf.nest.map_structure(
        lambda x: tf.TensorShape([None if i < 2 else size for i, size in enumerate(x.shape)]), loop
    )
    # No gradient is taken, so nothing of an iteration needs to be kept.
    return tf.while_loop(
        goes_on, body, loop, shape_invariants=shapes, maximum_iterations=length, parallel_iterations=1
    )[2]


def _best(scores: tf.Tensor, n: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the n largest of scores [..., v] with their places; -inf and 0 beyond v of them."""
    kept = tf.minimum(n, tf.shape(scores)[-1])
    values, places = tf.math.top_k(scores, kept)
    missing = [[0, 0]] * (scores.shape.rank - 1) + [[0, n - kept]]
    return tf.pad(values, missing, constant_values=_NEVER), tf.pad(places, missing)


def _repeated(following: tf.Tensor, written: tf.Tensor, original: tf.Tensor) -> tf.Tensor:
    """Returns -inf for words [b, n, k] that have been written as often as the original has them, else 0.

    Args:
        following: int32 [b, n, k], words that could be next.
        written: int32 [b, n, length], words so far, padded with 0.
        original: int32 [b, any].
    """
    times = tf.math.count_nonzero(tf.equal(following[..., tf.newaxis], written[:, :, tf.newaxis]), 3)
    wanted = tf.math.count_nonzero(tf.equal(following[..., tf.newaxis], original[:, tf.newaxis, tf.newaxis]), 3)
    return tf.where(times >= tf.maximum(wanted, 1), _NEVER, 0.0)


def _forbidden(v: tf.Tensor, reserved: int, end: int | None = None, only: bool = False) -> tf.Tensor:
    """Returns 0 for words that may be written and -inf for others, float32 [v]: without `end`, or with it only."""
    word = tf.range(v)
    allowed = word >= reserved
    if end is not None:
        allowed &= tf.equal(tf.equal(word, end), only)
    return tf.where(allowed, 0.0, _NEVER)


def _written(words: tf.Tensor, word: tf.Tensor, position: tf.Tensor, ended: tf.Tensor) -> tf.Tensor:
    """Writes a word [b, n] at a position of words [b, n, length], unless the sequence has ended."""
    place = tf.one_hot(position, words.shape[2], dtype=tf.int32)
    return words + tf.where(ended, 0, word)[:, :, tf.newaxis] * place


def _taken(state: State, parent: tf.Tensor) -> State:
    """Returns the states of the sequences [b, n] that go on."""
    return tf.nest.map_structure(lambda x: tf.gather(x, parent, axis=1, batch_dims=1), state)
