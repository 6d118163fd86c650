"""Finds good settings of BM25 for a store, on judged queries that you do not publish figures of.

    python benchmarks/bm25.py --store=STORE --judgments=FILE [--judgments=FILE] [--held_out] --json

The settings are those of `dpsr evaluate --system=bm25:OPTIONS`: stems, letter trigrams and their weight, k1, b, and,
where the items have several text columns, a field for each column with a weight for the title. The search changes one
setting at a time to the value with the highest recall@100 (the mean over the files), and goes through all settings
until none improves. It prints each setting that it tried.

The columns of --judgments are named as for `dpsr evaluate`. --held_out takes the validation fold of what the store
holds out. The best setting is chosen on these queries, so its figure here is a little too high: compare it with others
on queries that chose nothing.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import report
from absl import app, flags, logging
from tqdm import tqdm

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.data.store import Store
from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.evaluation.systems import Systems

METRICS = ("recall@10", "recall@100", "mrr@10")
CHOSEN_BY = "recall@100"
# The values that the search tries. A title weight of 0 joins all columns to one text.
VALUES: Mapping[str, Sequence[Any]] = {
    "stem": (False, True),
    "trigrams": (0.0, 0.1, 0.2, 0.3, 0.5, 0.8),
    "b": (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9),
    "k1": (0.3, 0.6, 0.9, 1.2, 1.6, 2.0),
    "title": (0.0, 1.0, 2.0, 4.0),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of BM25; the defaults are those of `--system=bm25`."""

    stem: bool = False
    trigrams: float = 0.0
    b: float = 0.75
    k1: float = 1.2
    title: float = 0.0

    def system(self, columns: Sequence[str]) -> str:
        """Returns the setting as `--system` takes it; the first of the text columns is the title."""
        options = ["stem"] if self.stem else []
        numbers = ("trigrams", "k1", "b")
        changed = {name: getattr(self, name) for name in numbers if getattr(self, name) != getattr(Setting, name)}
        if self.title:
            changed |= {columns[0]: self.title} | dict.fromkeys(columns[1:], 1)
        options += [f"{name}={value:g}" for name, value in changed.items()]
        return f"bm25:{'+'.join(options)}" if options else "bm25"


class Search:
    """The search for the best setting; remembers what it has measured."""

    def __init__(self, corpus: Corpus, judgments: Mapping[str, Judgments]):
        """`judgments`: name of a fold -> its judgments."""
        self._corpus, self._judgments = corpus, judgments
        self.columns = list(corpus.texts())
        # Setting -> fold -> the figures of each query.
        self.found: dict[Setting, dict[str, dict[str, Any]]] = {}

    def value(self, setting: Setting) -> float:
        """Measures a setting. Returns the mean of recall@100 over the folds."""
        if setting not in self.found:
            retriever = Systems(self._corpus).make(setting.system(self.columns))
            self.found[setting] = {}
            for name, judgments in self._judgments.items():
                ids, scores = retriever(judgments.queries, None, 100)
                self.found[setting][name] = metrics.ranked_metrics(ids, scores, judgments, (10, 100))
        return statistics.fmean(figures[CHOSEN_BY].mean() for figures in self.found[setting].values())

    def best(self) -> Setting:
        """Returns the setting at which no change of one value improves."""
        values = {name: tried for name, tried in VALUES.items() if name != "title" or len(self.columns) > 1}
        best, before = Setting(), None
        with tqdm(desc="search", unit=" settings") as bar:
            while best != before:
                before = best
                for name, tried in values.items():
                    changed = [dataclasses.replace(best, **{name: value}) for value in tried]
                    best = max([best, *changed], key=self.value)  # of equals the first: what is better has to show it
                    bar.update(len(self.found) - bar.n)
        return best


def judgments_of(values: flags.FlagValues, corpus: Corpus, store: Store) -> dict[str, Judgments]:
    """Reads the judgments that the flags name, by fold."""
    found = {
        Path(name).stem: Judgments.read(
            Path(name), values.query_column, values.item_column, values.grade_column, values.relevant_from,
            item_keys=corpus.item_keys,
        )
        for name in values.judgments
    }  # fmt: skip
    return found | ({"held out": Judgments.of_held_out(store, "validation")} if values.held_out else {})


def main(arguments: list[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    if not values.judgments and not values.held_out:
        raise app.UsageError("--judgments is missing; give a table of judged pairs, or --held_out")
    logging.set_verbosity(logging.WARNING)  # bm25s reports every index that it builds
    store = Store(values.store)
    corpus = Corpus.of_store(store)
    judgments = judgments_of(values, corpus, store)
    search = Search(corpus, judgments)
    best = search.best()
    result = report.Report("bm25", values.seed, report.hardware("numpy", "scipy", "bm25s", "PyStemmer"))
    for setting in sorted(search.found, key=lambda setting: -search.value(setting)):
        for fold, figures in search.found[setting].items():
            for metric in METRICS:
                samples = metrics.bootstrap_means(figures[metric][:, None], 1000, values.seed)
                low, high = metrics.interval(samples[:, 0])
                more = {"interval": [low, high], "queries": len(figures[metric])}
                note = f"95 % interval {low:.3f} to {high:.3f}"
                name = setting.system(search.columns)
                result.add(name, fold, metric, float(figures[metric].mean()), "", note=note, **more)
    for name, setting in (("plain", Setting()), ("best", best)):
        for fold in judgments:
            key = f"{CHOSEN_BY}_{fold}_{name}".replace("@", "").replace(" ", "_").replace(".", "_")
            result.bars[key] = result.value(setting.system(search.columns), fold, CHOSEN_BY)
    print(f"the best of {len(search.found)} settings: --system={best.system(search.columns)}\n")
    result.print(values.json)


if __name__ == "__main__":
    flags.DEFINE_string("store", None, "store whose items are searched", required=True)
    flags.DEFINE_multi_string("judgments", [], "table of judged query-item pairs; can be given several times")
    flags.DEFINE_boolean("held_out", False, "choose on the validation fold of the interactions that the store held out")
    flags.DEFINE_string("query_column", "query", "column of --judgments with the query text")
    flags.DEFINE_string("item_column", "item", "column of --judgments with the item id")
    flags.DEFINE_string("grade_column", "grade", "column of --judgments with the grade")
    flags.DEFINE_float("relevant_from", 1.0, "lowest grade that counts as relevant")
    flags.DEFINE_integer("seed", 1, "seed of the bootstrap samples")
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object on the last line")
    try:
        app.run(main)
    except (CommandError, UsageError) as error:
        sys.exit(f"bm25.py: error: {error}")
