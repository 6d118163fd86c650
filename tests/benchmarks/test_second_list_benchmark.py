"""benchmarks/second_list.py in its quick form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "second_list.py"


@pytest.mark.long
def test_quick_run() -> None:
    run = subprocess.run([sys.executable, str(SCRIPT), "--json", "--quick"], capture_output=True, text=True, check=True)
    report = json.loads(run.stdout.strip().splitlines()[-1])
    value = {(row["impl"], row["workload"], row["metric"]): row["value"] for row in report["rows"]}
    for name, entries in (("one list", 1), ("two lists", 2)):
        assert value[name, "nprobe=64", "codes_p50"] == entries * 5000, "all lists are probed"
        assert value[name, "nprobe=1", "ann_recall@100"] < value[name, "nprobe=32", "ann_recall@100"]
        budgets = [workload for impl, workload, metric in value if impl == name and "max_codes" in workload]
        for workload in set(budgets):
            assert value[name, workload, "codes_p99"] <= int(workload.partition("max_codes=")[2])
    assert value["two lists", "nprobe=4", "ann_recall@100"] > value["one list", "nprobe=4", "ann_recall@100"]
    # With so few lists, two lists may reach the recall of one list nowhere, and then there are no bars.
    assert all(value > 0 for value in report["bars"].values())
