"""The layers of a tower: stock and fused ones against NumPy, values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from dpsr_tf import ops
from dpsr_tf.config import ModelConfig
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.models.layers import FUSED, STOCK
from dpsr_tf.models.two_tower import TwoTower

v1 = tf.compat.v1

BOTH = pytest.mark.parametrize("layers", [STOCK, FUSED], ids=["stock", "fused"])
SPLITS = tf.constant([0, 2, 2, 5, 6], tf.int64)  # the second text has no tokens


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@BOTH
@pytest.mark.parametrize("relu", [False, True])
def test_dense_and_its_gradients(layers, relu):
    x, kernel, bias, upstream = normal(1, 6, 5), normal(2, 5, 37), normal(3, 37), normal(4, 6, 37)
    inputs = [tf.constant(value) for value in (x, kernel, bias)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = layers.dense(*inputs, relu)
        loss = tf.reduce_sum(y * upstream)
    linear = x.astype(float) @ kernel + bias
    slope = upstream * ((linear > 0) | (not relu))
    np.testing.assert_allclose(y, np.maximum(linear, 0) if relu else linear, rtol=1e-5, atol=1e-5)
    for got, want in zip(tape.gradient(loss, inputs), (slope @ kernel.T, x.T @ slope, slope.sum(axis=0)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 16), (4, 1, 64)])
def test_unit_vectors_and_their_gradient(layers, shape):
    x, upstream = normal(1, *shape), normal(2, *shape)
    x[3] *= 1e-8  # too short to be made as long as 1
    given = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(given)
        y = layers.unit(given, SPLITS)
        loss = tf.reduce_sum(y * upstream)
    scale = 1 / np.linalg.norm(x.astype(float), axis=-1, keepdims=True)
    scale[1], scale[3] = 0, 1e6
    unit = scale * x
    along = (upstream * unit).sum(axis=-1, keepdims=True)
    along[3] = 0
    np.testing.assert_allclose(y, unit, rtol=1e-5, atol=1e-6)
    expected = scale * (upstream - along * unit) / (1 + scale)
    np.testing.assert_allclose(tape.gradient(loss, given) / (1 + scale), expected, rtol=1e-4, atol=1e-5)
    assert not np.any(y[1])


@BOTH
def test_what_is_no_number_stays_none(layers):
    x = tf.constant([[np.nan, 1.0]])
    assert np.isnan(layers.dense(x, tf.eye(2), tf.zeros(2), True)[0, 0])
    assert np.isnan(layers.unit(x, tf.constant([0, 1], tf.int64))).all()


@pytest.mark.parametrize("heads", [1, 2])
def test_a_tower_of_fused_layers_trains_as_one_of_stock_ones(heads):
    texts = Tokens(tf.constant([3, 1, 4, 1, 5, 9]), SPLITS)
    config = ModelConfig(token_dim=8, hidden=(16, 12), embedding_dim=6, num_heads=heads)

    def of(layers):
        with tf.Graph().as_default(), v1.Session() as session:
            v1.set_random_seed(1)
            towers = TwoTower(config, 10, layers=layers)
            copied = Tokens(*(tf.constant(part.numpy()) for part in texts))
            query, items = towers.query_embedding(copied), towers.item_embedding(copied)
            loss = tf.reduce_sum(tf.sin(towers.scores(query, items)))
            gradients = tf.gradients(loss, v1.trainable_variables())
            session.run(v1.global_variables_initializer())
            return session.run([query, items, *map(tf.convert_to_tensor, gradients)])

    for fused, stock in zip(of(FUSED), of(STOCK), strict=True):
        np.testing.assert_allclose(fused, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "inferred"),
    [
        (lambda kernels: kernels.dpsr_add_bias(tf.zeros([2, 3]), tf.zeros(2), relu=True), True),
        (lambda kernels: kernels.dpsr_add_bias(tf.zeros([2]), tf.zeros(2), relu=True), True),
        (lambda kernels: kernels.dpsr_add_bias_gradient(tf.zeros([2, 3]), tf.zeros([3, 2]), relu=True), True),
        (lambda kernels: kernels.dpsr_unit_vectors(tf.zeros([2, 3]), tf.zeros([2], tf.int64)), False),
        (lambda kernels: kernels.dpsr_unit_vectors(tf.zeros([2]), tf.zeros([3], tf.int64)), True),
        (lambda kernels: kernels.dpsr_unit_vectors_gradient(tf.zeros([2, 3]), tf.zeros([2, 3]), tf.zeros(3)), False),
        (lambda kernels: kernels.dpsr_unit_vectors_gradient(tf.zeros([3]), tf.zeros([2, 3]), tf.zeros(2)), True),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, inferred):
    """By the kernels, and where shapes tell already when a graph is made."""
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected"):
        call(ops.load())
    if inferred:
        with tf.Graph().as_default(), pytest.raises(ValueError, match=r"ank|imension"):
            call(ops.load())
