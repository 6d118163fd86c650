"""The log that a store keeps, so that the next day can be added without reading the old days again.

`dpsr ingest --keep_log` writes the interactions that it has read as one Parquet file into the folder `log` of the
store. `dpsr ingest --append=STORE` takes over the files of that store and adds one of its own. The rows are encoded and
name items and users by their ids, because these get other rows when items and users come and go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from dpsr_common.errors import CommandError
from dpsr_common.files import link_or_copy
from dpsr_tf.data.encode import IdIndex
from dpsr_tf.data.schema import InteractionsSchema
from dpsr_tf.data.store import Store

FOLDER = "log"
_SECONDS_OF_DAY = 86_400
_BATCH_ROWS = 1 << 16
# What the rows of a part depend on, beside the tables themselves.
_SAME_VALUES = ("types", "positive_types", "type_weights", "positive_from", "negative_to")
_SAME_PRESENCE = ("user", "type", "time", "session", "position", "weight", "label")


@dataclasses.dataclass(frozen=True)
class LogPart:
    """One file of a kept log, as the manifest of the store describes it."""

    file: str  # relative to the store
    rows: int
    first: int  # the earliest time, seconds since 1970
    last: int


class KeptLog:
    """The interactions that a store keeps: those of an earlier store that are not too old, and those that are read now.

    The methods are called in this order: begin, add for each batch, older, parts.
    """

    def __init__(self, earlier: Store | None, schema: InteractionsSchema, keep_days: float | None = None):
        """Opens the log of an earlier store.

        Args:
            earlier: the store; None begins a new log.
            schema: describes the interactions that are read now.
            keep_days: how many days before its newest row the log begins; None keeps everything.

        Raises:
            CommandError: the store has not kept its log, or read it with other settings than those of `schema`.
        """
        self._earlier, self._keep_days = earlier, keep_days
        self._old = [LogPart(**part) for part in earlier.manifest.get("log", [])] if earlier else []
        if earlier is not None:
            _check_same(earlier, schema, bool(self._old))
        self._writer: pyarrow.parquet.ParquetWriter | None = None
        self._rows, self._first, self._last = 0, 2**32, 0

    def begin(self, out: Path, items: np.ndarray, users: np.ndarray) -> None:
        """Begins the new part in the store `out`, for rows of these tables: ids int64 [items] and [users]."""
        self._out, self._items, self._users = out, items, users
        (out / FOLDER).mkdir()
        number = 1 + max((int(Path(part.file).stem.rpartition("-")[2]) for part in self._old), default=0)
        self._name = f"{FOLDER}/part-{number:05}.parquet"

    def add(self, rows: pa.RecordBatch) -> None:
        """Adds rows as encode_interactions returns them."""
        if rows.num_rows == 0:
            return
        columns = dict(zip(rows.schema.names, rows.columns, strict=True))
        columns["item"] = pa.array(self._items[rows["item"].to_numpy()])
        columns["user"] = pa.array(self._users[rows["user"].to_numpy()])
        batch = pa.record_batch(columns)
        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(
                self._out / self._name, batch.schema, compression="zstd", write_page_checksum=True
            )
        self._writer.write_batch(batch)
        times = pc.min_max(rows["time"]).as_py()
        self._rows += rows.num_rows
        self._first, self._last = min(self._first, times["min"]), max(self._last, times["max"])

    def older(self) -> Iterator[pa.RecordBatch]:
        """Yields the rows of the earlier store as encode_interactions returns them, and takes over their files.

        Drops rows that are too old, and rows whose item or user is not in the tables.

        Raises:
            CommandError: a file is missing or damaged, or does not hold the rows that the manifest says.
        """
        earliest = 0
        if self._keep_days is not None:
            newest = max([self._last, *(part.last for part in self._old)])
            earliest = max(0, newest - round(self._keep_days * _SECONDS_OF_DAY) + 1)
            # A part whose first time is 0 has labels without a time, which do not grow old.
            self._old = [part for part in self._old if part.last >= earliest or part.first == 0]
        items, users = IdIndex(self._items), IdIndex(self._users)
        dropped = 0
        for part in self._old:
            assert self._earlier is not None
            path = self._earlier.path / part.file
            link_or_copy(path, self._out / part.file)
            try:
                with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
                    if file.metadata.num_rows != part.rows:
                        raise CommandError(
                            f"{path}: holds {file.metadata.num_rows:,} rows, expected {part.rows:,} as in the "
                            f"manifest; ingest all days again with --keep_log"
                        )
                    for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
                        rows = _with_rows(batch, earliest, items, users)
                        dropped += batch.num_rows - rows.num_rows
                        yield rows
            except (pa.ArrowException, OSError) as error:
                raise CommandError(f"{path}: cannot be read: {error}; ingest all days again with --keep_log") from None
        if dropped:
            print(f"log: dropped {dropped:,} earlier rows: too old, or item or user not in the tables", flush=True)

    def parts(self) -> list[dict[str, Any]]:
        """Ends the new part. Returns what the manifest says about all parts."""
        parts = list(self._old)
        if self._writer is not None:
            self._writer.close()
            parts.append(LogPart(self._name, self._rows, self._first, self._last))
        return [dataclasses.asdict(part) for part in parts]


def _check_same(earlier: Store, schema: InteractionsSchema, has_parts: bool) -> None:
    """Raises CommandError if `earlier` has not kept its log, or read it with other settings than those of `schema`."""
    before = earlier.schema.interactions
    if before is None or not has_parts:
        raise CommandError(
            f"--append={earlier.path}: has not kept its log; ingest all days once with --keep_log, then append"
        )
    differing = [key for key in _SAME_VALUES if getattr(before, key) != getattr(schema, key)]
    differing += [key for key in _SAME_PRESENCE if (getattr(before, key) is None) != (getattr(schema, key) is None)]
    if differing:
        raise CommandError(
            f"--append={earlier.path}: its log was read with other values of {', '.join(differing)} in the section "
            f"interactions; use the same schema, or ingest all days again with --keep_log"
        )


def _with_rows(batch: pa.RecordBatch, earliest: int, items: IdIndex, users: IdIndex) -> pa.RecordBatch:
    columns: dict[str, Any] = dict(zip(batch.schema.names, batch.columns, strict=True))
    item = items.rows(batch["item"].to_numpy())
    # The index of users begins with the anonymous user, -1, whose row is 0.
    user = users.rows(batch["user"].to_numpy())
    # Labels may be without a time, which is 0 here.
    time = batch["time"].to_numpy()
    known = (item >= 0) & (user >= 0) & ((time >= earliest) | (time == 0))
    columns |= {"item": pa.array(item), "user": pa.array(user)}
    return pa.record_batch(columns).filter(pa.array(known))
