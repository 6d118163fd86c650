"""Features of items by id, in the graph: what serving reads of the history that a caller sends as item ids.

The C++ table and gathers are those of the training dataset, so an item of a history is the same to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dpsr_tf import ops
from dpsr_tf.data.dataset import FeatureKinds, Features, Tokens


class Items(NamedTuple):
    """Some items of a store; an id that it does not have has row -1, no tokens, codes 0 and empty lists."""

    rows: tf.Tensor  # int32 [n]
    text: Tokens  # n texts, or none where they were not asked for
    features: Features  # of the n items


class ItemTable:
    """The item table of a store, looked up by id."""

    def __init__(
        self, path: str | tf.Tensor, manifest: dict[str, Any], features: Sequence[str] = (), text: bool = True
    ):
        """Raises UsageError if the store has no feature of that name.

        Args:
            path: of items.dpsr: a text, or a string tensor [], for example the path of an asset of a SavedModel. It is
                opened when the lookup first runs.
            manifest: of its store.
            features: item features to give, in this order.
            text: gives the item text.
        """
        self._path = path
        self._kinds = FeatureKinds.of(manifest, "items", features)
        self._text = text

    def __call__(self, ids: tf.Tensor) -> Items:
        """Looks up int64 [n] ids. Raises DataLossError or NotFoundError, with the file, when the graph runs."""
        found = ops.load().dpsr_item_features(
            items=self._path,
            ids=ids,
            text=self._text,
            fixed=self._kinds.fixed,
            lists=self._kinds.lists,
            num_lists=len(self._kinds.lists),
        )
        lists = tuple(map(Tokens, found.list_values, found.list_splits))
        return Items(found.rows, Tokens(found.text_values, found.text_splits), Features(found.codes, lists))
