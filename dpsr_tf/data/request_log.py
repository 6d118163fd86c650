"""Writes what a ranker reads beside the rest of a store: whole requests, counts as of each of them, and numbers.

    requests.dpsr        requests for training, in order of time, with all items shown; or one file per shard
    held_requests.dpsr   requests kept out of training
    statistics.dpsr      the same counts as of the end of the log
    numbers.dpsr         numeric features of items and users

docs/ranking.md says what is counted, and docs/data_format.md describes the layout of the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_tf.data.column_files import RaggedColumnFile, add_splits, string_bytes
from dpsr_tf.data.database import Database, SortedColumns
from dpsr_tf.data.event_counts import (
    COUNT_COLUMNS,
    EVENTS,
    SPENDING,
    CountColumns,
    counts_at_end,
    counts_before,
    sorted_counts,
    spending_before,
    sums_at_end,
)
from dpsr_tf.data.interaction_log import create_with_asked, held_out_conditions, request_key, shard_of_query
from dpsr_tf.data.numbers import NumericFeature
from dpsr_tf.data.schema import EVENT_TYPES, GRADED, Schema
from dpsr_tf.data.store import requests_names
from dpsr_tokenizer import Vocabulary

# The best that came of a shown item, from unclicked on.
OUTCOMES = ("unclicked", "click", "cart", "order")
# The names that columns of encoded rows have in the database.
_RENAMED = {"user": "user_row", "item": "item_row", "position": "shown_at"}
_FIRST_OUTCOME = EVENT_TYPES.index("click") - 1
_BATCH = 1 << 16


@dataclasses.dataclass(frozen=True)
class RequestCounts:
    """What the manifest says about the requests of a store, those for training and those held out together."""

    requests: int
    held_requests: int
    shown: int  # items shown, summed over all requests
    held_shown: int
    clicks: int  # shown items whose best outcome is a click; the same for carts and orders
    carts: int
    orders: int
    requests_without_positive: int  # nothing was clicked
    requests_with_pairs: int  # two items have different outcomes, so that one can be preferred to the other
    without_position: int  # items shown whose position is unknown
    graded_rows: int  # rows with a label, left out of the requests of a log
    ungraded_rows: int  # rows without a label, left out of judged lists


class RequestLog:
    """Takes the encoded interactions into the database, and writes the files of a ranker.

    The methods are called in this order: add for each batch, then write.
    """

    def __init__(self, schema: Schema, database: Database):
        """Begins an empty log; `schema` has the sections `interactions` and `ranking`."""
        assert schema.ranking is not None and schema.interactions is not None
        self._all, self._schema, self._ranking = schema, schema.interactions, schema.ranking
        self._database = database
        self._last_time = self._left_out = 0

    def add(self, rows: pa.RecordBatch) -> None:
        """Adds rows as encode_interactions returns them."""
        if rows.num_rows == 0:
            return
        self._last_time = max(self._last_time, pc.max(rows["time"]).as_py())
        # A row with a label is a grade, given by people or by a program. Requests hold what users did, or only grades.
        used = rows["labelled"] if self._ranking.grades else pc.invert(rows["labelled"])
        self._left_out += rows.num_rows - pc.sum(used).as_py()
        rows = rows.filter(used)
        if self._ranking.grades:
            types = _types_of_grades(rows["label"].to_numpy(), self._ranking.grades)
            rows = rows.set_column(rows.schema.get_field_index("type"), "type", pa.array(types))
        session = ["session"] if self._schema.session else []
        kept = ["query", "user", "item", "time", "type", "position", *session]
        self._database.insert("events", rows.select(kept).rename_columns([_RENAMED.get(name, name) for name in kept]))

    def write(self, out: Path, shards: int, vocabulary: Vocabulary, num_users: int) -> dict[str, Any]:
        """Writes all files into the directory `out`, where items.dpsr and users.dpsr are. Says what the manifest says.

        Args:
            out: the directory of the store.
            shards: the number of files with requests for training.
            vocabulary: of query text.
            num_users: the number of users, with the anonymous one.
        """
        self._shards = shards
        names = requests_names(shards) + (["held_requests.dpsr"] if self._schema.held_out else [])
        self._files = len(names)
        self._group_requests()
        self._describe_items(out)
        numbers = self._write_numbers(out)
        columns = self._request_columns()
        for number, name in enumerate(names):
            kind = "requests" if number < shards else "held_requests"
            with PackedFileWriter(out / name, kind) as file:
                self._write_requests(file, number, columns, vocabulary)
        self._write_statistics(out, num_users)
        counts = self._counts()
        _report(counts, numbers)
        schema = self._schema
        if not (schema.user or schema.session or self._ranking.grades):
            print(
                "requests: the schema names neither `user` nor `session`, so searches of different people are one "
                f"request where they have the same query and follow each other within {schema.session_gap:g} minutes; "
                "give `session`, for example an id of each search"
            )
        return {
            "counts": dataclasses.asdict(counts),
            "until": self._end,
            "numbers": [dataclasses.asdict(feature) | {"knots": list(feature.knots)} for feature in numbers],
        }

    # Requests.

    def _group_requests(self) -> None:
        """Creates the tables `asked_queries`, `asks` (one row per request) and `shown` (one row per item shown)."""
        database, key = self._database, f"{request_key(self._schema)}, asked"
        held_query, held_time = held_out_conditions(self._schema, self._last_time)
        database.create(
            "asked_queries",
            f"""SELECT query AS text, {shard_of_query(self._shards)} AS shard, {held_query} AS held,
                (row_number() OVER (ORDER BY query) - 1)::INTEGER AS query_row
            FROM (SELECT DISTINCT query FROM events)""",
        )
        others = ", ".join(name for name in database.columns("events") if name != "query")
        create_with_asked(
            database,
            "event_rows",
            f"""SELECT query_row, {others}, shard, held OR {held_time} AS held
            FROM events JOIN asked_queries ON query = text""",
            self._schema,
        )
        database.drop("events")
        self._end = 1 + database.scalar("SELECT coalesce(max(time), 0) FROM event_rows")
        # A request with any row that is held out is held out as a whole.
        database.create(
            "asks",
            f"""SELECT {key}, file, (row_number() OVER (ORDER BY file, asked, {key}) - 1)::INTEGER AS request
            FROM (SELECT {key}, CASE WHEN bool_or(held) THEN {self._shards} ELSE any_value(shard) END::INTEGER AS file
                FROM event_rows GROUP BY {key})""",
        )
        # A grade does not say that somebody clicked, so all counts are 0.
        best = ", ".join(
            f"min(time) FILTER (type >= {_FIRST_OUTCOME + place} AND {not self._ranking.grades}) AS {event}_at"
            for place, event in enumerate(EVENTS[1:], 1)
        )
        database.create(
            "shown",
            f"""SELECT *, row_number() OVER (ORDER BY request, shown_at = 0, shown_at, item_row) - 1 AS row
            FROM (SELECT request, item_row, any_value(query_row) AS query_row, any_value(user_row) AS user_row,
                any_value(asked) AS asked, greatest(max(type)::INTEGER - {_FIRST_OUTCOME}, 0)::UTINYINT AS outcome,
                coalesce(min(nullif(shown_at, 0)), 0)::UTINYINT AS shown_at, {best}
                FROM event_rows JOIN asks USING ({key}) GROUP BY request, item_row)""",
        )
        database.drop("event_rows")

    def _counts(self) -> RequestCounts:
        held = f"file = {self._shards}"
        per_request = """SELECT request, count(*) AS n, max(outcome) AS best, min(outcome) AS worst FROM shown
            GROUP BY request"""
        found = self._database.rows(
            f"""SELECT count(*) FILTER (NOT ({held})), count(*) FILTER ({held}),
                coalesce(sum(n) FILTER (NOT ({held})), 0), coalesce(sum(n) FILTER ({held}), 0),
                count(*) FILTER (best = 0), count(*) FILTER (best > worst)
            FROM asks JOIN ({per_request}) USING (request)"""
        )[0]
        outcomes = dict(self._database.rows("SELECT outcome, count(*) FROM shown GROUP BY outcome"))
        requests, held_requests, shown, held_shown, without_positive, with_pairs = map(int, found)
        return RequestCounts(
            requests=requests,
            held_requests=held_requests,
            shown=shown,
            held_shown=held_shown,
            clicks=outcomes.get(OUTCOMES.index("click"), 0),
            carts=outcomes.get(OUTCOMES.index("cart"), 0),
            orders=outcomes.get(OUTCOMES.index("order"), 0),
            requests_without_positive=without_positive,
            requests_with_pairs=with_pairs,
            without_position=self._database.scalar("SELECT count(*) FROM shown WHERE shown_at = 0"),
            graded_rows=0 if self._ranking.grades else self._left_out,
            ungraded_rows=self._left_out if self._ranking.grades else 0,
        )

    # Items and users.

    def _describe_items(self, out: Path) -> None:
        """Creates the table `item_facts`: price, and code of each attribute (-1 is none), by row of the item."""
        items = PackedFile(str(out / "items.dpsr"), "items", verify=False)
        prices = self._numbers("items", self._ranking.price) if self._ranking.price else None
        for begin in range(0, len(items["id"]), _BATCH):
            piece = slice(begin, min(begin + _BATCH, len(items["id"])))
            columns = {"item_row": pa.array(np.arange(piece.start, piece.stop, dtype=np.int32))}
            for i, name in enumerate(self._ranking.attributes):
                codes = items[f"feature.{name}"][piece].astype(np.int64)
                columns[f"a{i}"] = pa.array(np.where(codes == 0, -1, codes))
            if prices is not None:
                price = prices[piece].astype(np.float64)
                columns["price"] = pa.array(price, mask=np.isnan(price))
            self._database.insert("item_facts", pa.record_batch(columns))

    def _numbers(self, table: str, name: str) -> np.ndarray:
        """Returns a numeric feature of "items" or "users", float32 [rows], NaN where there is none."""
        section = self._all.items if table == "items" else self._all.users
        place = next(i for i, feature in enumerate(section.features if section else ()) if feature.key == name)
        parts = [
            batch.column(0).to_numpy(zero_copy_only=False)
            for batch in self._database.batches(f"SELECT f{place} FROM {table} ORDER BY id", f"read {table}")
        ]
        with np.errstate(over="ignore"):
            numbers = np.concatenate([np.zeros(0), *parts]).astype(np.float32)
        # A number that float32 cannot hold is as good as none.
        return np.where(np.isinf(numbers), np.float32(np.nan), numbers)

    def _write_numbers(self, out: Path) -> list[NumericFeature]:
        """Writes numbers.dpsr. Returns how its features are scaled."""
        training = f"FROM shown JOIN asks USING (request) WHERE file < {self._shards}"
        found = []
        with PackedFileWriter(out / "numbers.dpsr", "numbers") as file:
            for table, column in (("items", "item_row"), ("users", "user_row")):
                section = self._all.items if table == "items" else self._all.users
                names = [f.key for f in (section.features if section else ()) if f.kind == "number"]
                if not names:
                    continue
                # A user counts once for each request, an item once for each time it was shown.
                once = "count(DISTINCT request)" if table == "users" else "count(*)"
                seen = self._database.arrays(
                    f"SELECT shown.{column} AS place, {once} AS n {training} GROUP BY shown.{column}"
                )
                for name in names:
                    values = self._numbers(table, name)
                    weights = np.zeros(len(values), np.int64)
                    weights[seen["place"]] = seen["n"]
                    file.add(f"{table.removesuffix('s')}.{name}", values)
                    found.append(NumericFeature.of(table, name, values, weights))
        return found

    # Columns.

    def _units(self, entity: str, row: str = "row") -> str:
        """Returns SQL for all events of an entity, and with `row` for the moment of each item shown."""
        shown = len(EVENTS) if self._ranking.grades else EVENTS.index("shown")
        what = f"{entity}::BIGINT AS entity, asked::BIGINT AS time, {row} AS row, {shown}::UTINYINT AS event"
        events = [
            f"SELECT {entity}, {event}_at, -1, {place} {_JOINED} WHERE {event}_at IS NOT NULL"
            for place, event in enumerate(EVENTS[1:], 1)
        ]
        return " UNION ALL ".join([f"SELECT {what} {_JOINED}", *events])

    def _entities(self) -> dict[str, str]:
        """Returns what is counted for each item shown: its name, and SQL for its number."""
        attributes = {name: f"a{i}" for i, name in enumerate(self._ranking.attributes)}
        return {"item": "item_row", "query_item": _QUERY_ITEM, **attributes}

    def _orders(self) -> str:
        return f"SELECT user_row, order_at AS time, price {_JOINED} WHERE order_at > 0 AND user_row > 0 AND price > 0"

    def _request_columns(self) -> _RequestColumns:
        database = self._database
        requests, shown = database.count("asks"), database.count("shown")
        last = database.scalar("SELECT coalesce(max(asked), 0) FROM asks")
        asks = database.sorted_columns(
            ["query_row", "user_row", "asked"], "FROM asks", ["request"], "sort requests", "file", self._files
        )
        items = database.sorted_columns(
            ["item_row", "shown_at", "outcome"], "FROM shown", ["row"], "sort items shown", "request", requests
        )
        counts = {
            name: counts_before(database, self._units(entity), shown, last, f"count {name}")
            for name, entity in self._entities().items()
        }
        moments = f"SELECT 0, asked, request, {len(EVENTS)} FROM asks"
        everything = f"{self._units('0', '-1')} UNION ALL {moments}"
        counts["all"] = counts_before(database, everything, requests, last, "count all")
        spending = None
        if self._ranking.price:
            asked = "SELECT user_row, asked AS time, request AS row FROM asks"
            spending = spending_before(database, self._orders(), asked, requests)
        return _RequestColumns(asks, items, counts, spending)

    def _write_requests(
        self, file: PackedFileWriter, number: int, all_: _RequestColumns, vocabulary: Vocabulary
    ) -> None:
        """Writes the requests of one file."""
        database, splits = self._database, all_.asks.splits
        begin, end = int(splits[number]), int(splits[number + 1])
        # The queries of this file, in the order of their text.
        of_file = f"FROM asked_queries SEMI JOIN (FROM asks WHERE file = {number}) USING (query_row) ORDER BY query_row"
        rows = database.arrays(f"SELECT query_row {of_file}")["query_row"]
        tokens = RaggedColumnFile(database.folder, np.int32)
        texts = RaggedColumnFile(database.folder, np.uint8)

        def encode(batch: pa.RecordBatch) -> Any:
            return vocabulary.encode_batch(batch["text"]), string_bytes(batch["text"])

        for _, (ids, data) in database.encoded_batches(f"SELECT text {of_file}", "encode queries", len(rows), encode):
            tokens.append(*ids)
            texts.append(*data)
        tokens.copy(file, "query.splits", "query.tokens")
        texts.copy(file, "query_text.splits", "query_text.bytes")
        query, user, asked = all_.asks.columns
        first, last = add_splits(file, "request.splits", all_.items.splits, begin, end)
        query.copy(file, "request.query", begin, end, lambda values: np.searchsorted(rows, values))
        user.copy(file, "request.user", begin, end)
        asked.copy(file, "request.time", begin, end)
        for name, column in zip(("item", "position", "outcome"), all_.items.columns, strict=True):
            column.copy(file, f"shown.{name}", first, last)
        for name, counts in all_.counts.items():
            if name == "all":
                counts.copy(file, "all", begin, end)
            else:
                counts.copy(file, f"stat.{name}", first, last)
        if all_.spending is not None:
            for name, column in zip(SPENDING, all_.spending.columns, strict=True):
                column.copy(file, f"spend.{name}", begin, end)

    def _write_statistics(self, out: Path, num_users: int) -> None:
        """Writes statistics.dpsr."""
        database, end = self._database, self._end
        items = PackedFile(str(out / "items.dpsr"), "items", verify=False)
        rows = {"item": len(items["id"])}
        # Code 0 stands for an unknown value. Its counts are 0.
        rows |= {name: len(items[f"values.{name}.splits"]) for name in self._ranking.attributes}
        entities = self._entities()
        with PackedFileWriter(out / "statistics.dpsr", "statistics") as file:
            file.add("until", np.array([end], np.uint32))
            for name, number in rows.items():
                counts = counts_at_end(database, self._units(entities[name]), number, end, f"count {name}")
                counts.copy(file, f"stat.{name}")
            counts_at_end(database, self._units("0"), 1, end, "count all").copy(file, "all")
            self._write_query_items(file)
            if self._ranking.price:
                moments = f"SELECT range AS user_row, {end} AS time, range AS row FROM range({num_users})"
                spending = spending_before(database, self._orders(), moments, num_users)
                for name, column in zip(SPENDING, spending.columns, strict=True):
                    column.copy(file, f"spend.{name}")

    def _write_query_items(self, file: PackedFileWriter) -> None:
        """Writes the counts of each item under each query, of pairs that were shown in the longest window."""
        database = self._database
        sums = ", ".join(COUNT_COLUMNS)
        database.create(
            "counts",
            f"""SELECT dense_rank() OVER (ORDER BY entity // {_ITEMS}) - 1 AS query,
                (entity // {_ITEMS})::INTEGER AS query_row, (entity % {_ITEMS})::INTEGER AS item_row,
                row_number() OVER (ORDER BY entity) - 1 AS row, {sums}
            FROM ({sums_at_end(self._units(_QUERY_ITEM), self._end)})""",
        )
        queries = "FROM asked_queries SEMI JOIN counts USING (query_row)"
        texts = RaggedColumnFile(database.folder, np.uint8)
        for batch in database.batches(f"SELECT text {queries} ORDER BY query_row", "write queries"):
            texts.append(*string_bytes(batch["text"]))
        texts.copy(file, "query_text.splits", "query_text.bytes")
        pairs = database.sorted_columns(["item_row"], "FROM counts", ["row"], "write pairs", "query", texts.rows)
        file.add("query_item.splits", pairs.splits)
        pairs.columns[0].copy(file, "query_item.item")
        sorted_counts(database, database.count("counts"), "count pairs").copy(file, "stat.query_item")


class _RequestColumns(NamedTuple):
    """The columns of the files of requests, of all files."""

    asks: SortedColumns  # query, user, time; groups are files
    items: SortedColumns  # item, position, outcome; groups are requests
    counts: dict[str, CountColumns]  # per item shown; "all" per request
    spending: SortedColumns | None  # per request


# A query and an item as one number.
_ITEMS = 1 << 32
_QUERY_ITEM = f"query_row::BIGINT * {_ITEMS} + item_row"
_JOINED = "FROM shown JOIN item_facts USING (item_row)"


def _types_of_grades(label: np.ndarray, grades: Mapping[str, float]) -> np.ndarray:
    """Returns the type of event that each label stands for, uint8 [rows]; `label` is float32 [rows]."""
    types = np.full(len(label), EVENT_TYPES.index("impression"), np.uint8)
    for name in GRADED:
        if name in grades:
            types[label >= np.float32(grades[name])] = EVENT_TYPES.index(name)
    return types


def _report(counts: RequestCounts, numbers: list[NumericFeature]) -> None:
    """Prints what the requests hold, and what of them says nothing."""
    c = counts
    print(
        f"requests: {c.requests:,} for training with {c.shown:,} items shown, {c.held_requests:,} held out with "
        f"{c.held_shown:,}; {c.requests_with_pairs:,} have an item that is preferred to another, "
        f"{c.requests_without_positive:,} have no click"
    )
    if c.without_position:
        print(f"requests: {c.without_position:,} items shown have no position, which is 0 for them")
    if c.graded_rows:
        print(f"requests: left out {c.graded_rows:,} rows with a label, which are grades and no events")
    if c.ungraded_rows:
        print(f"requests: left out {c.ungraded_rows:,} rows without a label; the lists have graded items only")
    for feature in numbers:
        if feature.problem:
            print(f"requests: the number {feature.table}.{feature.name} {feature.problem} in requests for training")
