"""Reads the values of one column of a raw table: text, numbers, ids, lists and times.

Each function takes one Arrow array of any type that can hold such values, and returns the values together with flags
that say which rows are missing or wrong. Nothing raises because of a value.

- Text is string or binary of any kind, and must be UTF-8. Numbers, booleans and dates stand for their text; a whole
  float such as 30.0 stands for "30".
- Numbers are of any numeric type, or text such as "12", "-0.5" or "1e5". Null, NaN, empty text and the words that CSV
  files use for it ("NA", "null", ...) are missing numbers. True is 1, false is 0.
- Ids are whole numbers in a column of any numeric type, or text without leading zeros ("7", but not "007" or "7.0").
  Where the shop's ids are text, every text that is not empty is an id.
- Times are timestamps, dates, numbers, or text such as "2024-03-01T12:30:45.5+01:00".
- Every column may be dictionary-encoded, and a list with one element stands for that element.

White space (as Unicode defines it) around ids, numbers, times and feature values is ignored.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

TEXT = pa.large_string()


class Ids(NamedTuple):
    """The ids of a column with n rows."""

    values: np.ndarray  # int64 [n]: the id, or the hash of a text id; 0 where there is none
    keys: pa.Array | None  # large_string [n]: the text id; None where ids are numbers
    missing: np.ndarray  # bool [n]: null or empty
    wrong: np.ndarray  # bool [n]: there is a value, but it is not an id
    garbled: np.ndarray  # bool [n]: the value is not UTF-8 text; these rows are wrong, too


def texts_of(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Reads a column as text.

    Returns:
        The texts, large_string [n], and which rows are not UTF-8, bool [n]. The text of these rows is null.
    """
    column = _scalars(column)
    bad = np.zeros(len(column), bool)
    if pa.types.is_floating(column.type):
        numbers = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
        whole = np.abs(numbers) < 2**53
        whole &= np.floor(np.where(whole, numbers, 0.5)) == numbers
        exact = pa.array(np.where(whole, numbers, 0).astype(np.int64), mask=~whole)
        other = pa.array(numbers, mask=whole | np.isnan(numbers))
        return pc.coalesce(pc.cast(exact, TEXT), pc.cast(other, TEXT)), bad
    if pa.types.is_timestamp(column.type):
        # The time is shown in UTC: this machine may not know the column's time zone.
        column = column.view(pa.timestamp(column.type.unit))
    try:
        return pc.cast(column, TEXT), bad
    except pa.ArrowInvalid:
        values = column.to_pylist()
        for row, value in enumerate(values):
            try:
                values[row] = None if value is None else value.decode()
            except UnicodeDecodeError:
                values[row], bad[row] = None, True
        return pa.array(values, TEXT), bad


def numbers_of(column: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads a column as numbers.

    Returns:
        The numbers, float64 [n]; which are missing, bool [n]; which are something else than a number, bool [n]. The
        number of missing and wrong rows is NaN.
    """
    column = _scalars(column)
    kind = column.type
    bad = np.zeros(len(column), bool)
    if pa.types.is_large_binary(kind):
        texts, bad = texts_of(column)
        texts = trimmed(texts)
        for words, number in _BOOLEANS:
            texts = pc.if_else(pc.is_in(texts, words), pa.scalar(number, TEXT), texts)
        written = flags_of(pc.match_substring_regex(texts, _NUMBER))
        missing = flags_of(pc.is_null(texts)) & ~bad | flags_of(pc.is_in(texts, _MISSING_NUMBERS))
        bad |= ~written & ~missing
        column = pc.if_else(pa.array(written), texts, pa.scalar(None, TEXT))
    elif pa.types.is_temporal(kind):
        bad = flags_of(pc.is_valid(column))
        column = pa.nulls(len(column))
    numbers = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return numbers, np.isnan(numbers) & ~bad, bad


_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"
_MISSING_NUMBERS = pa.array(pyarrow.csv.ConvertOptions().null_values, TEXT)
_BOOLEANS = [(pa.array([word, word.title()], TEXT), number) for word, number in (("true", "1"), ("false", "0"))]


def ids_of(column: pa.Array, string_ids: bool) -> Ids:
    """Reads a column as ids: text if `string_ids`, else int64."""
    column = _scalars(column)
    kind, count = column.type, len(column)
    nothing = np.zeros(count, bool)
    if pa.types.is_integer(kind) and not string_ids:
        wrong = nothing
        if pa.types.is_uint64(kind):
            wrong = flags_of(pc.greater(column, pa.scalar(2**63 - 1, pa.uint64())))
        values = pc.fill_null(pc.cast(column, pa.int64(), safe=False), 0).to_numpy(zero_copy_only=False)
        return Ids(values, None, flags_of(pc.is_null(column)), wrong, nothing)
    texts, garbled = texts_of(column)
    if pa.types.is_decimal(kind):
        texts = pc.replace_substring_regex(texts, r"\.0*$", "")
    texts = trimmed(texts)
    missing = flags_of(pc.is_null(texts)) & ~garbled
    if string_ids:
        return Ids(hashes_of(texts), texts, missing, garbled, garbled)
    # Numbers of up to 18 digits always fit into int64, so Arrow casts them at once. All others, such as -1, are few.
    short = pc.and_(pc.ascii_is_decimal(texts), pc.less_equal(pc.binary_length(texts), 18))
    short = flags_of(pc.and_not(short, pc.match_substring_regex(texts, "^0.")))
    values = pc.cast(pc.if_else(pa.array(short), texts, pa.scalar(None, TEXT)), pa.int64())
    values = pc.fill_null(values, 0).to_numpy(zero_copy_only=False).copy()
    wrong = garbled.copy()
    others = np.flatnonzero(~short & ~missing & ~garbled)
    for row, text in zip(others.tolist(), texts.take(pa.array(others)).to_pylist(), strict=True):
        value = int(text) if re.fullmatch("-?[1-9][0-9]{0,18}", text) else 2**63
        wrong[row] = not -(2**63) <= value < 2**63
        values[row] = 0 if wrong[row] else value
    return Ids(values, None, missing, wrong, garbled)


def lists_of(column: pa.Array, separator: str | None) -> tuple[pa.Array, np.ndarray]:
    """Reads a column as lists of texts. A value that is not a list becomes a list with one element.

    Args:
        column: the column, n rows.
        separator: splits every text into several elements, if given.

    Returns:
        The lists, large_list<large_string> [n], whose elements are trimmed and not empty, and which rows are not
        UTF-8, bool [n].
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    bad = np.zeros(len(column), bool)
    rows = np.arange(len(column))
    if _is_list(column.type):
        lengths, column = _elements(column)
        rows = np.repeat(rows, lengths)
    texts, garbled = texts_of(column)
    bad[rows[garbled]] = True
    if separator is not None:
        lengths, texts = _elements(pc.split_pattern(texts, separator))
        rows = np.repeat(rows, lengths)
    texts = trimmed(texts)
    splits = np.zeros(len(bad) + 1, np.int64)
    np.cumsum(np.bincount(rows[flags_of(pc.is_valid(texts))], minlength=len(bad)), out=splits[1:])
    return pa.LargeListArray.from_arrays(pa.array(splits), texts.drop_null()), bad


def vectors_of(column: pa.Array, separator: str | None, length: int) -> tuple[pa.Array, np.ndarray]:
    """Reads a column as vectors of finite numbers.

    Args:
        column: lists of numbers, or texts that `separator` splits; n rows.
        separator: text between two numbers of a cell, if the column holds texts.
        length: number of values of a vector.

    Returns:
        The vectors, large_list<float> [n], and which rows have something else than `length` finite numbers, bool [n].
        The vector of these rows, and of rows without a value, is an empty list.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    count = len(column)
    bad, rows = np.zeros(count, bool), np.arange(count)
    if _is_list(column.type):
        lengths, column = _elements(column)
        rows = np.repeat(rows, lengths)
    if separator is not None:
        texts, garbled = texts_of(column)
        bad[rows[garbled]] = True
        lengths, column = _elements(pc.split_pattern(trimmed(texts), separator))
        rows = np.repeat(rows, lengths)
    numbers, missing, _ = numbers_of(column)
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    lengths = np.bincount(rows, minlength=count)
    absent = (lengths == np.bincount(rows, missing, count)) & (lengths <= 1)
    bad |= ~absent & ((lengths != length) | (np.bincount(rows, ~np.isfinite(numbers), count) > 0))
    kept = ~absent & ~bad
    splits = np.zeros(count + 1, np.int64)
    np.cumsum(np.where(kept, length, 0), out=splits[1:])
    return pa.LargeListArray.from_arrays(pa.array(splits), pa.array(numbers[kept[rows]])), bad


def seconds_of(column: pa.Array, units_per_second: int) -> np.ndarray:
    """Reads a column as times.

    Args:
        column: timestamps, dates, numbers or text, n rows.
        units_per_second: 1 where numbers count seconds, 1,000 for milliseconds, 1,000,000 for microseconds.

    Returns:
        Whole seconds since 1970 in UTC, int64 [n]; 0 where there is no time.
    """
    column = _scalars(column)
    kind = column.type
    if pa.types.is_date32(kind):
        return seconds_of(pc.multiply(pc.cast(pc.cast(column, pa.int32()), pa.int64()), 86_400), 1)
    if pa.types.is_date64(kind):
        return seconds_of(pc.cast(column, pa.int64()), 1_000)
    if pa.types.is_timestamp(kind):
        return seconds_of(pc.cast(column, pa.int64()), {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit])
    if pa.types.is_integer(kind):
        whole = ids_of(column, False)
        return np.where(whole.wrong, 0, whole.values // units_per_second)
    numbers = numbers_of(pa.nulls(len(column)) if pa.types.is_boolean(kind) else column)[0]
    seconds = np.where(np.abs(numbers) < 2**63, numbers, 0).astype(np.int64) // units_per_second
    return seconds + _iso_seconds(column) if pa.types.is_large_binary(kind) else seconds


# The accepted forms of a time in text. The fraction of a second is dropped; no zone means UTC.
_ISO = (
    r"^(?P<date>\d{4}-\d{2}-(?P<day>\d{2}))"
    r"(?:[T ](?P<minute>\d{2}:\d{2})(?::(?P<second>[0-5]\d)(?:[.,]\d+)?)?"
    r"(?:Z| ?UTC|(?P<zone>[+-](?:[01]\d|2[0-3])(?::?[0-5]\d)?))?)?$"
)


def _iso_seconds(column: pa.Array) -> np.ndarray:
    """Seconds of text such as "2024-03-01", "2024-03-01 12:30:00.5" or "2024-03-01T12:30+01:00"; 0 for other text."""
    parts = pc.extract_regex(trimmed(texts_of(column)[0]), _ISO)
    if parts.null_count == len(parts):
        return np.zeros(len(parts), np.int64)

    def part(name: str, default: str) -> pa.Array:
        text = pc.struct_field(parts, name)
        return pc.if_else(pc.equal(text, ""), pa.scalar(default, TEXT), text)

    date = pc.struct_field(parts, "date")
    texts = pc.binary_join_element_wise(
        date, part("minute", "00:00"), part("second", "00"), part("zone", "+00"), pa.scalar(" ", TEXT)
    )
    times = pc.strptime(texts, format="%Y-%m-%d %H:%M %S %z", unit="s", error_is_null=True)
    # strptime takes February 30 for March 1, so the day of its result must be the day in the text.
    days = pc.day(pc.strptime(date, format="%Y-%m-%d", unit="s", error_is_null=True))
    exists = pc.equal(days, pc.cast(pc.struct_field(parts, "day"), pa.int64()))
    seconds = pc.if_else(exists, pc.cast(times, pa.int64()), 0)
    return pc.fill_null(seconds, 0).to_numpy(zero_copy_only=False)


def trimmed(texts: pa.Array) -> pa.Array:
    """Removes white space at both ends of each text. A text of which nothing is left becomes null."""
    texts = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, TEXT), texts)


def hashes_of(texts: pa.Array) -> np.ndarray:
    """Returns a 63-bit hash of each text, int64 [n]; 0 for null. It is the same on every machine."""
    encoded = texts.dictionary_encode()
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in encoded.dictionary.to_pylist())
    hashes = np.frombuffer(b"".join(digests), ">u8").astype(np.int64) & np.int64(2**63 - 1)
    return np.append(hashes, 0)[pc.fill_null(encoded.indices, len(hashes)).to_numpy(zero_copy_only=False)]


def flags_of(values: pa.Array) -> np.ndarray:
    """Turns Arrow booleans into bool [n]; null becomes false."""
    return pc.fill_null(values, False).to_numpy(zero_copy_only=False)


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of text or bytes."""
    t = pa.types
    tests = (t.is_string, t.is_large_string, t.is_string_view, t.is_binary, t.is_large_binary, t.is_binary_view)
    return any(test(kind) for test in (*tests, t.is_fixed_size_binary))


# A list with several elements becomes this. It is not UTF-8, so that it is never taken for a text, number or id.
_LIST_OF_SEVERAL = b"\xff"


def _scalars(column: pa.Array) -> pa.Array:
    """Decodes dictionaries, replaces each list by its element, and gives all kinds of text as large_binary."""
    if isinstance(column, pa.ExtensionArray):
        return _scalars(column.storage)
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _scalars(column.dictionary_decode())
    if _is_list(kind):
        lengths, values = _elements(column)
        values = _scalars(values)
        first = values.take(pa.array(np.cumsum(lengths) - lengths, mask=lengths != 1))
        if not (lengths > 1).any():
            return first
        texts = first if pa.types.is_large_binary(first.type) else pc.cast(texts_of(first)[0], pa.large_binary())
        return pc.if_else(pa.array(lengths > 1), pa.scalar(_LIST_OF_SEVERAL, pa.large_binary()), texts)
    return pc.cast(column, pa.large_binary()) if is_text(kind) else column


def _is_list(kind: pa.DataType) -> bool:
    t = pa.types
    return any(test(kind) for test in (t.is_list, t.is_large_list, t.is_fixed_size_list, t.is_list_view))


def _elements(column: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Returns the lengths of lists, int64 [n] (0 for null), and all their elements, one list after the other."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), pc.list_flatten(column)
