"""FAISS indices, built and searched as by `dpsr index`: build time, memory, recall, latency, throughput and size.

    python benchmarks/index.py --json [--items=15000000] [--factories="IVF16384,SQ8;..."] [--quick]

The vectors come from benchmarks/vectors.py, in a mapped file; more than 20 million are a stream, which is drawn again
for each pass and is never on a disk or whole in memory. An index of a stream is trained on other vectors of the same
distribution, and times of building leave out the drawing. Without --factories, the script measures the index that
`auto` chooses and the other kinds of index with the same number of lists. Below two million items it also measures
HNSW, which takes hours for more. With --folder the vectors and the figures of each factory are kept there, and later
runs measure only what is missing. --peers also measures usearch, hnswlib and ScaNN, with the same vectors, recall and
threads; benchmarks/index_peers.py says how they are named in --factories.

ann_recall compares with exact search. p50, p99 and core_ms are measured with the top 1,000, one query at a time on one
thread; wall_qps with all queries at once, on all cores. Building uses as many cores as OMP_NUM_THREADS says.
peak_memory is the most memory that the process allocated while it built the index (sampled, without the mapped file,
which the system can drop from memory). size is the size of the written file. The bars belong to the first factory:
`build_wall_s`, and core_ms at ann_recall@1000 of 0.90 and 0.95. Of more than 15 million items the names have the
millions (`build_120m_wall_s`), and there are `core_ms_120m_top100_at_ann_recall_0_90`, `rss_gb`, the peak_memory, and
`cold_start_s`: opening the file, mapped, and the first search, with nothing of it in the page cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import faiss
import index_peers
import numpy as np
import report
from absl import app, flags
from vectors import DIM, Vectors

from dpsr_export import ann

K, FEWER = 1000, 100
TARGETS = (0.90, 0.95, 0.99)
_MANY_ITEMS = 2_000_000  # from this number of items on, HNSW is not measured
_STREAM_ITEMS = 20_000_000  # from this number of items on, vectors are a stream
_SPIN_S = 0.3  # OpenMP's other threads wait for work so long, and take CPU time meanwhile

FLAGS = flags.FLAGS


def factories(items: int) -> list[str]:
    """Returns the factory strings that are measured without --factories."""
    if items <= 50_000:
        return ["IVF256,SQ8", "Flat"]
    chosen = next(c.factory for c in ann.candidates(items, DIM, 0.95)[1:] if not c.verdict)
    if items >= _STREAM_ITEMS:
        return [chosen]
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


@dataclasses.dataclass
class Stopwatch:
    """Wall and CPU time, from which some work can be taken out, in seconds."""

    wall: float = dataclasses.field(default_factory=lambda: -time.perf_counter())
    core: float = dataclasses.field(default_factory=lambda: -report.cpu_seconds())

    def stop(self) -> None:
        """Ends the measurement."""
        self.wall += time.perf_counter()
        self.core += report.cpu_seconds()

    def leave_out(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the blocks; the time that their iterator takes does not count."""
        while True:
            wall, core = time.perf_counter(), report.cpu_seconds()
            block = next(blocks, None)
            self.wall -= time.perf_counter() - wall
            self.core -= report.cpu_seconds() - core
            if block is None:
                return
            yield block


class StreamedExact:
    """The exact results of queries over a stream of vectors; `ann.Exact` for vectors that are never all there."""

    def __init__(self, blocks: Iterator[np.ndarray], queries: np.ndarray, ks: Sequence[int]):
        """Searches all blocks. The labels are the positions in the stream."""
        self.ks, self._queries = tuple(ks), queries
        scores = np.zeros((len(queries), 0), np.float32)
        labels = np.zeros((len(queries), 0), np.int64)
        begin = 0
        for block in blocks:
            found, rows = faiss.knn(queries, block, min(max(ks), len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            scores, labels = np.hstack([scores, found]), np.hstack([labels, rows + begin])
            best = np.argsort(-scores, axis=1, kind="stable")[:, : max(ks)]
            scores, labels = (np.take_along_axis(of, best, axis=1) for of in (scores, labels))
            begin += len(block)
        self._labels = labels

    def ann_recall(self, index: faiss.Index, k: int, entries: int = 1) -> float:
        """Returns the share of the exact top k that the index finds, averaged over the queries."""
        found = ann.search(index, self._queries, k, entries)[1]
        rows = zip(found, self._labels[:, :k], strict=True)
        return float(np.mean([np.isin(mine, right).sum() / len(right) for mine, right in rows]))


def build(vectors: Vectors, items: np.ndarray | None, factory: str) -> tuple[faiss.Index, Stopwatch]:
    """Builds an index of mapped vectors, or of the stream if there are none."""
    watch = Stopwatch()
    if items is not None:
        index = ann.build(items, factory)
    else:
        index = ann.make(factory, DIM)
        (drawn,) = watch.leave_out(vectors.sample(count) for count in [ann.training_sample(index)])
        ann.train(index, drawn)
        del drawn  # gigabytes, if there are many lists
        ann.add(index, lambda: watch.leave_out(vectors.blocks()))
    watch.stop()
    return index, watch


def measure(
    result: report.Report,
    vectors: Vectors,
    items: np.ndarray | None,
    queries: np.ndarray,
    exact: ann.Exact | StreamedExact,
    factory: str,
    folder: Path,
) -> None:
    """Builds and measures one index, and adds its rows to the report. `items` is None for a stream."""
    workload = f"{vectors.items:,} x {DIM}"
    print(f"{factory}: building", file=sys.stderr)
    with peak_memory() as peak:
        index, watch = build(vectors, items, factory)
        result.add(factory, workload, "build_wall", watch.wall, "s")
        result.add(factory, workload, "build_core", watch.core, "s")
    print(f"{factory}: built in {watch.wall:.0f} s, with {peak[0]:.1f} GB", file=sys.stderr)
    result.add(factory, workload, "peak_memory", peak[0], "GB")
    path = folder / "index"
    faiss.write_index(index, str(path))
    result.add(factory, workload, "size", path.stat().st_size / 1e9, "GB")
    result.add(factory, workload, "bytes_per_item", path.stat().st_size / vectors.items, "bytes")
    result.add(factory, workload, "cold_start", cold_start(path, queries[:1]), "s")
    path.unlink()
    settings = ann.measure_settings(index, exact, queries, K)
    chosen = {s.parameters: s for k in (K, FEWER) for s in (ann.choose(settings, k, target) for target in TARGETS)}
    for setting in chosen.values():
        name = f"{workload}, {setting.parameters or '-'}"
        ann.set_parameters(index, setting.parameters)
        for k, recall in setting.ann_recall.items():
            result.add(factory, name, f"ann_recall@{k}", recall, "")
        result.add(factory, name, "p50", setting.p50_ms, "ms")
        result.add(factory, name, "p99", setting.p99_ms, "ms")
        result.add(factory, name, "core_ms", core_ms(index, queries), "ms")
        result.add(factory, name, f"core_ms@{FEWER}", core_ms(index, queries, FEWER), "ms")
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
        start = time.perf_counter()
        index.search(queries, K)
        result.add(factory, name, "wall_qps", len(queries) / (time.perf_counter() - start), "1/s")
        faiss.omp_set_num_threads(threads)
    print(f"{factory}: measured", file=sys.stderr)


def measure_peer(
    result: report.Report, items: np.ndarray, queries: np.ndarray, exact: ann.Exact, factory: str, folder: Path
) -> None:
    """Builds and measures an index of another project, and adds its rows to the report.

    Searches for the top 1,000 and for the top 100 have settings of their own: a graph needs as many candidates as it
    returns items.
    """
    workload = f"{len(items):,} x {DIM}"
    print(f"{factory}: building", file=sys.stderr)
    options = index_peers.options_of(factory)
    with peak_memory() as before:
        pass
    with peak_memory() as peak:
        watch = Stopwatch()
        index = index_peers.build(factory, items, options, faiss.omp_get_max_threads())
        watch.stop()
    print(f"{factory}: built in {watch.wall:.0f} s", file=sys.stderr)
    result.add(factory, workload, "build_wall", watch.wall, "s")
    result.add(factory, workload, "build_core", watch.core, "s")
    result.add(factory, workload, "peak_memory", peak[0] - before[0], "GB")
    size = index.write(folder / "peer")
    shutil.rmtree(folder / "peer") if (folder / "peer").is_dir() else (folder / "peer").unlink()
    result.add(factory, workload, "size", size / 1e9, "GB")
    result.add(factory, workload, "bytes_per_item", size / len(items), "bytes")
    for k, metric in ((K, "core_ms"), (FEWER, f"core_ms@{FEWER}")):
        found: list[tuple[str, float, float]] = []
        for settings in index.settings(k):
            best: list[float] = []
            for index.setting in settings:
                best.append(exact.ann_recall(index, k))
                found.append((index.setting, best[-1], core_ms(index, queries, k)))
                if best[-1] >= TARGETS[1] or (len(best) > 5 and best[-1] < best[-5] + 0.002 and best[-1] > 0.1):
                    break
        chosen = {cheapest_of(found, target)[0]: cheapest_of(found, target) for target in TARGETS[:2]}
        for index.setting, recall, cost in chosen.values():
            name = f"{workload}, {index.setting}, top {k}"
            result.add(factory, name, f"ann_recall@{k}", recall, "")
            result.add(factory, name, metric, cost, "ms")
            p50, p99 = ann.latency(index, queries, k)
            result.add(factory, name, "p50", p50, "ms")
            result.add(factory, name, "p99", p99, "ms")
    print(f"{factory}: measured", file=sys.stderr)


def cheapest_of(found: Sequence[tuple[str, float, float]], target: float) -> tuple[str, float, float]:
    """Returns the setting (name, recall, cost) that reaches the recall at the lowest cost, or the one nearest to it."""
    good = [setting for setting in found if setting[1] >= target]
    return min(good, key=lambda setting: setting[2]) if good else max(found, key=lambda setting: setting[1])


def cold_start(path: Path, query: np.ndarray) -> float:
    """Returns the seconds until an index file, mapped, has answered a query, with none of it in the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    index.search(query, K)
    return time.perf_counter() - start


def core_ms(index: faiss.Index, queries: np.ndarray, k: int = K) -> float:
    """Returns the CPU time in ms of a search for the top k, one query at a time on one thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    time.sleep(_SPIN_S)
    start, done = time.process_time(), 0
    for query in queries:
        index.search(query[np.newaxis], k)
        done += 1
        if time.process_time() - start > 2:
            break
    found = 1000 * (time.process_time() - start) / done
    faiss.omp_set_num_threads(threads)
    return found


def bars(result: report.Report, factory: str, items: int) -> dict[str, float]:
    """Returns the bars of one factory. A recall that was not reached has no bar."""
    rows = [row for row in result.rows if row["impl"] == factory]
    of: dict[str, dict[str, float]] = {}
    for row in rows:
        of.setdefault(row["metric"], {})[row["workload"]] = row["value"]
    many = items > 15_000_000
    size = f"_{items // 1_000_000}m" if many else ""
    (wall,) = of["build_wall"].values()
    found = {f"build{size}_wall_s": wall}

    def cheapest(metric: str, k: int, target: float) -> list[float]:
        good = [of[metric][name] for name, recall in of[f"ann_recall@{k}"].items() if recall >= target]
        return [min(good)] if good else []

    for target in TARGETS[:2]:
        for value in cheapest("core_ms", K, target):
            found[f"core_ms{size}_at_ann_recall_0_{round(100 * target)}"] = value
    if many:
        for value in cheapest(f"core_ms@{FEWER}", FEWER, TARGETS[0]):
            found[f"core_ms{size}_top{FEWER}_at_ann_recall_0_{round(100 * TARGETS[0])}"] = value
        (found["rss_gb"],) = of["peak_memory"].values()
        (found["cold_start_s"],) = of["cold_start"].values()
    return found


def _define_flags() -> None:
    flags.DEFINE_integer("items", 15_000_000, "number of vectors", 1000)
    flags.DEFINE_integer("queries", 500, "number of queries", 10)
    flags.DEFINE_string("factories", "", "FAISS factory strings, separated by semicolons")
    flags.DEFINE_boolean("peers", False, "also measures usearch, hnswlib and ScaNN, which the extra `bench` installs")
    flags.DEFINE_integer("seed", 1, "seed of the vectors")
    flags.DEFINE_string("folder", None, "directory that keeps vectors and figures; a temporary one if left out")
    flags.DEFINE_boolean("json", False, "prints one JSON object as the last line")
    flags.DEFINE_boolean("quick", False, "only tests the script, with 20,000 items and 100 queries")


def main(_: list[str]) -> None:
    """Runs the benchmark and prints the results."""
    items, asked = (20_000, 100) if FLAGS.quick else (FLAGS.items, FLAGS.queries)
    chosen = [factory for factory in FLAGS.factories.split(";") if factory] or factories(items)
    chosen += index_peers.CHOSEN if FLAGS.peers else []
    for factory in filter(index_peers.is_peer, chosen):
        if items >= _STREAM_ITEMS:
            raise app.UsageError(f"{factory} cannot be built from a stream; give fewer than {_STREAM_ITEMS:,} --items")
        index_peers.options_of(factory)  # before hours of work
    result = report.Report(
        "index", FLAGS.seed, report.hardware("faiss-cpu", "faiss-gpu", "numpy", *index_peers.PACKAGES)
    )
    with tempfile.TemporaryDirectory(dir=FLAGS.folder) as folder:
        kept = Path(FLAGS.folder or folder)
        distribution = Vectors(items, FLAGS.seed)
        rows = kept / f"{items}-{FLAGS.seed}-{asked}.json"
        mapped, queries = None if items >= _STREAM_ITEMS else distribution.kept(kept), distribution.queries(asked)
        known = json.loads(rows.read_text()) if rows.exists() else {}
        exact: ann.Exact | StreamedExact | None = None
        ks = [10, FEWER, K]
        for factory in chosen:
            if factory not in known:
                if exact is None:
                    stream = mapped is None
                    print(f"exact search of {items:,} vectors", file=sys.stderr)
                    exact = (
                        StreamedExact(distribution.blocks(), queries, ks) if stream else ann.Exact(mapped, queries, ks)
                    )
                alone = dataclasses.replace(result, rows=[])
                if index_peers.is_peer(factory):
                    measure_peer(alone, mapped, queries, exact, factory, Path(folder))
                else:
                    measure(alone, distribution, mapped, queries, exact, factory, Path(folder))
                known[factory] = alone.rows
                rows.write_text(json.dumps(known))
            result.rows += known[factory]
    result.bars = bars(result, chosen[0], items)
    result.print(FLAGS.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
