"""Judgments by hand: a file of query, item and grade that `dpsr evaluate --judgments` reads."""

from __future__ import annotations

import contextlib
import fcntl
import math
import threading
from collections.abc import Iterator
from pathlib import Path

from dpsr_common import files
from dpsr_common.errors import CommandError, UsageError

_HEADER = "query\titem\tgrade"
# Saving writes the whole file, so its size is bounded.
MAX_JUDGMENTS = 100_000
MAX_QUERY = 1000  # characters
HIGHEST_GRADE = 3


class JudgmentFile:
    """The judgments in a TSV file with the columns query, item and grade.

    Every judgment replaces the file as a whole, so a reader never sees half of it. Processes and threads that judge at
    the same time wait for each other.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file, which need not be there yet.

        Raises:
            UsageError: the name does not end in .tsv, or there is no such directory.
            CommandError: the file cannot be read, or has other columns or rows that are not judgments.
        """
        if path.suffix != ".tsv":
            raise UsageError(f"--judgments={path}: expected a file name that ends in .tsv")
        if not path.parent.is_dir():
            raise UsageError(f"--judgments={path}: there is no directory {path.parent}; make it first")
        self.path = path
        self._thread_lock = threading.Lock()
        with self._locked():
            self._read()

    def __len__(self) -> int:
        """Returns the number of judgments."""
        return sum(map(len, self._read().values()))

    def of_query(self, query: str) -> dict[str, float]:
        """Returns item -> grade of a query."""
        return self._read().get(_one_line(query), {})

    def judge(self, query: str, item: str, grade: float | None) -> int:
        """Saves the grade of an item for a query, or takes it back with None. Returns the number of judgments.

        Raises:
            ValueError: the query is empty or too long, the item or the grade is not one, or there are too many
                judgments.
            CommandError: the file cannot be written.
        """
        query = _one_line(query)
        if not 0 < len(query) <= MAX_QUERY:
            raise ValueError(f"query: has {len(query)} characters, expected 1 to {MAX_QUERY}")
        if set(item) & set("\t\r\n"):
            raise ValueError(f"item: got {item[:80]!r}, expected an id without tabs and ends of lines")
        if grade is not None and not 0 <= grade <= HIGHEST_GRADE:
            raise ValueError(f"grade: got {grade}, expected 0 to {HIGHEST_GRADE}, or null to take the judgment back")
        with self._locked():
            judged = self._read()
            of_query = judged.setdefault(query, {})
            if grade is None:
                of_query.pop(item, None)
            else:
                of_query[item] = float(grade)
            total = sum(map(len, judged.values()))
            if total > MAX_JUDGMENTS:
                raise ValueError(f"{self.path} has {MAX_JUDGMENTS:,} judgments, which is the limit; begin another file")
            rows = [
                f"{text}\t{name}\t{value:g}\n" for text, of_text in judged.items() for name, value in of_text.items()
            ]
            try:
                files.write_text(self.path, f"{_HEADER}\n{''.join(rows)}")
            except OSError as error:
                raise CommandError(f"{self.path}: cannot be written: {error.strerror}") from None
        return total

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other threads and processes from judging."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            with self._thread_lock, open(lock, "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise CommandError(f"{lock}: cannot be written: {error.strerror}; choose another --judgments") from None

    def _read(self) -> dict[str, dict[str, float]]:
        """Returns query -> item -> grade."""
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{self.path}: cannot be read: {error}") from None
        if lines[0] != _HEADER:
            raise CommandError(
                f"{self.path}: begins with {lines[0][:80]!r}, expected the columns query, item and grade; choose "
                "another file"
            )
        judged: dict[str, dict[str, float]] = {}
        for number, line in enumerate(lines[1:], 2):
            if not line:
                continue
            cells = line.split("\t")
            try:
                query, item, grade = cells[0], cells[1], float(cells[2])
            except (IndexError, ValueError):
                grade = math.nan
            if len(cells) != 3 or math.isnan(grade):
                raise CommandError(f"{self.path}: line {number}: expected a query, an item and a grade, joined by tabs")
            judged.setdefault(query, {})[item] = grade
        return judged


def _one_line(query: str) -> str:
    """Returns a query without tabs, ends of lines and characters that a text file should not hold."""
    return " ".join("".join(c if c.isprintable() else " " for c in query).split())
