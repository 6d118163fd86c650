"""Tables of a servable inside the graph: what a request says of a user, as training read it, and text item ids.

In a TensorFlow 1 graph the load ops join the collection TABLE_INITIALIZERS and the files ASSET_FILEPATHS, as those of
FaissIndexTable do. The C++ is in export/request_tables.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from dpsr_export.faiss_search import load
from dpsr_tf.data.examples_dataset import Features, History, Tokens
from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.models.features import FIXED_KINDS, Feature

v1 = tf.compat.v1


class KeyTable:
    """Texts and what they stand for, from a packed file (export/request_tables/key_table.h)."""

    def __init__(self, path: str | Path):
        """Loads, or in a graph prepares to load, the file.

        Raises:
            tf.errors.NotFoundError, DataLossError, FailedPreconditionError: no such file, a damaged one, another kind;
                at once when eager, else when the load op runs.
        """
        handle = load().dpsr_key_table_handle(shared_name=f"key_table_{uuid.uuid4().hex}")
        self._handle = _loaded(handle, load().dpsr_key_table_load, path)

    def item_ids(self, keys: tf.Tensor) -> tf.Tensor:
        """Item ids int64 of the shop's own text ids, of any shape; -1 where there is none."""
        return load().dpsr_item_ids_of_keys(self._handle, keys)

    def item_keys(self, ids: tf.Tensor) -> tf.Tensor:
        """The reverse: "" where there is none."""
        return load().dpsr_item_keys_of_ids(self._handle, ids)

    def feature_codes(
        self,
        side: str,
        features: Sequence[Feature],
        boundaries: dict[str, Sequence[float]],
        texts: tf.Tensor,
        values: Sequence[tf.Tensor],
    ) -> tuple[tf.Tensor, dict[str, Tokens]]:
        """Codes of features of the kinds categorical, number and multi, 0 for what is absent or unknown.

        Args:
            side: "user" or "item".
            features: in the order of `values`.
            boundaries: of each feature of kind number.
            texts: string [batch], what the values belong to.
            values: string [batch], float [batch] (NaN is absent) or string [batch, n] ("" is padding); a tensor without
                elements is absent.

        Returns:
            Codes int32 [batch, features of the kinds categorical and number]; codes of each feature of kind multi.

        Raises:
            tf.errors.InvalidArgumentError: another shape.
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
    """Texts and features of the items of a store, by id: what the query tower reads of a history."""

    def __init__(self, path: str | Path, features: Sequence[Feature]):
        """Loads, or in a graph prepares to load, items.dpsr, or a part of it that has these features.

        Raises:
            tf.errors.NotFoundError, DataLossError, FailedPreconditionError: as KeyTable; also a feature that the file
                does not have.
        """
        fixed = [feature.name for feature in features if feature.kind in FIXED_KINDS]
        lists = [feature.name for feature in features if feature.kind not in FIXED_KINDS]
        self._num_lists = len(lists)
        handle = load().dpsr_item_table_handle(shared_name=f"item_table_{uuid.uuid4().hex}")
        self._handle = _loaded(handle, load().dpsr_item_table_load, path, fixed=fixed, lists=lists)

    def history(self, texts: tf.Tensor, item_ids: tf.Tensor, types: tf.Tensor, length: int) -> History:
        """The last `length` known items of each user, oldest first, as training has them; no past queries.

        Args:
            texts: string [batch], one a user; only their number counts.
            item_ids: int64 [batch, n], oldest first; -1 is padding. No element where all are absent.
            types: string [batch, n], names of EVENT_TYPES, "" for a click; no element where all are clicks.
            length: at least 1.

        Raises:
            tf.errors.InvalidArgumentError: another shape, an unknown type.
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
    """The last `length` queries of each user, of equal ones in a row one, as training has them.

    Args:
        texts: string [batch], one a user; only their number counts.
        queries: string [batch, n], oldest first; "" is padding. No element where all are absent.
        length: at least 1.

    Returns:
        Texts string [p], and where each user's are: row splits int64 [batch + 1].

    Raises:
        tf.errors.InvalidArgumentError: another shape.
    """
    found = load().dpsr_past_queries(texts, queries, length=length)
    return found.queries, found.row_splits


def file_fingerprint(path: str | Path) -> str:
    """16 hex digits that tell a file from another in its place (export/request_tables/file_fingerprint.h)."""
    with tf.Graph().as_default(), v1.Session() as session:
        return str(session.run(load().dpsr_file_fingerprint(str(path))).decode())


def check_assets() -> None:
    """Makes the graph refuse at load any asset, of those it has so far, that is not the file it is now."""
    for path in v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS):
        expected = file_fingerprint(tf.get_static_value(path).item().decode())
        with tf.name_scope("check_asset"):
            checked = load().dpsr_file_fingerprint(path, expected=expected)
        v1.add_to_collection(v1.GraphKeys.TABLE_INITIALIZERS, checked.op)


def _loaded(handle: tf.Tensor, load_op: Any, path: str | Path, **attributes: Any) -> tf.Tensor:
    filename = tf.constant(str(path))
    loaded = load_op(handle, filename, **attributes)
    if not tf.executing_eagerly():
        v1.add_to_collection(v1.GraphKeys.TABLE_INITIALIZERS, loaded)
        v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, filename)
    return handle
