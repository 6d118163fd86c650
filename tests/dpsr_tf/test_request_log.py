"""The section `ranking` of a schema: whole requests, counts as of each of them against brute force, and numbers."""

from __future__ import annotations

import collections
import json
import math

import numpy as np
import pytest
import yaml

from dpsr_common.errors import UsageError
from dpsr_common.packed_file import PackedFile
from dpsr_tf.data.event_counts import EVENTS, WINDOWS
from dpsr_tf.data.schema import load_schema
from dpsr_tf.data.store import Store, unpack_strings

DAY = 86_400
START = 1_700_000_000 // DAY * DAY
LADDER = {"impression": 0, "skip": 0, "click": 1, "cart": 2, "order": 3}

ITEMS = [
    {"item_id": 10 * i, "title": f"thing {i}", "brand": brand, "shop": shop, "price": price, "weight": 3}
    for i, (brand, shop, price) in enumerate(
        [("Acme", "a", 5), ("Acme", "b", 7.5), ("Bolt", "b", 20), (None, "a", 11), ("Cord", None, None)], 1
    )
]
USERS = [{"user_id": 3, "age": 30}, {"user_id": 5, "age": None}, {"user_id": 8, "age": 41}]
SCHEMA = {
    "items": {
        "files": "items.jsonl",
        "id": "item_id",
        "text": ["title", "brand"],
        "features": [
            "brand",
            "shop",
            {"column": "price", "kind": "number", "boundaries": [10]},
            {"column": "weight", "kind": "number", "boundaries": [10]},
        ],
    },
    "users": {
        "files": "users.jsonl",
        "id": "user_id",
        "features": [{"column": "age", "kind": "number", "boundaries": [26]}],
    },
    "interactions": {
        "files": "log.jsonl",
        "query": "query",
        "item": "item_id",
        "user": "user_id",
        "type": "type",
        "time": "time",
        "position": "position",
        "session": "session",
        "session_gap": 30,
        # What is positive for retrieval does not matter here.
        "positive_types": ["order"],
    },
    "ranking": {"attributes": ["brand", "shop"], "brand": "brand", "price": "price"},
}


def random_log(seed: int, rows: int = 400, sessions: bool = True):
    """A log with ties of times, days' ends, repeated rows, anonymous users, and rows of one request."""
    rng = np.random.default_rng(seed)
    # Few distinct moments, at and around the ends of days and of windows.
    days = rng.integers(0, 40, rows)
    seconds = rng.choice([0, 1, 2, 600, DAY // 2, DAY - 1], rows)
    log = [
        {
            "query": ["red", "blue thing", "红"][rng.integers(3)],
            "item_id": 10 * int(rng.integers(1, 6)),
            "user_id": [3, 5, 8, -1][rng.integers(4)],
            "type": list(LADDER)[rng.choice(5, p=[0.3, 0.1, 0.3, 0.1, 0.2])],
            "time": int(START + day * DAY + second),
            "position": None if rng.random() < 0.1 else int(rng.integers(1, 9)),
            "session": f"s{rng.integers(3)}" if sessions and rng.random() < 0.5 else "",
        }
        for day, second in zip(days, seconds, strict=True)
    ]
    return log + log[:5]


def write(folder, log, schema=SCHEMA):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("items", ITEMS), ("users", USERS), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    return folder / "schema.yaml"


def changed(section: str, **values):
    return SCHEMA | {section: SCHEMA[section] | values}


@pytest.fixture
def ingested(tmp_path, dpsr):
    def make(log, schema=SCHEMA, *more, name="store"):
        path = write(tmp_path / f"shop-{name}", log, schema)
        result = dpsr("ingest", f"--schema={path}", f"--out={tmp_path / name}", *more).succeeds()
        return Store(tmp_path / name), result.out

    return make


# Brute force: lists of dicts, loops, and the definitions of docs/ranking.md word by word.


def requests_of(log):
    """(query, user, session or "", asked) -> item -> (best outcome, position, times of click, cart and order)."""
    streams = collections.defaultdict(list)
    for row in log:
        streams[row["query"], row["user_id"], row["session"]].append(row)
    found = {}
    for (query, user, session), rows in streams.items():
        asked = before = None
        for row in sorted(rows, key=lambda row: row["time"]):
            if before is None or (not session and row["time"] - before > 30 * 60):
                asked = row["time"]
            before = row["time"]
            item = found.setdefault((query, user, session, asked), {}).setdefault(row["item_id"], [0, 0, {}])
            best = LADDER[row["type"]]
            item[0] = max(item[0], best)
            if row["position"]:
                item[1] = min(item[1] or 99, row["position"])
            for level in range(1, best + 1):
                item[2][level] = min(item[2].get(level, math.inf), row["time"])
    return found


def events_of(requests):
    """All events: (level of EVENTS, time, query, user, item)."""
    events = []
    for (query, user, _, asked), items in requests.items():
        for item, (_, _, times) in items.items():
            events.append((0, asked, query, user, item))
            events += [(level, time, query, user, item) for level, time in times.items()]
    return events


def counts_of(events, moment, same):
    """Counts by window and event, of the events that `same` accepts."""
    return [
        sum(level == e and moment - days * DAY <= time < moment and same(query, item)
            for e, time, query, _, item in events)
        for days in WINDOWS
        for level in range(len(EVENTS))
    ]  # fmt: skip


def quantile(prices, share):
    return sorted(prices)[math.ceil(share * len(prices)) - 1]


def spending_of(events, user, moment):
    price = {row["item_id"]: row["price"] for row in ITEMS}
    paid = [price[i] for e, time, _, u, i in events if e == 3 and u == user and time < moment and price[i] is not None]
    if user == -1 or not paid:
        return (0, math.nan, math.nan, math.nan)
    return (len(paid), sum(paid) / len(paid), quantile(paid, 0.5), quantile(paid, 0.9))


def brand_of(item):
    return next(row["brand"] for row in ITEMS if row["item_id"] == item)


def shop_of(item):
    return next(row["shop"] for row in ITEMS if row["item_id"] == item)


def stored(file: PackedFile, store: Store):
    """The requests of a file, in the form of requests_of but without sessions, each with its counts."""
    items, users = store.items()["id"], store.users()["id"]
    queries = unpack_strings(file, "query_text")
    splits = file["request.splits"]
    assert np.all(np.diff(file["request.time"].astype(np.int64)) >= 0), "requests are in order of time"
    found = []
    for r in range(len(splits) - 1):
        shown = []
        for i in range(splits[r], splits[r + 1]):
            counts = {
                name: [int(file[f"stat.{name}.{days}.{event}"][i]) for days in WINDOWS for event in EVENTS]
                for name in ("item", "query_item", "brand", "shop")
            }
            item = int(items[file["shown.item"][i]])
            shown.append((item, int(file["shown.outcome"][i]), int(file["shown.position"][i]), counts))
        everything = [int(file[f"all.{days}.{event}"][r]) for days in WINDOWS for event in EVENTS]
        spent = tuple(float(file[f"spend.{name}"][r]) for name in ("orders", "mean", "median", "high"))
        key = (queries[file["request.query"][r]], int(users[file["request.user"][r]]), int(file["request.time"][r]))
        found.append((key, shown, everything, spent))
    return found


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 6))])
def test_requests_and_counts_are_those_of_brute_force(ingested, seed):
    log = random_log(seed, sessions=seed % 2 == 0)
    schema = SCHEMA if seed % 2 == 0 else changed("interactions", session=None)
    store, _ = ingested(log, schema, f"--shards={1 + seed % 3}")
    requests = requests_of(log)
    events = events_of(requests)
    expected = collections.defaultdict(list)
    for (query, user, _, asked), items in requests.items():
        expected[query, user, asked].append({i: (best, place) for i, (best, place, _) in items.items()})
    number = 0
    for file in store.requests():
        for (query, user, asked), shown, everything, spent in stored(file, store):
            number += 1
            # Two sessions of a user may ask the same in the same second.
            assert {item: (outcome, place) for item, outcome, place, _ in shown} in expected[query, user, asked]
            order = [(place == 0, place, item) for item, _, place, _ in shown]
            assert order == sorted(order)
            assert everything == counts_of(events, asked, lambda q, i: True)
            np.testing.assert_allclose(spent, spending_of(events, user, asked), rtol=1e-6)
            for item, _, _, counts in shown:
                same = {
                    "item": lambda q, i, item=item: i == item,
                    "query_item": lambda q, i, item=item, query=query: (q, i) == (query, item),
                    "brand": lambda q, i, item=item: brand_of(item) is not None and brand_of(i) == brand_of(item),
                    "shop": lambda q, i, item=item: shop_of(item) is not None and shop_of(i) == shop_of(item),
                }
                for name, accepts in same.items():
                    assert counts[name] == counts_of(events, asked, accepts), (name, query, item, asked)
    assert number == len(requests)


def test_statistics_are_the_counts_after_the_last_event(ingested):
    log = random_log(7)
    store, _ = ingested(log)
    file, events = store.statistics(), events_of(requests_of(log))
    until = int(file["until"][0])
    assert until == max(row["time"] for row in log) + 1 == store.manifest["ranking"]["until"]

    def counts(name, place):
        return [int(file[f"{name}.{days}.{event}"][place]) for days in WINDOWS for event in EVENTS]

    assert counts("all", 0) == counts_of(events, until, lambda q, i: True)
    ids = store.items()["id"].tolist()
    for row, item in enumerate(ids):
        assert counts("stat.item", row) == counts_of(events, until, lambda q, i, item=item: i == item)
    brands = ["", *unpack_strings(store.items(), "values.brand")]
    assert counts("stat.brand", 0) == [0] * 12, "items without a brand are no brand"
    for code, brand in enumerate(brands[1:], 1):
        assert counts("stat.brand", code) == counts_of(events, until, lambda q, i, b=brand: brand_of(i) == b)
    queries, splits = unpack_strings(file, "query_text"), file["query_item.splits"]
    pairs = {}
    for place, query in enumerate(queries):
        for at in range(splits[place], splits[place + 1]):
            pairs[query, ids[file["query_item.item"][at]]] = counts("stat.query_item", at)
    expected = {(q, i) for e, time, q, _, i in events if time >= until - 30 * DAY}
    assert set(pairs) == expected
    for (query, item), found in pairs.items():
        assert found == counts_of(events, until, lambda q, i, query=query, item=item: (q, i) == (query, item))
    for row, user in enumerate(store.users()["id"].tolist()):
        spent = [float(file[f"spend.{name}"][row]) for name in ("orders", "mean", "median", "high")]
        np.testing.assert_allclose(spent, spending_of(events, user, until), rtol=1e-6)


def test_an_event_at_the_end_of_a_window_counts_to_the_second(ingested):
    def row(time, kind="impression"):
        return {"query": "red", "item_id": 10, "user_id": 3, "type": kind, "time": time, "position": 1, "session": ""}

    moment = START + 35 * DAY
    log = [row(moment), row(moment - DAY, "order"), row(moment - DAY - 1), row(moment - 30 * DAY - 1)]
    # The rows of the first two moments lie one second apart, in one request of another query.
    log[2]["query"] = "blue"
    store, _ = ingested(log)
    last = stored(store.requests()[0], store)[-1]
    assert last[0] == ("red", 3, moment)
    counts = last[1][0][3]
    assert counts["item"] == [1, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]
    assert counts["query_item"] == [1, 1, 1, 1] * 3


def test_held_out_requests_are_apart_and_know_the_past(ingested):
    log = random_log(8)
    schema = changed("interactions", held_out={"last_days": 10})
    store, out = ingested(log, schema)
    requests = requests_of(log)
    border = max(row["time"] for row in log) - 10 * DAY + 1
    training = stored(store.requests()[0], store)
    held = stored(store.held_requests(), store)
    # No request here goes over the border: they end within seconds, or a session has all of its rows held out.
    late = {
        (q, u, asked)
        for (q, u, s, asked), _ in requests.items()
        if any(
            r["time"] >= border
            for r in log
            if (r["query"], r["user_id"], r["session"]) == (q, u, s)
            and asked <= r["time"] and (s or r["time"] - asked <= 3600)
        )
    }  # fmt: skip
    assert {key for key, *_ in held} <= late
    assert len(training) + len(held) == len(requests)
    assert all(key[2] < border for key, *_ in training)
    events = events_of(requests)
    for (_, _, asked), _, everything, _ in held:
        assert everything == counts_of(events, asked, lambda q, i: True)
    counts = store.manifest["ranking"]["counts"]
    assert (counts["requests"], counts["held_requests"]) == (len(training), len(held))
    assert f"{len(training):,} for training" in out


def test_held_out_queries_keep_all_of_their_requests_apart(ingested):
    log = [row | {"query": f"{row['query']} {i % 40}"} for i, row in enumerate(random_log(9))]
    store, _ = ingested(log, changed("interactions", held_out={"query_share": 0.3}))
    training = {key[0] for key, *_ in stored(store.requests()[0], store)}
    held = {key[0] for key, *_ in stored(store.held_requests(), store)}
    assert training and held and not training & held


@pytest.mark.parametrize("share", [None, 0.3])
def test_the_rest_of_the_store_is_the_same_without_the_section(ingested, share):
    interactions = {} if share is None else {"held_out": {"query_share": share}}
    schema = changed("interactions", **interactions)
    store, _ = ingested(random_log(10), schema, "--shards=2")
    plain, _ = ingested(random_log(10), {k: v for k, v in schema.items() if k != "ranking"}, "--shards=2", name="plain")
    for name in plain.manifest["files"]:
        assert (plain.path / name).read_bytes() == (store.path / name).read_bytes(), name
    extra = {"requests-00000-of-00002.dpsr", "requests-00001-of-00002.dpsr", "statistics.dpsr", "numbers.dpsr"}
    held = {"held_requests.dpsr"} if share else set()
    assert set(store.manifest["files"]) - set(plain.manifest["files"]) == extra | held
    assert "ranking" not in plain.manifest["schema"] and "ranking" not in plain.manifest
    assert plain.requests() == [] and plain.statistics() is None and plain.held_requests() is None


def test_the_order_of_rows_threads_and_memory_do_not_matter(ingested):
    log = random_log(11, 2000)
    one, _ = ingested(log, SCHEMA, "--threads=1")
    other, _ = ingested(list(reversed(log)), SCHEMA, "--threads=2", "--memory=64MB", name="other")
    assert one.manifest["files"] == other.manifest["files"]
    assert one.manifest["ranking"] == other.manifest["ranking"]


def test_appended_days_give_the_store_of_all_days(tmp_path, dpsr):
    log = sorted(random_log(12), key=lambda row: row["time"])
    border = START + 25 * DAY
    days = [[r for r in log if r["time"] < border], [r for r in log if r["time"] >= border]]
    path = write(tmp_path / "shop", days[0])
    dpsr("ingest", f"--schema={path}", f"--out={tmp_path / 'one'}", "--keep_log").succeeds()
    write(tmp_path / "shop", days[1])
    dpsr("ingest", f"--schema={path}", f"--out={tmp_path / 'two'}", f"--append={tmp_path / 'one'}").succeeds()
    write(tmp_path / "shop", log)
    dpsr("ingest", f"--schema={path}", f"--out={tmp_path / 'whole'}").succeeds()
    appended, whole = Store(tmp_path / "two"), Store(tmp_path / "whole")
    assert appended.manifest["files"] == whole.manifest["files"]
    assert appended.manifest["ranking"] == whole.manifest["ranking"]


def test_bad_input_is_counted_and_reported(ingested):
    def row(query, kind, position, time, **more):
        base = {"query": query, "item_id": 10, "user_id": 3, "session": "", "label": None}
        return base | {"type": kind, "position": position, "time": START + time} | more

    log = [
        row("red", "order", 1, 10),
        row("red", "impression", 2, 10, item_id=20),
        row("blue", "impression", None, 5000),
        row("red", "click", None, 9000, label=2),
        row("red", "", None, 9000, label=0),
        row("red", "wish", None, 9000),
    ]
    schema = changed("interactions", label="label")
    store, out = ingested(log, schema, "--max_reject_fraction=0.5")
    assert store.manifest["ranking"]["counts"] == {
        "requests": 2,
        "held_requests": 0,
        "shown": 3,
        "held_shown": 0,
        "clicks": 0,
        "carts": 0,
        "orders": 1,
        "requests_without_positive": 1,
        "requests_with_pairs": 1,
        "without_position": 1,
        "graded_rows": 2,
        "ungraded_rows": 0,
    }
    assert "1 have no click" in out and "1 items shown have no position" in out and "left out 2 rows" in out
    assert "type is not known" in out
    assert "items.weight is always 3" in out
    numbers = {(n["table"], n["name"]): n for n in store.manifest["ranking"]["numbers"]}
    assert numbers["items", "weight"] == {
        "table": "items", "name": "weight", "missing": 0.0, "mean": 3.0, "std": 0.0, "knots": [3.0]
    }  # fmt: skip


def test_searches_that_cannot_be_told_apart_are_reported(ingested):
    columns = {name: column for name, column in SCHEMA["interactions"].items() if name not in ("user", "session")}
    schema = {name: section for name, section in SCHEMA.items() if name != "users"} | {"interactions": columns}
    log = [
        {"query": "red", "item_id": 10 * i, "type": kind, "position": 1, "time": START + 1500 * i}
        for i, kind in enumerate(["impression", "order", "impression", "click"], 1)
    ]
    store, out = ingested(log, schema)
    assert store.manifest["ranking"]["counts"]["requests"] == 2, "one for each half an hour, whoever searched"
    assert "neither `user` nor `session`" in out and "within 30 minutes" in out
    log = [row | {"session": f"s{i}"} for i, row in enumerate(log)]
    store, out = ingested(log, schema | {"interactions": columns | {"session": "session"}}, name="told_apart")
    assert store.manifest["ranking"]["counts"]["requests"] == 4 and "neither" not in out


def test_grades_alone_give_no_requests(ingested):
    log = [row | {"label": 1, "type": "", "time": None} for row in random_log(15, 20)]
    store, out = ingested(log, changed("interactions", label="label", held_out={"query_share": 0.4}))
    counts = store.manifest["ranking"]["counts"]
    assert (counts["requests"], counts["held_requests"], counts["graded_rows"]) == (0, 0, len(log))
    assert len(store.requests()[0]["request.query"]) == 0 and len(store.held_requests()["shown.item"]) == 0
    assert not store.statistics()["stat.item.30.shown"].any()
    assert f"left out {len(log)} rows" in out


def test_numbers_stay_numbers_and_are_scaled_by_the_training_part(ingested):
    log = random_log(13)
    store, _ = ingested(log, changed("interactions", held_out={"last_days": 15}))
    file = store.numbers()
    np.testing.assert_array_equal(file["item.price"], np.array([5, 7.5, 20, 11, np.nan], np.float32))
    np.testing.assert_array_equal(file["user.age"], np.array([np.nan, 30, np.nan, 41], np.float32))
    price = {row["item_id"]: row["price"] for row in ITEMS}
    shown = [item for _, items, _, _ in stored(store.requests()[0], store) for item, *_ in items]
    values = np.array([price[item] for item in shown if price[item] is not None])
    found = next(n for n in store.manifest["ranking"]["numbers"] if n["name"] == "price")
    assert found["mean"] == pytest.approx(values.mean()) and found["std"] == pytest.approx(values.std())
    assert found["missing"] == pytest.approx(1 - len(values) / len(shown))
    expected = {quantile(values, share) for share in np.arange(1, 16) / 16}
    assert found["knots"] == sorted(expected)


def test_a_number_without_any_value_is_reported(tmp_path, dpsr):
    path = write(tmp_path / "shop", random_log(14))
    (tmp_path / "shop" / "users.jsonl").write_text('{"user_id": 3, "age": null}\n')
    log = [row | {"user_id": 3} for row in random_log(14)]
    (tmp_path / "shop" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    out = dpsr("ingest", f"--schema={path}", f"--out={tmp_path / 'store'}").succeeds().out
    assert "the number users.age has no value" in out


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("ranking", {"attributes": ["price"]}, "ranking: attributes has 'price', expected an item feature of kind cat"),
        ("ranking", {"price": "brand"}, "ranking: price has 'brand', expected an item feature of kind number"),
        ("ranking", {"attributes": ["brand", "brand"]}, "has 'brand' twice"),
        ("interactions", {"time": None}, "ranking: needs a column with the time"),
        ("interactions", {"type": None}, "ranking: needs a column with the type"),
    ],
)
def test_wrong_schemas(tmp_path, dpsr, section, values, message):
    path = write(tmp_path / "shop", random_log(1), changed(section, **values))
    dpsr("ingest", f"--schema={path}", f"--out={tmp_path / 'store'}").fails(2, message)


def test_items_alone_have_no_requests(tmp_path, dpsr):
    path = write(tmp_path / "shop", random_log(1))
    dpsr("ingest", f"--schema={path}", f"--out={tmp_path / 'store'}", "--items_only").succeeds()
    assert Store(tmp_path / "store").requests() == []


GRADED = [
    ("red", 10, 3), ("red", 20, 2.33), ("red", 30, 2.3), ("red", 40, 0), ("blue thing", 10, 1), ("blue thing", 20, 0.5),
    ("red", 20, 1), ("blue thing", 30, None),
]  # fmt: skip


def test_grades_make_one_request_for_each_query(ingested):
    schema = {"items": SCHEMA["items"], "interactions": {
        "files": "log.jsonl", "query": "query", "item": "item_id", "label": "label", "positive_from": 2,
    }, "ranking": SCHEMA["ranking"] | {"grades": {"click": 1, "order": 2.33}}}  # fmt: skip
    log = [{"query": query, "item_id": item, "label": label} for query, item, label in GRADED]
    store, out = ingested(log, schema)
    (file,) = store.requests()
    texts, splits = unpack_strings(file, "query_text"), file["request.splits"]
    items = store.items()["id"][file["shown.item"]]
    found = {
        texts[query]: dict(zip(items[begin:end].tolist(), file["shown.outcome"][begin:end].tolist(), strict=True))
        for query, begin, end in zip(file["request.query"].tolist(), splits[:-1], splits[1:], strict=True)
    }
    # Label 2.33 is an order although float32 holds a little less; the best of two labels of an item counts.
    assert found == {"red": {10: 3, 20: 3, 30: 1, 40: 0}, "blue thing": {10: 1, 20: 0}}
    assert not file["request.time"].any() and not file["request.user"].any() and not file["shown.position"].any()
    # Grades do not count as events.
    for packed in (file, store.statistics()):
        counts = [name for name in packed if name.startswith(("stat.", "all.", "spend.orders"))]
        assert len(counts) > 40 and not any(packed[name].any() for name in counts)
    assert store.manifest["ranking"]["counts"]["ungraded_rows"] == 1 and "left out 1 rows without a label" in out
    assert store.manifest["ranking"]["counts"]["graded_rows"] == 0


def test_grades_that_are_held_out_by_query(ingested):
    schema = {"items": SCHEMA["items"], "interactions": {
        "files": "log.jsonl", "query": "query", "item": "item_id", "label": "label", "held_out": {"query_share": 0.5},
    }, "ranking": {"grades": {"order": 1}}}  # fmt: skip
    log = [{"query": f"q{i}", "item_id": item, "label": item // 10 % 2} for i in range(30) for item in (10, 20, 30)]
    store, _ = ingested(log, schema)
    counts = store.manifest["ranking"]["counts"]
    assert counts["requests"] + counts["held_requests"] == 30 and counts["shown"] + counts["held_shown"] == 90
    assert counts["held_requests"] > 5 and counts["orders"] == 60


@pytest.mark.parametrize(
    "interactions, grades, message",
    [
        ({"label": "g"}, {"sold": 1}, "grades has 'sold', expected one of click, cart, order"),
        ({"label": "g"}, {"click": 2, "order": 1}, "expected numbers that rise from click to cart to order"),
        ({}, {"click": 1}, "grades needs a column with the label of each pair"),
        ({"label": "g", "type": "t"}, {"click": 1}, "grades cannot be combined with interactions: type 't'"),
    ],
)
def test_bad_grades(tmp_path, interactions, grades, message):
    base = {"files": "log.jsonl", "query": "query", "item": "item_id"}
    schema = {"items": SCHEMA["items"], "interactions": base | interactions, "ranking": {"grades": grades}}
    with pytest.raises(UsageError, match=message):
        load_schema(write(tmp_path, [], schema))
