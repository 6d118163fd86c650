"""The interactions of a store: queries, positive pairs, impressions, negatives, user events and held-out pairs."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFileWriter
from dpsr_tf.data.column_files import RaggedColumnFile, add_splits, string_bytes
from dpsr_tf.data.database import Database, SortedColumns
from dpsr_tf.data.encode import NEGATIVE, POSITIVE
from dpsr_tf.data.feature_table import BYTE_VALUES
from dpsr_tf.data.schema import EVENT_TYPES, InteractionsSchema
from dpsr_tf.data.store import interactions_names
from dpsr_tokenizer import Vocabulary

_UNCLICKED = tuple(EVENT_TYPES.index(name) for name in ("impression", "skip"))
_WEIGHT_UNITS = 1 << 20
# The sections of the users' events and their columns in the database, and the columns by which events are sorted.
EVENT_SECTIONS = {"event.time": "time", "event.item": "item_row", "event.query": "query_row", "event.type": "type"}
EVENT_ORDER = ("user_row", "time", "query_row", "item_row", "type")
_ITEM_CLICKS = f"SELECT item_row, count(*) AS n FROM pairs WHERE role = {POSITIVE} AND NOT held GROUP BY item_row"
# The tables that `save` writes.
_SAVED = ("queries", "pairs")
# Columns whose names are keywords or functions of SQL have other names in the database.
_SQL_NAMES = {"user": "user_row", "item": "item_row", "position": "shown_at"}


class InteractionLog:
    """Takes the encoded interactions into the database and writes them to the files of a store.

    The methods are called in this order: add, number_queries, then the others.

    Attributes:
        last_time: the time of the last row of the whole log.
    """

    def __init__(self, schema: InteractionsSchema | None, database: Database, is_shard: bool = False):
        """Begins an empty log.

        Args:
            schema: describes the interactions. Without a schema the log stays empty: the store gets items only.
            database: takes the rows.
            is_shard: whether the log gets the rows of one shard only, and so perhaps no positive pair. Its queries are
                then numbered within the shard.
        """
        self._may_be_empty = schema is None or is_shard
        self._schema = schema = schema or InteractionsSchema(files=(), query="", item="")
        self._database = database
        self.last_time = 0
        self._has_weights = _has_weights(schema)
        self._has_requests = _has_requests(schema)
        if schema.type is not None and not self._has_requests and not is_shard:
            print(
                "interactions: the schema names neither `time` nor `session`, so unclicked impressions are not used: "
                "nothing tells which of them belong to one request",
                flush=True,
            )
        self._mines = self._has_requests and schema.mined_negatives > 0
        self._optional = _optional_columns(schema)

    def add(self, rows: pa.RecordBatch) -> None:
        """Adds rows as encode_interactions returns them. Rows that no file of the store needs are dropped."""
        if rows.num_rows == 0:
            return
        self.last_time = max(self.last_time, pc.max(rows["time"]).as_py())
        self.add_used(used_rows(rows, self._schema))

    def add_used(self, rows: pa.RecordBatch) -> None:
        """Adds rows as used_rows returns them."""
        self._database.insert("log", rows)

    # Queries.

    def number_queries(self, shards: int) -> None:
        """Creates the table `queries`, with text, shard and row of each query, and the table `pairs`.

        `pairs` is the log with the row of the query in place of its text, and with `asked`, the time at which the
        request of the row began.

        Raises:
            CommandError: no interaction is a positive pair for training.
        """
        if "log" not in self._database:
            if not self._may_be_empty:
                raise no_positive_pairs(self._schema)
            self._create_empty_log()
        held_query, held_time = held_out_conditions(self._schema, self.last_time)
        self._database.create(
            "queries",
            f"""SELECT text, shard, held, training AND NOT held AS training,
                (row_number() OVER (ORDER BY shard, text) - 1)::INTEGER AS query_row
            FROM (SELECT query AS text, {shard_of_query(shards)} AS shard, {held_query} AS held,
                bool_or(NOT {held_time}) AS training FROM log WHERE role <> 0 GROUP BY query)""",
        )
        others = [name for name in self._database.columns("log") if name != "query"]
        create_with_asked(
            self._database,
            "pairs",
            f"""SELECT query_row, {", ".join(others)}, held OR {held_time} AS held
            FROM log JOIN queries ON query = text""",
            self._schema,
        )
        self._database.drop("log")
        self._check_positives()

    def _create_empty_log(self) -> None:
        self._database.create(
            "log",
            """SELECT '' AS query, 0::INTEGER AS user_row, 0::INTEGER AS item_row, 0::UINTEGER AS time,
                0::UTINYINT AS type, 0::UTINYINT AS role LIMIT 0""",
        )

    def _request_key(self) -> str:
        return request_key(self._schema)

    def _overrule_clicks(self) -> None:
        """Removes clicks on items that a label calls negative for the query, if no other label calls them positive."""
        if not self._schema.label or self._schema.negative_to is None:
            return
        self._database.create(
            "overruled",
            f"""SELECT query_row, item_row, bool_and(held) AS held FROM pairs WHERE labelled AND role <> 0
                GROUP BY query_row, item_row HAVING bool_and(role = {NEGATIVE})""",
        )
        # What was held out must not change what training reads.
        self._database.execute(
            f"""DELETE FROM pairs USING overruled WHERE role = {POSITIVE} AND NOT labelled
                AND pairs.query_row = overruled.query_row AND pairs.item_row = overruled.item_row
                AND (pairs.held OR NOT overruled.held)"""
        )
        self._database.drop("overruled")

    def _check_positives(self) -> None:
        if not self._may_be_empty and not self.count_positives():
            raise no_positive_pairs(self._schema)

    def count_positives(self) -> int:
        """Returns the number of positive pairs for training."""
        return self._database.scalar(f"SELECT count(*) FROM pairs WHERE role = {POSITIVE} AND NOT held")

    # Files.

    def item_clicks(self, num_items: int) -> np.ndarray:
        """Counts the positive pairs of each item that are not held out, float32 [num_items]."""
        clicks = np.zeros(num_items, np.float32)
        counts = self._database.arrays(_ITEM_CLICKS)
        clicks[counts["item_row"]] = counts["n"]
        return clicks

    def save(self, folder: Path) -> None:
        """Writes the queries and pairs of number_queries into an existing folder, for `load`."""
        for table in _SAVED:
            self._database.save(f"FROM {table}", folder / f"{table}.parquet")

    def load(self, folder: Path) -> None:
        """Takes the place of `add` and number_queries: reads what `save` wrote."""
        for table in _SAVED:
            self._database.load(table, folder / f"{table}.parquet")

    def save_clicks(self, path: Path) -> None:
        """Writes a Parquet file `item_row`, `n` with what item_clicks counts."""
        self._database.save(_ITEM_CLICKS, path)

    def save_events(self, path: Path, first_query: int) -> None:
        """Writes a Parquet file with the columns of EVENT_ORDER: the positive events of the users, in no order.

        The queries of this log are numbered from `first_query` on. Numbers are signed, as Spark wants them.
        """
        columns = {name: name for name in EVENT_ORDER}
        columns |= {"time": "time::BIGINT", "query_row": f"query_row + {first_query}", "type": "type::SMALLINT"}
        selected = ", ".join(f"({column}) AS {name}" for name, column in columns.items())
        self._database.save(f"SELECT {selected} {self._events()}", path)

    def _events(self) -> str:
        held_out = self._schema.held_out
        # Where the split goes by time, held-out events are the future, and readers look strictly before a moment. Where
        # it goes by query, they are as old as the others and would give away the answer.
        past = "TRUE" if held_out is None or held_out.query_share is None else "NOT held"
        return f"FROM pairs WHERE role = {POSITIVE} AND user_row > 0 AND {past} AND time > 0"

    def write_events(self, file: PackedFileWriter, num_users: int) -> int:
        """Writes the positive events of each user, in the order of time, as sections event.*. Returns their number."""
        events = self._database.sorted_columns(
            list(EVENT_SECTIONS.values()),
            self._events(),
            EVENT_ORDER,
            "write events",
            group="user_row",
            num_groups=num_users,
        )
        file.add("event.splits", events.splits)
        for section, column in zip(EVENT_SECTIONS, events.columns, strict=True):
            column.copy(file, section)
        return int(events.splits[-1])

    def few_values(self) -> dict[str, np.ndarray | None]:
        """Returns the distinct weights and labels of the positives, float32, ascending; None if there are over 256.

        Drops clicks that labels overrule, so it comes after write_events.
        """
        self._overrule_clicks()
        return self._all_few_values()

    def _all_few_values(self) -> dict[str, np.ndarray | None]:
        return {name: self._few_values(name) for name in self._optional if name != "position"}

    def write_interactions(
        self,
        out: Path,
        shards: int,
        vocabulary: Vocabulary,
        shard: int | None = None,
        few_values: dict[str, np.ndarray | None] | None = None,
    ) -> dict[str, int]:
        """Writes the interaction files into the directory `out`. Returns the counts of queries and pairs.

        Args:
            out: the directory.
            shards: the number of files.
            vocabulary: gives the tokens of queries their ids.
            shard: the shard that this log is; None is all of them.
            few_values: what few_values says about the log of which this is a shard.

        Raises:
            CommandError: labels have overruled every positive pair for training.
        """
        self._overrule_clicks()
        self._check_positives()
        few_values = self._all_few_values() if few_values is None else few_values
        queries = self._database.count("queries")
        tokens, texts = self._encode_queries(queries, vocabulary)
        self._number_requests()
        columns = _Columns(
            tokens,
            texts,
            self._positives(queries),
            self._impressions(),
            self._negatives(queries),
        )
        # Queries are sorted by shard, and everything else by query: each shard is one piece of every column.
        first_query = 0
        for number, name in enumerate(interactions_names(shards)):
            if shard not in (None, number):
                continue
            end_query = first_query + self._database.scalar(f"SELECT count(*) FROM queries WHERE shard = {number}")
            with PackedFileWriter(out / name, "interactions") as file:
                self._write_shard(file, columns, few_values, first_query, end_query)
            first_query = end_query
        return {
            "queries": queries,
            "positives": int(columns.positive.splits[-1]),
            "impressions": int(columns.impression.splits[-1]),
            "negatives": int(columns.negative.splits[-1]),
        }

    def write_held_out(self, out: Path) -> int:
        """Writes held_out.dpsr into the directory `out`, if the schema holds pairs out. Returns their number."""
        if self._schema.held_out is None:
            return 0
        weight = ["weight"] if self._has_weights else []
        columns = ["query_row", "user_row", "item_row", "asked", "type", *weight]
        held = self._database.sorted_columns(
            columns,
            f"FROM pairs WHERE role = {POSITIVE} AND held",
            ["query_row", "item_row", "user_row", "asked", "type", *weight],
            "write held out",
        )
        with PackedFileWriter(out / "held_out.dpsr", "held_out") as file:
            for name, column in zip(("query", "user", "item", "time", "type", *weight), held.columns, strict=True):
                column.copy(file, name)
        return held.columns[0].rows

    def _encode_queries(self, queries: int, vocabulary: Vocabulary) -> tuple[RaggedColumnFile, RaggedColumnFile]:
        """Returns the token ids and the UTF-8 bytes of all queries, in the order of their row."""
        folder = self._database.folder
        tokens, texts = RaggedColumnFile(folder, np.int32), RaggedColumnFile(folder, np.uint8)

        def encode(batch: pa.RecordBatch) -> Any:
            return vocabulary.encode_batch(batch["text"]), string_bytes(batch["text"])

        query = "SELECT text FROM queries ORDER BY query_row"
        for _, (token_ids, text_bytes) in self._database.encoded_batches(query, "encode queries", queries, encode):
            tokens.append(*token_ids)
            texts.append(*text_bytes)
        return tokens, texts

    def _number_requests(self) -> None:
        """Creates the tables `requests` and `unclicked`.

        `requests` numbers each request with a positive and an unclicked impression; `unclicked` has these impressions.
        Both are empty where the log does not say what was shown.
        """
        if not self._has_requests:
            self._database.create("unclicked", "SELECT 0 AS request, 0::INTEGER AS item_row LIMIT 0")
            self._database.create("requests", "SELECT 0::INTEGER AS query_row, 0 AS request LIMIT 0")
            return
        key = f"{self._request_key()}, asked"
        self._database.create(
            "clicked", f"SELECT DISTINCT {key}, item_row FROM pairs WHERE role = {POSITIVE} AND NOT held"
        )
        self._database.create(
            "shown",
            f"""SELECT DISTINCT {key}, item_row FROM pairs
                SEMI JOIN clicked USING ({key}) ANTI JOIN clicked USING ({key}, item_row)
                WHERE role <> {POSITIVE} AND type IN {_UNCLICKED} AND NOT held""",
        )
        self._database.create(
            "requests",
            f"SELECT {key}, row_number() OVER (ORDER BY {key}) - 1 AS request FROM (SELECT DISTINCT {key} FROM shown)",
        )
        self._database.create("unclicked", f"SELECT request, item_row FROM shown JOIN requests USING ({key})")
        self._database.drop("clicked")
        self._database.drop("shown")

    def _positive_names(self) -> list[str]:
        """Returns the names of the columns that _positives returns."""
        return ["user", "item", "type", "time", *self._optional, *(["request"] if self._has_requests else [])]

    def _positives(self, queries: int) -> SortedColumns:
        """Returns the positive pairs of each query."""
        columns = ["user_row", "item_row", "type", "asked", *(_SQL_NAMES.get(n, n) for n in self._optional)]
        order = ["query_row", "item_row", "user_row", "asked", "type", *columns[4:]]
        source = "FROM pairs"
        if self._has_requests:
            columns.append("coalesce(request, -1)::INTEGER AS request_row")
            order.append("request_row")
            source = f"FROM pairs LEFT JOIN requests USING ({self._request_key()}, asked)"
        return self._database.sorted_columns(
            columns,
            f"{source} WHERE role = {POSITIVE} AND NOT held",
            order,
            "write positives",
            group="query_row",
            num_groups=queries,
        )

    def _impressions(self) -> SortedColumns:
        """Returns the unclicked items of each request."""
        return self._database.sorted_columns(
            ["item_row"],
            "FROM unclicked",
            ["request", "item_row"],
            "write impressions",
            group="request",
            num_groups=self._database.count("requests"),
        )

    def _negatives(self, queries: int) -> SortedColumns:
        """Returns the items of each query that a label calls negative and none positive, and the mined ones."""
        positive = f"SELECT query_row, item_row FROM pairs WHERE role = {POSITIVE} AND NOT held"
        labelled = f"SELECT DISTINCT query_row, item_row FROM pairs WHERE role = {NEGATIVE} AND NOT held"
        mined = f"UNION SELECT query_row, item_row FROM ({self._mined()})" if self._mines else ""
        return self._database.sorted_columns(
            ["item_row"],
            f"FROM ({labelled} {mined}) ANTI JOIN ({positive}) USING (query_row, item_row)",
            ["query_row", "item_row"],
            "write negatives",
            group="query_row",
            num_groups=queries,
        )

    def _mined(self) -> str:
        """Returns SQL for the items of each query that were shown often and never clicked.

        An item that is shown at position p is expected to be clicked as often as items at p are clicked in the whole
        log, times how much more or less often items are clicked for this query. So an item far down must be shown more
        often than one at the top before its missing clicks say something.
        """
        position = "coalesce(min(nullif(shown_at, 0)), 0)" if self._schema.position else "0"
        return f"""
            WITH shown AS (
                SELECT query_row, item_row, bool_or(role = {POSITIVE})::INTEGER AS clicked, {position} AS place
                FROM pairs WHERE NOT held AND (role = {POSITIVE} OR type IN {_UNCLICKED})
                GROUP BY {self._request_key()}, asked, item_row),
            rates AS (SELECT place, avg(clicked) AS rate FROM shown GROUP BY place),
            expected AS (
                SELECT query_row, item_row, sum(rate) AS clicks, sum(clicked) AS clicked
                FROM shown JOIN rates USING (place) GROUP BY query_row, item_row),
            scaled AS (
                SELECT query_row, item_row, clicked,
                    clicks * sum(clicked) OVER query / nullif(sum(clicks) OVER query, 0) AS clicks
                FROM expected WINDOW query AS (PARTITION BY query_row))
            SELECT query_row, item_row FROM scaled WHERE clicked = 0 AND clicks >= {self._schema.mined_from}
            QUALIFY row_number() OVER (PARTITION BY query_row ORDER BY clicks DESC, item_row)
                <= {self._schema.mined_negatives}"""

    def _few_values(self, column: str) -> np.ndarray | None:
        """Returns the distinct values of a column of the positives, float32, ascending; None if there are over 256."""
        query = f"""SELECT DISTINCT {column} AS value FROM pairs
                    WHERE role = {POSITIVE} AND NOT held LIMIT {BYTE_VALUES + 1}"""
        values = self._database.arrays(query)["value"]
        # Adding 0 makes 0 and -0 one value.
        return np.unique(values + np.float32(0)) if len(values) <= BYTE_VALUES else None

    def _write_shard(
        self,
        file: PackedFileWriter,
        columns: _Columns,
        few_values: dict[str, np.ndarray | None],
        first_query: int,
        end_query: int,
    ) -> None:
        """Writes the queries `first_query` to `end_query` and all that belongs to them."""
        first_request, end_request = (
            self._database.scalar(f"SELECT count(*) FROM requests WHERE query_row < {row}")
            for row in (first_query, end_query)
        )
        columns.tokens.copy(file, "query.splits", "query.tokens", first_query, end_query)
        columns.texts.copy(file, "query_text.splits", "query_text.bytes", first_query, end_query)
        begin, end = add_splits(file, "positive.splits", columns.positive.splits, first_query, end_query)
        for name, column in zip(self._positive_names(), columns.positive.columns, strict=True):
            section, values = f"positive.{name}", few_values.get(name)
            if values is not None:
                column.copy(file, section, begin, end, _codes_in(values), np.uint8)
                file.add(f"{section}.values", values)
            elif name == "request":
                column.copy(file, section, begin, end, _counted_from(first_request))
            else:
                column.copy(file, section, begin, end)
        if self._has_requests:
            splits = columns.impression.splits
            begin, end = add_splits(file, "impression.splits", splits, first_request, end_request)
            columns.impression.columns[0].copy(file, "impression.item", begin, end)
        begin, end = add_splits(file, "negative.splits", columns.negative.splits, first_query, end_query)
        columns.negative.columns[0].copy(file, "negative.item", begin, end)


class _Columns(NamedTuple):
    """The columns of the interaction files, of all shards."""

    tokens: RaggedColumnFile
    texts: RaggedColumnFile
    positive: SortedColumns
    impression: SortedColumns
    negative: SortedColumns


def used_rows(rows: pa.RecordBatch, schema: InteractionsSchema) -> pa.RecordBatch:
    """Returns the rows of encode_interactions that a store needs, with the columns that it needs, named for SQL."""
    used = pc.not_equal(rows["role"], 0)
    if _has_requests(schema):
        used = pc.or_(used, pc.is_in(rows["type"], pa.array(_UNCLICKED, pa.uint8())))
    kept = ["query", "user", "item", "time", "type", "role", *_optional_columns(schema)]
    if schema.session:
        kept.append("session")
    if schema.label:
        kept.append("labelled")
    return rows.filter(used).select(kept).rename_columns([_SQL_NAMES.get(name, name) for name in kept])


def no_positive_pairs(schema: InteractionsSchema) -> CommandError:
    """Returns the error of a log without a positive pair for training."""
    s = schema
    reason = "the log has no clicks"
    if s.label:
        reason = f"no label in column {s.label} is at least {s.positive_from:g}"
    elif s.type:
        reason = f"no row that counts has one of the types {', '.join(s.positive_types)} (positive_types)"
    kept = " that are not held out" if s.held_out else ""
    return CommandError(f"the log has no positive pairs{kept}: {reason}; correct the schema or the tables")


def _has_weights(schema: InteractionsSchema) -> bool:
    """Whether a positive pair may have another weight than 1."""
    return schema.weight is not None or any(weight != 1 for weight in schema.type_weights.values())


def _has_requests(schema: InteractionsSchema) -> bool:
    """Whether the log may say which items were shown and not clicked.

    `types` does not decide that: a type with a name of EVENT_TYPES needs no entry there. Without times and sessions,
    nothing tells one request from another.
    """
    return schema.type is not None and bool(schema.time or schema.session)


def _optional_columns(schema: InteractionsSchema) -> list[str]:
    named = {"weight": _has_weights(schema), "label": schema.label, "position": schema.position}
    return [name for name, there in named.items() if there]


def _codes_in(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Replaces numbers by their place in ascending `values`, which hold all of them."""
    return lambda numbers: np.searchsorted(values, numbers)


def _counted_from(first: int) -> Callable[[np.ndarray], np.ndarray]:
    """Subtracts `first` from row numbers; -1, which stands for no row, stays."""
    return lambda rows: np.where(rows < 0, rows, rows - first)


def _md5_number(text: str, begin: int) -> str:
    """Returns SQL for 64 bits of the MD5 of a text, big endian, from hex digit `begin` (1 or 17) on."""
    return f"('0x' || substr(md5({text}), {begin}, 16))::UBIGINT"


def summed_weights(database: Database) -> str:
    """Returns SQL for the sum of the weights of rows of the table `pairs`."""
    # Whole multiples of a small share of 1, because sums of floats depend on their order.
    has_weights = "weight" in database.columns("pairs")
    return f"sum(round(weight * {_WEIGHT_UNITS})::HUGEINT) / {_WEIGHT_UNITS}" if has_weights else "count(*)"


def request_key(schema: InteractionsSchema) -> str:
    """Returns the columns that all rows of a request have in common, for SQL."""
    return ", ".join(["query_row", "user_row", *(["session"] if schema.session else [])])


def create_with_asked(database: Database, table: str, log: str, schema: InteractionsSchema) -> None:
    """Creates a table with the rows of the query `log` and a further column `asked`, when the request began.

    The rows of a request have the same query and user. They have the same session, too; without one, no more than
    `session_gap` minutes lie between two of them. Rows without a user and a session are of many people, and would form
    one request for as long as somebody asks. So their requests also end `session_gap` minutes after they began.
    """
    if not schema.time:
        database.create(table, f"SELECT *, 0::UINTEGER AS asked FROM ({log})")
        return
    gap, session = round(60 * schema.session_gap), "AND session = 0" if schema.session else ""
    begins = f"before IS NULL OR (time - before > {gap} {session})"
    request = f"(PARTITION BY {request_key(schema)} ORDER BY time)"
    database.create(
        table,
        f"""SELECT * EXCLUDE (before), max(CASE WHEN {begins} THEN time END) OVER {request} AS asked
        FROM (SELECT *, lag(time) OVER {request} AS before FROM ({log}))""",
    )
    _split_long_requests(database, table, f"user_row = 0 {session}", gap)


def _split_long_requests(database: Database, table: str, anonymous: str, gap: int) -> None:
    """Splits the requests of the rows that are `anonymous` so that none is longer than `gap` seconds."""
    is_long = f"SELECT DISTINCT query_row, asked FROM {table} WHERE {anonymous} AND time - asked > {gap}"
    if not database.scalar(f"SELECT count(*) FROM ({is_long})"):
        return
    # Where a request ends decides where the next one begins, which takes a pass in the order of time.
    names = ("query_row", "asked", "time")
    moments = f"""SELECT DISTINCT {", ".join(names)} FROM {table} SEMI JOIN ({is_long}) USING (query_row, asked)
        WHERE {anonymous} ORDER BY query_row, time"""
    request: tuple[int, int] | None = None
    began = 0
    for batch in database.batches(moments, "split requests"):
        found = []
        for query, asked, time in zip(*(batch[name].to_pylist() for name in names), strict=True):
            if (query, asked) != request or time - began > gap:
                request, began = (query, asked), time
            found.append(began)
        columns = {name: batch[name] for name in names}
        database.insert("moments", pa.record_batch({**columns, "began": pa.array(found, batch["asked"].type)}))
    others = ", ".join(f"whole.{name}" for name in database.columns(table) if name != "asked")
    database.create(
        "split_requests",
        f"""SELECT {others}, CASE WHEN {anonymous} THEN coalesce(began, whole.asked) ELSE whole.asked END AS asked
        FROM {table} AS whole LEFT JOIN moments ON whole.query_row = moments.query_row
            AND whole.asked = moments.asked AND whole.time = moments.time""",
    )
    database.drop("moments")
    database.drop(table)
    database.rename("split_requests", table)


def shard_of_query(shards: int) -> str:
    """Returns SQL for the shard of the text in the column `query`."""
    return f"{_md5_number('query', 1)} % {shards}"


def held_out_conditions(schema: InteractionsSchema, last_time: int) -> tuple[str, str]:
    """Returns SQL that tells from `query`, and SQL that tells from `time`, whether a row is held out.

    `last_time` is the time of the last interaction. Raises CommandError as held_out_from.
    """
    held_out = schema.held_out
    if held_out is None:
        return "FALSE", "FALSE"
    if held_out.query_share is not None:
        # The second half of the hash: the first decides on the shard.
        return f"{_md5_number('query', 17)} < {int(held_out.query_share * 2**64)}::UBIGINT", "FALSE"
    return "FALSE", f"time >= {held_out_from(schema, last_time)}"


def held_out_from(schema: InteractionsSchema, last_time: int) -> int:
    """Returns the first second since 1970 that is held out.

    Args:
        schema: holds out interactions by time.
        last_time: the time of the last interaction.

    Raises:
        CommandError: `held_out.after` is not a time.
    """
    held_out = schema.held_out
    assert held_out is not None
    if held_out.last_days is not None:
        return max(0, math.floor(last_time - held_out.last_days * 86400) + 1)
    given = held_out.after or ""
    try:
        return math.floor(float(given) / {"s": 1, "ms": 1e3, "us": 1e6}[schema.time_unit])
    except (ValueError, OverflowError):
        pass
    try:
        moment = datetime.datetime.fromisoformat(given.replace("Z", "+00:00"))
    except ValueError:
        raise CommandError(
            f"interactions: held_out: after is '{given}', expected a time such as 2024-01-31T12:00:00, or a number in "
            f"time_unit; correct the schema"
        ) from None
    return math.floor((moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp())
