"""A checkpoint as a retriever: its embeddings by NumPy, and what the query tower is told of users."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import tensorflow as tf
from conftest import Shop, encode_table

from dpsr_common import command_line
from dpsr_common.errors import CommandError
from dpsr_tf.config import Config, ModelConfig
from dpsr_tf.data.store import Store
from dpsr_tf.data.user_requests import User
from dpsr_tf.evaluation.retriever import ask
from dpsr_tf.models.encoders import StoreTables, best_items, exact_search
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.two_tower import TwoTower

v1 = tf.compat.v1

QUERIES = ["red shoes", "红鞋", "", "bolt", "never heard"]


def placeholders(features):
    return tf.nest.map_structure(
        lambda a: None if a is None else v1.placeholder(a.dtype, [None, *a.shape[1:]]), features
    )


def make_model(path, store, step=7, **model):
    """A model directory with a checkpoint of random weights, of this step."""
    directory = ModelDirectory.create_or_resume(path, Config(model=ModelConfig(**model)), store)
    tables = StoreTables(directory, store)
    with tf.Graph().as_default(), v1.Session() as session:
        v1.set_random_seed(1)
        towers = TwoTower(directory.config.model, tables.spec)
        towers.query_embedding(placeholders(tables.queries(["red"], None)))
        towers.item_embedding(placeholders(tables.items(np.arange(2))))
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(path / "model.ckpt"), global_step=step)
    return directory


def embed(model, vocabulary, tower, texts):
    """A tower of a text-only model without hidden layers, by NumPy."""
    read = tf.train.load_checkpoint(str(model.path)).get_tensor
    table, rows = read("token_embedding"), []
    values, splits = vocabulary.encode_batch(texts)
    for begin, end in itertools.pairwise(splits):
        x = table[values[begin:end]].sum(axis=0) @ read(f"{tower}/embedding/kernel") + read(f"{tower}/embedding/bias")
        rows.append(x / np.linalg.norm(x) if end > begin else x * 0)
    return np.array(rows)


def test_exact_search_of_a_checkpoint_equals_numpy(store, tmp_path):
    model = make_model(tmp_path / "model", store, token_dim=8, embedding_dim=6, num_heads=1)
    retriever = exact_search(model.path, store)
    assert not retriever.personal
    texts = {30: "Red running shoes Acme", 70: "红色 跑鞋 43码 阿克梅", 50: "007"}
    items = embed(model, store.vocabulary, "item_tower", list(texts.values()))
    queries = embed(model, store.vocabulary, "query_tower/head_0", QUERIES)
    pairs = np.tile(list(texts), (len(QUERIES), 1))
    np.testing.assert_allclose(retriever.score(QUERIES, None, pairs), queries @ items.T, atol=1e-5)
    ids, scores = ask(retriever, QUERIES, [User(5)] * 5, 7)
    assert (ids[2] == -1).all(), "an empty query finds nothing"
    for row in (0, 1, 3, 4):
        assert sorted(ids[row].tolist()) == sorted(store.items()["id"].tolist())
        of_item = dict(zip(ids[row].tolist(), scores[row].tolist(), strict=True))
        assert [of_item[item] for item in texts] == pytest.approx((queries[row] @ items.T).tolist(), abs=1e-5)
        assert (np.diff(scores[row]) <= 0).all()


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A store with features, times, and a history of user 5: five clicks at 100, 200, ... 500.

    It must not be changed.
    """
    shop = Shop(tmp_path_factory.mktemp("timed") / "shop")
    shop.items = [{**item, "tags": "a|b" if item["color"] == "red" else ""} for item in shop.items]
    clicks = [("red shoes", 30), ("red shoes", 20), ("红鞋", 70), ("red shoes", 30), ("bolt", 10)]
    shop.log = [
        {"query": query, "item_id": item, "user_id": 5, "time": 100 * (i + 1)} for i, (query, item) in enumerate(clicks)
    ]
    shop.log += [{"query": "100", "item_id": 50, "user_id": 3, "time": 50}]
    shop.schema["items"]["features"] = ["brand", {"column": "tags", "kind": "multi", "separator": "|"}]
    shop.schema["interactions"] = {
        "files": "log.*", "query": "query", "item": "item_id", "user": "user_id", "time": "time",
    }  # fmt: skip
    path = shop.path.parent / "store"
    assert command_line.main(shop.write(".jsonl").flags(path)) == 0
    return Store(path)


PERSONAL = {
    "token_dim": 8, "embedding_dim": 6, "feature_dim": 4, "num_heads": 2, "user_features": ("gender",),
    "item_features": ("brand", "tags"), "history_length": 3, "query_history_length": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def personal(timed, tmp_path_factory):
    """A model that reads features and histories of `timed`; it must not be changed."""
    return make_model(tmp_path_factory.mktemp("personal") / "model", timed, **PERSONAL)


@pytest.mark.parametrize(
    ("user", "items", "queries"),
    [
        (User(5), [70, 30, 10], ["red shoes", "bolt"]),
        (User(5, 500), [20, 70, 30], ["红鞋", "red shoes"]),  # strictly before
        (User(5, 501), [70, 30, 10], ["red shoes", "bolt"]),
        (User(5, 300), [30, 20], ["red shoes"]),  # of equal ones in a row, one
        (User(5, 100), [], []),
        (User(3), [50], ["100"]),
        (User(-1), [], []),
        (User(999), [], []),
    ],
)
def test_history_as_of_a_time(timed, personal, user, items, queries):
    tables = StoreTables(personal, timed)
    # Between two others, whose histories must not mix with it.
    found = tables.queries(["a", "b", "c"], [User(3), user, User(5)]).history
    begin, end = found.items.row_splits[1:3]
    assert timed.items()["id"][found.items.values[begin:end]].tolist() == items
    assert (found.types[begin:end] == 2).all()
    assert found.text.row_splits[-1] == len(found.text.values) and len(found.text.row_splits) == len(found.types) + 1
    assert len(found.features.codes) == len(found.types)
    first, last = found.query_splits[1:3]
    values, splits = timed.vocabulary.encode_batch(queries)
    ours = found.query.row_splits[first : last + 1]
    assert found.query.values[ours[0] : ours[-1]].tolist() == values.tolist()
    assert np.diff(ours).tolist() == np.diff(splits).tolist()


def test_features_are_those_of_the_store(timed, personal):
    tables = StoreTables(personal, timed)
    items = timed.items()
    rows = np.array([5, 0, 5])
    found = tables.items(rows)
    assert found.features.codes[:, 0].tolist() == items["feature.brand"][rows].tolist()
    by_id = dict(zip(items["id"].tolist(), range(7), strict=True))
    lengths = np.diff(tables.items(np.array([by_id[30], by_id[10], by_id[70]])).features.lists[0].row_splits)
    assert lengths.tolist() == [2, 0, 2]
    users = tables.queries(["a"] * 4, [User(8), User(3), User(-1), User(5)]).user.codes[:, 0]
    assert users[0] == users[2] == 0 and 0 < users[1] != users[3] > 0


def test_a_personal_model_is_told_who_asks_and_when(timed, personal):
    retriever = exact_search(personal.path, timed)
    assert retriever.personal
    users = [User(-1), User(5, 100), User(5, 300), User(5), User(5), User(999)]
    _, scores = ask(retriever, ["red shoes"] * 6, users, 7)
    np.testing.assert_allclose(scores[[0, 3]], scores[[5, 4]], atol=1e-6)
    for row in range(4):
        for other in range(row):
            assert np.abs(scores[row] - scores[other]).max() > 1e-4, (row, other)
    found = best_items(personal.path, timed, ["red shoes"] * 6, users, 3)
    expected = retriever(["red shoes"] * 6, users, 3)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    pairs = np.tile([30, 70], (6, 1))
    alone = [retriever.score(["red shoes"], [user], pairs[:1])[0] for user in users]
    np.testing.assert_allclose(retriever.score(["red shoes"] * 6, users, pairs), alone, atol=1e-6)
    np.testing.assert_allclose(retriever.score(["red shoes"] * 6, None, pairs)[3], alone[0], atol=1e-6)


def test_the_command_measures_a_personal_model(timed, personal, tmp_path, dpsr):
    rows = [
        {"query": "red shoes", "item": 20, "who": 5, "when": 150},
        {"query": "red shoes", "item": 30, "who": 3, "when": 60},
    ]
    (tmp_path / "judgments.tsv").write_bytes(encode_table(rows, ".tsv"))
    columns = ["--grade_column=", "--user_column=who", "--time_column=when", "--k=1,7", "--compare"]
    out = tmp_path / "figures.json"
    dpsr(
        "evaluate", f"--store={timed.path}", f"--judgments={tmp_path / 'judgments.tsv'}", *columns, f"--json={out}",
        "--system=bm25", f"--system=model:{personal.path}", f"--system=rrf(bm25,model:{personal.path})",
    ).succeeds()  # fmt: skip
    found = json.loads(out.read_text())
    assert found["queries"] == 2
    assert found["systems"][f"model:{personal.path}"]["recall@7"] == 1
    ids, _ = exact_search(personal.path, timed)(["red shoes"] * 2, [User(5, 150), User(3, 60)], 1)
    expected = np.mean([ids[0, 0] == 20, ids[1, 0] == 30])
    assert found["systems"][f"model:{personal.path}"]["recall@1"] == expected


def test_models_that_cannot_be_asked(store, tmp_path):
    with pytest.raises(CommandError, match="holds no model"):
        exact_search(tmp_path / "none", store)
    empty = ModelDirectory.create_or_resume(tmp_path / "empty", Config(), store)
    with pytest.raises(CommandError, match="holds no checkpoint"):
        exact_search(empty.path, store)
    # What a training leaves that fails at its first step.
    untrained = make_model(tmp_path / "untrained", store, step=0)
    with pytest.raises(CommandError, match=r"holds no trained checkpoint, only model.ckpt-0"):
        exact_search(untrained.path, store)
    model = make_model(tmp_path / "model", store, token_dim=8, embedding_dim=6)
    (tmp_path / "model" / "config.yaml").write_text("model: {token_dim: 8, embedding_dim: 6, hidden: [4]}\n")
    with pytest.raises(CommandError, match=r"model.ckpt-7 cannot be read, or does not fit the config"):
        exact_search(model.path, store)
    (tmp_path / "model" / "config.yaml").write_text("model: {item_features: [weight]}\n")
    with pytest.raises(CommandError, match="weight"):
        exact_search(model.path, store)


def test_a_store_of_another_vocabulary(shop, store, tmp_path, dpsr):
    model = make_model(tmp_path / "model", store, token_dim=8, embedding_dim=6)
    shop.items[0]["title"] = "Something else"
    dpsr(*shop.write().flags(tmp_path / "other")).succeeds()
    with pytest.raises(CommandError, match="holds a model of another vocabulary"):
        exact_search(model.path, Store(tmp_path / "other"))
