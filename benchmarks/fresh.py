"""Measures changes of items that a model server applies while it answers: how soon they are seen, and what they cost.

    python benchmarks/fresh.py --json [--items=1000000] [--out=DIR] [--quick]

The shop is generated, its model is trained for a few steps, since weights do not change the speed, and the embeddings
are in an IVF index. The processes are those of a shop: `dpsr serve`; a writer of changes (benchmarks/fresh_writer.py);
`dpsr index --merge` and `dpsr export` for the next version. All run on this machine.

Of the changes 60 % put a new item, 10 % replace one of the index, 15 % update the price of one, and 15 % delete one
that is there. Titles of new items are halves of titles of the shop. Each put or updated item has a price of its own, so
that a search with a range of prices tells which items are there.

`visible`: time from the acknowledgement of a change by the writer to the first answer that shows it, asked for every
20 ms: one change after the other (`quiet`), and while 1,000 changes a second are written and queries run (`busy`).

`load`: an open loop of queries, without and with 1,000 changes a second, in turns. Both turns also have the searches of
`busy`.

`kills`: the writer is killed (SIGKILL) while it writes segments, and the server while changes arrive. `swap`: the
changes so far are merged into a new index, which becomes version 2 while changes arrive. After each of them, all prices
are asked for: `lost` counts the items that should be there and are not, `deleted_returned` those that should not. A
thread also looks at answers all the time: an item that was deleted two seconds before a request was sent counts there.

`recall`: of the server's answers after all changes, and of an index that is trained and built anew from the same items,
with the same search parameters. Both are compared with exact search.

Bars: visible_s_p99, deleted_returned, lost_after_kill, p99_ratio_1000_changes_per_s, and recall_over_rebuilt.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow loads

import grpc
import numpy as np
import pyarrow.parquet as pq
import report
import servers
from absl import app, flags
from quality import dpsr
from shop_load import QUICK_ITEMS, log_queries, prepare
from tensorflow_serving.apis import predict_pb2

from dpsr_export import ann
from dpsr_export.embeddings import ItemEmbeddings
from dpsr_export.item_changes import DELETE, DIRECTORY, PUT, UPDATE, Changes, ItemChangeLog
from dpsr_export.item_rows import ServableItems
from dpsr_serving.client import SearchClient, ServingError
from dpsr_serving.model_server import ModelServer, start_model_server
from dpsr_tf.data.store import Store

ITEMS = 1_000_000
# Changes of each second under load, and how many of them one segment has.
RATE, BATCH = 1000, 50
# The price of the item that change i puts or updates is PRICES + i: a price that no item of the shop has.
PRICES = 1_000_000
NEW_IDS = 1 << 40
_QUERIES = 500
_VISIBLE_S = 2.0
# Time between two searches for a change. Searches without a pause would be a load of their own.
_POLL_S = 0.02
# Time between two looks whether a change is acknowledged.
_ACKNOWLEDGED_S = 0.002
_PATIENCE_S = 60.0


class Source:
    """The changes of a benchmark, in the order in which they are written, and what is there after the first n.

    Attributes:
        kinds, ids: of each change.
        final: whether no later change is of the same item.
        before: the last put or update of the same item before each change, or -1.
        titles: of some items of the shop.
        path: a log with all changes, from which the writer copies.
    """

    def __init__(self, folder: Path, base: Path, count: int, seed: int):
        """Makes `count` changes of the items of the shop in `folder`, encoded for the servable in `base`."""
        chance = random.Random(seed)
        table = pq.read_table(folder / "shop" / "items.parquet").drop_columns(["sales"])
        picked = table.take(chance.sample(range(len(table)), min(len(table), count))).to_pylist()
        self.titles = {row["item_id"]: row["title"] for row in picked}
        old = [row["item_id"] for row in picked]
        there, kinds, ids = list(old), [], []
        place = {item: number for number, item in enumerate(there)}
        for number in range(count):
            draw = chance.random()
            if draw < 0.6 or len(there) < 2:
                kind, item = PUT, NEW_IDS + number
            else:
                item = chance.choice(old) if draw < 0.7 else chance.choice(there)
                kind = PUT if draw < 0.7 else UPDATE if draw < 0.85 else DELETE
            if kind == DELETE:
                last = there.pop()
                if last != item:
                    there[place[item]], place[last] = last, place[item]
                del place[item]
            elif item not in place:
                place[item] = len(there)
                there.append(item)
            kinds.append(kind)
            ids.append(item)
        self.kinds, self.ids = kinds, ids
        last: dict[int, int] = {}
        self.before: list[int] = []
        self.final = [False] * count
        for number, (kind, item) in enumerate(zip(kinds, ids, strict=True)):
            self.before.append(last.get(item, -1))
            last[item] = -1 if kind == DELETE else number
        for number in {item: number for number, item in enumerate(ids)}.values():
            self.final[number] = True
        self.path = folder / f"changes-{count}-{seed}"
        if not self.path.exists():
            self._write(ServableItems(base), picked, chance)

    def _write(self, items: ServableItems, picked: Sequence[dict[str, Any]], chance: random.Random) -> None:
        rows: dict[int, list[dict[str, Any]]] = {PUT: [], UPDATE: [], DELETE: []}
        for number, (kind, item) in enumerate(zip(self.kinds, self.ids, strict=True)):
            row: dict[str, Any] = {"item_id": item, "price": float(PRICES + number)}
            if kind == PUT:
                like, other = chance.choice(picked), chance.choice(picked)
                words, others = like["title"].split(), other["title"].split()
                row = like | row | {"title": " ".join(words[: (len(words) + 1) // 2] + others[len(others) // 2 :])}
            rows[kind].append(row)
        encoded = {}
        for kind, changes, rejects in (
            (PUT, *items.put_rows(rows[PUT])),
            (UPDATE, *items.update_rows(rows[UPDATE])),
            (DELETE, *items.delete_rows([row["item_id"] for row in rows[DELETE]])),
        ):
            if rejects:
                raise SystemExit(f"the writer refuses a row of the benchmark: {rejects[0]}")
            encoded[kind] = iter(changes.examples)
        examples = [next(encoded[kind]) for kind in self.kinds]
        made = Changes(np.array(self.kinds, np.uint8), np.array(self.ids, np.int64), examples)
        ItemChangeLog(self.path).append(made)

    def after(self, count: int) -> tuple[dict[int, int], set[int]]:
        """Returns what is there after `count` changes: item -> the change with its price; and the deleted items."""
        prices: dict[int, int] = {}
        deleted: set[int] = set()
        for number, (kind, item) in enumerate(zip(self.kinds[:count], self.ids[:count], strict=True)):
            if kind == DELETE:
                prices.pop(item, None)
                deleted.add(item)
            else:
                prices[item] = number
                deleted.discard(item)
        return prices, deleted


class Shop:
    """The servable, its server, and the writer."""

    def __init__(self, folder: Path, base: Path, source: Source):
        self.folder, self.base, self.source = folder, base, source
        self.acknowledged: list[float] = []  # by change
        self.server = start_model_server(base, servers.MODEL)
        self.client = SearchClient(self.server.target, servers.MODEL)
        self._writer: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def write(self, end: int, rate: float, batch: int) -> None:
        """Starts a writer of the changes up to `end`."""
        script = Path(__file__).with_name("fresh_writer.py")
        arguments = [self.source.path, self.base / DIRECTORY, end, rate, batch]
        command = [sys.executable, str(script), *map(str, arguments)]
        writer = self._writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        def read() -> None:
            assert writer.stdout is not None
            for line in writer.stdout:
                if not line.endswith("\n"):
                    return  # the writer was killed while it said so
                _, last, when = line.split()
                # A writer that was killed may have written changes that it did not tell of.
                told = int(last) - len(self.acknowledged)
                self.acknowledged += [float(when)] * told

        self._reader = threading.Thread(target=read)
        self._reader.start()

    def written(self, kill: bool = False) -> None:
        """Waits for the writer, or kills it."""
        assert self._writer is not None and self._reader is not None
        if kill:
            self._writer.kill()
        self._reader.join()
        if self._writer.wait() and not kill:
            raise SystemExit("the writer of changes has failed")

    def restart(self) -> float:
        """Kills the server and starts another one at the same address. Returns the seconds until that is ready."""
        self.server.process.kill()
        self.server.stop()
        start = time.perf_counter()
        self.server = start_model_server(self.base, servers.MODEL, self.server.port)
        return time.perf_counter() - start

    def at_price(self, low: int, high: int) -> set[int]:
        """Returns the items that a search for the prices of the changes [low, high) finds."""
        (found,) = self.client.search("shoes", 1000, filters={"price": (PRICES + low, PRICES + high - 1)})
        return set(found.item_ids.tolist())

    def applied(self) -> dict[str, float]:
        """Asks the server for the state of the changes; it applies what is new first."""
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = servers.MODEL, "apply_changes"
        with grpc.insecure_channel(self.server.target) as channel:
            call = channel.unary_unary(
                "/tensorflow.serving.PredictionService/Predict",
                predict_pb2.PredictRequest.SerializeToString,
                predict_pb2.PredictResponse.FromString,
            )
            answer = call(request, timeout=_PATIENCE_S)
        return {name: _scalar(tensor) for name, tensor in answer.outputs.items()}

    def await_applied(self) -> dict[str, float]:
        """Waits until the server has applied all acknowledged changes."""
        end = time.monotonic() + _PATIENCE_S
        while (state := self.applied())["offset"] < len(self.acknowledged):
            if time.monotonic() > end:
                raise SystemExit(f"the server does not apply all changes: {state}")
            time.sleep(0.02)
        return state

    def close(self) -> None:
        """Ends the processes."""
        if self._writer is not None and self._writer.poll() is None:
            self.written(kill=True)
        self.client.close()
        self.server.stop()


def _scalar(tensor: Any) -> float:
    import tensorflow as tf

    return float(tf.make_ndarray(tensor))


def verify(shop: Shop) -> tuple[int, int]:
    """Asks for all prices. Returns how many items are missing, and how many are found that should not be there."""
    shop.await_applied()
    count = len(shop.acknowledged)
    prices, deleted = shop.source.after(count)
    expected: dict[int, set[int]] = {}
    step = 500
    for item, number in prices.items():
        expected.setdefault(number // step, set()).add(item)
    missing = strange = 0
    for begin in range(0, count, step):
        found = shop.at_price(begin, min(begin + step, count))
        right = expected.get(begin // step, set())
        missing += len(right - found)
        strange += len(found - right)
    # Deleted items of the shop, by their titles.
    known = [item for item in deleted if item in shop.source.titles][:_QUERIES]
    for begin in range(0, len(known), 50):
        some = known[begin : begin + 50]
        for result in shop.client.search([shop.source.titles[item] for item in some], 100):
            strange += len(deleted & set(result.item_ids.tolist()))
    return missing, strange


class Watch:
    """A thread that looks for deleted items in answers all the time."""

    def __init__(self, shop: Shop):
        self.answers = self.returned = 0
        self._shop, self._stop, self._chance = shop, threading.Event(), random.Random(1)
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        source, number = self._shop.source, 0
        gone: set[int] = set()  # items that were deleted long enough ago, and do not come back
        titles: list[str] = []
        while not self._stop.wait(0.1):
            old = time.time() - _VISIBLE_S
            acknowledged = self._shop.acknowledged
            while number < len(acknowledged) and acknowledged[number] < old:
                item = source.ids[number]
                if source.kinds[number] == DELETE and source.final[number]:
                    gone.add(item)
                    titles += [source.titles[item]] if item in source.titles else []
                number += 1
            if not titles:
                continue
            try:
                results = self._shop.client.search(self._chance.choices(titles, k=4), 100)
            except ServingError:
                continue  # the server has just been killed
            self.answers += len(results)
            self.returned += sum(len(gone & set(result.item_ids.tolist())) for result in results)


def visible(shop: Shop, number: int) -> float:
    """Waits until answers show a change. Returns the seconds since it was acknowledged."""
    source = shop.source
    item, kind, before = source.ids[number], source.kinds[number], source.before[number]
    end = time.monotonic() + _PATIENCE_S
    while len(shop.acknowledged) <= number:
        time.sleep(_ACKNOWLEDGED_S)
    while True:
        place = before if kind == DELETE else number
        if (item in shop.at_price(place, place + 1)) == (kind != DELETE):
            return time.time() - shop.acknowledged[number]
        if time.monotonic() > end:
            raise SystemExit(f"change {number} of item {item} is not visible after {_PATIENCE_S:g} s")
        time.sleep(_POLL_S)


def probes(source: Source, begin: int, end: int) -> list[int]:
    """Returns the changes in a range that a search for a price can tell from later ones."""
    return [
        number
        for number in range(begin, end)
        if source.final[number] and (source.kinds[number] != DELETE or source.before[number] >= 0)
    ]


def quiet(shop: Shop, count: int) -> list[float]:
    """Writes changes one after the other. Returns the seconds until each is visible."""
    found, number = [], len(shop.acknowledged)
    while len(found) < count:
        shop.write(number + count, 20, 1)
        for probe in probes(shop.source, number, number + count):
            found.append(visible(shop, probe))
        shop.written()
        number += count
    return found


def busy(shop: Shop, count: int) -> list[float]:
    """Writes changes at RATE. Returns the seconds until each of some of them is visible."""
    begin = len(shop.acknowledged)
    found: list[float] = []
    shop.write(begin + count, RATE, BATCH)
    for probe in probes(shop.source, begin, begin + count):
        # The next change that is not written yet, a few times a second.
        if probe >= len(shop.acknowledged) + RATE // 5 or (not found and probe > begin):
            found.append(visible(shop, probe))
    shop.written()
    return found


def unchanging(shop: Shop, seconds: float) -> None:
    """Searches as often as `busy` does, for a change that answers show already."""
    source = shop.source
    number = next(n for n in probes(source, 0, len(shop.acknowledged)) if source.kinds[n] != DELETE)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        # As long as `busy` waits for the next change, and as often as it searches for it.
        wait = time.monotonic() + 0.2
        while time.monotonic() < wait:
            time.sleep(_ACKNOWLEDGED_S)
        for _ in range(5):
            if source.ids[number] not in shop.at_price(number, number + 1):
                raise SystemExit(f"change {number} of item {source.ids[number]} is no longer visible")
            time.sleep(_POLL_S)


def load(result: report.Report, shop: Shop, workload: str, turns: int, seconds: float) -> list[float]:
    """Measures queries with and without changes, in turns. Returns how long changes took to be visible."""
    requests = shop.folder / "requests"
    (closed,) = _load(shop, requests, "--concurrency=4", seconds / 2)
    rate = max(10.0, round(closed["qps"] / 5))
    result.add("server", workload, "closed_loop", closed["qps"], "1/s")
    p99: dict[str, list[float]] = {"steady": [], "changing": []}
    cpu: dict[str, list[float]] = {"steady": [], "changing": []}
    seen: list[float] = []
    failed = 0
    for turn in range(turns):
        for name in list(p99)[:: 1 if turn % 2 else -1]:
            with concurrent.futures.ThreadPoolExecutor(1) as threads:
                running = threads.submit(_load, shop, requests, f"--rate={rate}", seconds)
                if name == "changing":
                    seen += busy(shop, round(RATE * (seconds + seconds / 4)))
                else:
                    unchanging(shop, seconds)
                (found,) = running.result()
            shop.await_applied()
            p99[name].append(found["latency_us"]["p99"] / 1000)
            cpu[name].append(found["server_cpu_us"] * found["qps"] / 1e6)
            failed += found["failed"]
    for name, samples in p99.items():
        result.add_samples(name, workload, "p99", samples, "ms", rate=rate)
        result.add_samples(name, workload, "server_cores", cpu[name], "cores", rate=rate)
    ratios = [b / a for a, b in zip(p99["steady"], p99["changing"], strict=True)]
    result.add_samples("changing_over_steady", workload, "p99", ratios, "ratio")
    result.add("server", workload, "failed", failed, "requests")
    return seen


def _load(shop: Shop, requests: Path, how: str, seconds: float) -> list[dict[str, Any]]:
    server: Any = shop.server  # it has the attributes of servers.Server that count
    return servers.load(server, requests, how, f"--seconds={seconds}", f"--warmup_seconds={seconds / 4}")


def kills(result: report.Report, shop: Shop, workload: str, rounds: int, count: int) -> tuple[int, int]:
    """Kills the writer in the middle of segments, and the server while changes arrive. Returns what verify does."""
    log, unfinished = ItemChangeLog(shop.base / DIRECTORY), 0
    for _ in range(rounds):
        begin = len(shop.acknowledged)
        shop.write(begin + count, 0, count // 4)
        while len(shop.acknowledged) < begin + count // 4:
            time.sleep(0.0001)
        end = time.monotonic() + 1
        while not list(log.path.glob("*.tmp.*")) and time.monotonic() < end:
            pass
        shop.written(kill=True)
        unfinished += len(list(log.path.glob("*.tmp.*")))
        if log.end() < len(shop.acknowledged):
            return len(shop.acknowledged) - log.end(), 0
        # What the writer could not tell of any more is in the log as well.
        shop.acknowledged += [time.time()] * (log.end() - len(shop.acknowledged))
    starts = []
    for _ in range(2):
        begin = len(shop.acknowledged)
        shop.write(begin + count, RATE, BATCH)
        time.sleep(count / RATE / 2)
        starts.append(shop.restart())
        shop.written()
    result.add_samples(
        "server", workload, "restart", starts, "s", note=f"{len(shop.acknowledged):,} changes in the log"
    )
    result.add("writer", workload, "unfinished_segments", unfinished, "files", rounds=rounds)
    return verify(shop)


def merged(result: report.Report, shop: Shop, workload: str) -> Path:
    """Merges all changes into a new index. Returns its directory."""
    out = shop.folder / "merged"
    start = time.perf_counter()
    dpsr(
        "index", "--merge", "--overwrite", f"--index={shop.folder / 'index'}", f"--servable={shop.base}", f"--out={out}"
    )
    result.add("merge", workload, "wall", time.perf_counter() - start, "s", changes=len(shop.acknowledged))
    return out


def recall(result: report.Report, shop: Shop, workload: str, index: Path, queries: Sequence[str]) -> float:
    """Compares the server's answers and those of an index that is built anew with exact search. Returns the ratio."""
    manifest = json.loads((index / "index.json").read_text())
    items = ItemEmbeddings(index / "item_embeddings.dpsr", manifest["embedding_dim"])
    vectors, k = items.vectors, 100
    embedded = _embedded(shop, queries)
    exact = ann.Exact(vectors, embedded, [k])
    floors = exact._floors[k]
    right = 0
    for begin in range(0, len(queries), 50):
        for place, found in enumerate(shop.client.search(list(queries[begin : begin + 50]), k), begin):
            rows = np.searchsorted(items.ids, found.item_ids)
            right += int((vectors[rows] @ embedded[place] >= floors[place] - 1e-6).sum())
    online = right / (k * len(queries))
    rebuilt_index = ann.build(vectors, manifest["factory"])
    ann.set_parameters(rebuilt_index, manifest["parameters"])
    rebuilt = exact.ann_recall(rebuilt_index, k)
    result.add("server", workload, f"ann_recall@{k}", online, "")
    result.add(
        "rebuilt", workload, f"ann_recall@{k}", rebuilt, "", note=f"{manifest['factory']}, {manifest['parameters']}"
    )
    return online / rebuilt


def _embedded(shop: Shop, queries: Sequence[str]) -> np.ndarray:
    import tensorflow as tf

    request = servers.request(queries, "query_embedding")
    with grpc.insecure_channel(shop.server.target) as channel:
        call = channel.unary_unary(
            "/tensorflow.serving.PredictionService/Predict",
            predict_pb2.PredictRequest.SerializeToString,
            predict_pb2.PredictResponse.FromString,
        )
        found = tf.make_ndarray(call(request, timeout=_PATIENCE_S).outputs["query_embedding"])
    return np.ascontiguousarray(found[:, 0])


def swap(result: report.Report, shop: Shop, workload: str, index: Path, count: int) -> tuple[int, int]:
    """Publishes version 2 while changes arrive. Returns what verify does."""
    begin = len(shop.acknowledged)
    shop.write(begin + count, RATE / 5, BATCH)
    start = time.perf_counter()
    dpsr("export", "--index_only", f"--index={index}", f"--out={shop.base}")
    result.add("export", workload, "wall", time.perf_counter() - start, "s")
    end = time.monotonic() + _PATIENCE_S
    while shop.client.search("shoes", 1)[0].version != 2:
        if time.monotonic() > end:
            raise SystemExit("the server does not load version 2")
        time.sleep(0.05)
    shop.written()
    return verify(shop)


def measure(result: report.Report, folder: Path, seed: int, full: bool, quick: bool) -> None:
    """Runs all parts on the shop, store, model and index in `folder`, and fills rows and bars."""
    store = Store(folder / "store")
    bulk, probed, turns, seconds, killed = (40_000, 200, 27 if full else 9, 4.0, 3000)
    if quick:
        bulk, probed, turns, seconds, killed = (500, 10, 1, 1.0, 200)
    workload = f"{store.counts.items:,} items"
    queries = log_queries(store, seed)
    servers.write_requests(folder / "requests", queries)
    with tempfile.TemporaryDirectory(prefix="served-", dir=folder) as served:
        base = Path(served) / "dpsr"
        dpsr("export", f"--model={folder / 'model'}", f"--index={folder / 'index'}", f"--out={base}")
        count = bulk + 8 * probed + round(turns * RATE * seconds * 1.25) + 10 * killed
        source = Source(folder, base, count, seed)
        with contextlib.closing(Shop(folder, base, source)) as shop:
            result.add("server", workload, "rss_before", rss_mib(shop.server), "MiB")
            begin = time.perf_counter()
            shop.write(bulk, 0, 1000)
            shop.written()
            result.add("writer", workload, "rate", bulk / (time.perf_counter() - begin), "changes/s")
            shop.await_applied()
            result.add("server", workload, "rate", bulk / (time.perf_counter() - begin), "changes/s")
            watch = Watch(shop)
            try:
                seen = {"quiet": quiet(shop, probed), "busy": load(result, shop, workload, turns, seconds)}
                lost, strange = kills(result, shop, workload, 2 if quick else 5, killed)
                state = shop.applied()
                index = merged(result, shop, workload)
                over_rebuilt = recall(result, shop, workload, index, queries)
                lost_in_swap, strange_in_swap = swap(result, shop, workload, index, killed)
            finally:
                watch.stop()
            for name, samples in seen.items():
                for quantile in (50, 99):
                    value = float(np.percentile(samples, quantile))
                    result.add(name, workload, f"visible_p{quantile}", value, "s", samples=len(samples))
            result.add("server", workload, "rss_after", rss_mib(shop.server), "MiB")
            for name, value in state.items():
                result.add("state", workload, name, value, "")
            result.add("watch", workload, "answers", watch.answers, "answers", returned=watch.returned)
    result.bars = {
        "visible_s_p99": float(np.percentile([*seen["quiet"], *seen["busy"]], 99)),
        "deleted_returned": watch.returned + strange + strange_in_swap,
        "lost_after_kill": lost + lost_in_swap,
        "p99_ratio_1000_changes_per_s": result.value("changing_over_steady", workload, "p99"),
        "recall_over_rebuilt": over_rebuilt,
    }


def rss_mib(server: ModelServer) -> float:
    """Returns the resident memory of a server, in MiB."""
    fields = Path(f"/proc/{server.process.pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) / 1024


def _define_flags() -> None:
    flags.DEFINE_string("out", None, "folder that keeps the shop and the models; a temporary one if left out")
    flags.DEFINE_integer("items", ITEMS, "number of items", 1000)
    flags.DEFINE_integer("seed", 1, "seed of the shop and of the changes")
    flags.DEFINE_boolean("full", False, "measures more often")
    flags.DEFINE_boolean("json", False, "prints one JSON object as the last line")
    flags.DEFINE_boolean("quick", False, "only tests the script, with 3,000 items and few changes")


def main(_: list[str]) -> None:
    """Runs the benchmark and prints the results."""
    values = flags.FLAGS
    result = report.Report("fresh", values.seed, report.hardware("dpsr", "faiss-cpu", "tensorflow", "grpcio"))
    items = QUICK_ITEMS if values.quick else values.items
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(values.out or temporary) / f"fresh-{items}-{values.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, items, values.seed)
        measure(result, folder, values.seed, values.full, values.quick)
    result.print(values.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
