"""The input of an Estimator whose batches are made in Python, as functions of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from dpsr_tf.training.cluster import Cluster

# Batches that are made ahead.
_AHEAD = 4


def generated_input(
    example: Any, batches: Callable[[int], Iterator[Any]], cluster: Cluster
) -> Callable[[], tf.data.Dataset]:
    """Returns an input_fn whose elements are {"batch": batch}. It begins at the global step.

    Args:
        example: a batch, a structure of arrays [n, ...]; n may differ from batch to batch.
        batches: from the number of the first batch to that batch and all that follow.
        cluster: this process's part of a cluster. Each of several workers makes about every num_workers-th step.
    """
    signature = tf.nest.map_structure(lambda array: tf.TensorSpec([None, *array.shape[1:]], array.dtype), example)

    def generate(first: np.ndarray) -> Iterator[Any]:
        return batches(int(first))

    def input_fn() -> tf.data.Dataset:
        # The step is read whenever a session is made, also after a loss.
        first = tf.compat.v1.train.get_global_step() // cluster.num_workers
        dataset = tf.data.Dataset.from_generator(generate, output_signature=signature, args=(first,))
        return dataset.map(lambda batch: {"batch": batch}).prefetch(_AHEAD)

    return input_fn
