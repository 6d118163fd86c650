"""Training batches straight from the three files of a store, assembled in C++ (DPSR section 5.1.2)."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dpsr_tf import ops
from dpsr_tf.config import TrainConfig
from dpsr_tf.data.store import Store


class Tokens(NamedTuple):
    """Token ids of several texts: text i holds values[row_splits[i]:row_splits[i + 1]]."""

    values: tf.Tensor  # int32 [tokens]
    row_splits: tf.Tensor  # int64 [texts + 1]


class Batch(NamedTuple):
    """A training batch of b positive pairs and r shared random negatives (Algorithm 1, lines 3 and 4)."""

    query: Tokens  # b texts
    item: Tokens  # b + r texts: the positives in order, then the shared negatives
    item_rows: tf.Tensor  # int32 [b + r], rows of the item file
    user_features: tf.Tensor  # int32 [b, features]
    weights: tf.Tensor  # float32 [b]
    negative_mask: tf.Tensor  # bool [b, b + r]: item j may serve as a negative for query i


class _ExamplesDataset(tf.data.Dataset):
    """The C++ source op as a tf.data.Dataset."""

    def __init__(self, variant: tf.Tensor, spec: tuple[tf.TensorSpec, ...]):
        self._spec = spec
        super().__init__(variant)

    def _inputs(self) -> list[tf.data.Dataset]:
        return []

    @property
    def element_spec(self) -> tuple[tf.TensorSpec, ...]:
        """Types and shapes of the components."""
        return self._spec


def examples_dataset(
    store: Store,
    config: TrainConfig,
    user_features: tuple[str, ...] = (),
    num_epochs: int | None = None,
    shard_index: int = 0,
    num_shards: int = 1,
    first_step: int = 0,
) -> tf.data.Dataset:
    """A dataset of Batch: each element one training step.

    Batch n depends only on the arguments and n. The whole log is shuffled anew each epoch; workers of one training
    give the same seed and their own `shard_index`, and read disjoint parts of that shuffle.

    Args:
        store: where the three files are.
        config: batch size, negatives, seed.
        user_features: profile features to emit, in this order.
        num_epochs: passes over the log; None is forever.
        shard_index: this worker's number, 0 to num_shards - 1.
        num_shards: how many workers share the log.
        first_step: number of the first batch; a resumed training gives its global step.

    Raises:
        tf.errors.InvalidArgumentError, NotFoundError, DataLossError, FailedPreconditionError: on the first use, with
            the option or the file that is wrong.
    """
    b, items = config.batch_size, config.batch_size + config.num_random_negatives
    spec = (
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([b + 1], tf.int64),
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([items + 1], tf.int64),
        tf.TensorSpec([items], tf.int32),
        tf.TensorSpec([b, len(user_features)], tf.int32),
        tf.TensorSpec([b], tf.float32),
        tf.TensorSpec([b, items], tf.bool),
    )
    variant = ops.load().dpsr_examples_dataset(
        users=str(store.users_path),
        items=str(store.items_path),
        interactions=str(store.interactions_path),
        batch_size=b,
        num_title_queries=config.num_title_queries,
        num_shared_negatives=config.num_random_negatives,
        num_supervised_negatives=config.num_supervised_negatives,
        seed=config.seed,
        num_epochs=num_epochs or 0,
        shard_index=shard_index,
        num_shards=num_shards,
        first_step=first_step,
        user_features=list(user_features),
    )

    def as_batch(*parts: tf.Tensor) -> Batch:
        return Batch(Tokens(*parts[0:2]), Tokens(*parts[2:4]), *parts[4:])

    return _ExamplesDataset(variant, spec).map(as_batch)


def training_input(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """A dataset of Batch as an Estimator's input_fn gives it: Estimator takes a tuple for (features, labels)."""
    return dataset.map(lambda batch: {"batch": batch})
