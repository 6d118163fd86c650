"""Raw rows into rows of a store: Arrow batches in, Arrow batches out.

These are pure functions of one batch, without files, processes or state, so that threads or a cluster engine can call
them; what becomes of a row depends on nothing but the row. Columns are as tables.read_batches gives them, or of any
other type that can hold the value:

- text is string or binary of any kind, UTF-8; numbers, booleans and dates stand for their text, a whole float such as
  30.0 for "30";
- numbers are of any numeric type, or text such as "12", "-0.5" or "1e5"; null, NaN, empty text and the words for it
  that CSV files hold ("NA", "null", ...) are missing numbers; true is 1, false 0;
- ids are whole numbers in a column of any numeric type, or text without leading zeros ("7", but not "007" or "7.0");
  where the shop's ids are text, any text that is not empty;
- any of them may be dictionary-encoded, and a list of one is its element.

White space around ids, numbers, times, types, sessions and feature values does not count; Unicode says what is white.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from dpsr_tf.data.schema import EVENT_TYPES, Feature, Filter, InteractionsSchema, ItemsSchema, UsersSchema

_TEXT = pa.large_string()
_LONGEST_PREVIEW = 200

# Roles of an interaction.
POSITIVE, NEGATIVE = 1, 2
# What a log may have for an id where nobody is known; the id of row 0 of users.dpsr.
_ANONYMOUS = -1


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What became of a batch; each of its rows is in one of the two.

    Attributes:
        rows: the rows that can be used, in order.
        rejects: the others, in order: `row` int64 (place in the batch, from 0 on), `reason` large_string, `value`
            large_string (what was found, at most 200 characters; null where there is nothing).
    """

    rows: pa.RecordBatch
    rejects: pa.RecordBatch


class IdIndex:
    """Row by id. Takes 8 bytes an id, those of the ids themselves not counted."""

    def __init__(self, ids: np.ndarray):
        """ids: int64 [rows], ascending, each once. The position of an id is its row."""
        self._ids = ids
        # Ids without large gaps are looked up in one step. Others are found by bisection, which is several times as
        # fast where the ids that are looked for are sorted: neighbours then lie in the same cache lines.
        self._table: np.ndarray | None = None
        if len(ids) and int(ids[-1]) - int(ids[0]) < 2 * len(ids):
            self._table = np.full(int(ids[-1]) - int(ids[0]) + 1, -1, np.int32)
            self._table[ids - ids[0]] = np.arange(len(ids), dtype=np.int32)

    def __len__(self) -> int:
        """Rows."""
        return len(self._ids)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows int32 [n] of ids int64 [n], -1 where an id is unknown."""
        if len(self._ids) == 0 or len(ids) == 0:
            return np.full(len(ids), -1, np.int32)
        if self._table is not None:
            inside = (ids >= self._ids[0]) & (ids <= self._ids[-1])
            return np.where(inside, self._table[np.where(inside, ids - self._ids[0], 0)], np.int32(-1))
        order = np.argsort(ids)
        ordered = ids[order]
        places = np.minimum(np.searchsorted(self._ids, ordered), len(self._ids) - 1)
        rows = np.empty(len(ids), np.int32)
        rows[order] = np.where(self._ids[places] == ordered, places, -1)
        return rows


def encode_items(batch: pa.RecordBatch, schema: ItemsSchema, string_ids: bool) -> Encoded:
    """Encodes rows of the item table.

    Args:
        batch: rows with all columns that the schema names.
        schema: what they are.
        string_ids: whether the shop's item ids are text; else they are int64 from 0 on.

    Returns:
        Columns `id` int64 (of a text id, a 63-bit hash that is the same everywhere), [`key` large_string, the text id],
        `title` and `text` large_string (null is empty text), `popularity` float32 (null where it is missing, or the
        schema names none), and `feature.NAME` for each feature: large_string (categorical, text; null is unknown),
        float64 (number; null is unknown), or large_list<large_string> (multi); `filter.NAME` for each filter, likewise.

        Rejected is, by the first that applies: an id, then a title or text, that is not UTF-8 (or a list of several); a
        missing id; one that is no whole number from 0 on; a popularity that is negative or no number; a feature or
        filter that is not UTF-8, or of kind number and neither empty nor a finite number.
    """
    rows = _Rows(batch)
    ids = rows.ids("item", schema.id, string_ids)
    title = schema.title or schema.text[0]
    texts = {name: pc.fill_null(rows.text(name, name), "") for name in dict.fromkeys([*schema.text, title])}
    rows.reject_ids("item", schema.id, ids)
    columns = _id_columns(ids) | {
        "title": texts[title],
        "text": pc.binary_join_element_wise(*(texts[name] for name in schema.text), pa.scalar(" ", _TEXT)),
        "popularity": pa.nulls(len(batch), pa.float32()),
    }
    if schema.popularity is not None:
        values, missing, bad = numbers_of(batch[schema.popularity])
        popularity = _float32(values)
        bad |= ~missing & ~(np.isfinite(popularity) & (popularity >= 0))
        rows.reject(bad, "popularity is no number from 0 on", schema.popularity)
        columns["popularity"] = pa.array(popularity, mask=missing | bad)
    return rows.encoded(columns | _features(rows, schema.features) | _features(rows, schema.filters, "filter"))


def encode_users(batch: pa.RecordBatch, schema: UsersSchema, string_ids: bool) -> Encoded:
    """Encodes rows of the user table: as encode_items, but with columns `id`, [`key`] and `feature.NAME` only.

    The id -1 is that of the anonymous user, who is in no table.
    """
    rows = _Rows(batch)
    ids = rows.ids("user", schema.id, string_ids)
    rows.reject_ids("user", schema.id, ids)
    return rows.encoded(_id_columns(ids) | _features(rows, schema.features))


def encode_interactions(
    batch: pa.RecordBatch,
    schema: InteractionsSchema,
    items: IdIndex,
    users: IdIndex | None,
    string_item_ids: bool,
    string_user_ids: bool,
) -> Encoded:
    """Encodes rows of the interaction table.

    Args:
        batch: rows with all columns that the schema names.
        schema: what they are.
        items: ids of the item table (of text ids, their hashes).
        users: ids of the user table; None if the schema names no user. Rows are those of users.dpsr, whose row 0 is the
            anonymous user: the index may begin with that one's id, -1, or with the first user, who is row 1 then too.
        string_item_ids, string_user_ids: whether ids are text.

    Returns:
        Columns, none of them null: `query` large_string, trimmed; `user`, `item` int32, rows (an empty user and -1 are
        anonymous, 0); `time` uint32, seconds since 1970 (0 where the schema names none); `type` uint8, place in
        EVENT_TYPES (click where the schema names none); `session` uint64, a hash (0 is none); `position` uint8 (0 is
        none, 255 is 255 or more); `weight` float32, times that of the type; `label` float32 (1 where the schema names
        none); `role` uint8: 1 positive, 2 supervised negative, 0 neither. The label decides on the role, or the type
        where there is no label.

        Rejected is, by the first that applies:
        1. a query, id or session that is not UTF-8 (or a list of several values);
        2. a query without text;
        3. no item id; an item that is not in the table;
        4. a user that is not in the table;
        5. a time that is missing, unreadable, 1970-01-01T00:00:00Z or before, or after 2106-02-07T06:28:15Z;
        6. a type, missing ones too, that is not in `types` and no name of EVENT_TYPES;
        7. a position that is no whole number from 1 on; a weight that is missing, negative, not finite or no number; a
           label that is missing, not finite or no number.
    """
    s, count = schema, len(batch)
    rows = _Rows(batch)
    query = pc.utf8_trim_whitespace(pc.fill_null(rows.text("query", s.query), ""))
    item_ids = rows.ids("item", s.item, string_item_ids)
    user_ids = rows.ids("user", s.user, string_user_ids) if s.user else None
    sessions = _trimmed(rows.text("session", s.session)) if s.session else None
    rows.reject(_flags(pc.equal(query, "")), "query is empty", s.query)
    rows.reject(item_ids.missing, "item id is missing", s.item)
    item = items.rows(item_ids.values)
    rows.reject(item_ids.wrong | (item < 0), "item is not in the item table", s.item)
    user = np.zeros(count, np.int32)
    if s.user and user_ids is not None and users is not None:
        anonymous = user_ids.missing | (user_ids.values == _ANONYMOUS)
        if user_ids.keys is not None:
            anonymous |= _flags(pc.equal(user_ids.keys, str(_ANONYMOUS)))
        found = users.rows(user_ids.values)
        rows.reject(~anonymous & (user_ids.wrong | (found < 0)), "user is not in the user table", s.user)
        first_row = -users.rows(np.array([_ANONYMOUS]))[0]
        user = np.where(anonymous, 0, found + first_row).astype(np.int32)
    time = np.zeros(count, np.int64)
    if s.time:
        time = _seconds(batch[s.time], {"s": 1, "ms": 1_000, "us": 1_000_000}[s.time_unit])
        rows.reject((time <= 0) | (time >= 2**32), "time is missing or no time of 1970 to 2106", s.time)
    kind = np.full(count, EVENT_TYPES.index("click"), np.uint8)
    if s.type:
        kind = _types(batch[s.type], s.types)
        rows.reject(kind == _NO_TYPE, "type is not known", s.type)
        kind = np.where(kind == _NO_TYPE, np.uint8(0), kind)
    position = np.zeros(count, np.uint8)
    if s.position:
        numbers, missing, bad = numbers_of(batch[s.position])
        numbers = np.where(missing | bad, 1, numbers)
        bad |= (numbers < 1) | (numbers != np.floor(numbers)) | np.isinf(numbers)
        rows.reject(bad, "position is no whole number from 1 on", s.position)
        position = np.where(missing | bad, 0, np.minimum(numbers, 255)).astype(np.uint8)
    weight = np.array([s.type_weights.get(name, 1.0) for name in EVENT_TYPES], np.float64)[kind]
    if s.weight:
        numbers, missing, bad = numbers_of(batch[s.weight])
        bad |= missing | (numbers < 0)
        weight = np.where(bad, 1, numbers) * weight
        bad |= ~np.isfinite(_float32(weight))
        rows.reject(bad, "weight is no number from 0 on", s.weight)
    label = np.ones(count, np.float64)
    if s.label:
        label, missing, bad = numbers_of(batch[s.label])
        rows.reject(missing | bad | ~np.isfinite(_float32(label)), "label is no number", s.label)
        role = np.where(label >= s.positive_from, POSITIVE, 0)
        if s.negative_to is not None:
            role = np.where(label <= s.negative_to, NEGATIVE, role)
    else:
        role = np.array([POSITIVE if name in s.positive_types else 0 for name in EVENT_TYPES])[kind]
    return rows.encoded(
        {
            "query": query,
            "user": pa.array(user),
            "item": pa.array(item),
            "time": pa.array(np.clip(time, 0, 2**32 - 1).astype(np.uint32)),
            "type": pa.array(kind),
            "session": pa.array(np.zeros(count, np.uint64) if sessions is None else _hashes(sessions).view(np.uint64)),
            "position": pa.array(position),
            "weight": pa.array(_float32(weight)),
            "label": pa.array(_float32(label)),
            "role": pa.array(role.astype(np.uint8)),
        }
    )


# Values of a column. Each function takes any of the types that this module's docstring names.


class Ids(NamedTuple):
    """Ids of a column, n rows."""

    values: np.ndarray  # int64 [n]; of text ids, their hashes; 0 where there is none
    keys: pa.Array | None  # large_string [n], where ids are text
    missing: np.ndarray  # bool [n]: null or empty
    wrong: np.ndarray  # bool [n]: there is something, but it is no id
    garbled: np.ndarray  # bool [n]: it is not even UTF-8


def texts_of(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """A column as large_string [n], and where it is not UTF-8 (null then), bool [n]."""
    column = _scalars(column)
    bad = np.zeros(len(column), bool)
    if pa.types.is_floating(column.type):
        numbers = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
        whole = np.abs(numbers) < 2**53
        whole &= np.floor(np.where(whole, numbers, 0.5)) == numbers
        exact = pa.array(np.where(whole, numbers, 0).astype(np.int64), mask=~whole)
        other = pa.array(numbers, mask=whole | np.isnan(numbers))
        return pc.coalesce(pc.cast(exact, _TEXT), pc.cast(other, _TEXT)), bad
    if pa.types.is_timestamp(column.type):
        column = column.view(pa.timestamp(column.type.unit))  # as UTC: the machine may not know the zone
    try:
        return pc.cast(column, _TEXT), bad
    except pa.ArrowInvalid:
        values = column.to_pylist()
        for row, value in enumerate(values):
            try:
                values[row] = None if value is None else value.decode()
            except UnicodeDecodeError:
                values[row], bad[row] = None, True
        return pa.array(values, _TEXT), bad


def numbers_of(column: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A column as float64 [n]; where a number is missing (NaN then); where there is something else (NaN then too)."""
    column = _scalars(column)
    kind = column.type
    bad = np.zeros(len(column), bool)
    if pa.types.is_large_binary(kind):
        texts, bad = texts_of(column)
        texts = _trimmed(texts)
        for words, number in _BOOLEANS:
            texts = pc.if_else(pc.is_in(texts, words), pa.scalar(number, _TEXT), texts)
        written = _flags(pc.match_substring_regex(texts, _NUMBER))
        missing = _flags(pc.is_null(texts)) & ~bad | _flags(pc.is_in(texts, _NO_NUMBER))
        bad |= ~written & ~missing
        column = pc.if_else(pa.array(written), texts, pa.scalar(None, _TEXT))
    elif pa.types.is_temporal(kind):
        bad = _flags(pc.is_valid(column))
        column = pa.nulls(len(column))
    numbers = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return numbers, np.isnan(numbers) & ~bad, bad


def ids_of(column: pa.Array, string_ids: bool) -> Ids:
    """A column as ids: text if `string_ids`, else int64."""
    column = _scalars(column)
    kind, count = column.type, len(column)
    nothing = np.zeros(count, bool)
    if pa.types.is_integer(kind) and not string_ids:
        wrong = nothing
        if pa.types.is_uint64(kind):
            wrong = _flags(pc.greater(column, pa.scalar(2**63 - 1, pa.uint64())))
        values = pc.fill_null(pc.cast(column, pa.int64(), safe=False), 0).to_numpy(zero_copy_only=False)
        return Ids(values, None, _flags(pc.is_null(column)), wrong, nothing)
    texts, garbled = texts_of(column)
    if pa.types.is_decimal(kind):
        texts = pc.replace_substring_regex(texts, r"\.0*$", "")
    texts = _trimmed(texts)
    missing = _flags(pc.is_null(texts)) & ~garbled
    if string_ids:
        return Ids(_hashes(texts), texts, missing, garbled, garbled)
    # A number of up to 18 digits needs no thought; all others, -1 too, are few.
    short = pc.and_(pc.ascii_is_decimal(texts), pc.less_equal(pc.binary_length(texts), 18))
    short = _flags(pc.and_not(short, pc.match_substring_regex(texts, "^0.")))
    values = pc.cast(pc.if_else(pa.array(short), texts, pa.scalar(None, _TEXT)), pa.int64())
    values = pc.fill_null(values, 0).to_numpy(zero_copy_only=False).copy()
    wrong = garbled.copy()
    others = np.flatnonzero(~short & ~missing & ~garbled)
    for row, text in zip(others.tolist(), texts.take(pa.array(others)).to_pylist(), strict=True):
        value = int(text) if re.fullmatch("-?[1-9][0-9]{0,18}", text) else 2**63
        wrong[row] = not -(2**63) <= value < 2**63
        values[row] = 0 if wrong[row] else value
    return Ids(values, None, missing, wrong, garbled)


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of text or bytes."""
    t = pa.types
    tests = (t.is_string, t.is_large_string, t.is_string_view, t.is_binary, t.is_large_binary, t.is_binary_view)
    return any(test(kind) for test in (*tests, t.is_fixed_size_binary))


_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"
_NO_NUMBER = pa.array(pyarrow.csv.ConvertOptions().null_values, _TEXT)
_BOOLEANS = [(pa.array([word, word.title()], _TEXT), number) for word, number in (("true", "1"), ("false", "0"))]
_LIST_OF_SEVERAL = b"\xff"  # no UTF-8, so that nobody takes it for a text, number or id
_NO_TYPE = 255


def _scalars(column: pa.Array) -> pa.Array:
    """Without dictionary and lists; all kinds of text as large_binary."""
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
    """Lengths int64 [n] of lists, 0 of a null, and their elements, one list after the other."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), pc.list_flatten(column)


def _lists(column: pa.Array, separator: str | None) -> tuple[pa.Array, np.ndarray]:
    """A column as large_list<large_string> [n], and where it is not UTF-8, bool [n].

    Elements, split at `separator`, are trimmed and not empty; a value that is no list is one of one element.
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
    texts = _trimmed(texts)
    splits = np.zeros(len(bad) + 1, np.int64)
    np.cumsum(np.bincount(rows[_flags(pc.is_valid(texts))], minlength=len(bad)), out=splits[1:])
    return pa.LargeListArray.from_arrays(pa.array(splits), texts.drop_null()), bad


def _trimmed(texts: pa.Array) -> pa.Array:
    """Without white space at both ends; null where nothing is left."""
    texts = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, _TEXT), texts)


def _hashes(texts: pa.Array) -> np.ndarray:
    """A 63-bit hash of each text, int64 [n]; 0 for null."""
    encoded = texts.dictionary_encode()
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in encoded.dictionary.to_pylist())
    hashes = np.frombuffer(b"".join(digests), ">u8").astype(np.int64) & np.int64(2**63 - 1)
    return np.append(hashes, 0)[pc.fill_null(encoded.indices, len(hashes)).to_numpy(zero_copy_only=False)]


def _types(column: pa.Array, types: dict[str, str]) -> np.ndarray:
    """Places in EVENT_TYPES, uint8 [n]; _NO_TYPE where a value is not known."""
    encoded = _trimmed(texts_of(column)[0]).dictionary_encode()
    names = [types.get(value, value) for value in encoded.dictionary.to_pylist()]
    codes = [EVENT_TYPES.index(name) if name in EVENT_TYPES else _NO_TYPE for name in names]
    indices = pc.fill_null(encoded.indices, len(codes)).to_numpy(zero_copy_only=False)
    return np.array([*codes, _NO_TYPE], np.uint8)[indices]


_ISO = (
    r"^(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})"
    r"(?:[T ](?P<hour>\d{2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,]\d+)?)?"
    r"(?:Z| ?UTC|(?P<sign>[+-])(?P<zone_hour>\d{2})(?::?(?P<zone_minute>\d{2}))?)?)?$"
)


def _seconds(column: pa.Array, unit: int) -> np.ndarray:
    """Whole seconds since 1970, UTC, int64 [n]; 0 where there is no time. `unit`: how many of a number are a second."""
    column = _scalars(column)
    kind = column.type
    if pa.types.is_date32(kind):
        return _seconds(pc.multiply(pc.cast(pc.cast(column, pa.int32()), pa.int64()), 86_400), 1)
    if pa.types.is_date64(kind):
        return _seconds(pc.cast(column, pa.int64()), 1_000)
    if pa.types.is_timestamp(kind):
        return _seconds(pc.cast(column, pa.int64()), {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit])
    if pa.types.is_integer(kind):
        whole = ids_of(column, False)
        return np.where(whole.wrong, 0, whole.values // unit)
    numbers = numbers_of(pa.nulls(len(column)) if pa.types.is_boolean(kind) else column)[0]
    seconds = np.where(np.abs(numbers) < 2**63, numbers, 0).astype(np.int64) // unit
    return seconds + _iso_seconds(column) if pa.types.is_large_binary(kind) else seconds


def _iso_seconds(column: pa.Array) -> np.ndarray:
    """Seconds of text such as "2024-03-01", "2024-03-01 12:30:00.5", "2024-03-01T12:30+01:00"; 0 for other text."""
    parts = pc.extract_regex(_trimmed(texts_of(column)[0]), _ISO)
    if parts.null_count == len(parts):
        return np.zeros(len(parts), np.int64)

    def part(name: str) -> np.ndarray:
        digits = pc.fill_null(pc.struct_field(parts, name), "")
        return pc.cast(pc.if_else(pc.equal(digits, ""), "0", digits), pa.int64()).to_numpy(zero_copy_only=False)

    year, month, day = part("year"), part("month"), part("day")
    hour, minute, second = part("hour"), part("minute"), part("second")
    zone_hour, zone_minute = part("zone_hour"), part("zone_minute")
    zone = (zone_hour * 60 + zone_minute) * 60
    zone = np.where(_flags(pc.equal(pc.struct_field(parts, "sign"), "-")), -zone, zone)
    months = (year * 12 + month - 1 - 1970 * 12).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    valid = (month >= 1) & (month <= 12) & (day >= 1) & (days.astype("datetime64[M]") == months)
    valid &= (
        _flags(pc.is_valid(parts)) & (hour < 24) & (minute < 60) & (second < 60) & (zone_hour < 24) & (zone_minute < 60)
    )
    return np.where(valid, days.astype(np.int64) * 86_400 + hour * 3_600 + minute * 60 + second - zone, 0)


def _flags(values: pa.Array) -> np.ndarray:
    """bool [n]; null is false."""
    return pc.fill_null(values, False).to_numpy(zero_copy_only=False)


def _float32(numbers: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)


# Rows of a batch.


class _Rows:
    """A batch on its way: which of its rows cannot be used, and why. The first reason given counts."""

    def __init__(self, batch: pa.RecordBatch):
        self.batch = batch
        self._reason = np.zeros(len(batch), np.int16)  # 0: none so far
        self._reasons: list[tuple[str, str]] = []

    def reject(self, bad: np.ndarray, reason: str, column: str) -> None:
        """Rejects rows, bool [rows], that have no reason yet."""
        if bad.any():
            self._reasons.append((reason, column))
            self._reason[bad & (self._reason == 0)] = len(self._reasons)

    def text(self, what: str, column: str) -> pa.Array:
        """A column as large_string [rows]. Rejects what is not UTF-8; it is null here."""
        texts, bad = texts_of(self.batch[column])
        self.reject(bad, f"{what} is not UTF-8 text", column)
        return texts

    def ids(self, what: str, column: str, string_ids: bool) -> Ids:
        """A column of ids. Rejects what is not UTF-8."""
        ids = ids_of(self.batch[column], string_ids)
        self.reject(ids.garbled, f"{what} id is not UTF-8 text", column)
        return ids

    def reject_ids(self, what: str, column: str, ids: Ids) -> None:
        """Rejects what cannot be the id of a row of a table."""
        self.reject(ids.missing, f"{what} id is missing", column)
        if ids.keys is None:
            self.reject(ids.wrong | (ids.values < 0), f"{what} id is no whole number from 0 on", column)
        else:
            self.reject(_flags(pc.equal(ids.keys, str(_ANONYMOUS))), f"{what} id is -1, which is nobody's", column)

    def encoded(self, columns: dict[str, pa.Array]) -> Encoded:
        """The result, from columns with a value for every row of the batch."""
        rows = pa.record_batch(columns)
        bad = np.flatnonzero(self._reason)
        reasons = [self._reasons[number - 1] for number in self._reason[bad].tolist()]
        values = [_preview(self.batch[column], row) for row, (_, column) in zip(bad.tolist(), reasons, strict=True)]
        rejects = pa.record_batch(
            {
                "row": pa.array(bad, pa.int64()),
                "reason": pa.array([reason for reason, _ in reasons], _TEXT),
                "value": pa.array(values, _TEXT),
            }
        )
        return Encoded(rows.filter(pa.array(self._reason == 0)) if len(bad) else rows, rejects)


def _id_columns(ids: Ids) -> dict[str, pa.Array]:
    return {"id": pa.array(ids.values)} | ({} if ids.keys is None else {"key": ids.keys})


def _features(rows: _Rows, features: Sequence[Feature | Filter], word: str = "feature") -> dict[str, pa.Array]:
    columns = {}
    for feature in features:
        what = f"{word} {feature.key}"
        if feature.kind == "number":
            numbers, missing, bad = numbers_of(rows.batch[feature.column])
            rows.reject(bad | np.isinf(numbers), f"{what} is no number", feature.column)
            values = pa.array(numbers, mask=missing | bad)
        elif feature.kind == "multi":
            values, bad = _lists(rows.batch[feature.column], feature.separator)
            rows.reject(bad, f"{what} is not UTF-8 text", feature.column)
        else:
            values = rows.text(what, feature.column)
            values = _trimmed(values) if feature.kind == "categorical" else values
        columns[f"{word}.{feature.key}"] = values
    return columns


def _preview(column: pa.Array, row: int) -> str | None:
    """What a reject's value looks like to people."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.slice(row, 1).dictionary_decode()
        row = 0
    value = column[row]
    if not value.is_valid:
        return None
    if is_text(column.type):
        return (
            pc.cast(value, pa.large_binary())
            .as_py()[: 4 * _LONGEST_PREVIEW]
            .decode(errors="replace")[:_LONGEST_PREVIEW]
        )
    try:
        return str(value.as_py())[:_LONGEST_PREVIEW]
    except (
        ArithmeticError,
        LookupError,
        ValueError,
    ):  # text within a list that is not UTF-8, a time that Python cannot hold
        return f"a value of type {column.type}"
