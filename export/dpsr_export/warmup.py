"""Warm-up requests of a servable, which servers replay before it takes traffic, and what is measured with them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import tensorflow as tf

from dpsr_common.errors import CommandError, op_message
from dpsr_common.serving_apis import PredictionLog
from dpsr_export import faiss_search
from dpsr_export.ann import RECALL_AT
from dpsr_export.signatures import input_types
from dpsr_tf.data.user_requests import input_arrays
from dpsr_tf.models.exact_search import top_positions
from dpsr_tokenizer import tf_ops  # noqa: F401 - its import loads the tokenizer's ops, which the servable's graph needs

v1 = tf.compat.v1

# Where TensorFlow Serving looks for them.
FILE = "tf_serving_warmup_requests"
_BATCHES = (1, 2, 8, 32)

# A signature and its inputs.
Request = tuple[str, dict[str, np.ndarray]]


class LoadedServable:
    """A servable in a session of this process, as a model server has it.

    Attributes:
        inputs: NumPy type and rank of the inputs of each signature.
    """

    def __init__(self, path: Path):
        """Raises CommandError if it does not load."""
        faiss_search.load()
        self._session = v1.Session(graph=tf.Graph())
        with self._session.graph.as_default():
            try:
                loaded = v1.saved_model.load(self._session, [tf.saved_model.SERVING], str(path))
            except tf.errors.OpError as error:
                raise CommandError(f"{path}: does not load: {op_message(error)}; export the model again") from None
        self._signatures = dict(loaded.signature_def)
        self.inputs = {name: input_types(signature) for name, signature in self._signatures.items()}

    def __call__(self, signature: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Its outputs. Raises tf.errors.OpError."""
        definition = self._signatures[signature]
        fetches = {name: info.name for name, info in definition.outputs.items()}
        found: dict[str, np.ndarray] = self._session.run(
            fetches, {definition.inputs[name].name: value for name, value in inputs.items()}
        )
        return found

    def search_inputs(self, requests: Sequence[Mapping[str, Any]], k: int, parameters: str = "") -> dict[str, Any]:
        """The inputs of `search` for requests that hold values by input's name; what they leave out is absent."""
        arrays = input_arrays(requests, self.inputs["search"])
        return arrays | {"k": np.array(k, np.int32), "search_parameters": np.array(parameters, object)}

    def close(self) -> None:
        """Frees it."""
        self._session.close()


def warmup_requests(servable: LoadedServable, queries: Sequence[Mapping[str, Any]], serving_k: int) -> list[Request]:
    """Requests of several signatures, batch sizes and k, out of queries of the log (servable_assets.REQUESTS)."""
    queries = list(queries) or [{"query": ""}]
    made: list[Request] = []
    place = 0

    def take(count: int) -> list[Mapping[str, Any]]:
        nonlocal place
        taken = [queries[(place + i) % len(queries)] for i in range(count)]
        place += count
        return taken

    for batch in _BATCHES:
        made.append(("serving_default", input_arrays(take(batch), servable.inputs["serving_default"])))
        made += [("search", servable.search_inputs(take(batch), k)) for k in sorted({*RECALL_AT, serving_k})]
    made.append(("query_embedding", input_arrays(take(1), servable.inputs["query_embedding"])))
    # The way through the filter.
    inputs = servable.search_inputs(take(1), serving_k)
    excluded = "excluded_item_ids" if "excluded_item_ids" in inputs else "excluded_item_keys"
    inputs[excluded] = np.array([[0 if excluded == "excluded_item_ids" else b"0"]], inputs[excluded].dtype)
    return [*made, ("search", inputs)]


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


def replay(
    servable: LoadedServable, requests: Sequence[Request], item_ids: np.ndarray, answerable: bool = True
) -> None:
    """Sends the warm-up requests. What cannot answer them must not be deployed.

    Args:
        servable: that has just been written.
        requests: of warmup_requests.
        item_ids: int64, of the index.
        answerable: the queries are real ones, so at least one finds items.

    Raises:
        CommandError: an error, an item that is not in the index, no results at all.
    """
    found_any = False
    for signature, inputs in requests:
        try:
            found = servable(signature, inputs)
        except tf.errors.OpError as error:
            raise CommandError(f"the servable does not answer its warm-up requests: {op_message(error)}") from None
        for name, values in found.items():
            if values.dtype.kind == "f" and np.isnan(values).any():
                raise CommandError(f"the servable answers NaN in {name} of {signature}; train the model again")
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
    """What the manifest says of a servable: ann_recall against exact search, and latency, one query at a time.

    Args:
        servable: warmed up.
        queries: of the log.
        item_ids: int64 [items].
        vectors: float32 [items, dim], what the index was made from.
        k: whose latency is measured.
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
    """The exact result of each query, [queries, heads, dim], as the lookup op defines it: heads united, best first."""
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


def unite_heads(items: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """What all heads found, int64 [n] and float32 [n]: the best k items, each once with its largest score."""
    found, which = np.unique(items, return_inverse=True)
    largest = np.full(len(found), -np.inf, np.float32)
    np.maximum.at(largest, which, scores)
    order = top_positions(found, largest, k)
    return found[order], largest[order]


def read_requests(path: Path) -> list[dict[str, Any]]:
    """What `dpsr index` has kept of the log. Raises CommandError if the file cannot be read."""
    try:
        requests = json.loads(path.read_text())
        assert isinstance(requests, list) and all(isinstance(request, dict) for request in requests)
    except (OSError, ValueError, AssertionError) as error:
        raise CommandError(f"{path}: cannot be read: {error}; run `dpsr index` again") from None
    return requests
