"""Tables in the graph of a servable. They turn the values of a request into what the towers read in training.

They cover values of features, items of a history, past queries, and item ids that are texts. In a TensorFlow 1 graph
the load ops are added to the collection TABLE_INITIALIZERS and the files to ASSET_FILEPATHS, as FaissIndexTable does.
The C++ is in export/request_tables.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFileWriter
from dpsr_export.faiss_search import load
from dpsr_tf.data.column_files import string_bytes
from dpsr_tf.data.column_values import ids_of
from dpsr_tf.data.examples_dataset import Features, History, Tokens
from dpsr_tf.data.id_index import id_index
from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.models.features import FIXED_KINDS, Feature

v1 = tf.compat.v1


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Texts as the rows of a packed file of kind "items", which KeyTable and ItemTable read.

    Attributes:
        ids: int64 [rows], hashes of the texts, ascending.
        order: int64 [rows], the place of each row's text among those given.
    """

    ids: np.ndarray
    order: np.ndarray
    _keys: pa.Array

    @classmethod
    def of(cls, texts: Sequence[str], problem: str) -> TextRows:
        """Sorts different texts by their hashes. Raises CommandError with `problem` if two have the same hash."""
        keys = pa.array(texts, pa.large_string())
        ids = ids_of(keys, string_ids=True).values if len(keys) else np.zeros(0, np.int64)
        order = np.argsort(ids)
        ids = ids[order]
        if (ids[1:] == ids[:-1]).any():
            raise CommandError(problem)
        return cls(ids, order, keys.take(pa.array(order)))

    def add_to(self, file: PackedFileWriter) -> None:
        """Adds the sections `id`, `id_index.*`, `key.*`, and empty `tokens.*`."""
        data, splits = string_bytes(self._keys)
        bucket_splits, bucket_rows = id_index(self.ids)
        file.add("id", self.ids)
        file.add("id_index.splits", bucket_splits)
        file.add("id_index.rows", bucket_rows)
        file.add("key.splits", splits)
        file.add("key.bytes", data)
        file.add("tokens.splits", np.zeros(len(self.ids) + 1, np.int64))
        file.add("tokens.values", np.zeros(0, np.int32))


class KeyTable:
    """A table of texts with an id or a code each, from a packed file (export/request_tables/key_table.h)."""

    def __init__(self, path: str | Path):
        """Loads the file or, in a graph, adds the op that loads it.

        Raises:
            tf.errors.NotFoundError, DataLossError, FailedPreconditionError: the file does not exist, is damaged, or is
                of another kind. Raised here in eager mode, and otherwise when the load op runs.
        """
        handle = load().dpsr_key_table_handle(shared_name=f"key_table_{uuid.uuid4().hex}")
        self._handle = loaded(handle, load().dpsr_key_table_load, path)

    def item_ids(self, keys: tf.Tensor) -> tf.Tensor:
        """Returns the item id, int64, of each of the shop's own text ids, in the same shape. Unknown texts give -1."""
        return load().dpsr_item_ids_of_keys(self._handle, keys)

    def item_keys(self, ids: tf.Tensor) -> tf.Tensor:
        """Returns the shop's own text id of each item id, in the same shape. Unknown ids give ""."""
        return load().dpsr_item_keys_of_ids(self._handle, ids)

    def feature_codes(
        self,
        side: str,
        features: Sequence[Feature],
        boundaries: dict[str, Sequence[float]],
        texts: tf.Tensor,
        values: Sequence[tf.Tensor],
    ) -> tuple[tf.Tensor, dict[str, Tokens]]:
        """Returns the codes of features of the kinds categorical, number and multi. 0 is absent or unknown.

        Args:
            side: "user" or "item".
            features: the features, in the order of `values`.
            boundaries: bucket boundaries of each feature of kind number.
            texts: string [batch], the texts that the values belong to. Only their number counts.
            values: for each feature string [batch] (categorical), float [batch] (number; NaN is absent) or string
                [batch, n] (multi; "" is padding). A tensor without elements is absent.

        Returns:
            Codes int32 [batch, features of the kinds categorical and number], and the codes of each feature of kind
            multi by its name.

        Raises:
            tf.errors.InvalidArgumentError: a tensor has a wrong shape.
        """
        multi = [feature.name for feature in features if feature.kind not in FIXED_KINDS]
        ends = [boundaries[feature.name] if feature.kind == "number" else () for feature in features]
        codes, list_values, list_splits = load().dpsr_feature_codes(
            self._handle,
            texts,
            values,
            side=side,
            names=[feature.name for feature in features],
            lists=[feature.name in multi for feature in features],
            boundaries=[end for of_feature in ends for end in of_feature],
            num_boundaries=[len(of_feature) for of_feature in ends],
            num_lists=len(multi),
        )
        return codes, dict(zip(multi, map(Tokens, list_values, list_splits), strict=True))


class ItemTable:
    """A table of the texts and features of items by id, which the query tower reads for a history."""

    def __init__(self, path: str | Path, features: Sequence[Feature]):
        """Loads items.dpsr or, in a graph, adds the op that loads it. The file may lack other features than `features`.

        Raises:
            tf.errors.NotFoundError, DataLossError, FailedPreconditionError: as for KeyTable, or the file lacks a
                feature.
        """
        fixed = [feature.name for feature in features if feature.kind in FIXED_KINDS]
        lists = [feature.name for feature in features if feature.kind not in FIXED_KINDS]
        self._num_lists = len(lists)
        handle = load().dpsr_item_table_handle(shared_name=f"item_table_{uuid.uuid4().hex}")
        self._handle = loaded(handle, load().dpsr_item_table_load, path, fixed=fixed, lists=lists)

    def history(self, texts: tf.Tensor, item_ids: tf.Tensor, types: tf.Tensor, length: int) -> History:
        """Returns the last `length` known items of each user, oldest first, as in training. It has no past queries.

        Args:
            texts: string [batch], one for each user. Only their number counts.
            item_ids: int64 [batch, n], oldest first. -1 is padding. A tensor without elements means no history.
            types: string [batch, n], names of EVENT_TYPES, or "" for a click. A tensor without elements means that all
                are clicks.
            length: at least 1.

        Raises:
            tf.errors.InvalidArgumentError: a tensor has a wrong shape, or a type is unknown.
        """
        found = load().dpsr_item_history(
            self._handle,
            texts,
            item_ids,
            types,
            length=length,
            event_types=EVENT_TYPES,
            default_type=EVENT_TYPES.index("click"),
            num_lists=self._num_lists,
        )
        return History(
            items=Tokens(found.rows, found.row_splits),
            types=found.type_codes,
            text=Tokens(found.text_values, found.text_splits),
            features=Features(found.codes, tuple(map(Tokens, found.list_values, found.list_splits))),
            query_splits=tf.zeros_like(found.row_splits),
            query=Tokens(tf.zeros([0], tf.int32), tf.zeros([1], tf.int64)),
        )


def past_queries(texts: tf.Tensor, queries: tf.Tensor, length: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the last `length` queries of each user, as in training. Equal queries in a row count once.

    Args:
        texts: string [batch], one for each user. Only their number counts.
        queries: string [batch, n], oldest first. "" is padding. A tensor without elements means no past queries.
        length: at least 1.

    Returns:
        Texts, string [p], and the row splits of the users, int64 [batch + 1].

    Raises:
        tf.errors.InvalidArgumentError: a tensor has a wrong shape.
    """
    found = load().dpsr_past_queries(texts, queries, length=length)
    return found.queries, found.row_splits


def file_fingerprint(path: str | Path) -> str:
    """Returns 16 hex digits that identify the content of a file (export/request_tables/file_fingerprint.h)."""
    with tf.Graph().as_default(), v1.Session() as session:
        return str(session.run(load().dpsr_file_fingerprint(str(path))).decode())


def check_assets() -> None:
    """Adds checks to the graph: it refuses to load if one of its assets so far is no longer the file it is now."""
    for path in v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS):
        expected = file_fingerprint(tf.get_static_value(path).item().decode())
        with tf.name_scope("check_asset"):
            checked = load().dpsr_file_fingerprint(path, expected=expected)
        v1.add_to_collection(v1.GraphKeys.TABLE_INITIALIZERS, checked.op)


def accept_assets(servable: Path, names: Collection[str], change: Callable[[Any], None] | None = None) -> None:
    """Changes the graph of a servable so that it accepts other files: the ones that its assets `names` now are.

    Args:
        servable: the version directory.
        names: names of files in `assets`.
        change: is called with each NodeDef of the graph, and may change it too.
    """
    path = servable / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    (meta_graph,) = saved_model.meta_graphs
    assets = {}
    for held in meta_graph.collection_def[tf.saved_model.ASSETS_KEY].any_list.value:
        asset = meta_graph_pb2.AssetFileDef.FromString(held.value)
        assets[asset.tensor_info.name.partition(":")[0]] = asset.filename
    for node in meta_graph.graph_def.node:
        if change is not None:
            change(node)
        if node.op == "DpsrFileFingerprint" and assets[node.input[0]] in names:
            node.attr["expected"].s = file_fingerprint(servable / "assets" / assets[node.input[0]]).encode()
    path.write_bytes(saved_model.SerializeToString(deterministic=True))


def loaded(handle: tf.Tensor, load_op: Any, path: str | Path, **attributes: Any) -> tf.Tensor:
    """Loads a file into the handle of a table or, in a graph, adds the op that does it. Returns the handle."""
    filename = tf.constant(str(path))
    loaded = load_op(handle, filename, **attributes)
    if not tf.executing_eagerly():
        v1.add_to_collection(v1.GraphKeys.TABLE_INITIALIZERS, loaded)
        v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, filename)
    return handle
