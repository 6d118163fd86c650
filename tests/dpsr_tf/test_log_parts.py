"""`dpsr ingest --keep_log` and `--append`: a log that grows by a day, and codes that stay (`--like`)."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.parquet
import pytest

from dpsr_tf.data.store import Store

DAY = 86_400


def click(day, query, item, user=5, event="click"):
    return {"query": query, "item_id": item, "user_id": user, "time": day * DAY + 60 * len(query), "type": event}


DAYS = {
    1: [click(1, "red shoes", 30), click(1, "red shoes", 20, event="impression"), click(1, "bolt", 10, user=3)],
    2: [click(2, "red shoes", 20), click(2, "blue", 20, user=8), click(2, "blue", 30, user=8, event="impression")],
    3: [click(3, "red shoes", 30, user=-1), click(3, "running", 30)],
}


@pytest.fixture
def timed(shop):
    """The tiny shop with times and types in its log."""
    names = {name: shop.schema["interactions"][name] for name in ("files", "query", "item", "user")}
    shop.schema["interactions"] = names | {"time": "time", "type": "type", "files": "day*.jsonl"}
    shop.log = DAYS[1]
    shop.write(".jsonl")
    (shop.path / "log.jsonl").unlink()
    return shop


def write_days(shop, *days):
    for old in shop.path.glob("day*"):
        old.unlink()
    for day in days:
        shop.log = DAYS[day]
        shop.write(".jsonl")
        (shop.path / "log.jsonl").rename(shop.path / f"day{day}.jsonl")


def same_files(a, b):
    """Asserts that two stores hold the same bytes, apart from their manifests and kept logs."""
    names = [name for name in Store(a).manifest["files"]]
    assert names == list(Store(b).manifest["files"])
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_days_one_after_another_give_the_store_of_all_days(timed, tmp_path, dpsr):
    write_days(timed, 1)
    dpsr(*timed.flags(tmp_path / "one"), "--keep_log").succeeds()
    for day, before, out in ((2, "one", "two"), (3, "two", "three")):
        write_days(timed, day)
        dpsr(*timed.flags(tmp_path / out), f"--append={tmp_path / before}").succeeds()
    write_days(timed, 1, 2, 3)
    dpsr(*timed.flags(tmp_path / "whole")).succeeds()
    same_files(tmp_path / "three", tmp_path / "whole")
    parts = Store(tmp_path / "three").manifest["log"]
    assert [part["file"] for part in parts] == [f"log/part-{number:05}.parquet" for number in (1, 2, 3)]
    assert [part["rows"] for part in parts] == [3, 3, 2]
    # The old days are the same files, not copies, and the next store does not need the earlier one.
    assert (tmp_path / "one" / parts[0]["file"]).stat().st_ino == (tmp_path / "three" / parts[0]["file"]).stat().st_ino
    shutil.rmtree(tmp_path / "one")
    shutil.rmtree(tmp_path / "two")
    dpsr(*timed.flags(tmp_path / "again"), f"--append={tmp_path / 'three'}").succeeds()
    assert Store(tmp_path / "again").counts.positives == 12, "days 1 to 3 twice"


def test_old_days_expire(timed, tmp_path, dpsr):
    write_days(timed, 1)
    dpsr(*timed.flags(tmp_path / "one"), "--keep_log").succeeds()
    write_days(timed, 2, 3)
    dpsr(*timed.flags(tmp_path / "two"), f"--append={tmp_path / 'one'}", "--keep_days=2").succeeds()
    write_days(timed, 2, 3)
    dpsr(*timed.flags(tmp_path / "whole")).succeeds()
    same_files(tmp_path / "two", tmp_path / "whole")
    assert [part["file"] for part in Store(tmp_path / "two").manifest["log"]] == ["log/part-00002.parquet"]


def test_labels_without_a_time_do_not_expire(timed, tmp_path, dpsr):
    """A part of labels alone stays, and so do the labels of a part whose clicks are too old."""
    timed.schema["interactions"]["label"] = "grade"
    label = {"query": "bolt", "item_id": 10, "user_id": -1, "time": None, "type": None, "grade": 2}
    old, new = ({**click(day, "red shoes", 30), "grade": None} for day in (1, 9))
    for out, rows, append in (
        ("one", [label], ["--keep_log"]),
        ("two", [old, {**label, "query": "hex bolt"}], [f"--append={tmp_path / 'one'}", "--keep_days=2"]),
        ("three", [new], [f"--append={tmp_path / 'two'}", "--keep_days=2"]),
    ):
        for path in timed.path.glob("day*"):
            path.unlink()
        timed.log = rows
        timed.write(".jsonl")
        (timed.path / "log.jsonl").rename(timed.path / "day.jsonl")
        dpsr(*timed.flags(tmp_path / out), *append).succeeds()
    store = Store(tmp_path / "three")
    assert store.counts.positives == 3, "two labels and the new click"
    assert list(store.queries()) == ["bolt", "hex bolt", "red shoes"]
    assert [part["rows"] for part in store.manifest["log"]] == [1, 2, 1]


def test_items_and_users_that_are_gone(timed, tmp_path, dpsr):
    write_days(timed, 1, 2)
    dpsr(*timed.flags(tmp_path / "two"), "--keep_log").succeeds()
    timed.items = [item for item in timed.items if item["item_id"] != 20]
    timed.users = [user for user in timed.users if user["user_id"] != 3]
    write_days(timed, 3)
    printed = dpsr(*timed.flags(tmp_path / "three"), f"--append={tmp_path / 'two'}").succeeds().out
    assert "log: dropped 4 earlier rows" in printed
    store = Store(tmp_path / "three")
    assert store.counts.positives == 3 and 20 not in store.items()["id"] and 3 not in store.users()["id"]
    # Their rows are in the log still: they count again if the item comes back.
    assert [part["rows"] for part in store.manifest["log"]] == [6, 2]


@pytest.mark.parametrize(
    ("change", "flags", "fragments"),
    [
        ({}, ["--append=STORE"], ["has not kept its log", "--keep_log"]),
        ({}, ["--append=nowhere"], ["nowhere: holds no store"]),
        ({}, ["--keep_days=3"], ["--keep_days=3: needs --append"]),
        ({}, ["--items_only", "--keep_log"], ["--keep_log: cannot be combined with --items_only"]),
        ({"positive_types": ["order"]}, ["--append=KEPT"], ["positive_types", "use the same schema"]),
        ({"time": None}, ["--append=KEPT"], ["with other values of time"]),
        ({"time": None}, ["--append=KEPT", "--keep_days=3"], ["names no column with the time"]),
    ],
)
def test_what_cannot_be_appended(timed, tmp_path, dpsr, change, flags, fragments):
    write_days(timed, 1)
    dpsr(*timed.flags(tmp_path / "plain")).succeeds()
    dpsr(*timed.flags(tmp_path / "kept"), "--keep_log").succeeds()
    timed.schema["interactions"] |= change
    write_days(timed, 2)
    flags = [flag.replace("STORE", str(tmp_path / "plain")).replace("KEPT", str(tmp_path / "kept")) for flag in flags]
    status = 2 if flags[0].startswith(("--keep_days", "--items_only")) else 1
    dpsr(*timed.flags(tmp_path / "out"), *flags).fails(status, *fragments)
    assert not (tmp_path / "out").exists()


def test_a_damaged_part_is_named(timed, tmp_path, dpsr):
    write_days(timed, 1)
    dpsr(*timed.flags(tmp_path / "one"), "--keep_log").succeeds()
    part = tmp_path / "one" / "log" / "part-00001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 0xFF
    part.write_bytes(data[: len(data) // 2])
    write_days(timed, 2)
    dpsr(*timed.flags(tmp_path / "two"), f"--append={tmp_path / 'one'}").fails(1, "part-00001.parquet: cannot be read")
    assert not (tmp_path / "two").exists()


def test_a_part_with_other_rows_than_the_manifest_says_is_refused(timed, tmp_path, dpsr):
    write_days(timed, 1)
    dpsr(*timed.flags(tmp_path / "one"), "--keep_log").succeeds()
    write_days(timed, 2)
    dpsr(*timed.flags(tmp_path / "two"), f"--append={tmp_path / 'one'}").succeeds()
    part = tmp_path / "two" / "log" / "part-00001.parquet"
    table = pyarrow.parquet.read_table(part)
    part.unlink()  # it is a link to the file of the first store
    pyarrow.parquet.write_table(table.slice(1), part)
    write_days(timed, 3)
    dpsr(*timed.flags(tmp_path / "three"), f"--append={tmp_path / 'two'}").fails(
        1, "part-00001.parquet: holds 2 rows, expected 3", "ingest all days again with --keep_log"
    )
    assert not (tmp_path / "three").exists()


def test_codes_stay_and_unknown_values_are_unknown(shop, tmp_path, dpsr):
    shop.schema["items"]["features"] = ["brand", "color"]
    dpsr(*shop.write(".jsonl").flags(tmp_path / "one")).succeeds()
    small = ["train.steps=1", "train.batch_size=2", "model.token_dim=4", "model.embedding_dim=4"]
    features = ["model.item_features=[brand]", "model.user_features=[gender]"]
    settings = [f"--set={setting}" for setting in [*small, *features]]
    dpsr("train", f"--store={tmp_path / 'one'}", f"--out={tmp_path / 'model'}", *settings)
    one = Store(tmp_path / "one")
    # Brand "Acme" has been the most frequent one. Now it is rarer than a new brand.
    shop.items = [
        {"item_id": 1000 + i, "title": "glimmer", "brand": "New", "color": "teal"} for i in range(5)
    ] + shop.items
    shop.users.append({"user_id": 9, "gender": "x", "age": 41})
    like = f"--like={tmp_path / 'model'}"
    dpsr(*shop.write(".jsonl").flags(tmp_path / "two"), like).succeeds()
    two = Store(tmp_path / "two")
    rows = np.searchsorted(two.items()["id"], one.items()["id"])
    assert two.items()["feature.brand"][rows].tolist() == one.items()["feature.brand"].tolist()
    new = np.searchsorted(two.items()["id"], [1000 + i for i in range(5)])
    assert two.items()["feature.brand"][new].tolist() == [0] * 5, "a brand that the model does not know"
    assert set(two.items()["feature.color"][new].tolist()) == {1}, "the model does not read colors: they get new codes"
    assert two.users()["feature.gender"].tolist()[-1] == 0
    assert two.vocabulary.fingerprint == one.vocabulary.fingerprint
    assert two.vocabulary.encode("glimmer")[0] >= len(two.vocabulary), "in the buckets for unknown tokens"
    assert [feature for feature in two.features.items if feature.name == "brand"] == [
        feature for feature in one.features.items if feature.name == "brand"
    ]


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda s: s["items"].update(features=[]), ["feature 'brand' of items, which the schema does not have"]),
        (
            lambda s: s["items"].update(features=[{"column": "brand", "kind": "text"}]),
            ["'brand' of items, whose kind was 'categorical' and is 'text'"],
        ),
        (lambda s: s.update(tokenizer={"letter_trigrams": False}), ["section `tokenizer` differs from the model's"]),
    ],
)
def test_a_schema_that_the_model_cannot_read(shop, tmp_path, dpsr, change, fragments):
    shop.schema["items"]["features"] = ["brand"]
    dpsr(*shop.write(".jsonl").flags(tmp_path / "one")).succeeds()
    small = ["train.steps=1", "train.batch_size=2", "model.token_dim=4", "model.item_features=[brand]"]
    settings = [f"--set={setting}" for setting in small]
    dpsr("train", f"--store={tmp_path / 'one'}", f"--out={tmp_path / 'model'}", *settings)
    change(shop.schema)
    flags = [*shop.write(".jsonl").flags(tmp_path / "two"), f"--like={tmp_path / 'model'}"]
    dpsr(*flags).fails(1, f"--like={tmp_path / 'model'}", *fragments)
    assert not (tmp_path / "two").exists()


def test_like_something_that_is_no_model(shop, tmp_path, dpsr):
    dpsr(*shop.write().flags(tmp_path / "out"), f"--like={tmp_path}").fails(1, "holds no model (no config.yaml)")
