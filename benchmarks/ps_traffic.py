"""Traffic between parameter servers and a worker in a training step: ours beside TensorFlow's stock ways.

    python benchmarks/ps_traffic.py --json [--quick]

It runs a real cluster on this machine: 2 ps and 1 worker, each a process. Queries have 20 tokens and titles 30, drawn
by Zipf's law (and uniformly) from two tables of 200,000 rows and 64 dimensions, one on each ps. The model is two towers
256-128-64 with the hinge loss over in-batch negatives and AdaGrad. The implementations:

    stock    tf.nn.embedding_lookup_sparse and AdagradOptimizer.minimize, as users write it
    placed   stock ops, summing on the ps (EmbeddingTable, implementation="stock")
    fused    our ops (EmbeddingTable, the default)
    half     fused, with the towers' weights as 16-bit numbers on the wire (half_on_wire)
    shared   fused, with one table for both texts, as `dpsr train` has by default (model.share_text_table)
    rows     shared, with half of the rows on each ps (cluster.placement: rows)
    dense    the towers alone, on vectors that the worker has: the traffic without embeddings

Bytes are the bytes that TCP delivered on the connections between these three processes, in both directions (`ss -ti`),
so other traffic on the machine does not count. Embedding bytes are the bytes of a step minus the bytes of `dense`. The
floor is one vector down and one gradient up for each text, 64 x 4 bytes each, and 4 bytes up for each token.

The CPU time of a parameter server says how many workers it carries: `workers_per_ps_core` is the worker's CPU time of
a step divided by that of both ps. So many workers, each with one core, keep one core of parameter servers busy.

It also reports the loss after the same steps, which must not suffer from the lower traffic, and the examples per CPU
second of one process without ps, with 10 and 30 tokens and 64 shared random negatives.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Read when the libraries load.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import report
import tensorflow as tf
from absl import app, flags

from dpsr_tf import ops
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.models.embedding import EmbeddingTable, GreedyBySize, half_on_wire, minimize
from dpsr_tf.training.launch import free_ports

v1 = tf.compat.v1

NUM_IDS, DIM, HIDDEN, MARGIN, LEARNING_RATE = 200_000, 64, (256, 128), 0.1, 0.01
TOKENS = (20, 30)  # of a query and of a title
LOCAL_TOKENS, LOCAL_NEGATIVES = (10, 30), 64
CLUSTER = ("dense", "stock", "placed", "fused", "half", "shared", "rows")
BATCHES = 32  # number of different batches, used in turn


class Workload(NamedTuple):
    """The input of a step."""

    distribution: str  # "zipf" or "uniform"
    batch_size: int
    tokens: tuple[int, int] = TOKENS
    shared_negatives: int = 0

    @property
    def name(self) -> str:
        """Name of the workload in the report."""
        return f"{self.distribution}_b{self.batch_size}"

    @property
    def texts(self) -> tuple[int, int]:
        """Number of queries and titles in a batch."""
        return self.batch_size, self.batch_size + self.shared_negatives

    @property
    def floor(self) -> int:
        """Bytes that the embeddings of a step need at least."""
        tokens = sum(texts * length for texts, length in zip(self.texts, self.tokens, strict=True))
        return sum(self.texts) * DIM * 4 * 2 + tokens * 4


def draw_tokens(random: np.random.Generator, distribution: str, count: int) -> np.ndarray:
    """Returns token ids, int32 [count]."""
    if distribution == "uniform":
        return random.integers(0, NUM_IDS, count, dtype=np.int32)
    # Zipf with exponent 1, shifted by 10: the inverse of its distribution function.
    u = random.random(count)
    ranks = np.exp(np.log(10) + u * np.log((NUM_IDS + 10) / 10)) - 10
    return np.minimum(ranks, NUM_IDS - 1).astype(np.int32)


def batches(workload: Workload, seed: int) -> tuple[Tokens, Tokens]:
    """Returns query and title tokens of the next step."""
    random = np.random.default_rng(seed)
    drawn = tuple(
        np.stack([draw_tokens(random, workload.distribution, texts * length) for _ in range(BATCHES)])
        for texts, length in zip(workload.texts, workload.tokens, strict=True)
    )
    values = v1.data.make_one_shot_iterator(tf.data.Dataset.from_tensor_slices(drawn).repeat().prefetch(4)).get_next()
    splits = [
        tf.range(0, (texts + 1) * length, length, dtype=tf.int64)
        for texts, length in zip(workload.texts, workload.tokens, strict=True)
    ]
    return Tokens(values[0], splits[0]), Tokens(values[1], splits[1])


def tower(name: str, x: tf.Tensor) -> tf.Tensor:
    """Adds a tower to the graph. Returns vectors of unit length, float32 [texts, DIM]."""
    for i, width in enumerate((*HIDDEN, DIM)):
        with v1.variable_scope(f"{name}_{i}"):
            initializer = v1.glorot_uniform_initializer(seed=1)
            kernel = v1.get_variable("kernel", [x.shape[1], width], initializer=initializer, use_resource=True)
            bias = v1.get_variable("bias", [width], initializer=v1.zeros_initializer(), use_resource=True)
        x = tf.nn.bias_add(tf.matmul(x, kernel), bias)
        x = tf.nn.relu(x) if i < len(HIDDEN) else x
    return tf.math.l2_normalize(x, axis=1)


def loss_of(query: tf.Tensor, title: tf.Tensor) -> tf.Tensor:
    """Returns the hinge loss over all titles of the batch.

    Its gradient is written by hand, because the gradient of a diagonal would need another matrix.
    """

    @tf.custom_gradient
    def hinge(scores: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        b = tf.shape(scores)[0]
        terms = scores + (MARGIN - tf.linalg.diag_part(scores))[:, tf.newaxis]
        wrong = tf.cast(terms > 0, tf.float32)
        scale = 1 / tf.cast(tf.size(scores), tf.float32)

        def backward(upstream: tf.Tensor) -> tf.Tensor:
            own = tf.linalg.diag_part(wrong) - tf.reduce_sum(wrong, 1)
            return tf.linalg.set_diag(wrong, own) * (scale * upstream)

        return (tf.reduce_sum(terms * wrong) - MARGIN * tf.cast(b, tf.float32)) * scale, backward

    return hinge(tf.matmul(query, title, transpose_b=True))


def step_of(impl: str, workload: Workload, seed: int) -> tuple[tf.Operation, tf.Tensor]:
    """Builds the training step and the loss in the current graph."""
    texts = batches(workload, seed)
    # One seed: all implementations begin alike.
    initializer = v1.random_uniform_initializer(-0.125, 0.125, seed=seed)
    names = ("query_table", "title_table")
    tables: list[EmbeddingTable] = []
    if impl == "stock":
        vectors = []
        for name, tokens in zip(names, texts, strict=True):
            table = v1.get_variable(name, [NUM_IDS, DIM], initializer=initializer, use_resource=True)
            sparse = tf.RaggedTensor.from_row_splits(tokens.values, tokens.row_splits, validate=False).to_sparse()
            vectors.append(v1.nn.embedding_lookup_sparse(table, sparse, None, combiner="sum"))
    elif impl == "dense":
        vectors = [tf.ones([count, DIM]) * tf.cast(tokens.values[0], tf.float32)
                   for tokens, count in zip(texts, workload.texts, strict=True)]  # fmt: skip
    else:
        kind = "stock" if impl == "placed" else "fused"
        distinct = ("text_table",) if impl in ("shared", "rows") else names
        layout: dict[str, Any] = {"implementation": kind, "initializer": initializer}
        if impl == "rows":
            layout = {"placement": "rows", "num_shards": 2}
        tables = [EmbeddingTable(name, NUM_IDS, DIM, **layout) for name in distinct]
        vectors = [tables[at % len(tables)].bag(tokens) for at, tokens in enumerate(texts)]
    getter = half_on_wire if impl == "half" else None
    with v1.variable_scope(v1.get_variable_scope(), custom_getter=getter):
        towers = [
            tower(name, tf.ensure_shape(x, [None, DIM])) for name, x in zip(("query", "title"), vectors, strict=True)
        ]
    loss = loss_of(*towers)
    step = v1.train.get_or_create_global_step()
    if tables or impl == "dense":
        return minimize(loss, tables, LEARNING_RATE, step), loss
    return v1.train.AdagradOptimizer(LEARNING_RATE).minimize(loss, step), loss


def session_config(threads: int = 0) -> Any:
    """Returns the config of all sessions; 0 threads let TensorFlow choose."""
    config = v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
    # Without this rewrite the stock ops run faster; ours run the same.
    config.graph_options.rewrite_options.arithmetic_optimization = 2  # RewriterConfig.OFF
    return config


class Usage(NamedTuple):
    """Bytes to the ps, bytes to the worker, and CPU seconds of the worker and of both ps: so far, or in a step."""

    up: float
    down: float
    worker_cpu: float
    ps_cpu: float


class Counts(NamedTuple):
    """Numbers of steps: before the measurement, measured, and, after that, those whose losses are averaged."""

    warm_up: int
    steps: int
    losses: int


def counts_of(workload: Workload, quick: bool) -> Counts:
    """Returns how many steps a workload is measured for."""
    small = workload.batch_size <= 64
    if quick:
        return Counts(3, 30, BATCHES) if small else Counts(2, 5, 2)
    return Counts(20, 300 if small else 60, BATCHES)


class Cluster:
    """A cluster of two ps processes, with this process as the worker."""

    def __init__(self) -> None:
        self._ports = free_ports(3)
        addresses = [f"127.0.0.1:{port}" for port in self._ports]
        self._spec = {"worker": addresses[:1], "ps": addresses[1:]}
        self._ps = [
            subprocess.Popen([sys.executable, __file__, f"--ps={task}", f"--cluster={','.join(addresses)}"])
            for task in range(2)
        ]
        self._server = tf.distribute.Server(self._spec, "worker", 0, config=session_config())

    def stop(self) -> None:
        """Ends the ps processes, which never end by themselves."""
        for process in self._ps:
            process.kill()
            process.wait()

    def usage(self) -> Usage:
        """Measures the traffic so far."""
        up, down = bytes_between(set(self._ports[:1]), set(self._ports[1:]))
        return Usage(up, down, _own_cpu(), sum(cpu_of(process.pid) for process in self._ps))

    def measure(self, impl: str, workload: Workload, seed: int, counts: Counts) -> tuple[Usage, float]:
        """Returns the usage of a step, and the mean loss of the last steps."""
        setter = v1.train.replica_device_setter(
            cluster=self._spec, worker_device="/job:worker/task:0", ps_strategy=GreedyBySize(2)
        )
        with tf.Graph().as_default(), v1.device(setter):
            v1.set_random_seed(seed)
            train, loss = step_of(impl, workload, seed)
            with v1.Session(self._server.target, config=session_config()) as session:
                session.run(v1.global_variables_initializer())
                for _ in range(counts.warm_up):
                    session.run(train)
                before = self.usage()
                for _ in range(counts.steps):
                    session.run(train)
                after = self.usage()
                losses = [session.run([loss, train])[0] for _ in range(counts.losses)]
        return Usage(*((b - a) / counts.steps for a, b in zip(before, after, strict=True))), float(np.mean(losses))


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def cpu_of(pid: int) -> float:
    """Returns the CPU seconds of a process whose threads live as long as it does."""
    # In nanoseconds, where /proc/PID/stat counts ticks of 10 ms.
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def bytes_between(worker_ports: set[int], ps_ports: set[int]) -> tuple[int, int]:
    """Returns the bytes so far from workers to parameter servers and back, over all connections that are open.

    A receiver asks the sender's server for a tensor, so each connection has one end at a port of a server.
    """
    listing = subprocess.run(["ss", "-tinH", "state", "established"], capture_output=True, text=True, check=True)
    up = down = 0
    for head, info in itertools.pairwise(listing.stdout.splitlines()):
        fields = head.split()
        if len(fields) < 4 or "bytes_" not in info:
            continue
        port = int(fields[2].rpartition(":")[2])
        sent, received = (
            int(found[1]) if (found := re.search(rf"bytes_{way}:(\d+)", info)) else 0 for way in ("sent", "received")
        )
        if port in ps_ports:
            up, down = up + received, down + sent
        elif port in worker_ports:
            up, down = up + sent, down + received
    return up, down


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.stop()


def measure_cluster(result: report.Report, cluster: Cluster, workload: Workload, quick: bool) -> None:
    """Adds the rows of one workload."""
    counts = counts_of(workload, quick)
    totals = {}
    for impl in CLUSTER:
        usage, loss = cluster.measure(impl, workload, result.seed, counts)
        totals[impl] = usage.up + usage.down
        for metric, value in (("to_ps", usage.up), ("to_worker", usage.down), ("total", totals[impl])):
            result.add(impl, workload.name, f"{metric}_bytes", value, "bytes/step")
        if impl in ("stock", "placed", "fused", "shared", "rows"):
            of_embedding = totals[impl] - totals["dense"]
            result.add(impl, workload.name, "embedding_bytes", of_embedding, "bytes/step")
        if impl != "dense":
            note = f"mean of {counts.losses} steps after {counts.warm_up + counts.steps}"
            result.add(impl, workload.name, "loss", loss, "", note=note)
        for metric, value in (("worker_cpu", usage.worker_cpu), ("ps_cpu", usage.ps_cpu)):
            result.add(impl, workload.name, metric, value / workload.batch_size * 1e6, "us/example")
        result.add(impl, workload.name, "ps_bytes", totals[impl] / workload.batch_size, "bytes/example")
        workers = usage.worker_cpu / usage.ps_cpu
        result.add(impl, workload.name, "workers_per_ps_core", workers, "", note="of one core each")
    result.add("floor", workload.name, "embedding_bytes", workload.floor, "bytes/step")


def measure_local(result: report.Report, batch_size: int, quick: bool) -> None:
    """Adds examples per CPU second of one process, with one thread in each pool."""
    workload = Workload("zipf", batch_size, LOCAL_TOKENS, LOCAL_NEGATIVES)
    name = f"local_b{batch_size}"
    with contextlib.ExitStack() as stack:
        passes = {}
        for impl in ("stock", "placed", "fused"):
            graph = tf.Graph()
            with graph.as_default():
                train, _ = step_of(impl, workload, result.seed)
                session = stack.enter_context(v1.Session(graph=graph, config=session_config(1)))
                session.run(v1.global_variables_initializer())
            passes[impl] = session.make_callable(train)
        rates = report.rates(passes, batch_size, 3 if quick else 7, 0.05 if quick else 1.0)
        for impl, samples in rates.items():
            result.add_samples(impl, name, "rate", samples, "examples/CPU s", note="no ps; one process, one thread")


def bars(result: report.Report) -> dict[str, float]:
    """Returns the bars, from the Zipf workloads."""
    found = {}
    for b in (64, 1024):
        ours = result.value("fused", f"zipf_b{b}", "embedding_bytes")
        found[f"embedding_bytes_over_floor_b{b}"] = ours / result.value("floor", f"zipf_b{b}", "embedding_bytes")
        found[f"embedding_bytes_ratio_to_stock_b{b}"] = ours / result.value("stock", f"zipf_b{b}", "embedding_bytes")
        shared = result.value("shared", f"zipf_b{b}", "embedding_bytes")
        found[f"shared_embedding_bytes_over_floor_b{b}"] = shared / result.value(
            "floor", f"zipf_b{b}", "embedding_bytes"
        )
        found[f"workers_per_ps_core_b{b}"] = result.value("shared", f"zipf_b{b}", "workers_per_ps_core")
    total = result.value("half", "zipf_b64", "total_bytes")
    found["total_bytes_ratio_to_stock_b64"] = total / result.value("stock", "zipf_b64", "total_bytes")
    return found


def _define_flags() -> None:
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object in the last line")
    flags.DEFINE_boolean("quick", False, "runs few steps, with Zipf only, to try the benchmark out")
    flags.DEFINE_integer("seed", 1, "seed of tokens and initial values", lower_bound=0)
    flags.DEFINE_integer("ps", None, "internal: runs the ps with this number")
    flags.DEFINE_list("cluster", [], "internal: addresses of the worker and the ps, for --ps")


def main(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    if arguments[1:]:
        raise app.UsageError(f"unexpected argument '{arguments[1]}'")
    ops.load()
    if values.ps is not None:
        spec = {"worker": values.cluster[:1], "ps": values.cluster[1:]}
        tf.distribute.Server(spec, "ps", values.ps, config=session_config()).join()
    v1.disable_eager_execution()
    v1.logging.set_verbosity(v1.logging.ERROR)
    result = report.Report("ps_traffic", values.seed, report.hardware("dpsr", "tensorflow"))
    with running_cluster() as cluster:
        for distribution in ("zipf",) if values.quick else ("zipf", "uniform"):
            for batch_size in (64, 1024):
                measure_cluster(result, cluster, Workload(distribution, batch_size), values.quick)
    for batch_size in (64, 1024):
        measure_local(result, batch_size, values.quick)
    result.bars = bars(result)
    result.print(values.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
