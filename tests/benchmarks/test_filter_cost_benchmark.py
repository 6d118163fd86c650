from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
benchmark = importlib.import_module("filter_cost")
report = importlib.import_module("report")
vectors = importlib.import_module("vectors")


def test_every_filter_is_measured_and_an_exact_index_stays_exact(tmp_path: Path) -> None:
    result = report.Report("filter_cost", 1, {})
    source = vectors.Vectors(3000, 1, dim=8)
    items = next(source.blocks())
    benchmark.filter_cost(result, items, source.queries(84), tmp_path, repeat=1, seconds=0)
    assert len(result.rows) == 1 + 3 * len(benchmark.SHARES)
    assert all(row["value"] > 0 for row in result.rows)
    # Flat: all that is missing are equal scores, and sums in another order.
    assert [row["ann_recall"] for row in result.rows] == pytest.approx([1.0] * len(result.rows), abs=1e-3)
    unfiltered = result.value("none", "all items", "core_ms")
    assert result.bars == {
        "filter_cost_ratio_worst": pytest.approx(max(row["value"] for row in result.rows) / unfiltered)
    }
