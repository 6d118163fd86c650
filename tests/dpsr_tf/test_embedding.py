"""Embedding tables: fused and stock against NumPy and each other, checkpoints, concurrency, a cluster."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from dpsr_tf import ops
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.models.embedding import (
    EmbeddingTable,
    GreedyBySize,
    average,
    half_on_wire,
    minimize,
    rows_of,
    saver,
    segment_ids,
    spread_rows,
)

v1 = tf.compat.v1
Texts = list[list[int]]

LAYOUTS = [("whole", 1), ("rows", 1), ("rows", 3)]
BOTH = ["fused", "stock"]
# Repeated ids within a text and between texts, texts without ids, the first and the last id.
QUERIES: Texts = [[3, 1, 3], [], [10], [0, 10, 3, 7]]
ITEMS: Texts = [[3], [5, 5, 5, 5, 2], [], [10, 3]]


def tokens(texts: Texts) -> Tokens:
    splits = np.cumsum([0, *map(len, texts)])
    return Tokens(tf.constant([each for text in texts for each in text], tf.int32), tf.constant(splits, tf.int64))


def session(graph: tf.Graph, arithmetic: bool = False) -> Any:
    config = v1.ConfigProto()
    config.graph_options.rewrite_options.arithmetic_optimization = 1 if arithmetic else 2
    config.graph_options.rewrite_options.min_graph_nodes = -1
    opened = v1.Session(graph=graph, config=config)
    opened.run(v1.global_variables_initializer())
    return opened


def values(opened: Any, suffix: str = "") -> np.ndarray:
    """The table, or with "/Adagrad" its accumulator, whole."""
    parts = [
        variable
        for variable in v1.global_variables()
        if variable.op.name.endswith("Adagrad") == bool(suffix) and variable.op.name.startswith("table")
    ]
    pieces = opened.run(parts)
    whole = np.full((sum(map(len, pieces)), pieces[0].shape[1]), np.nan, np.float32)
    for variable, piece in zip(parts, pieces, strict=True):
        whole[ids_of(variable)] = piece
    return whole


def ids_of(variable: Any) -> np.ndarray:
    """The ids of the rows of a piece of a table, in their order."""
    return np.concatenate([np.arange(begin, end) for begin, end in rows_of(variable)])


def pooled(table: np.ndarray, texts: Texts, weights: Sequence[float] | None, combiner: str) -> np.ndarray:
    out, at = [], 0
    for text in texts:
        w = np.ones(len(text)) if weights is None else np.array(weights[at : at + len(text)])
        at += len(text)
        norm = {"sum": 1.0, "mean": w.sum(), "sqrtn": np.sqrt((w**2).sum())}[combiner]
        out.append((w[:, None] * table[text]).sum(0) / norm if text else np.zeros(table.shape[1]))
    return np.array(out)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("placement,num_shards", LAYOUTS)
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("weighted", [False, True])
def test_bag_is_the_combined_rows(implementation, placement, num_shards, combiner, weighted):
    weights = np.arange(1, 9, dtype=np.float32) / 4 if weighted else None
    with tf.Graph().as_default() as graph:
        table = EmbeddingTable(
            "table", 11, 5, placement=placement, num_shards=num_shards, implementation=implementation
        )
        together = table.bags([tokens(QUERIES), tokens(ITEMS)], [weights, weights] if weighted else None, combiner)
        alone = table.bag(tokens(QUERIES), weights, combiner)
        codes = table.lookup(tf.constant([10, 0, 10]))
        with session(graph) as opened:
            rows = values(opened)
            results = opened.run([*together, alone, codes])
    expected = [pooled(rows, texts, weights, combiner) for texts in (QUERIES, ITEMS, QUERIES)]
    for got, want in zip(results, [*expected, rows[[10, 0, 10]]], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert [result.shape[1] for result in (*together, alone, codes)] == [5] * 4


def trained(
    implementation: str, placement: str, num_shards: int, dim: int, arithmetic: bool, exclusive: bool = False
) -> list[np.ndarray]:
    """Table, accumulator and dense weights after three steps with several reads of one table."""
    random = np.random.default_rng(7)
    # Small, as is the learning rate: large scores would make much of a rounding in three steps.
    initial, kernel = random.normal(size=(11, dim)) / 3, random.normal(size=(dim, 4)) / 3 / dim**0.5
    with tf.Graph().as_default() as graph:
        table = EmbeddingTable(
            "table", 11, dim, placement=placement, num_shards=num_shards, implementation=implementation,
            exclusive=exclusive, initializer=lambda shape, dtype, partition_info=None: tf.constant(
                initial[slice(*_rows(shape, partition_info))], dtype
            ),
        )  # fmt: skip
        dense = v1.get_variable("kernel", initializer=tf.constant(kernel, tf.float32), use_resource=True)
        query, item = table.bags([tokens(QUERIES), tokens(ITEMS)])
        mean = table.bag(tokens(ITEMS), tf.constant([1, 2, 3, 4, 5, 6, 7, 8.0]) / 4, "sqrtn")
        table.lookup(tf.constant([4]))  # read, but nothing depends on it
        codes = table.lookup(tf.constant([9, 3, 9, 3]))
        scores = tf.matmul(tf.tanh(tf.matmul(query, dense)), tf.matmul(item + tf.gather(mean, [0, 1, 1, 3]), dense),
                           transpose_b=True)  # fmt: skip
        loss = tf.reduce_sum(tf.sin(scores)) + tf.reduce_sum(codes**2)
        step = v1.train.get_or_create_global_step()
        train = minimize(loss, [table], 0.01, step)
        with session(graph, arithmetic) as opened:
            np.testing.assert_array_equal(values(opened, "/Adagrad"), np.full((11, dim), 0.1, np.float32))
            for _ in range(3):
                opened.run(train)
            assert opened.run(step) == 3
            return [values(opened), values(opened, "/Adagrad"), opened.run(dense), initial]


def _rows(shape: Sequence[int], partition_info: Any) -> tuple[int, int]:
    begin = 0 if partition_info is None else partition_info.var_offset[0]
    return begin, begin + shape[0]


@pytest.mark.parametrize("placement,num_shards", LAYOUTS)
@pytest.mark.parametrize("dim", [1, 5, 64, 70])
@pytest.mark.parametrize("arithmetic", [False, True])
def test_fused_trains_as_stock_does(placement, num_shards, dim, arithmetic):
    stock = trained("stock", "whole", 1, dim, False)
    fused = trained("fused", placement, num_shards, dim, arithmetic)
    for got, want in zip(fused, stock, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    # The ids that nothing depends on have not moved; all others have.
    moved = np.any(fused[0] != fused[3].astype(np.float32), axis=1)
    assert np.flatnonzero(~moved).tolist() == [4, 6, 8]
    assert np.all(fused[1][[4, 6, 8]] == np.float32(0.1))


def test_an_exclusive_table_trains_the_same_to_the_bit():
    alone, shared = (trained("fused", "whole", 1, 64, False, exclusive) for exclusive in (True, False))
    for got, want in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(got, want)


def test_stock_in_rows_trains_as_in_one_piece():
    for got, want in zip(trained("stock", "rows", 3, 5, False), trained("stock", "whole", 1, 5, False), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", BOTH)
def test_a_step_is_adagrad_of_the_summed_gradient(implementation):
    """Against the formula: three occurrences of id 3 in two texts."""
    with tf.Graph().as_default() as graph:
        table = EmbeddingTable("table", 5, 2, implementation=implementation)
        table.bag(tokens([[3, 1, 3], [3]]))
        step = table.apply_adagrad([tf.constant([[1.0, -2.0], [10.0, 20.0]])], 0.5)
        with session(graph) as opened:
            before = values(opened)
            opened.run(step)
            after, accumulator = values(opened), values(opened, "/Adagrad")
    gradient = np.zeros((5, 2))
    gradient[1], gradient[3] = [1, -2], [12, 16]
    np.testing.assert_allclose(accumulator, 0.1 + gradient**2, rtol=1e-6)
    np.testing.assert_allclose(after, before - 0.5 * gradient / np.sqrt(0.1 + gradient**2), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("placement,num_shards", LAYOUTS)
@pytest.mark.parametrize("bad", [11, -1, 2**31 - 1, -(2**31)])
def test_ids_out_of_range_are_refused_and_change_nothing(placement, num_shards, bad):
    with tf.Graph().as_default() as graph:
        table = EmbeddingTable("table", 11, 5, placement=placement, num_shards=num_shards)
        ids = v1.placeholder(tf.int32, [None])
        vectors = table.bag(Tokens(ids, tf.constant([0, 1, 3], tf.int64)))
        train = minimize(tf.reduce_sum(vectors), [table], 0.1)
        with session(graph) as opened:
            before = values(opened)
            with pytest.raises(tf.errors.InvalidArgumentError, match=rf"id {bad} in text 1, expected 0 to 10"):
                opened.run(train, {ids: [1, 2, bad]})
            np.testing.assert_array_equal(values(opened), before)
            opened.run(train, {ids: [1, 2, 10]})


def test_dense_adagrad_refuses_what_does_not_fit():
    with tf.Graph().as_default() as graph:
        a, b = (v1.get_variable(name, [2], initializer=v1.ones_initializer(), use_resource=True) for name in "ab")
        with pytest.raises(ValueError, match="must be equal"):
            ops.load().dpsr_dense_adagrad([a.handle], [b.handle], [tf.zeros([3])], 0.1)
        late = v1.placeholder_with_default(tf.zeros([3]), None)
        step = ops.load().dpsr_dense_adagrad([a.handle], [b.handle], [late], 0.1)
        with session(graph) as opened:
            with pytest.raises(tf.errors.InvalidArgumentError, match=r"gradient has shape \[3\], expected \[2\]"):
                opened.run(step)
            np.testing.assert_array_equal(opened.run(a), [1, 1])


def test_broken_inputs_are_refused_by_the_kernels():
    kernels = ops.load()
    good = [1, 0, 2, 0, 1]  # one text with rows 0 and 1
    with tf.Graph().as_default() as graph:
        v1.get_variable("table", [3, 2], use_resource=True)
        v1.get_variable("other", [2, 2], use_resource=True)
        v1.get_variable("flat", [3], use_resource=True)
        v1.get_variable("ints", [3, 2], tf.int32, v1.zeros_initializer(), use_resource=True)
        v1.get_variable("fresh", [3, 2], use_resource=True, collections=[])
        packed, gradient = v1.placeholder(tf.int32), v1.placeholder(tf.float32)
        rate = v1.placeholder(tf.float32)
        splits = v1.placeholder(tf.int64)
        pack = kernels.dpsr_pack_tokens([packed], [splits], [gradient], num_shards=1, first_rows=[0, 3])

        def handle(variable: str, dtype: tf.DType = tf.float32) -> tf.Tensor:
            # Without a shape, which would be refused when the graph is made.
            return tf.raw_ops.VarHandleOp(dtype=dtype, shape=tf.TensorShape(None), shared_name=variable)

        def bag(*variable: Any) -> tf.Tensor:
            return kernels.dpsr_embedding_bag(handle(*variable), packed, dim=2)

        def step(accumulator: str) -> tf.Operation:
            return kernels.dpsr_embedding_adagrad(handle("table"), handle(accumulator), rate, [packed], [gradient])

        one, ones = np.ones((1, 2)), np.ones(2)
        cases = [
            (bag("table"), {packed: [1, 0, 2, 0, 3]}, "row 3, expected 0 to 2"),
            (bag("table"), {packed: []}, "packed tokens of 0 numbers"),
            (bag("table"), {packed: [good]}, r"packed has shape \[1,5\]"),
            (bag("ints", tf.int32), {packed: good}, r"the table is int32 \[3,2\], expected float \[rows, 2\]"),
            (bag("flat"), {packed: good}, r"the table is float \[3\], expected float \[rows, 2\]"),
            (step("other"), {packed: good, gradient: one, rate: 1}, r"accumulator has shape \[2,2\]"),
            (step("table"), {packed: good, gradient: ones, rate: 1}, r"gradient has shape \[2\]"),
            (step("table"), {packed: good, gradient: one, rate: [1]}, "learning_rate has shape"),
            (step("table"), {packed: [9], gradient: one, rate: 1}, "packed tokens of 1 numbers"),
            (pack, {packed: [1, 2], splits: [0, 5], gradient: [1, 1]}, "row_splits go from 0 to 5"),
            (pack, {packed: [1, 2], splits: [], gradient: [1, 1]}, "row_splits is empty"),
            (pack, {packed: [1, 2], splits: [0, 2], gradient: [1]}, r"weights has shape \[1\], expected \[2\]"),
        ]
        fresh = bag("fresh")
        with session(graph) as opened:
            for fetched, fed, message in cases:
                with pytest.raises(tf.errors.InvalidArgumentError, match=message):
                    opened.run(fetched, fed)
            # A variable that has no value yet.
            with pytest.raises((tf.errors.FailedPreconditionError, tf.errors.NotFoundError)):
                opened.run(fresh, {packed: good})


def test_shapes_are_inferred_and_checked_when_the_graph_is_made():
    kernels = ops.load()
    with tf.Graph().as_default():
        table = v1.get_variable("table", [3, 2], use_resource=True)
        wide = v1.get_variable("wide", [3, 4], use_resource=True)
        ids, rate = tf.constant([1, 0, 1, 0]), tf.constant(0.1)
        assert kernels.dpsr_embedding_bag(table.handle, ids, dim=2).shape.as_list() == [None, 2]
        for copy in kernels.dpsr_embedding_snapshot(table.handle, table.handle):
            assert copy.shape.as_list() == [3, 2]
        packed = kernels.dpsr_pack_tokens([ids], [tf.constant([0], tf.int64)], [], num_shards=2, first_rows=[0, 1, 2])
        assert [each.shape.as_list() for each in packed] == [[None], [None]]
        refused = [
            lambda: kernels.dpsr_embedding_bag(table.handle, ids, dim=3),
            lambda: kernels.dpsr_embedding_bag(table.handle, [ids], dim=2),
            lambda: kernels.dpsr_embedding_snapshot(table.handle, wide.handle),
            lambda: kernels.dpsr_embedding_adagrad(table.handle, wide.handle, rate, [ids], [tf.zeros([1, 2])]),
            lambda: kernels.dpsr_embedding_adagrad(table.handle, table.handle, rate, [ids], [tf.zeros([1, 4])]),
            lambda: kernels.dpsr_embedding_adagrad(table.handle, table.handle, [rate], [ids], [tf.zeros([1, 2])]),
            lambda: kernels.dpsr_pack_tokens([ids], [[[0]]], [], num_shards=1, first_rows=[0, 1]),
        ]
        for make in refused:
            with pytest.raises(ValueError, match=r"(?i)shape|dimension"):
                make()


def test_arguments_are_checked():
    with tf.Graph().as_default():
        for arguments, message in [
            ({"placement": "row"}, "placement is 'row', expected one of 'whole', 'rows'"),
            ({"implementation": "slow"}, "implementation is 'slow', expected one of 'fused', 'stock'"),
            ({"num_shards": 2}, "num_shards is 2, expected 1"),
            ({"placement": "rows", "num_shards": 0}, "expected at least 1"),
        ]:
            with pytest.raises(ValueError, match=message):
                EmbeddingTable("table", 11, 5, **arguments)
        table = EmbeddingTable("table", 11, 5)
        with pytest.raises(ValueError, match="combiner is 'max'"):
            table.bag(tokens(QUERIES), combiner="max")
        vectors = table.bag(tokens(QUERIES))
        with pytest.raises(ValueError, match="0 gradients, expected one for each of the 1 outputs"):
            table.apply_adagrad([], 0.1)
        with pytest.raises(LookupError, match=r"take the gradients of EmbeddingTable\.outputs"):
            tf.gradients(tf.reduce_sum(vectors), table.variables)


@pytest.mark.parametrize("before", [(i, *layout) for i in BOTH for layout in LAYOUTS])
@pytest.mark.parametrize("after", [(i, *layout) for i in BOTH for layout in LAYOUTS])
def test_a_checkpoint_serves_every_other_layout(before, after, tmp_path):
    """Also as a plain variable, which is how export reads it."""

    def graph_of(implementation: str, placement: str, num_shards: int) -> tuple[tf.Graph, Any, tf.Operation]:
        with tf.Graph().as_default() as graph:
            table = EmbeddingTable(
                "table", 11, 5, placement=placement, num_shards=num_shards, implementation=implementation
            )
            train = minimize(tf.reduce_sum(table.bag(tokens(QUERIES)) ** 2), [table], 0.1)
            return graph, saver([table]), train

    graph, saves, train = graph_of(*before)
    with graph.as_default(), session(graph) as opened:
        for _ in range(2):
            opened.run(train)
        path = saves.save(opened, str(tmp_path / "model.ckpt"))
        saved = [values(opened), values(opened, "/Adagrad")]
    reader = tf.train.load_checkpoint(path)
    assert reader.get_variable_to_shape_map() == {"table": [11, 5], "table/Adagrad": [11, 5]}
    np.testing.assert_array_equal(reader.get_tensor("table"), saved[0])
    np.testing.assert_array_equal(reader.get_tensor("table/Adagrad"), saved[1])
    graph, restores, _ = graph_of(*after)
    with graph.as_default(), session(graph) as opened:
        restores.restore(opened, path)
        np.testing.assert_array_equal(values(opened), saved[0])
        np.testing.assert_array_equal(values(opened, "/Adagrad"), saved[1])


def test_checkpoints_of_consecutive_pieces_are_read(tmp_path):
    """Clusters wrote them before rows were spread. TensorFlow's own partitioner writes them here."""
    initial = np.random.default_rng(3).normal(size=(11, 5)).astype(np.float32)
    with tf.Graph().as_default() as graph:
        parts = v1.get_variable("table", [11, 5], partitioner=v1.fixed_size_partitioner(3), use_resource=True)
        with session(graph) as opened:
            for part, value in zip(parts, np.split(initial, [4, 8]), strict=True):
                opened.run(part.assign(value))
            path = v1.train.Saver().save(opened, str(tmp_path / "model.ckpt"))
    for placement, num_shards in LAYOUTS:
        with tf.Graph().as_default() as graph:
            table = EmbeddingTable("table", 11, 5, placement=placement, num_shards=num_shards, implementation="stock")
            with session(graph) as opened:
                saver([table]).restore(opened, path)
                np.testing.assert_array_equal(values(opened), initial)


def test_moving_averages_of_pieces_are_saved_in_the_order_of_ids(tmp_path):
    initial = np.arange(55, dtype=np.float32).reshape(11, 5)

    def rows(shape: Sequence[int], dtype: tf.DType, partition_info: Any = None) -> tf.Tensor:
        begin = partition_info.var_offset[0]
        return tf.constant(initial[begin : begin + shape[0]], dtype)

    with tf.Graph().as_default() as graph:
        table = EmbeddingTable("table", 11, 5, placement="rows", num_shards=3, initializer=rows)
        step = v1.train.get_or_create_global_step()
        average(minimize(tf.reduce_sum(table.bag(tokens([[3]]))), [table], 0.1, step), 0.9, step)
        with session(graph) as opened:
            path = saver([table]).save(opened, str(tmp_path / "model.ckpt"))
            reader = tf.train.load_checkpoint(path)
            for name in ("table", "table/ExponentialMovingAverage"):
                np.testing.assert_array_equal(reader.get_tensor(name), initial)
            averages = [v for v in v1.global_variables() if v.op.name.endswith("Average")]
            assert [rows_of(v) for v in averages] == [rows_of(v) for v in table.variables]
            opened.run([v.assign(tf.zeros_like(v)) for v in averages])
            saver([table]).restore(opened, path)
            np.testing.assert_array_equal(opened.run(averages[1]), initial[ids_of(averages[1])])


@pytest.mark.parametrize("begins", [[0], [0, 3, 3, 700, 20_000]])
@pytest.mark.parametrize("num_shards", [1, 2, 5, 40])
def test_rows_are_spread_evenly(num_shards, begins):
    num_ids = 50_000
    ranges = spread_rows(num_ids, num_shards, begins)
    owned = [np.concatenate([np.arange(*ids) for ids in ranges.of_shard(shard)]) for shard in range(num_shards)]
    np.testing.assert_array_equal(np.sort(np.concatenate(owned)), np.arange(num_ids))
    sizes = [len(ids) for ids in owned]
    assert max(sizes) - min(sizes) <= len(begins)
    # Look-ups by Zipf's law in each part, as many in one part as in another.
    weights = np.zeros(num_ids)
    for begin, end in zip(begins, [*begins[1:], num_ids], strict=True):
        if begin < end:
            part = 1 / np.arange(1, end - begin + 1)
            weights[begin:end] += part / part.sum()
    shares = np.array([weights[ids].sum() for ids in owned]) / weights.sum()
    # No placement can do better than the most frequent row alone. Consecutive pieces would give a shard 0.94 of 2.
    assert shares.max() <= max(1.35 / num_shards, 1.15 * weights.max() / weights.sum())
    assert len(ranges.shards) <= len(begins) * num_shards * 18
    with pytest.raises(ValueError, match="expected ascending ids from 0 to 50000"):
        spread_rows(num_ids, num_shards, [0, 7, 5])


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    def graph_of(num_ids: int) -> tuple[tf.Graph, Any]:
        with tf.Graph().as_default() as graph:
            table = EmbeddingTable("table", num_ids, 5)
            minimize(tf.reduce_sum(table.bag(tokens(QUERIES))), [table], 0.1)
            return graph, saver([table])

    graph, saves = graph_of(11)
    with graph.as_default(), session(graph) as opened:
        path = saves.save(opened, str(tmp_path / "model.ckpt"))
    graph, restores = graph_of(12)
    with graph.as_default(), session(graph) as opened, pytest.raises(tf.errors.InvalidArgumentError, match="shape"):
        restores.restore(opened, path)


@pytest.mark.parametrize("placement,num_shards", [("whole", 1), ("rows", 2)])
def test_checkpoints_of_a_table_in_training_are_consistent(placement, num_shards, tmp_path):
    """In each, every row of a piece has had the same number of steps, in table and accumulator alike; none is lost.

    With a constant gradient of 1 the accumulator is 0.1 + the number of steps, and the table follows from that number.
    """
    num_ids, dim, workers, saves = 40_000, 8, 3, 6
    with tf.Graph().as_default() as graph:
        table = EmbeddingTable(
            "table", num_ids, dim, placement=placement, num_shards=num_shards, initializer=v1.zeros_initializer()
        )
        vectors = table.bag(Tokens(tf.range(num_ids), tf.range(num_ids + 1, dtype=tf.int64)))
        train = minimize(tf.reduce_sum(vectors), [table], 1.0)
        writer = saver([table], max_to_keep=None)
        done: list[None] = []
        enough = threading.Event()
        with session(graph) as opened:

            def work() -> None:
                while not enough.is_set():
                    opened.run(train)
                    done.append(None)

            threads = [threading.Thread(target=work) for _ in range(workers)]
            for thread in threads:
                thread.start()
            paths = []
            for i in range(saves):
                before = len(done)
                while len(done) == before:
                    time.sleep(0.001)
                paths.append(writer.save(opened, str(tmp_path / "model.ckpt"), i, write_meta_graph=False))
            enough.set()
            for thread in threads:
                thread.join()
            final = values(opened, "/Adagrad")
        pieces = [ids_of(variable) for variable in table.variables]
    # Adding 1 to 0.1 in float32, again and again.
    accumulators = np.cumsum(np.r_[np.float32(0.1), np.ones(len(done), np.float32)], dtype=np.float32)
    rows = np.r_[np.float32(0), -np.cumsum(1 / np.sqrt(accumulators[1:]), dtype=np.float32)]
    np.testing.assert_array_equal(final, np.full((num_ids, dim), accumulators[-1]))
    counts = set()
    for path in paths:
        reader = tf.train.load_checkpoint(path)
        table_rows, accumulator = reader.get_tensor("table"), reader.get_tensor("table/Adagrad")
        for piece in pieces:
            done = np.unique(accumulator[piece])
            assert len(done) == 1, (path, done)
            count = int(np.abs(accumulators - done[0]).argmin())
            np.testing.assert_allclose(table_rows[piece], rows[count], rtol=1e-5)
            counts.add(count)
    # Saved while it trained, or this shows nothing.
    assert len(counts) >= saves


def test_variables_read_densely_meanwhile_are_not_changed_under_the_reader():
    """A dense read before the first sparse step shares the variable's memory: the step must copy it first."""
    with tf.Graph().as_default() as graph:
        table = EmbeddingTable("table", 11, 5)
        read = table.variables[0].read_value()
        with tf.control_dependencies([read]):
            train = minimize(tf.reduce_sum(table.bag(tokens(QUERIES))), [table], 0.1)
        with tf.control_dependencies([train]):
            late = read + 0.0
        with session(graph) as opened:
            before = opened.run(table.variables[0])
        with session(graph) as opened:
            opened.run(table.variables[0].assign(before))
            np.testing.assert_array_equal(opened.run(late), before)
            assert np.any(opened.run(table.variables[0]) != before)


@pytest.mark.parametrize("stock", [False, True])
def test_dense_variables_take_the_steps_of_tensorflows_adagrad(stock):
    """Dense and sparse gradients, and a variable that the loss does not depend on."""
    start = np.linspace(-1, 1, 30, dtype=np.float32).reshape(6, 5)
    with tf.Graph().as_default() as graph:
        a, b, _ = (v1.get_variable(name, initializer=start, use_resource=True) for name in ("a", "b", "unused"))
        loss = tf.reduce_sum(tf.matmul(a, b, transpose_b=True) ** 2) + tf.reduce_sum(tf.gather(b, [1, 1, 4]) ** 3)
        step = v1.train.create_global_step()
        train = minimize(loss, [], 0.1, step, v1.train.AdagradOptimizer(0.1, 0.1) if stock else None)
        names = ["a", "a/Adagrad", "b", "b/Adagrad", "unused"]
        with session(graph) as opened:
            for _ in range(4):
                opened.run(train)
            found = {v.op.name: opened.run(v) for v in v1.global_variables() if v.op.name in names}
            assert opened.run(step) == 4
    np.testing.assert_array_equal(found["unused"], start)
    expected = {"a": start.astype(float), "b": start.astype(float)}
    sums = {name: np.full_like(value, 0.1) for name, value in expected.items()}
    for _ in range(4):
        product = 2 * expected["a"] @ expected["b"].T
        gradients = {"a": product @ expected["b"], "b": product.T @ expected["a"]}
        for row in (1, 1, 4):
            gradients["b"][row] += 3 * expected["b"][row] ** 2
        for name, gradient in gradients.items():
            sums[name] += gradient**2
            expected[name] -= 0.1 * gradient / np.sqrt(sums[name])
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[f"{name}/Adagrad"], sums[name], rtol=1e-4)


def test_whole_tables_are_spread_by_size():
    with tf.Graph().as_default():
        setter = v1.train.replica_device_setter(ps_tasks=2, ps_strategy=GreedyBySize(2))
        for _ in range(2):
            with tf.Graph().as_default(), v1.device(setter):
                tables = [EmbeddingTable(f"table_{rows}", rows, 4) for rows in (100, 60, 30, 20)]
                vectors = [table.bag(tokens([[1]])) for table in tables]
                minimize(tf.add_n([tf.reduce_sum(each) for each in vectors]), tables, 0.1)
                tasks = [tf.DeviceSpec.from_string(table.variables[0].device).task for table in tables]
                # 100 | 60, then 30 beside 60, then 20 beside 60 + 30.
                assert tasks == [0, 1, 1, 1]
                for table, task in zip(tables, tasks, strict=True):
                    (accumulator,) = (v for v in v1.global_variables() if v.op.name == f"{table.name}/Adagrad")
                    assert tf.DeviceSpec.from_string(accumulator.device).task == task
                    of_table = [op for op in tf.Graph.get_operations(v1.get_default_graph())
                                if op.type in ("DpsrEmbeddingBag", "DpsrEmbeddingAdagrad")
                                and op.inputs[0] is table.variables[0].handle]  # fmt: skip
                    assert [tf.DeviceSpec.from_string(op.device).task for op in of_table] == [task] * 2
                packs = [op for op in v1.get_default_graph().get_operations() if op.type == "DpsrPackTokens"]
                assert {tf.DeviceSpec.from_string(op.device).job for op in packs} == {"worker"}


def test_half_on_wire_sends_dense_weights_and_gradients_once_and_half():
    def job(op: tf.Operation) -> str | None:
        return tf.DeviceSpec.from_string(op.device).job

    with tf.Graph().as_default() as graph, v1.device(v1.train.replica_device_setter(ps_tasks=2)):
        with v1.variable_scope(v1.get_variable_scope(), custom_getter=half_on_wire, reuse=v1.AUTO_REUSE):
            table = EmbeddingTable("table", 11, 5)
            for _ in range(2):
                kernel = v1.get_variable("kernel", [5, 5], use_resource=True)
                vectors = tf.matmul(table.bag(tokens(QUERIES)), kernel)
            count = v1.get_variable("count", [], tf.int32, v1.zeros_initializer(), use_resource=True, trainable=False)
        assert isinstance(count, tf.Variable) and isinstance(table.variables[0], tf.Variable)
        minimize(tf.reduce_sum(vectors**2), [table], 0.1)
        # Tensors that go from a job to the other, each once however many there read it.
        crossings = {
            (tensor.name, tensor.op.type, tensor.dtype.name, job(tensor.op))
            for op in graph.get_operations()
            for tensor in op.inputs
            if tensor.dtype.is_floating and {job(op), job(tensor.op)} == {"ps", "worker"}
        }
    by_kind = sorted(crossing[1:] for crossing in crossings)
    gradient = [crossing for crossing in by_kind if crossing[2] == "worker" and crossing[1] == "float32"]
    assert gradient == [("MatMul", "float32", "worker")]  # of the bag that the loss depends on
    assert [crossing for crossing in by_kind if crossing not in gradient] == [
        ("Cast", "bfloat16", "worker"),
        ("Cast", "float16", "ps"),
        *[("DpsrEmbeddingBag", "float32", "ps")] * 2,
    ]


# Two tables, one whole and one in rows, trained by Estimator; the program of every process of a cluster.
PROGRAM = """
import sys
import tensorflow as tf
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.models.embedding import EmbeddingTable, device_function, half_on_wire, minimize, saver

v1 = tf.compat.v1
v1.logging.set_verbosity(v1.logging.ERROR)
implementation, model_dir, num_shards, wire = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]

def input_fn():
    def texts(i):
        i = tf.cast(i, tf.int32)
        return Tokens(tf.stack([i % 7, 3, 3, 20 + i % 5, i % 11]), tf.constant([0, 2, 2, 5], tf.int64))
    return tf.data.Dataset.range(1000).map(lambda i: {"query": texts(i), "item": texts(i * 5 + 1)})

def waves(shape, dtype, partition_info=None):
    # The same values in however many pieces.
    begin = partition_info.var_offset[0] if partition_info else 0
    return tf.sin(tf.reshape(tf.range(begin * shape[1], (begin + shape[0]) * shape[1], dtype=dtype), shape))

def model_fn(features, labels, mode, params):
    ones = v1.ones_initializer()
    query = EmbeddingTable("query_table", 25, 6, implementation=implementation, initializer=ones)
    item = EmbeddingTable("item_table", 25, 6, implementation=implementation, initializer=waves, placement="rows",
                          num_shards=num_shards)
    with v1.variable_scope(v1.get_variable_scope(), custom_getter=half_on_wire if wire == "half" else None):
        kernel = v1.get_variable("kernel", [6, 6], initializer=ones, use_resource=True)
    scores = tf.matmul(tf.tanh(tf.matmul(query.bag(features["query"], combiner="mean"), kernel)),
                       item.bag(features["item"]), transpose_b=True)
    if mode == tf.estimator.ModeKeys.PREDICT:
        return tf.estimator.EstimatorSpec(mode, predictions={"scores": scores})
    loss = tf.reduce_sum(tf.square(scores - tf.eye(3)))
    train = minimize(loss, [query, item], 0.1, v1.train.get_global_step())
    scaffold = v1.train.Scaffold(saver=saver([query, item]))
    return tf.estimator.EstimatorSpec(mode, loss=loss, train_op=train, scaffold=scaffold)

config = tf.estimator.RunConfig(tf_random_seed=3, save_checkpoints_steps=7, save_summary_steps=None)
config = config.replace(device_fn=device_function(config))
steps = int(sys.argv[5])
estimator = tf.estimator.Estimator(model_fn, model_dir, config, warm_start_from=sys.argv[6] if sys.argv[6:] else None)
if config.num_ps_replicas:
    tf.estimator.train_and_evaluate(estimator, tf.estimator.TrainSpec(input_fn, max_steps=steps),
                                    tf.estimator.EvalSpec(input_fn, steps=1))
else:
    estimator.train(input_fn, max_steps=steps)
    scores = next(estimator.predict(lambda: input_fn().take(1)))["scores"]
    assert scores.shape == (3,), scores
"""


def checkpoint(model_dir: Path) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(str(model_dir))
    return {name: reader.get_tensor(name) for name in sorted(reader.get_variable_to_shape_map())}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(*arguments: object, **more: str) -> subprocess.Popen[str]:
    """Starts PROGRAM."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", **more}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def alone(implementation: str, model_dir: Path, steps: int, *more: object) -> dict[str, np.ndarray]:
    """The checkpoint of a training in one process."""
    process = start(implementation, model_dir, 1, "float", steps, *more)
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == 0, errors
    return checkpoint(model_dir)


@pytest.fixture(scope="module")
def stock_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory of stock ops in one process after 20 steps."""
    path = tmp_path_factory.mktemp("stock") / "model"
    alone("stock", path, 20)
    return path


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("wire,tolerance", [("float", 1e-5), ("half", 2e-2)])
def test_a_cluster_trains_as_one_process_does(wire, tolerance, stock_model, tmp_path):
    """2 ps, 1 worker, real processes: the checkpoint is that of stock ops in one process, which goes on with it."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
    cluster = {"chief": addresses[:1], "ps": addresses[1:]}
    tasks = [{"type": "ps", "index": 0}, {"type": "ps", "index": 1}, {"type": "chief", "index": 0}]
    processes = [
        start("fused", tmp_path / "cluster", 2, wire, 20, TF_CONFIG=json.dumps({"cluster": cluster, "task": task}))
        for task in tasks
    ]
    try:
        errors = processes[-1].communicate(timeout=200)[1]
        assert processes[-1].returncode == 0, errors
        assert [process.poll() for process in processes[:2]] == [None, None]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    of_cluster, of_stock = checkpoint(tmp_path / "cluster"), checkpoint(stock_model)
    assert of_cluster["global_step"] == 20
    assert list(of_cluster) == list(of_stock)
    assert {"query_table", "query_table/Adagrad", "item_table", "item_table/Adagrad"} < set(of_cluster)
    for name, value in of_stock.items():
        np.testing.assert_allclose(of_cluster[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    if wire == "half":
        return
    # One process goes on with the cluster's checkpoint, in one piece; and a new training starts warm from it.
    assert alone("fused", tmp_path / "cluster", 22)["global_step"] == 22
    warm = alone("fused", tmp_path / "warm", 1, stock_model)
    for name in ("query_table", "item_table"):
        # A row moves by at most the learning rate; what was not read has stayed.
        moved = np.abs(warm[name] - of_stock[name]).max(axis=1)
        assert moved.max() < 0.1001 and np.count_nonzero(moved == 0) > 10
        assert np.all(warm[f"{name}/Adagrad"][moved == 0] == np.float32(0.1))


@pytest.mark.parametrize("lengths", [[2, 0, 3, 1, 0, 0], [0, 0], [5], []])
def test_segment_ids(lengths: list[int]) -> None:
    splits = np.cumsum([0, *lengths], dtype=np.int64)
    found = segment_ids(tf.constant(splits), tf.constant(splits[-1]))
    assert found.numpy().tolist() == np.repeat(np.arange(len(lengths)), lengths).tolist()


def test_a_table_of_stock_ops_stays_small() -> None:
    """Each op costs a server time for each request."""
    with tf.Graph().as_default() as graph:
        table = EmbeddingTable("table", 10, 4, implementation="stock")
        before = len(graph.get_operations())
        table.bag(Tokens(tf.constant([1, 2]), tf.constant([0, 2], tf.int64)))
        added = [op.type for op in graph.get_operations()[before:] if op.type not in ("Const", "Identity")]
    assert len(added) <= 18, added


@pytest.mark.parametrize("text", [[3, 1, 3], []])
def test_one_text_of_a_stock_table(text: list[int]) -> None:
    with tf.Graph().as_default() as graph:
        table = EmbeddingTable("table", 4, 2, implementation="stock")
        ids = v1.placeholder(tf.int32, [None])
        splits = tf.stack([tf.constant(0, tf.int64), tf.size(ids, tf.int64)])
        found = table.bag(Tokens(ids, splits), weights=tf.ones_like(ids, tf.float32))
        assert found.shape == [1, 2]
        assert not any(op.type == "UnsortedSegmentSum" for op in graph.get_operations())
        with session(graph) as opened:
            rows, vector = opened.run([table.variables[0], found], {ids: text})
    np.testing.assert_allclose(vector, rows[text].sum(0, keepdims=True), rtol=1e-6)
