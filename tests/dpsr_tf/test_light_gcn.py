"""LightGCN against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from dpsr_tf import ops
from dpsr_tf.models.light_gcn import LightGcn, pair_batches, sampled_softmax_loss

RNG = np.random.default_rng(4)
# Every user and item has a pair, some have many.
USERS = np.concatenate([np.arange(7), RNG.integers(0, 7, 40), [0, 1]])
ITEMS = np.concatenate([np.arange(7), RNG.integers(0, 9, 40), [7, 8]])
PAIRS = np.unique(np.stack([USERS, ITEMS]), axis=1)


def dense(layers: int, pairs: np.ndarray = PAIRS) -> np.ndarray:
    """The mean of the powers of the normalised adjacency, [16, 16]."""
    adjacency = np.zeros((16, 16))
    adjacency[pairs[0], pairs[1] + 7] = 1
    adjacency += adjacency.T
    scale = np.maximum(adjacency.sum(axis=1), 1) ** -0.5
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


def test_hidden_pairs_are_not_in_the_graph():
    model = LightGcn(*PAIRS, dim=5, layers=3, seed=1)
    x = model.embeddings.numpy()
    # A training step that was compiled sees it too.
    propagate = tf.function(lambda: model.propagate(tf.convert_to_tensor(model.embeddings)))
    for hidden in ([0, 3, 5], [1], range(len(PAIRS[0])), []):
        model.hide(np.array(hidden, int))
        left = dense(3, np.delete(PAIRS, np.array(hidden, int), axis=1))
        np.testing.assert_allclose(propagate(), left @ x, rtol=1e-4, atol=1e-6)


def test_pairs_are_hidden_while_they_are_learned():
    hidden, count = [], len(PAIRS[0])
    batches = pair_batches(*PAIRS, 4, 8, 0.5, 1, hidden.append, parts=3)
    for _ in range(3 * (count // 3 // 4)):
        users, items, _ = next(batches)
        of_part = set(zip(*PAIRS[:, hidden[-1]].tolist(), strict=True))
        assert set(zip(users.tolist(), (items - 7).tolist(), strict=True)) <= of_part
    assert sorted(np.concatenate(hidden)) == list(range(count))


def test_the_start_spans_the_leading_eigenvectors():
    model = LightGcn(*PAIRS, dim=3, layers=1, seed=1)
    model.start_from_spectrum(scale=0.5, iterations=200, seed=1)
    x = model.embeddings.numpy()
    np.testing.assert_allclose(np.square(x).mean(), 0.25, rtol=1e-4)
    # With one layer the propagation is (A + I) / 2.
    leading = np.linalg.eigh(dense(1))[1][:, -3:]
    np.testing.assert_allclose(leading @ (leading.T @ x), x, atol=1e-3)


def test_loss_is_that_of_a_pair_against_all_negatives_by_cosine():
    final = RNG.normal(size=(16, 5)).astype(np.float32)
    users, items, negatives = np.array([0, 6, 3, 3]), np.array([7, 15, 9, 8]), np.array([9, 10, 14])
    unit = final / np.linalg.norm(final, axis=1, keepdims=True)
    scores = np.sum(unit[users] * unit[items], axis=1, keepdims=True), unit[users] @ unit[negatives].T
    shares = np.exp(np.concatenate(scores, axis=1) / 0.5)
    expected = np.mean(-np.log(shares[:, 0] / shares.sum(axis=1)))
    np.testing.assert_allclose(sampled_softmax_loss(final, users, items, negatives, 0.5), expected, rtol=1e-5)


def test_every_pair_comes_once_an_epoch_with_drawn_items():
    count = len(PAIRS[0])
    batches = pair_batches(*PAIRS, count // 2, 400, power=0.5, seed=1)
    epochs = [[next(batches), next(batches)] for _ in range(2)]
    for epoch in epochs:
        users, items, negatives = (np.concatenate(parts) for parts in zip(*epoch, strict=True))
        found = set(zip(users.tolist(), (items - 7).tolist(), strict=True))
        assert len(found) == len(users) == 2 * (count // 2)
        assert found <= set(zip(*PAIRS.tolist(), strict=True))
        # All items are drawn, and no user.
        assert set(negatives.tolist()) == set(range(7, 16))
    assert epochs[0][0][0].tolist() != epochs[1][0][0].tolist()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_items_are_drawn_by_a_power_of_their_pairs(power):
    (*_, negatives) = next(pair_batches(*PAIRS, 8, 100_000, power, seed=1))
    expected = np.bincount(PAIRS[1]) ** power
    np.testing.assert_allclose(np.bincount(negatives - 7) / 1e5, expected / expected.sum(), atol=0.01)


def test_the_same_seed_gives_the_same_batches():
    one, same, other = (next(pair_batches(*PAIRS, 8, 4, 0.5, seed)) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


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
