"""Warm-up requests of a servable, which servers replay before it takes traffic, and measurements of the servable."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.tensor_pb2 import TensorProto

from dpsr_common.errors import CommandError, op_message
from dpsr_common.serving_apis import PredictionLog
from dpsr_export import faiss_search
from dpsr_export.ann import RECALL_AT, unite_heads
from dpsr_export.signatures import input_types
from dpsr_tf.data.user_requests import input_arrays
from dpsr_tokenizer import tf_ops  # noqa: F401 - its import loads the tokenizer's ops, which the servable's graph needs

v1 = tf.compat.v1

# The name under which TensorFlow Serving looks for warm-up requests in assets.extra.
FILE = "tf_serving_warmup_requests"
_BATCHES = (1, 2, 8, 32)

# The name of a signature, and its inputs.
Request = tuple[str, dict[str, np.ndarray]]


class LoadedServable:
    """A servable that is loaded into a session of this process, as a model server does it.

    Attributes:
        inputs: for each signature, NumPy type and rank of its inputs by name.
    """

    def __init__(self, path: Path, threads: int = 0):
        """Loads a version directory. Raises CommandError if it cannot be loaded.

        Args:
            path: the directory.
            threads: number of threads that a request may use; 0 is one for each core.
        """
        faiss_search.load()
        config = v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
        self._session = v1.Session(graph=tf.Graph(), config=config)
        with self._session.graph.as_default():
            try:
                loaded = v1.saved_model.load(self._session, [tf.saved_model.SERVING], str(path))
            except tf.errors.OpError as error:
                raise CommandError(f"{path}: cannot be loaded: {op_message(error)}; export the model again") from None
        self._signatures = dict(loaded.signature_def)
        self.inputs = {name: input_types(signature) for name, signature in self._signatures.items()}

    def __call__(self, signature: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Runs a signature and returns its outputs. Raises tf.errors.OpError."""
        definition = self._signatures[signature]
        fetches = {name: info.name for name, info in definition.outputs.items()}
        found: dict[str, np.ndarray] = self._session.run(
            fetches, {definition.inputs[name].name: value for name, value in inputs.items()}
        )
        return found

    def search_inputs(self, requests: Sequence[Mapping[str, Any]], k: int, parameters: str = "") -> dict[str, Any]:
        """Returns the inputs of `search` for requests, which map names of inputs to values. Other inputs are absent."""
        arrays = input_arrays(requests, self.inputs["search"])
        return arrays | {"k": np.array(k, np.int32), "search_parameters": np.array(parameters, object)}

    def close(self) -> None:
        """Frees the servable."""
        self._session.close()


def warmup_requests(servable: LoadedServable, queries: Sequence[Mapping[str, Any]], serving_k: int) -> list[Request]:
    """Makes requests for several signatures, batch sizes and k from queries of the log (servable_assets.REQUESTS)."""
    queries = list(queries) or [{"query": ""}]
    requests: list[Request] = []
    place = 0

    def next_queries(count: int) -> list[Mapping[str, Any]]:
        nonlocal place
        chosen = [queries[(place + i) % len(queries)] for i in range(count)]
        place += count
        return chosen

    for batch in _BATCHES:
        requests.append(("serving_default", input_arrays(next_queries(batch), servable.inputs["serving_default"])))
        requests += [
            ("search", servable.search_inputs(next_queries(batch), k)) for k in sorted({*RECALL_AT, serving_k})
        ]
        requests.append(("query_embedding", input_arrays(next_queries(batch), servable.inputs["query_embedding"])))
    # The last request warms up the search with a filter.
    inputs = servable.search_inputs(next_queries(1), serving_k)
    excluded = "excluded_item_ids" if "excluded_item_ids" in inputs else "excluded_item_keys"
    inputs[excluded] = np.array([[0 if excluded == "excluded_item_ids" else b"0"]], inputs[excluded].dtype)
    return [*requests, ("search", inputs)]


def write_warmup(path: Path, requests: Sequence[Request]) -> None:
    """Writes the file that TensorFlow Serving reads: TFRecords of PredictionLog messages."""
    with tf.io.TFRecordWriter(str(path)) as file:
        for signature, inputs in requests:
            log = PredictionLog()
            request = log.predict_log.request
            request.model_spec.signature_name = signature
            for name, value in inputs.items():
                # TensorFlow's own TensorProto is another Python class with the same wire format.
                request.inputs[name].ParseFromString(tf.make_tensor_proto(value).SerializeToString())
            file.write(log.SerializeToString(deterministic=True))


def keep_batchable(path: Path) -> None:
    """Keeps the warm-up requests of a version that a server can compute in a batch with others, one row in each.

    TensorFlow Serving with --enable_batching refuses every request whose inputs do not all have the same first
    dimension, and then the version does not load: `search`, `rank` and `rewrite` have scalars among their inputs. If no
    request is left, the version has no warm-up file.

    Args:
        path: directory of the version.
    """
    file = path / "assets.extra" / FILE
    kept: list[Request] = []
    for record in v1.io.tf_record_iterator(str(file)):
        request = PredictionLog.FromString(record).predict_log.request
        inputs = {}
        for name, tensor in request.inputs.items():
            inputs[name] = tf.make_ndarray(TensorProto.FromString(tensor.SerializeToString()))
        rows = {len(value) if value.ndim else 0 for value in inputs.values()}
        if len(rows) == 1:
            for row in range(rows.pop()):
                kept.append(
                    (request.model_spec.signature_name, {name: value[row : row + 1] for name, value in inputs.items()})
                )
    file.unlink()
    if kept:
        write_warmup(file, kept)


def replay(
    servable: LoadedServable, requests: Sequence[Request], item_ids: np.ndarray, answerable: bool = True
) -> None:
    """Sends the warm-up requests. A servable that cannot answer them must not be deployed.

    Args:
        servable: the servable that has just been written.
        requests: as warmup_requests returns them.
        item_ids: int64, the item ids of the index.
        answerable: whether the queries are real, so that at least one of them must find items.

    Raises:
        CommandError: a request fails, an answer has a NaN or an item that is not in the index, or no request finds
            anything.
    """
    found_any = False
    for signature, inputs in requests:
        try:
            found = servable(signature, inputs)
        except tf.errors.OpError as error:
            raise CommandError(f"the servable does not answer its warm-up requests: {op_message(error)}") from None
        for name, values in found.items():
            if values.dtype.kind == "f" and np.isnan(values).any():
                raise CommandError(f"the servable returns NaN in {name} of {signature}; train the model again")
        if "item_ids" in found:
            ids = found["item_ids"]
            strange = ids[(ids != -1) & ~np.isin(ids, item_ids)]
            if len(strange):
                raise CommandError(f"the servable finds the item {strange[0]}, which is not in the index")
            found_any = found_any or bool((ids != -1).any())
    if answerable and not found_any:
        raise CommandError("the servable finds nothing for any query of the log; train the model again")


def measure(
    servable: LoadedServable, queries: Sequence[Mapping[str, Any]], item_ids: np.ndarray, vectors: np.ndarray, k: int
) -> dict[str, Any]:
    """Measures ann_recall against exact search, and the latency of one query at a time.

    Args:
        servable: the servable, which has answered its warm-up requests.
        queries: queries of the log.
        item_ids: int64 [items].
        vectors: float32 [items, dim], the embeddings that the index was made from.
        k: latency is measured with this k.

    Returns:
        The entry `measured` of the servable's manifest.
    """
    depth = max(k, *RECALL_AT)
    ids, seconds = [], []
    for query in queries:
        inputs = servable.search_inputs([query], k)
        start = time.perf_counter()
        servable("search", inputs)
        seconds.append(time.perf_counter() - start)
        ids.append(servable("search", servable.search_inputs([query], depth))["item_ids"][0])
    if not ids:
        return {"queries": 0}
    embedded = servable("query_embedding", input_arrays(queries, servable.inputs["query_embedding"]))
    heads = embedded["query_embedding"]
    exact = _exact(heads, item_ids, vectors, depth)
    recall = {}
    for at in sorted({*RECALL_AT, k}):
        shares = [
            len(np.intersect1d(row[:at], right[:at])) / len(right[:at])
            for row, right in zip(ids, exact, strict=True)
            if len(right)
        ]
        recall[f"ann_recall@{at}"] = float(np.mean(shares)) if shares else None
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {"queries": len(ids), "k": k, **recall, "p50_ms": round(float(p50), 4), "p99_ms": round(float(p99), 4)}


def _exact(heads: np.ndarray, item_ids: np.ndarray, vectors: np.ndarray, k: int) -> list[np.ndarray]:
    """Returns the exact result of each query [queries, heads, dim], with heads united as the lookup op does it."""
    count, _, dim = heads.shape
    found = min(k, len(item_ids))
    scores, rows = faiss.knn(
        np.ascontiguousarray(heads.reshape(-1, dim)), vectors, found, metric=faiss.METRIC_INNER_PRODUCT
    )
    results = []
    for query in range(count):
        there = np.repeat(heads[query].any(axis=1), found)
        row = slice(query * heads.shape[1], (query + 1) * heads.shape[1])
        items, products = item_ids[rows[row].reshape(-1)[there]], scores[row].reshape(-1)[there]
        results.append(unite_heads(items, products, k)[0])
    return results


def read_requests(path: Path) -> list[dict[str, Any]]:
    """Reads the queries that `dpsr index` has kept from the log. Raises CommandError if the file cannot be read."""
    try:
        requests = json.loads(path.read_text())
        assert isinstance(requests, list) and all(isinstance(request, dict) for request in requests)
    except (OSError, ValueError, AssertionError) as error:
        raise CommandError(f"{path}: cannot be read: {error}; run `dpsr index` again") from None
    return requests
