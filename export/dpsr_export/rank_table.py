"""The table from which a servable takes what a ranker reads of items, users and queries.

The C++ is in export/rank_features.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dpsr_common.packed_file import PackedFileWriter
from dpsr_export.faiss_search import load
from dpsr_export.request_tables import loaded
from dpsr_tf.data.event_counts import SPENDING
from dpsr_tf.data.ranking_features import DPSR_SCORE, RankingFeatures
from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.models.features import Number

FILE = "rank_table.dpsr"


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
    request: tf.Tensor  # float32 [1, numbers of kind request]
    pairs: tf.Tensor  # float32 [n, numbers of kind pair]


class RankWeights(NamedTuple):
    """The weights of a ranker that RankTable.scores reads."""

    request: tf.Tensor  # kernel of the request's part of the first layer
    pair: tf.Tensor  # kernel of the pairs' part of the first layer
    wanted: tuple[tf.Tensor, tf.Tensor] | None  # kernel and bias of what is multiplied with items; None if nothing is
    layers: Sequence[tf.Tensor]  # bias of the first layer, then kernel and bias of each other one


class RankTable:
    """A rank table in a graph, or in eager mode."""

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
        self._spending = [f"spend.{name}" for name in SPENDING if f"spend.{name}" in features.kinds]
        self._pairs = [name for name, kind in features.kinds.items() if kind == "pair"]
        self._widths = widths
        handle = load().dpsr_rank_table_handle(shared_name=f"rank_table_{uuid.uuid4().hex}")
        self._handle = loaded(handle, load().dpsr_rank_table_load, path)

    def numbers(
        self,
        query: tf.Tensor,
        user_id: tf.Tensor,
        item_ids: tf.Tensor,
        dpsr_score: tf.Tensor,
        of_user: Mapping[str, tf.Tensor],
        request: Sequence[str],
        pairs: Sequence[str],
        max_items: int,
    ) -> RankNumbers:
        """Returns numbers as of the end of the log. NaN is missing, and all but `dpsr_score` of an unknown item.

        Args:
            query: string [1], at most 65,536 bytes. White space at its ends does not count.
            user_id: int64 [1], or [0] for an anonymous user.
            item_ids: int64 [n].
            dpsr_score: float32 [n], or [0] if it is missing for all items.
            of_user: the numbers of the user that the request brings, float32 [1] or [0], by name ("user.age").
            request: names of the numbers of kind request.
            pairs: names of the numbers of kind pair, but for `list_similarity`.
            max_items: the largest n.

        Raises:
            tf.errors.InvalidArgumentError: a tensor has a wrong shape, the query or the list is too long, or a score is
                infinite.
        """
        of_request, of_pairs = [*self._spending, *of_user], [*self._pairs, DPSR_SCORE]
        found = load().dpsr_rank_numbers(
            self._handle, query, user_id, item_ids, dpsr_score, list(of_user.values()),
            names=[name.removeprefix("user.") for name in of_user],
            max_items=max_items,
            num_spending=len(self._spending),
            num_pairs=len(self._pairs),
            request=[of_request.index(name) for name in request],
            pairs=[of_pairs.index(name) for name in pairs],
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

    def list_similarity(self, table: int, rows: tf.Tensor) -> tf.Tensor:
        """Returns how similar each item is to the others of a list, as dpsr_scorer of models/ranker_inputs.py does.

        Args:
            table: the table with the items' embeddings.
            rows: int32 [n]; -1 is an unknown item, which does not count.

        Returns:
            float32 [n, 1]; NaN for an unknown item, and where the list has no other known one.
        """
        embeddings = self.rows(table, rows)
        others = tf.reduce_sum(embeddings, 0, keepdims=True) - embeddings
        product, *squares = (tf.reduce_sum(x, 1, keepdims=True) for x in
            (embeddings * others, tf.square(embeddings), tf.square(others)))  # fmt: skip
        # 0 / 0 is NaN.
        return product / tf.sqrt(squares[0] * squares[1])

    def scores(
        self,
        tables: Sequence[int],
        rows: tf.Tensor,
        history_rows: tf.Tensor | None,
        numbers: RankNumbers,
        scales: Mapping[str, Sequence[Number]],
        text: tf.Tensor,
        user: tf.Tensor,
        fields: Sequence[int],
        half_life: float,
        weights: RankWeights,
    ) -> tf.Tensor:
        """Scores items for one request: Ranker.scores without attention and cross layers, in one op.

        Args:
            tables: which tables have `hidden`, `vectors`, `offered` and codes of items; -1 stands for none.
            rows: int32 [n], of items; -1 is unknown.
            history_rows: int32 [h], of the history's items, oldest first; None if the ranker reads no history.
            numbers: of the request and its pairs.
            scales: of the numbers of the kinds "request" and "pair".
            text: float32 [1, width], vector of the query.
            user: float32 [1, width], vectors of the user's features.
            fields: widths of the parts of items' vectors.
            half_life: of matches.
            weights: of all layers.

        Returns:
            float32 [n], -inf for unknown items.
        """
        given = {
            f"{kind}_scales": [part for number in of_kind for part in (number.unit, number.mean, number.std)]
            for kind, of_kind in scales.items()
        }
        missing = {
            f"{kind}_may_miss": [place for place, number in enumerate(of_kind) if number.may_miss]
            for kind, of_kind in scales.items()
        }
        found: tf.Tensor = load().dpsr_rank_scores(
            self._handle,
            rows,
            tf.zeros([0], tf.int32) if history_rows is None else history_rows,
            numbers.pairs,
            numbers.request,
            text,
            user,
            weights.request,
            weights.pair,
            *(weights.wanted or (tf.zeros([0, 0]), tf.zeros([0]))),
            list(weights.layers),
            tables=list(tables),
            cut=Number.CUT,
            fields=list(fields),
            half_life=half_life,
            products=weights.wanted is not None,
            has_history=history_rows is not None,
            **given,
            **missing,
        )
        return found
