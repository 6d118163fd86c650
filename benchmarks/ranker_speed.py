"""Measures how long a ranker's servable takes for the items of one request, beside XGBoost and a model server.

    python benchmarks/ranker_speed.py --out=DIR --json

The shop is generated, and the ranker is that of dpsr_tf/configs/ranker.yaml, but with ReLU layers of 256, 128 and 64,
after a few steps of training, since its weights do not change its speed. A request has a query
of the log, the features and the last 50 items of a user, and 100 items by id.

`rank_core`: CPU time of the whole graph of the signature `rank` on one core, in this process, with a session of one
thread that is called without a server: text, statistics, gathers and layers. `xgboost`: CPU time on one thread to score
the 100 rows of numbers of such a request with 500 trees of depth 6, whose features are given. `server`: what a client
on this machine waits for, and CPU time of the model server, both for one request at a time.

CPU times are the median of blocks of requests; the smallest and the largest block stand beside them.
"""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report
import tensorflow as tf
import xgboost
from absl import app, flags
from servers import cpu_seconds_of
from tensorflow.core.protobuf import config_pb2

from dpsr_common.command_line import main as dpsr
from dpsr_export import faiss_search
from dpsr_export.ranker import rank_inputs
from dpsr_export.warmup import LoadedServable
from dpsr_serving.client import SearchClient, User
from dpsr_serving.model_server import start_model_server
from dpsr_tf.config import CONFIGS
from dpsr_tf.data.ranking_features import RankingFeatures
from dpsr_tf.data.store import Store
from dpsr_tf.data.user_requests import User as StoreUser
from dpsr_tf.data.user_requests import UserRequests, client_arguments
from dpsr_tokenizer import tf_ops  # noqa: F401 - loads the tokenizer's ops, which the servable's graph needs

v1 = tf.compat.v1

ITEMS, HISTORY = 100, 50
TREES, DEPTH = 500, 6
# Variants of the ranker, beside that of the bar.
VARIANTS: dict[str, list[str]] = {
    "": [],
    ", attention": ["model.history_pooling=attention"],
    ", no history": ["model.history_length=0"],
}
_REQUESTS, _BLOCKS = 50, 15


def _run(*arguments: str) -> None:
    if dpsr(list(arguments)):
        raise SystemExit(f"dpsr {' '.join(arguments)} has failed")


def prepare(folder: Path, seed: int) -> Store:
    """Generates and ingests a shop in `folder`, unless it is there."""
    if not (folder / "store" / "manifest.json").exists():
        sizes = ["--items=3000", "--users=300", "--interactions=30000", "--set=judged_queries=20"]
        _run("generate", f"--out={folder / 'shop'}", f"--seed={seed}", *sizes)
        _run("ingest", f"--schema={folder / 'shop' / 'schema.ranking.yaml'}", f"--out={folder / 'store'}")
    return Store(folder / "store")


def export(folder: Path, name: str, settings: list[str]) -> Path:
    """Trains a ranker for a few steps and exports it. Returns the base path."""
    model, base = folder / f"model{name}", folder / f"servable{name}"
    if not (base / "1").exists():
        shape = ["model.hidden=[256,128,64]", "model.history_length=50", "train.steps=20", "train.checkpoint_steps=20"]
        flags_ = [f"--set={setting}" for setting in [*shape, *settings]]
        _run("train", f"--store={folder / 'store'}", f"--config={CONFIGS / 'ranker.yaml'}", f"--out={model}", *flags_)
        _run("export", f"--model={model}", f"--store={folder / 'store'}", f"--out={base}")
    return base


def requests_of(store: Store, seed: int) -> list[tuple[str, StoreUser, np.ndarray]]:
    """Returns queries of the log, users with at least 50 events, and rows of 100 items that were shown, and others."""
    rng = np.random.default_rng(seed)
    file, users = store.requests()[0], store.users()
    busy = np.flatnonzero(np.diff(users["event.splits"]) >= HISTORY)
    busy = busy if len(busy) else np.argsort(np.diff(users["event.splits"]))[-20:]
    texts, splits = file["query_text.bytes"], file["query_text.splits"]
    found = []
    for row in rng.choice(len(file["request.query"]), _REQUESTS, replace=False).tolist():
        query = int(file["request.query"][row])
        shown = file["shown.item"][file["request.splits"][row] : file["request.splits"][row + 1]]
        items = np.concatenate([shown, rng.integers(store.counts.items, size=ITEMS)])[:ITEMS]
        user = StoreUser(int(users["id"][rng.choice(busy)]))
        found.append((texts[splits[query] : splits[query + 1]].tobytes().decode(), user, items))
    return found


def cpu_us(run: Callable[[int], Any], count: int, blocks: int) -> list[float]:
    """Returns the CPU time of a call in microseconds, for each of some blocks of `count` calls run(0), run(1), ..."""

    def seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    for number in range(count):
        run(number)
    samples = []
    for _ in range(blocks):
        # A block is long enough for the clock of CPU time, which ticks every few milliseconds.
        start = seconds()
        for number in range(4 * count):
            run(number % count)
        samples.append((seconds() - start) / (4 * count) * 1e6)
    return samples


def core(version: Path, inputs: list[dict[str, np.ndarray]]) -> Callable[[int], np.ndarray]:
    """Loads a servable into a session of one thread. Returns a function from the number of a request to its scores."""
    faiss_search.load()
    one = v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
    session = v1.Session(graph=tf.Graph(), config=one)
    with session.graph.as_default():
        loaded = v1.saved_model.load(session, [tf.saved_model.SERVING], str(version))
    signature = loaded.signature_def["rank"]
    names = sorted(signature.inputs)
    options = config_pb2.CallableOptions(
        feed=[signature.inputs[name].name for name in names], fetch=[signature.outputs["scores"].name]
    )
    # Ops run on the thread of the caller, so that no time is spent on handing over.
    options.run_options.inter_op_thread_pool = -1
    call = session._make_callable_from_options(options)  # type: ignore[attr-defined]
    fed = [[request[name] for name in names] for request in inputs]
    return lambda number: call(*fed[number])[0]


def trees(store: Store, requests: list[tuple[str, StoreUser, np.ndarray]], seed: int) -> Callable[[int], Any]:
    """Trains XGBoost on numbers of the log. Returns a function that scores the rows of a request."""
    features, rng = RankingFeatures(store), np.random.default_rng(seed)
    file = store.requests()[0]
    shown = features.of(file, rng.choice(len(file["request.query"]), 2000, replace=False))

    def matrix(of: Any) -> np.ndarray:
        return np.stack([*(of.numbers[name] for name in features.numbers), *of.codes.values()], 1).astype(np.float32)

    rows = matrix(shown)
    # Labels of chance keep all trees at their full depth.
    data = xgboost.QuantileDMatrix(rows, rng.random(len(rows)) < 0.3)
    parameters = {"objective": "binary:logistic", "tree_method": "hist", "max_depth": DEPTH, "eta": 0.1, "nthread": 1}
    model = xgboost.train(parameters, data, TREES)
    pairs = []
    for query, _, items in requests:
        zeros = np.zeros(len(items), np.int64)
        pairs.append(matrix(features.at_end([query], zeros, zeros, items)))
    return lambda number: model.inplace_predict(pairs[number])


def measure(result: report.Report, out: Path, seed: int, full: bool) -> None:
    """Adds the rows of this benchmark and the bar `rank_core_us_100_items`.

    Args:
        result: the report to add to.
        out: folder that keeps the shop and the models.
        seed: of the shop and of the requests.
        full: also measures rankers of other shapes.
    """
    folder = out / f"ranker-speed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    store = prepare(folder, seed)
    requests = requests_of(store, seed)
    lengths = [min(HISTORY, len(items)) for _, _, items in requests]
    workload = f"{ITEMS} items"
    blocks = 3 * _BLOCKS if full else _BLOCKS
    ids = store.items()["id"]
    for name, settings in VARIANTS.items():
        if name and not full:
            continue
        base = export(folder, name.replace(" ", "-").replace(",", ""), settings)
        servable = LoadedServable(base / "1")
        of_users = UserRequests(store, [n for n in servable.inputs["rank"] if n != "user_id"])
        inputs = []
        for query, user, items in requests:
            asked = {"query": query, "user_id": user.id, "item_ids": ids[items]} | of_users.of(user)
            for part in ("clicked_items", "clicked_item_types"):
                if part in asked:
                    asked[part] = asked[part][-HISTORY:]
            inputs.append(rank_inputs(servable, asked))
        if "clicked_items" in inputs[0]:
            lengths = [request["clicked_items"].shape[1] for request in inputs]
        expected = servable("rank", inputs[0])["scores"]
        servable.close()
        run = core(base / "1", inputs)
        np.testing.assert_allclose(run(0), expected, rtol=1e-4, atol=1e-4)
        note = f"layers 256-128-64, {np.mean(lengths):.0f} items of history{name}"
        result.add_samples(f"rank_core{name}", workload, "cpu", cpu_us(run, _REQUESTS, blocks), "us", note=note)
    result.bars["rank_core_us_100_items"] = result.value("rank_core", workload, "cpu")
    note = f"{TREES} trees, depth {DEPTH}; {len(RankingFeatures(store).numbers)} numbers are given"
    result.add_samples(
        "xgboost", workload, "cpu", cpu_us(trees(store, requests, seed), _REQUESTS, _BLOCKS), "us", note=note
    )
    _measure_server(result, folder / "servable", store, requests, workload)


def _measure_server(
    result: report.Report,
    base: Path,
    store: Store,
    requests: list[tuple[str, StoreUser, np.ndarray]],
    workload: str,
) -> None:
    manifest = json.loads((base / "1" / "assets.extra" / "dpsr_manifest.json").read_text())
    names = [name for name in manifest["inputs"]["rank"] if name != "user_id"]
    arguments = client_arguments(store, names)
    ids = store.items()["id"]
    calls = []
    for query, user, items in requests:
        about = arguments(user) if arguments else {}
        about = {name: value[-HISTORY:] if name.startswith("clicked") else value for name, value in about.items()}
        calls.append((query, ids[items].tolist(), User(**about), user.id))
    one = ["--tensorflow_intra_op_parallelism=1"]
    with start_model_server(base, "ranker", arguments=one) as server, SearchClient(server.target, "ranker") as client:
        for query, items, user, user_id in calls:
            client.rank(query, items, user=user, user_id=user_id)
        seconds, start = [], cpu_seconds_of(server.process.pid)
        for _ in range(10):
            for query, items, user, user_id in calls:
                begin = time.perf_counter()
                client.rank(query, items, user=user, user_id=user_id)
                seconds.append(time.perf_counter() - begin)
        used = (cpu_seconds_of(server.process.pid) - start) / len(seconds) * 1e6
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e6
    result.add("server", workload, "wall_p50", float(p50), "us", note="a Python client on this machine")
    result.add("server", workload, "wall_p99", float(p99), "us")
    result.add("server", workload, "cpu", used, "us", note="CPU time of the server")


def main(arguments: list[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    result = report.Report("ranker_speed", values.seed, report.hardware("numpy", "tensorflow-cpu", "xgboost-cpu"))
    folder = Path(values.out or tempfile.mkdtemp())
    try:
        measure(result, folder, values.seed, values.full)
    finally:
        if not values.out:
            shutil.rmtree(folder)
    result.print(values.json)


if __name__ == "__main__":
    flags.DEFINE_integer("seed", 1, "seed of the shop and of the requests")
    flags.DEFINE_string("out", None, "folder that keeps the shop and the models, and reads those that it has")
    flags.DEFINE_boolean("full", False, "also rankers of other shapes, and longer measurements")
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object on the last line")
    app.run(main)
