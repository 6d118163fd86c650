"""Measures the model server under steady load while it loads new versions of its model and unloads old ones.

    python benchmarks/version_swap.py --json [--quick]

An open loop of requests (latencies count from when a request was due) runs first on one version, then through
--versions swaps: a new version is published, the server loads it and unloads the previous one. `failed` counts the
requests of both phases that did not succeed. Memory is read when a version has been unloaded: after the first swap and
after the last.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import statistics
import time
from pathlib import Path

import grpc
import report
import servers
from absl import flags
from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc

PATIENCE_S = 120.0
WORKLOAD = "swaps"


def publish(saved: Path, base_path: Path, version: int) -> None:
    """Puts `saved` in place by one rename. Its files are hard links, so that copying takes no time from the server."""
    hidden = base_path / f".{version}.tmp"
    shutil.copytree(saved, hidden, copy_function=os.link)
    hidden.rename(base_path / str(version))


def await_swap(target: str, version: int) -> None:
    """Waits until `version` answers and the previous one has been unloaded."""
    state = get_model_status_pb2.ModelVersionStatus.State
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = servers.MODEL
    end = time.monotonic() + PATIENCE_S
    with grpc.insecure_channel(target) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        while True:
            response = stub.GetModelStatus(request, timeout=PATIENCE_S)
            states = {status.version: status.state for status in response.model_version_status}
            if states.get(version) == state.AVAILABLE and states.get(version - 1, state.END) == state.END:
                return
            if time.monotonic() > end:
                raise RuntimeError(f"version {version} did not take over: {states}")
            time.sleep(0.02)


def measure(result: report.Report, folder: Path, server_flags: list[str]) -> None:
    values = flags.FLAGS
    versions, interval, megabytes = (
        (3, 0.8, 1.0) if values.quick else (values.versions, values.interval, values.megabytes)
    )
    rate = 200.0 if values.quick else values.rate
    saved, base_path, requests = folder / "saved", folder / "model", folder / "requests"
    base_path.mkdir()
    servers.write_model(saved, megabytes=megabytes)
    servers.write_requests(requests, servers.queries())
    publish(saved, base_path, 1)
    load = [f"--rate={rate}", f"--seconds={versions * interval}"]
    memory: dict[int, float] = {}
    durations = []
    with servers.model_server(base_path, *server_flags) as server, concurrent.futures.ThreadPoolExecutor(1) as threads:
        (steady,) = servers.load(
            server,
            requests,
            load[0],
            f"--seconds={min(10.0, versions * interval)}",
            f"--warmup_seconds={0.5 if values.quick else 2}",
        )
        begin = time.monotonic()
        running = threads.submit(servers.load, server, requests, *load, "--warmup_seconds=0")
        for swap in range(1, versions + 1):
            time.sleep(max(0.0, begin + (swap - 1) * interval - time.monotonic()))
            published = time.monotonic()
            publish(saved, base_path, swap + 1)
            await_swap(server.target, swap + 1)
            durations.append(time.monotonic() - published)
            shutil.rmtree(base_path / str(swap))
            time.sleep(interval / 4)
            memory[swap + 1] = server.rss_mib()
        (swaps,) = running.result()
        after = server.rss_mib()
    for name, found in (("steady", steady), ("swaps", swaps)):
        servers.add_load(result, name, WORKLOAD, found, found["failed"] + found["unsent"])
    result.add(
        "swaps",
        WORKLOAD,
        "versions",
        versions,
        "versions",
        rate=rate,
        memory_mib=[round(m, 1) for m in memory.values()],
    )
    result.add("swaps", WORKLOAD, "rss_first", memory[2], "MiB")
    result.add("swaps", WORKLOAD, "rss_last", memory[versions + 1], "MiB")
    result.add("swaps", WORKLOAD, "rss_peak", swaps["server_peak_rss_mib"], "MiB")
    result.add("swaps", WORKLOAD, "rss_after", after, "MiB")
    result.add(
        "swaps",
        WORKLOAD,
        "duration",
        statistics.median(durations),
        "s",
        note="from publishing to unloaded, polling included",
    )
    result.bars = {
        "failed": result.value("steady", WORKLOAD, "failed") + result.value("swaps", WORKLOAD, "failed"),
        "p99_swap_over_steady": swaps["latency_us"]["p99"] / steady["latency_us"]["p99"],
        "rss_20_over_2": memory[versions + 1] / memory[2],
    }


if __name__ == "__main__":
    flags.DEFINE_integer("versions", 20, "number of versions to swap in", lower_bound=1)
    flags.DEFINE_float("rate", 1000, "requests per second", lower_bound=1)
    flags.DEFINE_float("interval", 2, "seconds from one version to the next", lower_bound=0.1)
    flags.DEFINE_float("megabytes", 50, "size of the variables in each version, in MB", lower_bound=0)
    flags.DEFINE_boolean("quick", False, "swap three versions in, to check that the benchmark works")
    servers.run("version_swap", measure)
