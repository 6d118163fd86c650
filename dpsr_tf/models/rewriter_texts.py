"""Rewrites texts: the graph from queries to rewrites, and the checkpoint of a rewriter as a function.

`dpsr rewrite`, evaluation and benchmarks use the function; export uses the graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf

from dpsr_common.errors import CommandError
from dpsr_tf.data.store import Store
from dpsr_tf.models.encoders import restore
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.rewriter import DIRECTIONS, TITLE, UNKNOWN, Candidates, Rewriter
from dpsr_tf.models.rewriting_losses import log_probability
from dpsr_tokenizer import WordSequences
from dpsr_tokenizer.tf_ops import VocabularyTable, join_words, tokenize_strings

v1 = tf.compat.v1

# Longer texts are not queries.
_MAX_BYTES = 1024
# Texts that are rewritten at a time.
_BATCH = 64

# A rewrite, and the logarithm of its probability.
Rewrites = list[tuple[str, float]]


def rewriter(
    model_dir: str | Path,
    store: Store | None = None,
    checkpoint: str | None = None,
    method: str | None = None,
    path: str | None = None,
    threads: int | None = None,
) -> Callable[[Sequence[str], int, int], list[Rewrites]]:
    """Returns the rewriter of a model directory as a function of texts, n and a seed.

    The function returns for each text its most probable rewrites, at most n of them, the most probable one first. None
    of them is equal to the text itself, and no two are equal. A text without words has none. It works on batches of
    texts, with one thread for each core.

    Args:
        model_dir: the model.
        store: if given, the store must have the same words as the model.
        checkpoint: name of a checkpoint in the directory, such as "model.ckpt-200"; by default the last one.
        method: "beam" or "sampling"; by default the config's. The seed matters for sampling only.
        path: "direct" or "titles"; by default the config's.
        threads: number of batches at a time; by default the number of cores.

    Raises:
        CommandError: no rewriter or checkpoint is there, the checkpoint cannot be read, or the store has other words.
    """
    model = ModelDirectory.open(model_dir, "rewriter")
    if store is not None and (difference := model.store_difference(store)):
        raise CommandError(f"{model.path}: {difference}; give the store the model was trained on")
    saved = str(model.path / checkpoint) if checkpoint else model.last_checkpoint()
    threads = threads or len(os.sched_getaffinity(0))
    with tf.Graph().as_default():
        texts = v1.placeholder(tf.string, [None])
        count, seed = v1.placeholder(tf.int32, []), v1.placeholder(tf.int64, [])
        graph = RewriteGraph(model)
        outputs = graph(texts, count, seed, method, path)
        session = v1.Session(config=_session_config())
        restore(model, session, saved)
        session.run([v1.local_variables_initializer(), v1.tables_initializer()])
        session.run(graph.compose)
        run = session.make_callable(outputs, [texts, count, seed])

    def rewrite(queries: Sequence[str], n: int, seed: int = 0) -> list[Rewrites]:
        if n < 1:
            raise ValueError(f"n is {n}, expected at least 1")
        batches = [list(queries[i : i + _BATCH]) for i in range(0, len(queries), _BATCH)]

        def of(batch: list[str]) -> list[Rewrites]:
            found, logs = run(np.array([text.encode() for text in batch], object), n, seed)
            return [
                [(text.decode(), float(log)) for text, log in zip(*row, strict=True) if text and np.isfinite(log)]
                for row in zip(found, logs, strict=True)
            ]

        with ThreadPoolExecutor(threads) as pool:
            return [rewrites for batch in pool.map(of, batches) for rewrites in batch]

    return rewrite


def log_probabilities(
    model_dir: str | Path, checkpoint: str | None = None
) -> Callable[[str, Sequence[str | bytes], np.ndarray], np.ndarray]:
    """Returns a function that tells how probable it is that a rewriter writes given texts.

    Its arguments are the direction (one of rewriter.DIRECTIONS), n texts that are read, and what is written, int32
    [n, T]: words with their end, padded with 0. It returns the mean log probability of a known word of each text, the
    end included, float32 [n].

    Args:
        model_dir: the model.
        checkpoint: as `rewriter` has it.

    Raises:
        CommandError: as `rewriter`.
    """
    model = ModelDirectory.open(model_dir, "rewriter")
    saved = str(model.path / checkpoint) if checkpoint else model.last_checkpoint()
    spec = model.features.sequences
    words = WordSequences(model.words)
    runs: dict[tuple[str, int], Callable[..., np.ndarray]] = {}

    def made(direction: str, length: int) -> Callable[..., np.ndarray]:
        size = spec.title_words if DIRECTIONS[direction][0] == TITLE else spec.query_words
        with tf.Graph().as_default():
            read = v1.placeholder(tf.int32, [None, size])
            pieces = v1.placeholder(tf.int32, [None, size, spec.max_pieces])
            target = v1.placeholder(tf.int32, [None, length])
            known = words.pieces_of_vocabulary(max_pieces=spec.max_pieces, num_pieces=spec.num_pieces)
            graph = Rewriter(model.config, spec, known)
            candidates, compose = graph.frozen()
            encoded = graph.encode(direction, read, pieces)
            known_words = target > UNKNOWN
            logs = log_probability(graph, direction, encoded, target, known_words, candidates)
            mean = logs / tf.maximum(tf.reduce_sum(tf.cast(known_words, tf.float32), 1), 1.0)
            session = v1.Session()
            restore(model, session, saved)
            session.run(v1.local_variables_initializer())
            session.run(compose)
            run = session.make_callable(mean, [read, pieces, target])

        def score(texts: Sequence[str | bytes], target: np.ndarray) -> np.ndarray:
            ids = words.encode(texts, max_words=size)
            of_words = words.pieces(texts, max_words=size, max_pieces=spec.max_pieces, num_pieces=spec.num_pieces)
            return run(ids, of_words, target)

        return score

    def scores(direction: str, texts: Sequence[str | bytes], target: np.ndarray) -> np.ndarray:
        key = direction, target.shape[1]
        if key not in runs:
            runs[key] = made(*key)
        found = [runs[key](list(texts[i : i + _BATCH]), target[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]
        return np.concatenate([np.zeros(0, np.float32), *found])

    return scores


class RewriteGraph:
    """The graph from texts to rewrites, in the default graph. It has stock ops only, but for the tokenizer's.

    After the weights are restored, run v1.local_variables_initializer(), v1.tables_initializer() and then `compose`.

    Attributes:
        compose: the op that computes the vectors of all words.
    """

    def __init__(self, model: ModelDirectory):
        """`model` is a rewriter."""
        self._spec = model.features.sequences
        self._table = VocabularyTable(model.words_path)
        sequences = WordSequences(self._table.vocabulary)
        pieces = sequences.pieces_of_vocabulary(max_pieces=self._spec.max_pieces, num_pieces=self._spec.num_pieces)
        self._words = sequences.texts()
        self._rewriter = Rewriter(model.config, self._spec, pieces)
        self._candidates: Candidates
        self._candidates, self.compose = self._rewriter.frozen()

    def __call__(
        self,
        texts: tf.Tensor,
        count: int | tf.Tensor,
        seed: tf.Tensor,
        method: str | None = None,
        path: str | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Rewrites texts.

        Args:
            texts: string [b].
            count: n, 1 or more; int32 [] if it is a tensor.
            seed: int64 [], for sampling.
            method, path: as Rewriter.rewrites has them.

        Returns:
            Rewrites, string [b, n], the most probable one first, and the logarithms of their probabilities, float32
            [b, n]; "" and -inf where there are fewer than n, and for texts that are not `readable`.
        """
        spec, texts = self._spec, without_long(texts)
        words, pieces = self._table.word_sequences(texts, spec.query_words, spec.max_pieces, spec.num_pieces)
        words = tf.where(self.readable(texts)[:, tf.newaxis], words, 0)
        found = self._rewriter.rewrites(words, pieces, self._candidates, count, seed, method, path)
        return join_words(tf.constant(self._words), found.words), found.log_probabilities

    def readable(self, texts: tf.Tensor) -> tf.Tensor:
        """Returns which texts, string [b], the model can read: bool [b].

        They have words, not more than a query may have, and each word has a letter that some word of the vocabulary
        has. The pieces of other words are hashed to those of known words, so that the model would make something up.
        """
        known = tf.constant(sorted({ord(letter) for word in self._words for letter in word}), tf.int32)
        words = tokenize_strings(texts, WordSequences.config())
        letters = tf.strings.unicode_decode(words.values, "UTF-8")
        places = tf.minimum(tf.searchsorted(known, letters.values), tf.size(known) - 1)
        is_known = tf.equal(tf.gather(known, places), letters.values)
        unknown = tf.equal(_counts(is_known, letters.row_splits), 0)
        all_known = tf.equal(_counts(unknown, words.row_splits), 0)
        count = words.row_lengths()
        return all_known & (count > 0) & (count <= self._spec.query_words)


def without_long(texts: tf.Tensor) -> tf.Tensor:
    """Returns texts, string [b], with "" in the place of those that are too long for a query (1,024 bytes).

    This bounds the cost of a hostile text.
    """
    return tf.where(tf.strings.length(texts) <= _MAX_BYTES, texts, "")


def _counts(values: tf.Tensor, splits: tf.Tensor) -> tf.Tensor:
    """Returns how many of the values of each row are true; bool [m] and row splits int64 [rows + 1] to int64 [rows]."""
    # Sums of ragged tensors would make a mask of the size rows times longest row, which a long query could blow up.
    sums = tf.concat([[0], tf.cumsum(tf.cast(values, tf.int64))], 0)
    return tf.gather(sums, splits[1:]) - tf.gather(sums, splits[:-1])


def _session_config() -> tf.compat.v1.ConfigProto:
    # Batches run at the same time, each on one thread.
    config = v1.ConfigProto(intra_op_parallelism_threads=1)
    return config
