"""Predicts how training scales with workers and parameter servers, from costs that it measures on this machine.

    python benchmarks/cluster_scale.py --json [--out=DIR] [--full]

No cluster of many machines is at hand, so this is a model, fed by measured costs and checked where it can be:

1. `dpsr launch` trains the generated shop with 1, 2 and 4 workers and one parameter server, all on this machine. The
   run with 1 worker gives the CPU time of a step in worker and parameter server, and the bytes between them. The model
   predicts the steps a second of the other two runs, whose processes share this machine's cores.
2. The same costs for the paper's workload (benchmarks/ps_traffic.py: batch 64, 20 and 30 tokens, 64 dimensions, towers
   256-128-64) give the steps a second of the paper's cluster: five machines with 48 cores and 10 Gbit/s each, 5
   parameter servers, and up to 160 workers. Once with embeddings summed in the parameter server (section 5.1.3 of the
   DPSR paper), once with TensorFlow's stock lookups. The paper trains 400 million steps with 40 workers in 55 hours.

The model is a closed queueing network: each worker computes a step on one core of its own, then its step needs CPU time
of the parameter servers, which share it equally, and time on their network links in both directions. Workers wait for
one another where these are busy. The rate is that of mean value analysis (Reiser and Lavenberg, JACM 1980, section 3),
which is exact for such networks. It knows nothing of stragglers, lost machines and other traffic, so it is an upper
bound.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow loads

import report
from absl import app, flags
from ps_traffic import TOKENS, Workload, bytes_between, counts_of, cpu_of, running_cluster

from dpsr_common.command_line import main as dpsr

# The paper's cluster (sections 5.1.3 and 6): machines, their network links, and what one parameter server may use.
MACHINES, CORES, LINK_BYTES = 5, 48, 10e9 / 8
WORKERS = (1, 5, 10, 20, 40, 80, 160)
PAPER_STEPS, PAPER_HOURS, PAPER_WORKERS = 400e6, 55.0, 40
_LOCAL_WORKERS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one training step costs.

    Attributes:
        worker: seconds of CPU time of the worker.
        ps: seconds of CPU time of all parameter servers together.
        up, down: bytes from worker to parameter servers, and back.
    """

    worker: float
    ps: float
    up: float
    down: float


@dataclasses.dataclass(frozen=True)
class Station:
    """A place where steps queue: seconds that a step needs of it, and how many it serves at a time."""

    demand: float
    servers: int = 1


def rate(workers: int, thinking: float, stations: Sequence[Station]) -> float:
    """Returns the steps a second of so many workers, by exact mean value analysis.

    Args:
        workers: number of workers, each of which has one step under way at any time.
        thinking: seconds of a step in which the worker needs no station.
        stations: the stations that each step visits once.
    """
    found = 0.0
    # For each station, the probability that it holds 0, 1, ... steps.
    held = [[1.0] for _ in stations]
    for population in range(1, workers + 1):
        waits = [
            station.demand * sum((j + 1) / min(j + 1, station.servers) * share for j, share in enumerate(held[number]))
            for number, station in enumerate(stations)
        ]
        found = population / (thinking + sum(waits))
        for number, station in enumerate(stations):
            shares = [
                found * station.demand / min(j + 1, station.servers) * share for j, share in enumerate(held[number])
            ]
            held[number] = [max(0.0, 1 - sum(shares)), *shares]
    return found


def of_cluster(costs: Costs, workers: int, servers: int = MACHINES) -> float:
    """Returns the steps a second in the paper's cluster, with one parameter server on each of `servers` machines.

    A worker has one core. The parameter server of a machine has the cores that the machine's workers leave.
    """
    cores = max(1, CORES - -(-workers // servers))
    each = [
        Station(costs.ps / servers, cores),
        Station(costs.up / servers / LINK_BYTES),
        Station(costs.down / servers / LINK_BYTES),
    ]
    return rate(workers, costs.worker, each * servers)


def on_one_machine(costs: Costs, seconds: float, workers: int, cores: int) -> float:
    """Returns the steps a second of workers that share the cores of one machine with the parameter server.

    `seconds`: those of a step with one worker. What it needs beyond its CPU time is waiting that workers do not share.
    """
    busy = costs.worker + costs.ps
    return rate(workers, max(0.0, seconds - busy), [Station(busy, cores)])


class Training:
    """A running `dpsr launch`, watched from one checkpoint to another."""

    def __init__(self, store: Path, model: Path, workers: int, steps: int) -> None:
        self._model, self._steps = model, steps
        options = [f"train.steps={steps}", f"train.checkpoint_steps={steps // 4}", "train.average_decay=0"]
        command = [sys.executable, "-m", "dpsr_common", "launch", "--ps=1", f"--workers={workers}"]
        command += [f"--store={store}", f"--out={model}", *(f"--set={option}" for option in options)]
        self._lines: list[str] = []
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self._lines += self._process.stdout

    def measure(self) -> tuple[float, Costs]:
        """Returns the seconds and the costs of a step, between the first checkpoint after a quarter and the last one.

        Raises:
            SystemExit: the training failed.
        """
        try:
            first, start, before = self._wait(self._steps // 4)
            last, end, after = self._wait(3 * self._steps // 4)
            if self._process.wait():
                raise SystemExit("".join(self._lines))
        finally:
            self._process.kill()
            self._process.wait()
        steps = last - first
        worker, ps, up, down = ((b - a) / steps for a, b in zip(before, after, strict=True))
        return (end - start) / steps, Costs(worker, ps, up, down)

    def _wait(self, step: int) -> tuple[int, float, tuple[float, float, float, float]]:
        """Waits for a checkpoint of this step or a later one. Returns its step, the time, and the usage."""
        while True:
            steps = [int(re.sub(r"\D", "", path.suffixes[0])) for path in self._model.glob("model.ckpt-*.index")]
            if found := [number for number in steps if number >= step]:
                return max(found), time.perf_counter(), self._usage()
            if self._process.poll() is not None:
                raise SystemExit("".join(self._lines))
            time.sleep(0.01)

    def _usage(self) -> tuple[float, float, float, float]:
        """Returns the CPU seconds of workers and parameter server, and the bytes up and down, so far."""
        cpu = {"worker": 0.0, "ps": 0.0}
        ports: dict[str, set[int]] = {"worker": set(), "ps": set()}
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in children:
            environment = dict(
                entry.partition("=")[::2] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")
            )
            config = json.loads(environment.get("TF_CONFIG", "{}"))
            if not config:
                continue
            kind = "ps" if config["task"]["type"] == "ps" else "worker"
            cpu[kind] += cpu_of(int(pid))
            for job, addresses in config["cluster"].items():
                ports["ps" if job == "ps" else "worker"] |= {int(a.rpartition(":")[2]) for a in addresses}
        up, down = bytes_between(ports["worker"], ports["ps"])
        return cpu["worker"], cpu["ps"], up, down


def check(result: report.Report, out: Path, steps: int) -> None:
    """Adds the measured and the predicted rates of 1, 2 and 4 workers on this machine, and the bars of their ratio."""
    store = out / "store"
    if not (store / "manifest.json").exists():
        sizes = ["--items=20000", "--users=2000", "--interactions=200000", f"--seed={result.seed}"]
        for arguments in (
            ["generate", f"--out={out / 'shop'}", *sizes],
            ["ingest", f"--schema={out / 'shop' / 'schema.yaml'}", f"--out={store}"],
        ):
            if dpsr(arguments):
                raise SystemExit(f"dpsr {arguments[0]} failed")
    costs, seconds = Costs(0, 0, 0, 0), 0.0
    for workers in _LOCAL_WORKERS:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            here, used = Training(store, Path(folder) / "model", workers, steps * min(workers, 2)).measure()
        workload = f"{workers} local workers"
        if workers == 1:
            costs, seconds = used, here
            for name in ("worker", "ps"):
                result.add("measured", workload, f"{name}_cpu", getattr(costs, name) * 1e6, "us/step")
            for name in ("up", "down"):
                result.add("measured", workload, f"{name}_bytes", getattr(costs, name), "bytes/step")
        predicted = on_one_machine(costs, seconds, workers, int(result.hardware["cores"]))
        result.add("measured", workload, "rate", 1 / here, "steps/s")
        result.add("model", workload, "rate", predicted, "steps/s")
        if workers > 1:
            result.bars[f"predicted_over_measured_{workers}_workers"] = predicted * here


def paper(result: report.Report, quick: bool) -> None:
    """Adds the predicted rates of the paper's cluster."""
    workload = Workload("zipf", 64, TOKENS)
    for impl in ("stock", "shared", "half"):
        with running_cluster() as cluster:
            used, _ = cluster.measure(impl, workload, result.seed, counts_of(workload, quick))
        costs = Costs(used.worker_cpu, used.ps_cpu, used.up, used.down)
        for name, value in (("worker_cpu", costs.worker), ("ps_cpu", costs.ps)):
            result.add(impl, "batch 64", name, value * 1e6, "us/step")
        result.add(impl, "batch 64", "bytes", costs.up + costs.down, "bytes/step")
        for workers in WORKERS:
            steps = of_cluster(costs, workers)
            note = f"{PAPER_STEPS / steps / 3600:,.1f} hours for 400 million steps"
            result.add(impl, f"{workers} workers, 5 ps", "rate", steps, "steps/s", note=note)
    at = f"{PAPER_WORKERS} workers, 5 ps"
    here = result.value("shared", at, "rate")
    result.add("paper", at, "rate", PAPER_STEPS / PAPER_HOURS / 3600, "steps/s", note="400 million steps in 55 hours")
    result.bars["hours_400m_steps_40_workers"] = PAPER_STEPS / here / 3600
    result.bars["rate_ratio_to_stock_40_workers"] = here / result.value("stock", at, "rate")
    most = f"{max(WORKERS)} workers, 5 ps"
    result.bars["rate_ratio_to_stock_160_workers"] = result.value("shared", most, "rate") / result.value(
        "stock", most, "rate"
    )


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS
    if arguments[1:]:
        raise app.UsageError(f"unexpected argument '{arguments[1]}'")
    result = report.Report("cluster_scale", values.seed, report.hardware("tensorflow", "numpy"))
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(values.out or temporary)
        out.mkdir(parents=True, exist_ok=True)
        check(result, out, 400 if values.quick else 30_000 if values.full else 6_000)
    paper(result, not values.full)
    result.print(values.json)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder that keeps the store")
    flags.DEFINE_integer("seed", 1, "seed of the shop, the batches and the weights")
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object on the last line")
    flags.DEFINE_boolean("full", False, "trains five times as long, and measures ten times as many steps")
    flags.DEFINE_boolean("quick", False, "only tests the script")
    app.run(main)
