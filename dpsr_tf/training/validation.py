"""Measures checkpoints on the validation fold of what the store held out of its log.

The figure is recall@k of a retrieval model. Of a ranker it is NDCG@10 of the items shown, with gains of 2^outcome - 1,
over the requests with a click. Of a rewriter it is the mean log probability of a word of the fold's queries: written
for the queries with typing errors and for a title that they clicked, as far as the config trains these directions.

It writes into the model directory, beside the checkpoints:

validation.jsonl   one line for each measurement: {"step": 2000, "recall@100": 0.41, "queries": 500}. Where the
                   checkpoint has a quantizer, also "quantized": true: recall is then that of T(x), as the index has it
best/              the best checkpoint so far, as a model directory that any command reads; measured.json has its line
validation/        the measurements for TensorBoard
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf
from tqdm import tqdm

from dpsr_common.errors import CommandError
from dpsr_common.files import link_or_copy, write_text
from dpsr_tf.config import Config
from dpsr_tf.data.column_files import string_bytes
from dpsr_tf.data.ranking_features import RankingFeatures, Shown
from dpsr_tf.data.store import Store, unpack_strings
from dpsr_tf.models.encoders import best_items
from dpsr_tf.models.model_directory import copy_model
from dpsr_tf.models.quantizer import Quantizer
from dpsr_tf.models.ranker_inputs import scorer_of_config
from dpsr_tf.models.ranker_scores import ranker_scores
from dpsr_tf.models.rewriter_texts import log_probabilities
from dpsr_tf.ops._native import shortened
from dpsr_tokenizer import Vocabulary, WordSequences

v1 = tf.compat.v1

BEST = "best"
_RECORDS = "validation.jsonl"
_CANDIDATE, _PREVIOUS = ".best.candidate", ".best.previous"
# Seed of the draw of queries: every training on a store asks the same ones.
_SEED = 1
# k of the NDCG@k of rankers.
_NDCG_AT = 10
# Seconds between an evaluator's looks at the model directory, and between a trainer's looks at the measurements.
_POLL = 1.0
_LOOK = 5.0


class Validation:
    """Measures the checkpoints of a model directory and keeps the best. Exactly one process of a training does this."""

    def __init__(self, model_dir: Path, config: Config, measure: Measure):
        """`model_dir` is trained with `config`; `measure` comes from measure_of."""
        self._path, self._config, self._figures = model_dir, config, measure
        self._writer: tf.compat.v1.summary.FileWriter | None = None
        # An earlier process may have been killed between the two renames in _measure.
        if not (self._path / BEST).exists() and (self._path / _PREVIOUS).exists():
            os.rename(self._path / _PREVIOUS, self._path / BEST)

    def after_checkpoint(self, checkpoint: str | Path) -> bool:
        """Measures a checkpoint, model.ckpt-STEP, if one is due. Returns whether training should stop."""
        step = _step(checkpoint)
        records = measurements(self._path, self._config)
        last = records[-1]["step"] if records else 0
        due = step - last > (self._config.validation.every - 0.5) * self._config.train.checkpoint_steps
        try:
            quantized = Quantizer.is_in(str(checkpoint))
        except (tf.errors.OpError, ValueError):  # training has removed this old checkpoint meanwhile
            return is_over(self._path, self._config)
        if quantized and not _is_quantized(records):
            due = True  # the start of the quantizer, the first that later ones can be better than
            records = []
        if due or (step >= self._config.train.steps and step > last):
            self._measure(Path(checkpoint), step, records, quantized)
        return is_over(self._path, self._config)

    def watch(self) -> None:
        """Measures each new checkpoint until one has all steps of the training: the work of an evaluator.

        Workers that were on their way when that one was written can be part of one more, which is not measured.
        """
        seen = None
        while not is_over(self._path, self._config):
            checkpoint = tf.train.latest_checkpoint(str(self._path))
            if checkpoint is None or checkpoint == seen:
                time.sleep(_POLL)
                continue
            seen = checkpoint
            if self.after_checkpoint(checkpoint) or _step(checkpoint) >= self._config.train.steps:
                return

    def _measure(self, checkpoint: Path, step: int, records: list[dict[str, Any]], quantized: bool) -> None:
        candidate = self._path / _CANDIDATE
        try:
            self._copy(checkpoint, candidate)
        except FileNotFoundError:  # training has removed this old checkpoint meanwhile
            return
        name, figures = metric(self._config), self._figures(candidate, quantized)
        value = float(figures.mean())
        record = {"step": step, name: round(value, 6), "queries": len(figures)}
        if quantized:
            record["quantized"] = True
        best = all(_figure(record, self._config) > _figure(other, self._config) for other in records)
        if best:
            (candidate / "measured.json").write_text(json.dumps(record) + "\n")
            shutil.rmtree(self._path / _PREVIOUS, ignore_errors=True)
            if (self._path / BEST).exists():
                os.rename(self._path / BEST, self._path / _PREVIOUS)
            os.rename(candidate, self._path / BEST)
            shutil.rmtree(self._path / _PREVIOUS, ignore_errors=True)
        shutil.rmtree(candidate, ignore_errors=True)
        file = self._path / _RECORDS
        write_text(file, (file.read_text() if file.exists() else "") + json.dumps(record) + "\n")
        self._summarise(name, value, step)
        tqdm.write(
            f"validation step {step:,}: {name} {value:.4f}{' of quantized items' if quantized else ''}"
            f"{', the best so far' if best else ''}"
        )  # above the bar

    def _copy(self, checkpoint: Path, to: Path) -> None:
        """Makes a model directory that holds this checkpoint only."""
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir()
        copy_model(self._path, to)
        # Links are safe because a checkpoint's files are never overwritten.
        files = [checkpoint.with_name(f"{checkpoint.name}.{suffix}") for suffix in ("index", "meta")]
        for file in [*files, *checkpoint.parent.glob(f"{checkpoint.name}.data-*")]:
            link_or_copy(file, to / file.name)
        (to / "checkpoint").write_text(f'model_checkpoint_path: "{checkpoint.name}"\n')

    def _summarise(self, name: str, value: float, step: int) -> None:
        if self._writer is None:
            with tf.Graph().as_default():  # a FileWriter refuses to be made in eager mode
                self._writer = v1.summary.FileWriter(str(self._path / "validation"))
        summary = v1.Summary(value=[v1.Summary.Value(tag=f"validation/{name}", simple_value=value)])
        self._writer.add_summary(summary, step)
        self._writer.flush()


# Measures the checkpoint of a model directory: a figure for each query or request, float [n].
Measure = Callable[[Path, bool], np.ndarray]


def measure_of(store: Store, config: Config) -> Measure:
    """Returns what measures the checkpoints of a training.

    Raises:
        CommandError: the store has no held-out interactions in the validation fold.
    """
    measures = {"retrieval": _retrieval_measure, "ranker": _ranker_measure, "rewriter": _rewriter_measure}
    return measures[config.model.kind](store, config)


def _retrieval_measure(store: Store, config: Config) -> Measure:
    # Imported here so that a training without validation loads neither DuckDB nor, below, SciPy.
    from dpsr_tf.evaluation.judgments import Judgments

    judgments = Judgments.of_held_out(store, "validation").sample(config.validation.queries, _SEED)
    k = config.validation.recall_at

    def measure(model: Path, quantized: bool) -> np.ndarray:
        from dpsr_tf.evaluation.metrics import ranked_metrics

        ids, scores = best_items(model, store, judgments.queries, judgments.users, k, quantized)
        return ranked_metrics(ids, scores, judgments, [k])[f"recall@{k}"]

    return measure


def _ranker_measure(store: Store, config: Config) -> Measure:
    from dpsr_tf.evaluation.judgments import fold_of
    from dpsr_tf.evaluation.ranking_metrics import ndcg

    file = store.held_requests()
    if file is None:
        raise CommandError(
            f"{store.path}: holds out no requests, which validation needs; add `held_out` to the section "
            f"interactions of the schema and ingest the log again, or set validation.queries to 0"
        )
    inside = np.array([fold_of(text) == "validation" for text in unpack_strings(file, "query_text")], bool)
    splits = file["request.splits"]
    clicks = np.concatenate([[0], np.cumsum(file["shown.outcome"] > 0)])
    found = np.flatnonzero(inside[file["request.query"]] & (clicks[splits[1:]] > clicks[splits[:-1]]))
    if not len(found):
        raise CommandError(
            f"{store.path}: no request of the validation fold has a click; hold out more and ingest the log again, or "
            f"set validation.queries to 0"
        )
    chosen = np.random.default_rng(_SEED).permutation(found)[: config.validation.queries]

    @functools.cache
    def items_shown() -> Shown:
        shown = RankingFeatures(store).of(file, np.sort(chosen))
        # The same for all checkpoints.
        score = scorer_of_config(config.ranker, store)
        return score(shown) if score else shown

    def measure(model: Path, quantized: bool) -> np.ndarray:
        shown = items_shown()
        return ndcg(shown.request, 2.0**shown.outcome - 1, ranker_scores(model, store)(shown), _NDCG_AT)

    return measure


def _rewriter_measure(store: Store, config: Config) -> Measure:
    from dpsr_tf.evaluation.judgments import Judgments

    judgments = Judgments.of_held_out(store, "validation").sample(config.validation.queries, _SEED)
    words = WordSequences(Vocabulary(str(store.words_path)))
    schema = store.schema.rewriting
    assert schema is not None
    target = words.encode(judgments.queries, max_words=schema.max_query_words, ends=True)
    titles, row_of = store.titles(), {item: row for row, item in enumerate(store.items()["id"].tolist())}
    data, splits = string_bytes(pa.array(judgments.queries))
    seeds = np.random.default_rng(_SEED).integers(0, 1 << 64, len(judgments.queries), dtype=np.uint64)
    read: dict[str, Sequence[str | bytes]] = {
        "direct": shortened(data, splits, seeds, drop_rate=0.0, typo_rate=config.rewriter.typo_rate),
        "backward": [titles[row_of[items[0]]] for items in judgments.relevant],
    }
    weights = {"direct": config.rewriter.direct_weight, "backward": config.rewriter.backward_weight}
    used = [name for name, weight in weights.items() if weight]

    def measure(model: Path, quantized: bool) -> np.ndarray:
        score = log_probabilities(model)
        return np.mean([score(name, read[name], target) for name in used], axis=0)

    return measure


def metric(config: Config) -> str:
    """Returns the name of the metric, such as "recall@100"."""
    if config.model.kind == "ranker":
        return f"ndcg@{_NDCG_AT}"
    if config.model.kind == "rewriter":
        return "log_probability"
    return f"recall@{config.validation.recall_at}"


def measurements(model_dir: Path, config: Config) -> list[dict[str, Any]]:
    """Returns the measurements of a model with this metric, in order of steps.

    If there are some with a quantizer, only those: a quantized model finds less than the same model without a
    quantizer, and is what the training is for.
    """
    try:
        lines = (model_dir / _RECORDS).read_text().splitlines()
    except FileNotFoundError:
        return []
    records = [record for record in map(json.loads, lines) if metric(config) in record]
    return [record for record in records if record.get("quantized")] or records


def _is_quantized(records: list[dict[str, Any]]) -> bool:
    return any(record.get("quantized") for record in records)


def best_of(records: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Returns the best measurement, the first one of equals."""
    return max(records, key=lambda record: _figure(record, config))


def _figure(record: dict[str, Any], config: Config) -> float:
    """Returns what a record measured. NaN, which compares with nothing, counts as lower than all numbers."""
    value = float(record[metric(config)])
    return -math.inf if math.isnan(value) else value


def is_over(model_dir: Path, config: Config) -> bool:
    """Returns whether the last `validation.patience` measurements brought nothing better (early stopping).

    A training that is to have a quantizer does not stop before it.
    """
    patience, records = config.validation.patience, measurements(model_dir, config)
    if not config.validation.queries or not patience or not records:
        return False
    if config.quantizer.sub_spaces and not _is_quantized(records):
        return False
    return len(records) - 1 - records.index(best_of(records, config)) >= patience


class ValidationListener(tf.estimator.CheckpointSaverListener):
    """Runs validation in the process that trains."""

    def __init__(self, validation: Validation, model_dir: Path):
        """`model_dir` holds the checkpoints."""
        self._validation, self._path = validation, model_dir

    def after_save(self, session: tf.compat.v1.Session, global_step_value: int) -> bool:
        """Measures the checkpoint. Returning true stops the training."""
        return self._validation.after_checkpoint(self._path / f"model.ckpt-{global_step_value}")


class StopWhenOver(tf.estimator.SessionRunHook):
    """Stops a process of a cluster when the evaluator's measurements no longer improve."""

    def __init__(self, model_dir: Path, config: Config):
        """`model_dir` is where the evaluator writes its measurements."""
        self._path, self._config = model_dir, config
        self._next_look = 0.0

    def after_run(self, run_context: tf.estimator.SessionRunContext, run_values: tf.estimator.SessionRunValues) -> None:
        """Looks at the measurements every few seconds."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK
            if is_over(self._path, self._config):
                run_context.request_stop()


def _step(checkpoint: str | Path) -> int:
    return int(str(checkpoint).rpartition("-")[2])
