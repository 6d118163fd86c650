"""Message passing over the click graph (SearchGCN): what the neighbours of queries and items add to their texts.

Queries and items exchange messages over clicks, items and the values of their attributes over attributes. A node
starts with the unit vector of its text, e0; a value of an attribute has an embedding of its own. A layer is the mean
over the T types of edges t that such a node can have, and within a type attends over the neighbours:

    e_v' = 1 / T sum_t sum_u softmax_u(<W_t e_u, W_t e_v> / temperature) W_t e_u

T is 1 for queries and values, and 1 + the number of attributes for items. With a sum in the place of the mean, what the
attributes say would be louder than the text.

The layers of a node are summed: e0 + e1 + e2. e1 of the neighbours is computed from their own neighbours. The weights
W_t, [token_dim, token_dim] without a bias, are the same in all layers, and the same around queries and around items.
They start as the identity, so that a node starts as the mean of what its neighbours say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import tensorflow as tf

from dpsr_common.errors import UsageError
from dpsr_tf.config import ModelConfig
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.models.features import Feature
from dpsr_tf.models.layers import Layers
from dpsr_tf.models.text_encoder import Table

if TYPE_CHECKING:
    from dpsr_tf.data.examples_dataset import Graph

v1 = tf.compat.v1

# Name of the table of attribute values, of all attributes one after the other.
VALUES = "graph_value_embedding"


class GraphEncoder:
    """Adds the neighbours of queries and items to the vectors of their texts.

    Attributes:
        num_values: number of rows of the table of attribute values.
    """

    def __init__(
        self,
        config: ModelConfig,
        attributes: Sequence[Feature],
        encode: Callable[[str, Tokens], tf.Tensor],
        values: Table | None,
        kernels: Layers,
    ):
        """Makes the encoder; its weights are made by the first call.

        Args:
            config: has a `graph_fan_out`, whose length is the number of layers.
            attributes: item features whose values are nodes of the graph.
            encode: returns the vectors of texts, [texts, token_dim]: (side "user" or "item", texts).
            values: the table of attribute values, of width token_dim; None without attributes.
            kernels: the ops that attend.
        """
        self._config, self._attributes, self._encode = config, attributes, encode
        self._values, self._kernels = values, kernels
        self._layers = len(config.graph_fan_out)
        self._nodes: tuple[Graph, _Nodes] | None = None

    def query_context(self, graph: Graph, text: tf.Tensor) -> tf.Tensor:
        """Returns e1 + e2 of queries, float32 [b, token_dim], given the vectors of their texts [b, token_dim]."""
        nodes, e0 = self._nodes_of(graph), self._unit(text)
        to_query, to_item = self._weights("item_to_query"), self._weights("query_to_item")
        near = graph.query_items
        e1 = self._attend(tf.matmul(e0, to_query), nodes.items_to_query, near)
        if self._layers == 1:
            return e1
        # The items next to queries are the first item nodes, and these have attributes.
        last = tf.reduce_max(tf.concat([near.values, [-1]], axis=0))
        items = nodes.item[: last + 1]
        wanted = tf.gather(tf.matmul(items, to_item), near.values)
        of_items = self._attend(wanted, nodes.queries_to_item, graph.query_items_queries)
        if self._attributes:
            of_values = tf.gather(self._from_values(nodes.value, graph.node_attributes), near.values)
            of_items = self._mean(of_items, of_values)
        messages = tf.matmul(of_items, to_query)
        return e1 + self._attend(tf.matmul(e1, to_query), messages, _in_order(near))

    def item_context(self, graph: Graph, text: tf.Tensor) -> tf.Tensor:
        """Returns e1 + e2 of items, float32 [n, token_dim], given the vectors of their texts [n, token_dim]."""
        nodes, e0 = self._nodes_of(graph), self._unit(text)
        to_query, to_item = self._weights("item_to_query"), self._weights("query_to_item")
        near = graph.item_queries
        e1 = self._attend(tf.matmul(e0, to_item), nodes.queries_to_item, near)
        if self._attributes:
            e1 = self._mean(e1, self._from_values(nodes.value, graph.attributes))
        if self._layers == 1:
            return e1
        wanted = tf.gather(tf.matmul(nodes.query, to_query), near.values)
        of_queries = self._attend(wanted, nodes.items_to_query, graph.item_queries_items)
        e2 = self._attend(tf.matmul(e1, to_item), tf.matmul(of_queries, to_item), _in_order(near))
        if self._attributes:
            e2 = self._mean(e2, self._from_values(self._items_of_values(graph, nodes), graph.attributes))
        return e1 + e2

    @staticmethod
    def fused(text: tf.Tensor, context: tf.Tensor) -> tf.Tensor:
        """Returns the sum of all layers at the length of the text's vector: [rows, token_dim], zero where that is zero.

        So a node with neighbours enters the layers of a tower at the scale of one without, which is its text alone.
        """
        return text + tf.stop_gradient(tf.norm(text, axis=1, keepdims=True)) * context

    def _nodes_of(self, graph: Graph) -> _Nodes:
        # A training step embeds the nodes once, for both towers.
        if self._nodes is None or self._nodes[0] is not graph:
            self._nodes = (graph, _Nodes(self, graph))
        return self._nodes[1]

    def _attend(self, wanted: tf.Tensor, messages: tf.Tensor, near: Tokens) -> tf.Tensor:
        return self._kernels.attend(wanted, messages, near, self._config.graph_temperature)

    def _mean(self, of_queries: tf.Tensor, of_values: tf.Tensor) -> tf.Tensor:
        """Returns the mean of what queries say to items and the sum of what the values of their attributes say."""
        return (of_queries + of_values) / (1 + len(self._attributes))

    def _items_of_values(self, graph: Graph, nodes: _Nodes) -> tf.Tensor:
        """Returns e1 of values of attributes, [v, token_dim]: what their items say."""
        # Each value belongs to one attribute. A message is projected after the sum over neighbours, which is linear.
        weights = [self._weights(f"item_to_{attribute.name}") for attribute in self._attributes]
        wanted = [tf.matmul(tf.matmul(nodes.value, w), w, transpose_b=True) for w in weights]
        mine = self._of_attributes(graph.value)
        target = tf.add_n([mask * vectors for mask, vectors in zip(mine, wanted, strict=True)])
        found = self._attend(target, nodes.item, graph.value_items)
        return tf.add_n([mask * tf.matmul(found, w) for mask, w in zip(mine, weights, strict=True)])

    def _of_attributes(self, rows: tf.Tensor) -> list[tf.Tensor]:
        """Returns for each attribute which of the values belong to it, float32 [v, 1]."""
        masks, first = [], 0
        for attribute in self._attributes:
            mine = (rows >= first) & (rows < first + attribute.num_ids)
            masks.append(tf.cast(mine, tf.float32)[:, tf.newaxis])
            first += attribute.num_ids
        return masks

    def _from_values(self, values: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """Returns the messages of `values` [v, token_dim] to items: [items, token_dim], given `places` [items * A].

        An item has one value of each attribute at most, so there is nothing to attend over.
        """
        places = tf.reshape(places, [-1, len(self._attributes)]) + 1
        total: list[tf.Tensor] = []
        for i, attribute in enumerate(self._attributes):
            messages = tf.matmul(values, self._weights(f"{attribute.name}_to_item"))
            total.append(tf.gather(tf.pad(messages, [[1, 0], [0, 0]]), places[:, i]))
        return tf.add_n(total)

    def _weights(self, edge: str) -> tf.Tensor:
        width = self._config.token_dim
        with v1.variable_scope("graph", reuse=v1.AUTO_REUSE):
            return v1.get_variable(edge, [width, width], initializer=v1.initializers.identity(), use_resource=True)

    def _unit(self, text: tf.Tensor) -> tf.Tensor:
        if text.shape[1] != self._config.token_dim:
            raise UsageError(
                f"model.encoder {self._config.encoder}: returned vectors of width {text.shape[1]}, expected "
                f"model.token_dim, {self._config.token_dim}, because model.graph_fan_out is set"
            )
        return tf.math.l2_normalize(text, axis=1, epsilon=1e-12)

    def values(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns e0 of values of attributes, [v, token_dim]."""
        assert self._values is not None
        return self._values.lookup(rows)

    def unit_texts(self, side: str, texts: Tokens) -> tf.Tensor:
        """Returns e0 of texts, [texts, token_dim]."""
        return self._unit(self._encode(side, texts))


class _Nodes:
    """e0 of the nodes of a graph, and the messages that they send over clicks."""

    def __init__(self, encoder: GraphEncoder, graph: Graph):
        self.query, self.item = encoder.unit_texts("user", graph.query), encoder.unit_texts("item", graph.item)
        self.value = encoder.values(graph.value) if encoder._attributes else None
        self.items_to_query = tf.matmul(self.item, encoder._weights("item_to_query"))
        self.queries_to_item = tf.matmul(self.query, encoder._weights("query_to_item"))


def _in_order(near: Tokens) -> Tokens:
    """Returns the same lists, whose neighbours are now numbered one after the other."""
    return Tokens(tf.range(tf.size(near.values)), near.row_splits)
