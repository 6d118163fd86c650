"""Runs the model server at full load for minutes: no request may fail, and its memory must not grow.

    python benchmarks/soak.py --json [--minutes=10] [--server_flag=--enable_batching ...]

A closed loop of 32 requests keeps every core busy, and memory is read every second. `rss_end_over_begin` is the median
memory in the last tenth of the time divided by the median in the second tenth, when everything has been allocated once.
"""

from __future__ import annotations

import concurrent.futures
import statistics
import time
from pathlib import Path

import report
import servers
from absl import flags

WORKLOAD = "full_load"


def measure(result: report.Report, folder: Path, server_flags: list[str]) -> None:
    seconds = 2.0 if flags.FLAGS.quick else flags.FLAGS.minutes * 60
    servers.write_model(folder / "model" / "1")
    servers.write_requests(folder / "requests", servers.queries())
    memory = []
    with (
        servers.model_server(folder / "model", *server_flags) as server,
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
    servers.add_load(result, "dpsr", WORKLOAD, found, found["failed"])
    result.add("dpsr", WORKLOAD, "rss_begin", begin, "MiB")
    result.add("dpsr", WORKLOAD, "rss_end", end, "MiB", max=max(memory), min=min(memory))
    result.bars = {"failed": found["failed"], "rss_end_over_begin": end / begin}


if __name__ == "__main__":
    flags.DEFINE_float("minutes", 10, "minutes of load", lower_bound=0.01)
    flags.DEFINE_boolean("quick", False, "run for two seconds, to check that the benchmark works")
    servers.run("soak", measure)
