"""A tiny shop as real files, the command line run in this process, and the real evaluation data where it is present."""

from __future__ import annotations

import copy
import csv
import dataclasses
import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from dpsr_common import command_line
from dpsr_tf.data.store import Store

Rows = list[dict[str, Any]]

# Item ids in no order, so that an id is never mistaken for a row; texts that one format or another could spoil.
_ITEMS: Rows = [
    {"item_id": 30, "title": "Red running shoes", "brand": "Acme", "color": "red"},
    {"item_id": 10, "title": '3/4" hex bolt, "zinc"', "brand": "Bolts & Co", "color": None},
    {"item_id": 70, "title": "红色 跑鞋 43码", "brand": "阿克梅", "color": "red"},
    {"item_id": 50, "title": "007", "brand": None, "color": "blue"},
    {"item_id": 20, "title": "Blue suède shoes", "brand": "Acme", "color": "blue"},
    {"item_id": 90, "title": "", "brand": None, "color": ""},
    {"item_id": 2**40, "title": "NA", "brand": "N/A", "color": "null"},
]
_USERS: Rows = [
    {"user_id": 5, "gender": "f", "age": 30},
    {"user_id": 3, "gender": "m", "age": 30},
    {"user_id": 8, "gender": None, "age": 7},
]
_LOG: Rows = [
    {"query": "red shoes", "item_id": 30, "user_id": 5, "weight": 1.5, "label": 2},
    {"query": "red shoes", "item_id": 20, "user_id": 3, "weight": 1.0, "label": 1},
    {"query": "红鞋", "item_id": 70, "user_id": 8, "weight": 2.25, "label": 2},
    {"query": " red shoes ", "item_id": 30, "user_id": 3, "weight": 0.5, "label": 2},
    {"query": 'bolt 3/4"', "item_id": 10, "user_id": -1, "weight": 1.0, "label": 2},
    {"query": "100", "item_id": 50, "user_id": 5, "weight": 1.0, "label": 2},
    {"query": "red shoes", "item_id": 70, "user_id": 5, "weight": 1.0, "label": 0},
    {"query": "红鞋", "item_id": 50, "user_id": 5, "weight": 1.0, "label": 0},
    {"query": "never liked", "item_id": 90, "user_id": 5, "weight": 1.0, "label": 0},
    {"query": "so so", "item_id": 90, "user_id": 5, "weight": 1.0, "label": 1},
    {"query": "red shoes", "item_id": 30, "user_id": 5, "weight": 1.5, "label": 2},
]
_SCHEMA: dict[str, Any] = {
    "items": {"files": "items.*", "id": "item_id", "text": ["title", "brand"]},
    "users": {"files": "users.*", "id": "user_id", "features": ["gender", "age"]},
    "interactions": {
        "files": "log.*",
        "query": "query",
        "item": "item_id",
        "user": "user_id",
        "weight": "weight",
        "label": "label",
        "positive_from": 2,
        "negative_to": 0,
    },
    "vocabulary": {"num_oov_buckets": 16},
}


@dataclasses.dataclass
class Shop:
    """Tables as lists of rows, to be changed by a test, then written and ingested."""

    path: Path
    items: Rows = dataclasses.field(default_factory=lambda: copy.deepcopy(_ITEMS))
    users: Rows = dataclasses.field(default_factory=lambda: copy.deepcopy(_USERS))
    log: Rows = dataclasses.field(default_factory=lambda: copy.deepcopy(_LOG))
    schema: dict[str, Any] = dataclasses.field(default_factory=lambda: copy.deepcopy(_SCHEMA))

    def write(self, suffix: str = ".tsv") -> Shop:
        """Writes items, users and log as files with this suffix, and schema.yaml."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("items", "users", "log"):
            (self.path / f"{name}{suffix}").write_bytes(encode_table(getattr(self, name), suffix))
        (self.path / "schema.yaml").write_text(yaml.safe_dump(self.schema, allow_unicode=True))
        return self

    def flags(self, out: Path) -> list[str]:
        """The arguments of the command that ingests it into `out`."""
        return ["ingest", f"--schema={self.path / 'schema.yaml'}", f"--out={out}"]


def encode_table(rows: Rows, suffix: str) -> bytes:
    """The rows as a file of this kind. TSV is unquoted, CSV quoted where needed, None is empty in both."""
    kind, compressed = suffix.removesuffix(".gz"), suffix.endswith(".gz")
    if kind == ".parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
        data = sink.getvalue()
    elif kind == ".jsonl":
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    else:
        table = [list(rows[0]), *(["" if value is None else value for value in row.values()] for row in rows)]
        text = io.StringIO()
        if kind == ".csv":
            csv.writer(text, lineterminator="\n").writerows(table)
        else:
            text.writelines("\t".join(map(str, row)) + "\n" for row in table)
        data = text.getvalue().encode()
    return gzip.compress(data) if compressed else data


@pytest.fixture(scope="session")
def click_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of 240 clicks on 60 items by 30 queries, the first of them a head query; it must not be changed.

    The weight of each click is its own (1 to 240), so that a test can tell which click a training example is. A query
    has clicks in one of 6 kinds of items, whose titles say the kind in other words than the queries do, and labelled
    negatives in the next kind.
    """
    kinds = ["shoes sneakers", "phone mobile", "lamp light", "rug carpet", "手机壳 保护套", "红色 跑鞋"]
    asked = ["running trainers", "telephone", "lantern", "floor mat", "手机 配件", "鞋 红"]
    words = ["alpha", "bravo", "delta", "gamma", "omega"]
    shop = Shop(tmp_path_factory.mktemp("clicks") / "shop")
    shop.items = [
        {"item_id": 1000 + 7 * i, "title": f"{kinds[i % 6]} {words[i % 5]}", "brand": f"no {i}"} for i in range(60)
    ]
    shop.users = [{"user_id": 100 + i, "gender": "mf"[i % 2], "age": 20 + i} for i in range(9)]
    shop.log = []
    for click in range(240):
        query = 0 if click < 80 else click % 30
        item = (query % 6 + 6 * (click * 7 % 10)) % 60
        shop.log.append(_click(shop, query, asked, words, item, user=click % 9, weight=click + 1.0, label=2))
    for query in range(30):
        for item in range((query + 1) % 6, 60, 24):
            shop.log.append(_click(shop, query, asked, words, item, user=0, weight=1.0, label=0))
    shop.write(".jsonl")
    store = shop.path.parent / "store"
    assert command_line.main(shop.flags(store)) == 0
    return Store(store)


def _click(
    shop: Shop, query: int, asked: list[str], words: list[str], item: int, user: int, weight: float, label: int
) -> dict[str, Any]:
    return {
        "query": f"{asked[query % 6]} {words[query // 6]}",
        "item_id": shop.items[item]["item_id"],
        "user_id": shop.users[user]["user_id"],
        "weight": weight,
        "label": label,
    }


@pytest.fixture(scope="session")
def held_out_store(click_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The clicks of `click_store`, a third of the queries held out; it must not be changed."""
    path = tmp_path_factory.mktemp("held_out")
    schema = yaml.safe_load((click_store.path.parent / "shop" / "schema.yaml").read_text())
    schema["interactions"]["held_out"] = {"query_share": 0.34}
    shutil.copytree(click_store.path.parent / "shop", path / "shop")
    (path / "shop" / "schema.yaml").write_text(yaml.safe_dump(schema))
    assert command_line.main(["ingest", f"--schema={path / 'shop' / 'schema.yaml'}", f"--out={path / 'store'}"]) == 0
    return Store(path / "store")


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """The tiny shop, not written yet."""
    return Shop(tmp_path / "shop")


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a store of the tiny shop; it must not be changed."""
    shop = Shop(tmp_path_factory.mktemp("tiny") / "shop")
    path = shop.path.parent / "store"
    assert command_line.main(shop.write().flags(path)) == 0
    return path


@pytest.fixture
def store(tiny_store: Path, shop: Shop, tmp_path: Path) -> Store:
    """A store of the tiny shop, whose files are there too; a test may change both."""
    shop.write()
    return Store(shutil.copytree(tiny_store, tmp_path / "store"))


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes | None]]:
    """Every path below a directory, hidden ones too, with its bytes (None for a directory)."""

    def read(root: Path) -> dict[str, bytes | None]:
        return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}

    return read


@pytest.fixture(scope="session")
def homedepot() -> Path:
    """The Home Depot files: $DPSR_HOMEDEPOT, or ../shared/data/homedepot; skips where there are none."""
    beside = Path(__file__).parents[3] / "shared" / "data" / "homedepot"
    path = Path(os.environ.get("DPSR_HOMEDEPOT", beside))
    if not (path / "products.tsv").is_file():
        pytest.skip(f"no Home Depot files at {path}")
    return path
