"""Learning-rate schedules and the optimizers of dense weights."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf

from dpsr_common.errors import UsageError
from dpsr_tf.config import Config, ModelConfig, TrainConfig
from dpsr_tf.training.optimizers import rate_factor
from dpsr_tf.training.train import config_from_flags, train

v1 = tf.compat.v1

CONFIG = Config(
    model=ModelConfig(token_dim=8, hidden=(8,), embedding_dim=6),
    train=TrainConfig(steps=12, batch_size=8, num_random_negatives=8, learning_rate=0.1, checkpoint_steps=6),
)


def with_train(**options):
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **options))


def weights(path, step):
    checkpoint = str(path / f"model.ckpt-{step}")
    return {name: tf.train.load_variable(checkpoint, name) for name, _ in tf.train.list_variables(checkpoint)}


def factors(**options):
    with tf.Graph().as_default(), v1.Session() as session:
        step = v1.placeholder(tf.int64, [])
        factor = rate_factor(TrainConfig(**options), step)
        return [float(session.run(factor, {step: s})) for s in range(options["steps"] + 2)]


def test_rates_of_a_warm_up_and_a_fall():
    assert factors(steps=4) == [1] * 6
    np.testing.assert_allclose(factors(steps=6, warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(factors(steps=4, schedule="linear"), [1, 0.75, 0.5, 0.25, 0, 0])
    falling = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    np.testing.assert_allclose(factors(steps=6, warmup_steps=2, schedule="cosine"), [0.5, 1, *falling, 0], atol=1e-7)
    np.testing.assert_allclose(factors(steps=2, warmup_steps=4, schedule="cosine"), [0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(
    ("optimizer", "slots"), [("adagrad", {"Adagrad"}), ("adam", {"Adam", "Adam_1"}), ("momentum", {"Momentum"})]
)
def test_first_step_of_each_optimizer(click_store, tmp_path, optimizer, slots):
    """Against the formulas, with the gradients that two learning rates of momentum tell; tables are AdaGrad's."""
    config = with_train(steps=1, dense_optimizer=optimizer, dense_learning_rate=0.01)
    reference = with_train(steps=1, dense_optimizer="momentum", dense_learning_rate=1.0)
    train(click_store, config, tmp_path / "model")
    train(click_store, reference, tmp_path / "reference")
    before, after = weights(tmp_path / "model", 0), weights(tmp_path / "model", 1)
    gradients = {
        name.removesuffix("/Momentum"): value
        for name, value in weights(tmp_path / "reference", 1).items()
        if name.endswith("/Momentum")
    }
    assert "item_tower/hidden_0/kernel" in gradients and "token_embedding" not in gradients
    for name, gradient in gradients.items():
        expected = {
            "adagrad": 0.01 * gradient / np.sqrt(0.1 + gradient**2),
            "adam": 0.01 * gradient / (np.abs(gradient) + 1e-8 / math.sqrt(1 - 0.999)),
            "momentum": 0.01 * gradient,
        }[optimizer]
        np.testing.assert_allclose(before[name] - after[name], expected, atol=2e-7, err_msg=name)
        assert {other.rpartition("/")[2] for other in after if other.startswith(f"{name}/")} == slots
    of_reference = weights(tmp_path / "reference", 1)
    for name in ("token_embedding", "token_embedding/Adagrad"):
        np.testing.assert_array_equal(after[name], of_reference[name])
        assert (after[name] != before[name]).any()


def test_the_schedule_is_the_rate_of_tables_and_dense_weights(click_store, tmp_path):
    """A first step of a warm-up of 10 steps is one of a tenth of the rate."""
    train(click_store, with_train(steps=1, warmup_steps=10), tmp_path / "warm")
    train(click_store, with_train(steps=1, learning_rate=0.01), tmp_path / "tenth")
    warm, tenth = weights(tmp_path / "warm", 1), weights(tmp_path / "tenth", 1)
    for name in ("token_embedding", "item_tower/hidden_0/kernel"):
        np.testing.assert_allclose(warm[name], tenth[name], atol=1e-7)
        assert (warm[name] != weights(tmp_path / "warm", 0)[name]).any()


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_a_resumed_training_gives_the_same_bits(click_store, tmp_path, optimizer):
    """It goes on from step 6, as after a kill, with the rates of the schedule from there on."""
    options = {"dense_optimizer": optimizer, "dense_learning_rate": 0.01, "average_decay": 0.9}
    config = with_train(schedule="cosine", warmup_steps=4, **options)
    train(click_store, config, tmp_path / "model")
    before = weights(tmp_path / "model", 12)
    (tmp_path / "model" / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-6"\n')
    train(click_store, config, tmp_path / "model")
    for name, value in weights(tmp_path / "model", 12).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert (before["token_embedding"] != weights(tmp_path / "model", 6)["token_embedding"]).any()


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="schedule is 'cosin', expected one of constant, linear, cosine"):
        config_from_flags(None, ["train.schedule=cosin"])
    with pytest.raises(UsageError, match="dense_optimizer is 'lamb', expected one of adagrad, adam, momentum"):
        config_from_flags(None, ["train.dense_optimizer=lamb"])
