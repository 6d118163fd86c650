"""LightGCN (He et al., SIGIR 2020): embeddings of ids that are propagated over the whole graph of users and items.

It is the message passing of graph_encoder.py without texts, attention and weights, over all edges in the place of
sampled ones, with symmetric normalisation. It shows that the message passing reaches what is published, on data that
have ids alone (docs/graph.md); the retrieval of a shop needs texts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from dpsr_tf import ops
from dpsr_tf.data.column_files import row_splits


class LightGcn:
    """Users and items whose final embedding is the mean of the layers E, AE, AAE, ... (equations 7 and 8).

    A is the adjacency of users and items with weight 1 / sqrt(degree of both) for each edge.

    Attributes:
        embeddings: the layer 0, all that is trained: float32 [users + items, dim].
    """

    def __init__(self, users: np.ndarray, items: np.ndarray, dim: int, layers: int, seed: int):
        """Makes the graph and random embeddings.

        Args:
            users, items: the pairs, int [pairs] each; numbers from 0 on.
            dim: width of the embeddings.
            layers: number of layers beside layer 0.
            seed: seed of the embeddings.
        """
        self.num_users, self._layers = int(users.max()) + 1, layers
        ends = np.concatenate([users, items + self.num_users]), np.concatenate([items + self.num_users, users])
        nodes = self.num_users + int(items.max()) + 1
        degree = np.maximum(np.bincount(ends[0], minlength=nodes), 1)
        order = np.lexsort((ends[1], ends[0]))
        rows, columns = (end[order] for end in ends)
        self._splits = tf.constant(row_splits(np.bincount(rows, minlength=nodes)))
        self._columns = tf.constant(columns, tf.int32)
        self._weights = tf.constant(1 / np.sqrt(degree[rows] * degree[columns]), tf.float32)
        start = np.random.default_rng(seed).normal(0, 0.1, (nodes, dim))
        self.embeddings = tf.Variable(start, dtype=tf.float32)

    def propagate(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the mean of the layers of x, [nodes, dim] float32."""
        layer = total = x
        for _ in range(self._layers):
            layer = self._step(layer)
            total += layer
        return total / (self._layers + 1)

    def final(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the final embeddings of users [users, dim] and of items [items, dim].

        Their lengths matter: a user's score of an item is the inner product (equation 6).
        """
        final = self.propagate(tf.convert_to_tensor(self.embeddings))
        return final[: self.num_users], final[self.num_users :]

    def _step(self, x: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def step(x: tf.Tensor) -> tuple[tf.Tensor, object]:
            # The adjacency is symmetric, so the gradient is the same product.
            return self._product(x), self._product

        return step(x)

    def _product(self, x: tf.Tensor) -> tf.Tensor:
        return ops.load().dpsr_propagate(x, self._splits, self._columns, self._weights)


def softmax_loss(
    users: tf.Tensor, items: tf.Tensor, batch: tf.Tensor, wanted: tf.Tensor, of: tf.Tensor, temperature: float
) -> tf.Tensor:
    """Returns the softmax loss of some users over all items, the mean over each user's items and over users.

    Args:
        users, items: final embeddings, [users, dim] and [items, dim].
        batch: the users, int [b].
        wanted: their items, int [pairs].
        of: the place of each pair's user in `batch`, int [pairs], ascending.
        temperature: divides the inner products.
    """
    chosen = tf.gather(users, batch) / temperature
    # The mean score of a user's items is the score of their mean.
    positive = tf.reduce_sum(chosen * tf.math.segment_mean(tf.gather(items, wanted), of), axis=1)
    return tf.reduce_mean(tf.reduce_logsumexp(tf.matmul(chosen, items, transpose_b=True), axis=1) - positive)


def user_batches(
    users: np.ndarray, items: np.ndarray, size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields `batch`, `wanted` and `of` for softmax_loss without end: each user with all of its items once an epoch."""
    order = np.argsort(users, kind="stable")
    items, counts = items[order], np.bincount(users)
    splits, rng = row_splits(counts), np.random.default_rng(seed)
    while True:
        shuffled = rng.permutation(np.flatnonzero(counts))
        for begin in range(0, len(shuffled) - size + 1, size):
            batch = shuffled[begin : begin + size]
            of = np.repeat(np.arange(size), counts[batch])
            places = np.repeat(splits[batch] - row_splits(counts[batch])[:-1], counts[batch]) + np.arange(len(of))
            yield batch.astype(np.int32), items[places].astype(np.int32), of.astype(np.int32)
