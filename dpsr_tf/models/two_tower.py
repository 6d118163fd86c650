"""The two towers (DPSR sections 4.1 to 4.3), which map features to unit vectors. They are trained together."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import tensorflow as tf

from dpsr_tf.config import ModelConfig
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.models.features import FeatureSpec, ItemFeatures, QueryFeatures
from dpsr_tf.models.graph_encoder import VALUES, GraphEncoder
from dpsr_tf.models.input_layers import (
    Initializer,
    InputLayers,
    TableFactory,
    dense,
    required,
    segment_softmax,
    segment_sum,
    stock_table,
)
from dpsr_tf.models.layers import STOCK, Layers

if TYPE_CHECKING:
    from dpsr_tf.data.examples_dataset import History

v1 = tf.compat.v1


class TwoTower(InputLayers):
    """Query tower and item tower.

    The input layer of a tower is the concatenation of what it reads: text, features and, in the query tower, the user's
    history. The item tower sends it through ReLU layers and a last linear layer. The query tower projects it to m
    vectors, one for each head, and sends each through layers of its own (section 4.2). With one head there is no
    projection. Embeddings are normalised to length 1.

    With `graph_fan_out`, what the neighbours in the click graph say is added to a text (GraphEncoder). Queries and
    items without neighbours are embedded from their text.

    Code 0 of a feature is the unknown value and adds nothing, as an empty list and an empty history do. So the query of
    an anonymous user is embedded from its text alone.

    The first call makes the variables, and all later calls in a graph share them. A checkpoint holds them by their
    names: `token_embedding`, `query_tower/...`, `item_tower/...`.

    Attributes:
        config, features: as given.
        tables: all embedding tables by name.
        norms: mean length of query and item embeddings before normalisation, float32 [], of the last calls.

    Example:
        towers = TwoTower(ModelConfig(num_heads=2), FeatureSpec(num_tokens=vocabulary.num_ids))
        query = towers.query_embedding(QueryFeatures(query_tokens))
        scores = towers.scores(query, towers.item_embedding(ItemFeatures(item_tokens)))
    """

    def __init__(
        self,
        config: ModelConfig,
        features: FeatureSpec | int,
        table: TableFactory = stock_table,
        layers: Layers = STOCK,
        training: bool = False,
    ):
        """Makes the tables and the text encoder that the config names.

        Args:
            config: shape of the towers.
            features: what the towers read, from FeatureSpec.choose(config, ...). A number stands for
                FeatureSpec(num_tokens=number).
            table: makes the embedding tables.
            layers: models.layers.STOCK or, for training, FUSED.
            training: whether the text encoder is told that it is trained.

        Raises:
            UsageError: the text encoder cannot be imported or does not return vectors.
        """
        super().__init__(config, features, table, layers, training)
        self.norms: dict[str, tf.Tensor] = {}
        self._graph: GraphEncoder | None = None
        if config.graph_fan_out:
            *begins, rows = itertools.accumulate((attribute.num_ids for attribute in self.features.graph), initial=0)
            values = self._table(VALUES, rows, config.token_dim, begins) if rows else None
            self._graph = GraphEncoder(config, self.features.graph, self.encode, values, layers)

    def query_embedding(self, query: QueryFeatures | Tokens) -> tf.Tensor:
        """Embeds queries: unit vectors [queries, heads, embedding_dim] float32; zero for a text without tokens.

        `query` can be the text alone if the config names nothing else.
        """
        query = QueryFeatures(query) if isinstance(query, Tokens) else query
        x = self._query_input(query)
        heads = []
        for head in range(self.config.num_heads):
            with v1.variable_scope(f"query_tower/head_{head}", reuse=v1.AUTO_REUSE):
                if self.config.num_heads == 1:
                    heads.append(self._layers(x))
                    continue
                start = _identity_plus_noise if self.config.aligned_start else None
                projected = dense("projection", x, self.config.token_dim, start, kernels=self.kernels)
                heads.append(self._layers(projected))
        return self._normalised("query", tf.stack(heads, axis=1), query.text)

    def item_embedding(self, item: ItemFeatures | Tokens) -> tf.Tensor:
        """Embeds items: unit vectors [items, embedding_dim] float32; zero for a text without tokens.

        `item` can be the text alone if the config names nothing else.
        """
        item = ItemFeatures(item) if isinstance(item, Tokens) else item
        x = self.item_vector(item)
        with v1.variable_scope("item_tower", reuse=v1.AUTO_REUSE):
            outputs = self._layers(x)
        return self._normalised("item", outputs, item.text)

    def item_vector(self, item: ItemFeatures) -> tf.Tensor:
        """Returns the item tower's input layer, [items, width] float32, which also represents items in a history."""
        text = self.encode("item", item.text)
        if self._graph is not None and item.graph is not None:
            text = self._graph.fused(text, self._graph.item_context(item.graph, text))
        return tf.concat([text, *self.feature_vectors("item", self.features.item, item.features)], axis=1)

    def query_context(self, query: QueryFeatures) -> tf.Tensor:
        """Returns what the click graph adds to the texts of queries, [queries, token_dim] float32.

        It depends on text and neighbourhood alone, so it can be computed before a query comes.
        """
        graph = required(self._graph, "a graph")
        return graph.query_context(required(query.graph, "graph"), self.encode("user", query.text))

    def scores(self, query: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """Scores every query with every item (equation 1): [b, m, d] and [n, d] to float32 [b, n]."""
        inner = [tf.matmul(head, items, transpose_b=True) for head in tf.unstack(query, axis=1)]
        return soft_dot_product(inner, self.config.temperature)

    def own_scores(self, query: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """Scores every query with items of its own: [b, m, d] and [b, o, d] to float32 [b, o]."""
        inner = tf.unstack(tf.matmul(query, items, transpose_b=True), axis=1)
        return soft_dot_product(inner, self.config.temperature)

    def pair_scores(self, query: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """Scores query i with item i: [b, m, d] and [b, d] to float32 [b]."""
        return soft_dot_product(tf.unstack(head_scores(query, items), axis=1), self.config.temperature)

    def _query_input(self, query: QueryFeatures) -> tf.Tensor:
        text = self.encode("user", query.text)
        if self._graph is not None and (query.graph is not None or query.context is not None):
            context = self.query_context(query) if query.context is None else query.context
            text = self._graph.fused(text, context)
        parts = [text, *self.feature_vectors("user", self.features.user, query.user)]
        if self.config.history_length:
            history = required(query.history, "history")
            items = self._history_vectors(history)
            with v1.variable_scope("query_tower/history", reuse=v1.AUTO_REUSE):
                items += dense("type", tf.one_hot(history.types, len(EVENT_TYPES)), items.shape[1], bias=False)
                parts.append(self._pooled(text, items, history.items.row_splits))
        if self.config.query_history_length:
            history = required(query.history, "history")
            queries = self.encode("user", history.query)
            with v1.variable_scope("query_tower/query_history", reuse=v1.AUTO_REUSE):
                parts.append(self._pooled(text, queries, history.query_splits))
        return tf.concat(parts, axis=1)

    def _history_vectors(self, history: History) -> tf.Tensor:
        """Returns the vector of each event's item, [h, width]. An item in several histories is embedded once."""
        rows, places = tf.unique(history.items.values)
        first = tf.math.unsorted_segment_min(tf.range(tf.size(places)), places, tf.size(rows))
        features = history.features
        if features is not None:
            lists = tuple(_taken(tokens, first) for tokens in features.lists)
            features = type(features)(tf.gather(features.codes, first), lists)
        text = _taken(required(history.text, "text of the history"), first)
        return tf.gather(self.item_vector(ItemFeatures(text, features)), places)

    def _pooled(self, query: tf.Tensor, events: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
        """Pools `events` [h, width] into one vector for each user, [b, width]; zero for a user without events."""
        if self.config.history_pooling == "attention":
            # The key has no bias: it would add the same to all events of a user, which does not change the softmax.
            wanted = dense("query", query, self.config.token_dim)
            keys = dense("key", events, self.config.token_dim, bias=False)
            users = tf.ragged.row_splits_to_segment_ids(row_splits)
            logits = tf.reduce_sum(tf.gather(wanted, users) * keys, axis=1) / math.sqrt(self.config.token_dim)
            events *= tf.expand_dims(segment_softmax(logits, row_splits), 1)
        return segment_sum(events, row_splits)

    def _layers(self, x: tf.Tensor) -> tf.Tensor:
        """Applies the ReLU layers and the linear layer of a tower or head.

        With an aligned start, the layers start equal in all towers and heads, and they only rotate the text. So a text
        starts close to texts with the same tokens, also if training never sees it. Without it, the outputs of ReLU
        layers with random weights all lie in one narrow cone. Towers in different cones never come together under the
        hinge loss. If heads lie in different cones, one of them wins for all queries, and the soft dot product keeps it
        so.
        """
        rows = self.config.token_dim
        for i, width in enumerate((*self.config.hidden, self.config.embedding_dim)):
            is_last = i == len(self.config.hidden)
            name = "embedding" if is_last else f"hidden_{i}"
            start = _turned(i, rows) if self.config.aligned_start else None
            x = dense(name, x, width, start, relu=not is_last, kernels=self.kernels)
            rows = width
        return x

    def _normalised(self, tower: str, x: tf.Tensor, text: Tokens) -> tf.Tensor:
        """Scales `x` [texts, ..., embedding_dim] to length 1; zero where the text has no tokens."""
        self.norms[tower] = tf.reduce_mean(tf.norm(x, axis=-1))
        return self.kernels.unit(x, text.row_splits)


def head_scores(query: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
    """Returns the inner products of each head of query i with item i: [b, m, d] and [b, d] to float32 [b, m]."""
    return tf.reduce_sum(query * tf.expand_dims(items, 1), axis=2)


def soft_dot_product(inner: Sequence[tf.Tensor], temperature: float) -> tf.Tensor:
    """Returns the score of section 4.3, equation 1: the sum over heads of softmax(inner / beta) * inner.

    Args:
        inner: for each head, its inner products with the items; floats of one shape.
        temperature: beta. Below 1e-6 the score is its limit, the largest inner product.

    Returns:
        Floats of the same shape.
    """
    if len(inner) == 1:
        return inner[0]
    if temperature < 1e-6:
        return functools.reduce(tf.maximum, inner)

    # Written by hand, gradient included, with a tensor for each head: TensorFlow is slow at reducing over a short axis
    # between longer ones.
    @tf.custom_gradient
    def weighted_sum(*heads: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], list[tf.Tensor]]]:
        top = functools.reduce(tf.maximum, heads)
        terms = [tf.exp((head - top) / temperature) for head in heads]
        total = tf.add_n(terms)
        weights = [term / total for term in terms]
        score = tf.add_n([weight * head for weight, head in zip(weights, heads, strict=True)])

        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            return [
                upstream * (weight + weight * (head - score) / temperature)
                for weight, head in zip(weights, heads, strict=True)
            ]

        return score, gradient

    return weighted_sum(*inner)


def _taken(texts: Tokens, rows: tf.Tensor) -> Tokens:
    """Returns the texts of some rows."""
    found = tf.gather(tf.RaggedTensor.from_row_splits(texts.values, texts.row_splits, validate=False), rows)
    return Tokens(found.values, found.row_splits)


def _turned(seed: int, rows: int) -> Initializer:
    """Returns an initializer of a kernel: an orthogonal matrix for the first `rows` inputs, random for the others.

    Kernels with the same seed and shape have the same orthogonal matrix.
    """

    def kernel(shape: Sequence[int], dtype: tf.DType, partition_info: None = None) -> tf.Tensor:
        turned = min(rows, shape[0])  # an own text encoder may give fewer numbers
        turn = v1.orthogonal_initializer(seed=seed)([turned, shape[1]], dtype)
        return tf.concat([turn, v1.glorot_uniform_initializer()([shape[0] - turned, shape[1]], dtype)], axis=0)

    return kernel


def _identity_plus_noise(shape: Sequence[int], dtype: tf.DType, partition_info: None = None) -> tf.Tensor:
    """Initializes a kernel with the identity plus Glorot-uniform noise, so that heads start alike but not equal."""
    return tf.eye(*shape, dtype=dtype) + v1.glorot_uniform_initializer()(shape, dtype)
