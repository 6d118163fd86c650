"""benchmarks/bm25_scale.py in its quick form."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bm25_scale.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("bm25_scale")


@pytest.mark.long
@pytest.mark.slow
def test_the_extrapolation_follows_from_the_sizes(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--json", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    rows = {(row["impl"], row["workload"], row["metric"]): row["value"] for row in found["rows"]}
    for name in benchmark.ANALYSES:
        small, large = (rows[name, f"{items:,} items", "core_ms"] for items in (2000, 4000))
        growth = math.log(large / small) / math.log(2)
        assert rows[name, "all sizes", "growth"] == pytest.approx(growth)
        for how, exponent in (("by growth", growth), ("in proportion", 1)):
            estimate = large * (15_000_000 / 4000) ** exponent
            assert rows[name, f"15,000,000 items, extrapolated {how}", "core_ms"] == pytest.approx(estimate)
        assert 0 < rows[name, "2,000 items", "items_found"] < rows[name, "4,000 items", "items_found"] <= 1000
    # Words that users type, but no title has, find more with trigrams.
    assert rows["default", "4,000 items", "items_found"] >= rows["unigrams", "4,000 items", "items_found"]


def test_one_size_is_refused() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--items=1000"], capture_output=True, text=True, check=False)
    assert done.returncode and "--items=1000: expected two numbers at least, ascending" in done.stdout + done.stderr
