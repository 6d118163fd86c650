"""gRPC's health and reflection services on the proxy."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from processes import PATIENCE_S
from proxy_backends import FAST, StartBackend, StartProxy, call, predict, wait_until, write_yaml

from dpsr_common import serving_apis
from dpsr_serving import grpc_services
from dpsr_serving.grpc_services import NOT_SERVING, SERVICE_UNKNOWN, SERVING

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"


def asking(service: str) -> bytes:
    return bytes(grpc_services.HealthCheckRequest(service=service).SerializeToString())


def status_of(answer: bytes) -> int:
    return int(grpc_services.HealthCheckResponse.FromString(answer).status)


def check(target: str, service: str = "") -> int | grpc.StatusCode:
    code, _, response, *_ = call(target, CHECK, asking(service))
    return status_of(response) if code is grpc.StatusCode.OK else code


def test_health_of_the_proxy_and_of_models(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    one, two = start_backend(), start_backend()
    config = (
        f"models: {{a: {{backends: ['{one.target}']}}, b: {{backends: ['{two.target}']}},\n"
        f"  s: {{shards: [['{one.target}'], ['{two.target}']], missing_shards: error}},\n"
        f"  p: {{shards: [['{one.target}'], ['{two.target}']]}}}}\n{FAST}"
    )
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    wait_until(lambda: check(proxy.target) == SERVING)
    services = ("tensorflow.serving.PredictionService", "tensorflow.serving.ModelService", "a", "b", "s", "p")
    assert [check(proxy.target, service) for service in services] == [SERVING] * 6
    assert check(proxy.target, "nobody") is grpc.StatusCode.NOT_FOUND
    code, details, *_ = call(proxy.target, CHECK, b"\xff")
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "not a grpc.health.v1.HealthCheckRequest" in details
    two.stop()
    wait_until(lambda: check(proxy.target, "b") == NOT_SERVING)
    assert [check(proxy.target, model) for model in ("", "a", "s", "p")] == [SERVING, SERVING, NOT_SERVING, SERVING]
    one.stop()
    wait_until(lambda: check(proxy.target) == NOT_SERVING)
    assert check(proxy.target, "p") == NOT_SERVING


def test_health_of_models_that_servers_report(servers: Any, start_proxy: StartProxy, tmp_path: Path) -> None:
    config = f"default: {{backends: ['{servers['shop'].target}'], discover: true}}\n"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    assert check(proxy.target, "shop") is grpc.StatusCode.NOT_FOUND  # nobody has asked for it
    for model in ("shop", "invented"):
        call(proxy.target, serving_apis.PREDICT, predict(model, query=["a"]))
    assert check(proxy.target, "shop") == SERVING
    assert check(proxy.target, "invented") is grpc.StatusCode.NOT_FOUND


def test_watch(start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path) -> None:
    """The status comes at once and with each change. The stream ends when the proxy is asked to end, which is soon."""
    backend = start_backend()
    config = f"models: {{a: {{backends: ['{backend.target}']}}}}\n{FAST}"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    wait_until(lambda: check(proxy.target) == SERVING)
    with grpc.insecure_channel(proxy.target) as channel:
        watch = channel.unary_stream(WATCH)
        model, unknown = watch(asking("a"), timeout=PATIENCE_S), watch(asking("nobody"), timeout=PATIENCE_S)
        assert (status_of(next(model)), status_of(next(unknown))) == (SERVING, SERVICE_UNKNOWN)
        wrong = watch(b"\xff", timeout=PATIENCE_S)
        assert wrong.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert watch(asking("a"), timeout=0.2).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        unknown.cancel()
        backend.stop()
        assert status_of(next(model)) == NOT_SERVING
        proxy.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as error:
            next(model)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert proxy.process.wait(20) == 0  # a drain may take 30 s


def test_watchers_do_not_use_up_the_proxy(start_proxy: StartProxy, tmp_path: Path) -> None:
    config = "default: {backends: ['127.0.0.1:1']}\nlimits: {connections: 2}\n"
    target = start_proxy(write_yaml(tmp_path / "p.yaml", config)).target
    options = (("grpc.use_local_subchannel_pool", 1),)  # connections of their own
    with grpc.insecure_channel(target, options) as one, grpc.insecure_channel(target, options) as two:
        watching = [one.unary_stream(WATCH)(b"", timeout=PATIENCE_S) for _ in range(8)]
        assert [status_of(next(watch)) for watch in watching] == [NOT_SERVING] * 8
        more = one.unary_stream(WATCH)(b"", timeout=PATIENCE_S)
        assert more.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "8 calls" in more.details()
        watching.append(two.unary_stream(WATCH)(b"", timeout=PATIENCE_S))
        assert status_of(next(watching[-1])) == NOT_SERVING
        # Both places are taken, by connections that only watch. A third client gets one.
        with grpc.insecure_channel(target, options) as three:
            assert three.unary_unary(CHECK)(b"", timeout=PATIENCE_S)


def test_reflection_describes_all_services(start_proxy: StartProxy) -> None:
    """A client that knows nothing finds the services, and makes a request with what it found."""
    target = start_proxy("--backend=127.0.0.1:1").target
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        assert set(database.get_services()) == {
            "tensorflow.serving.PredictionService",
            "tensorflow.serving.ModelService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        for name in database.get_services():
            assert pool.FindServiceByName(name).methods
        method = pool.FindMethodByName("grpc.health.v1.Health.Check")
        request, answer = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        found = channel.unary_unary(CHECK)(request().SerializeToString(), timeout=PATIENCE_S)
        assert answer.FromString(found).status in (SERVING, NOT_SERVING)


@pytest.mark.parametrize("package", ["grpc.reflection.v1", "grpc.reflection.v1alpha"])
def test_reflection_answers_each_message(start_proxy: StartProxy, package: str) -> None:
    target = start_proxy("--backend=127.0.0.1:1").target
    asked: list[dict[str, Any]] = [
        {"file_containing_symbol": "tensorflow.serving.PredictRequest"},
        {"file_by_filename": "health.proto"},
        {"file_containing_symbol": "no.such.Symbol"},
        {"file_by_filename": "no.such.file"},
        {"all_extension_numbers_of_type": "tensorflow.serving.PredictRequest"},
        {"file_containing_extension": {"containing_type": "tensorflow.serving.PredictRequest", "extension_number": 1}},
        {},
        {"list_services": "*"},
    ]
    received = threading.Semaphore(0)

    def requests() -> Iterator[bytes]:
        for one in asked:
            yield reflection_pb2.ServerReflectionRequest(host="h", **one).SerializeToString()
            received.acquire(timeout=PATIENCE_S)  # one after the other, as tools do

    answers = []
    with grpc.insecure_channel(target) as channel:
        stream = channel.stream_stream(f"/{package}.ServerReflection/ServerReflectionInfo")
        for answer in stream(requests(), timeout=PATIENCE_S):
            answers.append(reflection_pb2.ServerReflectionResponse.FromString(answer))
            received.release()
        wrong = stream(iter([b"\xff"]), timeout=PATIENCE_S)
        assert wrong.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [answer.original_request.WhichOneof("message_request") for answer in answers] == [
        next(iter(one), None) for one in asked
    ]
    assert {answer.valid_host for answer in answers} == {"h"}
    kinds = [answer.WhichOneof("message_response") for answer in answers]
    file, error = "file_descriptor_response", "error_response"
    assert kinds == [file, file, error, error, "all_extension_numbers_response", error, error, "list_services_response"]
    assert [answers[i].error_response.error_code for i in (2, 3, 5, 6)] == [5, 5, 5, 3]
    assert b"PredictRequest" in b"".join(answers[0].file_descriptor_response.file_descriptor_proto)
    assert len(answers[0].file_descriptor_response.file_descriptor_proto) > 3  # with what it imports


def test_descriptions_of_reflection_fit_grpcs_own() -> None:
    """Our messages have the fields of those that gRPC's library has."""
    ours = grpc_services.POOL.FindFileByName("reflection_v1alpha.proto")
    for name, theirs in reflection_pb2.DESCRIPTOR.message_types_by_name.items():
        fields = {field.name: field.number for field in ours.message_types_by_name[name].fields}
        assert fields == {field.name: field.number for field in theirs.fields}
