"""The section `graph` of a schema: adjacency of queries, items and attributes, against brute force over the raw log."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from dpsr_tf.data.store import Store, unpack_strings

DAY = 86_400
ITEMS = [
    {"item_id": 10 * i, "title": f"thing {i}", "brand": [None, "Acme", "Bolt"][i % 3], "shop": f"s{i % 2}"}
    for i in range(1, 13)
]
SCHEMA = {
    "items": {"files": "items.jsonl", "id": "item_id", "text": ["title"], "features": ["brand", "shop"]},
    "interactions": {"files": "log.jsonl", "query": "query", "item": "item_id", "time": "time", "weight": "weight"},
    "graph": {"attributes": ["brand", "shop"]},
}


def random_log(rows: int = 300):
    """Clicks of 9 queries on all items but the last, some of them repeated; every 7th has weight 0."""
    rng = np.random.default_rng(5)
    return [
        {
            "query": f"query {rng.integers(9)}",
            "item_id": 10 * int(rng.integers(1, 12)),
            "time": int(100 * DAY + rng.integers(0, 20) * DAY),
            "weight": 0 if i % 7 == 0 else float(rng.integers(1, 4)) / 4,
        }
        for i in range(rows)
    ]


def write(path: Path, schema: dict, log: list, items: list | None = None) -> list[str]:
    """Writes the tables; returns the flags of `dpsr ingest` up to --out."""
    path.mkdir(exist_ok=True)
    for name, rows in (("items", items or ITEMS), ("log", log)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "schema.yaml").write_text(yaml.safe_dump(schema))
    return ["ingest", f"--schema={path / 'schema.yaml'}"]


def rows_of(files: list, node: str, neighbour: str, columns: tuple[str, ...]) -> list[list[tuple]]:
    """The edges of each node, over all files."""
    rows = []
    for file in files:
        splits = file[f"{node}.splits"]
        values = [file[f"{node}.{name}"].tolist() for name in (neighbour, *columns)]
        rows += [list(zip(*(v[a:b] for v in values), strict=True)) for a, b in zip(splits, splits[1:], strict=False)]
    return rows


def expected(store: Store, log: list, limit: int):
    """Edges by query and by item from the raw rows, strongest first."""
    row_of = {text: row for row, text in enumerate(store.queries())}
    item_of = {int(item): row for row, item in enumerate(store.items()["id"])}
    weight, first = collections.defaultdict(float), {}
    for click in log:
        edge = row_of[click["query"]], item_of[click["item_id"]]
        weight[edge] += click["weight"]
        first[edge] = min(first.get(edge, 1 << 40), click["time"])
    queries, items = [[] for _ in row_of], [[] for _ in item_of]
    for (query, item), total in weight.items():
        if total > 0:
            queries[query].append((item, total, first[query, item]))
            items[item].append((query, total, first[query, item]))
    return [[sorted(row, key=lambda e: (-e[1], e[0]))[:limit] for row in rows] for rows in (queries, items)]


@pytest.mark.parametrize(("shards", "limit"), [(1, 1000), (3, 1000), (3, 4)])
def test_edges_of_both_directions_are_those_of_the_log(tmp_path, dpsr, shards, limit):
    log = random_log()
    schema = SCHEMA | {"graph": SCHEMA["graph"] | {"max_edges": limit}}
    result = dpsr(*write(tmp_path / "raw", schema, log), f"--out={tmp_path / 'store'}", f"--shards={shards}")
    result.succeeds()
    store = Store(tmp_path / "store")
    files = store.graph()
    assert len(files) == shards
    queries, items = expected(store, log, limit)
    assert rows_of(files, "query", "item", ("weight", "time")) == queries
    assert rows_of(files, "item", "query", ("weight", "time")) == items
    assert [int(file["item.first"][0]) for file in files] == [12 * s // shards for s in range(shards)]
    everything, _ = expected(store, log, 1000)
    report = store.manifest["graph"]
    assert report["edges"] == sum(map(len, everything))
    capped = sum(len(row) > limit for row in everything)
    assert report["capped"].get("query", 0) == capped
    assert ("keeps its strongest" in result.out) == (capped > 0)


def test_values_of_attributes_have_the_items_with_them_most_clicked_first(tmp_path, dpsr):
    log = random_log()
    dpsr(*write(tmp_path / "raw", SCHEMA, log), f"--out={tmp_path / 'store'}").succeeds()
    store = Store(tmp_path / "store")
    file, items = store.graph()[0], store.items()
    clicks = collections.Counter(click["item_id"] for click in log)
    for attribute in ("brand", "shop"):
        codes, splits = items[f"feature.{attribute}"], file[f"value.{attribute}.splits"]
        assert len(splits) == 2 + len(unpack_strings(items, f"values.{attribute}"))
        assert splits[1] == 0  # the unknown value
        for code in range(1, len(splits) - 1):
            found = file[f"value.{attribute}.item"][splits[code] : splits[code + 1]].tolist()
            number = [clicks[int(items["id"][row])] for row in range(12)]
            assert found == sorted(np.flatnonzero(codes == code).tolist(), key=lambda row: (-number[row], row))
            weights = file[f"value.{attribute}.weight"][splits[code] : splits[code + 1]]
            assert weights.tolist() == [1.0 + number[row] for row in found]


def test_order_of_rows_threads_and_batches_does_not_change_the_graph(tmp_path, dpsr):
    log = random_log()
    made = []
    for i, rows in enumerate((log, log[::-1])):
        flags = write(tmp_path / f"raw{i}", SCHEMA, rows)
        dpsr(*flags, f"--out={tmp_path / f'store{i}'}", f"--threads={i + 1}").succeeds()
        made.append((tmp_path / f"store{i}" / "graph.dpsr").read_bytes())
    assert made[0] == made[1]


def test_held_out_pairs_are_not_in_the_graph(tmp_path, dpsr):
    log = random_log()
    schema = SCHEMA | {"interactions": SCHEMA["interactions"] | {"held_out": {"last_days": 5}}}
    dpsr(*write(tmp_path / "raw", schema, log), f"--out={tmp_path / 'store'}").succeeds()
    store = Store(tmp_path / "store")
    last = max(click["time"] for click in log)
    kept = [click for click in log if click["time"] <= last - 5 * DAY]
    edges = rows_of(store.graph(), "query", "item", ("weight", "time"))
    assert edges == expected(store, kept, 1000)[0]


def test_a_catalogue_without_a_log_has_the_edges_of_attributes(tmp_path, dpsr):
    schema = {key: SCHEMA[key] for key in ("items", "graph")}
    dpsr(*write(tmp_path / "raw", schema, []), f"--out={tmp_path / 'store'}").succeeds()
    file = Store(tmp_path / "store").graph()[0]
    assert len(file["query.item"]) == 0 and len(file["item.splits"]) == 13
    assert file["value.brand.splits"].tolist() == [0, 0, 4, 8]


def test_a_store_without_the_section_has_no_graph(tmp_path, dpsr):
    schema = {key: SCHEMA[key] for key in ("items", "interactions")}
    dpsr(*write(tmp_path / "raw", schema, random_log()), f"--out={tmp_path / 'store'}").succeeds()
    store = Store(tmp_path / "store")
    assert store.graph() == [] and "graph" not in store.manifest and "graph" not in store.manifest["schema"]


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"attributes": ["colour"]}, "graph: attributes has 'colour', expected an item feature of kind categorical"),
        ({"attributes": ["brand", "brand"]}, "attributes has 'brand' twice"),
        ({"max_edges": 0}, "max_edges"),
    ],
)
def test_a_section_that_does_not_fit_the_schema_is_refused(tmp_path, dpsr, graph, message):
    flags = write(tmp_path / "raw", SCHEMA | {"graph": graph}, random_log(10))
    dpsr(*flags, f"--out={tmp_path / 'store'}").fails(2, message)
    assert not (tmp_path / "store").exists()
