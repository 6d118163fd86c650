"""LightGCN against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from dpsr_tf import ops
from dpsr_tf.models.light_gcn import LightGcn, softmax_loss, user_batches

RNG = np.random.default_rng(4)
# Every user and item has a pair, some have many.
USERS = np.concatenate([np.arange(7), RNG.integers(0, 7, 40), [0, 1]])
ITEMS = np.concatenate([np.arange(7), RNG.integers(0, 9, 40), [7, 8]])
PAIRS = np.unique(np.stack([USERS, ITEMS]), axis=1)


def dense(layers: int) -> np.ndarray:
    """The mean of the powers of the normalised adjacency, [16, 16]."""
    adjacency = np.zeros((16, 16))
    adjacency[PAIRS[0], PAIRS[1] + 7] = 1
    adjacency += adjacency.T
    scale = adjacency.sum(axis=1) ** -0.5
    adjacency *= scale[:, np.newaxis] * scale
    return sum(np.linalg.matrix_power(adjacency, layer) for layer in range(layers + 1)) / (layers + 1)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_propagation_is_that_of_dense_matrices(layers):
    model = LightGcn(*PAIRS, dim=5, layers=layers, seed=1)
    x = model.embeddings.numpy()
    np.testing.assert_allclose(model.propagate(tf.constant(x)), dense(layers) @ x, rtol=1e-4, atol=1e-6)
    upstream = RNG.normal(size=x.shape).astype(np.float32)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model.propagate(tf.convert_to_tensor(model.embeddings)) * upstream)
    np.testing.assert_allclose(tape.gradient(loss, model.embeddings), dense(layers) @ upstream, rtol=1e-4, atol=1e-6)


def test_loss_is_the_mean_over_users_of_the_mean_over_their_items():
    users, items = (RNG.normal(size=(n, 5)).astype(np.float32) for n in (7, 9))
    for batch, wanted, of in user_batches(*PAIRS, 3, seed=1):
        for place, user in enumerate(batch):
            assert sorted(wanted[of == place]) == sorted(PAIRS[1][PAIRS[0] == user])
        logits = users[batch] @ items.T / 0.5
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = np.mean([-logits[place][wanted[of == place]].mean() for place in range(3)])
        np.testing.assert_allclose(softmax_loss(users, items, batch, wanted, of, 0.5), expected, rtol=1e-5)
        break


def test_every_user_comes_once_an_epoch():
    batches = user_batches(*PAIRS, 7, seed=1)
    for _ in range(3):
        assert sorted(next(batches)[0]) == list(range(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": [0, 2]}, r"columns\[1\] is 2, expected 0 to 1"),
        ({"row_splits": tf.constant([0, 1, 1], tf.int64)}, "row_splits do not rise from 0 to 2"),
        ({"row_splits": tf.constant([0, 2], tf.int64)}, r"row_splits has shape \[2\], expected \[3\]"),
        ({"weights": [1.0]}, r"weights has shape \[1\], expected \[2\]"),
    ],
)
def test_bad_matrices_are_refused(change, message):
    inputs = {
        "x": tf.ones([2, 3]),
        "row_splits": tf.constant([0, 1, 2], tf.int64),
        "columns": [1, 0],
        "weights": [1.0, 1.0],
    }
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        ops.load().dpsr_propagate(**inputs | change)
