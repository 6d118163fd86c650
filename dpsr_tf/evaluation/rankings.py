"""Measures rankers on lists of items: requests that a store held out, or the judged items of queries.

Nothing is retrieved: each system scores the items of a list, and the order of the scores is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.data.ranking_features import RankingFeatures, Shown
from dpsr_tf.data.request_log import OUTCOMES
from dpsr_tf.data.store import RowsById, Store
from dpsr_tf.data.tables import Table
from dpsr_tf.data.user_requests import User
from dpsr_tf.evaluation import metrics, ranking_metrics
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.features import request_batches
from dpsr_tf.evaluation.judgments import FOLDS, Judgments, fold_of, item_column
from dpsr_tf.evaluation.ranking_metrics import Calibration
from dpsr_tf.evaluation.systems import Systems

DEFAULT_KS = (5, 10)
# The systems that only rank given items.
DESCRIPTIONS = {
    "ranker:DIR": "a ranker: the last checkpoint of a model with model.kind ranker",
    "shown": "the order in which the items were shown",
    "feature:NAME": "a number of the table of `dpsr features`, such as feature:item.30.ctr; the largest comes first",
    "scores:FILE": "scores of any other ranker: a table (Parquet, ...) with request or query, item and score",
}
_KINDS = {name.partition(":")[0] for name in DESCRIPTIONS}
# A missing number comes last.
_LAST = float(np.finfo(np.float32).min)
# Judged lists whose features are computed at a time.
_LISTS = 256
_LARGEST_GRADE = 30


def systems_help() -> str:
    """Returns one line per system that only ranks: how it is written and what it is."""
    width = max(map(len, DESCRIPTIONS))
    return "\n".join(f"  {name:<{width}} {what}" for name, what in DESCRIPTIONS.items())


def is_ranker(spec: str) -> bool:
    """Returns whether `--system` names a system that only ranks."""
    return spec.strip().partition(":")[0] in _KINDS


def is_validated(spec: str) -> bool:
    """Returns whether a system is `ranker:DIR` or `model:DIR`, and its training looked at the validation fold."""
    kind, _, directory = spec.strip().partition(":")
    if kind not in ("ranker", "model"):
        return False
    from dpsr_tf.models.model_directory import ModelDirectory

    return ModelDirectory.open(directory).validated


Scorer = Callable[[Shown, np.ndarray], np.ndarray]


class Batch(NamedTuple):
    """The n items of some lists."""

    shown: Shown
    numbers: np.ndarray  # int64 [lists], the number of each list
    gain: np.ndarray  # float64 [n], for NDCG
    positive: np.ndarray  # bool [n]


class Lists(Protocol):
    """Lists of items to rank."""

    path: Path  # for messages

    def batches(self, fold: str) -> Iterator[Batch]:
        """Yields whole lists; `fold` is one of FOLDS."""
        ...


class HeldOutRequests:
    """The requests that a store held out, each with all items that were shown."""

    def __init__(self, store: Store, positive: str = "order"):
        """Takes the lowest outcome that is positive. Raises CommandError if the store has held out no requests."""
        if store.held_requests() is None:
            need = "`held_out`" if store.schema.ranking else "the section `ranking` and `held_out`"
            raise CommandError(
                f"{store.path}: holds no requests that were held out; add {need} to the schema and ingest the log again"
            )
        self.path = store.path / "held_requests.dpsr"
        self._store, self._features, self._positive = store, RankingFeatures(store), OUTCOMES.index(positive)

    def batches(self, fold: str) -> Iterator[Batch]:
        """See Lists. The numbers are those of the table of `dpsr features`. The gain of an outcome is 2^outcome - 1."""
        for first, file, chosen in request_batches(self._store, fold):
            if len(chosen):
                shown = self._features.of(file, chosen)
                yield Batch(shown, first + chosen, 2.0**shown.outcome - 1, shown.outcome >= self._positive)


class JudgedLists:
    """The judged items of each query."""

    def __init__(self, corpus: Corpus, judgments: Judgments, relevant_from: float):
        """Takes judgments of items of the corpus, which has a store. Raises CommandError if a grade is too large."""
        assert corpus.store is not None
        self.path, self._store = judgments.path, corpus.store
        # Without the section `ranking`, items have no numbers; BM25 and towers need none.
        self._features = RankingFeatures(corpus.store) if corpus.store.schema.ranking else None
        self._relevant_from = relevant_from
        users = judgments.users or [User(-1)] * len(judgments.queries)
        graded = judgments.grades or [dict.fromkeys(items, 1.0) for items in judgments.relevant]
        self._lists = list(zip(judgments.queries, users, graded, strict=True))
        largest = max((grade for _, _, grades in self._lists for grade in grades.values()), default=0)
        if largest > _LARGEST_GRADE:
            raise CommandError(
                f"{self.path}: has the grade {largest:g}, expected at most {_LARGEST_GRADE}, because its gain is "
                f"2^grade - 1; scale the grades"
            )
        self._rows, self._users = RowsById(corpus.item_ids), RowsById(corpus.store.users()["id"])
        judged = np.unique([item for _, _, grades in self._lists for item in grades])
        unknown = judged[self._rows(judged) < 0]
        if len(unknown):
            raise CommandError(
                f"{self.path}: {len(unknown):,} of {len(judged):,} judged items are not in the store, first "
                f"{judgments.unknown_keys.get(int(unknown[0]), unknown[0])}; give judgments of the items in this "
                f"store, or --skip_unknown to ignore the others"
            )

    def batches(self, fold: str) -> Iterator[Batch]:
        """See Lists. A list has the number of its query in the judgments.

        The gain of a grade is 2^grade - 1, and 0 for a grade below 0.
        """
        chosen = [i for i, (query, _, _) in enumerate(self._lists) if fold == "all" or fold_of(query) == fold]
        for begin in range(0, len(chosen), _LISTS):
            numbers = chosen[begin : begin + _LISTS]
            lists = [self._lists[number] for number in numbers]
            grade = np.array([grade for _, _, grades in lists for grade in grades.values()], np.float64)
            gain = 2.0 ** np.maximum(grade, 0) - 1
            yield Batch(self._shown(lists), np.array(numbers), gain, grade >= self._relevant_from)

    def _shown(self, lists: Sequence[tuple[str, User, Mapping[int, float]]]) -> Shown:
        lengths = [len(grades) for _, _, grades in lists]
        request = np.repeat(np.arange(len(lists)), lengths)
        ids = np.array([item for _, _, grades in lists for item in grades], np.int64)
        asked = [user for _, user, _ in lists]
        user = np.maximum(self._users(np.array([one.id for one in asked], np.int64)), 0)[request]
        item, queries = self._rows(ids), [query for query, _, _ in lists]
        if self._features is None:
            zeros = np.zeros(len(item), np.uint8)
            shown = Shown(queries, request, user, np.zeros(len(item), np.int64), item, zeros, zeros, {}, {})
        else:
            shown = self._features.at_end(queries, request, user, item)
        times = np.array([one.time or 0 for one in asked], np.int64)[request]
        return shown._replace(time=np.where(times > 0, times, shown.time))


class Rankers:
    """Opens the systems that `--system` names: functions from items shown and numbers of lists to scores."""

    def __init__(self, corpus: Corpus, lists: Lists, seed: int = 1):
        """Takes what the systems read and rank; `seed` is that of the system `random`."""
        self._corpus, self._lists, self._systems = corpus, lists, Systems(corpus, seed)

    def make(self, spec: str) -> Scorer:
        """Returns the system. Raises UsageError if `spec` names none, CommandError if opening fails."""
        kind, _, operand = spec.strip().partition(":")
        if kind not in _KINDS:
            return self._retriever(spec)
        if bool(operand) == (kind == "shown"):
            raise UsageError(f"--system={spec}: expected one of {', '.join(DESCRIPTIONS)}")
        if kind == "shown":
            return self._shown_order(spec)
        if kind == "feature":
            return self._feature(spec, operand)
        if kind == "scores":
            return self._scores_of_file(spec, Path(operand))
        # Imports TensorFlow, which no baseline needs.
        from dpsr_tf.models.ranker_scores import ranker_scores

        score = ranker_scores(operand, self._corpus.need_store(spec))
        return lambda shown, numbers: score(shown)

    def _shown_order(self, spec: str) -> Scorer:
        if isinstance(self._lists, JudgedLists):
            raise UsageError(f"--system={spec}: judged items were not shown in any order; measure it with --held_out")
        # Items without a known position come last.
        return lambda shown, numbers: -np.where(shown.position > 0, shown.position, 256).astype(np.float64)

    def _feature(self, spec: str, name: str) -> Scorer:
        store = self._corpus.need_store(spec)
        known = RankingFeatures(store).numbers
        if name not in known:
            raise UsageError(f"--system={spec}: the store has no number {name}, expected one of {', '.join(known)}")
        return lambda shown, numbers: np.nan_to_num(shown.numbers[name].astype(np.float64), nan=_LAST)

    def _scores_of_file(self, spec: str, path: Path) -> Scorer:
        if not path.is_file():
            raise UsageError(f"--system={spec}: no such file")
        judged = isinstance(self._lists, JudgedLists)
        mend = "write one row for each item of each list"
        keys = self._corpus.item_keys if judged else None
        texts, others = (["query"], []) if judged else ([], ["request"])
        (others if keys is None else texts).append("item")
        table = Table(path, texts, [*others, "score"], mend)
        items = item_column(table, "item", keys)[0]
        of_list: Sequence[Any] = table.text("query").to_pylist() if judged else table.ids("request").tolist()
        scores = dict(zip(zip(of_list, items.tolist(), strict=True), table.numbers("score").tolist(), strict=True))
        ids = self._corpus.item_ids

        def score(shown: Shown, numbers: np.ndarray) -> np.ndarray:
            keys = shown.queries if judged else numbers.tolist()
            pairs = [(keys[r], i) for r, i in zip(shown.request.tolist(), ids[shown.item].tolist(), strict=True)]
            missing = [pair for pair in pairs if pair not in scores]
            if missing:
                what = "query" if judged else "request"
                raise CommandError(
                    f"{path}: has no score for {len(missing):,} of {len(pairs):,} items, first {what} "
                    f"{missing[0][0]!r}, item {missing[0][1]}; {mend}"
                )
            return np.array([scores[pair] for pair in pairs])

        return score

    def _retriever(self, spec: str) -> Scorer:
        retriever, ids = self._systems.make(spec), self._corpus.item_ids
        if getattr(retriever, "score", None) is None:
            raise UsageError(f"--system={spec}: cannot score given items, so --rank cannot measure it; leave it out")
        store = self._corpus.need_store(spec)
        user_ids = store.users()["id"]

        def score(shown: Shown, numbers: np.ndarray) -> np.ndarray:
            lengths = np.bincount(shown.request, minlength=len(shown.queries))
            place = np.arange(len(shown.item)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            items = np.full((len(shown.queries), max(1, lengths.max(initial=0))), -1, np.int64)
            items[shown.request, place] = ids[shown.item]
            firsts = np.minimum(np.cumsum(lengths) - lengths, max(0, len(shown.item) - 1))
            users = [
                User(int(user_ids[row]), int(time) or None)
                for row, time in zip(shown.user[firsts].tolist(), shown.time[firsts].tolist(), strict=True)
            ]
            found: np.ndarray = retriever.score(shown.queries, users, items)  # type: ignore[attr-defined]
            return found[shown.request, place].astype(np.float64)

        return score


@dataclasses.dataclass(frozen=True)
class _Scored:
    """The n items of all lists of a fold, with the scores of each system."""

    lists: int
    request: np.ndarray
    gain: np.ndarray
    positive: np.ndarray
    in_validation: np.ndarray  # bool [n], whether the query is in the validation fold
    scores: dict[str, np.ndarray]


def measure_rankings(
    rankers: Mapping[str, Scorer],
    lists: Lists,
    fold: str = "all",
    ks: Sequence[int] = DEFAULT_KS,
    bootstrap: int = 1000,
    seed: int = 1,
    compare: bool = False,
) -> dict[str, Any]:
    """Measures every system on the lists of a fold, one of FOLDS.

    Returns:
        `lists`, `items`: their numbers. `systems`: system -> figure -> number. `intervals`: system -> figure -> [low,
        high]. `counts`: figure -> the number of lists that it is the mean of. `comparisons`, if `compare`: as
        measure_all returns them. `notes`: system -> lines.

    Raises:
        CommandError: the fold has no lists.
    """
    scored = _score(rankers, lists, fold)
    inside = np.ones(len(scored.request), bool) if fold == "all" else scored.in_validation == (fold == FOLDS[0])
    request = scored.request[inside]
    if not len(request):
        raise CommandError(f"{lists.path}: has no list in the fold '{fold}'; give another fold, or hold out more")
    report: dict[str, Any] = {"lists": len(np.unique(request)), "items": len(request)}
    report |= {key: {} for key in ("systems", "intervals", "counts", "notes")}
    per_list: dict[str, dict[str, np.ndarray]] = {}
    calibrations: dict[str, Calibration] = {}
    for spec, score in scored.scores.items():
        figures = _figures(request, scored.gain[inside], scored.positive[inside], score[inside], ks)
        report["notes"][spec] = [f"no {name}: no list has it" for name, values in figures.items() if not len(values)]
        per_list[spec] = {name: values for name, values in figures.items() if len(values)}
        report["counts"] = {name: len(values) for name, values in figures.items()}
        report["systems"][spec] = {name: float(values.mean()) for name, values in per_list[spec].items()}
        report["intervals"][spec] = {
            name: metrics.interval(metrics.bootstrap_means(values[:, None], bootstrap, seed)[:, 0])
            for name, values in (per_list[spec].items() if bootstrap else ())
        }
        calibration = _calibrated(scored, score, inside)
        if calibration is None:
            report["notes"][spec].append(
                "no calibration: it is fitted on the other fold, which needs positive items and others there"
            )
            continue
        calibrations[spec] = calibration
        report["systems"][spec] |= calibration.figures()
        report["intervals"][spec] |= {
            name: metrics.interval(values) for name, values in calibration.samples(bootstrap, seed).items()
        }
    if compare:
        baseline, *others = per_list
        report["comparisons"] = [
            {
                "system": spec,
                "baseline": baseline,
                "figures": _compare(per_list[spec], per_list[baseline], bootstrap, seed)
                | _compare_calibration(calibrations.get(spec), calibrations.get(baseline), bootstrap, seed),
            }
            for spec in others
        ]
    return report


def _score(rankers: Mapping[str, Scorer], lists: Lists, fold: str) -> _Scored:
    """Scores the lists of both folds: the curves of calibration come from the other fold."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("request", "gain", "positive", "in_validation")}
    scores: dict[str, list[np.ndarray]] = {spec: [] for spec in rankers}
    found = 0
    for shown, numbers, gain, positive in lists.batches("all"):
        in_validation = np.array([fold_of(text) == FOLDS[0] for text in shown.queries], bool)
        values = (found + shown.request, gain, positive, in_validation[shown.request])
        for part, value in zip(parts.values(), values, strict=True):
            part.append(value)
        for spec, score in rankers.items():
            # A score that is not a number ranks last.
            scores[spec].append(np.nan_to_num(np.asarray(score(shown, numbers), np.float64), nan=_LAST))
        found += len(shown.queries)
    if not found:
        raise CommandError(f"{lists.path}: has no list; give judgments of items in the store, or hold out more")
    joined = {name: np.concatenate(part) for name, part in parts.items()}
    return _Scored(found, **joined, scores={spec: np.concatenate(part) for spec, part in scores.items()})


def _figures(
    request: np.ndarray, gain: np.ndarray, positive: np.ndarray, score: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    found = {"session_auc": ranking_metrics.session_auc(request, positive, score)}
    found |= {f"ndcg@{k}": ranking_metrics.ndcg(request, gain, score, k) for k in ks}
    return found | {"mrr": ranking_metrics.reciprocal_ranks(request, positive, score)}


def _calibrated(scored: _Scored, score: np.ndarray, inside: np.ndarray) -> Calibration | None:
    """Maps scores to probabilities by a curve that is fitted on the queries of the other fold."""
    probability, base = np.empty(len(score)), np.empty(len(score))
    for of_fold in (scored.in_validation, ~scored.in_validation):
        rows, others = of_fold & inside, ~of_fold
        if not rows.any():
            continue
        if scored.positive[others].all() or not scored.positive[others].any():
            return None
        curve = ranking_metrics.IsotonicCurve.fit(score[others], scored.positive[others])
        probability[rows], base[rows] = curve(score[rows]), scored.positive[others].mean()
    return Calibration.of(scored.request[inside], scored.positive[inside], probability[inside], base[inside])


def _compare(
    system: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray], samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Compares figure by figure, because each is a mean over other lists."""
    found: dict[str, dict[str, Any]] = {}
    for name in system:
        if name in baseline:
            found |= metrics.compare({name: system[name]}, {name: baseline[name]}, samples, seed)
    return found


def _compare_calibration(
    system: Calibration | None, baseline: Calibration | None, samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Returns differences with intervals. The paired tests need means over lists, which these figures are not."""
    if system is None or baseline is None:
        return {}
    ours, theirs = system.samples(samples, seed), baseline.samples(samples, seed)
    return {
        name: {
            "difference": value - baseline.figures()[name],
            "interval": metrics.interval(ours[name] - theirs[name]) if samples else None,
            "p_t_test": None,
            "p_wilcoxon": None,
        }
        for name, value in system.figures().items()
    }
