"""FAISS indices on an NVIDIA GPU beside the CPU of the same machine: building, searching, and equal answers.

    python benchmarks/gpu.py --json [--items=1000000,15000000] [--batches=1,16,256,4096] [--quick]

It needs the package faiss-gpu in place of faiss-cpu, and a card. Without them only the CPU is measured; a row says
why, and the bars of the GPU are missing. The vectors are those of benchmarks/vectors.py. For each number of items the
index has the lists that `dpsr index` chooses, with codes of 16-bit floats, because a GPU finds at most 512 results
with SQ8. The search parameters are those that reach an ann_recall@1000 of 0.90 on the CPU. The GPU searches the same
index with them. Numbers of items that do not fit into the card's memory are left out, and a row says so;
`--items=fit` adds the largest number that fits there, in main memory and in the folder, doubling from 30 million.
Above 30 million only the GPU builds: `benchmarks/index.py` has the CPU's time.

build     wall time of `dpsr index --device=gpu` and without it: training and adding, not the embedding
recall    ann_recall@1000 of each index
exact     wall time of an exact search for 200 queries, as `dpsr index` does it to measure recall
search    wall milliseconds of a call for the top 1,000 or top 100 of a batch of queries; on the CPU with all cores
same      share of the CPU's results that the GPU also returns, and the largest difference of the scores of equal items
op        the same with the lookup op of a servable (DPSR_FAISS_DEVICE), one query a row, batch by batch
callers   queries a second of the op, for 1, 16 and 64 callers that each send one query at a time
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow loads

import faiss
import numpy as np
import report
import tensorflow as tf
from absl import app, flags
from index import factories
from vectors import DIM, Vectors

from dpsr_common.errors import CommandError
from dpsr_export import ann
from dpsr_export.faiss_search import FaissIndexTable, write_item_ids

K, RECALL = 1000, 0.90
_FEWER = 100
_CPU_BUILDS_TO = 30_000_000  # items; the CPU takes an hour for 120 million
_CALLERS, _CALLS = (1, 16, 64), 256
_COMPARED = 200  # queries
_CODE_BYTES = 2 * DIM  # of a vector, as 16-bit floats
# Share of the card's free memory that an index may take; FAISS needs the rest for searches.
_MEMORY_SHARE = 0.7
_SECONDS = 1.0  # that each search is measured for
v1 = tf.compat.v1
FLAGS = flags.FLAGS


def problem() -> str:
    """Returns why no GPU can be used, or "" if one can."""
    try:
        ann.check_device("gpu")
    except CommandError as error:
        return str(error).removeprefix("--device=gpu: ")
    return ""


def card(field: str) -> str:
    """Returns what nvidia-smi says of the first card: its name, or its memory.free in MiB."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def milliseconds(search: Callable[[], object]) -> float:
    """Returns the median wall time of a call in ms, after one call to warm up."""
    search()
    times = []
    end = time.perf_counter() + _SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        search()
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


def difference(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> tuple[float, float]:
    """Compares the results of two searches, each scores [n, k] and positions [n, k].

    Returns:
        The share of the first one's positions that the second one has in the same row, and the largest difference
        between scores of positions that both have.
    """
    shares, most = [], 0.0
    for scores, positions, others, places in zip(*expected, *found, strict=True):
        known = dict(zip(places.tolist(), others.tolist(), strict=True))
        both = [(score, known[place]) for place, score in zip(positions.tolist(), scores.tolist(), strict=True)
                if place >= 0 and place in known]  # fmt: skip
        shares.append(len(both) / max(1, int((positions >= 0).sum())))
        most = max([most, *(abs(a - b) for a, b in both)])
    return float(np.mean(shares)), most


def on_gpu(index: faiss.Index) -> Any:
    """Copies an index to the first card. Its search parameters go with it."""
    options = faiss.GpuClonerOptions()
    options.allowCpuCoarseQuantizer = True
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)


def many_calls(table: FaissIndexTable, queries: np.ndarray, callers: int) -> tf.Operation:
    """Adds _CALLS calls of the op to the graph, with one query each. Returns the op that runs all of them.

    They form one chain for each caller. In a chain, each call waits for the one before.
    """
    ends: list[tf.Tensor] = []
    for number in range(_CALLS):
        with tf.control_dependencies([ends[-callers]] if number >= callers else []):
            query = tf.constant(queries[number % len(queries)][np.newaxis, np.newaxis])
            ends.append(table.search(query, K)[0])
    return tf.group(*ends[-callers:])


def measure_op(
    result: report.Report, devices: Sequence[str], index: faiss.Index, queries: np.ndarray, batches: Sequence[int]
) -> None:
    """Adds the rows of the lookup op on each device."""
    items = index.ntotal
    workload = f"{items:,} x {DIM}"
    answers = {}
    config = v1.ConfigProto(inter_op_parallelism_threads=max(_CALLERS))
    with tempfile.TemporaryDirectory(dir=FLAGS.folder) as name:
        path, ids = Path(name) / "items.faiss", Path(name) / "item_ids.dpsr"
        faiss.write_index(index, str(path))
        write_item_ids(ids, np.arange(items), path)
        for device in devices:
            os.environ["DPSR_FAISS_DEVICE"] = device
            with tf.Graph().as_default(), v1.Session(config=config) as session:
                table = FaissIndexTable(str(path), str(ids))
                given = v1.placeholder(tf.float32, [None, 1, DIM])
                found, scores, _ = table.search(given, K)
                calls = {callers: many_calls(table, queries, callers) for callers in _CALLERS}
                session.run(v1.tables_initializer())
                for batch in batches:
                    asked = {given: queries[:batch, np.newaxis]}
                    spent = milliseconds(functools.partial(session.run, [found, scores], asked))
                    result.add(device, f"{workload}, batch {batch}", "op_ms", spent, "ms")
                for callers, together in calls.items():
                    rate = 1000 * _CALLS / milliseconds(functools.partial(session.run, together))
                    result.add(device, f"{workload}, {callers} callers", "op_qps", rate, "1/s")
                answers[device] = session.run([scores, found], {given: queries[:_COMPARED, np.newaxis]})
    if "gpu" in devices:
        share, most = difference(answers["cpu"], answers["gpu"])
        result.add("gpu", workload, "op_same_results", share, "share")
        result.add("gpu", workload, "op_score_difference", most, "")
        qps = [result.value("gpu", f"{workload}, {callers} callers", "op_qps") for callers in _CALLERS]
        result.bars[f"gpu_op_same_results_{items}"] = share
        result.bars[f"gpu_op_callers_over_one_{items}"] = qps[-1] / qps[0]


def measure(result: report.Report, items: int, batches: Sequence[int], has_gpu: bool, folder: Path) -> None:
    """Adds the rows of one number of items."""
    workload = f"{items:,} x {DIM}"
    distribution = Vectors(items, result.seed)
    vectors = distribution.kept(folder)
    queries = np.resize(distribution.queries(min(max(batches), 4096)), (max(batches), DIM))
    factory = factories(items)[0].replace("SQ8", "SQfp16")
    devices = ["cpu", "gpu"] if has_gpu else ["cpu"]
    compared = queries[:_COMPARED]
    built = {}
    for device in reversed(devices):
        if device == "cpu" and has_gpu and items > _CPU_BUILDS_TO:
            continue
        start = time.perf_counter()
        index = built[device] = ann.build(vectors, factory, device)
        result.add(device, workload, "build", time.perf_counter() - start, "s", note=factory)
        print(f"{workload}: built on the {device}", file=sys.stderr, flush=True)
    for device in devices:
        start = time.perf_counter()
        exact = ann.Exact(vectors, compared, [K], device)
        result.add(device, workload, "exact", time.perf_counter() - start, "s")
    settings = ann.measure_settings(index, exact, compared, K)
    chosen = ann.choose(settings, K, RECALL)
    for device, each in built.items():
        ann.set_parameters(each, chosen.parameters)
        result.add(device, workload, "recall", exact.ann_recall(each, K), "share", note=chosen.parameters)
    # One search for the lists of all queries, then a thread for each query. With slices of queries, FAISS 1.15.1 finds
    # wrong lists (ann.search).
    faiss.extract_index_ivf(index).parallel_mode = 3
    note = f"{chosen.parameters or '-'}, ann_recall@{K} {chosen.ann_recall[K]:.3f}"
    searched = {"cpu": index} | ({"gpu": on_gpu(index)} if has_gpu else {})
    for batch in batches:
        asked = np.ascontiguousarray(queries[:batch])
        for device, each in searched.items():
            for k in (K, _FEWER):
                spent = milliseconds(functools.partial(each.search, asked, k))
                metric = "search" if k == K else f"search_top_{k}"
                result.add(device, f"{workload}, batch {batch}", metric, spent, "ms", note=note)
    if has_gpu:
        share, most = difference(index.search(compared, K), searched["gpu"].search(compared, K))
        result.add("gpu", workload, "same_results", share, "share")
        result.add("gpu", workload, "score_difference", most, "")
        if "cpu" in built:
            result.bars[f"gpu_build_ratio_{items}"] = result.value("gpu", workload, "build") / result.value(
                "cpu", workload, "build"
            )
        for batch in batches:
            at = f"{workload}, batch {batch}"
            result.bars[f"gpu_search_ratio_{items}_b{batch}"] = result.value("gpu", at, "search") / result.value(
                "cpu", at, "search"
            )
        result.bars[f"gpu_same_results_{items}"] = share
    del searched
    measure_op(result, devices, index, queries, batches)


def sizes(asked: str, has_gpu: bool, result: report.Report) -> list[int]:
    """Returns the numbers of items that are measured. Those that do not fit on the card get a row that says so."""
    fit = int((int(card("memory.free")) << 20) * _MEMORY_SHARE / (_CODE_BYTES + 12)) if has_gpu else sys.maxsize
    # The folder holds the vectors and the index, and main memory should hold both as well.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = min(memory, shutil.disk_usage(FLAGS.folder or tempfile.gettempdir()).free)
    held = min(fit, int(room * _MEMORY_SHARE / (4 * DIM + _CODE_BYTES + 8)))
    wanted = [int(number) for number in asked.split(",") if number != "fit"]
    if has_gpu and "fit" in asked.split(","):
        wanted += [30_000_000 << shift for shift in range(8) if 30_000_000 << shift <= held][-1:]
    for items in wanted:
        if items > fit:
            result.add(
                "gpu", f"{items:,} x {DIM}", "left_out", 1, "", note=f"at most {fit:,} fit into the card's memory"
            )
    return [items for items in wanted if items <= fit]


def main(_: list[str]) -> None:
    """Runs the benchmark and prints the results."""
    result = report.Report("gpu", FLAGS.seed, report.hardware("faiss-cpu", "faiss-gpu", "tensorflow", "numpy"))
    why = problem()
    if not why:
        result.hardware["gpu"] = card("name")
    else:
        result.add("gpu", "-", "missing", 1, "", note=why)
    asked, batches = FLAGS.items, [int(batch) for batch in FLAGS.batches]
    if FLAGS.quick:
        asked, batches = "20000", [1, 16]
    os.environ["DPSR_MAX_RESULTS"] = str(max(batches) * K)  # the op's default is a million
    with tempfile.TemporaryDirectory(dir=FLAGS.folder) as folder:
        for items in sizes(asked, not why, result):
            shown = len(result.rows)
            try:
                measure(result, items, batches, not why, Path(FLAGS.folder or folder))
            finally:
                # If a later size fails or the machine goes away, these figures are not lost.
                print(*map(json.dumps, result.rows[shown:]), sep="\n", file=sys.stderr, flush=True)
    result.print(FLAGS.json)


if __name__ == "__main__":
    flags.DEFINE_string("items", "1000000,15000000", "numbers of vectors; fit: as many million as the card holds")
    flags.DEFINE_list("batches", ["1", "16", "256", "4096"], "numbers of queries in one search")
    flags.DEFINE_integer("seed", 1, "seed of the vectors")
    flags.DEFINE_string("folder", None, "directory that keeps the vectors; a temporary one if left out")
    flags.DEFINE_boolean("json", False, "prints one JSON object as the last line")
    flags.DEFINE_boolean("quick", False, "only tests the script, with 20,000 items")
    app.run(main)
