"""Message passing over the click graph, against NumPy, and a training that only the graph can win."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
import yaml

from dpsr_tf.config import ModelConfig
from dpsr_tf.data.examples_dataset import Graph, Tokens
from dpsr_tf.data.store import Store, unpack_strings
from dpsr_tf.models.features import Feature, FeatureSpec, ItemFeatures, QueryFeatures
from dpsr_tf.models.layers import FUSED, STOCK
from dpsr_tf.models.two_tower import TwoTower

v1 = tf.compat.v1
DIM, TEMPERATURE = 6, 0.3
RNG = np.random.default_rng(3)


def tokens(rows: list[list[int]]) -> Tokens:
    splits = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return Tokens(np.array([t for row in rows for t in row], np.int32), splits)


# Two queries (the second without neighbours) and three items; two attributes with 3 and 2 codes.
SPEC = FeatureSpec(20, graph=(Feature("brand", num_ids=3), Feature("shop", num_ids=2)))
QUERY_TEXTS, ITEM_TEXTS = [[1, 2], [3]], [[4, 5, 5], [6], [7, 8]]
GRAPH = Graph(
    query=tokens([[9, 1], [10], [11, 2, 2]]),
    item=tokens([[12], [13, 4], [], [15]]),
    value=np.array([4, 2, 1], np.int32),  # shop 1, brand 2, brand 1
    value_items=tokens([[3, 0], [1], []]),
    attributes=np.array([1, 0, -1, 0, 1, -1], np.int32),
    node_attributes=np.array([2, -1, 1, 0], np.int32),
    query_items=tokens([[1, 0], []]),
    query_items_queries=tokens([[2, 0, 1], []]),
    item_queries=tokens([[0, 2], [], [1]]),
    item_queries_items=tokens([[3], [2, 1], []]),
)


def reference(weights: dict[str, np.ndarray], layers: int) -> tuple[np.ndarray, np.ndarray]:
    """e1 + e2 of queries and of items, by loops over the equations."""

    def unit(rows):
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)

    def texts(rows):
        return unit(np.array([weights["token_embedding"][row].sum(axis=0) for row in rows]))

    def rows_of(lists):
        return [lists.values[a:b].tolist() for a, b in zip(lists.row_splits, lists.row_splits[1:], strict=False)]

    def attend(target, neighbours, w):
        if len(neighbours) == 0:
            return np.zeros(DIM)
        wanted, messages = target @ w, np.array(neighbours) @ w
        share = np.exp(messages @ wanted / TEMPERATURE)
        return share / share.sum() @ messages

    to_query, to_item = weights["graph/item_to_query"], weights["graph/query_to_item"]
    query, item = texts(rows_of(GRAPH.query)), texts(rows_of(GRAPH.item))
    value = weights["graph_value_embedding"][GRAPH.value]
    names = ("brand", "shop")

    def from_values(places, vectors):
        return sum(
            (
                vectors[place] @ weights[f"graph/{name}_to_item"]
                for name, place in zip(names, places, strict=True)
                if place >= 0
            ),
            np.zeros(DIM),
        )

    of_values = [
        attend(value[v], item[near], weights.get(f"graph/item_to_{names[int(GRAPH.value[v] >= 3)]}", np.eye(DIM)))
        for v, near in enumerate(rows_of(GRAPH.value_items))
    ]
    contexts: tuple[list, list] = ([], [])
    far = iter(rows_of(GRAPH.query_items_queries))
    for e0, near in zip(texts(QUERY_TEXTS), rows_of(GRAPH.query_items), strict=True):
        e1 = attend(e0, item[near], to_query)
        places = GRAPH.node_attributes.reshape(-1, 2)
        of_near = [(attend(item[u], query[next(far)], to_item) + from_values(places[u], value)) / 3 for u in near]
        contexts[0].append(e1 + (attend(e1, of_near, to_query) if layers == 2 else 0))
    far = iter(rows_of(GRAPH.item_queries_items))
    for e0, near, places in zip(
        texts(ITEM_TEXTS), rows_of(GRAPH.item_queries), GRAPH.attributes.reshape(-1, 2), strict=True
    ):
        e1 = (attend(e0, query[near], to_item) + from_values(places, value)) / 3
        of_near = [attend(query[u], item[next(far)], to_query) for u in near]
        e2 = (attend(e1, of_near, to_item) + from_values(places, of_values)) / 3
        contexts[1].append(e1 + (e2 if layers == 2 else 0))
    return np.array(contexts[0]), np.array(contexts[1])


def test_layers_are_those_of_numpy():
    for layers in (1, 2):
        config = ModelConfig(token_dim=DIM, embedding_dim=4, graph_fan_out=(3,) * layers, graph_temperature=TEMPERATURE)
        with tf.Graph().as_default(), v1.Session() as session:
            towers = TwoTower(config, SPEC)
            graph = tf.nest.map_structure(tf.constant, GRAPH)
            query, item = (Tokens(*map(tf.constant, tokens(rows))) for rows in (QUERY_TEXTS, ITEM_TEXTS))
            context = towers.query_context(QueryFeatures(query, graph=graph))
            vectors = towers.item_vector(ItemFeatures(item, graph=graph))
            embeddings = [
                towers.query_embedding(QueryFeatures(query, graph=graph)),
                towers.query_embedding(QueryFeatures(query, context=context)),
                towers.query_embedding(QueryFeatures(query)),
            ]
            session.run(v1.global_variables_initializer())
            for variable in v1.trainable_variables():
                session.run(variable.assign(RNG.normal(size=variable.shape)))
            weights = {v.op.name: session.run(v) for v in v1.trainable_variables()}
            of_queries, of_items = reference(weights, layers)
            np.testing.assert_allclose(session.run(context), of_queries, rtol=1e-4, atol=1e-5)
            text = np.array([weights["token_embedding"][row].sum(axis=0) for row in ITEM_TEXTS])
            expected = text + np.linalg.norm(text, axis=1, keepdims=True) * of_items
            np.testing.assert_allclose(session.run(vectors), expected, rtol=1e-4, atol=1e-5)
            with_graph, by_context, by_text = session.run(embeddings)
            np.testing.assert_allclose(by_context, with_graph, rtol=1e-5, atol=1e-6)
            # A query without neighbours is embedded as without a graph.
            np.testing.assert_allclose(with_graph[1], by_text[1], rtol=1e-5, atol=1e-6)
            assert np.abs(with_graph[0] - by_text[0]).max() > 0.01


@pytest.mark.parametrize("count", [0, 1, 40])
def test_fused_attention_is_that_of_stock_ops(count):
    near = tokens([RNG.integers(0, 9, RNG.integers(0, 5)).tolist() for _ in range(count)])
    with tf.Graph().as_default(), v1.Session() as session:
        wanted, messages = (tf.constant(RNG.normal(size=(n, 5)), tf.float32) for n in (count, 9))
        upstream = tf.constant(RNG.normal(size=(count, 5)), tf.float32)
        found = []
        for kernels in (STOCK, FUSED):
            y = kernels.attend(wanted, messages, Tokens(*map(tf.constant, near)), TEMPERATURE)
            gradients = tf.gradients(tf.reduce_sum(y * upstream), [wanted, messages])
            found.append([y, *map(tf.convert_to_tensor, gradients)])
        stock, fused = session.run(found)
        for one, other in zip(stock, fused, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"near": [0, 9]}, r"near\[1\] is 9, expected 0 to 2"),
        ({"row_splits": [0, 1, 3]}, "row_splits do not rise from 0 to 2"),
        ({"row_splits": [0, 2]}, r"row_splits has shape \[2\], expected \[3\]"),
        ({"messages": tf.zeros([3, 5])}, r"expected \[n, dim\] and \[m, dim\]"),
    ],
)
def test_bad_inputs_of_attention_are_named(change, message):
    from dpsr_tf import ops

    inputs = {"wanted": tf.zeros([2, 4]), "messages": tf.zeros([3, 4]), "near": [0, 1], "row_splits": [0, 1, 2]}
    inputs["row_splits"] = tf.constant(change.get("row_splits", inputs["row_splits"]), tf.int64)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        ops.load().dpsr_attend(**inputs | {k: v for k, v in change.items() if k != "row_splits"}, scale=1.0)


# Training. Titles are random, so that only clicks tell which items a query wants.


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A store of 8 groups of queries and items, which share no word, and a model with a graph trained on it."""
    from dpsr_common import command_line

    folder = tmp_path_factory.mktemp("groups")
    rng = np.random.default_rng(1)
    items = [{"item": i, "title": f"item{i} word{rng.integers(30)}", "brand": f"b{i % 8}"} for i in range(64)]
    log = [{"query": f"query{q}", "item": int(q % 8 + 8 * rng.integers(8))} for q in range(40) for _ in range(6)]
    for name, rows in (("items", items), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    schema = {
        "items": {"files": "items.jsonl", "id": "item", "text": ["title"], "features": ["brand"]},
        "interactions": {"files": "log.jsonl", "query": "query", "item": "item"},
        "graph": {"attributes": ["brand"]},
        "tokenizer": {"letter_trigrams": False},
    }
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    assert command_line.main(["ingest", f"--schema={folder / 'schema.yaml'}", f"--out={folder / 'store'}"]) == 0
    return folder, log


CONFIG = {
    "model.token_dim": 16,
    "model.embedding_dim": 16,
    "model.graph_fan_out": "[5, 3]",
    "train.batch_size": 16,
    "train.learning_rate": 0.1,
    "train.num_random_negatives": 16,
    "train.checkpoint_steps": 10,
}


def train(folder, out: str, *more: str, store: str = "store", **changes) -> int:
    from dpsr_common import command_line

    config = CONFIG | {key.replace("__", "."): value for key, value in changes.items()}
    flags = [f"--set={key}={value}" for key, value in config.items()]
    return command_line.main(["train", f"--store={folder / store}", f"--out={folder / out}", *flags, *more])


@pytest.mark.long
@pytest.mark.slow
def test_a_resumed_training_gives_the_same_weights(shop):
    folder, _ = shop
    assert train(folder, "whole", train__steps=20) == 0
    assert train(folder, "parts", train__steps=10) == 0
    assert train(folder, "parts", train__steps=20) == 0
    whole, parts = (tf.train.load_checkpoint(str(folder / name)) for name in ("whole", "parts"))
    names = [name for name in whole.get_variable_to_shape_map() if name != "global_step"]
    assert {"graph/item_to_query", "graph/brand_to_item", "graph_value_embedding"} <= set(names)
    for name in names:
        assert np.array_equal(whole.get_tensor(name), parts.get_tensor(name)), name
    # Both training and the message passing have changed the weights.
    assert np.abs(whole.get_tensor("graph/item_to_query") - np.eye(16)).max() > 1e-4


@pytest.mark.slow
def test_a_warm_start_finds_values_by_their_names(shop):
    """The new day has a further brand, more frequent than the others, so that all codes differ."""
    from dpsr_common import command_line

    folder, _ = shop
    day = folder / "day"
    day.mkdir()
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    items += [{"item": 100 + i, "title": f"new{i}", "brand": "new"} for i in range(12)]
    (day / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    for name in ("log.jsonl", "schema.yaml"):
        (day / name).write_bytes((folder / name).read_bytes())
    assert command_line.main(["ingest", f"--schema={day / 'schema.yaml'}", f"--out={folder / 'day-store'}"]) == 0
    assert train(folder, "old", train__steps=2) == 0
    warm = f"--warm_start={folder / 'old'}"
    assert train(folder, "new", warm, store="day-store", train__steps=1, train__learning_rate=1e-8) == 0
    old, new = (tf.train.load_checkpoint(str(folder / name)) for name in ("old", "new"))
    for name in ("graph/item_to_query", "graph/brand_to_item"):
        np.testing.assert_allclose(new.get_tensor(name), old.get_tensor(name), atol=1e-6)
    before, now = (reader.get_tensor("graph_value_embedding") for reader in (old, new))
    values = [unpack_strings(Store(folder / name).items(), "values.brand") for name in ("store", "day-store")]
    assert values[1][0] == "new" and len(values[1]) == 9
    for code, value in enumerate(values[0], 1):
        np.testing.assert_allclose(now[1 + values[1].index(value)], before[code], atol=1e-6)


def test_a_store_without_a_graph_is_refused(click_store, tmp_path, capsys):
    from dpsr_common import command_line

    flags = [f"--store={click_store.path}", f"--out={tmp_path / 'model'}", "--set=model.graph_fan_out=[3]"]
    assert command_line.main(["train", *flags]) == 2
    assert "the store has no click graph; add the section graph to its schema" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert command_line.main(["train", *flags[:2], "--set=model.graph_fan_out=[3, 2, 1]"]) == 2
    assert "at most two hops" in capsys.readouterr().err
