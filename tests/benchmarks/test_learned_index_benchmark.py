"""benchmarks/learned_index.py: its data and measures, and a run of its quick form."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "learned_index.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("learned_index")


def unit(generator, *shape):
    x = generator.standard_normal(shape, np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def workload():
    generator = np.random.default_rng(1)
    items, log, asked = (unit(generator, n, 16) for n in (3_000, 400, 50))
    pairs = np.stack([np.arange(400), benchmark.best(log, items, 1)[:, 0]], axis=1)
    relevant = list(benchmark.best(asked, items, 3))
    return benchmark.Workload("random", items, log, pairs, asked, relevant, 16, 0.1)


def test_the_log_of_the_synthetic_setting_has_right_pairs_only():
    setting = benchmark.Synthetic(pairs=5_000)
    log = setting.log(1)
    assert log.shape == (5_000, 2) and log.min() >= 0 and log.max() < 10_000
    for query, item in log:
        digits = [int(digit) for digit in f"{item:04d}"]
        digits.remove(query // 10 % 10)
        digits.remove(query % 10)
    assert len(np.unique(log[:, 0] // 100)) == 100


def test_precision_of_the_synthetic_setting_is_that_of_the_tutorial():
    setting = benchmark.Synthetic()
    found = np.zeros((10_000, 4), np.int64)
    found[98] = [9998, 1998, 4321, 8899]
    found[77] = [7711, 1717, 1722, -1]
    precision = setting.precision(found)
    assert precision[98] == 0.75 and precision[77] == 0.5
    assert precision[0] == 1  # 0000 has two zeros


@pytest.mark.parametrize("objective", benchmark.OBJECTIVES)
def test_a_learned_index_finds_items(workload, objective):
    start = benchmark.start_of(workload, 4, "opq", 1)
    how = benchmark.Learning(steps=30, queries=32)
    learned = benchmark.learn(workload, 4, objective, 1, start, how)
    assert not np.array_equal(learned.codebooks, start.codebooks)
    found = benchmark.of_quantizer(workload, learned)(workload.asked, 16)
    assert benchmark.share_found(found, workload.relevant).mean() > 0.5
    again = benchmark.learn(workload, 4, objective, 1, start, how)
    assert np.allclose(again.codebooks, learned.codebooks, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("codec", ["RQ2x8", "LSQ2x8", "RaBitQ"])
def test_other_codecs_use_the_lists_of_the_start(workload, codec):
    start = benchmark.start_of(workload, 4, "opq", 1)
    search = benchmark.of_factory(workload, codec, start)
    found = search(workload.asked, 1)
    chosen = faiss.knn(workload.asked @ start.rotation, start.coarse, 1, faiss.METRIC_INNER_PRODUCT)[1][:, 0]
    lists = start.encode(workload.items)[0]
    assert all((lists[rows[rows >= 0]] == of_query).all() for rows, of_query in zip(found, chosen, strict=True))
    assert benchmark.share_found(search(workload.asked, 16), workload.relevant).mean() > 0.3


def test_shares_and_intervals():
    shares = benchmark.share_found(np.array([[1, 2], [3, -1]]), [np.array([1, 5]), np.array([3])])
    assert shares.tolist() == [0.5, 1.0]
    low, high = benchmark.interval(np.arange(100) / 100)
    assert low < 0.495 < high and high - low < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=none"], "--only=none: 'none' is unknown; expected some of poeem, homedepot"),
        pytest.param(
            ["--only=homedepot", "--data=none"],
            "--data=none: has no homedepot; give the folder of the data sets",
            marks=pytest.mark.long,
        ),
        pytest.param(["more"], "unexpected argument 'more'", marks=pytest.mark.long),
    ],
)
def test_bad_arguments(arguments, message):
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode != 0 and message in run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.long
def test_quick_run(tmp_path):
    command = [sys.executable, SCRIPT, "--json", "--quick", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["bars"]) == {
        "poeem_precision100",
        "poeem_precision100_reconstruction",
        "nprobe_ratio_at_equal_recall",
        "givens_over_svd_cost",
        "train_rate_over_unquantized",
        "index_seconds_over_embedding_seconds",
    }
    costs = {"givens_over_svd_cost", "train_rate_over_unquantized", "index_seconds_over_embedding_seconds"}
    # A quick run is too short for costs: the difference of two CPU times may even be negative.
    assert all(value > 0 for name, value in found["bars"].items() if name not in costs)
    assert all(math.isfinite(found["bars"][name]) for name in costs)
    recalls = [row["value"] for row in found["rows"] if row["metric"].endswith("recall@100")]
    assert recalls and all(0 <= value <= 1 for value in recalls)
    assert all(
        row["value"] == 1 for row in found["rows"] if (row["impl"], row["metric"]) == ("exact", "ann_recall@100")
    )
