"""The training examples of a rewriter: pairs of texts of a store as tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dpsr_tf.config import Config
from dpsr_tf.data.rewriting_batches import RewritingBatches, RewritingOptions
from dpsr_tf.data.store import Store
from dpsr_tf.models.features import SequenceSpec
from dpsr_tf.models.model_directory import ModelDirectory, feature_spec
from dpsr_tf.models.rewriting_losses import RewritingBatch
from dpsr_tf.training.cluster import Cluster
from dpsr_tf.training.generated_input import generated_input
from dpsr_tokenizer import Vocabulary, WordSequences


class RewriterExamples:
    """Reads the examples of a training. Opening it finds out what cannot be trained on."""

    def __init__(self, store: Store, config: Config):
        """Raises UsageError if the store has no sequences of words."""
        feature_spec(config, store)
        self._store = store
        self._words = WordSequences(Vocabulary(str(store.words_path)))
        own: dict[str, Any] = {
            "batch_size": config.rewriter.click_pairs,
            "pair_batch_size": config.train.batch_size,
            "seed": config.train.seed,
        }
        # All others have the names of the config.
        names = {field.name for field in dataclasses.fields(RewritingOptions)} - own.keys()
        self._options = RewritingOptions(**own, **{name: getattr(config.rewriter, name) for name in names})

    def pieces(self, model: ModelDirectory) -> np.ndarray:
        """Returns the pieces of each word of the vocabulary, int32 [words, max_pieces]."""
        spec = model.features.sequences
        return self._words.pieces_of_vocabulary(max_pieces=spec.max_pieces, num_pieces=spec.num_pieces)

    def input_fn(self, model: ModelDirectory, cluster: Cluster) -> Callable[[], tf.data.Dataset]:
        """Returns the input_fn of an Estimator, which begins at the global step."""
        spec = model.features.sequences
        arrays = RewritingBatches(self._store, self._options, cluster.worker_index, cluster.num_workers)

        def batches(first: int) -> Iterator[RewritingBatch]:
            for batch in arrays.batches(first):
                yield self._tensors(batch, spec)

        example = self._tensors(arrays.batch(0), spec)
        return generated_input(example, batches, cluster)

    def _tensors(self, batch: dict[str, np.ndarray], spec: SequenceSpec) -> RewritingBatch:
        queries, query_pieces = words_of(self._words, batch["queries"], spec.query_words, spec)
        titles, title_pieces = words_of(self._words, batch["titles"], spec.title_words, spec)
        sources, source_pieces = words_of(self._words, batch["pair_source"], spec.query_words, spec)
        return RewritingBatch(
            queries,
            query_pieces,
            batch["query_words"],
            titles,
            title_pieces,
            batch["title_words"],
            batch["weights"],
            sources,
            source_pieces,
            batch["pair_words"],
            batch["pair_weights"],
        )


def words_of(
    words: WordSequences, texts: Sequence[str | bytes] | np.ndarray, size: int, spec: SequenceSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the words of texts, int32 [b, size], and their pieces, int32 [b, size, max_pieces]."""
    texts = list(texts)
    pieces = words.pieces(texts, max_words=size, max_pieces=spec.max_pieces, num_pieces=spec.num_pieces)
    return words.encode(texts, max_words=size), pieces
