"""The cost of a filter: searches of the FAISS op with and without one, on one thread.

    python benchmarks/filter_cost.py --json [--items=1000000]

The vectors are clustered unit vectors (benchmarks/vectors.py) in the index that `auto` chooses. nprobe is the smallest
power of two with which ann_recall@1000 is at least 0.9 without a filter. benchmarks/servable.py runs the same
measurement on the index that it has built. Filters let 50 %, 10 %, 1 % and 0.1 % of the items pass:

- `category`: one value of an attribute that is independent of the vectors, the same in all queries;
- `price`: a range of a number that is independent of the vectors, different in each query, so that no cached result can
  be used;
- `region`: the items furthest along one direction of the vectors. Some queries have their neighbours there, others
  none.

`core_ms` is the CPU time of a query (k = 1000) in a graph without a server, with seven queries in each request, which
one thread answers. ann_recall compares with the exact result among the items that pass. The bar
`filter_cost_ratio_worst` is the largest ratio of `core_ms` with a filter to `core_ms` without one, in the same process.

`scored` is how many passing items have to be scored, those of the nearest lists first, to find as large a share of the
exact result as without a filter, over the items that a search without a filter scores. Codes are not rounded for it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import faiss
import numpy as np
import servers
import tensorflow as tf
from report import Report, hardware
from tensorflow_serving.apis import predict_pb2
from vectors import Vectors

import dpsr_export
import model_server
from dpsr_export import ann, faiss_search, item_attributes

v1 = tf.compat.v1

K = 1000
SHARES = (0.5, 0.1, 0.01, 0.001)
# Few enough queries for the op to answer them on one thread.
_BATCH = 7
_QUERIES = 12 * _BATCH
# Number of rounds with different ranges, so that there are more of them than the cache holds.
_ROUNDS = 10
# Number of items whose exact scores are computed at a time.
_BLOCK = 1 << 20


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000, help="number of items")
    parser.add_argument("--seed", type=int, default=1, help="seed of the vectors and attributes")
    parser.add_argument("--repeat", type=int, default=5, help="number of measurements of each search, side by side")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of each measurement in seconds")
    parser.add_argument("--json", action="store_true", help="prints one JSON object as the last line")
    arguments = parser.parse_args()
    report = Report("filter_cost", arguments.seed, hardware("faiss-cpu", "tensorflow"))
    source = Vectors(arguments.items, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        vectors = source.kept(Path(folder))
        filter_cost(report, vectors, source.queries(_QUERIES), Path(folder), arguments.repeat, arguments.seconds)
    report.print(arguments.json)


def filter_cost(
    report: Report, vectors: np.ndarray, queries: np.ndarray, folder: Path, repeat: int = 5, seconds: float = 0.5
) -> None:
    """Measures searches with filters, and adds rows and the bar to a report.

    Args:
        report: the report.
        vectors: float32 [items, dim], which may be mapped.
        queries: float32 [84, dim].
        folder: directory for the files. items.faiss, the index that `auto` chooses, is built if it does not exist.
        repeat: number of measurements of each search.
        seconds: length of each measurement.
    """
    items = len(vectors)
    factory = next(c.factory for c in ann.candidates(items, vectors.shape[1], 0.9) if not c.verdict)
    if not (folder / "items.faiss").exists():
        faiss.write_index(ann.build(vectors, factory), str(folder / "items.faiss"))
    faiss_search.write_item_ids(folder / "item_ids.dpsr", np.arange(items), folder / "items.faiss")
    random = np.random.default_rng(report.seed)
    draw, price = random.random(items), random.random(items).astype(np.float32)
    region = vectors[:, 0].copy()
    item_attributes.write_columns(
        folder,
        [
            *(
                item_attributes.Column(f"category{share:g}", (draw < share).astype(np.int32), ["yes"])
                for share in SHARES
            ),
            item_attributes.Column("price", price),
            item_attributes.Column("region", region),
        ],
    )
    paths = [str(folder / name) for name in ("items.faiss", "item_ids.dpsr", item_attributes.FILE)]
    exact = _exact(vectors, queries, np.arange(items))
    for nprobe in (1 << i for i in range(20)):
        parameters = f"nprobe={nprobe}" if "IVF" in factory else ""
        table = faiss_search.FaissIndexTable(*paths, parameters=parameters)
        if not parameters or _recall(_ids(table, queries), exact) >= 0.9:
            break

    # For each kind of search: the exact result, and an expression for all queries or one for each query.
    asked: dict[tuple[str, str], tuple[np.ndarray, str, list[str]]] = {("none", "all items"): (exact, "", [])}
    for share in SHARES:
        workload = f"{100 * share:g} % of the items"
        low = float(np.partition(region, -round(items * share))[-round(items * share)])
        in_price = np.flatnonzero((price >= 0.25) & (price <= np.float32(0.25 + share)))
        for impl, passing, expression, each in (
            ("category", np.flatnonzero(draw < share), f"category{share:g}=yes", []),
            ("price", in_price, f"price=0.25..{0.25 + share}", _ranges(random, share)),
            ("region", np.flatnonzero(region >= low), f"region={low!r}..", []),
        ):
            asked[impl, workload] = (_exact(vectors, queries, passing), expression, each)
            if impl == "category" and parameters:
                scored = _scored(folder / "items.faiss", queries, nprobe, exact, passing, asked[impl, workload][0])
                report.add(impl, workload, "scored", scored, "times")
    print(f"{factory}, {parameters}", flush=True)
    files = []
    for number, (_, expression, each) in enumerate(asked.values()):
        files.append(folder / f"requests_{number}")
        servers.write_messages(files[-1], _requests(queries, each or [expression] * _QUERIES))
    with tf.Graph().as_default():
        inputs = {
            "query_embedding": v1.placeholder(tf.float32, [None, 1, queries.shape[1]], "query_embedding"),
            "include": v1.placeholder(tf.string, [None, None], "include"),
        }
        found = faiss_search.FaissIndexTable(*paths, parameters=parameters).search(k=K, **inputs)
        save_graph(folder / "1", inputs, dict(zip(("item_ids", "scores", "heads"), found, strict=True)))
    graph = model_server.Model(folder / "1", [str(dpsr_export.op_library_path())], files[0])
    turns = [model_server.session_runs_us(graph, files, seconds) for _ in range(repeat)]
    worst = 0.0
    for number, ((impl, workload), (exact, expression, _)) in enumerate(asked.items()):
        recall = _recall(_ids(table, queries, expression), exact)
        times = [turn[number] / _BATCH / 1000 for turn in turns]
        report.add_samples(impl, workload, "core_ms", times, "ms", ann_recall=recall, note=f"ann_recall {recall:.3f}")
        worst = max(worst, float(np.median([turn[number] / turn[0] for turn in turns])))
    report.bars["filter_cost_ratio_worst"] = worst


def save_graph(path: Path, inputs: dict[str, tf.Tensor], outputs: dict[str, tf.Tensor], checkpoint: str = "") -> None:
    """Writes a SavedModel of the default graph. If it has variables, their values come from a checkpoint."""
    with v1.Session() as session:
        if checkpoint:
            v1.train.Saver().restore(session, checkpoint)
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(
            session,
            [tf.saved_model.SERVING],
            signature_def_map={"serving_default": v1.saved_model.predict_signature_def(inputs, outputs)},
            assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
            main_op=v1.tables_initializer(),
        )
        builder.save()


def _scored(
    path: Path, queries: np.ndarray, nprobe: int, exact: np.ndarray, passing: np.ndarray, exact_passing: np.ndarray
) -> float:
    """Returns `scored`, from the exact results of all items and of those that pass, int64 [queries, n]."""
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    list_of = np.empty(index.ntotal, np.int64)
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        list_of[faiss.rev_swig_ptr(index.invlists.get_ids(number), size)] = number
    order = np.argsort(-queries @ index.quantizer.reconstruct_n(0, index.nlist).T, axis=1)
    rank = np.argsort(order, axis=1)
    found = (np.take_along_axis(rank, list_of[exact], axis=1) < nprobe).mean()
    counts = np.bincount(list_of[passing], minlength=index.nlist)
    ends = np.cumsum(counts[order], axis=1)
    scored = np.take_along_axis(ends, np.take_along_axis(rank, list_of[exact_passing], axis=1), axis=1)
    needed = np.quantile(scored, found, method="inverted_cdf")
    return float(needed / (nprobe * index.ntotal / index.nlist))


def _ranges(random: np.random.Generator, share: float) -> list[str]:
    """Returns many different ranges of prices, one for each query."""
    begins = random.random(_ROUNDS * _QUERIES) * (1 - share)
    return [f"price={begin!r}..{begin + share!r}" for begin in begins.tolist()]


def _requests(queries: np.ndarray, include: list[str]) -> list[predict_pb2.PredictRequest]:
    """Returns requests of _BATCH queries, in turn, with one expression for each query ("": no filter)."""
    found = []
    for begin in range(0, len(include), _BATCH):
        rows = np.arange(begin, begin + _BATCH)
        one = predict_pb2.PredictRequest()
        one.model_spec.name, one.model_spec.signature_name = servers.MODEL, "serving_default"
        one.inputs["query_embedding"].CopyFrom(tf.make_tensor_proto(queries[rows % len(queries), np.newaxis]))
        one.inputs["include"].CopyFrom(tf.make_tensor_proto([[include[row]] for row in rows]))
        found.append(one)
    return found


def _ids(table: Any, queries: np.ndarray, include: str = "") -> np.ndarray:
    """Searches with the op. Returns ids, int64 [queries, K]."""
    texts = np.full((len(queries), 1), include)
    return table.search(queries[:, np.newaxis], K, include=texts)[0].numpy()


def _exact(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns those of the given rows with the largest inner products, int64 [queries, at most K]."""
    scores, found = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for begin in range(0, len(rows), _BLOCK):
        block = rows[begin : begin + _BLOCK]
        here = faiss.knn(queries, vectors[block], min(K, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, found = np.hstack([scores, here[0]]), np.hstack([found, block[here[1]]])
        best = np.argsort(-scores, axis=1)[:, :K]
        scores, found = np.take_along_axis(scores, best, axis=1), np.take_along_axis(found, best, axis=1)
    return found


def _recall(found: np.ndarray, exact: np.ndarray) -> float:
    pairs = zip(found, exact, strict=True)
    return sum(len(np.intersect1d(a, b)) for a, b in pairs) / exact.size


if __name__ == "__main__":
    main()
