"""Item retrieval inside a TensorFlow graph: the FAISS lookup op (end of section 4.3 and section 5.2.1 of the paper)."""

from __future__ import annotations

import functools
import importlib.util
import os
import uuid
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from dpsr_common.packed_file import PackedFileWriter, checksum
from dpsr_export import op_library_path

__all__ = ["FaissIndexTable", "load", "op_library_path", "write_item_ids"]

v1 = tf.compat.v1


@functools.cache
def load() -> Any:
    """The generated Python functions of the retrieval ops; loads the op library once a process.

    Call it before loading a SavedModel that holds a FaissIndexTable. Unless FAISS_LIBRARY is set already, sets it to
    the libfaiss.so of the installed faiss package, which is not imported: the ops open it when they load an index.

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


def write_item_ids(path: str | Path, item_ids: NDArray[np.int64], index_path: str | Path) -> None:
    """Writes the item ids [ntotal], all >= 0, of an index whose file is complete.

    The file also holds size and checksum of the index: with another one, or one that is damaged, it is refused.
    """
    index = np.memmap(index_path, np.uint8, "r")
    with PackedFileWriter(str(path), "item_ids") as file:
        file.add("id", item_ids)
        file.add("index.bytes", np.array([index.size], np.uint64))
        file.add("index.checksum", np.array([checksum(index)], np.uint64))


class FaissIndexTable:
    """A FAISS index and the item ids of its positions, searched inside the graph.

    In a TensorFlow 1 graph the load op joins the collection TABLE_INITIALIZERS (run `tables_initializer()`) and the
    files join ASSET_FILEPATHS, so that `tf.compat.v1.saved_model.Builder` copies them and the SavedModel can be moved.
    Eagerly the index is loaded at once and freed with this object.

    The files must not change while they are loaded: replace them by renaming others over them.
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
    ):
        """Loads or, in a graph, prepares to load an index.

        Args:
            index_path: an inner-product index that `faiss.write_index` wrote, with positions as labels.
            item_ids_path: the item ids of the positions, which write_item_ids wrote for this very index.
            attributes_path: a packed file of kind "item_attributes" (dpsr_export/attributes.py), what filters compare;
                None where the shop has none: then no filter can be given.
            parameters: search parameters as `faiss.ParameterSpace` names them, for example "nprobe=32".
            max_parameters: the parameters that a request may set, each with its largest value, for example
                "nprobe=512,k_factor_rf=8"; empty: none.
            dim: the dimension that queries will have: an index of another is refused; 0: any.
            mmap: maps the index instead of copying it: processes share its memory.

        Raises:
            tf.errors.NotFoundError: a file does not exist. This and all below at once when eager, else when the load op
                runs.
            tf.errors.DataLossError: a file is damaged, or the index is not the one of the item ids.
            tf.errors.FailedPreconditionError: the metric is not the inner product, the index is not trained or of
                another dimension, there are not as many item ids as vectors, an item id is negative, the attributes are
                of other items, or no FAISS library of the right version is found.
            tf.errors.InvalidArgumentError: FAISS does not take the parameters.
        """
        ops = load()
        with tf.name_scope("faiss_index"):
            # A name of its own: in eager mode all tables of a process live side by side.
            self._handle = ops.dpsr_faiss_index_handle(shared_name=f"faiss_index_{uuid.uuid4().hex}")
            paths = [tf.constant(str(path or "")) for path in (index_path, item_ids_path, attributes_path)]
            loaded = ops.dpsr_faiss_index_load(
                self._handle, *paths, parameters=parameters, max_parameters=max_parameters, dim=dim, mmap=mmap
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
        """Retrieves the items with the largest inner products, over all heads.

        Each head retrieves k items; the results are united; an item's score is its largest inner product over heads
        (not the soft dot product, which training uses); equal scores are ordered by ascending item id; the best k
        remain. A row that holds a NaN or an infinity, and a head of zeros, as an empty query has, retrieve nothing.

        Args:
            query_embedding: [batch, heads, dim] float32, at most 16 heads.
            k: [] int32, 1 to 10,000.
            include: [batch, n] string, filter expressions (docs/index.md, "Filters"); an item is found where it meets
                each of its row. "" is padding. This and the next two may be absent: None, or a tensor without elements.
            exclude: [batch, n] string, filter expressions; an item is found where it meets none of its row.
            excluded_item_ids: [batch, n] int64, items that are not found; -1 is padding.
            parameters: [] string, search parameters of this call, within `max_parameters`; "" or None: those of the
                index.

        Returns:
            item_ids [batch, k] int64, scores [batch, k] float32 and heads [batch, k] int32, the best first: heads holds
            the head that gave the score, the lowest of those that gave the same. Missing results are -1, -inf and -1.

        Raises:
            tf.errors.InvalidArgumentError: another shape, k out of range, an expression that is malformed or names an
                attribute that is not there, parameters out of bounds. In a graph what is known statically is a
                ValueError.
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


def _absent(dtype: tf.DType) -> tf.Tensor:
    return tf.zeros([0, 0], dtype)


def _destroy(handle: tf.Tensor) -> None:
    # The table may be collected while a graph is being built; the handle is eager.
    with tf.init_scope():
        tf.raw_ops.DestroyResourceOp(resource=handle, ignore_lookup_error=True)
