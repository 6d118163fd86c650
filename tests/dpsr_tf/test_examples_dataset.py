from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest
import tensorflow as tf
from store_builder import SmallStore, numbers_of, queries_of, random_store, title_of, write_file

from dpsr_common.errors import UsageError
from dpsr_common.packed_file import FormatError, PackedFile
from dpsr_export.request_tables import ItemTable
from dpsr_tf import ops
from dpsr_tf.config import TrainConfig
from dpsr_tf.data.examples_dataset import (
    Batch,
    BatchOptions,
    History,
    Tokens,
    examples_dataset,
    training_input,
)
from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.data.store import Store, interactions_names
from dpsr_tf.models.features import Feature
from dpsr_tokenizer import Vocabulary

USER_FEATURES = ("profile1", "interests", "profile0")
ITEM_FEATURES = ("note", "code1", "tags", "code0")
EVERYTHING = {
    "num_title_queries": 2,
    "title_typo_rate": 0.2,
    "num_supervised_negatives": 2,
    "num_own_negatives": 3,
    "own_negative_source": "both",
    "user_features": USER_FEATURES,
    "item_features": ITEM_FEATURES,
    "history_length": 4,
    "history_text": True,
    "history_features": ("tags", "code0"),
    "query_history_length": 3,
}


def options(batch_size=8, negatives=6, **more):
    return BatchOptions(batch_size=batch_size, num_random_negatives=negatives, **more)


def batches(dataset, count=None):
    """Batches as NumPy arrays, in a list."""
    return list((dataset if count is None else dataset.take(count)).as_numpy_iterator())


def take(iterator, count):
    return [tf.nest.map_structure(lambda t: t.numpy(), next(iterator)) for _ in range(count)]


def texts(tokens):
    """Tokens of a batch as a list of lists."""
    assert tokens.row_splits[0] == 0 and tokens.row_splits[-1] == len(tokens.values)
    return split(tokens.values, tokens.row_splits)


def split(values, splits):
    return [piece.tolist() for piece in np.split(values, splits[1:-1])] if len(splits) > 1 else []


def same(ones, others):
    """Asserts that two lists of batches are equal, bit for bit."""
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)


class Rows:
    """A store as NumPy and plain Python read it; queries by global row."""

    def __init__(self, store):
        self.items = PackedFile(store.path / "items.dpsr", "items")
        self.users = PackedFile(store.path / "users.dpsr", "users")
        self.item_text = self.lists(self.items, "tokens.splits", "tokens.values")
        self.features = {"items": self._features(self.items), "users": self._features(self.users)}
        self.queries, self.negatives = [], []
        self.clicks = {}  # by weight, which is each click's own
        self.clicked = collections.defaultdict(set)
        self.shard_of = {}
        for shard, name in enumerate(interactions_names(store.manifest["shards"])):
            log = PackedFile(store.path / name, "interactions")
            first = len(self.queries)
            self.queries += self.lists(log, "query.splits", "query.tokens")
            self.negatives += self.lists(log, "negative.splits", "negative.item")
            shown = self.lists(log, "impression.splits", "impression.item")
            requests = [shown[row] if row >= 0 else [] for row in log["positive.request"].tolist()]
            columns = [queries_of(log), *(log[f"positive.{name}"] for name in ("user", "item", "time", "type"))]
            columns = [column.tolist() for column in (*columns, numbers_of(log, "positive.label"))]
            weights = numbers_of(log, "positive.weight").tolist()
            for weight, request, *row in zip(weights, requests, *columns, strict=True):
                self.clicks[weight] = [first + row[0], *row[1:], request]
                self.clicked[first + row[0]].add(row[2])
                self.shard_of[weight] = shard
        splits = self.users["event.splits"]
        columns = [self.users[f"event.{name}"].tolist() for name in ("time", "item", "query", "type")]
        events = list(zip(*columns, strict=True))
        self.events = [events[a:b] for a, b in itertools.pairwise(splits)]

    def of(self, batch, title_queries=0):
        """(query, user, item, time, type, label, request) of each example from the log."""
        return [self.clicks[weight] for weight in batch.weights.tolist()[: len(batch.weights) - title_queries]]

    def check_features(self, table, names, rows, features):
        fixed = [name for name in names if f"feature.{name}" in getattr(self, table)]
        expected = np.array([[self.features[table][name][row] for name in fixed] for row in rows], np.int32)
        np.testing.assert_array_equal(features.codes, expected.reshape(len(rows), len(fixed)))
        lists = [name for name in names if name not in fixed]
        assert len(lists) == len(features.lists)
        for name, column in zip(lists, features.lists, strict=True):
            assert texts(column) == [self.features[table][name][row] for row in rows]

    @staticmethod
    def lists(file, splits, values):
        return split(file[values], file[splits])

    def _features(self, file):
        fixed = {name[8:]: file[name].tolist() for name in file if name.startswith("feature.") and "." not in name[8:]}
        lists = [name[8:-7] for name in file if name.startswith("feature.") and name.endswith(".splits")]
        return fixed | {name: self.lists(file, f"feature.{name}.splits", f"feature.{name}.values") for name in lists}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return random_store(tmp_path_factory.mktemp("dataset") / "store", seed=1, shards=3)


@pytest.fixture(scope="module")
def rows(small):
    return Rows(small)


@pytest.fixture
def fresh(tmp_path):
    """A store that may be damaged."""
    return random_store(tmp_path / "store", seed=2, num_positives=60, num_items=20, num_queries=10)


def test_the_store_has_what_these_tests_need(rows):
    assert len(rows.clicks) == 240 and len(rows.queries) == 30 and len(rows.item_text) == 60
    assert {len(text) for text in rows.item_text} >= {0, 6}
    assert rows.events[0] == [] and sum(click[1] == 0 for click in rows.clicks.values()) > 5
    ties = sum(event[0] == click[3] for click in rows.clicks.values() for event in rows.events[click[1]])
    assert ties > 300, "every click is an event at its own time, some are at another's"


@pytest.mark.parametrize(
    "chosen",
    [
        options(),
        options(1, 0, num_own_negatives=1),
        options(64, 64, **EVERYTHING),
        options(300, 1, history_length=1000, query_history_length=1000, history_types=("cart", "order")),
        options(5, 3, num_supervised_negatives=3, num_own_negatives=2, own_negative_source="labels"),
        options(16, 200, item_features=("code1",), history_features=ITEM_FEATURES, history_length=2),
    ],
    ids=["plain", "one", "everything", "long", "labels", "wide"],
)
def test_batches_equal_a_numpy_reading_of_the_store(small, rows, chosen):
    o, b = chosen, chosen.batch_size
    shared = b + o.num_random_negatives
    masks, own_masks, histories = set(), set(), set()
    for batch in batches(examples_dataset(small, o), 12):
        clicks = rows.of(batch, o.num_title_queries)
        log = len(clicks)
        queries, users, items, times, types, labels, requests = (list(column) for column in zip(*clicks, strict=True))
        item_rows = batch.item_rows.tolist()
        assert item_rows[:log] == items
        assert batch.query_rows.tolist() == queries + [-1] * o.num_title_queries
        assert texts(batch.query)[:log] == [rows.queries[query] for query in queries]
        assert texts(batch.item) == [rows.item_text[row] for row in item_rows]
        rows.check_features("items", o.item_features, item_rows, batch.item_features)
        assert batch.user_rows.tolist() == users + [0] * o.num_title_queries
        rows.check_features("users", o.user_features, batch.user_rows, batch.user_features)
        assert batch.labels.tolist() == labels + [1] * o.num_title_queries
        assert batch.types.tolist() == types + [EVENT_TYPES.index("click")] * o.num_title_queries

        expected = [[row not in rows.clicked[query] for row in item_rows[:shared]] for query in queries]
        expected += [[row != item_rows[i] for row in item_rows[:shared]] for i in range(log, b)]
        np.testing.assert_array_equal(batch.negative_mask, expected)
        masks.update(batch.negative_mask.ravel().tolist())
        labelled = {item for query in queries for item in rows.negatives[query]}
        if all(rows.negatives[query] for query in queries):
            assert labelled.issuperset(item_rows[b : b + o.num_supervised_negatives])

        m = o.num_own_negatives
        for i in range(b):
            known = set()
            if i < log and o.own_negative_source != "labels":
                known.update(requests[i])
            if i < log and o.own_negative_source != "impressions":
                known.update(rows.negatives[queries[i]])
            own = item_rows[shared + i * m : shared + (i + 1) * m]
            there = batch.own_negative_mask[i].tolist()
            drawn = [item for item, ok in zip(own, there, strict=True) if ok]
            assert len(set(drawn)) == len(drawn) == min(m, len(known)) and known.issuperset(drawn)
            assert not any(item for item, ok in zip(own, there, strict=True) if not ok)
            own_masks.update(there)

        past_items, past_types = texts(batch.history.items), split(batch.history.types, batch.history.items.row_splits)
        past_queries = split(np.array(texts(batch.history.query), object), batch.history.query_splits)
        assert len(past_items) == len(past_queries) == b
        kept = [EVENT_TYPES.index(name) for name in o.history_types or EVENT_TYPES]
        for i in range(b):
            before = [event for event in rows.events[users[i]] if event[0] < times[i]] if i < log else []
            events = [event for event in before if event[3] in kept]
            events = events[len(events) - min(len(events), o.history_length) :]
            assert past_items[i] == [event[1] for event in events]
            assert past_types[i] == [event[3] for event in events]
            asked = [query for query, _ in itertools.groupby(event[2] for event in before)]
            asked = asked[len(asked) - min(len(asked), o.query_history_length) :]
            assert list(map(list, past_queries[i])) == [rows.queries[query] for query in asked]
            histories.add(len(events))
        history_rows = batch.history.items.values.tolist()
        rows.check_features("items", o.history_features, history_rows, batch.history.features)
        assert texts(batch.history.text) == [rows.item_text[row] for row in history_rows if o.history_text]
    assert masks == {True, False} or o.num_random_negatives == 0
    assert own_masks == ({True, False} if o.num_own_negatives else set())
    assert len(histories) > min(2, o.history_length)


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["plain", "everything"])
def test_types_and_shapes(small, more):
    dataset = examples_dataset(small, options(**more))

    def check(spec, value):
        assert spec.dtype == value.dtype and spec.shape.is_compatible_with(value.shape), (spec, value)

    assert isinstance(dataset.element_spec, Batch)
    for batch in batches(dataset, 3):
        assert isinstance(batch, Batch) and isinstance(batch.history, History) and isinstance(batch.query, Tokens)
        tf.nest.map_structure(check, dataset.element_spec, batch)
    spec = training_input(dataset).element_spec
    assert set(spec) == {"batch"} and isinstance(spec["batch"], Batch)
    shapes = tf.nest.map_structure(lambda tensor: tensor.shape.as_list(), dataset.element_spec)
    if not more:
        assert shapes == Batch(
            query=([None], [9]),
            query_rows=[8],
            item=([None], [15]),
            item_rows=[14],
            item_features=([14, 0], ()),
            user_rows=[8],
            user_features=([8, 0], ()),
            history=(([None], [9]), [None], ([None], [1]), ([None, 0], ()), [9], ([None], [None])),
            weights=[8],
            labels=[8],
            types=[8],
            negative_mask=[8, 14],
            own_negative_mask=[8, 0],
        )
    else:
        assert shapes.item_rows == [8 + 6 + 24] and shapes.own_negative_mask == [8, 3]
        assert shapes.user_features.codes == [8, 2] and len(shapes.item_features.lists) == 2


def test_a_mask_that_nobody_asks_for(small):
    without = examples_dataset(small, options(negative_mask=False))
    for batch, whole in zip(batches(without, 3), batches(examples_dataset(small, options()), 3), strict=True):
        assert batch.negative_mask.shape == (8, 0) and without.element_spec.negative_mask.shape == [8, 0]
        assert whole.negative_mask.shape == (8, 14)
        same([batch._replace(negative_mask=whole.negative_mask)], [whole])


def test_options_of_a_config(small):
    config = TrainConfig(
        batch_size=16, num_random_negatives=4, num_own_negatives=2, own_negative_source="labels", num_title_queries=3
    )
    chosen = BatchOptions.from_config(config, history_length=5)
    assert (chosen.batch_size, chosen.own_negative_source, chosen.history_length) == (16, "labels", 5)
    assert batches(examples_dataset(small, chosen), 1)[0].item_rows.shape == (16 + 4 + 32,)


@pytest.mark.parametrize("buffer", [1, 1 << 20])
def test_every_click_once_an_epoch(small, buffer):
    dataset = examples_dataset(small, options(shuffle_buffer=buffer), num_epochs=3)
    stream = [weight for batch in batches(dataset) for weight in batch.weights.tolist()]
    orders = [stream[epoch * 240 : (epoch + 1) * 240] for epoch in range(3)]
    assert [sorted(order) for order in orders] == [list(range(1, 241))] * 3
    assert len({tuple(order) for order in orders}) == 3, "shuffled anew each epoch"


def test_batches_cross_epochs_and_a_partial_one_is_left_out(small):
    dataset = examples_dataset(small, options(7), num_epochs=2)
    assert dataset.cardinality() == 480 // 7
    stream = [weight for batch in batches(dataset) for weight in batch.weights.tolist()]
    assert len(stream) == 480 // 7 * 7
    assert sorted(stream[:240]) == list(range(1, 241))
    assert len(set(stream[240:])) == len(stream) - 240


def test_a_log_shorter_than_a_batch_repeats(small):
    counts = collections.Counter(batches(examples_dataset(small, options(500)), 1)[0].weights.tolist())
    assert len(counts) == 240 and set(counts.values()) == {2, 3}
    assert batches(examples_dataset(small, options(500), num_epochs=2)) == []


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7, 40])
def test_shards_are_disjoint_and_complete(small, rows, shards):
    epochs = [], []
    for shard in range(shards):
        dataset = examples_dataset(small, options(1, 0), num_epochs=2, shard_index=shard, num_shards=shards)
        stream = [batch.weights.tolist()[0] for batch in batches(dataset)]
        half = len(stream) // 2
        assert len(stream) == dataset.cardinality().numpy()
        epochs[0].extend(stream[:half])
        epochs[1].extend(stream[half:])
        if shards <= 3:
            assert {rows.shard_of[weight] % shards for weight in stream} == {shard}, "files of its own"
        else:
            assert half in (240 // shards, 240 // shards + 1)
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 241))] * 2


def test_a_worker_does_not_read_what_others_read(tmp_path):
    store = random_store(tmp_path / "two", shards=2)
    other = store.path / interactions_names(store.manifest["shards"])[1]
    sections = dict(PackedFile(other, "interactions").items())
    sections["positive.item"] = sections["positive.item"] + 10**6
    write_file(other, "interactions", sections)
    assert batches(examples_dataset(store, options(), num_shards=2), 1)
    with pytest.raises(tf.errors.DataLossError, match=f"{other}: section positive.item row 0 refers to row 10"):
        examples_dataset(store, options(), shard_index=1, num_shards=2)


def test_a_worker_opens_the_files_of_others_for_histories_of_queries_only(tmp_path):
    store = random_store(tmp_path / "two", shards=2)
    other, own = (store.path / name for name in interactions_names(2))

    def dataset(**more):
        return examples_dataset(store, options(history_length=3, **more), shard_index=1, num_shards=2)

    expected = batches(dataset(), 9)
    counts = [len(PackedFile(path, "interactions")["query.splits"]) - 1 for path in (other, own)]
    store.manifest["shard_queries"] = counts
    other.unlink()
    same(batches(dataset(), 9), expected)
    with pytest.raises(tf.errors.NotFoundError, match=str(other)):
        dataset(query_history_length=3)
    store.manifest["shard_queries"] = [counts[0], counts[1] + 1]
    with pytest.raises(tf.errors.DataLossError, match=f"{own}: has {counts[1]} queries, the manifest says"):
        dataset()


def test_seed_and_shard_draw_negatives_of_their_own(small):
    def negatives(seed=1, **shard):
        return np.stack(
            [b.item_rows[8:] for b in batches(examples_dataset(small, options(8, 50, seed=seed), **shard), 9)]
        )

    first = negatives()
    np.testing.assert_array_equal(first, negatives())
    for other in (negatives(seed=2), negatives(shard_index=0, num_shards=9), first[::-1]):
        assert (first != other).mean() > 0.8


def test_negatives_are_uniform_over_all_items(small):
    drawn = np.concatenate([b.item_rows[4:] for b in batches(examples_dataset(small, options(4, 300)), 200)])
    counts = np.bincount(drawn, minlength=60)
    expected = len(drawn) / 60
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 20 < chi_square < 120, "59 degrees of freedom: far outside only if not uniform, or not random"


@pytest.mark.parametrize("first_step", [0, 1, 29, 30, 75])
def test_first_step_equals_skipping(small, first_step):
    skipped = batches(examples_dataset(small, options(**EVERYTHING)).skip(first_step), 5)
    same(batches(examples_dataset(small, options(**EVERYTHING), first_step=first_step), 5), skipped)


def test_first_step_beyond_the_end(small):
    dataset = examples_dataset(small, options(), num_epochs=1, first_step=30)
    assert dataset.cardinality() == 0 and batches(dataset) == []
    assert examples_dataset(small, options(), num_epochs=1, first_step=28).cardinality() == 2
    assert examples_dataset(small, options()).cardinality() == tf.data.INFINITE_CARDINALITY


# Ahead and in parallel.


@pytest.mark.parametrize("calls", [1, 2, 7, 100])
def test_parallel_assembly_changes_nothing(small, calls):
    plain = batches(examples_dataset(small, options(**EVERYTHING), num_epochs=3))
    parallel = examples_dataset(small, options(**EVERYTHING, num_parallel_calls=calls), num_epochs=3)
    assert parallel.cardinality() == len(plain)
    same(batches(parallel), plain)
    same(batches(parallel.prefetch(2), 5), plain[:5])


def test_iterators_that_are_left_leave_no_thread(small):
    dataset = examples_dataset(small, options(256, 256, **EVERYTHING, num_parallel_calls=16))
    next(iter(dataset))  # TensorFlow's own pools exist from now on
    before = threading.active_count(), _threads()
    for _ in range(30):
        iterator = iter(dataset)
        next(iterator)
        del iterator  # while batches are being assembled
    assert (threading.active_count(), _threads()) == before


def _threads():
    with open("/proc/self/status") as file:
        return next(line for line in file if line.startswith("Threads:"))


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("num_epochs", [None, 1])
@pytest.mark.parametrize("calls", [0, 4])
def test_iterator_checkpoint_restores_mid_stream(small, tmp_path, prefetch, num_epochs, calls):
    def new():
        dataset = examples_dataset(small, options(num_own_negatives=1, num_parallel_calls=calls), num_epochs=num_epochs)
        return iter(dataset.prefetch(prefetch) if prefetch else dataset)

    iterator = new()
    take(iterator, 4)
    path = tf.train.Checkpoint(iterator=iterator).save(str(tmp_path / "checkpoint"))
    expected = take(iterator, 6)
    restored = new()
    take(restored, 1)
    tf.train.Checkpoint(iterator=restored).restore(path).assert_consumed()
    same(take(restored, 6), expected)
    if num_epochs:
        assert len(list(restored)) == 30 - 10, "the end is where it was"


def test_two_readers_in_one_pipeline(small):
    two = tf.data.Dataset.zip((examples_dataset(small, options()), examples_dataset(small, options())))
    for one, other in two.take(5):
        same([one], [other])


def test_inside_a_function_and_from_a_graph(small):
    chosen = options(**EVERYTHING, num_parallel_calls=2)
    expected = batches(examples_dataset(small, chosen), 3)

    @tf.function
    def item_rows():
        total = tf.zeros([0, 38], tf.int32)
        for batch in examples_dataset(small, chosen).take(3):
            tf.autograph.experimental.set_loop_options(shape_invariants=[(total, tf.TensorShape([None, 38]))])
            total = tf.concat([total, batch.item_rows[tf.newaxis]], axis=0)
        return total

    np.testing.assert_array_equal(item_rows(), [batch.item_rows for batch in expected])
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        batch = tf.compat.v1.data.make_one_shot_iterator(examples_dataset(small, chosen)).get_next()
        same([session.run(batch) for _ in range(3)], expected)


# Title queries: a random item under a piece of its own text.


def is_piece(piece, text):
    """Whether the tokens of `piece` stand in `text` in this order."""
    rest = iter(text)
    return all(token in rest for token in piece)


def test_title_queries(small, rows):
    vocabulary = Vocabulary(str(small.path / "vocabulary.dpsr"))
    items, lengths = set(), []
    for batch in batches(examples_dataset(small, options(num_title_queries=5)), 40):
        queries = texts(batch.query)
        for i in range(3, 8):
            row = batch.item_rows[i]
            title = vocabulary.encode(title_of(rows.item_text[row])).tolist()
            assert is_piece(queries[i], title) and len(queries[i]) >= min(1, len(title))
            items.add(row)
            lengths.append(len(queries[i]) / max(1, len(title)))
    assert len(items) > 50 and min(lengths) < 0.5 < max(lengths)


def test_titles_alone_need_no_log(shop, tmp_path, dpsr):
    del shop.schema["interactions"], shop.schema["users"]
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    store = Store(tmp_path / "store")
    found = batches(examples_dataset(store, options(num_title_queries=8)), 30)
    assert {row for batch in found for row in batch.item_rows[:8].tolist()} == set(range(len(shop.items)))
    assert all((batch.query_rows == -1).all() for batch in found)
    # The same batches, whatever the log holds.
    np.testing.assert_array_equal(
        found[7].item_rows,
        next(iter(batches(examples_dataset(store, options(num_title_queries=8), first_step=7), 1))).item_rows,
    )
    with pytest.raises(tf.errors.FailedPreconditionError, match="has no positive interactions; ingest a log, or train"):
        batches(examples_dataset(store, options(num_title_queries=7)), 1)


def test_title_queries_with_typing_errors(small):
    vocabulary = Vocabulary(str(small.path / "vocabulary.dpsr"))
    unknown = {}
    for rate in (0.0, 0.1, 1.0):
        chosen = options(64, num_title_queries=63, title_typo_rate=rate)
        tokens = np.concatenate([batch.query.values[5:] for batch in batches(examples_dataset(small, chosen), 10)])
        assert tokens.min() >= 0
        unknown[rate] = np.mean(tokens >= len(vocabulary))
    # Five tokens at most are those of the query from the log, which is of another vocabulary.
    assert unknown[0.0] < 0.05 and 0.05 < unknown[0.1] < 0.25 and unknown[1.0] > 0.8


def test_queries_with_typing_errors(small, rows):
    vocabulary = Vocabulary(str(small.path / "vocabulary.dpsr"))
    plain = batches(examples_dataset(small, options(64)), 4)
    for rate, least, most in ((1e-9, 0.0, 0.0), (0.3, 0.3, 0.9)):
        changed = []
        for batch, other in zip(
            batches(examples_dataset(small, options(64, query_typo_rate=rate)), 4), plain, strict=True
        ):
            np.testing.assert_array_equal(batch.item_rows, other.item_rows)
            for query, row in zip(texts(batch.query), batch.query_rows, strict=True):
                changed.append(query != vocabulary.encode(title_of(rows.queries[row])).tolist())
        assert least <= np.mean(changed) <= most


def test_pretraining_is_on_title_queries_alone(small):
    chosen = options(**EVERYTHING)
    before = batches(examples_dataset(small, dataclasses.replace(chosen, pretrain_steps=3)), 6)
    for batch in before[:3]:
        assert (batch.query_rows == -1).all() and (batch.user_rows == 0).all() and (batch.weights == 1).all()
        assert not batch.own_negative_mask.any() and batch.history.items.row_splits[-1] == 0
    # Then the log from its beginning, here too where a training goes on in the middle of either part.
    for batch, first in zip(before[3:], batches(examples_dataset(small, chosen), 3), strict=True):
        np.testing.assert_array_equal(batch.query_rows, first.query_rows)
        np.testing.assert_array_equal(batch.item_rows[:6], first.item_rows[:6])
    for step in (2, 4):
        rest = examples_dataset(small, dataclasses.replace(chosen, pretrain_steps=3), first_step=step)
        same(batches(rest, 6 - step), before[step:])


# File systems.


@pytest.mark.parametrize("scheme", ["ram", "file"])
def test_stores_on_tensorflow_file_systems(small, tmp_path, scheme):
    root = f"{scheme}://{'' if scheme == 'ram' else tmp_path}/copy"
    tf.io.gfile.makedirs(root)
    for path in small.path.iterdir():
        tf.io.gfile.copy(str(path), f"{root}/{path.name}", overwrite=True)
    copy = SmallStore(root, small.manifest)
    chosen = options(**EVERYTHING)
    same(batches(examples_dataset(copy, chosen), 5), batches(examples_dataset(small, chosen), 5))
    with tf.io.gfile.GFile(f"{root}/items.dpsr", "rb") as file:
        data = file.read()
    for damaged, error in ((data[:-1], tf.errors.DataLossError), (b"", tf.errors.DataLossError)):
        with tf.io.gfile.GFile(f"{root}/items.dpsr", "wb") as file:
            file.write(damaged)
        with pytest.raises(error, match=f"{root}/items.dpsr"):
            examples_dataset(copy, chosen)
    tf.io.gfile.remove(f"{root}/items.dpsr")
    with pytest.raises(tf.errors.NotFoundError, match=f"{root}/items.dpsr"):
        examples_dataset(copy, chosen)


# The item table of serving.


def test_serving_reads_the_history_that_training_reads(small, rows):
    """A caller sends it as item ids, padded, with more than the model reads."""
    chosen = options(32, 0, history_length=4, history_text=True, history_features=ITEM_FEATURES)
    kinds = {feature["name"]: feature["kind"] for feature in small.manifest["features"]["items"]}
    table = ItemTable(small.path / "items.dpsr", [Feature(name, kinds[name]) for name in ITEM_FEATURES])
    ids, seen = rows.items["id"], set()
    for batch in batches(examples_dataset(small, chosen), 10):
        histories = np.split(ids[batch.history.items.values], batch.history.items.row_splits[1:-1])
        types = np.split(batch.history.types, batch.history.items.row_splits[1:-1])
        sent, names = np.full((32, 9), -1, np.int64), np.full((32, 9), "", object)
        for row, (history, of_row) in enumerate(zip(histories, types, strict=True)):
            if len(history) == 4:
                sent[row, :2] = ids[:2]  # older ones
            sent[row, 2] = 2**62  # never heard of
            places = [3, 4, 5, 7][: len(history)]
            sent[row, places] = history
            names[row, places] = [EVENT_TYPES[code] for code in of_row]
        found = table.history(tf.zeros([32], tf.string), tf.constant(sent), tf.constant(names), 4)
        for name in ("items", "types", "text", "features"):
            tf.nest.map_structure(np.testing.assert_array_equal, getattr(found, name), getattr(batch.history, name))
        seen.update(found.items.values.numpy().tolist())
    assert len(seen) > 40


# Errors.


INPUTS = ("users", "items", "interactions", "queries", "titles", "vocabulary", "graph", "first_step")
OPTIONS = options(
    shuffle_buffer=100,
    num_own_negatives=1,
    user_features=("profile0", "profile1", "interests"),
    item_features=("code0", "code1", "tags", "note"),
    history_length=2,
    query_history_length=2,
)


def create(store, **changes):
    """The op with these inputs and options instead of good ones."""
    inputs = {name: str(store.path / f"{name}.dpsr") for name in INPUTS}
    inputs["interactions"] = [str(store.path / name) for name in interactions_names(store.manifest["shards"])]
    inputs |= {"queries": tf.zeros([0], tf.int64), "graph": tf.zeros([0], tf.string), "first_step": 0}
    message = json.loads(OPTIONS.message(store.manifest, num_epochs=0, shard_index=0, num_shards=1))
    assert set(changes) <= set(inputs | message)
    inputs |= {name: changes.pop(name) for name in INPUTS if name in changes}
    return ops.load().dpsr_examples_dataset(options=json.dumps(message | changes), **inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected 1 to 1048576"),
        ({"batch_size": -3}, "batch_size is -3, expected 1 to 1048576"),
        ({"batch_size": 2**20 + 1}, "batch_size is 1048577, expected 1 to 1048576"),
        ({"num_random_negatives": -1}, "num_random_negatives is -1, expected 0 to 1048576"),
        ({"num_random_negatives": 2**40}, "num_random_negatives is 1099511627776, expected 0 to 1048576"),
        ({"num_supervised_negatives": -1}, "num_supervised_negatives is -1, expected 0 to"),
        ({"num_supervised_negatives": 7}, "num_supervised_negatives is 7, expected at most num_random_negatives, 6"),
        ({"num_title_queries": -1}, "num_title_queries is -1, expected 0 to"),
        ({"num_title_queries": 9}, "num_title_queries is 9, expected at most batch_size, 8"),
        ({"pretrain_steps": -1}, "pretrain_steps is -1, expected 0 to"),
        ({"query_typo_rate": -0.5}, "query_typo_rate is -0.5, expected 0 to 1"),
        ({"title_subsampling": 2.0}, "title_subsampling is 2, expected 0 to 1"),
        ({"title_typo_rate": 1.5}, "title_typo_rate is 1.5, expected 0 to 1"),
        ({"num_own_negatives": -1}, "num_own_negatives is -1, expected 0 to"),
        ({"num_own_negatives": 2**21 + 1}, "num_own_negatives is 2097153, expected at most 2097152"),
        ({"own_negative_source": "none"}, 'own_negative_source is "none", expected one of impressions, labels, both'),
        ({"history_length": -1}, "history_length is -1, expected 0 to"),
        ({"history_length": 2**40}, "history_length is 1099511627776, expected 0 to 1048576"),
        ({"history_types": 32}, "history_types is 32, expected 0 to 31"),
        ({"graph_fan_out": [5, 0]}, "graph_fan_out is 0, expected numbers from 1 to 256"),
        ({"graph_fan_out": [1, 2, 3]}, "graph_fan_out is 3, expected at most 2 numbers"),
        ({"graph_fan_out": ["a"]}, "graph_fan_out is .*, expected a list of whole numbers"),
        ({"graph_sampling": "any"}, 'graph_sampling is "any", expected one of weighted, strongest'),
        ({"graph_dropout": 1.5}, "graph_dropout is 1.5, expected 0 to 1"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0, expected 1 to"),
        ({"num_parallel_calls": -1}, "num_parallel_calls is -1, expected 0 to 1024"),
        ({"num_epochs": -1}, "num_epochs is -1, expected 0 to"),
        ({"num_epochs": 2**62}, "num_epochs is 4611686018427387904, expected "),
        ({"num_shards": 0}, "num_shards is 0, expected 1 to"),
        ({"num_shards": 2**63 - 1}, "num_shards is 9223372036854775807, expected "),
        ({"shard_index": -1}, "shard_index is -1, expected 0 to"),
        ({"shard_index": 3, "num_shards": 3}, "shard_index is 3, expected at most num_shards - 1, 2"),
        ({"first_step": -1}, "first_step is -1, expected 0 to"),
        ({"first_step": 2**62}, "first_step is 4611686018427387904, expected "),
        ({"interactions": tf.zeros([0], tf.string)}, "no interactions file is given"),
        ({"queries": [1, 2]}, "queries has 2 numbers, expected one for each of the 3 interactions files"),
        ({"queries": [-1, 0, 0]}, "queries has the number -1, expected 0 to 2147483647"),
        ({"first_step": tf.constant([8], tf.int64)}, "scalar"),
    ],
)
def test_bad_arguments_name_got_and_expected(small, changes, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        create(small, **changes)


def test_bad_options_are_named_before_the_graph_runs(small):
    with (
        tf.Graph().as_default(),
        pytest.raises(tf.errors.InvalidArgumentError, match="shuffle_buffer is 0, expected 1 to"),
    ):
        examples_dataset(small, options(shuffle_buffer=0))


def test_bad_arguments_in_a_graph_fail_when_it_runs(small):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        handle = create(small, batch_size=0)
        with pytest.raises(tf.errors.InvalidArgumentError, match="batch_size is 0, expected 1 to 1048576"):
            session.run(tf.raw_ops.DatasetCardinality(input_dataset=handle))


def test_shape_function(small):
    with tf.Graph().as_default():
        assert create(small).shape == []
        assert create(small, first_step=tf.compat.v1.placeholder(tf.int64)).shape == []
        for name in ("users", "items", "titles", "vocabulary"):
            with pytest.raises(ValueError, match="Shape must be rank 0 but is rank 1"):
                create(small, **{name: ["a", "b"]})
        for name in ("interactions", "graph"):
            with pytest.raises(ValueError, match="Shape must be rank 1 but is rank 0"):
                create(small, **{name: "a"})
        with pytest.raises(ValueError, match="Shape must be rank 1 but is rank 0"):
            create(small, queries=1)
        with pytest.raises(ValueError, match="Shape must be rank 0 but is rank 1"):
            create(small, first_step=[1])


def test_unknown_names(small, tmp_path):
    with pytest.raises(UsageError, match="no feature 'income' of users, expected some of profile0, profile1, "):
        examples_dataset(small, options(user_features=("profile0", "income")))
    with pytest.raises(UsageError, match="history_types has 'view', expected some of impression, skip, click"):
        examples_dataset(small, options(history_types=("view",)))
    # The manifest knows one that the file has not.
    with pytest.raises(tf.errors.NotFoundError, match=r"items\.dpsr: no item feature 'price'.*schema"):
        create(small, item_features={"fixed": ["price"], "lists": []})
    without = random_store(tmp_path / "store", with_impressions=False)
    with pytest.raises(tf.errors.FailedPreconditionError, match="has no impressions to take negatives from"):
        examples_dataset(without, options(num_own_negatives=1))
    both = options(num_own_negatives=2, own_negative_source="both")
    assert batches(examples_dataset(without, both), 1)[0].own_negative_mask.any()


def test_files_in_the_wrong_place(fresh):
    (fresh.path / "users.dpsr").rename(fresh.path / "users")
    (fresh.path / "items.dpsr").rename(fresh.path / "users.dpsr")
    with pytest.raises(tf.errors.FailedPreconditionError, match='kind "items", expected "users"'):
        create(fresh)
    (fresh.path / "users.dpsr").unlink()
    with pytest.raises(tf.errors.NotFoundError, match=str(fresh.path / "users.dpsr")):
        create(fresh)


@pytest.mark.parametrize(
    "name",
    ["users.dpsr", *(pytest.param(name, marks=pytest.mark.long) for name in ("items.dpsr", "interactions.dpsr"))],
)
def test_every_damage_is_detected_at_open_or_at_read(fresh, name):
    """Flips of single bits and truncations anywhere: found by the op, or, in sections it does not read, by whoever
    reads them."""
    path = fresh.path / name
    data = path.read_bytes()
    rng = np.random.default_rng(3)
    refused = 0
    damages = [(int(at), int(bit)) for at, bit in np.c_[rng.integers(0, len(data), 1200), rng.integers(0, 8, 1200)]]
    damages += [(int(size), None) for size in rng.integers(0, len(data), 200)]
    for at, bit in damages:
        if bit is None:
            path.write_bytes(data[:at])
        else:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        with pytest.raises(FormatError, match=str(path)):
            PackedFile(path, name.split(".")[0])
        try:
            create(fresh)
        except (tf.errors.DataLossError, tf.errors.FailedPreconditionError) as error:
            assert str(path) in error.message
            refused += 1
        else:
            assert bit is not None and not _is_read(path, at)
    assert refused > 1000


UNREAD = {
    "items.dpsr": ("id", "id_index.", "popularity", "values."),
    "users.dpsr": ("id", "id_index.", "values."),
    "interactions.dpsr": ("query_text.",),
}


def _is_read(path, at):
    """Whether byte `at` of the file belongs to a section that the op reads (its padding included)."""
    begin = 64
    for name, values in PackedFile(path, verify=False).items():
        end = begin + -(-values.nbytes // 64) * 64
        if begin <= at < end:
            return not name.startswith(UNREAD[path.name])
        begin = end
    return True


@pytest.mark.parametrize(
    ("name", "section", "change", "message"),
    [
        ("items", "tokens.splits", lambda a: np.array([0, 5], np.int64), "tokens.splits does not span"),
        ("items", "tokens.splits", lambda a: a[:0], "tokens.splits does not span"),
        ("items", "tokens.splits", lambda a: a.astype(np.int32), 'section "tokens.splits" is int32, expected int64'),
        ("items", "tokens.values", lambda a: a - 2000, "tokens.values row 0 refers to row -"),
        ("items", "feature.code0", lambda a: a[:-1], "feature.code0 has 19 rows, expected 20"),
        ("items", "feature.code0", lambda a: a.astype(np.int32) - 9, "feature.code0 row 0 is code -"),
        ("items", "feature.code0", lambda a: a.astype(np.int64), 'section "feature.code0" is int64, expected int32'),
        ("items", "feature.code1", lambda a: a + 9, "feature.code1 row 0 is code .*, expected 0 to "),
        ("items", "feature.tags.values", lambda a: a + 9, "feature.tags.values row 0 is code .*, expected 0 to 9"),
        ("items", "feature.tags.splits", lambda a: a[:-1], "feature.tags.splits has 20 rows, expected 21"),
        ("users", "feature.profile0", lambda a: a + 9, "feature.profile0 row 0 is code"),
        ("users", "event.splits", lambda a: a[::-1].copy(), "event.splits does not span"),
        ("users", "event.splits", lambda a: np.r_[a[0], a[2], a[2:]], "event.splits row 1 is .*anonymous"),
        ("users", "event.time", lambda a: a[::-1].copy(), "event.time row .* is before row"),
        ("users", "event.item", lambda a: a + 20, "event.item row 0 refers to row .* of 20 items"),
        ("users", "event.query", lambda a: a + 10, "event.query row 0 refers to row .* of 10 queries"),
        ("users", "event.type", lambda a: a + 3, "event.type row 0 is .*, expected the code of an interaction type"),
        ("users", "event.type", lambda a: a[1:], "event.type has .* rows, expected"),
        ("interactions", "query.splits", lambda a: np.r_[a[:2], a[-1:], a[3:]], "query.splits falls from"),
        ("interactions", "query.tokens", lambda a: a - 2000, "query.tokens row 0 refers to row -"),
        ("interactions", "positive.splits", lambda a: a[1:], "positive.splits has 10 rows, expected 11"),
        ("interactions", "positive.item", lambda a: a + 20, "positive.item row 0 refers to row .* of 20 items"),
        ("interactions", "positive.item", lambda a: a[::-1].copy(), "expected the items of a query in ascending order"),
        ("interactions", "positive.user", lambda a: a[:-1], "positive.user has 59 rows, expected 60"),
        ("interactions", "positive.user", lambda a: a - 10, "positive.user row 0 refers to row -.* of 10 users"),
        ("interactions", "positive.type", lambda a: a + 3, "positive.type row 0 is"),
        ("interactions", "positive.weight", lambda a: a[1:], "positive.weight has 59 rows, expected 60"),
        ("interactions", "positive.weight.values", lambda a: a[:9], "positive.weight row .* is code .* of 9 values"),
        ("interactions", "positive.weight.values", lambda a: a.astype(np.int32), "is int32, expected float32"),
        ("interactions", "positive.weight", lambda a: a.astype(np.float32), "is float32, expected uint8"),
        ("interactions", "positive.label", lambda a: a[1:], "positive.label has 59 rows, expected 60"),
        ("interactions", "positive.request", lambda a: a - 1, "positive.request row .* refers to row -2 of"),
        ("interactions", "positive.request", lambda a: a + 60, "positive.request row 0 refers to row"),
        ("interactions", "impression.item", lambda a: a[::-1].copy(), "impression.item row .*expected ascending rows"),
        ("interactions", "impression.item", lambda a: a + 20, "impression.item row 0 refers to row .* of 20 items"),
        ("interactions", "negative.item", lambda a: a[::-1].copy(), "negative.item row .*expected ascending rows"),
        ("interactions", "negative.item", lambda a: a + 99, "negative.item row 0 refers to row .* of 20 items"),
        ("interactions", "negative.splits", lambda a: a * 2, "negative.splits does not span"),
    ],
)
def test_sections_that_do_not_fit(fresh, name, section, change, message):
    path = fresh.path / f"{name}.dpsr"
    sections = dict(PackedFile(path, name).items())
    sections[section] = change(sections[section])
    write_file(path, name, sections)
    with pytest.raises(tf.errors.DataLossError, match=f"{path}: .*{message}"):
        create(fresh)


@pytest.mark.parametrize(
    ("name", "section"), [("items", "tokens.values"), ("users", "event.type"), ("interactions", "positive.time")]
)
def test_sections_that_are_missing(fresh, name, section):
    path = fresh.path / f"{name}.dpsr"
    sections = dict(PackedFile(path, name).items())
    del sections[section]
    write_file(path, name, sections)
    with pytest.raises(tf.errors.DataLossError, match=f'{path}: has no section "{section}"'):
        create(fresh)


def test_queries_of_events_are_read_for_histories_of_queries_only(fresh):
    expected = batches(examples_dataset(fresh, options(history_length=5)), 5)
    path = fresh.path / "users.dpsr"
    sections = dict(PackedFile(path, "users").items())
    sections["event.query"] = sections["event.query"][::-1] + 10
    write_file(path, "users", sections)
    with pytest.raises(tf.errors.DataLossError, match=r"event\.query row 0 refers to row"):
        create(fresh)
    assert create(fresh, query_history_length=0) is not None
    same(batches(examples_dataset(fresh, options(history_length=5)), 5), expected)


def test_optional_sections(tmp_path):
    store = random_store(tmp_path / "store", with_impressions=False)
    path = store.path / "interactions.dpsr"
    sections = dict(PackedFile(path, "interactions").items())
    for name in ("positive.weight", "positive.label"):
        del sections[name], sections[f"{name}.values"]
    write_file(path, "interactions", sections)
    batch = batches(examples_dataset(store, dataclasses.replace(options(), history_length=3)), 1)[0]
    assert (batch.weights == 1).all() and (batch.labels == 1).all()
