"""The rows that `dpsr ingest` cannot use: a file that lists them, their counts, and the limit that stops the job."""

from __future__ import annotations

import collections
import heapq
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.data.tables import Source

# More rejects than this, if they are too large a share of the rows so far, stop the job before the end of the table.
_HOPELESS = 1_000_000


class Rejects:
    """Writes the rows that cannot be used to a file, counts them, and raises an error when they are too many."""

    def __init__(self, path: Path, max_fraction: float):
        """Begins without rejects.

        Args:
            path: the file, one JSON object per line. It is created by the first reject.
            max_fraction: share of a table's rows that may be rejected, 0 to 1.
        """
        self._path, self._max_fraction = path, max_fraction
        self._file: IO[str] | None = None
        # The current table: its name, where its rejects begin in the file, and the order of its files.
        self._table, self._begin = "", 0
        self._places: dict[str, int] = {}
        # Per table: how many rows were rejected for each reason, and the first of them.
        self._reasons: dict[str, collections.Counter[str]] = {}
        self._examples: dict[tuple[str, str], str] = {}

    def __enter__(self) -> Rejects:
        """Removes the file of an earlier run."""
        if self._path.is_file():
            with open(self._path, errors="replace") as file:
                if not file.readline().startswith('{"file": '):
                    raise UsageError(
                        f"--rejects={self._path}: this file exists and does not hold rejects; choose another file"
                    )
            try:
                self._path.unlink()
            except OSError as error:
                raise CommandError(
                    f"--rejects={self._path}: the file of an earlier run cannot be removed: {error.strerror}"
                ) from None
        return self

    def __exit__(self, *unused: object) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    @property
    def total(self) -> int:
        """The number of rejects of all tables."""
        return sum(sum(reasons.values()) for reasons in self._reasons.values())

    def begin(self, table: str, files: Sequence[Path]) -> None:
        """Begins a table. All rejects that follow belong to it."""
        self._table, self._places = table, {str(path): i for i, path in enumerate(files)}
        self._begin = self._file.tell() if self._file else 0
        self._reasons[table] = collections.Counter()

    def add(self, source: Source, rejects: pa.RecordBatch) -> None:
        """Adds the rejects of a batch, with columns `row`, `reason` and `value` as in encode.Encoded."""
        rows, reasons, values = (rejects[name].to_pylist() for name in ("row", "reason", "value"))
        for row, reason, value in zip(rows, reasons, values, strict=True):
            self._count(source.path, source.first_row + row, reason, value)
            self._write(self._line(source.path, source.first_row + row, reason, value))

    def merge(self, rejects: Iterator[tuple[Path, int, str, str]]) -> None:
        """Adds rejects that are known at the end of the table only, and keeps the file in the order of the input.

        Args:
            rejects: file, row from 0, reason and value of each, in the order of the input.
        """
        first = next(rejects, None)
        if first is None:
            return
        lines = []
        for path, row, reason, value in itertools.chain([first], rejects):
            self._count(path, row, reason, value)
            lines.append(self._line(path, row, reason, value))
        before: list[str] = []
        if self._file is not None:
            self._file.close()
            with open(self._path, encoding="utf-8") as file:
                file.seek(self._begin)
                before = file.readlines()
            os.truncate(self._path, self._begin)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        for line in heapq.merge(before, lines, key=self._place):
            self._write(line)

    def check(self, rows: int, complete: bool) -> None:
        """Raises CommandError if too many rows of the current table were rejected.

        Args:
            rows: the table's rows so far.
            complete: whether these are all. Before that, only a great many rejects are an error.
        """
        reasons = self._reasons[self._table]
        rejected = sum(reasons.values())
        if self._file is not None:
            self._file.flush()
        if rejected <= self._max_fraction * rows or not (complete or rejected > _HOPELESS):
            return
        raise CommandError(
            f"{next(iter(self._places))}: {rejected:,} of {rows:,} {self._table} cannot be used "
            f"({self._summary(self._table)}), more than --max_reject_fraction={self._max_fraction:g}; "
            f"all are listed in {self._path}; correct the tables or the schema"
        )

    def report(self) -> None:
        """Prints how many rows of each table were left out, and why."""
        for table, reasons in self._reasons.items():
            if reasons:
                print(f"left out {sum(reasons.values()):,} {table} ({self._summary(table)}); see {self._path}")

    def _summary(self, table: str) -> str:
        return "; ".join(
            f"{count:,} rows: {reason}, first {self._examples[table, reason]}"
            for reason, count in self._reasons[table].items()
        )

    def _count(self, path: Path, row: int, reason: str, value: str | None) -> None:
        self._reasons[self._table][reason] += 1
        self._examples.setdefault((self._table, reason), f"{path.name} row {row + 1}: {value!r}")

    def _line(self, path: Path, row: int, reason: str, value: str | None) -> str:
        line = {"file": str(path), "row": row + 1, "table": self._table, "reason": reason, "value": value}
        return json.dumps(line, ensure_ascii=False) + "\n"

    def _place(self, line: str) -> tuple[int, int]:
        reject = json.loads(line)
        return self._places[reject["file"]], reject["row"]

    def _write(self, line: str) -> None:
        if self._file is None:
            try:
                self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise CommandError(f"--rejects={self._path}: cannot be written: {error.strerror}") from None
        self._file.write(line)
