"""`dpsr evaluate`: measures retrieval on human judgments."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf import __version__
from dpsr_tf.data.store import RowsById, Store
from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.corpus import FREQUENCIES, Corpus
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.evaluation.retriever import Retriever, ask, is_personal
from dpsr_tf.evaluation.systems import KINDS, NAMES, Systems

USAGE = f"""
Usage: dpsr evaluate --store=STORE --judgments=FILE --system=bm25 --system=server:HOST:PORT/MODEL
       dpsr evaluate --store=STORE --held_out --system=bm25 --system=model:DIR --compare

Asks each system for the items of every judged query and prints recall, precision, MRR and NDCG over the whole corpus,
top-k among 1,024 items, AUC, coverage, popularity and latency, averaged over the queries with at least one relevant
item. An item that nobody judged counts as not relevant. docs/evaluation.md defines every figure.

Systems:
{KINDS.rstrip()}
"""

# What is computed where --k does not say.
KS = (10, 100)
# The slicing that needs no column: how often the query is in the store's log.
FREQUENCY = "frequency"
_BATCH = 256

REQUIRED_FLAGS = ("store",)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of `dpsr evaluate`."""
    text, integer, boolean = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    text("judgments", None, "table (TSV, CSV, Parquet, ...) of judged pairs", flag_values=values)
    text("query_column", "query", "its column of the query text", flag_values=values)
    text("item_column", "item", "its column of the item id", flag_values=values)
    text("grade_column", "grade", "its column of the grade; empty: every row is relevant", flag_values=values)
    text("user_column", "", "its column of the user id, if it has one", flag_values=values)
    text("time_column", "", "with users, its column of the time: seconds since 1970", flag_values=values)
    flags.DEFINE_float("relevant_from", 1.0, "grades of this and above are relevant", flag_values=values)
    boolean("held_out", False, "measures on what the store held out, in place of judgments", flag_values=values)
    boolean("skip_unknown", False, "leaves out judgments of items that are not in the store", flag_values=values)
    text("queries", None, "table with one row a judged query, for --ask_column and --query_slice", flag_values=values)
    text("key_column", "query", "its column of the query as the judgments have it", flag_values=values)
    text("ask_column", "", "its column of the text to ask in the query's place", flag_values=values)
    flags.DEFINE_multi_string(
        "slice", [], f"column of the judgments to slice by, or {FREQUENCY}; repeatable", flag_values=values
    )
    flags.DEFINE_multi_string("query_slice", [], "column of --queries to slice by; repeatable", flag_values=values)
    text("store", None, "store with the item corpus", flag_values=values)
    flags.DEFINE_multi_string("system", [], "what to measure, see above; repeatable", flag_values=values)
    flags.DEFINE_list("k", None, f"cut-offs ({','.join(map(str, KS))})", flag_values=values)
    boolean("compare", False, "compares every system with the first, query by query", flag_values=values)
    integer("bootstrap", 1000, "samples behind each interval; 0: no intervals", 0, 1_000_000, flag_values=values)
    integer("max_queries", None, "measures on so many queries, drawn by chance", 1, flag_values=values)
    integer("latency_queries", 100, "queries asked alone to measure latency; 0: none", 0, flag_values=values)
    integer("seed", 1, "of samples, candidates, and the system random", 0, 2**31 - 1, flag_values=values)
    text("json", None, "file to write all figures to", flag_values=values)


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr evaluate`."""
    ks = _ks(values.k)
    if not values.system:
        raise UsageError(f"--system is missing, expected at least one of: {NAMES}")
    if values.time_column and not values.user_column:
        raise UsageError("--time_column is given without --user_column, and only a user has a history; give both")
    if math.isnan(values.relevant_from):
        raise UsageError("--relevant_from=nan: expected a number")
    if values.held_out and values.judgments:
        raise UsageError(f"--judgments={values.judgments}: goes not with --held_out; give one of them")
    if not values.held_out and not values.judgments:
        raise UsageError("--judgments is missing; give a table of judged pairs, or --held_out")
    if (values.ask_column or values.query_slice) and not values.queries:
        raise UsageError("--queries is missing; --ask_column and --query_slice name columns of that table")
    if values.compare and len(values.system) < 2:
        raise UsageError("--compare needs two systems or more, the first is what the others are compared with")
    if values.json and not Path(values.json).parent.is_dir():
        raise CommandError(f"--json={values.json}: there is no directory {Path(values.json).parent}; make it first")
    if values.json and (Path(values.json).is_dir() or not os.access(Path(values.json).parent, os.W_OK)):
        raise CommandError(f"--json={values.json}: cannot be written there; choose another file")
    corpus = Corpus.of_store(Store(values.store))
    if values.k and max(ks) > len(corpus.item_ids):
        raise UsageError(f"--k={max(ks)}: is beyond the corpus, expected at most {len(corpus.item_ids)}, its items")
    judgments, left_out = _judgments(values, corpus)
    systems = Systems(corpus, values.seed)
    retrievers = {spec: systems.make(spec) for spec in values.system}
    options = Options(ks, values.seed, values.bootstrap, values.latency_queries)
    report = {
        "judgments": str(judgments.path),
        "store": values.store,
        "queries": len(judgments.queries),
        "left_out": left_out,
        "items": len(corpus.item_ids),
        "settings": dataclasses.asdict(options) | {"confidence": metrics.CONFIDENCE, "relevant_from": None},
        "versions": _versions(),
        **measure_all(retrievers, judgments, corpus, options, values.compare),
    }
    report["settings"]["relevant_from"] = None if values.held_out else values.relevant_from
    print(f"{judgments.path}: {len(judgments.queries):,} queries with a relevant item, {len(corpus.item_ids):,} items")
    print("".join(f"left out: {count:,} {what}\n" for what, count in left_out.items() if count), end="")
    print(format_report(report))
    if values.json:
        temporary = Path(f"{values.json}.tmp{os.getpid()}")
        try:
            temporary.write_text(json.dumps(_jsonable(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            os.replace(temporary, values.json)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CommandError(f"--json={values.json}: cannot be written: {error.strerror}") from None


def _ks(given: Sequence[str] | None) -> tuple[int, ...]:
    if given is None:
        return KS
    if not given or not all(text.strip().isdecimal() and int(text) > 0 for text in given):
        raise UsageError(f"--k={','.join(given)}: expected cut-offs of 1 or more, as in --k=10,100")
    return tuple(sorted({int(text) for text in given}))


def _judgments(values: flags.FlagValues, corpus: Corpus) -> tuple[Judgments, dict[str, int]]:
    """The judgments that the flags name, and how many of what is left out of them."""
    columns = [name for name in values.slice if name != FREQUENCY]
    left_out = {}
    if values.held_out:
        assert corpus.store is not None
        if columns:
            raise UsageError(f"--slice={columns[0]}: held-out interactions have no columns, expected {FREQUENCY}")
        judgments = Judgments.of_held_out(corpus.store)
    else:
        judgments = Judgments.read(
            Path(values.judgments),
            values.query_column,
            values.item_column,
            values.grade_column,
            values.relevant_from,
            values.user_column,
            values.time_column,
            columns,
            corpus.item_keys,
            corpus.user_keys,
        )
    if values.skip_unknown:
        judgments, left_out["judgments of items that are not in the store"] = judgments.only_known(corpus.item_ids)
    judgments.check_items(corpus.item_ids)
    if values.user_column:
        known = corpus.store.users()["id"] if corpus.store is not None else np.zeros(0, np.int64)
        strange = {user.id for user in judgments.users or ()} - set(known.tolist())
        left_out["users that the store does not know, who are asked for as anonymous"] = len(strange)
    left_out["queries without a relevant item, but for AUC"] = len(judgments.unanswered)
    if FREQUENCY in values.slice:
        found: list[tuple[str, ...]] = [(name,) for name in corpus.frequencies(judgments.queries)]
        judgments = dataclasses.replace(judgments, slices={FREQUENCY: found, **judgments.slices})
    if values.queries:
        judgments = judgments.with_queries(
            Path(values.queries), values.key_column, values.ask_column, values.query_slice
        )
    if values.max_queries:
        everything = len(judgments.queries)
        judgments = judgments.sample(values.max_queries, values.seed)
        left_out["queries that --max_queries did not draw"] = everything - len(judgments.queries)
    return judgments, left_out


@dataclasses.dataclass(frozen=True)
class Options:
    """How systems are measured.

    Attributes:
        ks: cut-offs.
        seed: of bootstrap samples and candidates, the same for all systems.
        bootstrap: samples behind an interval; 0: no intervals.
        latency_queries: queries asked alone; 0: none.
    """

    ks: tuple[int, ...] = KS
    seed: int = 1
    bootstrap: int = 1000
    latency_queries: int = 100


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of one system.

    Attributes:
        of_queries: name -> float64 [queries], whose mean is the figure.
        of_all: figures that are no mean over queries.
        pairs: for AUC; None where it is not defined.
        notes: what is missing, and what is odd.
    """

    of_queries: dict[str, np.ndarray]
    of_all: dict[str, float]
    pairs: metrics.LabelledPairs | None
    notes: list[str]


def evaluate(
    retriever: Retriever, judgments: Judgments, ks: Sequence[int] = KS, label: str = "evaluate"
) -> dict[str, float]:
    """Mean over the queries of recall@k, precision@k, mrr@k and ndcg@k, for the items that the retriever returns."""
    ids, scores, _ = _ask_all(retriever, judgments, max(ks), label)
    return {name: float(values.mean()) for name, values in metrics.ranked_metrics(ids, scores, judgments, ks).items()}


def measure_all(
    retrievers: Mapping[str, Retriever], judgments: Judgments, corpus: Corpus, options: Options, compare: bool = False
) -> dict[str, Any]:
    """Every figure of every system.

    Returns:
        `systems`: system -> figure -> number, None where it is not defined. `intervals`: the same with [low, high].
        `slices`: slicing -> value -> `queries`, `systems`, `intervals`. `comparisons`, with `compare`: of each system
        but the first with the first, see metrics.compare, each with `system`, `baseline`. `notes`: system -> lines.
    """
    measured = {spec: measure(retriever, judgments, corpus, options, spec) for spec, retriever in retrievers.items()}
    everything = np.ones(len(judgments.queries), bool)
    report: dict[str, Any] = _summary(measured, everything, options)
    for spec, one in measured.items():
        report["systems"][spec] |= one.of_all
    report["slices"] = {}
    for name, of_query in judgments.slices.items():
        found = {value for values in of_query for value in values}
        values = [value for value in FREQUENCIES if value in found] if name == FREQUENCY else sorted(found)
        report["slices"][name] = {
            value: _summary(measured, np.array([value in values for values in of_query]), options) for value in values
        }
    if compare:
        baseline, *others = measured
        report["comparisons"] = [
            {"system": spec, "baseline": baseline, "figures": _compare(measured[spec], measured[baseline], options)}
            for spec in others
        ]
    report["notes"] = {spec: one.notes for spec, one in measured.items()}
    return report


def measure(
    retriever: Retriever,
    judgments: Judgments,
    corpus: Corpus,
    options: Options,
    label: str = "evaluate",
) -> Measured:
    """All figures of one system."""
    ids, scores, seconds = _ask_all(retriever, judgments, max(options.ks), label)
    of_queries = metrics.ranked_metrics(ids, scores, judgments, options.ks)
    of_all, notes = _retrieved(ids, scores, corpus, options.ks)
    of_all["queries_per_second"] = len(ids) / max(seconds, 1e-9)
    pairs = None
    score = getattr(retriever, "score", None)
    if score is None:
        notes.append("gives no scores of pairs, so no top-k and no AUC")
    else:
        if metrics.has_candidates(judgments, corpus.item_ids):
            of_queries |= _top_k(retriever, judgments, corpus.item_ids, options.seed)
        else:
            most = max(map(len, judgments.relevant))
            notes.append(
                f"no top-k: it takes {metrics.NUM_CANDIDATES - 1:,} items that are not relevant, and a query has "
                f"{most:,} relevant ones of {len(corpus.item_ids):,}"
            )
        pairs = _labelled_pairs(retriever, judgments)
        if pairs is None:
            notes.append("no AUC: no item is judged not relevant")
    of_all |= _latency(retriever, judgments, max(options.ks), options.latency_queries)
    return Measured(of_queries, of_all, pairs, notes)


def _compare(system: Measured, baseline: Measured, options: Options) -> dict[str, dict[str, Any]]:
    """metrics.compare, and the difference of AUC with its interval; no test of it is by queries."""
    figures = metrics.compare(system.of_queries, baseline.of_queries, options.bootstrap, options.seed)
    if system.pairs is not None and baseline.pairs is not None:
        everything = np.ones(system.pairs.num_queries, bool)
        mine, other = (pairs.auc(everything[np.newaxis])[0] for pairs in (system.pairs, baseline.pairs))
        drawn = [
            pairs.auc_samples(everything, options.bootstrap, options.seed) for pairs in (system.pairs, baseline.pairs)
        ]
        figures["auc"] = {
            "difference": float(mine - other),
            "interval": metrics.interval(drawn[0] - drawn[1]),
            "p_t_test": None,
            "p_wilcoxon": None,
        }
    return figures


def _ask_all(retriever: Retriever, judgments: Judgments, k: int, label: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Ids and scores [queries, k], and how many seconds it took."""
    queries, users, rows = judgments.queries, judgments.users, np.arange(len(judgments.queries))
    if not is_personal(retriever):
        # One query of many users has one answer.
        places: dict[str, int] = {}
        rows = np.array([places.setdefault(query, len(places)) for query in queries])
        queries, users = list(places), None
    ids = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.float32)
    start = time.perf_counter()
    with tqdm(total=len(queries), desc=f"{'ask ' + label.partition(':')[0]:<14}", unit=" queries") as bar:
        for begin in range(0, len(queries), _BATCH):
            end = min(begin + _BATCH, len(queries))
            ids[begin:end], scores[begin:end] = ask(
                retriever, queries[begin:end], users[begin:end] if users else None, k
            )
            bar.update(end - begin)
    return ids[rows], scores[rows], time.perf_counter() - start


def _retrieved(
    ids: np.ndarray, scores: np.ndarray, corpus: Corpus, ks: Sequence[int]
) -> tuple[dict[str, float], list[str]]:
    """Coverage and popularity of the answers, and what is odd about them."""
    rows = RowsById(corpus.item_ids)(ids)
    holds = metrics.counted(ids, scores)
    percentiles = corpus.popularity_percentiles()
    figures, notes = {}, []
    for k in ks:
        found = rows[:, :k][holds[:, :k] & (rows[:, :k] >= 0)]
        figures[f"coverage@{k}"] = len(np.unique(found)) / len(corpus.item_ids)
        figures[f"popularity@{k}"] = float(percentiles[found].mean()) if len(found) else float("nan")
    figures["empty_answers"] = float((~holds.any(axis=1)).mean())
    strange = {
        "results that are no items of the store": holds & (rows < 0),
        "results that repeat an item": (ids >= 0) & ~holds & ~np.isnan(scores),
        "results whose score is no number": (ids >= 0) & np.isnan(scores),
    }
    notes += [f"{int(where.sum()):,} {what}, counted as wrong" for what, where in strange.items() if where.any()]
    return figures, notes


def _score(retriever: Retriever, queries: Sequence[str], users: Sequence[Any] | None, items: np.ndarray) -> np.ndarray:
    return retriever.score(queries, users if is_personal(retriever) else None, items)  # type: ignore[attr-defined]


def _top_k(retriever: Retriever, judgments: Judgments, item_ids: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """top-k of each query: the mean over its relevant items, each among the same 1,023 others."""
    result = {k: np.empty(len(judgments.queries)) for k in metrics.TOP_K}
    for begin in range(0, len(judgments.queries), _BATCH):
        part = slice(begin, begin + _BATCH)
        asked = judgments.take(range(begin, min(begin + _BATCH, len(judgments.queries))))
        relevant = _padded(asked.relevant)
        items = np.concatenate([relevant, metrics.top_k_candidates(asked, item_ids, [seed, begin])], axis=1)
        scores = _score(retriever, asked.queries, asked.users, items)
        own, others = scores[:, : relevant.shape[1]], scores[:, relevant.shape[1] :]
        is_item = relevant >= 0
        for k in metrics.TOP_K:
            within = np.where(is_item, metrics.rank_within(own, others, k), 0)
            result[k][part] = within.sum(axis=1) / is_item.sum(axis=1)
    return {f"top-{k}": values for k, values in result.items()}


def _labelled_pairs(retriever: Retriever, judgments: Judgments) -> metrics.LabelledPairs | None:
    """Scores of all judged pairs, those of queries without a relevant item too; None if all pairs are relevant."""
    judged = [list(grades) for grades in judgments.grades] if judgments.grades else judgments.relevant
    queries = judgments.queries + [text for text, _, _ in judgments.unanswered]
    users = None
    if judgments.users is not None:
        users = judgments.users + [user for _, user, _ in judgments.unanswered]
    labels = [np.isin(items, relevant) for items, relevant in zip(judged, judgments.relevant, strict=True)]
    labels += [np.zeros(len(items), bool) for _, _, items in judgments.unanswered]
    judged = judged + [items for _, _, items in judgments.unanswered]
    if all(of_query.all() for of_query in labels):
        return None
    found = []
    for begin in range(0, len(queries), _BATCH):
        part = slice(begin, begin + _BATCH)
        items = _padded(judged[part])
        scores = _score(retriever, queries[part], users[part] if users else None, items)
        found.append(scores[items >= 0])
    of_query = np.repeat(np.arange(len(queries)), [len(items) for items in judged])
    return metrics.LabelledPairs.of(of_query, np.concatenate(labels), np.concatenate(found), len(queries))


def _padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
    """The lists as rows of one array, filled up with -1."""
    padded = np.full((len(lists), max(1, *map(len, lists))), -1, np.int64)
    for row, items in enumerate(lists):
        padded[row, : len(items)] = items
    return padded


def _latency(retriever: Retriever, judgments: Judgments, k: int, count: int) -> dict[str, float]:
    """Milliseconds of one query asked alone, as the client sees it, and of CPU time of this process."""
    count = min(count, len(judgments.queries))
    if not count:
        return {}
    users = judgments.users
    wall, cpu = np.empty(count), np.empty(count)
    for row in range(-1, count):  # the first one twice: to warm up
        asked = slice(max(row, 0), max(row, 0) + 1)
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        ask(retriever, judgments.queries[asked], users[asked] if users else None, k)
        wall[row], cpu[row] = time.perf_counter() - wall_start, time.process_time() - cpu_start
    p50, p99 = np.quantile(wall, [0.5, 0.99]) * 1e3
    return {"latency_ms_p50": float(p50), "latency_ms_p99": float(p99), "cpu_ms": float(cpu.mean() * 1e3)}


def _summary(measured: Mapping[str, Measured], among: np.ndarray, options: Options) -> dict[str, Any]:
    """Means and intervals over the queries of `among`, bool [queries]."""
    systems: dict[str, dict[str, Any]] = {}
    intervals: dict[str, dict[str, Any]] = {}
    for spec, one in measured.items():
        names = list(one.of_queries)
        values = np.stack([one.of_queries[name][among] for name in names], axis=1)
        systems[spec] = dict(zip(names, values.mean(axis=0).tolist(), strict=True))
        intervals[spec] = {}
        if options.bootstrap:
            samples = metrics.bootstrap_means(values, options.bootstrap, options.seed)
            intervals[spec] = {name: metrics.interval(samples[:, column]) for column, name in enumerate(names)}
        if one.pairs is not None:
            # Queries without a relevant item belong to no slice.
            rest = np.full(one.pairs.num_queries - len(among), among.all())
            inside = np.concatenate([among, rest])
            systems[spec]["auc"] = float(one.pairs.auc(inside[np.newaxis].astype(np.float64))[0])
            if options.bootstrap:
                samples = one.pairs.auc_samples(inside, options.bootstrap, options.seed)
                intervals[spec]["auc"] = metrics.interval(samples)
    return {"queries": int(among.sum()), "systems": systems, "intervals": intervals}


def _versions() -> dict[str, str]:
    packages = ("numpy", "scipy", "bm25s", "ir-measures", "tensorflow", "faiss-cpu", "faiss-gpu")
    versions = {"dpsr": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _jsonable(value: Any) -> Any:
    """The report with None where a figure is not defined: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def format_report(report: Mapping[str, Any]) -> str:
    """The report for people."""
    ks = report["settings"]["ks"]
    main = [*(f"recall@{k}" for k in ks), f"mrr@{ks[0]}", f"ndcg@{ks[0]}"]
    names = ["system", *main, *(f"top-{k}" for k in metrics.TOP_K), "auc"]
    more = ["system", *(f"precision@{k}" for k in ks), *(f"coverage@{k}" for k in ks), *(f"popularity@{k}" for k in ks)]
    speed = ["system", "latency_ms_p50", "latency_ms_p99", "cpu_ms", "queries_per_second"]
    rows = [{"system": spec, **figures} for spec, figures in report["systems"].items()]
    blocks = [_table(names, rows)]
    if report["settings"]["bootstrap"]:
        widths = [
            {"system": f"{spec} +-"}
            | {name: (limits[1] - limits[0]) / 2 for name, limits in intervals.items() if limits}
            for spec, intervals in report["intervals"].items()
        ]
        blocks[0] = _table(names, [row for pair in zip(rows, widths, strict=True) for row in pair])
        blocks[0] += f"\n+-: half of the {metrics.CONFIDENCE:.0%} bootstrap interval"
    blocks += [_table(more, rows), _table(speed, rows)]
    for slicing, values in report["slices"].items():
        of_slice = [
            {slicing: value, "queries": part["queries"], "system": spec, **figures}
            for value, part in values.items()
            for spec, figures in part["systems"].items()
        ]
        blocks.append(_table([slicing, "queries", *names], of_slice))
    for comparison in report.get("comparisons", []):
        rows = [
            {
                "figure": name,
                "difference": one["difference"],
                **dict(zip(("low", "high"), one["interval"] or (), strict=False)),
                "p (t-test)": _p_value(one["p_t_test"]),
                "p (Wilcoxon)": _p_value(one["p_wilcoxon"]),
            }
            for name, one in comparison["figures"].items()
            if name in names
        ]
        title = f"{comparison['system']} less {comparison['baseline']}, query by query"
        columns = ["figure", "difference", "low", "high", "p (t-test)", "p (Wilcoxon)"]
        blocks.append(f"{title}\n{_table(columns, rows)}")
    notes = [f"{spec}: {note}" for spec, lines in report["notes"].items() for note in lines]
    return "\n\n".join(blocks + (["\n".join(notes)] if notes else []))


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row, texts to the left and numbers to the right; - where a row has no such number."""
    lines = [list(columns)] + [[_cell(row.get(name)) for name in columns] for row in rows]
    is_text = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if text else f"{cell:>{width}}"
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in lines
    )


def _p_value(p: float | None) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or not np.isfinite(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
