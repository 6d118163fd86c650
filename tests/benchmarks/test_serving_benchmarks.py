"""The benchmarks of serving in their quick form: they run, and their figures are possible ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slow


def run(name: str, *arguments: str) -> dict[str, Any]:
    script = ROOT / "benchmarks" / f"{name}.py"
    command = [sys.executable, script, "--json", "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["benchmark", "schema", "seed", "hardware", "rows", "bars"]
    assert found["benchmark"] == name
    return found


def values(found: dict[str, Any], metric: str) -> dict[tuple[str, str], float]:
    return {(row["workload"], row["impl"]): row["value"] for row in found["rows"] if row["metric"] == metric}


@pytest.mark.long
def test_model_server() -> None:
    found = run("model_server")
    bars = ["qps_ratio_to_python_c8", "qps_ratio_to_python_c32", "core_us_ratio_to_python", "core_us_over_session_run"]
    assert list(found["bars"]) == bars
    assert all(found["bars"][name] > 0 for name in bars[:3])
    assert {row["workload"] for row in found["rows"]} == {"12kb", "fused"}
    for load in ("closed_1", "closed_8", "closed_32", "open_half"):
        assert set(values(found, f"{load}_failed").values()) == {0}
        p50, p99 = values(found, f"{load}_p50"), values(found, f"{load}_p99")
        assert all(0 < p50[key] <= p99[key] for key in p50)
        assert all(value > 0 for value in values(found, f"{load}_cpu").values())
    assert all(value > 5_000 for (workload, _), value in values(found, "answer").items() if workload == "12kb")


@pytest.mark.long
def test_version_swap() -> None:
    found = run("version_swap", "--server_flag=--enable_batching")
    assert list(found["bars"]) == ["failed", "p99_swap_over_steady", "rss_20_over_2"]
    assert found["bars"]["failed"] == 0
    assert found["bars"]["rss_20_over_2"] > 0.5
    assert values(found, "versions") == {("swaps", "swaps"): 3}


@pytest.mark.long
def test_soak() -> None:
    found = run("soak")
    assert list(found["bars"]) == ["failed", "rss_end_over_begin"]
    assert found["bars"]["failed"] == 0
    assert 0.5 < found["bars"]["rss_end_over_begin"] < 1.5
    assert all(values(found, "requests")[way, "dpsr"] > 0 for way in ("grpc", "proxy", "rest"))


@pytest.mark.long
def test_proxy() -> None:
    found = run("proxy")
    bars = ["added_p50_ms", "qps_per_core", "merge_us_4_shards_k1000", "cpu_ratio_to_nginx", "workers2_over_1"]
    if not (ROOT / "build" / "nginx").exists():
        bars.remove("cpu_ratio_to_nginx")
    assert list(found["bars"]) == bars
    assert all(found["bars"][name] > 0 for name in ("qps_per_core", "merge_us_4_shards_k1000", "workers2_over_1"))
    transport = values(found, "cpu")
    assert 0 < transport["transport", "wire"] < transport["transport", "h2"]
    cpu = values(found, "cpu proxy")
    assert {impl for _, impl in cpu} - {"nginx"} == {"proxy", "grpc.aio", "grpc C++", "1 worker", "2 workers"}
    # The few requests of the open loop may take nginx less CPU time than the kernel counts.
    assert all(value > 0 for key, value in cpu.items() if key != ("open 300", "nginx"))
    for workload in ("open 300", "closed 8"):
        p50, p99 = values(found, "p50"), values(found, "p99")
        assert all(
            0 < p50[workload, impl] <= p99[workload, impl] for impl in ("direct", "proxy", "grpc.aio", "grpc C++")
        )


@pytest.mark.long
def test_faults() -> None:
    found = run("faults", "--faults=kill,reload")
    assert found["bars"] == {"failed_kill": 0, "failed_reload": 0}
    assert all(count > 100 for count in values(found, "requests").values())


@pytest.mark.long
def test_gray_faults() -> None:
    found = run("faults", "--faults=gray,shard_rollout,hedge")
    bars = found["bars"]
    assert list(bars) == ["failed_gray", "failed_shard_rollout", "mixed_versions", "p99_hedged_over_unhedged"]
    assert [bars[name] for name in list(bars)[:3]] == [0, 0, 0]
    assert bars["p99_hedged_over_unhedged"] > 0
    for version in (1, 2):
        assert values(found, f"answers of version {version}")["shard_rollout", "proxy"] > 10
