"""The model server's executable as a child process, and requests that clients send to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from processes import PATIENCE_S
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

BINARY = Path(__file__).parents[2] / "serving" / "dpsr_serving" / "bin" / "dpsr_model_server"
READY = "Running gRPC ModelServer at "
State = get_model_status_pb2.ModelVersionStatus.State
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"did not happen: {what}"
        time.sleep(0.02)


class Reply:
    """An HTTP answer: `status`, `headers`, `text`, and `json` of the text."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.text = response.read().decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> tuple[int, str]:
        """Status and text of an error, which must be the only key of the answer."""
        assert self.headers["Content-Type"] == "application/json"
        assert list(self.json) == ["error"]
        return self.status, self.json["error"]


class Server:
    """The executable on a free port, and stubs to talk to it. `log` is its standard error."""

    def __init__(self, log: Path, *arguments: str, port: int = 0, rest_port: int = 0, wait: bool = True) -> None:
        self.log = log
        self.port = port
        self.rest_port = rest_port
        if rest_port:
            arguments = (f"--rest_api_port={rest_port}", *arguments)
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [str(BINARY), f"--port={port}", *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        if wait:
            self.wait_until_ready()
        if self.port:
            self.connect()

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(READY), f"not ready: {line!r}\n{self.log.read_text()}"
        self.port = int(line.split()[4].rpartition(":")[2])

    def connect(self) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.model = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def predict(self, request: predict_pb2.PredictRequest, timeout: float = PATIENCE_S) -> predict_pb2.PredictResponse:
        return self.prediction.Predict(request, timeout=timeout)

    def states(self, name: str = "default") -> dict[int, int]:
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = name
        response = self.model.GetModelStatus(request, timeout=PATIENCE_S)
        return {status.version: status.state for status in response.model_version_status}

    def reload(
        self, config: model_server_config_pb2.ModelServerConfig, timeout: float = PATIENCE_S
    ) -> model_management_pb2.ReloadConfigResponse:
        request = model_management_pb2.ReloadConfigRequest(config=config)
        return self.model.HandleReloadConfigRequest(request, timeout=timeout)

    def rest(
        self, path: str, body: object = None, method: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Sends GET without a body and POST with one, unless `method` is given. Bodies are JSON unless bytes or str."""
        connection = http.client.HTTPConnection("127.0.0.1", self.rest_port, timeout=PATIENCE_S)
        try:
            data = body if isinstance(body, bytes | str) or body is None else json.dumps(body)
            connection.request(method or ("GET" if body is None else "POST"), path, data, dict(headers or {}))
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, port: int = 0, rest_port: int = 0, wait: bool = True) -> Iterator[Server]:
    server = Server(folder / "server.log", *arguments, port=port, rest_port=rest_port, wait=wait)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def failing_start(*arguments: str) -> tuple[int, str]:
    """The exit status and standard error of a server that is expected to end by itself."""
    done = subprocess.run([str(BINARY), *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert READY not in done.stdout
    return done.returncode, done.stderr


def predict_request(
    signature: str = "", inputs: dict[str, object] | None = None, name: str = "default", version: int | None = None
) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = name
    request.model_spec.signature_name = signature
    if version is not None:
        request.model_spec.version.value = version
    for key, value in (inputs if inputs is not None else {"x": np.float32([1, 2])}).items():
        proto = value if isinstance(value, tensor_pb2.TensorProto) else tf.make_tensor_proto(value)
        request.inputs[key].CopyFrom(proto)
    return request


def labelled_request(label: str, name: str = "default") -> predict_pb2.PredictRequest:
    request = predict_request(name=name)
    request.model_spec.version_label = label
    return request


def gate_request(folder: Path, version: int | None = None) -> tuple[predict_pb2.PredictRequest, Path, Path]:
    """A request that runs from the time the first file appears until the second one does."""
    begun, release = folder / "begun", folder / "release"
    return predict_request("gate", {"begun": str(begun), "release": str(release)}, version=version), begun, release


def held_request(server: Server, folder: Path, **options: Any) -> tuple[Any, Path]:
    """Sends a gate_request and waits until it runs. Returns its future, and the file that ends it."""
    request, begun, release = gate_request(folder)
    call = server.prediction.Predict.future(request, timeout=PATIENCE_S, **options)
    eventually(begun.exists, "the request runs")
    return call, release


def error_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value.code(), raised.value.details()


def model_config(
    name: str,
    base_path: Path,
    *,
    specific: tuple[int, ...] = (),
    latest: int = 0,
    every: bool = False,
    labels: Mapping[str, int] | None = None,
    platform: str = "tensorflow",
) -> model_server_config_pb2.ModelConfig:
    """A model of a ModelServerConfig; `str()` of it is its text form."""
    config = model_server_config_pb2.ModelConfig(name=name, base_path=str(base_path), model_platform=platform)
    policy = config.model_version_policy
    if specific:
        policy.specific.versions.extend(specific)
    if latest:
        policy.latest.num_versions = latest
    if every:
        policy.all.SetInParent()
    config.version_labels.update(labels or {})
    return config


def config_list(*models: model_server_config_pb2.ModelConfig) -> model_server_config_pb2.ModelServerConfig:
    config = model_server_config_pb2.ModelServerConfig()
    config.model_config_list.config.extend(models)
    return config
