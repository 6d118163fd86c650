"""The table from which a servable takes what a ranker reads of items, users and queries.

The C++ is in export/rank_features.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dpsr_common.packed_file import PackedFileWriter
from dpsr_export.faiss_search import load
from dpsr_export.request_tables import loaded
from dpsr_tf.data.event_counts import SPENDING
from dpsr_tf.data.ranking_features import RankingFeatures
from dpsr_tf.data.schema import EVENT_TYPES


def write_rank_table(features: RankingFeatures, tables: Sequence[np.ndarray], path: str | Path) -> None:
    """Writes a rank table (export/rank_features/rank_table.h).

    Args:
        features: the features of a store.
        tables: what a model has computed for each item of the store, float32 [items, width] each.
        path: the file to write.
    """
    with PackedFileWriter(str(path), "rank_table") as file:
        for name, values in features.sections().items():
            file.add(name, np.ascontiguousarray(values))
        for number, table in enumerate(tables):
            file.add(f"table{number}", np.ascontiguousarray(table, np.float32).reshape(-1))
            file.add(f"table{number}.width", np.array([table.shape[1]], np.int32))


class RankNumbers(NamedTuple):
    """What a ranker reads of a query, a user and n items."""

    rows: tf.Tensor  # int32 [n], rows of the items; -1 is unknown
    spending: tf.Tensor  # float32 [1, 4 or 0], the numbers `spend.*` of kind request
    pairs: tf.Tensor  # float32 [n, numbers], the numbers of kind pair, without dpsr_score


class RankTable:
    """A rank table in a graph, or in eager mode.

    Attributes:
        spending: names of the numbers of a user.
        pairs: names of the numbers of pairs.
    """

    def __init__(self, path: str | Path, features: RankingFeatures, widths: Sequence[int] = ()):
        """Loads the file or, in a graph, adds the op that loads it.

        Args:
            path: a file that write_rank_table has written.
            features: the features that it was written with.
            widths: of its tables.

        Raises:
            tf.errors.NotFoundError, DataLossError, FailedPreconditionError: the file does not exist, is damaged, or is
                of another kind. Raised here in eager mode, and otherwise when the load op runs.
        """
        self.spending = [f"spend.{name}" for name in SPENDING if f"spend.{name}" in features.kinds]
        self.pairs = [name for name, kind in features.kinds.items() if kind == "pair"]
        self._widths = widths
        handle = load().dpsr_rank_table_handle(shared_name=f"rank_table_{uuid.uuid4().hex}")
        self._handle = loaded(handle, load().dpsr_rank_table_load, path)

    def numbers(self, query: tf.Tensor, user_id: tf.Tensor, item_ids: tf.Tensor, max_items: int) -> RankNumbers:
        """Returns the numbers as of the end of the log; NaN is missing, and all of an unknown item.

        Args:
            query: string [1], at most 65,536 bytes. White space at its ends does not count.
            user_id: int64 [1], or [0] for an anonymous user.
            item_ids: int64 [n].
            max_items: the largest n.

        Raises:
            tf.errors.InvalidArgumentError: a tensor has a wrong shape, or the query or the list is too long.
        """
        found = load().dpsr_rank_numbers(
            self._handle, query, user_id, item_ids, max_items=max_items, num_spending=len(self.spending),
            num_pairs=len(self.pairs),
        )  # fmt: skip
        return RankNumbers(*found)

    def history(self, item_ids: tf.Tensor, types: tf.Tensor, length: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns rows and types (index in EVENT_TYPES) of the last `length` known items of one user, oldest first.

        Args:
            item_ids: int64 [1, n], oldest first. -1 is padding. A tensor without elements means no history.
            types: string [1, n], names of EVENT_TYPES, or "" for a click. A tensor without elements: all are clicks.
            length: at least 1.

        Raises:
            tf.errors.InvalidArgumentError: a tensor has a wrong shape, or a type is unknown.
        """
        found = load().dpsr_rank_history(
            self._handle,
            item_ids,
            types,
            length=length,
            event_types=EVENT_TYPES,
            default_type=EVENT_TYPES.index("click"),
        )
        return found.rows, found.type_codes

    def rows(self, table: int, rows: tf.Tensor) -> tf.Tensor:
        """Returns rows of a table, float32 [n, width]; `rows` int32 [n], -1 gives zeros."""
        found: tf.Tensor = load().dpsr_rank_rows(self._handle, rows, table=table, width=self._widths[table])
        return found
