"""The ops that read requests: item keys, feature values, past queries; and the check of a servable's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from dpsr_common.packed_file import PackedFileWriter
from dpsr_export import request_tables
from dpsr_export.faiss_search import load
from dpsr_tf.data.column_files import string_bytes
from dpsr_tf.data.column_values import ids_of
from dpsr_tf.data.id_index import id_index
from dpsr_tf.models.features import Feature

v1 = tf.compat.v1


def write_keys(path: Path, keys: list[str], codes: list[int] | None = None) -> np.ndarray:
    """Writes a key table. Returns the keys' ids, as ingest makes them."""
    import pyarrow as pa

    texts = pa.array(keys, pa.large_string())
    ids = ids_of(texts, string_ids=True).values
    data, splits = string_bytes(texts)
    bucket_splits, rows = id_index(ids)
    with PackedFileWriter(str(path), "keys") as file:
        for name, values in (
            ("id", ids), ("id_index.splits", bucket_splits), ("id_index.rows", rows), ("key.splits", splits),
            ("key.bytes", data),
        ):  # fmt: skip
            file.add(name, values)
        if codes is not None:
            file.add("code", np.array(codes, np.int32))
    return ids


def test_item_keys_and_ids(tmp_path: Path) -> None:
    keys = [f"sku-{i}" for i in range(1000)] + ["手机", "a" * 500]
    ids = write_keys(tmp_path / "keys.dpsr", keys)
    table = request_tables.KeyTable(tmp_path / "keys.dpsr")
    np.testing.assert_array_equal(table.item_ids(tf.constant(keys)), ids)
    assert [key.decode() for key in table.item_keys(tf.constant(ids)).numpy()] == keys
    asked = tf.constant([[" sku-7\t", "\u3000手机\u3000"], ["", "sku-1000"]])
    assert table.item_ids(asked).numpy().tolist() == [[ids[7], ids[1000]], [-1, -1]]
    assert table.item_keys(tf.constant([[ids[1]], [-1], [5]], tf.int64)).numpy().tolist() == [[b"sku-1"], [b""], [b""]]
    assert table.item_ids(tf.zeros([0, 0], tf.string)).shape == [0, 0]
    assert table.item_ids(tf.constant([b"\xff\xfe", b"sku\x00-1"])).numpy().tolist() == [-1, -1]


FEATURES = [
    Feature("size", "number", 4), Feature("color", "categorical", 3), Feature("tags", "multi", 3),
    Feature("brand", "categorical", 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> request_tables.KeyTable:
    path = tmp_path_factory.mktemp("values") / "feature_values.dpsr"
    keys = [
        "user\0color\0red",
        "user\0color\0blau",
        "user\0tags\0a",
        "user\0tags\0red",
        "user\0brand\0红",
        "item\0color\0x",
    ]
    write_keys(path, keys, [1, 2, 1, 2, 1, 7])
    return request_tables.KeyTable(path)


def codes_of(table: request_tables.KeyTable, size: object, color: object, tags: object, brand: object) -> tuple:
    given = [
        tf.constant(size, tf.float32),
        tf.constant(color, tf.string),
        tf.constant(tags, tf.string),
        tf.constant(brand, tf.string),
    ]
    codes, lists = table.feature_codes("user", FEATURES, {"size": [0.7, 10, 20]}, tf.constant(["q"] * 4), given)
    return codes.numpy().tolist(), tf.RaggedTensor.from_row_splits(*lists["tags"]).to_list()


def test_feature_codes(values: request_tables.KeyTable) -> None:
    codes, tags = codes_of(
        values,
        [0.7, np.nan, 20, -np.inf],
        ["red", " blau\u3000", "x", ""],
        [["a", "red", ""], ["", "", ""], ["green", "red", "red"], ["", "", " a"]],
        ["红", "red", "红 ", "红红"],
    )
    # 0.7 is a boundary and belongs to the bucket above, as float32 as well as in ingest; "x" is an item's colour.
    assert codes == [[2, 1, 1], [0, 2, 0], [4, 0, 1], [1, 0, 0]]
    assert tags == [[1, 2], [], [2, 2], [1]]
    absent = codes_of(values, [], [], np.zeros([0, 0], object), [])
    assert absent == ([[0, 0, 0]] * 4, [[]] * 4)


def test_feature_codes_in_a_graph(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.dpsr", ["user\0color\0red"], [1])
    with tf.Graph().as_default(), v1.Session() as session:
        table = request_tables.KeyTable(tmp_path / "keys.dpsr")
        texts = v1.placeholder(tf.string, [None])
        features = [Feature("color", "categorical", 2), Feature("tags", "multi", 2)]
        given = [v1.placeholder(tf.string, [None]), v1.placeholder(tf.string, [None, None])]
        codes, lists = table.feature_codes("user", features, {}, texts, given)
        assert codes.shape.as_list() == [None, 1] and lists["tags"].row_splits.shape.rank == 1
        feed = {texts: ["a", "b"], given[0]: ["red", "blue"], given[1]: [["x"], ["y"]]}
        with pytest.raises(tf.errors.FailedPreconditionError, match="the table is not loaded"):
            session.run(codes, feed)
        session.run(v1.tables_initializer())
        assert session.run(codes, feed).tolist() == [[1], [0]]
        for place, value, message in (
            (0, ["red"], r"user_color has shape \[1\], expected \[2\]"),
            (1, [["x"]], r"user_tags has shape \[1,1\], expected \[2, n\]"),
        ):
            with pytest.raises(tf.errors.InvalidArgumentError, match=message):
                session.run(codes, feed | {given[place]: value})
        with pytest.raises(ValueError, match="rank 1 but is rank 2"):
            table.feature_codes("user", features, {}, given[1], given)


def test_past_queries() -> None:
    texts, splits = request_tables.past_queries(
        tf.constant(["q"] * 4),
        tf.constant(
            [["a", "b", "b ", "a", "c"], ["", "", "", "", ""], ["", "x", "", "x", ""], ["1", "2", "3", "4", "4"]]
        ),
        3,
    )
    assert splits.numpy().tolist() == [0, 3, 3, 4, 7]
    assert [text.decode() for text in texts.numpy()] == ["b", "a", "c", "x", "2", "3", "4"]
    none, splits = request_tables.past_queries(tf.constant(["q"] * 2), tf.zeros([0, 0], tf.string), 3)
    assert none.shape == [0] and splits.numpy().tolist() == [0, 0, 0]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"past_queries has shape \[1,2\], expected \[2, n\]"):
        request_tables.past_queries(tf.constant(["q"] * 2), tf.constant([["a", "b"]]), 3)


def test_tables_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(tf.errors.NotFoundError, match=r"none\.dpsr"):
        request_tables.KeyTable(tmp_path / "none.dpsr")
    write_keys(tmp_path / "keys.dpsr", ["a", "b"])
    data = bytearray((tmp_path / "keys.dpsr").read_bytes())
    data[70] ^= 1
    (tmp_path / "bad.dpsr").write_bytes(data)
    with pytest.raises(tf.errors.DataLossError, match=r"bad\.dpsr"):
        request_tables.KeyTable(tmp_path / "bad.dpsr")
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"keys\.dpsr.*items"):
        request_tables.ItemTable(tmp_path / "keys.dpsr", [])
    handle = load().dpsr_key_table_handle(shared_name="two tables")
    write_keys(tmp_path / "other.dpsr", ["c"])
    for _ in range(2):
        load().dpsr_key_table_load(handle, str(tmp_path / "keys.dpsr"))
    with pytest.raises(
        tf.errors.FailedPreconditionError, match=r"cannot load .*other.dpsr: this handle holds .*keys.dpsr"
    ):
        load().dpsr_key_table_load(handle, str(tmp_path / "other.dpsr"))


def test_file_fingerprints(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"some bytes")
    known = request_tables.file_fingerprint(path)
    assert len(known) == 16
    assert load().dpsr_file_fingerprint(str(path), expected=known).numpy().decode() == known
    path.write_bytes(b"other byte")
    with pytest.raises(tf.errors.FailedPreconditionError, match="is not the file that this servable was exported with"):
        load().dpsr_file_fingerprint(str(path), expected=known)
    with pytest.raises(tf.errors.NotFoundError, match="nowhere"):
        load().dpsr_file_fingerprint("/nowhere/file")
