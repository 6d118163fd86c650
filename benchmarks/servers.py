"""Parts that the serving benchmarks share: models to serve, servers in their own processes, and the load generator."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow loads

import grpc
import report
from absl import app, flags, logging
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc, predict_pb2, prediction_log_pb2

BIN = Path(__file__).resolve().parents[1] / "serving" / "dpsr_serving" / "bin"
MODEL = "default"
RESULTS = 1000  # ids (int64) and scores (float32) in an answer, 12 KB in all


def cpu_seconds_of(process: int) -> float:
    """Returns the CPU time (user and system) of a process since its start, in seconds."""
    stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


class Server:
    """A server in a process of its own.

    Attributes:
        process: the process.
        target: "host:port" that it listens on.
        start_seconds: seconds from its start until it answered.
    """

    def __init__(self, command: Sequence[str], ready: str, environment: Mapping[str, str] | None = None) -> None:
        begin = time.monotonic()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the server
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, env={**os.environ, **(environment or {})}
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.start_seconds = time.monotonic() - begin
        if not line.startswith(ready):
            self.process.kill()
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"{command[0]} did not start: {line!r}\n{self.log.read()[-2000:]}")
        self.target = line.removeprefix(ready).split()[0]

    def rss_mib(self) -> float:
        """Returns the resident memory of the process, in MiB."""
        fields = Path(f"/proc/{self.process.pid}/status").read_text().split()
        return int(fields[fields.index("VmRSS:") + 1]) / 1024

    def cpu_seconds(self) -> float:
        """Returns the CPU time (user and system) of the process since its start, in seconds."""
        return cpu_seconds_of(self.process.pid)

    def stop(self) -> None:
        """Ends the process."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def free_port() -> int:
    """Returns the number of a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def model_server(base_path: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Runs our model server on the versions below `base_path`, without op libraries unless `arguments` name some."""
    command = [str(BIN / "dpsr_model_server"), "--port=0", f"--model_name={MODEL}", f"--model_base_path={base_path}"]
    server = Server([*command, *arguments], "Running gRPC ModelServer at ", environment)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def python_server(version: Path, op_libraries: Sequence[str] = ()) -> Iterator[Server]:
    """Runs a gRPC server in Python on one SavedModel."""
    script = Path(__file__).with_name("python_server.py")
    command = [sys.executable, str(script), str(version), *op_libraries]
    server = Server(command, "listening on ", {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"})
    try:
        yield server
    finally:
        server.stop()


def _is_available(stub: model_service_pb2_grpc.ModelServiceStub, request: Any) -> bool:
    try:
        found = stub.GetModelStatus(request, timeout=5).model_version_status
    except grpc.RpcError:
        return False
    return any(version.state == version.AVAILABLE for version in found)


@contextlib.contextmanager
def tensorflow_server(binary: str, base_path: Path, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Runs TensorFlow Serving's server on the versions below `base_path`."""
    port = free_port()
    # With its default of 4 threads for each core, it refuses requests of 32 callers.
    command = [binary, f"--port={port}", f"--model_name={MODEL}", f"--model_base_path={base_path}"]
    server = Server.__new__(Server)
    begin = time.monotonic()
    server.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the server
    server.process = subprocess.Popen(
        [*command, "--grpc_max_threads=64"],
        stdout=server.log,
        stderr=server.log,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    server.target = f"127.0.0.1:{port}"
    with grpc.insecure_channel(server.target) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = MODEL
        while not _is_available(stub, request):
            if server.process.poll() is not None or time.monotonic() > begin + 60:
                server.process.kill()
                server.log.seek(0)
                raise RuntimeError(f"{binary} did not start:\n{server.log.read()[-2000:]}")
            time.sleep(0.01)
    server.start_seconds = time.monotonic() - begin
    try:
        yield server
    finally:
        server.stop()


def load(server: Server, requests: Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs the load generator, and returns its result for each load of `arguments` (see dpsr_load_generator --help)."""
    command = [
        str(BIN / "dpsr_load_generator"),
        f"--target={server.target}",
        f"--requests_file={requests}",
        f"--server_pid={server.process.pid}",
        *arguments,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    )
    if done.returncode != 0:
        raise RuntimeError(f"the load generator failed: {done.stderr}")
    for line in done.stderr.splitlines():
        print(line, file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def add_load(result: report.Report, impl: str, workload: str, found: dict[str, Any], failed: int) -> None:
    """Adds the results of a load: rate, latencies, failed requests, CPU time of the server."""
    result.add(impl, workload, "qps", found["qps"], "1/s")
    for quantile in ("p50", "p99", "p99.9", "max"):
        result.add(impl, workload, quantile, found["latency_us"][quantile] / 1e3, "ms")
    result.add(impl, workload, "failed", failed, "requests", errors=found["errors"])
    if "server_cpu_us" in found:
        result.add(impl, workload, "cpu", found["server_cpu_us"], "us/request")


def run(name: str, measure: Callable[[report.Report, Path, list[str]], None]) -> None:
    """Runs a benchmark of the model server alone. The caller has defined all other flags.

    Args:
        name: name of the report.
        measure: fills the report. It receives the report, a folder for its files, and flags for the server.
    """
    flags.DEFINE_boolean("json", False, "print one JSON object as the last line")
    flags.DEFINE_multi_string(
        "server_flag", [], "flag for the model server, for example --server_flag=--enable_batching"
    )

    def main(arguments: Sequence[str]) -> None:
        if arguments[1:]:
            raise app.UsageError(f"unexpected argument '{arguments[1]}'")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        result = report.Report(name, 1, hardware())
        with tempfile.TemporaryDirectory() as folder:
            measure(result, Path(folder), flags.FLAGS.server_flag)
        result.print(flags.FLAGS.json)

    app.run(main)


def write_model(path: Path) -> None:
    """Saves a model that answers each query with RESULTS ids and scores, as retrieval does, but computes little.

    `query` string [n] -> `item_ids` int64 [n, RESULTS], `scores` float [n, RESULTS].
    """
    import tensorflow as tf

    logging.set_verbosity(logging.WARNING)

    class Model(tf.Module):
        def __init__(self) -> None:
            self.ids = tf.Variable(tf.random.stateless_uniform([4096], [1, 2], 0, 2**40, tf.int64))
            self.scores = tf.Variable(tf.random.stateless_normal([4096], [1, 3]))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "query")])
        def serve(self, query: tf.Tensor) -> dict[str, tf.Tensor]:
            place = tf.strings.to_hash_bucket_fast(query, 3000)[:, tf.newaxis] + tf.range(RESULTS, dtype=tf.int64)
            return {"item_ids": tf.gather(self.ids, place), "scores": tf.gather(self.scores, place)}

    model = Model()
    tf.saved_model.save(model, str(path), signatures={"serving_default": model.serve})
    # A request to warm up with, as models in production have it.
    extra = path / "assets.extra"
    extra.mkdir()
    with tf.io.TFRecordWriter(str(extra / "tf_serving_warmup_requests")) as writer:
        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.CopyFrom(request(queries(1), "serving_default"))
        writer.write(log.SerializeToString())


def write_requests(path: Path, texts: Sequence[str], signature: str = "serving_default", batch: int = 1) -> None:
    """Writes a file of PredictRequests with `batch` queries each, for the load generator."""
    begins = range(0, len(texts) - batch + 1, batch)
    write_messages(path, [request(texts[begin : begin + batch], signature) for begin in begins])


def write_messages(path: Path, requests: Sequence[predict_pb2.PredictRequest]) -> None:
    """Writes a file of PredictRequests for the load generator: each is preceded by its size as a varint."""
    with path.open("wb") as file:
        for one in requests:
            message = one.SerializeToString()
            size = len(message)
            while size > 127:
                file.write(bytes([size & 127 | 128]))
                size >>= 7
            file.write(bytes([size]) + message)


def request(texts: Sequence[str], signature: str) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = MODEL
    request.model_spec.signature_name = signature
    tensor = request.inputs["query"]
    tensor.dtype = types_pb2.DT_STRING
    tensor.tensor_shape.dim.add(size=len(texts))
    tensor.string_val.extend(text.encode() for text in texts)
    return request


def queries(count: int = 1000) -> list[str]:
    """Returns texts of the length of typical queries."""
    words = ["red", "running", "shoes", "steel", "garden", "chair", "12v", "cordless", "drill", "lamp", "oak"]
    return [" ".join(words[(i * 7 + k * k) % len(words)] for k in range(2 + i % 4)) + f" {i}" for i in range(count)]


def hardware() -> dict[str, Any]:
    return report.hardware("dpsr", "tensorflow", "grpcio", "protobuf")
