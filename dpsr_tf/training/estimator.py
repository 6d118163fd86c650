"""The Estimator: Algorithm 1 of the DPSR paper as a model_fn, with the session config and the hooks of a run."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from dpsr_common.errors import CommandError
from dpsr_tf.config import Config
from dpsr_tf.data.examples_dataset import Batch
from dpsr_tf.models.embedding import (
    EmbeddingTable,
    average,
    device_function,
    half_on_wire,
    minimize,
    name_in_checkpoint,
    saver,
    take_averages,
)
from dpsr_tf.models.features import FeatureSpec, RankingBatch
from dpsr_tf.models.input_layers import InputLayers, required
from dpsr_tf.models.layers import FUSED
from dpsr_tf.models.losses import log_q
from dpsr_tf.models.objective import build_loss
from dpsr_tf.models.quantizer import Quantizer
from dpsr_tf.models.quantizer_layer import ItemCodes, QuantizerLayer, TeacherItems
from dpsr_tf.models.ranker import Ranker
from dpsr_tf.models.ranking_losses import ranker_loss
from dpsr_tf.models.rewriter import Rewriter
from dpsr_tf.models.rewriting_losses import RewritingBatch, rewriter_loss
from dpsr_tf.models.two_tower import TwoTower
from dpsr_tf.training.cluster import Cluster
from dpsr_tf.training.optimizers import dense_optimizer, rate_factor

v1 = tf.compat.v1

# Makes a table: (name, number of rows, width, begins=the first rows of its parts).
_Tables = Callable[..., EmbeddingTable]
# Number of checkpoints that are kept.
_CHECKPOINTS = 3
SUMMARY_STEPS = 100
# Up to this batch size a step on one thread is as fast as on several threads, which mostly wait for one another.
_SMALL_BATCH = 128
_NOT_FINITE = "the loss became NaN or infinite at step"
# What the names of weights begin with that no item is embedded with.
_OF_QUERIES_ONLY = ("query_tower/", "query_token_embedding", "user_feature_embedding")


@dataclasses.dataclass(frozen=True)
class QuantizerPhase:
    """The second phase of a training, which trains a quantizer.

    Attributes:
        values: what the quantizer begins with; None in a process that does not begin it: a worker of a cluster, and a
            training that resumes from a checkpoint with a quantizer.
        known: names of the variables in the checkpoint that it begins from, if there are values.
        items: the codes of all items, for residual codes.
    """

    values: Quantizer | None = None
    known: frozenset[str] = frozenset()
    items: ItemCodes | None = None


class _Built(NamedTuple):
    """The model of a training graph, and what a step minimizes."""

    model: InputLayers | Rewriter
    loss: tf.Tensor
    metrics: dict[str, tf.Tensor]
    quantizer: QuantizerLayer | None
    rows: dict[str, tf.Tensor]  # what the batch consists of, for errors


def model_fn(features: dict[str, Any], labels: None, mode: str, params: dict[str, Any]) -> tf.estimator.EstimatorSpec:
    """Builds the training graph.

    Args:
        features: {"batch": a Batch, a RankingBatch for a ranker, or a RewritingBatch for a rewriter}, and with
            "teacher": TeacherItems for a quantizer that learns from a teacher.
        labels: unused, the positives of the batch are the labels.
        mode: tf.estimator.ModeKeys.TRAIN; inference graphs are built from TwoTower by dpsr_export.
        params: `config` (Config); `features` (FeatureSpec); `num_ps`, the number of parameter servers, 0 for none;
            `item_shares`, float32 [items], each item's share of the positive pairs, needed only if
            `train.log_q_correction` is on; `propensities`, float32 [positions], needed only if
            `ranker.propensity_weights` is on; `pieces`, int32 [words, pieces], the pieces of a rewriter's words;
            `warm_start`, a function that makes the Scaffold's `init_fn` from the
            towers, or None; `last_step`, the step at which the session ends, by default `train.steps`; and `quantizer`,
            a function that returns the QuantizerPhase, or None for a graph without a quantizer.

    A step whose loss is NaN or infinite raises InvalidArgumentError (see `loss_problem`) and changes no variable.

    Raises:
        ValueError: `mode` is not TRAIN.
    """
    if mode != tf.estimator.ModeKeys.TRAIN:
        raise ValueError(f"mode is {mode!r}, expected {tf.estimator.ModeKeys.TRAIN!r}")
    config: Config = params["config"]
    spec: FeatureSpec = params["features"]
    train = config.train
    phase: QuantizerPhase | None = params["quantizer"]() if params.get("quantizer") else None
    layout: dict[str, Any] = {"exclusive": not params["num_ps"]}
    if config.cluster.placement == "rows" and params["num_ps"] > 1:
        layout |= {"placement": "rows", "num_shards": params["num_ps"]}
    layout |= {"initial_accumulator": train.initial_accumulator, "accumulator_decay": train.accumulator_decay}
    table: _Tables = functools.partial(EmbeddingTable, **layout)
    if config.model.encoder:
        tf.keras.utils.set_random_seed(train.seed)  # Keras layers do not start from the seed of the graph
    build = {"retrieval": _build_towers, "ranker": _build_ranker, "rewriter": _build_rewriter}[config.model.kind]
    towers, loss, metrics, quantizer, rows = build(features, config, spec, table, params, phase)
    tables = [table for table in towers.tables.values() if isinstance(table, EmbeddingTable)]
    for name, value in metrics.items():
        v1.summary.scalar(name, value)
    global_step = v1.train.get_or_create_global_step()
    # Every update waits for the learning rate, and the learning rate waits for this check of the loss. The raw op is
    # used because the one in tf.debugging has a branch around it, which takes time.
    check = tf.raw_ops.Assert(
        condition=tf.math.is_finite(loss),
        data=[_NOT_FINITE, global_step, *(part for row in rows.items() for part in row)],
        summarize=-1,
    )
    with tf.control_dependencies([check]):
        factor = tf.identity(1.0)
        if train.schedule != "constant" or train.warmup_steps:
            factor = rate_factor(train, global_step.read_value())
            v1.summary.scalar("learning_rate", factor * train.learning_rate)
        if phase:
            # It begins when train.schedule's warm-up would be over, and falls from there.
            of_quantizer = dataclasses.replace(
                train, schedule=config.quantizer.schedule, warmup_steps=config.quantizer.start_step
            )
            quantizer_factor = rate_factor(of_quantizer, global_step.read_value())
    # The step is counted when this rate is known, which must be after the other factor has read it.
    with tf.control_dependencies([quantizer_factor] if phase else []):
        learning_rate = factor * (train.learning_rate * (config.quantizer.tower_rate if phase else 1.0))
    ratio = train.dense_learning_rate / train.learning_rate
    dense_learning_rate = ratio * learning_rate if ratio else learning_rate
    dense = dense_optimizer(train, dense_learning_rate)
    is_trained = _is_trained(config.quantizer.towers if phase else "both")
    train_op = minimize(loss, tables, learning_rate, global_step, dense, dense_learning_rate, is_trained)
    if train.average_decay:
        averaged = average(train_op, train.average_decay, global_step)
        # Where the towers stay as they are, so do their averages, which a checkpoint has all the same.
        train_op = train_op if phase and config.quantizer.towers == "frozen" else averaged
    if phase:
        with tf.name_scope("quantizer/"):
            train_op = tf.group(train_op, required(quantizer, "quantizer").minimize(loss, quantizer_factor))
    last_step = params.get("last_step", train.steps)
    return tf.estimator.EstimatorSpec(
        mode,
        loss=loss,
        train_op=train_op,
        scaffold=v1.train.Scaffold(
            saver=_saver(tables, phase, quantizer, train.average_decay > 0),
            init_fn=params["warm_start"](towers) if params.get("warm_start") else None,
        ),
        training_hooks=[QuickSteps(train_op, last_step, train.checkpoint_steps)] if not params["num_ps"] else [],
    )


def _weights_on_wire(config: Config) -> AbstractContextManager[Any]:
    """Returns a scope that reads weights in half precision if cluster.half_on_wire says so."""
    getter = half_on_wire if config.cluster.half_on_wire else None
    return v1.variable_scope(v1.get_variable_scope(), custom_getter=getter)


def _build_towers(
    features: dict[str, Any],
    config: Config,
    spec: FeatureSpec,
    table: _Tables,
    params: dict[str, Any],
    phase: QuantizerPhase | None,
) -> _Built:
    """Builds the two towers and their loss."""
    batch: Batch = features["batch"]
    teacher: TeacherItems | None = features.get("teacher")
    train = config.train
    item_log_q = None
    if train.log_q_correction:
        item_shares: np.ndarray = params["item_shares"]
        # Looked up outside of the graph, which may have 2 GiB in all.
        shares = tf.ensure_shape(tf.numpy_function(item_shares.take, [batch.item_rows], tf.float32), [None])
        title_share = tf.reduce_mean(tf.cast(batch.query_rows < 0, tf.float32))
        item_log_q = log_q(shares, len(item_shares), train.mixing_ratio, title_share)
    with _weights_on_wire(config):
        towers = TwoTower(config.model, spec, table=table, layers=FUSED, training=True)
        if phase is None:
            loss, metrics = build_loss(config, batch, towers, item_log_q)
    quantizer = None
    if phase is not None:
        # Outside, because the getter would give away values in the place of variables.
        quantizer = QuantizerLayer(config.quantizer, config.model.embedding_dim, items=phase.items)
        with _weights_on_wire(config):
            loss, metrics = build_loss(config, batch, towers, item_log_q, quantizer, teacher)
    rows = {"query_rows": batch.query_rows, "item_rows": batch.item_rows, "user_rows": batch.user_rows}
    return _Built(towers, loss, metrics, quantizer, rows)


def _build_ranker(
    features: dict[str, Any],
    config: Config,
    spec: FeatureSpec,
    table: _Tables,
    params: dict[str, Any],
    phase: QuantizerPhase | None,
) -> _Built:
    """Builds a ranker and its loss."""
    batch: RankingBatch = features["batch"]
    with _weights_on_wire(config):
        ranker = Ranker(config, spec, table=table, layers=FUSED, training=True)
        loss, metrics = ranker_loss(batch, ranker, params.get("propensities"))
    return _Built(ranker, loss, metrics, None, {"requests": batch.requests})


def _build_rewriter(
    features: dict[str, Any],
    config: Config,
    spec: FeatureSpec,
    table: _Tables,
    params: dict[str, Any],
    phase: QuantizerPhase | None,
) -> _Built:
    """Builds a rewriter and its loss."""
    batch: RewritingBatch = features["batch"]
    step = v1.train.get_or_create_global_step().read_value()
    with _weights_on_wire(config):
        rewriter = Rewriter(config, spec.sequences, params["pieces"], table=table, layers=FUSED, step=step)
        loss, metrics = rewriter_loss(batch, rewriter, config, step)
    return _Built(rewriter, loss, metrics, None, {})


def _is_trained(towers: str) -> Callable[[str], bool]:
    """Returns what tells by its name whether a weight is trained; `towers` is that of QuantizerConfig."""
    if towers == "both":
        return lambda name: True
    return lambda name: towers == "query" and name.startswith(_OF_QUERIES_ONLY)


def _saver(
    tables: Sequence[EmbeddingTable], phase: QuantizerPhase | None, layer: QuantizerLayer | None, has_averages: bool
) -> tf.compat.v1.train.Saver:
    """Returns the Saver of a graph. Where a quantizer begins, it restores checkpoints without one too."""
    if layer is None or phase is None or phase.values is None:
        return saver(tables, max_to_keep=_CHECKPOINTS)
    values = phase.values.arrays
    before = saver(tables, phase.known)
    averages = take_averages() if has_averages else tf.no_op()
    own = {id(variable) for variable in layer.variables}
    new = [v for v in v1.global_variables() if id(v) not in own and name_in_checkpoint(v) not in phase.known]
    others = v1.variables_initializer(new)
    given, loads = [], []
    for variable in layer.variables:
        with tf.device(variable.device):
            given.append(v1.placeholder(variable.dtype, variable.shape))
            loads.append(variable.assign(given[-1], read_value=False))

    def begin(session: tf.compat.v1.Session, checkpoint: str) -> None:
        before.restore(session, checkpoint)
        # The quantizer was computed from what the averages embed, so the towers go on from there.
        session.run(averages)
        session.run(others)
        session.run(loads, dict(zip(given, values, strict=True)))

    return saver(tables, kind=functools.partial(_BeginningSaver, begin), max_to_keep=_CHECKPOINTS)


class _BeginningSaver(tf.compat.v1.train.Saver):
    """A Saver that calls `begin` for a checkpoint that has no quantizer, and restores all others as usual."""

    def __init__(self, begin: Callable[[tf.compat.v1.Session, str], None], *args: Any, **arguments: Any):
        self._begin = begin
        super().__init__(*args, **arguments)

    def restore(self, session: tf.compat.v1.Session, checkpoint: str) -> None:
        """Restores a checkpoint, "MODEL/model.ckpt-1000"."""
        if Quantizer.is_in(checkpoint):
            super().restore(session, checkpoint)
        else:
            self._begin(session, checkpoint)


def run_config(model_dir: str, config: Config, cluster: Cluster) -> tf.estimator.RunConfig:
    """Returns checkpoint times, seed, placement and session config of this process. It also loads the op library."""
    session = v1.ConfigProto(allow_soft_placement=True)
    if cluster.is_local and config.train.batch_size <= _SMALL_BATCH and config.model.kind != "rewriter":
        session.intra_op_parallelism_threads = session.inter_op_parallelism_threads = 1
        session.experimental.executor_type = "SINGLE_THREADED_EXECUTOR"
    # A session config replaces Estimator's own device filters, so they are set again: with them a process waits only
    # for the processes that it needs.
    if not cluster.is_local and cluster.task_type != "evaluator":
        own = "/job:chief" if cluster.task_type == "chief" else f"/job:{cluster.task_type}/task:{cluster.task_index}"
        others = ["/job:worker", "/job:chief"] if cluster.task_type == "ps" else [own]
        session.device_filters.extend(["/job:ps", *others])
    run = tf.estimator.RunConfig(
        model_dir=model_dir,
        tf_random_seed=config.train.seed,
        save_checkpoints_steps=config.train.checkpoint_steps,
        save_summary_steps=min(SUMMARY_STEPS, config.train.checkpoint_steps),
        keep_checkpoint_max=_CHECKPOINTS,
        log_step_count_steps=None,
        session_config=session,
    )
    return run.replace(device_fn=device_function(run))


def loss_problem(error: tf.errors.OpError) -> str | None:
    """Returns what went wrong, with the step and the rows of the batch, if `error` is about the loss; else None."""
    parts = re.search(rf"{_NOT_FINITE}\]\s*\[(.*?)\](.*)", str(error.message), re.DOTALL)
    if parts is None:
        return None
    step, rest = parts.groups()
    rows = re.findall(r"\[(\w+_?rows|requests)\]\s*\[(.*?)\]", rest, re.DOTALL)
    of = ", ".join(f"{name} [{' '.join(r.split())}]" for name, r in rows)
    return f"{_NOT_FINITE} {step}" + (f", in a batch of {of}" if of else "")


class FiniteWeights(tf.estimator.CheckpointSaverListener):
    """Refuses to save weights that are NaN or infinite, so that training can resume from every checkpoint on disk."""

    def begin(self) -> None:
        """Adds the check to the graph, on the device of each variable."""
        checks = []
        for variable in v1.global_variables():
            if variable.dtype.is_floating:
                with tf.device(variable.device):
                    checks.append(tf.reduce_all(tf.math.is_finite(variable)))
        self._finite = tf.reduce_all(tf.stack(checks))

    def before_save(self, session: tf.compat.v1.Session, global_step_value: int) -> None:
        """Raises CommandError if a weight is NaN or infinite."""
        if not session.run(self._finite):
            raise CommandError(f"weights became NaN or infinite at step {global_step_value} and are not saved")


class NothingLeft(tf.estimator.SessionRunHook):
    """Ends a session before its first step if the last step is done already.

    Estimator notices it after a step only. So a worker of a cluster that comes late would do one step too many, and a
    quantizer could not begin with the very weights of a warm start.
    """

    def __init__(self, last_step: int):
        """`last_step` is the global step at which training ends."""
        self._last_step = last_step

    def after_create_session(self, session: tf.compat.v1.Session, coord: tf.train.Coordinator) -> None:
        """Reads the step at which the session begins."""
        self._is_done = int(session.run(v1.train.get_global_step())) >= self._last_step

    def before_run(self, run_context: tf.estimator.SessionRunContext) -> None:
        """Ends the session as the end of the input does."""
        if self._is_done:
            raise tf.errors.OutOfRangeError(None, None, f"step {self._last_step} is done")


class QuickSteps(tf.estimator.SessionRunHook):
    """Runs most steps of a training in one process by itself, without Estimator's work around each step.

    Estimator and its hooks see the first step, every 20th step, and the steps at which a checkpoint is due or training
    ends. The steps themselves are the same. With small batches, the work around them takes a third of the time.
    """

    _EVERY = 20

    def __init__(self, train_op: tf.Operation, last_step: int, checkpoint_steps: int):
        """Makes the hook of one training.

        Args:
            train_op: runs one step.
            last_step: the global step at which training ends.
            checkpoint_steps: number of steps between checkpoints, counted from where the session began.
        """
        self._train_op, self._last_step, self._checkpoint_steps = train_op, last_step, checkpoint_steps

    def after_create_session(self, session: tf.compat.v1.Session, coord: tf.train.Coordinator) -> None:
        """Reads the step at which the session begins."""
        self._run = session.make_callable(self._train_op)
        self._first = self._step = int(session.run(v1.train.get_global_step()))

    def before_run(self, run_context: tf.estimator.SessionRunContext) -> None:
        """Runs the steps before the next one that Estimator sees."""
        done = self._step - self._first
        if done:
            distances = (self._EVERY, self._checkpoint_steps)
            ahead = min(self._last_step - self._step, *(every - done % every for every in distances))
            for _ in range(ahead - 1):
                self._run()
                self._step += 1
        self._step += 1


class ProgressBar(tf.estimator.SessionRunHook):
    """Shows examples, examples per second, time left and the last loss. The rate goes to TensorBoard too.

    Attributes:
        num_steps: number of steps that this process of a cluster has trained.
    """

    # Steps between updates in a cluster, where fetching the loss takes time.
    _EVERY = 20

    def __init__(self, total_steps: int, batch_size: int, summary_dir: str | None, says_start: bool = False):
        """Makes the bar of one process.

        Args:
            total_steps: the global step at which training ends.
            batch_size: examples per step.
            summary_dir: folder of the chief's TensorBoard events; None, for other processes, shows no bar.
            says_start: whether to print a line each time a session starts; for the processes of a cluster.
        """
        self._total, self._batch_size = total_steps, batch_size
        self._summary_dir, self._says_start = summary_dir, says_start
        self._bar: tqdm | None = None
        self.num_steps = 0

    def begin(self) -> None:
        """Finds the step and the loss in the finished graph."""
        self._step = v1.train.get_global_step()
        self._loss = v1.get_collection(v1.GraphKeys.LOSSES)[0]

    def after_create_session(self, session: tf.compat.v1.Session, coord: tf.train.Coordinator) -> None:
        """Starts the bar where the checkpoint left off."""
        first = int(session.run(self._step))
        self.close()  # the bar of a session that was lost
        if self._says_start:
            print(f"training from step {first:,}", flush=True)
        self._bar = tqdm(
            total=self._total * self._batch_size,
            initial=first * self._batch_size,
            desc=f"{'train':<14}",
            unit=" examples",
            unit_scale=True,
            disable=self._summary_dir is None,
        )
        self._since = (first, time.monotonic())

    def before_run(self, run_context: tf.estimator.SessionRunContext) -> tf.estimator.SessionRunArgs | None:
        """Asks for step and loss when an update is due."""
        self.num_steps += 1
        # A process that trains alone is called by QuickSteps every 20th step only.
        every = self._EVERY if self._says_start else 1
        return tf.estimator.SessionRunArgs([self._step, self._loss]) if self.num_steps % every == 0 else None

    def after_run(self, run_context: tf.estimator.SessionRunContext, run_values: tf.estimator.SessionRunValues) -> None:
        """Moves the bar."""
        if run_values.results is not None and self._bar is not None:
            step, loss = run_values.results
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(int(step) * self._batch_size - self._bar.n)
            self._summarise(int(step))

    def _summarise(self, step: int) -> None:
        first, since = self._since
        if self._summary_dir is None or step - first < SUMMARY_STEPS:
            return
        self._since = (step, time.monotonic())
        rate = (step - first) * self._batch_size / (self._since[1] - since)
        summary = v1.Summary(value=[v1.Summary.Value(tag="examples_per_second", simple_value=rate)])
        v1.summary.FileWriterCache.get(self._summary_dir).add_summary(summary, step)

    def end(self, session: tf.compat.v1.Session) -> None:
        """Moves the bar to the last step."""
        if self._bar is not None:
            self._bar.update(int(session.run(self._step)) * self._batch_size - self._bar.n)

    def close(self) -> None:
        """Ends the line of the bar. Callers do this after failures too, of which hooks are not told."""
        if self._bar is not None:
            self._bar.close()
