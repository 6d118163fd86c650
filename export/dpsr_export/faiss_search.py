"""Item retrieval in a TensorFlow graph: the FAISS lookup op (end of section 4.3 and section 5.2.1 of the paper)."""

from __future__ import annotations

import functools
import importlib.util
import os
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from dpsr_common.packed_file import PackedFileWriter, checksum
from dpsr_export import op_library_path

__all__ = ["FaissIndexTable", "load", "op_library_path", "read_item_changes", "write_item_ids"]

v1 = tf.compat.v1


@functools.cache
def load() -> Any:
    """Loads the op library, once in a process, and returns the generated Python functions of its ops.

    Call it before you load a SavedModel that contains a FaissIndexTable. If the environment variable FAISS_LIBRARY is
    not set, this sets it to the libfaiss.so of the installed faiss package. The package is not imported: the ops open
    the library when they load an index.

    Raises:
        FileNotFoundError: the native parts are not built.
    """
    if not os.environ.get("FAISS_LIBRARY"):
        spec = importlib.util.find_spec("faiss")
        if spec is not None and spec.origin is not None:
            library = Path(spec.origin).parent / "libfaiss.so"
            if library.is_file():
                os.environ["FAISS_LIBRARY"] = str(library)
    return tf.load_op_library(op_library_path())


def write_item_ids(
    path: str | Path,
    item_ids: NDArray[np.int64],
    index_path: str | Path,
    entries: int = 1,
    versions: Mapping[int, int] | None = None,
    residual: float | None = None,
) -> None:
    """Writes the item ids of the positions of an index.

    The file also holds the size and checksum of the index file, so that it is refused with another or a damaged index.

    Args:
        path: the file to write.
        item_ids: int64 [ntotal / entries], all at least 0.
        index_path: the index file, which must be complete.
        entries: number of times that the index holds each position: 2 if each is in two lists.
        versions: the last version of items that had changes with a version, by id (docs/fresh_items.md). It may have
            ids that are not in the index. The file then has the sections `version`, int64 [items], with 0 for none;
            `hidden.id` and `hidden.version`, int64 [those that are not in the index].
        residual: mean squared distance of the items' vectors to what their codes stand for (ann.code_residual), with
            which that of new items is compared.
    """
    index = np.memmap(index_path, np.uint8, "r")
    with PackedFileWriter(str(path), "item_ids") as file:
        file.add("id", item_ids)
        file.add("index.bytes", np.array([index.size], np.uint64))
        file.add("index.checksum", np.array([checksum(index)], np.uint64))
        if entries > 1:
            file.add("index.entries", np.array([entries], np.uint64))
        if versions:
            known = np.array(sorted(versions.items()), np.int64)
            order = np.argsort(item_ids, kind="stable")
            places = order[np.minimum(np.searchsorted(item_ids, known[:, 0], sorter=order), len(item_ids) - 1)]
            there = item_ids[places] == known[:, 0]
            of_items = np.zeros(len(item_ids), np.int64)
            of_items[places[there]] = known[there, 1]
            file.add("version", of_items)
            file.add("hidden.id", np.ascontiguousarray(known[~there, 0]))
            file.add("hidden.version", np.ascontiguousarray(known[~there, 1]))
        if residual is not None:
            file.add("index.residual", np.array([residual], np.float64))


def read_item_changes(
    path: tf.Tensor | str, offset: tf.Tensor | int, max_changes: tf.Tensor | int, up: int = 0, log_errors: bool = False
) -> Any:
    """Reads changes of items from a log (dpsr_export/item_changes.py).

    Args:
        path: [] string, the directory of the log or, if `up` is not 0, an asset of a servable. The log of a servable is
            beside its versions. A servable whose version is not a whole number, or on a file system other than the
            local ones, has no log.
        offset: [] int64, the first change to read.
        max_changes: [] int32, the largest number of changes to read, at least 1.
        up: number of levels from the asset to the directory that holds the log.
        log_errors: logs that a segment cannot be read, and returns no changes, instead of raising an error.

    Returns:
        A named tuple of kinds int32 [n], item_ids int64 [n], versions int64 [n], times float64 [n], keys string [n]
        ("" where item ids are numbers), examples string [n], and next_offset int64 [], of the change after the last.
        n is 0 if the log has no changes from `offset` on, or does not exist.

    Raises:
        tf.errors.DataLossError: the segment with `offset` is damaged or missing. The message names the file.
    """
    return load().dpsr_item_changes_read(
        path, tf.cast(offset, tf.int64), tf.cast(max_changes, tf.int32), up=up, log_errors=log_errors
    )


class FaissIndexTable:
    """A FAISS index and the item ids of its positions, which a TensorFlow graph can search.

    In a TensorFlow 1 graph the load op is added to the collection TABLE_INITIALIZERS (run `tables_initializer()`), and
    the files to ASSET_FILEPATHS. So `tf.compat.v1.saved_model.Builder` copies them, and the SavedModel can be moved. In
    eager mode the index is loaded at once, and freed with this object.

    The files must not change while they are loaded. To replace them, rename other files over them.
    """

    def __init__(
        self,
        index_path: str,
        item_ids_path: str,
        attributes_path: str | None = None,
        parameters: str = "",
        max_parameters: str = "",
        dim: int = 0,
        mmap: bool = True,
        changes_offset: int = 0,
        shard: int = 0,
        num_shards: int = 1,
    ):
        """Loads an index or, in a graph, adds the op that loads it.

        Args:
            index_path: an inner-product index that `faiss.write_index` wrote, with positions as labels.
            item_ids_path: the item ids of the positions, which write_item_ids wrote for this index.
            attributes_path: a packed file of kind "item_attributes" (dpsr_export/item_attributes.py), which filters are
                evaluated on. Without it a search cannot have filters.
            parameters: search parameters as `faiss.ParameterSpace` names them, for example "nprobe=32".
            max_parameters: the parameters that a request may set, with their largest values, for example
                "nprobe=512,k_factor_rf=8". Empty means none. A request may always set max_codes where an index of lists
                obeys it; if it is named here, up to this value.
            dim: dimension of the queries. An index of another dimension is refused. 0 accepts any dimension.
            mmap: maps the index instead of copying it, so that processes share its memory.
            changes_offset: the index has all changes of its items before this one.
            shard: number of this index among the shards that split the items.
            num_shards: number of these shards.

        Raises:
            tf.errors.NotFoundError: a file does not exist. All errors are raised here in eager mode, and otherwise when
                the load op runs.
            tf.errors.DataLossError: a file is damaged, or the item ids belong to another index.
            tf.errors.FailedPreconditionError: the metric is not the inner product, the index is not trained or has
                another dimension, the numbers of item ids and vectors differ, an item id is negative, the attributes
                belong to other items, or no FAISS library of the right version is found.
            tf.errors.InvalidArgumentError: FAISS refuses the parameters.
        """
        ops = load()
        with tf.name_scope("faiss_index"):
            # Each table needs its own name, because in eager mode all tables of a process share one resource manager.
            self._handle = ops.dpsr_faiss_index_handle(shared_name=f"faiss_index_{uuid.uuid4().hex}")
            paths = [tf.constant(str(path or "")) for path in (index_path, item_ids_path, attributes_path)]
            self.item_ids_path = paths[1]
            loaded = ops.dpsr_faiss_index_load(
                self._handle,
                *paths,
                parameters=parameters,
                max_parameters=max_parameters,
                dim=dim,
                mmap=mmap,
                changes_offset=changes_offset,
                shard=shard,
                num_shards=num_shards,
            )
        if tf.executing_eagerly():
            weakref.finalize(self, _destroy, self._handle).atexit = False
        else:
            v1.add_to_collection(v1.GraphKeys.TABLE_INITIALIZERS, loaded)
            for path in paths if attributes_path else paths[:2]:
                v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, path)

    def search(
        self,
        query_embedding: tf.Tensor,
        k: tf.Tensor | int,
        include: tf.Tensor | None = None,
        exclude: tf.Tensor | None = None,
        excluded_item_ids: tf.Tensor | None = None,
        parameters: tf.Tensor | str | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Retrieves the items with the largest inner products over all heads.

        Each head retrieves k items, and the results are united. The score of an item is its largest inner product over
        the heads (not the soft dot product, which training uses). Equal scores are ordered by ascending item id. The
        best k remain. Nothing is retrieved for a row that holds a NaN or an infinity, nor by a head that is all zeros,
        as that of an empty query.

        Args:
            query_embedding: [batch, heads, dim] float32, at most 16 heads.
            k: [] int32, 1 to 10,000.
            include: [batch, n] string, filter expressions (docs/index.md, "Filters"). Results meet all expressions of
                their row. "" is padding. This and the next two may be absent: None, or a tensor without elements.
            exclude: [batch, n] string, filter expressions. Results meet none of the expressions of their row.
            excluded_item_ids: [batch, n] int64, items that are not retrieved. -1 is padding.
            parameters: [] string, search parameters of this call, within `max_parameters`. With "" or None the
                parameters of the index are used.

        Returns:
            item_ids [batch, k] int64, scores [batch, k] float32 and heads [batch, k] int32, best first. heads has the
            head that gave the score (the lowest, if several gave the same). Missing results are -1, -inf and -1.

        Raises:
            tf.errors.InvalidArgumentError: a wrong shape, k out of range, a malformed expression, an unknown attribute,
                or parameters out of bounds. In a graph, errors that are known statically are ValueErrors.
            tf.errors.FailedPreconditionError: the load op has not run.
        """
        item_ids, scores, heads = load().dpsr_faiss_search(
            self._handle,
            query_embedding,
            k,
            parameters=tf.convert_to_tensor("" if parameters is None else parameters),
            include=_absent(tf.string) if include is None else include,
            exclude=_absent(tf.string) if exclude is None else exclude,
            excluded_item_ids=_absent(tf.int64) if excluded_item_ids is None else excluded_item_ids,
        )
        return item_ids, scores, heads

    def apply_changes(self, offset: tf.Tensor | int, changes: Any, vectors: tf.Tensor) -> tf.Tensor:
        """Applies a batch of changes of items. Searches see all of them, or none.

        A put adds or replaces an item. An update changes attributes for filters. A deletion hides an item. Updates and
        deletions of unknown ids are ignored, and so are changes with a lower version than the last one of their item.
        With several shards, a put adds the item to one shard, and hides it in the others.

        Args:
            offset: [] int64, of the first change. If it is not the offset of changes_state, nothing happens.
            changes: what read_item_changes returns: kinds int32 [n] (0 put, 1 update, 2 delete), item_ids int64 [n],
                versions int64 [n] (0 if not given), times float64 [n], keys string [n], examples string [n] (serialized
                tf.train.Example with features "attribute.NAME"), and next_offset int64 [].
            vectors: [puts, dim] float32, the embeddings of the items that are put. An item whose embedding is zero or
                not finite is hidden.

        Returns:
            [] bool, whether the changes were applied.

        Raises:
            tf.errors.InvalidArgumentError: a wrong shape, an unknown kind, a negative id, or an example that cannot be
                parsed. Nothing has then changed.
            tf.errors.FailedPreconditionError: the load op has not run.
        """
        return load().dpsr_item_changes_apply(
            self._handle,
            tf.cast(offset, tf.int64),
            changes.next_offset,
            changes.kinds,
            changes.item_ids,
            changes.versions,
            changes.times,
            changes.keys,
            changes.examples,
            vectors,
        )

    def changes_state(self) -> Any:
        """Returns what the changes have done.

        Returns:
            A named tuple of offset int64 [], the first change that has not been applied; counts int64 [8]: visible
            items, those in the open segment, those in sealed segments, sealed segments, hidden entries of the index,
            ignored changes, puts that were not indexed (their embedding is zero or not finite), updates; last_time
            float64 [], the time of the last change, or 0; and drift float32 [], the mean squared distance of new
            vectors to what their codes stand for, over that of the items of the index, or NaN if it is not known.
        """
        return load().dpsr_item_changes_state(self._handle)

    def changed_item_keys(self, item_ids: tf.Tensor, keys: tf.Tensor) -> tf.Tensor:
        """Fills in the shop's own ids of items that changes have put.

        Args:
            item_ids: int64, in any shape.
            keys: string, in the same shape, the keys that are known already, or "".

        Returns:
            string, in the same shape: the keys. "" where they are not known.
        """
        return load().dpsr_changed_item_keys(self._handle, item_ids, keys)

    def changed_item_ids(self, keys: tf.Tensor, item_ids: tf.Tensor) -> tf.Tensor:
        """Fills in the item ids of items that changes have put.

        Args:
            keys: string, in any shape, the shop's own ids.
            item_ids: int64, in the same shape, the ids that are known already, or -1.

        Returns:
            int64, in the same shape: the item ids. -1 where they are not known.
        """
        return load().dpsr_changed_item_ids(self._handle, keys, item_ids)


def _absent(dtype: tf.DType) -> tf.Tensor:
    return tf.zeros([0, 0], dtype)


def _destroy(handle: tf.Tensor) -> None:
    # The handle is eager, but Python may free the table while a graph is being built.
    with tf.init_scope():
        tf.raw_ops.DestroyResourceOp(resource=handle, ignore_lookup_error=True)
