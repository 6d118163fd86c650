"""Measures retrievers on judgments: asks every query and computes all figures, with slices and comparisons."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from dpsr_tf.data.store import RowsById
from dpsr_tf.evaluation import metrics
from dpsr_tf.evaluation.corpus import FREQUENCIES, FREQUENCY, Corpus
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.evaluation.retriever import Retriever, ask, is_personal

DEFAULT_KS = (10, 100)
# Number of queries that a retriever is asked at once.
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Options:
    """How systems are measured.

    Attributes:
        ks: cut-offs.
        seed: of bootstrap samples and candidates, the same for all systems.
        bootstrap: samples behind an interval; 0: no intervals.
        latency_queries: queries asked alone; 0: none.
    """

    ks: tuple[int, ...] = DEFAULT_KS
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
    retriever: Retriever, judgments: Judgments, ks: Sequence[int] = DEFAULT_KS, label: str = "evaluate"
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
