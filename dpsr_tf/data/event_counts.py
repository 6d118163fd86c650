"""Counts of events as of a moment: impressions, clicks, carts and orders in the days strictly before it.

An event at time t lies in the window of d days before the moment T if T - d * 86,400 <= t < T. So a moment sees neither
its own second nor anything later. docs/ranking.md says which events are counted, and of what.

DuckDB sorts events and moments by entity and time. One pass over the sorted rows then has all counts: an event adds 1
to a window for the moments after it, and takes it away again d days later. The pass needs memory for one batch only.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dpsr_common.packed_file import PackedFileWriter
from dpsr_tf.data.column_files import ColumnFile
from dpsr_tf.data.database import Database, SortedColumns

# The lengths of the windows, in days.
WINDOWS = (1, 7, 30)
# What is counted. A cart is also a click, and an order also a cart, so counts never rise along this list.
EVENTS = ("shown", "click", "cart", "order")
# The shares of a user's past orders that cost at most the price of spend.median and spend.high.
_QUANTILES = (0.5, 0.9)
SPENDING = ("orders", "mean", "median", "high")
SECONDS_OF_DAY = 86_400

# The names of the columns with counts in the database.
COUNT_COLUMNS = [f"c{i}" for i in range(len(WINDOWS) * len(EVENTS))]


def count_names(entity: str) -> list[str]:
    """Returns the names of an entity's counts, in the order of all functions here: by window, then by event."""
    return [f"{entity}.{days}.{event}" for days in WINDOWS for event in EVENTS]


class CountColumns(NamedTuple):
    """The counts of an entity, in the order of count_names, uint32 [rows] each."""

    columns: list[ColumnFile]
    types: list[np.dtype]  # the smallest type that holds each column

    def copy(self, file: PackedFileWriter, entity: str, begin: int = 0, end: int | None = None) -> None:
        """Writes the rows `begin` to `end` of all columns as sections of a packed file."""
        for name, column, dtype in zip(count_names(entity), self.columns, self.types, strict=True):
            column.copy(file, name, begin, end, dtype=dtype)


def sorted_counts(database: Database, rows: int, label: str) -> CountColumns:
    """Returns the table `counts` sorted by `row`, which goes from 0 to `rows` - 1, and drops it."""
    result = database.sorted_columns(COUNT_COLUMNS, "FROM counts", ["row"], label)
    assert result.columns[0].rows == rows, (result.columns[0].rows, rows)
    largest = database.rows(f"SELECT {', '.join(f'coalesce(max({name}), 0)' for name in COUNT_COLUMNS)} FROM counts")
    database.drop("counts")
    return CountColumns(result.columns, [np.dtype(np.min_scalar_type(value)) for value in largest[0]])


def counts_before(database: Database, units: str, rows: int, last: int, label: str) -> CountColumns:
    """Counts the events of an entity before each of many moments.

    Args:
        database: holds the tables of the query.
        units: SQL with the columns `entity` int64, `time` int64, `row` int64 and `event`. Each of its rows is an event
            (a position in EVENTS), a moment (with a `row` of 0 or more), or both at once. A negative entity is no
            entity, and its counts are 0.
        rows: the number of moments. Their `row` goes from 0 to `rows` - 1.
        last: the last moment.
        label: of the progress bar.

    Returns:
        The counts of each moment.
    """
    ends = f"""SELECT entity, time + days * {SECONDS_OF_DAY} AS time, -1 AS row, event, days::UTINYINT AS days
        FROM units, (VALUES {", ".join(f"({days})" for days in WINDOWS)}) AS w(days)
        WHERE event < {len(EVENTS)} AND entity >= 0 AND time + days * {SECONDS_OF_DAY} < {last}"""
    query = f"""WITH units AS ({units})
        SELECT entity, time, row, event, 0::UTINYINT AS days FROM units UNION ALL {ends} ORDER BY entity, time"""
    running = _RunningCounts()
    database.insert("counts", _counts_batch(np.zeros(0, np.int64), np.zeros((0, len(COUNT_COLUMNS)), np.uint32)))
    for batch in database.batches(query, label):
        columns = (batch[name].to_numpy() for name in ("entity", "time", "row", "event", "days"))
        database.insert("counts", _counts_batch(*running.add(*columns)))
    return sorted_counts(database, rows, label)


def counts_at_end(database: Database, units: str, rows: int, end: int, label: str) -> CountColumns:
    """Counts the events of the entities 0 to `rows` - 1 before the moment `end`; `units` as in counts_before."""
    sums = ", ".join(f"coalesce({name}, 0)::UINTEGER AS {name}" for name in COUNT_COLUMNS)
    database.create(
        "counts",
        f"""SELECT range AS row, {sums} FROM range({rows}) LEFT JOIN ({sums_at_end(units, end)}) ON range = entity""",
    )
    return sorted_counts(database, rows, label)


def sums_at_end(units: str, end: int) -> str:
    """Returns SQL for `entity` and its COUNT_COLUMNS before the moment `end`, of entities with any event."""
    sums = (
        f"count(*) FILTER (time >= {end - days * SECONDS_OF_DAY} AND event = {event})::UINTEGER AS "
        f"{COUNT_COLUMNS[len(EVENTS) * place + event]}"
        for place, days in enumerate(WINDOWS)
        for event in range(len(EVENTS))
    )
    return f"""SELECT entity, {", ".join(sums)} FROM ({units})
        WHERE entity >= 0 AND event < {len(EVENTS)} AND time < {end} AND time >= {end - WINDOWS[-1] * SECONDS_OF_DAY}
        GROUP BY entity"""


class _RunningCounts:
    """Counts events along rows that are sorted by entity and time, one batch after another."""

    def __init__(self) -> None:
        self._entity = self._time = -(2**62)
        # Sums over all rows so far, and what they were before the rows of the last entity, and of its last time.
        zeros = np.zeros(len(COUNT_COLUMNS), np.int64)
        self._sums, self._before_entity, self._before_time = zeros, zeros, zeros

    def add(
        self, entity: np.ndarray, time: np.ndarray, row: np.ndarray, event: np.ndarray, days: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Takes the next n rows.

        `days` is 0 for an event or a moment, and the length of the window for the end of an event in it.

        Returns:
            The `row` of each moment among them, int64 [moments], and its counts, uint32 [moments, counts].
        """
        n = len(entity)
        if n == 0:
            return np.zeros(0, np.int64), np.zeros((0, len(COUNT_COLUMNS)), np.uint32)
        change = np.zeros((n, len(COUNT_COLUMNS)), np.int64)
        begins = np.flatnonzero((days == 0) & (event < len(EVENTS)))
        for place, window in enumerate(WINDOWS):
            change[begins, len(EVENTS) * place + event[begins]] = 1
            ends = np.flatnonzero(days == window)
            change[ends, len(EVENTS) * place + event[ends]] = -1
        # sums[i] is the sum before row i.
        sums = np.concatenate([self._sums[None], change]).cumsum(0)
        new_entity = np.concatenate([[self._entity], entity])
        new_time = np.concatenate([[self._time], time])
        entity_begins = new_entity[1:] != new_entity[:-1]
        time_begins = entity_begins | (new_time[1:] != new_time[:-1])
        # Of each row, the first row of its entity, and of its time, in this batch; -1 if that is in an earlier batch.
        first = [np.maximum.accumulate(np.where(b, np.arange(n), -1)) for b in (entity_begins, time_begins)]
        moments = np.flatnonzero((row >= 0) & (days == 0))
        before_entity, before_time = (
            np.where(at[:, None] < 0, carried, sums[np.maximum(at, 0)])
            for at, carried in zip(
                (first[0][moments], first[1][moments]), (self._before_entity, self._before_time), strict=True
            )
        )
        counts = np.where(entity[moments, None] < 0, 0, before_time - before_entity)
        self._before_entity = self._before_entity if first[0][-1] < 0 else sums[first[0][-1]]
        self._before_time = self._before_time if first[1][-1] < 0 else sums[first[1][-1]]
        self._entity, self._time, self._sums = entity[-1], time[-1], sums[-1]
        return row[moments], counts.astype(np.uint32)


def _counts_batch(row: np.ndarray, counts: np.ndarray) -> pa.RecordBatch:
    columns = {name: pa.array(np.ascontiguousarray(counts[:, i])) for i, name in enumerate(COUNT_COLUMNS)}
    return pa.record_batch({"row": pa.array(row, pa.int64())} | columns)


def spending_before(database: Database, orders: str, moments: str, rows: int) -> SortedColumns:
    """Computes what users have spent before each of many moments.

    Args:
        database: holds the tables of the queries.
        orders: SQL with the columns `user_row`, `time` and `price` float64, which is not null.
        moments: SQL with the columns `user_row`, `time` and `row`, which goes from 0 to `rows` - 1.
        rows: the number of moments.

    Returns:
        Columns in the order of SPENDING: the number of orders, uint32 [rows], and the mean, median and 0.9 quantile of
        their prices, float32 [rows], NaN without an order. The quantile q of n prices is the smallest of them that at
        least q n prices do not exceed.
    """
    query = f"""SELECT user_row::BIGINT AS user_row, time::BIGINT AS time, -1 AS row, price FROM ({orders})
        UNION ALL SELECT user_row::BIGINT, time::BIGINT, row, NULL::DOUBLE FROM ({moments})
        ORDER BY user_row, time, row DESC, price"""
    running = _RunningSpending()
    database.insert("spending", _spending_batch(np.zeros(0, np.int64), np.zeros((0, len(SPENDING)))))
    for batch in database.batches(query, "count spending"):
        user, row = batch["user_row"].to_numpy(), batch["row"].to_numpy()
        price = batch["price"].to_numpy(zero_copy_only=False)
        database.insert("spending", _spending_batch(*running.add(user, row, price)))
    result = database.sorted_columns(SPENDING, "FROM spending", ["row"], "sort spending")
    assert result.columns[0].rows == rows, (result.columns[0].rows, rows)
    database.drop("spending")
    return result


def _spending_of(prices: Sequence[float], total: float) -> tuple[float, ...]:
    """Returns the values of SPENDING for ascending prices whose sum is `total`."""
    if not prices:
        return (0.0, math.nan, math.nan, math.nan)
    places = (math.ceil(share * len(prices)) - 1 for share in _QUANTILES)
    return (float(len(prices)), total / len(prices), *(prices[place] for place in places))


class _RunningSpending:
    """Follows the orders of users along rows that are sorted by user and time, moments before orders."""

    def __init__(self) -> None:
        self._user = -1
        self._prices: list[float] = []
        self._total = 0.0
        self._state = _spending_of([], 0)

    def add(self, user: np.ndarray, row: np.ndarray, price: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes the next n rows; `row` is -1 for orders. Returns `row` and values [moments, 4] of the moments."""
        n = len(user)
        before = np.concatenate([[self._user], user])
        begins = before[1:] != before[:-1]
        # States that rows refer to: the one before the batch, that of a user without orders, one after each order.
        states, place = [self._state, _spending_of([], 0)], np.full(n, -1)
        changes = np.flatnonzero((row < 0) | begins)
        for at in changes.tolist():
            if begins[at]:
                self._prices, self._total = [], 0.0
                place[at] = 1
            if row[at] < 0:
                bisect.insort(self._prices, float(price[at]))
                self._total += float(price[at])
                place[at] = len(states)
                states.append(_spending_of(self._prices, self._total))
        latest = np.maximum.accumulate(np.where(place >= 0, np.arange(n), -1))
        of_row = np.where(latest < 0, 0, place[np.maximum(latest, 0)])
        moments = np.flatnonzero(row >= 0)
        if n:
            self._user, self._state = int(user[-1]), states[of_row[-1]]
        return row[moments], np.array(states)[of_row[moments]]


def _spending_batch(row: np.ndarray, values: np.ndarray) -> pa.RecordBatch:
    columns = {
        name: pa.array(np.ascontiguousarray(values[:, i]).astype(np.uint32 if name == "orders" else np.float32))
        for i, name in enumerate(SPENDING)
    }
    return pa.record_batch({"row": pa.array(row, pa.int64())} | columns)
