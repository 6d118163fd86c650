"""benchmarks/servable.py in its quick form: it runs, and its figures are possible ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "servable.py"


@pytest.mark.long
@pytest.mark.slow
def test_the_json_line() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--json", "--quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["benchmark", "schema", "seed", "hardware", "rows", "bars"]
    assert (found["benchmark"], found["schema"], found["seed"]) == ("servable", 1, 1)
    assert set(found["bars"]) == {
        "op_over_bare_faiss",
        "two_service_over_fused_p50",
        "head2_over_head1",
        "filter_cost_ratio_worst",
    }
    assert found["bars"]["op_over_bare_faiss"] > 0.5 and found["bars"]["head2_over_head1"] > 0.8
    assert found["bars"]["two_service_over_fused_p50"] > 0.5
    values = {(row["impl"], row["metric"]): row["value"] for row in found["rows"]}
    assert values["bare", "ann_recall@1000"] >= 0.9
    assert all(values["fused", f"closed_{clients}_failed"] == 0 for clients in (1, 8))
    assert 0 < values["fused", "closed_8_p50"] <= values["fused", "closed_8_p99"]
    assert all(values[impl, "core_ms"] > 0 for impl in ("op", "bare", "fused", "fused_2_heads"))
    for impl in ("query_tower", "fused", "filters"):
        assert all(values[impl, name] > 0 for name in ("load_cold", "load_cold_cpu", "load", "load_cpu"))
