"""What the proxy adds to a request: latency beside the server itself, and CPU time of the proxy.

    python benchmarks/proxy.py --json [--requests=N] [--quick]

The backend is a gRPC server in a process of its own that gives an answer of 12 KB, the size of a search answer of 1,000
items without keys, and does nothing else: what is measured is the way. Clients ask it directly and through the proxy,
in turns, with 1, 8 and 32 requests under way. The added latency is the difference of the medians (of the 99th
percentiles) of one turn; the row is the median of the turns. CPU time is user and system time of the proxy's processes.

All four (clients, proxy, its workers, server) share the cores of this machine: with few cores the latency at 8 and 32
is that of waiting for a core, which the CPU time tells better.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
from report import Report, hardware

from dpsr_serving import apis

ANSWER_BYTES = 12_000
CONCURRENCY = (1, 8, 32)


def main() -> None:
    """Runs the benchmark, or the backend of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, last line")
    parser.add_argument("--requests", type=int, default=3000, help="requests of each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few requests: does it run at all")
    parser.add_argument("--backend", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.backend:
        asyncio.run(serve())
        return
    if arguments.quick:
        arguments.requests, arguments.turns = 200, 2
    report = Report("proxy", 0, hardware("grpcio", "protobuf"))
    measure(report, arguments.requests, arguments.turns)
    report.print(arguments.json)


def measure(report: Report, requests: int, turns: int) -> None:
    """Fills the report."""
    with Child([sys.executable, __file__, "--backend"]) as backend, tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "proxy.yaml"
        config.write_text(f"models: {{m: {{backends: ['{backend.target}']}}}}\n")
        proxy = [sys.executable, "-m", "dpsr_tf.cli", "proxy", "--port=0", f"--config={config}"]
        with Child(proxy) as one, Child([*proxy, "--workers=2"]) as two:
            cpu_by_concurrency = {}
            for concurrency in CONCURRENCY:
                workload = f"concurrency {concurrency}"
                found = turns_of(backend, one, concurrency, requests, turns)
                for metric in ("p50", "p99"):
                    direct, through = ([run[metric] for run in found[name]] for name in ("direct", "proxy"))
                    report.add_samples("direct", workload, metric, direct, "ms")
                    report.add_samples("proxy", workload, metric, through, "ms")
                    added = [b - a for a, b in zip(direct, through, strict=True)]
                    report.add_samples("proxy", workload, f"added {metric}", added, "ms")
                cpu_by_concurrency[concurrency] = [run["cpu_us"] for run in found["proxy"]]
                report.add_samples("proxy", workload, "CPU a request", cpu_by_concurrency[concurrency], "us")
            rates: dict[str, list[float]] = {"1 worker": [], "2 workers": []}
            for _ in range(turns):
                for name, child in (("1 worker", one), ("2 workers", two)):
                    rates[name].append(asyncio.run(ask(child, 32, requests, connections=8))["rate"])
            for name, samples in rates.items():
                report.add_samples(name, "concurrency 32", "rate (wall)", samples, "requests/s")
    report.bars["added_p50_ms"] = report.value("proxy", "concurrency 1", "added p50")
    report.bars["cpu_us_per_request"] = report.value("proxy", "concurrency 8", "CPU a request")
    report.bars["qps_per_core"] = 1e6 / report.bars["cpu_us_per_request"]
    rate = {name: report.value(name, "concurrency 32", "rate (wall)") for name in rates}
    report.bars["workers2_over_1"] = rate["2 workers"] / rate["1 worker"]


def turns_of(
    backend: Child, proxy: Child, concurrency: int, requests: int, turns: int
) -> dict[str, list[dict[str, float]]]:
    """The figures of each turn of both, which take turns in going first."""
    found: dict[str, list[dict[str, float]]] = {"direct": [], "proxy": []}
    pairs = [("direct", backend), ("proxy", proxy)]
    for turn in range(turns):
        for name, child in pairs[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(asyncio.run(ask(child, concurrency, requests)))
    return found


async def ask(child: Child, concurrency: int, requests: int, connections: int = 1) -> dict[str, float]:
    """Sends the requests, `concurrency` at a time; latency in ms, the child's CPU time a request in us, rate."""
    request = apis.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "m", "search"
    request.inputs["query"].string_val.append(b"red shoes")
    message = request.SerializeToString()
    seconds: list[float] = []
    options = [("grpc.use_local_subchannel_pool", 1), *apis.CHANNEL_OPTIONS]
    channels = [grpc.aio.insecure_channel(child.target, options=options) for _ in range(connections)]
    methods = [channel.unary_unary(apis.PREDICT) for channel in channels]

    async def client(method: Callable[..., grpc.aio.UnaryUnaryCall], count: int) -> None:
        for _ in range(count):
            start = time.perf_counter()
            answer = await method(message, timeout=30)
            seconds.append(time.perf_counter() - start)
            if len(answer) != ANSWER_BYTES:
                raise SystemExit(f"an answer of {len(answer)} bytes")

    for method in methods:
        await client(method, 20)
    seconds.clear()
    cpu, start = child.cpu_seconds(), time.perf_counter()
    await asyncio.gather(*(client(methods[n % connections], requests // concurrency) for n in range(concurrency)))
    wall, cpu = time.perf_counter() - start, child.cpu_seconds() - cpu
    for channel in channels:
        await channel.close()
    seconds.sort()
    return {
        "p50": seconds[len(seconds) // 2] * 1e3,
        "p99": seconds[int(len(seconds) * 0.99)] * 1e3,
        "cpu_us": cpu / len(seconds) * 1e6,
        "rate": len(seconds) / wall,
    }


class Child:
    """A process that says "... ready on ADDRESS"; a context manager that ends it."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if " ready on " not in line:
            raise SystemExit(f"{' '.join(command)} said {line!r}")
        self.target = line.rpartition(" ")[2].strip()

    def __enter__(self) -> Child:
        """Returns the child itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait()

    def cpu_seconds(self) -> float:
        """User and system time of the process and its children so far."""
        pid = self._process.pid
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        total = 0
        for process in (pid, *below):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")


async def serve() -> None:
    """The backend: every call gets the same bytes."""
    content = os.urandom(ANSWER_BYTES)

    async def answer(request: bytes, context: object) -> bytes:
        return content

    class Methods(grpc.GenericRpcHandler):
        def service(self, details: object) -> object:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Methods(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"backend ready on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    main()
