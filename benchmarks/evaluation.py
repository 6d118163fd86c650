"""Measures how long an evaluation takes: 2,000 queries against 54,667 items and against a million items.

    python benchmarks/evaluation.py --json [--items=54667,1000000] [--quick]

Titles have eight words out of 200,000, whose frequency is inversely proportional to their rank. A query is three words
of one title. The item of this title is judged relevant, another item is judged not relevant. Embeddings are random.

Two times are measured for each system: the time to make it (for BM25, to build the index), and the time to compute all
figures of `dpsr evaluate` at its defaults with recall@1000 in addition, and without latency. The fusion shares the
indices of its parts. A run takes minutes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import report
from absl import app, flags

from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.evaluation.measure import Options, measure_all
from dpsr_tf.evaluation.retriever import Retriever
from dpsr_tf.evaluation.systems import Systems
from dpsr_tf.models.exact_search import ExactSearch

DIM = 128
TITLE_WORDS, QUERY_WORDS, VOCABULARY = 8, 3, 200_000


def shop(num_items: int, num_queries: int, seed: int) -> tuple[Corpus, Judgments]:
    """Returns items and judged queries as described above."""
    rng = np.random.default_rng(seed)
    frequencies = 1 / np.arange(1, VOCABULARY + 1)
    words = rng.choice(VOCABULARY, (num_items, TITLE_WORDS), p=frequencies / frequencies.sum())
    titles = [" ".join(f"w{word}" for word in row) for row in words.tolist()]
    right = rng.choice(num_items, num_queries, replace=num_queries > num_items)
    wrong = (right + 1) % num_items
    queries = [" ".join(rng.permutation(titles[row].split())[:QUERY_WORDS]) for row in right]
    return Corpus(np.arange(num_items), titles, rng.zipf(2, num_items).astype(np.float32)), Judgments(
        Path("generated"),
        queries,
        right[:, np.newaxis].tolist(),
        grades=[{yes: 1.0, no: 0.0} for yes, no in zip(right.tolist(), wrong.tolist(), strict=True)],
    )


def exact_search(corpus: Corpus, judgments: Judgments, seed: int) -> Retriever:
    """Returns exact search over random unit vectors; the vector of a query is close to that of its item."""
    rng = np.random.default_rng(seed)
    items = rng.standard_normal((len(corpus.item_ids), DIM), np.float32)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    row_of = {query: relevant[0] for query, relevant in zip(judgments.queries, judgments.relevant, strict=True)}

    def encode(queries: Sequence[str], users: object) -> np.ndarray:
        near = items[[row_of[query] for query in queries]]
        return (near + 0.1 * rng.standard_normal(near.shape, np.float32))[:, np.newaxis]

    return ExactSearch(encode, corpus.item_ids, items)


def measure(result: report.Report, num_items: int, num_queries: int) -> str:
    """Measures all systems and adds their rows to `result`. Returns the name of the workload."""
    corpus, judgments = shop(num_items, num_queries, result.seed)
    systems = Systems(corpus, result.seed)
    makers: dict[str, Callable[[], Retriever]] = {
        "bm25": lambda: systems.make("bm25"),
        "bm25-bigrams": lambda: systems.make("bm25-bigrams"),
        "exact search": lambda: exact_search(corpus, judgments, result.seed),
        "rrf(bm25,bm25-bigrams)": lambda: systems.make("rrf(bm25,bm25-bigrams)"),
        "popularity": lambda: systems.make("popularity"),
    }
    workload = f"{num_queries:,} x {num_items:,}"
    options = Options((10, 100, 1000), result.seed, latency_queries=0)
    for name, make in makers.items():
        retriever = _timed(result, name, workload, "make", make)
        # Hide the progress bars.
        with contextlib.redirect_stderr(io.StringIO()):
            work = functools.partial(measure_all, {name: retriever}, judgments, corpus, options)
            figures = _timed(result, name, workload, "evaluate", work)
        result.add(name, workload, "recall@100", figures["systems"][name]["recall@100"], "")
    return workload


def bars(result: report.Report, workload: str, num_items: int) -> dict[str, float]:
    """Returns the seconds that it takes to make and measure the slowest system, of wall time and of CPU time."""
    found = {}
    for time_of in ("wall", "cpu"):
        totals: dict[str, float] = {}
        for row in result.rows:
            if row["workload"] == workload and row["metric"].endswith(f"_{time_of}"):
                totals[row["impl"]] = totals.get(row["impl"], 0) + row["value"]
        found[f"slowest_{time_of}_seconds_{num_items}_items"] = max(totals.values())
    return found


def _timed(result: report.Report, name: str, workload: str, metric: str, work: Callable[[], Any]) -> Any:
    """Calls `work`, adds rows of its wall time and CPU time to `result`, and returns what it returns."""
    wall, cpu = time.perf_counter(), report.cpu_seconds()
    returned = work()
    result.add(name, workload, f"{metric}_wall", time.perf_counter() - wall, "s")
    result.add(name, workload, f"{metric}_cpu", report.cpu_seconds() - cpu, "s")
    return returned


def _define_flags() -> None:
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object on the last line")
    flags.DEFINE_list("items", ["54667", "1000000"], "numbers of items of the corpora, separated by commas")
    flags.DEFINE_integer("queries", 2000, "number of queries", lower_bound=1)
    flags.DEFINE_integer("seed", 1, "seed of titles, queries and embeddings", lower_bound=0)
    flags.DEFINE_boolean(
        "quick", False, "measures only 50 queries against 2,000 items, to check that the benchmark works"
    )


def main(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    if arguments[1:]:
        raise app.UsageError(f"unexpected argument '{arguments[1]}'")
    if not all(text.isdecimal() and int(text) >= 1100 for text in values.items):
        raise app.UsageError(f"--items={','.join(values.items)}: expected numbers of at least 1,100")
    result = report.Report("evaluation", values.seed, report.hardware("dpsr", "numpy", "scipy", "bm25s", "ir-measures"))
    sizes, queries = ([2000], 50) if values.quick else ([int(text) for text in values.items], values.queries)
    for num_items in sizes:
        workload = measure(result, num_items, queries)
        result.bars |= bars(result, workload, num_items)
    result.print(values.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
