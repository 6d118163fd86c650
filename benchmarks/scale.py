"""How far training and its data scale: the paper's size, computed from costs that are measured on this machine.

    python benchmarks/scale.py --json [--out=DIR] [--parts=steps,cluster] [--full]

No cluster of many machines is at hand, and no log of 5.6 billion sessions. So this is arithmetic and a model, fed by
measured costs and checked where they can be.

steps     The commands run on generated shops. CPU time and bytes for each clicked pair, item and user come from the
          difference between a smaller and a larger run, so that start-up does not count. They are multiplied by the
          paper's sizes: 5.6 billion sessions (DPSR, section 6), 120 million items (DSR, table 2), and 400 million
          users, which is our assumption. A session counts as one clicked pair, with the items shown beside it.
cluster   How the rate grows with workers and parameter servers:
          1. `dpsr launch` trains a shop with 1, 2 and 4 workers and one parameter server, all on this machine. The run
             with 1 worker gives the CPU time of a step in worker and parameter server. The model predicts the steps a
             second of the other two runs, whose processes share this machine's cores.
          2. The same costs for the paper's workload (benchmarks/ps_traffic.py: batch 64, 20 and 30 tokens, 64
             dimensions, towers 256-128-64) give the rate of the paper's cluster: five machines with 48 cores and 10
             Gbit/s each, 5 parameter servers, and up to 160 workers. Once with embeddings summed in the parameter
             server (section 5.1.3), once with TensorFlow's stock lookups, and once with the rows of each table
             spread over the parameter servers (cluster.placement: rows). The paper trains 400 million steps with 40
             workers in 55 hours.

The model of the cluster is a closed queueing network: each worker computes a step on one core of its own, then its step
needs CPU time of the parameter servers, which share it equally, and time on their network links in both directions.
Workers wait for one another where these are busy. The rate is that of Buzen's convolution algorithm (CACM 1973), which
is exact for such networks. It knows nothing of stragglers, lost machines and other traffic, so it is an upper bound.
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

import numpy as np
import report
from absl import app, flags
from ps_traffic import DIM, NUM_IDS, TOKENS, Workload, bytes_between, counts_of, cpu_of, draw_tokens, running_cluster

from dpsr_tf.models.embedding import spread_rows

# The paper's cluster (sections 5.1.3 and 6): machines, their network links, and what one parameter server may use.
MACHINES, CORES, LINK_BYTES = 5, 48, 10e9 / 8
WORKERS = (1, 5, 10, 20, 40, 80, 160)
PAPER_STEPS, PAPER_HOURS, PAPER_WORKERS = 400e6, 55.0, 40
# Sizes of the papers. The number of users is ours.
PAIRS, ITEMS, USERS = 5.6e9, 120e6, 400e6
PARTS = ("steps", "cluster")
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
    """A resource that steps queue for, such as the cores of a parameter server or a network link.

    Attributes:
        demand: seconds of the resource that one step needs.
        servers: number of steps that it serves at the same time.
    """

    demand: float
    servers: int = 1


def rate(workers: int, thinking: float, stations: Sequence[Station]) -> float:
    """Returns the steps a second of so many workers, by the convolution algorithm (Buzen, CACM 1973).

    Args:
        workers: number of workers, each of which has one step under way at any time.
        thinking: seconds of a step in which the worker needs no station.
        stations: what each step uses once.
    """
    places = np.arange(1, workers + 1)
    with np.errstate(divide="ignore"):  # of what costs nothing
        # For each place, the logarithm of the weight of 0, 1, ... steps there. Thinking has room for all.
        weights = [np.log(np.float64(station.demand) / np.minimum(places, station.servers)) for station in stations]
        weights.append(np.log(np.float64(thinking) / places))
    total = np.concatenate([[0.0], np.full(workers, -np.inf)])
    for weight in weights:
        own = np.concatenate([[0.0], np.cumsum(weight)])
        # All terms are positive, so nothing is lost by cancellation.
        total = np.array([np.logaddexp.reduce(total[: n + 1] + own[n::-1]) for n in range(workers + 1)])
    return float(np.exp(total[workers - 1] - total[workers]))


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


def shop(out: Path, items: int, users: int, clicks: int, seed: int) -> tuple[Path, float]:
    """Returns the store of a generated shop, and the CPU seconds of its ingestion; it is made if it is not there."""
    folder = out / f"shop-{items}-{users}-{clicks}-{seed}"
    store, cost = folder / "store", folder / "ingest.json"
    if not cost.exists():
        sizes = [f"--items={items}", f"--users={users}", f"--interactions={clicks}", f"--seed={seed}"]
        cpu_of_command("generate", f"--out={folder / 'shop'}", *sizes)
        arguments = [f"--schema={folder / 'shop' / 'schema.yaml'}", f"--out={store}", "--overwrite"]
        cost.write_text(json.dumps(cpu_of_command("ingest", *arguments)))
    return store, float(json.loads(cost.read_text()))


def cpu_of_command(*arguments: str) -> float:
    """Runs `dpsr ARGUMENTS...` and returns its CPU seconds. Raises SystemExit with its output if it fails."""
    before = report.cpu_seconds()
    run = subprocess.run([sys.executable, "-m", "dpsr_common", *arguments], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"dpsr {' '.join(arguments)}\n{run.stdout}{run.stderr}")
    return report.cpu_seconds() - before


def steps(result: report.Report, out: Path, quick: bool) -> None:
    """Adds what each step costs for a pair, an item or a user, and what that makes at the paper's size."""
    items, users, clicks, train_steps = (2_000, 300, 10_000, 100) if quick else (20_000, 2_000, 200_000, 20_000)
    small, small_cpu = shop(out, items, users, clicks, result.seed)
    long_log, long_cpu = shop(out, items, users, 4 * clicks, result.seed)
    wide, wide_cpu = shop(out, 4 * items, 4 * users, clicks, result.seed)
    counts = {store: json.loads((store / "manifest.json").read_text())["counts"] for store in (small, long_log, wide)}
    more_pairs = counts[long_log]["positives"] - counts[small]["positives"]
    pair_cpu = (long_cpu - small_cpu) / more_pairs
    pairs = counts[wide]["positives"] - counts[small]["positives"]
    rows = sum(counts[wide][name] - counts[small][name] for name in ("items", "users"))
    row_cpu = max(0.0, wide_cpu - small_cpu - pairs * pair_cpu) / rows

    def bytes_of(store: Path, pattern: str) -> int:
        return sum(path.stat().st_size for path in store.glob(pattern))

    # The history of a user is in the file of users, and grows with the log.
    history_bytes = (bytes_of(long_log, "users*.dpsr") - bytes_of(small, "users*.dpsr")) / more_pairs
    pair_bytes = bytes_of(long_log, "interactions*.dpsr") / counts[long_log]["positives"] + history_bytes
    user_bytes = (bytes_of(wide, "users*.dpsr") - counts[wide]["positives"] * history_bytes) / counts[wide]["users"]

    def trained(store: Path, count: int) -> tuple[Path, float]:
        options = [f"train.steps={count}", f"train.checkpoint_steps={count}", "train.batch_size=64"]
        return cached("train", store, f"model-{count}", *(f"--set={option}" for option in options))

    def cached(command: str, store: Path, name: str, *more: str) -> tuple[Path, float]:
        folder = store.parent / name
        cost = folder.with_suffix(".json")
        if not cost.exists():
            arguments = (f"--store={store}", f"--out={folder}", "--overwrite", *more)
            cost.write_text(json.dumps(cpu_of_command(command, *arguments)))
        return folder, float(json.loads(cost.read_text()))

    few, many = train_steps // 20, train_steps
    example_cpu = (trained(small, many)[1] - trained(small, few)[1]) / (many - few) / 64
    indexed = []
    for store in (small, wide):
        model = trained(store, few)[0]
        indexed.append(cached("index", store, "index", f"--model={model}", "--set=index.factory=Flat")[1])
    embed_cpu = (indexed[1] - indexed[0]) / (counts[wide]["items"] - counts[small]["items"])

    for step, unit, cpu, size, number in (
        ("ingest", "pair", pair_cpu, pair_bytes, PAIRS),
        ("ingest", "item", row_cpu, bytes_of(wide, "items*.dpsr") / counts[wide]["items"], ITEMS),
        ("ingest", "user", row_cpu, user_bytes, USERS),
        ("train, once over the log", "pair", example_cpu, 0.0, PAIRS),
        ("train, 400 million steps of 64", "pair", example_cpu, 0.0, PAPER_STEPS * 64),
        ("embed, and a flat index", "item", embed_cpu, bytes_of(small.parent / "index", "items.faiss") / items, ITEMS),
    ):
        result.add(step, unit, "cpu", cpu * 1e6, f"us/{unit}")
        result.add(step, f"{number:.3g} {unit}s", "core_hours", number * cpu / 3600, "h")
        if size:
            result.add(step, unit, "bytes", size, f"bytes/{unit}")
            result.add(step, f"{number:.3g} {unit}s", "size", number * size / 1e9, "GB")
    result.bars["core_hours_5600m_pairs"] = PAIRS * example_cpu / 3600
    sizes = [row["value"] for row in result.rows if row["impl"] == "ingest" and row["metric"] == "size"]
    result.bars["store_gb_5600m_pairs"] = sum(sizes)


def check(result: report.Report, out: Path, steps: int, worker_counts: Sequence[int] = _LOCAL_WORKERS) -> None:
    """Adds the measured and the predicted rates of so many workers on this machine, and the bars of their ratio."""
    store = shop(out, 20_000, 2_000, 200_000, result.seed)[0]
    costs, seconds = Costs(0, 0, 0, 0), 0.0
    for workers in worker_counts:
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
    for impl in ("stock", "shared", "half", "rows"):
        with running_cluster() as cluster:
            used, _ = cluster.measure(impl, workload, result.seed, counts_of(workload, quick))
        costs = Costs(used.worker_cpu, used.ps_cpu, used.up, used.down)
        if impl == "rows":
            # Measured with 2 parameter servers. Each of the others sends and gets a vector for each text too.
            more = (MACHINES - 2) * sum(workload.texts) * DIM * 4
            costs = dataclasses.replace(costs, up=costs.up + more, down=costs.down + more)
        for name, value in (("worker_cpu", costs.worker), ("ps_cpu", costs.ps)):
            result.add(impl, "batch 64", name, value * 1e6, "us/step")
        result.add(impl, "batch 64", "bytes", costs.up + costs.down, "bytes/step")
        for workers in WORKERS:
            steps = of_cluster(costs, workers)
            result.add(impl, f"{workers} workers, 5 ps", "rate", steps, "steps/s")
            result.add(impl, f"{workers} workers, 5 ps", "hours_400m_steps", PAPER_STEPS / steps / 3600, "h")
    ids = draw_tokens(np.random.default_rng(result.seed), "zipf", 1_000_000)
    counts = np.bincount(ids, minlength=NUM_IDS) / len(ids)
    for servers in (2, MACHINES):
        ranges = spread_rows(NUM_IDS, servers)
        shares = [sum(counts[a:b].sum() for a, b in ranges.of_shard(shard)) for shard in range(servers)]
        busiest = {"consecutive pieces": counts[: NUM_IDS // servers].sum(), "cluster.placement: rows": max(shares)}
        for impl, share in busiest.items():
            result.add(impl, f"{servers} ps", "look_ups_at_the_busiest", float(share), "")
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
    result = report.Report("scale", values.seed, report.hardware("tensorflow", "numpy"))
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(values.out or temporary)
        out.mkdir(parents=True, exist_ok=True)
        if "steps" in values.parts:
            steps(result, out, values.quick)
        if "cluster" in values.parts:
            if values.quick:
                check(result, out, 400, worker_counts=(1, 2))
            else:
                check(result, out, 30_000 if values.full else 6_000)
            paper(result, not values.full)
    result.print(values.json)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder that keeps shops, stores and models")
    flags.DEFINE_multi_enum("parts", list(PARTS), PARTS, "what is measured; give the flag once for each part")
    flags.DEFINE_integer("seed", 1, "seed of the shop, the batches and the weights")
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object on the last line")
    flags.DEFINE_boolean("full", False, "trains five times as long, and measures ten times as many steps")
    flags.DEFINE_boolean("quick", False, "only tests the script")
    app.run(main)
