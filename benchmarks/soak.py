"""The model server at full load for minutes: no request may fail, and its memory must not grow.

    python benchmarks/soak.py --json [--minutes=10] [--server_flag=--enable_batching ...]

A closed loop of 32 requests keeps every core busy; memory is read every second. `rss_end_over_begin` compares its
median in the last tenth of the time with that in the second tenth, when everything has been allocated once.
"""

from __future__ import annotations

import concurrent.futures
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import report
import servers
from absl import app, flags

WORKLOAD = "full_load"


def measure(result: report.Report, folder: Path, seconds: float, flags_: list[str]) -> None:
    servers.write_model(folder / "model" / "1")
    servers.write_requests(folder / "requests", servers.queries())
    memory = []
    with (
        servers.model_server(folder / "model", *flags_) as server,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        load = ["--concurrency=32", f"--seconds={seconds}", "--warmup_seconds=0"]
        running = threads.submit(servers.load, server, folder / "requests", *load)
        while not running.done():
            memory.append(server.rss_mib())
            time.sleep(min(1.0, seconds / 50))
        (found,) = running.result()
    tenth = max(1, len(memory) // 10)
    begin, end = statistics.median(memory[tenth : 2 * tenth]), statistics.median(memory[-tenth:])
    result.add("dpsr", WORKLOAD, "requests", found["succeeded"], "requests")
    result.add("dpsr", WORKLOAD, "failed", found["failed"], "requests", errors=found["errors"])
    result.add("dpsr", WORKLOAD, "qps", found["qps"], "1/s")
    for quantile in ("p50", "p99", "p99.9", "max"):
        result.add("dpsr", WORKLOAD, quantile, found["latency_us"][quantile] / 1e3, "ms")
    result.add("dpsr", WORKLOAD, "cpu", found["server_cpu_us"], "us/request")
    result.add("dpsr", WORKLOAD, "rss_begin", begin, "MiB")
    result.add("dpsr", WORKLOAD, "rss_end", end, "MiB", max=max(memory), min=min(memory))
    result.bars = {"failed": found["failed"], "rss_end_over_begin": end / begin}


def _define_flags() -> None:
    flags.DEFINE_boolean("json", False, "prints one JSON object as the last line")
    flags.DEFINE_float("minutes", 10, "of load", lower_bound=0.01)
    flags.DEFINE_boolean("quick", False, "five seconds: shows that it works")
    flags.DEFINE_multi_string("server_flag", [], "of the server, such as --server_flag=--enable_batching")


def main(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    if arguments[1:]:
        raise app.UsageError(f"unexpected argument '{arguments[1]}'")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    result = report.Report("soak", 1, servers.hardware())
    with tempfile.TemporaryDirectory() as folder:
        measure(result, Path(folder), 5.0 if values.quick else values.minutes * 60, values.server_flag)
    result.print(values.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
