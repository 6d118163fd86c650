"""Recording gRPC backends, raw calls and proxies with an HTTP port, for the tests of the proxy."""

from __future__ import annotations

import itertools
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from processes import PATIENCE_S, ProxyProcess

from dpsr_common import serving_apis
from dpsr_serving.tensors import make_tensor, to_numpy


class RecordingBackend:
    """A gRPC server of raw bytes that records its calls, for tests that a real model server does not allow."""

    def __init__(self, options: Sequence[tuple[str, Any]] = (), address: str = "127.0.0.1:0") -> None:
        self.calls: list[tuple[str, bytes, dict[str, Any], float | None]] = []
        self.peers: set[str] = set()  # addresses of the client ends of the connections
        self.entered = threading.Semaphore(0)
        self.answer: Callable[[bytes, Any], bytes] = lambda request, context: request
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=(*serving_apis.GRPC_OPTIONS, *options))
        backend = self

        class Handlers(grpc.GenericRpcHandler):
            def service(self, details: Any) -> Any:
                def handle(request: bytes, context: Any) -> bytes:
                    metadata = dict(context.invocation_metadata())
                    # A health check of the proxy. A check with a client's request is answered as that request.
                    if metadata.get("dpsr-proxy") == "check" and details.method == serving_apis.GET_MODEL_STATUS:
                        return b""
                    backend.peers.add(context.peer())
                    backend.calls.append((details.method, request, metadata, context.time_remaining()))
                    backend.entered.release()
                    return backend.answer(request, context)

                return grpc.unary_unary_rpc_method_handler(handle)

        self._server.add_generic_rpc_handlers((Handlers(),))
        self.target = f"{address.rpartition(':')[0]}:{self._server.add_insecure_port(address)}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()


# Two unanswered checks put a server down. The time-out is long enough for a server that has to wait for a processor.
FAST = "health: {every_s: 0.1, timeout_s: 1, return_s: 0.2}\n"

StartProxy = Callable[..., ProxyProcess]  # the fixtures of conftest.py
StartBackend = Callable[[], RecordingBackend]


def call(target: str, method: str, request: bytes, timeout: float | None = PATIENCE_S, metadata: Any = ()) -> Any:
    """Sends raw bytes; returns (code, details, response, initial metadata, trailing metadata) whatever the status."""
    with grpc.insecure_channel(target, options=serving_apis.CHANNEL_OPTIONS) as channel:
        done = channel.unary_unary(method).future(request, timeout=timeout, metadata=metadata)
        code = done.code()
        response = done.result() if code is grpc.StatusCode.OK else None
        return code, done.details(), response, tuple(done.initial_metadata()), tuple(done.trailing_metadata())


def predict(model: str | None, signature: str = "serving_default", **inputs: Any) -> bytes:
    request = serving_apis.PredictRequest()
    if model is not None:
        request.model_spec.name = model
        request.model_spec.signature_name = signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(make_tensor(value))
    return bytes(request.SerializeToString())


def ask_ids(target: str, model: str, query: str = "a", timeout: float = PATIENCE_S, metadata: Any = ()) -> list[int]:
    """The ids that one search finds; AssertionError where it fails."""
    code, details, response, *_ = call(target, serving_apis.PREDICT, predict(model, query=[query]), timeout, metadata)
    assert code is grpc.StatusCode.OK, (code, details)
    ids = to_numpy(serving_apis.PredictResponse.FromString(response).outputs["item_ids"])[0]
    return [int(item) for item in ids if item >= 0]


class Load:
    """Threads that send a request, or several in turn, until the end of the block, and record the answers."""

    def __init__(
        self,
        target: str,
        request: bytes | Sequence[bytes],
        threads: int = 4,
        timeout: float = PATIENCE_S,
        pause_s: float = 0.0,
    ) -> None:
        self.codes: list[grpc.StatusCode] = []
        self.details: list[str] = []
        self._stop = threading.Event()
        self._channel = grpc.insecure_channel(target, options=serving_apis.CHANNEL_OPTIONS)
        requests = [request] if isinstance(request, bytes) else list(request)
        self._threads = [threading.Thread(target=self._ask, args=(requests, timeout, pause_s)) for _ in range(threads)]

    def _ask(self, requests: Sequence[bytes], timeout: float, pause_s: float) -> None:
        method = self._channel.unary_unary(serving_apis.PREDICT)
        for request in itertools.cycle(requests):
            if self._stop.wait(pause_s):
                return
            done = method.future(request, timeout=timeout)
            code = done.code()
            self.codes.append(code)
            if code is not grpc.StatusCode.OK:
                self.details.append(done.details())

    def wait_for(self, more: int) -> None:
        """Returns when this many more requests have been answered."""
        goal = len(self.codes) + more
        wait_until(lambda: len(self.codes) >= goal)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()

    @property
    def failed(self) -> int:
        return sum(code is not grpc.StatusCode.OK for code in self.codes)


def wait_until(condition: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
    """Polls until the condition holds; AssertionError where it never does."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def http_address(proxy: ProxyProcess) -> str:
    """The HTTP address of a proxy that was started with --http_port=0. Can be read only once for each proxy."""
    assert proxy.process.stdout is not None
    line = proxy.process.stdout.readline()
    assert line.startswith("proxy HTTP on "), line
    return line.removeprefix("proxy HTTP on ").strip()


def get(address: str, path: str) -> tuple[int, str]:
    """Status and body of a page."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=PATIENCE_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metric(address: str, name: str, /, **labels: str) -> float:
    """The sum of a metric's values over the labels that are not given."""
    total = 0.0
    for line in get(address, "/metrics")[1].splitlines():
        series, _, value = line.rpartition(" ")
        if series.partition("{")[0] == name and all(f'{key}="{label}"' in series for key, label in labels.items()):
            total += float(value)
    return total


def write_yaml(path: Path, text: str) -> str:
    """Writes a configuration and puts it in place by one rename, as a deployment does; returns the flag for it."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.rename(path)
    return f"--config={path}"
