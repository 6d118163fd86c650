"""The numbers that a servable computes for a ranker, against those of RankingFeatures.at_end; and hostile requests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from ranking_shops import QUERIES, WORDS

from dpsr_export.faiss_search import load
from dpsr_export.rank_table import RankNumbers, RankTable, RankWeights, write_rank_table
from dpsr_tf.data.ranking_features import RankingFeatures
from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.data.store import Store
from dpsr_tf.models.features import Number

v1 = tf.compat.v1


class Tables:
    """A rank table with all numbers."""

    def __init__(self, store: Store, path: Path, tables: list[np.ndarray]):
        self.features = RankingFeatures(store)
        write_rank_table(self.features, tables, path)
        self.table = RankTable(path, self.features, [table.shape[1] for table in tables])
        self.pairs = [name for name, kind in self.features.kinds.items() if kind == "pair"]
        self.spending = [name for name in self.features.kinds if name.startswith("spend.") and name not in self.pairs]

    def __call__(self, query, user_id, item_ids, max_items=1000, scores=(), **of_user):
        given = {f"user.{name}": tf.constant(value, tf.float32) for name, value in of_user.items()}
        request = [*reversed(self.spending), *given]
        pairs = [*self.pairs, "dpsr_score"]
        found = self.table.numbers(query, user_id, item_ids, scores, given, request, pairs, max_items)
        return tf.nest.map_structure(lambda tensor: tensor.numpy(), found)


def test_numbers_are_those_at_the_end_of_the_log(ranking_shop: Store, tmp_path: Path) -> None:
    store = ranking_shop
    rng = np.random.default_rng(6)
    of_items = rng.normal(size=(store.counts.items, 3))
    numbers = Tables(store, tmp_path / "rank_table.dpsr", [of_items[:, :1], of_items])
    ids, users = store.items()["id"], store.users()["id"]
    assert len(numbers.pairs) > 20
    queries = [*QUERIES, *(" ".join(rng.choice([*WORDS, "other"], rng.integers(1, 9))) for _ in range(40))]
    for query in queries:
        user = int(rng.integers(store.counts.users))
        item = rng.integers(0, store.counts.items, 30)
        # The log's queries have no white space at their ends.
        expected = numbers.features.at_end([query.strip()], np.zeros(30, np.int64), np.full(30, user), item)
        asked, scores = ids[item], rng.normal(size=30).astype(np.float32)
        asked[3] = 5
        found = numbers(tf.constant([query]), users[user : user + 1], asked, scores=scores, age=[31.5], size=[])
        item[3] = -1
        np.testing.assert_array_equal(found.rows, item)
        for place, name in enumerate(numbers.pairs):
            right = expected.numbers[name].copy()
            right[3] = np.nan
            np.testing.assert_allclose(found.pairs[:, place], right, rtol=1e-6, atol=1e-6, err_msg=f"{name} {query!r}")
        np.testing.assert_array_equal(found.pairs[:, -1], scores)
        for place, name in enumerate(reversed(numbers.spending)):
            np.testing.assert_array_equal(found.request[0, place], expected.numbers[name][0], name)
        assert found.request[0, -2] == 31.5 and np.isnan(found.request[0, -1])
        values = numbers.table.rows(1, found.rows).numpy()
        np.testing.assert_allclose(values[:3], of_items[item[:3]], rtol=1e-6)
        assert not values[3].any() and numbers.table.rows(0, found.rows).shape == [30, 1]
    # Bytes that are not UTF-8 separate words.
    broken, clean = (numbers(tf.constant([text]), users[:1], ids[:9]) for text in (b"red\xffdrill", "red drill"))
    fields = [place for place, name in enumerate(numbers.pairs) if name.startswith("bm25.")]
    np.testing.assert_array_equal(broken.pairs[:, fields], clean.pairs[:, fields])
    if numbers.spending:
        spent = numbers(tf.constant(["red"]), users[users > 0][:1], ids[:1]).request
        assert spent[0, -1] > 0, "the first user has orders"
        for unknown in ([], [-1], [123]):
            anonymous = numbers(tf.constant(["red"]), np.array(unknown, np.int64), ids[:1]).request
            assert anonymous[0, -1] == 0 and np.isnan(anonymous[0, :-1]).all()


def test_wrong_requests(ranking_shop: Store, tmp_path: Path) -> None:
    store = ranking_shop
    numbers = Tables(store, tmp_path / "rank_table.dpsr", [np.zeros((store.counts.items, 2))])
    query, nobody, ids = tf.constant(["red"]), tf.constant([], tf.int64), store.items()["id"][:4]
    assert numbers(query, nobody, ids[:0]).pairs.shape == (0, len(numbers.pairs) + 1)
    hostile = np.array([-1, -(2**63), 2**63 - 1, 0], np.int64)
    unknown = numbers(query, nobody, hostile)
    assert unknown.rows.tolist()[:3] == [-1, -1, -1] and np.isnan(unknown.pairs[:3]).all()
    assert np.isnan(numbers(query, nobody, ids, scores=[np.nan, 1, 2, 3]).pairs[0, -1])
    for arguments, more, message in (
        ((query, nobody, ids, 3), {}, "item_ids has 4 items, expected at most 3; send the best"),
        ((tf.constant(["a", "b"]), nobody, ids), {}, r"query has shape \[2\], expected \[1\], one query for all items"),
        ((tf.constant([], tf.string), nobody, ids), {}, r"query has shape \[0\]"),
        ((tf.constant("a"), nobody, ids), {}, r"query has shape \[\]"),
        ((query, tf.constant([1, 2], tf.int64), ids), {}, r"user_id has shape \[2\], expected \[1\], or \[0\]"),
        ((query, nobody, ids.reshape(2, 2)), {}, r"item_ids has shape \[2,2\], expected \[n\]"),
        ((tf.constant(["x" * 2**20]), nobody, ids), {}, "query has 1048576 bytes, expected at most 65536"),
        ((query, nobody, ids), {"scores": [1.0]}, r"dpsr_score has shape \[1\], expected \[4\], one score for each"),
        ((query, nobody, ids), {"scores": [1, 2, -np.inf, 3]}, "dpsr_score has -inf at 2, expected finite numbers"),
        ((query, nobody, ids), {"age": [1.0, 2.0]}, r"user_age has shape \[2\], expected \[1\], or \[0\]"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            numbers(*arguments, **more)
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected less than 60"):
        numbers.table.rows(0, tf.constant([60]))
    assert numbers.table.rows(0, tf.constant([-5])).numpy().tolist() == [[0, 0]]
    wrong = RankTable(tmp_path / "rank_table.dpsr", numbers.features, [3])
    with pytest.raises(tf.errors.FailedPreconditionError, match="has no table 0 of width 3"):
        wrong.rows(0, tf.constant([1]))


def test_history(ranking_shop: Store, tmp_path: Path) -> None:
    store = ranking_shop
    features = RankingFeatures(store)
    write_rank_table(features, [], tmp_path / "rank_table.dpsr")
    table = RankTable(tmp_path / "rank_table.dpsr", features)
    ids = store.items()["id"]
    clicked = np.array([[ids[4], -1, 5, ids[7], ids[4], ids[0]]])
    no_types = np.zeros([0, 0], object)
    rows, types = table.history(clicked, no_types, 3)
    assert rows.numpy().tolist() == [7, 4, 0] and types.numpy().tolist() == [EVENT_TYPES.index("click")] * 3
    given = np.array([["order", "", "", "cart", "", "order"]], object)
    rows, types = table.history(clicked, given, 10)
    assert rows.numpy().tolist() == [4, 7, 4, 0]
    assert [EVENT_TYPES[code] for code in types.numpy()] == ["order", "cart", "click", "order"]
    assert table.history(np.zeros([0, 0], np.int64), no_types, 3)[0].shape == [0]
    for arguments, message in (
        ((clicked[0], no_types), r"clicked_items has shape \[6\], expected \[1, n\]"),
        ((clicked.reshape(2, 3), no_types), r"clicked_items has shape \[2,3\]"),
        ((clicked, given[:, :2]), r"clicked_item_types has shape \[1,2\], expected \[1,6\]"),
        ((clicked, np.full([1, 6], "bought", object)), "clicked_item_types has 'bought', expected one of"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            table.history(*arguments, 3)


def test_scores_of_wrong_shapes(ranking_shop_of_numbers: Store, tmp_path: Path) -> None:
    """A table whose model is another than that of the weights is an error, and no crash."""
    items, rng = ranking_shop_of_numbers.counts.items, np.random.default_rng(1)
    of_items = [rng.normal(size=(items, width)) for width in (3, 4, 2)]
    tables = Tables(ranking_shop_of_numbers, tmp_path / "rank_table.dpsr", of_items)
    number = Number("bm25.title", "pair", may_miss=True)
    good = {
        "rows": np.array([5, -1, 7], np.int32), "past": np.array([1, 2], np.int32), "pairs": np.ones((3, 1)),
        "request": np.zeros((1, 0)), "text": np.ones((1, 4)), "user": np.ones((1, 1)),
        "request_kernel": rng.normal(size=(10, 3)), "pair_kernel": rng.normal(size=(6, 3)),
        "wanted_kernel": rng.normal(size=(10, 2)), "wanted_bias": np.ones(2), "bias": np.ones(3),
        "kernel": np.ones((3, 1)), "last": np.array([0.5]),
    }  # fmt: skip

    def scores(**changes: np.ndarray) -> np.ndarray:
        v = {k: tf.constant(a, None if a.dtype == np.int32 else tf.float32) for k, a in (good | changes).items()}
        weights = RankWeights(
            v["request_kernel"], v["pair_kernel"], (v["wanted_kernel"], v["wanted_bias"]),
            [v["bias"], v["kernel"], v["last"]],
        )  # fmt: skip
        numbers = RankNumbers(v["rows"], v["request"], v["pairs"])
        return tables.table.scores(
            [0, 1, 2, -1], v["rows"], v["past"], numbers, {"request": [], "pair": [number]}, v["text"], v["user"], [4],
            5.0, weights,
        ).numpy()  # fmt: skip

    hidden, vectors, offered = (table.astype(np.float32) for table in of_items)
    pooled = vectors[[1, 2]].mean(0)
    inputs = np.concatenate([np.ones(5), pooled, [np.log(3)]])
    for place, row in ((0, 5), (2, 7)):
        wanted = inputs @ good["wanted_kernel"] + 1
        pair = [np.log(2), 0, *(wanted * offered[row]), vectors[row].sum(), vectors[row] @ pooled]
        first = hidden[row] + inputs @ good["request_kernel"] + np.array(pair) @ good["pair_kernel"] + 1
        np.testing.assert_allclose(scores()[place], np.maximum(first, 0).sum() + 0.5, rtol=1e-4)
    assert np.isneginf(scores()[1])
    for name, wrong, message in (
        ("rows", np.array([5, 60, 7], np.int32), "rows has 60, expected less than 60"),
        ("past", np.array([-1], np.int32), "history_rows has -1, expected 0 to 59"),
        ("pairs", np.ones((2, 1)), r"pair_numbers has shape \[2,1\], expected \[3,1\]"),
        ("request", np.ones((1, 2)), r"request_numbers has shape \[1,2\], expected \[1,0\]"),
        ("user", np.ones((1, 2)), r"request_kernel has shape \[10,3\], expected \[11,3\]"),
        ("pair_kernel", np.ones((5, 3)), r"pair_kernel has shape \[5,3\], expected \[6,3\]"),
        ("wanted_kernel", np.ones((10, 3)), r"wanted_kernel has shape \[10,3\], expected \[10,2\]"),
        ("bias", np.ones(4), r"the first bias has shape \[4\], expected \[3\]"),
        ("kernel", np.ones((4, 1)), r"a kernel has shape \[4,1\], expected \[3,1\]"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            scores(**{name: wrong})


def test_shapes_and_damaged_files(ranking_shop: Store, tmp_path: Path) -> None:
    store = ranking_shop
    features, path = RankingFeatures(store), tmp_path / "rank_table.dpsr"
    write_rank_table(features, [np.ones((store.counts.items, 2))], path)
    with tf.Graph().as_default(), v1.Session() as session:
        table = RankTable(path, features, [2])

        def numbers(*shapes: list[int | None]) -> list[tf.Tensor]:
            types = (tf.string, tf.int64, tf.int64, tf.float32)
            given = [v1.placeholder(t, s) for t, s in zip(types, shapes, strict=True)]
            return table.numbers(*given, {}, [], ["bm25.title", "dpsr_score"], 10)

        good = [[1], [None], [None], [None]]
        found = numbers(*good)
        assert [tensor.shape.as_list() for tensor in found] == [[None], [1, 0], [None, 2]]
        assert table.rows(0, found[0]).shape.as_list() == [None, 2]
        for place in range(4):
            with pytest.raises(ValueError, match="rank 1"):
                numbers(*good[:place], [2, 2], *good[place + 1 :])
        with pytest.raises(tf.errors.FailedPreconditionError, match="the table is not loaded"):
            session.run(table.rows(0, tf.constant([1])))
    bytes_ = path.read_bytes()
    for at in range(64, len(bytes_), len(bytes_) // 40):
        path.write_bytes(bytes_[:at] + bytes([bytes_[at] ^ 0x40]) + bytes_[at + 1 :])
        with pytest.raises(tf.errors.DataLossError):
            RankTable(path, features, [2])
    path.write_bytes(bytes_[:100])
    with pytest.raises(tf.errors.DataLossError):
        RankTable(path, features, [2])
    path.unlink()
    with pytest.raises(tf.errors.NotFoundError):
        RankTable(path, features, [2])
    handle = load().dpsr_rank_table_handle(shared_name="of another kind")
    with pytest.raises(tf.errors.FailedPreconditionError):
        load().dpsr_rank_table_load(handle, str(store.items_path))
