"""Training speed in examples per core-second: ours, what others use, and a hand-written loop as a reference.

    python benchmarks/training.py --json [--quick] [--torch_python=PYTHON]

The task: queries of 10 tokens and titles of 30, drawn by Zipf's law from a vocabulary of 200,000; one table of 64
dimensions; two towers 256-128-64 with embeddings of length 1; for each pair the hinge loss over the batch's other
titles and 64 random titles that the batch shares, with half the weight on each group; AdaGrad with learning rate 0.01.
The implementations:

    ours            the Estimator of `dpsr train`, from a store: the dataset op, fused tables, its hooks and summaries
    stock           Estimator as users write it: TFRecord, parse_example, embedding_lookup_sparse, AdagradOptimizer
    stock_1thread   as stock, with one thread in each pool; batch 64 only
    stock_noarith   as stock, without grappler's arithmetic optimization, which makes copies of the whole table
    torch           EmbeddingBag with sparse gradients, Adagrad; tokens are in memory; left out without torch
    limit           a loop in C++ with Eigen (training_limit.cc), compiled for this machine; tokens are in memory. It is
                    a reference, not a limit: ours may be faster. Its bars keep their names, ratio_to_limit_*

Each implementation is a process of its own, and they take turns. TensorFlow uses its default number of threads unless
said otherwise, torch and the loop one. Waiting threads cost CPU time too, so stock is also measured with one. The
rate of a turn is examples divided by CPU time (user and system, all threads of the process); the result is the median
over the turns. Making graphs and saving checkpoints do not count. First, all implementations train a few steps from the
same weights on the same batches, and their losses must be equal.

Another row is the CPU time per example with a table of 10 million rows, divided by the time with 100,000 rows. Tokens
are drawn from the whole table.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow loads

import numpy as np
import report
from absl import app, flags

NUM_IDS, DIM, WIDTHS = 200_000, 64, (256, 128, 64)
QUERY_TOKENS, TITLE_TOKENS, RANDOM = 10, 30, 64
MARGIN, LEARNING_RATE, INITIAL_ACCUMULATOR, ALPHA = 0.1, 0.01, 0.1, 0.5
PAIRS = 50_000  # in the log: as many queries as titles
BATCH_SIZES = (64, 1024)
IMPLEMENTATIONS = ("ours", "stock", "stock_1thread", "stock_noarith", "torch", "limit")
ONLY_B64 = ("stock_1thread",)
ROWS = {"rows_10m": 10_000_000, "rows_100k": 100_000}
CHECK_ROWS, CHECK_BATCH, CHECK_STEPS = 2_000, 64, 5


class Log(NamedTuple):
    """A log with one click for each query, each on a different item."""

    queries: np.ndarray  # int32 [pairs, QUERY_TOKENS]
    titles: np.ndarray  # int32 [pairs, TITLE_TOKENS]


def draw(pairs: int, num_ids: int, seed: int) -> Log:
    """Draws from Zipf's law with exponent 1, shifted by 10, by the inverse of its distribution function."""
    random = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        ranks = np.exp(np.log(10) + random.random((pairs, length)) * np.log((num_ids + 10) / 10)) - 10
        return np.minimum(ranks, num_ids - 1).astype(np.int32)

    return Log(tokens(QUERY_TOKENS), tokens(TITLE_TOKENS))


def group_weights(batch_size: int) -> tuple[float, float]:
    """Returns the weights of a batch title and of a random title in the loss of a pair (section 4.4.3)."""
    count = batch_size - 1 + RANDOM
    return count * (1 - ALPHA) / (batch_size - 1), count * ALPHA / RANDOM


# The files of a log.


def write_store(log: Log, folder: Path) -> None:
    """Writes the files of a store that training reads. It has neither texts nor a vocabulary."""
    from dpsr_common.packed_file import PackedFileWriter
    from dpsr_tf.data.id_index import id_index

    folder.mkdir()
    pairs = len(log.queries)
    splits = np.arange(pairs + 1, dtype=np.int64)
    ids = np.arange(pairs, dtype=np.int64)
    sections: dict[str, dict[str, np.ndarray]] = {
        "items": {
            "id": ids,
            **dict(zip(("id_index.splits", "id_index.rows"), id_index(ids), strict=True)),
            "popularity": np.ones(pairs, np.float32),
            "tokens.splits": splits * TITLE_TOKENS,
            "tokens.values": log.titles.ravel(),
        },
        "users": {
            "id": np.array([-1], np.int64),
            **dict(zip(("id_index.splits", "id_index.rows"), id_index(np.array([-1], np.int64)), strict=True)),
            "event.splits": np.zeros(2, np.int64),
            "event.time": np.zeros(0, np.uint32),
            "event.item": np.zeros(0, np.int32),
            "event.query": np.zeros(0, np.int32),
            "event.type": np.zeros(0, np.uint8),
        },
        "interactions": {
            "query.splits": splits * QUERY_TOKENS,
            "query.tokens": log.queries.ravel(),
            "query_text.splits": np.zeros(pairs + 1, np.int64),
            "query_text.bytes": np.zeros(0, np.uint8),
            "positive.splits": splits,
            "positive.user": np.zeros(pairs, np.int32),
            "positive.item": np.arange(pairs, dtype=np.int32),
            "positive.type": np.full(pairs, 2, np.uint8),
            "positive.time": np.arange(pairs, dtype=np.uint32),
            "negative.splits": np.zeros(pairs + 1, np.int64),
            "negative.item": np.zeros(0, np.int32),
        },
    }
    for kind, columns in sections.items():
        with PackedFileWriter(folder / f"{kind}.dpsr", kind) as file:
            for name, values in columns.items():
                file.add(name, values)


class StoreFiles(NamedTuple):
    """Returns the store as the dataset op needs it."""

    path: Path
    manifest: dict[str, Any]


def open_store(folder: Path) -> StoreFiles:
    features: dict[str, list[Any]] = {"items": [], "users": []}
    return StoreFiles(folder, {"format": "dpsr-store", "version": 3, "shards": 1, "features": features})


def write_records(log: Log, folder: Path) -> None:
    """Writes pairs and titles as TFRecord, one Example each."""
    import tensorflow as tf

    folder.mkdir()

    def integers(values: np.ndarray) -> Any:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    with (
        tf.io.TFRecordWriter(str(folder / "pairs")) as pairs,
        tf.io.TFRecordWriter(str(folder / "titles")) as titles,
    ):
        for query, title in zip(log.queries.tolist(), log.titles.tolist(), strict=True):
            of_title = integers(title)
            pair = tf.train.Features(feature={"query": integers(query), "title": of_title})
            pairs.write(tf.train.Example(features=pair).SerializeToString())
            alone = tf.train.Features(feature={"title": of_title})
            titles.write(tf.train.Example(features=alone).SerializeToString())


# The check: all implementations start from the same weights and batches.


class Start(NamedTuple):
    """The initial weights, and the batches of CHECK_STEPS steps."""

    table: np.ndarray  # float32 [CHECK_ROWS, DIM]
    layers: list[np.ndarray]  # kernel [in, out], bias [out] of each layer, query tower first
    queries: np.ndarray  # int32 [CHECK_STEPS, CHECK_BATCH, QUERY_TOKENS]
    titles: np.ndarray  # int32 [CHECK_STEPS, CHECK_BATCH + RANDOM, TITLE_TOKENS]


def layer_shapes() -> list[tuple[int, ...]]:
    inputs = (DIM, *WIDTHS[:-1])
    return [shape for _ in range(2) for i, o in zip(inputs, WIDTHS, strict=True) for shape in ((i, o), (o,))]


def make_start(seed: int) -> Start:
    random = np.random.default_rng(seed)
    layers = [
        random.normal(0, (2 / sum(shape)) ** 0.5 if len(shape) == 2 else 0.01, shape).astype(np.float32)
        for shape in layer_shapes()
    ]
    drawn = draw(CHECK_STEPS * (CHECK_BATCH + RANDOM), CHECK_ROWS, seed)
    titles = drawn.titles.reshape(CHECK_STEPS, -1, TITLE_TOKENS)
    queries = drawn.queries.reshape(CHECK_STEPS, -1, QUERY_TOKENS)[:, :CHECK_BATCH]
    table = random.uniform(-0.125, 0.125, (CHECK_ROWS, DIM)).astype(np.float32)
    return Start(table, layers, np.ascontiguousarray(queries), titles)


def write_start(start: Start, path: Path) -> None:
    """Writes all numbers of a start, one after the other, as training_limit.cc reads them."""
    path.write_bytes(b"".join(part.tobytes() for part in (start.table, *start.layers, start.queries, start.titles)))


def read_start(path: Path) -> Start:
    shapes = [(CHECK_ROWS, DIM), *layer_shapes()]
    shapes += [(CHECK_STEPS, CHECK_BATCH, QUERY_TOKENS), (CHECK_STEPS, CHECK_BATCH + RANDOM, TITLE_TOKENS)]
    data, parts, begin = path.read_bytes(), [], 0
    for i, shape in enumerate(shapes):
        count = int(np.prod(shape))
        dtype = np.float32 if i < len(shapes) - 2 else np.int32
        parts.append(np.frombuffer(data, dtype, count, begin).reshape(shape))
        begin += 4 * count
    return Start(parts[0], parts[1:-2], *parts[-2:])


# The implementations. Each is a process that trains for a turn whenever it reads how long.


class Turns:
    """The turns of a process: it reads the CPU seconds of a turn from a line, trains, and prints what it did."""

    def __init__(self) -> None:
        self._left: float | None = None
        self._say({"ready": True})

    def go_on(self, step: int) -> bool:
        """Counts steps and returns whether to train more. Call it every few steps."""
        if self._left is None or time.process_time() >= self._left:
            if self._left is not None:
                cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
                self._say({"steps": step - self._step, "cpu": cpu, "wall": wall})
            line = sys.stdin.readline().strip()
            if not line:
                return False
            self._step, self._wall, self._cpu = step, time.perf_counter(), time.process_time()
            self._left = self._cpu + float(line)
        return True

    @staticmethod
    def _say(what: dict[str, Any]) -> None:
        print(json.dumps(what), flush=True)


def run_estimator(impl: str, folder: Path, batch_size: int, num_ids: int) -> None:
    """Trains ours or stock until all turns are done."""
    import tensorflow as tf

    v1 = tf.compat.v1
    v1.logging.set_verbosity(v1.logging.ERROR)

    class Hook(tf.estimator.SessionRunHook):
        def begin(self) -> None:
            self._step = v1.train.get_global_step()
            self._turns: Turns | None = None

        def before_run(self, run_context: Any) -> Any:
            return tf.estimator.SessionRunArgs(self._step)

        def after_run(self, run_context: Any, run_values: Any) -> None:
            self._turns = self._turns or Turns()
            # A step counter that is fetched together with a step may be read before or after it.
            if not self._turns.go_on(int(run_values.results)):
                run_context.request_stop()

    with tempfile.TemporaryDirectory() as model_dir:
        if impl == "ours":
            estimator, examples, hooks = our_training(folder, batch_size, num_ids, model_dir)
        else:
            estimator, examples, hooks = stock_training(folder, batch_size, num_ids, model_dir, impl)
        estimator.train(examples, hooks=[*hooks, Hook()])


def our_config(batch_size: int) -> Any:
    from dpsr_tf.config import Config, ModelConfig, TrainConfig

    return Config(
        model=ModelConfig(token_dim=DIM, hidden=WIDTHS[:-1], embedding_dim=WIDTHS[-1]),
        train=TrainConfig(
            steps=1 << 40,
            batch_size=batch_size,
            learning_rate=LEARNING_RATE,
            margin=MARGIN,
            num_random_negatives=RANDOM,
            mixing_ratio=ALPHA,
        ),
    )


def our_params(batch_size: int, num_ids: int) -> dict[str, Any]:
    from dpsr_tf.models.features import FeatureSpec

    return {"config": our_config(batch_size), "features": FeatureSpec(num_ids), "num_ps": 0, "item_shares": None}


def our_training(folder: Path, batch_size: int, num_ids: int, model_dir: str) -> tuple[Any, Callable[[], Any], list]:
    """Trains like dpsr_tf.training.train, but without checkpoints."""
    import tensorflow as tf

    from dpsr_tf.data.examples_dataset import examples_dataset, training_input
    from dpsr_tf.training.cluster import Cluster
    from dpsr_tf.training.estimator import ProgressBar, model_fn, run_config
    from dpsr_tf.training.train import batch_options

    params = our_params(batch_size, num_ids)
    config, store = params["config"], open_store(folder / "store")
    run = run_config(model_dir, config, Cluster()).replace(save_checkpoints_steps=None, save_checkpoints_secs=None)

    def examples() -> tf.data.Dataset:
        return training_input(examples_dataset(store, batch_options(config, params["features"]))).prefetch(2)

    estimator = tf.estimator.Estimator(model_fn, config=run, params=params)
    return estimator, examples, [ProgressBar(config.train.steps, batch_size, model_dir)]


def stock_training(
    folder: Path, batch_size: int, num_ids: int, model_dir: str, impl: str
) -> tuple[Any, Callable[[], Any], list]:
    import tensorflow as tf

    v1 = tf.compat.v1

    def examples() -> tf.data.Dataset:
        def records(name: str, count: int) -> tf.data.Dataset:
            dataset = tf.data.TFRecordDataset(str(folder / "records" / name), buffer_size=1 << 20)
            return dataset.shuffle(10_000).repeat().batch(count, drop_remainder=True)

        def parse(pairs: tf.Tensor, titles: tf.Tensor) -> tuple[dict[str, tf.SparseTensor], tf.Tensor]:
            tokens = tf.io.VarLenFeature(tf.int64)
            pair = tf.io.parse_example(pairs, {"query": tokens, "title": tokens})
            title = tf.io.parse_example(titles, {"title": tokens})["title"]
            both = tf.sparse.concat(0, [pair["title"], title], expand_nonconcat_dims=True)
            return {"query": pair["query"], "title": both}, tf.zeros([])

        batches = tf.data.Dataset.zip((records("pairs", batch_size), records("titles", RANDOM))).map(parse).prefetch(2)
        options = tf.data.Options()
        if impl == "stock_1thread":
            options.threading.private_threadpool_size = 1
        return batches.with_options(options)

    def model_fn(features: dict[str, Any], labels: Any, mode: str) -> tf.estimator.EstimatorSpec:
        loss = stock_loss(features["query"], features["title"], batch_size, num_ids)
        step = v1.train.AdagradOptimizer(LEARNING_RATE).minimize(loss, v1.train.get_global_step())
        return tf.estimator.EstimatorSpec(mode, loss=loss, train_op=step)

    threads = 1 if impl == "stock_1thread" else 0  # 0: TensorFlow's default
    session = v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
    if impl == "stock_noarith":
        session.graph_options.rewrite_options.arithmetic_optimization = 2  # RewriterConfig.OFF
    run = tf.estimator.RunConfig(
        model_dir, 1, save_checkpoints_steps=None, save_checkpoints_secs=None, session_config=session
    )
    return tf.estimator.Estimator(model_fn, config=run), examples, []


def stock_loss(query: Any, title: Any, batch_size: int, num_ids: int) -> Any:
    """Returns the loss on sparse int64 tokens [batch_size, any] and [batch_size + RANDOM, any]."""
    import tensorflow as tf

    v1 = tf.compat.v1
    table = v1.get_variable(
        "table", [num_ids, DIM], initializer=v1.random_uniform_initializer(-0.125, 0.125), use_resource=True
    )
    vectors = []
    for name, tokens in (("query", query), ("title", title)):
        x = v1.nn.embedding_lookup_sparse(table, tokens, None, combiner="sum")
        with v1.variable_scope(name):
            for i, width in enumerate(WIDTHS):
                last = i == len(WIDTHS) - 1
                x = v1.layers.dense(x, width, activation=None if last else tf.nn.relu, name=f"layer_{i}")
        vectors.append(tf.math.l2_normalize(x, axis=1, epsilon=1e-12))
    of_batch, of_random = group_weights(batch_size)
    weights = np.full((batch_size, batch_size + RANDOM), of_random, np.float32)
    weights[:, :batch_size] = of_batch * (1 - np.eye(batch_size))
    positive = tf.reduce_sum(vectors[0] * vectors[1][:batch_size], axis=1, keepdims=True)
    scores = tf.matmul(vectors[0], vectors[1], transpose_b=True)
    return tf.reduce_sum(weights * tf.nn.relu(MARGIN - positive + scores)) / batch_size


def check_estimator(impl: str, start: Start) -> list[float]:
    """Returns the losses of the steps from `start`."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        queries = v1.placeholder(tf.int32, [CHECK_BATCH, QUERY_TOKENS])
        titles = v1.placeholder(tf.int32, [CHECK_BATCH + RANDOM, TITLE_TOKENS])
        step = v1.train.get_or_create_global_step()
        if impl == "ours":
            loss, train = _our_step(queries, titles)
        else:
            sparse = [
                tf.RaggedTensor.from_tensor(tf.cast(tokens, tf.int64)).to_sparse() for tokens in (queries, titles)
            ]
            loss = stock_loss(*sparse, CHECK_BATCH, CHECK_ROWS)
            train = v1.train.AdagradOptimizer(LEARNING_RATE).minimize(loss, step)
        session.run(v1.global_variables_initializer())
        variables = v1.trainable_variables()
        table = [variable for variable in variables if variable.shape == start.table.shape]
        layers = [variable for variable in variables if variable.shape != start.table.shape]
        for variable, value in zip([*table, *layers], [start.table, *start.layers], strict=True):
            variable.load(value, session)
        return [
            float(session.run([loss, train], {queries: start.queries[i], titles: start.titles[i]})[0])
            for i in range(CHECK_STEPS)
        ]


def _our_step(queries: Any, titles: Any) -> tuple[Any, Any]:
    """Returns loss and training step of our model_fn on a batch of these tokens."""
    import tensorflow as tf

    from dpsr_tf.data.examples_dataset import Batch, Features, History, Tokens
    from dpsr_tf.training.estimator import model_fn

    def tokens(matrix: tf.Tensor) -> Tokens:
        texts, length = matrix.shape
        return Tokens(tf.reshape(matrix, [-1]), tf.range(texts + 1, dtype=tf.int64) * length)

    def features(rows: int) -> Features:
        return Features(tf.zeros([rows, 0], tf.int32), ())

    rows, none = tf.range(CHECK_BATCH), Tokens(tf.zeros([0], tf.int32), tf.zeros([CHECK_BATCH + 1], tf.int64))
    batch = Batch(
        query=tokens(queries),
        query_rows=rows,
        item=tokens(titles),
        item_rows=tf.range(CHECK_BATCH + RANDOM),
        item_features=features(CHECK_BATCH + RANDOM),
        user_rows=tf.zeros_like(rows),
        user_features=features(CHECK_BATCH),
        history=History(none, tf.zeros([0], tf.int32), none, features(0), none.row_splits, none),
        weights=tf.ones([CHECK_BATCH]),
        labels=tf.ones([CHECK_BATCH]),
        types=tf.zeros_like(rows),
        negative_mask=tf.constant(~np.eye(CHECK_BATCH, CHECK_BATCH + RANDOM, dtype=bool)),
        own_negative_mask=tf.zeros([CHECK_BATCH, 0], tf.bool),
    )
    spec = model_fn({"batch": batch}, None, tf.estimator.ModeKeys.TRAIN, our_params(CHECK_BATCH, CHECK_ROWS))
    return spec.loss, spec.train_op


class Torch:
    """The model in torch, on one thread."""

    def __init__(self, batch_size: int, num_ids: int):
        import torch

        torch.set_num_threads(1)
        self.torch, self.batch_size = torch, batch_size
        self.table = torch.nn.EmbeddingBag(num_ids, DIM, mode="sum", sparse=True)
        torch.nn.init.uniform_(self.table.weight, -0.125, 0.125)

        def tower() -> Any:
            layers: list[Any] = []
            for i, o in zip((DIM, *WIDTHS[:-1]), WIDTHS, strict=True):
                layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
            return torch.nn.Sequential(*layers[:-1])

        self.towers = [tower(), tower()]
        dense = [parameter for tower in self.towers for parameter in tower.parameters()]
        self.optimizers = [
            torch.optim.Adagrad(parameters, lr=LEARNING_RATE, initial_accumulator_value=INITIAL_ACCUMULATOR, eps=0)
            for parameters in (self.table.parameters(), dense)
        ]
        of_batch, of_random = group_weights(batch_size)
        self.weights = torch.full((batch_size, batch_size + RANDOM), of_random)
        self.weights[:, :batch_size] = of_batch * (1 - torch.eye(batch_size))

    def load(self, start: Start) -> None:
        """Sets the initial weights."""
        torch = self.torch
        layers = [parameter for tower in self.towers for parameter in tower.parameters()]
        with torch.no_grad():
            self.table.weight.copy_(torch.tensor(start.table))
            for parameter, value in zip(layers, start.layers, strict=True):
                parameter.copy_(torch.tensor(value.T))  # a Linear holds [out, in]

    def step(self, queries: Any, titles: Any) -> Any:
        """Trains one step on int64 tokens [batch_size, n], [batch_size + RANDOM, m] and returns its loss."""
        torch = self.torch
        query, title = (
            torch.nn.functional.normalize(tower(self.table(tokens)), eps=1e-6)
            for tower, tokens in zip(self.towers, (queries, titles), strict=True)
        )
        positive = (query * title[: self.batch_size]).sum(1, keepdim=True)
        loss = (self.weights * torch.relu(MARGIN - positive + query @ title.T)).sum() / self.batch_size
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()


def run_torch(folder: Path, batch_size: int, num_ids: int) -> None:
    model = Torch(batch_size, num_ids)
    torch = model.torch
    queries, titles = (torch.from_numpy(tokens.astype(np.int64)) for tokens in read_tokens(folder))
    turns = Turns()
    for step in itertools.count():
        if step % 4 == 0 and not turns.go_on(step):
            return
        rows, others = torch.randint(len(queries), (batch_size,)), torch.randint(len(titles), (RANDOM,))
        model.step(queries[rows], titles[torch.cat([rows, others])])


def check_torch(start: Start) -> list[float]:
    model = Torch(CHECK_BATCH, CHECK_ROWS)
    model.load(start)
    return [
        float(model.step(*(model.torch.tensor(tokens[i].astype(np.int64)) for tokens in (start.queries, start.titles))))
        for i in range(CHECK_STEPS)
    ]


def write_tokens(log: Log, folder: Path) -> None:
    (folder / "queries.bin").write_bytes(log.queries.tobytes())
    (folder / "titles.bin").write_bytes(log.titles.tobytes())


def read_tokens(folder: Path) -> Log:
    return Log(
        np.fromfile(folder / "queries.bin", np.int32).reshape(-1, QUERY_TOKENS),
        np.fromfile(folder / "titles.bin", np.int32).reshape(-1, TITLE_TOKENS),
    )


# The main process starts the other processes and gives them their turns.


def compile_limit(folder: Path) -> Path:
    """Compiles training_limit.cc for this machine, with the Eigen of TensorFlow's wheel."""
    source, program = Path(__file__).with_name("training_limit.cc"), folder / "training_limit"
    wheel = importlib.util.find_spec("tensorflow")
    assert wheel is not None and wheel.origin is not None
    include = Path(wheel.origin).parent / "include"
    command = ["g++", "-std=c++17", "-O3", "-march=native", "-fno-math-errno", f"-isystem{include}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    return program


class Commands:
    """Starts the implementations."""

    def __init__(self, torch_python: str, limit: Path):
        self._torch_python, self._limit = torch_python, limit

    def of(self, impl: str, *arguments: object) -> list[str]:
        """Returns the command that runs `impl` with these arguments (`_run`)."""
        if impl == "limit":
            return [str(self._limit), *map(str, arguments)]
        python = self._torch_python if impl == "torch" else sys.executable
        return [python, "-W", "ignore", __file__, f"--run={impl}", "--", *map(str, arguments)]


class Runner:
    """A process of an implementation, which waits for its turns."""

    def __init__(self, command: list[str], batch_size: int):
        self._command, self._batch_size = command, batch_size
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def wait(self) -> dict[str, Any]:
        """Returns the next message of the process."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"training: {' '.join(self._command)} has ended:\n{_tail(self._errors)}")
        return dict(json.loads(line))

    def turn(self, cpu_seconds: float) -> float:
        """Trains for about this long and returns the examples per CPU second."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{cpu_seconds}\n")
        self._process.stdin.flush()
        done = self.wait()
        return float(done["steps"] * self._batch_size / done["cpu"])

    def stop(self) -> None:
        """Ends the process, which then removes its files."""
        try:
            self._process.communicate(timeout=30)  # closes its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()


def _tail(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")[-2000:]


def measure(runners: dict[str, Runner], turns: int, cpu_seconds: float) -> dict[str, list[float]]:
    """Returns the rates of the turns after a warm-up turn. Each round starts with another implementation."""
    try:
        for runner in runners.values():
            runner.wait()
            runner.turn(cpu_seconds)
        names, found = list(runners), {name: [] for name in runners}  # type: dict[str, list[float]]
        for turn in range(turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                found[name].append(runners[name].turn(cpu_seconds))
        return found
    finally:
        for runner in runners.values():
            runner.stop()


def check(commands: Commands, implementations: Sequence[str], folder: Path, seed: int) -> dict[str, list[float]]:
    """Compares the losses of all implementations from the same start. Raises SystemExit if they differ."""
    write_start(make_start(seed), folder / "start")
    losses = {}
    for impl in implementations:
        command = commands.of(impl, "check", folder / "start")
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise SystemExit(f"training: {' '.join(command)} failed:\n{run.stderr[-2000:]}")
        losses[impl] = list(map(float, json.loads(run.stdout.splitlines()[-1])))
    for impl, found in losses.items():
        if not np.allclose(found, losses["ours"], rtol=1e-4):
            raise SystemExit(f"training: {impl} computes another model: losses {found}, ours {losses['ours']}")
    return losses


def has_torch(python: str) -> bool:
    return subprocess.run([python, "-c", "import torch, absl, numpy"], capture_output=True, check=False).returncode == 0


def bars(result: report.Report) -> dict[str, float]:
    """Returns the bars of the implementations that ran."""
    found = {}

    def ratio(name: str, workload: str, peer: str, ours: str = "ours") -> None:
        try:
            found[name] = result.value(ours, workload, "rate") / result.value(peer, workload, "rate")
        except KeyError:
            return

    ratio("ratio_to_stock_b64", "b64", "stock")
    ratio("ratio_to_stock_b1024", "b1024", "stock")
    ratio("ratio_to_stock_1thread_b64", "b64", "stock_1thread")
    ratio("ratio_to_stock_noarith_b64", "b64", "stock_noarith")
    ratio("ratio_to_torch_b64", "b64", "torch")
    ratio("ratio_to_limit_b64", "b64", "limit")
    ratio("ratio_to_limit_b1024", "b1024", "limit")
    found["cost_10m_over_100k_rows"] = result.value("ours", "rows_100k", "rate") / result.value(
        "ours", "rows_10m", "rate"
    )
    return found


def _define_flags() -> None:
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object in the last line")
    flags.DEFINE_boolean("quick", False, "uses short turns and small tables, to try the benchmark out")
    flags.DEFINE_integer("seed", 1, "seed of tokens and weights", lower_bound=0)
    flags.DEFINE_string("torch_python", sys.executable, "Python interpreter that has torch, absl-py and numpy")
    flags.DEFINE_list("only", list(IMPLEMENTATIONS), "implementations to measure")
    flags.DEFINE_enum("run", None, IMPLEMENTATIONS[:-1], "internal: runs one implementation")


def _run(impl: str, arguments: Sequence[str]) -> None:
    """Runs `check START`, or trains with FOLDER BATCH_SIZE NUM_IDS."""
    if arguments[0] == "check":
        start = read_start(Path(arguments[1]))
        print(json.dumps(check_torch(start) if impl == "torch" else check_estimator(impl, start)))
        return
    folder, batch_size, num_ids = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    if impl == "torch":
        run_torch(folder, batch_size, num_ids)
    else:
        run_estimator(impl, folder, batch_size, num_ids)


def main(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    if values.run:
        _run(values.run, arguments[1:])
        return
    if arguments[1:]:
        raise app.UsageError(f"unexpected argument '{arguments[1]}'")
    quick = values.quick
    implementations = [impl for impl in IMPLEMENTATIONS if impl in values.only]
    if "torch" in implementations and not has_torch(values.torch_python):
        print(
            f"training: {values.torch_python} has no torch (extra `bench`); its row and bar are left out",
            file=sys.stderr,
        )
        implementations.remove("torch")
    result = report.Report("training", values.seed, report.hardware("dpsr", "tensorflow", "torch"))
    turns, cpu_seconds = (2, 0.2) if quick else (7, 1.0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands = Commands(values.torch_python, compile_limit(folder))
        losses = check(commands, implementations, folder, values.seed)
        for impl, found in losses.items():
            result.add(impl, "check", "loss", found[-1], "", note=f"of step {CHECK_STEPS} from the same weights")
        num_ids = 20_000 if quick else NUM_IDS
        log = draw(5_000 if quick else PAIRS, num_ids, values.seed)
        write_store(log, folder / "store")
        write_records(log, folder / "records")
        write_tokens(log, folder)
        for batch_size in BATCH_SIZES:
            runners = {
                impl: Runner(commands.of(impl, folder, batch_size, num_ids), batch_size)
                for impl in implementations
                if batch_size == 64 or impl not in ONLY_B64
            }
            for impl, rates in measure(runners, turns, cpu_seconds).items():
                result.add_samples(impl, f"b{batch_size}", "rate", rates, "examples/core-second")
        runners = {}
        for name, rows in ROWS.items():
            rows = rows // 100 if quick else rows
            (folder / name).mkdir()
            write_store(draw(5_000 if quick else PAIRS, rows, values.seed), folder / name / "store")
            runners[name] = Runner(commands.of("ours", folder / name, 64, rows), 64)
        for name, rates in measure(runners, turns, cpu_seconds).items():
            result.add_samples("ours", name, "rate", rates, "examples/core-second", note="batch 64")
    result.bars = bars(result)
    result.print(values.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
