"""The tokenizer as TensorFlow ops, for graphs, tf.data pipelines and servables."""

from __future__ import annotations

import os
import uuid
from typing import Any

import tensorflow as tf

from dpsr_tokenizer import TokenizerConfig, Vocabulary, op_library_path

_ops = tf.load_op_library(op_library_path())


def tokenize_strings(text: Any, config: TokenizerConfig | None = None) -> tf.RaggedTensor:
    """Tokenizes `text`, string [num_texts], to string [num_texts, (num_tokens)]. Needs no vocabulary.

        tokenize_strings(["red 手"])  # [[b"red", b"##re", b"#red", b"#ed#", "手".encode()]]

    `config` says which kinds of tokens to make; without it, the default kinds. Raises InvalidArgumentError or
    ValueError if `text` is not a vector.
    """
    values, row_splits = _ops.dpsr_tokenize_strings(text, config=(config or TokenizerConfig()).serialize())
    return tf.RaggedTensor.from_row_splits(values, row_splits, validate=False)


class VocabularyTable(tf.saved_model.experimental.TrackableResource):
    """A vocabulary as a TensorFlow resource, for eager code, tf.function, tf.data and graphs of TensorFlow 1.

    In a graph (tf.Graph, Estimator), tf.compat.v1.tables_initializer() loads the file. The file is in the collection
    ASSET_FILEPATHS, so that a SavedModel carries it in assets/. In eager code, the file is loaded at once, and
    tf.saved_model.save of a tf.Module that has the table as an attribute saves the file, too. Both kinds of SavedModel
    may be moved. The file stays mapped as long as the session lives or, without a session, the process.

        table = VocabularyTable("store/vocabulary.dpsr")
        table.tokenize(tf.constant(["red shoes", "手机"]))  # <tf.RaggedTensor int32 [2, None]>

    Raises FileNotFoundError, and dpsr_tokenizer.FormatError for a file that is corrupt or not a vocabulary. If the file
    becomes unreadable before it is loaded, loading raises tf.errors.NotFoundError, DataLossError or
    FailedPreconditionError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(device="CPU")
        # Opens the file here, so that a missing or corrupt one fails now and not in a later session.
        self.vocabulary = Vocabulary(path)
        # Graphs in one session or server share resources by name, so the name must be unique.
        self._shared_name = f"dpsr_vocabulary_{uuid.uuid4().hex}"
        asset = tf.saved_model.Asset(os.fspath(path))
        # TensorFlow does not track the attributes of a resource by itself.
        self._asset: Any = self._track_trackable(asset, "_asset")
        with tf.init_scope():
            load = self._initialize()
            if not tf.executing_eagerly():
                tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.TABLE_INITIALIZERS, load)
                tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.ASSET_FILEPATHS, asset.asset_path)

    def tokenize(self, text: Any) -> tf.RaggedTensor:
        """Turns `text`, string [num_texts], into token ids, int32 [num_texts, (num_ids)].

        Raises InvalidArgumentError or ValueError if `text` is not a vector, FailedPreconditionError if the table is not
        initialized.
        """
        values, row_splits = _ops.dpsr_tokenize(self.resource_handle, text)
        return tf.RaggedTensor.from_row_splits(values, row_splits, validate=False)

    def _create_resource(self) -> tf.Tensor:
        return _ops.dpsr_vocabulary_handle(shared_name=self._shared_name)

    def _initialize(self) -> Any:
        return _ops.dpsr_vocabulary_load(self.resource_handle, self._asset.asset_path)
