"""Encodes raw rows of items, users and interactions: Arrow batches in, Arrow batches out.

Each function is a pure function of one batch. It uses no files, processes or state, so threads or a cluster engine can
call it, and the result of a row depends on that row only. Columns are as tables.read_batches returns them, or of any
other type that column_values.py can read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpsr_tf.data.column_values import (
    TEXT,
    Ids,
    flags_of,
    hashes_of,
    ids_of,
    is_text,
    lists_of,
    numbers_of,
    seconds_of,
    texts_of,
    trimmed,
    vectors_of,
)
from dpsr_tf.data.schema import EVENT_TYPES, Feature, Filter, InteractionsSchema, ItemsSchema, Schema, UsersSchema

# The role of an interaction in training; 0 is neither.
POSITIVE, NEGATIVE = 1, 2

# The user id that logs use for an unknown user, and the id of row 0 of users.dpsr.
_ANONYMOUS = -1
_LONGEST_PREVIEW = 200
_NO_TYPE = 255
_UNITS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The result of encoding a batch. Each row of the batch is either in `rows` or in `rejects`.

    Attributes:
        rows: the usable rows, in order.
        rejects: the other rows, in order, with columns `row` int64 (the row's place in the batch, from 0), `reason`
            large_string, and `value` large_string (the value that was found, at most 200 characters; may be null).
    """

    rows: pa.RecordBatch
    rejects: pa.RecordBatch


class IdIndex:
    """Finds rows by id. Takes up to 8 bytes per id, beside the ids themselves."""

    def __init__(self, ids: np.ndarray):
        """Builds the index.

        Args:
            ids: int64 [rows], ascending and distinct. The position of an id is its row.
        """
        self._ids = ids
        # Ids without large gaps are looked up in one step. Others are found by bisection, which is several times as
        # fast where the ids that are looked for are sorted: neighbours then lie in the same cache lines.
        self._table: np.ndarray | None = None
        if len(ids) and int(ids[-1]) - int(ids[0]) < 2 * len(ids):
            self._table = np.full(int(ids[-1]) - int(ids[0]) + 1, -1, np.int32)
            self._table[ids - ids[0]] = np.arange(len(ids), dtype=np.int32)

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._ids)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Returns the rows, int32 [n], of ids int64 [n]; -1 where an id is unknown."""
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


def columns_to_read(schema: Schema, table: str) -> tuple[list[str], list[str]]:
    """Returns the columns of "items", "users" or "interactions": those of text, then the others. No name is twice."""
    texts: list[str | None]
    others: list[str | None] = []
    features: Sequence[Feature | Filter] = ()
    if table == "items":
        items = schema.items
        texts, others = [*items.text, items.title, *items.search_names.values(), items.id], [items.popularity]
        features = (*items.features, *items.filters)
    elif table == "users":
        assert schema.users is not None
        texts, features = [schema.users.id], schema.users.features
    else:
        s = schema.interactions
        assert s is not None
        texts, others = [s.query, s.item, s.user, s.type, s.session], [s.time, s.position, s.weight, s.label]
    texts += [feature.column for feature in features if feature.kind != "number"]
    others += [feature.column for feature in features if feature.kind == "number"]
    distinct = list(dict.fromkeys(column for column in texts if column is not None))
    return distinct, [column for column in dict.fromkeys(others) if column is not None and column not in distinct]


def are_text(counts: tuple[int, int]) -> bool:
    """Whether ids are text, given tables.count_ids: more than one in a hundred is not a usual whole number."""
    strange, total = counts
    return strange > 0.01 * total


def encode_items(batch: pa.RecordBatch, schema: ItemsSchema, string_ids: bool) -> Encoded:
    """Encodes rows of the item table.

    Args:
        batch: rows with all columns that the schema names.
        schema: describes the columns.
        string_ids: whether the shop's item ids are text; otherwise they are int64 from 0 on.

    Returns:
        Rows with these columns:

        - `id` int64; for text ids a 63-bit hash, which is the same on every machine;
        - `key` large_string, the text id; only for text ids;
        - `title` and `text` large_string; a null title or text is empty here;
        - `text0`, `text1`, ... large_string: the columns of `text` but the title, see ItemsSchema.text_names;
        - `searched0`, ..., `identifier0`, ..., `variants` large_string, empty for null: see ItemsSchema.search_names;
        - `popularity` float32; null where it is missing or the schema names no column;
        - `feature.NAME` for each feature: large_string (kinds categorical and text), float64 (number), or
          large_list<large_string> (multi), or large_list<float> (vector); null where it is unknown, or [] for a vector;
        - `filter.NAME` for each filter, with the same types.

        A row is rejected for the first of these reasons that applies:

        1. an id, and after it a title or text, that is not UTF-8, or is a list of several values;
        2. an id that is missing;
        3. an id that is not a whole number of 0 or more;
        4. a popularity that is negative or not a number;
        5. a feature or filter that is not UTF-8, or, for kind number, neither empty nor a finite number, or, for kind
           vector, neither empty nor as many finite numbers as its length.
    """
    rows = _Rows(batch)
    ids = rows.ids("item", schema.id, string_ids)
    title = schema.title or schema.text[0]
    search = schema.search_names
    columns_of_text = dict.fromkeys([*schema.text, title, *search.values()])
    texts = {name: pc.fill_null(rows.text(name, name), "") for name in columns_of_text}
    rows.reject_ids("item", schema.id, ids)
    columns = _id_columns(ids) | {
        "title": texts[title],
        "text": pc.binary_join_element_wise(*(texts[name] for name in schema.text), pa.scalar(" ", TEXT)),
        **{name: texts[column] for column, name in schema.text_names.items() if name != "title"},
        **{name: texts[column] for name, column in search.items()},
        "popularity": pa.nulls(len(batch), pa.float32()),
    }
    if schema.popularity is not None:
        values, missing, bad = numbers_of(batch[schema.popularity])
        popularity = _float32(values)
        bad |= ~missing & ~(np.isfinite(popularity) & (popularity >= 0))
        rows.reject(bad, "popularity is not a number of 0 or more", schema.popularity)
        columns["popularity"] = pa.array(popularity, mask=missing | bad)
    return rows.encoded(columns | _features(rows, schema.features) | _features(rows, schema.filters, "filter"))


def encode_item_attributes(
    batch: pa.RecordBatch, schema: ItemsSchema, filters: Sequence[Filter], string_ids: bool
) -> Encoded:
    """Encodes new attributes of items like encode_items, but with columns `id`, [`key`] and `filter.NAME` only.

    Args:
        batch: rows with the column of the id and those of `filters`.
        schema: describes the id.
        filters: the attributes, some of those of the schema or none.
        string_ids: whether the shop's item ids are text.
    """
    rows = _Rows(batch)
    ids = rows.ids("item", schema.id, string_ids)
    rows.reject_ids("item", schema.id, ids)
    return rows.encoded(_id_columns(ids) | _features(rows, filters, "filter"))


def encode_users(batch: pa.RecordBatch, schema: UsersSchema, string_ids: bool) -> Encoded:
    """Encodes rows of the user table like encode_items, but with columns `id`, [`key`] and `feature.NAME` only.

    The id -1 is rejected: it belongs to the anonymous user, who is in no table.
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
        schema: describes the columns.
        items: ids of the item table; the hashes where ids are text.
        users: ids of the user table; None if the schema names no user column. Rows are those of users.dpsr, where row 0
            is the anonymous user. The index may begin with the id of that user, -1, or with the first known user, who
            is row 1 in both cases.
        string_item_ids: whether item ids are text.
        string_user_ids: whether user ids are text.

    Returns:
        Rows with these columns, none of which holds nulls:

        - `query` large_string, trimmed;
        - `user`, `item` int32, rows of the two tables (an empty user id and -1 are anonymous, row 0);
        - `time` uint32, seconds since 1970; 0 if the schema names no time;
        - `type` uint8, position in EVENT_TYPES; click if the schema names no type;
        - `session` uint64, a hash; 0 is none;
        - `position` uint8; 0 is none, 255 stands for 255 or more;
        - `weight` float32, already multiplied by the weight of the type;
        - `label` float32; rows without a label get 1;
        - `labelled` bool, whether the row has a label;
        - `role` uint8: 1 positive, 2 supervised negative, 0 neither. The label decides it, or the type where there is
          no label.

        A row with a label needs neither time nor type, because people who grade pairs have none: its time is then 0,
        and its type is a click.

        A row is rejected for the first of these reasons that applies:

        1. a query, id or session that is not UTF-8, or is a list of several values;
        2. a query without text;
        3. an item id that is missing; an item that is not in the table;
        4. a user that is not in the table;
        5. a label that is not finite or not a number;
        6. a time that is missing, unreadable, not after 1970-01-01T00:00:00Z, or after 2106-02-07T06:28:15Z;
        7. a type that is neither in `types` nor in EVENT_TYPES, or is missing;
        8. a position that is not a whole number of 1 or more; a weight that is missing, negative, not finite or not a
           number.
    """
    s = schema
    rows = _Rows(batch)
    # All text is read before anything else is checked, so that bad UTF-8 is the first reason to reject a row.
    query = pc.utf8_trim_whitespace(pc.fill_null(rows.text("query", s.query), ""))
    item_ids = rows.ids("item", s.item, string_item_ids)
    user_ids = rows.ids("user", s.user, string_user_ids) if s.user else None
    session = _sessions(rows, s)
    rows.reject(flags_of(pc.equal(query, "")), "query is empty", s.query)
    item = _item_rows(rows, s, item_ids, items)
    user = _user_rows(rows, s, user_ids, users)
    label, labelled = _labels(rows, s)
    time = _times(rows, s, labelled)
    event_type = _event_types(rows, s, labelled)
    position = _positions(rows, s)
    weight = _weights(rows, s, event_type)
    return rows.encoded(
        {
            "query": query,
            "user": pa.array(user),
            "item": pa.array(item),
            "time": pa.array(time),
            "type": pa.array(event_type),
            "session": pa.array(session),
            "position": pa.array(position),
            "weight": pa.array(weight),
            "label": pa.array(_float32(label)),
            "labelled": pa.array(labelled),
            "role": pa.array(_roles(s, label, labelled, event_type)),
        }
    )


# The columns of an interaction. Each function rejects the rows whose value is bad, and returns one value for each row.


def _sessions(rows: _Rows, schema: InteractionsSchema) -> np.ndarray:
    if schema.session is None:
        return np.zeros(len(rows), np.uint64)
    return hashes_of(trimmed(rows.text("session", schema.session))).view(np.uint64)


def _item_rows(rows: _Rows, schema: InteractionsSchema, ids: Ids, items: IdIndex) -> np.ndarray:
    rows.reject(ids.missing, "item id is missing", schema.item)
    item = items.rows(ids.values)
    rows.reject(ids.wrong | (item < 0), "item is not in the item table", schema.item)
    return item


def _user_rows(rows: _Rows, schema: InteractionsSchema, ids: Ids | None, users: IdIndex | None) -> np.ndarray:
    if schema.user is None or ids is None or users is None:
        return np.zeros(len(rows), np.int32)
    anonymous = ids.missing | (ids.values == _ANONYMOUS)
    if ids.keys is not None:
        anonymous |= flags_of(pc.equal(ids.keys, str(_ANONYMOUS)))
    user = users.rows(ids.values)
    rows.reject(~anonymous & (ids.wrong | (user < 0)), "user is not in the user table", schema.user)
    # The row of the first id in the index: 0 if that is the anonymous user, 1 if it is the first known user.
    first_row = -users.rows(np.array([_ANONYMOUS]))[0]
    return np.where(anonymous, 0, user + first_row).astype(np.int32)


def _labels(rows: _Rows, schema: InteractionsSchema) -> tuple[np.ndarray, np.ndarray]:
    if schema.label is None:
        return np.ones(len(rows)), np.zeros(len(rows), bool)
    label, missing, bad = numbers_of(rows.batch[schema.label])
    rows.reject(bad | ~(missing | np.isfinite(_float32(label))), "label is not a number", schema.label)
    return np.where(missing, 1, label), ~missing


def _roles(schema: InteractionsSchema, label: np.ndarray, labelled: np.ndarray, event_type: np.ndarray) -> np.ndarray:
    by_type = np.array([POSITIVE if name in schema.positive_types else 0 for name in EVENT_TYPES], np.uint8)[event_type]
    by_label = np.where(label >= schema.positive_from, POSITIVE, 0)
    if schema.negative_to is not None:
        by_label = np.where(label <= schema.negative_to, NEGATIVE, by_label)
    return np.where(labelled, by_label, by_type).astype(np.uint8)


def _times(rows: _Rows, schema: InteractionsSchema, labelled: np.ndarray) -> np.ndarray:
    if schema.time is None:
        return np.zeros(len(rows), np.uint32)
    time = seconds_of(rows.batch[schema.time], _UNITS_PER_SECOND[schema.time_unit])
    without = _blanks(labelled, rows.batch[schema.time])
    bad = ((time <= 0) | (time >= 2**32)) & ~without
    rows.reject(bad, "time is missing, unreadable, or outside 1970 to 2106", schema.time)
    return np.where(without, 0, np.clip(time, 0, 2**32 - 1)).astype(np.uint32)


def _event_types(rows: _Rows, schema: InteractionsSchema, labelled: np.ndarray) -> np.ndarray:
    click = EVENT_TYPES.index("click")
    if schema.type is None:
        return np.full(len(rows), click, np.uint8)
    encoded = trimmed(texts_of(rows.batch[schema.type])[0]).dictionary_encode()
    names = [schema.types.get(value, value) for value in encoded.dictionary.to_pylist()]
    codes = [EVENT_TYPES.index(name) if name in EVENT_TYPES else _NO_TYPE for name in names]
    indices = pc.fill_null(encoded.indices, len(codes)).to_numpy(zero_copy_only=False)
    event_type = np.array([*codes, _NO_TYPE], np.uint8)[indices]
    event_type = np.where(_blanks(labelled, rows.batch[schema.type]), np.uint8(click), event_type)
    rows.reject(event_type == _NO_TYPE, "type is not known", schema.type)
    return np.where(event_type == _NO_TYPE, np.uint8(0), event_type)


def _positions(rows: _Rows, schema: InteractionsSchema) -> np.ndarray:
    if schema.position is None:
        return np.zeros(len(rows), np.uint8)
    numbers, missing, bad = numbers_of(rows.batch[schema.position])
    numbers = np.where(missing | bad, 1, numbers)
    bad |= (numbers < 1) | (numbers != np.floor(numbers)) | np.isinf(numbers)
    rows.reject(bad, "position is not a whole number of 1 or more", schema.position)
    return np.where(missing | bad, 0, np.minimum(numbers, 255)).astype(np.uint8)


def _weights(rows: _Rows, schema: InteractionsSchema, event_type: np.ndarray) -> np.ndarray:
    weight = np.array([schema.type_weights.get(name, 1.0) for name in EVENT_TYPES], np.float64)[event_type]
    if schema.weight is not None:
        numbers, missing, bad = numbers_of(rows.batch[schema.weight])
        bad |= missing | (numbers < 0)
        weight = np.where(bad, 1, numbers) * weight
        bad |= ~np.isfinite(_float32(weight))
        rows.reject(bad, "weight is not a number of 0 or more", schema.weight)
    return _float32(weight)


def _blanks(labelled: np.ndarray, column: pa.Array) -> np.ndarray:
    """Tells which rows have a label and no value in a column, bool [rows]."""
    if not labelled.any():
        return labelled
    texts, bad = texts_of(column)
    return labelled & flags_of(pc.is_null(trimmed(texts))) & ~bad


def _float32(numbers: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)


# The rows of a batch.


class _Rows:
    """A batch while it is encoded. Remembers which rows cannot be used, and the first reason why."""

    def __init__(self, batch: pa.RecordBatch):
        self.batch = batch
        # The number of the reason in `_reasons`, from 1 on; 0 is none so far.
        self._reason = np.zeros(len(batch), np.int16)
        self._reasons: list[tuple[str, str]] = []

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.batch)

    def reject(self, bad: np.ndarray, reason: str, column: str) -> None:
        """Rejects the rows `bad`, bool [rows], that have not been rejected yet."""
        if bad.any():
            self._reasons.append((reason, column))
            self._reason[bad & (self._reason == 0)] = len(self._reasons)

    def text(self, what: str, column: str) -> pa.Array:
        """Reads a column as large_string [rows]. Rejects values that are not UTF-8, and returns null for them."""
        texts, bad = texts_of(self.batch[column])
        self.reject(bad, f"{what} is not UTF-8 text", column)
        return texts

    def ids(self, what: str, column: str, string_ids: bool) -> Ids:
        """Reads a column of ids. Rejects values that are not UTF-8."""
        ids = ids_of(self.batch[column], string_ids)
        self.reject(ids.garbled, f"{what} id is not UTF-8 text", column)
        return ids

    def reject_ids(self, what: str, column: str, ids: Ids) -> None:
        """Rejects the ids that no row of a table may have."""
        self.reject(ids.missing, f"{what} id is missing", column)
        if ids.keys is None:
            self.reject(ids.wrong | (ids.values < 0), f"{what} id is not a whole number of 0 or more", column)
        else:
            reserved = flags_of(pc.equal(ids.keys, str(_ANONYMOUS)))
            purpose = " for anonymous users" if what == "user" else ""
            self.reject(reserved, f"{what} id -1 is reserved{purpose}", column)

    def encoded(self, columns: dict[str, pa.Array]) -> Encoded:
        """Returns the result, given columns with a value for every row of the batch."""
        rows = pa.record_batch(columns)
        bad = np.flatnonzero(self._reason)
        reasons = [self._reasons[number - 1] for number in self._reason[bad].tolist()]
        values = [_preview(self.batch[column], row) for row, (_, column) in zip(bad.tolist(), reasons, strict=True)]
        rejects = pa.record_batch(
            {
                "row": pa.array(bad, pa.int64()),
                "reason": pa.array([reason for reason, _ in reasons], TEXT),
                "value": pa.array(values, TEXT),
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
            rows.reject(bad | np.isinf(numbers), f"{what} is not a number", feature.column)
            values = pa.array(numbers, mask=missing | bad)
        elif feature.kind == "multi":
            values, bad = lists_of(rows.batch[feature.column], feature.separator)
            rows.reject(bad, f"{what} is not UTF-8 text", feature.column)
        elif isinstance(feature, Feature) and feature.length is not None:
            values, bad = vectors_of(rows.batch[feature.column], feature.separator, feature.length)
            rows.reject(bad, f"{what} is not a vector of {feature.length} finite numbers", feature.column)
        else:
            values = rows.text(what, feature.column)
            values = trimmed(values) if feature.kind == "categorical" else values
        columns[f"{word}.{feature.key}"] = values
    return columns


def _preview(column: pa.Array, row: int) -> str | None:
    """Returns the value of a rejected row as people read it."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.slice(row, 1).dictionary_decode()
        row = 0
    value = column[row]
    if not value.is_valid:
        return None
    if is_text(column.type):
        data = pc.cast(value, pa.large_binary()).as_py()[: 4 * _LONGEST_PREVIEW]
        return str(data.decode(errors="replace"))[:_LONGEST_PREVIEW]
    try:
        return str(value.as_py())[:_LONGEST_PREVIEW]
    except (ArithmeticError, LookupError, ValueError):
        # The value is a list with text that is not UTF-8, or a time that Python cannot hold.
        return f"a value of type {column.type}"
