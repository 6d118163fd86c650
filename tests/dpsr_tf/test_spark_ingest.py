"""`dpsr ingest --engine=spark` on a Spark of this machine, against the store of the local engine, file by file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Rows, Shop, encode_table

from dpsr_common import command_line
from dpsr_common.errors import CommandError
from dpsr_tf.data import pieces
from dpsr_tf.data.code_book import CodeBook
from dpsr_tf.data.pieces import ShardCounts
from dpsr_tf.data.store import Store
from dpsr_tf.spark import run_tasks, session

SPARK = ["--engine=spark", "--spark_master=local[2]"]


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    """One Java process for all tests of this file: the commands find its session."""
    with session("local[2]", "tests") as spark:
        yield spark


def big_shop(path: Path) -> Shop:
    """A shop with every kind of column, text ids, labels, requests, held-out queries and bad rows, in several files."""
    shop = Shop(path)
    words = ["red", "blue", "shoe", "lamp", "跑鞋", "手机", "bolt"]
    shop.items = [
        {
            "item_id": f"sku-{i * 7 % 40:02}",
            "title": f"{words[i % 7]} {words[i * 3 % 7]} {i}",
            "brand": ["Acme", "acme", "", "Bolts"][i % 4],
            "price": ["", "7.5", "40", "990"][i % 4],
            "tags": ["new|sale", "", "sale|sale|rare"][i % 3],
            "picture": "0.5|0.25" if i % 5 else "",
            "details": f"{words[i % 7]} for {words[(i + 1) % 7]}",
        }
        for i in range(40)
    ]
    shop.items += [{**shop.items[0], "title": "a second row of the same id"}, {**shop.items[1], "item_id": ""}]
    shop.users = [{"user_id": 100 + i * 3 % 11, "gender": "fm"[i % 2], "age": 20 + i} for i in range(13)]
    events = ["view", "click", "order", "view", "click"]
    shop.log = [
        {
            "query": f" {words[i // 5 % 7]} {words[i // 35 % 5]}",
            "item_id": f"sku-{i * 11 % 41:02}",
            "user_id": [-1, 100, 103, 999 if i % 50 == 7 else 106][i // 5 % 4],
            "event": events[i % 5],
            "time": 1_700_000_000 + 17 * i,
            "session": "" if i // 5 % 3 else f"s{i // 5}",
            "rank": 1 + i % 9,
            "weight": [1, 0.5, 2][i % 3],
            "label": ["", "", "", "2", "0"][i % 5 if i % 2 else 0],
        }
        for i in range(300)
    ]
    features = [
        {"column": "brand", "name": "Brand"},
        {"column": "brand", "name": "brand", "max_values": 1},
        {"column": "price", "kind": "number", "boundaries": [10, 50]},
        {"column": "tags", "kind": "multi", "separator": "|"},
        {"column": "picture", "kind": "vector", "length": 2, "separator": "|"},
        {"column": "details", "kind": "text", "vocabulary": "words"},
    ]
    shop.schema["items"] |= {
        "features": features,
        "filters": ["brand", {"column": "price", "kind": "number"}, features[3]],
        "searched": ["details"],
    }
    shop.schema["interactions"] |= {
        "files": "log",
        "type": "event",
        "types": {"view": "impression"},
        "type_weights": {"order": 3},
        "time": "time",
        "session": "session",
        "position": "rank",
        "held_out": {"query_share": 0.2},
    }
    shop.schema["vocabularies"] = {"words": {"tokenizer": {"letter_trigrams": False}}}
    shop.write()
    for number, (begin, suffix) in enumerate([(0, ".tsv"), (100, ".jsonl"), (200, ".parquet")]):
        write_log(shop, f"part-{number}{suffix}", shop.log[begin : begin + 100])
    return shop


def write_log(shop: Shop, name: str, rows: Rows) -> None:
    (shop.path / "log").mkdir(exist_ok=True)
    (shop.path / "log" / name).write_bytes(encode_table(rows, Path(name).suffix))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return big_shop(tmp_path_factory.mktemp("spark") / "shop")


@pytest.mark.slow
def test_the_store_is_that_of_the_local_engine(spark: Any, shop: Shop) -> None:
    """Every file, and the list of unusable rows; also with the codes of a model, of which nothing is counted."""
    flags = ["--shards=3", "--max_reject_fraction=0.5"]
    local, other = shop.path / "local", shop.path / "spark"
    assert command_line.main([*shop.flags(local), *flags]) == 0
    assert command_line.main([*shop.flags(other), *flags, *SPARK]) == 0
    assert files_of(other) == files_of(local)
    rejects = Path(f"{local}.rejects.jsonl").read_bytes()
    assert Path(f"{other}.rejects.jsonl").read_bytes() == rejects and b"more than once" in rejects
    counts = Store(other).counts
    assert min(counts.impressions, counts.negatives, counts.events, counts.held_out) > 0

    model = shop.path / "model"
    model.mkdir()
    (model / "config.yaml").touch()
    CodeBook.write(model, Store(local), ["Brand", "tags", "details"], ["gender"])
    flags = ["--items_only", f"--like={model}", "--max_reject_fraction=0.5"]
    assert command_line.main([*shop.flags(shop.path / "local-items"), *flags]) == 0
    assert command_line.main([*shop.flags(shop.path / "spark-items"), *flags, *SPARK]) == 0
    assert files_of(shop.path / "spark-items") == files_of(shop.path / "local-items")


@pytest.mark.slow
def test_errors_of_tasks_are_those_of_the_command(spark: Any, tmp_path: Path, capsys: Any) -> None:
    shop = Shop(tmp_path / "shop").write(".jsonl")
    (shop.path / "items.jsonl").write_text('{"item_id": 1, "title": "no brand"}\n')
    assert command_line.main([*shop.flags(tmp_path / "store"), *SPARK]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "items.jsonl: has no column brand; its columns are item_id, title; correct the schema" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shop"], "nothing half-written stays"
    failed = "a task failed: ZeroDivisionError: .* by zero; see Spark's logs"
    with pytest.raises(CommandError, match=failed), session(None, "tests"):
        run_tasks(spark, lambda number: 1 // number, [1, 0])


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"graph": {}}, "section graph"),
        ({"rewriting": {}}, "section rewriting"),
    ],
)
def test_schemas_that_need_the_whole_log_are_refused(
    section: dict[str, Any], named: str, tmp_path: Path, dpsr: Any
) -> None:
    shop = Shop(tmp_path / "shop")
    shop.schema |= section
    dpsr(*shop.write().flags(tmp_path / "store"), *SPARK).fails(1, named, "give --engine=local")


def test_flags_that_do_not_fit_are_refused(tmp_path: Path, dpsr: Any) -> None:
    flags = Shop(tmp_path / "shop").write().flags(tmp_path / "store")
    dpsr(*flags, "--spark_master=yarn").fails(2, "--spark_master=yarn", "needs --engine=spark")
    dpsr(*flags, "--engine=spark", "--keep_log").fails(2, "--keep_log")
    dpsr(*flags, "--engine=spark", "--threads=2").fails(2, "--threads")


def test_few_values_of_all_shards() -> None:
    def shard(weights: list[float] | None) -> ShardCounts:
        values = None if weights is None else np.array(weights, np.float32)
        return ShardCounts(queries=1, positives=1, few_values={"weight": values})

    def joined(*shards: list[float] | None) -> np.ndarray | None:
        return pieces.join_few_values([shard(weights) for weights in shards])["weight"]

    both = joined([1, 3], [], [2, 3])
    assert both is not None and both.tolist() == [1, 2, 3]
    assert joined([1], None) is None, "one shard has too many"
    halves = np.arange(200).tolist(), np.arange(100, 300).tolist()
    assert joined(*halves) is None, "all shards together have too many"
