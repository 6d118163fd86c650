"""Reads and compares the weights of checkpoints, for the tests of training."""

import dataclasses

import numpy as np
import tensorflow as tf


def with_train(config, **options):
    """Returns the config with other values in its section `train`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **options))


def weights(path, step=None):
    """Every variable of a checkpoint, the optimizer's too."""
    checkpoint = tf.train.latest_checkpoint(str(path)) if step is None else str(path / f"model.ckpt-{step}")
    return {name: tf.train.load_variable(checkpoint, name) for name, _ in tf.train.list_variables(checkpoint)}


def assert_same_weights(ones, others):
    """Asserts that all variables are equal to the bit, the optimizer's too."""
    assert set(ones) == set(others) and any("Adagrad" in name for name in ones)
    for name, value in ones.items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)
