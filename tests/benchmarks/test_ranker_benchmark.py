"""benchmarks/ranker.py on a shop of a few hundred items."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ranker.py"
BARS = [f"{metric}_{impl}" for metric in ("session_auc", "ndcg5") for impl in ("dpr", "xgboost", "lightgbm")]


@pytest.mark.long
def test_the_command(tmp_path):
    pytest.importorskip("xgboost")
    pytest.importorskip("lightgbm")
    small = ["--items=300", "--users=60", "--interactions=6000", "--seeds=1", "--steps=60", "--parts=shop"]
    small += [f"--out={tmp_path}", "--json"]
    run = subprocess.run([sys.executable, SCRIPT, *small], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert sorted(found["bars"]) == sorted(BARS)
    value = {(row["impl"], row["metric"]): row["value"] for row in found["rows"]}
    # The trees know the past of items and queries, so they beat words alone. Requests with a click are many.
    for bar in ("dpr", "xgboost", "lightgbm"):
        assert found["bars"][f"ndcg5_{bar}"] > value["bm25", "ndcg5"]
    tried = [row for row in found["rows"] if row["metric"] == "validation_session_auc"]
    for impl in ("xgboost orders", "xgboost lambdamart", "lightgbm lambdamart"):
        mine = [row for row in tried if row["impl"] == impl]
        best = max(mine, key=lambda row: row["value"])
        chosen = next(row for row in found["rows"] if (row["impl"], row["metric"]) == (impl, "session_auc"))
        assert len(mine) == 8 and chosen["setting"] == best["setting"]
