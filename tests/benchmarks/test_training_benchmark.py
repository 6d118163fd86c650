from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "training.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("training")


def test_weights_are_those_of_the_loss():
    from dpsr_tf.models.losses import negative_weights

    mask = ~np.eye(8, 8 + benchmark.RANDOM, dtype=bool)
    weights = negative_weights(mask, benchmark.ALPHA).numpy()
    np.testing.assert_allclose([weights[0, 1], weights[0, 8]], benchmark.group_weights(8), rtol=1e-6)


def flat(start):
    return [start.table, *start.layers, start.queries, start.titles]


def test_a_start_survives_its_file(tmp_path):
    start = benchmark.make_start(3)
    benchmark.write_start(start, tmp_path / "start")
    read = benchmark.read_start(tmp_path / "start")
    for expected, found in zip(flat(start), flat(read), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.long
def test_the_benchmark_runs(tmp_path):
    """Ours beside two others, which compute the same; without torch that is said, and its bar is left out."""
    no_torch = tmp_path / "python"
    no_torch.write_text("#!/bin/sh\nexit 1\n")
    no_torch.chmod(0o755)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        SCRIPT,
        "--quick",
        "--json",
        "--only=ours,stock_1thread,torch,limit",
        f"--torch_python={no_torch}",
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert f"{no_torch} has no torch (extra `bench`); its row and bar are left out" in run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["benchmark"] == "training"
    ratios = {"ratio_to_stock_1thread_b64", "ratio_to_limit_b64", "ratio_to_limit_b1024"}
    assert set(result["bars"]) == {*ratios, "cost_10m_over_100k_rows"}
    assert all(value > 0 for value in result["bars"].values())
    losses = {row["impl"]: row["value"] for row in result["rows"] if row["metric"] == "loss"}
    assert set(losses) == {"ours", "stock_1thread", "limit"}
    np.testing.assert_allclose(list(losses.values()), losses["limit"], rtol=1e-4)
