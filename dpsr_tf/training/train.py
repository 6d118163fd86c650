"""`dpsr train`: trains the two towers on a store."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import flags

from dpsr_common.errors import CommandError, UsageError, op_message
from dpsr_common.strict_yaml import read_yaml
from dpsr_common.typed_config import from_dict, read_assignment, to_dict
from dpsr_tf.config import Config
from dpsr_tf.data.examples_dataset import BatchOptions, examples_dataset, training_input
from dpsr_tf.data.store import Store, check_replaceable
from dpsr_tf.models.features import FeatureSpec
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.training import validation
from dpsr_tf.training.cluster import Cluster
from dpsr_tf.training.estimator import FiniteWeights, ProgressBar, model_fn, no_number, run_config

USAGE = """
Usage: dpsr train --store=STORE --out=MODEL [--config=FILE] [--set=KEY=VALUE ...]

Trains query tower and item tower on a store. A model that is there already goes on where its last checkpoint left off.
"""

REQUIRED_FLAGS = ("store", "out")


class LostError(CommandError):
    """A process that this one needs is gone. Kubeflow's "user-defined, retryable" status: starting again mends it."""

    status = 138


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr train`."""
    flags.DEFINE_string("store", None, "directory of the store", flag_values=values)
    flags.DEFINE_string("out", None, "directory of the model, made by this command", flag_values=values)
    flags.DEFINE_string("config", None, "config file (YAML); the paper's values if left out", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "starts anew if a model is there", flag_values=values)
    flags.DEFINE_multi_string("set", [], "a value over the file's, for example train.steps=500", flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr train`."""
    cluster = Cluster.from_environment()
    if values.overwrite and not cluster.is_local:
        raise UsageError("--overwrite and TF_CONFIG are given, but the tasks of a cluster share --out; remove it first")
    store, config = read_flags(values)
    if cluster.task_type == "evaluator" and not config.validation.queries:
        raise UsageError("TF_CONFIG: task: type is 'evaluator', but validation.queries is 0; set how many it shall ask")
    train(store, config, values.out, cluster)


def read_flags(values: flags.FlagValues) -> tuple[Store, Config]:
    """Store and config of the flags; what --overwrite removes is gone then. Raises UsageError or CommandError."""
    config, out = config_from_flags(values.config, values.set), Path(values.out)
    store = Store(values.store)
    if values.overwrite and out.exists():
        check_replaceable(out, "model", "config.yaml")
        shutil.rmtree(out)
    return store, config


def config_from_flags(path: str | None, assignments: list[str]) -> Config:
    """The config of a file with `section.key=value` assignments over it. Raises UsageError."""
    data = to_dict(from_dict(Config, read_yaml(path), path, check=not assignments)) if path else {}
    for assignment in assignments:
        key, value = read_assignment(assignment, "train.steps=500")
        section, _, name = key.partition(".")
        # Alone first: an error is then the assignment's, not the file's.
        from_dict(Config, {section: {name: value}}, f"--set={assignment}", check=False)
        data.setdefault(section, {})[name] = value
    return from_dict(Config, data, " ".join(f"--set={assignment}" for assignment in assignments) or path or "")


def train(store: Store, config: Config, model_dir: str | Path, cluster: Cluster | None = None) -> ModelDirectory:
    """Trains until the global step is `config.train.steps`; goes on from the last checkpoint if there is one.

    Args:
        store: the log.
        config: model and training.
        model_dir: made if it is not there.
        cluster: this process's part of a cluster, as TF_CONFIG says it; a process alone if left out. A parameter server
            does not return.

    Raises:
        CommandError: the model directory holds another model, or the loss is no number any more.
        UsageError: the config names features that the store does not have.
    """
    cluster = cluster or Cluster()
    model = ModelDirectory.create_or_resume(model_dir, config, store)
    trains = cluster.task_type in ("chief", "worker")
    if trains and validation.is_over(model.path, config):
        print(f"model {model.path}: {_stopped(model.path, config)}")
        return model
    if trains:
        _global_step(model.path)  # one that cannot be read is named
    listeners: list[tf.estimator.CheckpointSaverListener] = [FiniteWeights()]
    if config.validation.queries and (cluster.is_local or cluster.task_type == "evaluator"):
        validated = validation.Validation(model, store, config)
        if cluster.task_type == "evaluator":
            validated.watch()
            return model
        listeners.append(validation.ValidationListener(validated, model.path))
    estimator = tf.estimator.Estimator(
        model_fn,
        config=run_config(str(model.path), config, cluster),
        params={
            "config": config,
            "features": model.features,
            "num_ps": cluster.num_ps,
            "item_shares": _item_shares(store, config),
        },
    )
    is_chief = cluster.task_type == "chief"
    summary_dir = str(model.path) if is_chief else None
    bar = ProgressBar(config.train.steps, config.train.batch_size, summary_dir, says_start=not cluster.is_local)
    options = batch_options(config, model.features)
    options = dataclasses.replace(options, pretrain_steps=-(-options.pretrain_steps // cluster.num_workers))

    def examples() -> tf.data.Dataset:
        # Read when the session is made, or made again: a training that goes on does so at the batch where it was. Of
        # several workers each takes about every num_workers-th step.
        step = tf.compat.v1.train.get_global_step() // cluster.num_workers
        dataset = examples_dataset(
            store, options, shard_index=cluster.worker_index, num_shards=cluster.num_workers, first_step=step
        )
        return training_input(dataset).prefetch(2)

    try:
        if cluster.is_local:
            estimator.train(examples, hooks=[bar], max_steps=config.train.steps, saving_listeners=listeners)
        else:
            hooks = [bar, validation.StopWhenOver(model.path, config)]
            tf.estimator.train_and_evaluate(
                estimator,
                tf.estimator.TrainSpec(examples, config.train.steps, hooks, listeners),
                tf.estimator.EvalSpec(examples),  # of Estimator's own evaluator, which ours stands in for
            )
    except tf.errors.OpError as error:
        if (problem := no_number(error)) is not None:
            raise CommandError(
                f"{problem}; the last checkpoint, of step {_global_step(model.path)}, is sound; lower "
                f"train.learning_rate, now {config.train.learning_rate:g}, and start anew with another --out or "
                f"--overwrite"
            ) from None
        if not cluster.is_local and isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError)):
            raise LostError(f"a parameter server was lost: {op_message(error)}; start this task again") from None
        raise CommandError(op_message(error)) from None
    finally:
        bar.close()
    if not cluster.is_local:
        print(f"did {bar.num_steps:,} of the steps", flush=True)
    if is_chief:
        print(f"model {model.path}: step {_global_step(model.path):,}, {store.vocabulary.num_ids:,} token embeddings")
        if validation.is_over(model.path, config):
            print(f"model {model.path}: {_stopped(model.path, config)}")
    return model


def _stopped(model_dir: Path, config: Config) -> str:
    found = validation.best_of(validation.measurements(model_dir, config), config)
    name = validation.metric(config)
    return (
        f"stopped, as {config.validation.patience} measurements brought no better {name} than {found[name]:.4f} of "
        f"step {found['step']:,}, which is in {model_dir / validation.BEST}"
    )


def batch_options(config: Config, features: FeatureSpec) -> BatchOptions:
    """What the batches of a training hold: what its towers read."""
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
    )


def _item_shares(store: Store, config: Config) -> np.ndarray | None:
    """Each item's share of the positive pairs, float32 [items]; None where the loss does not ask for it."""
    if not config.train.log_q_correction:
        return None
    counts = np.zeros(store.counts.items)
    for shard in store.interactions():
        counts += np.bincount(shard["positive.item"], minlength=len(counts))
    return (counts / counts.sum()).astype(np.float32)


def _global_step(model_dir: Path) -> int:
    checkpoint = tf.train.latest_checkpoint(str(model_dir))
    if checkpoint is None:
        return 0
    try:
        return int(tf.train.load_variable(checkpoint, "global_step"))
    except (tf.errors.OpError, ValueError) as error:
        raise CommandError(
            f"{checkpoint}: the checkpoint cannot be read: {op_message(error)}; start anew with --overwrite"
        ) from None
