"""The Estimator: Algorithm 1 of the DPSR paper as a model_fn, and what a run on one machine needs around it."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tqdm import tqdm

from dpsr_tf.config import Config
from dpsr_tf.data.dataset import Batch
from dpsr_tf.models.losses import hinge_loss, negative_weights
from dpsr_tf.models.two_tower import TwoTower

v1 = tf.compat.v1


def model_fn(features: dict[str, Batch], labels: None, mode: str, params: dict[str, Any]) -> tf.estimator.EstimatorSpec:
    """Builds the training graph.

    Args:
        features: {"batch": one batch}.
        labels: unused, the positives of the batch are the labels.
        mode: tf.estimator.ModeKeys.TRAIN; inference graphs are built from TwoTower by dpsr_export.
        params: `config` (Config) and `num_ids` (rows of the embedding table).

    Raises:
        ValueError: for another mode.
    """
    if mode != tf.estimator.ModeKeys.TRAIN:
        raise ValueError(f"mode is {mode!r}, expected {tf.estimator.ModeKeys.TRAIN!r}")
    config: Config = params["config"]
    batch = features["batch"]
    train = config.train
    towers = TwoTower(config.model, params["num_ids"])
    query = towers.query_embedding(batch.query)  # [b, d]
    item = towers.item_embedding(batch.item)  # [b + r, d]
    scores = tf.matmul(query, item, transpose_b=True)  # [b, b + r]
    # Not the diagonal of `scores`: its gradient would be a second [b, b + r] matrix.
    positive_scores = tf.reduce_sum(query * item[: train.batch_size], axis=1)
    loss = hinge_loss(
        positive_scores,
        scores,
        negative_weights(batch.negative_mask, train.mixing_ratio),
        train.margin,
        batch.weights,
        train.num_hard_negatives,
    )
    violations = tf.reduce_mean(
        tf.cast((scores > positive_scores[:, tf.newaxis] - train.margin) & batch.negative_mask, tf.float32)
    )
    v1.summary.scalar("margin_violations", violations)
    optimizer = v1.train.AdagradOptimizer(train.learning_rate)
    train_op = optimizer.minimize(loss, global_step=v1.train.get_or_create_global_step())
    return tf.estimator.EstimatorSpec(mode, loss=loss, train_op=train_op)


def run_config(model_dir: str, config: Config) -> tf.estimator.RunConfig:
    """Checkpoints, seed and session for a run on one machine."""
    session = v1.ConfigProto()
    # On a single-shard table grappler's arithmetic optimization turns the lookup into copies of the whole table.
    session.graph_options.rewrite_options.arithmetic_optimization = 2  # RewriterConfig.OFF
    return tf.estimator.RunConfig(
        model_dir=model_dir,
        tf_random_seed=config.train.seed,
        save_checkpoints_steps=config.train.checkpoint_steps,
        save_summary_steps=min(100, config.train.checkpoint_steps),
        keep_checkpoint_max=3,
        log_step_count_steps=None,
        session_config=session,
    )


class ProgressBar(tf.estimator.SessionRunHook):
    """Shows steps, examples a second, time left and the mean loss of the last steps."""

    _EVERY = 20  # steps between updates: fetching the loss costs

    def __init__(self, total_steps: int, batch_size: int):
        """`total_steps`: the global step where training ends."""
        self._total, self._batch_size = total_steps, batch_size
        self._bar: tqdm | None = None

    def begin(self) -> None:
        """Finds the step and the loss in the finished graph."""
        self._step = v1.train.get_global_step()
        self._loss = v1.get_collection(v1.GraphKeys.LOSSES)[0]

    def after_create_session(self, session: tf.compat.v1.Session, coord: tf.train.Coordinator) -> None:
        """Starts the bar where the checkpoint left off."""
        first = int(session.run(self._step))
        self._bar = tqdm(
            total=self._total * self._batch_size,
            initial=first * self._batch_size,
            desc=f"{'train':<14}",
            unit=" examples",
            unit_scale=True,
        )
        self._local = first

    def before_run(self, run_context: tf.estimator.SessionRunContext) -> tf.estimator.SessionRunArgs | None:
        """Asks for the loss now and then."""
        self._local += 1
        return tf.estimator.SessionRunArgs([self._step, self._loss]) if self._local % self._EVERY == 0 else None

    def after_run(self, run_context: tf.estimator.SessionRunContext, run_values: tf.estimator.SessionRunValues) -> None:
        """Moves the bar."""
        if run_values.results is not None and self._bar is not None:
            step, loss = run_values.results
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(int(step) * self._batch_size - self._bar.n)

    def end(self, session: tf.compat.v1.Session) -> None:
        """Moves the bar to the last step."""
        if self._bar is not None:
            self._bar.update(int(session.run(self._step)) * self._batch_size - self._bar.n)

    def close(self) -> None:
        """Ends the bar's line; after a failure too, which hooks are not told of."""
        if self._bar is not None:
            self._bar.close()
