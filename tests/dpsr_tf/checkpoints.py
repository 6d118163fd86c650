"""Configs with changes, and the weights of checkpoints, for the tests of training."""

import dataclasses

import numpy as np
import tensorflow as tf

from dpsr_common.typed_config import from_dict
from dpsr_tf.config import Config


def with_train(config, **options):
    """Returns the config with other values in its section `train`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **options))


def changed_config(sections, **changes):
    """Makes a config of sections, with changes such as train__steps=5."""
    data = {section: dict(values) for section, values in sections.items()}
    for key, value in changes.items():
        section, name = key.split("__")
        data.setdefault(section, {})[name] = value
    return from_dict(Config, data, "test")


def weights(path, step=None):
    """Every variable of a checkpoint, the optimizer's too."""
    checkpoint = tf.train.latest_checkpoint(str(path)) if step is None else str(path / f"model.ckpt-{step}")
    return {name: tf.train.load_variable(checkpoint, name) for name, _ in tf.train.list_variables(checkpoint)}


def assert_same_weights(ones, others):
    """Asserts that all variables are equal to the bit, the optimizer's too."""
    assert set(ones) == set(others) and any("Adagrad" in name for name in ones)
    for name, value in ones.items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)
