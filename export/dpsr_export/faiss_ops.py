"""Item retrieval inside a TensorFlow graph: the FAISS lookup op (end of section 4.3 and section 5.2.1 of the paper)."""

from __future__ import annotations

import functools
import importlib.util
import os
import uuid
import weakref
from pathlib import Path
from typing import Any

import tensorflow as tf

from dpsr_export import op_library_path

__all__ = ["FaissIndexTable", "load", "op_library_path"]

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


class FaissIndexTable:
    """A FAISS index and the item ids of its positions, searched inside the graph.

    In a TensorFlow 1 graph the load op joins the collection TABLE_INITIALIZERS (run `tables_initializer()`) and the two
    files join ASSET_FILEPATHS, so that `tf.compat.v1.saved_model.Builder` copies them and the SavedModel can be moved.
    Eagerly the index is loaded at once and freed with this object.

    The files must not change while they are loaded: replace them by renaming others over them.
    """

    def __init__(self, index_path: str, item_ids_path: str, parameters: str = "", mmap: bool = True):
        """Loads or, in a graph, prepares to load an index.

        Args:
            index_path: an inner-product index that `faiss.write_index` wrote, with positions as labels.
            item_ids_path: a packed file of kind "item_ids", section "id": int64 [ntotal], all >= 0.
            parameters: search parameters as `faiss.ParameterSpace` names them, for example "nprobe=32".
            mmap: maps the index instead of reading it: loads in milliseconds, and processes share its memory.

        Raises:
            tf.errors.NotFoundError: a file does not exist. This and all below at once when eager, else when the load op
                runs.
            tf.errors.DataLossError: a file is damaged.
            tf.errors.FailedPreconditionError: the metric is not the inner product, the index is not trained, there are
                not as many item ids as vectors, an item id is negative, or no FAISS library of the right version is
                found.
            tf.errors.InvalidArgumentError: FAISS does not take the parameters.
        """
        ops = load()
        with tf.name_scope("faiss_index"):
            # A name of its own: in eager mode all tables of a process live side by side.
            self._handle = ops.dpsr_faiss_index_handle(shared_name=f"faiss_index_{uuid.uuid4().hex}")
            paths = [tf.constant(str(path)) for path in (index_path, item_ids_path)]
            loaded = ops.dpsr_faiss_index_load(self._handle, *paths, parameters=parameters, mmap=mmap)
        if tf.executing_eagerly():
            weakref.finalize(self, _destroy, self._handle).atexit = False
        else:
            v1.add_to_collection(v1.GraphKeys.TABLE_INITIALIZERS, loaded)
            for path in paths:
                v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, path)

    def search(self, query_embedding: tf.Tensor, k: tf.Tensor | int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Retrieves the items with the largest inner products, over all heads.

        Each head retrieves k items; the results are united; an item's score is its largest inner product over heads
        (not the soft dot product, which training uses); equal scores are ordered by ascending item id; the best k
        remain. A row that holds a NaN or an infinity, and a head of zeros, as an empty query has, retrieve nothing.

        Args:
            query_embedding: [batch, heads, dim] float32, at most 16 heads.
            k: [] int32, 1 to 10,000.

        Returns:
            item_ids [batch, k] int64, scores [batch, k] float32 and heads [batch, k] int32, the best first: heads holds
            the head that gave the score, the lowest of those that gave the same. Missing results are -1, -inf and -1.

        Raises:
            tf.errors.InvalidArgumentError: another shape or k out of range. In a graph what is known statically is a
                ValueError.
            tf.errors.FailedPreconditionError: the load op has not run.
        """
        item_ids, scores, heads = load().dpsr_faiss_search(self._handle, query_embedding, k)
        return item_ids, scores, heads


def _destroy(handle: tf.Tensor) -> None:
    # The table may be collected while a graph is being built; the handle is eager.
    with tf.init_scope():
        tf.raw_ops.DestroyResourceOp(resource=handle, ignore_lookup_error=True)
