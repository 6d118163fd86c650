"""Measures what the proxy adds to a request: latency compared with the server alone, and CPU time of the proxy.

    python benchmarks/proxy.py --json [--seconds=S] [--turns=N] [--nginx=PATH] [--quick]

The backend is the model server with a SavedModel whose answers are 12 KB, the size of a search answer of 1,000 items.
The load generator sends requests in turns to the server (`direct`), to the proxy in front of it (`proxy`), and to three
that only forward bytes and choose no server: a proxy of grpc.aio (`grpc.aio`), which shows the cost of Python's gRPC
alone, one on gRPC's C++ library (`grpc C++`), and, if it is there, nginx with one worker process (`nginx`).

`open R`: R requests per second, a moderate load; latencies count from when a request was due. `closed N`: N requests
under way all the time. The added latency is the difference of the medians in one turn; the row is the median over the
turns. CPU is the user and system time of the proxy's processes in us for one request: one core forwards 10^6 / CPU
requests per second.

`transport`: CPU time of one call of 12 KB between a client's and a server's session in this process, without sockets:
the proxy's wire (nghttp2 in C++), and the Python library h2 that it could be built on.

`merge`: CPU time to merge the answers of 4 shards with 1,000 items each.

Two workers: load generator, server and proxy share the cores of this machine. `limit` is the highest possible ratio of
the rate of two workers to that of one: the rate that all cores, fully busy, could reach.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import report
import servers

ROOT = Path(__file__).resolve().parents[1]
CONCURRENCY = (1, 8, 32)
RATE = 300  # requests per second, a small part of what one worker can do
BARE = "bare pass-through on "
PREDICT = "/tensorflow.serving.PredictionService/Predict"
ANSWER_BYTES = 12_000


# One worker, and connections to the server that stay, as ours have them.
NGINX = """
daemon off; worker_processes 1; error_log stderr warn; pid {folder}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000000; grpc_buffer_size 64k;
  upstream backend {{ server {target}; keepalive 128; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} http2;
    location / {{ grpc_pass grpc://backend; }}
  }}
}}
"""


class Proxy(servers.Server):
    """A proxy: its first process and the workers that it started."""

    def cpu_seconds(self) -> float:
        """Returns the CPU time (user and system) of all processes so far, in seconds."""
        return _cpu_seconds(self.process.pid)


def _cpu_seconds(pid: int) -> float:
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return servers.cpu_seconds_of(pid) + sum(_cpu_seconds(int(process)) for process in below)


def main() -> None:
    """Runs the benchmark, or with --bare the grpc.aio proxy that it compares with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of each load in each turn")
    parser.add_argument("--turns", type=int, default=5, help="number of turns")
    parser.add_argument(
        "--nginx", default=str(ROOT / "build" / "nginx"), help="nginx to compare with; left out if it is not found"
    )
    parser.add_argument("--quick", action="store_true", help="make few requests, to check that the benchmark works")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare is not None:
        asyncio.run(pass_through(arguments.bare))
        return
    if arguments.quick:
        arguments.seconds, arguments.turns = 0.3, 1
    result = report.Report("proxy", 1, servers.hardware())
    with tempfile.TemporaryDirectory() as folder:
        concurrency = (8,) if arguments.quick else CONCURRENCY
        measure(result, Path(folder), arguments.seconds, arguments.turns, concurrency, shutil.which(arguments.nginx))
    result.print(arguments.json)


def measure(
    result: report.Report, folder: Path, seconds: float, turns: int, concurrency: Sequence[int], nginx: str | None
) -> None:
    """Fills the report. `nginx`: path of nginx, if it is to be compared with."""
    servers.write_model(folder / "model" / "1")
    requests = folder / "requests"
    servers.write_requests(requests, servers.queries())
    started: list[servers.Server] = []
    with servers.model_server(folder / "model") as backend:
        try:
            command = [
                sys.executable,
                "-m",
                "dpsr_common.command_line",
                "proxy",
                "--port=0",
                f"--backend={backend.target}",
            ]
            targets = {
                "direct": backend,
                "proxy": Proxy(command, "proxy ready on "),
                "grpc.aio": Proxy([sys.executable, __file__, f"--bare={backend.target}"], BARE),
                "grpc C++": Proxy([str(servers.BIN / "dpsr_pass_through"), backend.target], "pass-through on "),
                "2 workers": Proxy([*command, "--workers=2"], "proxy ready on "),
            }
            if nginx is not None:
                targets["nginx"] = start_nginx(nginx, folder, backend.target)
            started = [target for target in targets.values() if target is not backend]
            compared = [name for name in targets if name != "2 workers"]
            loads = [(f"open {RATE}", f"--rate={RATE}"), *((f"closed {n}", f"--concurrency={n}") for n in concurrency)]
            for name, flag in loads:
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in compared}
                for turn in range(turns):
                    order = list(found)[:: 1 if turn % 2 == 0 else -1]
                    for impl in order:
                        found[impl].append(load(targets[impl], backend, requests, seconds, flag))
                add(result, name, found)
            pair: dict[str, list[dict[str, Any]]] = {"proxy": [], "2 workers": []}
            for turn in range(turns):
                for impl in list(pair)[:: 1 if turn % 2 == 0 else -1]:
                    flags = ("--concurrency=32", "--channels=16")
                    pair[impl].append(load(targets[impl], backend, requests, seconds, *flags))
        finally:
            for server in started:
                server.stop()
    for impl, make_call in (("wire", wire_calls), ("h2", h2_calls)):
        result.add(impl, "transport", "cpu", transport_us(make_call, 200 if turns == 1 else 2000), "us/call")
    result.add("proxy", "4 shards of 1000", "merge", merge_us(4, 1000), "us/call")
    for impl, runs in pair.items():
        name = "1 worker" if impl == "proxy" else impl
        result.add_samples(name, "workers, closed 32", "rate", [run["qps"] for run in runs], "1/s")
        for part in ("proxy", "server", "client"):
            result.add_samples(name, "workers, closed 32", f"cpu {part}", [run[f"{part}_us"] for run in runs], "us")
    ratios = [two["qps"] / one["qps"] for one, two in zip(pair["proxy"], pair["2 workers"], strict=True)]
    cores = len(os.sched_getaffinity(0))
    limits = [
        cores * 1e6 / (one["proxy_us"] + one["server_us"] + one["client_us"]) / one["qps"] for one in pair["proxy"]
    ]
    result.add_samples("2 workers", "workers, closed 32", "rate over 1 worker", ratios, "x")
    result.add_samples("2 workers", "workers, closed 32", "limit", limits, "x", note=f"of {cores} cores")
    result.bars["added_p50_ms"] = result.value("proxy", f"open {RATE}", "added p50")
    result.bars["qps_per_core"] = 1e6 / result.value("proxy", "closed 8", "cpu proxy")
    result.bars["merge_us_4_shards_k1000"] = result.value("proxy", "4 shards of 1000", "merge")
    if nginx is not None:
        ours, theirs = (result.value(impl, "closed 8", "cpu proxy") for impl in ("proxy", "nginx"))
        result.bars["cpu_ratio_to_nginx"] = ours / theirs
    else:
        print("cpu_ratio_to_nginx is not measured: nginx is missing; run `make build/nginx`", file=sys.stderr)
    result.bars["workers2_over_1"] = statistics.median(ratios)


def start_nginx(nginx: str, folder: Path, target: str) -> Proxy:
    """Starts nginx as a gRPC proxy in front of a server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = folder / "nginx.conf"
    file.write_text(NGINX.format(folder=folder, target=target, port=port))
    # It prints nothing once it listens, so a shell does.
    script = f"""{nginx} -p {folder} -c {file} & child=$!; trap 'kill $child; wait' TERM
    until (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null; do kill -0 $child || exit 1; sleep 0.05; done
    echo 'nginx on 127.0.0.1:{port}'; wait"""
    return Proxy(["bash", "-c", script], "nginx on ")


def add(result: report.Report, workload: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """Adds the rows of one load on all targets."""
    for impl, runs in found.items():
        result.add_samples(impl, workload, "rate", [run["qps"] for run in runs], "1/s")
        for quantile in ("p50", "p99"):
            result.add_samples(impl, workload, quantile, [run[quantile] for run in runs], "ms")
            if impl != "direct":
                added = [
                    through[quantile] - direct[quantile] for through, direct in zip(runs, found["direct"], strict=True)
                ]
                result.add_samples(impl, workload, f"added {quantile}", added, "ms")
        if impl != "direct":
            result.add_samples(impl, workload, "cpu proxy", [run["proxy_us"] for run in runs], "us")


def load(
    target: servers.Server, backend: servers.Server, requests: Path, seconds: float, *flags: str
) -> dict[str, Any]:
    """Runs one load on a target.

    Returns:
        The rate per second, latencies in ms, and the CPU time of proxy, server and generator in us for one request.
    """
    times = (f"--seconds={seconds}", "--warmup_seconds=0.2")
    before = target.cpu_seconds(), backend.cpu_seconds()
    (found,) = servers.load(target, requests, *times, *flags)
    proxy, server = target.cpu_seconds() - before[0], backend.cpu_seconds() - before[1]
    if found["failed"] or found["unsent"]:
        raise RuntimeError(f"{found['failed']} requests failed, {found['unsent']} were not sent: {found['errors']}")
    # The CPU times include the requests of the warm-up, which has the same rate as the load.
    count = found["qps"] * (seconds + 0.2)
    return {
        "qps": found["qps"],
        "p50": found["latency_us"]["p50"] / 1e3,
        "p99": found["latency_us"]["p99"] / 1e3,
        "proxy_us": proxy / count * 1e6,
        "server_us": server / count * 1e6,
        "client_us": found["client_cpu_us"],
    }


def transport_us(calls: Callable[[int], object], count: int) -> float:
    """Returns the CPU time of one call in us, the median of five runs of `count` calls."""
    calls(count // 10)
    times = []
    for _ in range(5):
        begin = time.process_time()
        calls(count)
        times.append((time.process_time() - begin) / count * 1e6)
    return statistics.median(times)


def merge_us(shards: int, k: int) -> float:
    """Returns the CPU time to merge the answers of shards with k items each, in us."""
    import numpy as np

    from dpsr_common import serving_apis
    from dpsr_serving.proxy.shards import merge_answers
    from dpsr_serving.tensors import make_tensor

    random = np.random.default_rng(1)
    answers = []
    for shard in range(shards):
        answer = serving_apis.PredictResponse()
        answer.outputs["item_ids"].CopyFrom(make_tensor(np.arange(k, dtype=np.int64)[np.newaxis] * shards + shard))
        scores = np.sort(random.random((1, k), np.float32))[:, ::-1]
        answer.outputs["scores"].CopyFrom(make_tensor(np.ascontiguousarray(scores)))
        answers.append(answer.SerializeToString())
    return transport_us(lambda count: [merge_answers(answers) for _ in range(count)], 200)


def wire_calls(count: int) -> None:
    """Makes calls between two sessions of the wire."""
    from dpsr_serving import _native

    limits = _native.Limits(
        streams=128,
        header_bytes=8192,
        message_bytes=2**25,
        connection_bytes=2**25,
        headers_s=10,
        body_s=60,
        answer_s=60,
    )
    server = _native.server_session(limits, _native.Host([PREDICT], [], 2**30), 0.0)
    client = _native.client_session(limits, 0.0)
    body = bytes(ANSWER_BYTES)
    for _ in range(count):
        client.call(PREDICT, "x", False, 1.0, (), b"a" * 100)
        up = client.send(2**16)
        for event in server.receive(up, len(up), 0.0) or ():
            if event[0] == 0:
                server.answer(event[1], 0, "", (), body, ())
        down = server.send(2**16)
        client.receive(down, len(down), 0.0)


def h2_calls(count: int) -> None:
    """Makes the same calls between two connections of the library h2."""
    import h2.config
    import h2.connection
    import h2.events

    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
    client.initiate_connection()
    server.initiate_connection()
    ask = [(":method", "POST"), (":scheme", "http"), (":path", PREDICT), (":authority", "x"), ("te", "trailers")]
    ask += [("content-type", "application/grpc"), ("grpc-timeout", "1S")]
    head, tail = [(":status", "200"), ("content-type", "application/grpc")], [("grpc-status", "0")]
    body = bytes(5 + ANSWER_BYTES)
    for _ in range(count):
        stream = client.get_next_available_stream_id()
        client.send_headers(stream, ask)
        client.send_data(stream, b"a" * 105, end_stream=True)
        for event in server.receive_data(client.data_to_send()):
            if isinstance(event, h2.events.DataReceived):
                server.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                server.send_headers(event.stream_id, head)
                server.send_data(event.stream_id, body)
                server.send_headers(event.stream_id, tail, end_stream=True)
        for event in client.receive_data(server.data_to_send()):
            if isinstance(event, h2.events.DataReceived):
                client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        server.receive_data(client.data_to_send())


async def pass_through(target: str) -> None:
    """Runs the smallest possible proxy of grpc.aio: it forwards bytes, deadline and metadata, and returns bytes."""
    channel = grpc.aio.insecure_channel(target)
    method = channel.unary_unary(PREDICT)

    async def forward(request: bytes, context: Any) -> bytes:
        answer: bytes = await method(request, timeout=context.time_remaining(), metadata=context.invocation_metadata())
        return answer

    handler = grpc.unary_unary_rpc_method_handler(forward)

    class Methods(grpc.GenericRpcHandler):
        def service(self, details: object) -> object:
            return handler

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Methods(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"{BARE}127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    main()
