"""How the time of a BM25 search grows with the number of items: the inverted index of `dpsr index --inverted`.

    python benchmarks/bm25_scale.py --json [--items=100000,300000,1000000] [--out=DIR] [--quick]

The paper's Table 2 has 61 s for BM25 among 15 million items, on 48 cores. For each number of items, a shop is
generated, and the index of its titles and brands is asked queries of its log for the best 1,000 items, on one thread:
`unigrams` with plain words as the paper's BM25, `default` with the default analysis. `core_ms` is the mean CPU time of
a search, without server; `growth` is the exponent of its power law over the sizes: 1 is proportional to the number of
items. The last rows are no measurement. They extrapolate the largest size to 15 million items, `by growth` and
`in proportion` to the number of items; the first is likely too low, because lists of 1,000 results stop growing and
lists of words do not. Shops and indexes are kept in --out. Bars: `growth`, and the two extrapolations, of `unigrams`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import report
from absl import app, flags

from dpsr_common.command_line import main as dpsr
from dpsr_serving.gateway.inverted import open_inverted_index
from dpsr_tf.data.store import Store

ANALYSES = {"unigrams": "", "default": "stem+typos=0.2"}
K = 1000
TARGET = 15_000_000
_QUERIES = 500

FLAGS = flags.FLAGS


def prepare(folder: Path, items: int, seed: int) -> Store:
    """Makes shop, store and indexes of one size in `folder`, unless they are there."""
    folder = folder / f"shop-{items}-{seed}"
    if not (folder / "store" / "manifest.json").exists():
        sizes = [f"--items={items}", "--users=300", "--interactions=20000", "--set=judged_queries=20"]
        _run("generate", f"--out={folder / 'shop'}", "--overwrite", f"--seed={seed}", *sizes)
        schema = f"--schema={folder / 'shop' / 'schema.yaml'}"
        _run("ingest", schema, f"--out={folder / 'store'}", "--overwrite")
    for name, analysis in ANALYSES.items():
        if not (folder / name / "inverted.json").exists():
            flag = f"--analysis={analysis}"
            _run("index", "--inverted", f"--store={folder / 'store'}", f"--out={folder / name}", "--overwrite", flag)
    return Store(folder / "store")


def _run(*arguments: str) -> None:
    if dpsr(list(arguments)):
        raise SystemExit(f"dpsr {' '.join(arguments)} has failed")


def measure(result: report.Report, folder: Path, sizes: Sequence[int], seconds: float = 2.0) -> None:
    """Measures searches of all sizes, and adds their rows, the growth, and the extrapolation.

    Args:
        result: the report.
        folder: keeps shops and indexes.
        sizes: numbers of items, ascending, at least two.
        seconds: CPU time that is measured at least, for each index.
    """
    times: dict[str, list[float]] = {name: [] for name in ANALYSES}
    for items in sizes:
        store = prepare(folder, items, result.seed)
        texts = list(store.queries())
        order = np.random.default_rng(result.seed).permutation(len(texts))[:_QUERIES]
        queries = [texts[row] for row in order]
        for name in ANALYSES:
            index = open_inverted_index(store.path.parent / name)
            found = [len(index.search([(query, 1.0)], K).ids) for query in queries]

            def ask(index: object = index, queries: Sequence[str] = queries) -> None:
                for query in queries:
                    index.search([(query, 1.0)], K)  # type: ignore[attr-defined]

            rate = report.rates({name: ask}, len(queries), 1, seconds)[name][0]
            times[name].append(1e3 / rate)
            workload = f"{items:,} items"
            result.add(name, workload, "core_ms", 1e3 / rate, "ms")
            result.add(name, workload, "items_found", float(np.mean(found)), "")
    for name, of_size in times.items():
        growth = float(np.polyfit(np.log(sizes), np.log(of_size), 1)[0])
        result.add(name, "all sizes", "growth", growth, "")
        for how, exponent in (("by growth", growth), ("in proportion", 1.0)):
            estimate = of_size[-1] * (TARGET / sizes[-1]) ** exponent
            result.add(name, f"{TARGET:,} items, extrapolated {how}", "core_ms", estimate, "ms")
    result.bars = {"growth": result.value("unigrams", "all sizes", "growth")}
    for how in ("by growth", "in proportion"):
        workload = f"{TARGET:,} items, extrapolated {how}"
        result.bars[f"core_ms_15m_{how.replace(' ', '_')}"] = result.value("unigrams", workload, "core_ms")


def _define_flags() -> None:
    flags.DEFINE_list("items", ["100000", "300000", "1000000"], "numbers of items, ascending; two at least")
    flags.DEFINE_integer("seed", 1, "seed of the shops and of the draw of queries")
    flags.DEFINE_string("out", None, "directory that keeps shops and indexes; a temporary one if left out")
    flags.DEFINE_boolean("json", False, "prints one JSON object as the last line")
    flags.DEFINE_boolean("quick", False, "only tests the script, with 2,000 and 4,000 items")


def main(_: list[str]) -> None:
    """Runs the benchmark."""
    sizes = [2000, 4000] if FLAGS.quick else [int(items) for items in FLAGS["items"].value]
    if len(sizes) < 2 or sizes != sorted(set(sizes)):
        raise app.UsageError(f"--items={','.join(FLAGS['items'].value)}: expected two numbers at least, ascending")
    result = report.Report("bm25_scale", FLAGS.seed, report.hardware("tantivy"))
    with tempfile.TemporaryDirectory() as temporary:
        measure(result, Path(FLAGS.out or temporary), sizes, 0.1 if FLAGS.quick else 2.0)
    result.print(FLAGS.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
