"""The input layer of a model: tables of embeddings, and vectors of texts and features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import tensorflow as tf

from dpsr_tf.config import ModelConfig
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.models.embedding import EmbeddingTable, segment_ids
from dpsr_tf.models.features import CODED_KINDS, FIXED_KINDS, Feature, FeatureSpec, ItemFeatures
from dpsr_tf.models.layers import STOCK, Layers
from dpsr_tf.models.text_encoder import EncoderInput, Table, make_encoder

if TYPE_CHECKING:
    from dpsr_tf.data.examples_dataset import Features

v1 = tf.compat.v1

T = TypeVar("T")
Initializer = Callable[..., tf.Tensor]

# The tower that reads the texts of a side.
_TOWERS = {"user": "query", "item": "item"}

# Makes a table: (name, number of rows, width, begins=the first rows of its parts) -> Table, as EmbeddingTable does.
TableFactory = Callable[..., Table]


def stock_table(name: str, num_rows: int, dim: int, begins: Sequence[int] = (0,)) -> EmbeddingTable:
    """Makes a table of stock ops. Its graph needs no op library, and any optimizer can train it."""
    return EmbeddingTable(name, num_rows, dim, begins=begins, implementation="stock")


class InputLayers:
    """Turns texts and features into vectors, for towers and rankers.

    Code 0 of a feature is the unknown value and adds nothing, as an empty list does. Tables are variables outside of
    any scope: `token_embedding`, `item_feature_embedding`, `user_feature_embedding`.

    Attributes:
        config, features: as given.
        tables: all embedding tables by name.
        kernels: implementation of the dense layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        features: FeatureSpec | int,
        table: TableFactory = stock_table,
        layers: Layers = STOCK,
        training: bool = False,
        reads_text: bool = True,
    ):
        """Makes the tables and the text encoder that the config names; see TwoTower.

        `reads_text` is whether there is a table for the text of queries and items.
        """
        self.config = config
        self.features = FeatureSpec(features) if isinstance(features, int) else features
        self.tables: dict[str, Table] = {}
        self.kernels, self._make_table, self._training = layers, table, training
        texts: list[tuple[str, str | None]] = []
        for side, chosen in (("user", self.features.user), ("item", self.features.item)):
            for text in (*((None,) if reads_text else ()), *(f for f in chosen if f.kind == "text")):
                self._text_table(side, text)
                texts.append((_TOWERS[side], None if text is None else text.name))
            coded = [feature.num_ids for feature in chosen if feature.kind in CODED_KINDS]
            if coded:
                # All features of a side share one table, so that a batch needs one lookup, not one for each feature.
                begins = list(itertools.accumulate(coded[:-1], initial=0))
                self._table(f"{side}_feature_embedding", sum(coded), config.feature_dim, begins)
        self._encoder = make_encoder(config, texts)

    def item_vector(self, item: ItemFeatures) -> tf.Tensor:
        """Returns the item tower's input layer, [items, width] float32, which also represents items in a history."""
        text = self.encode("item", item.text)
        return tf.concat([text, *self.feature_vectors("item", self.features.item, item.features)], axis=1)

    def feature_vectors(self, side: str, chosen: tuple[Feature, ...], given: Features | None) -> list[tf.Tensor]:
        """Returns one tensor for all fixed features, [rows, width], and one for each other feature."""
        if not chosen:
            return []
        given = required(given, f"{side} features")
        offsets, next_offset = {}, 0
        for feature in chosen:
            if feature.kind in CODED_KINDS:
                offsets[feature.name] = next_offset
                next_offset += feature.num_ids
        vectors = []
        fixed = [feature for feature in chosen if feature.kind in FIXED_KINDS]
        if fixed:
            rows = given.codes + tf.constant([offsets[feature.name] for feature in fixed], given.codes.dtype)
            found = self.tables[f"{side}_feature_embedding"].lookup(tf.reshape(rows, [-1]))
            known = tf.cast(tf.reshape(given.codes, [-1, 1]) > 0, found.dtype)
            vectors.append(tf.reshape(found * known, [-1, len(fixed) * self.config.feature_dim]))
        lists = [feature for feature in chosen if feature.kind not in FIXED_KINDS]
        for feature, tokens in zip(lists, given.lists, strict=True):
            if feature.kind == "text":
                vectors.append(self.encode(side, tokens, feature))
            elif feature.kind == "vector":
                vectors.append(_dense_vectors(tokens, feature.num_ids))
            else:
                rows = Tokens(tokens.values + offsets[feature.name], tokens.row_splits)
                vectors.append(self.tables[f"{side}_feature_embedding"].bag(rows))
        return vectors

    def encode(self, side: str, tokens: Tokens, feature: Feature | None = None) -> tf.Tensor:
        """Returns the vectors of texts, [texts, width]."""
        table, name = self._text_table(side, feature), None if feature is None else feature.name
        return self._encoder(EncoderInput(tokens, table, _TOWERS[side], name, self._training))

    def _text_table(self, side: str, feature: Feature | None = None) -> Table:
        """Returns the table of the query or item text, or of a text feature.

        There is one table for each vocabulary, or one for each vocabulary and side without share_text_table.
        """
        prefix = "" if self.config.share_text_table else {"user": "query_", "item": "item_"}[side]
        if feature is None or feature.vocabulary is None:
            return self._table(f"{prefix}token_embedding", self.features.num_tokens, self.config.token_dim)
        return self._table(f"{prefix}token_embedding_{feature.vocabulary}", feature.num_ids, self.config.token_dim)

    def _table(self, name: str, num_rows: int, dim: int, begins: Sequence[int] = (0,)) -> Table:
        if name not in self.tables:
            self.tables[name] = self._make_table(name, num_rows, dim, begins=begins)
        return self.tables[name]


def segment_softmax(logits: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
    """Computes the softmax of each segment logits[row_splits[i]:row_splits[i + 1]], float [values]."""
    segments = segment_ids(row_splits, tf.size(logits, tf.int64))
    count = tf.shape(row_splits, tf.int64)[0] - 1
    top = tf.math.unsorted_segment_max(tf.stop_gradient(logits), segments, count)
    weights = tf.exp(logits - tf.gather(top, segments))
    return weights / tf.gather(tf.math.unsorted_segment_sum(weights, segments, count), segments)


def segment_sum(rows: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
    """Returns the sum of each segment rows[row_splits[i]:row_splits[i + 1]]: [values, width] to [segments, width]."""
    segments = segment_ids(row_splits, tf.shape(rows, tf.int64)[0])
    total = tf.math.unsorted_segment_sum(rows, segments, tf.shape(row_splits, tf.int64)[0] - 1)
    return tf.ensure_shape(total, [None, rows.shape[1]])


def dense(
    name: str,
    x: tf.Tensor,
    width: int,
    initializer: Initializer | None = None,
    bias: bool = True,
    relu: bool = False,
    kernels: Layers = STOCK,
) -> tf.Tensor:
    """Applies a dense layer in a variable scope of this name: x [n, inputs] to [n, width]."""
    with v1.variable_scope(name, reuse=v1.AUTO_REUSE):
        initializer = initializer or v1.glorot_uniform_initializer()
        kernel = v1.get_variable("kernel", [x.shape[1], width], initializer=initializer, use_resource=True)
        if not bias:
            return tf.matmul(x, kernel)
        zeros = v1.zeros_initializer()
        return kernels.dense(x, kernel, v1.get_variable("bias", [width], initializer=zeros, use_resource=True), relu)


def required(value: T | None, name: str) -> T:
    """Returns a value that the config asks for; raises ValueError if it is None."""
    if value is None:
        raise ValueError(f"the config asks for {name}, but got None")
    return value


def _dense_vectors(lists: Tokens, length: int) -> tf.Tensor:
    """Returns vectors of a feature, float32 [rows, length]; zero for rows without one.

    Batches carry the bits of the numbers as int32, like codes.
    """
    values = lists.values if lists.values.dtype == tf.float32 else tf.bitcast(lists.values, tf.float32)
    given = tf.where(lists.row_splits[1:] > lists.row_splits[:-1])
    num_rows = tf.size(lists.row_splits, tf.int64) - 1
    vectors = tf.scatter_nd(given, tf.reshape(values, [-1, length]), [num_rows, length])
    return tf.ensure_shape(vectors, [None, length])
