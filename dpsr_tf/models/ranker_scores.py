"""Scores items shown in requests by the checkpoint of a ranker, on NumPy arrays.

Validation, evaluation and benchmarks use it; training and export build graphs of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dpsr_common.errors import CommandError
from dpsr_tf.data.ranking_features import MODEL_NUMBERS, Shown
from dpsr_tf.data.store import Store
from dpsr_tf.models.encoders import placeholder, restore
from dpsr_tf.models.features import Lists
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.ranker import Ranker
from dpsr_tf.models.ranker_inputs import RankerInputs, dpsr_scorer

v1 = tf.compat.v1

# Items that are scored at a time, at least those of one request.
_ITEMS = 1 << 14


def ranker_scores(model_dir: str | Path, store: Store, checkpoint: str | None = None) -> Callable[[Shown], np.ndarray]:
    """Returns the ranker of a model directory as a function from items shown to scores, float32 [n].

    Items may stand in any order. Only scores of items of one request can be compared. If the ranker reads
    MODEL_NUMBERS, and the items lack one, the retrieval model of its config computes them. The model is opened when it
    is needed.

    Args:
        model_dir: the model.
        store: the store that it was trained on, or one with the same vocabulary and features.
        checkpoint: name of a checkpoint in the directory, such as "model.ckpt-200"; by default the last one.

    Raises:
        CommandError: no ranker or checkpoint is there, the store has another vocabulary, other features or no requests,
            or the checkpoint cannot be read. When called: the retrieval model cannot be read.
    """
    model = ModelDirectory.open(model_dir, "ranker")
    difference = model.store_difference(store)
    if difference:
        raise CommandError(f"{model.path}: {difference}; give the store the model was trained on")
    path = str(model.path / checkpoint) if checkpoint else model.last_checkpoint()
    inputs = RankerInputs(store, model.features, model.config.model.history_length)
    of_model = {number.name for number in model.features.numbers} & set(MODEL_NUMBERS)
    run = _runner(model, path)

    @functools.cache
    def scorer() -> Callable[[Shown], Shown]:
        return dpsr_scorer(model.config.ranker.dpsr_model, store)

    def scores(shown: Shown) -> np.ndarray:
        if of_model - shown.numbers.keys():
            shown = scorer()(shown)
        order = np.argsort(shown.request, kind="stable")
        found = np.empty(len(order), np.float32)
        ends = np.cumsum(np.bincount(shown.request, minlength=len(shown.queries)))
        first = begin = 0
        while first < len(ends):
            last = max(first + 1, int(np.searchsorted(ends, begin + _ITEMS, side="right")))
            rows = order[begin : ends[last - 1]]
            if len(rows):
                found[rows] = run(inputs(shown.take(first, last, rows)))
            first, begin = last, int(ends[last - 1])
        return found

    return scores


def _runner(model: ModelDirectory, checkpoint: str) -> Callable[[Lists], np.ndarray]:
    """Returns the graph of a checkpoint as a function. The first call makes it."""
    graph = tf.Graph()
    session = v1.Session(graph=graph)
    inputs: Any = None
    output: Any = None

    def run(lists: Lists) -> np.ndarray:
        nonlocal inputs, output
        if output is None:
            with graph.as_default():
                inputs = tf.nest.map_structure(placeholder, lists)
                output = Ranker(model.config, model.features).scores(inputs)
                restore(model, session, checkpoint)
        return session.run(output, dict(zip(tf.nest.flatten(inputs), tf.nest.flatten(lists), strict=True)))

    return run
