"""The ranker: one tower that scores an item for a query and a user (section 3 of the paper on DSR and DPR).

All features of user, query and item go through ReLU layers to a logit. The paper's two towers are the same tower on
two items, and training compares their logits; a server scores each item alone.

The first layer is linear in three blocks, so that a server can compute each where it is cheap:

    item      what depends on the item alone: text, features, numbers of kind item. Computed at export.
    request   what depends on query and user: text, features, history, numbers of kind request. Once for a request.
    pair      the others: numbers of kind pair, products, attention on the history. For each item to be ranked.

Shapes: b requests, n items to be ranked (n of all requests together), u distinct items, h events of histories, H the
longest history, w the width of an item's vector, k model.token_dim, l the width of the first layer, f the number of
fixed features of an item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from dpsr_tf.config import Config
from dpsr_tf.data.examples_dataset import Features, Tokens
from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.models.features import FIXED_KINDS, FeatureSpec, ItemFeatures, Lists, Number
from dpsr_tf.models.input_layers import InputLayers, TableFactory, dense, required, segment_sum, stock_table
from dpsr_tf.models.layers import STOCK, Layers

v1 = tf.compat.v1

_SCOPE = "ranker"
# Events back after which an event counts half among the recent ones.
HALF_LIFE = 5
# Positions above this one share its bias.
MOST_POSITIONS = 255


class Request(NamedTuple):
    """What of b requests the items to be ranked are compared with."""

    inputs: tf.Tensor  # [b, width], all of the following layers' inputs that depend on query and user
    hidden: tf.Tensor  # [b, l], part of the first layer before its ReLU
    text: tf.Tensor  # [b, k]; [b, 0] without texts
    wanted: tf.Tensor  # [b, k], is multiplied with `Ranker.offered` of an item
    pooled: tf.Tensor | None  # [b, w], mean vector of the history's items, zero without history; None if there is none
    events: tf.Tensor | None  # [b, H, w], vectors of the history's items, padded with zeros; None without attention
    keys: tf.Tensor | None  # [b, H, k]; None without attention
    codes: tf.Tensor | None  # int32 [b, H, f], codes of the history's items, padded with 0; None without matches
    lengths: tf.Tensor | None  # int64 [b], the length of each history


class Ranker(InputLayers):
    """Scores items for requests.

    The first call makes the variables, and all later calls in a graph share them. A checkpoint holds them by their
    names: `token_embedding`, `item_feature_embedding`, `user_feature_embedding`, `ranker/...`.

    `scores` is the whole model. Training, evaluation and export use the same parts. Of an item: `item_vectors`,
    `item_hidden` and, if the config has them, `item_codes` (`has_matches`) and `item_inputs` (`has_crosses`). Of a
    request: `request`. Of both: `logits`.

    Example:
        ranker = Ranker(config, features)
        scores = ranker.scores(lists)   # [n]
    """

    def __init__(
        self,
        config: Config,
        features: FeatureSpec,
        table: TableFactory = stock_table,
        layers: Layers = STOCK,
        training: bool = False,
    ):
        """Makes the tables.

        Args:
            config: its sections `model` and `ranker` name the shape.
            features: what the ranker reads; its numbers with their scales.
            table: makes the embedding tables.
            layers: models.layers.STOCK or, for training, FUSED.
            training: whether there is dropout.
        """
        super().__init__(config.model, features, table, layers, training, config.ranker.texts)
        self.ranker = config.ranker
        self._fixed = [feature for feature in features.item if feature.kind in FIXED_KINDS]
        self._dropout = config.ranker.dropout if training else 0.0

    @property
    def has_attention(self) -> bool:
        """Whether each item attends on the history."""
        return self.config.history_length > 0 and self.config.history_pooling == "attention"

    @property
    def has_matches(self) -> bool:
        """Whether features of each item are compared with those of the history's items."""
        return self.config.history_length > 0 and self.ranker.matches and bool(self._fixed)

    @property
    def has_crosses(self) -> bool:
        """Whether there are cross layers, which read all inputs."""
        return self.ranker.crosses > 0

    def scores(self, lists: Lists) -> tf.Tensor:
        """Returns the score of each item to be ranked, float32 [n]. Only scores of one request can be compared."""
        vectors = self.item_vectors(lists.items)
        history = tf.gather(vectors, lists.history.values) if self.config.history_length else None
        codes = history_codes = None
        if self.has_matches:
            of_items = self.item_codes(lists.items)
            codes, history_codes = (tf.gather(of_items, p.values) for p in (lists.candidates, lists.history))
        request = self.request(
            lists.query,
            lists.user,
            history,
            lists.history.row_splits,
            lists.history_types,
            lists.request_numbers,
            history_codes,
        )
        mine = tf.gather(vectors, lists.candidates.values)
        hidden = self.item_hidden(mine, lists.item_numbers)
        inputs = self.item_inputs(mine, lists.item_numbers) if self.has_crosses else None
        return self.logits(request, mine, hidden, lists.candidates.row_splits, lists.pair_numbers, codes, inputs)

    def item_vectors(self, items: ItemFeatures) -> tf.Tensor:
        """Returns the vector of each item, [u, w]: its text and its features, one after another."""
        if self.ranker.texts:
            return self.item_vector(items)
        vectors = self.feature_vectors("item", self.features.item, items.features)
        return tf.concat([tf.zeros([tf.size(items.text.row_splits) - 1, 0]), *vectors], 1)

    def item_hidden(self, vectors: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """Returns the items' part of the first layer before its ReLU: [n, w] and [n, numbers of kind item] to [n, l].

        It depends on the item alone.
        """
        return self._part("item", self.item_inputs(vectors, numbers))

    def item_inputs(self, vectors: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """Returns the items' part of what the first layer reads, [n, width]."""
        return tf.concat([vectors, *self._scaled("item", numbers)], 1)

    def item_codes(self, items: ItemFeatures) -> tf.Tensor:
        """Returns the codes of the items' fixed features, int32 [u, f]."""
        return required(items.features, "item features").codes

    def request(
        self,
        query: Tokens,
        user: Features,
        history: tf.Tensor | None,
        history_splits: tf.Tensor,
        history_types: tf.Tensor,
        numbers: tf.Tensor,
        codes: tf.Tensor | None = None,
    ) -> Request:
        """Computes what depends on query and user.

        Args:
            query: b texts.
            user: features of the b users.
            history: vectors of the items of all events, [h, w], oldest first; None without history.
            history_splits: int64 [b + 1], which events belong to which request.
            history_types: int32 [h], index in EVENT_TYPES.
            numbers: [b, numbers of kind request], NaN where there is none.
            codes: `item_codes` of the items of all events, int32 [h, f]; needed if `has_matches`.
        """
        text = self.encode("user", query) if self.ranker.texts else tf.zeros([tf.size(query.row_splits) - 1, 0])
        inputs = [text, *self.feature_vectors("user", self.features.user, user), *self._scaled("request", numbers)]
        pooled = events = keys = lengths = None
        if history is not None:
            lengths = history_splits[1:] - history_splits[:-1]
            count = tf.cast(tf.maximum(lengths, 1), tf.float32)[:, tf.newaxis]
            pooled = segment_sum(history, history_splits) / count
            inputs += [pooled, tf.math.log1p(tf.cast(lengths, tf.float32))[:, tf.newaxis]]
        if history is not None and self.has_attention:
            with v1.variable_scope(f"{_SCOPE}/history", reuse=v1.AUTO_REUSE):
                keys = dense("key", history, self.config.token_dim, bias=False)
                keys += dense("type", tf.one_hot(history_types, len(EVENT_TYPES)), self.config.token_dim, bias=False)
                # The number of later events of the user: 0, 1, 2 to 3, 4 to 7, and so on.
                ages = tf.gather(history_splits, tf.ragged.row_splits_to_segment_ids(history_splits) + 1)
                ages = tf.cast(ages - tf.range(tf.size(ages, tf.int64)), tf.float32)  # 1 for the last event
                buckets = 1 + max(1, self.config.history_length).bit_length()
                age = tf.cast(tf.math.log(ages) / math.log(2.0) + 1e-4, tf.int32)
                keys += dense("age", tf.one_hot(age, buckets), self.config.token_dim, bias=False)
            events, keys = (_padded(values, history_splits) for values in (history, keys))
        joined = tf.concat(inputs, 1)
        return Request(
            inputs=joined,
            hidden=self._part("request", joined),
            text=text,
            wanted=self._dense("wanted", joined),
            pooled=pooled,
            events=events,
            keys=keys,
            codes=_padded(required(codes, "codes of the history"), history_splits) if self.has_matches else None,
            lengths=lengths,
        )

    def offered(self, vectors: tf.Tensor) -> tf.Tensor:
        """Returns what of items is multiplied with `Request.wanted`: [n, w] to [n, k]. It depends on the item alone."""
        return self._dense("offered", vectors)

    def logits(
        self,
        request: Request,
        vectors: tf.Tensor,
        hidden: tf.Tensor,
        row_splits: tf.Tensor,
        numbers: tf.Tensor,
        codes: tf.Tensor | None = None,
        inputs: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Scores items for requests.

        Args:
            request: of `request`.
            vectors: vectors of the n items, those of a request one after another, [n, w].
            hidden: of `item_hidden`, [n, l].
            row_splits: int64 [b + 1], which of the n items belong to which request.
            numbers: [n, numbers of kind pair], NaN where there is none.
            codes: of `item_codes`, int32 [n, f]; needed if `has_matches`.
            inputs: of `item_inputs`; needed if `has_crosses`.

        Returns:
            float32 [n].
        """
        of_item = tf.ragged.row_splits_to_segment_ids(row_splits)
        pair = self._pair_inputs(request, vectors, of_item, row_splits, numbers, codes)
        x = hidden + tf.gather(request.hidden, of_item)
        if pair is not None:
            x += self._part("pair", pair)
        with v1.variable_scope(_SCOPE, reuse=v1.AUTO_REUSE):
            bias = v1.get_variable("hidden_0/bias", [x.shape[1]], initializer=v1.zeros_initializer(), use_resource=True)
            x = self._left(tf.nn.relu(x + bias))
            for i, width in enumerate(self.config.hidden[1:], 1):
                x = self._left(dense(f"hidden_{i}", x, width, relu=True, kernels=self.kernels))
            if self.has_crosses:
                parts = [required(inputs, "inputs of items"), tf.gather(request.inputs, of_item)]
                x = tf.concat([x, self._crossed(tf.concat(parts if pair is None else [*parts, pair], 1))], 1)
            return tf.squeeze(dense("logit", x, 1, kernels=self.kernels), 1)

    def _pair_inputs(
        self,
        request: Request,
        vectors: tf.Tensor,
        of_item: tf.Tensor,
        row_splits: tf.Tensor,
        numbers: tf.Tensor,
        codes: tf.Tensor | None,
    ) -> tf.Tensor | None:
        """Returns what the first layer reads of each pair, [n, width]; `of_item` is the request of each item."""
        inputs = list(self._scaled("pair", numbers))
        if self.ranker.products and vectors.shape[1]:
            inputs.append(tf.gather(request.wanted, of_item) * self.offered(vectors))
            if self.ranker.texts:
                text = vectors[:, : self.config.token_dim]
                inputs.append(tf.reduce_sum(text * tf.gather(request.text, of_item), axis=1, keepdims=True))
            if request.pooled is not None:
                inputs.append(self._by_field(vectors * tf.gather(request.pooled, of_item)))
        if request.events is not None:
            inputs.append(self._attended(request, vectors, row_splits))
        if request.codes is not None:
            inputs.append(self._matches(request, required(codes, "codes of items"), row_splits))
        return tf.concat(inputs, 1) if inputs else None

    def position_bias(self, positions: tf.Tensor) -> tf.Tensor:
        """Returns what training adds to scores for positions, int32 [n]: float32 [n]; 0 for unknown ones."""
        with v1.variable_scope(_SCOPE, reuse=v1.AUTO_REUSE):
            zeros = v1.zeros_initializer()
            biases = v1.get_variable("position_bias", [MOST_POSITIONS], initializer=zeros, use_resource=True)
        known = tf.clip_by_value(positions, 1, MOST_POSITIONS)
        return tf.where(positions > 0, tf.gather(biases, known - 1), tf.zeros_like(positions, tf.float32))

    def _attended(self, request: Request, vectors: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
        """Pools the history for each item by attention (DIN, Zhou et al., KDD 2018, with a scaled product)."""
        with v1.variable_scope(f"{_SCOPE}/history", reuse=v1.AUTO_REUSE):
            wanted = _padded(dense("query", vectors, self.config.token_dim), row_splits)  # [b, m, k]
        logits = tf.matmul(wanted, request.keys, transpose_b=True) / math.sqrt(self.config.token_dim)  # [b, m, H]
        known = tf.sequence_mask(request.lengths, tf.shape(request.keys)[1])[:, tf.newaxis]
        weights = tf.nn.softmax(tf.where(known, logits, -1e9 * tf.ones_like(logits)))
        pooled = tf.matmul(weights, request.events)  # [b, m, w]; zero without events, whose vectors are padding
        flat = _flat(pooled, row_splits)
        return tf.concat([flat, self._by_field(flat * vectors)], 1)

    def _matches(self, request: Request, codes: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
        """Compares fixed features of items, int32 [n, f], with those of the history's items.

        Returns:
            float32 [n, 3 f]: of each feature, how many of the events have the same value: the logarithm of 1 + their
            number, their share, and their sum with weights that halve every few events back.
        """
        history = required(request.codes, "codes of the history")
        mine = tf.RaggedTensor.from_row_splits(codes, row_splits, validate=False).to_tensor()
        same = tf.equal(mine[:, :, tf.newaxis], history[:, tf.newaxis]) & (history > 0)[:, tf.newaxis]  # [b, m, H, f]
        same = tf.cast(same, tf.float32)
        lengths = required(request.lengths, "lengths of histories")
        age = tf.cast(lengths[:, tf.newaxis] - tf.range(tf.shape(history, tf.int64)[1]), tf.float32)  # [b, H]
        recent = tf.where(age > 0, tf.pow(2.0, -age / HALF_LIFE), tf.zeros_like(age))
        count = tf.reduce_sum(same, 2)
        share = count / tf.cast(tf.maximum(lengths, 1), tf.float32)[:, tf.newaxis, tf.newaxis]
        recent = tf.reduce_sum(same * recent[:, tf.newaxis, :, tf.newaxis], 2)
        return _flat(tf.concat([tf.math.log1p(count), share, recent], 2), row_splits, 3 * len(self._fixed))

    def _crossed(self, inputs: tf.Tensor) -> tf.Tensor:
        """Applies the cross layers of DCN-v2 (Wang et al., WWW 2021, equation 1, with weights of low rank).

        x_{i+1} = x_0 * (U_i V_i x_i + b_i) + x_i, with x_0 = inputs [n, width] and V_i of k rows.
        """
        x = inputs
        for i in range(self.ranker.crosses):
            low = dense(f"cross_{i}_low", x, self.config.token_dim, bias=False)
            x = inputs * dense(f"cross_{i}", low, int(inputs.shape[1]), kernels=self.kernels) + x
        return x

    def _by_field(self, products: tf.Tensor) -> tf.Tensor:
        """Sums products of items' vectors [n, w] over each of their parts: text and each feature, [n, fields]."""
        texts = [self.config.token_dim] if self.ranker.texts else []
        widths = [*texts, *[self.config.feature_dim] * len(self._fixed)]
        rest = int(products.shape[1]) - sum(widths)
        parts = tf.split(products, [*widths, rest] if rest else widths, axis=1)
        return tf.stack([tf.reduce_sum(part, axis=1) for part in parts], axis=1)

    def _part(self, kind: str, x: tf.Tensor) -> tf.Tensor:
        """Returns the part of the first layer that one kind of input has: [rows, width] to [rows, l]."""
        with v1.variable_scope(f"{_SCOPE}/hidden_0", reuse=v1.AUTO_REUSE):
            initializer = v1.glorot_uniform_initializer()
            shape = [int(x.shape[1]), self.config.hidden[0]]
            return tf.matmul(x, v1.get_variable(f"{kind}_kernel", shape, initializer=initializer, use_resource=True))

    def _dense(self, name: str, x: tf.Tensor) -> tf.Tensor:
        with v1.variable_scope(_SCOPE, reuse=v1.AUTO_REUSE):
            return dense(name, x, self.config.token_dim, kernels=self.kernels)

    def _left(self, x: tf.Tensor) -> tf.Tensor:
        return tf.nn.dropout(x, rate=self._dropout) if self._dropout else x

    def _scaled(self, kind: str, values: tf.Tensor) -> list[tf.Tensor]:
        numbers = self.features.numbers_of(kind)
        return [scaled(numbers, values)] if numbers else []


def scaled(numbers: Sequence[Number], values: tf.Tensor) -> tf.Tensor:
    """Scales numbers as models.features.Number says.

    Args:
        numbers: c numbers.
        values: float32 [rows, c], NaN where there is none.

    Returns:
        float32 [rows, c + m]: the scaled values, then for each of the m numbers that may miss 1 if it does, else 0.
    """

    def row(name: str) -> tf.Tensor:
        return tf.constant([[getattr(number, name) for number in numbers]], tf.float32)

    missing = tf.math.is_nan(values)
    logs = tf.sign(values) * tf.math.log1p(tf.abs(values) / row("unit"))
    x = tf.clip_by_value((logs - row("mean")) / row("std"), -Number.CUT, Number.CUT)
    x = tf.where(missing, tf.zeros_like(x), x)
    may_miss = [place for place, number in enumerate(numbers) if number.may_miss]
    if not may_miss:
        return x
    return tf.concat([x, tf.cast(tf.gather(missing, may_miss, axis=1), tf.float32)], 1)


def _flat(padded: tf.Tensor, row_splits: tf.Tensor, width: int | None = None) -> tf.Tensor:
    """Removes the padding of a matrix [b, longest, width]: returns its other rows, [n, width]."""
    rows = tf.boolean_mask(padded, tf.sequence_mask(row_splits[1:] - row_splits[:-1], tf.shape(padded)[1]))
    return tf.ensure_shape(rows, [None, width or padded.shape[2]])


def _padded(values: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
    """Returns rows [n, width] as one matrix for each request, [b, longest, width], padded with zeros."""
    ragged = tf.RaggedTensor.from_row_splits(values, row_splits, validate=False)
    return tf.ensure_shape(ragged.to_tensor(), [None, None, values.shape[1]])
