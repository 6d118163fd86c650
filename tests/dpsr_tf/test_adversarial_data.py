"""From the rows of a log to the batches of training, against brute force over the rows themselves.

Nothing here knows how a store is laid out: texts and ids are looked up through the Store's own methods.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import random

import numpy as np
import pytest
import tensorflow as tf

from dpsr_common.typed_config import from_dict
from dpsr_tf.data.examples_dataset import BatchOptions, examples_dataset
from dpsr_tf.data.ingest import ingest
from dpsr_tf.data.schema import EVENT_TYPES, Schema
from dpsr_tf.data.store import Store

TAKEN = ("click", "cart", "order")
WEIGHTS = {"order": 3.0}
DAY = 86_400


class World:
    """A random log, its store, and what follows from the rows by definition."""

    def __init__(self, path, seed, shards=1, items=12, users=5, queries=6, rows=260, held_out=None):
        r = random.Random(seed)
        self.items = [f"sku {i}" for i in range(items)]
        self.users = [f"u{i}" for i in range(users)]
        words = [f"term {i}" for i in range(queries)]
        # Few seconds for many rows: most times are shared, within a user and between them.
        times = [1_700_000_000 + r.randrange(8) + DAY * r.randrange(3) for _ in range(20)]
        self.log = [
            {
                "query": r.choice(words),
                "item": r.choice(self.items),
                # The last user never does anything.
                "user": r.choice([None, "", "-1", *self.users[:-1]]) if users else None,
                "event": r.choice(EVENT_TYPES),
                "time": r.choice(times),
                "session": r.choice([None, "s1", "s2"]),
                "weight": r.choice([0.5, 1.0, 2.0]),
            }
            for _ in range(rows)
        ]
        self.log[0]["event"] = "click"
        self.asked = self._request_times()
        path.mkdir()
        self._write(path / "items.jsonl", [{"id": sku, "title": f"{sku} thing{i}"} for i, sku in enumerate(self.items)])
        self._write(path / "users.jsonl", [{"id": user} for user in self.users])
        self._write(path / "log.jsonl", self.log)
        interactions = {
            "files": "log.jsonl",
            "query": "query",
            "item": "item",
            "user": "user",
            "type": "event",
            "time": "time",
            "session": "session",
            "weight": "weight",
            "type_weights": WEIGHTS,
        }
        if held_out:
            interactions["held_out"] = held_out
        schema = from_dict(
            Schema,
            {
                "items": {"files": "items.jsonl", "id": "id", "text": ["title"]},
                "users": {"files": "users.jsonl", "id": "id"},
                "interactions": interactions,
            },
            "schema",
        )
        (path / "store").mkdir()
        ingest(schema, path, path / "store", shards=shards)
        self.store = Store(path / "store")
        self.item_of, self.user_of = self.store.item_keys(), [None, *sorted_by_row(self.store)]
        self.query_of = list(self.store.queries())
        self.row_of = {query: row for row, query in enumerate(self.query_of)}
        self.by_time = held_out is not None and "query_share" not in held_out
        first = max(row["time"] for row in self.log) - held_out["last_days"] * DAY if self.by_time else None
        self.taken = [row for row in self.log if row["event"] in TAKEN]
        if self.by_time:
            self.training = [row for row in self.taken if row["time"] <= first]
        elif held_out:
            chosen = {q for q in words if self._hash(q) < held_out["query_share"] * 2**64}
            assert chosen, "the test needs held-out queries"
            self.training = [row for row in self.taken if row["query"] not in chosen]
        else:
            self.training = self.taken
        self.clicked = collections.defaultdict(set)
        for row in self.training:
            self.clicked[row["query"]].add(row["item"])

    def _request_times(self):
        """When the request of each row began, by the row's place in memory: rows of a session, or of half an hour."""
        requests = collections.defaultdict(list)
        for row in sorted(self.log, key=lambda row: row["time"]):
            key = row["query"], known(row["user"]), row["session"]
            if row["session"] is None and requests[key] and row["time"] - requests[key][-1][-1]["time"] <= 1800:
                requests[key][-1].append(row)
            elif row["session"] is None or not requests[key]:
                requests[key].append([row])
            else:
                requests[key][0].append(row)
        return {id(row): rows[0]["time"] for found in requests.values() for rows in found for row in rows}

    @staticmethod
    def _write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @staticmethod
    def _hash(query):
        return int.from_bytes(hashlib.md5(query.encode()).digest()[8:], "big")

    def events(self, user, before):
        """What a user did strictly before a time, oldest first."""
        past = self.taken if self.by_time else self.training
        item_row = {sku: row for row, sku in enumerate(self.item_of)}
        rows = [row for row in past if known(row["user"]) == user and row["time"] < before] if user else []
        return sorted(
            rows,
            key=lambda row: (
                row["time"],
                self.row_of[row["query"]],
                item_row[row["item"]],
                EVENT_TYPES.index(row["event"]),
            ),
        )

    def shown(self, query, user, time):
        """For each request of a user's query that began at a time: what it showed and nobody took."""
        shown = collections.defaultdict(set)
        taken = collections.defaultdict(set)
        clicks = set()
        held = {id(row) for row in self.taken} - {id(row) for row in self.training}
        for row in self.log:
            if row["query"] != query or known(row["user"]) != user or id(row) in held:
                continue
            request = row["session"], self.asked[id(row)]
            if row["event"] in TAKEN:
                taken[request].add(row["item"])
                if self.asked[id(row)] == time:
                    clicks.add(request)
            elif not self.by_time or row["time"] <= max(r["time"] for r in self.training):
                shown[request].add(row["item"])
        return [shown[request] - taken[request] for request in clicks]


def known(user):
    return None if user in (None, "", "-1") else user


def sorted_by_row(store):
    users = store.users()
    splits, data = users["key.splits"], users["key.bytes"].tobytes()
    return [data[begin:end].decode() for begin, end in itertools.pairwise(splits)][1:]


def example(world, batch, i):
    """An example as the log has it."""
    return (
        world.query_of[batch.query_rows[i]],
        world.user_of[batch.user_rows[i]],
        world.item_of[batch.item_rows[i]],
        EVENT_TYPES[batch.types[i]],
        float(batch.weights[i]),
    )


def rows_as_examples(rows):
    return collections.Counter(
        (row["query"], known(row["user"]), row["item"], row["event"], row["weight"] * WEIGHTS.get(row["event"], 1))
        for row in rows
    )


def pieces(values, splits):
    return [values[begin:end].tolist() for begin, end in itertools.pairwise(splits)]


OPTIONS = BatchOptions(
    batch_size=4,
    num_random_negatives=7,
    num_own_negatives=3,
    history_length=3,
    query_history_length=2,
    history_text=True,
    shuffle_buffer=64,
)
HELD_OUT = [None, {"last_days": 1}, {"query_share": 0.45}]


@pytest.mark.parametrize("held_out", HELD_OUT, ids=["all", "last_days", "query_share"])
@pytest.mark.parametrize(("shards", "workers"), [(1, 1), (3, 2), (2, 3)])
def test_batches_are_what_the_log_says(tmp_path, shards, workers, held_out):
    w = World(tmp_path / "world", 1000 + shards, shards, held_out=held_out)
    if held_out and "query_share" in held_out:
        # How far a history reaches is checked without sharing the hash: held-out queries are in no training row.
        assert {row["query"] for row in w.training} < {row["query"] for row in w.taken}
    seen, whole = collections.Counter(), rows_as_examples(w.training)
    times = collections.defaultdict(set)
    for row in w.training:
        times[row["query"], known(row["user"]), row["item"], row["event"]].add(w.asked[id(row)])
    own = 0
    for worker in range(workers):
        data = examples_dataset(w.store, OPTIONS, num_epochs=1, shard_index=worker, num_shards=workers)
        for batch in data.as_numpy_iterator():
            histories = pieces(batch.history.items.values, batch.history.items.row_splits)
            kinds = pieces(batch.history.types, batch.history.items.row_splits)
            past_tokens = pieces(batch.history.query.values, batch.history.query.row_splits)
            past = [past_tokens[begin:end] for begin, end in itertools.pairwise(batch.history.query_splits)]
            query_tokens = pieces(batch.query.values, batch.query.row_splits)
            item_tokens = pieces(batch.item.values, batch.item.row_splits)
            for row, tokens in zip(batch.item_rows, item_tokens, strict=True):
                sku = w.item_of[row]
                assert tokens == w.store.vocabulary.encode(f"{sku} thing{w.items.index(sku)}").tolist()
            for i in range(4):
                query, user, item, event, _ = seen_as = example(w, batch, i)
                seen[seen_as] += 1
                assert query_tokens[i] == w.store.vocabulary.encode(query).tolist()
                # The batch does not give the time of an example: its history must be that of the beginning of one of
                # the requests in which the log has it, and so no event of that request can be in it.
                found = [(w.item_of[row], EVENT_TYPES[kind]) for row, kind in zip(histories[i], kinds[i], strict=True)]
                fits = []
                for time in times[query, user, item, event]:
                    events = list(w.events(user, time))
                    asked = [q for q, _ in itertools.groupby(row["query"] for row in events)][-2:]
                    if found == [(row["item"], row["event"]) for row in events[-3:]] and past[i] == [
                        w.store.vocabulary.encode(q).tolist() for q in asked
                    ]:
                        fits.append(time)
                assert fits, (seen_as, found)
                for j in range(4 + 7):
                    is_click = w.item_of[batch.item_rows[j]] in w.clicked[query]
                    assert batch.negative_mask[i, j] == (not is_click)
                mine = [w.item_of[row] for row in batch.item_rows[11 + 3 * i : 14 + 3 * i]]
                mine = [sku for sku, there in zip(mine, batch.own_negative_mask[i], strict=True) if there]
                own += len(mine)
                assert any(
                    set(mine) <= shown and (mine or not shown) for time in fits for shown in w.shown(query, user, time)
                ), (seen_as, mine)
                assert item not in mine
    assert not seen - whole, "an example that is not in the log, or too often"
    left = sum((whole - seen).values())
    assert left < 4 * workers, "more are left out than the last batch of each worker"
    assert own > 0 and any(len(e) > 3 for e in (w.events(u, 2**32) for u in w.users))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_epoch_has_every_pair_once(tmp_path, workers):
    w = World(tmp_path / "world", 77, shards=2, rows=90)
    options = BatchOptions(batch_size=1, num_random_negatives=2, shuffle_buffer=16)
    whole = rows_as_examples(w.training)
    streams = [
        [
            example(w, batch, 0)
            for batch in examples_dataset(
                w.store, options, num_epochs=3, shard_index=worker, num_shards=workers
            ).as_numpy_iterator()
        ]
        for worker in range(workers)
    ]
    assert sum(map(len, streams)) == 3 * sum(whole.values())
    for epoch in range(3):
        seen = collections.Counter()
        for stream in streams:
            length = len(stream) // 3
            seen.update(stream[epoch * length : (epoch + 1) * length])
        assert seen == whole


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_restored_in_the_middle_with_any_parallelism(tmp_path, calls):
    w = World(tmp_path / "world", 5, shards=2)
    data = examples_dataset(w.store, dataclasses.replace(OPTIONS, num_parallel_calls=calls))
    iterator = iter(data)
    checkpoint = tf.train.Checkpoint(iterator=iterator)
    for _ in range(11):
        next(iterator)
    saved = checkpoint.save(str(tmp_path / "checkpoint"))
    expected = [tf.nest.map_structure(lambda t: t.numpy(), next(iterator)) for _ in range(9)]
    other = iter(examples_dataset(w.store, dataclasses.replace(OPTIONS, num_parallel_calls=calls)))
    for _ in range(3):
        next(other)
    tf.train.Checkpoint(iterator=other).restore(saved).assert_consumed()
    for batch in expected:
        again = tf.nest.map_structure(lambda t: t.numpy(), next(other))
        tf.nest.map_structure(np.testing.assert_array_equal, again, batch)


@pytest.mark.parametrize(("shards", "workers"), [(1, 1), (1, 3), (4, 1), (4, 3)])
def test_the_smallest_log(tmp_path, shards, workers):
    """One item, one query, one click; a batch larger than the log; more workers than files with a pair."""
    w = World(tmp_path / "world", 3, shards, items=1, users=2, queries=1, rows=1)
    assert len(w.training) == 1
    options = BatchOptions(batch_size=64, num_random_negatives=3, num_own_negatives=2)
    found = 0
    for worker in range(workers):
        for batch in examples_dataset(w.store, options, None, worker, workers).take(2).as_numpy_iterator():
            found += 1
            assert not batch.negative_mask.any() and not batch.own_negative_mask.any()
            assert set(batch.item_rows.tolist()) == {0}
    assert found >= 2
