"""What a tower does with dense vectors: layers and vectors of length 1, in stock ops or in fused ones.

Both compute the same, to rounding, gradients too. The fused ones (dpsr_tf/ops/layers.h) make a training step quicker:
with small batches the work around TensorFlow's many ops is much of it. A graph of stock ops needs no op library.
"""

from __future__ import annotations

from typing import Any, Protocol

import tensorflow as tf

from dpsr_tf import ops


class Layers(Protocol):
    """The two things, float32."""

    def dense(self, x: tf.Tensor, kernel: Any, bias: Any, relu: bool) -> tf.Tensor:
        """x [n, inputs] times kernel [inputs, outputs], plus bias [outputs]; with `relu` not below 0: [n, outputs]."""

    def unit(self, x: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
        """The vectors x [texts, ..., dim] at length 1.

        Those shorter than 1e-6 are divided by that; those of a text without tokens, by row_splits int64 [texts + 1],
        are zero.
        """


class _Stock:
    def dense(self, x: tf.Tensor, kernel: Any, bias: Any, relu: bool) -> tf.Tensor:
        y = tf.nn.bias_add(tf.matmul(x, kernel), bias)
        return tf.nn.relu(y) if relu else y

    def unit(self, x: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
        has_tokens = tf.cast(row_splits[1:] > row_splits[:-1], x.dtype)
        shape = [-1] + [1] * (x.shape.rank - 1)
        return tf.math.l2_normalize(x, axis=-1, epsilon=1e-12) * tf.reshape(has_tokens, shape)


class _Fused:
    def dense(self, x: tf.Tensor, kernel: Any, bias: Any, relu: bool) -> tf.Tensor:
        # Not one op with the product: TensorFlow's fused one packs the weights anew each step and takes twice as long.
        return ops.load().dpsr_add_bias(tf.matmul(x, kernel), bias, relu=relu)

    def unit(self, x: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
        return ops.load().dpsr_unit_vectors(x, row_splits).y


STOCK: Layers = _Stock()
FUSED: Layers = _Fused()


@tf.RegisterGradient("DpsrAddBias")
def _add_bias_gradient(op: tf.Operation, upstream: tf.Tensor) -> list[tf.Tensor]:
    return list(ops.load().dpsr_add_bias_gradient(upstream, op.outputs[0], relu=op.get_attr("relu")))


@tf.RegisterGradient("DpsrUnitVectors")
def _unit_vectors_gradient(op: tf.Operation, upstream: tf.Tensor, unused: tf.Tensor | None) -> list[tf.Tensor | None]:
    return [ops.load().dpsr_unit_vectors_gradient(upstream, *op.outputs), None]
