"""The parts that the files of items and users have in common: ids, features and filters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpsr_common.packed_file import PackedFileWriter
from dpsr_tf.data.code_book import CodeBook
from dpsr_tf.data.column_files import ColumnFile, RaggedColumnFile, row_splits, string_bytes
from dpsr_tf.data.database import Database
from dpsr_tf.data.id_index import id_index
from dpsr_tf.data.schema import FIXED_KINDS, VALUE_KINDS, Feature, Filter
from dpsr_tf.data.store import StoredFeature
from dpsr_tokenizer import Vocabulary

# How many values a byte can tell apart.
BYTE_VALUES = 256


class FeatureTable:
    """Reads the table of items or users from the database and writes its ids, features and filters.

    Features and filters are the columns f0, f1, ... of the table, filters last.
    """

    def __init__(
        self,
        database: Database,
        name: str,
        ids: np.ndarray,
        features: tuple[Feature, ...],
        vocabularies: dict[str | None, Vocabulary],
        filters: tuple[Filter, ...] = (),
        codes: CodeBook | None = None,
        values: Sequence[Sequence[str] | None] | None = None,
    ):
        """Gives each value of a feature its code.

        Args:
            database: holds the table.
            name: "items" or "users".
            ids: int64 [rows], ascending.
            features: features of the schema.
            vocabularies: for features of kind text; None is the vocabulary of the item text.
            filters: filters of the schema.
            codes: codes that the values of some features have already; other values of these features are unknown.
            values: for a piece of a table, the texts of code 1, 2, ... of each feature and filter in the whole table;
                None for kinds without codes.
        """
        self._database, self._name, self._ids = database, name, ids
        self._features, self._vocabularies = features, vocabularies
        self._all: tuple[Feature | Filter, ...] = (*features, *filters)
        self._has_keys = "key" in database.columns(name)
        folder = database.folder
        self._keys = RaggedColumnFile(folder, np.uint8)
        self._codes = {
            i: ColumnFile(folder, np.int32)
            for i, f in enumerate(self._all)
            if f.kind == "categorical" or (f.kind == "number" and isinstance(f, Feature))
        }
        self._numbers = {
            i: ColumnFile(folder, np.float64)
            for i, f in enumerate(self._all)
            if f.kind == "number" and isinstance(f, Filter)
        }
        self._texts = {i: RaggedColumnFile(folder, np.int32) for i, f in enumerate(features) if f.kind == "text"}
        self._vectors = {i: RaggedColumnFile(folder, np.float32) for i, f in enumerate(features) if f.kind == "vector"}
        for i, feature in enumerate(self._all):
            if feature.kind not in VALUE_KINDS:
                continue
            known = known_values(codes, name, feature) if values is None else values[i]
            if known is None:
                self._number_values(i, feature)
            else:
                numbers = pa.array(np.arange(1, len(known) + 1), pa.int32())
                rows = pa.record_batch({"value": pa.array(known, pa.large_string()), "code": numbers})
                self._database.insert(f"{name}_values_{i}", rows)

    def _number_values(self, i: int, feature: Feature | Filter) -> None:
        """Creates the table values_i of values and codes. Frequent values come first, ties in order of their bytes."""
        table = f"{self._name}_values_{i}"
        self._database.create(f"{table}_all", value_counts(self._name, i, feature))
        self._database.create(
            table,
            f"""SELECT value, row_number() OVER (ORDER BY n DESC, value)::INTEGER AS code
                FROM ({most_frequent(f"{table}_all", feature)})""",
        )
        self._database.drop(f"{table}_all")

    def read(
        self,
        columns: Sequence[str],
        encode: Callable[[pa.RecordBatch], Any],
        append: Callable[[pa.RecordBatch, Any], None],
    ) -> None:
        """Reads the table in the order of its ids.

        Args:
            columns: further columns that `encode` and `append` use.
            encode: runs on the worker threads, for each batch.
            append: runs on this thread, in order, with each batch and the value that `encode` returned for it.
        """
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

        query = f"SELECT {', '.join([*selected, 'id'])} FROM {self._name}{joins} ORDER BY id"
        batches = self._database.encoded_batches(query, f"encode {self._name}", len(self._ids), encode_all)
        for batch, (encoded, texts, keys) in batches:
            append(batch, encoded)
            if keys:
                self._keys.append(*keys)
            for i, column in self._codes.items():
                column.append(_codes_of(self._all[i], batch[f"f{i}"]))
            for i, column in self._numbers.items():
                column.append(floats_of(batch[f"f{i}"], np.nan, np.float64))
            for i, text in self._texts.items():
                text.append(*texts[i])
            for i, vectors in self._vectors.items():
                lengths = pc.fill_null(pc.list_value_length(batch[f"f{i}"]), 0).to_numpy(zero_copy_only=False)
                vectors.append(pc.list_flatten(batch[f"f{i}"]).to_numpy(), row_splits(lengths))

    def write_ids(self, file: PackedFileWriter) -> None:
        """Writes the sections id, key.* and id_index.*."""
        file.add("id", self._ids)
        if self._has_keys:
            self._keys.copy(file, "key.splits", "key.bytes")
        splits, rows = id_index(self._ids)
        file.add("id_index.splits", splits)
        file.add("id_index.rows", rows)

    def write_features(self, file: PackedFileWriter) -> tuple[StoredFeature, ...]:
        """Writes the sections feature.* and values.*. Returns what the manifest says about the features."""
        stored = []
        for i, feature in enumerate(self._features):
            name, num_values = f"feature.{feature.key}", None
            if feature.kind == "text":
                self._texts[i].copy(file, f"{name}.splits", f"{name}.values")
            elif feature.kind == "vector":
                self._vectors[i].copy(file, f"{name}.splits", f"{name}.values")
                num_values = feature.length
            elif feature.kind == "multi":
                self._write_lists(file, i, name)
            if feature.kind == "number":
                num_values = len(feature.boundaries) + 1
            elif feature.kind in VALUE_KINDS:
                num_values = self._write_values(file, i, f"values.{feature.key}")
            if feature.kind in FIXED_KINDS:
                assert num_values is not None
                self._codes[i].copy(file, name, dtype=np.uint8 if num_values < BYTE_VALUES else np.int32)
            stored.append(StoredFeature(feature.key, feature.kind, num_values, feature.boundaries, feature.vocabulary))
        return tuple(stored)

    def write_filters(self, file: PackedFileWriter) -> None:
        """Writes the sections filter.* and values.*."""
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
        """Writes the codes of a feature of kind multi; the codes of a row are in the order of its list."""
        codes, lengths = ColumnFile(self._database.folder, np.int32), np.zeros(len(self._ids), np.int64)
        query = f"""SELECT id, code FROM (SELECT id, unnest(f{i}) AS value, generate_subscripts(f{i}, 1) AS place
                    FROM {self._name}) JOIN {self._name}_values_{i} USING (value) ORDER BY id, place"""
        for batch in self._database.batches(query, f"write {self._name}"):
            codes.append(batch["code"].to_numpy())
            ids, counts = np.unique(batch["id"].to_numpy(), return_counts=True)
            lengths[np.searchsorted(self._ids, ids)] += counts
        file.add(f"{name}.splits", row_splits(lengths))
        codes.copy(file, f"{name}.values")

    def _write_values(self, file: PackedFileWriter, i: int, name: str) -> int:
        """Writes the texts of a feature's codes, from code 1 on. Returns how many there are."""
        values = RaggedColumnFile(self._database.folder, np.uint8)
        query = f"SELECT value FROM {self._name}_values_{i} ORDER BY code"
        for batch in self._database.batches(query, f"write {self._name}"):
            values.append(*string_bytes(batch["value"]))
        values.copy(file, f"{name}.splits", f"{name}.bytes")
        return values.rows


def known_values(codes: CodeBook | None, table: str, feature: Feature | Filter) -> list[str] | None:
    """Returns the texts of code 1, 2, ... of a feature that a model knows; None if they are to be counted."""
    return codes.values(table, feature.key) if codes and isinstance(feature, Feature) else None


def value_counts(table: str, i: int, feature: Feature | Filter) -> str:
    """Returns SQL for the values of a column of a table, and how many rows have each: columns `value`, `n`."""
    value = f"unnest(f{i})" if feature.kind == "multi" else f"f{i}"
    return f"SELECT value, count(*) AS n FROM (SELECT {value} AS value FROM {table}) GROUP BY value"


def most_frequent(counts: str, feature: Feature | Filter) -> str:
    """Returns SQL for the values that get a code, in the order of their codes, from a table `value`, `n`."""
    return f"FROM {counts} WHERE value <> '' ORDER BY n DESC, value LIMIT {feature.max_values}"


def _codes_of(feature: Feature | Filter, values: pa.Array) -> np.ndarray:
    """Returns the codes of a categorical column, which the database has joined, or the buckets of numbers."""
    if not isinstance(feature, Feature) or feature.kind == "categorical":
        return values.to_numpy()
    numbers = floats_of(values, np.nan, np.float64)
    codes = np.searchsorted(np.array(feature.boundaries), numbers, side="right") + 1
    return np.where(np.isnan(numbers), 0, codes).astype(np.int32)


def floats_of(values: pa.Array, missing: float, dtype: Any = np.float32) -> np.ndarray:
    """Turns Arrow numbers into an array; `missing` stands for null."""
    return pc.fill_null(values, pa.scalar(missing, values.type)).to_numpy(zero_copy_only=False).astype(dtype)
