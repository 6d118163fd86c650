"""`dpsr evaluate`: how well systems find the items that people judged relevant (DPSR section 6.2)."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import ir_measures
import numpy as np
from absl import flags
from ir_measures import RR, R
from tqdm import tqdm

from dpsr_tf.data.store import Store
from dpsr_tf.data.tables import Table, check_kind
from dpsr_tf.errors import CommandError, UsageError
from dpsr_tf.evaluation.retriever import Bm25, Retriever

USAGE = """
Usage: dpsr evaluate --judgments=FILE --store=STORE --system=bm25 --system=server:HOST:PORT/MODEL

Asks each system for the items of every judged query and prints recall@k over the whole corpus and MRR@10, averaged over
the queries with at least one relevant item. An item that nobody judged counts as not relevant.
"""

# Averaged over queries; the first k of a run decide.
MEASURES = {"recall@10": R @ 10, "recall@100": R @ 100, "mrr@10": RR @ 10}
_K = 100
_BATCH = 64

REQUIRED_FLAGS = ("judgments", "store")


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr evaluate`."""
    flags.DEFINE_string("judgments", None, "table (TSV, CSV, ...) of judged pairs", flag_values=values)
    flags.DEFINE_string("query_column", "query", "its column of the query text", flag_values=values)
    flags.DEFINE_string("item_column", "item", "its column of the item id", flag_values=values)
    flags.DEFINE_string("grade_column", "grade", "its column of the grade", flag_values=values)
    flags.DEFINE_float("relevant_from", 1.0, "grades of this and above are relevant", flag_values=values)
    flags.DEFINE_string("store", None, "store with the item corpus", flag_values=values)
    flags.DEFINE_multi_string("system", [], "bm25 or server:HOST:PORT/MODEL; repeatable", flag_values=values)
    flags.DEFINE_string("json", None, "file to write the figures to", flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr evaluate`."""
    if not values.system:
        raise UsageError("--system is missing, expected at least one of: bm25, server:HOST:PORT/MODEL")
    store = Store(values.store)
    item_ids = store.items()["id"]
    judgments = Judgments.read(
        Path(values.judgments), values.query_column, values.item_column, values.grade_column, values.relevant_from
    )
    judgments.check_items(item_ids)
    if values.json and not Path(values.json).parent.is_dir():
        raise CommandError(f"--json={values.json}: there is no directory {Path(values.json).parent}; make it first")
    retrievers = {spec: make_retriever(spec, store) for spec in values.system}
    rows = {
        spec: evaluate(retriever, judgments, label=spec.partition(":")[0]) for spec, retriever in retrievers.items()
    }
    print(f"{values.judgments}: {len(judgments.queries):,} queries with a relevant item, {len(item_ids):,} items")
    print(format_table(rows))
    if values.json:
        Path(values.json).write_text(json.dumps({"queries": len(judgments.queries), "systems": rows}, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Judgments:
    """The queries that have a relevant item, and those items."""

    path: Path
    queries: list[str]
    relevant: list[list[int]]  # item ids, one list a query

    @staticmethod
    def read(path: Path, query: str, item: str, grade: str, relevant_from: float) -> Judgments:
        """Reads a table of judged pairs. Raises CommandError (unreadable, a missing column, nothing relevant)."""
        if not path.is_file():
            raise UsageError(
                f"--judgments={path}: no such file" if not path.exists() else f"--judgments={path}: is no file"
            )
        check_kind(path)
        table = Table(path, [query], [item, grade], "correct --query_column, --item_column or --grade_column")
        is_relevant = table.numbers(grade, missing=-np.inf) >= relevant_from
        queries = np.array(table.text(query).to_pylist(), object)[is_relevant]
        pairs: dict[str, list[int]] = {}
        for text, item_id in zip(queries, table.ids(item)[is_relevant].tolist(), strict=True):
            pairs.setdefault(text, []).append(item_id)
        if not pairs:
            raise CommandError(
                f"{path}: no grade in column {grade} is {relevant_from:g} or more, so no query has a relevant item; "
                f"correct --grade_column or --relevant_from"
            )
        return Judgments(path, list(pairs), [sorted(set(ids)) for ids in pairs.values()])

    def check_items(self, item_ids: np.ndarray) -> None:
        """Raises CommandError if a relevant item is not in the corpus."""
        judged = np.unique(np.concatenate([np.array(ids) for ids in self.relevant]))
        unknown = np.setdiff1d(judged, item_ids)
        if len(unknown):
            first = ", ".join(str(i) for i in unknown[:3])
            raise CommandError(
                f"{self.path}: {len(unknown):,} of {len(judged):,} relevant items are not in the store, first {first}; "
                f"give the judgments of this corpus"
            )


def make_retriever(spec: str, store: Store) -> Retriever:
    """The system that `spec` names: `bm25`, or `server:HOST:PORT/MODEL`. Raises UsageError for another."""
    kind, _, rest = spec.partition(":")
    if spec == "bm25":
        return Bm25(store.items()["id"], store.titles())
    if kind == "server":
        target, slash, model = rest.rpartition("/")
        if slash and target and model:
            # By name: this package knows retrievers, not servers.
            return importlib.import_module("dpsr_serving.client").retriever(target, model)
    raise UsageError(f"--system={spec}: expected bm25 or server:HOST:PORT/MODEL")


def evaluate(retriever: Retriever, judgments: Judgments, label: str = "evaluate") -> dict[str, float]:
    """Mean of each of MEASURES over the queries, for the first 100 items that the retriever returns."""
    qrels = {str(row): {str(item): 1 for item in items} for row, items in enumerate(judgments.relevant)}
    found: dict[str, dict[str, float]] = {}
    with tqdm(total=len(judgments.queries), desc=f"{'ask ' + label:<14}", unit=" queries") as bar:
        for begin in range(0, len(judgments.queries), _BATCH):
            queries = judgments.queries[begin : begin + _BATCH]
            ids, _ = retriever(queries, None, _K)
            for row, items in enumerate(ids, start=begin):
                # The order is the system's; equal scores must not let the library choose another.
                found[str(row)] = {str(item): float(-rank) for rank, item in enumerate(items) if item >= 0}
            bar.update(len(queries))
    results = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, found)
    return {name: float(results[measure]) for name, measure in MEASURES.items()}


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """A table for people: one line a system."""
    width = max(len(name) for name in [*rows, "system"])
    lines = [f"{'system':<{width}}" + "".join(f"{name:>12}" for name in MEASURES)]
    lines += [f"{name:<{width}}" + "".join(f"{row[m]:>12.3f}" for m in MEASURES) for name, row in rows.items()]
    return "\n".join(lines)
