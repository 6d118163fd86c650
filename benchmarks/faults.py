"""Measures what clients see when model servers behind the proxy fail: failed requests and latency, for each fault.

    python benchmarks/faults.py --json [--seconds=S] [--faults=kill,hang] [--quick]

Two model servers hold the same model, whose answers are 12 KB. Clients send requests through the proxy, 8 under way all
the time, with a deadline of 10 s. The fault begins after a third of the time and ends after two thirds:

    kill     one server is killed (SIGKILL) and started again
    hang     one server is stopped (SIGSTOP) and continued; its calls wait until the proxy's checks notice
    end      one server is asked to end (SIGTERM) and started again
    reload   the proxy's configuration changes all the time: one server, the other, both
    rollout  the servers load version 2 and unload version 1, one after the other; the proxy follows (`discover`)
    gray     one server answers health checks, but hangs on requests; later it takes a second for each
    none     no fault, for comparison

And two that are measured in another way:

    shard_rollout  two shards load version 2, one after the other, and keep version 1 for a while. Each answer is looked
                   at: its items must come from one version (`mixed_versions`) and from both shards.
    hedge          one server takes 0.1 s more for every 20th of its requests, at 100 requests a second. Turns without
                   and with second calls (`hedge: {budget: 0.1}`) alternate; the bar compares the medians of their p99.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import report
import servers

from dpsr_common import serving_apis
from dpsr_serving.tensors import to_numpy

CONCURRENCY = 8
HEDGE_RATE = 100  # requests per second
TURNS = 3  # with and without second calls
SHARDS = 2
SHARD_RESULTS = 100


class Shop:
    """Two model servers and a proxy in front of them. With `gray`, each is behind a server that misbehaves as told."""

    def __init__(self, folder: Path, discover: bool = False, gray: bool = False, settings: str = "") -> None:
        self.bases = [folder / "a", folder / "b"]
        self._model, self._config, self._discover = folder / "model", folder / "proxy.yaml", discover
        self._settings = settings
        for base in self.bases:
            shutil.rmtree(base, ignore_errors=True)
            self.publish(base, 1)
        self.servers = [self._serve(base) for base in self.bases]
        self.modes = [folder / f"mode{index}" for index in range(2)]
        self.front = self.servers
        if gray:
            self.front = []
            for server, mode in zip(self.servers, self.modes, strict=True):
                put(mode, "ok")
                command = [sys.executable, str(Path(__file__).with_name("gray_server.py")), server.target, str(mode)]
                self.front.append(servers.Server(command, "gray server on "))
        self.configure(0, 1)
        command = [sys.executable, "-m", "dpsr_common", "proxy", "--port=0", f"--config={self._config}"]
        self.proxy = servers.Server(command, "proxy ready on ")

    def publish(self, base: Path, version: int) -> None:
        """Puts a version in place by one rename."""
        base.mkdir(exist_ok=True)
        shutil.copytree(self._model, base / "new")
        (base / "new").rename(base / str(version))

    def configure(self, *which: int) -> None:
        """Writes a proxy configuration with these servers only."""
        addresses = [self.front[index].target for index in which]
        pool = f"{{backends: {addresses}, discover: {str(self._discover).lower()}}}"
        put(self._config, f"models: {{{servers.MODEL}: {pool}}}\n{self._settings}")

    def restart(self, index: int) -> None:
        """Starts a server again, on the same port."""
        port = self.servers[index].target.rpartition(":")[2]
        self.servers[index].stop()
        self.servers[index] = self._serve(self.bases[index], port)

    def stop(self) -> None:
        """Ends the proxy and the servers."""
        self.proxy.stop()
        for front in self.front:
            if front not in self.servers:
                front.stop()
        for server in self.servers:
            server.process.send_signal(signal.SIGCONT)
            server.stop()

    def _serve(self, base: Path, port: str = "0") -> servers.Server:
        command = [str(servers.BIN / "dpsr_model_server"), f"--port={port}", f"--model_name={servers.MODEL}"]
        command += [f"--model_base_path={base}", "--file_system_poll_wait_seconds=1"]
        return servers.Server(command, "Running gRPC ModelServer at ")


def put(path: Path, text: str) -> None:
    """Writes a file by one rename."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def kill(shop: Shop, third: float) -> None:
    shop.servers[0].process.kill()
    time.sleep(third)
    shop.restart(0)


def hang(shop: Shop, third: float) -> None:
    shop.servers[0].process.send_signal(signal.SIGSTOP)
    time.sleep(third)
    shop.servers[0].process.send_signal(signal.SIGCONT)


def end(shop: Shop, third: float) -> None:
    shop.servers[0].process.terminate()
    time.sleep(third)
    shop.restart(0)


def reload(shop: Shop, third: float) -> None:
    until = time.monotonic() + third
    while time.monotonic() < until:
        for which in ((0,), (1,), (0, 1)):
            shop.configure(*which)
            shop.proxy.process.send_signal(signal.SIGHUP)
            time.sleep(0.2)


def rollout(shop: Shop, third: float) -> None:
    for base in shop.bases:
        shop.publish(base, 2)
        time.sleep(third / 2)


def gray(shop: Shop, third: float) -> None:
    for mode in ("hang", "ok", "slow", "ok"):
        put(shop.modes[0], mode)
        time.sleep(third / 4)


def none(shop: Shop, third: float) -> None:
    del shop, third


FAULTS: dict[str, Callable[[Shop, float], None]] = {
    fault.__name__: fault for fault in (none, kill, hang, end, reload, rollout, gray)
}
OTHERS = ("shard_rollout", "hedge")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument(
        "--seconds", type=float, default=9.0, help="seconds for each fault, the time before and after it included"
    )
    parser.add_argument("--quick", action="store_true", help="make few requests, to check that the benchmark works")
    parser.add_argument("--faults", default=",".join((*FAULTS, *OTHERS)), help="comma-separated faults to measure")
    arguments = parser.parse_args()
    if unknown := set(arguments.faults.split(",")) - {*FAULTS, *OTHERS}:
        parser.error(f"--faults: got {', '.join(sorted(unknown))}, expected some of {', '.join((*FAULTS, *OTHERS))}")
    seconds = 3.0 if arguments.quick else arguments.seconds
    result = report.Report("faults", 1, servers.hardware())
    with tempfile.TemporaryDirectory() as folder:
        servers.write_model(Path(folder) / "model")
        requests = Path(folder) / "requests"
        servers.write_requests(requests, servers.queries())
        for name in arguments.faults.split(","):
            if name == "shard_rollout":
                shard_rollout(Path(folder), seconds, result)
                continue
            if name == "hedge":
                hedge(Path(folder), requests, seconds, 1 if arguments.quick else TURNS, result)
                continue
            found = measure(Path(folder), requests, name, FAULTS[name], seconds)
            result.add("proxy", name, "requests", found["succeeded"] + found["failed"], "requests")
            result.add("proxy", name, "failed", found["failed"], "requests", errors=found["errors"])
            for quantile in ("p50", "p99", "p99.9", "max"):
                result.add("proxy", name, quantile, found["latency_us"][quantile] / 1e3, "ms")
            if name != "none":
                result.bars[f"failed_{name}"] = found["failed"]
    result.print(arguments.json)


def measure(
    folder: Path, requests: Path, name: str, fault: Callable[[Shop, float], None], seconds: float
) -> dict[str, Any]:
    """Returns the result of a load during which the fault came and went. Raises what the fault raised."""
    settings = "health: {every_s: 0.2, return_s: 0.2, eject_s: 0.2}\n" if name == "gray" else ""
    with running(folder, name == "rollout", name == "gray", settings) as shop:
        raised: list[BaseException] = []

        def happen() -> None:
            time.sleep(seconds / 3)
            try:
                fault(shop, seconds / 3)
            except Exception as error:
                raised.append(error)

        thread = threading.Thread(target=happen)
        thread.start()
        try:
            flags = (f"--concurrency={CONCURRENCY}", f"--seconds={seconds}", "--warmup_seconds=0")
            (found,) = servers.load(shop.proxy, requests, *flags)
        finally:
            thread.join()
        if raised:
            raise raised[0]
        return found


@contextlib.contextmanager
def running(folder: Path, discover: bool = False, gray: bool = False, settings: str = "") -> Iterator[Shop]:
    shop = Shop(folder, discover, gray, settings)
    try:
        yield shop
    finally:
        shop.stop()


def hedge(folder: Path, requests: Path, seconds: float, turns: int, result: report.Report) -> None:
    """Measures latencies with one server that stalls at times, without second calls and with them."""
    settings = {"unhedged": "", "hedged": "hedge: {budget: 0.1}\n"}
    p99s: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(turns):
        for name, setting in settings.items():
            with running(folder, gray=True, settings=setting) as shop:
                put(shop.modes[0], "stall")
                flags = (f"--rate={HEDGE_RATE}", f"--seconds={seconds}", "--warmup_seconds=2")
                (found,) = servers.load(shop.proxy, requests, *flags)
            p99s[name].append(found["latency_us"]["p99"] / 1e3)
            result.add(name, "hedge", "failed", found["failed"], "requests", errors=found["errors"])
            result.add(name, "hedge", "p50", found["latency_us"]["p50"] / 1e3, "ms")
    for name, values in p99s.items():
        result.add(name, "hedge", "p99", statistics.median(values), "ms", turns=values)
    result.bars["p99_hedged_over_unhedged"] = statistics.median(p99s["hedged"]) / statistics.median(p99s["unhedged"])


def shard_rollout(folder: Path, seconds: float, result: report.Report) -> None:
    """Counts failed and mixed answers while two shards change their versions, one after the other."""
    bases = [folder / f"shard{shard}" for shard in range(SHARDS)]
    for shard, base in enumerate(bases):
        for version in (1, 2):
            write_shard(base / f"model{version}", shard, version)
        (base / "model1").rename(base / "1")
    running_shards = []
    for base in bases:
        policy = "model_version_policy { latest { num_versions: 2 } }"
        put(
            base / "models.config",
            f'model_config_list {{ config {{ name: "{servers.MODEL}" base_path: "{base}" '
            f'model_platform: "tensorflow" {policy} }} }}',
        )
        command = [str(servers.BIN / "dpsr_model_server"), "--port=0", f"--model_config_file={base / 'models.config'}"]
        running_shards.append(
            servers.Server([*command, "--file_system_poll_wait_seconds=1"], "Running gRPC ModelServer at ")
        )
    shards = [[server.target] for server in running_shards]
    put(folder / "shards.yaml", f"models: {{{servers.MODEL}: {{shards: {shards}, missing_shards: error}}}}\n")
    command = [sys.executable, "-m", "dpsr_common", "proxy", "--port=0", f"--config={folder / 'shards.yaml'}"]
    proxy = servers.Server(command, "proxy ready on ")
    try:
        with Watchers(proxy.target) as watchers:
            time.sleep(seconds / 6)
            for base in bases:
                (base / "model2").rename(base / "2")
                time.sleep(seconds / 4)
            for base in bases:  # After this, the server unloads version 1.
                shutil.rmtree(base / "1")
            time.sleep(seconds / 3)
    finally:
        proxy.stop()
        for server in running_shards:
            server.stop()
    for version, count in sorted(watchers.versions.items()):
        result.add("proxy", "shard_rollout", f"answers of version {version}", count, "requests")
    result.add("proxy", "shard_rollout", "failed", len(watchers.errors), "requests", errors=watchers.errors[:3])
    result.bars["failed_shard_rollout"] = len(watchers.errors)
    result.bars["mixed_versions"] = watchers.mixed


class Watchers:
    """Threads that send requests until the end of the block, and look at each answer.

    Attributes:
        versions: version -> number of answers that come from it alone and from all shards.
        mixed: number of answers with items of several versions.
        errors: one text for each answer that failed or lacks a shard.
    """

    def __init__(self, target: str) -> None:
        self.versions: dict[int, int] = {}
        self.mixed = 0
        self.errors: list[str] = []
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._channel = grpc.insecure_channel(target, options=serving_apis.CHANNEL_OPTIONS)
        self._threads = [threading.Thread(target=self._watch) for _ in range(4)]

    def _watch(self) -> None:
        predict = self._channel.unary_unary(serving_apis.PREDICT)
        request = servers.request(["red shoes"], "serving_default").SerializeToString()
        while not self._stop.is_set():
            try:
                answer = serving_apis.PredictResponse.FromString(predict(request, timeout=10))
            except grpc.RpcError as error:
                self._count(None, set(), f"{error.code().name}: {error.details()}")
                continue
            ids = to_numpy(answer.outputs["item_ids"])
            shards = {int(shard) for shard in ids.ravel() // 1000 % 10}
            missing = "" if len(shards) == SHARDS else f"only shards {shards}"
            self._count(answer.model_spec.version.value, {int(version) for version in ids.ravel() // 10_000}, missing)

    def _count(self, stated: int | None, versions: set[int], error: str) -> None:
        with self._lock:
            if error:
                self.errors.append(error)
            elif versions != {stated}:
                self.mixed += 1
            else:
                (version,) = versions
                self.versions[version] = self.versions.get(version, 0) + 1

    def __enter__(self) -> Watchers:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()


def write_shard(path: Path, shard: int, version: int) -> None:
    """Saves a model with SHARD_RESULTS items, whose ids begin at version * 10,000 + shard * 1,000."""
    import tensorflow as tf

    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "query")])
        def serve(self, query: tf.Tensor) -> dict[str, tf.Tensor]:
            rank = tf.range(SHARD_RESULTS)[tf.newaxis, :] + tf.zeros_like(tf.strings.length(query))[:, tf.newaxis]
            # The shards' items alternate, so each has some among the best.
            scores = 1.0 / tf.cast(SHARDS * rank + shard + 1, tf.float32)
            return {"item_ids": tf.cast(rank, tf.int64) + version * 10_000 + shard * 1000, "scores": scores}

    model = Model()
    tf.saved_model.save(model, str(path), signatures={"serving_default": model.serve})


if __name__ == "__main__":
    main()
