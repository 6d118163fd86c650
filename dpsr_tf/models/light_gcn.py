"""LightGCN (He et al., SIGIR 2020): embeddings of ids that are propagated over the whole graph of users and items.

It is the message passing of graph_encoder.py without texts, attention and weights, over all edges in the place of
sampled ones, with symmetric normalisation. It compares the message passing with what is published, on data that have
ids alone (docs/graph.md); the retrieval of a shop needs texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
        order = np.lexsort((ends[1], ends[0]))
        self._rows, columns = (end[order] for end in ends)
        # The pair of each value of the matrix.
        self._pairs, self._num_pairs = order % len(users), len(users)
        self._splits = tf.constant(row_splits(np.bincount(self._rows, minlength=nodes)))
        self._columns = tf.constant(columns, tf.int32)
        self._weights = tf.Variable(tf.zeros(len(order)), trainable=False)
        self.hide(np.array([], int))
        start = np.random.default_rng(seed).normal(0, 0.1, (nodes, dim))
        self.embeddings = tf.Variable(start, dtype=tf.float32)

    def hide(self, pairs: np.ndarray) -> None:
        """Takes the edges of these pairs out of the graph, as if they had never been, and all others back into it.

        A pair that is predicted while the graph has its edge teaches the model to read this edge, and a pair of the
        future has none.

        Args:
            pairs: numbers of pairs in the order of the constructor.
        """
        seen = np.ones(self._num_pairs, np.float32)
        seen[pairs] = 0
        values, columns = seen[self._pairs], self._columns.numpy()
        degree = np.maximum(np.bincount(self._rows, values, len(self._splits) - 1), 1)
        self._weights.assign(values / np.sqrt(degree[self._rows] * degree[columns]))

    def propagate(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the mean of the layers of x, [nodes, dim] float32."""
        weights = tf.convert_to_tensor(self._weights)

        def product(x: tf.Tensor) -> tf.Tensor:
            return ops.load().dpsr_propagate(x, self._splits, self._columns, weights)

        @tf.custom_gradient
        def step(x: tf.Tensor) -> tuple[tf.Tensor, object]:
            # The adjacency is symmetric, so the gradient is the same product.
            return product(x), product

        layer = total = x
        for _ in range(self._layers):
            layer = step(layer)
            total += layer
        return total / (self._layers + 1)

    def final(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the final embeddings of users [users, dim] and of items [items, dim].

        Their lengths matter: a user's score of an item is the inner product (equation 6).
        """
        final = self.propagate(tf.convert_to_tensor(self.embeddings))
        return final[: self.num_users], final[self.num_users :]

    def start_from_spectrum(self, scale: float, iterations: int, seed: int) -> None:
        """Sets the embeddings to the leading eigenvectors of A, about, by subspace iteration.

        These are the smoothest signals on the graph, which a training from random embeddings has to find first.

        Args:
            scale: root of the mean square of the values.
            iterations: of two products with A + I each. The eigenvalues of A + I are not negative.
            seed: seed of the signals that the iteration begins with.
        """
        x = tf.random.stateless_normal(self.embeddings.shape, [seed, 0])
        for _ in range(iterations):
            for _ in range(2):
                x += ops.load().dpsr_propagate(x, self._splits, self._columns, self._weights)
            x, _ = tf.linalg.qr(x)
        self.embeddings.assign(x * scale * np.sqrt(len(x)))


def sampled_softmax_loss(
    final: tf.Tensor, users: tf.Tensor, items: tf.Tensor, negatives: tf.Tensor, temperature: float
) -> tf.Tensor:
    """Returns the softmax loss of pairs by cosines, the mean over pairs: an item against items that were drawn.

    Published work trains LightGCN with it in the place of BPR (Wu et al., On the Effectiveness of Sampled Softmax Loss
    for Item Recommendation, TOIS 2024). An epoch of it learns far more than one of BPR, as each pair meets all
    negatives of the batch.

    Args:
        final: final embeddings, [nodes, dim] float32.
        users, items: the nodes of the pairs, int [batch].
        negatives: nodes of items, which all pairs share, int [negatives]. A pair's own item may be among them.
        temperature: divides the cosines.
    """
    chosen, right, wrong = (tf.math.l2_normalize(tf.gather(final, nodes), 1) for nodes in (users, items, negatives))
    positive = tf.reduce_sum(chosen * right, axis=1) / temperature
    others = tf.reduce_logsumexp(tf.matmul(chosen / temperature, wrong, transpose_b=True), axis=1)
    return tf.reduce_mean(tf.math.softplus(others - positive))


def pair_batches(
    users: np.ndarray,
    items: np.ndarray,
    size: int,
    num_negatives: int,
    power: float,
    seed: int,
    hide: Callable[[np.ndarray], None] | None = None,
    parts: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields nodes for sampled_softmax_loss without end: each pair once an epoch, and items that are drawn.

    Args:
        users, items: the pairs, int [pairs] each, as for LightGcn.
        size: pairs of a batch. The last pairs of a part that do not fill one are left out.
        num_negatives: items that are drawn for each batch.
        power: an item with d pairs is drawn in proportion to d^power. The scores that are learned then lack as much of
            its popularity: to rank items, power * temperature * log d is to be added to a cosine, or more.
        seed: seed of the order and of the items.
        hide: is called with the numbers of the pairs of a part before its first batch (LightGcn.hide).
        parts: number of parts of an epoch, of equal size. They are drawn anew in each epoch.
    """
    first, rng = int(users.max()) + 1, np.random.default_rng(seed)
    drawn = np.cumsum(np.bincount(items) ** power)
    users, items = users.astype(np.int32), (items + first).astype(np.int32)
    while True:
        shuffled = rng.permutation(len(users))
        for part in np.array_split(shuffled, parts):
            if hide is not None:
                hide(part)
            for begin in range(0, len(part) - size + 1, size):
                batch = part[begin : begin + size]
                negatives = np.searchsorted(drawn, rng.uniform(0, drawn[-1], num_negatives), side="right")
                yield users[batch], items[batch], (negatives + first).astype(np.int32)
