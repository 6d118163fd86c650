"""The part of a store that evaluation needs: the items, and how often each query is in the log."""

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
    """The n items that retrieval chooses from, and the frequencies of the queries in their log.

    Attributes:
        item_ids: int64 [n], distinct.
        titles: n texts.
        popularity: float32 [n], the popularity column of the schema, or the number of clicks.
        item_keys: text id -> item id if the shop's item ids are texts, else None.
        user_keys: text id -> user id if the shop's user ids are texts, else None.
        query_counts: number of positive pairs of each query of the log.
        store: the store that this corpus comes from, if any.
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
        """Returns the corpus of all items of a store."""
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

    def texts(self) -> Mapping[str, Sequence[str]]:
        """Returns the texts that the towers read: column -> n texts. Without a store they are the titles."""
        return {"title": self.titles} if self.store is None else self.store.texts()

    def need_store(self, spec: str) -> Store:
        """Returns the store. Raises UsageError, which names the system `spec`, if there is none."""
        if self.store is None:
            raise UsageError(f"--system={spec}: needs a store with the items' features; give --store")
        return self.store

    def user_teller(self, names: Collection[str]) -> Callable[[User], dict[str, Any]] | None:
        """Returns a function from a user to the model inputs `names`, see client_arguments. None without a store."""
        return None if self.store is None else client_arguments(self.store, names)

    def popularity_percentiles(self) -> np.ndarray:
        """Returns the share of items that are less popular; equal items count half. float64 [n], 0.5 on average."""
        ordered = np.sort(self.popularity)
        below, up_to = (np.searchsorted(ordered, self.popularity, side) for side in ("left", "right"))
        return (below + up_to) / (2 * len(ordered))

    def frequencies(self, queries: Sequence[str]) -> list[str]:
        """Returns one of FREQUENCIES for each query, by its count in the log.

        The head is the most frequent queries that make up a third of all counts, the torso those that make up the next
        third, the tail the rest. Queries of equal counts are always in the same slice. A query that is not in the log,
        or has no positive pair there, is unseen.
        """
        counts = -np.sort(-np.array([count for count in self.query_counts.values() if count > 0], np.int64))
        # The number of the query at which each third of the counts is reached.
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
