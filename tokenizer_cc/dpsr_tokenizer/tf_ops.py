"""The tokenizer as a TensorFlow op: text to token ids inside a graph, a tf.data pipeline or a servable."""

from __future__ import annotations

import os
import uuid
from typing import Any

import tensorflow as tf

from dpsr_tokenizer import TokenizerConfig, Vocabulary, op_library_path

_ops = tf.load_op_library(op_library_path())


def tokenize_strings(text: Any, config: TokenizerConfig | None = None) -> tf.RaggedTensor:
    """The tokens of `text`, string [num_texts], as string [num_texts, (num_tokens)]; needs no vocabulary.

        tokenize_strings(["red 手"])  # [[b"red", b"##re", b"#red", b"#ed#", "手".encode()]]

    `config` says which kinds of tokens; left out, the default ones. Raises InvalidArgumentError or ValueError when
    `text` is no vector.
    """
    values, row_splits = _ops.dpsr_tokenize_strings(text, config=(config or TokenizerConfig()).serialize())
    return tf.RaggedTensor.from_row_splits(values, row_splits, validate=False)


class VocabularyTable(tf.saved_model.experimental.TrackableResource):
    """A vocabulary in TensorFlow, for eager code, tf.function and tf.data as well as for graphs of TensorFlow 1.

    In a graph (tf.Graph, Estimator) the file is loaded by tf.compat.v1.tables_initializer(), and is in the collection
    ASSET_FILEPATHS, so that a SavedModel carries it in assets/. Eagerly it is loaded at once; a tf.Module that has the
    table as an attribute carries it through tf.saved_model.save. Either SavedModel may be moved. The file stays mapped
    as long as the session, or the process where there is none.

        table = VocabularyTable("store/vocabulary.dpsr")
        table.tokenize(tf.constant(["red shoes", "手机"]))  # <tf.RaggedTensor int32 [2, None]>

    Raises FileNotFoundError, and dpsr_tokenizer.FormatError for a file that is corrupt or no vocabulary; loading a file
    that became unreadable since is tf.errors.NotFoundError, DataLossError or FailedPreconditionError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(device="CPU")
        self.vocabulary = Vocabulary(path)  # what has no file or a corrupt one fails here, not in a later session
        # Graphs that share a session or a server share resources by name: another table must never be found by ours.
        self._shared_name = f"dpsr_vocabulary_{uuid.uuid4().hex}"
        asset = tf.saved_model.Asset(os.fspath(path))
        # Attributes of a resource are not tracked by themselves.
        self._asset: Any = self._track_trackable(asset, "_asset")
        with tf.init_scope():
            load = self._initialize()
            if not tf.executing_eagerly():
                tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.TABLE_INITIALIZERS, load)
                tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.ASSET_FILEPATHS, asset.asset_path)

    def tokenize(self, text: Any) -> tf.RaggedTensor:
        """Token ids of `text`, string [num_texts], as int32 [num_texts, (num_ids)].

        Raises InvalidArgumentError or ValueError when `text` is no vector, FailedPreconditionError when the table is
        not initialized.
        """
        values, row_splits = _ops.dpsr_tokenize(self.resource_handle, text)
        return tf.RaggedTensor.from_row_splits(values, row_splits, validate=False)

    def _create_resource(self) -> tf.Tensor:
        return _ops.dpsr_vocabulary_handle(shared_name=self._shared_name)

    def _initialize(self) -> Any:
        return _ops.dpsr_vocabulary_load(self.resource_handle, self._asset.asset_path)
