"""The neighbourhoods of queries and items as they are served: those of the strongest edges of the whole click graph."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpsr_tf.data.column_files import RaggedRows, row_splits
from dpsr_tf.data.examples_dataset import Graph, Tokens
from dpsr_tf.data.store import Store

_NOTHING = np.zeros(0, np.int32)


class Neighbourhoods:
    """Reads neighbourhoods from a store, in the form of a training batch, as NumPy arrays.

    They are those of training with `graph_sampling: strongest`, without dropout, at the end of the log.
    """

    def __init__(self, store: Store, fan_out: Sequence[int], attributes: Mapping[str, int]):
        """Opens the graph of a store.

        Args:
            store: a store with a graph, whose files stay mapped.
            fan_out: `graph_fan_out` of the model.
            attributes: the item features whose values are nodes of the graph, with the number of codes of each.
        """
        first, *second = fan_out
        self._first, self._second, self._store = first, second[0] if second else 0, store
        graph, log, items = store.graph(), store.interactions(), store.items()
        self._of_query = RaggedRows([(file["query.splits"], file["query.item"]) for file in graph])
        self._of_item = RaggedRows([(file["item.splits"], file["item.query"]) for file in graph])
        self._query_texts = RaggedRows([(file["query.splits"], file["query.tokens"]) for file in log])
        self._item_texts = RaggedRows([(items["tokens.splits"], items["tokens.values"])])
        self._codes = [items[f"feature.{name}"] for name in attributes]
        # The codes of all attributes stand one after the other, as in the table of values.
        self._offsets = row_splits(np.array([*attributes.values()], np.int64))[:-1]
        sections = [(f"value.{name}.splits", f"value.{name}.item") for name in attributes]
        self._of_value = [RaggedRows([(graph[0][splits], graph[0][nodes])]) for splits, nodes in sections]

    @functools.cached_property
    def _known(self) -> dict[bytes, int]:
        """Tokens of a query -> its row. Of queries with the same tokens the one with the most clicks counts."""
        known: dict[bytes, tuple[float, int]] = {}
        first = 0
        for file, log in zip(self._store.graph(), self._store.interactions(), strict=True):
            splits, tokens = log["query.splits"], log["query.tokens"]
            clicks = np.add.reduceat(np.append(file["query.weight"], 0), file["query.splits"][:-1])
            clicks[np.diff(file["query.splits"]) == 0] = 0
            for row in np.flatnonzero(clicks > 0).tolist():
                key = tokens[splits[row] : splits[row + 1]].tobytes()
                found = known.get(key)
                if found is None or clicks[row] > found[0]:
                    known[key] = (float(clicks[row]), first + row)
            first += len(splits) - 1
        return {key: row for key, (_, row) in known.items()}

    def known(self, texts: Tokens) -> np.ndarray:
        """Returns the row of the query with the same tokens as each text, int64 [texts]; -1 if the graph has none."""
        splits, values = np.asarray(texts.row_splits), np.ascontiguousarray(texts.values, np.int32)
        keys = (values[begin:end].tobytes() for begin, end in itertools.pairwise(splits))
        return np.array([self._known.get(key, -1) if key else -1 for key in keys], np.int64)

    def rows(self) -> np.ndarray:
        """Returns the rows of the queries that `known` finds, int64, ascending."""
        return np.sort(np.fromiter(self._known.values(), np.int64, len(self._known)))

    def texts(self, rows: np.ndarray) -> Tokens:
        """Returns the tokens of queries of the log."""
        return _tokens(self._query_texts.take(rows))

    def of_queries(self, rows: np.ndarray) -> Graph:
        """Returns the neighbourhoods of queries, by rows int64 [b]; -1 stands for a query without neighbours."""
        items, splits = self._of_query.take(rows, self._first)
        far, far_splits = self._of_item.take(items, self._second, np.repeat(rows, np.diff(splits)))
        item, item_places = np.unique(items, return_inverse=True)
        query, query_places = np.unique(far, return_inverse=True)
        value, places = self._values(item)
        return self._graph(
            query,
            item,
            value=value,
            node_attributes=places,
            value_items=_lists(_NOTHING, np.zeros(len(value) + 1, np.int64)),
            query_items=_lists(item_places, splits),
            query_items_queries=_lists(query_places, far_splits),
        )

    def of_items(self, rows: np.ndarray) -> Graph:
        """Returns the neighbourhoods of items, by rows int64 [n]."""
        queries, splits = self._of_item.take(rows, self._first)
        far, far_splits = self._of_query.take(queries, self._second, np.repeat(rows, np.diff(splits)))
        value, attributes = self._values(rows)
        of_values, value_splits = self._items_of(value)
        query, query_places = np.unique(queries, return_inverse=True)
        item, item_places = np.unique(np.concatenate([far, of_values]), return_inverse=True)
        return self._graph(
            query,
            item,
            value=value,
            attributes=attributes,
            value_items=_lists(item_places[len(far) :], value_splits),
            item_queries=_lists(query_places, splits),
            item_queries_items=_lists(item_places[: len(far)], far_splits),
        )

    def _graph(self, query: np.ndarray, item: np.ndarray, **parts: Any) -> Graph:
        empty = _lists(_NOTHING, np.zeros(1, np.int64))
        everything: dict[str, Any] = {name: empty for name in Graph._fields}
        everything |= {name: _NOTHING for name in ("attributes", "node_attributes")}
        texts = {"query": _tokens(self._query_texts.take(query)), "item": _tokens(self._item_texts.take(item))}
        return Graph(**everything | texts | parts)

    def _values(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the values of items, rows int32 [v] of the table of values, and places int32 [items * attributes]."""
        if not self._codes:
            return _NOTHING, _NOTHING
        codes = np.stack([column[items].astype(np.int64) for column in self._codes], axis=1)
        rows = np.where(codes > 0, codes + self._offsets, -1).reshape(-1)
        values = np.unique(rows[rows >= 0])
        return values.astype(np.int32), np.where(rows >= 0, np.searchsorted(values, rows), -1).astype(np.int32)

    def _items_of(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items of values, which ascend, and their row splits."""
        found, lengths = [_NOTHING], [np.zeros(0, np.int64)]
        ends = np.searchsorted(values, [*self._offsets, np.iinfo(np.int32).max])
        for part, offset, begin, end in zip(self._of_value, self._offsets, ends, ends[1:], strict=False):
            items, splits = part.take(values[begin:end] - offset, self._second)
            found.append(items)
            lengths.append(np.diff(splits))
        return np.concatenate(found), row_splits(np.concatenate(lengths))


def _tokens(found: tuple[np.ndarray, np.ndarray]) -> Tokens:
    return Tokens(*found)


def _lists(values: np.ndarray, splits: np.ndarray) -> Tokens:
    return Tokens(values.astype(np.int32), splits)
