from __future__ import annotations

import collections
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import encode_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_builder import numbers_of, queries_of

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.packed_file import PackedFile
from dpsr_common.typed_config import from_dict
from dpsr_tf.data.adapters import open_adapter
from dpsr_tf.data.ingest import ingest
from dpsr_tf.data.interruption import end_on_signal, record_signals
from dpsr_tf.data.schema import EVENT_TYPES, Schema, load_schema
from dpsr_tf.data.store import Store, interactions_names, manifest_checksum, unpack_strings
from dpsr_tokenizer import Tokenizer

FORMATS = [".tsv", ".csv", ".jsonl", ".parquet", ".tsv.gz", ".csv.gz", ".jsonl.gz"]


def ragged(file, splits, values):
    """A ragged column as a list of lists."""
    bounds, flat = file[splits].tolist(), file[values].tolist()
    assert bounds[0] == 0 and bounds[-1] == len(flat)
    return [flat[begin:end] for begin, end in itertools.pairwise(bounds)]


# What a store holds, against plain Python.


def by_id(shop):
    """The items in the order of the store."""
    return sorted(shop.items, key=lambda row: row["item_id"])


def test_items(shop, store):
    file, items = store.items(), by_id(shop)
    assert file["id"].tolist() == [row["item_id"] for row in items] == [10, 20, 30, 50, 70, 90, 2**40]
    texts = [f"{row['title'] or ''} {row['brand'] or ''}" for row in items]
    expected = [store.vocabulary.encode(text).tolist() for text in texts]
    assert ragged(file, "tokens.splits", "tokens.values") == expected
    assert expected[5] == [], "an item without text stays, without tokens"
    assert store.titles() == [row["title"] for row in items]
    assert store.item_keys() is None
    assert file["popularity"].tolist() == [1, 0, 3, 1, 1, 0, 0]
    assert (file["id"].dtype, file["tokens.splits"].dtype, file["tokens.values"].dtype) == ("int64", "int64", "int32")


def test_title_column(shop, tmp_path, dpsr):
    shop.schema["items"]["title"] = "brand"
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    store = Store(tmp_path / "store")
    assert store.titles() == [row["brand"] or "" for row in by_id(shop)]
    assert store.texts() == {name: [row[name] or "" for row in by_id(shop)] for name in ("title", "brand")}


def test_texts_are_those_that_the_towers_read(shop, store, tmp_path, dpsr):
    assert store.texts() == {name: [row[name] or "" for row in by_id(shop)] for name in ("title", "brand")}
    sections = {"title.splits", "title.bytes", "text1.splits", "text1.bytes"}
    assert PackedFile(str(store.path / "titles.dpsr"), "titles").keys() == sections
    for out, text, title, sections in (
        ("one", ["title"], None, {"title.splits", "title.bytes"}),
        ("other", ["brand", "brand"], "title", {"title.splits", "title.bytes", "text0.splits", "text0.bytes"}),
    ):
        shop.schema["items"] |= {"text": text, "title": title or text[0]}
        dpsr(*shop.write().flags(tmp_path / out)).succeeds()
        found = Store(tmp_path / out)
        assert found.texts() == {text[0]: [row[text[0]] or "" for row in by_id(shop)]}
        assert PackedFile(str(found.path / "titles.dpsr"), "titles").keys() == sections, "a text is stored once"


def test_interactions(shop, store):
    item_row = {row["item_id"]: i for i, row in enumerate(by_id(shop))}
    user_row = {-1: 0, 3: 1, 5: 2, 8: 3}
    queries = sorted({row["query"].strip() for row in shop.log if row["label"] in (0, 2)})
    assert queries == ["100", 'bolt 3/4"', "never liked", "red shoes", "红鞋"], "grade 1 is neither; spaces are trimmed"

    def pairs(label):
        rows = [
            (queries.index(r["query"].strip()), item_row[r["item_id"]], user_row[r["user_id"]], r["weight"])
            for r in shop.log
            if r["label"] == label
        ]
        return sorted(rows)

    (file,) = store.interactions()
    assert unpack_strings(file, "query_text") == queries == list(store.queries())
    assert ragged(file, "query.splits", "query.tokens") == [store.vocabulary.encode(q).tolist() for q in queries]
    positives = pairs(2)
    columns = queries_of(file), file["positive.item"], file["positive.user"], numbers_of(file, "positive.weight")
    found = list(zip(*(column.tolist() for column in columns), strict=True))
    assert found == positives, "sorted by query and item, a repeated row twice"
    assert len(positives) == 6
    by_query = [[item for q, item, _, _ in positives if q == i] for i in range(len(queries))]
    assert ragged(file, "positive.splits", "positive.item") == by_query
    negatives = [[item for q, item, _, _ in pairs(0) if q == i] for i in range(len(queries))]
    assert ragged(file, "negative.splits", "negative.item") == negatives
    assert negatives[queries.index("never liked")] == [5], "a query with negatives only keeps its row"
    types = {name: str(values.dtype) for name, values in file.items()}
    assert types == {
        "query_text.splits": "int64",
        "query_text.bytes": "uint8",
        "query.splits": "int64",
        "query.tokens": "int32",
        "positive.splits": "int64",
        "positive.user": "int32",
        "positive.item": "int32",
        "positive.type": "uint8",
        "positive.time": "uint32",
        "positive.weight": "uint8",
        "positive.weight.values": "float32",
        "positive.label": "uint8",
        "positive.label.values": "float32",
        "negative.splits": "int64",
        "negative.item": "int32",
    }


def test_users(shop, store):
    file = store.users()
    assert file["id"].tolist() == [-1, 3, 5, 8], "row 0 is the anonymous user"
    assert file["feature.gender"].tolist() == [0, 2, 1, 0], "0 is unknown, then f, m: as frequent, by their text"
    assert unpack_strings(file, "values.gender") == ["f", "m"]
    assert file["feature.age"].tolist() == [0, 1, 1, 2], "the most frequent value is 1"
    assert unpack_strings(file, "values.age") == ["30", "7"]
    assert [(feature.name, feature.kind, feature.num_values) for feature in store.features.users] == [
        ("gender", "categorical", 2),
        ("age", "categorical", 2),
    ]
    types = {name: str(values.dtype) for name, values in file.items()}
    assert types == {
        "id": "int64",
        "id_index.splits": "int32",
        "id_index.rows": "int32",
        "feature.gender": "uint8",
        "values.gender.splits": "int64",
        "values.gender.bytes": "uint8",
        "feature.age": "uint8",
        "values.age.splits": "int64",
        "values.age.bytes": "uint8",
        "event.splits": "int64",
        "event.time": "uint32",
        "event.item": "int32",
        "event.query": "int32",
        "event.type": "uint8",
    }
    assert file["event.splits"].tolist() == [0] * 5, "events need a time"


def test_without_users_weights_and_labels(shop, tmp_path, dpsr):
    del shop.schema["users"]
    shop.schema["interactions"] = {"files": "log.*", "query": "query", "item": "item_id"}
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    store = Store(tmp_path / "store")
    (file,) = store.interactions()
    assert len(file["positive.item"]) == len(shop.log), "every row is positive"
    assert set(file["positive.user"].tolist()) == {0} and set(file["positive.type"].tolist()) == {2}
    assert not {"positive.weight", "positive.label", "positive.position", "positive.request"} & set(file)
    assert len(file["negative.item"]) == 0
    assert store.users()["id"].tolist() == [-1] and store.held_out() is None


def test_filters(shop, tmp_path, dpsr):
    for row, price, stock, tags in zip(
        shop.items,
        [19.99, None, 1e9, 0.1, -3, 5, 7.25],
        ["yes", "no", "yes", "yes", None, "no", "yes"],
        ["new|sale|new", "", "sale", None, "|", "a b", "手机|new"],
        strict=True,
    ):
        row.update(price=price, stock=stock, tags=tags)
    shop.schema["items"]["filters"] = [
        {"column": "brand", "name": "maker"},
        {"column": "price", "kind": "number"},
        {"column": "stock", "name": "in stock"},
        {"column": "tags", "kind": "multi", "separator": "|"},
    ]
    shop.write()
    dpsr(*shop.flags(tmp_path / "one")).succeeds()
    store = Store(tmp_path / "one")
    file, items = store.filters(), by_id(shop)
    assert store.features.items == ()
    assert file is not None
    makers, stocks, tags = (unpack_strings(file, f"values.{name}") for name in ("maker", "in stock", "tags"))
    named = [None, *makers]
    assert [named[code] for code in file["filter.maker"]] == [row["brand"] for row in items]
    assert stocks == ["yes", "no"]
    expected = [{"yes": 1, "no": 2, None: 0}[row["stock"]] for row in items]
    assert file["filter.in stock"].tolist() == expected
    np.testing.assert_array_equal(file["filter.price"], [np.nan if r["price"] is None else r["price"] for r in items])
    assert file["filter.price"].dtype == np.float64
    lists = ragged(file, "filter.tags.splits", "filter.tags.values")
    assert [[tags[code - 1] for code in codes] for codes in lists] == [
        [tag for tag in (row["tags"] or "").split("|") if tag] for row in items
    ]
    # The same bytes from another order; a store without filters has no such file, and its other files are the same.
    shop.items.reverse()
    shop.write()
    dpsr(*shop.flags(tmp_path / "two"), "--threads=1").succeeds()
    assert (tmp_path / "one" / "filters.dpsr").read_bytes() == (tmp_path / "two" / "filters.dpsr").read_bytes()
    del shop.schema["items"]["filters"]
    shop.write()
    dpsr(*shop.flags(tmp_path / "without")).succeeds()
    assert Store(tmp_path / "without").filters() is None
    assert not (tmp_path / "without" / "filters.dpsr").exists()
    assert (tmp_path / "without" / "items.dpsr").read_bytes() == (tmp_path / "one" / "items.dpsr").read_bytes()


def test_a_store_of_a_version_without_filters(shop, store):
    # Its manifest does not know the key.
    manifest = json.loads((store.path / "manifest.json").read_text())
    del manifest["schema"]["items"]["filters"]
    manifest["checksum"] = manifest_checksum(manifest)
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    assert Store(store.path).filters() is None


def test_a_damaged_filter_file(shop, tmp_path, dpsr):
    shop.schema["items"]["filters"] = ["brand"]
    shop.write()
    dpsr(*shop.flags(tmp_path / "store")).succeeds()
    file = tmp_path / "store" / "filters.dpsr"
    whole = file.read_bytes()
    file.write_bytes(whole[:70] + bytes([whole[70] ^ 1]) + whole[71:])
    with pytest.raises(CommandError, match=r"filters\.dpsr"):
        dict(Store(tmp_path / "store").filters())
    file.unlink()
    with pytest.raises(CommandError, match=r"filters\.dpsr"):
        Store(tmp_path / "store")


def test_vocabulary(shop, store):
    config = store.vocabulary.config
    tokenizer = Tokenizer(config)
    texts = [f"{row['title'] or ''} {row['brand'] or ''}" for row in shop.items]
    texts += store.queries()
    expected = collections.Counter(token for text in texts for token in tokenizer.tokenize(text))
    assert len(store.vocabulary) == len(expected)
    assert {store.vocabulary.token(i): store.vocabulary.count(i) for i in range(len(expected))} == expected
    assert store.vocabulary.num_ids == len(expected) + 16


def test_vocabulary_limits_and_tokenizer_of_the_schema(shop, tmp_path, dpsr):
    shop.schema["tokenizer"] = {"letter_trigrams": False, "char_bigrams": False}
    shop.schema["vocabulary"] = {"min_count": 2, "max_size": 3, "num_oov_buckets": 0}
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    vocabulary = Store(tmp_path / "store").vocabulary
    tokens = {vocabulary.token(i): vocabulary.count(i) for i in range(len(vocabulary))}
    assert vocabulary.num_ids == 3 and min(tokens.values()) >= 2 and tokens["shoes"] == 3
    assert (
        not vocabulary.config.letter_trigrams and not vocabulary.config.char_bigrams and vocabulary.config.char_unigrams
    )


def test_manifest_and_summary(shop, tmp_path, dpsr):
    outcome = dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    store = Store(tmp_path / "store")
    assert vars(store.counts) == {
        "users": 4,
        "items": 7,
        "queries": 5,
        "positives": 6,
        "impressions": 0,
        "negatives": 3,
        "events": 0,
        "held_out": 0,
        "rejected": 0,
    }
    assert "7 items, 4 users, 5 queries, 6 positive pairs, 3 supervised negatives" in outcome.out
    assert store.manifest["files"]["vocabulary.dpsr"] == f"{store.vocabulary.fingerprint:016x}"
    assert store.manifest["schema"]["items"]["text"] == ["title", "brand"]
    assert oct((tmp_path / "store").stat().st_mode)[-3:] == "755"


# A store, worked out from the rows in plain Python: what docs/data_format.md says, and nothing of how ingest does it.


def mix64(x):
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def packed(lists, name, values):
    """A ragged column as its two sections."""
    return {
        f"{name}splits": list(itertools.accumulate(map(len, lists), initial=0)),
        f"{name}{values}": [value for row in lists for value in row],
    }


def packed_texts(texts, name):
    return packed([list(text.encode()) for text in texts], name, "bytes")


def expected_table(features, rows, ids, store):
    """Sections that items and users have in common. `rows` None: the anonymous user."""
    k = next(k for k in itertools.count() if 2**k >= len(ids))
    buckets = [[row for row, id in enumerate(ids) if mix64(id % 2**64) >> (64 - k) == b] for b in range(2**k)]
    sections = {"id": ids, **packed(buckets, "id_index.", "rows")}
    if any(isinstance(row["id"], str) for row in rows):
        sections |= packed_texts(["" if row["id"] is None else row["id"] for row in rows], "key.")
    for feature in features:
        column = [row.get(feature.column) for row in rows]
        name = f"feature.{feature.key}"
        if feature.kind == "number":
            sections[name] = [
                0 if value is None else 1 + sum(boundary <= value for boundary in feature.boundaries)
                for value in column
            ]
        elif feature.kind == "text":
            vocabulary = store.vocabularies[feature.vocabulary] if feature.vocabulary else store.vocabulary
            sections |= packed([vocabulary.encode(value or "").tolist() for value in column], f"{name}.", "values")
        else:
            lists = [value or [] if feature.kind == "multi" else [value] for value in column]
            seen = collections.Counter(value for row in lists for value in row if value)
            known = sorted(seen, key=lambda value: (-seen[value], value.encode()))[: feature.max_values]
            codes = [[known.index(value) + 1 if value in known else 0 for value in row] for row in lists]
            if feature.kind == "multi":
                sections |= packed([[code for code in row if code] for row in codes], f"{name}.", "values")
            else:
                sections[name] = [code for (code,) in codes]
            sections |= packed_texts(known, f"values.{feature.key}.")
    return sections


def mined_items(schema, rows):
    """{query: items} that were shown often and never clicked, of pairs with their role."""
    shown = {}
    for pair, role in rows:
        if role == "positive" or EVENT_TYPES[pair["type"]] in ("impression", "skip"):
            clicked, place = shown.get((pair["request"], pair["item"]), (0, 0))
            here = pair["position"] if schema.position else 0
            place = min(filter(None, (place, here)), default=0)
            shown[pair["request"], pair["item"]] = (max(clicked, int(role == "positive")), place)
    at = collections.defaultdict(list)
    for clicked, place in shown.values():
        at[place].append(clicked)
    expected, found = collections.defaultdict(float), collections.Counter()
    for (request, item), (clicked, place) in shown.items():
        expected[request[0], item] += np.mean(at[place])
        found[request[0], item] += clicked
    mined = collections.defaultdict(set)
    for query in {query for query, _ in expected}:
        items = {item: clicks for (q, item), clicks in expected.items() if q == query}
        total = sum(items.values())
        factor = sum(found[query, item] for item in items) / total if total else 0
        strong = [
            (-clicks * factor, item)
            for item, clicks in items.items()
            if not found[query, item] and clicks * factor >= schema.mined_from
        ]
        mined[query] = {item for _, item in sorted(strong)[: schema.mined_negatives]}
    return mined


def expected_store(schema, items, users, log, shards, store):
    """{file name: {section: list}} of all files but the vocabularies."""
    s = schema.interactions

    def in_order(rows, file):
        """The rows of a table in the order of their ids. The hash of a text id may have any value."""
        if any(isinstance(row["id"], str) for row in rows):
            keys = unpack_strings(file, "key")
            hashes = dict(zip(keys, file["id"].tolist(), strict=True))
            assert len(hashes) == len(keys) and all(-1 <= id < 2**63 for id in hashes.values())
        else:
            hashes = {row["id"]: row["id"] for row in rows}
        hashes[None] = -1
        rows = sorted(rows, key=lambda row: hashes[row["id"]])
        return rows, [hashes[row["id"]] for row in rows]

    items, item_ids = in_order(items, store.items())
    users, user_ids = in_order([{"id": None}, *(users if schema.users else [])], store.users())
    item_row = {row["id"]: i for i, row in enumerate(items)}
    user_row = {row["id"]: i for i, row in enumerate(users)} if s.user else collections.defaultdict(int)

    latest = max(row["time"] for row in log)
    held_out = s.held_out

    def is_held(row):
        if held_out is None:
            return False
        if held_out.query_share is not None:
            return int.from_bytes(hashlib.md5(row["query"].encode()).digest()[8:], "big") < held_out.query_share * 2**64
        if held_out.last_days is not None:
            return row["time"] > latest - held_out.last_days * 86400
        return row["time"] >= float(held_out.after)

    def role(row):
        if s.label and row["label"] is not None:
            low = s.negative_to if s.negative_to is not None else -np.inf
            return "positive" if row["label"] >= s.positive_from else "negative" if row["label"] <= low else None
        return "positive" if kind(row) in s.positive_types else None

    def kind(row):
        return s.types[row["type"]] if s.type else "click"

    def weight(row):
        return (row["weight"] if s.weight else 1) * s.type_weights.get(kind(row), 1)

    def shard(query):
        return int.from_bytes(hashlib.md5(query.encode()).digest()[:8], "big") % shards

    queries = sorted({row["query"] for row in log if role(row)}, key=lambda q: (shard(q), q.encode()))
    query_row = {query: i for i, query in enumerate(queries)}
    shows = s.type is not None and bool(s.time or s.session)

    # A label wins over the clicks for its query and item.
    labels = collections.defaultdict(list)
    for row in log:
        if s.label and s.negative_to is not None and row["label"] is not None and role(row):
            labels[row["query"], row["item"]].append((role(row), is_held(row)))

    def overruled(row):
        told = labels[row["query"], row["item"]]
        wrong = bool(told) and all(label == "negative" for label, _ in told)
        return wrong and (is_held(row) or not all(held for _, held in told))

    def is_positive(row):
        return role(row) == "positive" and (bool(s.label and row["label"] is not None) or not overruled(row))

    positives = [row for row in log if is_positive(row) and not is_held(row)]

    # When the request of each row began.
    def request_of(row):
        user = user_row[row["user"]] if s.user else 0
        return query_row[row["query"]], user, (row["session"] or 0) if s.session else 0

    def is_shown(row):
        return shows and kind(row) in ("impression", "skip")

    asked = {}
    rows_of = collections.defaultdict(list)
    for row in log:
        if row["query"] in query_row and (role(row) or is_shown(row)):
            rows_of[request_of(row)].append(row)
    for (_, user, session), rows in rows_of.items():
        begin = before = None
        for row in sorted(rows, key=lambda row: row["time"]):
            # The rows of nobody in particular end with the gap after the first one, too.
            since = before if user else begin
            if before is None or (not session and row["time"] - since > 60 * s.session_gap):
                begin = row["time"]
            before = row["time"]
            asked[id(row)] = begin if s.time else 0

    def pair(row):
        return {
            "query": query_row[row["query"]],
            "item": item_row[row["item"]],
            "user": user_row[row["user"]] if s.user else 0,
            "time": asked[id(row)],
            "type": EVENT_TYPES.index(kind(row)),
            "weight": weight(row),
            "label": 1 if row["label"] is None else row["label"],
            "position": min(row["position"] or 0, 255),
            "request": (*request_of(row), asked[id(row)]),
        }

    # Items and users.
    files = {}
    texts = [" ".join(row[column] or "" for column in schema.items.text) for row in items]
    clicks = collections.Counter(row["item"] for row in log if role(row) == "positive" and not is_held(row))
    files["items.dpsr"] = expected_table(schema.items.features, items, item_ids, store) | {
        "popularity": [row["sold"] or 0 if schema.items.popularity else clicks[row["id"]] for row in items],
        **packed([store.vocabulary.encode(text).tolist() for text in texts], "tokens.", "values"),
    }
    files["titles.dpsr"] = packed_texts([row["title"] or "" for row in items], "title.")
    for column, name in schema.items.text_names.items():
        files["titles.dpsr"] |= packed_texts([row[column] or "" for row in items], f"{name}.")
    told = [
        pair(row) | {"time": row["time"]}
        for row in log
        if role(row) == "positive" and s.time and not (held_out and held_out.query_share is not None and is_held(row))
    ]
    events = [
        sorted((e["time"], e["query"], e["item"], e["type"]) for e in told if e["user"] == user and user > 0)
        for user in range(len(users))
    ]
    files["users.dpsr"] = expected_table(schema.users.features if schema.users else (), users, user_ids, store) | {
        "event.splits": packed(events, "", "")["splits"],
        **{
            f"event.{name}": [e[i] for row in events for e in row]
            for i, name in enumerate(["time", "query", "item", "type"])
        },
    }

    # Interactions.
    clicked = collections.defaultdict(set)
    for row in positives:
        clicked[pair(row)["request"]].add(item_row[row["item"]])
    unclicked = collections.defaultdict(set)
    for row in log:
        if is_shown(row) and role(row) != "positive" and not is_held(row) and row["query"] in query_row:
            request, item = pair(row)["request"], item_row[row["item"]]
            if request in clicked and item not in clicked[request]:
                unclicked[request].add(item)
    mined = collections.defaultdict(set)
    if shows and s.mined_negatives:
        used = [r for r in log if id(r) in asked and not is_held(r) and (role(r) != "positive" or is_positive(r))]
        mined = mined_items(s, [(pair(row), role(row)) for row in used])
    columns = ["query", "item", "user", "time", "type"]
    columns += ["weight"] if s.weight or set(s.type_weights.values()) - {1} else []
    columns += [name for name in ("label", "position") if getattr(s, name)]
    for number, name in enumerate(interactions_names(shards)):
        mine = [query for query in queries if shard(query) == number]
        first = query_row[mine[0]] if mine else 0
        requests = sorted(request for request in unclicked if queries[request[0]] in mine)
        rows = []
        for row in map(pair, positives):
            if queries[row["query"]] in mine:
                row["query"] -= first
                row["request"] = requests.index(row["request"]) if row["request"] in requests else -1
                rows.append([row[name] for name in [*columns, *(["request"] if shows else [])]])
        rows.sort()
        negatives = [
            sorted(
                (
                    {
                        item_row[r["item"]]
                        for r in log
                        if r["query"] == query and role(r) == "negative" and not is_held(r)
                    }
                    | mined[query_row[query]]
                )
                - {item_row[r["item"]] for r in positives if r["query"] == query}
            )
            for query in mine
        ]
        files[name] = {
            **packed([store.vocabulary.encode(query).tolist() for query in mine], "query.", "tokens"),
            **packed_texts(mine, "query_text."),
            "positive.splits": [sum(row[0] < q for row in rows) for q in range(len(mine) + 1)],
            **{
                f"positive.{c}": [row[i] for row in rows]
                for i, c in enumerate([*columns, *(["request"] if shows else [])])
                if c != "query"
            },
            **packed(negatives, "negative.", "item"),
        }
        for column in {"weight", "label"} & set(columns):
            values = sorted({pair(row)[column] for row in positives})
            assert len(values) <= 256
            codes = [values.index(number) for number in files[name][f"positive.{column}"]]
            files[name] |= {f"positive.{column}": codes, f"positive.{column}.values": values}
        if shows:
            files[name] |= packed([sorted(unclicked[request]) for request in requests], "impression.", "item")
    if held_out:
        rows = [pair(row) for row in log if is_positive(row) and is_held(row)]
        names = columns[: 5 + ("weight" in columns)]
        rows = sorted([row[name] for name in names] for row in rows)
        # Sorted by (query, item, user, ...), as the columns of positives are.
        files["held_out.dpsr"] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return files


_NAMES = st.sampled_from(["Ä", "a b", "red", "z", "红鞋", "𝒳", "RED"])


@st.composite
def worlds(draw):
    """A schema, its tables, and the number of shards."""
    text_ids = draw(st.booleans())
    ids = st.sampled_from([f"B{i:03}" for i in range(20)]) if text_ids else st.integers(0, 2**62)

    def maybe(values):
        return st.none() | values

    def there():
        return draw(st.booleans())

    items = [
        {
            "id": id,
            "title": draw(maybe(_NAMES)),
            "brand": draw(maybe(_NAMES)),
            "price": draw(maybe(st.sampled_from([0.5, 1.0, 3.0, 10.0]))),
            "tags": draw(maybe(st.lists(_NAMES, max_size=3, unique=True))),
            "about": draw(maybe(_NAMES)),
            "sold": draw(maybe(st.sampled_from([0.0, 1.5, 7.0]))),
        }
        for id in draw(st.lists(ids, min_size=1, max_size=6, unique=True))
    ]
    users = [
        {"id": id, "city": draw(maybe(_NAMES)), "age": draw(maybe(st.sampled_from([17.0, 18.0, 30.0])))}
        for id in draw(st.lists(ids, max_size=4, unique=True))
    ]
    day = 86400
    log = [
        {
            "query": draw(_NAMES),
            "item": draw(st.sampled_from(items))["id"],
            "user": draw(st.sampled_from([None, *(user["id"] for user in users)])),
            "time": draw(st.integers(1, 7)) * day,
            "type": draw(st.sampled_from("iikkco")),
            "session": draw(st.sampled_from([None, 1, 2, 3])),
            "position": draw(maybe(st.sampled_from([1, 2, 254, 255, 256, 1000]))),
            "weight": draw(st.sampled_from([0.5, 1.0, 2.0])),
            "label": draw(st.sampled_from([None, 0.0, 1.0, 2.0])),
        }
        for _ in range(draw(st.integers(1, 40)))
    ]
    s = {"files": "log.parquet", "query": "query", "item": "item", "session_gap": draw(st.sampled_from([30, 1440]))}
    s |= {name: name for name in ("user", "time", "session", "position", "weight", "label") if there()}
    if there():
        s |= {"type": "type", "types": {"i": "impression", "k": "click", "c": "cart", "o": "order"}}
        s |= {"positive_types": draw(st.sampled_from([["click", "order"], ["order"], ["click", "cart", "order"]]))}
        s |= {"type_weights": draw(st.sampled_from([{}, {"click": 0.25}, {"order": 1.0}]))}
        s |= draw(st.sampled_from([{}, {"mined_negatives": 50, "mined_from": 0.2301}]))
    if "label" in s:
        s |= draw(st.sampled_from([{}, {"negative_to": 0.0}, {"positive_from": 2.0, "negative_to": 1.0}]))
    held = [{"query_share": 0.4}, None]
    held += [{"after": str(4 * day)}, {"last_days": 2.5}] if "time" in s else []
    s["held_out"] = draw(st.sampled_from(held))
    schema = {
        "items": {
            "files": "items.parquet",
            "id": "id",
            "text": ["title", "brand"],
            "popularity": draw(st.sampled_from([None, "sold"])),
            "features": [
                {"column": "brand", "max_values": draw(st.sampled_from([2, 100]))},
                {"column": "price", "kind": "number", "boundaries": [1.0, 5.0]},
                {"column": "tags", "kind": "multi", "max_values": draw(st.sampled_from([2, 100]))},
                {"column": "about", "name": "Brand", "kind": "text", "vocabulary": "words"},
                {"column": "title", "kind": "text"},
            ],
        },
        "vocabularies": {"words": {"tokenizer": {"letter_trigrams": False}, "vocabulary": {"num_oov_buckets": 4}}},
        "interactions": s,
    }
    if "user" in s or there():
        features = ["city", {"column": "age", "kind": "number", "boundaries": [18.0]}]
        schema["users"] = {"files": "users.parquet", "id": "id", "features": features}
    return from_dict(Schema, schema, "schema"), items, users, log, draw(st.sampled_from([1, 1, 2, 5]))


def write_world(folder, schema, items, users, log):
    """The tables as Parquet, with types that do not depend on the rows."""
    id_type = pa.string() if isinstance(items[0]["id"], str) else pa.int64()
    text, number, lists = pa.string(), pa.float64(), pa.list_(pa.string())
    types = {
        "items": {
            "id": id_type,
            "title": text,
            "brand": text,
            "price": number,
            "tags": lists,
            "about": text,
            "sold": number,
        },
        "users": {"id": id_type, "city": text, "age": number},
        "log": {
            "query": text,
            "item": id_type,
            "user": id_type,
            "time": pa.int64(),
            "type": text,
            "session": pa.int64(),
            "position": pa.int64(),
            "weight": number,
            "label": number,
        },
    }
    folder.mkdir(exist_ok=True)
    for name, rows in (("items", items), ("users", users), ("log", log)):
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, pa.schema(types[name])), folder / f"{name}.parquet")


def files_of(store):
    names = [name for name in store.manifest["files"] if not name.startswith("vocabulary")]
    return {name: {s: v.tolist() for s, v in PackedFile(store.path / name).items()} for name in names}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(world=worlds(), order=st.randoms(use_true_random=False))
def test_a_store_holds_what_plain_python_works_out(world, order):
    schema, items, users, log, shards = world
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        write_world(source, schema, items, users, log)
        out = source / "store"
        out.mkdir()
        try:
            counts = ingest(schema, source, out, shards=shards)
        except CommandError as error:
            assert "no positive pair" in str(error)
            return
        store = Store(out)
        expected = expected_store(schema, items, users, log, shards, store)
        got = files_of(store)
        assert got.keys() == expected.keys()
        for name, sections in expected.items():
            assert got[name].keys() == sections.keys(), name
            for section, values in sections.items():
                assert got[name][section] == values, (name, section)
        assert counts.positives == sum(len(got[n]["positive.item"]) for n in interactions_names(shards))

        # The same rows in another order, in other pieces, on another number of threads: the same bytes.
        for rows in (items, users, log):
            order.shuffle(rows)
        write_world(source, schema, items, users, log)
        again = source / "again"
        again.mkdir()
        ingest(
            schema, source, again, shards=shards, threads=order.choice([1, 2, 4]), batch_rows=order.choice([1, 7, 100])
        )
        for path in out.iterdir():
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.parametrize(("distinct", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "float32")])
def test_few_weights_are_held_as_bytes(shop, tmp_path, dpsr, distinct, dtype):
    shop.log = [{**shop.log[0], "label": 2, "weight": 0.5 + i % distinct} for i in range(600)]
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    (file,) = Store(tmp_path / "store").interactions()
    assert file["positive.weight"].dtype == dtype and ("positive.weight.values" in file) == (dtype == "uint8")
    assert numbers_of(file, "positive.weight").tolist() == sorted(row["weight"] for row in shop.log)


@pytest.mark.parametrize(("distinct", "dtype"), [(255, "uint8"), (256, "int32")])
def test_few_codes_are_held_as_bytes(shop, tmp_path, dpsr, distinct, dtype):
    shop.users = [{**shop.users[0], "user_id": 3 + i, "gender": f"{i % distinct:03}"} for i in range(2 * distinct)]
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    codes = Store(tmp_path / "store").users()["feature.gender"]
    assert codes.dtype == dtype and codes.tolist() == [0, *(1 + i % distinct for i in range(2 * distinct))]


# One log, one store.


@pytest.fixture
def as_tsv(shop, store, tree):
    """The store of the tiny shop from TSV tables, as bytes."""
    return tree(store.path)


@pytest.mark.parametrize("suffix", FORMATS[1:])
def test_every_format_gives_the_same_store(shop, as_tsv, suffix, tmp_path, dpsr, tree):
    shop.path = tmp_path / "other"
    dpsr(*shop.write(suffix).flags(tmp_path / "again")).succeeds()
    assert tree(tmp_path / "again") == as_tsv


def test_the_order_of_the_log_does_not_matter(shop, as_tsv, tmp_path, dpsr, tree):
    for seed in range(3):
        random.Random(seed).shuffle(shop.log)
        dpsr(*shop.write().flags(tmp_path / f"again{seed}")).succeeds()
        assert tree(tmp_path / f"again{seed}") == as_tsv


def test_several_files_directories_and_globs(shop, as_tsv, tmp_path, dpsr, tree):
    shop.write()
    for name in ("items", "users", "log"):
        (shop.path / f"{name}.tsv").unlink()
    folder = shop.path / "log"
    folder.mkdir()
    (folder / "part-2.tsv").write_bytes(encode_table(shop.log[:4], ".tsv"))
    (folder / "part-10.jsonl.gz").write_bytes(encode_table(shop.log[4:], ".jsonl.gz"))
    (folder / "_SUCCESS").touch()
    (shop.path / "items-1.csv").write_bytes(encode_table(shop.items[:2], ".csv"))
    (shop.path / "items-2.parquet").write_bytes(encode_table(shop.items[2:], ".parquet"))
    (shop.path / "a.tsv").write_bytes(encode_table(shop.users[:1], ".tsv"))
    (shop.path / "b.tsv").write_bytes(encode_table(shop.users[1:], ".tsv"))
    shop.schema["items"]["files"] = "items-?.*"
    shop.schema["users"]["files"] = ["a.tsv", "b.tsv"]
    shop.schema["interactions"]["files"] = "log"
    (shop.path / "schema.yaml").write_text(repr(shop.schema))
    dpsr(*shop.flags(tmp_path / "again")).succeeds()
    got = tree(tmp_path / "again")
    assert {name: data for name, data in got.items() if name != "manifest.json"} == {
        name: data for name, data in as_tsv.items() if name != "manifest.json"
    }


def test_input_gives_the_directory_of_the_files(shop, as_tsv, tmp_path, dpsr, tree):
    schema = shop.write().path / "schema.yaml"
    moved = schema.rename(tmp_path / "moved.yaml")
    dpsr("ingest", f"--schema={moved}", f"--input={shop.path}", f"--out={tmp_path / 'again'}").succeeds()
    assert tree(tmp_path / "again") == as_tsv


def test_features_may_have_other_types_in_other_files(shop, tmp_path, dpsr):
    shop.write()
    (shop.path / "users.tsv").unlink()
    (shop.path / "users.1.parquet").write_bytes(encode_table([{"user_id": 5, "gender": "f", "age": 30}], ".parquet"))
    (shop.path / "users.2.parquet").write_bytes(encode_table([{"user_id": 3, "gender": None, "age": "30"}], ".parquet"))
    shop.log = []
    (shop.path / "log.tsv").write_text("query\titem_id\tuser_id\tweight\tlabel\nred\t30\t3\t1\t2\n")
    dpsr(*shop.flags(tmp_path / "store")).succeeds()
    users = PackedFile(tmp_path / "store" / "users.dpsr", "users")
    assert users["id"].tolist() == [-1, 3, 5]
    assert users["feature.age"].tolist() == [0, 1, 1] and users["feature.gender"].tolist() == [0, 0, 1]


def test_threads_memory_and_batches_do_not_matter(shop, tmp_path, tree):
    """A log of several batches and row groups of the database, some of it on disk."""
    schema = load_schema(big_shop(shop, 400_000).path / "schema.yaml")
    stores = []
    for i, options in enumerate(
        [
            {"threads": 1, "memory": 10**9},
            {"threads": 4, "memory": 64 * 10**6},
            {"threads": 2, "batch_rows": 12_345},
        ]
    ):
        out = tmp_path / f"store{i}"
        out.mkdir()
        ingest(schema, shop.path, out, shards=3, **options)
        stores.append(tree(out))
    assert stores[0] == stores[1] == stores[2]


def test_shards(shop, tmp_path, dpsr):
    dpsr(*shop.write().flags(tmp_path / "store"), "--shards=3").succeeds()
    dpsr(*shop.flags(tmp_path / "whole")).succeeds()
    store, whole = Store(tmp_path / "store"), Store(tmp_path / "whole")
    assert [path.name for path in store.interactions_paths] == [
        f"interactions-0000{shard}-of-00003.dpsr" for shard in range(3)
    ]
    texts = [unpack_strings(file, "query_text") for file in store.interactions()]
    for shard, mine in enumerate(texts):
        hashes = [hashlib.md5(text.encode()).digest()[:8] for text in mine]
        assert mine == sorted(mine) and all(int.from_bytes(h, "big") % 3 == shard for h in hashes)
    assert list(store.queries()) == [text for mine in texts for text in mine]
    assert (
        sorted(store.queries()) == list(whole.queries())
        and store.vocabulary.fingerprint == whole.vocabulary.fingerprint
    )
    assert vars(store.counts) == vars(whole.counts)


@pytest.mark.parametrize("value", ["0", "100000", "-1"])
def test_shards_are_counted_from_one(shop, refuses, value):
    shop.write()
    refuses(2, f"--shards={value}: expected 1 to 99999", flags=[f"--shards={value}"])


# What the command refuses. Each of these changes one thing in the tiny shop.


def refused(dpsr, tree, shop, root, status, *fragments, flags=()):
    """Asserts that ingest fails with this status and message, and leaves nothing behind, hidden or not."""
    before = tree(root)
    outcome = dpsr(*shop.flags(root / "store"), *flags)
    outcome.fails(status, "dpsr ingest: error: ", *fragments)
    (root / "store.rejects.jsonl").unlink(missing_ok=True)
    assert tree(root) == before


@pytest.fixture
def refuses(dpsr, tree, shop, tmp_path):
    return lambda status, *fragments, flags=(): refused(dpsr, tree, shop, tmp_path, status, *fragments, flags=flags)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda s: s.pop("items"), ["key 'items' is missing"]),
        (lambda s: s["items"].pop("files"), ["items: key 'files' is missing", "directories or glob patterns"]),
        (lambda s: s["items"].pop("id"), ["items: key 'id' is missing", "column with the item id"]),
        (lambda s: s["items"].pop("text"), ["items: key 'text' is missing"]),
        (lambda s: s["items"].update(text=[]), ["items: text is []"]),
        (lambda s: s["items"].update(files=[]), ["items: files is []"]),
        (lambda s: s["interactions"].update(files=[]), ["interactions: files is []"]),
        (lambda s: s["users"].pop("id"), ["users: key 'id' is missing"]),
        (lambda s: s["interactions"].pop("query"), ["interactions: key 'query' is missing"]),
        (lambda s: s["items"].update(texts="x"), ["items: unknown key 'texts'", "did you mean 'text'?"]),
        (lambda s: s["items"].update(id=3), ["items: id is 3, expected a text"]),
        (lambda s: s["items"].update(text=["title", 3]), ["items: text is 3, expected a text"]),
        (lambda s: s.update(items="items.tsv"), ["items: is 'items.tsv', expected a section"]),
        (lambda s: s["interactions"].update(positive_from="good"), ["positive_from is 'good', expected a number"]),
        (
            lambda s: s["interactions"].update(negative_to=2),
            ["negative_to is 2 and positive_from is 2, expected negative_to below positive_from"],
        ),
        (lambda s: s.pop("users"), ["user is 'user_id', but there is no section `users`"]),
        (lambda s: s["vocabulary"].update(min_count=0), ["vocabulary: min_count is 0, expected 1 or more"]),
        (lambda s: s["vocabulary"].update(num_oov_buckets=2**24 + 1), ["num_oov_buckets is 16777217", "16777216"]),
        (lambda s: s.update(tokenizer={"letter_trigrams": 1}), ["letter_trigrams is 1, expected true or false"]),
        (lambda s: s["interactions"].update(negative_to=1.0, label=None), ["negative_to", "label"]),
        (lambda s: s["items"].update(filters=["brand", "brand"]), ["items: filters has brand twice"]),
        (lambda s: s["items"].update(filters=["a=b"]), ["filters: name is 'a=b'", "without a dot or ="]),
        (lambda s: s["items"].update(filters=["a.b"]), ["filters: name is 'a.b'", "without a dot or ="]),
        (lambda s: s["items"].update(filters=["seventeen_letters"]), ["seventeen_letters", "at most 16 bytes"]),
        (lambda s: s["items"].update(filters=[{"column": "brand", "kind": "text"}]), ["kind is 'text'", "number"]),
        (
            lambda s: s["items"].update(filters=[{"column": "brand", "separator": "|"}]),
            ["only kind multi can have a separator"],
        ),
        (lambda s: s["items"].update(filters=[{"column": "brand", "boundaries": [1]}]), ["unknown key 'boundaries'"]),
    ],
)
def test_schema_errors(shop, refuses, change, fragments):
    change(shop.schema)
    shop.write()
    refuses(2, f"{shop.path / 'schema.yaml'}: ", *fragments)


def test_no_schema_file(shop, refuses):
    refuses(2, "schema.yaml: no such file, expected a YAML file")


def test_missing_file(shop, refuses):
    shop.write()
    (shop.path / "items.tsv").unlink()
    refuses(2, f"{shop.path}/items.*: no such file", "--input", "`files`")


def test_unknown_kind_of_file(shop, refuses):
    shop.write()
    (shop.path / "items.tsv").rename(shop.path / "items.xlsx")
    refuses(2, "items.xlsx: unknown kind of file, expected .parquet, .csv, .tsv, .jsonl")


@pytest.mark.parametrize("name", ["items", "users", "log"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_empty_file(shop, refuses, name, suffix):
    shop.write(suffix)
    (shop.path / f"{name}{suffix}").write_bytes(b"")
    refuses(1, f"{name}{suffix}: is empty, expected a table with columns ")


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_file(shop, refuses, suffix):
    shop.write(suffix)
    path = shop.path / f"items{suffix}"
    data = path.read_bytes()
    if suffix in (".tsv", ".csv"):
        path.write_bytes(data + (b"1" if suffix == ".tsv" else b"1,2,3,4,5\n"))
    else:
        path.write_bytes(data[: len(data) // 2])
    refuses(1, f"items{suffix}: cannot be read as ")


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".parquet"])
def test_items_without_a_row(shop, refuses, suffix):
    shop.write(suffix)
    path = shop.path / f"items{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(shop.items).slice(0, 0), path)
    else:
        path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    refuses(1, f"items{suffix}: has no usable row, expected at least one item")


@pytest.mark.parametrize("suffix", [".tsv", ".parquet"])
def test_log_without_a_row(shop, refuses, suffix):
    shop.write(suffix)
    path = shop.path / f"log{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(shop.log).slice(0, 0), path)
    else:
        path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    refuses(1, "the log has no positive pairs")


@pytest.mark.parametrize("suffix", [".tsv", ".parquet"])
def test_users_without_a_row(shop, tmp_path, dpsr, suffix):
    shop.log = [row | {"user_id": -1} for row in shop.log]
    shop.write(suffix)
    path = shop.path / f"users{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(shop.users).slice(0, 0), path)
    else:
        path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    dpsr(*shop.flags(tmp_path / "store")).succeeds()
    users = PackedFile(tmp_path / "store" / "users.dpsr", "users")
    assert users["id"].tolist() == [-1] and users["feature.gender"].tolist() == [0] == users["feature.age"].tolist()
    assert users["values.gender.splits"].tolist() == [0]


@pytest.mark.parametrize("suffix", FORMATS)
def test_missing_column_lists_the_columns_there(shop, refuses, suffix):
    shop.schema["interactions"]["query"] = "search_term"
    shop.write(suffix)
    refuses(1, f"log{suffix}: has no column search_term; its columns are query, item_id, user_id, weight, label")


def test_all_missing_columns_are_named(shop, refuses):
    shop.schema["items"].update(id="sku", text=["name", "brand"])
    shop.write()
    refuses(1, "items.tsv: has no column name, sku; its columns are item_id, title, brand, color")


def test_a_column_that_stands_twice(shop, refuses):
    shop.write()
    path = shop.path / "items.tsv"
    path.write_bytes(path.read_bytes().replace(b"color", b"title", 1))
    refuses(1, "items.tsv: ", "column title", "more than once")


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".tsv.gz"])
@pytest.mark.parametrize(("name", "column", "text"), [("items", "title", "Blue suède shoes"), ("log", "query", "红鞋")])
def test_bad_utf8(shop, refuses, suffix, name, column, text):
    shop.write(suffix)
    path = shop.path / f"{name}{suffix}"
    data = encode_table(getattr(shop, name), suffix.removesuffix(".gz"))
    data = data.replace(text.encode(), b"\xe8\xff", 1)
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    refuses(1, f"(1 rows: {column} is not UTF-8 text, first {name}{suffix} row ")


def test_bad_utf8_in_json(shop, refuses):
    shop.write(".jsonl")
    path = shop.path / "items.jsonl"
    path.write_bytes(path.read_bytes().replace("suède".encode(), b"su\xe8de"))
    refuses(1, "1 of 7 items cannot be used (1 rows: title is not UTF-8 text, first items.jsonl row 5: ")


def test_bad_utf8_in_a_parquet_file(shop, refuses):
    shop.write(".parquet")
    table = pa.Table.from_pylist(shop.items)
    titles = pa.array([b"\xff"] * len(table), pa.binary()).cast(pa.string(), safe=False)
    table = table.set_column(1, "title", titles)
    pyarrow.parquet.write_table(table, shop.path / "items.parquet")
    refuses(1, "7 of 7 items cannot be used (7 rows: title is not UTF-8 text, first items.parquet row 1: ")


def test_bad_utf8_in_the_header(shop, refuses):
    shop.write()
    path = shop.path / "items.tsv"
    path.write_bytes(path.read_bytes().replace(b"color", b"couleur d\xe9fraichie", 1))
    refuses(1, "items.tsv: ", "UTF-8")


def test_bad_utf8_in_an_id(shop, refuses):
    shop.write()
    path = shop.path / "items.tsv"
    path.write_bytes(path.read_bytes().replace(b"30\t", b"\xff\t", 1))
    refuses(1, "1 of 7 items cannot be used (1 rows: item id is not UTF-8 text, first items.tsv row 1: ")


def test_bad_utf8_in_a_user_feature(shop, refuses):
    shop.write()
    path = shop.path / "users.tsv"
    path.write_bytes(path.read_bytes().replace(b"\tf\t", b"\t\xff\t", 1))
    refuses(1, "1 of 3 users cannot be used", "gender", " is not UTF-8 text, first users.tsv row 1: ")


def test_bad_utf8_in_a_column_that_is_not_used(shop, tmp_path, dpsr):
    shop.write()
    path = shop.path / "items.tsv"
    path.write_bytes(path.read_bytes().replace(b"\tred\n", b"\t\xff\n"))
    dpsr(*shop.flags(tmp_path / "store")).succeeds()


@pytest.mark.parametrize(
    ("name", "column", "value", "fragments"),
    [
        # Ids of which more than may be rejected are no numbers are text; the log refers to an item that is gone.
        ("items", "item_id", "A-1", ["3 of 11 interactions", "3 rows: item is not in the item table", "row 1: '30'"]),
        ("items", "item_id", 1.5, ["3 of 11 interactions", "3 rows: item is not in the item table"]),
        ("users", "user_id", "x", ["7 of 11 interactions", "7 rows: user is not in the user table", "row 1: '5'"]),
        ("items", "item_id", None, ["1 of 7 items", "item id is missing, first items.jsonl row 1: None"]),
        ("items", "item_id", 2**63, ["1 of 7 items", "item id is not a whole number of 0 or more", str(2**63)]),
        ("items", "item_id", -1, ["1 of 7 items", "item id is not a whole number of 0 or more", "'-1'"]),
        ("users", "user_id", -1, ["1 of 3 users", "user id is not a whole number of 0 or more", "'-1'"]),
        ("items", "title", ["a", "b"], ["1 of 7 items", "title"]),
        ("log", "item_id", "x", ["1 of 11 interactions", "item is not in the item table, first log.jsonl row 1: 'x'"]),
        ("log", "label", "good", ["label is not a number, first log.jsonl row 1: 'good'"]),
        ("log", "label", {"a": 1}, ["label is not a number"]),
        ("log", "weight", "heavy", ["weight is not a number of 0 or more, first log.jsonl row 1: 'heavy'"]),
        ("log", "weight", None, ["weight is not a number of 0 or more"]),
        ("log", "weight", -1.0, ["weight is not a number of 0 or more, first log.jsonl row 1: '-1'"]),
        ("log", "weight", 1e300, ["weight is not a number of 0 or more"]),  # finite, but not as a float32
    ],
)
def test_values_of_the_wrong_kind(shop, refuses, name, column, value, fragments):
    getattr(shop, name)[0][column] = value
    shop.write(".jsonl")
    refuses(1, "cannot be used (", *fragments)


# A label that is "nan" is no label.
@pytest.mark.parametrize(
    ("column", "text"), [("weight", "nan"), *itertools.product(["weight", "label"], ["inf", "-inf"])]
)
def test_numbers_that_are_not_finite(shop, refuses, column, text):
    shop.log[0][column] = text
    shop.write()
    refuses(
        1, f"1 of 11 interactions cannot be used (1 rows: {column} is not a number", f"first log.tsv row 1: '{text}'"
    )


def test_a_row_without_a_user_is_anonymous(shop, store, tmp_path, dpsr):
    shop.log[4]["user_id"] = None  # was -1
    dpsr(*shop.write().flags(tmp_path / "again")).succeeds()
    for name in ("users.dpsr", "interactions.dpsr"):
        assert (tmp_path / "again" / name).read_bytes() == (store.path / name).read_bytes()


def log_of(shop, rows, **schema):
    """Replaces the log by rows of (query, item, user, time, type, ...), whose further columns `schema` names."""
    more = (name for name in ("session", "label", "position") if name in schema)
    names = ["query", "item_id", "user_id", "time", "type", *more]
    shop.log = [dict(zip(names, row, strict=True)) for row in rows]
    kept = {name: shop.schema["interactions"][name] for name in ("files", "query", "item", "user")}
    shop.schema["interactions"] = kept | {"time": "time", "type": "type"} | schema
    return shop


def pairs_of(store):
    """{(query, item id, type): time of the request} of the positive pairs."""
    (file,) = store.interactions()
    queries, items = list(store.queries()), store.items()["id"]
    columns = queries_of(file), file["positive.item"], file["positive.type"], file["positive.time"]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {(queries[query], int(items[item]), EVENT_TYPES[kind]): time for query, item, kind, time in rows}


def unclicked_of(store):
    """{(query, item id): unclicked items of the same request} of the positive pairs."""
    (file,) = store.interactions()
    queries, items = list(store.queries()), store.items()["id"]
    shown = ragged(file, "impression.splits", "impression.item")
    rows = zip(queries_of(file).tolist(), file["positive.item"].tolist(), file["positive.request"], strict=True)
    return {
        (queries[query], int(items[item])): sorted(items[shown[request]].tolist()) if request >= 0 else []
        for query, item, request in rows
    }


def test_a_pair_has_the_time_of_its_request(shop, tmp_path, dpsr):
    """Click A, click B, order A: the query came before all of them, and a history as of then has none of them."""
    minute = 60
    log_of(
        shop,
        [
            ("red shoes", 30, 5, 1000, "impression"),
            ("red shoes", 30, 5, 1000 + minute, "click"),
            ("bolt", 10, 5, 1000 + 2 * minute, "click"),
            ("red shoes", 20, 5, 1000 + 3 * minute, "click"),
            ("red shoes", 30, 5, 1000 + 30 * minute, "order"),
            ("red shoes", 70, 5, 1001 + 60 * minute, "click"),
            ("red shoes", 50, 3, 1000 + minute, "click"),
        ],
    )
    dpsr(*shop.write().flags(tmp_path / "store")).succeeds()
    store = Store(tmp_path / "store")
    assert pairs_of(store) == {
        ("red shoes", 30, "click"): 1000,
        ("red shoes", 20, "click"): 1000,
        ("red shoes", 30, "order"): 1000,
        # More than half an hour after the order.
        ("red shoes", 70, "click"): 1001 + 60 * minute,
        # Another user.
        ("red shoes", 50, "click"): 1000 + minute,
        ("bolt", 10, "click"): 1000 + 2 * minute,
    }
    events = store.users()["event.time"].tolist()
    assert events == [1060, 1060, 1120, 1180, 2800, 4601], "events keep their own times"


def test_a_session_is_one_request_and_rows_without_one_are_split_by_a_gap(shop, tmp_path, dpsr):
    rows = [
        ("red", 30, None, 1000, "click", "s1"),
        ("red", 20, None, 90_000, "impression", "s1"),
        ("red", 30, None, 1000, "impression", None),
        ("red", 20, None, 2000, "click", None),
        ("red", 70, None, 9000, "impression", None),
        ("red", 10, None, 9060, "click", None),
    ]
    dpsr(*log_of(shop, rows, session="session").write(".jsonl").flags(tmp_path / "store")).succeeds()
    assert unclicked_of(Store(tmp_path / "store")) == {("red", 30): [20], ("red", 20): [30], ("red", 10): [70]}
    shop.schema["interactions"]["session_gap"] = 200
    dpsr(*shop.write(".jsonl").flags(tmp_path / "wide")).succeeds()
    assert unclicked_of(Store(tmp_path / "wide")) == {("red", 30): [20], ("red", 20): [30, 70], ("red", 10): [30, 70]}


@pytest.mark.parametrize("session", [None, "session"])
def test_rows_without_user_and_session_are_also_split_after_a_gap_since_the_first(shop, tmp_path, dpsr, session):
    """People who ask one after the other would else form one request for as long as somebody asks."""
    times = [(30, 1000, "click"), (20, 2500, "impression"), (70, 4000, "impression"), (10, 5000, "click")]
    of_session = [""] if session else []
    people = {"red": None, "blue": 5}
    rows = [
        (query, item, user, time, kind, *of_session) for query, user in people.items() for item, time, kind in times
    ]
    more = {"session": session} if session else {}
    dpsr(*log_of(shop, rows, **more).write(".jsonl").flags(tmp_path / "store")).succeeds()
    assert unclicked_of(Store(tmp_path / "store")) == {
        ("red", 30): [20],
        ("red", 10): [70],
        ("blue", 30): [20, 70],
        ("blue", 10): [20, 70],
    }


def test_without_time_and_session_no_impression_is_used(shop, tmp_path, dpsr):
    log_of(shop, [("red", 30, 5, 0, "click"), ("red", 20, 5, 0, "impression")])
    del shop.schema["interactions"]["time"]
    printed = dpsr(*shop.write().flags(tmp_path / "store")).succeeds().out
    assert "neither `time` nor `session`, so unclicked impressions are not used" in printed
    (file,) = Store(tmp_path / "store").interactions()
    assert "positive.request" not in file and len(file["positive.item"]) == 1


def test_labels_win_over_clicks(shop, tmp_path, dpsr):
    """The paper's example: phone cases are clicked for "cell-phone" (section 4.5)."""
    rows = [
        ("cell-phone", 30, 5, 1000, "click", None),
        ("cell-phone", 20, 5, 1001, "click", None),
        ("cell-phone", 20, 3, 1002, "order", None),
        ("cell-phone", 20, None, None, None, 0),
        ("cell-phone", 70, None, None, None, 2),
        # Two people do not agree.
        ("cell-phone", 10, 8, 1003, "click", None),
        ("cell-phone", 10, None, None, None, 0),
        ("cell-phone", 10, None, None, None, 2),
        ("case", 20, 5, 1004, "click", None),
    ]
    log_of(shop, rows, label="label", negative_to=0, positive_from=2)
    dpsr(*shop.write(".jsonl").flags(tmp_path / "store")).succeeds()
    store = Store(tmp_path / "store")
    assert {pair[:2] for pair in pairs_of(store)} == {
        ("cell-phone", 30),
        ("cell-phone", 70),
        ("cell-phone", 10),
        ("case", 20),
    }
    (file,) = store.interactions()
    negatives = ragged(file, "negative.splits", "negative.item")
    assert [store.items()["id"][rows].tolist() for rows in negatives] == [[], [20]]
    assert len(store.users()["event.item"]) == 5, "what users clicked stays in their histories"


def test_labels_that_overrule_every_click(shop, refuses):
    rows = [("red", 30, 5, 1000, "click", None), ("red", 30, None, None, None, 0)]
    log_of(shop, rows, label="label", negative_to=0).write(".jsonl")
    refuses(1, "the log has no positive pairs: no label in column label is at least 1")


def test_the_most_skipped_items_are_mined(shop, tmp_path, dpsr):
    """Item 20 is shown first, as often as item 30, and never clicked. Item 70 is as often shown, but far down."""
    rows = []
    for request in range(40):
        time = 10_000 * (request + 1)
        clicked = request % 2 == 0
        rows += [
            ("red", 20, None, time, "impression", 1),
            ("red", 30, None, time, "click" if clicked else "impression", 2),
            ("red", 70, None, time, "impression", 50),
            ("bolt", 10, None, time, "click", 1),
            ("bolt", 20, None, time, "impression", 2),
            ("bolt", 50, None, time, "impression", 50),
        ]
    log_of(shop, rows, position="position", mined_negatives=5)
    dpsr(*shop.write(".jsonl").flags(tmp_path / "store")).succeeds()
    (file,) = Store(tmp_path / "store").interactions()
    negatives = ragged(file, "negative.splits", "negative.item")
    ids = Store(tmp_path / "store").items()["id"]
    assert [ids[rows].tolist() for rows in negatives] == [[20], [20]], "bolt, red; nobody clicks at position 50"
    shop.schema["interactions"]["mined_from"] = 1000
    dpsr(*shop.write(".jsonl").flags(tmp_path / "strict")).succeeds()
    assert len(Store(tmp_path / "strict").interactions()[0]["negative.item"]) == 0


def test_nothing_is_mined_where_no_click_was_to_be_expected(shop, tmp_path, dpsr):
    """Before the held-out click, "bolt" was shown at a position only at which nobody clicks anything."""
    rows = [("bolt", 20, None, 2_000_000, "click", 50)]
    for request in range(40):
        time = 10_000 * (request + 1)
        rows += [
            ("red", 30, None, time, "click", 1),
            ("bolt", 20, None, time, "impression", 50),
            ("bolt", 30, None, time, "impression", 50),
        ]
    log_of(shop, rows, position="position", mined_negatives=5, held_out={"after": "1000000"})
    dpsr(*shop.write(".jsonl").flags(tmp_path / "store")).succeeds()
    (file,) = Store(tmp_path / "store").interactions()
    assert ragged(file, "negative.splits", "negative.item") == [[], []], "bolt, red"


def test_no_positive_pair(shop, refuses):
    shop.schema["interactions"]["positive_from"] = 3
    shop.write()
    refuses(1, "the log has no positive pairs: no label in column label is at least 3; correct the schema")


def test_a_long_feature_name(shop, refuses):
    name = "age_of_the_user_in_whole_years"
    shop.users = [{"user_id": 1, name: 5}, {"user_id": 5, name: 5}, {"user_id": 3, name: 1}, {"user_id": 8, name: 2}]
    shop.schema["users"]["features"] = [name]
    shop.write()
    refuses(2, f"users: features: name is '{name}'", "16")


# Rows that cannot be used.


def read_rejects(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"item_id": 99}, "item"),
        ({"user_id": 99}, "user"),
        ({"query": "  "}, "query"),
        ({"query": "\u3000"}, "query"),
        ({"label": "good"}, "label"),
    ],
)
def test_unusable_rows(shop, store, change, reason, tmp_path, dpsr, tree):
    shop.log.insert(3, shop.log[0] | change)  # 1 of 12
    shop.write()
    listed = tmp_path / "refused.rejects.jsonl"
    outcome = dpsr(*shop.flags(tmp_path / "refused"))
    outcome.fails(
        1, "log.tsv: 1 of 12 interactions cannot be used (1 rows: ", "--max_reject_fraction=0.01", str(listed)
    )
    assert not (tmp_path / "refused").exists()
    (reject,) = read_rejects(listed)
    assert (reject["file"], reject["row"], reject["table"]) == (str(shop.path / "log.tsv"), 4, "interactions")
    assert reason in reject["reason"]
    assert f"(1 rows: {reject['reason']}, first log.tsv row 4: " in outcome.errors[0]
    dpsr(*shop.flags(tmp_path / "refused"), "--max_reject_fraction=0.08").fails(1, "--max_reject_fraction=0.08")
    elsewhere = tmp_path / "elsewhere.jsonl"
    flags = [*shop.flags(tmp_path / "accepted"), "--max_reject_fraction=0.084", f"--rejects={elsewhere}"]
    accepted = dpsr(*flags).succeeds()
    assert "left out 1 interactions" in accepted.out and reject["reason"] in accepted.out, "what was left out is told"
    assert read_rejects(elsewhere) == [reject] and not (tmp_path / "accepted.rejects.jsonl").exists()
    got, expected = tree(tmp_path / "accepted"), tree(store.path)
    assert Store(tmp_path / "accepted").counts.rejected == 1
    del got["manifest.json"], expected["manifest.json"]
    assert got == expected, "as if the row had not been there"
    shop.log.pop(3)
    dpsr(*shop.write().flags(tmp_path / "accepted"), "--overwrite", f"--rejects={elsewhere}").succeeds()
    assert not elsewhere.exists(), "no rejects, no file, not even that of the run before"


def test_all_reasons_are_counted(shop, dpsr, tmp_path):
    shop.log = [*shop.log[:5], shop.log[0] | {"item_id": 99}, *shop.log[5:], shop.log[0] | {"query": ""}]
    shop.log.append(shop.log[0] | {"item_id": 98})
    outcome = dpsr(*shop.write().flags(tmp_path / "store"))
    outcome.fails(
        1, "3 of 14 interactions cannot be used (2 rows: item", "; 1 rows: query", "first log.tsv row 6: '99'"
    )
    rejects = read_rejects(tmp_path / "store.rejects.jsonl")
    assert [(reject["row"], reject["value"]) for reject in rejects][::2] == [(6, "99"), (14, "98")]


def test_rejects_of_all_tables_in_the_order_of_the_files(shop, dpsr, tmp_path):
    """A repeated id is known only when the whole table has been read. Its reject is sorted in among the others."""
    shop.items = [shop.items[0], shop.items[0] | {"title": "again"}, *shop.items[1:], shop.items[1] | {"item_id": -5}]
    shop.items.append(shop.items[3] | {"brand": "again"})
    shop.users.append(shop.users[1] | {"age": 99})
    shop.log.append(shop.log[0] | {"item_id": 99})
    dpsr(*shop.write().flags(tmp_path / "store"), "--max_reject_fraction=0.5").succeeds()
    rejects = read_rejects(tmp_path / "store.rejects.jsonl")
    assert [(reject["table"], reject["row"]) for reject in rejects] == [
        ("items", 2),
        ("items", 9),
        ("items", 10),
        ("users", 4),
        ("interactions", 12),
    ]
    assert rejects[0]["reason"] == "item id appears more than once" and rejects[0]["value"] == "30"
    assert rejects[3]["reason"] == "user id appears more than once" and rejects[3]["value"] == "3"
    store = Store(tmp_path / "store")
    assert store.counts.rejected == 5
    titles = dict(zip(store.items()["id"].tolist(), store.titles(), strict=True))
    assert titles[30] == "Red running shoes" and store.counts.items == 7, "the first by the order of the files is kept"
    assert store.users()["feature.age"].tolist()[1] == 1


@pytest.mark.parametrize(("table", "message"), [("items", "1 of 8 items"), ("users", "1 of 4 users")])
def test_each_table_has_its_own_share(shop, dpsr, tmp_path, table, message):
    rows = getattr(shop, table)
    rows.append(rows[0])
    dpsr(*shop.write().flags(tmp_path / "store")).fails(1, f"{table}.tsv: {message} cannot be used", "more than once")
    assert not (tmp_path / "store").exists()


def test_a_hopeless_job_stops_early(shop, dpsr, tmp_path, monkeypatch):
    monkeypatch.setattr("dpsr_tf.data.rejects._HOPELESS", 5)
    monkeypatch.setattr("dpsr_tf.data.ingest._BATCH_ROWS", 1)
    shop.log = [row | {"item_id": 99} for row in shop.log * 9]
    schema = load_schema(shop.write(".parquet").path / "schema.yaml")
    (tmp_path / "out").mkdir()
    with pytest.raises(CommandError, match=r"6 of 6 interactions cannot be used"):
        ingest(schema, shop.path, tmp_path / "out", batch_rows=1)


def test_a_file_that_holds_no_rejects_is_left_alone(shop, dpsr, tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    dpsr(*shop.write().flags(tmp_path / "store"), f"--rejects={tmp_path / 'thesis'}").fails(
        2, "thesis: this file exists and does not hold rejects"
    )
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_nothing_but_unusable_rows(shop, dpsr, tmp_path):
    shop.log = [row | {"item_id": 99} for row in shop.log]
    dpsr(*shop.write().flags(tmp_path / "store"), "--max_reject_fraction=1").fails(1, "no positive pair")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan"])
def test_max_reject_fraction_is_a_share(shop, refuses, value):
    shop.write()
    refuses(2, f"--max_reject_fraction={value}", "0 to 1", flags=[f"--max_reject_fraction={value}"])


# Where the store goes.


def test_a_store_that_is_there_stays_untouched(shop, store, tmp_path, dpsr, tree):
    before = tree(store.path)
    shop.items[0]["title"] = "another title"
    shop.write()
    dpsr(*shop.flags(store.path)).fails(1, f"{store.path}: exists already", "--overwrite")
    assert tree(store.path) == before
    dpsr(*shop.flags(store.path), "--overwrite").succeeds()
    assert "another title" in Store(store.path).titles()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shop", "store"]


def test_a_failing_overwrite_keeps_the_old_store(shop, store, dpsr, tree, tmp_path):
    shop.schema["interactions"]["query"] = "search_term"
    before = tree(store.path)
    shop.write()
    dpsr(*shop.flags(store.path), "--overwrite").fails(1, "has no column search_term")
    assert tree(store.path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shop", "store"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_overwrite_replaces_nothing_but_a_store(shop, dpsr, tree, tmp_path, kind):
    shop.write()
    if kind == "file":
        (tmp_path / "thesis").write_text("years of work")
    else:
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    before = tree(tmp_path)
    dpsr(*shop.flags(tmp_path / "thesis"), "--overwrite").fails(1, f"{tmp_path / 'thesis'}: ", "store")
    assert tree(tmp_path) == before


def test_parents_are_made_only_if_all_is_well(shop, dpsr, tree, tmp_path):
    shop.write()
    dpsr(*shop.flags(tmp_path / "a" / "b" / "store")).succeeds()
    assert Store(tmp_path / "a" / "b" / "store").counts.items == 7
    shop.schema["interactions"]["query"] = "search_term"
    shop.write()
    before = tree(tmp_path)
    dpsr(*shop.flags(tmp_path / "c" / "d" / "store")).fails(1, "has no column")
    assert tree(tmp_path) == before


def test_out_that_cannot_be_made(shop, dpsr, tmp_path):
    shop.write()
    (tmp_path / "file").touch()
    dpsr(*shop.flags(tmp_path / "file" / "store")).fails(1, f"{tmp_path / 'file' / 'store'}: cannot be made")


def test_out_is_the_current_directory(shop, dpsr, tmp_path, monkeypatch):
    shop.write()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    dpsr("ingest", f"--schema={shop.path / 'schema.yaml'}", "--out=.", "--overwrite").fails(1, "--out")


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--out=x"], "give either --schema=FILE or --adapter=NAME"),
        (["--out=x", "--schema=a", "--adapter=homedepot"], "give either --schema=FILE or --adapter=NAME"),
        (["--schema=a"], "--out is missing"),
        (["--adapter=homedepot", "--out=x"], "--adapter=homedepot needs --input"),
        (["--adapter=nope", "--input=.", "--out=x"], "--adapter=nope: expected one of "),
        (["--schema=a", "--out=x", "extra"], "unexpected argument 'extra'"),
        (["--schema=a", "--out=x", "--max_reject_fraction=some"], "--max_reject_fraction=some"),
    ],
)
def test_usage_errors(dpsr, tmp_path, monkeypatch, flags, fragment):
    monkeypatch.chdir(tmp_path)
    dpsr("ingest", *flags).fails(2, fragment)
    assert list(tmp_path.iterdir()) == []


# Runs that are cut short.


def big_shop(shop, rows):
    """The tiny shop with a log of so many rows, as Parquet, with times."""
    shop.schema["interactions"] |= {"time": "time", "session": "session"}
    shop.write(".parquet")
    random = np.random.default_rng(1)
    log = {
        "query": pa.array([f"query {i}" for i in range(1000)]).take(pa.array(random.integers(0, 1000, rows))),
        "item_id": random.choice([30, 10, 70, 50, 20, 90], rows),
        "user_id": random.choice([-1, 5, 3, 8], rows),
        "weight": random.random(rows),
        "label": random.integers(0, 3, rows),
        "time": random.integers(0, 2**31, rows),
        "session": random.integers(0, 2**31, rows),
    }
    pyarrow.parquet.write_table(pa.table(log), shop.path / "log.parquet", row_group_size=100_000)
    return shop


def command(shop, out, *flags):
    return [sys.executable, "-m", "dpsr_common", *shop.flags(out), *flags]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(shop, number, tmp_path, dpsr):
    out = tmp_path / "stores" / "store"
    out.parent.mkdir()
    process = subprocess.Popen(command(big_shop(shop, 1_000_000), out), stderr=subprocess.DEVNULL)
    while not any(out.parent.glob(".store.unfinished-*/unfinished")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert not out.exists()
    assert bool(list(out.parent.iterdir())) == (number == signal.SIGKILL), "only a killed run cannot clean up"
    for left in out.parent.iterdir():
        with pytest.raises(CommandError):
            Store(left)
    shop.schema["interactions"] = {"files": "log.*", "query": "query", "item": "item_id"}
    (shop.path / "log.parquet").unlink()
    dpsr(*shop.write(".parquet").flags(out)).succeeds()
    assert [path.name for path in out.parent.iterdir()] == ["store"], "the next run removes what was left"
    assert Store(out).counts.positives == len(shop.log)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("translated", [False, True])
def test_a_signal_that_a_library_swallows(number, ends, translated):
    before = signal.getsignal(number)
    after = []
    with pytest.raises(ends) as raised, record_signals() as signals, end_on_signal(signals):
        try:
            signal.raise_signal(number)
        except BaseException as error:
            assert isinstance(error, ends)
            if translated:
                raise ValueError("reading failed") from None
        after.append("goes on")
    assert after == ([] if translated else ["goes on"])
    assert getattr(raised.value, "code", 143) == 143
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("limit", [1_000, 10_000, 100_000, 1_000_000])
def test_a_file_that_may_not_grow(shop, limit, tmp_path):
    """What a full disk looks like to a process, at four places of its work."""
    out = tmp_path / "stores" / "store"
    out.parent.mkdir()
    ran = subprocess.run(
        command(big_shop(shop, 300_000), out, "--memory=64MB"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    message = ran.stderr.splitlines()[-1]
    assert f"{out.parent}: the disk is full" in message and "make room" in message
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("megabytes", [1, 3, 4])
def test_a_full_disk(shop, megabytes, tmp_path, dpsr):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small disk")
    try:
        outcome = dpsr(*big_shop(shop, 300_000).flags(disk / "store"), "--memory=64MB")
        outcome.fails(1, f"{disk}: the disk is full", "make room")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.long
def test_memory_does_not_grow_with_the_log(shop, tmp_path):
    def peak(rows):
        big_shop(shop, rows)
        script = f"""
import sys
from dpsr_common import command_line
assert command_line.main({[*shop.flags(tmp_path / f"store-{rows}"), "--memory=64MB", "--threads=2"]}) == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
        ran = subprocess.run(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        return int(ran.stdout.split()[-1])

    assert peak(3_000_000) < 1.35 * peak(300_000)  # benchmarks/store.py measures it at size


def test_too_little_memory_names_the_flag(shop, refuses):
    shop.write()
    for text in ("10MB", "much", "-1GB", "1"):
        refuses(2, f"--memory={text}: expected 64MB or more", flags=[f"--memory={text}"])


# The Home Depot adapter.


def homedepot_files(path, train):
    """Files of that layout: unquoted TSV, titles with inch signs and quotes."""
    path.mkdir()
    (path / "products.tsv").write_text(
        "product_uid\tproduct_title\n"
        '100001\t1/2 in. x 3" Galvanized "Hurricane" Tie\n'
        '100002\t"Unclosed quote\n'
        "100003\tIt's 5' x 7' Rug, Beige\n"
        '100004\t""\n'
    )
    (path / "judgments.train.tsv").write_text("search_term\tproduct_uid\trelevance\n" + train)
    return path


def test_homedepot_adapter(dpsr, tmp_path):
    train = '3" tie\t100001\t3\n3" tie\t100002\t1.67\n3" tie\t100003\t2\nrug 5\'\t100003\t2.33\nrug 5\'\t100001\t1\n'
    source = homedepot_files(tmp_path / "homedepot", train)
    dpsr("ingest", "--adapter=homedepot", f"--input={source}", f"--out={tmp_path / 'store'}").succeeds()
    store = Store(tmp_path / "store")
    assert store.titles() == [
        '1/2 in. x 3" Galvanized "Hurricane" Tie',
        '"Unclosed quote',
        "It's 5' x 7' Rug, Beige",
        '""',
    ]
    (log,) = store.interactions()
    assert unpack_strings(log, "query_text") == ['3" tie', "rug 5'"]
    assert ragged(log, "positive.splits", "positive.item") == [[0], [2]], "2.33 is relevant, 2 is neither"
    assert ragged(log, "negative.splits", "negative.item") == [[1], [0]], "1.67 and below are supervised negatives"


def test_homedepot_adapter_names_what_is_missing(dpsr, tmp_path):
    source = homedepot_files(tmp_path / "homedepot", "a\t100001\t3\n")
    (source / "judgments.train.tsv").unlink()
    outcome = dpsr("ingest", "--adapter=homedepot", f"--input={source}", f"--out={tmp_path / 'store'}")
    outcome.fails(2, f"{source / 'judgments.train.tsv'}: no such file")


def test_adapters_are_valid_schemas():
    assert load_schema(open_adapter("homedepot").schema_path).interactions.positive_from == 2.33
    with pytest.raises(UsageError, match="--adapter=shop: expected one of"):
        open_adapter("shop")


def test_homedepot_files(dpsr, tmp_path, homedepot):
    outcome = dpsr("ingest", "--adapter=homedepot", f"--input={homedepot}", f"--out={tmp_path / 'store'}").succeeds()
    assert re.search(r"54,667 items, 1 users, 7,614 queries, 33,503 positive pairs, 7,689 supervised", outcome.out)
    store = Store(tmp_path / "store")
    lines = (homedepot / "products.tsv").read_text(encoding="utf-8").split("\n")[1:54_668]
    assert store.titles() == [line.split("\t")[1].rstrip("\r") for line in lines]
    assert store.items()["id"].tolist() == [int(line.split("\t")[0]) for line in lines]
