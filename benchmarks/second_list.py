"""Second lists and scan budgets of an index of product codes: recall, codes that are scored, and time.

    python benchmarks/second_list.py --json [--items=200000] [--lists=1024] [--factory=PQ32np] [--quick]

The vectors come from benchmarks/vectors.py. Two indexes have the same centroids and codebooks: in one, each item is in
one list; in the other, in two (index.second_list=1.5). Each is measured at several values of nprobe, and at nprobe 32
with several scan budgets (max_codes).

ann_recall compares with exact search. `codes` is the number of codes that a query scores, which the sizes of its lists
give; cpu is the CPU time of a search for the top 100 on one thread. Both have a median and a 99th percentile over the
queries. Bars: the smallest nprobe with two lists that reaches the recall@100 of nprobe 8 with one list, over 8, and the
same for the medians of codes and CPU time.
"""

from __future__ import annotations

import time

import faiss
import numpy as np
import report
from absl import app, flags
from vectors import DIM, Vectors

from dpsr_export import ann

K = 100
NPROBES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
NPROBE_OF_BUDGETS, NPROBE_OF_BAR = 32, 8
SECOND_LIST = 1.5

FLAGS = flags.FLAGS


def measure(
    result: report.Report, name: str, index: faiss.Index, exact: ann.Exact, queries: np.ndarray, entries: int
) -> None:
    """Measures one index and adds its rows to the report."""
    ivf = faiss.extract_index_ivf(index)
    sizes = np.array([ivf.invlists.list_size(number) for number in range(ivf.nlist)])
    probes = ivf.quantizer.search(queries, min(max(NPROBES), ivf.nlist))[1]
    mean_codes = sizes.sum() / ivf.nlist
    budgets = [round(share * NPROBE_OF_BUDGETS * mean_codes) for share in (0.25, 0.5, 1, 1.5)]
    settings = [(nprobe, 0) for nprobe in NPROBES] + [(NPROBE_OF_BUDGETS, budget) for budget in budgets]
    for nprobe, budget in settings:
        ann.set_parameters(index, f"nprobe={nprobe},max_codes={budget}")
        workload = f"nprobe={nprobe}" + (f",max_codes={budget}" if budget else "")
        codes = sizes[probes[:, :nprobe]].sum(axis=1)
        codes = np.minimum(codes, budget) if budget else codes
        for k in exact.ks:
            result.add(name, workload, f"ann_recall@{k}", exact.ann_recall(index, k, entries), "")
        cpu = cpu_ms(index, queries, entries)
        for metric, values, unit in (("codes", codes, ""), ("cpu", cpu, "ms")):
            for percent in (50, 99):
                result.add(name, workload, f"{metric}_p{percent}", float(np.percentile(values, percent)), unit)


def cpu_ms(index: faiss.Index, queries: np.ndarray, entries: int) -> np.ndarray:
    """Returns the CPU time of each query's search on one thread, the smaller of two runs."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    runs = np.zeros((2, len(queries)))
    for run in runs:
        for row, query in enumerate(queries):
            start = time.thread_time()
            index.search(query[np.newaxis], entries * K)
            run[row] = 1000 * (time.thread_time() - start)
    faiss.omp_set_num_threads(threads)
    return runs.min(axis=0)


def bars(result: report.Report) -> dict[str, float]:
    """Returns what two lists need for the recall of one list at NPROBE_OF_BAR, over what one list needs."""
    of_one = f"nprobe={NPROBE_OF_BAR}"
    wanted = result.value("one list", of_one, f"ann_recall@{K}")
    for nprobe in NPROBES:
        of_two = f"nprobe={nprobe}"
        if result.value("two lists", of_two, f"ann_recall@{K}") < wanted:
            continue
        ratios = {
            f"{metric}_ratio": result.value("two lists", of_two, metric) / result.value("one list", of_one, metric)
            for metric in ("codes_p50", "cpu_p50")
        }
        return {"nprobe_ratio": nprobe / NPROBE_OF_BAR, **ratios}
    return {}


def _define_flags() -> None:
    flags.DEFINE_integer("items", 200_000, "number of vectors", 1000)
    flags.DEFINE_integer("queries", 1000, "number of queries", 10)
    flags.DEFINE_integer("lists", 1024, "number of lists", 64)
    flags.DEFINE_string("factory", "PQ32np", "product codes, as in FAISS factory strings")
    flags.DEFINE_integer("seed", 1, "seed of the vectors")
    flags.DEFINE_boolean("json", False, "prints one JSON object as the last line")
    flags.DEFINE_boolean("quick", False, "only tests the script, with 5,000 items, 64 lists and 50 queries")


def main(_: list[str]) -> None:
    """Runs the benchmark and prints the results."""
    items, lists, asked = (5000, 64, 50) if FLAGS.quick else (FLAGS.items, FLAGS.lists, FLAGS.queries)
    result = report.Report("second_list", FLAGS.seed, report.hardware("faiss-cpu", "numpy"))
    distribution = Vectors(items, FLAGS.seed, DIM)
    vectors, queries = np.concatenate(list(distribution.blocks())), distribution.queries(asked)
    exact = ann.Exact(vectors, queries, [10, K])
    factory = f"IVF{lists},{FLAGS.factory}"
    # Training has a fixed seed, so both indexes have the same centroids and codes.
    for name, second_list, entries in (("one list", 0.0, 1), ("two lists", SECOND_LIST, 2)):
        measure(result, name, ann.build(vectors, factory, second_list=second_list), exact, queries, entries)
    result.bars = bars(result)
    result.print(FLAGS.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
