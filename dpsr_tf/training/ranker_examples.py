"""The training examples of a ranker: whole requests of a store as tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from dpsr_tf.config import Config
from dpsr_tf.data.propensities import propensities
from dpsr_tf.data.ranking_batches import RankingBatches
from dpsr_tf.data.ranking_features import RankingFeatures, Shown
from dpsr_tf.data.store import Store
from dpsr_tf.models.features import Number, RankingBatch
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.ranker_inputs import (
    RankerInputs,
    check_numbers,
    choose_numbers,
    model_numbers,
    scorer_of_config,
)
from dpsr_tf.training.cluster import Cluster
from dpsr_tf.training.generated_input import generated_input

# Items shown whose numbers the scales are fitted to.
_FIT_ITEMS = 1 << 16


class RankerExamples:
    """Reads the examples of a training. Opening it finds out what cannot be trained on, and says what is left out.

    Attributes:
        propensities: float64 [positions], for `ranker.propensity_weights`; None if that is off.
    """

    def __init__(self, store: Store, config: Config):
        """Raises CommandError if the store has no request from which something can be learned."""
        self._store, self._config = store, config
        self._features = RankingFeatures(store)
        self._batches = RankingBatches(store, self._features, config.train.seed, config.ranker.gains)
        self._score = scorer_of_config(config.ranker, store)
        self.propensities = propensities(store) if config.ranker.propensity_weights else None

    def numbers(self) -> tuple[Number, ...]:
        """Chooses the numbers that a new ranker reads, and prints what is left out."""
        batches = self._batches
        print(
            f"ranker: {batches.usable:,} of {batches.requests:,} requests for training have an item that is preferred "
            f"to another; the others are left out"
        )
        if not self._config.ranker.numbers:
            return ()
        shown = self._scored(batches.sample(_FIT_ITEMS))
        numbers, left_out = choose_numbers(self._features, shown, model_numbers(self._config.ranker))
        print(f"ranker: reads {len(numbers)} numbers, {sum(n.may_miss for n in numbers)} of which may be missing")
        if left_out:
            print(f"ranker: leaves out {len(left_out)} numbers, which say nothing: {', '.join(left_out)}")
        return numbers

    def input_fn(self, model: ModelDirectory, cluster: Cluster) -> Callable[[], tf.data.Dataset]:
        """Returns the input_fn of an Estimator, which begins at the global step."""
        check_numbers(self._features, model.features.numbers, str(model.path))
        config, spec = self._config, model.features
        inputs = RankerInputs(self._store, spec, config.model.history_length)

        def batch(shown: Shown, requests: np.ndarray) -> RankingBatch:
            return RankingBatch(
                inputs(self._scored(shown)), shown.outcome.astype(np.int32), shown.position.astype(np.int32), requests
            )

        def batches(first: int) -> Iterator[RankingBatch]:
            size, worker = config.train.batch_size, (cluster.worker_index, cluster.num_workers)
            for shown, requests in self._batches.batches(size, first, *worker):
                yield batch(shown, requests)

        example = batch(*next(self._batches.batches(config.train.batch_size, 0)))
        return generated_input(example, batches, cluster)

    def _scored(self, shown: Shown) -> Shown:
        return self._score(shown) if self._score else shown
