"""The features of items shown in requests, as a ranker reads them: numbers and codes by name.

`dpsr features` writes them to a file for other rankers. docs/ranking.md lists them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFile
from dpsr_tf.data.column_files import row_splits
from dpsr_tf.data.event_counts import EVENTS, SPENDING, WINDOWS
from dpsr_tf.data.match_features import MatchFeatures
from dpsr_tf.data.store import Store, unpack_strings

# What a number depends on: the item alone, query and user alone, or both.
Kind = Literal["item", "request", "pair"]
# The window whose global rates smooth the rates of all windows.
_GLOBAL_WINDOW = WINDOWS[-1]
# What is derived from the counts of each entity and window, beside the counts themselves.
RATES = ("ctr", "cvr")
# The numbers of a pair that a retrieval model gives (models/ranker_inputs.py). They are not in RankingFeatures.
DPSR_SCORE, LIST_SIMILARITY = "dpsr_score", "list_similarity"
MODEL_NUMBERS = (DPSR_SCORE, LIST_SIMILARITY)
# More than any number of items, so that a query and an item make one number.
_ITEMS = 1 << 32


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

    def take(self, first: int, last: int, rows: np.ndarray | slice) -> Shown:
        """Returns the requests `first` to `last` - 1, whose items are in these rows."""
        arrays = {name: getattr(self, name)[rows] for name in ("user", "time", "item", "position", "outcome")}
        return self._replace(
            queries=self.queries[first:last],
            request=self.request[rows] - first,
            numbers={name: values[rows] for name, values in self.numbers.items()},
            codes={name: values[rows] for name, values in self.codes.items()},
            **arrays,
        )


class RankingFeatures:
    """Makes the features of requests of a store.

    Attributes:
        numbers: the names of the numeric features.
        kinds: the kind of each of them, by name.
        codes: the names of the categorical features.
    """

    def __init__(self, store: Store):
        """Reads the items of a store. Raises CommandError if the store has no requests."""
        if store.schema.ranking is None:
            raise CommandError(
                f"{store.path}: holds no requests; add the section `ranking` to the schema and ingest the log again"
            )
        self._store, self._ranking = store, store.schema.ranking
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
        kinds: dict[str, Kind] = {name: "item" if name.startswith("item.") else "request" for name in self._numbers}
        kinds |= {name: "item" if name in self._match.of_item else "pair" for name in self._match.names}
        for entity in self._entities:
            rates = (f"{entity}.{days}.{what}" for days in WINDOWS for what in (*EVENTS, *RATES))
            kinds |= dict.fromkeys(rates, "pair" if entity == "query_item" else "item")
        if self._ranking.price is not None:
            kinds |= dict.fromkeys((f"spend.{name}" for name in SPENDING), "request")
            kinds["spend.price_ratio"] = "pair"
        self.kinds, self.numbers = kinds, list(kinds)

    @property
    def _entities(self) -> tuple[str, ...]:
        return ("item", "query_item", *self._attributes)

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
        queries = [texts[number] for number in query.tolist()]
        shown = Shown(queries, request, of_request["user"][request], of_request["time"][request],
            file["shown.item"][place], file["shown.position"][place], file["shown.outcome"][place], {}, {}
        )  # fmt: skip
        rows = requests[request]
        numbers = self._match(texts, query[request], shown.item)
        numbers |= self._statistics(
            shown.item,
            lambda entity, name: file[f"stat.{entity}.{name}"][place],
            {event: file[f"all.{_GLOBAL_WINDOW}.{event}"][rows] for event in EVENTS},
        )
        return self._complete(shown, numbers, lambda name: file[f"spend.{name}"][rows])

    def at_end(self, queries: Sequence[str], request: np.ndarray, user: np.ndarray, item: np.ndarray) -> Shown:
        """Returns the features of any n pairs as of the end of the log, as a server knows them.

        Args:
            queries: the query of each request. The log need not have it.
            request: int64 [n]: the request of each pair, a place in `queries`.
            user: int64 [n], row of the user; 0 is the anonymous user.
            item: int64 [n], row of the item.

        Returns:
            The pairs in this order. Time is the second after the last event; position and outcome are 0.
        """
        end = self._end
        zeros, time = np.zeros(len(item), np.uint8), np.full(len(item), end.file["until"][0])
        shown = Shown(list(queries), request, user, time, item, zeros, zeros, {}, {})
        pair = end.pairs(queries, request, item)

        def count(entity: str, name: str) -> np.ndarray:
            values = end.file[f"stat.{entity}.{name}"]
            if entity == "query_item":
                return np.where(pair < 0, 0, values[pair]) if len(values) else np.zeros(len(pair), values.dtype)
            return values[item if entity == "item" else self._attributes[entity][item]]

        numbers = self._match(queries, request, item)
        numbers |= self._statistics(item, count, end.whole)
        return self._complete(shown, numbers, lambda name: end.file[f"spend.{name}"][user])

    def sections(self) -> dict[str, np.ndarray]:
        """Returns what a server needs to compute the numbers of requests and pairs at the end of the log.

        Returns:
            Sections of a file, by name, as export/rank_features/rank_table.h describes them. They lack the numbers of
            items, and those of users that a request brings.
        """
        file, items = self._end.file, self._store.items()
        names = [name for name in self.numbers if name.startswith("query_item.")]
        sections = {name: items[name] for name in items if name.partition(".")[0] in ("id", "id_index", "key")}
        sections |= self._match.sections()
        sections |= {f"query.{part}": file[f"query_text.{part}"] for part in ("splits", "bytes")}
        sections |= {"query_item.splits": file["query_item.splits"], "query_item.values": file["query_item.item"]}
        for section, counts in (
            ("numbers", lambda name: file[f"stat.query_item.{name}"]),
            ("missing", lambda name: np.zeros(1, np.uint32)),
        ):
            values = self._counts_and_rates("query_item", None, counts, self._end.whole)
            sections[f"query_item.{section}"] = np.stack([values[name] for name in names], axis=1).reshape(-1)
        if self._ranking.price is not None:
            spent = np.stack([file[f"spend.{name}"] for name in SPENDING], axis=1).astype(np.float32)
            buyers = np.flatnonzero(file[f"spend.{SPENDING[0]}"])
            ids = self._store.users()["id"][buyers]
            order = np.argsort(ids)
            sections |= {
                "price": self._numbers[f"item.{self._ranking.price}"],
                "user.id": ids[order],
                "user.spending": spent[buyers][order].reshape(-1),
                # The anonymous user has no orders.
                "user.missing": spent[0],
            }
        return sections

    @functools.cached_property
    def _end(self) -> _End:
        return _End(self._store)

    def _complete(self, shown: Shown, numbers: dict[str, np.ndarray], spent: Callable[[str], np.ndarray]) -> Shown:
        """Returns `shown` with numbers and codes; `spent` returns one of SPENDING for each pair, float32 [n]."""
        item, user = shown.item, shown.user
        numbers |= {name: values[item if name.startswith("item.") else user] for name, values in self._numbers.items()}
        if self._ranking.price is not None:
            numbers |= {f"spend.{name}": spent(name) for name in SPENDING}
            numbers["spend.price_ratio"] = numbers[f"item.{self._ranking.price}"] / numbers["spend.mean"]
        codes = {
            name: values[item if name.startswith("item.") else user].astype(np.int32)
            for name, values in self._codes.items()
        }
        return shown._replace(
            numbers={name: numbers[name].astype(np.float32, copy=False) for name in self.numbers}, codes=codes
        )

    def _statistics(
        self,
        item: np.ndarray,
        count: Callable[[str, str], np.ndarray],
        everything: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Returns counts and rates of n pairs.

        Args:
            item: row of the item of each pair.
            count: from an entity and the name of a count ("7.click") to the counts of the pairs.
            everything: the counts of the whole log in the longest window, by EVENTS.
        """
        found: dict[str, np.ndarray] = {}
        for entity in self._entities:
            known = self._attributes[entity][item] > 0 if entity in self._attributes else None
            found |= self._counts_and_rates(entity, known, functools.partial(count, entity), everything)
        return found

    def _counts_and_rates(
        self,
        entity: str,
        known: np.ndarray | None,
        count: Callable[[str], np.ndarray],
        everything: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Returns the counts and rates of an entity by name, float32 [n], NaN where `known` is false."""
        found = {}
        for days in WINDOWS:
            counts = {event: count(f"{days}.{event}") for event in EVENTS}
            for name, value in (counts | self.rates(counts, everything)).items():
                number = value.astype(np.float32)
                found[f"{entity}.{days}.{name}"] = number if known is None else np.where(known, number, np.nan)
        return found

    def rates(self, counts: Mapping[str, np.ndarray], everything: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns smoothed rates, by RATES.

        Args:
            counts: by EVENTS, [n].
            everything: the same for the whole log over the longest window, [n] or [1].
        """
        r = self._ranking
        return {
            "ctr": _smoothed(counts, everything, "click", "shown", r.smoothing_impressions),
            "cvr": _smoothed(counts, everything, "order", "click", r.smoothing_clicks),
        }


class _End:
    """Counts as of the end of the log, and the rows of the pairs that have any."""

    def __init__(self, store: Store):
        file = store.statistics()
        assert file is not None
        self.file = file
        self.whole = {event: file[f"all.{_GLOBAL_WINDOW}.{event}"] for event in EVENTS}
        self._queries = {text: row for row, text in enumerate(unpack_strings(file, "query_text"))}
        # Ascending, because the pairs are sorted by query and item.
        pairs = np.diff(file["query_item.splits"])
        self._keys = np.repeat(np.arange(len(pairs)), pairs) * _ITEMS + file["query_item.item"]

    def pairs(self, queries: Sequence[str], request: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Returns the row of each pair, -1 for a pair without counts."""
        # The log has texts without white space at their ends. Judgments may have it.
        query = np.array([self._queries.get(text.strip(), -1) for text in queries], np.int64)[request]
        wanted = query * _ITEMS + item
        at = np.searchsorted(self._keys, wanted)
        return np.where((query >= 0) & (np.append(self._keys, -1)[at] == wanted), at, -1)


def _smoothed(
    counts: Mapping[str, np.ndarray], everything: Mapping[str, np.ndarray], part: str, whole: str, weight: float
) -> np.ndarray:
    """Returns (part + weight * rate) / (whole + weight), where `rate` is part / whole of everything; 0 for 0 / 0."""
    rate = _ratio(everything[part].astype(np.float64), everything[whole].astype(np.float64))
    return _ratio(counts[part] + weight * rate, counts[whole] + weight)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)


def _texts(file: PackedFile, rows: np.ndarray) -> list[str]:
    splits, data = file["query_text.splits"], file["query_text.bytes"]
    return [data[splits[row] : splits[row + 1]].tobytes().decode() for row in rows.tolist()]
