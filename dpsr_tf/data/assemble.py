"""Assembles encoded Arrow batches into the packed files of a store (format 2), in bounded memory.

Rows wait in a temporary database. When all are there, they are sorted, joined and counted, and written.

    with Workers(2) as workers, Assembler(schema, out, workers, memory=2**30) as store:
        for rows in ...:
            store.add("items", rows, numbers)
        repeated = store.close_table("items")
        ...
        counts, features, sections = store.write(shards=1)

docs/data_format.md describes the layout of the files.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFileWriter
from dpsr_tf.data.click_graph import write_graph
from dpsr_tf.data.code_book import CodeBook
from dpsr_tf.data.column_files import ColumnFile, RaggedColumnFile, string_bytes
from dpsr_tf.data.database import TEXT_ROWS, Database
from dpsr_tf.data.feature_table import FeatureTable, floats_of, value_counts
from dpsr_tf.data.interaction_log import InteractionLog
from dpsr_tf.data.log_parts import KeptLog
from dpsr_tf.data.parallel import Workers
from dpsr_tf.data.query_pairs import QueryPairs
from dpsr_tf.data.request_log import RequestLog
from dpsr_tf.data.schema import Feature, Filter, Schema
from dpsr_tf.data.store import Counts, Features, StoredFeature, vocabulary_name
from dpsr_tokenizer import TokenizerConfig, Vocabulary, VocabularyBuilder


class Assembler:
    """Takes the rows of three tables, one after another, and writes all packed files of a store."""

    def __init__(
        self,
        schema: Schema,
        out: Path,
        workers: Workers,
        memory: int,
        codes: CodeBook | None = None,
        log: KeptLog | None = None,
        folder: Path | None = None,
    ):
        """Begins a store.

        Args:
            schema: describes the rows.
            out: an existing, empty directory for the files.
            workers: threads that encode text; DuckDB and the vocabulary builder use as many of their own.
            memory: bytes that DuckDB and the vocabulary builder use at most. Other rows wait in a folder of `out`,
                which is removed at the end.
            codes: token ids and feature codes that the store takes over; None makes new ones.
            log: keeps the interactions in the store, beside those of an earlier one.
            folder: where rows wait, a folder that does not exist yet; None is one in `out`.
        """
        self._schema, self._out, self._workers, self._memory = schema, out, workers, memory
        self._codes, self._kept = codes, log
        self._folder = folder or out / "unfinished"
        self._folder.mkdir()
        self._ids: dict[str, np.ndarray] = {}
        self._database = Database(self._folder, workers, memory)
        self._log = InteractionLog(schema.interactions, self._database)
        self._requests = RequestLog(schema, self._database) if schema.ranking else None
        self._query_pairs = QueryPairs(schema, self._database) if schema.rewriting else None

    def __enter__(self) -> Assembler:
        """Returns the assembler itself."""
        return self

    def __exit__(self, *unused: object) -> None:
        """Removes everything that is not part of the store."""
        self._database.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, table: str, rows: pa.RecordBatch, numbers: np.ndarray | None = None) -> None:
        """Adds rows of "items", "users" or "interactions", as encode.py returns them.

        Args:
            table: the table. Each table is complete before the next one begins; items and users are closed before
                interactions begin.
            rows: its next rows.
            numbers: int64 [rows], for items and users: the place of each row among all rows of the input. Of two rows
                with the same id the one with the lower number is kept.
        """
        if table == "interactions":
            self._add_to_log(rows)
            if self._kept:
                self._kept.add(rows)
            return
        rows = rows.rename_columns(plain_names(rows.schema.names))
        self._database.insert(table, rows.append_column("number", pa.array(numbers, pa.int64())))

    def _add_to_log(self, rows: pa.RecordBatch) -> None:
        self._log.add(rows)
        if self._requests:
            self._requests.add(rows)

    def close_table(self, table: str, is_first: bool = True) -> tuple[np.ndarray, list[str]]:
        """Ends "items" or "users": keeps the first row of each id, and adds the anonymous user as row 0 of the users.

        Args:
            table: the table.
            is_first: whether this is the whole table or its first piece; another piece gets no anonymous user.

        Returns:
            The rows that repeat an id: their numbers int64 [repeated], ascending, and their ids (or keys) as text.

        Raises:
            CommandError: two text ids have the same hash.
        """
        if table == "users" and is_first:
            self._add_anonymous_user()
        repeated = self._close(table)
        if table == "users" and self._kept:
            self._kept.begin(self._out, self._ids["items"], self._ids["users"])
        return repeated

    def _close(self, table: str) -> tuple[np.ndarray, list[str]]:
        if table not in self._database:
            self._ids[table] = np.zeros(0, np.int64)
            return np.zeros(0, np.int64), []
        has_keys = "key" in self._database.columns(table)
        if has_keys:
            self._check_hashes(table)
        ids = self._database.arrays(f"SELECT id, number FROM {table} ORDER BY id, number")
        repeated = np.flatnonzero(ids["id"][1:] == ids["id"][:-1]) + 1
        self._ids[table] = np.delete(ids["id"], repeated)
        if len(repeated) == 0:
            return repeated, []
        self._database.insert("repeated", pa.record_batch({"number": pa.array(ids["number"][repeated])}))
        shown = "key" if has_keys else "id"
        rows = self._database.rows(
            f"SELECT number, {shown}::VARCHAR FROM {table} SEMI JOIN repeated USING (number) ORDER BY number"
        )
        self._database.execute(f"DELETE FROM {table} WHERE number IN (SELECT number FROM repeated)")
        self._database.drop("repeated")
        return np.array([number for number, _ in rows], np.int64), [value for _, value in rows]

    def ids(self, table: str) -> np.ndarray:
        """Returns the ids of a closed table, int64 [rows], ascending. The position of an id is its row.

        The first id of the users is -1, the anonymous user.
        """
        return self._ids[table]

    def write(self, shards: int) -> tuple[Counts, Features, dict[str, Any]]:
        """Writes all packed files of the store.

        Returns:
            What the manifest says about tables and features, and its parts `ranking`, `graph` and `rewriting`, if the
            schema has these sections.

        Raises:
            CommandError: no interaction is a positive pair for training.
        """
        for rows in self._kept.older() if self._kept else ():
            self._add_to_log(rows)
        if self._query_pairs:
            self._query_pairs.find_reformulations(self._log.last_time)
        self._log.number_queries(shards)
        vocabularies = self._write_vocabularies()
        clicks = None if self._schema.items.popularity else self._log.item_clicks(len(self._ids["items"]))
        item_features = self.write_items(vocabularies, clicks)
        with PackedFileWriter(self._out / "users.dpsr", "users") as file:
            user_features = self.write_users(file, vocabularies)
            events = self._log.write_events(file, len(self._ids["users"]))
        counts = self._log.write_interactions(self._out, shards, vocabularies[None])
        counts["held_out"] = self._log.write_held_out(self._out)
        counts |= {"users": len(self._ids["users"]), "items": len(self._ids["items"]), "events": events, "rejected": 0}
        sections: dict[str, Any] = {}
        if self._schema.graph:
            clicks = self._log.item_clicks(len(self._ids["items"]))
            sections["graph"] = write_graph(self._database, self._schema, self._out, shards, clicks)
        if self._query_pairs:
            sections["rewriting"] = self._query_pairs.write(self._out, shards, self._codes, **self._counting())
        if self._requests:
            sections["ranking"] = self._requests.write(self._out, shards, vocabularies[None], len(self._ids["users"]))
        return Counts(**counts), Features(item_features, user_features), sections

    # Pieces: see pieces.py, which calls these in place of `write`.

    def save_value_counts(self, table: str, i: int, path: Path) -> None:
        """Writes a Parquet file `value`, `n`: how many rows of a closed table have each value of its column `i`."""
        self._database.save(value_counts(table, i, coded_columns(self._schema, table)[i]), path)

    # Tables.

    def _user_features(self) -> tuple[Feature, ...]:
        return self._schema.users.features if self._schema.users else ()

    def _add_anonymous_user(self) -> None:
        if "users" not in self._database:
            # No row has created the table, because there are no known users.
            types = {
                "categorical": "VARCHAR",
                "number": "DOUBLE",
                "multi": "VARCHAR[]",
                "text": "VARCHAR",
                "vector": "FLOAT[]",
            }
            columns = {"id": "BIGINT", "number": "BIGINT"}
            columns |= {f"f{i}": types[feature.kind] for i, feature in enumerate(self._user_features())}
            nulls = ", ".join(f"NULL::{kind} AS {name}" for name, kind in columns.items())
            self._database.create("users", f"SELECT {nulls} LIMIT 0")
        values = {"id": "-1", "number": "-1", "key": "''"}
        columns_of_row = ", ".join(values.get(name, "NULL") for name in self._database.columns("users"))
        self._database.execute(f"INSERT INTO users SELECT {columns_of_row}")

    def _check_hashes(self, table: str) -> None:
        """Raises CommandError if two text ids have the same hash."""
        same = self._database.rows(
            f"SELECT min(key), max(key) FROM {table} GROUP BY id HAVING min(key) <> max(key) ORDER BY ALL LIMIT 1"
        )
        for first, second in same:
            raise CommandError(
                f"{table}: the ids '{first}' and '{second}' have the same 63-bit hash; give one of them another id"
            )

    # Files.

    def _write_vocabularies(self) -> dict[str | None, Vocabulary]:
        """Writes all vocabularies. Returns them by name; None is that of query and item text."""
        written: dict[str | None, Vocabulary] = {}
        for name in (None, *self._schema.vocabularies):
            count = functools.partial(self.count_tokens, name)
            written[name] = write_vocabulary(self._schema, name, self._out, self._codes, count)
        return written

    def count_tokens(self, name: str | None) -> VocabularyBuilder:
        """Counts the tokens of a vocabulary in the tables that are there: "items", "users", the queries."""
        tables = {"items": self._schema.items.features, "users": self._user_features()}
        texts = [("items", "text", "items", ""), ("queries", "text", "queries", "WHERE training")]
        if name is not None:
            texts = [
                (f"{table} {feature.key}", f"f{i}", table, f"WHERE f{i} IS NOT NULL")
                for table, features in tables.items()
                for i, feature in enumerate(features)
                if feature.vocabulary == name
            ]
        builder = VocabularyBuilder(tokenizer_config(self._schema, name), **self._counting())
        for label, column, table, which in texts:
            if table not in self._database:
                continue
            query = f"SELECT {column} FROM {table} {which}"
            for batch in self._database.batches(query, f"count {label}", self._database.count(table), TEXT_ROWS):
                builder.add(batch.column(0))
        return builder

    def _counting(self) -> dict[str, Any]:
        """Returns the options of a VocabularyBuilder."""
        return {
            "num_threads": self._workers.threads,
            "max_memory_bytes": self._memory,
            "temporary_directory": self._folder,
        }

    def write_items(
        self,
        vocabularies: dict[str | None, Vocabulary],
        clicks: np.ndarray | None = None,
        values: Sequence[Sequence[str] | None] | None = None,
    ) -> tuple[StoredFeature, ...]:
        """Writes items.dpsr, titles.dpsr and filters.dpsr.

        Args:
            vocabularies: by name; None is that of the item text.
            clicks: float32 [items], the popularity where the schema names no column for it.
            values: for a piece, see FeatureTable.
        """
        schema, ids = self._schema.items, self._ids["items"]
        others = [name for name in schema.text_names.values() if name != "title"] + list(schema.search_names)
        tokens = RaggedColumnFile(self._folder, np.int32)
        texts = {name: RaggedColumnFile(self._folder, np.uint8) for name in ("title", *others)}
        popularity = ColumnFile(self._folder, np.float32)

        def encode(batch: pa.RecordBatch) -> Any:
            return vocabularies[None].encode_batch(batch["text"]), {name: string_bytes(batch[name]) for name in texts}

        def append(batch: pa.RecordBatch, encoded: Any) -> None:
            tokens.append(*encoded[0])
            for name, text in texts.items():
                text.append(*encoded[1][name])
            popularity.append(floats_of(batch["popularity"], 0))

        with PackedFileWriter(self._out / "items.dpsr", "items") as file:
            table = FeatureTable(
                self._database, "items", ids, schema.features, vocabularies, schema.filters, self._codes, values
            )
            table.read([*texts, "text", "popularity"], encode, append)
            table.write_ids(file)
            if clicks is None:
                popularity.copy(file, "popularity")
            else:
                file.add("popularity", clicks)
            tokens.copy(file, "tokens.splits", "tokens.values")
            features = table.write_features(file)
        with PackedFileWriter(self._out / "titles.dpsr", "titles") as file:
            for name, text in texts.items():
                text.copy(file, f"{name}.splits", f"{name}.bytes")
        if schema.filters:
            with PackedFileWriter(self._out / "filters.dpsr", "filters") as file:
                table.write_filters(file)
        return features

    def write_users(
        self,
        file: PackedFileWriter,
        vocabularies: dict[str | None, Vocabulary],
        values: Sequence[Sequence[str] | None] | None = None,
    ) -> tuple[StoredFeature, ...]:
        """Writes the sections of users.dpsr, up to the events. The arguments are as in write_items."""
        table = FeatureTable(
            self._database,
            "users",
            self._ids["users"],
            self._user_features(),
            vocabularies,
            codes=self._codes,
            values=values,
        )
        table.read([], lambda batch: None, lambda batch, encoded: None)
        table.write_ids(file)
        return table.write_features(file)


def coded_columns(schema: Schema, table: str) -> tuple[Feature | Filter, ...]:
    """Returns the features of a table and then its filters: its columns f0, f1, ... in the database."""
    if table == "items":
        return (*schema.items.features, *schema.items.filters)
    return schema.users.features if schema.users else ()


def plain_names(names: Sequence[str]) -> list[str]:
    """Replaces the names of features and filters by f0, f1, ...: they may differ in case only, which SQL ignores."""
    numbers = itertools.count()
    return [f"f{next(numbers)}" if name.startswith(("feature.", "filter.")) else name for name in names]


def tokenizer_config(schema: Schema, name: str | None) -> TokenizerConfig:
    """Returns the tokenizer of a vocabulary of the schema; None is that of query and item text."""
    section = schema.tokenizer if name is None else schema.vocabularies[name].tokenizer
    return TokenizerConfig(**dataclasses.asdict(section))


def write_vocabulary(
    schema: Schema, name: str | None, out: Path, codes: CodeBook | None, count: Callable[[], VocabularyBuilder]
) -> Vocabulary:
    """Writes a vocabulary of the store `out`: a copy of the model's, or the tokens that `count` counts."""
    path = out / vocabulary_name(name)
    known = codes.vocabulary(name) if codes else None
    if known is not None:
        shutil.copyfile(known, path)
        return Vocabulary(path)
    limits = schema.vocabulary if name is None else schema.vocabularies[name].vocabulary
    try:
        count().write(path, **dataclasses.asdict(limits))
    except ValueError as error:
        # The limits leave no token that gets an id.
        raise CommandError(f"vocabulary: {error}; lower min_count, or give num_oov_buckets") from None
    return Vocabulary(path)
