"""Batches of whole requests for the training of a ranker.

A batch is a function of the store, the seed and the step, so that a training that resumes sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dpsr_common.errors import CommandError
from dpsr_tf.data.column_files import row_splits
from dpsr_tf.data.ranking_features import RankingFeatures, Shown
from dpsr_tf.data.store import Store

# Batches whose features are computed at a time: less work for each than one by one.
_BATCHES = 8


class RankingBatches:
    """The training requests of a store that say something: those with two items of different outcomes.

    Attributes:
        usable: number of such requests.
        requests: number of all training requests.
    """

    def __init__(self, store: Store, features: RankingFeatures, seed: int, gains: tuple[float, ...] = (0, 1, 2, 3)):
        """Finds the requests.

        Args:
            store: a store with requests.
            features: makes their features.
            seed: of the order of the requests.
            gains: gain of each outcome. A request needs two items of different gains.

        Raises:
            CommandError: no request has two items of different gains.
        """
        self._features, self._seed, self._files = features, seed, store.requests()
        gain = np.array(gains)
        found, first, self.requests = [], 0, 0
        for file in self._files:
            splits = file["request.splits"]
            of_items = gain[file["shown.outcome"]]
            begins = splits[:-1][np.diff(splits) > 0]
            usable = np.zeros(len(splits) - 1, bool)
            if len(begins):
                differs = np.maximum.reduceat(of_items, begins) > np.minimum.reduceat(of_items, begins)
                usable[np.diff(splits) > 0] = differs
            found.append(first + np.flatnonzero(usable))
            first += len(splits) - 1
        # The number of each usable request, and of the first request of each file.
        self._numbers = np.concatenate(found)
        self._firsts = np.cumsum([0, *(len(file["request.splits"]) - 1 for file in self._files)])
        self.requests, self.usable = first, len(self._numbers)
        if not self.usable:
            raise CommandError(
                f"{store.path}: has {self.requests:,} requests for training, but none in which two items have "
                f"different outcomes, so a ranker has nothing to learn; ingest a log with clicked and unclicked items"
            )

    def batches(
        self, batch_size: int, first_step: int, worker_index: int = 0, num_workers: int = 1
    ) -> Iterator[tuple[Shown, np.ndarray]]:
        """Yields batches of `batch_size` requests without an end: their items, and the numbers of their requests.

        In each epoch, every usable request comes once, in another random order. Of several workers, each takes every
        num_workers-th batch.

        Args:
            batch_size: requests in a batch.
            first_step: number of batches of this worker that are left out.
            worker_index: this worker, from 0 on.
            num_workers: number of workers.
        """
        block = first_step // _BATCHES
        while True:
            # Work of one block: the batches block * _BATCHES, ... of this worker.
            steps = (np.arange(_BATCHES) + block * _BATCHES) * num_workers + worker_index
            places = (steps[:, None] * batch_size + np.arange(batch_size)).ravel()
            requests = self._ordered(places)
            shown = self.of(requests)
            lengths = np.bincount(shown.request, minlength=len(requests))
            splits = row_splits(lengths)
            for number in range(_BATCHES):
                if block * _BATCHES + number < first_step:
                    continue
                first, last = number * batch_size, (number + 1) * batch_size
                yield shown.take(first, last, slice(splits[first], splits[last])), requests[first:last]
            block += 1

    def sample(self, items: int) -> Shown:
        """Returns usable requests that are drawn at random, with at least `items` items, or all that there are."""
        order = np.random.default_rng([self._seed, 0, 1]).permutation(self._numbers)
        mean = max(1.0, sum(len(file["shown.item"]) for file in self._files) / max(1, self.requests))
        return self.of(order[: int(items / mean) + 1])

    def of(self, requests: np.ndarray) -> Shown:
        """Returns the items of some requests, in this order; `requests` int64 [requests] are their numbers."""
        if len(self._files) == 1:
            return self._features.of(self._files[0], requests)
        of_file = np.searchsorted(self._firsts, requests, side="right") - 1
        parts, place = [], []
        for number, file in enumerate(self._files):
            mine = np.flatnonzero(of_file == number)
            if len(mine):
                parts.append(self._features.of(file, requests[mine] - self._firsts[number]))
                place.append(mine)
        return _joined(parts, place)

    def _ordered(self, places: np.ndarray) -> np.ndarray:
        """Returns the requests at some places of the endless sequence of epochs."""
        epochs, within = np.divmod(places, self.usable)
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            found[mine] = self._numbers[self._permutation(int(epoch))[within[mine]]]
        return found

    def _permutation(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.usable)
        return self._order


def _joined(parts: list[Shown], places: list[np.ndarray]) -> Shown:
    """Joins requests of several files; request i of a part becomes request places[part][i]."""
    queries = [""] * sum(map(len, places))
    for part, place in zip(parts, places, strict=True):
        for number, query in zip(place.tolist(), part.queries, strict=True):
            queries[number] = query
    request = np.concatenate([place[part.request] for part, place in zip(parts, places, strict=True)])
    order = np.argsort(request, kind="stable")

    def joined(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(values)[order]

    return parts[0]._replace(
        queries=queries,
        request=request[order],
        numbers={name: joined([part.numbers[name] for part in parts]) for name in parts[0].numbers},
        codes={name: joined([part.codes[name] for part in parts]) for name in parts[0].codes},
        **{n: joined([getattr(part, n) for part in parts]) for n in ("user", "time", "item", "position", "outcome")},
    )
