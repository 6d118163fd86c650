"""The log of item changes beside the versions of a servable: how it is written, read and trimmed. No TensorFlow.

BASE/item_changes holds immutable packed files of kind "item_changes" (segments), and the file `lock`. A segment is
named FIRST-END.dpsr, both with 20 digits, and holds the changes [FIRST, END). Offsets count changes from 0 on. Each
segment begins where the one before it ends, and the oldest ones may have been trimmed. With n changes:

    kind             uint8 [n]      PUT, UPDATE or DELETE
    id               int64 [n]      item id; for text ids their hash
    version          int64 [n]      number that the shop gave, or 0
    time             float64 [n]    when the change was acknowledged, in seconds since 1970
    key.splits,      int64 [n + 1]  the shop's own text ids; only if ids are texts
    key.bytes        uint8
    example.splits,  int64 [n + 1]  a serialized tf.train.Example each (dpsr_export/item_rows.py), empty for DELETE
    example.bytes    uint8

A writer holds the lock, writes a segment under a temporary name, syncs it, and renames it. Then its changes are
acknowledged: they survive the loss of power, and every reader sees all of them. Segments are read in C++, too
(export/fresh_items/change_log.h).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.packed_file import FormatError, PackedFile, PackedFileWriter

DIRECTORY = "item_changes"
PUT, UPDATE, DELETE = 0, 1, 2
KIND_NAMES = ("put", "update", "delete")
# A longer list of changes is written as several segments, so that reading one never takes long.
_SEGMENT_CHANGES = 1 << 16
_KIND = "item_changes"
_NAME = re.compile(r"(0\d{19})-(0\d{19})\.dpsr")


@dataclasses.dataclass(frozen=True)
class Changes:
    """n changes of items, in order.

    Attributes:
        kinds: uint8 [n], PUT, UPDATE or DELETE.
        ids: int64 [n], item ids from 0 on.
        examples: a serialized tf.train.Example each; empty for DELETE.
        versions: int64 [n], numbers of the shop; None is 0 for all. A change with a lower number than the item's last
            one comes late and is ignored.
        keys: the shop's own text ids; None where ids are numbers.
        times: float64 [n], seconds since 1970 when the changes were acknowledged. None before that.
    """

    kinds: np.ndarray
    ids: np.ndarray
    examples: Sequence[bytes]
    versions: np.ndarray | None = None
    keys: Sequence[str] | None = None
    times: np.ndarray | None = None

    def __len__(self) -> int:
        """Returns the number of changes."""
        return len(self.kinds)

    def part(self, begin: int, end: int) -> Changes:
        """Returns the changes from `begin` to before `end`."""
        rows = slice(begin, end)
        return Changes(
            self.kinds[rows],
            self.ids[rows],
            self.examples[rows],
            None if self.versions is None else self.versions[rows],
            None if self.keys is None else self.keys[rows],
            None if self.times is None else self.times[rows],
        )

    @classmethod
    def concatenated(cls, parts: Sequence[Changes]) -> Changes:
        """Joins changes that are not acknowledged yet, in order. Either all of them have keys or none has."""
        keyed = any(part.keys is not None for part in parts)
        versions = [np.zeros(len(part), np.int64) if part.versions is None else part.versions for part in parts]
        return cls(
            np.concatenate([part.kinds for part in parts]),
            np.concatenate([part.ids for part in parts]),
            [example for part in parts for example in part.examples],
            np.concatenate(versions),
            [key for part in parts for key in part.keys or ()] if keyed else None,
        )


@dataclasses.dataclass(frozen=True, order=True)
class Segment:
    """A file of the log, with the changes [first, end)."""

    first: int
    end: int
    path: Path


@dataclasses.dataclass(frozen=True)
class LogStatus:
    """What a log holds.

    Attributes:
        first: offset of the oldest change that is still there.
        end: offset of the next change.
        segments: number of files.
        size: their bytes.
        last_time: when the last change was acknowledged, in seconds since 1970; None for an empty log.
    """

    first: int
    end: int
    segments: int
    size: int
    last_time: float | None


class ItemChangeLog:
    """A log of item changes. Any number of processes may write and read it."""

    def __init__(self, directory: Path, first_offset: int = 0):
        """Names the log. The directory is made by the first change.

        Args:
            directory: BASE/item_changes.
            first_offset: offset of the first change of a log that is empty.
        """
        self.path = directory
        self._first_offset = first_offset

    def append(self, changes: Changes) -> tuple[int, int]:
        """Writes changes at the end of the log, and waits until they are on the disk. Waits for other writers.

        Returns:
            The offsets of the changes: the first one, and the one after the last.

        Raises:
            CommandError: the directory cannot be written. Then the log holds the first of the changes, or none.
        """
        with self._locked() as names:
            end = first = self._end(names)
            if len(changes) == 0:
                return first, end
            acknowledged = time.time()
            for begin in range(0, len(changes), _SEGMENT_CHANGES):
                part = changes.part(begin, begin + _SEGMENT_CHANGES)
                path = self.path / f"{end:020}-{end + len(part):020}.dpsr"
                try:
                    _write(path, part, acknowledged)
                except OSError as error:
                    raise CommandError(
                        f"{path}: cannot be written: {error}; {end - first:,} of {len(changes):,} changes are in the "
                        f"log; make room, and write the others again"
                    ) from None
                end += len(part)
            return first, end

    def read(self, offset: int | None = None) -> Iterator[tuple[int, Changes]]:
        """Reads the changes from an offset on, by default from the oldest one on.

        Yields:
            The changes of a segment, and the offset of the first of them.

        Raises:
            CommandError: a segment is damaged or missing. It is raised after the changes before it were read.
        """
        segments = self.segments()
        place = offset if offset is not None else segments[0].first if segments else 0
        if offset is not None and segments and offset > segments[-1].end:
            raise CommandError(
                f"{self.path}: ends at the change {segments[-1].end}, but is read from {offset} on: it is another log"
            )
        for segment in segments:
            if segment.end <= place:
                continue
            if segment.first > place:
                raise CommandError(
                    f"{self.path}: the changes {place} to {segment.first - 1} are missing, before {segment.path}; "
                    f"restore the segment, or take an index that has them"
                )
            yield place, _read(segment).part(place - segment.first, segment.end - segment.first)
            place = segment.end

    def segments(self) -> list[Segment]:
        """Returns the files of the log in order. Raises CommandError if the directory cannot be read."""
        matches = (_NAME.fullmatch(name) for name in sorted(self._names()))
        return [Segment(int(match[1]), int(match[2]), self.path / match[0]) for match in matches if match]

    def end(self) -> int:
        """Returns the offset of the next change. Raises CommandError if the directory cannot be read."""
        return self._end(self._names())

    def _end(self, names: list[str]) -> int:
        # Names have the order of their offsets. A writer does this before each segment: with thousands of them, parsing
        # or sorting all names takes longer than writing a segment.
        while names:
            last = max(names)
            if match := _NAME.fullmatch(last):
                return int(match[2])
            names.remove(last)
        return self._first_offset

    def _names(self) -> list[str]:
        """Returns the names in the directory, in any order."""
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CommandError(f"{self.path}: cannot be read: {error.strerror}") from None

    def status(self) -> LogStatus:
        """Returns what the log holds. Raises CommandError if its last segment is damaged."""
        segments = self.segments()
        if not segments:
            return LogStatus(self._first_offset, self._first_offset, 0, 0, None)
        times = _read(segments[-1]).times
        assert times is not None
        size = sum(segment.path.stat().st_size for segment in segments)
        return LogStatus(segments[0].first, segments[-1].end, len(segments), size, float(times[-1]))

    def trim(self, before: int) -> int:
        """Removes the segments whose changes all have offsets below `before`. Returns how many changes were removed.

        The newest segment always stays, because it says where the log ends.

        Raises:
            UsageError: the log ends before `before`.
            CommandError: the directory cannot be written.
        """
        with self._locked():
            segments = self.segments()
            end = segments[-1].end if segments else self._first_offset
            if before > end:
                raise UsageError(f"--before={before}: the log {self.path} ends at {end}; give at most that")
            removed = [segment for segment in segments[:-1] if segment.end <= before]
            try:
                # Oldest first, so that a trim which is killed leaves no gap.
                for segment in removed:
                    segment.path.unlink()
            except OSError as error:
                raise CommandError(f"{self.path}: cannot be trimmed: {error}") from None
            return sum(segment.end - segment.first for segment in removed)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[list[str]]:
        """Makes the directory, keeps other writers out, and removes what killed writers left behind.

        Yields:
            The names in the directory.
        """
        try:
            if not self.path.is_dir():
                self.path.mkdir(exist_ok=True)
                _sync(self.path.parent)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CommandError(f"{self.path}: cannot be written: {error.strerror}; correct its permissions") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            names = self._names()
            for name in names:
                if ".dpsr.tmp." in name:
                    (self.path / name).unlink(missing_ok=True)
            yield names
        finally:
            os.close(lock)


def _write(path: Path, changes: Changes, acknowledged: float) -> None:
    count = len(changes)
    with PackedFileWriter(str(path), _KIND) as file:
        file.add("kind", np.ascontiguousarray(changes.kinds, np.uint8))
        file.add("id", np.ascontiguousarray(changes.ids, np.int64))
        versions = np.zeros(count, np.int64) if changes.versions is None else changes.versions
        file.add("version", np.ascontiguousarray(versions, np.int64))
        file.add("time", np.full(count, acknowledged))
        if changes.keys is not None:
            _add_bytes(file, "key", [key.encode() for key in changes.keys])
        _add_bytes(file, "example", changes.examples)


def _add_bytes(file: PackedFileWriter, name: str, values: Sequence[bytes]) -> None:
    splits = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value) for value in values], out=splits[1:])
    file.add(f"{name}.splits", splits)
    file.add(f"{name}.bytes", np.frombuffer(b"".join(values), np.uint8))


def _read(segment: Segment) -> Changes:
    try:
        file = PackedFile(segment.path, _KIND)
        keys = [key.decode() for key in _bytes(file, "key")] if "key.splits" in file else None
        changes = Changes(file["kind"], file["id"], _bytes(file, "example"), file["version"], keys, file["time"])
    except (FormatError, KeyError, OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{segment.path}: is damaged or missing: {error}") from None
    columns = (changes.kinds, changes.ids, changes.examples, changes.versions, changes.times, keys)
    if any(column is not None and len(column) != segment.end - segment.first for column in columns):
        raise CommandError(f"{segment.path}: does not hold the {segment.end - segment.first:,} changes of its name")
    return changes


def _bytes(file: PackedFile, name: str) -> list[bytes]:
    splits, data = file[f"{name}.splits"].tolist(), file[f"{name}.bytes"].tobytes()
    return [data[begin:end] for begin, end in itertools.pairwise(splits)]


def _sync(directory: Path) -> None:
    """Writes the names in a directory to the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
