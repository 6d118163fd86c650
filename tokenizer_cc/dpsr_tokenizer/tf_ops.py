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


def join_words(texts: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
    """Turns word ids into texts, with stock TensorFlow ops only.

    Args:
        texts: string [num_ids], the text of each id: tf.constant(WordSequences.texts()).
        ids: int32 [..., max_words], each from 0 to num_ids - 1. Reserved ids have no text.

    Returns:
        string [...]: words after one space each, characters of scripts without spaces one after another.
    """
    return tf.strings.strip(tf.strings.reduce_join(tf.gather(texts, ids), axis=-1))


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

    def word_sequences(
        self, text: Any, max_words: int, max_pieces: int = 12, num_pieces: int = 16384
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the ids of the first words of each text, and the hashed letter trigrams (pieces) of each word.

        The vocabulary must be one of words and characters (dpsr_tokenizer.WordSequences), such as a store's
        `vocabulary.words.dpsr`. `WordSequences.pieces_of_vocabulary` has the pieces of known words by id, and
        `join_words` turns ids into texts.

        Args:
            text: string [num_texts].
            max_words: number of words of a text that are read, 1 to 1024.
            max_pieces: number of pieces of a word that are read, 1 to 256.
            num_pieces: number of values of a piece, with the 0, at least 2.

        Returns:
            words: int32 [num_texts, max_words]; 0 after the last word, 1 for an unknown word.
            pieces: int32 [num_texts, max_words, max_pieces]; 1 to num_pieces - 1, and 0 after the last of a word.

        Raises:
            tf.errors.FailedPreconditionError: the table is not initialized, or its vocabulary has other tokens.
            tf.errors.InvalidArgumentError, ValueError: `text` is not a vector, or a number is out of range.
        """
        words, pieces = _ops.dpsr_word_sequences(
            self.resource_handle, text, max_words=max_words, max_pieces=max_pieces, num_pieces=num_pieces
        )
        return words, pieces

    def _create_resource(self) -> tf.Tensor:
        return _ops.dpsr_vocabulary_handle(shared_name=self._shared_name)

    def _initialize(self) -> Any:
        return _ops.dpsr_vocabulary_load(self.resource_handle, self._asset.asset_path)
