"""benchmarks/gpu.py: how results are compared, and a run on whatever this machine has."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "gpu.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("gpu")


def test_difference():
    expected = np.array([[0.9, 0.8, 0.7], [0.5, 0.4, -np.inf]]), np.array([[1, 2, 3], [4, 5, -1]])
    assert benchmark.difference(expected, expected) == (1.0, 0.0)
    found = np.array([[0.9, 0.79, 0.7], [0.5, 0.4, 0.3]]), np.array([[1, 2, 9], [4, 5, 6]])
    share, most = benchmark.difference(expected, found)
    assert share == pytest.approx((2 / 3 + 1) / 2) and most == pytest.approx(0.01)
    none = np.full((2, 3), -np.inf), np.full((2, 3), -1)
    assert benchmark.difference(expected, none) == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.long
def test_a_short_run():
    run = subprocess.run([sys.executable, str(SCRIPT), "--quick", "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    found = {(row["impl"], row["metric"]) for row in report["rows"]}
    assert {("cpu", "build"), ("cpu", "search"), ("cpu", "op_ms")} <= found
    if ("gpu", "missing") in found:
        assert report["bars"] == {}
    else:
        assert report["bars"]["gpu_same_results_20000"] > 0.99
