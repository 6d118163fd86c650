"""Learning rates over the steps of a training, and the optimizer of the dense weights."""

from __future__ import annotations

import math

import tensorflow as tf

from dpsr_tf.config import TrainConfig

v1 = tf.compat.v1

_MOMENTUM = 0.9


def rate_factor(train: TrainConfig, step: tf.Tensor) -> tf.Tensor:
    """Returns what the learning rates are multiplied by at a step, float32 [].

    In the first `warmup_steps` steps w, step s (from 0) has the factor (s + 1) / w. After them the factor stays 1, or
    falls to 0 at `steps`: linearly, or as half a cosine wave (Loshchilov and Hutter, 2017, without restarts).

    Args:
        train: names the schedule.
        step: number of steps that were done, int64 [].
    """
    done = tf.cast(step, tf.float32)
    factor = tf.constant(1.0)
    if train.schedule != "constant":
        length = max(1, train.steps - train.warmup_steps)
        share = tf.clip_by_value((done - train.warmup_steps) / length, 0.0, 1.0)
        factor = 1.0 - share if train.schedule == "linear" else 0.5 * (1.0 + tf.cos(math.pi * share))
    return tf.minimum(factor, (done + 1.0) / max(1, train.warmup_steps))


def dense_optimizer(train: TrainConfig, learning_rate: tf.Tensor) -> tf.compat.v1.train.Optimizer | None:
    """Returns the optimizer of all weights but embedding tables; None for AdaGrad, which embedding.minimize has."""
    if train.dense_optimizer == "adam":
        return v1.train.AdamOptimizer(learning_rate)
    if train.dense_optimizer == "momentum":
        return v1.train.MomentumOptimizer(learning_rate, _MOMENTUM)
    return None
