"""Measures the model server under steady load while it loads new versions of its model and unloads old ones.

    python benchmarks/version_swap.py --json [--items=1000000] [--out=DIR] [--quick]

The model is a fused servable of a generated shop with a million items. Open loops of searches, most of them with
filters, come over gRPC, through the proxy, and over REST (benchmarks/shop_load.py); latencies count from when a request
was due. They run first on one version, then through --versions swaps: a new version is published, the server loads it
and unloads the previous one. `failed` counts the requests of both phases that did not succeed. `p99_swap_over_steady`
is that of the way with the largest. Memory is read when a version has been unloaded: after the first swap and after the
last.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import grpc
import report
import servers
import shop_load
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
    versions, interval, rate = (3, 0.8, 50.0) if values.quick else (values.versions, values.interval, values.rate)
    saved = shop_load.servable(folder)
    memory: dict[int, float] = {}
    durations = []
    with contextlib.ExitStack() as stack:
        # Hard links need the same file system.
        base_path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=saved.parent.parent)))
        publish(saved, base_path, 1)
        front = stack.enter_context(shop_load.front(saved, base_path, server_flags))
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        front.load(0.5 if values.quick else 2, rate)
        steady = front.load(min(20.0, versions * interval), rate)
        begin = time.monotonic()
        running = threads.submit(front.load, versions * interval, rate)
        for swap in range(1, versions + 1):
            time.sleep(max(0.0, begin + (swap - 1) * interval - time.monotonic()))
            published = time.monotonic()
            publish(saved, base_path, swap + 1)
            await_swap(front.server.target, swap + 1)
            durations.append(time.monotonic() - published)
            shutil.rmtree(base_path / str(swap))
            time.sleep(interval / 4)
            memory[swap + 1] = front.server.rss_mib()
        swaps = running.result()
        after = front.server.rss_mib()
    failed = sum(shop_load.add_loads(result, name, loads) for name, loads in (("steady", steady), ("swaps", swaps)))
    found = [round(m, 1) for m in memory.values()]
    result.add("swaps", WORKLOAD, "versions", versions, "versions", rate=rate, memory_mib=found)
    result.add("swaps", WORKLOAD, "rss_first", memory[2], "MiB")
    result.add("swaps", WORKLOAD, "rss_last", memory[versions + 1], "MiB")
    result.add("swaps", WORKLOAD, "rss_peak", swaps[shop_load.GRPC]["server_peak_rss_mib"], "MiB")
    result.add("swaps", WORKLOAD, "rss_after", after, "MiB")
    median = statistics.median(durations)
    result.add("swaps", WORKLOAD, "duration", median, "s", note="from publishing to unloaded, polling included")
    for way in shop_load.WAYS:
        ratio = result.value("swaps", way, "p99") / result.value("steady", way, "p99")
        result.add("swaps_over_steady", way, "p99", ratio, "ratio")
    result.bars = {
        "failed": failed,
        "p99_swap_over_steady": max(result.value("swaps_over_steady", way, "p99") for way in shop_load.WAYS),
        "rss_20_over_2": memory[versions + 1] / memory[2],
    }


if __name__ == "__main__":
    flags.DEFINE_integer("versions", 20, "number of versions to swap in", lower_bound=1)
    flags.DEFINE_float(
        "rate", 300, "requests per second over gRPC, and as many through the proxy; REST has a tenth", lower_bound=10
    )
    flags.DEFINE_float("interval", 3, "seconds from one version to the next", lower_bound=0.1)
    flags.DEFINE_boolean("quick", False, "swap three versions of a small shop in, to check that the benchmark works")
    flags.DEFINE_integer("items", 1_000_000, "number of items", lower_bound=1000)
    flags.DEFINE_string("out", None, "folder that keeps shop, model and servable; a temporary one if left out")
    servers.run("version_swap", measure)
