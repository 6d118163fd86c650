from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "ps_traffic.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("ps_traffic")


def test_floor_is_that_of_the_documentation():
    # 64 queries and 64 titles, 256 bytes each way; 20 and 30 ids of 4 bytes.
    assert benchmark.Workload("zipf", 64).floor == 128 * 256 * 2 + 64 * 50 * 4


def test_zipf_is_skewed_and_uniform_is_not():
    random = np.random.default_rng(1)
    zipf, uniform = (benchmark.draw_tokens(random, kind, 100_000) for kind in ("zipf", "uniform"))
    for drawn in (zipf, uniform):
        assert drawn.min() >= 0 and drawn.max() < benchmark.NUM_IDS
    # The share of ranks below 1,000 is log(101) / log(20,001), against 1,000 in 200,000.
    assert abs(np.mean(zipf < 1000) - 0.466) < 0.01
    assert abs(np.mean(uniform < 1000) - 0.005) < 0.002


@pytest.mark.slow
@pytest.mark.long
def test_the_whole_benchmark_runs():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, SCRIPT, "--quick", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    bars = result["bars"]
    assert result["benchmark"] == "ps_traffic"
    for b in (64, 1024):
        # Bytes do not depend on how busy the machine is.
        assert 1 < bars[f"embedding_bytes_over_floor_b{b}"] < 1.1
        assert 1 < bars[f"shared_embedding_bytes_over_floor_b{b}"] < 1.1
        assert bars[f"embedding_bytes_ratio_to_stock_b{b}"] < 0.15
        assert bars[f"workers_per_ps_core_b{b}"] > 0
    assert bars["total_bytes_ratio_to_stock_b64"] < 0.5
    zipf_rows = [row for row in result["rows"] if row["workload"] == "zipf_b64"]
    losses = {row["impl"]: row["value"] for row in zipf_rows if row["metric"] == "loss"}
    of_one_table = [losses.pop(impl) for impl in ("shared", "rows")]
    assert set(losses) == {"stock", "placed", "fused", "half"} and np.ptp(list(losses.values())) < 1e-3
    # A table for both texts is another model. Its rows, spread over the ps, have other first values.
    assert of_one_table == pytest.approx([losses["fused"]] * 2, abs=0.05)
    cpu = {row["metric"]: row["value"] for row in zipf_rows if row["impl"] == "shared"}
    assert cpu["workers_per_ps_core"] == pytest.approx(cpu["worker_cpu"] / cpu["ps_cpu"])
