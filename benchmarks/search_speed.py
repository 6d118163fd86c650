"""Measures the search gateway with all stages on a million items: latency, CPU time, and failures of each stage.

    python benchmarks/search_speed.py --out=DIR --json [--items=1000000] [--quick]

benchmarks/search.py runs this as its second part. The shop is generated, its models are trained for a few steps, since
weights do not change their speed, and the embeddings are in an IVF index. All processes run on this machine: the
gateway, a model server each for retrieval, ranker and rewriter, and the load generator. The pipeline has all stages:

    rewrites (3), inverted index (300 items), inverted index with the rewrites (300), semantic (300),
    reciprocal ranks (300 stay), ranker (the first 100, with what the user clicked), diversity of brands and shops (50)

Rewrites come from a small servable that leaves out words, in the place of a rewriter, whose own time
benchmarks/rewriting.py measures. Queries are those of the log. Of all requests, half come from a user with features and
20 clicked items; every fourth asks for facets.

`closed`: as many requests as the gateway answers with 8 under way at any time. `open`: requests at random times, at
half that rate; latencies count from when a request was due. `core`: requests for a second of CPU time of gateway and
model servers together. `gateway`: CPU time of the gateway for one request, less that of the index in its threads.

`stages`: latency and CPU time of a request with each stage added to the last: the inverted index, the model beside it,
rewrites, the ranker, and diversity. The load is the same for all, a quarter of what the gateway answers with all.

`failures`: at a quarter of the rate, each of the model servers is stopped (SIGSTOP), continued, killed, and started
again. `failed` counts requests without an answer of status 200, and those that needed a stage that was well.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow loads

import numpy as np
import report
from absl import app, flags
from search_load import CONCURRENCY, Load
from servers import Server, cpu_seconds_of

from dpsr_common.command_line import main as dpsr
from dpsr_serving.model_server import ModelServer, start_model_server
from dpsr_tf.config import CONFIGS
from dpsr_tf.data.store import Store

ITEMS = 1_000_000
_QUERIES, _HISTORY = 500, 20
_MODELS = ("dpsr", "ranker", "rewriter")
_STAGES = {"dpsr": "recall.semantic", "ranker": "fine", "rewriter": "rewrite"}

_WORDS = {"recall": {"inverted": {"k": 300}}, "coarse": {"size": 300}}
_MODELS_TOO = _WORDS | {"recall": {"inverted": {"k": 300}, "semantic": {"model": "dpsr", "k": 300}}}
_REWRITES = {"rewrite": {"model": "rewriter", "n": 3}, "recall": {**_MODELS_TOO["recall"], "rewritten": {"k": 300}}}
_RANKER = {"fine": {"model": "ranker", "size": 100}}
_DIVERSITY = {"rerank": {"diversity": {"attributes": ["brand", "shop"]}}}
# Pipelines with each stage added to the last.
STAGES: dict[str, dict[str, Any]] = {
    "words": _WORDS,
    "model": _MODELS_TOO,
    "rewrites": _MODELS_TOO | _REWRITES,
    "ranker": _MODELS_TOO | _REWRITES | _RANKER,
    "diversity": _MODELS_TOO | _REWRITES | _RANKER | _DIVERSITY,
}

CONFIG = """
index: {index}
models:
  dpsr: {{target: "{dpsr}"}}
  ranker: {{target: "{ranker}"}}
  rewriter: {{target: "{rewriter}"}}
pipelines:
  full:
    rewrite: {{model: rewriter, n: 3, deadline_ms: 50}}
    recall:
      inverted: {{k: 300, deadline_ms: 50}}
      rewritten: {{k: 300, deadline_ms: 50}}
      semantic: {{model: dpsr, k: 300, deadline_ms: 50}}
    coarse: {{size: 300}}
    fine: {{model: ranker, size: 100, deadline_ms: 50}}
    rerank: {{diversity: {{attributes: [brand, shop]}}}}
{stages}
default: full
"""


def _run(*arguments: str) -> None:
    if dpsr(list(arguments)):
        raise SystemExit(f"dpsr {' '.join(arguments)} has failed")


def prepare(folder: Path, items: int, seed: int) -> Store:
    """Makes shop, store, indexes and servables in `folder`, unless they are there."""
    store, model, ranker = folder / "store", folder / "model", folder / "model-ranker"
    if not (store / "manifest.json").exists():
        sizes = [f"--items={items}", "--users=300", "--interactions=30000", "--set=judged_queries=20"]
        _run("generate", f"--out={folder / 'shop'}", f"--seed={seed}", *sizes)
        _run("ingest", f"--schema={folder / 'shop' / 'schema.ranking.yaml'}", f"--out={store}")
    if not (folder / "inverted" / "inverted.json").exists():
        _run("index", "--inverted", f"--store={store}", f"--out={folder / 'inverted'}")
    few = ["--set=train.steps=20", "--set=train.checkpoint_steps=20"]
    if not (folder / "dpsr" / "1").exists():
        lists = 2 ** max(2, round(np.log2(4 * items**0.5)))
        shape = ["--set=train.batch_size=64", f"--set=index.factory=IVF{lists},SQ8", "--set=serving.k=300"]
        _run("train", f"--store={store}", f"--config={CONFIGS / 'shop.yaml'}", f"--out={model}", *few, *shape)
        _run("index", f"--model={model}", f"--store={store}", f"--out={folder / 'index'}")
        _run("export", f"--model={model}", f"--index={folder / 'index'}", f"--out={folder / 'dpsr'}")
    if not (folder / "ranker" / "1").exists():
        _run("train", f"--store={store}", f"--config={CONFIGS / 'ranker.yaml'}", f"--out={ranker}", *few)
        _run("export", f"--model={ranker}", f"--store={store}", f"--out={folder / 'ranker'}")
    if not (folder / "rewriter" / "1").exists():
        write_rewriter(folder / "rewriter" / "1")
    return Store(store)


def write_rewriter(version: Path) -> None:
    """Writes a servable with a rewriter's signature. Rewrites of a query lack its first word, its last, or both."""
    import tensorflow as tf

    class Rewriter(tf.Module):
        @tf.function(
            input_signature=[
                tf.TensorSpec([None], tf.string, "query"),
                tf.TensorSpec([], tf.int32, "n"),
                tf.TensorSpec([], tf.int64, "seed"),
            ]
        )
        def rewrite(self, query: tf.Tensor, n: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
            first, last = "^[^ ]+ ", " [^ ]+$"
            replaced = [tf.strings.regex_replace(query, pattern, "") for pattern in (first, last)]
            both = tf.strings.regex_replace(replaced[0], last, "")
            rewrites = tf.stack([*replaced, both], axis=1)[:, :n]
            zero = tf.cast(seed - seed, tf.float32)
            return {"rewrites": rewrites, "log_probabilities": tf.zeros(tf.shape(rewrites)) + zero}

    module = Rewriter()
    tf.saved_model.save(module, str(version), signatures={"rewrite": module.rewrite, "serving_default": module.rewrite})


def bodies(store: Store, seed: int) -> list[bytes]:
    """Returns encoded requests."""
    rng = np.random.default_rng(seed)
    file, ids = store.requests()[0], store.items()["id"]
    texts, splits = file["query_text.bytes"], file["query_text.splits"]
    asked = np.unique(file["request.query"])
    found = []
    for number, query in enumerate(rng.choice(asked, _QUERIES, replace=len(asked) < _QUERIES).tolist()):
        text = texts[splits[query] : splits[query + 1]].tobytes().decode("utf-8", "replace")
        request: dict[str, Any] = {"query": text, "size": 20}
        if number % 2:
            clicked = rng.choice(ids, _HISTORY).tolist()
            features = {"gender": "f", "city": "x", "age": 30 + number % 20}
            request["user"] = {"id": number, "features": features, "clicked_items": clicked}
        if number % 4 == 0:
            request["facets"] = ["brand", "price"]
        found.append(json.dumps(request, ensure_ascii=False).encode())
    return found


class Setup:
    """The processes of one measurement."""

    def __init__(self, folder: Path, requests: Sequence[bytes]) -> None:
        self._folder = folder
        self._requests = [json.loads(body) for body in requests]
        self.models = {name: self._start(name) for name in _MODELS}
        config = folder / "search.yaml"
        targets = {name: server.target for name, server in self.models.items()}
        # JSON is YAML.
        stages = "\n".join(f"  {name}: {json.dumps(pipeline)}" for name, pipeline in STAGES.items())
        config.write_text(CONFIG.format(index=folder / "inverted", stages=stages, **targets))
        command = [sys.executable, "-m", "dpsr_common", "search", f"--config={config}", "--port=0"]
        self.gateway = Server(command, "search ready on http://")

    def _start(self, name: str, port: int = 0) -> ModelServer:
        return start_model_server(self._folder / name, name, port)

    def restart(self, name: str) -> None:
        """Starts the server of a model again, at the same address."""
        self.models[name].stop()
        self.models[name] = self._start(name, self.models[name].port)

    def start_load(self, seconds: float, rate: float, seed: int, pipeline: str = "full") -> subprocess.Popen[str]:
        """Starts the load generator."""
        script = str(Path(__file__).with_name("search_load.py"))
        file = self._folder / f"requests.{pipeline}.json"
        asked = [json.dumps({**request, "pipeline": pipeline}, ensure_ascii=False) for request in self._requests]
        file.write_text(json.dumps(asked))
        command = [sys.executable, script, self.gateway.target, str(file), str(seconds), str(rate), str(seed)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def load(self, seconds: float, rate: float, seed: int, pipeline: str = "full") -> Load:
        """Puts load on the gateway and returns what the load generator saw."""
        return finish(self.start_load(seconds, rate, seed, pipeline))

    def cpu_seconds(self) -> tuple[float, float, float]:
        """Returns the CPU time of the gateway, of its inverted index, and of the model servers."""
        import urllib.request

        with urllib.request.urlopen(f"http://{self.gateway.target}/metrics") as answer:
            text = answer.read().decode()
        found = [line for line in text.splitlines() if line.startswith("dpsr_search_index_cpu_seconds_total{")]
        index = float(found[0].rpartition(" ")[2]) if found else 0.0
        servers = sum(cpu_seconds_of(server.process.pid) for server in self.models.values())
        return self.gateway.cpu_seconds(), index, servers

    def stop(self) -> None:
        """Ends all processes."""
        self.gateway.stop()
        for server in self.models.values():
            server.process.send_signal(signal.SIGCONT)
            server.stop()


def finish(process: subprocess.Popen[str]) -> Load:
    """Waits for the load generator."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit("the load generator has failed")
    return Load(**json.loads(output))


def failures(setup: Setup, rate: float, seconds: float, seed: int) -> tuple[int, int, dict[str, int]]:
    """Stops, kills and restarts the server of each model under load.

    Returns:
        Number of requests, number of failed ones, and stage -> number of answers without it.
    """
    requests = failed = 0
    degraded: dict[str, int] = {}
    for name, stage in _STAGES.items():
        done: list[Load] = []
        actions: list[Callable[[], None]] = [
            lambda name=name: setup.models[name].process.send_signal(signal.SIGSTOP),
            lambda name=name: setup.models[name].process.send_signal(signal.SIGCONT),
            lambda name=name: setup.models[name].process.kill(),
            lambda name=name: setup.restart(name),
        ]
        for act in actions:
            process = setup.start_load(seconds, rate, seed)
            time.sleep(seconds / 3)
            act()
            done.append(finish(process))
            seed += 1
        found = [load.degraded.get(stage, 0) for load in done]
        print(f"{stage}: left out in {found} of {[len(load.latencies) for load in done]} answers")
        if not (found[0] and found[2]):
            raise SystemExit(f"the failures of {name} did not reach the stage {stage}")
        requests += sum(len(load.latencies) for load in done)
        failed += sum(load.failed for load in done)
        degraded[stage] = sum(found)
    return requests, failed, degraded


def stages(result: report.Report, setup: Setup, workload: str, rate: float, seconds: float, seed: int) -> int:
    """Adds latency and CPU time of a request with each stage added to the last. Returns the number of failed ones."""
    failed = 0
    for name in STAGES:
        setup.load(seconds / 8, rate, seed, name)  # warms up
        before = setup.cpu_seconds()
        found = setup.load(seconds, rate, seed, name)
        spent = dict(zip(("gateway", "inverted index", "model servers"), setup.cpu_seconds(), strict=True))
        count = len(found.latencies)
        for part, start in zip(spent, before, strict=True):
            spent[part] = (spent[part] - start) / count * 1e6
        spent["gateway"] -= spent["inverted index"]
        for quantile in (50, 99):
            value = float(np.percentile(found.latencies, quantile)) * 1000
            result.add(name, f"stages, {workload}", f"p{quantile}", value, "ms", note=f"{rate:.0f} requests/s")
        result.add(name, f"stages, {workload}", "cpu", sum(spent.values()), "us")
        for part, value in spent.items():
            result.add(name, f"stages, {workload}", f"cpu of {part}", value, "us")
        failed += found.failed
    return failed


def measure(result: report.Report, out: Path, seed: int, full: bool, items: int = ITEMS, seconds: float = 8.0) -> None:
    """Adds the rows of this benchmark and the bars p50_ms, p99_ms, requests_per_core_second, gateway_cpu_us, failed.

    Args:
        result: the report to add to.
        out: folder that keeps the shop and the models.
        seed: of the shop and of the requests.
        full: measures longer.
        items: number of items.
        seconds: length of each measurement.
    """
    folder = out / f"search-speed-{items}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    store = prepare(folder, items, seed)
    seconds = 4 * seconds if full else seconds
    setup = Setup(folder, bodies(store, seed))
    workload = f"{items:,} items"
    try:
        setup.load(seconds / 4, 0, seed)  # warms up
        closed = setup.load(seconds, 0, seed)
        rate = len(closed.latencies) / closed.seconds
        result.add("closed", workload, "rate", rate, "requests/s", concurrency=CONCURRENCY, failed=closed.failed)
        before = setup.cpu_seconds()
        opened = setup.load(2 * seconds, rate / 2, seed)
        gateway, index, servers = (b - a for a, b in zip(before, setup.cpu_seconds(), strict=True))
        count = len(opened.latencies)
        p50, p99 = (float(value) * 1000 for value in np.percentile(opened.latencies, [50, 99]))
        note = f"{rate / 2:.0f} requests/s"
        left_out = {stage: share / count for stage, share in opened.degraded.items()}
        for name, value in (("p50", p50), ("p99", p99)):
            result.add("open", workload, name, value, "ms", note=note, left_out=left_out)
        core = count / (gateway + servers)
        result.add("core", workload, "rate", core, "requests/s", note="CPU time of gateway and model servers")
        gateway_us = (gateway - index) / count * 1e6
        result.add("gateway", workload, "cpu", gateway_us, "us", note="without the inverted index")
        result.add("inverted_index", workload, "cpu", index / count * 1e6, "us")
        result.add("model_servers", workload, "cpu", servers / count * 1e6, "us")
        result.add("gateway", workload, "memory", setup.gateway.rss_mib(), "MiB")
        requests, failed, degraded = failures(setup, rate / 4, seconds / 3, seed)
        failed += closed.failed + opened.failed + stages(result, setup, workload, rate / 4, seconds, seed)
        requests += len(closed.latencies) + count
        result.add("failures", workload, "failed", failed, "requests", requests=requests, left_out=degraded)
    finally:
        setup.stop()
    result.bars.update(
        p50_ms=p50, p99_ms=p99, requests_per_core_second=core, gateway_cpu_us=gateway_us, failed=float(failed)
    )


def _define_flags() -> None:
    flags.DEFINE_string("out", None, "folder that keeps the shop and the models; a temporary one if left out")
    flags.DEFINE_integer("items", ITEMS, "number of items", 1000)
    flags.DEFINE_integer("seed", 1, "seed of the shop and of the requests")
    flags.DEFINE_boolean("full", False, "measures longer")
    flags.DEFINE_boolean("json", False, "prints one JSON object as the last line")
    flags.DEFINE_boolean("quick", False, "only tests the script, with 3,000 items and short measurements")


def main(_: list[str]) -> None:
    """Runs the benchmark and prints the results."""
    values = flags.FLAGS
    result = report.Report("search_speed", values.seed, report.hardware("dpsr", "tantivy", "aiohttp", "numpy"))
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(values.out or temporary)
        if values.quick:
            measure(result, out, values.seed, False, items=3000, seconds=1.5)
        else:
            measure(result, out, values.seed, values.full, items=values.items)
    result.print(values.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
