"""The click graph in the store, and the neighbourhoods of batches, against brute force over the raw log."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import yaml

from dpsr_tf.data.examples_dataset import BatchOptions, Tokens, examples_dataset
from dpsr_tf.data.neighbourhoods import Neighbourhoods
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
        rows += [list(zip(*(v[a:b] for v in values), strict=True)) for a, b in itertools.pairwise(splits)]
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


# Neighbourhoods of batches.

FAN_OUT = BatchOptions(
    batch_size=8,
    num_random_negatives=5,
    graph_fan_out=(64, 64),
    graph_attributes=("brand", "shop"),
)


@pytest.fixture(scope="module")
def graph_store(tmp_path_factory) -> tuple[Store, list]:
    """A store of two shards, and its log."""
    from dpsr_common import command_line

    folder, log = tmp_path_factory.mktemp("graph"), random_log()
    assert command_line.main([*write(folder / "raw", SCHEMA, log), f"--out={folder / 'store'}", "--shards=2"]) == 0
    return Store(folder / "store"), log


class Expected:
    """The neighbourhoods of a store by brute force. Nodes are told by their token ids."""

    def __init__(self, store: Store, log: list):
        self.edges = rows_of(store.graph(), "query", "item", ("weight", "time"))
        self.of_item = rows_of(store.graph(), "item", "query", ("weight", "time"))
        self.items = store.items()
        texts = [
            (row, tuple(file["query.tokens"][a:b]))
            for first, file in zip(self.firsts(store), store.interactions(), strict=True)
            for row, (a, b) in enumerate(zip(file["query.splits"], file["query.splits"][1:], strict=False), first)
        ]
        self.query_of = {tokens: row for row, tokens in texts}
        splits, values = self.items["tokens.splits"], self.items["tokens.values"]
        self.item_of = {tuple(values[splits[i] : splits[i + 1]]): i for i in range(len(splits) - 1)}
        assert len(self.query_of) == len(texts) and len(self.item_of) == len(splits) - 1
        # Every positive by (query, item, weight): the rows of one request are one click here.
        self.times = collections.defaultdict(set)
        first = 0
        for file in store.interactions():
            local = np.repeat(np.arange(len(file["positive.splits"]) - 1), np.diff(file["positive.splits"])) + first
            for query, item, time in zip(local, file["positive.item"], file["positive.time"], strict=True):
                self.times[int(query), int(item)].add(int(time))
            first += len(file["positive.splits"]) - 1

    @staticmethod
    def firsts(store: Store) -> list[int]:
        return np.cumsum([0, *(len(file["query.splits"]) - 1 for file in store.interactions())])[:-1].tolist()

    def near(self, edges: list, node: int, other: int, moment: float) -> set[int]:
        return {neighbour for neighbour, _, time in edges[node] if neighbour != other and time < moment}


def lists(tokens) -> list[tuple[int, ...]]:
    splits = np.asarray(tokens.row_splits)
    return [tuple(np.asarray(tokens.values)[a:b].tolist()) for a, b in itertools.pairwise(splits)]


def nodes_of(batch, expected: Expected):
    """Rows of the query nodes and of the item nodes of a batch."""
    graph = batch.graph[0]
    return (
        np.array([expected.query_of[t] for t in lists(graph.query)], int),
        np.array([expected.item_of[t] for t in lists(graph.item)], int),
    )


def test_neighbourhoods_are_without_the_pair_and_older_than_it(graph_store):
    """With fan-outs above every degree, the neighbourhoods of a pair are those of a moment of one of its clicks."""
    store, log = graph_store
    expected = Expected(store, log)
    seen = 0
    for batch in examples_dataset(store, FAN_OUT).take(30).as_numpy_iterator():
        graph = batch.graph[0]
        queries, items = nodes_of(batch, expected)
        assert len(set(queries)) == len(queries) and len(set(items)) == len(items)
        of_query, of_query_item = lists(graph.query_items), lists(graph.query_items_queries)
        of_item, of_item_query = lists(graph.item_queries), lists(graph.item_queries_items)
        p = s = 0
        for i, (query, item) in enumerate(zip(batch.query_rows, batch.item_rows[:8], strict=True)):
            found_items, found_queries = items[list(of_query[i])], queries[list(of_item[i])]
            second = [set(queries[list(of_query_item[p + j])]) for j in range(len(found_items))]
            second_items = [set(items[list(of_item_query[s + j])]) for j in range(len(found_queries))]
            p, s = p + len(found_items), s + len(found_queries)
            fits = [
                set(found_items) == expected.near(expected.edges, query, item, moment)
                and set(found_queries) == expected.near(expected.of_item, item, query, moment)
                and second == [expected.near(expected.of_item, u, query, moment) for u in found_items]
                and second_items == [expected.near(expected.edges, u, item, moment) for u in found_queries]
                for moment in expected.times[int(query), int(item)]
            ]
            assert any(fits), (query, item)
            seen += len(found_items) > 0 and len(found_queries) > 0
        # A random negative sees the graph of the moment of the pair whose turn it is.
        for j in range(8, 13):
            pair = int(batch.query_rows[j - 8]), int(batch.item_rows[j - 8])
            found = set(queries[list(of_item[j])])
            row = int(batch.item_rows[j])
            assert found in [expected.near(expected.of_item, row, -1, moment) for moment in expected.times[pair]]
    assert seen > 100


def test_attributes_of_items_and_items_of_their_values(graph_store):
    store, log = graph_store
    expected = Expected(store, log)
    codes = np.stack([expected.items[f"feature.{name}"].astype(int) for name in ("brand", "shop")], axis=1)
    offsets = np.array([0, 1 + codes[:, 0].max()])
    for batch in examples_dataset(store, FAN_OUT).take(5).as_numpy_iterator():
        graph = batch.graph[0]
        _, items = nodes_of(batch, expected)
        of_batch, of_nodes = graph.attributes.reshape(-1, 2), graph.node_attributes.reshape(-1, 2)
        for rows, places in ((batch.item_rows, of_batch), (items[: len(of_nodes)], of_nodes)):
            value = np.where(codes[rows] > 0, codes[rows] + offsets, -1)
            assert np.array_equal(np.where(places < 0, -1, graph.value[places]), value)
        assert set(graph.query_items.values) == set(range(len(of_nodes)))
        of_value = lists(graph.value_items)
        for value in set(of_batch[of_batch >= 0]):
            side = int(graph.value[value] >= offsets[1])
            rows = np.flatnonzero(codes[:, side] == graph.value[value] - offsets[side])
            assert sorted(items[list(of_value[value])]) == rows.tolist()


@pytest.mark.parametrize("sampling", ["weighted", "strongest"])
def test_fan_outs_limit_neighbours(graph_store, sampling):
    store, log = graph_store
    expected = Expected(store, log)
    options = dataclasses.replace(FAN_OUT, graph_fan_out=(3, 2), graph_sampling=sampling)
    for batch in examples_dataset(store, options).take(10).as_numpy_iterator():
        graph = batch.graph[0]
        _, items = nodes_of(batch, expected)
        assert {len(near) for near in lists(graph.query_items)} <= {0, 1, 2, 3}
        assert {len(near) for near in lists(graph.query_items_queries)} <= {0, 1, 2}
        for query, item, near in zip(batch.query_rows, batch.item_rows, lists(graph.query_items), strict=False):
            found = items[list(near)].tolist()
            assert len(set(found)) == len(found)
            strongest = [
                [node for node, _, time in expected.edges[query] if node != item and time < moment][:3]
                for moment in expected.times[int(query), int(item)]
            ]
            assert sampling == "weighted" or found in strongest


def test_one_hop_has_no_second_neighbours(graph_store):
    options = dataclasses.replace(FAN_OUT, graph_fan_out=(3,))
    batch = next(examples_dataset(graph_store[0], options).as_numpy_iterator())
    graph = batch.graph[0]
    assert len(graph.query_items.values) > 0
    for second in (graph.query_items_queries, graph.item_queries_items, graph.value_items):
        assert len(second.values) == 0 and not second.row_splits.any()


def test_dropout_takes_the_clicks_of_that_share(graph_store):
    def with_neighbours(dropout: float) -> np.ndarray:
        options = dataclasses.replace(FAN_OUT, graph_dropout=dropout)
        batches = list(examples_dataset(graph_store[0], options).take(150).as_numpy_iterator())
        assert all((batch.graph[0].attributes >= 0).any() for batch in batches)
        return np.mean([(np.diff(getattr(b.graph[0], part).row_splits) > 0).mean() for b in batches for part in PARTS])

    PARTS = ("query_items", "item_queries")
    everything, half = with_neighbours(0), with_neighbours(0.5)
    assert abs(half / everything - 0.5) < 0.05
    assert with_neighbours(1) == 0


def test_a_batch_depends_on_its_step_alone(graph_store):
    store, options = graph_store[0], dataclasses.replace(FAN_OUT, graph_fan_out=(3, 2), graph_dropout=0.3)

    def flat(batches):
        return [[np.asarray(part).tolist() for part in tf.nest.flatten(batch)] for batch in batches]

    whole = flat(examples_dataset(store, options).take(6).as_numpy_iterator())
    resumed = flat(examples_dataset(store, options, first_step=3).take(3).as_numpy_iterator())
    ahead = dataclasses.replace(options, num_parallel_calls=3)
    assert resumed == whole[3:]
    assert flat(examples_dataset(store, ahead).take(6).as_numpy_iterator()) == whole
    other = dataclasses.replace(options, seed=2)
    assert flat(examples_dataset(store, other).take(6).as_numpy_iterator()) != whole


def test_workers_see_the_queries_of_all_shards(graph_store):
    store, log = graph_store
    expected = Expected(store, log)
    first_of_second = Expected.firsts(store)[1]
    for worker in range(2):
        dataset = examples_dataset(store, FAN_OUT, shard_index=worker, num_shards=2)
        batches = list(dataset.take(10).as_numpy_iterator())
        assert all((batch.query_rows >= first_of_second).all() == bool(worker) for batch in batches)
        seen = np.concatenate([nodes_of(batch, expected)[0] for batch in batches]) >= first_of_second
        assert seen.any() and not seen.all()


def test_title_queries_have_no_neighbours_and_their_items_have_all(graph_store):
    store, log = graph_store
    expected = Expected(store, log)
    options = dataclasses.replace(FAN_OUT, num_title_queries=8)
    for batch in examples_dataset(store, options).take(3).as_numpy_iterator():
        queries, _ = nodes_of(batch, expected)
        assert len(batch.graph[0].query_items.values) == 0
        for item, near in zip(batch.item_rows, lists(batch.graph[0].item_queries), strict=True):
            assert set(queries[list(near)]) == {query for query, *_ in expected.of_item[item]}


def test_a_store_without_a_graph_is_refused(click_store):
    with pytest.raises(tf.errors.FailedPreconditionError, match="has no click graph, expected the section graph"):
        next(iter(examples_dataset(click_store, BatchOptions(graph_fan_out=(3,)))))


def test_served_neighbourhoods_are_the_strongest(graph_store):
    """Those of training with the strongest edges, where neither a pair nor a time leaves edges out."""
    store, log = graph_store
    expected = Expected(store, log)
    served = Neighbourhoods(store, (3, 2), {"brand": 3, "shop": 3})

    def strongest(edges: list, row: int, other: int, most: int) -> list[int]:
        return [node for node, *_ in edges[row] if node != other][:most]

    rows = np.arange(12)
    graph = served.of_items(rows)
    queries = np.array([expected.query_of[t] for t in lists(graph.query)])
    items = np.array([expected.item_of[t] for t in lists(graph.item)])
    far = iter(lists(graph.item_queries_items))
    for row, near in zip(rows, lists(graph.item_queries), strict=True):
        assert queries[list(near)].tolist() == strongest(expected.of_item, row, -1, 3)
        for query in queries[list(near)]:
            assert items[list(next(far))].tolist() == strongest(expected.edges, query, row, 2)
    options = dataclasses.replace(FAN_OUT, num_title_queries=8, graph_fan_out=(3, 2), graph_sampling="strongest")
    batch = next(examples_dataset(store, options).as_numpy_iterator())
    mine = served.of_items(batch.item_rows)

    def values_of(graph) -> list:
        """The value of each attribute of each item, and its items."""
        texts = [[lists(graph.item)[i] for i in near] for near in lists(graph.value_items)]
        return [(int(graph.value[v]), texts[v]) if v >= 0 else None for v in graph.attributes]

    assert values_of(mine) == values_of(batch.graph[0])

    rows = np.array([2, -1, 0, len(expected.edges) - 1, 2])
    graph = served.of_queries(rows)
    queries = np.array([expected.query_of[t] for t in lists(graph.query)])
    items = np.array([expected.item_of[t] for t in lists(graph.item)])
    far = iter(lists(graph.query_items_queries))
    for row, near in zip(rows, lists(graph.query_items), strict=True):
        assert items[list(near)].tolist() == (strongest(expected.edges, row, -1, 3) if row >= 0 else [])
        for item in items[list(near)]:
            assert queries[list(next(far))].tolist() == strongest(expected.of_item, item, row, 2)


def test_a_query_is_known_by_its_tokens(graph_store):
    store, _ = graph_store
    served = Neighbourhoods(store, (3,), {})
    texts = ["QUERY  3", "query 3", "other", "", "query 3 4"]
    rows = served.known(Tokens(*store.vocabulary.encode_batch(texts)))
    assert list(store.queries())[rows[0]] == "query 3" and rows.tolist() == [rows[0], rows[0], -1, -1, -1]
    assert served.rows().tolist() == [row for row, edges in enumerate(Expected(*graph_store).edges) if edges]
