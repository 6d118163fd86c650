"""Parts that benchmarks of a large servable share: a generated shop, its index and servable, and load on it.

The load comes over gRPC, over gRPC through `dpsr proxy`, and over REST, all at the same time. Of four requests, one has
no filter, one asks for a range of prices that no other request has, one for a brand, and one for what is in stock in
one of two categories.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import report
import servers
from absl import flags
from quality import dpsr

import dpsr_export
import dpsr_tokenizer
from dpsr_common import serving_apis
from dpsr_serving.client import SearchClient
from dpsr_serving.search import Signature, make_request, make_search
from dpsr_tf.config import CONFIGS
from dpsr_tf.data.store import Store

QUICK_ITEMS = 3_000
SEED = 1
GRPC, PROXY, REST = WAYS = ("grpc", "proxy", "rest")
_QUERIES = 500
_RESULTS = 100
_TIMEOUT_S = 10.0


def prepare(folder: Path, items: int, seed: int) -> None:
    """Makes shop, store, model and index in `folder`, unless they are there.

    The model is trained for a few steps, since weights do not change the speed. The index is IVF with codes of 8 bits.
    """
    shop, store, model, index = (folder / name for name in ("shop", "store", "model", "index"))
    if not (store / "manifest.json").exists():
        sizes = [f"--items={items}", "--users=300", "--interactions=30000", "--set=judged_queries=20"]
        dpsr("generate", f"--out={shop}", f"--seed={seed}", *sizes)
        dpsr("ingest", f"--schema={shop / 'schema.yaml'}", f"--out={store}")
    few = ["--set=train.steps=20", "--set=train.checkpoint_steps=20", "--set=train.batch_size=64"]
    if not (model / "checkpoint").exists():
        lists = 2 ** max(2, round(np.log2(4 * items**0.5)))
        shape = [f"--set=index.factory=IVF{lists},SQ8", "--set=serving.k=300"]
        dpsr("train", f"--store={store}", f"--config={CONFIGS / 'shop.yaml'}", f"--out={model}", *few, *shape)
    if not (index / "index.json").exists():
        dpsr("index", f"--model={model}", f"--store={store}", f"--out={index}")


def servable(temporary: Path) -> Path:
    """Makes a shop and its servable, unless they are there. Returns the servable: the directory of its version 1.

    The flags say how many items it has, and where everything is kept (`prepare` says what).
    """
    values = flags.FLAGS
    items = QUICK_ITEMS if values.quick else values.items
    folder = Path(values.out or temporary) / f"shop-{items}-{SEED}"
    prepare(folder, items, SEED)
    made = folder / "servable"
    if not (made / "1").exists():
        dpsr("export", f"--model={folder / 'model'}", f"--index={folder / 'index'}", f"--out={made}")
    return made / "1"


def log_queries(store: Store, seed: int) -> list[str]:
    """Returns different queries of the log."""
    found = sorted(set(store.queries()))
    return random.Random(seed).sample(found, min(_QUERIES, len(found)))


class Front:
    """A model server on versions of `servable`, a proxy before it, and requests for both.

    Attributes:
        server, proxy: their processes.
    """

    def __init__(self, folder: Path, server: servers.Server, rest_port: int, proxy: servers.Server) -> None:
        self.server, self._rest_port, self.proxy = server, rest_port, proxy
        self._requests = folder / "requests"
        with SearchClient(server.target, servers.MODEL) as client:
            signature = client.signature()
        queries = log_queries(Store(folder / "store"), SEED)
        tensors = list(_tensors(signature, queries, folder / "shop" / "items.parquet"))
        spec = serving_apis.PredictRequest().model_spec
        spec.name = servers.MODEL
        servers.write_messages(self._requests, [make_request(spec, "search", arrays) for arrays in tensors])
        self._bodies = [json.dumps(_of_rest(arrays)) for arrays in tensors]

    def load(self, seconds: float, rate: float = 0.0, concurrency: int = 0) -> dict[str, dict[str, Any]]:
        """Sends requests in all ways at the same time.

        Args:
            seconds: time of the load.
            rate: requests a second of each of the two ways of gRPC (an open loop); REST has a tenth of them. Or 0.
            concurrency: unanswered requests of each of the two ways of gRPC (a closed loop); REST has one. Or 0.

        Returns:
            The result of the load generator for each way. That of REST has the same keys.
        """
        how = [f"--rate={rate}" if rate else f"--concurrency={concurrency}", f"--seconds={seconds}"]
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            running = {
                way: threads.submit(_load, target, self.server, self._requests, how)
                for way, target in ((GRPC, self.server.target), (PROXY, self.proxy.target))
            }
            running[REST] = threads.submit(self._load_rest, seconds, rate / 10)
            return {way: found.result() for way, found in running.items()}

    def _load_rest(self, seconds: float, rate: float) -> dict[str, Any]:
        begin = time.perf_counter()
        took: list[float] = []
        errors: dict[str, int] = {}
        connection = http.client.HTTPConnection("127.0.0.1", self._rest_port, timeout=_TIMEOUT_S)
        number = 0
        while (due := begin + number / rate if rate else time.perf_counter()) < begin + seconds:
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                connection.request("POST", f"/v1/models/{servers.MODEL}:predict", self._bodies[number % _QUERIES])
                with connection.getresponse() as answer:
                    body = answer.read()
                problem = "" if answer.status == 200 and b'"item_ids"' in body else f"{answer.status}: {body[:200]!r}"
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                problem = repr(error)
            number += 1
            if problem:
                errors[problem] = errors.get(problem, 0) + 1
            else:
                took.append(time.perf_counter() - due)
        connection.close()
        if not took:
            raise RuntimeError(f"no request over REST was answered: {errors}")
        quantiles = {"p50": 50, "p99": 99, "p99.9": 99.9, "max": 100}
        return {
            "succeeded": len(took),
            "failed": number - len(took),
            "unsent": 0,
            "errors": errors,
            "qps": number / (time.perf_counter() - begin),
            "latency_us": {name: float(np.percentile(took, at)) * 1e6 for name, at in quantiles.items()},
        }


@contextlib.contextmanager
def front(version: Path, base_path: Path, server_flags: Sequence[str]) -> Iterator[Front]:
    """Serves the versions below `base_path`, which are all like `version`, a result of `servable`."""
    libraries = ",".join(str(made.op_library_path()) for made in (dpsr_tokenizer, dpsr_export))
    with contextlib.ExitStack() as stack:
        rest_port = servers.free_port()
        flags = [f"--op_library={libraries}", f"--rest_api_port={rest_port}", *server_flags]
        server = stack.enter_context(servers.model_server(base_path, *flags))
        command = [sys.executable, "-m", "dpsr_common", "proxy", "--port=0", f"--backend={server.target}"]
        proxy = servers.Server(command, "proxy ready on ")
        stack.callback(proxy.stop)
        yield Front(version.parent.parent, server, rest_port, proxy)


def add_loads(result: report.Report, impl: str, loads: dict[str, dict[str, Any]]) -> int:
    """Adds the results of a load: a workload for each way. Returns how many requests failed or were sent too late."""
    failed = 0
    for way, found in loads.items():
        lost = found["failed"] + found["unsent"]
        result.add(impl, way, "requests", found["succeeded"], "requests")
        servers.add_load(result, impl, way, found, lost)
        failed += lost
    return failed


def _load(target: str, server: servers.Server, requests: Path, how: Sequence[str]) -> dict[str, Any]:
    (found,) = servers.load(server, requests, *how, "--warmup_seconds=0", f"--target={target}")
    # It is that of all ways together.
    found.pop("server_cpu_us", None)
    return found


def _tensors(signature: Signature, queries: Sequence[str], items: Path) -> Iterator[dict[str, Any]]:
    """Yields the inputs of `search` for _QUERIES requests."""
    columns = next(pq.ParquetFile(items).iter_batches(_QUERIES, columns=["brand", "category", "price", "in_stock"]))
    rows = columns.to_pylist()
    generator = random.Random(SEED)
    for number in range(_QUERIES):
        row, other = rows[number % len(rows)], generator.choice(rows)
        filters: dict[str, Any] = (
            {},
            {"price": (row["price"] * 0.5, row["price"] * 1.5)},
            {"brand": row["brand"]},
            {"category": sorted({row["category"], other["category"]}), "in_stock": "true"},
        )[number % 4]
        yield signature.tensors(make_search(queries[number % len(queries)], _RESULTS, filters=filters))


def _of_rest(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the body of a REST request with these inputs."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        return value.decode() if isinstance(value, bytes) else value

    return {"signature_name": "search", "inputs": {name: plain(array.tolist()) for name, array in arrays.items()}}
