from __future__ import annotations

import collections
import itertools
import shutil

import numpy as np
import pytest
import tensorflow as tf

from dpsr_tf import ops
from dpsr_tf.config import TrainConfig
from dpsr_tf.data.dataset import Batch, examples_dataset, training_input
from dpsr_tf.data.store import Store
from dpsr_tf.errors import CommandError
from dpsr_tokenizer import PackedFile, PackedFileWriter

FEATURES = ("age", "gender")


def config(batch_size=8, negatives=6, **options):
    return TrainConfig(batch_size=batch_size, num_random_negatives=negatives, **options)


def batches(dataset, count=None):
    """Batches as NumPy arrays, in a list."""
    return list((dataset if count is None else dataset.take(count)).as_numpy_iterator())


def texts(tokens):
    """Tokens of a batch as a list of lists."""
    assert tokens.row_splits[0] == 0 and tokens.row_splits[-1] == len(tokens.values)
    return [piece.tolist() for piece in np.split(tokens.values, tokens.row_splits[1:-1])]


def same(ones, others):
    """Asserts that two lists of batches are equal, bit for bit."""
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)


def differ(ones, others):
    return any((one.item_rows != other.item_rows).any() for one, other in zip(ones, others, strict=True))


class Tables:
    """A store as NumPy and plain Python read it."""

    def __init__(self, store):
        items, self.log = store.items(), store.interactions()
        users = PackedFile(store.users_path, "users")
        self.items = self._rows(items, "tokens.splits", "tokens.values")
        self.queries = self._rows(self.log, "query.splits", "query.tokens")
        self.negatives = self._rows(self.log, "negative.splits", "negative.item")
        self.features = np.stack([users[f"feature.{name}"] for name in FEATURES], axis=1)
        self.clicked = collections.defaultdict(set)
        for query, item in zip(self.log["positive.query"].tolist(), self.log["positive.item"].tolist(), strict=True):
            self.clicked[query].add(item)
        # Each weight stands once, so it tells the click.
        self.click_of = {weight: row for row, weight in enumerate(self.log["positive.weight"].tolist())}
        self.num_clicks = len(self.log["positive.item"])
        assert len(self.click_of) == self.num_clicks

    def clicks(self, batch, title_queries=0):
        """Rows of the log that the batch's examples are, title queries left out."""
        return [self.click_of[weight] for weight in batch.weights.tolist()[: len(batch.weights) - title_queries]]

    @staticmethod
    def _rows(file, splits, values):
        return [piece.tolist() for piece in np.split(file[values], file[splits][1:-1])]


@pytest.fixture(scope="module")
def tables(click_store):
    return Tables(click_store)


def test_the_store_has_what_these_tests_need(tables):
    assert tables.num_clicks == 240 and len(tables.items) == 60 and len(tables.queries) == 30
    clicks = collections.Counter(tables.log["positive.query"].tolist())
    assert max(clicks.values()) > 4 * 14, "a head query, longer than the batch many times over"
    assert all(tables.negatives)


@pytest.mark.parametrize(
    ("batch_size", "negatives", "supervised"), [(8, 6, 0), (1, 0, 0), (2, 200, 0), (64, 64, 32), (5, 3, 3), (300, 1, 1)]
)
def test_batches_equal_a_numpy_reading_of_the_store(click_store, tables, batch_size, negatives, supervised):
    options = config(batch_size, negatives, num_supervised_negatives=supervised)
    seen_masks = set()
    for batch in batches(examples_dataset(click_store, options, FEATURES), 12):
        clicks = tables.clicks(batch)
        queries = tables.log["positive.query"][clicks].tolist()
        rows = batch.item_rows.tolist()
        assert len(clicks) == batch_size and len(rows) == batch_size + negatives
        assert rows[:batch_size] == tables.log["positive.item"][clicks].tolist()
        assert texts(batch.query) == [tables.queries[query] for query in queries]
        assert texts(batch.item) == [tables.items[row] for row in rows]
        np.testing.assert_array_equal(batch.user_features, tables.features[tables.log["positive.user"][clicks]])
        mask = [[row not in tables.clicked[query] for row in rows] for query in queries]
        np.testing.assert_array_equal(batch.negative_mask, mask)
        seen_masks.update(batch.negative_mask.ravel().tolist())
        labelled = {item for query in queries for item in tables.negatives[query]}
        assert labelled.issuperset(rows[batch_size : batch_size + supervised])
    assert seen_masks == {True, False} or negatives == 0


def test_types_and_shapes(click_store):
    dataset = examples_dataset(click_store, config(), FEATURES)
    batch = batches(dataset, 1)[0]
    assert isinstance(dataset.element_spec, Batch)

    def check(spec, value):
        assert spec.dtype == value.dtype and spec.shape.is_compatible_with(value.shape)

    tf.nest.map_structure(check, dataset.element_spec, batch)
    shapes = tf.nest.map_structure(lambda spec: spec.shape.as_list(), dataset.element_spec)
    assert shapes == Batch(([None], [9]), ([None], [15]), [14], [8, 2], [8], [8, 14])
    spec = training_input(dataset).element_spec
    assert set(spec) == {"batch"} and isinstance(spec["batch"], Batch)


def test_no_user_feature_is_asked_for(click_store):
    assert batches(examples_dataset(click_store, config()), 1)[0].user_features.shape == (8, 0)


def test_user_features_come_in_the_order_asked_for(click_store):
    both = batches(examples_dataset(click_store, config(), ("age", "gender")), 3)
    swapped = batches(examples_dataset(click_store, config(), ("gender", "age")), 3)
    for one, other in zip(both, swapped, strict=True):
        np.testing.assert_array_equal(one.user_features, other.user_features[:, ::-1])
    assert len({tuple(row) for batch in both for row in batch.user_features.tolist()}) > 5


def test_every_click_once_an_epoch(click_store, tables):
    orders = []
    stream = [
        click
        for batch in batches(examples_dataset(click_store, config(), num_epochs=3))
        for click in tables.clicks(batch)
    ]
    assert len(stream) == 3 * 240
    for epoch in range(3):
        orders.append(stream[epoch * 240 : (epoch + 1) * 240])
        assert sorted(orders[-1]) == list(range(240))
    assert len({tuple(order) for order in orders}) == 3, "shuffled anew each epoch"
    neighbours = sum(b == a + 1 for order in orders for a, b in itertools.pairwise(order))
    assert neighbours < 20, "a shuffle of the whole log, not of pieces"


def test_batches_cross_epochs_and_a_partial_one_is_left_out(click_store, tables):
    dataset = examples_dataset(click_store, config(batch_size=7), num_epochs=2)
    assert dataset.cardinality() == 480 // 7
    stream = [click for batch in batches(dataset) for click in tables.clicks(batch)]
    assert len(stream) == 480 // 7 * 7
    assert sorted(stream[:240]) == list(range(240))
    assert len(set(stream[240:])) == len(stream) - 240


def test_a_log_shorter_than_a_batch_repeats(click_store, tables):
    batch = batches(examples_dataset(click_store, config(batch_size=500)), 1)[0]
    counts = collections.Counter(tables.clicks(batch))
    assert len(counts) == 240 and set(counts.values()) == {2, 3}
    assert batches(examples_dataset(click_store, config(batch_size=500), num_epochs=2)) == []


@pytest.mark.parametrize("shards", [1, 3, 7, 40])
def test_shards_are_disjoint_and_complete(click_store, tables, shards):
    whole = [tables.clicks(b)[0] for b in batches(examples_dataset(click_store, config(1, 0), num_epochs=2))]
    for epoch in range(2):
        parts = []
        for shard in range(shards):
            dataset = examples_dataset(click_store, config(1, 0), num_epochs=2, shard_index=shard, num_shards=shards)
            stream = [tables.clicks(batch)[0] for batch in batches(dataset)]
            assert len(stream) == dataset.cardinality().numpy() and len(stream) % 2 == 0
            half = len(stream) // 2
            assert half in (240 // shards, 240 // shards + 1)
            parts.append(stream[epoch * half : (epoch + 1) * half])
        assert sorted(click for part in parts for click in part) == list(range(240))
        assert [parts[i % shards][i // shards] for i in range(240)] == whole[epoch * 240 : (epoch + 1) * 240]


def test_shards_draw_negatives_of_their_own(click_store):
    one, other = (
        batches(examples_dataset(click_store, config(2, 50), shard_index=i, num_shards=2), 1)[0] for i in (0, 1)
    )
    assert (one.item_rows[2:] != other.item_rows[2:]).any()


def test_a_shard_beyond_the_log_is_empty(click_store):
    dataset = examples_dataset(click_store, config(1, 0), shard_index=240, num_shards=241)
    assert batches(dataset) == [] and dataset.cardinality() == 0


def test_seed(click_store):
    def first(seed):
        return batches(examples_dataset(click_store, config(seed=seed), FEATURES), 20)

    same(first(1), first(1))
    assert differ(first(1), first(2))
    negatives = [np.concatenate([batch.item_rows[8:] for batch in first(seed)]) for seed in (1, 2)]
    assert (negatives[0] != negatives[1]).mean() > 0.9


def test_negatives_are_uniform_over_all_items(click_store):
    rows = np.concatenate([b.item_rows[4:] for b in batches(examples_dataset(click_store, config(4, 300)), 200)])
    counts = np.bincount(rows, minlength=60)
    expected = len(rows) / 60
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 20 < chi_square < 120, "59 degrees of freedom: far outside only if not uniform, or not random"


def test_negatives_change_with_the_step(click_store):
    steps = batches(examples_dataset(click_store, config()), 50)
    assert len({tuple(batch.item_rows[8:].tolist()) for batch in steps}) == 50


@pytest.mark.parametrize("first_step", [0, 1, 29, 30, 75])
def test_first_step_equals_skipping(click_store, first_step):
    options = config(num_supervised_negatives=2, num_title_queries=3)
    skipped = batches(examples_dataset(click_store, options, FEATURES).skip(first_step), 5)
    same(batches(examples_dataset(click_store, options, FEATURES, first_step=first_step), 5), skipped)


def test_first_step_beyond_the_end(click_store):
    dataset = examples_dataset(click_store, config(), num_epochs=1, first_step=30)
    assert dataset.cardinality() == 0 and batches(dataset) == []
    assert examples_dataset(click_store, config(), num_epochs=1, first_step=28).cardinality() == 2
    assert examples_dataset(click_store, config()).cardinality() == tf.data.INFINITE_CARDINALITY


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("num_epochs", [None, 1])
def test_iterator_checkpoint_restores_mid_stream(click_store, tmp_path, prefetch, num_epochs):
    def fresh():
        dataset = examples_dataset(click_store, config(), FEATURES, num_epochs=num_epochs)
        return iter(dataset.prefetch(prefetch) if prefetch else dataset)

    def take(iterator, count):
        return [tf.nest.map_structure(lambda t: t.numpy(), next(iterator)) for _ in range(count)]

    iterator = fresh()
    take(iterator, 4)
    path = tf.train.Checkpoint(iterator=iterator).save(str(tmp_path / "checkpoint"))
    expected = take(iterator, 6)
    restored = fresh()
    take(restored, 1)
    tf.train.Checkpoint(iterator=restored).restore(path).assert_consumed()
    same(take(restored, 6), expected)
    if num_epochs:
        assert len(list(restored)) == 30 - 10, "the end is where it was"


def test_prefetch_and_parallel_readers_change_nothing(click_store):
    plain = batches(examples_dataset(click_store, config()), 20)
    same(batches(examples_dataset(click_store, config()).prefetch(4), 20), plain)
    two = tf.data.Dataset.zip((examples_dataset(click_store, config()), examples_dataset(click_store, config())))
    for one, other in two.take(5):
        same([one], [other])


def test_inside_a_function_and_from_a_graph(click_store):
    expected = batches(examples_dataset(click_store, config()), 3)

    @tf.function
    def rows():
        total = tf.zeros([0, 14], tf.int32)
        for batch in examples_dataset(click_store, config()).take(3):
            tf.autograph.experimental.set_loop_options(shape_invariants=[(total, tf.TensorShape([None, 14]))])
            total = tf.concat([total, batch.item_rows[tf.newaxis]], axis=0)
        return total

    np.testing.assert_array_equal(rows(), [batch.item_rows for batch in expected])
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        batch = tf.compat.v1.data.make_one_shot_iterator(examples_dataset(click_store, config())).get_next()
        same([session.run(batch) for _ in range(3)], expected)


# Title queries: a random item under a piece of its own text.


def is_piece(piece, text):
    """Whether the tokens of `piece` stand in `text` in this order."""
    rest = iter(text)
    return all(token in rest for token in piece)


def test_title_queries(click_store, tables):
    titles, options = 5, config(8, 6, num_title_queries=5)
    items, lengths = set(), []
    for batch in batches(examples_dataset(click_store, options, FEATURES), 40):
        rows = batch.item_rows.tolist()
        clicks = tables.clicks(batch, titles)
        assert rows[:3] == tables.log["positive.item"][clicks].tolist()
        queries = texts(batch.query)
        assert queries[:3] == [tables.queries[query] for query in tables.log["positive.query"][clicks].tolist()]
        for i in range(3, 8):
            assert is_piece(queries[i], tables.items[rows[i]])
            assert batch.negative_mask[i].tolist() == [row != rows[i] for row in rows]
            items.add(rows[i])
            lengths.append(len(queries[i]) / len(tables.items[rows[i]]))
        assert (batch.weights[3:] == 1).all() and not batch.user_features[3:].any()
    assert len(items) > 50 and min(lengths) < 0.5 < max(lengths)


def test_clicks_once_an_epoch_beside_title_queries(click_store, tables):
    dataset = examples_dataset(click_store, config(8, 6, num_title_queries=5), num_epochs=1)
    assert dataset.cardinality() == 80
    assert sorted(click for batch in batches(dataset) for click in tables.clicks(batch, 5)) == list(range(240))


# Errors.


def create(store, **changes):
    """The op with these arguments instead of good ones."""
    arguments = {
        "users": str(store.users_path),
        "items": str(store.items_path),
        "interactions": str(store.interactions_path),
        "batch_size": 8,
        "num_title_queries": 0,
        "num_shared_negatives": 6,
        "num_supervised_negatives": 0,
        "seed": 1,
        "num_epochs": 0,
        "shard_index": 0,
        "num_shards": 1,
        "first_step": 0,
        "user_features": [],
    }
    assert set(changes) <= set(arguments)
    return ops.load().dpsr_examples_dataset(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"batch_size": -3}, "batch_size is -3, expected 1 or more"),
        ({"batch_size": 2**20 + 1}, "batch_size 1048577 .*expected at most 1048576"),
        ({"num_shared_negatives": -1}, "num_shared_negatives is -1, expected 0 or more"),
        ({"num_shared_negatives": 2**40}, "num_shared_negatives 1099511627776, expected at most 1048576"),
        ({"num_supervised_negatives": -1}, "num_supervised_negatives is -1, expected 0 or more"),
        ({"num_supervised_negatives": 7}, "num_supervised_negatives is 7, expected at most num_shared_negatives, 6"),
        ({"num_title_queries": -1}, "num_title_queries is -1, expected 0 to batch_size - 1, 7"),
        ({"num_title_queries": 8}, "num_title_queries is 8, expected 0 to batch_size - 1, 7"),
        ({"num_epochs": -1}, "num_epochs is -1, expected 0 or more"),
        ({"num_epochs": 2**62}, "num_epochs is 4611686018427387904, expected "),
        ({"num_shards": 0}, "num_shards is 0, expected 1 or more"),
        ({"num_shards": 2**63 - 1}, "num_shards is 9223372036854775807, expected "),
        ({"shard_index": -1}, "shard_index is -1, expected 0 to num_shards - 1, 0"),
        ({"shard_index": 3, "num_shards": 3}, "shard_index is 3, expected 0 to num_shards - 1, 2"),
        ({"first_step": -1}, "first_step is -1, expected 0 to"),
        ({"first_step": 2**62}, "first_step is 4611686018427387904, expected "),
    ],
)
def test_bad_arguments_name_got_and_expected(click_store, changes, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        create(click_store, **changes)


def test_bad_arguments_in_a_graph_fail_when_it_runs(click_store):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        handle = create(click_store, batch_size=0)
        with pytest.raises(tf.errors.InvalidArgumentError, match="batch_size is 0, expected 1 or more"):
            session.run(tf.raw_ops.DatasetCardinality(input_dataset=handle))


@pytest.mark.parametrize("name", ["users", "items", "interactions"])
def test_damaged_files_are_named(store, name):
    path = getattr(store, f"{name}_path")
    data = path.read_bytes()
    for damaged, error in (
        (data[:-1], tf.errors.DataLossError),
        (b"", tf.errors.DataLossError),
        (data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :], tf.errors.DataLossError),
        (data[:8] + b"\2" + data[9:], (tf.errors.FailedPreconditionError, tf.errors.DataLossError)),
    ):
        path.write_bytes(damaged)
        with pytest.raises(error, match=str(path)):
            create(store)
    shutil.copy(store.vocabulary_path, path)
    with pytest.raises(tf.errors.FailedPreconditionError, match=f'{path}.*kind "vocabulary", expected "{name}"'):
        create(store)
    path.unlink()
    with pytest.raises(tf.errors.NotFoundError, match=str(path)):
        create(store)


def test_unknown_user_feature(click_store):
    with pytest.raises(tf.errors.NotFoundError, match=r"users\.dpsr: no user feature 'income'.*schema"):
        examples_dataset(click_store, config(), ("age", "income"))


def test_files_that_do_not_belong_together(click_store, store):
    shutil.copy(click_store.interactions_path, store.interactions_path)
    message = r"interactions\.dpsr: section positive\.\w+ row \d+ refers to row \d+ of \d+ (users|items)"
    with pytest.raises(tf.errors.DataLossError, match=message):
        create(store)


def rewrite(path, kind, **changes):
    """The file with these sections instead of its own."""
    sections = {name: np.array(values) for name, values in PackedFile(path, kind).items()}
    sections |= {name.replace("__", "."): values for name, values in changes.items()}
    with PackedFileWriter(path, kind) as file:
        for name, values in sections.items():
            file.add(name, values)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("items", {"tokens__splits": np.array([0, 5], np.int64)}, "tokens.splits does not span"),
        ("items", {"tokens__splits": np.array([], np.int64)}, "tokens.splits does not span"),
        ("items", {"tokens__splits": np.zeros(8, np.int32)}, "tokens.splits"),
        (
            "interactions",
            {"positive__item": np.array([0, 1, 2, 3, 4, 7], np.int32)},
            "positive.item row 5 refers to row 7",
        ),
        (
            "interactions",
            {"positive__item": np.array([-1, 1, 2, 3, 4, 5], np.int32)},
            "positive.item row 0 refers to row -1",
        ),
        ("interactions", {"positive__user": np.zeros(5, np.int32)}, "positive.user has 5 rows, expected 6"),
        ("interactions", {"negative__item": np.array([0, 1, 99], np.int32)}, "negative.item row 2 refers to row 99"),
        ("interactions", {"query__splits": np.array([0, 9, 3, 3, 3, 3], np.int64)}, "query.splits"),
        ("users", {"id": np.array([-1], np.int64)}, "positive.user row . refers to row"),
    ],
)
def test_sections_that_do_not_fit(store, name, changes, message):
    path = getattr(store, f"{name}_path")
    rewrite(path, name, **changes)
    with pytest.raises(tf.errors.DataLossError, match=message):
        create(store)


def test_positives_that_are_not_those_of_their_query(store):
    """The splits say whose rows they are, and so does positive.query: a mask from wrong rows would train on clicks."""
    queries = store.interactions()["positive.query"][::-1].copy()
    rewrite(store.interactions_path, "interactions", positive__query=queries)
    with pytest.raises(tf.errors.DataLossError, match=r"positive\.query"):
        create(store)


def test_tokens_beyond_the_vocabulary_are_refused(store):
    values = store.items()["tokens.values"].copy()
    values[3] = store.vocabulary.num_ids
    rewrite(store.items_path, "items", tokens__values=values)
    with pytest.raises((CommandError, tf.errors.DataLossError), match=r"items\.dpsr"):
        batches(examples_dataset(Store(store.path), config()), 1)


def test_shape_function(click_store):
    with tf.Graph().as_default():
        assert create(click_store).shape == []
        unknown = tf.compat.v1.placeholder(tf.int64)
        assert create(click_store, batch_size=unknown).shape == []
        for name in ("users", "items", "interactions"):
            with pytest.raises(ValueError, match="Shape must be rank 0 but is rank 1"):
                create(click_store, **{name: ["a", "b"]})
        for name in ("batch_size", "num_shared_negatives", "seed", "num_epochs", "shard_index", "first_step"):
            with pytest.raises(ValueError, match="Shape must be rank 0 but is rank 1"):
                create(click_store, **{name: [1]})


def test_arguments_that_are_no_scalars(click_store):
    with pytest.raises(tf.errors.InvalidArgumentError, match="scalar"):
        create(click_store, batch_size=tf.constant([8], tf.int64))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        size = tf.compat.v1.placeholder(tf.int64)
        cardinality = tf.raw_ops.DatasetCardinality(input_dataset=create(click_store, batch_size=size))
        with pytest.raises(tf.errors.InvalidArgumentError, match="scalar"):
            session.run(cardinality, {size: [8]})
        assert session.run(cardinality, {size: 8}) == -1
