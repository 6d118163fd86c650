"""What evaluation needs to know of a store: the items, and how often each query was asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dpsr_common.errors import UsageError
from dpsr_common.packed_file import PackedFile
from dpsr_tf.data.store import Store, unpack_strings
from dpsr_tf.data.user_requests import User, client_arguments

# The value of --slice that needs no column: how often the store's log has the query. Its slices, most frequent first:
FREQUENCY = "frequency"
FREQUENCIES = ("head", "torso", "tail", "unseen")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The items that retrieval chooses from, n in all, and the log they were seen in.

    Attributes:
        item_ids: int64 [n], distinct.
        titles: n texts.
        popularity: float32 [n], what the schema says it is, else clicks.
        item_keys: id of each of the shop's own ids where those are texts; else None.
        user_keys: the same of the users.
        query_counts: positive pairs of each query of the log.
        store: where it comes from, if from a store.
    """

    item_ids: np.ndarray
    titles: Sequence[str]
    popularity: np.ndarray
    item_keys: Mapping[str, int] | None = None
    user_keys: Mapping[str, int] | None = None
    query_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    store: Store | None = None

    @staticmethod
    def of_store(store: Store) -> Corpus:
        """All items of a store."""
        items = store.items()
        counts = np.concatenate([np.diff(file["positive.splits"]) for file in store.interactions()])
        return Corpus(
            item_ids=items["id"],
            titles=store.titles(),
            popularity=items["popularity"],
            item_keys=_ids_of_keys(items),
            user_keys=_ids_of_keys(store.users()),
            query_counts=dict(zip(store.queries(), counts.tolist(), strict=True)),
            store=store,
        )

    def need_store(self, spec: str) -> Store:
        """The store. Raises UsageError that names the system `spec` if there is none."""
        if self.store is None:
            raise UsageError(f"--system={spec}: needs a store with the items' features; give --store")
        return self.store

    def user_teller(self, names: Collection[str]) -> Callable[[User], dict[str, Any]] | None:
        """What a model with inputs of these names is told of a user: see client_arguments. None without a store."""
        return None if self.store is None else client_arguments(self.store, names)

    def popularity_percentiles(self) -> np.ndarray:
        """Share of the items that are less popular, items as popular counted half: float64 [n], 0.5 on average."""
        ordered = np.sort(self.popularity)
        below, up_to = (np.searchsorted(ordered, self.popularity, side) for side in ("left", "right"))
        return (below + up_to) / (2 * len(ordered))

    def frequencies(self, queries: Sequence[str]) -> list[str]:
        """One of FREQUENCIES for each query, by its count in the log.

        The head are the most frequent queries that make up a third of all counts, the torso those of the next third,
        the tail the rest; queries of equal counts are never parted. A query that is not in the log, or has no positive
        pair there, is unseen.
        """
        counts = -np.sort(-np.array([count for count in self.query_counts.values() if count > 0], np.int64))
        # The count at which each third is reached.
        thirds = np.searchsorted(np.cumsum(counts), counts.sum() * np.array([1, 2]) / 3) if len(counts) else []
        ends = [counts[place] for place in thirds]
        found = []
        for query in queries:
            count = self.query_counts.get(query.strip(), 0)
            found.append(FREQUENCIES[sum(count < end for end in ends)] if count > 0 else "unseen")
        return found


def _ids_of_keys(table: PackedFile) -> dict[str, int] | None:
    if "key.splits" not in table:
        return None
    return dict(zip(unpack_strings(table, "key"), table["id"].tolist(), strict=True))
