"""The parts of benchmarks/search.py that need neither data sets nor training."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsr_export.inverted_index import parse_analysis
from dpsr_serving.gateway.inverted import Found

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "search.py"
sys.path.append(str(SCRIPT.parent))
benchmark: Any = importlib.import_module("search")

COLUMNS = ("title", "brand", "category", "bullet_points", "color", "details")


def test_every_analysis_is_one():
    for analyses in benchmark.ANALYSES.values():
        for analysis in analyses:
            assert parse_analysis(analysis, {column: column for column in COLUMNS})


def lists(queries: int) -> tuple[list[dict[str, Found]], list[list[int]]]:
    """Queries whose first item is relevant, as both sources say."""
    found = Found(np.arange(40), np.linspace(1, 0, 40).astype(np.float32))
    return [{"inverted": found, "semantic": found} for _ in range(queries)], [[0]] * queries


def test_a_query_is_never_judged_by_what_it_taught(monkeypatch: pytest.MonkeyPatch):
    taught: list[list[int]] = []
    rows, _ = lists(50)
    relevant = [[number] for number in range(50)]

    def learn(given: Any, wanted: list[list[int]], depths: Any, keep: float) -> int:
        assert len(given) == len(wanted) and depths == {"inverted": 300, "semantic": 300}
        taught.append([items[0] for items in wanted])
        return len(taught) - 1

    monkeypatch.setattr(benchmark, "learn", learn)
    fusions = benchmark.crosswise(rows, relevant)
    assert len(taught) == benchmark.FOLDS and all(len(queries) == 40 for queries in taught)
    for query, fusion in enumerate(fusions):
        assert query not in taught[fusion]


def test_the_cut_off_does_not_count_in_recall():
    rows, relevant = lists(50)
    fusion = benchmark.crosswise(rows, relevant)[0]
    whole = benchmark.uncut(fusion).combine(rows[0], 1000)
    assert len(whole.ids) == 40 and len(fusion.combine(rows[0], 1000).ids) < 40


def test_bars_come_from_the_rows():
    result = benchmark.report.Report("search", 1, {})
    for impl, value in (("hybrid_learned", 0.9), ("bm25", 0.5), ("inverted", 0.6), ("semantic", 0.7)):
        for metric in ("recall@100", "ndcg@10"):
            result.add(impl, "esci150 dev", metric, value, "")
    for other in ("bm25", "inverted", "semantic"):
        result.add(f"hybrid_learned - {other}", "esci150 dev", "ndcg@10", 0.1, "", interval=[-0.1, 0.3])
    result.add("cut_off", "esci150 dev", "kept", 0.98, "")
    benchmark.add_bars(result)
    assert result.bars["esci150_recall100_hybrid"] == 0.9 and result.bars["esci150_recall100_bm25"] == 0.5
    assert result.bars["esci150_ndcg10_hybrid_over_bm25_low"] == -0.1 and result.bars["esci150_cut_off_kept"] == 0.98
    assert not [name for name in result.bars if name.startswith("icecat")]


def test_a_folder_without_the_data_sets():
    run = subprocess.run([sys.executable, SCRIPT, "--data=none"], capture_output=True, text=True, check=False)
    message = "--data=none: has no homedepot/judgments.dev.tsv; give the folder of the data sets"
    assert run.returncode != 0 and message in run.stdout + run.stderr
