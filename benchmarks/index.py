"""FAISS indices, built and searched as by `dpsr index`: build time, memory, recall, latency, throughput and size.

    python benchmarks/index.py --json [--items=15000000] [--factories="IVF16384,SQ8;..."] [--quick]

The vectors come from benchmarks/vectors.py, in a mapped file. Without --factories, the script measures the index that
`auto` chooses and the other kinds of index with the same number of lists. Below two million items it also measures
HNSW, which takes hours for more. With --folder the vectors and the figures of each factory are kept there, and later
runs measure only what is missing.

ann_recall compares with exact search. p50, p99 and core_ms are measured with the top 1,000, one query at a time on one
thread; wall_qps with all queries at once, on all cores. Building uses as many cores as OMP_NUM_THREADS says.
peak_memory is the most memory that the process allocated while it built the index (sampled, without the mapped file,
which the system can drop from memory). size is the size of the written file. The bars belong to the first factory:
`build_wall_s`, and core_ms at ann_recall@1000 of 0.90 and 0.95.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import report
from absl import app, flags
from vectors import DIM, Vectors

from dpsr_export import ann

K = 1000
TARGETS = (0.90, 0.95, 0.99)
_MANY_ITEMS = 2_000_000  # from this number of items on, HNSW is not measured

FLAGS = flags.FLAGS


def factories(items: int) -> list[str]:
    """Returns the factory strings that are measured without --factories."""
    if items <= 50_000:
        return ["IVF256,SQ8", "Flat"]
    chosen = next(c.factory for c in ann.candidates(items, DIM, 0.95)[1:] if not c.verdict)
    lists = chosen.removesuffix(",SQ8")
    others = [f"{lists},Flat", f"{lists},PQ32np", f"OPQ32,{lists},PQ32np", f"{lists},PQ64x4fs,Refine(SQ8)", "Flat"]
    return [chosen, *others, *(["HNSW32"] if items < _MANY_ITEMS else [])]


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Yields a list, to which the peak of the process's anonymous memory in GB is added when the block ends."""
    found: list[float] = []
    most = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal most
        while True:
            fields = Path("/proc/self/status").read_text().split()
            most = max(most, int(fields[fields.index("RssAnon:") + 1]))
            if done.wait(0.05):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(most * 1024 / 1e9)


def measure(
    result: report.Report, items: np.ndarray, queries: np.ndarray, exact: ann.Exact, factory: str, folder: Path
) -> None:
    """Builds and measures one index, and adds its rows to the report."""
    workload = f"{len(items):,} x {DIM}"
    with peak_memory() as peak:
        wall, cpu = time.perf_counter(), report.cpu_seconds()
        index = ann.build(items, factory)
        result.add(factory, workload, "build_wall", time.perf_counter() - wall, "s")
        result.add(factory, workload, "build_core", report.cpu_seconds() - cpu, "s")
    result.add(factory, workload, "peak_memory", peak[0], "GB")
    path = folder / "index"
    faiss.write_index(index, str(path))
    result.add(factory, workload, "size", path.stat().st_size / 1e9, "GB")
    result.add(factory, workload, "bytes_per_item", path.stat().st_size / len(items), "bytes")
    path.unlink()
    settings = ann.measure_settings(index, exact, queries, K)
    chosen = [ann.choose(settings, K, target) for target in TARGETS]
    for setting in {setting.parameters: setting for setting in chosen}.values():
        name = f"{workload}, {setting.parameters or '-'}"
        ann.set_parameters(index, setting.parameters)
        for k, recall in setting.ann_recall.items():
            result.add(factory, name, f"ann_recall@{k}", recall, "")
        result.add(factory, name, "p50", setting.p50_ms, "ms")
        result.add(factory, name, "p99", setting.p99_ms, "ms")
        result.add(factory, name, "core_ms", core_ms(index, queries), "ms")
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
        start = time.perf_counter()
        index.search(queries, K)
        result.add(factory, name, "wall_qps", len(queries) / (time.perf_counter() - start), "1/s")
        faiss.omp_set_num_threads(threads)
    print(f"{factory}: measured", file=sys.stderr)


def core_ms(index: faiss.Index, queries: np.ndarray) -> float:
    """Returns the CPU time in ms of a search for the top K, one query at a time on one thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    start, done = time.process_time(), 0
    for query in queries:
        index.search(query[np.newaxis], K)
        done += 1
        if time.process_time() - start > 2:
            break
    found = 1000 * (time.process_time() - start) / done
    faiss.omp_set_num_threads(threads)
    return found


def bars(result: report.Report, factory: str) -> dict[str, float]:
    """Returns the bars of one factory. A recall that was not reached has no bar."""
    rows = [row for row in result.rows if row["impl"] == factory]
    found = {"build_wall_s": next(row["value"] for row in rows if row["metric"] == "build_wall")}
    cost = {row["workload"]: row["value"] for row in rows if row["metric"] == "core_ms"}
    recall = {row["workload"]: row["value"] for row in rows if row["metric"] == f"ann_recall@{K}"}
    for target in TARGETS[:2]:
        good = [cost[name] for name, value in recall.items() if value >= target]
        if good:
            found[f"core_ms_at_ann_recall_0_{round(100 * target)}"] = min(good)
    return found


def _define_flags() -> None:
    flags.DEFINE_integer("items", 15_000_000, "number of vectors", 1000)
    flags.DEFINE_integer("queries", 500, "number of queries", 10)
    flags.DEFINE_string("factories", "", "FAISS factory strings, separated by semicolons")
    flags.DEFINE_integer("seed", 1, "seed of the vectors")
    flags.DEFINE_string("folder", None, "directory that keeps vectors and figures; a temporary one if left out")
    flags.DEFINE_boolean("json", False, "prints one JSON object as the last line")
    flags.DEFINE_boolean("quick", False, "only tests the script, with 20,000 items and 100 queries")


def main(_: list[str]) -> None:
    """Runs the benchmark and prints the results."""
    items, asked = (20_000, 100) if FLAGS.quick else (FLAGS.items, FLAGS.queries)
    chosen = [factory for factory in FLAGS.factories.split(";") if factory] or factories(items)
    result = report.Report("index", FLAGS.seed, report.hardware("faiss-cpu", "faiss-gpu", "numpy"))
    with tempfile.TemporaryDirectory(dir=FLAGS.folder) as folder:
        kept = Path(FLAGS.folder or folder)
        distribution = Vectors(items, FLAGS.seed)
        rows = kept / f"{items}-{FLAGS.seed}-{asked}.json"
        mapped, queries = distribution.kept(kept), distribution.queries(asked)
        known = json.loads(rows.read_text()) if rows.exists() else {}
        exact: ann.Exact | None = None
        for factory in chosen:
            if factory not in known:
                exact = exact or ann.Exact(mapped, queries, [10, 100, K])
                alone = dataclasses.replace(result, rows=[])
                measure(alone, mapped, queries, exact, factory, Path(folder))
                known[factory] = alone.rows
                rows.write_text(json.dumps(known))
            result.rows += known[factory]
    result.bars = bars(result, chosen[0])
    result.print(FLAGS.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
