"""From encoded Arrow batches to the packed files of a store (format 2), in bounded memory.

Rows wait in tables of DuckDB, which sorts, joins and counts within a given memory and puts the rest on disk. Every
result is read back in an order over all of its columns, so the same rows give the same bytes, in whatever order and
on however many threads they came.

    with Assembler(schema, out, threads=2, memory=2**30) as store:
        for rows in ...:
            store.add("items", rows, numbers)
        repeated = store.close_table("items")
        ...
        counts, features = store.write(shards=1)

The layout of the files is on docs/data_format.md.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFileWriter
from dpsr_tf.data.schema import (
    EVENT_TYPES,
    Feature,
    Filter,
    InteractionsSchema,
    Schema,
    TokenizerSchema,
    VocabularySchema,
)
from dpsr_tf.data.store import Counts, Features, StoredFeature, interactions_names, vocabulary_name
from dpsr_tokenizer import TokenizerConfig, Vocabulary, VocabularyBuilder

T = TypeVar("T")
R = TypeVar("R")

# Rows of a result that are handled at a time, of numbers and of texts: enough for speed, few enough for memory.
_ROWS, _TEXTS = 1 << 16, 1 << 12
# What an encoded interaction is: encode.py gives it as `role`.
_POSITIVE, _NEGATIVE = 1, 2
_UNCLICKED = tuple(EVENT_TYPES.index(name) for name in ("impression", "skip"))
# Column names that are no words of SQL.
_SQL_NAMES = {"user": "user_row", "item": "item_row", "position": "shown_at"}


class Assembler:
    """Takes the rows of three tables, one after another, and writes all packed files of a store."""

    def __init__(self, schema: Schema, out: Path, threads: int, memory: int):
        """Begins a store.

        Args:
            schema: what the rows are.
            out: an existing, empty directory for the files.
            threads: how many DuckDB and the tokenizer use.
            memory: bytes that DuckDB uses at most; what does not fit lies in a folder of `out` until close().
        """
        self._schema, self._out, self._threads, self._memory = schema, out, threads, memory
        self._folder = out / "unfinished"
        self._folder.mkdir()
        self._pool = ThreadPoolExecutor(threads)
        self._ids: dict[str, np.ndarray] = {}
        self._last_time = 0
        self._tables: set[str] = set()
        self._db = duckdb.connect(
            config={
                "memory_limit": f"{memory}B",
                "threads": threads,
                "temp_directory": str(self._folder / "duckdb"),
                "preserve_insertion_order": False,
                "python_enable_replacements": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            }
        )

    def __enter__(self) -> Assembler:
        """The assembler itself."""
        return self

    def __exit__(self, *unused: object) -> None:
        """Removes all that is not part of the store."""
        self._pool.shutdown(cancel_futures=True)
        self._db.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, table: str, rows: pa.RecordBatch, numbers: np.ndarray | None = None) -> None:
        """Takes rows of "items", "users" or "interactions", as encode.py gives them.

        Args:
            table: the table; one is complete before the next begins, and the first two have been closed.
            rows: its next rows.
            numbers: int64 [rows] of items and users: where each row stands among all rows of the input, so that the
                first of two rows with the same id is kept.
        """
        if table == "interactions":
            self._add_interactions(rows)
            return
        # Names of features may differ in case only, which SQL does not see.
        names = itertools.count()
        plain = [f"f{next(names)}" if name.startswith(("feature.", "filter.")) else name for name in rows.schema.names]
        self._insert(table, rows.rename_columns(plain).append_column("number", pa.array(numbers, pa.int64())))

    def close_table(self, table: str) -> tuple[np.ndarray, list[str]]:
        """Ends "items" or "users": keeps the first row of each id. Of users it makes row 0, the anonymous one.

        Returns:
            Of the rows that repeat an id: their numbers int64 [repeated], ascending, and their ids (or keys) as text.

        Raises:
            CommandError: two text ids have the same hash.
        """
        if table == "users":
            self._add_anonymous_user()
        if table not in self._tables:
            self._ids[table] = np.zeros(0, np.int64)
            return np.zeros(0, np.int64), []
        if "key" in self._columns(table):
            same = self._rows(
                f"SELECT min(key), max(key) FROM {table} GROUP BY id HAVING min(key) <> max(key) ORDER BY ALL LIMIT 1"
            )
            for first, second in same:
                raise CommandError(
                    f"{table}: the ids '{first}' and '{second}' have the same 63-bit hash; give one another id"
                )
        ids = self._arrays(f"SELECT id, number FROM {table} ORDER BY id, number")
        again = np.flatnonzero(ids["id"][1:] == ids["id"][:-1]) + 1
        self._ids[table] = np.delete(ids["id"], again)
        if len(again) == 0:
            return again, []
        self._insert("repeated", pa.record_batch({"number": pa.array(ids["number"][again])}))
        shown = "key" if "key" in self._columns(table) else "id"
        rows = self._rows(
            f"SELECT number, {shown}::VARCHAR FROM {table} SEMI JOIN repeated USING (number) ORDER BY number"
        )
        self._db.execute(f"DELETE FROM {table} WHERE number IN (SELECT number FROM repeated)")
        self._drop("repeated")
        return np.array([number for number, _ in rows], np.int64), [value for _, value in rows]

    def ids(self, table: str) -> np.ndarray:
        """Ids int64 [rows], ascending, of a closed table: position is row. Of users the first is -1, the anonymous."""
        return self._ids[table]

    def write(self, shards: int) -> tuple[Counts, Features]:
        """Writes all packed files of the store, and what the manifest says of them.

        Raises:
            CommandError: no interaction is a positive pair for training.
        """
        self._number_interactions(shards)
        vocabularies = self._write_vocabularies()
        item_features = self._write_items(vocabularies)
        user_features, events = self._write_users(vocabularies)
        counts = self._write_interactions(shards, vocabularies[None])
        counts["held_out"] = self._write_held_out()
        counts |= {"users": len(self._ids["users"]), "items": len(self._ids["items"]), "events": events, "rejected": 0}
        return Counts(**counts), Features(item_features, user_features)

    # Tables.

    def _add_anonymous_user(self) -> None:
        if "users" not in self._tables:  # there are no others
            types = {"categorical": "VARCHAR", "number": "DOUBLE", "multi": "VARCHAR[]", "text": "VARCHAR"}
            features = [f", f{i} {types[feature.kind]}" for i, feature in enumerate(self._features()["users"])]
            self._db.execute(f"CREATE TABLE users (id BIGINT, number BIGINT{''.join(features)})")
            self._tables.add("users")
        values = {"id": "-1", "number": "-1", "key": "''"}
        columns = ", ".join(values.get(name, "NULL") for name in self._columns("users"))
        self._db.execute(f"INSERT INTO users SELECT {columns}")

    def _add_interactions(self, rows: pa.RecordBatch) -> None:
        s = self._schema.interactions
        if rows.num_rows == 0:
            return
        self._last_time = max(self._last_time, pc.max(rows["time"]).as_py())
        used = pc.not_equal(rows["role"], 0)
        if has_requests(s):
            used = pc.or_(used, pc.is_in(rows["type"], pa.array(_UNCLICKED, pa.uint8())))
        kept = ["query", "user", "item", "time", "type", "role", *self._optional_columns()]
        if has_requests(s) and s.session:
            kept.append("session")
        rows = rows.filter(used).select(kept)
        self._insert("log", rows.rename_columns([_SQL_NAMES.get(name, name) for name in kept]))

    def _optional_columns(self) -> list[str]:
        s = self._schema.interactions
        named = {"weight": has_weights(s), "label": s.label, "position": s.position}
        return [name for name, there in named.items() if there]

    def _number_interactions(self, shards: int) -> None:
        """Table `queries`: text, shard and row of each; table `pairs`: the log with the query's row for its text."""
        s = self._schema.interactions
        if "log" not in self._tables:
            self._pairs_are_missing()
        held_time = held_query = "FALSE"
        if s.held_out and s.held_out.query_share is not None:
            # The second half of the hash: the first decides on the shard.
            held_query = f"{_md5_number('query', 17)} < {int(s.held_out.query_share * 2**64)}::UBIGINT"
        elif s.held_out:
            held_time = f"time >= {held_out_from(s, self._last_time)}"
        self._create(
            "queries",
            f"""SELECT text, shard, held, training AND NOT held AS training,
                (row_number() OVER (ORDER BY shard, text) - 1)::INTEGER AS query_row
            FROM (SELECT query AS text, {_md5_number("query", 1)} % {shards} AS shard, {held_query} AS held,
                bool_or(NOT {held_time}) AS training FROM log WHERE role <> 0 GROUP BY query)""",
        )
        others = [name for name in self._columns("log") if name != "query"]
        self._create(
            "pairs",
            f"SELECT query_row, {', '.join(others)}, held OR {held_time} AS held FROM log JOIN queries ON query = text",
        )
        self._drop("log")
        if not self._scalar(f"SELECT count(*) FROM pairs WHERE role = {_POSITIVE} AND NOT held"):
            self._pairs_are_missing()

    def _pairs_are_missing(self) -> None:
        s = self._schema.interactions
        what = f"no label in column {s.label} is {s.positive_from:g} or more" if s.label else "there is no click"
        kept = " that is not held out" if s.held_out else ""
        raise CommandError(f"there is no positive pair{kept}: {what}; correct the schema or the tables")

    # Files.

    def _write_vocabularies(self) -> dict[str | None, Vocabulary]:
        texts = [
            ("items", self._count("items"), "SELECT text FROM items"),
            ("queries", self._count("queries"), "SELECT text FROM queries WHERE training"),
        ]
        made: dict[str | None, Vocabulary] = {}
        made[None] = self._write_vocabulary(None, self._schema.tokenizer, self._schema.vocabulary, texts)
        for name, section in self._schema.vocabularies.items():
            texts = [
                (f"{table} {feature.key}", self._count(table), f"SELECT f{i} FROM {table} WHERE f{i} IS NOT NULL")
                for table, features in self._features().items()
                for i, feature in enumerate(features)
                if feature.vocabulary == name
            ]
            made[name] = self._write_vocabulary(name, section.tokenizer, section.vocabulary, texts)
        return made

    def _write_vocabulary(
        self,
        name: str | None,
        tokenizer: TokenizerSchema,
        limits: VocabularySchema,
        texts: list[tuple[str, int, str]],
    ) -> Vocabulary:
        builder = VocabularyBuilder(
            TokenizerConfig(**dataclasses.asdict(tokenizer)),
            num_threads=self._threads,
            max_memory_bytes=self._memory,
            temporary_directory=self._folder,
        )
        for what, rows, sql in texts:
            for batch in self._batches(sql, f"count {what}", rows, _TEXTS):
                builder.add(batch.column(0))
        path = self._out / vocabulary_name(name)
        try:
            builder.write(path, **dataclasses.asdict(limits))
        except ValueError as error:  # nothing is left that has an id
            raise CommandError(f"vocabulary: {error}; lower min_count, or give num_oov_buckets") from None
        return Vocabulary(path)

    def _write_items(self, vocabularies: dict[str | None, Vocabulary]) -> tuple[StoredFeature, ...]:
        tokens, titles = _Texts(self._folder, np.int32), _Texts(self._folder, np.uint8)
        popularity = _Column(self._folder, np.float32)

        def encode(batch: pa.RecordBatch) -> Any:
            return vocabularies[None].encode_batch(batch["text"]), string_bytes(batch["title"])

        def append(batch: pa.RecordBatch, encoded: Any) -> None:
            tokens.append(*encoded[0])
            titles.append(*encoded[1])
            popularity.append(_floats(batch["popularity"], 0))

        columns = ["title", "text", "popularity"]
        with PackedFileWriter(self._out / "items.dpsr", "items") as file:
            table = _Table(self, "items", self._schema.items.features, vocabularies, self._schema.items.filters)
            table.read(columns, encode, append)
            table.write_ids(file)
            if self._schema.items.popularity:
                popularity.copy(file, "popularity")
            else:
                clicks = np.zeros(len(self._ids["items"]), np.float32)
                counts = self._arrays(
                    f"SELECT item_row, count(*) AS n FROM pairs WHERE role = {_POSITIVE} AND NOT held GROUP BY item_row"
                )
                clicks[counts["item_row"]] = counts["n"]
                file.add("popularity", clicks)
            tokens.copy(file, "tokens.splits", "tokens.values")
            features = table.write_features(file)
        with PackedFileWriter(self._out / "titles.dpsr", "titles") as file:
            titles.copy(file, "title.splits", "title.bytes")
        if self._schema.items.filters:
            with PackedFileWriter(self._out / "filters.dpsr", "filters") as file:
                table.write_filters(file)
        return features

    def _write_users(self, vocabularies: dict[str | None, Vocabulary]) -> tuple[tuple[StoredFeature, ...], int]:
        s = self._schema.interactions
        with PackedFileWriter(self._out / "users.dpsr", "users") as file:
            table = _Table(self, "users", self._features()["users"], vocabularies)
            table.read([], lambda batch: None, lambda batch, encoded: None)
            table.write_ids(file)
            features = table.write_features(file)
            # Held-out events are the future where the split goes by time: a reader looks strictly before a moment.
            # Where it goes by query they are of the same time as the others, and would tell the answer.
            past = "TRUE" if s.held_out is None or s.held_out.query_share is None else "NOT held"
            events = self._sections(
                ["time", "item_row", "query_row", "type"],
                f"FROM pairs WHERE role = {_POSITIVE} AND user_row > 0 AND {past} AND {bool(s.time)}",
                ["user_row", "time", "query_row", "item_row", "type"],
                "write events",
                by="user_row",
                rows=len(self._ids["users"]),
            )
            file.add("event.splits", events.splits)
            for name, column in zip(("time", "item", "query", "type"), events.columns, strict=True):
                column.copy(file, f"event.{name}")
        return features, int(events.splits[-1])

    def _write_interactions(self, shards: int, vocabulary: Vocabulary) -> dict[str, int]:
        s = self._schema.interactions
        queries = self._count("queries")
        tokens, texts = _Texts(self._folder, np.int32), _Texts(self._folder, np.uint8)

        def encode(batch: pa.RecordBatch) -> Any:
            return vocabulary.encode_batch(batch["text"]), string_bytes(batch["text"])

        for _, encoded in self._encoded(
            "SELECT text FROM queries ORDER BY query_row", "encode queries", queries, encode
        ):
            tokens.append(*encoded[0])
            texts.append(*encoded[1])

        requests = has_requests(s)
        if requests:
            self._number_requests()
        else:
            self._create("unclicked", "SELECT 0 AS request, 0::INTEGER AS item_row LIMIT 0")
            self._create("requests", "SELECT 0::INTEGER AS query_row, 0 AS request LIMIT 0")
        optional = self._optional_columns()
        columns = ["user_row", "item_row", "type", "time", *(_SQL_NAMES.get(n, n) for n in optional)]
        key = ["query_row", "item_row", "user_row", "time", "type", *columns[4:]]
        source = "FROM pairs"
        if requests:
            columns.append("coalesce(request, -1)::INTEGER AS request_row")
            key.append("request_row")
            source = f"FROM pairs LEFT JOIN requests USING ({', '.join(self._request_key())})"
        positive = self._sections(
            columns,
            f"{source} WHERE role = {_POSITIVE} AND NOT held",
            key,
            "write positives",
            by="query_row",
            rows=queries,
        )
        impression = self._sections(
            ["item_row"],
            "FROM unclicked",
            ["request", "item_row"],
            "write impressions",
            by="request",
            rows=self._count("requests"),
        )
        negative = self._sections(
            ["item_row"],
            f"""FROM (SELECT DISTINCT query_row, item_row FROM pairs WHERE role = {_NEGATIVE} AND NOT held)
                ANTI JOIN (SELECT query_row, item_row FROM pairs WHERE role = {_POSITIVE} AND NOT held)
                USING (query_row, item_row)""",
            ["query_row", "item_row"],
            "write negatives",
            by="query_row",
            rows=queries,
        )
        # Rows of queries go from shard to shard, and so do all others: each shard is a piece of every column.
        names = ["user", "item", "type", "time", *optional, *(["request"] if requests else [])]
        few = {name: self._few_values(name) for name in optional if name != "position"}
        first_query = 0
        for shard, name in enumerate(interactions_names(shards)):
            end_query = first_query + self._scalar(f"SELECT count(*) FROM queries WHERE shard = {shard}")
            request = [
                self._scalar(f"SELECT count(*) FROM requests WHERE query_row < {row}")
                for row in (first_query, end_query)
            ]
            with PackedFileWriter(self._out / name, "interactions") as file:
                tokens.copy(file, "query.splits", "query.tokens", first_query, end_query)
                texts.copy(file, "query_text.splits", "query_text.bytes", first_query, end_query)
                begin, end = _add_splits(file, "positive.splits", positive.splits, first_query, end_query)
                for column_name, column in zip(names, positive.columns, strict=True):
                    section, values = f"positive.{column_name}", few.get(column_name)
                    if values is not None:
                        column.copy(file, section, begin, end, _code_of(values), np.uint8)
                        file.add(f"{section}.values", values)
                    elif column_name == "request":
                        column.copy(file, section, begin, end, _less(request[0]))
                    else:
                        column.copy(file, section, begin, end)
                if requests:
                    begin, end = _add_splits(file, "impression.splits", impression.splits, *request)
                    impression.columns[0].copy(file, "impression.item", begin, end)
                begin, end = _add_splits(file, "negative.splits", negative.splits, first_query, end_query)
                negative.columns[0].copy(file, "negative.item", begin, end)
            first_query = end_query
        return {
            "queries": queries,
            "positives": int(positive.splits[-1]),
            "impressions": int(impression.splits[-1]),
            "negatives": int(negative.splits[-1]),
        }

    def _few_values(self, column: str) -> np.ndarray | None:
        """The values of a column of the positives, float32, ascending; None if a byte does not tell them apart."""
        sql = f"SELECT DISTINCT {column} AS value FROM pairs WHERE role = {_POSITIVE} AND NOT held LIMIT {_BYTE + 1}"
        values = self._arrays(sql)["value"]
        return np.unique(values + np.float32(0)) if len(values) <= _BYTE else None  # zero is not two values

    def _request_key(self) -> list[str]:
        return ["query_row", "user_row", *(["session"] if self._schema.interactions.session else [])]

    def _number_requests(self) -> None:
        """Table `requests`: number of each request with a positive and an unclicked impression; table `unclicked`."""
        key = ", ".join(self._request_key())
        self._create("clicked", f"SELECT DISTINCT {key}, item_row FROM pairs WHERE role = {_POSITIVE} AND NOT held")
        self._create(
            "shown",
            f"""SELECT DISTINCT {key}, item_row FROM pairs
                SEMI JOIN clicked USING ({key}) ANTI JOIN clicked USING ({key}, item_row)
                WHERE role <> {_POSITIVE} AND type IN {_UNCLICKED} AND NOT held""",
        )
        self._create(
            "requests",
            f"SELECT {key}, row_number() OVER (ORDER BY {key}) - 1 AS request FROM (SELECT DISTINCT {key} FROM shown)",
        )
        self._create("unclicked", f"SELECT request, item_row FROM shown JOIN requests USING ({key})")
        self._drop("clicked")
        self._drop("shown")

    def _write_held_out(self) -> int:
        s = self._schema.interactions
        if s.held_out is None:
            return 0
        weight = ["weight"] if has_weights(s) else []
        columns = ["query_row", "user_row", "item_row", "time", "type", *weight]
        held = self._sections(
            columns,
            f"FROM pairs WHERE role = {_POSITIVE} AND held",
            ["query_row", "item_row", "user_row", "time", "type", *weight],
            "write held out",
        )
        with PackedFileWriter(self._out / "held_out.dpsr", "held_out") as file:
            for name, column in zip(("query", "user", "item", "time", "type", *weight), held.columns, strict=True):
                column.copy(file, name)
        return held.columns[0].rows

    # DuckDB.

    def _features(self) -> dict[str, tuple[Feature, ...]]:
        users = self._schema.users
        return {"items": self._schema.items.features, "users": users.features if users else ()}

    def _insert(self, table: str, rows: pa.RecordBatch) -> None:
        self._db.register("batch", rows)
        self._db.execute(
            f"INSERT INTO {table} FROM batch" if table in self._tables else f"CREATE TABLE {table} AS FROM batch"
        )
        self._db.unregister("batch")
        self._tables.add(table)

    def _create(self, table: str, sql: str) -> None:
        self._db.execute(f"CREATE TABLE {table} AS {sql}")
        self._tables.add(table)

    def _drop(self, table: str) -> None:
        self._db.execute(f"DROP TABLE {table}")
        self._tables.remove(table)

    def _columns(self, table: str) -> list[str]:
        return [name for (name, *_) in self._rows(f"DESCRIBE {table}")]

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self._db.sql(sql).fetchall()

    def _scalar(self, sql: str) -> int:
        return int(self._rows(sql)[0][0])

    def _count(self, table: str) -> int:
        return self._scalar(f"SELECT count(*) FROM {table}")

    def _arrays(self, sql: str) -> dict[str, np.ndarray]:
        return self._db.sql(sql).fetchnumpy()

    def _batches(self, sql: str, label: str, total: int | None = None, rows: int = _ROWS) -> Iterator[pa.RecordBatch]:
        """The result of a query, some rows at a time, under a progress bar."""
        with tqdm(total=total, desc=f"{label:<16}", unit=" rows", unit_scale=True) as bar:
            for batch in self._db.sql(sql).to_arrow_reader(rows):
                yield batch
                bar.update(batch.num_rows)

    def _encoded(
        self, sql: str, label: str, total: int, encode: Callable[[pa.RecordBatch], R]
    ) -> Iterator[tuple[pa.RecordBatch, R]]:
        """Each batch of a result and what `encode`, on all threads, makes of it."""
        batches = self._batches(sql, label, total, _TEXTS)
        return ordered(self._pool, lambda batch: (batch, encode(batch)), batches, self._threads)

    def _sections(
        self,
        columns: Sequence[str],
        source: str,
        order: Sequence[str],
        label: str,
        by: str | None = None,
        rows: int = 0,
    ) -> _Sections:
        """Columns of a sorted result, and where those of each row `by`, 0 to `rows` - 1, begin."""
        names = [column.rpartition(" AS ")[2] for column in columns]
        empty = self._arrays(f"SELECT {', '.join(columns)} {source} LIMIT 0")
        sections = [_Column(self._folder, empty[name].dtype) for name in names]
        counts = np.zeros(rows, np.int64)
        extra = [by] if by and by not in names else []
        sql = f"SELECT {', '.join([*columns, *extra])} {source} ORDER BY {', '.join(order)}"
        for batch in self._batches(sql, label):
            if by:
                found, number = np.unique(batch[by].to_numpy(), return_counts=True)
                counts[found] += number
            for section, name in zip(sections, names, strict=True):
                section.append(batch[name].to_numpy())
        return _Sections(sections, _splits(counts))


class _Table:
    """What the files of items and users have in common: ids and features; filters, which are much the same."""

    def __init__(
        self,
        store: Assembler,
        name: str,
        features: tuple[Feature, ...],
        vocabularies: dict[str | None, Vocabulary],
        filters: tuple[Filter, ...] = (),
    ):
        self._store, self._name, self._features, self._vocabularies = store, name, features, vocabularies
        # Columns f0, f1, ... of the table.
        self._all: tuple[Feature | Filter, ...] = (*features, *filters)
        self._ids = store.ids(name)
        self._has_keys = "key" in store._columns(name)
        self._keys = _Texts(store._folder, np.uint8)
        self._codes = {
            i: _Column(store._folder, np.int32)
            for i, f in enumerate(self._all)
            if f.kind == "categorical" or (f.kind == "number" and isinstance(f, Feature))
        }
        self._numbers = {
            i: _Column(store._folder, np.float64)
            for i, f in enumerate(self._all)
            if f.kind == "number" and isinstance(f, Filter)
        }
        self._texts = {i: _Texts(store._folder, np.int32) for i, f in enumerate(features) if f.kind == "text"}
        for i, feature in enumerate(self._all):
            if feature.kind in ("categorical", "multi"):
                self._number_values(i, feature)

    def _number_values(self, i: int, feature: Feature | Filter) -> None:
        """Table values_i: value and code, by falling frequency; ties by text, in order of its bytes."""
        value = f"unnest(f{i})" if feature.kind == "multi" else f"f{i}"
        table = f"{self._name}_values_{i}"
        self._store._create(
            f"{table}_all",
            f"SELECT value, count(*) AS n FROM (SELECT {value} AS value FROM {self._name}) GROUP BY value",
        )
        self._store._create(
            table,
            f"""SELECT value, row_number() OVER (ORDER BY n DESC, value)::INTEGER AS code
                FROM (FROM {table}_all WHERE value <> '' ORDER BY n DESC, value LIMIT {feature.max_values})""",
        )
        self._store._drop(f"{table}_all")

    def read(
        self,
        columns: Sequence[str],
        encode: Callable[[pa.RecordBatch], Any],
        append: Callable[[pa.RecordBatch, Any], None],
    ) -> None:
        """Reads the table in order of id; `encode` runs on all threads, `append` here, in order."""
        selected, joins = [*columns, *(["key"] if self._has_keys else [])], ""
        for i, feature in enumerate(self._all):
            if feature.kind == "categorical":
                values = f"{self._name}_values_{i}"
                joins += f" LEFT JOIN {values} ON f{i} = {values}.value"
                selected.append(f"coalesce({values}.code, 0)::INTEGER AS f{i}")
            elif feature.kind != "multi":
                selected.append(f"f{i}")

        def encode_all(batch: pa.RecordBatch) -> Any:
            texts = {
                i: self._vocabularies[self._features[i].vocabulary].encode_batch(pc.fill_null(batch[f"f{i}"], ""))
                for i in self._texts
            }
            return encode(batch), texts, string_bytes(batch["key"]) if self._has_keys else None

        sql = f"SELECT {', '.join([*selected, 'id'])} FROM {self._name}{joins} ORDER BY id"
        for batch, (encoded, texts, keys) in self._store._encoded(
            sql, f"encode {self._name}", len(self._ids), encode_all
        ):
            append(batch, encoded)
            if keys:
                self._keys.append(*keys)
            for i, column in self._codes.items():
                column.append(self._code(self._all[i], batch[f"f{i}"]))
            for i, column in self._numbers.items():
                column.append(_floats(batch[f"f{i}"], np.nan, np.float64))
            for i, text in self._texts.items():
                text.append(*texts[i])

    @staticmethod
    def _code(feature: Feature | Filter, values: pa.Array) -> np.ndarray:
        if not isinstance(feature, Feature) or feature.kind == "categorical":
            return values.to_numpy()
        numbers = _floats(values, np.nan, np.float64)
        codes = np.searchsorted(np.array(feature.boundaries), numbers, side="right") + 1
        return np.where(np.isnan(numbers), 0, codes).astype(np.int32)

    def write_ids(self, file: PackedFileWriter) -> None:
        """Sections id, key.* and id_index.*."""
        file.add("id", self._ids)
        if self._has_keys:
            self._keys.copy(file, "key.splits", "key.bytes")
        splits, rows = id_index(self._ids)
        file.add("id_index.splits", splits)
        file.add("id_index.rows", rows)

    def write_features(self, file: PackedFileWriter) -> tuple[StoredFeature, ...]:
        """Sections feature.* and values.*."""
        stored = []
        for i, feature in enumerate(self._features):
            name, values = f"feature.{feature.key}", None
            if feature.kind == "text":
                self._texts[i].copy(file, f"{name}.splits", f"{name}.values")
            elif feature.kind == "multi":
                self._write_lists(file, i, name)
            if feature.kind == "number":
                values = len(feature.boundaries) + 1
            elif feature.kind != "text":
                values = self._write_values(file, i, f"values.{feature.key}")
            if feature.kind in ("categorical", "number"):
                assert values is not None
                self._codes[i].copy(file, name, dtype=np.uint8 if values < _BYTE else np.int32)
            stored.append(StoredFeature(feature.key, feature.kind, values, feature.boundaries, feature.vocabulary))
        return tuple(stored)

    def write_filters(self, file: PackedFileWriter) -> None:
        """Sections filter.* and values.*."""
        for i, feature in enumerate(self._all[len(self._features) :], len(self._features)):
            name = f"filter.{feature.key}"
            if feature.kind == "number":
                self._numbers[i].copy(file, name)
                continue
            if feature.kind == "multi":
                self._write_lists(file, i, name)
            else:
                self._codes[i].copy(file, name)
            self._write_values(file, i, f"values.{feature.key}")

    def _write_lists(self, file: PackedFileWriter, i: int, name: str) -> None:
        """Codes of a feature of kind multi, in the order of the row's list."""
        codes, lengths = _Column(self._store._folder, np.int32), np.zeros(len(self._ids), np.int64)
        sql = f"""SELECT id, code FROM (SELECT id, unnest(f{i}) AS value, generate_subscripts(f{i}, 1) AS place
                  FROM {self._name}) JOIN {self._name}_values_{i} USING (value) ORDER BY id, place"""
        for batch in self._store._batches(sql, f"write {self._name}"):
            codes.append(batch["code"].to_numpy())
            found, number = np.unique(batch["id"].to_numpy(), return_counts=True)
            lengths[np.searchsorted(self._ids, found)] += number
        file.add(f"{name}.splits", _splits(lengths))
        codes.copy(file, f"{name}.values")

    def _write_values(self, file: PackedFileWriter, i: int, name: str) -> int:
        values = _Texts(self._store._folder, np.uint8)
        for batch in self._store._batches(
            f"SELECT value FROM {self._name}_values_{i} ORDER BY code", f"write {self._name}"
        ):
            values.append(*string_bytes(batch["value"]))
        values.copy(file, f"{name}.splits", f"{name}.bytes")
        return values.rows


class _Column:
    """One array that grows on disk, until a packed file, which takes one section after another, has its turn."""

    def __init__(self, folder: Path, dtype: Any):
        self._dtype, self.rows = np.dtype(dtype), 0
        self._path = folder / f"column-{next(_numbers)}"
        self._file: IO[bytes] = open(self._path, "wb")  # noqa: SIM115

    def append(self, values: np.ndarray) -> None:
        assert values.dtype == self._dtype, (values.dtype, self._dtype)
        self._file.write(np.ascontiguousarray(values).data)
        self.rows += len(values)

    def copy(
        self,
        file: PackedFileWriter,
        name: str,
        begin: int = 0,
        end: int | None = None,
        change: Callable[[np.ndarray], np.ndarray] | None = None,
        dtype: Any = None,
    ) -> None:
        """Writes rows `begin` to `end` as a section, of what `change` makes of them, as `dtype` if given."""
        self._file.flush()
        dtype = np.dtype(dtype or self._dtype)
        end = self.rows if end is None else end
        if begin == end:
            file.add(name, np.zeros(0, dtype))
        for row in range(begin, end, _COPIED):
            count = min(_COPIED, end - row)
            values = np.fromfile(self._path, self._dtype, count, offset=row * self._dtype.itemsize)
            file.append(name, (change(values) if change else values).astype(dtype, copy=False))


_COPIED = 1 << 18
_BYTE = 256  # values that a byte tells apart
_numbers = itertools.count()


class _Texts:
    """A ragged column: flat values on disk, lengths in memory."""

    def __init__(self, folder: Path, dtype: Any):
        self._values = _Column(folder, dtype)
        self._lengths: list[np.ndarray] = []

    @property
    def rows(self) -> int:
        return sum(map(len, self._lengths))

    @functools.cached_property
    def _splits(self) -> np.ndarray:
        return _splits(np.concatenate([np.zeros(0, np.int64), *self._lengths]))

    def append(self, values: np.ndarray, splits: np.ndarray) -> None:
        self._values.append(values)
        self._lengths.append(np.diff(splits))

    def copy(
        self, file: PackedFileWriter, splits_name: str, values_name: str, begin: int = 0, end: int | None = None
    ) -> None:
        """Writes rows `begin` to `end` as two sections."""
        self._values.copy(file, values_name, *_add_splits(file, splits_name, self._splits, begin, end))


@dataclasses.dataclass
class _Sections:
    columns: list[_Column]
    splits: np.ndarray  # int64 [rows + 1]


def _splits(lengths: np.ndarray) -> np.ndarray:
    """Where each of some rows begins, int64 [rows + 1]."""
    splits = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=splits[1:])
    return splits


def _add_splits(
    file: PackedFileWriter, name: str, splits: np.ndarray, begin: int = 0, end: int | None = None
) -> tuple[int, int]:
    """Writes the splits of rows `begin` to `end`, from 0 on; returns where their values begin and end."""
    piece = splits[begin : len(splits) if end is None else end + 1]
    file.add(name, piece - piece[0])
    return int(piece[0]), int(piece[-1])


def _less(first: int) -> Callable[[np.ndarray], np.ndarray]:
    """Rows counted from `first` on; -1 stays."""
    return lambda rows: np.where(rows < 0, rows, rows - first)


def _code_of(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Places in ascending `values`, which hold all that are asked for."""
    return lambda numbers: np.searchsorted(values, numbers)


def _floats(values: pa.Array, missing: float, dtype: Any = np.float32) -> np.ndarray:
    return pc.fill_null(values, pa.scalar(missing, values.type)).to_numpy(zero_copy_only=False).astype(dtype)


def _md5_number(text: str, begin: int) -> str:
    """SQL: 64 bits of the MD5 of a text, from hex digit `begin` (1 or 17) on, big endian."""
    return f"('0x' || substr(md5({text}), {begin}, 16))::UBIGINT"


def string_bytes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 bytes uint8 [total] and row splits int64 [n + 1] of texts; null is the empty text."""
    texts = pc.fill_null(texts.cast(pa.large_string()), "")
    _, offsets, data = texts.buffers()
    splits = np.frombuffer(offsets, np.int64, len(texts) + 1, texts.offset * 8) if len(texts) else np.zeros(1, np.int64)
    values = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    return values[splits[0] : splits[-1]], splits - splits[0]


def mix64(x: np.ndarray) -> np.ndarray:
    """Mix64 of dpsr_tf/ops/permutation.h: uint64 [n] -> uint64 [n]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def id_index(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits int32 [2^k + 1] and rows int32 [n]: the rows of the ids whose Mix64 begins with the k bits of a bucket.

    2^k is the smallest power of two that is n or more, so a bucket holds one row on average.
    """
    k = max(len(ids) - 1, 0).bit_length()
    bucket = (mix64(ids.astype(np.uint64)) >> np.uint64(64 - k)).astype(np.int64) if k else np.zeros(len(ids), np.int64)
    splits = _splits(np.bincount(bucket, minlength=1 << k)).astype(np.int32)
    return splits, np.argsort(bucket, kind="stable").astype(np.int32)


def has_weights(schema: InteractionsSchema) -> bool:
    """Whether positive pairs may have another weight than 1."""
    return schema.weight is not None or any(weight != 1 for weight in schema.type_weights.values())


def has_requests(schema: InteractionsSchema) -> bool:
    """Whether the log may tell which items were shown and not clicked: `types` need not name what has its own name."""
    return schema.type is not None


def held_out_from(schema: InteractionsSchema, last_time: int) -> int:
    """The first second since 1970 that is held out, where that goes by time. Raises CommandError for a bad `after`."""
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
            f"interactions: held_out: after is '{given}', expected a time as 2024-01-31T12:00:00, or a number in "
            f"time_unit; correct the schema"
        ) from None
    return math.floor((moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp())


def ordered(pool: ThreadPoolExecutor, function: Callable[[T], R], values: Iterable[T], threads: int) -> Iterator[R]:
    """`function` of each value, on the threads of a pool, in order; only a few values wait at a time."""
    waiting: collections.deque[Future[R]] = collections.deque()
    try:
        for value in values:
            waiting.append(pool.submit(function, value))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
