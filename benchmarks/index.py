"""FAISS indices built and searched as `dpsr index` does it: build time and memory, recall, latency and throughput.

    python benchmarks/index.py --json [--items=15000000] [--factories=IVF16384_HNSW32,SQ8;...] [--quick]

Vectors have 64 dimensions, length 1, and a fixed seed: a topic out of items / 500, of Zipf-like size, plus noise whose
spectrum falls as that of learnt embeddings does (deviation of dimension i as 1 / sqrt(i + 4)). Queries are drawn in the
same way and are not items. They lie in a file that is mapped, in --folder. Recall is ann_recall against exact search;
p50, p99 and core-ms are of the top 1,000, one query at a time on one thread; QPS are wall, on all cores. Peak memory is
that of the process so far (resident, with mapped vectors). The bars are of the first factory: `build_wall_s`, and
core-ms of the cheapest setting whose ann_recall@1000 reaches 0.90 and 0.95.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import report
from absl import app, flags

from dpsr_export import ann

DIM, K = 64, 1000
_BLOCK = 1 << 18

FLAGS = flags.FLAGS
flags.DEFINE_integer("items", 15_000_000, "vectors", 1000)
flags.DEFINE_integer("queries", 500, "queries", 10)
flags.DEFINE_string("factories", "", "FAISS factory strings, separated by ;")
flags.DEFINE_integer("seed", 1, "of the vectors")
flags.DEFINE_string("folder", None, "where the vectors are written; a temporary folder if left out")
flags.DEFINE_boolean("json", False, "prints the JSON line")
flags.DEFINE_boolean("quick", False, "20,000 items")


def vectors(count: int, items: int, seed: int, part: int) -> np.ndarray:
    """float32 [count, DIM] of length 1; `part` tells blocks of items and queries apart, topics are common to all."""
    topics = max(1, items // 500)
    centres = np.random.default_rng(seed).standard_normal((topics, DIM), np.float32)
    rng = np.random.default_rng([seed, part])
    spectrum = 1 / np.sqrt(np.arange(DIM, dtype=np.float32) + 4)
    spectrum *= np.sqrt(DIM / (spectrum**2).sum())
    topic = (topics * rng.random(count) ** 1.5).astype(np.int64)
    found = centres[topic] * spectrum + 0.7 * rng.standard_normal((count, DIM), np.float32) * spectrum
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def write_items(path: Path, items: int, seed: int) -> np.ndarray:
    """All items, mapped from a file."""
    mapped = np.lib.format.open_memmap(path, "w+", np.float32, (items, DIM))
    for part, begin in enumerate(range(0, items, _BLOCK)):
        mapped[begin : begin + _BLOCK] = vectors(min(_BLOCK, items - begin), items, seed, 1 + part)
    mapped.flush()
    return np.load(path, mmap_mode="r")


def measure(result: report.Report, items: np.ndarray, queries: np.ndarray, exact: ann.Exact, factory: str) -> None:
    """Builds one index and adds its rows."""
    workload = f"{len(items):,} x {DIM}"
    wall, cpu = time.perf_counter(), report.cpu_seconds()
    index = ann.build(items, factory)
    result.add(factory, workload, "build_wall", time.perf_counter() - wall, "s")
    result.add(factory, workload, "build_cpu", report.cpu_seconds() - cpu, "s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.add(factory, workload, "peak_memory", peak / 1e9, "GB")
    result.add(factory, workload, "size", faiss.serialize_index(index).nbytes / 1e9 if len(items) < 2e6 else 0, "GB")
    for setting in ann.sweep(index, exact, queries, K):
        name = f"{workload}, {setting.parameters or '-'}"
        ann.set_parameters(index, setting.parameters)
        for k, recall in setting.ann_recall.items():
            result.add(factory, name, f"ann_recall@{k}", recall, "")
        result.add(factory, name, "p50", setting.p50_ms, "ms")
        result.add(factory, name, "p99", setting.p99_ms, "ms")
        result.add(factory, name, "core_ms", core_ms(index, queries), "ms")
        start = time.perf_counter()
        index.search(queries, K)
        result.add(factory, name, "wall_qps", len(queries) / (time.perf_counter() - start), "1/s")


def core_ms(index: faiss.Index, queries: np.ndarray) -> float:
    """CPU time of one search for the top K, one at a time on one thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    start, done = time.process_time(), 0
    for query in queries[:200]:
        index.search(query[np.newaxis], K)
        done += 1
        if time.process_time() - start > 2:
            break
    found = 1000 * (time.process_time() - start) / done
    faiss.omp_set_num_threads(threads)
    return found


def bars(result: report.Report, factory: str) -> dict[str, float]:
    """Of the first factory; a recall that was not reached has no bar."""
    rows = [row for row in result.rows if row["impl"] == factory]
    found = {"build_wall_s": next(row["value"] for row in rows if row["metric"] == "build_wall")}
    cost = {row["workload"]: row["value"] for row in rows if row["metric"] == "core_ms"}
    recall = {row["workload"]: row["value"] for row in rows if row["metric"] == f"ann_recall@{K}"}
    for target in (0.90, 0.95):
        good = [cost[name] for name, value in recall.items() if value >= target]
        if good:
            found[f"core_ms_at_ann_recall_0_{round(100 * target)}"] = min(good)
    return found


def main(_: list[str]) -> None:
    """Measures and prints."""
    items = 20_000 if FLAGS.quick else FLAGS.items
    chosen = next(c.factory for c in ann.candidates(items, DIM, 0.95)[1:] if not c.verdict)
    factories = [factory for factory in FLAGS.factories.split(";") if factory] or [chosen]
    result = report.Report("index", FLAGS.seed, report.hardware("faiss-cpu", "faiss-gpu", "numpy"))
    with tempfile.TemporaryDirectory(dir=FLAGS.folder) as folder:
        mapped = write_items(Path(folder) / "items.npy", items, FLAGS.seed)
        queries = vectors(FLAGS.queries, items, FLAGS.seed, 0)
        exact = ann.Exact(mapped, queries, [10, 100, K])
        for factory in factories:
            measure(result, mapped, queries, exact, factory)
    result.bars = bars(result, factories[0])
    result.print(FLAGS.json)


if __name__ == "__main__":
    app.run(main)
