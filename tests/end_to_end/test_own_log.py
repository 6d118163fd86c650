"""All of docs/data_format.md with a raw log: awkward text, text ids, mixed file formats."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from dpsr_common import command_line
from dpsr_tf.data.store import Store

WORDS = [
    "red",
    "blue",
    "steel",
    "oak",
    "kettle",
    "lamp",
    "usb-c",
    "12mm",
    "跑鞋",
    "红色",
    "手机",
    "壳",
    "crème",
    "Ärmel",
]
START = datetime.datetime(2024, 3, 1, tzinfo=datetime.timezone.utc)
TITLES = {0: 'Bolt, 12"" wide\nsecond line', 1: "'; DROP TABLE items; --", 2: "007", 3: "NA", 4: "=1+1"}


def dpsr(capfd, *arguments):
    """Runs a command, asserts that it succeeds, and returns what it printed."""
    status = command_line.main([str(argument) for argument in arguments])
    printed = capfd.readouterr()
    assert status == 0, printed.err
    return printed.out


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path, r = tmp_path_factory.mktemp("own"), random.Random(5)
    items = [
        {
            "sku": f"SKU/{i:04}",
            "title": TITLES.get(i, " ".join(r.choices(WORDS, k=4))),
            "brand": r.choice(["Acme", "阿克梅", None]),
            "price": r.choice([None, 9.5, 10, 199.99]),
            "tags": r.choice(["a|b", "c", None, "a| c |a"]),
            "description": " ".join(r.choices(WORDS, k=9)),
        }
        for i in range(80)
    ]
    (path / "items").mkdir()
    with open(path / "items" / "first.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(items[0]))
        writer.writeheader()
        writer.writerows(items[:40])
    with gzip.open(path / "items" / "second.jsonl.gz", "wt", encoding="utf-8") as file:
        for item in items[40:]:
            row = item | {"tags": item["tags"] and item["tags"].split("|")}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    users = [{"uid": f"u{i}", "gender": r.choice("fm"), "age": r.choice([None, 18, 30, 77])} for i in range(20)]
    pa.parquet.write_table(pa.Table.from_pylist(users), path / "users.parquet")
    log = []
    for session in range(300):
        time = START + datetime.timedelta(seconds=r.randrange(20 * 86_400))
        user, query = r.choice([None, "-1", *(user["uid"] for user in users)]), " ".join(r.choices(WORDS, k=2))
        for position, item in enumerate(r.sample(items, 6), 1):
            log.append(
                {
                    "q": query,
                    "sku": item["sku"],
                    "uid": user,
                    "event": r.choice(["view", "skip", "click", "buy", "cart"]),
                    "at": time + datetime.timedelta(seconds=position),
                    "visit": f"s{session}",
                    "rank": position,
                }
            )
    (path / "log").mkdir()
    pa.parquet.write_table(pa.Table.from_pylist(log[:600]), path / "log" / "1.parquet")
    with open(path / "log" / "2.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(log[0]))
        writer.writeheader()
        writer.writerows(row | {"at": row["at"].isoformat()} for row in log[600:1200])
    with gzip.open(path / "log" / "3.jsonl.gz", "wt", encoding="utf-8") as file:
        for row in log[1200:]:
            file.write(json.dumps(row | {"at": row["at"].isoformat()}, ensure_ascii=False) + "\n")
    schema = {
        "items": {
            "files": "items",
            "id": "sku",
            "text": ["title", "brand"],
            "features": [
                "brand",
                {"column": "price", "kind": "number", "boundaries": [10, 50, 200]},
                {"column": "tags", "kind": "multi", "separator": "|"},
                {"column": "description", "name": "details", "kind": "text", "vocabulary": "words"},
            ],
        },
        "users": {
            "files": "users.parquet",
            "id": "uid",
            "features": ["gender", {"column": "age", "kind": "number", "boundaries": [26, 51]}],
        },
        "interactions": {
            "files": "log/*",
            "query": "q",
            "item": "sku",
            "user": "uid",
            "type": "event",
            "types": {"view": "impression", "buy": "order"},
            "type_weights": {"order": 3},
            "time": "at",
            "session": "visit",
            "position": "rank",
            "held_out": {"last_days": 5},
        },
        "vocabularies": {"words": {"tokenizer": {"letter_trigrams": False}, "vocabulary": {"min_count": 2}}},
    }
    (path / "schema.yaml").write_text(yaml.safe_dump(schema, allow_unicode=True))
    return path, items, log


def test_ingest_takes_the_log_as_it_is(own, capfd):
    path, items, log = own
    dpsr(capfd, "ingest", f"--schema={path}/schema.yaml", f"--out={path}/store", "--max_reject_fraction=0")
    store = Store(path / "store")
    assert sorted(store.item_keys()) == sorted(item["sku"] for item in items)
    titles = dict(zip(store.item_keys(), store.titles(), strict=True))
    assert titles == {item["sku"]: item["title"] for item in items}
    taken = [row for row in log if row["event"] in ("click", "cart", "buy")]
    cut = max(row["at"] for row in log) - datetime.timedelta(days=5)
    assert store.counts.positives == sum(row["at"] <= cut for row in taken)
    assert store.counts.held_out == sum(row["at"] > cut for row in taken)
    assert store.counts.events == sum(row["uid"] not in (None, "-1") for row in taken)
    assert store.counts.impressions > 0 and store.counts.rejected == 0


@pytest.mark.slow
def test_model_index_and_servable_give_the_same_figures(own, tmp_path, capfd):
    """train, index, export, evaluate."""
    path, *_ = own
    store = tmp_path / "store"
    dpsr(capfd, "ingest", f"--schema={path}/schema.yaml", f"--out={store}")
    flags = ["--set=train.steps=20", "--set=model.num_heads=2", "--set=validation.queries=20"]
    dpsr(capfd, "train", f"--store={store}", f"--out={tmp_path}/model", *flags)
    dpsr(capfd, "index", f"--model={tmp_path}/model", f"--store={store}", f"--out={tmp_path}/index")
    dpsr(capfd, "export", f"--model={tmp_path}/model", f"--index={tmp_path}/index", f"--out={tmp_path}/servable")
    kinds = ("model", "index", "servable")
    flags = [f"--store={store}", "--held_out", *(f"--system={kind}:{tmp_path}/{kind}" for kind in kinds)]
    flags += [f"--json={tmp_path}/report.json", "--latency_queries=2", "--k=10,80"]
    dpsr(capfd, "evaluate", *flags, "--fold=all")
    found = json.loads((tmp_path / "report.json").read_text())
    figures, notes = found["systems"], found["notes"].values()
    warning = "warning: its training looked at half of these queries"
    assert [any(warning in note for note in of_system) for of_system in notes] == [True, True, True]
    recall = [figures[f"{kind}:{tmp_path}/{kind}"]["recall@10"] for kind in kinds]
    assert recall == pytest.approx([recall[0]] * 3, abs=0.02)
    assert figures[f"model:{tmp_path}/model"]["recall@80"] > 0.9, "only a query without a known token finds less"


@pytest.mark.slow
def test_features_and_history(own, tmp_path, capfd):
    """A model with all features of the schema and with histories is trained, indexed and measured."""
    path, *_ = own
    store = tmp_path / "store"
    dpsr(capfd, "ingest", f"--schema={path}/schema.yaml", f"--out={store}")
    settings = ['model.item_features=["*"]', 'model.user_features=["*"]', "model.history_length=5"]
    flags = [f"--set={setting}" for setting in ["train.steps=20", "train.num_own_negatives=2", *settings]]
    dpsr(capfd, "train", f"--store={store}", f"--out={tmp_path}/model", *flags)
    dpsr(capfd, "index", f"--model={tmp_path}/model", f"--store={store}", f"--out={tmp_path}/index")
    flags = [f"--store={store}", "--held_out", *(f"--system={kind}:{tmp_path}/{kind}" for kind in ("model", "index"))]
    dpsr(capfd, "evaluate", *flags, f"--json={tmp_path}/report.json", "--latency_queries=2", "--k=10")
    one, other = json.loads((tmp_path / "report.json").read_text())["systems"].values()
    assert one["recall@10"] == pytest.approx(other["recall@10"], abs=0.02)


def test_an_own_label_beside_own_types(own, tmp_path, capfd):
    """`types` maps only the types that have other names in the log; all other types keep their names."""
    path, *_ = own
    rows = [("impression", 0), ("click", 1), ("impression", 2), ("buy", 3)]
    (tmp_path / "log.jsonl").write_text(
        "".join(
            json.dumps({"q": "lamp", "sku": f"SKU/{i:04}", "event": event, "session": "s"}) + "\n" for event, i in rows
        )
    )
    schema = {
        "items": {"files": str(path / "items"), "id": "sku", "text": ["title"]},
        "interactions": {
            "files": str(tmp_path / "log.jsonl"),
            "query": "q",
            "item": "sku",
            "type": "event",
            "types": {"buy": "order"},
            "session": "session",
        },
    }
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    dpsr(capfd, "ingest", f"--schema={tmp_path}/schema.yaml", f"--out={tmp_path}/store")
    assert Store(tmp_path / "store").counts.positives == 2
    assert Store(tmp_path / "store").counts.impressions == 2
