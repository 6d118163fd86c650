"""The attributes of items that searches filter by, written from the store to `item_attributes.dpsr` beside the index.

It is a packed file of kind "item_attributes", which export/faiss_search/item_filter.h reads. Its rows are positions of
the index. For each filter NAME of the schema, in this order:

    value.NAME           kind number: float32 if that holds every value exactly, otherwise float64; NaN if missing
                         categorical: code of the value, in the smallest of uint8, uint16 and int32; 0 if missing
                         multi: codes of all values, one position after the other
    splits.NAME          multi: int64 [positions + 1], where the values of each position begin
    text.NAME.splits,    texts of the codes 1, 2, ..., ascending by their UTF-8 bytes
    text.NAME.bytes

The section `item_ids.fingerprint`, uint64 [1], identifies the item ids with which the file was written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_tf.data.store import Store, pack_strings, unpack_strings

FILE = "item_attributes.dpsr"
_KIND = "item_attributes"


@dataclasses.dataclass(frozen=True)
class Column:
    """One attribute of the items of an index.

    Attributes:
        name: its name in filters.
        values: [positions] numbers, with NaN for a missing value; or [positions] codes, where code i stands for
            texts[i - 1] and 0 for a missing value; or [values] codes of a multi-valued attribute.
        texts: distinct texts of the codes, in any order. None for numbers.
        splits: int64 [positions + 1], where the values of each position begin. Only for multi-valued attributes.
    """

    name: str
    values: NDArray[Any]
    texts: list[str] | None = None
    splits: NDArray[np.int64] | None = None


def write(directory: Path, store: Store) -> list[str]:
    """Writes the attributes of the items in `directory`/item_ids.dpsr, if the schema of the store has filters.

    Returns:
        The names of the written files: one or none.

    Raises:
        CommandError: the store is damaged.
    """
    if not store.schema.items.filters:
        return []
    ids = PackedFile(str(directory / "item_ids.dpsr"), "item_ids")["id"]
    write_columns(directory, columns(store, np.searchsorted(store.items()["id"], ids)))
    return [FILE]


def write_columns(directory: Path, columns: Iterable[Column]) -> None:
    """Writes given attributes of the items in `directory`/item_ids.dpsr, in the order of their positions."""
    with _writer(directory) as file:
        add_columns(file, columns)


def add_columns(file: PackedFileWriter, columns: Iterable[Column]) -> None:
    """Adds the sections value.*, splits.* and text.* of attributes to a packed file."""
    for column in columns:
        values = column.values
        if column.texts is None:
            file.add(f"value.{column.name}", _narrow(values))
            continue
        codes, texts = _ordered(column.texts)
        splits, data = pack_strings(texts)
        file.add(f"value.{column.name}", codes[values])
        if column.splits is not None:
            file.add(f"splits.{column.name}", column.splits)
        file.add(f"text.{column.name}.splits", splits)
        file.add(f"text.{column.name}.bytes", data)


def copy_positions(source: Path, directory: Path, positions: NDArray[np.int64]) -> None:
    """Copies the attributes of some positions of the index in `source` to `directory`, which has their item ids."""
    attributes = PackedFile(str(source / FILE), _KIND)
    with _writer(directory) as file:
        for section in attributes:
            kind, _, name = section.partition(".")
            if kind == "value" and f"splits.{name}" in attributes:
                splits, places = select_rows(attributes[f"splits.{name}"], positions)
                file.add(section, attributes[section][places])
                file.add(f"splits.{name}", splits)
            elif kind == "value":
                file.add(section, attributes[section][positions])
            elif kind == "text":
                file.add(section, attributes[section])


@contextmanager
def _writer(directory: Path) -> Iterator[PackedFileWriter]:
    """Opens an attributes file for the items in `directory`/item_ids.dpsr."""
    item_ids = PackedFile(str(directory / "item_ids.dpsr"), "item_ids")
    with PackedFileWriter(str(directory / FILE), _KIND) as file:
        file.add("item_ids.fingerprint", np.array([item_ids.fingerprint], np.uint64))
        yield file


def columns(store: Store, rows: NDArray[np.int64]) -> Iterator[Column]:
    """Returns the filter attributes of some items of a store, which has filters."""
    filters = store.filters()
    assert filters is not None
    for attribute in store.schema.items.filters:
        name = attribute.key
        if attribute.kind == "number":
            yield Column(name, filters[f"filter.{name}"][rows])
            continue
        texts = unpack_strings(filters, f"values.{name}")
        if attribute.kind == "multi":
            splits, places = select_rows(filters[f"filter.{name}.splits"], rows)
            yield Column(name, filters[f"filter.{name}.values"][places], texts, splits)
        else:
            yield Column(name, filters[f"filter.{name}"][rows], texts)


def _ordered(texts: list[str]) -> tuple[NDArray[np.uint8 | np.uint16 | np.int32], list[str]]:
    """Returns the sorted texts, and an array that maps each code of the store, 0 to len(texts), to the sorted code."""
    encoded = [text.encode() for text in texts]
    order = sorted(range(len(texts)), key=encoded.__getitem__)
    codes = np.zeros(len(texts) + 1, np.int64)
    codes[np.array(order, np.int64) + 1] = np.arange(1, len(texts) + 1)
    dtype = np.uint8 if len(texts) < 2**8 else np.uint16 if len(texts) < 2**16 else np.int32
    return codes.astype(dtype), [texts[place] for place in order]


def _narrow(values: NDArray[np.float64]) -> NDArray[np.float32 | np.float64]:
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return narrow if np.array_equal(narrow, values, equal_nan=True) else values


def select_rows(splits: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Selects rows of a ragged array. Returns their splits, int64 [rows + 1], and the positions of their values."""
    lengths = np.diff(splits)[rows]
    taken = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    places = np.arange(taken[-1]) + np.repeat(splits[rows] - taken[:-1], lengths)
    return taken, places
