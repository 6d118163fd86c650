"""The Estimator: Algorithm 1 of the DPSR paper as a model_fn, and what a run needs around it."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tqdm import tqdm

from dpsr_tf.config import Config
from dpsr_tf.data.dataset import Batch
from dpsr_tf.models.embedding import EmbeddingTable, device_function, minimize, saver
from dpsr_tf.models.features import FeatureSpec
from dpsr_tf.models.losses import log_q
from dpsr_tf.models.objective import build_loss
from dpsr_tf.models.two_tower import TwoTower
from dpsr_tf.training.cluster import Cluster

v1 = tf.compat.v1

_CHECKPOINTS = 3  # that are kept


def model_fn(features: dict[str, Batch], labels: None, mode: str, params: dict[str, Any]) -> tf.estimator.EstimatorSpec:
    """Builds the training graph.

    Args:
        features: {"batch": one batch}.
        labels: unused, the positives of the batch are the labels.
        mode: tf.estimator.ModeKeys.TRAIN; inference graphs are built from TwoTower by dpsr_export.
        params: `config` (Config), `features` (FeatureSpec), and `item_shares` (float32 [items], each item's share of
            the positive pairs; only where `train.log_q_correction` is on).

    Raises:
        ValueError: for another mode.
    """
    if mode != tf.estimator.ModeKeys.TRAIN:
        raise ValueError(f"mode is {mode!r}, expected {tf.estimator.ModeKeys.TRAIN!r}")
    config: Config = params["config"]
    spec: FeatureSpec = params["features"]
    batch = features["batch"]
    train = config.train
    towers = TwoTower(config.model, spec, table=EmbeddingTable)
    tables = [table for table in towers.tables.values() if isinstance(table, EmbeddingTable)]
    item_log_q = None
    if train.log_q_correction:
        shares = tf.gather(tf.constant(params["item_shares"]), batch.item_rows)
        title_share = train.num_title_queries / train.batch_size
        item_log_q = log_q(shares, len(params["item_shares"]), train.mixing_ratio, title_share)
    loss, metrics = build_loss(config, batch, towers, item_log_q)
    for name, value in metrics.items():
        v1.summary.scalar(name, value)
    train_op = minimize(loss, tables, train.learning_rate, v1.train.get_or_create_global_step())
    return tf.estimator.EstimatorSpec(
        mode, loss=loss, train_op=train_op, scaffold=v1.train.Scaffold(saver=saver(tables, max_to_keep=_CHECKPOINTS))
    )


def run_config(model_dir: str, config: Config, cluster: Cluster) -> tf.estimator.RunConfig:
    """Checkpoints, seed, placement and session of this process. A ps gets the op library here, too."""
    session = v1.ConfigProto(allow_soft_placement=True)
    # Estimator's own, which a session config given here replaces: a process waits for those it needs only.
    if not cluster.is_local and cluster.task_type != "evaluator":
        own = "/job:chief" if cluster.task_type == "chief" else f"/job:{cluster.task_type}/task:{cluster.task_index}"
        others = ["/job:worker", "/job:chief"] if cluster.task_type == "ps" else [own]
        session.device_filters.extend(["/job:ps", *others])
    run = tf.estimator.RunConfig(
        model_dir=model_dir,
        tf_random_seed=config.train.seed,
        save_checkpoints_steps=config.train.checkpoint_steps,
        save_summary_steps=min(100, config.train.checkpoint_steps),
        keep_checkpoint_max=_CHECKPOINTS,
        log_step_count_steps=None,
        session_config=session,
    )
    return run.replace(device_fn=device_function(run))


class ProgressBar(tf.estimator.SessionRunHook):
    """Shows steps, examples a second, time left and the mean loss of the last steps."""

    _EVERY = 20  # steps between updates: fetching the loss costs

    def __init__(self, total_steps: int, batch_size: int, shown: bool = True):
        """`total_steps`: the global step where training ends."""
        self._total, self._batch_size, self._shown = total_steps, batch_size, shown
        self._bar: tqdm | None = None

    def begin(self) -> None:
        """Finds the step and the loss in the finished graph."""
        self._step = v1.train.get_global_step()
        self._loss = v1.get_collection(v1.GraphKeys.LOSSES)[0]

    def after_create_session(self, session: tf.compat.v1.Session, coord: tf.train.Coordinator) -> None:
        """Starts the bar where the checkpoint left off."""
        first = int(session.run(self._step))
        self.close()  # of a session that was lost
        self._bar = tqdm(
            total=self._total * self._batch_size,
            initial=first * self._batch_size,
            desc=f"{'train':<14}",
            unit=" examples",
            unit_scale=True,
            disable=not self._shown,
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
