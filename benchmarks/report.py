"""Functions that all benchmarks share: CPU time, rates measured side by side, the hardware, the table, the JSON line.

With `--json` the last line of a benchmark is one object:

    {"benchmark": "tokenizer", "schema": 1, "seed": 1, "hardware": {...},
     "rows": [{"impl": "core", "workload": "homedepot", "metric": "rate", "value": 80.2, "unit": "MB/s", ...}],
     "bars": {"ratio_to_best_comparable": 7.9}}
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import statistics
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from absl import app

SCHEMA = 1

Key = TypeVar("Key", bound=Hashable)


def read_seeds(given: list[str]) -> list[int]:
    """Returns the seeds of the flag --seeds. Raises app.UsageError for others than whole numbers."""
    if not given or not all(seed.isdecimal() for seed in given):
        raise app.UsageError(f"--seeds={','.join(given)}: expected whole numbers, as in --seeds=1,2")
    return [int(seed) for seed in given]


def cpu_seconds() -> float:
    """Returns the user and system time of this process, of all its threads, and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def rates(
    passes: Mapping[Key, Callable[[], object]], units: float, repeat: int, min_seconds: float
) -> dict[Key, list[float]]:
    """Measures passes side by side, and returns `repeat` rates of each, in units of work per second of CPU time.

    A pass does `units` of work. Each runs once to warm up. Then all are measured in turn, `repeat` times, and each time
    for at least `min_seconds` of CPU time, so that a change of the machine's speed affects all of them. Each turn
    begins with another pass, so that none always runs after the same one.
    """
    for run in passes.values():
        run()
    names = list(passes)
    samples: dict[Key, list[float]] = {name: [] for name in names}
    for turn in range(repeat):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            done = 0
            start = cpu_seconds()
            while (seconds := cpu_seconds() - start) < min_seconds or done == 0:
                passes[name]()
                done += 1
            samples[name].append(units * done / seconds)
    return samples


def hardware(*packages: str) -> dict[str, Any]:
    """Describes the machine, with the versions of Python and of those `packages` that are installed."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


@dataclasses.dataclass
class Report:
    """The figures of one run of a benchmark: rows of measurements, and the bars that they are held to."""

    benchmark: str
    seed: int
    hardware: dict[str, Any]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    bars: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, impl: str, workload: str, metric: str, value: float, unit: str, **more: Any) -> None:
        """Adds a row. `more` are fields that only this benchmark has."""
        self.rows.append({"impl": impl, "workload": workload, "metric": metric, "value": value, "unit": unit, **more})

    def add_samples(self, impl: str, workload: str, metric: str, samples: list[float], unit: str, **more: Any) -> None:
        """Adds a row with the median of the samples, the smallest and the largest."""
        spread = {"min": min(samples), "max": max(samples), "samples": len(samples)}
        self.add(impl, workload, metric, statistics.median(samples), unit, **spread, **more)

    def value(self, impl: str, workload: str, metric: str) -> float:
        """Returns the value of a row. Raises KeyError if the row does not exist."""
        for row in self.rows:
            if (row["impl"], row["workload"], row["metric"]) == (impl, workload, metric):
                return float(row["value"])
        raise KeyError(f"no row of {impl}, {workload}, {metric}")

    def table(self) -> str:
        """Returns the rows and the bars as a table for people."""
        lines = [f"{self.hardware['cpu']}, {self.hardware['cores']} cores; seed {self.seed}", ""]
        cells = [("workload", "implementation", "metric", "value", "unit", "min", "max", "note")]
        for row in self.rows:
            spread = [f"{row[key]:,.4g}" if key in row else "" for key in ("min", "max")]
            head = (row["workload"], row["impl"], row["metric"], f"{row['value']:,.6g}", row["unit"])
            cells.append((*head, *spread, row.get("note", "")))
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        numbers = {3, 5, 6}
        for line in cells:
            aligned = [
                f"{cell:>{width}}" if column in numbers else f"{cell:<{width}}"
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            lines.append("  ".join(aligned).rstrip())
        return "\n".join([*lines, "", *(f"{name} = {value:.3f}" for name, value in self.bars.items())])

    def print(self, as_json: bool) -> None:
        """Prints the table and, with `as_json`, the JSON object as the last line."""
        print(self.table())
        if as_json:
            print(json.dumps({"benchmark": self.benchmark, "schema": SCHEMA, **dataclasses.asdict(self)}), flush=True)
