"""Features of kind vector, from raw tables to the towers; test_export_personal.py goes on to the servable."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
import yaml
from store_builder import SmallStore, write_file

from dpsr_common.errors import UsageError
from dpsr_common.packed_file import PackedFile
from dpsr_common.typed_config import from_dict
from dpsr_tf.config import Config, ModelConfig, TrainConfig
from dpsr_tf.data.column_values import vectors_of
from dpsr_tf.data.examples_dataset import BatchOptions, Features, Tokens, examples_dataset
from dpsr_tf.data.ingest import ingest
from dpsr_tf.data.schema import Schema, load_schema
from dpsr_tf.data.store import Store
from dpsr_tf.data.user_requests import User
from dpsr_tf.models.encoders import StoreTables, item_encoder, query_encoder
from dpsr_tf.models.features import Feature, FeatureSpec, ItemFeatures, QueryFeatures
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.two_tower import TwoTower
from dpsr_tf.training.train import batch_options, train

v1 = tf.compat.v1

NUM_ITEMS, NUM_USERS = 20, 6


def photo(i):
    """Numbers of both signs, whose bits are negative and positive; every fourth item has none."""
    return None if i % 4 == 0 else [round((-1) ** (i + j) * (0.1 * i + j), 2) for j in range(3)]


def taste(i):
    return None if i == 2 else [-0.5 * i, i / 3]


SCHEMA = {
    "items": {
        "files": "items.jsonl",
        "id": "item",
        "text": "title",
        "features": ["brand", {"column": "photo", "kind": "vector", "length": 3}],
    },
    "users": {
        "files": "users.csv",
        "id": "user",
        "features": [{"column": "taste", "kind": "vector", "length": 2, "separator": ";"}],
    },
    "interactions": {"files": "log.jsonl", "query": "query", "item": "item", "user": "user", "time": "time"},
}


def write_tables(folder, items):
    log = [
        {"query": f"w{i % 7} w{i % 3}", "item": i % NUM_ITEMS, "user": i % NUM_USERS, "time": 1000 + i}
        for i in range(120)
    ]
    for name, rows in (("items", items), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(folder / "users.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "taste"])
        for i in range(NUM_USERS):
            writer.writerow([i, "" if taste(i) is None else ";".join(map(str, taste(i)))])
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))


def item_rows():
    return [
        {"item": i, "title": f"w{i % 7} w{i % 3}", "brand": f"b{i % 2}", "photo": photo(i)} for i in range(NUM_ITEMS)
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from dpsr_common.command_line import main

    folder = tmp_path_factory.mktemp("vectors")
    write_tables(folder, item_rows())
    assert main(["ingest", f"--schema={folder / 'schema.yaml'}", f"--out={folder / 'store'}"]) == 0
    return Store(folder / "store")


# Reading.


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1, -2.5], None, []], pa.list_(pa.float64())),
        pa.array([[1, -2.5], None, []], pa.large_list(pa.float32())),
        pa.array([[1, -2.5], None, None], pa.list_(pa.float32(), 2)),
        pa.array([["1", "-2.5"], None, [None]], pa.list_(pa.string())),
    ],
    ids=["double", "large", "fixed size", "text"],
)
def test_lists_of_numbers(column):
    vectors, bad = vectors_of(column, None, 2)
    assert vectors.to_pylist() == [[1, -2.5], [], []] and not bad.any()
    assert vectors.type == pa.large_list(pa.float32())


def test_texts_with_a_separator():
    column = pa.array([b"1|-2.5", b" 1e1| 0 ", None, b"", b" ", b"1|2|3", b"1|x", b"1|", b"\xff|1"], pa.large_binary())
    vectors, bad = vectors_of(column, "|", 2)
    assert vectors.to_pylist() == [[1, -2.5], [10, 0], [], [], [], [], [], [], []]
    assert bad.tolist() == [False] * 5 + [True] * 4


@pytest.mark.parametrize("value", [[1.0], [1.0, 2.0, 3.0], [1.0, None], [1.0, np.nan], [np.inf, 1.0], [1e39, 1.0]])
def test_what_is_no_vector_of_two_finite_numbers(value):
    vectors, bad = vectors_of(pa.array([[0.0, 1.0], value], pa.list_(pa.float64())), None, 2)
    assert bad.tolist() == [False, True] and vectors.to_pylist() == [[0, 1], []]


def test_vectors_of_one_number():
    vectors, bad = vectors_of(pa.array([1.5, None, np.inf]), None, 1)
    assert vectors.to_pylist() == [[1.5], [], []] and bad.tolist() == [False, False, True]


def test_rows_with_a_bad_vector_are_rejected(tmp_path, dpsr):
    rows = item_rows()
    rows[5]["photo"], rows[6]["photo"] = [1, 2], [1, "two", 3]
    write_tables(tmp_path, rows)
    flags = [f"--schema={tmp_path / 'schema.yaml'}", f"--out={tmp_path / 'store'}", "--max_reject_fraction=0.2"]
    dpsr("ingest", *flags)
    rejects = [json.loads(line) for line in (tmp_path / "store.rejects.jsonl").read_text().splitlines()]
    of_items = [(row["row"], row["reason"]) for row in rejects if row["table"] == "items"]
    assert of_items == [(row, "feature photo is not a vector of 3 finite numbers") for row in (6, 7)]
    assert Store(tmp_path / "store").counts.items == NUM_ITEMS - 2


def test_the_store_holds_the_numbers(store):
    for table, features, value, count in (
        (store.items(), store.features.items, photo, NUM_ITEMS),
        (store.users(), store.features.users, taste, NUM_USERS),
    ):
        feature = features[-1]
        assert (feature.kind, feature.num_values) == ("vector", 3 if value is photo else 2)
        splits, values = (table[f"feature.{feature.name}.{part}"] for part in ("splits", "values"))
        assert values.dtype == np.float32
        found = dict(zip(table["id"].tolist(), np.split(values, splits[1:-1]), strict=True))
        for i in range(count):
            np.testing.assert_array_equal(found[i], np.array(value(i) or [], np.float32))


def test_order_threads_and_batches_do_not_change_the_store(store, tmp_path):
    write_tables(tmp_path, item_rows()[::-1])
    (tmp_path / "store").mkdir()
    schema = load_schema(tmp_path / "schema.yaml")
    ingest(schema, tmp_path, tmp_path / "store", threads=3, batch_rows=7)
    for name in ("items.dpsr", "users.dpsr"):
        assert (tmp_path / "store" / name).read_bytes() == (store.path / name).read_bytes()


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"column": "photo", "kind": "vector"}, "length is None and kind is vector: kind vector needs a length"),
        ({"column": "brand", "length": 3}, "length is 3 and kind is categorical: .* other kinds have none"),
        ({"column": "brand", "separator": ";"}, "only kind multi or vector can have a separator"),
    ],
)
def test_schemas_that_are_refused(feature, message):
    with pytest.raises(UsageError, match=message):
        from_dict(Schema, {**SCHEMA, "items": {**SCHEMA["items"], "features": [feature]}}, "schema.yaml")


# The towers.


def test_a_tower_reads_the_numbers_as_they_are():
    """Bits of a batch or numbers; a row without a vector reads zeros."""
    spec = FeatureSpec(5, item=(Feature("brand", num_ids=3), Feature("photo", "vector", 2)))
    numbers, splits = np.array([1.5, -2, -0.25, 4], np.float32), np.array([0, 2, 2, 4])
    with tf.Graph().as_default(), v1.Session() as session:
        text = Tokens(tf.constant([1, 2, 3]), tf.constant([0, 1, 2, 3], tf.int64))
        towers = TwoTower(ModelConfig(token_dim=4, feature_dim=2), spec)
        inputs = [
            towers.item_vector(
                ItemFeatures(
                    text, Features(tf.constant([[1], [0], [2]]), (Tokens(tf.constant(values), tf.constant(splits)),))
                )
            )
            for values in (numbers, numbers.view(np.int32))
        ]
        session.run(v1.global_variables_initializer())
        one, other = session.run(inputs)
        assert {variable.op.name for variable in v1.global_variables()} == {"token_embedding", "item_feature_embedding"}
    np.testing.assert_array_equal(one, other)
    assert one.shape == (3, 4 + 2 + 2)
    np.testing.assert_array_equal(one[:, 6:], [[1.5, -2], [0, 0], [-0.25, 4]])


CONFIG = Config(
    model=ModelConfig(
        token_dim=8,
        embedding_dim=6,
        item_features=("*",),
        user_features=("*",),
        history_length=3,
        num_heads=2,
    ),
    train=TrainConfig(steps=20, batch_size=8, num_random_negatives=4, learning_rate=0.1, checkpoint_steps=20),
)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """The path of a model of CONFIG; it must not be changed."""
    return train(store, CONFIG, tmp_path_factory.mktemp("trained") / "model").path


def test_training_reads_what_evaluation_reads(store, trained):
    """The towers on a batch of the C++ dataset and on the store's rows in NumPy, with the weights of a training."""
    model = ModelDirectory.open(trained)
    checkpoint = model.last_checkpoint()
    with tf.Graph().as_default(), v1.Session() as session:
        dataset = examples_dataset(store, batch_options(CONFIG, model.features))
        batch = v1.data.make_one_shot_iterator(dataset).get_next()
        towers = TwoTower(CONFIG.model, model.features)
        embeddings = towers.query_embedding(QueryFeatures.of(batch)), towers.item_embedding(ItemFeatures.of(batch))
        v1.train.Saver().restore(session, checkpoint)
        batch, (query, item) = session.run((batch, embeddings))
    bits = batch.item_features.lists[0]
    assert bits.values.dtype == np.int32 and (bits.values < 0).any() and len(batch.history.features.lists[0].values)
    np.testing.assert_allclose(item, item_encoder(model, store, checkpoint)(batch.item_rows), atol=1e-6)

    def assert_vectors(lists, ids, value):
        found = np.split(lists.values.view(np.float32), lists.row_splits[1:-1])
        for i, vector in zip(ids.tolist(), found, strict=True):
            np.testing.assert_array_equal(vector, np.array(value(i) or [], np.float32))

    assert_vectors(batch.user_features.lists[0], store.users()["id"][batch.user_rows], taste)
    assert_vectors(bits, store.items()["id"][batch.item_rows], photo)
    assert_vectors(batch.history.features.lists[0], store.items()["id"][batch.history.items.values], photo)
    users = [User(i) for i in range(NUM_USERS)]
    told = StoreTables(model, store).queries(["w1"] * NUM_USERS, users).user.lists[0]
    assert_vectors(told, np.arange(NUM_USERS), taste)
    assert query_encoder(model.path, store)(["w1"], users[:1]).shape == query[:1].shape == (1, 2, 6)
    # Behind the text and the brand, the kernel of the item tower has the rows of the photo, which training changes.
    before, after = (
        tf.train.load_variable(str(model.path / f"model.ckpt-{step}"), "item_tower/embedding/kernel")
        for step in (0, 20)
    )
    assert before.shape == (8 + 16 + 3, 6) and (before[-3:] != after[-3:]).all()


@pytest.mark.parametrize("part", ["splits", "values"])
def test_a_damaged_file_is_refused(store, tmp_path, part):
    """Splits that do not span the numbers."""
    shutil.copytree(store.path, tmp_path / "store")
    path = tmp_path / "store" / "items.dpsr"
    sections = dict(PackedFile(path, "items").items())
    sections[f"feature.photo.{part}"] = sections[f"feature.photo.{part}"][:-1]
    write_file(path, "items", sections)
    copy = SmallStore(tmp_path / "store", store.manifest)
    options = BatchOptions(batch_size=4, num_random_negatives=4, item_features=("photo",))
    with pytest.raises(tf.errors.DataLossError, match=f"{path}: section feature.photo.splits"):
        next(iter(examples_dataset(copy, options)))


def test_another_length_is_another_model(trained, tmp_path):
    longer = yaml.safe_load(yaml.safe_dump(SCHEMA))
    longer["items"]["features"][1]["length"] = 4
    rows = [row | {"photo": None if row["photo"] is None else [*row["photo"], 1.0]} for row in item_rows()]
    folder = tmp_path / "longer"
    folder.mkdir()
    write_tables(folder, rows)
    (folder / "schema.yaml").write_text(yaml.safe_dump(longer))
    from dpsr_common.command_line import main

    assert main(["ingest", f"--schema={folder / 'schema.yaml'}", f"--out={folder / 'store'}"]) == 0
    difference = ModelDirectory.open(trained).store_difference(Store(folder / "store"))
    assert difference is not None and "items.photo" in difference
