"""The features of items shown in requests, as a ranker reads them: numbers and codes by name.

`dpsr features` writes them to a file for other rankers. docs/ranking.md lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFile
from dpsr_tf.data.column_files import row_splits
from dpsr_tf.data.event_counts import EVENTS, SPENDING, WINDOWS
from dpsr_tf.data.match_features import MatchFeatures
from dpsr_tf.data.store import Store

# The window whose global rates smooth the rates of all windows.
_GLOBAL_WINDOW = WINDOWS[-1]
# What is derived from the counts of each entity and window, beside the counts themselves.
RATES = ("ctr", "cvr")


class Shown(NamedTuple):
    """Items shown in some requests, one request after the other; arrays [n] but for `queries`."""

    queries: list[str]  # one for each request
    request: np.ndarray  # the place of the request among those asked for
    user: np.ndarray  # row of the user
    time: np.ndarray  # when the request began, seconds since 1970
    item: np.ndarray  # row of the item
    position: np.ndarray  # from 1 on, 0 is unknown
    outcome: np.ndarray  # position in OUTCOMES of request_log.py
    numbers: dict[str, np.ndarray]  # float32 by name, NaN where there is none
    codes: dict[str, np.ndarray]  # int32 by name, 0 is unknown


class RankingFeatures:
    """Makes the features of requests of a store.

    Attributes:
        numbers: the names of the numeric features.
        codes: the names of the categorical features.
    """

    def __init__(self, store: Store):
        """Reads the items of a store. Raises CommandError if the store has no requests."""
        if store.schema.ranking is None:
            raise CommandError(
                f"{store.path}: holds no requests; add the section `ranking` to the schema and ingest the log again"
            )
        self._ranking = store.schema.ranking
        numbers = store.numbers()
        assert numbers is not None
        self._numbers = {name: numbers[name] for name in numbers}
        tables = {"item": (store.items(), store.features.items), "user": (store.users(), store.features.users)}
        self._codes = {
            f"{table}.{feature.name}": file[f"feature.{feature.name}"]
            for table, (file, features) in tables.items()
            for feature in features
            if feature.kind == "categorical"
        }
        self._attributes = {name: self._codes[f"item.{name}"] for name in self._ranking.attributes}
        self._match = MatchFeatures(store)
        self.codes = list(self._codes)
        self.numbers = [*self._numbers, *self._match.names]
        for entity in ("item", "query_item", *self._attributes):
            self.numbers += [f"{entity}.{days}.{what}" for days in WINDOWS for what in (*EVENTS, *RATES)]
        if self._ranking.price is not None:
            self.numbers += [*(f"spend.{name}" for name in SPENDING), "spend.price_ratio"]

    def of(self, file: PackedFile, requests: np.ndarray) -> Shown:
        """Returns all items shown in some requests.

        Args:
            file: one of store.requests(), or store.held_requests().
            requests: int64 [requests], rows of its requests.
        """
        splits = file["request.splits"]
        lengths = splits[requests + 1] - splits[requests]
        request = np.repeat(np.arange(len(requests)), lengths)
        place = np.repeat(splits[requests] - row_splits(lengths)[:-1], lengths) + np.arange(len(request))
        of_request = {name: file[f"request.{name}"][requests] for name in ("query", "user", "time")}
        asked, query = np.unique(of_request["query"], return_inverse=True)
        texts = _texts(file, asked)
        item, user = file["shown.item"][place], of_request["user"][request]
        numbers = {name: values[item if name.startswith("item.") else user] for name, values in self._numbers.items()}
        numbers |= self._match(texts, query[request], item)
        numbers |= self._statistics(file, requests[request], place, item)
        if self._ranking.price is not None:
            numbers |= self._spending(file, requests[request], numbers[f"item.{self._ranking.price}"])
        return Shown(
            [texts[number] for number in query.tolist()],
            request,
            user,
            of_request["time"][request],
            item,
            file["shown.position"][place],
            file["shown.outcome"][place],
            {name: numbers[name].astype(np.float32, copy=False) for name in self.numbers},
            {
                name: values[item if name.startswith("item.") else user].astype(np.int32)
                for name, values in self._codes.items()
            },
        )

    def _statistics(
        self, file: PackedFile, request: np.ndarray, place: np.ndarray, item: np.ndarray
    ) -> dict[str, np.ndarray]:
        everything = {event: file[f"all.{_GLOBAL_WINDOW}.{event}"][request] for event in EVENTS}
        found = {}
        for entity in ("item", "query_item", *self._attributes):
            known = self._attributes[entity][item] > 0 if entity in self._attributes else None
            for days in WINDOWS:
                counts = {event: file[f"stat.{entity}.{days}.{event}"][place] for event in EVENTS}
                values = counts | self.rates(counts, everything)
                for name, value in values.items():
                    number = value.astype(np.float32)
                    found[f"{entity}.{days}.{name}"] = number if known is None else np.where(known, number, np.nan)
        return found

    def rates(self, counts: Mapping[str, np.ndarray], everything: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns smoothed rates, by RATES.

        Args:
            counts: by EVENTS, [n].
            everything: the same for the whole log over the longest window, [n].
        """
        r = self._ranking
        return {
            "ctr": _smoothed(counts, everything, "click", "shown", r.smoothing_impressions),
            "cvr": _smoothed(counts, everything, "order", "click", r.smoothing_clicks),
        }

    def _spending(self, file: PackedFile, request: np.ndarray, price: np.ndarray) -> dict[str, np.ndarray]:
        spent = {f"spend.{name}": file[f"spend.{name}"][request] for name in SPENDING}
        return spent | {"spend.price_ratio": price / spent["spend.mean"]}


def _smoothed(
    counts: Mapping[str, np.ndarray], everything: Mapping[str, np.ndarray], part: str, whole: str, weight: float
) -> np.ndarray:
    """Returns (part + weight * rate) / (whole + weight), where `rate` is part / whole of everything; 0 for 0 / 0."""
    rate = _ratio(everything[part].astype(np.float64), everything[whole].astype(np.float64))
    return _ratio(counts[part] + weight * rate, counts[whole] + weight)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _texts(file: PackedFile, rows: np.ndarray) -> list[str]:
    splits, data = file["query_text.splits"], file["query_text.bytes"]
    return [data[splits[row] : splits[row + 1]].tobytes().decode() for row in rows.tolist()]
