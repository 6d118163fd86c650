from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "evaluation.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("evaluation")
report = importlib.import_module("report")


def test_the_shop_is_seeded_and_each_query_has_words_of_its_item():
    corpus, judgments = benchmark.shop(1500, 40, 1)
    assert len(corpus.titles) == 1500 and len(judgments.queries) == 40
    for query, relevant in zip(judgments.queries, judgments.relevant, strict=True):
        assert set(query.split()) <= set(corpus.titles[relevant[0]].split())
    assert benchmark.shop(1500, 40, 1)[1] == judgments
    assert benchmark.shop(1500, 40, 2)[1] != judgments


def test_exact_search_finds_the_item_of_a_query():
    corpus, judgments = benchmark.shop(1500, 40, 1)
    ids, _ = benchmark.exact_search(corpus, judgments, 1)(judgments.queries, None, 1)
    assert (ids == np.array(judgments.relevant)).mean() > 0.9


def test_bars_are_of_the_slowest_system():
    result = report.Report("evaluation", 1, {})
    for impl, make, evaluate in (("a", 1.0, 5.0), ("b", 4.0, 3.0)):
        for workload, factor in (("few", 1), ("many", 10)):
            for metric, value in (
                ("make_wall", make),
                ("evaluate_wall", evaluate),
                ("make_cpu", 0),
                ("evaluate_cpu", 2),
            ):
                result.add(impl, workload, metric, value * factor, "s")
    assert benchmark.bars(result, "many", 9) == {"slowest_wall_seconds_9_items": 70, "slowest_cpu_seconds_9_items": 20}


@pytest.mark.slow
def test_the_json_line():
    run = subprocess.run([sys.executable, SCRIPT, "--json", "--quick"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert list(found) == ["benchmark", "schema", "seed", "hardware", "rows", "bars"]
    assert (found["benchmark"], found["schema"], found["seed"]) == ("evaluation", 1, 1)
    assert set(found["bars"]) == {"slowest_wall_seconds_2000_items", "slowest_cpu_seconds_2000_items"}
    recall = {row["impl"]: row["value"] for row in found["rows"] if row["metric"] == "recall@100"}
    assert set(recall) == {"bm25", "bm25-bigrams", "exact search", "rrf(bm25,bm25-bigrams)", "popularity"}
    assert min(value for name, value in recall.items() if name != "popularity") > 0.9 > recall["popularity"]


def test_a_bad_size():
    run = subprocess.run([sys.executable, SCRIPT, "--items=10"], capture_output=True, text=True, check=False)
    assert run.returncode != 0 and "--items=10: expected numbers of at least 1,100" in run.stdout + run.stderr
