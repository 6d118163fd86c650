"""`dpsr train`: trains the two towers, a ranker, or a rewriter on a store."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import flags

from dpsr_common.errors import CommandError, UsageError, op_message
from dpsr_common.files import locked
from dpsr_common.object_store import cached, is_remote
from dpsr_common.strict_yaml import read_yaml
from dpsr_common.typed_config import from_dict, read_assignment, to_dict
from dpsr_tf.config import Config
from dpsr_tf.data.examples_dataset import BatchOptions, examples_dataset, training_input
from dpsr_tf.data.store import (
    FORMAT,
    FORMAT_VERSION,
    Store,
    check_replaceable,
    interactions_names,
    read_manifest,
)
from dpsr_tf.models.features import FeatureSpec, Number
from dpsr_tf.models.model_directory import ModelDirectory, feature_spec, other_files
from dpsr_tf.models.quantizer import Quantizer
from dpsr_tf.models.quantizer_layer import ItemCodes
from dpsr_tf.models.text_encoder import load_encoder
from dpsr_tf.training import quantizer_start, validation
from dpsr_tf.training.cluster import Cluster
from dpsr_tf.training.estimator import (
    FiniteWeights,
    NothingLeft,
    ProgressBar,
    QuantizerPhase,
    loss_problem,
    model_fn,
    run_config,
)
from dpsr_tf.training.quantizer_start import Teacher
from dpsr_tf.training.ranker_examples import RankerExamples
from dpsr_tf.training.rewriter_examples import RewriterExamples
from dpsr_tf.training.warm_start import SUMS, WarmStart

USAGE = """
Usage: dpsr train --store=STORE --out=MODEL [--config=FILE] [--set=KEY=VALUE ...] [--warm_start=MODEL]

Trains the query tower and the item tower on a store, or what model.kind of the config names: a ranker or a rewriter. If
OUT already holds a model, training resumes from its last checkpoint. With --warm_start, a new model begins with the
weights of another one, whose store may have had other tokens and other values of features.
"""

REQUIRED_FLAGS = ("store", "out")
REMOTE_INPUTS = ("warm_start",)
REMOTE_PATHS = ("store",)

# Files of a store that no worker opens to train a retrieval model, by the first part of their names.
_UNREAD = {"held_out", "filters", "requests", "held_requests", "statistics", "numbers", "sequences", "rewriting"}
# Seconds between a worker's looks for the chief's quantizer.
_POLL = 1.0


class LostError(CommandError):
    """Another process of the cluster is gone. Starting this process again helps.

    The status is the one that Kubeflow takes for "user-defined, retryable".
    """

    status = 138


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr train`."""
    flags.DEFINE_string("store", None, "directory of the store, from `dpsr ingest`", flag_values=values)
    flags.DEFINE_string("out", None, "directory of the model, created if it does not exist", flag_values=values)
    flags.DEFINE_string(
        "config",
        None,
        "config file (YAML). Without it the model reads texts only, with one head and no ReLU layers; "
        "dpsr_tf/configs/dpsr.yaml is the paper's model",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "overwrite", False, "remove the model in --out, if there is one, and train from the start", flag_values=values
    )
    flags.DEFINE_string(
        "warm_start",
        None,
        "model whose weights the training begins with; it is not read again if --out holds a checkpoint",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "warm_start_sums",
        "keep",
        SUMS,
        "for --warm_start, whether AdaGrad's sums of squared gradients are taken from that model or start as usual",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "set", [], "override a value of the config, for example train.steps=500", flag_values=values
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr train`."""
    cluster = Cluster.from_environment()
    if values.overwrite and not cluster.is_local:
        raise UsageError(
            "--overwrite: cannot be combined with TF_CONFIG, because the tasks of a cluster share --out; remove the "
            "model first"
        )
    store, config, warm_start = read_flags(values, cluster)
    if cluster.task_type == "evaluator" and not config.validation.queries:
        raise UsageError(
            "TF_CONFIG: task: type is 'evaluator', but validation.queries is 0; set how many queries the evaluator asks"
        )
    train(store, config, values.out, cluster, warm_start, values.overwrite)


def read_flags(values: flags.FlagValues, cluster: Cluster | None = None) -> tuple[Store, Config, WarmStart | None]:
    """Returns store, config and warm start that the flags name.

    Args:
        values: the flags of `dpsr train`.
        cluster: as in `train`.

    Raises:
        UsageError, CommandError: what is wrong with a flag, the config or the store.
    """
    config, out = config_from_flags(values.config, values.set), Path(values.out)
    store = open_store(values.store, config, cluster or Cluster())
    if config.model.kind != "retrieval":
        _check_kind(store, config, values)
        return store, config, None
    if not store.counts.positives and config.train.num_title_queries < config.train.batch_size:
        raise CommandError(
            f"{values.store}: holds no positive pair, because it was made without interactions; train on titles alone, "
            f"with --config=dpsr_tf/configs/catalogue.yaml or train.num_title_queries as large as train.batch_size"
        )
    warm_start = None
    if values.warm_start is not None:
        _check_stays(values, "--warm_start", values.warm_start)
        warm_start = WarmStart.open(values.warm_start, config, values.warm_start_sums)
    quantizer_start.check(config, store)
    is_new = values.overwrite or tf.train.latest_checkpoint(str(out)) is None
    if config.quantizer.sub_spaces and not config.quantizer.start_step and warm_start is None and is_new:
        raise UsageError(
            "quantizer.start_step is 0, so the quantizer would start from random embeddings; give the number of steps "
            "that train the towers first, or the trained model to begin with, --warm_start=MODEL"
        )
    return store, config, warm_start


def open_store(path: str, config: Config, cluster: Cluster) -> Store:
    """Opens a store. Of one in an object store, only the files that this process may open are copied to this machine.

    Raises:
        CommandError: as Store and object_store.cached.
    """
    if not is_remote(path):
        return Store(path)
    manifest = cached(path, lambda name: name == "manifest.json") / "manifest.json"
    has = _files_of(read_manifest(manifest, FORMAT, FORMAT_VERSION, "dpsr ingest"), config, cluster)
    return Store(cached(path, has), has)


def _files_of(manifest: dict[str, Any], config: Config, cluster: Cluster) -> Callable[[str], bool] | None:
    """Returns what tells whether a process may open a file of a store; None if it may open all of them."""
    shards, model = manifest.get("shards"), config.model
    is_trainer = not cluster.is_local and cluster.task_type != "evaluator"
    if not is_trainer or model.kind != "retrieval" or not isinstance(shards, int):
        return None
    unread = _UNREAD if model.graph_fan_out else _UNREAD | {"graph"}
    starts_quantizer = bool(config.quantizer.sub_spaces) and cluster.task_type == "chief"
    reads_all_queries = bool(model.graph_fan_out or model.query_history_length)
    others: set[str] = set()
    if "shard_queries" in manifest and not (reads_all_queries or config.train.log_q_correction or starts_quantizer):
        names = interactions_names(shards)
        if cluster.task_type == "ps":
            others = set(names)
        elif shards >= cluster.num_workers:  # as examples_dataset deals them out
            others = set(names) - set(names[cluster.worker_index :: cluster.num_workers])

    def has(name: str) -> bool:
        # The folder log has the raw log, for the next `dpsr ingest`.
        return name not in others and re.split("[-.]", name)[0] not in unread and not name.startswith("log/")

    return has


def _check_kind(store: Store, config: Config, values: flags.FlagValues) -> None:
    """Raises UsageError or CommandError if flags or store do not fit a ranker or rewriter."""
    kind = config.model.kind
    if values.warm_start is not None:
        raise UsageError(
            f"--warm_start={values.warm_start}: cannot be combined with model.kind {kind}; train the {kind} from the "
            f"start"
        )
    if kind == "ranker" and store.schema.ranking is None:
        raise CommandError(
            f"{values.store}: holds no requests, which a ranker learns from; add the section `ranking` to the schema "
            f"and ingest the log again"
        )
    if kind == "ranker" and config.ranker.dpsr_model:
        _check_stays(values, "ranker.dpsr_model", config.ranker.dpsr_model)


def _check_stays(values: flags.FlagValues, name: str, path: str) -> None:
    """Raises UsageError if --overwrite removes the model at `path`, which the training reads."""
    if values.overwrite and Path(path).resolve().is_relative_to(Path(values.out).resolve()):
        raise UsageError(f"{name}={path}: --overwrite removes this model; choose another --out")


def is_untrained(model_dir: Path) -> bool:
    """Returns whether a directory holds the beginnings of a model and nothing else: nothing is lost with it."""
    return (model_dir / "features.json").is_file() and not other_files(model_dir)


def remove(model_dir: Path) -> None:
    """Removes a model, if there is one. Raises CommandError if another process trains it, or if it is no model."""
    if model_dir.exists():
        check_replaceable(model_dir, "model", "features.json")
        with _only_trainer(model_dir):
            shutil.rmtree(model_dir)


def _only_trainer(out: Path) -> contextlib.AbstractContextManager[None]:
    """Locks a model directory. Raises CommandError if another process trains the model."""
    return locked(out, f"{out}: another `dpsr train` trains this model; wait until it ends, or choose another --out")


def examples_of(store: Store, config: Config) -> RankerExamples | RewriterExamples | None:
    """Returns the examples of a ranker or rewriter; None for the two towers, which read them by an op.

    Called before anything is written or removed, because it finds out what cannot be trained.

    Raises:
        CommandError: the store has nothing to learn from.
        UsageError: as train.
    """
    if config.model.encoder:
        load_encoder(config.model.encoder)
    own: RankerExamples | RewriterExamples | None = None
    if config.model.kind != "retrieval":
        own = (RankerExamples if config.model.kind == "ranker" else RewriterExamples)(store, config)
    feature_spec(config, store)
    return own


def numbers_of(
    store: Store, config: Config, own: RankerExamples | RewriterExamples | None
) -> Callable[[], tuple[Number, ...]]:
    """Returns what chooses the numbers that a new model reads. All processes of a cluster choose the same ones.

    `own` is what examples_of returned, or None for a parameter server, which did not call it.
    """
    if isinstance(own, RankerExamples):
        return own.numbers
    return lambda: RankerExamples(store, config).numbers() if config.model.kind == "ranker" else ()


def config_from_flags(path: str | None, assignments: list[str]) -> Config:
    """Reads a config file and overrides values by `section.key=value` assignments. Raises UsageError."""
    data = to_dict(from_dict(Config, read_yaml(path), path, check=not assignments)) if path else {}
    for assignment in assignments:
        key, value = read_assignment(assignment, "train.steps=500")
        section, _, name = key.partition(".")
        # Each assignment is checked alone first, so that an error names it and not the file.
        from_dict(Config, {section: {name: value}}, f"--set={assignment}", check=False)
        data.setdefault(section, {})[name] = value
    return from_dict(Config, data, " ".join(f"--set={assignment}" for assignment in assignments) or path or "")


def train(
    store: Store,
    config: Config,
    model_dir: str | Path,
    cluster: Cluster | None = None,
    warm_start: WarmStart | None = None,
    overwrite: bool = False,
) -> ModelDirectory:
    """Trains until the global step is `config.train.steps`, from the last checkpoint if there is one.

    With a quantizer it trains the towers alone until `config.quantizer.start_step`, or not at all if there is a later
    checkpoint. Then it computes the quantizer's start, and trains on with a second graph. A checkpoint with a quantizer
    is resumed in the second graph.

    Args:
        store: the log.
        config: model and training.
        model_dir: directory of the model, made if it does not exist.
        cluster: this process's part of a cluster, as TF_CONFIG describes it; by default the process trains alone. A
            parameter server does not return.
        warm_start: the model whose weights a new training begins with. Nothing of it is read if the model directory
            holds a checkpoint.
        overwrite: whether to remove the model of the model directory first, once it is clear that training can begin.

    Raises:
        CommandError: the model directory holds another model, another process trains it, or the loss became NaN or
            infinite.
        UsageError: the config names features that the store does not have, or a text encoder that cannot be imported or
            does not return vectors.
    """
    cluster = cluster or Cluster()
    own = None if cluster.task_type == "ps" else examples_of(store, config)
    measure = None
    if config.validation.queries and (cluster.is_local or cluster.task_type == "evaluator"):
        measure = validation.measure_of(store, config)
    # The tasks of a cluster share the directory, so none of them may remove what another one has begun.
    if overwrite or (cluster.is_local and is_untrained(Path(model_dir))):
        remove(Path(model_dir))
    model = ModelDirectory.create_or_resume(model_dir, config, store, numbers_of(store, config, own))
    # Only the chief writes checkpoints. The other tasks of its cluster use the same directory.
    with _only_trainer(model.path) if cluster.task_type == "chief" else contextlib.nullcontext():
        _train_model(model, store, config, cluster, warm_start, own, measure)
    return model


def _train_model(
    model: ModelDirectory,
    store: Store,
    config: Config,
    cluster: Cluster,
    warm_start: WarmStart | None,
    own: RankerExamples | RewriterExamples | None,
    measure: validation.Measure | None,
) -> None:
    """Does what `train` says, in a model directory that is there."""
    is_chief = cluster.task_type == "chief"
    if cluster.task_type in ("chief", "worker"):
        if validation.is_over(model.path, config):
            print(f"model {model.path}: {_stopped(model.path, config)}")
            return
        step = _global_step(model.path)  # fails here if the checkpoint cannot be read
        if warm_start and tf.train.latest_checkpoint(str(model.path)) and is_chief:
            print(
                f"model {model.path}: resumes at step {step:,}; --warm_start={warm_start.model.path} is not read again"
            )
        if step >= config.train.steps and is_chief:
            print(f"model {model.path}: is at step {step:,} already; to train on, give a larger train.steps")
    listeners: list[tf.estimator.CheckpointSaverListener] = [FiniteWeights()]
    if measure is not None:
        validator = validation.Validation(model.path, config, measure)
        if cluster.task_type == "evaluator":
            validator.watch()
            return
        listeners.append(validation.ValidationListener(validator, model.path))
    summary_dir = str(model.path) if is_chief else None
    bar = ProgressBar(config.train.steps, config.train.batch_size, summary_dir, says_start=not cluster.is_local)
    training = _Training(model, store, config, cluster, warm_start, bar, listeners, own)
    try:
        training.run()
    except tf.errors.OpError as error:
        raise _explained(error, model.path, config, cluster) from None
    except KeyboardInterrupt:
        bar.close()  # so that the next line stands alone
        if cluster.is_local:
            step = _global_step(model.path)
            print(
                f"model {model.path}: interrupted; its last checkpoint is of step {step:,}, where `dpsr train` goes on",
                file=sys.stderr,
            )
        raise
    finally:
        bar.close()
    if not cluster.is_local:
        print(f"this process trained {bar.num_steps:,} steps", flush=True)
    if is_chief:
        made = f"{store.vocabulary.num_ids:,} token embeddings"
        if config.model.kind == "rewriter":
            made = f"{model.features.sequences.num_words:,} words"
        print(f"model {model.path}: step {_global_step(model.path):,}, {made}")
        if validation.is_over(model.path, config):
            print(f"model {model.path}: {_stopped(model.path, config)}")


class _Training:
    """The sessions of one training in this process."""

    def __init__(
        self,
        model: ModelDirectory,
        store: Store,
        config: Config,
        cluster: Cluster,
        warm_start: WarmStart | None,
        bar: ProgressBar,
        listeners: list[tf.estimator.CheckpointSaverListener],
        own: RankerExamples | RewriterExamples | None,
    ):
        self._model, self._store, self._config, self._cluster = model, store, config, cluster
        self._warm_start, self._bar, self._listeners = warm_start, bar, listeners
        self._item_shares, self._own = _item_shares(store, config), own
        self._has_server = cluster.is_local

    def run(self) -> None:
        """Trains to the last step. A parameter server does not return."""
        steps, quantizer = self._config.train.steps, self._config.quantizer
        if not quantizer.sub_spaces or self._cluster.task_type == "ps":
            self._train(steps)
            return
        if not _has_quantizer(self._model):
            self._train(quantizer.start_step)
        if _global_step(self._model.path) < steps:
            self._train(steps, self._start_quantizer())

    def _start_quantizer(self) -> QuantizerPhase:
        """Computes what the quantizer begins with, where it has not begun. The workers of a cluster wait for it."""
        self._bar.close()
        model, is_needed = self._model, Teacher.is_needed(self._config.quantizer)
        if self._cluster.task_type != "chief":
            print("waits until the chief has started the quantizer", flush=True)
            while not _has_quantizer(model) or (is_needed and Teacher.open(model, self._store) is None):
                time.sleep(_POLL)
            return QuantizerPhase(items=self._item_codes(model.last_checkpoint()))
        checkpoint, begins = tf.train.latest_checkpoint(str(model.path)), not model.has_quantizer
        # A resumed training has the teacher already, unless it is a copy of the best checkpoint alone.
        if is_needed and (begins or Teacher.open(model, self._store) is None):
            Teacher.write(model, self._store, checkpoint)
        if not begins:
            return QuantizerPhase(items=self._item_codes(checkpoint))
        values, line = quantizer_start.start(model, self._store, checkpoint)
        print(line, flush=True)
        known = tf.train.load_checkpoint(checkpoint).get_variable_to_shape_map()
        return QuantizerPhase(values, frozenset(known), self._item_codes(checkpoint, values))

    def _item_codes(self, checkpoint: str, quantizer: Quantizer | None = None) -> ItemCodes | None:
        """Returns the codes of all items, if the quantizer has residual codes.

        The chief chooses them when the quantizer begins, before it writes a checkpoint with it, and again if their file
        was lost. The workers of a cluster wait for that.
        """
        if self._config.quantizer.codes != "residual":
            return None
        quantizer = quantizer or Quantizer.read(checkpoint)
        while True:
            found = quantizer_start.open_item_codes(self._model, self._store, quantizer)
            if found is not None:
                return found
            if self._cluster.task_type == "chief":
                quantizer_start.write_item_codes(self._model, self._store, checkpoint, quantizer)
            else:
                time.sleep(_POLL)

    def _train(self, last_step: int, phase: QuantizerPhase | None = None) -> None:
        """Trains until the global step is `last_step`, without a quantizer or with one."""
        model, cluster, warm_start = self._model, self._cluster, self._warm_start
        estimator = tf.estimator.Estimator(
            model_fn,
            config=run_config(str(model.path), self._config, cluster),
            params={
                "config": self._config,
                "features": model.features,
                "num_ps": cluster.num_ps,
                "item_shares": self._item_shares,
                "propensities": self._own.propensities if isinstance(self._own, RankerExamples) else None,
                "pieces": self._own.pieces(model) if isinstance(self._own, RewriterExamples) else None,
                "last_step": last_step,
                # Functions, because Estimator copies all other values.
                "warm_start": (lambda towers: warm_start.init_fn(model, towers)) if warm_start and not phase else None,
                "quantizer": phase and (lambda: phase),
            },
        )
        hooks = [NothingLeft(last_step), self._bar]
        if not cluster.is_local:
            hooks.append(validation.StopWhenOver(model.path, self._config))
        # Estimator does not take 0, which makes the checkpoint of a warm start.
        max_steps, examples = max(1, last_step), self._examples_of(phase)
        if self._has_server:
            listeners = self._listeners if cluster.task_type == "chief" else None
            estimator.train(examples, hooks=hooks, max_steps=max_steps, saving_listeners=listeners)
            return
        # This starts the server of a process, which stays until the process ends.
        self._has_server = True
        tf.estimator.train_and_evaluate(
            estimator,
            tf.estimator.TrainSpec(examples, max_steps, hooks, self._listeners),
            tf.estimator.EvalSpec(examples),  # required, but unused: our evaluator takes the place of Estimator's
        )

    def _examples_of(self, phase: QuantizerPhase | None) -> Callable[[], tf.data.Dataset]:
        """Returns the input_fn of a graph."""
        store, config, cluster = self._store, self._config, self._cluster
        if self._own:
            return self._own.input_fn(self._model, cluster)
        options = batch_options(config, self._model.features)
        # The workers share the first steps too.
        options = dataclasses.replace(options, pretrain_steps=-(-options.pretrain_steps // cluster.num_workers))
        teacher = Teacher.open(self._model, store) if phase and Teacher.is_needed(config.quantizer) else None

        def examples() -> tf.data.Dataset:
            # The step is read whenever a session is made, also after a loss, so that training resumes at the batch
            # where it was. Each of several workers takes about every num_workers-th step.
            step = tf.compat.v1.train.get_global_step() // cluster.num_workers
            dataset = examples_dataset(
                store, options, shard_index=cluster.worker_index, num_shards=cluster.num_workers, first_step=step
            )
            joined = teacher.join(dataset, config, step, cluster.worker_index) if teacher else training_input(dataset)
            return joined.prefetch(2)

        return examples


def _has_quantizer(model: ModelDirectory) -> bool:
    try:
        return model.has_quantizer
    except (tf.errors.OpError, ValueError):  # the chief replaces this checkpoint
        return False


def _explained(error: tf.errors.OpError, model_dir: Path, config: Config, cluster: Cluster) -> CommandError:
    """Returns the error of a training step with its cause and what to do."""
    if (problem := loss_problem(error)) is not None:
        rates = f"train.learning_rate, now {config.train.learning_rate:g}"
        if Quantizer.is_in(tf.train.latest_checkpoint(str(model_dir))):
            rates = (
                f"quantizer.learning_rate, now {config.quantizer.learning_rate:g}, and quantizer.coarse_learning_rate, "
                f"now {config.quantizer.coarse_learning_rate:g}"
            )
        return CommandError(
            f"{problem}; the last checkpoint, of step {_global_step(model_dir)}, is sound; lower {rates}, and start "
            f"anew with another --out or with --overwrite"
        )
    if not cluster.is_local and isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError)):
        return LostError(f"a parameter server was lost: {op_message(error)}; start this task again")
    return CommandError(op_message(error))


def _stopped(model_dir: Path, config: Config) -> str:
    best = validation.best_of(validation.measurements(model_dir, config), config)
    name = validation.metric(config)
    return (
        f"training has stopped: {config.validation.patience} measurements brought no better {name} than "
        f"{best[name]:.4f} at step {best['step']:,}; that checkpoint is in {model_dir / validation.BEST}"
    )


def batch_options(config: Config, features: FeatureSpec) -> BatchOptions:
    """Returns what a training batch must hold for the towers and the loss of a config."""
    model = config.model
    items = tuple(feature.name for feature in features.item)
    return BatchOptions.from_config(
        config.train,
        user_features=tuple(feature.name for feature in features.user),
        item_features=items,
        history_length=model.history_length,
        history_text=model.history_length > 0,
        history_features=items if model.history_length else (),
        query_history_length=model.query_history_length,
        graph_fan_out=model.graph_fan_out,
        graph_sampling=model.graph_sampling,
        graph_dropout=model.graph_dropout,
        graph_attributes=tuple(feature.name for feature in features.graph),
    )


def _item_shares(store: Store, config: Config) -> np.ndarray | None:
    """Returns each item's share of the positive pairs, float32 [items]; None where the loss does not need it."""
    if not config.train.log_q_correction:
        return None
    counts = np.zeros(store.counts.items)
    for shard in store.interactions():
        counts += np.bincount(shard["positive.item"], minlength=len(counts))
    return (counts / max(1, counts.sum())).astype(np.float32)


def _global_step(model_dir: Path) -> int:
    checkpoint = tf.train.latest_checkpoint(str(model_dir))
    if checkpoint is None:
        return 0
    try:
        return int(tf.train.load_variable(checkpoint, "global_step"))
    except (tf.errors.OpError, ValueError) as error:
        raise CommandError(
            f"{checkpoint}: the checkpoint cannot be read: {op_message(error)}; train from the start with --overwrite"
        ) from None
