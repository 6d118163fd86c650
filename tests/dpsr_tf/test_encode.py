from __future__ import annotations

import datetime
import decimal
import gzip
import hashlib
import itertools
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from conftest import encode_table
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsr_tf.data.column_values import ids_of, numbers_of, texts_of
from dpsr_tf.data.encode import IdIndex, encode_interactions, encode_items, encode_users
from dpsr_tf.data.schema import EVENT_TYPES, Feature, InteractionsSchema, ItemsSchema, UsersSchema
from dpsr_tf.data.tables import read_batches

IMPRESSION, SKIP, CLICK, CART, ORDER = range(5)
UTC = datetime.timezone.utc


def log_schema(**changes):
    return InteractionsSchema(**{"files": ("log",), "query": "query", "item": "item"} | changes)


def key_hash(key):
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") & (2**63 - 1)


ITEMS = IdIndex(np.array([10, 20, 30]))
USERS = IdIndex(np.array([-1, 5, 7]))
KEYS = ["007", "A1", "红"]
KEY_ROWS = {key: row for row, key in enumerate(sorted(KEYS, key=key_hash))}
KEY_ITEMS = IdIndex(np.array(sorted(map(key_hash, KEYS))))


def encode_log(columns, items=ITEMS, users=USERS, string_items=False, string_users=False, **schema):
    """Encodes columns; `query` and `item`, where they are left out, are all alike."""
    count = len(next(iter(columns.values())))
    batch = pa.record_batch({"query": ["red"] * count, "item": [10] * count} | columns)
    named = {name: name for name in columns}
    return encode_interactions(batch, log_schema(**named | schema), items, users, string_items, string_users)


def column(encoded, name):
    return encoded.rows[name].to_pylist()


def rejects(encoded):
    """Row, reason and value of each reject, after a check that no row is lost."""
    found = encoded.rejects
    assert found.schema.types == [pa.int64(), pa.large_string(), pa.large_string()]
    found.validate(full=True)
    encoded.rows.validate(full=True)
    rows = found["row"].to_pylist()
    assert rows == sorted(set(rows))
    return list(zip(rows, found["reason"].to_pylist(), found["value"].to_pylist(), strict=True))


# Ids.

INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
NUMBERS = [*INTEGERS, pa.float32(), pa.float64(), pa.decimal128(20), pa.decimal128(22, 2), pa.decimal256(40, 3)]
TEXTS = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()]


def as_type(values, kind):
    if kind in TEXTS:
        return pa.array([None if v is None else str(v).encode() for v in values], pa.binary()).cast(kind)
    return pa.array(values, pa.int64()).cast(kind)


@pytest.mark.parametrize("kind", [*NUMBERS, *TEXTS], ids=str)
@pytest.mark.parametrize("form", ["plain", "dictionary", "sliced", "lists of one"])
def test_ids_of_every_type(kind, form):
    values = [0, 7, None, 123, 100]
    array = as_type(values, kind)
    if form == "dictionary":
        if kind in (pa.string_view(), pa.decimal256(40, 3)):
            pytest.skip("Arrow has no dictionaries of them")
        array = array.dictionary_encode()
    elif form == "sliced":
        array = as_type([99, 99, *values, 99], kind).slice(2, 5)
    elif form == "lists of one":
        array = pa.LargeListArray.from_arrays(pa.array(range(6), pa.int64()), array)
    ids = ids_of(array, False)
    assert ids.values[[0, 1, 3, 4]].tolist() == [0, 7, 123, 100] and ids.values.dtype == np.int64
    assert ids.missing.tolist() == [False, False, True, False, False]
    assert not ids.wrong.any() and not ids.garbled.any() and ids.keys is None
    keys = ids_of(array, True)
    assert keys.keys.to_pylist() == ["0", "7", None, "123", "100"]
    assert keys.values[[0, 1, 3, 4]].tolist() == list(map(key_hash, ["0", "7", "123", "100"]))
    assert keys.missing.tolist() == ids.missing.tolist()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(str(v), v) for v in (0, 1, -1, -7, 10**17, 10**18, 2**63 - 1, -(2**63))],
        *[(f" \t\u3000{v}\n", v) for v in (12, -1)],
        *[
            (text, None)
            for text in ("007", "00", "-0", "-01", "+1", "1.0", "1e5", "0x1f", "A1", "1 2", "1_0", "１", "NA")
        ],
        *[(str(v), None) for v in (2**63, -(2**63) - 1, 10**19, 10**30)],
    ],
)
def test_ids_of_text(text, value):
    ids = ids_of(pa.array(["5", text, "6"]), False)
    assert ids.wrong.tolist() == [False, value is None, False] and not ids.missing.any()
    assert ids.values[[0, 2]].tolist() == [5, 6]
    assert value is None or ids.values[1] == value


@pytest.mark.parametrize(
    "array",
    [
        pa.array([1.5, np.inf, -np.inf, 1e300]),
        pa.array([2**63, 2**64 - 1], pa.uint64()),
        pa.array([decimal.Decimal("1.5")]),
        pa.array([True, False]),
        pa.array([datetime.date(2024, 3, 1)]),
        pa.array([[1, 2], [3, 4]]),
    ],
    ids=str,
)
def test_what_is_no_id(array):
    ids = ids_of(array, False)
    assert ids.wrong.all() and not ids.missing.any()


def test_missing_ids():
    for array in (
        pa.array([np.nan, None]),
        pa.array(["", " \u3000"]),
        pa.nulls(2),
        pa.array([[], None], pa.list_(pa.int8())),
    ):
        for string_ids in (False, True):
            ids = ids_of(array, string_ids)
            assert ids.missing.all() and not ids.wrong.any()


@pytest.mark.parametrize("ids", [[], [5], [-1, 0, 1, 2], [-1, 3, 4, 9], [2**62, 2**63 - 1], [-(2**63), 0, 2**63 - 1]])
def test_id_index(ids):
    index = IdIndex(np.array(ids, np.int64))
    asked = [*ids, -2, -1, 0, 1, 7, 2**63 - 1, -(2**63), *ids[::-1]]
    rows = index.rows(np.array(asked, np.int64))
    assert rows.dtype == np.int32 and len(index) == len(ids)
    assert rows.tolist() == [ids.index(i) if i in ids else -1 for i in asked]
    assert index.rows(np.zeros(0, np.int64)).tolist() == []


@pytest.mark.parametrize("span", [10_000, 2**62])
def test_id_index_of_many(span):
    generator = np.random.default_rng(0)
    ids = np.unique(generator.integers(0, span, 9_000))
    asked = generator.permutation(np.concatenate([ids, generator.integers(0, span, 5_000)]))
    row = {i: r for r, i in enumerate(ids.tolist())}
    assert IdIndex(ids).rows(asked).tolist() == [row.get(i, -1) for i in asked.tolist()]


# Texts and numbers.


def test_texts_of_other_types():
    for array, expected in [
        (pa.array([30, None]), ["30", None]),
        (pa.array([30.0, 1.5, np.nan, None, 123456789012.0, -0.0]), ["30", "1.5", None, None, "123456789012", "0"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([datetime.date(2024, 3, 1)]), ["2024-03-01"]),
        (pa.array([0], pa.timestamp("s", "Mars/Olympus")), ["1970-01-01 00:00:00"]),
        (pa.array([b"ab"], pa.binary(2)), ["ab"]),
        (pa.array([["a"], [], None]), ["a", None, None]),
        (pa.array([[5.0]]), ["5"]),
    ]:
        texts, bad = texts_of(array)
        assert texts.to_pylist() == expected and texts.type == pa.large_string() and not bad.any()


NO_UTF8 = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"a\xe8\xff", b"\xf5\x80\x80\x80"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()], ids=str)
def test_texts_that_are_not_utf8(kind):
    values = [b"red", *NO_UTF8, None, "红".encode()]
    array = pa.array(values, pa.large_binary() if "large" in str(kind) else pa.binary()).cast(kind, safe=False)
    for form in (array, pa.array([b"x", *values]).cast(kind, safe=False)[1:]):
        texts, bad = texts_of(form)
        assert texts.to_pylist() == ["red", *[None] * len(NO_UTF8), None, "红"]
        assert bad.tolist() == [False, *[True] * len(NO_UTF8), False, False]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[(text, float(text)) for text in ("0", "-1", "+1", "007", "1.5", "1.", ".5", "1e5", "1E-3", "-0.5", "9" * 30)],
        (" 12\u3000", 12.0),
        *[(text, number) for text, number in (("true", 1.0), ("True", 1.0), ("false", 0.0), ("False", 0.0))],
        *[(text, None) for text in ("", " ", "NA", "N/A", "null", "NULL", "nan", "NaN")],
        *[
            (text, "bad")
            for text in ("good", "1,5", "1e", "0x1f", "--1", "1 2", "inf", "-inf", "infinity", "１", "yes")
        ],
    ],
)
def test_numbers_of_text(text, number):
    numbers, missing, bad = numbers_of(pa.array(["3", text, None]))
    assert numbers[0] == 3 and missing[2] and not bad[2]
    assert (missing[1], bad[1]) == (number is None, number == "bad")
    assert numbers[1] == number if isinstance(number, float) else np.isnan(numbers[1])


@pytest.mark.parametrize("kind", [*NUMBERS, pa.float16(), *TEXTS], ids=str)
def test_numbers_of_every_type(kind):
    array = (
        pa.array([np.float16(3), None, np.float16(0)], kind) if kind == pa.float16() else as_type([3, None, 0], kind)
    )
    numbers, missing, bad = numbers_of(array)
    assert numbers[[0, 2]].tolist() == [3, 0] and missing.tolist() == [False, True, False] and not bad.any()


@pytest.mark.parametrize("value", [b"red", b"\xff", b"", 5, 1.5, True, None], ids=str)
def test_a_list_of_several_beside_does_not_matter(value):
    alone, beside = pa.array([[value]]), pa.array([[value], [value, value]])
    texts, bad = texts_of(beside)
    assert (texts[0], bad[0]) == (texts_of(alone)[0][0], texts_of(alone)[1][0])
    assert bad[1] and not texts[1].is_valid
    for read in (numbers_of, lambda column: ids_of(column, False)):
        for many, one in zip(read(beside), read(alone), strict=True):
            assert many is one or np.array_equal(many[:1], one, equal_nan=one.dtype == float)


def test_what_is_no_number():
    for array in (pa.array([datetime.date(2024, 3, 1)]), pa.array([[1, 2]]), pa.array([b"\xff"])):
        numbers, missing, bad = numbers_of(array)
        assert bad.tolist() == [True] and not missing.any() and np.isnan(numbers[0])


# Items and users.

ITEM_SCHEMA = ItemsSchema(
    files=("items",),
    id="id",
    text=("title", "brand"),
    popularity="sales",
    features=(
        Feature("brand"),
        Feature("price", kind="number", boundaries=(10,)),
        Feature("tags", kind="multi", separator="|"),
        Feature("about", name="details", kind="text"),
    ),
)


def test_items():
    batch = pa.record_batch(
        {
            "id": ["3", "1", "2"],
            "title": [" Red ", None, "b"],
            "brand": ["Acme ", "", None],
            "sales": ["1.5", "", "0"],
            "price": ["10", "", "9.5"],
            "tags": ["a| b||a", "", None],
            "about": [" x ", "", None],
        }
    )
    rows = encode_items(batch, ITEM_SCHEMA, False).rows
    large = pa.large_string()
    assert {name: str(kind) for name, kind in zip(rows.schema.names, rows.schema.types, strict=True)} == {
        "id": "int64",
        "title": "large_string",
        "text": "large_string",
        "text1": "large_string",
        "popularity": "float",
        "feature.brand": "large_string",
        "feature.price": "double",
        "feature.tags": str(pa.large_list(large)),
        "feature.details": "large_string",
    }
    assert rows.to_pydict() == {
        "id": [3, 1, 2],
        "title": [" Red ", "", "b"],
        "text": [" Red  Acme ", " ", "b "],
        "text1": ["Acme ", "", ""],
        "popularity": [1.5, None, 0.0],
        "feature.brand": ["Acme", None, None],
        "feature.price": [10.0, None, 9.5],
        "feature.tags": [["a", "b", "a"], [], []],
        "feature.details": [" x ", "", None],
    }


def test_text_ids_of_items_and_users():
    batch = pa.record_batch({"id": ["007", " A1", "红"], "t": ["a", "b", "c"]})
    for rows in (
        encode_items(batch, ItemsSchema(files=("i",), id="id", text=("t",), title="id"), True).rows,
        encode_users(batch, UsersSchema(files=("u",), id="id"), True).rows,
    ):
        assert rows["key"].to_pylist() == KEYS
        assert rows["id"].to_pylist() == list(map(key_hash, KEYS))
        assert len({key_hash(key) for key in KEYS}) == 3
    assert rows.schema.names == ["id", "key"]


@pytest.mark.parametrize(
    ("change", "reason", "value"),
    [
        ({"id": None}, "item id is missing", None),
        ({"id": b""}, "item id is missing", ""),
        ({"id": b"x"}, "item id is not a whole number of 0 or more", "x"),
        ({"id": b"-1"}, "item id is not a whole number of 0 or more", "-1"),
        ({"id": b"\xff1"}, "item id is not UTF-8 text", "�1"),
        ({"title": b"caf\xe9"}, "title is not UTF-8 text", "caf�"),
        ({"brand": b"\xff"}, "brand is not UTF-8 text", "�"),
        ({"sales": b"-1"}, "popularity is not a number of 0 or more", "-1"),
        ({"sales": b"many"}, "popularity is not a number of 0 or more", "many"),
        ({"sales": b"1e300"}, "popularity is not a number of 0 or more", "1e300"),
        ({"price": b"cheap"}, "feature price is not a number", "cheap"),
        ({"price": b"1e999"}, "feature price is not a number", "1e999"),
        ({"tags": b"a|\xff"}, "feature tags is not UTF-8 text", "a|�"),
        ({"about": b"\xff" * 1000}, "feature details is not UTF-8 text", "�" * 200),
        ({"id": b"x", "title": b"\xff", "price": b"cheap"}, "title is not UTF-8 text", "�"),
    ],
)
def test_rejected_items(change, reason, value):
    good = {"id": b"1", "title": b"t", "brand": b"b", "sales": b"1", "price": b"1", "tags": b"a|b", "about": b"c"}
    batch = pa.RecordBatch.from_pylist([good, good | change, good])
    for form in (batch, pa.RecordBatch.from_pylist([good, *batch.to_pylist()]).slice(1)):
        encoded = encode_items(form, ITEM_SCHEMA, False)
        assert rejects(encoded) == [(1, reason, value)]
        assert column(encoded, "id") == [1, 1]


def test_the_anonymous_user_is_in_no_table():
    schema = UsersSchema(files=("u",), id="id")
    for string_ids, reason in (
        (False, "user id is not a whole number of 0 or more"),
        (True, "user id -1 is reserved for anonymous users"),
    ):
        encoded = encode_users(pa.record_batch({"id": ["3", "-1", ""]}), schema, string_ids)
        assert rejects(encoded) == [(1, reason, "-1"), (2, "user id is missing", "")]


@pytest.mark.parametrize(
    ("array", "separator", "expected"),
    [
        (pa.array([["a", "b "], [], None, ["", None]]), None, [["a", "b"], [], [], []]),
        (pa.array([["a", "b"]], pa.list_(pa.string(), 2)), None, [["a", "b"]]),
        (pa.array([[1, 2], [3]], pa.large_list(pa.int8())), None, [["1", "2"], ["3"]]),
        (pa.array(["a, b", "", None, ","]), ",", [["a", "b"], [], [], []]),
        (pa.array(["a, b"]), None, [["a, b"]]),
        (pa.array([["a|b", "c"], ["d"]]), "|", [["a", "b", "c"], ["d"]]),
        (pa.array(["a|b", "a|b"]).dictionary_encode(), "|", [["a", "b"], ["a", "b"]]),
        (pa.array([5, None]), None, [["5"], []]),
    ],
)
def test_features_of_several_values(array, separator, expected):
    schema = UsersSchema(files=("u",), id="id", features=(Feature("f", kind="multi", separator=separator),))
    count = len(array)
    encoded = encode_users(pa.record_batch({"id": range(count), "f": array}), schema, False)
    assert column(encoded, "feature.f") == expected
    two = pa.concat_arrays([array, array])
    encoded = encode_users(pa.record_batch({"id": range(count), "f": two[count:]}), schema, False)
    assert column(encoded, "feature.f") == expected, "sliced"


# Interactions.


def test_the_least_schema():
    encoded = encode_log({"query": [" red\u3000", "红鞋"], "item": [30, 10]}, users=None)
    assert rejects(encoded) == []
    assert encoded.rows.to_pydict() == {
        "query": ["red", "红鞋"],
        "user": [0, 0],
        "item": [2, 0],
        "time": [0, 0],
        "type": [CLICK, CLICK],
        "session": [0, 0],
        "position": [0, 0],
        "weight": [1.0, 1.0],
        "label": [1.0, 1.0],
        "labelled": [False, False],
        "role": [1, 1],
    }
    types = "large_string int32 int32 uint32 uint8 uint64 uint8 float float bool uint8"
    assert " ".join(map(str, encoded.rows.schema.types)) == types


def test_no_row():
    for kind in (pa.null(), pa.large_binary()):
        names = ["query", "item", "user", "time", "type", "session", "position", "weight", "label"]
        encoded = encode_log({name: pa.array([], kind) for name in names})
        assert encoded.rows.num_rows == encoded.rejects.num_rows == 0
        assert " ".join(map(str, encoded.rows.schema.types)).startswith("large_string int32 int32 uint32 uint8 uint64")
    batch = pa.record_batch({name: pa.nulls(0) for name in ("id", "title", "brand", "sales", "price", "tags", "about")})
    full = pa.record_batch({name: ["1"] for name in batch.schema.names})
    schema = encode_items(full, ITEM_SCHEMA, True).rows.schema
    assert encode_items(batch, ITEM_SCHEMA, True).rows.schema == schema


@pytest.mark.parametrize("index", [USERS, IdIndex(np.array([5, 7]))])
def test_users_of_interactions(index):
    values = [5, 7, -1, None, 6, -2]
    for array in (
        pa.array(values),
        pa.array([None if v is None else str(v) for v in values]),
        pa.array(values, pa.float64()),
    ):
        encoded = encode_log({"user": array}, users=index)
        assert column(encoded, "user") == [1, 2, 0, 0]
        assert [row[:2] for row in rejects(encoded)] == [(i, "user is not in the user table") for i in (4, 5)]
    encoded = encode_log({"user": ["", " -1 ", "x"]}, users=index)
    assert column(encoded, "user") == [0, 0] and rejects(encoded) == [(2, "user is not in the user table", "x")]
    nobody = encode_log({"user": [5, None]}, users=IdIndex(np.zeros(0, np.int64)))
    assert rejects(nobody) == [(0, "user is not in the user table", "5")]


def test_text_ids_of_interactions():
    users = IdIndex(np.array([-1, *sorted(map(key_hash, KEYS))]))
    encoded = encode_log(
        {"item": ["红", "007", " A1 ", "7", None], "user": ["A1", "-1", "", "A1", "A1"]}, KEY_ITEMS, users, True, True
    )
    assert column(encoded, "item") == [KEY_ROWS["红"], KEY_ROWS["007"], KEY_ROWS["A1"]]
    assert column(encoded, "user") == [1 + KEY_ROWS["A1"], 0, 0]
    assert rejects(encoded) == [(3, "item is not in the item table", "7"), (4, "item id is missing", None)]
    assert column(
        encode_log({"item": [1], "user": [-1]}, IdIndex(np.array([key_hash("1")])), users, True, True), "user"
    ) == [0]


MOMENT = 1_709_296_245  # 2024-03-01T12:30:45Z


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2024-03-01T12:30:45Z", MOMENT),
        ("2024-03-01 12:30:45", MOMENT),
        ("2024-03-01T12:30:45.999999", MOMENT),
        ("2024-03-01T12:30:45,5Z", MOMENT),
        ("2024-03-01 12:30:45 UTC", MOMENT),
        ("2024-03-01T20:30:45+08:00", MOMENT),
        ("2024-03-01T20:30:45+0800", MOMENT),
        ("2024-03-01T20:30:45+08", MOMENT),
        ("2024-03-01T07:00:45-05:30", MOMENT),
        ("2024-03-01T12:30", MOMENT - 45),
        (" 2024-03-01 ", MOMENT - 45 - 30 * 60 - 12 * 3600),
        ("2024-02-29", 1_709_164_800),
        ("1970-01-01T00:00:01", 1),
        ("2106-02-07T06:28:15Z", 2**32 - 1),
        (str(MOMENT), MOMENT),
        (f"{MOMENT}.75", MOMENT),
        ("1.7e9", 1_700_000_000),
        *[
            (text, None)
            for text in (
                "",
                "NA",
                "soon",
                "0",
                "-5",
                "0.5",
                str(2**32),
                "1e300",
                "1969-12-31",
                "1970-01-01",
                "2106-02-07T06:28:16Z",
                "2023-02-29",
                "2024-13-01",
                "2024-00-01",
                "2024-01-00",
                "2024-01-32",
                "2024-01-01T24:00:00",
                "2024-01-01T10:60",
                "2024-01-01T10:00:60",
                "2024-01-01T10:00:00+24:00",
                "2024-01-01T10:00:00+08:60",
                "24-01-01",
                "2024-1-1",
                "01/02/2024",
                "2024-03-01T",
            )
        ],
    ],
)
def test_times_of_text(text, seconds):
    encoded = encode_log({"time": [str(MOMENT), text, "2024-03-01"]})
    if seconds is None:
        assert rejects(encoded) == [(1, "time is missing, unreadable, or outside 1970 to 2106", text)]
        assert len(encoded.rows) == 2
    else:
        assert column(encoded, "time") == [MOMENT, seconds, 1_709_251_200] and rejects(encoded) == []
    for other in ([text], [text, "x"]):
        assert column(encode_log({"time": other}), "time") == ([] if seconds is None else [seconds])


def test_times_of_other_types():
    naive = datetime.datetime(2024, 3, 1, 12, 30, 45)
    aware = naive.replace(tzinfo=UTC)
    arrays = [
        *[pa.array([naive, None], pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")],
        *[pa.array([aware, None], pa.timestamp(unit, "Asia/Shanghai")) for unit in ("s", "us")],
        *[pa.array([MOMENT, None], kind) for kind in (pa.int32(), pa.int64(), pa.uint32(), pa.uint64(), pa.float64())],
        pa.array([decimal.Decimal(MOMENT), None]),
        pa.array([naive, None]).dictionary_encode(),
    ]
    for array in arrays:
        encoded = encode_log({"time": array})
        assert column(encoded, "time") == [MOMENT], array.type
        assert rejects(encoded) == [(1, "time is missing, unreadable, or outside 1970 to 2106", None)]
    for kind in (pa.date32(), pa.date64()):
        assert column(encode_log({"time": pa.array([naive.date()], kind)}), "time") == [1_709_251_200]
    for array in (pa.array([np.nan, np.inf, -np.inf, 1e300]), pa.array([True]), pa.array([2**64 - 1], pa.uint64())):
        assert len(rejects(encode_log({"time": array}))) == len(array)
    far = pa.array([-(2**63), 2**63 - 1], pa.timestamp("s"))
    assert len(rejects(encode_log({"time": far}))) == 2, "no time that Python can show"


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 1_000), ("us", 1_000_000)])
def test_units_of_times(unit, factor):
    value = MOMENT * factor + factor - 1
    for array in ([value], [float(value)], [str(value)]):
        assert column(encode_log({"time": array}, time_unit=unit), "time") == [MOMENT]
    assert column(encode_log({"time": ["2024-03-01T12:30:45"]}, time_unit=unit), "time") == [MOMENT]


def test_types():
    values = ["click", " order ", "view", "buy", "impression", "skip", "cart", "share", "", None]
    types = {"view": "impression", "buy": "order", "cart": "click"}
    for array in (pa.array(values), pa.array(values).dictionary_encode()):
        encoded = encode_log({"type": array}, types=types)
        assert column(encoded, "type") == [CLICK, ORDER, IMPRESSION, ORDER, IMPRESSION, SKIP, CLICK]
        assert column(encoded, "role") == [1, 1, 0, 1, 0, 0, 1]
        assert rejects(encoded) == [
            (7, "type is not known", "share"),
            (8, "type is not known", ""),
            (9, "type is not known", None),
        ]
    encoded = encode_log(
        {"type": pa.array([0, 1, 2], pa.int8())}, types={"0": "skip", "1": "order"}, positive_types=("skip",)
    )
    assert column(encoded, "type") == [SKIP, ORDER] and column(encoded, "role") == [1, 0]
    assert rejects(encoded) == [(2, "type is not known", "2")]


def test_sessions():
    encoded = encode_log({"session": ["s1", "s2", " s1", "", None, "7"]})
    assert column(encoded, "session") == [key_hash("s1"), key_hash("s2"), key_hash("s1"), 0, 0, key_hash("7")]
    assert column(encode_log({"session": [7]}), "session") == [key_hash("7")]


def test_positions():
    encoded = encode_log({"position": ["1", "254", "255", "256", "1e9", "3.0", "", None, "0", "-1", "1.5", "top"]})
    assert column(encoded, "position") == [1, 254, 255, 255, 255, 3, 0, 0]
    reason = "position is not a whole number of 1 or more"
    assert rejects(encoded) == [(i, reason, v) for i, v in enumerate(["0", "-1", "1.5", "top"], 8)]
    encoded = encode_log({"position": [1.0, 300.0, np.nan, 2.5, np.inf]})
    assert column(encoded, "position") == [1, 255, 0] and len(rejects(encoded)) == 2


def test_weights():
    values = [0.0, 1.5, -0.5, None, np.nan, np.inf, 1e300]
    for array in (pa.array(values), pa.array([None if v is None else str(v) for v in values])):
        encoded = encode_log({"weight": array, "type": ["order"] * 7}, type_weights={"order": 3, "click": 9})
        assert column(encoded, "weight") == [0.0, 4.5]
        assert [row[:2] for row in rejects(encoded)] == [
            (i, "weight is not a number of 0 or more") for i in range(2, 7)
        ]
    assert column(encode_log({"type": ["order", "cart"]}, type_weights={"order": 0.5}), "weight") == [0.5, 1.0]
    assert column(encode_log({"weight": [2]}, type_weights={"click": 2}), "weight") == [4.0], (
        "without types all are clicks"
    )


def test_labels_decide_on_the_role():
    values = ["3", "2.33", "2.32999999", "1.67", "1.68", "inf", "good"]
    encoded = encode_log(
        {"label": values, "type": ["skip"] * 7}, positive_from=2.33, negative_to=1.67, positive_types=("click",)
    )
    assert column(encoded, "role") == [1, 1, 0, 2, 0]
    assert column(encoded, "label") == np.float32([3, 2.33, 2.33, 1.67, 1.68]).tolist()
    assert [row[:2] for row in rejects(encoded)] == [(i, "label is not a number") for i in (5, 6)]
    assert column(encode_log({"label": [0, 1, 2]}), "role") == [0, 1, 1], "no negatives without negative_to"


def test_rows_with_and_without_a_label_in_one_log():
    encoded = encode_log({"label": ["", None, "2", "0"], "type": ["click", "skip", "skip", "click"]}, negative_to=0)
    assert column(encoded, "role") == [1, 0, 1, 2], "a row without a label counts by its type"
    assert column(encoded, "labelled") == [False, False, True, True]
    assert column(encoded, "label") == [1, 1, 2, 0]


def test_a_label_needs_neither_time_nor_type():
    values = {"label": ["2", "0", ""], "time": ["", None, ""], "type": ["", "", "click"]}
    encoded = encode_log(values, negative_to=0)
    assert column(encoded, "time") == [0, 0] and column(encoded, "type") == [EVENT_TYPES.index("click")] * 2
    assert rejects(encoded) == [(2, "time is missing, unreadable, or outside 1970 to 2106", "")]
    encoded = encode_log({"label": ["2"], "time": ["soon"], "type": ["share"]})
    assert rejects(encoded) == [(0, "time is missing, unreadable, or outside 1970 to 2106", "soon")]


GOOD = {
    "query": b"red",
    "item": b"10",
    "user": b"5",
    "session": b"s",
    "time": b"2024-03-01",
    "type": b"order",
    "position": b"3",
    "weight": b"2",
    "label": b"1",
}
# In the order in which they count.
BAD = [
    ("query", b"\xff", "query is not UTF-8 text"),
    ("item", b"\xff", "item id is not UTF-8 text"),
    ("user", b"\xff", "user id is not UTF-8 text"),
    ("session", b"\xff", "session is not UTF-8 text"),
    ("query", " \u3000".encode(), "query is empty"),
    ("item", b" ", "item id is missing"),
    ("item", b"99", "item is not in the item table"),
    ("user", b"99", "user is not in the user table"),
    ("label", b"\xff", "label is not a number"),
    ("label", b"x", "label is not a number"),
    ("time", b"soon", "time is missing, unreadable, or outside 1970 to 2106"),
    ("time", b"\xff", "time is missing, unreadable, or outside 1970 to 2106"),
    ("type", b"share", "type is not known"),
    ("type", b"\xff", "type is not known"),
    ("position", b"0", "position is not a whole number of 1 or more"),
    ("position", b"\xff", "position is not a whole number of 1 or more"),
    ("weight", b"-1", "weight is not a number of 0 or more"),
]


def test_one_reason_a_row_in_a_fixed_order():
    rows = [GOOD]
    expected = []
    for i, (name, value, reason) in enumerate(BAD):
        rows += [GOOD | {name: value}, GOOD]
        expected.append((2 * i + 1, reason, value.decode(errors="replace")))
    encoded = encode_log({name: [row[name] for row in rows] for name in GOOD})
    assert rejects(encoded) == expected
    assert column(encoded, "item") == [0] * (len(BAD) + 1)
    for i, (name, value, _) in enumerate(BAD):
        for later_name, later_value, _ in BAD[i + 1 :]:
            if later_name != name:
                row = GOOD | {name: value, later_name: later_value}
                assert rejects(encode_log({key: [row[key]] for key in GOOD}))[0][1] == BAD[i][2]


def test_previews_are_short_text():
    for value, preview in [("红" * 500, "红" * 200), ("a\nb", "a\nb")]:
        assert rejects(encode_log({"item": [value]}))[0][2] == preview
    bad_list = pa.array([[b"\xff", b"\xff"]]).cast(pa.list_(pa.string()), safe=False)
    for array in (
        pa.array(["x"]).dictionary_encode(),
        pa.array(["x"], pa.string_view()),
        pa.array([b"x"], pa.binary(1)),
    ):
        assert rejects(encode_log({"item": array}))[0][2] == "x"
    assert rejects(encode_log({"item": [[1, 2]]}))[0][2] == "[1, 2]"
    assert rejects(encode_log({"item": bad_list}))[0][2].startswith("a value of type list")


# One row, one result: whatever rows and formats are around it.

VALUES = {
    "query": [b"red", " 红 \u3000".encode(), b"100", b"NA", b"null", b"1e5", b"two\nlines", b"", b"\xff"],
    "item": [b"10", b"20", b"30", b"007", b"-1", b"", b"10.0", b"99999999999999999999", b"\xff"],
    "user": [b"5", b"7", b"-1", b"", b"x", b"6"],
    "session": [b"s1", b"s2", b""],
    "time": [b"1709296245", b"1.7e9", b"2024-03-01T12:30:45+08:00", b"2024-03-01", b"soon", b"", b"-1"],
    "type": [b"click", b"order", b"view", b"share", b""],
    "position": [b"1", b"300", b"", b"0", b"NA", b"x"],
    "weight": [b"1", b"0.5", b"1e39", b"-1", b"", b"inf"],
    "label": [b"0", b"1", b"2.5", b"", b"x"],
}
ROWS = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in VALUES.items()})
SCHEMA = log_schema(**{name: name for name in VALUES}, types={"view": "impression"}, negative_to=0)


def encode_parts(batches, string_ids=False):
    """Rows and rejects of several batches as one."""
    rows, rejected, begin = [], [], 0
    items = KEY_ITEMS if string_ids else ITEMS
    for batch in batches:
        encoded = encode_interactions(batch, SCHEMA, items, USERS, string_ids, string_ids)
        rows += encoded.rows.to_pylist()
        rejected += [(begin + row, reason, value) for row, reason, value in rejects(encoded)]
        begin += len(batch)
    assert len(rows) + len(rejected) == begin
    return rows, rejected


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=30), st.lists(st.integers(0, 30), max_size=4), st.booleans())
def test_any_split_into_batches_gives_the_same(rows, cuts, string_ids):
    batch = pa.RecordBatch.from_pylist(rows)
    whole = encode_parts([batch], string_ids)
    bounds = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    assert encode_parts([batch.slice(a, b - a) for a, b in itertools.pairwise(bounds)], string_ids) == whole
    coded = pa.record_batch({name: batch[name].dictionary_encode() for name in VALUES})
    assert encode_parts([coded], string_ids) == whole
    large = pa.record_batch({name: batch[name].cast(pa.large_binary()) for name in VALUES})
    assert encode_parts([large], string_ids) == whole


TYPED = {
    "query": ["red", " 红 ", "100", "NA", "", '"', None],
    "item": [10, 20, 30, 99, None],
    "user": [5, 7, -1, 6, None],
    "session": ["s1", "007", None],
    "time": [MOMENT, MOMENT + 1, 0, None],
    "type": ["click", "order", "view", "share", None],
    "position": [1, 300, 0, None],
    "weight": [1.0, 0.5, -1.0, 1e39, None],
    "label": [0.0, 1.0, 2.5, None],
}


@pytest.mark.parametrize("batch_rows", [7, 65_536])
def test_every_format_gives_the_same(tmp_path, batch_rows):
    generator = random.Random(0)
    rows = [{name: generator.choice(values) for name, values in TYPED.items()} for _ in range(300)]
    table = pa.Table.from_pylist(rows)
    pyarrow.feather.write_feather(table, str(tmp_path / "t.arrow"))
    for suffix in (".parquet", ".csv", ".tsv", ".jsonl", ".csv.gz", ".jsonl.gz"):
        (tmp_path / f"t{suffix}").write_bytes(encode_table(rows, suffix))
    data = (tmp_path / "t.csv").read_bytes()
    (tmp_path / "t.csv.zst").write_bytes(pa.Codec("zstd").compress(data, asbytes=True))
    times = pa.array([row["time"] for row in rows]).cast(pa.timestamp("s"))
    moments = table.set_column(table.schema.get_field_index("time"), "time", times)
    pyarrow.parquet.write_table(moments, tmp_path / "moments.parquet")
    as_text = [{name: None if value is None else str(value) for name, value in row.items()} for row in rows]
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, as_text)).encode()))
    results = {}
    for file in sorted(tmp_path.iterdir()):
        batches = [
            s.batch
            for s in read_batches(
                [file],
                ["query", "item", "user", "type", "session"],
                ["time", "position", "weight", "label"],
                batch_rows,
            )
        ]
        rows_of_file, rejected = encode_parts(batches)
        results[file.name] = (rows_of_file, [(row, reason) for row, reason, _ in rejected])
    assert len(results) == 10
    first = results["t.parquet"]
    assert 5 < len(first[0]) < 200 and len({reason for _, reason in first[1]}) == 8
    for name, result in results.items():
        assert result == first, name
