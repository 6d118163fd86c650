"""Measures what clients see when model servers behind the proxy fail: failed requests and latency, for each fault.

    python benchmarks/faults.py --json [--seconds=S] [--faults=kill,hang] [--quick]

Two model servers hold the same model, whose answers are 12 KB. Clients send requests through the proxy, 8 under way all
the time, with a deadline of 10 s. The fault begins after a third of the time and ends after two thirds:

    kill     one server is killed (SIGKILL) and started again
    hang     one server is stopped (SIGSTOP) and continued; its calls wait until the proxy's checks notice
    end      one server is asked to end (SIGTERM) and started again
    reload   the proxy's configuration changes all the time: one server, the other, both
    rollout  the servers load version 2 and unload version 1, one after the other; the proxy follows (`discover`)
    none     no fault, for comparison
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import report
import servers

CONCURRENCY = 8


class Shop:
    """Two model servers and a proxy in front of them."""

    def __init__(self, folder: Path, discover: bool) -> None:
        self.bases = [folder / "a", folder / "b"]
        self._model, self._config, self._discover = folder / "model", folder / "proxy.yaml", discover
        for base in self.bases:
            shutil.rmtree(base, ignore_errors=True)
            self.publish(base, 1)
        self.servers = [self._serve(base) for base in self.bases]
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
        addresses = [self.servers[index].target for index in which]
        new = self._config.with_suffix(".new")
        new.write_text(
            f"models: {{{servers.MODEL}: {{backends: {addresses}, discover: {str(self._discover).lower()}}}}}\n"
        )
        new.rename(self._config)

    def restart(self, index: int) -> None:
        """Starts a server again, on the same port."""
        port = self.servers[index].target.rpartition(":")[2]
        self.servers[index].stop()
        self.servers[index] = self._serve(self.bases[index], port)

    def stop(self) -> None:
        """Ends the proxy and the servers."""
        self.proxy.stop()
        for server in self.servers:
            server.process.send_signal(signal.SIGCONT)
            server.stop()

    def _serve(self, base: Path, port: str = "0") -> servers.Server:
        command = [str(servers.BIN / "dpsr_model_server"), f"--port={port}", f"--model_name={servers.MODEL}"]
        command += [f"--model_base_path={base}", "--file_system_poll_wait_seconds=1"]
        return servers.Server(command, "Running gRPC ModelServer at ")


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


def none(shop: Shop, third: float) -> None:
    del shop, third


FAULTS: dict[str, Callable[[Shop, float], None]] = {
    fault.__name__: fault for fault in (none, kill, hang, end, reload, rollout)
}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument(
        "--seconds", type=float, default=9.0, help="seconds for each fault, the time before and after it included"
    )
    parser.add_argument("--quick", action="store_true", help="make few requests, to check that the benchmark works")
    parser.add_argument("--faults", default=",".join(FAULTS), help="comma-separated faults to measure")
    arguments = parser.parse_args()
    if unknown := set(arguments.faults.split(",")) - set(FAULTS):
        parser.error(f"--faults: got {', '.join(sorted(unknown))}, expected some of {', '.join(FAULTS)}")
    seconds = 3.0 if arguments.quick else arguments.seconds
    result = report.Report("faults", 1, servers.hardware())
    with tempfile.TemporaryDirectory() as folder:
        servers.write_model(Path(folder) / "model")
        requests = Path(folder) / "requests"
        servers.write_requests(requests, servers.queries())
        for name in arguments.faults.split(","):
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
    with running(folder, name == "rollout") as shop:
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
def running(folder: Path, discover: bool) -> Iterator[Shop]:
    shop = Shop(folder, discover)
    try:
        yield shop
    finally:
        shop.stop()


if __name__ == "__main__":
    main()
