"""Coarse ranking: one list of the lists of several sources, by ranks or by a learned score, and a cut-off.

By ranks: reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009). An item's score is the sum over the
sources of weight / (60 + rank). It needs no training, and its scores mean nothing beyond their order.

Learned: the probability that an item is relevant, by logistic regression on two numbers for each source s:

    scaled_s   0 to 1: the item's score between that of the source's last and first item; 0 if s did not find it
    score_s    the score itself; if s did not find the item, what it has at most: the last score of a full list, else 0

    probability = sigmoid(bias + sum over s of (scaled_weight_s * scaled_s + score_weight_s * score_s))

The scaled score says how good an item is among those of this query, the score itself how good the query's items are at
all. So a query that no item fits has low probabilities throughout.

The cut-off has two thresholds, which are learned, too. Items below the one are left out: it is the largest probability
that keeps a given share of the relevant items. If even the first item is below the other, nothing is left: it is the
largest probability that keeps the same share of the queries that have a relevant item.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import itertools
import json
import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.files import write_text
from dpsr_serving.gateway.catalogue import Catalogue
from dpsr_serving.gateway.found import Found

FORMAT, FORMAT_VERSION = "dpsr-fusion", 1
RANK_CONSTANT = 60
# Strength of the prior that draws weights to 0, in pairs. It matters for tens of judged queries, not for hundreds.
_RIDGE = 10.0
_FOLDS = 5
# Items that are not relevant, of each query, from which is learned: a sample that stands for all of them.
_SAMPLE = 100
_MAKE_AGAIN = "make it with `dpsr search --learn`"


class Combined:
    """The united list, best first.

    Attributes:
        ids: int64 [m].
        scores: float32 [m], descending.
        cut_off: number of items that were left out because their score was too low.
    """

    def __init__(self, union: _Union, order: NDArray[np.int64], scores: NDArray[np.float32], cut_off: int) -> None:
        """Takes the places of the items in the union of the sources, best first, and their scores."""
        self.ids: NDArray[np.int64] = union.ids[order]
        self.scores, self.cut_off = scores, cut_off
        self._union, self._order = union, order

    # Few requests ask for ranks and scores by source, so they are only computed then.

    @functools.cached_property
    def ranks(self) -> Mapping[str, NDArray[np.int32]]:
        """Source -> int32 [m], the rank of each item in it, from 1; 0 if it did not find the item."""
        found = {}
        for name, places in self._union.places.items():
            ranks = np.zeros(len(self._union.ids), np.int32)
            ranks[places] = np.arange(1, len(places) + 1)
            found[name] = ranks[self._order]
        return found

    @functools.cached_property
    def source_scores(self) -> Mapping[str, NDArray[np.float32]]:
        """Source -> float32 [m], NaN if it did not find the item."""
        found = {}
        for name, places in self._union.places.items():
            scores = np.full(len(self._union.ids), np.nan, np.float32)
            scores[places] = self._union.found[name].scores
            found[name] = scores[self._order]
        return found

    def masks(self, bits: Mapping[str, int]) -> NDArray[np.uint16]:
        """Returns uint16 [m], the sum of the bits of the sources that found each item. `bits`: source -> its bit."""
        return self._union.sums(bits)[self._order].astype(np.uint16)


@dataclasses.dataclass(frozen=True)
class SourceWeights:
    """What a learned fusion knows of a source.

    Attributes:
        scaled: weight of the scaled score.
        score: weight of the score itself.
        depth: number of items that the source was asked for.
    """

    scaled: float
    score: float
    depth: int


class RankFusion:
    """Reciprocal rank fusion with a weight for each source."""

    def __init__(self, weights: Mapping[str, float] | None = None, min_score: float | None = None) -> None:
        """Takes source -> weight, 1 for those that are left out, and the lowest score that stays in the list."""
        self._weights, self._min_score = dict(weights or {}), min_score

    def combine(self, found: Mapping[str, Found], size: int) -> Combined:
        """Returns the best `size` items of all sources. A source that failed is left out of `found`."""
        union = _Union(found)
        denominators = RANK_CONSTANT + np.arange(1, max(map(len, found.values()), default=0) + 1)
        shares = {name: self._weights.get(name, 1.0) / denominators[: len(one)] for name, one in found.items()}
        return union.best(union.sums(shares), size, self._min_score)


@dataclasses.dataclass(frozen=True)
class LearnedFusion:
    """Logistic regression on the scores of the sources; see the top of this file.

    Attributes:
        sources: name -> weights.
        bias: of the logistic regression.
        min_score: the lowest probability of an item that stays in the list.
        min_best: the lowest probability of a first item whose list stays.
        learned: how it was learned: numbers of queries and pairs, and what the cut-off does.
    """

    sources: Mapping[str, SourceWeights]
    bias: float
    min_score: float = 0.0
    min_best: float = 0.0
    learned: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def combine(self, found: Mapping[str, Found], size: int) -> Combined:
        """Returns the best `size` items of all sources. A source that failed is left out of `found`."""
        union = _Union(found)
        logits = np.full(len(union.ids), self.bias)
        for name, weights in self.sources.items():
            if name in found:
                scaled, score = union.numbers(name, weights.depth)
                logits += weights.scaled * scaled + weights.score * score
        scores = _sigmoid(logits)
        stays = np.float32(scores.max(initial=0.0)) >= np.float32(self.min_best)
        return union.best(scores, size, self.min_score if stays else math.inf)

    def check_sources(self, depths: Mapping[str, int], where: str) -> None:
        """Raises CommandError, which begins with `where`, unless a pipeline has the sources that it was learned from.

        `depths`: source -> the k that the pipeline asks it for.
        """
        if set(depths) != set(self.sources):
            raise CommandError(
                f"{where}: was learned from the sources {', '.join(sorted(self.sources))}, but the pipeline has "
                f"{', '.join(sorted(depths))}; {_MAKE_AGAIN} for this pipeline"
            )
        for name, weights in self.sources.items():
            if depths[name] < weights.depth:
                raise CommandError(
                    f"{where}: was learned from {weights.depth} items of {name}, but the pipeline asks for "
                    f"k={depths[name]}; set k to {weights.depth} or more, or {_MAKE_AGAIN} for this pipeline"
                )

    @classmethod
    def read(cls, path: Path) -> LearnedFusion:
        """Reads fusion.json. Raises CommandError if it is missing, damaged or of another version."""
        try:
            tree = json.loads(path.read_text("utf-8"))
            if not isinstance(tree, dict) or (tree.get("format"), tree.get("version")) != (FORMAT, FORMAT_VERSION):
                raise CommandError(f"{path}: is not of {FORMAT} version {FORMAT_VERSION}; {_MAKE_AGAIN}")
            sources = {
                name: SourceWeights(float(entry["scaled"]), float(entry["score"]), int(entry["depth"]))
                for name, entry in tree["sources"].items()
            }
            fusion = cls(
                sources, float(tree["bias"]), float(tree["min_score"]), float(tree["min_best"]), dict(tree["learned"])
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommandError(f"{path}: cannot be read: {error}; {_MAKE_AGAIN}") from None
        values = [
            fusion.bias,
            fusion.min_score,
            fusion.min_best,
            *(v for w in sources.values() for v in (w.scaled, w.score)),
        ]
        if not all(map(math.isfinite, values)):
            raise CommandError(f"{path}: holds a number that is not finite; {_MAKE_AGAIN}")
        return fusion

    def write(self, path: Path) -> None:
        """Writes fusion.json, whole or not at all. Raises CommandError if it cannot be written."""
        tree = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        try:
            write_text(path, json.dumps(tree, indent=2) + "\n")
        except OSError as error:
            raise CommandError(f"{path}: cannot be written: {error.strerror}") from None


class _Union:
    """The items of all sources.

    Attributes:
        found: what each source found.
        ids: int64 [m], ascending.
        places: source -> the place in `ids` of each item that it found, in its order.
    """

    def __init__(self, found: Mapping[str, Found]) -> None:
        self.found = found
        lists = [one.ids for one in found.values()]
        united = np.concatenate(lists) if lists else np.zeros(0, np.int64)
        # As np.unique does, which takes twice as long for some hundred items.
        order = united.argsort(kind="stable")
        ascending = united[order]
        is_new = np.ones(len(united), bool)
        np.not_equal(ascending[1:], ascending[:-1], out=is_new[1:])
        self.ids = ascending[is_new]
        self._places = np.empty(len(united), np.int64)
        self._places[order] = is_new.cumsum() - 1
        ends = itertools.accumulate(map(len, lists))
        self.places = {
            name: self._places[end - len(ids) : end] for name, ids, end in zip(found, lists, ends, strict=True)
        }

    def sums(self, shares: Mapping[str, float | NDArray[np.float64]]) -> NDArray[np.float64]:
        """Returns the sum over the sources of each item's share, float64 [m].

        `shares`: source -> the shares of the items that it found, in its order, or one number for all of them.
        """
        weights = np.empty(len(self._places))
        begin = 0
        for name, places in self.places.items():
            weights[begin : begin + len(places)] = shares[name]
            begin += len(places)
        return np.bincount(self._places, weights, len(self.ids)).astype(np.float64, copy=False)

    def numbers(self, name: str, depth: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns the scaled score and the score of each item in a source, float64 [m] each.

        Only the first `depth` items count, so that a pipeline that asks for more scales them alike. An item whose score
        is NaN counts as not found.
        """
        places, scores = self.places[name][:depth], self.found[name].scores[:depth].astype(np.float64)
        is_full = len(places) == depth
        is_number = ~np.isnan(scores)
        places, scores = places[is_number], scores[is_number]
        scaled = np.zeros(len(self.ids))
        if not len(places):
            return scaled, np.zeros(len(self.ids))
        high, low = scores[0], scores[-1]
        scaled[places] = (scores - low) / (high - low) if high > low else 1.0
        score = np.full(len(self.ids), low if is_full else 0.0)
        score[places] = scores
        return scaled, score

    def best(self, scores: NDArray[np.float64], size: int, min_score: float | None) -> Combined:
        """Returns the best items in order: descending scores, equal ones by ascending id."""
        # Scores are compared as they are returned, so that sums of the same numbers in another order tie.
        single = scores.astype(np.float32)
        order = np.argsort(-single, kind="stable")
        cut_off = 0
        if min_score is not None:
            kept = int(np.count_nonzero(single >= np.float32(min_score)))
            order, cut_off = order[:kept], len(order) - kept
        order = order[:size]
        return Combined(self, order, single[order], cut_off)


# Learning.


def learn(
    lists: Sequence[Mapping[str, Found]],
    relevant: Sequence[Collection[int]],
    depths: Mapping[str, int],
    keep: float = 0.99,
) -> LearnedFusion:
    """Learns a fusion from judged queries. The same input gives the same numbers.

    An item without a judgment counts as not relevant. Every query has the same weight. Queries without a relevant item
    teach what nothing fits.

    Args:
        lists: of each query, what each source found.
        relevant: of each query, the ids of its relevant items; may be empty.
        depths: source -> number of items that it was asked for.
        keep: share that the cut-off is to keep, above 0 to 1, of the relevant items found and of the queries that have
            one. 1 cuts nothing off.

    Returns:
        The fusion. Its `learned` has `queries`, `pairs`, `relevant` (pairs), `keep`, and what the cut-off does on
        queries that had no part in learning it (5 folds): `kept`, the share of relevant items that stay; `length`, the
        mean number of items that stay; `emptied`, the share of the queries with a relevant item found of which nothing
        stays; `emptied_others`, that share of the other queries, None if there are none.

    Raises:
        CommandError: fewer than 10 queries have a relevant item that a source found.
    """
    names = list(depths)
    rows = []
    for found, wanted in zip(lists, relevant, strict=True):
        union = _Union({name: found.get(name, Found.nothing()) for name in names})
        numbers = [column for name in names for column in union.numbers(name, depths[name])]
        rows.append((np.stack(numbers, axis=1), np.isin(union.ids, list(wanted))))
    has_relevant = np.array([bool(labels.any()) for _, labels in rows])
    if has_relevant.sum() < 10:
        raise CommandError(
            f"{int(has_relevant.sum())} queries have a relevant item that a source finds, expected at least 10; give "
            f"more judgments"
        )
    # Folds have the same number of queries with a relevant item, and of others.
    fold = np.empty(len(rows), np.int64)
    for kind in (True, False):
        of_kind = np.flatnonzero(has_relevant == kind)
        fold[of_kind] = np.random.default_rng(1).permutation(len(of_kind)) % _FOLDS
    held_out: list[NDArray[np.float64]] = [np.zeros(0)] * len(rows)
    for number in range(_FOLDS):
        weights = _logistic_regression([row for row, of in zip(rows, fold, strict=True) if of != number])
        for query in np.flatnonzero(fold == number):
            held_out[query] = _probabilities(weights, rows[query][0])
    labels = np.concatenate([labels for _, labels in rows])
    best = np.array([scores.max(initial=0.0) for scores in held_out])
    min_score = _threshold(np.concatenate(held_out)[labels], keep)
    min_best = _threshold(best[has_relevant], keep)
    stays = [scores >= (min_score if top >= min_best else math.inf) for scores, top in zip(held_out, best, strict=True)]
    emptied = np.array([not kept.any() for kept in stays])
    weights = _logistic_regression(rows)
    learned = {
        "queries": len(rows),
        "pairs": len(labels),
        "relevant": int(labels.sum()),
        "keep": keep,
        "kept": float(np.concatenate(stays)[labels].mean()),
        "length": float(np.mean([kept.sum() for kept in stays])),
        "emptied": float(emptied[has_relevant].mean()),
        "emptied_others": float(emptied[~has_relevant].mean()) if not has_relevant.all() else None,
    }
    sources = {
        name: SourceWeights(float(weights[1 + 2 * i]), float(weights[2 + 2 * i]), depths[name])
        for i, name in enumerate(names)
    }
    return LearnedFusion(sources, float(weights[0]), min_score, min_best, learned)


def _threshold(probabilities: NDArray[np.float64], keep: float) -> float:
    """Returns the largest threshold that keeps a share of these probabilities."""
    if keep >= 1:
        return 0.0
    dropped = int((1 - keep) * len(probabilities))
    return float(np.sort(probabilities)[dropped])


def _logistic_regression(rows: Sequence[tuple[NDArray[np.float64], NDArray[np.bool_]]]) -> NDArray[np.float64]:
    """Fits a logistic regression by Newton's method, in which every query has the same weight.

    Of the items that are not relevant a sample is used, whose weight stands for all of them.

    Args:
        rows: of each query, numbers [items, n] and labels [items].

    Returns:
        [1 + n]: the bias, and a weight for each number.
    """
    rng = np.random.default_rng(1)
    parts = []
    for values, relevant in rows:
        others = np.flatnonzero(~relevant)
        drawn = rng.choice(others, min(len(others), _SAMPLE), replace=False)
        chosen = np.concatenate([np.flatnonzero(relevant), drawn])
        weight = np.where(relevant[chosen], 1.0, len(others) / max(1, len(drawn))) / max(1, len(relevant))
        parts.append((values[chosen], relevant[chosen], weight))
    numbers, labels, weights = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    weights *= sum(len(relevant) for _, relevant in rows) / weights.sum()
    mean = np.average(numbers, axis=0, weights=weights)
    deviation = np.sqrt(np.average((numbers - mean) ** 2, axis=0, weights=weights))
    deviation = np.where(deviation > 1e-9, deviation, 1.0)  # a number that never varies has no weight anyway
    inputs = np.concatenate([np.ones((len(numbers), 1)), (numbers - mean) / deviation], axis=1)
    ridge = np.diag([1e-6, *[_RIDGE] * numbers.shape[1]])
    found = np.zeros(inputs.shape[1])
    for _ in range(50):
        chance = _sigmoid(inputs @ found)
        gradient = inputs.T @ (weights * (chance - labels)) + ridge @ found
        curvature = (inputs * (weights * chance * (1 - chance))[:, np.newaxis]).T @ inputs + ridge
        step = np.linalg.solve(curvature, gradient)
        # Steps are bounded, because Newton's method may leap away from where one label is rare.
        found -= step * min(1.0, 4.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    slopes = found[1:] / deviation
    return np.concatenate([[found[0] - slopes @ mean], slopes])


def _probabilities(weights: NDArray[np.float64], numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    return _sigmoid(weights[0] + numbers @ weights[1:])


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.clip(logits, -60, 60)))


class _Tsv(csv.excel_tab):
    """Fields between tabs, where quotes are ordinary characters."""

    quoting = csv.QUOTE_NONE


def read_judgments(
    path: Path,
    catalogue: Catalogue,
    columns: tuple[str, str, str] = ("query", "item", "grade"),
    relevant_from: float = 1,
) -> dict[str, set[int]]:
    """Reads a table of judged pairs (TSV, or CSV by its name; also .gz).

    Args:
        path: the table, with a header.
        catalogue: the items; those that it does not have are left out.
        columns: query, item (the key, or the id where the shop's ids are numbers) and grade.
        relevant_from: lowest grade that is relevant.

    Returns:
        Query -> ids of its relevant items, also for queries without one.

    Raises:
        UsageError: there is no such file.
        CommandError: it cannot be read, lacks a column, or a grade is not a number.
    """
    if not path.is_file():
        raise UsageError(f"--learn={path}: no such file; give a table of judged pairs")
    find = _item_finder(catalogue)
    found: dict[str, set[int]] = {}
    opened: Any = gzip.open if path.suffix == ".gz" else open
    comma = path.name.removesuffix(".gz").endswith(".csv")
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, dialect="excel" if comma else _Tsv)
            given = reader.fieldnames or ()
            missing = [name for name in columns if name not in given]
            if missing:
                raise CommandError(f"{path}: has no column {missing[0]}; its columns are {', '.join(given)}")
            for line in reader:
                query, item, grade = (line[name] for name in columns)
                wanted = found.setdefault(query.strip(), set())
                row = find(item)
                if float(grade) >= relevant_from and row is not None:
                    wanted.add(row)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"{path}: cannot be read: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CommandError(f"{path}: has a row that is not query, item and grade: {error}") from None
    return found


def _item_finder(catalogue: Catalogue) -> Callable[[str], int | None]:
    """Returns a function from the id or key of an item, as a table has it, to its id; None if it is unknown."""
    if catalogue.has_keys:
        ids = {catalogue.key(row): int(catalogue.ids[row]) for row in range(catalogue.num_items)}
        return ids.get

    def find(text: str) -> int | None:
        number = int(text)
        return number if -(2**63) <= number < 2**63 and catalogue.rows([number])[0] >= 0 else None

    return find
