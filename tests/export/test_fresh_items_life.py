"""The life of changes with real processes: benchmarks/fresh.py on a small shop."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Job

from dpsr_export.item_changes import ItemChangeLog
from dpsr_export.merge import replay

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(SCRIPTS))
benchmark: Any = importlib.import_module("fresh")
report: Any = importlib.import_module("report")


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_comes_back(job: Job, tmp_path: Path) -> None:
    for path in (job.store, job.model, job.index, job.store.parent / "shop"):
        (tmp_path / path.name).symlink_to(path)
    result = report.Report("fresh", 1, {})
    benchmark.measure(result, tmp_path, seed=1, full=False, quick=True)
    assert result.bars["lost_after_kill"] == 0 and result.bars["deleted_returned"] == 0
    assert result.bars["recall_over_rebuilt"] == pytest.approx(1)  # both are Flat
    assert result.value("server", "400 items", "failed") == 0
    # What the benchmark expects is what the replay says.
    (log,) = tmp_path.glob("changes-*")
    changes = next(ItemChangeLog(log).read())[1]
    source = object.__new__(benchmark.Source)
    source.kinds, source.ids = changes.kinds.tolist(), changes.ids.tolist()
    base = np.unique(changes.ids[changes.ids < benchmark.NEW_IDS])
    for count in (100, len(changes)):
        prices, deleted = source.after(count)
        replayed = replay(base, source.kinds[:count], source.ids[:count], [0] * count)
        assert replayed.items.keys() == prices.keys() and replayed.hidden == deleted and not replayed.ignored
        for item, changed in replayed.items.items():
            assert prices[item] == (changed.updates or [changed.put])[-1]
