from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from dpsr_tf.config import ModelConfig
from dpsr_tf.data.dataset import Tokens
from dpsr_tf.models.two_tower import TwoTower

v1 = tf.compat.v1

TEXTS = [[3, 1, 4, 1], [], [5], [9, 2, 6, 5, 3, 5], []]
NUM_IDS = 12


def tokens(texts):
    values = [token for text in texts for token in text]
    splits = np.cumsum([0, *map(len, texts)])
    return Tokens(tf.constant(values, tf.int32), tf.constant(splits, tf.int64))


def run(config, build, seed=1):
    """Values of what `build(towers)` makes, and all variables by name, in a graph of TensorFlow 1."""
    with tf.Graph().as_default(), v1.Session() as session:
        v1.set_random_seed(seed)
        fetches = build(TwoTower(config, NUM_IDS))
        session.run(v1.global_variables_initializer())
        variables = {variable.op.name: variable for variable in v1.global_variables()}
        return session.run((fetches, variables))


def both(texts):
    return lambda towers: (towers.query_embedding(tokens(texts)), towers.item_embedding(tokens(texts)))


def numpy_tower(variables, tower, texts, hidden):
    """The forward pass of section 4.1 in float64."""
    table = variables["token_embedding"].astype(np.float64)
    rows = []
    for text in texts:
        x = table[text].sum(axis=0) if text else np.zeros(table.shape[1])
        for layer in [f"hidden_{i}" for i in range(hidden)] + ["embedding"]:
            x = x @ variables[f"{tower}/{layer}/kernel"] + variables[f"{tower}/{layer}/bias"]
            if layer != "embedding":
                x = np.maximum(x, 0)
        # Where every ReLU of a layer is off nothing is left to normalise.
        rows.append(x / max(np.linalg.norm(x), 1e-6) if text else np.zeros(len(x)))
    return np.stack(rows)


@pytest.mark.parametrize("hidden", [(), (16,), (16, 7)])
def test_equals_a_numpy_forward_pass(hidden):
    config = ModelConfig(token_dim=6, hidden=hidden, embedding_dim=5)
    (query, item), variables = run(config, both(TEXTS))
    assert query.dtype == np.float32 and query.shape == item.shape == (5, 5)
    np.testing.assert_allclose(query, numpy_tower(variables, "query_tower", TEXTS, len(hidden)), atol=1e-6)
    np.testing.assert_allclose(item, numpy_tower(variables, "item_tower", TEXTS, len(hidden)), atol=1e-6)


def test_unit_length_and_zero_for_empty_text():
    (query, item), _ = run(ModelConfig(token_dim=8, hidden=(16,), embedding_dim=4), both(TEXTS))
    for vectors in (query, item):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 1, 1, 0], atol=1e-6)
        assert not vectors[[1, 4]].any()


@pytest.mark.parametrize("texts", [[[]], [[], [], []]])
def test_nothing_but_empty_texts(texts):
    (query, item), _ = run(ModelConfig(token_dim=4, embedding_dim=3), both(texts))
    assert query.shape == item.shape == (len(texts), 3) and not query.any() and not item.any()


def test_empty_text_is_zero_even_with_biases():
    """Trained biases give an empty text a direction; it must match nothing all the same."""

    def build(towers):
        outputs = both(TEXTS)(towers)
        biases = [v.assign(tf.ones_like(v)) for v in v1.global_variables() if v.op.name.endswith("bias")]
        initialize = v1.global_variables_initializer()
        return outputs, biases, initialize

    with tf.Graph().as_default(), v1.Session() as session:
        outputs, biases, initialize = build(TwoTower(ModelConfig(token_dim=4, hidden=(3,), embedding_dim=3), NUM_IDS))
        session.run(initialize)
        session.run(biases)
        for vectors in session.run(outputs):
            assert not vectors[[1, 4]].any()
            np.testing.assert_allclose(np.linalg.norm(vectors[[0, 2, 3]], axis=1), 1, atol=1e-6)


def test_one_table_and_two_towers():
    config = ModelConfig(token_dim=6, hidden=(8,), embedding_dim=5)
    (query, item), variables = run(config, both(TEXTS))
    layers = ["hidden_0/kernel", "hidden_0/bias", "embedding/kernel", "embedding/bias"]
    expected = {"token_embedding", *(f"{tower}_tower/{layer}" for tower in ("query", "item") for layer in layers)}
    assert set(variables) == expected, "one table for both, a checkpoint's names"
    assert variables["token_embedding"].shape == (NUM_IDS, 6)
    assert variables["query_tower/embedding/kernel"].shape == (8, 5)
    assert np.abs(query - item)[[0, 2, 3]].max() > 0.01, "the towers have weights of their own"


def test_later_calls_share_the_variables():
    config = ModelConfig(token_dim=6, hidden=(8,), embedding_dim=5)

    def build(towers):
        return [towers.query_embedding(tokens(TEXTS)) for _ in range(2)], towers.query_embedding(tokens(TEXTS[3:4]))

    ((first, second), alone), variables = run(config, build)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(alone[0], first[3], atol=1e-6, err_msg="a text's vector does not depend on its batch")
    assert len(variables) == 5


def test_order_of_tokens_does_not_matter():
    (query, _), _ = run(ModelConfig(token_dim=6, embedding_dim=5), both([[1, 2, 3], [3, 2, 1], [1, 2, 2, 3]]))
    np.testing.assert_allclose(query[0], query[1], atol=1e-6)
    assert np.abs(query[0] - query[2]).max() > 1e-3, "a token that stands twice counts twice"


def test_seed_decides_the_initial_weights():
    config = ModelConfig(token_dim=6, embedding_dim=5)
    (one, _), variables = run(config, both(TEXTS), seed=1)
    (again, _), _ = run(config, both(TEXTS), seed=1)
    (other, _), _ = run(config, both(TEXTS), seed=2)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01
    table = variables["token_embedding"]
    assert np.abs(table).max() <= 6**-0.5 and np.abs(table).max() > 0.5 * 6**-0.5, "uniform within 1 / sqrt(width)"


@pytest.mark.parametrize("hidden", [(), (16,)])
def test_gradients_reach_the_table_and_both_towers(hidden):
    def build(towers):
        query, item = both(TEXTS)(towers)
        loss = tf.reduce_sum(query * item)
        variables = v1.trainable_variables()
        gradients = tf.gradients(loss, variables)
        return {v.op.name: tf.convert_to_tensor(g) for v, g in zip(variables, gradients, strict=True)}

    gradients, variables = run(ModelConfig(token_dim=6, hidden=hidden, embedding_dim=5), build)
    assert set(gradients) == set(variables)
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-6, name
    used = sorted({token for text in TEXTS for token in text})
    moved = np.flatnonzero(np.abs(gradients["token_embedding"]).max(axis=1) > 0)
    np.testing.assert_array_equal(moved, used)


def test_gradient_of_an_empty_text_is_zero():
    def build(towers):
        query = towers.query_embedding(tokens([[]]))
        return [tf.convert_to_tensor(g) for g in tf.gradients(tf.reduce_sum(query), v1.trainable_variables())]

    gradients, _ = run(ModelConfig(token_dim=4, hidden=(3,), embedding_dim=3), build)
    assert len(gradients) == 5 and not any(gradient.any() for gradient in gradients)


def test_gradient_of_the_table_equals_finite_differences():
    config = ModelConfig(token_dim=3, hidden=(16,), embedding_dim=3)
    goal = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)

    def build(towers):
        loss = tf.reduce_sum(towers.query_embedding(tokens(TEXTS)) * goal)
        return tf.convert_to_tensor(tf.gradients(loss, towers.token_embedding)[0])

    gradient, variables = run(config, build)

    def loss(table):
        return (numpy_tower(variables | {"token_embedding": table}, "query_tower", TEXTS, 1) * goal).sum()

    table, step = variables["token_embedding"].astype(np.float64), 1e-6
    for index in np.ndindex(table.shape):
        up, down = table.copy(), table.copy()
        up[index] += step
        down[index] -= step
        assert gradient[index] == pytest.approx((loss(up) - loss(down)) / (2 * step), abs=2e-4)
