"""Turns items shown in requests (Shown) into the input of a ranker (Lists), as NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from dpsr_common.errors import CommandError
from dpsr_tf.config import RankerConfig
from dpsr_tf.data.column_files import row_splits
from dpsr_tf.data.examples_dataset import Features, Tokens
from dpsr_tf.data.ranking_features import DPSR_SCORE, LIST_SIMILARITY, MODEL_NUMBERS, RankingFeatures, Shown
from dpsr_tf.data.store import Store
from dpsr_tf.data.user_requests import User
from dpsr_tf.models.encoders import features_of, item_embeddings, query_encoder, splits_of, take
from dpsr_tf.models.features import NUMBER_KINDS, FeatureSpec, Lists, Number


class RankerInputs:
    """Reads from a store what a ranker needs beside the numbers of Shown: texts, features, and users' histories.

    A history is what the user did strictly before the request, the last `history_length` events.
    """

    def __init__(self, store: Store, spec: FeatureSpec, history_length: int):
        """`spec` names the features and the numbers."""
        self._spec, self._length, self._vocabulary = spec, history_length, store.vocabulary
        self._items, self._users = store.items(), store.users()
        self._numbers = {kind: [number.name for number in spec.numbers_of(kind)] for kind in NUMBER_KINDS}

    def __call__(self, shown: Shown) -> Lists:
        """Returns the input for some requests, whose items stand together, in the order of `shown`."""
        b, n = len(shown.queries), len(shown.item)
        lengths = np.bincount(shown.request, minlength=b)
        splits = row_splits(lengths)
        if n and (np.diff(shown.request) < 0).any():
            raise ValueError("items of a request must stand together, in the order of requests")
        # The row of a request's first item; a request without items has no user.
        firsts = np.minimum(splits[:-1], max(n - 1, 0))
        user = np.where(lengths > 0, shown.user[firsts], 0) if n else np.zeros(b, np.int64)
        time = np.where(lengths > 0, shown.time[firsts], 0) if n else np.zeros(b, np.int64)
        events, history_splits = self._events(user, time)
        rows, places = np.unique(
            np.concatenate([shown.item, self._users["event.item"][events]]).astype(np.int64), return_inverse=True
        )
        places = places.astype(np.int32)
        return Lists(
            query=Tokens(*self._vocabulary.encode_batch(shown.queries)),
            user=_features(features_of(self._users, self._spec.user, user), b),
            item_text=take(self._items["tokens.values"], self._items["tokens.splits"], rows),
            item_features=_features(features_of(self._items, self._spec.item, rows), len(rows)),
            candidates=Tokens(places[:n], splits),
            history=Tokens(places[n:], history_splits),
            history_types=self._users["event.type"][events].astype(np.int32),
            item_numbers=self._matrix(shown, "item", slice(None), n),
            request_numbers=self._matrix(shown, "request", firsts if n else slice(0), b),
            pair_numbers=self._matrix(shown, "pair", slice(None), n),
        )

    def _events(self, user: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows of events and their row splits."""
        if not self._length:
            return np.zeros(0, np.int64), np.zeros(len(user) + 1, np.int64)
        splits, times = self._users["event.splits"], self._users["event.time"]
        lists = []
        for row, until in zip(user.tolist(), time.tolist(), strict=True):
            begin, end = int(splits[row]), int(splits[row + 1])
            end = begin + int(np.searchsorted(times[begin:end], until, side="left"))
            lists.append(np.arange(max(begin, end - self._length), end))
        return np.concatenate([np.zeros(0, np.int64), *lists]), splits_of(lists)

    def _matrix(self, shown: Shown, kind: str, rows: slice | np.ndarray, length: int) -> np.ndarray:
        names = self._numbers[kind]
        matrix = np.empty((length, len(names)), np.float32)
        for place, name in enumerate(names):
            matrix[:, place] = shown.numbers[name][rows] if name in shown.numbers else np.nan
        return matrix


def model_numbers(ranker: RankerConfig) -> tuple[str, ...]:
    """Returns those of MODEL_NUMBERS that a ranker reads."""
    return MODEL_NUMBERS[: 0 if not ranker.dpsr_model else 1 + ranker.list_similarity]


def choose_numbers(
    features: RankingFeatures, shown: Shown, of_model: Collection[str]
) -> tuple[tuple[Number, ...], list[str]]:
    """Chooses the numbers that tell something, and fits their scales to some items shown.

    Args:
        features: names the numbers and their kinds.
        shown: items of requests for training.
        of_model: those of MODEL_NUMBERS that may be chosen too.

    Returns:
        The numbers, those of `of_model` last, and for each that is left out a text that says why.
    """
    kinds: Mapping[str, str] = features.kinds | dict.fromkeys(of_model, "pair")
    numbers, left_out = [], []
    for name, kind in kinds.items():
        values = shown.numbers[name].astype(np.float64)
        missing = np.isnan(values)
        values = values[np.isfinite(values)]
        if not len(values):
            left_out.append(f"{name} has no value")
            continue
        if values.min() == values.max() and not missing.any():
            left_out.append(f"{name} is always {values[0]:g}")
            continue
        sizes = np.abs(values[values != 0])
        unit = float(np.median(sizes)) if len(sizes) else 1.0
        logs = np.sign(values) * np.log1p(np.abs(values) / unit)
        # A number that is there or not, and otherwise always the same, tells by being there.
        std = float(logs.std())
        std = std if std > 1e-6 else 1.0
        numbers.append(Number(name, kind, unit, float(logs.mean()), std, bool(missing.any())))
    return tuple(numbers), left_out


def check_numbers(features: RankingFeatures, numbers: Sequence[Number], where: str) -> None:
    """Raises CommandError unless the numbers of a model are those of a store."""
    for number in numbers:
        kind = "pair" if number.name in MODEL_NUMBERS else features.kinds.get(number.name)
        if kind != number.kind:
            raise CommandError(
                f"{where}: reads the number {number.name}, which the store does not have; give the store that the "
                f"model was trained on, or one of the same schema"
            )


def _features(found: Features | None, rows: int) -> Features:
    return Features(np.zeros((rows, 0), np.int32), ()) if found is None else found


def scorer_of_config(ranker: RankerConfig, store: Store) -> Callable[[Shown], Shown] | None:
    """Returns dpsr_scorer for a training of a ranker; None if the ranker does not read its numbers."""
    return dpsr_scorer(ranker.dpsr_model, store) if ranker.dpsr_model and ranker.numbers else None


def dpsr_scorer(directory: str, store: Store) -> Callable[[Shown], Shown]:
    """Returns a function that adds MODEL_NUMBERS to items shown. Both come from the embeddings of a retrieval model.

    `dpsr_score` is the product of the embeddings of query and item, the largest over query heads. `list_similarity` is
    the cosine of the embeddings of the item and of all other items of its request together. Most items that retrieval
    finds answer the query, so one that is unlike the others often does not (pseudo relevance feedback).

    Raises:
        CommandError: no model or checkpoint is there, or the model cannot read the store.
    """
    items, encode, ids = item_embeddings(directory, store), query_encoder(directory, store), store.users()["id"]

    def scored(shown: Shown) -> Shown:
        b = len(shown.queries)
        users = [User(-1)] * b
        for request, row in zip(*np.unique(shown.request, return_index=True), strict=True):
            users[request] = User(int(ids[shown.user[row]]), int(shown.time[row]))
        heads = [
            encode(shown.queries[begin : begin + _QUERIES], users[begin : begin + _QUERIES])
            for begin in range(0, b, _QUERIES)
        ]
        of_request, n = np.concatenate(heads), len(shown.item)
        score, similarity = np.empty(n, np.float32), np.empty(n, np.float32)
        pieces = [slice(begin, begin + _PAIRS) for begin in range(0, n, _PAIRS)]
        of_list = np.zeros((b, items.shape[1]), np.float32)
        for piece in pieces:
            np.add.at(of_list, shown.request[piece], items[shown.item[piece]])
        for piece in pieces:
            request, embeddings = shown.request[piece], items[shown.item[piece]]
            score[piece] = np.einsum("nhd,nd->nh", of_request[request], embeddings).max(1)
            similarity[piece] = _cosines(embeddings, of_list[request] - embeddings)
        return shown._replace(numbers=shown.numbers | {DPSR_SCORE: score, LIST_SIMILARITY: similarity})

    return scored


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine of each row of `a` with that of `b`, both [n, d]: float32 [n], NaN where one of them is 0."""
    lengths = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), lengths, out=np.full(len(a), np.nan, np.float32), where=lengths > 0)


# Queries that are embedded at a time, and pairs that are scored at a time.
_QUERIES, _PAIRS = 1024, 8192
