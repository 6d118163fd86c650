"""The click graph of a store: edges between queries and items, and between items and values of their attributes.

graph.dpsr (kind "graph"), or one file for each shard; the edges of a node stand strongest first, ties by ascending row

  query.splits   int64 [queries of the shard + 1]   row splits of the edges of each query
  query.item     int32                              items that were clicked for it
  query.weight   float32                            sum of the weights of these clicks
  [query.time]   uint32                             when the request of the first of them began, if the log has times
  item.first     int64 [1]                          first item row of this file, of S: s I / S in file s
  item.splits    int64 [items of the shard + 1]     row splits of the edges of each item
  item.query     int32                              rows of the queries, counted over all shards
  item.weight, [item.time]                          as above
  value.<name>.splits  int64 [values + 2]           first file only, for each attribute: row splits of the edges of
                                                    each code of the feature; code 0, the unknown value, has none
  value.<name>.item    int32                        items with this value
  value.<name>.weight  float32                      1 + number of positive pairs of the item

The edges from an item to its attributes are the features in items.dpsr. A node keeps `max_edges` edges in each
direction, so an edge may stand in one direction only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_tf.data.column_files import add_splits, row_splits
from dpsr_tf.data.database import Database, SortedColumns
from dpsr_tf.data.encode import POSITIVE
from dpsr_tf.data.interaction_log import summed_weights
from dpsr_tf.data.schema import Schema
from dpsr_tf.data.store import graph_names


def write_graph(database: Database, schema: Schema, out: Path, shards: int, item_clicks: np.ndarray) -> dict[str, Any]:
    """Writes the files of the graph into the directory `out`.

    Args:
        database: has the tables `queries` and `pairs` of InteractionLog.
        schema: has a section `graph`.
        out: holds items.dpsr.
        shards: number of files.
        item_clicks: number of positive pairs of each item, float32 [items].

    Returns:
        What the manifest says about the graph: `edges` between queries and items, and `capped`, the number of nodes of
        each kind that have more edges than a node keeps.
    """
    assert schema.graph is not None
    limit, queries = schema.graph.max_edges, database.count("queries")
    weight = summed_weights(database)
    database.create(
        "edges",
        f"""SELECT query_row, item_row, ({weight})::FLOAT AS weight, min(asked) AS time FROM pairs
            WHERE role = {POSITIVE} AND NOT held GROUP BY query_row, item_row HAVING ({weight})::FLOAT > 0""",
    )
    columns = ["weight", "time"] if schema.interactions and schema.interactions.time else ["weight"]
    capped = {
        side: database.scalar(
            f"SELECT count(*) FROM (SELECT 1 FROM edges GROUP BY {side}_row HAVING count(*) > {limit})"
        )
        for side in ("query", "item")
    }
    of_queries = _edges_of(database, "query_row", "item_row", columns, limit, queries)
    of_items = _edges_of(database, "item_row", "query_row", columns, limit, len(item_clicks))
    first_query = 0
    for shard, name in enumerate(graph_names(shards)):
        end_query = first_query + database.scalar(f"SELECT count(*) FROM queries WHERE shard = {shard}")
        first_item, end_item = (len(item_clicks) * s // shards for s in (shard, shard + 1))
        with PackedFileWriter(out / name, "graph") as file:
            _write_edges(file, "query", "item", columns, of_queries, first_query, end_query)
            file.add("item.first", np.array([first_item], np.int64))
            _write_edges(file, "item", "query", columns, of_items, first_item, end_item)
            for attribute in schema.graph.attributes if shard == 0 else ():
                capped[attribute] = _write_values(file, out, attribute, item_clicks, limit)
        first_query = end_query
    capped = {node: count for node, count in capped.items() if count}
    found = {"edges": database.count("edges"), "capped": capped}
    database.drop("edges")
    for node, count in capped.items():
        print(
            f"graph: {count:,} nodes of kind {node} have more than {limit:,} edges; each keeps its strongest {limit:,}",
            flush=True,
        )
    return found


def _edges_of(
    database: Database, node: str, neighbour: str, columns: list[str], limit: int, num_nodes: int
) -> SortedColumns:
    """Returns the neighbours of each node, and the other columns of their edges."""
    order = f"weight DESC, {neighbour}"
    return database.sorted_columns(
        [neighbour, *columns],
        f"""FROM (FROM edges QUALIFY row_number() OVER (PARTITION BY {node} ORDER BY {order}) <= {limit})""",
        [node, order],
        "write graph",
        group=node,
        num_groups=num_nodes,
    )


def _write_edges(
    file: PackedFileWriter, node: str, neighbour: str, columns: list[str], edges: SortedColumns, begin: int, end: int
) -> None:
    first, last = add_splits(file, f"{node}.splits", edges.splits, begin, end)
    for name, column in zip((neighbour, *columns), edges.columns, strict=True):
        column.copy(file, f"{node}.{name}", first, last)


def _write_values(file: PackedFileWriter, out: Path, attribute: str, clicks: np.ndarray, limit: int) -> int:
    """Writes the items of each value of an attribute. Returns how many values have more of them than are kept."""
    items = PackedFile(str(out / "items.dpsr"), "items", False)
    codes, num_values = items[f"feature.{attribute}"].astype(np.int32), len(items[f"values.{attribute}.splits"]) - 1
    order = np.lexsort((-clicks, codes))  # stable, so ties stay in the order of rows
    order = order[codes[order] > 0].astype(np.int32)
    counts = np.bincount(codes[order], minlength=num_values + 1)
    rank = np.arange(len(order)) - np.repeat(row_splits(counts)[:-1], counts)
    kept = order[rank < limit]
    file.add(f"value.{attribute}.splits", row_splits(np.minimum(counts, limit)))
    file.add(f"value.{attribute}.item", kept)
    file.add(f"value.{attribute}.weight", (clicks[kept] + 1).astype(np.float32))
    return int((counts > limit).sum())
