"""Traces: the proxy's spans at a receiver of OTLP, and the header `traceparent` on its way to the servers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import PATIENCE_S
from proxy_backends import StartBackend, StartProxy, ask_ids, call, predict, wait_until, write_yaml

from dpsr_common import serving_apis
from dpsr_common.errors import CommandError, UsageError
from dpsr_serving.model_server import ModelServer
from dpsr_serving.proxy.config import TracingConfig, parse_config
from dpsr_serving.proxy.server import ProxyServer
from dpsr_serving.proxy.tracing import Tracer
from dpsr_serving.tensors import make_tensor

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
SERVER, CLIENT, INTERNAL = 2, 3, 1  # kinds of spans


class Receiver:
    """A collector that keeps all spans that it receives."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        handlers = {"Export": grpc.unary_unary_rpc_method_handler(self._export)}
        service = EXPORT.split("/")[1]
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _export(self, request: bytes, context: Any) -> bytes:
        for resource in trace_service.ExportTraceServiceRequest.FromString(request).resource_spans:
            self.services.update(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return b""

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.stop()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def end(proxy: Any) -> None:
    """Ends the proxy, which exports its last spans."""
    proxy.process.terminate()
    assert proxy.process.wait(PATIENCE_S) == 0


def test_request_with_a_retry(
    receiver: Receiver, start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    """The client's trace goes on through the request and both attempts, each of which the server sees as its parent."""
    backends = [start_backend(), start_backend()]
    failing = threading.Lock()
    parents: list[str] = []

    def answer(request: bytes, context: Any) -> bytes:
        metadata = dict(context.invocation_metadata())
        parents.append(metadata["traceparent"])
        assert metadata["tracestate"] == "vendor=1"
        if failing.acquire(blocking=False):
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        context.set_trailing_metadata((("dpsr-queue-us", "120"), ("dpsr-compute-us", "3400")))
        return request

    for backend in backends:
        backend.answer = answer
    targets = [backend.target for backend in backends]
    config = f"models: {{m: {{backends: {targets}}}}}\ntracing: {{endpoint: '{receiver.endpoint}', sample: 0}}\n"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    metadata = (("traceparent", SAMPLED), ("tracestate", "vendor=1"))
    code, _, _, _, trailing = call(proxy.target, serving_apis.PREDICT, predict("m", "search"), PATIENCE_S, metadata)
    assert code is grpc.StatusCode.OK and dict(trailing)["dpsr-queue-us"] == "120"
    end(proxy)
    assert receiver.services == {"dpsr-proxy"}
    request, first, second = sorted(receiver.spans, key=lambda span: span.start_time_unix_nano)
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE}
    assert (request.name, request.kind, request.parent_span_id.hex()) == (
        "tensorflow.serving.PredictionService/Predict",
        SERVER,
        PARENT,
    )
    assert attributes(request) == {
        "rpc.system": "grpc",
        "rpc.service": "tensorflow.serving.PredictionService",
        "rpc.method": "Predict",
        "rpc.grpc.status_code": 0,
        "dpsr.model": "m",
        "dpsr.signature": "search",
    }
    for span, number in ((first, 1), (second, 2)):
        assert (span.name, span.kind, span.parent_span_id) == ("attempt", CLIENT, request.span_id)
        assert parents[number - 1] == f"00-{TRACE}-{span.span_id.hex()}-01"
        found = attributes(span)
        assert found["dpsr.attempt"] == number and found["server.address"] == "127.0.0.1"
        assert f"127.0.0.1:{found['server.port']}" in targets
    assert (first.status.code, first.status.message) == (2, "not now")
    assert attributes(first)["rpc.grpc.status_code"] == 14
    assert (attributes(second)["dpsr.queue_us"], attributes(second)["dpsr.compute_us"]) == (120, 3400)
    assert request.start_time_unix_nano <= second.start_time_unix_nano <= second.end_time_unix_nano
    assert second.end_time_unix_nano <= request.end_time_unix_nano


def test_shards_and_requests_that_are_not_sampled(
    receiver: Receiver, start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    backends = [start_backend(), start_backend()]
    seen: list[str | None] = []
    response = serving_apis.PredictResponse()
    for name, value in (("item_ids", [[1]]), ("scores", [[0.5]])):
        response.outputs[name].CopyFrom(make_tensor(value))

    def answer(request: bytes, context: Any) -> bytes:
        seen.append(dict(context.invocation_metadata()).get("traceparent"))
        return bytes(response.SerializeToString())

    for backend in backends:
        backend.answer = answer
    shards = f"shards: [['{backends[0].target}'], ['{backends[1].target}']]"
    tracing = f"tracing: {{endpoint: '{receiver.endpoint}', sample: 0, service: edge}}"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", f"models: {{m: {{{shards}}}}}\n{tracing}\n"))

    def ask(*metadata: tuple[str, str]) -> None:
        code, *_ = call(proxy.target, serving_apis.PREDICT, predict("m", "search"), PATIENCE_S, metadata)
        assert code is grpc.StatusCode.OK

    ask()
    ask(("traceparent", NOT_SAMPLED))
    ask(("traceparent", f"00-{'0' * 32}-{PARENT}-01"))  # malformed: not a trace
    assert seen == [None] * 2 + [NOT_SAMPLED] * 2 + [f"00-{'0' * 32}-{PARENT}-01"] * 2
    ask(("traceparent", SAMPLED))
    end(proxy)
    assert receiver.services == {"edge"} and len(receiver.spans) == 5
    (request,) = (span for span in receiver.spans if span.kind == SERVER)
    parts = [span for span in receiver.spans if span.kind == INTERNAL]
    assert sorted(attributes(span)["dpsr.shard"] for span in parts) == [1, 2]
    assert {span.parent_span_id for span in parts} == {request.span_id}
    attempts = {span.parent_span_id: span for span in receiver.spans if span.kind == CLIENT}
    ports = [attributes(attempts[part.span_id])["server.port"] for part in parts]
    assert {f"127.0.0.1:{port}" for port in ports} == {backend.target for backend in backends}


def test_times_of_a_model_server_are_in_the_attempts_span(
    receiver: Receiver, servers: dict[str, ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    tracing = f"tracing: {{endpoint: '{receiver.endpoint}', sample: 1}}"
    config = f"default: {{backends: ['{servers['shop'].target}']}}\n{tracing}\n"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    assert ask_ids(proxy.target, "shop") == [100]
    end(proxy)
    request, attempt = sorted(receiver.spans, key=lambda span: span.start_time_unix_nano)
    found = attributes(attempt)
    took_us = (request.end_time_unix_nano - request.start_time_unix_nano) / 1000
    assert 0 <= found["dpsr.queue_us"] + found["dpsr.compute_us"] <= took_us


def test_reload_begins_and_ends_traces_and_lost_clients_have_spans(
    receiver: Receiver, start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    backend, go = start_backend(), threading.Event()

    def hold(request: bytes, context: Any) -> bytes:
        go.wait(PATIENCE_S)
        return request

    plain = f"default: {{backends: ['{backend.target}']}}\n"
    tracing = f"tracing: {{endpoint: '{receiver.endpoint}', sample: 1, follow_clients: false}}\n"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", plain))

    def ask(timeout: float = PATIENCE_S) -> grpc.StatusCode:
        metadata = (("traceparent", NOT_SAMPLED),)
        return call(proxy.target, serving_apis.PREDICT, predict("m"), timeout, metadata)[0]

    assert ask() is grpc.StatusCode.OK and backend.calls[-1][2]["traceparent"] == NOT_SAMPLED
    write_yaml(tmp_path / "p.yaml", plain + tracing)
    wait_until(lambda: ask() is grpc.StatusCode.OK and backend.calls[-1][2]["traceparent"] != NOT_SAMPLED)
    backend.answer = hold
    while backend.entered.acquire(blocking=False):
        pass
    with grpc.insecure_channel(proxy.target) as channel:
        lost = channel.unary_unary(serving_apis.PREDICT).future(predict("m"))
        assert backend.entered.acquire(timeout=PATIENCE_S)
        lost.cancel()
    go.set()
    backend.answer = lambda request, context: request
    write_yaml(tmp_path / "p.yaml", plain)
    wait_until(lambda: ask() is grpc.StatusCode.OK and backend.calls[-1][2]["traceparent"] == NOT_SAMPLED)
    # What was traced before is exported although the proxy goes on.
    wait_until(lambda: any(attributes(one)["rpc.grpc.status_code"] == 1 for one in receiver.spans))
    assert TRACE in {span.trace_id.hex() for span in receiver.spans}
    assert proxy.process.poll() is None


def test_proxy_ends_although_the_collector_is_gone(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    config = (
        f"default: {{backends: ['{start_backend().target}']}}\ntracing: {{endpoint: 'http://127.0.0.1:1', sample: 1}}"
    )
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    assert call(proxy.target, serving_apis.PREDICT, predict("m"))[0] is grpc.StatusCode.OK
    end(proxy)


def test_share_of_requests() -> None:
    tracer = Tracer(TracingConfig("http://127.0.0.1:1", sample=0.5))
    share = sum(tracer.begin("/s/m", ()) is not None for _ in range(1000)) / 1000
    assert 0.35 < share < 0.65
    for header in (SAMPLED, f"cc-{TRACE}-{PARENT}-03-more"):
        assert tracer.begin("/s/m", ((b"traceparent", header.encode()),)) is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "tracing.endpoint: got None, expected http://host:port or https://host:port"),
        ("{endpoint: 'collector:4317'}", "tracing.endpoint: got 'collector:4317', expected http://host:port"),
        ("{endpoint: 'http://c:4317', sample: 2}", "tracing.sample: got 2, expected a number of at least 0"),
    ],
)
def test_wrong_settings(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_config(f"default: {{backends: ['h:1']}}\ntracing: {text}")
    assert words in str(error.value)


def test_a_reload_that_is_refused_ends_its_new_tracer(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Tracer] = []
    really_close = Tracer.close

    def close(tracer: Tracer) -> None:
        closed.append(tracer)
        really_close(tracer)

    monkeypatch.setattr(Tracer, "close", close)
    plain = parse_config("default: {backends: ['127.0.0.1:1']}")
    traced = parse_config("default: {backends: ['127.0.0.1:1']}\ntracing: {endpoint: 'http://127.0.0.1:1'}")

    async def refuse(*_: Any) -> None:
        raise CommandError("no resolver")

    async def reload() -> None:
        server = ProxyServer(plain)
        monkeypatch.setattr(server._names, "follow", refuse)
        with pytest.raises(CommandError, match="no resolver"):
            await server.reload(traced)
        await asyncio.gather(*server._tasks)
        assert len(closed) == 1
        await server.stop(0)
        assert len(closed) == 1, "the server never had the tracer"

    asyncio.run(reload())
