"""Rows of a shop's tables as changes of items, for the log that servables apply (dpsr_export/item_changes.py).

Rows are read and checked as at ingest, by the schema that the newest version of the servable was made with. A change
has a tf.train.Example, whose features are

    item_text         the text that the item tower reads
    item_NAME         for each feature of the schema, as the signature `score` takes it: texts, or floats for the kinds
                      number and vector; left out if it is absent
    attribute.NAME    for each filter of the schema: texts, one or several, or a float. A number that a float32 does not
                      hold exactly is a text. In a new item, an attribute that is missing is left out. In an update, an
                      attribute that becomes missing is an empty list, and one that keeps its value is left out.
    title             the title that people see

An Example has all features of the schema, not only those that the model reads, because the log is also applied by later
models. This module does not import TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.serving_apis import Example
from dpsr_common.typed_config import from_dict
from dpsr_export.index_files import MANIFEST, MANIFEST_FORMAT, MANIFEST_VERSION
from dpsr_export.item_changes import DELETE, DIRECTORY, PUT, UPDATE, Changes, ItemChangeLog
from dpsr_tf.data.column_values import ids_of
from dpsr_tf.data.encode import Encoded, encode_item_attributes, encode_items
from dpsr_tf.data.schema import Feature, Filter, ItemsSchema
from dpsr_tf.data.store import read_manifest
from dpsr_tf.data.tables import column_names, find_files, is_json, read_batches, read_rows, rows_batch

_MEND = "correct the table; its columns are those of the schema that the servable was made with"
Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Reject:
    """A row that cannot be used.

    Attributes:
        place: file and row, for people.
        reason: what is wrong.
        value: the value that was found; None if there is none.
    """

    place: str
    reason: str
    value: str | None

    def __str__(self) -> str:
        """Returns a line for people."""
        return f"{self.place}: {self.reason}" + ("" if self.value is None else f": {self.value!r}")


def _row(number: int) -> str:
    return f"row {number + 1}"


class ServableItems:
    """What the items of a servable look like, and where the log of their changes is.

    Attributes:
        schema: describes the columns of item tables.
        string_ids: whether the shop's item ids are text.
        log: the log.
        changes_offset: the newest version was made with all changes before this one.
        version: path of the newest version.
    """

    def __init__(self, base: Path):
        """Reads the manifest of the newest version.

        Args:
            base: the directory that holds the versions or, of a servable with shards, the shards.

        Raises:
            CommandError: there is no version, or an older dpsr exported it, whose servables cannot take item changes.
        """
        self.version = newest_version(base)
        manifest = read_manifest(self.version / MANIFEST, MANIFEST_FORMAT, MANIFEST_VERSION, "dpsr export")
        kind = manifest.get("kind", "retrieval")
        if kind != "retrieval":
            raise CommandError(
                f"{self.version}: is a {kind} servable, whose items cannot change; give that of a retrieval model"
            )
        index = manifest["index"]
        if "items_schema" not in index or "apply_changes" not in manifest["inputs"]:
            raise CommandError(
                f"{self.version}: was exported by a version of DPSR that did not know changes of items; run "
                f"`dpsr index` and `dpsr export` again"
            )
        schema = from_dict(ItemsSchema, index["items_schema"], f"{self.version / MANIFEST}: items_schema")
        # These columns are not in servables.
        self.schema = dataclasses.replace(schema, popularity=None, searched=(), identifiers=(), group=None)
        self.string_ids: bool = index["string_ids"]
        self.changes_offset: int = index.get("changes_offset", 0)
        self.log = ItemChangeLog(base / DIRECTORY, self.changes_offset)

    def put_tables(self, files: Sequence[Path], version: str | None) -> Iterator[tuple[Changes, list[Reject]]]:
        """Reads tables of whole items, as at ingest. `version` is the column with the version of each row."""
        columns = [*self._put_columns(), *([version] if version else [])]
        for source in read_batches(files, columns, [], mend=_MEND):
            changes, rejects = self._changes(PUT, source.batch, version, self._encode_put)
            yield changes, _rejects(rejects, _places(source.path, source.first_row))

    def update_tables(self, files: Sequence[Path], version: str | None) -> Iterator[tuple[Changes, list[Reject]]]:
        """Reads tables with ids and new values of attributes.

        In JSON lines, a row changes only the attributes that it has. In other tables, each row changes all attributes
        that have a column; an empty cell makes the attribute missing.
        """
        for path in files:
            if is_json(path):
                first = 0
                for rows in read_rows(path):
                    yield self.update_rows(rows, version, _places(path, first))
                    first += len(rows)
                continue
            columns = column_names(path)
            filters = self._filters(columns, version, str(path))
            for source in read_batches([path], columns, [], mend=_MEND):
                changes, rejects = self._update(source.batch, filters, version)
                yield changes, _rejects(rejects, _places(path, source.first_row))

    def delete_tables(self, files: Sequence[Path], version: str | None) -> Iterator[tuple[Changes, list[Reject]]]:
        """Reads tables with the ids of items to delete. Other columns are ignored."""
        for source in read_batches(files, [self.schema.id, *([version] if version else [])], [], mend=_MEND):
            changes, rejects = self._changes(DELETE, source.batch, version, self._encode_attributes(()))
            yield changes, _rejects(rejects, _places(source.path, source.first_row))

    def put_rows(self, rows: Rows, version: str | None = None) -> tuple[Changes, list[Reject]]:
        """Encodes whole items, given as values by column. A column that a row lacks is empty.

        Raises:
            UsageError: a row has a column that the schema does not know.
        """
        known = [*self._put_columns(), *([version] if version else [])]
        strange = sorted({name for row in rows for name in row} - set(known))
        if strange:
            raise UsageError(f"a row has the column '{strange[0]}', expected only {', '.join(known)}")
        changes, rejects = self._changes(PUT, rows_batch(rows, known), version, self._encode_put)
        return changes, _rejects(rejects, _row)

    def update_rows(
        self, rows: Rows, version: str | None = None, place: Callable[[int], str] = _row
    ) -> tuple[Changes, list[Reject]]:
        """Encodes new values of attributes, given by column; None and empty values make an attribute missing.

        Raises:
            UsageError: a row has a column that is not a filter of the schema.
        """
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(tuple(row), []).append(number)
        made: list[tuple[Changes, list[int]]] = []
        rejects: dict[int, tuple[str, str | None]] = {}
        for columns, numbers in groups.items():
            filters = self._filters(columns, version, place(numbers[0]))
            batch = rows_batch([rows[number] for number in numbers], columns)
            changes, bad = self._update(batch, filters, version if version in columns else None)
            rejects |= {numbers[row]: why for row, why in bad.items()}
            made.append((changes, [number for row, number in enumerate(numbers) if row not in bad]))
        if not made:
            return Changes(np.zeros(0, np.uint8), np.zeros(0, np.int64), []), []
        order = np.argsort([number for _, numbers in made for number in numbers])
        return _taken(Changes.concatenated([changes for changes, _ in made]), order), _rejects(rejects, place)

    def delete_rows(self, ids: Sequence[Any], version: int = 0) -> tuple[Changes, list[Reject]]:
        """Encodes deletions of items by the shop's own ids. All of them have the same version."""
        batch = rows_batch([{self.schema.id: given} for given in ids], [self.schema.id])
        changes, rejects = self._changes(DELETE, batch, None, self._encode_attributes(()))
        versions = np.full(len(changes), version, np.int64)
        return dataclasses.replace(changes, versions=versions), _rejects(rejects, _row)

    def _put_columns(self) -> list[str]:
        schema = self.schema
        columns = [schema.id, *schema.text, schema.title or schema.text[0]]
        columns += [feature.column for feature in schema.features]
        columns += [attribute.column for attribute in schema.filters]
        return list(dict.fromkeys(columns))

    def _filters(self, columns: Sequence[str], version: str | None, where: str) -> list[Filter]:
        """Returns the filters that the columns of an update have. Raises UsageError for any other column."""
        by_column: dict[str, list[Filter]] = {}
        for attribute in self.schema.filters:
            by_column.setdefault(attribute.column, []).append(attribute)
        if self.schema.id not in columns:
            raise UsageError(f"{where}: has no column {self.schema.id}, the id of the item; {_MEND}")
        strange = [column for column in columns if column not in (self.schema.id, version, *by_column)]
        if strange:
            raise UsageError(
                f"{where}: has the column '{strange[0]}', but an update only changes attributes that searches filter "
                f"by: {', '.join(by_column) or 'none in this servable'}; leave the column out, or give whole items to "
                f"`dpsr items add`"
            )
        return [attribute for column, of in by_column.items() if column in columns for attribute in of]

    def _update(
        self,
        batch: pa.RecordBatch,
        filters: Sequence[Filter],
        version: str | None,
    ) -> tuple[Changes, dict[int, tuple[str, str | None]]]:
        return self._changes(UPDATE, batch, version, self._encode_attributes(filters), filters)

    def _encode_put(self, batch: pa.RecordBatch) -> Encoded:
        return encode_items(batch, self.schema, self.string_ids)

    def _encode_attributes(self, filters: Sequence[Filter]) -> Callable[[pa.RecordBatch], Encoded]:
        return lambda batch: encode_item_attributes(batch, self.schema, filters, self.string_ids)

    def _changes(
        self,
        kind: int,
        batch: pa.RecordBatch,
        version: str | None,
        encode: Callable[[pa.RecordBatch], Encoded],
        filters: Sequence[Filter] = (),
    ) -> tuple[Changes, dict[int, tuple[str, str | None]]]:
        """Encodes a batch. Returns reason and value of the rows that are rejected, by their number in the batch."""
        encoded = encode(batch)
        numbers, reasons, values = (encoded.rejects[name].to_pylist() for name in ("row", "reason", "value"))
        rejects = dict(zip(numbers, zip(reasons, values, strict=True), strict=True))
        kept = np.delete(np.arange(len(batch)), numbers)
        rows, versions = encoded.rows, np.zeros(len(kept), np.int64)
        if version is not None:
            given = ids_of(batch[version], False)
            wrong = (given.wrong | (given.values < 0))[kept]
            for number in kept[wrong].tolist():
                rejects[number] = ("version is not a whole number of 0 or more", str(batch[version][number].as_py()))
            rows, versions, kept = rows.filter(pa.array(~wrong)), given.values[kept][~wrong], kept[~wrong]
        changes = Changes(
            np.full(len(kept), kind, np.uint8),
            rows["id"].to_numpy(),
            [b""] * len(kept) if kind == DELETE else list(self._examples(kind, rows, filters)),
            versions,
            rows["key"].to_pylist() if self.string_ids else None,
        )
        return changes, rejects

    def _examples(self, kind: int, rows: pa.RecordBatch, filters: Sequence[Filter]) -> Iterator[bytes]:
        columns: list[tuple[str, Callable[[Any, Any], None], list[Any]]] = []
        if kind == PUT:
            columns += [
                ("item_text", _add_text, rows["text"].to_pylist()),
                ("title", _add_text, rows["title"].to_pylist()),
            ]
            for feature in self.schema.features:
                columns.append((f"item_{feature.key}", _adder(feature), rows[f"feature.{feature.key}"].to_pylist()))
            filters = self.schema.filters
        for attribute in filters:
            columns.append(
                (f"attribute.{attribute.key}", _adder(attribute), rows[f"filter.{attribute.key}"].to_pylist())
            )
        for number in range(len(rows)):
            example = Example()
            features = example.features.feature
            for name, add, values in columns:
                value = values[number]
                if value is not None and value != []:
                    add(features[name], value)
                elif kind == UPDATE:
                    features[name].bytes_list.SetInParent()
            yield example.SerializeToString(deterministic=True)


class _Call(NamedTuple):
    """One call of an ItemWriter. `rows` are rows, or the ids to delete."""

    kind: int
    rows: Sequence[Any]
    version: Any
    future: Future[tuple[int, int]]


class ItemWriter:
    """Writes changes from a process that goes on running. Changes of several calls share the work, and a segment.

    Each method takes rows as values by column, as in the shop's tables, and returns at once with a future. The future
    has the offset of the first change and the one after the last, as soon as they are on the disk. If a row cannot be
    used, it has a CommandError, and none of the call's rows is written. Thread-safe.

    Example:
        with ItemWriter(Path("/models/shop")) as writer:
            writer.update([{"item": "sku-1", "price": 9.5}])
            writer.delete(["sku-2"]).result()
    """

    def __init__(self, base: Path, wait_s: float = 0.02):
        """Opens the log of a servable.

        Args:
            base: as for ServableItems.
            wait_s: seconds that changes wait for others.

        Raises:
            CommandError: as ServableItems.
        """
        self._items = ServableItems(base)
        self._wait_s = wait_s
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()  # nothing is queued after the end
        self._thread = threading.Thread(target=self._run, name="item-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> ItemWriter:
        """Returns the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the writer."""
        self.close()

    def close(self) -> None:
        """Writes what is waiting, and ends the thread."""
        with self._lock:
            if not self._closed.is_set():
                self._closed.set()
                self._queue.put(None)
        self._thread.join()

    def add(self, rows: Rows, version: str | None = None) -> Future[tuple[int, int]]:
        """Adds or replaces items. `version` names the column with the version of each row."""
        return self._call(PUT, rows, version)

    def update(self, rows: Rows, version: str | None = None) -> Future[tuple[int, int]]:
        """Gives items new values of the attributes that searches filter by."""
        return self._call(UPDATE, rows, version)

    def delete(self, ids: Sequence[Any], version: int = 0) -> Future[tuple[int, int]]:
        """Deletes items by the shop's own ids. All of them have the same version."""
        return self._call(DELETE, ids, version)

    def _call(self, kind: int, rows: Sequence[Any], version: Any) -> Future[tuple[int, int]]:
        call = _Call(kind, list(rows), version, Future())
        with self._lock:
            if self._closed.is_set():
                raise CommandError("the writer of item changes is closed; open another one")
            self._queue.put(call)
        return call.future

    def _run(self) -> None:
        is_open = True
        while is_open:
            waiting = [self._queue.get()]
            if waiting[0] is not None and not self._closed.wait(self._wait_s):
                while not self._queue.empty():
                    waiting.append(self._queue.get())
            is_open = None not in waiting
            # A call that was cancelled in time is left out; later it cannot be cancelled any more.
            self._write([call for call in waiting if call is not None and call.future.set_running_or_notify_cancel()])

    def _write(self, calls: Sequence[_Call]) -> None:
        parts: list[tuple[Changes, Future[tuple[int, int]]]] = []
        for _, run in itertools.groupby(calls, key=lambda call: (call.kind, call.version)):
            parts += self._encoded(list(run))
        if not parts:
            return
        try:
            offset, _ = self._items.log.append(Changes.concatenated([changes for changes, _ in parts]))
        except Exception as error:
            for _, future in parts:
                future.set_exception(error)
            return
        for changes, future in parts:
            future.set_result((offset, offset + len(changes)))
            offset += len(changes)

    def _encoded(self, calls: Sequence[_Call]) -> list[tuple[Changes, Future[tuple[int, int]]]]:
        """Encodes calls of one kind together, or one by one if some of them cannot be used."""
        encode = {PUT: self._items.put_rows, UPDATE: self._items.update_rows, DELETE: self._items.delete_rows}
        kind, _, version, future = calls[0]
        try:
            changes, rejects = encode[kind]([row for call in calls for row in call.rows], version)  # type: ignore[operator]
            if rejects:
                raise CommandError(describe_rejects(rejects))
        except Exception as error:
            if len(calls) > 1:
                return [part for call in calls for part in self._encoded([call])]
            future.set_exception(error)
            return []
        ends = list(itertools.accumulate((len(call.rows) for call in calls), initial=0))
        return [
            (changes.part(begin, end), call.future)
            for call, (begin, end) in zip(calls, itertools.pairwise(ends), strict=True)
        ]


def collect(parts: Iterable[tuple[Changes, list[Reject]]]) -> tuple[Changes | None, list[Reject]]:
    """Joins what the readers of tables give. There are no changes if no row can be used."""
    changes: list[Changes] = []
    rejects: list[Reject] = []
    for part, bad in parts:
        changes.append(part)
        rejects += bad
    joined = Changes.concatenated(changes) if changes else None
    return (joined if joined else None), rejects


def describe_rejects(rejects: Sequence[Reject], most: int = 5) -> str:
    """Returns a line that says how many rows cannot be used, with the first of them."""
    shown = "; ".join(map(str, rejects[:most]))
    return f"{len(rejects):,} rows cannot be used: {shown}{'; ...' if len(rejects) > most else ''}"


def tables(patterns: Sequence[str]) -> list[Path]:
    """Returns the files of tables: files, directories or glob patterns. Raises UsageError as at ingest."""
    return find_files(patterns, Path())


def newest_version(base: Path) -> Path:
    """Returns the newest version of a servable or, if it has shards, that of the first shard.

    Args:
        base: as for ServableItems.

    Raises:
        CommandError: there is no version, or `base` is one shard of several.
    """
    versions = _versions(base)
    if not versions:
        raise CommandError(f"{base}: holds no servable; give the directory that `dpsr export --out` wrote")
    if base.name.startswith("shard-") and not (base / DIRECTORY).is_dir():
        raise CommandError(f"{base}: is one shard of a servable, and all shards share a log; give {base.parent}")
    return versions[-1]


def changes_offsets(base: Path) -> list[tuple[Path, int]]:
    """Returns each version of a servable, lowest first, and the offset of the first change that its index lacks.

    A version whose manifest cannot be read, or of a DPSR that did not know changes of items, is left out.
    """
    found: list[tuple[Path, int]] = []
    for path in _versions(base):
        with contextlib.suppress(CommandError):
            manifest = read_manifest(path / MANIFEST, MANIFEST_FORMAT, MANIFEST_VERSION, "dpsr export")
            if "apply_changes" in manifest.get("inputs", {}):
                found.append((path, manifest["index"].get("changes_offset", 0)))
    return found


def _versions(base: Path) -> list[Path]:
    """Returns the versions of a servable, lowest first; of one with shards, those of the first shard."""
    # Each shard has a base path of its own; all of them were exported together.
    for pattern in ("*", "shard-0-of-*/*"):
        if found := [path for path in base.glob(pattern) if path.name.isdigit()]:
            return sorted(found, key=lambda path: int(path.name))
    return []


def _taken(changes: Changes, order: np.ndarray) -> Changes:
    places = order.tolist()
    assert changes.versions is not None
    keys = None if changes.keys is None else [changes.keys[place] for place in places]
    examples = [changes.examples[place] for place in places]
    return Changes(changes.kinds[order], changes.ids[order], examples, changes.versions[order], keys)


def _rejects(rejects: Mapping[int, tuple[str, str | None]], place: Callable[[int], str]) -> list[Reject]:
    return [Reject(place(number), *rejects[number]) for number in sorted(rejects)]


def _places(path: Path, first: int) -> Callable[[int], str]:
    return lambda row: f"{path} row {first + row + 1}"


def _adder(feature: Feature | Filter) -> Callable[[Any, Any], None]:
    if feature.kind == "multi":
        return _add_texts
    if feature.kind == "vector":
        return _add_vector
    if feature.kind == "number":
        return _add_number if isinstance(feature, Feature) else _add_exact
    return _add_text


def _add_text(feature: Any, value: str) -> None:
    feature.bytes_list.value.append(value.encode())


def _add_texts(feature: Any, values: Sequence[str]) -> None:
    feature.bytes_list.value.extend([value.encode() for value in values])


def _add_vector(feature: Any, values: Sequence[float]) -> None:
    feature.float_list.value.extend(values)


def _add_number(feature: Any, value: float) -> None:
    with np.errstate(over="ignore"):
        feature.float_list.value.append(float(np.float32(value)))


def _add_exact(feature: Any, value: float) -> None:
    with np.errstate(over="ignore"):
        narrow = float(np.float32(value))
    if narrow == value:
        feature.float_list.value.append(narrow)
    else:
        feature.bytes_list.value.append(repr(value).encode())
