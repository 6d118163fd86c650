from __future__ import annotations

import collections
import gzip
import itertools
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import encode_table

from dpsr_tf.data.schema import adapter_path, load_schema
from dpsr_tf.data.store import Store, unpack_strings
from dpsr_tf.errors import UsageError
from dpsr_tokenizer import PackedFile, Tokenizer

FORMATS = [".tsv", ".csv", ".jsonl", ".parquet", ".tsv.gz", ".csv.gz", ".jsonl.gz"]


def ragged(file, splits, values):
    """A ragged column as a list of lists."""
    bounds, flat = file[splits].tolist(), file[values].tolist()
    assert bounds[0] == 0 and bounds[-1] == len(flat)
    return [flat[begin:end] for begin, end in itertools.pairwise(bounds)]


# What a store holds, against plain Python.


def test_items(shop, store):
    file = store.items()
    assert file["id"].tolist() == [row["item_id"] for row in shop.items], "in the order of the table"
    texts = [f"{row['title'] or ''} {row['brand'] or ''}" for row in shop.items]
    expected = [store.vocabulary.encode(text).tolist() for text in texts]
    assert ragged(file, "tokens.splits", "tokens.values") == expected
    assert expected[5] == [], "an item without text stays, without tokens"
    assert store.titles() == [row["title"] for row in shop.items]
    assert (file["id"].dtype, file["tokens.splits"].dtype, file["tokens.values"].dtype) == ("int64", "int64", "int32")


def test_title_column(shop, tmp_path, dpsr):
    shop.schema["items"]["title"] = "brand"
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    assert Store(tmp_path / "store").titles() == [row["brand"] or "" for row in shop.items]


def test_interactions(shop, store):
    item_row = {row["item_id"]: i for i, row in enumerate(shop.items)}
    user_row = {-1: 0} | {row["user_id"]: i for i, row in enumerate(shop.users, start=1)}
    queries = sorted({row["query"].strip() for row in shop.log if row["label"] in (0, 2)})
    assert queries == ["100", 'bolt 3/4"', "never liked", "red shoes", "红鞋"], "grade 1 is neither; spaces are trimmed"

    def pairs(label):
        rows = [
            (queries.index(r["query"].strip()), item_row[r["item_id"]], user_row[r["user_id"]], r["weight"])
            for r in shop.log
            if r["label"] == label
        ]
        return sorted(rows)

    file = store.interactions()
    assert unpack_strings(file, "query_text") == queries
    assert ragged(file, "query.splits", "query.tokens") == [store.vocabulary.encode(q).tolist() for q in queries]
    positives = pairs(2)
    columns = [file[f"positive.{name}"].tolist() for name in ("query", "item", "user", "weight")]
    assert list(zip(*columns, strict=True)) == positives, "sorted by query and item, a repeated row twice"
    assert len(positives) == 6
    by_query = [[item for q, item, _, _ in positives if q == i] for i in range(len(queries))]
    assert ragged(file, "positive.splits", "positive.item") == by_query
    negatives = [[item for q, item, _, _ in pairs(0) if q == i] for i in range(len(queries))]
    assert ragged(file, "negative.splits", "negative.item") == negatives
    assert negatives[queries.index("never liked")] == [5], "a query with negatives only keeps its row"
    types = {name: str(values.dtype) for name, values in file.items()}
    assert types == {
        "query_text.splits": "int64",
        "query_text.bytes": "uint8",
        "query.splits": "int64",
        "query.tokens": "int32",
        "positive.splits": "int64",
        "positive.query": "int32",
        "positive.user": "int32",
        "positive.item": "int32",
        "positive.weight": "float32",
        "negative.splits": "int64",
        "negative.item": "int32",
    }


def test_users(shop, store):
    file = PackedFile(store.users_path, "users")
    assert file["id"].tolist() == [-1, 5, 3, 8], "row 0 is the anonymous user"
    assert file["feature.gender"].tolist() == [0, 1, 2, 0], "0 is unknown, then f, m"
    assert file["feature.age"].tolist() == [0, 1, 1, 2], "values in the order of their text: 30, 7"
    assert file["feature.age"].dtype == "int32"


def test_without_users_weights_and_labels(shop, tmp_path, dpsr):
    del shop.schema["users"]
    shop.schema["interactions"] = {"files": "log.*", "query": "query", "item": "item_id"}
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    store = Store(tmp_path / "store")
    file = store.interactions()
    assert len(file["positive.item"]) == len(shop.log), "every row is positive"
    assert set(file["positive.user"].tolist()) == {0} and set(file["positive.weight"].tolist()) == {1.0}
    assert len(file["negative.item"]) == 0
    users = PackedFile(store.users_path, "users")
    assert list(users) == ["id"] and users["id"].tolist() == [-1]


def test_vocabulary(shop, store):
    config = store.vocabulary.config
    tokenizer = Tokenizer(config)
    texts = [f"{row['title'] or ''} {row['brand'] or ''}" for row in shop.items]
    texts += unpack_strings(store.interactions(), "query_text")
    expected = collections.Counter(token for text in texts for token in tokenizer.tokenize(text))
    assert len(store.vocabulary) == len(expected)
    assert {store.vocabulary.token(i): store.vocabulary.count(i) for i in range(len(expected))} == expected
    assert store.vocabulary.num_ids == len(expected) + 16


def test_vocabulary_limits_and_tokenizer_of_the_schema(shop, tmp_path, dpsr):
    shop.schema["tokenizer"] = {"letter_trigrams": False, "char_bigrams": False}
    shop.schema["vocabulary"] = {"min_count": 2, "max_size": 3, "num_oov_buckets": 0}
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    vocabulary = Store(tmp_path / "store").vocabulary
    tokens = {vocabulary.token(i): vocabulary.count(i) for i in range(len(vocabulary))}
    assert vocabulary.num_ids == 3 and min(tokens.values()) >= 2 and tokens["shoes"] == 3
    assert (
        not vocabulary.config.letter_trigrams and not vocabulary.config.char_bigrams and vocabulary.config.char_unigrams
    )


def test_manifest_and_summary(shop, tmp_path, dpsr):
    outcome = dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    store = Store(tmp_path / "store")
    assert vars(store.counts) == {"users": 4, "items": 7, "queries": 5, "positives": 6, "negatives": 3}
    assert "7 items, 4 users, 5 queries, 6 positive pairs, 3 supervised negatives" in outcome.out
    assert store.manifest["fingerprints"]["vocabulary.dpsr"] == f"{store.vocabulary.fingerprint:016x}"
    assert store.manifest["schema"]["items"]["text"] == ["title", "brand"]
    assert oct((tmp_path / "store").stat().st_mode)[-3:] == "755"


# One log, one store.


@pytest.fixture
def as_tsv(shop, store, tree):
    """The store of the tiny shop from TSV tables, as bytes."""
    return tree(store.path)


@pytest.mark.parametrize("suffix", FORMATS[1:])
def test_every_format_gives_the_same_store(shop, as_tsv, suffix, tmp_path, dpsr, tree):
    shop.path = tmp_path / "other"
    dpsr(*shop.write(suffix).flags(tmp_path / "again")).succeeds()
    assert tree(tmp_path / "again") == as_tsv


def test_the_order_of_the_log_does_not_matter(shop, as_tsv, tmp_path, dpsr, tree):
    for seed in range(3):
        random.Random(seed).shuffle(shop.log)
        dpsr(*shop.write().flags(tmp_path / f"again{seed}")).succeeds()
        assert tree(tmp_path / f"again{seed}") == as_tsv


def test_several_files_directories_and_globs(shop, as_tsv, tmp_path, dpsr, tree):
    shop.write()
    for name in ("items", "users", "log"):
        (shop.path / f"{name}.tsv").unlink()
    folder = shop.path / "log"
    folder.mkdir()
    (folder / "part-2.tsv").write_bytes(encode_table(shop.log[:4], ".tsv"))
    (folder / "part-10.jsonl.gz").write_bytes(encode_table(shop.log[4:], ".jsonl.gz"))
    (folder / "_SUCCESS").touch()
    (shop.path / "items-1.csv").write_bytes(encode_table(shop.items[:2], ".csv"))
    (shop.path / "items-2.parquet").write_bytes(encode_table(shop.items[2:], ".parquet"))
    (shop.path / "a.tsv").write_bytes(encode_table(shop.users[:1], ".tsv"))
    (shop.path / "b.tsv").write_bytes(encode_table(shop.users[1:], ".tsv"))
    shop.schema["items"]["files"] = "items-?.*"
    shop.schema["users"]["files"] = ["a.tsv", "b.tsv"]
    shop.schema["interactions"]["files"] = "log"
    (shop.path / "schema.yaml").write_text(repr(shop.schema))
    dpsr(*shop.flags(tmp_path / "again")).succeeds()
    got = tree(tmp_path / "again")
    assert {name: data for name, data in got.items() if name != "manifest.json"} == {
        name: data for name, data in as_tsv.items() if name != "manifest.json"
    }


def test_input_gives_the_directory_of_the_files(shop, as_tsv, tmp_path, dpsr, tree):
    schema = shop.write().path / "schema.yaml"
    moved = schema.rename(tmp_path / "moved.yaml")
    dpsr("ingest", f"--schema={moved}", f"--input={shop.path}", f"--out={tmp_path / 'again'}").succeeds()
    assert tree(tmp_path / "again") == as_tsv


def test_features_may_have_other_types_in_other_files(shop, tmp_path, dpsr):
    shop.write()
    (shop.path / "users.tsv").unlink()
    (shop.path / "users.1.parquet").write_bytes(encode_table([{"user_id": 5, "gender": "f", "age": 30}], ".parquet"))
    (shop.path / "users.2.parquet").write_bytes(encode_table([{"user_id": 3, "gender": None, "age": "30"}], ".parquet"))
    shop.log = []
    (shop.path / "log.tsv").write_text("query\titem_id\tuser_id\tweight\tlabel\nred\t30\t3\t1\t2\n")
    dpsr(*shop.flags(tmp_path / "store")).succeeds()
    users = PackedFile(tmp_path / "store" / "users.dpsr", "users")
    assert users["feature.age"].tolist() == [0, 1, 1] and users["feature.gender"].tolist() == [0, 1, 0]


# What the command refuses. Each of these changes one thing in the tiny shop.


def refused(dpsr, tree, shop, root, status, *fragments, flags=()):
    """Asserts that ingest fails with this status and message, and leaves nothing behind, hidden or not."""
    before = tree(root)
    outcome = dpsr(*shop.flags(root / "store"), *flags)
    outcome.fails(status, "dpsr ingest: error: ", *fragments)
    assert tree(root) == before


@pytest.fixture
def refuses(dpsr, tree, shop, tmp_path):
    return lambda status, *fragments, flags=(): refused(dpsr, tree, shop, tmp_path, status, *fragments, flags=flags)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda s: s.pop("items"), ["key 'items' is missing"]),
        (lambda s: s.pop("interactions"), ["key 'interactions' is missing"]),
        (lambda s: s["items"].pop("files"), ["items: key 'files' is missing", "directories or globs"]),
        (lambda s: s["items"].pop("id"), ["items: key 'id' is missing", "column of the item id"]),
        (lambda s: s["items"].pop("text"), ["items: key 'text' is missing"]),
        (lambda s: s["items"].update(text=[]), ["items: text is []"]),
        (lambda s: s["items"].update(files=[]), ["items: files is []"]),
        (lambda s: s["interactions"].update(files=[]), ["interactions: files is []"]),
        (lambda s: s["users"].pop("id"), ["users: key 'id' is missing"]),
        (lambda s: s["interactions"].pop("query"), ["interactions: key 'query' is missing"]),
        (lambda s: s["items"].update(texts="x"), ["items: unknown key 'texts'", "did you mean 'text'?"]),
        (lambda s: s["items"].update(id=3), ["items: id is 3, expected a text"]),
        (lambda s: s["items"].update(text=["title", 3]), ["items: text is 3, expected a text"]),
        (lambda s: s.update(items="items.tsv"), ["items: is 'items.tsv', expected a section"]),
        (lambda s: s["interactions"].update(positive_from="good"), ["positive_from is 'good', expected a number"]),
        (
            lambda s: s["interactions"].update(negative_to=2),
            ["negative_to is 2 and positive_from 2, expected negative_to below positive_from"],
        ),
        (lambda s: s.pop("users"), ["user is 'user_id', but there is no section users"]),
        (lambda s: s["vocabulary"].update(min_count=0), ["vocabulary: min_count is 0, expected 1 or more"]),
        (lambda s: s["vocabulary"].update(num_oov_buckets=2**24 + 1), ["num_oov_buckets is 16777217", "16777216"]),
        (lambda s: s.update(tokenizer={"letter_trigrams": 1}), ["letter_trigrams is 1, expected true or false"]),
        (lambda s: s["interactions"].update(negative_to=1.0, label=None), ["negative_to", "label"]),
    ],
)
def test_schema_errors(shop, refuses, change, fragments):
    change(shop.schema)
    shop.write()
    refuses(2, f"{shop.path / 'schema.yaml'}: ", *fragments)


def test_no_schema_file(shop, refuses):
    refuses(2, "schema.yaml: no such file, expected a YAML file")


def test_missing_file(shop, refuses):
    shop.write()
    (shop.path / "items.tsv").unlink()
    refuses(2, f"{shop.path}/items.*: no such file", "--input", "`files`")


def test_unknown_kind_of_file(shop, refuses):
    shop.write()
    (shop.path / "items.tsv").rename(shop.path / "items.xlsx")
    refuses(2, "items.xlsx: unknown kind of file, expected .parquet, .csv, .tsv, .jsonl")


@pytest.mark.parametrize("name", ["items", "users", "log"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_empty_file(shop, refuses, name, suffix):
    shop.write(suffix)
    (shop.path / f"{name}{suffix}").write_bytes(b"")
    refuses(1, f"{name}{suffix}: is empty, expected a table with columns ")


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_file(shop, refuses, suffix):
    shop.write(suffix)
    path = shop.path / f"items{suffix}"
    data = path.read_bytes()
    if suffix in (".tsv", ".csv"):
        path.write_bytes(data + (b"1" if suffix == ".tsv" else b"1,2,3,4,5\n"))
    else:
        path.write_bytes(data[: len(data) // 2])
    refuses(1, f"items{suffix}: cannot be read as ")


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".parquet"])
def test_items_without_a_row(shop, refuses, suffix):
    shop.write(suffix)
    path = shop.path / f"items{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(shop.items).slice(0, 0), path)
    else:
        path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    refuses(1, f"items{suffix}: has no row, expected at least one item")


@pytest.mark.parametrize("suffix", [".tsv", ".parquet"])
def test_log_without_a_row(shop, refuses, suffix):
    shop.write(suffix)
    path = shop.path / f"log{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(shop.log).slice(0, 0), path)
    else:
        path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    refuses(1, f"log{suffix}: no positive pair among 0 interactions")


@pytest.mark.parametrize("suffix", [".tsv", ".parquet"])
def test_users_without_a_row(shop, tmp_path, dpsr, suffix):
    shop.log = [row | {"user_id": -1} for row in shop.log]
    shop.write(suffix)
    path = shop.path / f"users{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(shop.users).slice(0, 0), path)
    else:
        path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    dpsr(*shop.flags(tmp_path / "store")).succeeds()
    users = PackedFile(tmp_path / "store" / "users.dpsr", "users")
    assert {name: values.tolist() for name, values in users.items()} == {
        "id": [-1],
        "feature.gender": [0],
        "feature.age": [0],
    }


@pytest.mark.parametrize("suffix", FORMATS)
def test_missing_column_lists_the_columns_there(shop, refuses, suffix):
    shop.schema["interactions"]["query"] = "search_term"
    shop.write(suffix)
    refuses(1, f"log{suffix}: has no column search_term; its columns are query, item_id, user_id, weight, label")


def test_all_missing_columns_are_named(shop, refuses):
    shop.schema["items"].update(id="sku", text=["name", "brand"])
    shop.write()
    refuses(1, "items.tsv: has no column name, sku; its columns are item_id, title, brand, color")


def test_a_column_that_stands_twice(shop, refuses):
    shop.write()
    path = shop.path / "items.tsv"
    path.write_bytes(path.read_bytes().replace(b"color", b"title", 1))
    refuses(1, "items.tsv: ", "column title", "more than once")


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".tsv.gz"])
@pytest.mark.parametrize(("name", "column", "text"), [("items", "title", "Blue suède shoes"), ("log", "query", "红鞋")])
def test_bad_utf8(shop, refuses, suffix, name, column, text):
    shop.write(suffix)
    path = shop.path / f"{name}{suffix}"
    data = encode_table(getattr(shop, name), suffix.removesuffix(".gz"))
    data = data.replace(text.encode(), b"\xe8\xff", 1)
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    refuses(1, f"{name}{suffix}: column {column} is not UTF-8 text", "convert the file to UTF-8")


def test_bad_utf8_in_json(shop, refuses):
    shop.write(".jsonl")
    path = shop.path / "items.jsonl"
    path.write_bytes(path.read_bytes().replace("suède".encode(), b"su\xe8de"))
    refuses(1, "items.jsonl: ", "UTF-8")


def test_bad_utf8_in_a_parquet_file(shop, refuses):
    shop.write(".parquet")
    table = pa.Table.from_pylist(shop.items)
    titles = pa.array([b"\xff"] * len(table), pa.binary()).cast(pa.string(), safe=False)
    table = table.set_column(1, "title", titles)
    pyarrow.parquet.write_table(table, shop.path / "items.parquet")
    refuses(1, "items.parquet: column title is not UTF-8 text")


def test_bad_utf8_in_the_header(shop, refuses):
    shop.write()
    path = shop.path / "items.tsv"
    path.write_bytes(path.read_bytes().replace(b"color", b"couleur d\xe9fraichie", 1))
    refuses(1, "items.tsv: ", "UTF-8")


def test_bad_utf8_in_an_id(shop, refuses):
    shop.write()
    path = shop.path / "items.tsv"
    path.write_bytes(path.read_bytes().replace(b"30\t", b"\xff\t", 1))
    refuses(1, "items.tsv: column item_id is no whole number", "int64")


def test_bad_utf8_in_a_user_feature(shop, refuses):
    shop.write()
    path = shop.path / "users.tsv"
    path.write_bytes(path.read_bytes().replace(b"\tf\t", b"\t\xff\t", 1))
    refuses(1, "users.tsv: column gender", "UTF-8")


def test_bad_utf8_in_a_column_that_is_not_used(shop, tmp_path, dpsr):
    shop.write()
    path = shop.path / "items.tsv"
    path.write_bytes(path.read_bytes().replace(b"\tred\n", b"\t\xff\n"))
    dpsr(*shop.flags(tmp_path / "store")).succeeds()


@pytest.mark.parametrize(
    ("name", "column", "value", "fragments"),
    [
        ("items", "item_id", "A-1", ["items.jsonl: column item_id is no whole number", "A-1", "int64"]),
        ("items", "item_id", 1.5, ["items.jsonl: column item_id is no whole number", "1.5"]),
        ("items", "item_id", None, ["items.jsonl: column item_id has 1 rows without an id"]),
        ("items", "item_id", 2**63, ["items.jsonl: column item_id is no whole number"]),
        ("items", "item_id", {"a": 1}, ["items.jsonl: column item_id is no whole number"]),
        ("items", "item_id", -1, ["items.jsonl: column item_id", "-1"]),  # which pads the answers of a search
        ("items", "title", ["a", "b"], ["items.jsonl: column title", "text"]),
        ("users", "user_id", "x", ["users.jsonl: column user_id is no whole number"]),
        ("log", "item_id", "x", ["log.jsonl: column item_id is no whole number"]),
        ("log", "user_id", None, ["log.jsonl: column user_id has 1 rows without an id"]),
        ("log", "label", "good", ["log.jsonl: column label is no number", "good"]),
        ("log", "label", None, ["log.jsonl: column label has rows without a finite number"]),
        ("log", "label", {"a": 1}, ["log.jsonl: column label is no number"]),
        ("log", "weight", "heavy", ["log.jsonl: column weight is no number", "heavy"]),
        ("log", "weight", None, ["log.jsonl: column weight has rows without a finite number"]),
        ("log", "weight", -1.0, ["log.jsonl: column weight", "-1"]),
        ("log", "weight", 1e300, ["log.jsonl: column weight"]),  # finite, but not as a float32
    ],
)
def test_values_of_the_wrong_kind(shop, refuses, name, column, value, fragments):
    rows = getattr(shop, name)
    rows[0][column] = value
    if isinstance(value, (str, list, dict)):  # JSON lines want one type a column
        for row in rows:
            row[column] = value if not isinstance(value, str) else str(row[column])
        rows[0][column] = value
    shop.write(".jsonl")
    refuses(1, *fragments)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("column", ["weight", "label"])
def test_numbers_that_are_not_finite(shop, refuses, column, text):
    shop.log[0][column] = text
    shop.write()
    refuses(1, f"log.tsv: column {column} has rows without a finite number")


def test_duplicate_item_ids(shop, refuses):
    shop.items += [dict(shop.items[0]), dict(shop.items[1])]
    shop.write()
    refuses(1, "items.tsv: column item_id: 2 ids stand more than once, first 10", "one row an item")


def test_duplicate_user_ids(shop, refuses):
    shop.users.append(dict(shop.users[0]))
    shop.write()
    refuses(1, "users.tsv: ", "column user_id", "more than once", "5")


def test_the_anonymous_user_is_ours(shop, refuses):
    shop.users.append({"user_id": -1, "gender": "f", "age": 1})
    shop.write()
    refuses(1, "column user_id", "-1")


def test_no_positive_pair(shop, refuses):
    shop.schema["interactions"]["positive_from"] = 3
    shop.write()
    refuses(1, "log.tsv: no positive pair among 11 interactions: no label in column label is 3 or more")


def test_a_long_feature_name(shop, refuses):
    name = "age_of_the_user_in_whole_years"
    shop.users = [{"user_id": 1, name: 5}, {"user_id": 5, name: 5}, {"user_id": 3, name: 1}, {"user_id": 8, name: 2}]
    shop.schema["users"]["features"] = [name]
    shop.write()
    refuses(2, f"users: features is '{name}'", "23")


# Rows that refer to nothing.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"item_id": 99}, "item is not in the item table"),
        ({"user_id": 99}, "user is not in the user table"),
        ({"query": "  "}, "query is empty"),
        ({"query": "　"}, "query is empty"),
    ],
)
def test_unusable_rows(shop, refuses, store, change, reason, tmp_path, dpsr, tree):
    expected = tree(store.path)
    shop.log.insert(3, shop.log[0] | change)  # 1 of 12
    shop.write()
    outcome = dpsr(*shop.flags(tmp_path / "refused"))
    outcome.fails(1, f"log.tsv: 1 of 12 interactions cannot be used (1 rows: {reason})", "--max_reject_fraction=0.01")
    assert not (tmp_path / "refused").exists()
    dpsr(*shop.flags(tmp_path / "refused"), "--max_reject_fraction=0.08").fails(1, "--max_reject_fraction=0.08")
    accepted = dpsr(*shop.flags(tmp_path / "accepted"), "--max_reject_fraction=0.084").succeeds()
    assert tree(tmp_path / "accepted") == expected, "as if the row had not been there"
    assert f"1 rows: {reason}" in accepted.out, "what was left out is told"


def test_all_reasons_are_counted(shop, refuses):
    shop.log += [shop.log[0] | {"item_id": 99}] * 2 + [shop.log[0] | {"query": ""}]
    shop.write()
    refuses(1, "3 of 14 interactions cannot be used (2 rows: item is not in the item table; 1 rows: query is empty)")


def test_nothing_but_unusable_rows(shop, refuses):
    shop.log = [row | {"item_id": 99} for row in shop.log]
    shop.write()
    refuses(1, "no positive pair among 11 interactions", flags=["--max_reject_fraction=1"])


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan"])
def test_max_reject_fraction_is_a_share(shop, refuses, value):
    shop.write()
    refuses(2, f"--max_reject_fraction={value}", "0 to 1", flags=[f"--max_reject_fraction={value}"])


# Where the store goes.


def test_a_store_that_is_there_stays_untouched(shop, store, tmp_path, dpsr, tree):
    before = tree(store.path)
    shop.items[0]["title"] = "another title"
    shop.write()
    dpsr(*shop.flags(store.path)).fails(1, f"{store.path}: exists already", "--overwrite")
    assert tree(store.path) == before
    dpsr(*shop.flags(store.path), "--overwrite").succeeds()
    assert Store(store.path).titles()[0] == "another title"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shop", "store"]


def test_a_failing_overwrite_keeps_the_old_store(shop, store, dpsr, tree, tmp_path):
    shop.schema["interactions"]["query"] = "search_term"
    before = tree(store.path)
    shop.write()
    dpsr(*shop.flags(store.path), "--overwrite").fails(1, "has no column search_term")
    assert tree(store.path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shop", "store"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_overwrite_replaces_nothing_but_a_store(shop, dpsr, tree, tmp_path, kind):
    shop.write()
    if kind == "file":
        (tmp_path / "thesis").write_text("years of work")
    else:
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    before = tree(tmp_path)
    dpsr(*shop.flags(tmp_path / "thesis"), "--overwrite").fails(1, f"{tmp_path / 'thesis'}: ", "store")
    assert tree(tmp_path) == before


def test_parents_are_made_only_if_all_is_well(shop, dpsr, tree, tmp_path):
    shop.write()
    dpsr(*shop.flags(tmp_path / "a" / "b" / "store")).succeeds()
    assert Store(tmp_path / "a" / "b" / "store").counts.items == 7
    shop.schema["interactions"]["query"] = "search_term"
    shop.write()
    before = tree(tmp_path)
    dpsr(*shop.flags(tmp_path / "c" / "d" / "store")).fails(1, "has no column")
    assert tree(tmp_path) == before


def test_out_that_cannot_be_made(shop, dpsr, tmp_path):
    shop.write()
    (tmp_path / "file").touch()
    dpsr(*shop.flags(tmp_path / "file" / "store")).fails(1, f"{tmp_path / 'file' / 'store'}: cannot be made")


def test_out_is_the_current_directory(shop, dpsr, tmp_path, monkeypatch):
    shop.write()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    dpsr("ingest", f"--schema={shop.path / 'schema.yaml'}", "--out=.", "--overwrite").fails(1, "--out")


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--out=x"], "give either --schema=FILE or --adapter=NAME"),
        (["--out=x", "--schema=a", "--adapter=homedepot"], "give either --schema=FILE or --adapter=NAME"),
        (["--schema=a"], "--out is missing"),
        (["--adapter=homedepot", "--out=x"], "--adapter=homedepot needs --input"),
        (["--adapter=nope", "--input=.", "--out=x"], "no adapter 'nope', expected one of: homedepot"),
        (["--schema=a", "--out=x", "extra"], "unexpected argument 'extra'"),
        (["--schema=a", "--out=x", "--max_reject_fraction=some"], "--max_reject_fraction=some"),
    ],
)
def test_usage_errors(dpsr, tmp_path, monkeypatch, flags, fragment):
    monkeypatch.chdir(tmp_path)
    dpsr("ingest", *flags).fails(2, fragment)
    assert list(tmp_path.iterdir()) == []


# The Home Depot adapter.


def homedepot_files(path, train):
    """Files of that layout: unquoted TSV, titles with inch signs and quotes."""
    path.mkdir()
    (path / "products.tsv").write_text(
        "product_uid\tproduct_title\n"
        '100001\t1/2 in. x 3" Galvanized "Hurricane" Tie\n'
        '100002\t"Unclosed quote\n'
        "100003\tIt's 5' x 7' Rug, Beige\n"
        '100004\t""\n'
    )
    (path / "judgments.train.tsv").write_text("search_term\tproduct_uid\trelevance\n" + train)
    return path


def test_homedepot_adapter(dpsr, tmp_path):
    train = '3" tie\t100001\t3\n3" tie\t100002\t1.67\n3" tie\t100003\t2\nrug 5\'\t100003\t2.33\nrug 5\'\t100001\t1\n'
    source = homedepot_files(tmp_path / "homedepot", train)
    dpsr("ingest", "--adapter=homedepot", f"--input={source}", f"--out={tmp_path / 'store'}").succeeds()
    store = Store(tmp_path / "store")
    assert store.titles() == [
        '1/2 in. x 3" Galvanized "Hurricane" Tie',
        '"Unclosed quote',
        "It's 5' x 7' Rug, Beige",
        '""',
    ]
    log = store.interactions()
    assert unpack_strings(log, "query_text") == ['3" tie', "rug 5'"]
    assert ragged(log, "positive.splits", "positive.item") == [[0], [2]], "2.33 is relevant, 2 is neither"
    assert ragged(log, "negative.splits", "negative.item") == [[1], [0]], "1.67 and below are supervised negatives"


def test_homedepot_adapter_names_what_is_missing(dpsr, tmp_path):
    source = homedepot_files(tmp_path / "homedepot", "a\t100001\t3\n")
    (source / "judgments.train.tsv").unlink()
    outcome = dpsr("ingest", "--adapter=homedepot", f"--input={source}", f"--out={tmp_path / 'store'}")
    outcome.fails(2, f"{source / 'judgments.train.tsv'}: no such file")


def test_adapters_are_valid_schemas():
    assert load_schema(adapter_path("homedepot")).interactions.positive_from == 2.33
    with pytest.raises(UsageError, match="no adapter 'shop'"):
        adapter_path("shop")


def test_homedepot_files(dpsr, tmp_path, homedepot):
    outcome = dpsr("ingest", "--adapter=homedepot", f"--input={homedepot}", f"--out={tmp_path / 'store'}").succeeds()
    assert re.search(r"54,667 items, 1 users, 7,614 queries, 33,503 positive pairs, 7,690 supervised", outcome.out)
    store = Store(tmp_path / "store")
    lines = (homedepot / "products.tsv").read_text(encoding="utf-8").split("\n")[1:54_668]
    assert store.titles() == [line.split("\t")[1].rstrip("\r") for line in lines]
    np.testing.assert_array_equal(store.items()["id"], [int(line.split("\t")[0]) for line in lines])
