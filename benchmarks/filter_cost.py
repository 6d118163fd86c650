"""What a filter costs: searches of the FAISS op with and without one, on one thread.

    python benchmarks/filter_cost.py --json [--items=1000000]

Clustered unit vectors (benchmarks/vectors.py), the index that `auto` takes for so many, nprobe the least of powers of
two with which ann_recall@1000 is at least 0.9 without a filter. Filters leave 50 %, 10 %, 1 % and 0.1 % of the items:

- `category`: one value of an attribute that has nothing to do with the vectors, the same in all queries;
- `price`: a range of a number that has nothing to do with them, another one in every query, so that nothing is kept
  from the query before;
- `region`: those furthest along one direction of the vectors: some queries have their neighbours there, others none.

`core_ms` is the CPU time of a query (k = 1000), queries seven to a call, which one thread answers; ann_recall is of the
exact result among the items that pass. The bar `filter_cost_ratio_worst` is the largest ratio of `core_ms` to that of
the search without a filter.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import faiss
import numpy as np
import tensorflow as tf
from report import Report, hardware, rates
from vectors import Vectors

from dpsr_export import ann, attributes, faiss_ops

K = 1000
SHARES = (0.5, 0.1, 0.01, 0.001)
# Fewer head searches than the op spreads over threads.
_BATCH = 7
_QUERIES = 12 * _BATCH


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="measurements of each, side by side")
    parser.add_argument("--seconds", type=float, default=0.5, help="of CPU time, at least, for each")
    parser.add_argument("--json", action="store_true", help="prints one JSON object as the last line")
    arguments = parser.parse_args()
    report = Report("filter_cost", arguments.seed, hardware("faiss-cpu", "tensorflow"))
    source = Vectors(arguments.items, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        vectors = np.concatenate(list(source.blocks()))
        filter_cost(report, vectors, source.queries(_QUERIES), Path(folder), arguments.repeat, arguments.seconds)
    report.print(arguments.json)


def filter_cost(
    report: Report, vectors: np.ndarray, queries: np.ndarray, folder: Path, repeat: int = 5, seconds: float = 0.5
) -> None:
    """Adds the rows and the bar to a report.

    Args:
        report: to add to.
        vectors: float32 [items, dim].
        queries: float32 [84, dim].
        folder: an empty folder for the index.
        repeat: measurements of each.
        seconds: of CPU time, at least, for each.
    """
    items = len(vectors)
    factory = next(c.factory for c in ann.candidates(items, vectors.shape[1], 0.9) if not c.verdict)
    index = ann.build(vectors, factory)
    faiss.write_index(index, str(folder / "items.faiss"))
    faiss_ops.write_item_ids(folder / "item_ids.dpsr", np.arange(items), folder / "items.faiss")
    random = np.random.default_rng(report.seed)
    draw, price = random.random(items), random.random(items).astype(np.float32)
    region = vectors[:, 0].copy()
    attributes.write_columns(
        folder,
        [
            *(attributes.Column(f"category{share:g}", (draw < share).astype(np.int32), ["yes"]) for share in SHARES),
            attributes.Column("price", price),
            attributes.Column("region", region),
        ],
    )
    paths = [str(folder / name) for name in ("items.faiss", "item_ids.dpsr", attributes.FILE)]
    everything = _exact(vectors, queries, np.arange(items))
    for nprobe in (1 << i for i in range(20)):
        parameters = f"nprobe={nprobe}" if "IVF" in factory else ""
        table = faiss_ops.FaissIndexTable(*paths, parameters=parameters)
        if not parameters or _recall(_ids(table, queries), everything) >= 0.9:
            break

    passes: dict[tuple[str, str], Callable[[], object]] = {}
    passing: dict[tuple[str, str], np.ndarray] = {("none", "all items"): np.arange(items)}
    passes["none", "all items"] = lambda: _search(table, queries, None)
    lows: dict[float, float] = {}
    for share in SHARES:
        workload = f"{100 * share:g} % of the items"
        low = float(np.partition(region, -round(items * share))[-round(items * share)])
        lows[share] = low
        passing["category", workload] = np.flatnonzero(draw < share)
        passing["price", workload] = np.flatnonzero((price >= 0.25) & (price <= np.float32(0.25 + share)))
        passing["region", workload] = np.flatnonzero(region >= low)
        passes["category", workload] = lambda share=share: _search(table, queries, f"category{share:g}=yes")
        passes["price", workload] = lambda share=share: _search(table, queries, _ranges(random, share))
        passes["region", workload] = lambda low=low: _search(table, queries, f"region={low!r}..")
    print(f"{factory}, {parameters}", flush=True)
    found = rates(passes, len(queries), repeat, seconds)
    unfiltered = float(np.median([1000 / rate for rate in found["none", "all items"]]))
    worst = 0.0
    for (impl, workload), samples in found.items():
        times = [1000 / rate for rate in samples]
        include = {"none": None, "price": f"price=0.25..{0.25 + _share(workload)}"}.get(
            impl,
            f"category{_share(workload):g}=yes" if impl == "category" else f"region={lows.get(_share(workload))!r}..",
        )
        exact = _exact(vectors, queries, passing[impl, workload])
        recall = _recall(_ids(table, queries, include), exact)
        report.add_samples(impl, workload, "core_ms", times, "ms", ann_recall=recall, note=f"ann_recall {recall:.3f}")
        worst = max(worst, float(np.median(times)) / unfiltered)
    report.bars["filter_cost_ratio_worst"] = worst


def _share(workload: str) -> float:
    return 1.0 if workload == "all items" else float(workload.split()[0]) / 100


def _ranges(random: np.random.Generator, share: float) -> list[str]:
    """A range of prices for each query, none of them twice."""
    begins = random.random(_QUERIES) * (1 - share)
    return [f"price={begin!r}..{begin + share!r}" for begin in begins.tolist()]


def _search(table: Any, queries: np.ndarray, include: str | list[str] | None) -> list[tf.Tensor]:
    found = []
    for begin in range(0, len(queries), _BATCH):
        batch = queries[begin : begin + _BATCH, np.newaxis]
        texts = None
        if include is not None:
            texts = np.array(include[begin : begin + _BATCH] if isinstance(include, list) else [include] * len(batch))
            texts = texts[:, np.newaxis]
        found.append(table.search(batch, K, include=texts)[0])
    return found


def _ids(table: Any, queries: np.ndarray, include: str | None = None) -> np.ndarray:
    return np.concatenate([part.numpy() for part in _search(table, queries, include)])


def _exact(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows int64 [queries, at most K] with the largest inner products, of those given."""
    scores = queries @ vectors[rows].T
    k = min(K, len(rows))
    return rows[np.argpartition(-scores, k - 1, axis=1)[:, :k]]


def _recall(found: np.ndarray, exact: np.ndarray) -> float:
    pairs = zip(found, exact, strict=True)
    return sum(len(np.intersect1d(a, b)) for a, b in pairs) / exact.size


if __name__ == "__main__":
    main()
