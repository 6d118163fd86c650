"""`dpsr features`: the table of a fold against the store, against BM25, and against exact search of a model."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from test_encoders import make_model

from dpsr_tf.data.event_counts import EVENTS
from dpsr_tf.data.ranking_features import RankingFeatures
from dpsr_tf.data.store import Store, unpack_strings
from dpsr_tf.data.user_requests import User
from dpsr_tf.evaluation import features
from dpsr_tf.evaluation.baselines import Bm25, Field
from dpsr_tf.evaluation.judgments import fold_of
from dpsr_tf.models.encoders import exact_search, item_embeddings
from dpsr_tokenizer import Tokenizer, TokenizerConfig

ITEMS = [
    {"item_id": 1, "title": "Acme drill 12mm AB-300", "detail": "12mm drill for steel, 500 W", "brand": "Acme"},
    {"item_id": 2, "title": "New Balance running shoes", "detail": "", "brand": "New Balance"},
    {"item_id": 3, "title": "红色跑鞋 43码", "detail": "阿克梅", "brand": None},
    {"item_id": 4, "title": "", "detail": "spare part", "brand": "Acme"},
    {"item_id": 5, "title": "Shoes shoes shoes", "detail": "balance board", "brand": "Bolt"},
]
QUERIES = ["acme drill 12mm", "new balance shoes", "balance shoes shoes", "红色 跑鞋", "AB-300 part 99", "zzz"]
DAY = 86_400
SCHEMA = {
    "items": {
        "files": "items.jsonl",
        "id": "item_id",
        "text": ["title", "detail"],
        "features": ["brand", {"column": "price", "kind": "number", "boundaries": [10]}],
    },
    "users": {"files": "users.jsonl", "id": "user_id", "features": ["gender"]},
    "interactions": {
        "files": "log.jsonl",
        "query": "query",
        "item": "item_id",
        "user": "user_id",
        "type": "type",
        "time": "time",
        "position": "position",
        "held_out": {"last_days": 5},
    },
    "ranking": {
        "attributes": ["brand"], "brand": "brand", "price": "price", "smoothing_impressions": 7, "smoothing_clicks": 3
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A store with requests of six queries, each with all five items in some order."""
    folder = tmp_path_factory.mktemp("ranking")
    rng = np.random.default_rng(1)
    log = []
    for number in range(300):
        query, user = QUERIES[rng.integers(len(QUERIES))], int(rng.choice([7, 9, -1]))
        time = 1_700_000_000 + number * 5000
        for position, item in enumerate(rng.permutation(5) + 1, 1):
            kind = rng.choice(["impression", "click", "cart", "order"], p=[0.6, 0.2, 0.1, 0.1])
            row = {"query": query, "item_id": int(item), "user_id": user, "type": kind, "position": position}
            log.append(row | {"time": time + int(rng.integers(100))})
    items = [item | {"price": None if item["item_id"] == 3 else 1.5 * item["item_id"]} for item in ITEMS]
    users = [{"user_id": 7, "gender": "f"}, {"user_id": 9, "gender": None}]
    for name, rows in (("items", items), ("users", users), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    return folder


@pytest.fixture(scope="module")
def store(shop):
    from dpsr_common.command_line import main

    assert main(["ingest", f"--schema={shop / 'schema.yaml'}", f"--out={shop / 'store'}", "--shards=2"]) == 0
    return Store(shop / "store")


def table_of(path):
    table = pyarrow.parquet.read_table(path)
    columns = {
        name: table[name].to_pylist() if name == "query" else table[name].to_numpy() for name in table.column_names
    }
    return table, columns


def test_the_table_holds_every_item_shown(store, tmp_path, dpsr):
    out = dpsr("features", f"--store={store.path}", f"--out={tmp_path / 'train.parquet'}").succeeds().out
    table, columns = table_of(tmp_path / "train.parquet")
    counts = store.manifest["ranking"]["counts"]
    assert len(table) == counts["shown"]
    assert f"{counts['shown']:,} items shown in {counts['requests']:,} requests" in out
    place, first = 0, 0
    ids, users = store.items()["id"], store.users()["id"]
    for file in store.requests():
        splits, texts = file["request.splits"], unpack_strings(file, "query_text")
        for request in range(len(splits) - 1):
            begin, end = splits[request : request + 2]
            rows = slice(place, place + end - begin)
            assert set(columns["request"][rows]) == {first + request}
            assert set(columns["query"][rows]) == {texts[file["request.query"][request]]}
            assert set(columns["user_id"][rows]) == {users[file["request.user"][request]]}
            assert set(columns["time"][rows]) == {file["request.time"][request]}
            np.testing.assert_array_equal(columns["item_id"][rows], ids[file["shown.item"][begin:end]])
            np.testing.assert_array_equal(columns["position"][rows], file["shown.position"][begin:end])
            np.testing.assert_array_equal(columns["outcome"][rows], file["shown.outcome"][begin:end])
            np.testing.assert_array_equal(columns["item.7.click"][rows], file["stat.item.7.click"][begin:end])
            np.testing.assert_array_equal(
                columns["spend.mean"][rows], np.repeat(file["spend.mean"][request], end - begin)
            )
            # The formula of docs/ranking.md, with the constants of the schema.
            whole = {event: int(file[f"all.30.{event}"][request]) for event in EVENTS}
            rate = whole["click"] / whole["shown"] if whole["shown"] else 0
            click, shown = (file[f"stat.brand.1.{event}"][begin:end].astype(float) for event in ("click", "shown"))
            known = store.items()["feature.brand"][file["shown.item"][begin:end]] > 0
            expected = np.where(known, (click + 7 * rate) / (shown + 7), np.nan)
            np.testing.assert_allclose(columns["brand.1.ctr"][rows], expected, rtol=1e-5)
            rate = whole["order"] / whole["click"] if whole["click"] else 0
            order, click = (
                file[f"stat.query_item.30.{event}"][begin:end].astype(float) for event in ("order", "click")
            )
            np.testing.assert_allclose(columns["query_item.30.cvr"][rows], (order + 3 * rate) / (click + 3), rtol=1e-5)
            place += end - begin
        first += len(splits) - 1
    assert place == len(table)
    names = json.loads(table.schema.metadata[features.METADATA])
    assert names["codes"] == ["item.brand", "user.gender"]
    given = {"request", "query", "user_id", "item_id", "time", "position", "outcome"}
    assert given | set(names["numbers"]) | set(names["codes"]) == set(table.column_names)
    assert table["brand.1.ctr"].null_count == sum(item == 3 for item in columns["item_id"]), "missing is null"


def test_small_batches_give_the_same_table(store, tmp_path, monkeypatch):
    features.write_features(store, tmp_path / "whole.parquet")
    monkeypatch.setattr(features, "_ROWS", 12)
    features.write_features(store, tmp_path / "parts.parquet")
    assert pyarrow.parquet.ParquetFile(tmp_path / "parts.parquet").num_row_groups > 100
    whole, parts = (pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "parts"))
    assert whole.equals(parts)


def test_folds_are_those_of_evaluation(store, tmp_path):
    texts = {}
    for fold in ("train", "validation", "test"):
        path = tmp_path / f"{fold}.parquet"
        features.write_features(store, path, fold)
        _, columns = table_of(path)
        texts[fold] = set(columns["query"])
        border = max(columns["time"]) if fold == "train" else min(columns["time"])
        texts[fold, "border"] = border
    assert all(fold_of(text) == fold for fold in ("validation", "test") for text in texts[fold])
    assert texts["train", "border"] < min(texts["validation", "border"], texts["test", "border"])
    rows = sum(len(pyarrow.parquet.read_table(tmp_path / f"{fold}.parquet")) for fold in ("validation", "test"))
    assert rows == store.manifest["ranking"]["counts"]["held_shown"]


def pairs(store, queries):
    """All pairs of these queries and the items: texts, query and item of each pair."""
    items = store.counts.items
    return queries, np.repeat(np.arange(len(queries)), items), np.tile(np.arange(items), len(queries))


def test_matches_are_those_of_bm25_and_of_sets_of_words(store):
    queries, query, item = pairs(store, [*QUERIES, "", "drill drill ACME bolt"])
    found = RankingFeatures(store)._match(queries, query, item)
    for column, texts in store.texts().items():
        expected = Bm25(store.items()["id"], [Field(texts)]).score(
            queries, None, np.tile(store.items()["id"], (len(queries), 1))
        )
        np.testing.assert_allclose(found[f"bm25.{column}"], expected.ravel(), rtol=1e-5, atol=1e-6)
        assert expected.any()

    def value(name, text, item_id):
        return found[name][queries.index(text) * store.counts.items + item_id - 1]

    assert (
        value("query_in_title", "new balance shoes", 2) == 1 and value("title_in_query", "new balance shoes", 2) == 0.75
    )
    assert value("query_in_title", "balance shoes shoes", 5) == 0.5 and value("title_in_query", "zzz", 2) == 0
    assert np.isnan(value("title_in_query", "zzz", 4)) and np.isnan(value("query_in_title", "", 2))
    # 12mm stands in title and detail of item 1, 300 in its title, 99 nowhere.
    assert value("number_match", "acme drill 12mm", 1) == 1 and value("number_match", "AB-300 part 99", 1) == 0.5
    assert value("number_match", "AB-300 part 99", 2) == 0 and np.isnan(value("number_match", "zzz", 1))
    assert value("brand_match", "acme drill 12mm", 1) == 1 and value("brand_other", "acme drill 12mm", 1) == 0
    assert value("brand_match", "acme drill 12mm", 2) == 0 and value("brand_other", "acme drill 12mm", 2) == 1
    assert value("brand_match", "balance shoes shoes", 2) == 0, "one word of two is not the brand"
    assert (
        value("brand_match", "drill drill ACME bolt", 5) == 1 and value("brand_match", "drill drill ACME bolt", 4) == 1
    )
    assert np.isnan(value("brand_match", "acme drill 12mm", 3))


def test_more_matches_are_those_of_loops_over_sets(store):
    queries, query, item = pairs(store, [*QUERIES, "", "12 unknown shoe", "shoes running", "part part drill"])
    found = RankingFeatures(store)._match(queries, query, item)
    words = Tokenizer(TokenizerConfig(letter_trigrams=False, number_parts=False)).tokenize

    def trigrams(text):
        latin = [f"#{word}#" for word in words(text) if re.search("[a-z]", word)]
        return {padded[i : i + 3] for padded in latin for i in range(len(padded) - 2)}

    def share(part, whole):
        return part / whole if whole else math.nan

    texts = {column: [words(text) for text in of_items] for column, of_items in store.texts().items()}

    def rarity(column, word):
        frequency = sum(word in text for text in texts[column])
        return math.log(1 + (len(ITEMS) - frequency + 0.5) / (frequency + 0.5))

    for pair, (text, row) in enumerate(zip([queries[place] for place in query], item, strict=True)):
        asked, title = words(text), texts["title"][row]
        ours, theirs = trigrams(text), trigrams(store.texts()["title"][row])
        expected = {
            f"bm25_share.{column}": share(found[f"bm25.{column}"][pair], sum(rarity(column, word) for word in asked))
            for column in texts
        }
        everywhere = {word for column in texts for word in texts[column][row]}
        expected |= {
            "query_in_texts": share(len(set(asked) & everywhere), len(set(asked))),
            "missing_rarity": max((rarity("title", word) for word in asked if word not in title), default=0),
            "last_word_in_title": float(asked[-1] in title) if asked else math.nan,
            "trigrams_in_title": share(len(ours & theirs), len(ours)),
            "trigram_overlap": share(len(ours & theirs), len(ours | theirs)) if ours else math.nan,
            "title_words": len(set(title)),
            "title_numbers": sum(any(letter.isdigit() for letter in word) for word in set(title)),
        }
        for name, value in expected.items():
            assert found[name][pair] == pytest.approx(value, rel=1e-5, nan_ok=True), (name, text, row)
    assert len(np.unique(found["trigram_overlap"])) > 5 and len(np.unique(found["missing_rarity"])) >= 3


def test_the_score_is_that_of_exact_search(store, tmp_path, dpsr):
    model = make_model(tmp_path / "model", store, token_dim=8, embedding_dim=6, num_heads=2, history_length=3)
    path = tmp_path / "test.parquet"
    dpsr("features", f"--store={store.path}", f"--out={path}", "--fold=test", f"--model={model.path}").succeeds()
    _, columns = table_of(path)
    asks = [User(int(user), int(time)) for user, time in zip(columns["user_id"], columns["time"], strict=True)]
    expected = exact_search(model.path, store).score(columns["query"], asks, columns["item_id"][:, None])[:, 0]
    np.testing.assert_allclose(columns["dpsr_score"], expected, atol=1e-5)
    assert np.ptp(expected) > 0.1
    # How similar an item is to the others that were shown with it.
    rows = {int(item): row for row, item in enumerate(store.items()["id"])}
    embeddings = item_embeddings(model.path, store).astype(np.float64)[[rows[int(i)] for i in columns["item_id"]]]
    for place, (request, found) in enumerate(zip(columns["request"], columns["list_similarity"], strict=True)):
        others = embeddings[(columns["request"] == request) & (np.arange(len(embeddings)) != place)].sum(0)
        length = np.linalg.norm(embeddings[place]) * np.linalg.norm(others)
        assert found == pytest.approx(
            embeddings[place] @ others / length if length else math.nan, abs=1e-5, nan_ok=True
        )
    assert np.nanmax(columns["list_similarity"]) > np.nanmin(columns["list_similarity"]) + 0.1


def test_at_the_end_of_the_log_is_what_the_next_request_would_see(store, shop, tmp_path, dpsr):
    # Requests in the second after the last event see the whole log, and not each other.
    end = int(store.statistics()["until"][0])
    asked = [*QUERIES, "never asked drill 12mm"]
    next_rows = [
        {"query": text, "item_id": item, "user_id": user, "type": "order", "time": end}
        for text in asked
        for user in (7, 9, -1)
        for item in range(1, 6)
    ]
    for name in ("items", "users"):
        (tmp_path / f"{name}.jsonl").write_text((shop / f"{name}.jsonl").read_text())
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in next_rows)
    (tmp_path / "log.jsonl").write_text((shop / "log.jsonl").read_text() + rows)
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    dpsr("ingest", f"--schema={tmp_path / 'schema.yaml'}", f"--out={tmp_path / 'store'}").succeeds()
    longer = Store(tmp_path / "store")
    file = longer.held_requests()
    expected = RankingFeatures(longer).of(file, np.flatnonzero(file["request.time"] == end))
    # The last request of the log goes on with the same query.
    assert len(expected.item) == len(next_rows) - 5
    features = RankingFeatures(store)
    found = features.at_end(expected.queries, expected.request, expected.user, expected.item)
    for name in features.numbers:
        np.testing.assert_array_equal(found.numbers[name], expected.numbers[name], name)
    for name in features.codes:
        np.testing.assert_array_equal(found.codes[name], expected.codes[name], name)
    spaced = [f" {text}\t" for text in expected.queries]
    spaced_numbers = features.at_end(spaced, expected.request, expected.user, expected.item).numbers
    for name in features.numbers:
        np.testing.assert_array_equal(spaced_numbers[name], expected.numbers[name], name)
    assert (found.time == end).all() and not found.position.any() and not found.outcome.any()
    new = np.array([text == asked[-1] for text in found.queries])[found.request]
    for name in ("query_item.30.shown", "query_item.30.ctr", "spend.price_ratio", "brand.7.ctr"):
        assert len(np.unique(found.numbers[name])) > 2, name
    assert not found.numbers["query_item.30.shown"][new].any() and found.numbers["query_item.30.shown"][~new].all()
    # A number of the item is the same for all requests, one of the request for all its items.
    for name, kind in features.kinds.items():
        key = {"item": found.item, "request": found.request}.get(kind)
        if key is not None:
            for one in np.unique(key):
                assert len(np.unique(found.numbers[name][key == one])) == 1, name
    assert [features.kinds[name] for name in ("item.price", "item.7.ctr", "brand.1.click", "spend.high")] == [
        "item", "item", "item", "request"
    ]  # fmt: skip
    assert {name for name, kind in features.kinds.items() if kind == "pair" and "query_item" not in name} == {
        "bm25.title", "bm25.detail", "query_in_title", "title_in_query", "number_match", "brand_match", "brand_other",
        "bm25_share.title", "bm25_share.detail", "query_in_texts", "missing_rarity", "last_word_in_title",
        "trigrams_in_title", "trigram_overlap", "spend.price_ratio",
    }  # fmt: skip


def test_wrong_use(store, shop, tmp_path, dpsr):
    out = tmp_path / "out.parquet"
    out.write_text("mine")
    dpsr("features", f"--store={store.path}", f"--out={out}").fails(1, "exists already", "--overwrite")
    assert out.read_text() == "mine"
    dpsr("features", f"--store={store.path}", f"--out={tmp_path / 'no' / 'x'}").fails(1, "does not exist")
    schema = {key: value for key, value in SCHEMA.items() if key != "ranking"}
    (shop / "plain.yaml").write_text(yaml.safe_dump(schema))
    dpsr("ingest", f"--schema={shop / 'plain.yaml'}", f"--out={tmp_path / 'plain'}").succeeds()
    dpsr("features", f"--store={tmp_path / 'plain'}", f"--out={tmp_path / 'x'}").fails(
        1, "holds no requests", "`ranking`"
    )
    del schema["interactions"]["held_out"]
    (shop / "all.yaml").write_text(yaml.safe_dump(schema | {"ranking": {}}))
    dpsr("ingest", f"--schema={shop / 'all.yaml'}", f"--out={tmp_path / 'all'}").succeeds()
    flags = [f"--store={tmp_path / 'all'}", f"--out={tmp_path / 'x'}", "--fold=test"]
    dpsr("features", *flags).fails(1, "no requests in this fold", "held_out")
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_empty_section_gives_counts_of_items_and_queries(shop, tmp_path, dpsr):
    (shop / "empty.yaml").write_text(yaml.safe_dump(SCHEMA | {"ranking": {}}))
    dpsr("ingest", f"--schema={shop / 'empty.yaml'}", f"--out={tmp_path / 'store'}").succeeds()
    dpsr("features", f"--store={tmp_path / 'store'}", f"--out={tmp_path / 'train.parquet'}").succeeds()
    table, columns = table_of(tmp_path / "train.parquet")
    counted = {name.partition(".")[0] for name in table.column_names if name.endswith(".ctr")}
    assert counted == {"item", "query_item"}
    assert not {"brand_match", "spend.mean", "spend.price_ratio"} & set(columns)
    assert "item.brand" in columns and "item.price" in columns and "bm25.title" in columns


@pytest.mark.slow
def test_generate_ingest_features(tmp_path, dpsr):
    small = ["--items=300", "--users=40", "--interactions=2000"]
    dpsr("generate", f"--out={tmp_path / 'shop'}", *small, "--set=judged_queries=20").succeeds()
    schema = tmp_path / "shop" / "schema.ranking.yaml"
    dpsr("ingest", f"--schema={schema}", f"--out={tmp_path / 'store'}").succeeds()
    dpsr("features", f"--store={tmp_path / 'store'}", f"--out={tmp_path / 'train.parquet'}").succeeds()
    dpsr("features", f"--store={tmp_path / 'store'}", f"--out={tmp_path / 'test.parquet'}", "--fold=test").succeeds()
    truth = json.loads((tmp_path / "shop" / "truth.json").read_text())["counts"]
    counts = Store(tmp_path / "store").manifest["ranking"]["counts"]
    # Every item shown of the log is in the store once, with the best that came of it. A session that asks the same
    # again goes on with its request.
    log = pyarrow.parquet.read_table(tmp_path / "shop" / "interactions")
    shown = log.group_by(["session", "query", "item_id"]).aggregate([])
    assert (
        counts["shown"] + counts["held_shown"] == len(shown) <= truth["impressions"] + truth["skips"] + truth["clicks"]
    )
    assert 0.9 * truth["orders"] < counts["orders"] <= truth["orders"]
    _, columns = table_of(tmp_path / "train.parquet")
    assert (columns["outcome"] == 3).any() and set(columns["position"]) == set(range(1, 9))
    # The past tells something of the future: what is clicked was clicked more often before.
    clicked = columns["outcome"] > 0
    assert columns["item.30.ctr"][clicked].mean() > columns["item.30.ctr"][~clicked].mean()
