from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tensorflow as tf
from absl import app

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "store.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("store")

SIZES = benchmark.Sizes(interactions=1_200, users=16, items=300, queries=70)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log, the store and the flat file of SIZES."""
    folder = tmp_path_factory.mktemp("store_benchmark")
    seconds, peak = benchmark.ingest(benchmark.generate(SIZES, 1, folder / "log"), folder / "store")
    assert seconds > 0.1
    assert peak > 50e6
    (folder / "mean").write_text(str(benchmark.write_flat(folder / "store", folder / "flat.tfrecord")))
    return folder


@pytest.mark.long
def test_the_log_is_as_large_as_said(tmp_path):
    benchmark.generate(SIZES, 1, tmp_path / "log")
    tables = {
        name: pyarrow.parquet.read_table(tmp_path / "log" / f"{name}.parquet") for name in ("items", "users", "log")
    }
    assert [len(table) for table in tables.values()] == [SIZES.items, SIZES.users, SIZES.interactions]
    queries = set(tables["log"]["query"].to_pylist())
    assert len(queries) == SIZES.queries
    assert {len(query.split()) for query in queries} == {4}
    assert {len(title.split()) for title in tables["items"]["title"].to_pylist()} == {30}
    assert len(tables["items"].column_names) - 2 + len(tables["users"].column_names) - 1 == 10
    assert tables["log"]["item_id"].to_numpy().max() < SIZES.items
    benchmark.generate(SIZES, 1, tmp_path / "again")
    benchmark.generate(SIZES, 2, tmp_path / "other")
    logs = [(tmp_path / name / "log.parquet").read_bytes() for name in ("log", "again", "other")]
    assert logs[0] == logs[1] != logs[2]


def test_histories_are_the_last_events_before():
    draw = np.random.default_rng(1)
    splits = np.cumsum([0, 0, 3, 90, 1])
    times = np.concatenate([np.sort(draw.integers(0, 60, count)) for count in np.diff(splits)]).astype(np.uint32)
    positive = {"user": draw.integers(0, 4, 500), "time": draw.integers(0, 60, 500).astype(np.uint32)}
    first, last = benchmark.histories(positive, {"splits": splits, "time": times})
    for user, time, begin, end in zip(positive["user"], positive["time"], first, last, strict=True):
        before = [event for event in range(splits[user], splits[user + 1]) if times[event] < time]
        assert list(range(begin, end)) == before[-20:]
    assert (last - first).max() == 20


@pytest.mark.long
def test_both_sides_hold_the_same(folder):
    """Every example of the flat file is one of the op's, field by field, and the other way round."""
    n = SIZES.interactions
    flat = next(iter(benchmark.flat_dataset(folder / "flat.tfrecord", n, 1)))
    op = next(iter(benchmark.op_dataset(folder / "store", n, 1)))

    def rows(tokens):
        values, splits = tokens.values.numpy(), tokens.row_splits.numpy()
        return [tuple(part.tolist()) for part in np.split(values, splits[1:-1])]

    def flat_examples():
        lists = [rows(flat[name]) for name in ("query", "title", "history_item", "history_type")]
        lists.append([tuple(map(tuple, row)) for row in flat["past_query"].to_list()])
        names = [*benchmark.USER_FEATURES, *benchmark.ITEM_FEATURES]
        single = [
            flat[name].numpy().tolist()
            for name in (*names, "query_row", "user_row", "item_row", "type", "weight", "label")
        ]
        return sorted(zip(*lists, *single, strict=True))

    def op_examples():
        history_types = tf.RaggedTensor.from_row_splits(op.history.types, op.history.items.row_splits)
        lists = [rows(tokens) for tokens in (op.query, op.item, op.history.items, history_types)]
        past = tf.RaggedTensor.from_nested_row_splits(
            op.history.query.values, [op.history.query_splits, op.history.query.row_splits]
        )
        lists.append([tuple(map(tuple, row)) for row in past.to_list()])
        codes = np.concatenate([op.user_features.codes, op.item_features.codes], axis=1).T
        single = (op.query_rows, op.user_rows, op.item_rows, op.types, op.weights, op.labels)
        return sorted(zip(*lists, *codes.tolist(), *(column.numpy().tolist() for column in single), strict=True))

    examples = flat_examples()
    assert len(examples) == n
    # One by one, because a difference of the whole lists takes minutes to print.
    assert all(one == other for one, other in zip(examples, op_examples(), strict=True))
    lengths = [len(example[2]) for example in examples]
    assert max(lengths) == 20
    assert np.mean(lengths) == pytest.approx(float((folder / "mean").read_text()))
    assert {len(example[0]) for example in examples} == {4}
    assert {len(example[1]) for example in examples} == {30}
    assert {len(example[4]) for example in examples} == set(range(6)), "past queries"
    assert {len(text) for example in examples for text in example[4]} == {4}


def test_a_training_batch_has_negatives_and_a_mask(folder):
    op, training = (next(iter(benchmark.op_dataset(folder / "store", 8, 1, impl))) for impl in benchmark.OPTIONS)
    assert (op.item_rows.shape, op.negative_mask.shape) == ([8], [8, 0])
    assert (training.item_rows.shape, training.negative_mask.shape) == ([72], [8, 72])


def test_compressed_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    (tmp_path / "b").write_bytes(np.random.default_rng(1).bytes(100_000))
    assert benchmark.compressed_bytes([tmp_path / "a"]) < 1_000
    assert 100_000 < benchmark.compressed_bytes([tmp_path / "a", tmp_path / "b"]) < 102_000


@pytest.mark.long
def test_the_json_line():
    run = subprocess.run([sys.executable, SCRIPT, "--json", "--quick"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert list(found) == ["benchmark", "schema", "seed", "hardware", "rows", "bars"]
    assert (found["benchmark"], found["schema"], found["seed"]) == ("store", 1, 1)
    assert set(found["bars"]) == {
        "append_day_cpu_over_whole",
        "bytes_ratio_to_flat",
        "ratio_to_tfrecord_b64",
        "ratio_to_tfrecord_b1024",
        "ingest_interactions_per_core_second",
        "peak_memory_growth_10x",
    }
    assert all(value > 0 for value in found["bars"].values())
    rows = {(row["impl"], row["metric"]): row["value"] for row in found["rows"] if row["workload"].startswith("20,000")}
    parts = [value for (impl, metric), value in rows.items() if impl == "store" and metric.startswith("bytes_of_")]
    assert sum(parts) == rows["store", "bytes"]
    assert {"op", "op_training", "tfrecord"} == {impl for impl, metric in rows if metric == "rate_b1024"}
    assert rows["store", "bytes_compressed"] < rows["store", "bytes"] < rows["tfrecord", "bytes"]
    assert found["bars"]["bytes_ratio_to_flat"] == rows["store", "bytes"] / rows["tfrecord", "bytes"]


def test_a_folder_that_is_there(tmp_path):
    with pytest.raises(app.UsageError, match="exists already"), benchmark.working_folder(str(tmp_path)):
        pass
