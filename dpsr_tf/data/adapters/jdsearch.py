"""JDsearch: searches and histories of users of JD.com, one user per line, and the products that they saw."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpsr_common.errors import CommandError
from dpsr_tf.data.adapters import raw

_PUBLISHER = "JD.com and Renmin University, https://github.com/rucliujn/JDsearch"
_BEHAVIOUR, _PRODUCTS = "user_behavior_data", "product_meta_data"
# The publisher writes the code 24 between the terms of a text.
_TERMS = "\x18"
_NO_QUERY = "-1"
_OUTCOMES = {"0.0": "impression", "1.0": "click", "2.0": "cart", "3.0": "order"}
_EVENTS = {"CLICK": "click", "FLW": "follow", "CART": "cart", "ORD": "order"}
# The lists of a fifth of the users have the latest time: jdsearch_ranker.yaml holds out these only.
_PARTS = 5

_NUMBER, _TEXT = pa.int64(), pa.string()
_ROW = {"query": _TEXT, "user_id": _NUMBER, "item_id": _NUMBER, "type": _TEXT, "time": _NUMBER, "session": _TEXT,
        "weight": pa.float32()}  # fmt: skip
_ITEM = {"item_id": _NUMBER, "name": _TEXT, "brand": _TEXT, "category": _TEXT, "category1": _TEXT,
         "category2": _TEXT, "category3": _TEXT, "category4": _TEXT, "shop": _TEXT}  # fmt: skip


def convert(source: Path, out: Path) -> None:
    """Writes items.parquet, users.parquet and log.parquet.

    Args:
        source: a directory with user_behavior_data.txt and product_meta_data.txt, or with the published samples of
            both, user_behavior_data_sample.txt and product_meta_data_sample.txt.
        out: an existing directory.

    Raises:
        UsageError, CommandError: files are missing or bad.
    """
    sample = "" if (source / f"{_BEHAVIOUR}.txt").is_file() else "_sample"
    if not (source / f"{_BEHAVIOUR}{sample}.txt").is_file():
        sample = ""
    behaviour, products = raw.require(source, [f"{_BEHAVIOUR}{sample}.txt", f"{_PRODUCTS}{sample}.txt"], _PUBLISHER)
    users = 0
    seen = _Ids()

    def log() -> Iterator[tuple[str, int, int, str, int, str, float]]:
        nonlocal users
        for number, line in raw.lines(behaviour):
            if number == 1 and line.startswith("query\t"):
                continue
            users += 1
            for row in _rows(line, users, f"{behaviour}: line {number}"):
                seen.add(row[2])
                yield row

    def items() -> Iterator[tuple[Any, ...]]:
        known = _Ids()
        for number, line in raw.lines(products):
            if number == 1 and line.startswith("wid\t"):
                continue
            item = _item(line, f"{products}: line {number}")
            known.add(item[0])
            yield item
        # Some products that users saw have no metadata. They stay in the lists, without a text.
        nothing = [None] * (len(_ITEM) - 1)
        yield from ((item, *nothing) for item in np.setdiff1d(seen.unique(), known.unique()).tolist())

    raw.write(out / "log.parquet", _ROW, log())
    raw.write(out / "users.parquet", {"user_id": _NUMBER}, ([user] for user in range(1, users + 1)))
    raw.write(out / "items.parquet", _ITEM, items())


class _Ids:
    """A set of ids that takes 8 bytes for each."""

    def __init__(self) -> None:
        self._ids, self._size = array("q"), 1 << 20

    def add(self, id_: int) -> None:
        self._ids.append(id_)
        if len(self._ids) > 2 * self._size:
            self._ids = array("q", self.unique().tobytes())
            self._size = max(self._size, len(self._ids))

    def unique(self) -> np.ndarray:
        """Returns the ids, int64, ascending."""
        return np.unique(np.frombuffer(self._ids, np.int64)) if self._ids else np.zeros(0, np.int64)


def _rows(line: str, user: int, where: str) -> Iterator[tuple[str, int, int, str, int, str, float]]:
    """Yields the history of a user, and then the candidates of the test query."""
    fields = line.split("\t")
    if len(fields) != 7:
        raise CommandError(f"{where} has {len(fields)} fields, expected 7 with tabs between them")
    query, *lists = fields
    candidates, labels, queries, items, events, pauses = (field.split("_") if field else [] for field in lists)
    if len(candidates) != len(labels) or not len(queries) == len(items) == len(events) == len(pauses) - 1:
        raise CommandError(
            f"{where} has {len(candidates)} candidates with {len(labels)} labels, and a history of {len(queries)} "
            f"queries, {len(items)} products, {len(events)} types and {len(pauses)} times; expected equal numbers, and "
            f"one time more"
        )
    try:
        # The log has only the seconds between events. The last of them is the test query.
        asked = raw.HELD_OUT_FROM + user % _PARTS
        times = np.array([int(pause) for pause in pauses])
        past = np.minimum(asked - (times.sum() - times.cumsum())[:-1], raw.HELD_OUT_FROM - 1)
        for words, item, event, time in zip(queries, items, events, past.tolist(), strict=True):
            # What was done without a query belongs to the history, and is nothing to learn an answer from.
            yield _text(words), user, int(item), _EVENTS[event], time, "", float(words != _NO_QUERY)
        for item, label in zip(candidates, labels, strict=True):
            yield _text(query), user, int(item), _OUTCOMES[label], asked, "test", 1.0
    except (ValueError, KeyError) as error:
        raise CommandError(
            f"{where} is not as published ({error}): expected whole numbers, the labels {', '.join(_OUTCOMES)} and the "
            f"types {', '.join(_EVENTS)}"
        ) from None


def _item(line: str, where: str) -> tuple[Any, ...]:
    fields = line.split("\t")
    if len(fields) != 13:
        raise CommandError(f"{where} has {len(fields)} fields, expected 13 with tabs between them")
    item, name, _, brand, *categories, shop = fields
    try:
        number = int(item)
    except ValueError:
        raise CommandError(f"{where} begins with {item!r}, expected the id of a product, a whole number") from None
    return number, _text(name), _text(brand), _text(_TERMS.join(categories[1::2])), *categories[::2], shop


def _text(terms: str) -> str:
    return terms.replace(_TERMS, " ")
