"""Compares the model server under load with a gRPC server in Python, on the same SavedModels in the same run.

    python benchmarks/model_server.py --json [--servable=DIR] [--quick] [--tensorflow_model_server=PATH]

Models: `12kb` looks up 1000 ids and scores for each query, an answer of 12 KB, so that the server's own cost stands
out. `fused` is a servable of `dpsr export` (tokenizer, query tower and index in one graph): the one of --servable, or a
small one that the benchmark makes.

Servers: `dpsr`, ours; `dpsr_glibc`, the same with glibc's allocator in the place of jemalloc; `python`. With
--tensorflow_model_server (default: $TENSORFLOW_MODEL_SERVER), TensorFlow Serving's own server takes its turns as well,
as it was built (`tensorflow_serving`) and with jemalloc (`tensorflow_serving_jemalloc`). It must have our ops
(docs/tensorflow_serving.md). Its bars are those of `fused`, and compare with the server as it was built.

Loads: closed loops of 1, 8 and 32 requests, and open loops at half the rate that the closed loop of 32 reached.
Latencies of an open loop count from when a request was due. All servers run all the time and take turns under load; the
bars for rates are medians of the ratios of neighbouring turns.

`cpu` is the CPU time of the server's process for one request. `session_run` is the CPU time of the graph alone, for the
same requests in one thread and without a server. Load generator and server share the machine's cores, so only the ratio
of two rates carries over to other machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
import servers
from absl import app, flags

from dpsr_common import command_line

CONCURRENCIES = (1, 8, 32)
GLIBC = "dpsr_glibc"
IMPLS = ["dpsr", GLIBC, "python"]
PEER = "tensorflow_serving"
PEER_JEMALLOC = "tensorflow_serving_jemalloc"


class Model(NamedTuple):
    """A model to serve: the folder of a version, the libraries of its ops, and a file of requests."""

    version: Path
    op_libraries: Sequence[str]
    requests: Path


@contextlib.contextmanager
def serving(impl: str, model: Model) -> Iterator[servers.Server]:
    if impl == "python":
        with servers.python_server(model.version, model.op_libraries) as server:
            yield server
        return
    if impl in (PEER, PEER_JEMALLOC):
        preload = {"LD_PRELOAD": "libjemalloc.so.2"} if impl == PEER_JEMALLOC else {}
        with servers.tensorflow_server(flags.FLAGS.tensorflow_model_server, model.version.parent, preload) as server:
            yield server
        return
    libraries = [f"--op_library={','.join(model.op_libraries)}"] if model.op_libraries else []
    # The loader then finds malloc and operator new in these libraries, before jemalloc's.
    preload = {"LD_PRELOAD": "libc.so.6 libstdc++.so.6"} if impl == GLIBC else {}
    with servers.model_server(model.version.parent, *libraries, environment=preload) as server:
        yield server


def session_run_us(model: Model, seconds: float) -> float:
    """Returns the CPU time of the graph alone, in microseconds for one request."""
    (found,) = session_runs_us(model, [model.requests], seconds)
    return found


def session_runs_us(model: Model, files: Sequence[Path], seconds: float) -> list[float]:
    """Returns session_run_us() for each of several files of requests, measured one after the other."""
    requests = ",".join(map(str, files))
    command = [servers.BIN / "dpsr_session_run", model.version, requests, str(seconds), *model.op_libraries]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the graph did not run: {done.stderr}")
    return [float(json.loads(line)["cpu_us"]) for line in done.stdout.splitlines()]


def make_fused(folder: Path) -> Path:
    """Makes a small servable from a generated shop, by the commands that a user would run, in this process."""
    small = ["train.steps=30", "train.batch_size=64"]
    commands = [
        ["generate", f"--out={folder / 'shop'}", "--items=5000", "--users=50", "--interactions=10000"],
        ["ingest", f"--schema={folder / 'shop' / 'schema.yaml'}", f"--out={folder / 'store'}"],
        ["train", f"--store={folder / 'store'}", f"--out={folder / 'model'}", *(f"--set={text}" for text in small)],
        ["index", f"--model={folder / 'model'}", f"--store={folder / 'store'}", f"--out={folder / 'index'}"],
        ["export", f"--model={folder / 'model'}", f"--index={folder / 'index'}", f"--out={folder / 'servable'}"],
    ]
    for command in commands:
        with contextlib.redirect_stdout(sys.stderr):
            if command_line.main(command) != 0:
                raise RuntimeError(f"dpsr {' '.join(command)} failed")
    return folder / "servable"


def models(folder: Path, servable: str | None) -> dict[str, Model]:
    """Returns the models of the benchmark, and makes those that are not given."""
    import dpsr_export
    import dpsr_tokenizer

    requests = folder / "requests"
    servers.write_requests(requests, servers.queries())
    servers.write_model(folder / "12kb" / "1")
    base_path = Path(servable).absolute() if servable else make_fused(folder / "fused")
    versions = [child for child in base_path.iterdir() if child.name.isdecimal()] if base_path.is_dir() else []
    if not versions:
        raise app.UsageError(f"--servable={servable}: expected a directory whose numbered children are versions")
    libraries = (str(dpsr_tokenizer.op_library_path()), str(dpsr_export.op_library_path()))
    newest = max(versions, key=lambda version: int(version.name))
    return {"12kb": Model(folder / "12kb" / "1", (), requests), "fused": Model(newest, libraries, requests)}


def add_loads(result: report.Report, impl: str, workload: str, loads: list[dict[str, Any]], **more: Any) -> None:
    """Adds the rows of one load, which was measured several times."""
    failed = sum(load["failed"] + load["unsent"] for load in loads)
    name = f"{loads[0]['loop']}_{more.get('concurrency', 'half')}"
    result.add_samples(impl, workload, f"{name}_qps", [load["qps"] for load in loads], "1/s", **more)
    for quantile in ("p50", "p99", "p99.9"):
        samples = [load["latency_us"][quantile] / 1e3 for load in loads]
        result.add_samples(impl, workload, f"{name}_{quantile}", samples, "ms", **more)
    result.add_samples(impl, workload, f"{name}_cpu", [load["server_cpu_us"] for load in loads], "us/request", **more)
    result.add_samples(impl, workload, f"{name}_rss", [load["server_rss_mib"] for load in loads], "MiB", **more)
    result.add(impl, workload, f"{name}_failed", failed, "requests", **more)


def measure(result: report.Report, workload: str, model: Model, repeat: int, seconds: float) -> None:
    times = [f"--seconds={seconds}", f"--warmup_seconds={seconds / 4}"]
    loads: dict[tuple[str, int], list[dict[str, Any]]] = {}
    starts: dict[str, list[float]] = {impl: [] for impl in IMPLS}
    session = []
    rate: dict[str, float] = {}
    for turn in range(repeat):
        session.append(session_run_us(model, seconds))
        with contextlib.ExitStack() as stack:
            running = {impl: stack.enter_context(serving(impl, model)) for impl in IMPLS}
            for concurrency in (*CONCURRENCIES, 0):  # 0: the open loop
                # The servers take turns, so that a change of the machine's speed affects both. Idle, they cost nothing.
                for impl in IMPLS if turn % 2 == 0 else IMPLS[::-1]:
                    load = f"--concurrency={concurrency}" if concurrency else f"--rate={rate[impl]:.0f}"
                    (found,) = servers.load(running[impl], model.requests, load, *times)
                    loads.setdefault((impl, concurrency), []).append(found)
                    rate.setdefault(impl, 1.0)
                    if concurrency == CONCURRENCIES[-1] and turn == 0:
                        rate[impl] = max(1.0, found["qps"] / 2)
            for impl in IMPLS:
                starts[impl].append(running[impl].start_seconds)
    result.add_samples("session_run", workload, "cpu", session, "us/request")
    for impl in IMPLS:
        result.add_samples(impl, workload, "start", starts[impl], "s")
        for concurrency in (*CONCURRENCIES, 0):
            more = {"concurrency": concurrency} if concurrency else {"rate": rate[impl]}
            add_loads(result, impl, workload, loads[impl, concurrency], **more)
        result.add(impl, workload, "answer", loads[impl, 1][0]["response_bytes"], "bytes")
    for concurrency in CONCURRENCIES:
        for peer in IMPLS[1:]:
            pairs = list(zip(loads["dpsr", concurrency], loads[peer, concurrency], strict=True))
            if any(theirs["qps"] == 0 for _, theirs in pairs):
                raise SystemExit(f"{workload}: {peer} completed no request; run again with less other load")
            ratios = [ours["qps"] / theirs["qps"] for ours, theirs in pairs]
            result.add_samples(f"dpsr_over_{peer}", workload, f"closed_{concurrency}_qps", ratios, "ratio")


def bars(result: report.Report) -> dict[str, float]:
    """Returns the bars, each for the model with the worse result. CPU times are those at 8 concurrent requests."""
    workloads = list(dict.fromkeys(row["workload"] for row in result.rows))

    def cpu(impl: str) -> list[float]:
        metric = "cpu" if impl == "session_run" else "closed_8_cpu"
        return [result.value(impl, workload, metric) for workload in workloads]

    def qps_ratio(concurrency: int) -> float:
        return min(result.value("dpsr_over_python", each, f"closed_{concurrency}_qps") for each in workloads)

    found = {}
    if PEER in IMPLS:
        ours, theirs = (result.value(impl, "fused", "closed_8_cpu") for impl in ("dpsr", PEER))
        found = {
            "qps_ratio_to_tensorflow_serving_c8": result.value(f"dpsr_over_{PEER}", "fused", "closed_8_qps"),
            "cpu_ratio_to_tensorflow_serving": ours / theirs,
        }
    return found | {
        "qps_ratio_to_python_c8": qps_ratio(8),
        "qps_ratio_to_python_c32": qps_ratio(32),
        "core_us_ratio_to_python": max(ours / theirs for ours, theirs in zip(cpu("dpsr"), cpu("python"), strict=True)),
        "core_us_over_session_run": max(
            ours - graph for ours, graph in zip(cpu("dpsr"), cpu("session_run"), strict=True)
        ),
    }


def _define_flags() -> None:
    flags.DEFINE_boolean("json", False, "print one JSON object as the last line")
    flags.DEFINE_string(
        "servable", None, "base path of a servable of `dpsr export`; the default is to make a small one"
    )
    flags.DEFINE_string(
        "tensorflow_model_server",
        os.environ.get("TENSORFLOW_MODEL_SERVER"),
        "path of TensorFlow Serving's server, to measure it as well",
    )
    flags.DEFINE_integer("repeat", 3, "number of measurements of each server", lower_bound=1)
    flags.DEFINE_float("seconds", 5, "seconds of each load", lower_bound=0.1)
    flags.DEFINE_boolean("quick", False, "make one short measurement, to check that the benchmark works")


def main(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    if arguments[1:]:
        raise app.UsageError(f"unexpected argument '{arguments[1]}'")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    repeat, seconds = (1, 0.4) if values.quick else (values.repeat, values.seconds)
    if values.tensorflow_model_server:
        IMPLS.extend([PEER, PEER_JEMALLOC])
    result = report.Report("model_server", 1, servers.hardware())
    with tempfile.TemporaryDirectory() as folder:
        for workload, model in models(Path(folder), values.servable).items():
            measure(result, workload, model, repeat, seconds)
    result.bars = bars(result)
    result.print(values.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
