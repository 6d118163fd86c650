"""Runs the model server and the proxy at full load for minutes: no request may fail, and their memory must not grow.

    python benchmarks/soak.py --json [--minutes=10] [--items=1000000] [--out=DIR] [--server_flag=--enable_batching ...]

The model is a fused servable of a generated shop with a million items. Closed loops of searches, most of them with
filters, keep every core busy: 8 over gRPC, 8 through the proxy, and one over REST (benchmarks/shop_load.py). Memory is
read every second. `rss_end_over_begin` is the median memory of a process in the last tenth of the time divided by the
median in the second tenth, when everything has been allocated once; the bar is that of the process with the larger one.
"""

from __future__ import annotations

import concurrent.futures
import statistics
import time
from pathlib import Path

import report
import servers
import shop_load
from absl import flags


def measure(result: report.Report, folder: Path, server_flags: list[str]) -> None:
    seconds = 2.0 if flags.FLAGS.quick else flags.FLAGS.minutes * 60
    version = shop_load.servable(folder)
    with (
        shop_load.front(version, version.parent, server_flags) as front,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        memory: dict[str, list[float]] = {"server": [], "proxy": []}
        running = threads.submit(front.load, seconds, concurrency=8)
        while not running.done():
            memory["server"].append(front.server.rss_mib())
            memory["proxy"].append(front.proxy.rss_mib())
            time.sleep(min(1.0, seconds / 50))
        loads = running.result()
    failed, ratios = shop_load.add_loads(result, "dpsr", loads), []
    for process, found in memory.items():
        tenth = max(1, len(found) // 10)
        begin, end = statistics.median(found[tenth : 2 * tenth]), statistics.median(found[-tenth:])
        result.add(process, "memory", "rss_begin", begin, "MiB")
        result.add(process, "memory", "rss_end", end, "MiB", max=max(found), min=min(found))
        ratios.append(end / begin)
    result.bars = {"failed": failed, "rss_end_over_begin": max(ratios)}


if __name__ == "__main__":
    flags.DEFINE_float("minutes", 10, "minutes of load", lower_bound=0.01)
    flags.DEFINE_boolean("quick", False, "run for two seconds with a small shop, to check that the benchmark works")
    flags.DEFINE_integer("items", 1_000_000, "number of items", lower_bound=1000)
    flags.DEFINE_string("out", None, "folder that keeps shop, model and servable; a temporary one if left out")
    servers.run("soak", measure)
