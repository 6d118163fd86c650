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
        ks: cut-offs of the figures of ranked lists.
        seed: seed of the bootstrap samples and of the candidates of top-k, the same for all systems.
        bootstrap: number of bootstrap samples for each interval; 0 turns intervals off.
        latency_queries: number of queries that are asked one at a time to measure latency; 0 turns this off.
    """

    ks: tuple[int, ...] = DEFAULT_KS
    seed: int = 1
    bootstrap: int = 1000
    latency_queries: int = 100


@dataclasses.dataclass(frozen=True)
class SystemFigures:
    """The figures of one system, before they are averaged.

    Attributes:
        per_query: name -> float64 [queries]; the figure is the mean over the queries.
        overall: figures that are not means over queries, such as coverage and latency.
        pairs: scores of judged pairs, for AUC; None if AUC is not defined.
        notes: why figures are missing, and anomalies in the answers.
    """

    per_query: dict[str, np.ndarray]
    overall: dict[str, float]
    pairs: metrics.LabelledPairs | None
    notes: list[str]


def evaluate(
    retriever: Retriever, judgments: Judgments, ks: Sequence[int] = DEFAULT_KS, label: str = "evaluate"
) -> dict[str, float]:
    """Returns the means over the queries of recall@k, precision@k, mrr@k and ndcg@k."""
    ids, scores, _ = _ask_all(retriever, judgments, max(ks), label)
    return {name: float(values.mean()) for name, values in metrics.ranked_metrics(ids, scores, judgments, ks).items()}


def measure_all(
    retrievers: Mapping[str, Retriever], judgments: Judgments, corpus: Corpus, options: Options, compare: bool = False
) -> dict[str, Any]:
    """Measures every system.

    Returns:
        `systems`: system -> figure -> number, None if it is not defined. `intervals`: system -> figure -> [low, high].
        `slices`: slicing -> value -> `queries`, `share` (of all queries), `systems`, `intervals`. `comparisons`, if
        `compare`: one for each system but the first, with `system`, `baseline` (the first) and `figures`, see
        metrics.compare. `notes`: system -> lines.
    """
    measured = {spec: measure(retriever, judgments, corpus, options, spec) for spec, retriever in retrievers.items()}
    auc_samples = {
        spec: one.pairs.auc_samples(np.ones(one.pairs.num_queries, bool), options.bootstrap, options.seed)
        for spec, one in measured.items()
        if one.pairs is not None
    }
    all_queries = np.ones(len(judgments.queries), bool)
    report: dict[str, Any] = _summary(measured, all_queries, options, auc_samples)
    for spec, one in measured.items():
        report["systems"][spec] |= one.overall
    report["slices"] = {}
    for name, of_query in judgments.slices.items():
        occurring = {value for values in of_query for value in values}
        ordered = [value for value in FREQUENCIES if value in occurring] if name == FREQUENCY else sorted(occurring)
        inside = {value: np.array([value in values for values in of_query]) for value in ordered}
        report["slices"][name] = {
            value: {"share": float(rows.mean()), **_summary(measured, rows, options)} for value, rows in inside.items()
        }
    if compare:
        baseline, *others = measured
        report["comparisons"] = [
            {"system": spec, "baseline": baseline, "figures": _compare(measured, spec, baseline, options, auc_samples)}
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
) -> SystemFigures:
    """Computes all figures of one system. `label` is the text of its progress bar."""
    ids, scores, seconds = _ask_all(retriever, judgments, max(options.ks), label)
    per_query = metrics.ranked_metrics(ids, scores, judgments, options.ks)
    overall, notes = _coverage_and_popularity(ids, scores, corpus, options.ks)
    overall["queries_per_second"] = len(ids) / max(seconds, 1e-9)
    pairs = None
    if getattr(retriever, "score", None) is None:
        notes.append("no top-k and no AUC: the system cannot score given pairs")
    else:
        if metrics.has_candidates(judgments, corpus.item_ids):
            per_query |= _top_k(retriever, judgments, corpus.item_ids, options.seed)
        else:
            most = max(map(len, judgments.relevant))
            notes.append(
                f"no top-k: each query needs {metrics.NUM_CANDIDATES - 1:,} items that are not relevant, and one has "
                f"{most:,} relevant items of {len(corpus.item_ids):,}"
            )
        pairs = _labelled_pairs(retriever, judgments)
        if pairs is None:
            notes.append("no AUC: every judged item is relevant")
    overall |= _latency(retriever, judgments, max(options.ks), options.latency_queries)
    return SystemFigures(per_query, overall, pairs, notes)


def _compare(
    measured: Mapping[str, SystemFigures],
    spec: str,
    baseline: str,
    options: Options,
    auc_samples: Mapping[str, np.ndarray],
) -> dict[str, dict[str, Any]]:
    """Returns metrics.compare, and the difference of AUC with its interval but without tests, which need queries."""
    one, other = measured[spec], measured[baseline]
    figures = metrics.compare(one.per_query, other.per_query, options.bootstrap, options.seed)
    if one.pairs is not None and other.pairs is not None:
        once = np.ones((1, one.pairs.num_queries))
        figures["auc"] = {
            "difference": float(one.pairs.auc(once)[0] - other.pairs.auc(once)[0]),
            "interval": metrics.interval(auc_samples[spec] - auc_samples[baseline]),
            "p_t_test": None,
            "p_wilcoxon": None,
        }
    return figures


def _ask_all(retriever: Retriever, judgments: Judgments, k: int, label: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Asks every query. Returns ids and scores, both [queries, k], and the seconds it took."""
    queries, users, rows = judgments.queries, judgments.users, np.arange(len(judgments.queries))
    if not is_personal(retriever):
        # The answer does not depend on the user: ask a query of many users once.
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


def _coverage_and_popularity(
    ids: np.ndarray, scores: np.ndarray, corpus: Corpus, ks: Sequence[int]
) -> tuple[dict[str, float], list[str]]:
    """Returns coverage and popularity of the answers, and notes about answers that are counted as wrong."""
    rows = RowsById(corpus.item_ids)(ids)
    holds = metrics.counted(ids, scores)
    percentiles = corpus.popularity_percentiles()
    figures, notes = {}, []
    for k in ks:
        found = rows[:, :k][holds[:, :k] & (rows[:, :k] >= 0)]
        figures[f"coverage@{k}"] = len(np.unique(found)) / len(corpus.item_ids)
        figures[f"popularity@{k}"] = float(percentiles[found].mean()) if len(found) else float("nan")
    figures["empty_answers"] = float((~holds.any(axis=1)).mean())
    anomalies = {
        "results that are not items of the store": holds & (rows < 0),
        "results that repeat an item of the same answer": (ids >= 0) & ~holds & ~np.isnan(scores),
        "results whose score is NaN": (ids >= 0) & np.isnan(scores),
    }
    notes += [f"{int(where.sum()):,} {what}, counted as wrong" for what, where in anomalies.items() if where.any()]
    return figures, notes


def _score(retriever: Retriever, queries: Sequence[str], users: Sequence[Any] | None, items: np.ndarray) -> np.ndarray:
    return retriever.score(queries, users if is_personal(retriever) else None, items)  # type: ignore[attr-defined]


def _top_k(retriever: Retriever, judgments: Judgments, item_ids: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Returns top-k of each query: the mean over its relevant items, each ranked among the same 1,023 others."""
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
    """Scores all judged pairs, also those of queries without a relevant item. None if all pairs are relevant."""
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
    """Returns the lists as rows of one int64 array, padded with -1."""
    padded = np.full((len(lists), max(1, *map(len, lists))), -1, np.int64)
    for row, items in enumerate(lists):
        padded[row, : len(items)] = items
    return padded


def _latency(retriever: Retriever, judgments: Judgments, k: int, count: int) -> dict[str, float]:
    """Returns the milliseconds that a single query takes: wall time, and CPU time of this process."""
    count = min(count, len(judgments.queries))
    if not count:
        return {}
    users = judgments.users
    wall, cpu = np.empty(count), np.empty(count)
    # The first query is asked twice, once to warm up; the second time overwrites its figures.
    for row in range(-1, count):
        asked = slice(max(row, 0), max(row, 0) + 1)
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        ask(retriever, judgments.queries[asked], users[asked] if users else None, k)
        wall[row], cpu[row] = time.perf_counter() - wall_start, time.process_time() - cpu_start
    p50, p99 = np.quantile(wall, [0.5, 0.99]) * 1e3
    return {"latency_ms_p50": float(p50), "latency_ms_p99": float(p99), "cpu_ms": float(cpu.mean() * 1e3)}


def _summary(
    measured: Mapping[str, SystemFigures],
    inside: np.ndarray,
    options: Options,
    auc_samples: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Averages over the queries that are `inside`, bool [queries], with intervals.

    `auc_samples` are the bootstrap samples of AUC of each system, [samples], where they are known already.
    """
    systems: dict[str, dict[str, Any]] = {}
    intervals: dict[str, dict[str, Any]] = {}
    for spec, one in measured.items():
        names = list(one.per_query)
        values = np.stack([one.per_query[name][inside] for name in names], axis=1)
        systems[spec] = dict(zip(names, values.mean(axis=0).tolist(), strict=True))
        intervals[spec] = {}
        if options.bootstrap:
            samples = metrics.bootstrap_means(values, options.bootstrap, options.seed)
            intervals[spec] = {name: metrics.interval(samples[:, column]) for column, name in enumerate(names)}
        if one.pairs is not None:
            # Queries without a relevant item count only if all other queries are inside.
            unanswered = np.full(one.pairs.num_queries - len(inside), inside.all())
            counted = np.concatenate([inside, unanswered])
            systems[spec]["auc"] = float(one.pairs.auc(counted[np.newaxis].astype(np.float64))[0])
            if options.bootstrap:
                known = (auc_samples or {}).get(spec)
                samples = one.pairs.auc_samples(counted, options.bootstrap, options.seed) if known is None else known
                intervals[spec]["auc"] = metrics.interval(samples)
    return {"queries": int(inside.sum()), "systems": systems, "intervals": intervals}
