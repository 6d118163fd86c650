"""Item attributes that searches filter by: from the store into `item_attributes.dpsr`, beside the index.

A packed file of kind "item_attributes", which export/faiss_search/item_filter.h reads. Its rows are positions of the
index. For each filter NAME of the schema, in its order:

    value.NAME           kind number: float32 if that holds every value exactly, else float64; NaN where there is none
                         categorical: code of the value, uint8, uint16 or int32, whichever suffices; 0 is none
                         multi: codes of all values, one position after the other
    splits.NAME          multi: int64 [positions + 1], where the values of a position begin
    text.NAME.splits,    text of codes 1, 2, ..., ascending by its UTF-8 bytes
    text.NAME.bytes

and `item_ids.fingerprint`, uint64 [1], of the item ids with which the file was written.
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
        name: in filters.
        values: [positions] numbers, NaN where there is none, or codes from 1 on into `texts`, 0 where there is none; of
            a multi-valued attribute [values] codes.
        texts: what codes stand for, in any order, each once; None for numbers.
        splits: int64 [positions + 1], of a multi-valued attribute: where the values of a position begin.
    """

    name: str
    values: NDArray[Any]
    texts: list[str] | None = None
    splits: NDArray[np.int64] | None = None


def write(directory: Path, store: Store) -> list[str]:
    """Writes the attributes of the items of `directory`/item_ids.dpsr, if the schema of their store names filters.

    Returns:
        The names of the files written: one, or none.

    Raises:
        CommandError: the store is damaged.
    """
    if not store.schema.items.filters:
        return []
    ids = PackedFile(str(directory / "item_ids.dpsr"), "item_ids")["id"]
    write_columns(directory, _columns(store, np.searchsorted(store.items()["id"], ids)))
    return [FILE]


def write_columns(directory: Path, columns: Iterable[Column]) -> None:
    """Writes attributes of the items of `directory`/item_ids.dpsr, in their order."""
    with _writer(directory) as file:
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


def take(source: Path, directory: Path, positions: NDArray[np.int64]) -> None:
    """Writes the attributes of some positions of the index in `source` beside the item ids of these in `directory`."""
    attributes = PackedFile(str(source / FILE), _KIND)
    with _writer(directory) as file:
        for section in attributes:
            kind, _, name = section.partition(".")
            if kind == "value" and f"splits.{name}" in attributes:
                splits, places = _take(attributes[f"splits.{name}"], positions)
                file.add(section, attributes[section][places])
                file.add(f"splits.{name}", splits)
            elif kind == "value":
                file.add(section, attributes[section][positions])
            elif kind == "text":
                file.add(section, attributes[section])


@contextmanager
def _writer(directory: Path) -> Iterator[PackedFileWriter]:
    """A file for the items of the item ids that are there."""
    item_ids = PackedFile(str(directory / "item_ids.dpsr"), "item_ids")
    with PackedFileWriter(str(directory / FILE), _KIND) as file:
        file.add("item_ids.fingerprint", np.array([item_ids.fingerprint], np.uint64))
        yield file


def _columns(store: Store, rows: NDArray[np.int64]) -> Iterator[Column]:
    """The filters of a store, of some of its items."""
    filters = store.filters()
    assert filters is not None
    for attribute in store.schema.items.filters:
        name = attribute.key
        if attribute.kind == "number":
            yield Column(name, filters[f"filter.{name}"][rows])
            continue
        texts = unpack_strings(filters, f"values.{name}")
        if attribute.kind == "multi":
            splits, places = _take(filters[f"filter.{name}.splits"], rows)
            yield Column(name, filters[f"filter.{name}.values"][places], texts, splits)
        else:
            yield Column(name, filters[f"filter.{name}"][rows], texts)


def _ordered(texts: list[str]) -> tuple[NDArray[np.uint8 | np.uint16 | np.int32], list[str]]:
    """By the code of the store, 0 to values, the code in the order of the texts; and the texts in that order."""
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


def _take(splits: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits int64 [rows + 1] of some rows, and the places of their values."""
    lengths = np.diff(splits)[rows]
    taken = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    places = np.arange(taken[-1]) + np.repeat(splits[rows] - taken[:-1], lengths)
    return taken, places
