"""The table of a servable with what the click graph adds to queries of the log (docs/graph.md).

`dpsr index` computes it with the item embeddings, and `--index_only` renews it with them. A query is found by its token
ids, so case, width and white space make no difference. It then gets the vector that the model computes from its
neighbourhood; all other queries are embedded from their text.

query_graph.dpsr is a packed file of kind "items", which the tables of request_tables.py read:

    id, id_index.*       int64 [queries]   hash of the key, ascending
    key.splits, .bytes                     the key: token ids with a space between two of them
    tokens.splits, .values                 empty
    feature.graph.splits, .values          float32 [queries * token_dim]: TwoTower.query_context
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dpsr_common.packed_file import PackedFileWriter
from dpsr_export import request_tables
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.data.neighbourhoods import Neighbourhoods
from dpsr_tf.data.store import Store
from dpsr_tf.models.encoders import query_contexts
from dpsr_tf.models.features import Feature
from dpsr_tf.models.model_directory import ModelDirectory

FILE = "query_graph.dpsr"
_FEATURE = "graph"
_BATCH = 4096
# Largest number of held-out pairs that the coverage is measured on.
_SAMPLE = 100_000


def write(model: ModelDirectory, store: Store, checkpoint: str, most: int, path: Path) -> dict[str, Any]:
    """Writes the table.

    Args:
        model: a model with a graph.
        store: the store whose graph it reads.
        checkpoint: path of the weights.
        most: largest number of queries; the most frequent ones are taken.
        path: the file to write.

    Returns:
        What index.json says about it: `queries`, their number; `coverage`, the share of the traffic whose queries are
        in the table, None without a log; `measured_on`, a phrase that says which traffic.

    Raises:
        CommandError: two queries have the same hash.
    """
    encode, neighbourhoods = query_contexts(model, store, checkpoint)
    counts = np.concatenate([np.diff(shard["positive.splits"]) for shard in store.interactions()])
    rows = neighbourhoods.rows()
    if len(rows) > most:
        rows = np.sort(rows[np.lexsort((rows, -counts[rows]))[:most]])
    texts = request_tables.TextRows.of(
        _keys(neighbourhoods.texts(rows)),
        f"{store.path}: two queries have the same 63-bit hash; lower serving.graph_queries",
    )
    rows = rows[texts.order]
    dim = model.config.model.token_dim
    with PackedFileWriter(str(path), "items") as file:
        texts.add_to(file)
        file.add(f"feature.{_FEATURE}.splits", np.arange(len(rows) + 1, dtype=np.int64) * dim)
        file.append(f"feature.{_FEATURE}.values", np.zeros(0, np.float32))
        for begin in range(0, len(rows), _BATCH):
            file.append(f"feature.{_FEATURE}.values", encode(rows[begin : begin + _BATCH]).reshape(-1))
    coverage, measured_on = _coverage(store, neighbourhoods, rows, counts)
    return {"queries": len(rows), "coverage": coverage, "measured_on": measured_on}


def _keys(texts: Tokens) -> list[str]:
    values, splits = np.asarray(texts.values).tolist(), np.asarray(texts.row_splits).tolist()
    return [" ".join(map(str, values[begin:end])) for begin, end in itertools.pairwise(splits)]


def _coverage(
    store: Store, neighbourhoods: Neighbourhoods, rows: np.ndarray, counts: np.ndarray
) -> tuple[float | None, str]:
    """Returns the share of the traffic whose query has the tokens of one of the queries `rows`."""
    held_out = store.held_out()
    if held_out is not None and len(held_out["query"]):
        every = -(-len(held_out["query"]) // _SAMPLE)
        asked, weights = np.unique(held_out["query"][::every], return_counts=True)
        what = f"{int(weights.sum()):,} held-out pairs"
    elif counts.sum():
        asked, weights = np.flatnonzero(counts), counts[counts > 0]
        what = f"{int(weights.sum()):,} pairs of the log"
    else:
        return None, "no log"
    known = neighbourhoods.known(neighbourhoods.texts(asked))
    return round(float(weights[np.isin(known, rows) & (known >= 0)].sum() / weights.sum()), 6), what


class QueryTable:
    """The table in the graph of a servable."""

    def __init__(self, path: Path, dim: int):
        """Adds the ops that load the file; `dim` is the width of its vectors."""
        self._dim = dim
        self._keys = request_tables.KeyTable(path)
        self._rows = request_tables.ItemTable(path, [Feature(_FEATURE, "vector", dim)])

    def context(self, tokens: Tokens) -> tf.Tensor:
        """Returns what the click graph adds to queries, float32 [queries, dim]; zero for those not in the table."""
        ids = tf.RaggedTensor.from_row_splits(tf.strings.as_string(tokens.values), tokens.row_splits, validate=False)
        keys = tf.strings.strip(tf.strings.reduce_join(ids.to_tensor(""), axis=1, separator=" "))
        found = self._rows.history(keys, self._keys.item_ids(keys)[:, tf.newaxis], tf.zeros([0, 0], tf.string), 1)
        vectors = found.features.lists[0].values
        if vectors.dtype != tf.float32:
            vectors = tf.bitcast(vectors, tf.float32)
        known = tf.where(found.items.row_splits[1:] > found.items.row_splits[:-1])
        shape = tf.stack([tf.size(keys, tf.int64), self._dim])
        return tf.ensure_shape(tf.scatter_nd(known, tf.reshape(vectors, [-1, self._dim]), shape), [None, self._dim])
