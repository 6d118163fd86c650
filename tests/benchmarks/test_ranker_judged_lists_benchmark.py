"""benchmarks/ranker_judged_lists.py on grades of a rule: good items have the colour of the query, and long titles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ranker.py"
COLOURS = ["red", "blue", "green", "black", "white", "pink"]


@pytest.mark.long
def test_every_query_is_scored_by_models_that_have_not_seen_it(tmp_path):
    pytest.importorskip("lightgbm")
    rng = np.random.default_rng(1)
    lines = ["query\tpair\tgrade\trater_variance\ttitle\tdescription"]
    for query in range(40):
        colour = COLOURS[query % len(COLOURS)]
        for place in range(10):
            mine = COLOURS[rng.integers(len(COLOURS))] if rng.random() < 0.5 else colour
            # BM25 prefers short titles. Good ones are long, which the number of words tells.
            long = rng.random() < 0.5
            title = f"{mine} shoe {'with a soft inner sole and laces' if long else ''}"
            grade = (2 if mine == colour else 0) + (2 if long else 1)
            lines.append(f"{colour} shoe number{query}\t{query * 10 + place}\t{grade}\t0\t{title}\tcalled {title}")
    (tmp_path / "data" / "crowdflower261").mkdir(parents=True)
    (tmp_path / "data" / "crowdflower261" / "judgments.dev.tsv").write_text("\n".join(lines) + "\n")
    flags = ["--parts=judged_lists", f"--data={tmp_path / 'data'}", f"--out={tmp_path}", "--json"]
    run = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    bars = {impl: found["bars"][f"ndcg10_crowdflower261_{impl}"] for impl in ("bm25", "lightgbm", "dpr")}
    assert 0.5 < bars["bm25"] < 0.9 and bars["lightgbm"] > 0.95 and bars["dpr"] > 0.95
    rows = {(row["impl"], row["workload"], row["metric"]): row for row in found["rows"]}
    low, high = rows["dpr", "crowdflower261", "ndcg10"]["interval"]
    assert low <= bars["dpr"] <= high and rows["dpr", "crowdflower261", "ndcg10"]["queries"] == 40
    assert {f"chosen_{k}" for k in range(5)} <= {metric for impl, _, metric in rows if impl == "dpr"}
    assert rows["data", "esci150", "missing"]["value"] == 1, "data sets that are not there are left out, and named"
