"""Dense layers, normalisation to length 1 and attention over neighbours, in stock ops or in fused ops.

Both compute the same up to rounding, gradients included. The fused ops (dpsr_tf/ops/layers.h) make a training step
faster: with small batches, much of its time is the work around TensorFlow's many ops. A graph of stock ops needs no op
library.
"""

from __future__ import annotations

from typing import Any, Protocol

import tensorflow as tf

from dpsr_tf import ops
from dpsr_tf.data.examples_dataset import Tokens


class Layers(Protocol):
    """A set of kernels for the towers. All tensors are float32."""

    def dense(self, x: tf.Tensor, kernel: Any, bias: Any, relu: bool) -> tf.Tensor:
        """Returns x [n, inputs] times kernel [inputs, outputs] plus bias [outputs], cut at 0 if `relu`."""

    def unit(self, x: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
        """Scales the vectors x [texts, ..., dim] to length 1.

        Vectors shorter than 1e-6 are divided by 1e-6. The vectors of a text without tokens, as row_splits int64
        [texts + 1] tells, become zero.
        """

    def attend(self, wanted: tf.Tensor, messages: tf.Tensor, near: Tokens, temperature: float) -> tf.Tensor:
        """Returns the sum over u in near[i] of softmax_u(<wanted[i], messages[u]> / temperature) * messages[u].

        Args:
            wanted: [n, dim].
            messages: [m, dim].
            near: for each of the n rows the places of its neighbours among the m messages.
            temperature: above 0.

        Returns:
            [n, dim]; zero for a row without neighbours.
        """


class _Stock:
    def dense(self, x: tf.Tensor, kernel: Any, bias: Any, relu: bool) -> tf.Tensor:
        y = tf.nn.bias_add(tf.matmul(x, kernel), bias)
        return tf.nn.relu(y) if relu else y

    def unit(self, x: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
        has_tokens = tf.cast(row_splits[1:] > row_splits[:-1], x.dtype)
        shape = [-1] + [1] * (x.shape.rank - 1)
        return tf.math.l2_normalize(x, axis=-1, epsilon=1e-12) * tf.reshape(has_tokens, shape)

    def attend(self, wanted: tf.Tensor, messages: tf.Tensor, near: Tokens, temperature: float) -> tf.Tensor:
        count = tf.shape(wanted)[0]
        rows = tf.ragged.row_splits_to_segment_ids(near.row_splits, out_type=tf.int32)
        found = tf.gather(messages, near.values)
        logits = tf.reduce_sum(tf.gather(wanted, rows) * found, axis=1) / temperature
        top = tf.math.unsorted_segment_max(tf.stop_gradient(logits), rows, count)
        weights = tf.exp(logits - tf.gather(top, rows))
        total = tf.math.unsorted_segment_sum(weights, rows, count)
        summed = tf.math.unsorted_segment_sum(weights[:, tf.newaxis] * found, rows, count)
        return tf.ensure_shape(tf.math.divide_no_nan(summed, total[:, tf.newaxis]), [None, messages.shape[1]])


class _Fused:
    def dense(self, x: tf.Tensor, kernel: Any, bias: Any, relu: bool) -> tf.Tensor:
        # The product is an op of its own: TensorFlow's op that fuses both packs the weights anew at each step and takes
        # twice as long.
        return ops.load().dpsr_add_bias(tf.matmul(x, kernel), bias, relu=relu)

    def unit(self, x: tf.Tensor, row_splits: tf.Tensor) -> tf.Tensor:
        return ops.load().dpsr_unit_vectors(x, row_splits).y

    def attend(self, wanted: tf.Tensor, messages: tf.Tensor, near: Tokens, temperature: float) -> tf.Tensor:
        return ops.load().dpsr_attend(wanted, messages, near.values, near.row_splits, scale=1 / temperature).y


STOCK: Layers = _Stock()
FUSED: Layers = _Fused()


@tf.RegisterGradient("DpsrAddBias")
def _add_bias_gradient(op: tf.Operation, upstream: tf.Tensor) -> list[tf.Tensor]:
    return list(ops.load().dpsr_add_bias_gradient(upstream, op.outputs[0], relu=op.get_attr("relu")))


@tf.RegisterGradient("DpsrAttend")
def _attend_gradient(op: tf.Operation, upstream: tf.Tensor, unused: tf.Tensor | None) -> list[tf.Tensor | None]:
    of_inputs = ops.load().dpsr_attend_gradient(upstream, *op.inputs, op.outputs[1], scale=op.get_attr("scale"))
    return [*of_inputs, None, None]


@tf.RegisterGradient("DpsrUnitVectors")
def _unit_vectors_gradient(op: tf.Operation, upstream: tf.Tensor, unused: tf.Tensor | None) -> list[tf.Tensor | None]:
    return [ops.load().dpsr_unit_vectors_gradient(upstream, *op.outputs), None]
