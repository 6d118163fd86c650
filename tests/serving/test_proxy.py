"""The proxy as its own process, between real clients, real model servers and recording gRPC backends."""

from __future__ import annotations

import functools
import itertools
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from processes import PATIENCE_S, ProxyProcess, child_environment, run_command
from proxy_backends import RecordingBackend, StartProxy, call, http_address, metric, predict, wait_until, write_yaml

from dpsr_common import serving_apis
from dpsr_common.command_line import main
from dpsr_common.errors import UsageError
from dpsr_serving import _native
from dpsr_serving.client import SearchClient, ServingError
from dpsr_serving.model_server import ModelServer
from dpsr_serving.proxy import routing
from dpsr_serving.proxy.config import ModelConfig, PoolConfig, ProxyConfig, parse_config
from dpsr_serving.tensors import make_tensor, to_numpy


def write_config(path: Path, servers: dict[str, ModelServer]) -> Path:
    lines = [f"  {name}: {{backends: ['{server.target}']}}" for name, server in servers.items()]
    path.write_text("models:\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def proxy(servers: dict[str, ModelServer], tmp_path: Path, start_proxy: StartProxy) -> ProxyProcess:
    """A proxy in front of the servers of both models, each on a backend of its own."""
    return start_proxy(f"--config={write_config(tmp_path / 'proxy.yaml', servers)}")


# Before real model servers


def test_routes_each_model_to_the_server_that_holds_it(proxy: ProxyProcess) -> None:
    for model, base in (("shop", 100), ("keyed", 200)):
        with SearchClient(proxy.target, model) as client:
            (result,) = client.search("ab")
            assert result.item_ids.tolist() == [base, base + 1]
            (status,) = client.model_status()
            assert status.state == "AVAILABLE"


def test_answers_equal_those_of_the_server_for_every_method(
    proxy: ProxyProcess, servers: dict[str, ModelServer]
) -> None:
    spec = serving_apis.GetModelStatusRequest()
    spec.model_spec.name = "shop"
    name_only = spec.SerializeToString()
    old = serving_apis.PredictRequest.FromString(predict("shop", query=["a"]))
    old.model_spec.version.value = 6
    multi = serving_apis.MultiInferenceRequest()
    multi.tasks.add().model_spec.name = "shop"
    requests = [
        (serving_apis.PREDICT, predict("shop", query=["a", "abcd", ""])),
        (serving_apis.PREDICT, predict("shop", "search", query=["abc"], k=np.int32(2))),
        (serving_apis.PREDICT, predict("shop", "nowhere", query=["a"])),
        (serving_apis.PREDICT, predict("shop", wrong=["a"])),
        (serving_apis.PREDICT, predict("shop", query=np.zeros(3, np.float32))),
        (serving_apis.PREDICT, old.SerializeToString()),
        (serving_apis.PREDICT, predict(None, query=["a"])),
        (serving_apis.PREDICT, predict("", query=["a"])),
        ("/tensorflow.serving.PredictionService/MultiInference", multi.SerializeToString()),
        *(
            (method, name_only)
            for method in serving_apis.METHODS
            if method.endswith(("Classify", "Regress", "GetModelMetadata", "GetModelStatus"))
        ),
    ]
    codes = set()
    for method, request in requests:
        through = call(proxy.target, method, request)
        direct = call(servers["shop"].target, method, request)
        assert through[:2] == direct[:2], method
        if direct[2] is not None:  # map fields have no order on the wire: compare what they mean
            response_type = (
                serving_apis.PredictResponse if method == serving_apis.PREDICT else serving_apis.GetModelStatusResponse
            )
            assert response_type.FromString(through[2]) == response_type.FromString(direct[2])
        codes.add(direct[0])
    assert {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT} <= codes


def test_stock_client_of_tensorflow_serving_works_unchanged(proxy: ProxyProcess) -> None:
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest()
    request.model_spec.name = "shop"
    request.inputs["query"].CopyFrom(tf.make_tensor_proto(["ab"]))
    with grpc.insecure_channel(proxy.target) as channel:
        response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=PATIENCE_S)
    assert tf.make_ndarray(response.outputs["item_ids"]).tolist() == [[100, 101, -1]]


def test_many_clients_at_once_each_get_their_own_answer(proxy: ProxyProcess) -> None:
    def ask(worker: int) -> None:
        model, base = (("shop", 100), ("keyed", 200))[worker % 2]
        with SearchClient(proxy.target, model) as client:
            for round_number in range(20):
                n = 1 + (worker + round_number) % 9
                for result in client.search(["x" * n, "y"], k=10):
                    assert result.item_ids.tolist() == list(range(base, base + n))
                    n = 1

    with futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(ask, worker) for worker in range(8)]:
            done.result()


def test_answers_and_requests_far_above_grpcs_default_size(proxy: ProxyProcess) -> None:
    k = 500_000
    with SearchClient(proxy.target, "shop", timeout_s=60) as client:
        (result,) = client.search("x" * 6_000_000, k)  # the answer: 500,000 x (8 + 4 + 4) bytes or more
    assert np.array_equal(result.item_ids, np.arange(100, 100 + k))


def test_deadline_ends_a_slow_request(proxy: ProxyProcess) -> None:
    code = call(proxy.target, serving_apis.PREDICT, predict("shop", "slow", work=np.int32(2_000_000)), timeout=0.3)[0]
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    with SearchClient(proxy.target, "shop") as client:
        assert len(client.search("ab")[0]) == 2


def test_unknown_model_is_not_found_in_tensorflow_servings_words(proxy: ProxyProcess) -> None:
    versioned = serving_apis.PredictRequest.FromString(predict("nowhere", query=["a"]))
    versioned.model_spec.version.value = 7
    status = serving_apis.GetModelStatusRequest()
    status.model_spec.name = "nowhere"
    for method, request, words in (
        (serving_apis.PREDICT, predict("nowhere", query=["a"]), "Servable not found for request: Latest(nowhere)"),
        (serving_apis.PREDICT, versioned.SerializeToString(), "Servable not found for request: Specific(nowhere, 7)"),
        (serving_apis.GET_MODEL_STATUS, status.SerializeToString(), "Could not find any versions of model nowhere"),
    ):
        code, details, *_ = call(proxy.target, method, request)
        assert (code, details) == (grpc.StatusCode.NOT_FOUND, words)
    with SearchClient(proxy.target, "nowhere") as client, pytest.raises(ServingError) as raised:
        client.search("a")
    assert proxy.target in str(raised.value) and "'nowhere'" in str(raised.value)


def test_default_backends_take_all_other_models(
    servers: dict[str, ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    config = tmp_path / "proxy.yaml"
    config.write_text(
        f"models:\n  keyed:\n    backends: ['{servers['keyed'].target}']\n"
        f"default: {{backends: ['{servers['shop'].target}']}}\n"
    )
    proxy = start_proxy(f"--config={config}")
    for model, base in (("shop", 100), ("keyed", 200)):
        with SearchClient(proxy.target, model) as client:
            assert client.search("a")[0].item_ids.tolist() == [base]
    # The default server does not know the model either: its answer is returned.
    code, details, *_ = call(proxy.target, serving_apis.PREDICT, predict("nowhere", query=["a"]))
    assert code is grpc.StatusCode.NOT_FOUND and "nowhere" in details


def test_killed_backend_is_unavailable_by_name_and_others_go_on(
    model_paths: dict[str, Path], servers: dict[str, ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    from dpsr_serving.model_server import start_model_server

    with start_model_server(model_paths["keyed"], "keyed", op_libraries=()) as doomed:
        config = write_config(tmp_path / "proxy.yaml", {"keyed": doomed, "shop": servers["shop"]})
        proxy = start_proxy(f"--config={config}")
        with SearchClient(proxy.target, "keyed") as keyed, SearchClient(proxy.target, "shop") as shop:
            assert len(keyed.search("ab")[0]) == 2
            doomed.process.kill()
            doomed.process.wait()
            with pytest.raises(ServingError) as raised:
                keyed.search("ab")
            assert raised.value.code is grpc.StatusCode.UNAVAILABLE
            assert "model 'keyed'" in raised.value.details and doomed.target in raised.value.details
            assert len(shop.search("ab")[0]) == 2


# Before recording backends


def test_passes_bytes_metadata_and_deadline_on(
    start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy
) -> None:
    backend = start_backend()
    answer = b"\x00 not even a message \xff"

    def reply(request: bytes, context: Any) -> bytes:
        context.send_initial_metadata((("served-by", "b1"),))
        context.set_trailing_metadata((("cost", "3"), ("trace-bin", b"\x00\xff")))
        return answer

    backend.answer = reply
    proxy = start_proxy(f"--backend={backend.target}")
    request = predict("m", query=["a", b"\xff\x00"]) + b"\x9a\x3f\x03new"  # field 1011, unknown to this version
    sent = (("user-id", "42"), ("blob-bin", b"\x01\x00\xfe"))
    code, _, response, initial, trailing = call(
        proxy.target, serving_apis.PREDICT, request, timeout=PATIENCE_S, metadata=sent
    )
    assert (code, response) == (grpc.StatusCode.OK, answer)
    assert ("served-by", "b1") in initial
    assert set(trailing) == {("cost", "3"), ("trace-bin", b"\x00\xff")}
    ((method, seen, metadata, remaining),) = backend.calls
    assert (method, seen) == (serving_apis.PREDICT, request)
    assert metadata.items() >= dict(sent).items()
    assert remaining is not None and 0 < remaining < 1.5 * PATIENCE_S  # gRPC rounds a deadline up on each hop
    call(proxy.target, serving_apis.PREDICT, request, timeout=None)
    unlimited = backend.calls[1][3]
    assert unlimited is None or unlimited > 1e9


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_passes_errors_back_unchanged(
    shared_error_proxy: tuple[RecordingBackend, ProxyProcess], code: grpc.StatusCode
) -> None:
    backend, proxy = shared_error_proxy

    def refuse(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("retry-after", "1"),))
        context.abort(code, "words of the server: é\n100 %")
        raise AssertionError("abort raises")

    backend.answer = refuse
    got = call(proxy.target, serving_apis.PREDICT, predict("m"))
    assert (got[0], got[1], got[4]) == (code, "words of the server: é\n100 %", (("retry-after", "1"),))


@pytest.fixture(scope="module")
def shared_error_proxy() -> Iterator[tuple[RecordingBackend, ProxyProcess]]:
    backend = RecordingBackend()
    proxy = ProxyProcess(f"--backend={backend.target}")
    yield backend, proxy
    proxy.stop()
    backend.stop()


def test_passes_cancellation_on(start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy) -> None:
    backend = start_backend()
    cancelled = threading.Event()

    def wait(request: bytes, context: Any) -> bytes:
        context.add_callback(cancelled.set)
        cancelled.wait(PATIENCE_S)
        return b""

    backend.answer = wait
    proxy = start_proxy(f"--backend={backend.target}")
    with grpc.insecure_channel(proxy.target) as channel:
        pending = channel.unary_unary(serving_apis.PREDICT).future(predict("m"), timeout=PATIENCE_S)
        assert backend.entered.acquire(timeout=PATIENCE_S)
        pending.cancel()
        assert cancelled.wait(PATIENCE_S)
    proxy.process.terminate()
    assert proxy.process.communicate(timeout=PATIENCE_S)[1] == ""  # clients may cancel calls, so nothing is logged


def test_requests_of_a_known_model_keep_deadlines_cancellation_and_retries(
    start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    """From a model's second request on, the proxy forwards without a task."""
    backends = [start_backend(), start_backend()]
    cancelled = threading.Event()
    release = threading.Event()

    def answer(request: bytes, context: Any) -> bytes:
        if b"cancel" in request:
            context.add_callback(cancelled.set)
            cancelled.wait(PATIENCE_S)
        if b"late" in request:
            release.wait(PATIENCE_S)
        if b"loading" in request and context.peer() and next(refusals) == 0:
            context.abort(grpc.StatusCode.UNAVAILABLE, "loading")
        if b"wrong" in request:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "wrong")
        return request

    refusals = itertools.count()
    for backend in backends:
        backend.answer = answer
    targets = [backend.target for backend in backends]
    config = write_yaml(tmp_path / "p.yaml", f"models: {{m: {{backends: {targets}, limit: {{in_flight: 3}}}}}}")
    proxy = start_proxy(config, "--http_port=0")
    http = http_address(proxy)
    with grpc.insecure_channel(proxy.target) as channel:
        method = channel.unary_unary(serving_apis.PREDICT)
        for _ in range(3):
            assert method(predict("m", query=["a"]), timeout=PATIENCE_S) == predict("m", query=["a"])
        # Deadlines end in their order, not in that of the calls. The proxy tells the client whose server was late.
        late = predict("m", query=["late"])
        begin = time.monotonic()
        slow = [method.future(late, timeout=timeout) for timeout in (PATIENCE_S, 0.6, 0.2)]
        with pytest.raises(grpc.RpcError) as refused:
            method(predict("m", query=["a"]), timeout=PATIENCE_S)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "three are in flight"
        for pending, seconds in ((slow[2], 0.2), (slow[1], 0.6)):
            assert pending.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert seconds - 0.01 < time.monotonic() - begin
        # On a busy machine a client may notice its deadline before the proxy does.
        wait_until(lambda: metric(http, "dpsr_proxy_backend_outstanding") == 1)
        release.set()
        assert slow[0].result() == late
        # A call that is given up is given up at the server, and frees its place of the limit.
        for _ in range(4):
            cancelled.clear()
            while any(backend.entered.acquire(blocking=False) for backend in backends):
                pass
            gone = method.future(predict("m", query=["cancel"]), timeout=PATIENCE_S)
            wait_until(lambda: any(backend.entered.acquire(blocking=False) for backend in backends))
            gone.cancel()
            assert cancelled.wait(PATIENCE_S)
        loading = predict("m", query=["loading"])
        assert method(loading, timeout=PATIENCE_S) == loading
        assert sum(request == loading for backend in backends for _, request, *_ in backend.calls) == 2
        with pytest.raises(grpc.RpcError) as wrong:
            method(predict("m", query=["wrong"]), timeout=PATIENCE_S)
        assert (wrong.value.code(), wrong.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "wrong")
    assert metric(http, "dpsr_proxy_retries_total", model="m") == 1
    assert metric(http, "dpsr_proxy_requests_total", model="m", code="OK") == 5
    assert metric(http, "dpsr_proxy_requests_total", model="m", code="FAILED_PRECONDITION") == 1
    wait_until(lambda: all(metric(http, "dpsr_proxy_backend_outstanding", backend=b.target) == 0 for b in backends))


def test_least_outstanding_backend_gets_the_next_request(
    start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    backends = [start_backend(), start_backend()]
    release = threading.Event()

    def hold(request: bytes, context: Any) -> bytes:
        if b"hold" in request:
            release.wait(PATIENCE_S)
        return request

    for backend in backends:
        backend.answer = hold
    config = tmp_path / "proxy.yaml"
    config.write_text(f"models: {{m: {{backends: {[backend.target for backend in backends]}}}}}")
    proxy = start_proxy(f"--config={config}")
    with grpc.insecure_channel(proxy.target) as channel:
        method = channel.unary_unary(serving_apis.PREDICT)
        pending = method.future(predict("m", query=["hold"]), timeout=PATIENCE_S)
        busy = next(backend for backend in backends * 10_000 if backend.entered.acquire(timeout=0.01))
        for _ in range(5):
            method(predict("m", query=["quick"]), timeout=PATIENCE_S)
        release.set()
        pending.result()
        assert len(busy.calls) == 1
        for _ in range(4):  # idle ones take turns
            method(predict("m", query=["quick"]), timeout=PATIENCE_S)
    assert [len(backend.calls) for backend in backends] in ([3, 7], [7, 3])


def test_broken_requests_are_refused(start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy) -> None:
    backend = start_backend()
    proxy = start_proxy(f"--backend={backend.target}")
    for request, words in (
        (b"", "Missing ModelSpec"),
        (predict(None, query=["a"]), "Missing ModelSpec"),
        (b"\x0a\x00", "ModelSpec has no name specified."),
        (b"\x0a\x05ab", f"cannot decode the request of {serving_apis.PREDICT}"),
        (b"\x0a\x03\x0a\x01\xff", f"cannot decode the request of {serving_apis.PREDICT}"),  # a name that is not UTF-8
        (b"\xff" * 40, f"cannot decode the request of {serving_apis.PREDICT}"),
    ):
        code, details, *_ = call(proxy.target, serving_apis.PREDICT, request)
        assert code is grpc.StatusCode.INVALID_ARGUMENT and details.startswith(words), request
    assert call(proxy.target, "/tensorflow.serving.PredictionService/Other", b"")[0] is grpc.StatusCode.UNIMPLEMENTED
    assert backend.calls == []


def test_reload_config_goes_to_a_sole_backend_only(
    start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    method = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"
    backends = [start_backend(), start_backend()]
    config = tmp_path / "proxy.yaml"
    config.write_text(f"default: {{backends: {[backend.target for backend in backends]}}}\nforward_reloads: true\n")
    code, details, *_ = call(start_proxy(f"--config={config}").target, method, b"\x0a\x00")
    assert code is grpc.StatusCode.FAILED_PRECONDITION and "2 backends" in details
    # Without the key, nobody who reaches the proxy can replace the models of a server.
    code, details, *_ = call(start_proxy(f"--backend={backends[0].target}").target, method, b"\x0a\x00")
    assert code is grpc.StatusCode.PERMISSION_DENIED and "forward_reloads" in details
    assert [backend.calls for backend in backends] == [[], []]
    config.write_text(f"default: {{backends: [{backends[0].target!r}]}}\nforward_reloads: true\n")
    assert call(start_proxy(f"--config={config}").target, method, b"\x0a\x00")[2] == b"\x0a\x00"


def test_sigterm_drains(start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy) -> None:
    backend = start_backend()
    release = threading.Event()

    def hold(request: bytes, context: Any) -> bytes:
        release.wait(PATIENCE_S)
        return b"late"

    backend.answer = hold
    proxy = start_proxy(f"--backend={backend.target}")
    with grpc.insecure_channel(proxy.target) as channel:
        pending = channel.unary_unary(serving_apis.PREDICT).future(predict("m"), timeout=PATIENCE_S)
        assert backend.entered.acquire(timeout=PATIENCE_S)
        proxy.process.terminate()
        # It stops listening while the first call is still in flight.
        while call(proxy.target, serving_apis.PREDICT, b"")[0] is not grpc.StatusCode.UNAVAILABLE:
            pass
        assert not pending.done() and proxy.process.poll() is None
        release.set()
        assert pending.result() == b"late"
    assert proxy.process.wait(PATIENCE_S) == 0


def test_drain_ends_with_its_time(start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy) -> None:
    backend = start_backend()
    release = threading.Event()

    def hold(request: bytes, context: Any) -> bytes:
        release.wait(PATIENCE_S)
        return b"too late"

    backend.answer = hold
    proxy = start_proxy(f"--backend={backend.target}", "--drain_s=0.1")
    with grpc.insecure_channel(proxy.target) as channel:
        pending = channel.unary_unary(serving_apis.PREDICT).future(predict("m"), timeout=PATIENCE_S)
        assert backend.entered.acquire(timeout=PATIENCE_S)
        proxy.process.terminate()
        assert pending.code() is not grpc.StatusCode.OK
    assert proxy.process.wait(PATIENCE_S) == 0
    assert proxy.process.communicate()[1] == ""
    release.set()


# The command


def test_port_in_use_is_one_clear_line(start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy) -> None:
    backend = start_backend().target
    taken = start_proxy(f"--backend={backend}").target.rpartition(":")[2]
    result = run_command("proxy", f"--backend={backend}", f"--port={taken}")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(f"dpsr proxy: error: cannot listen on 127.0.0.1:{taken}")
    assert result.stderr.count("\n") == 1


def test_bad_usage_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "proxy.yaml"
    config.write_text("modles: {}")
    for arguments, words in (
        ((), "neither --config nor --backend is given"),
        (("--config=a", "--backend=b:1"), "--config and --backend cannot be combined"),
        (("--backend=b:1", "stray"), "'stray'"),
        (("--backend=b:1", "--potr=1"), "potr"),
        (("--backend=b:1", "--port=70000"), "70000"),
        (("--backend=nowhere",), "--backend: got 'nowhere', expected host:port"),
        ((f"--config={tmp_path / 'missing.yaml'}",), "missing.yaml"),
        ((f"--config={config}",), f"{config}: line 1: the configuration: unknown key 'modles', allowed: models, "),
    ):
        assert main(["proxy", *arguments]) == 2, arguments
        errors = capsys.readouterr().err
        assert errors.startswith("dpsr proxy: error: ") and errors.count("\n") == 1 and words in errors, errors


def test_help() -> None:
    result = run_command("proxy", "--help")
    assert result.returncode == 0 and "--backend" in result.stdout and result.stderr == ""


def test_config() -> None:
    config = parse_config(
        """
        models:
          a: {backends: ["h1:1", "[::1]:8500"]}
          "7": {backends: [h2.example:2]}
        default: {backends: [h3:3]}
        """
    )
    pools = (PoolConfig(((*addresses,),)) for addresses in (["h1:1", "[::1]:8500"], ["h2.example:2"], ["h3:3"]))
    a, seven, default = pools
    assert config == ProxyConfig({"a": ModelConfig(a), "7": ModelConfig(seven)}, default)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no backends are configured"),
        ("models: {}", "no backends are configured"),
        ("[1, 2]", "the configuration: got [1, 2], expected a mapping with the keys models, default, "),
        ("{", "not valid YAML"),
        ("models: [a]", "models: got ['a'], expected a mapping"),
        ("models: {7: {backends: [h:1]}}", "models: got the name 7, expected a string"),
        ("models: {m: {backend: [h:1]}}", "models.m: unknown key 'backend', allowed: backends, "),
        ("models: {m: [h:1]}", "models.m: got"),
        ("models: {m: {backends: []}}", "models.m.backends: got [], expected a list of at least one host:port"),
        ("models: {m: {}}", "models.m.backends: got None"),
        ("models: {m: {backends: h:1}}", "models.m.backends: got 'h:1'"),
        ("models: {m: {backends: [h]}}", "models.m.backends[0]: got 'h', expected host:port"),
        ("models: {m: {backends: [h:1, 'h:0']}}", "models.m.backends[1]: got 'h:0'"),
        ("models: {m: {backends: ['h:65536']}}", "models.m.backends[0]: got 'h:65536'"),
        ("models: {m: {backends: ['::1:80']}}", "models.m.backends[0]: got '::1:80'"),
        ("models: {m: {backends: ['h:1', 'h:1']}}", "each address once"),
        ("models: {m: {backends: ['h:1']}, m: {backends: ['h:2']}}", "key 'm' is given twice"),
        ("default: {backends: [80]}", "default.backends[0]: got 80"),
    ],
)
def test_bad_config_names_key_value_and_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_config(text)
    assert words in str(raised.value)


# Routing


def spec_of(request: bytes, path: tuple[int, ...]) -> routing.Spec | None:
    message = routing.find_model_spec(request, path)
    return None if message is None else routing.parse_spec(message)


class _Loaded:
    def __init__(self, outstanding: int) -> None:
        self.outstanding = outstanding


def test_least_outstanding_takes_the_fewest_and_turns_among_equals() -> None:
    backends = [_Loaded(n) for n in (2, 1, 3, 1)]
    chosen = [backends.index(routing.least_outstanding(backends, turn)) for turn in range(8)]
    assert set(chosen) == {1, 3}
    idle = [_Loaded(0) for _ in range(3)]
    assert [idle.index(routing.least_outstanding(idle, turn)) for turn in range(6)] == [0, 1, 2, 0, 1, 2]


def test_model_spec_is_read_as_protobuf_reads_it() -> None:
    path = routing.model_spec_path(serving_apis.METHODS[serving_apis.PREDICT])
    assert path == (1,)
    first, second = serving_apis.PredictRequest(), serving_apis.PredictRequest()
    first.model_spec.name = "a"
    first.model_spec.version.value = 5
    first.inputs["x"].CopyFrom(make_tensor(["\x0a\x03\x0a\x01q"]))  # a tensor that looks like a model spec
    second.model_spec.name = "b"
    parts = [first.SerializeToString(), second.SerializeToString()]
    noise = b"\xa0\x06\x01" + b"\xa5\x06" + b"1234" + b"\xa1\x06" + b"12345678"  # fields 100 of the other wire types
    for message in (parts[0], b"".join(parts), noise.join(parts) + noise):
        assert spec_of(message, path) == routing.parse_spec(
            serving_apis.PredictRequest.FromString(message).model_spec.SerializeToString()
        )
    assert routing.find_model_spec(noise, path) is None


def test_multi_inference_goes_by_its_first_task() -> None:
    path = routing.model_spec_path(serving_apis.METHODS["/tensorflow.serving.PredictionService/MultiInference"])
    assert path == (1, 1)
    request = serving_apis.MultiInferenceRequest()
    assert routing.find_model_spec(request.SerializeToString(), path) is None
    for name in ("a", "b"):
        request.tasks.add().model_spec.name = name
    assert spec_of(request.SerializeToString(), path).model == "a"


def test_every_cut_of_a_request_is_refused_or_read() -> None:
    request = predict("model", query=["text"] * 3)
    whole = spec_of(request, (1,))
    refused = 0
    for end in range(len(request)):
        try:
            spec = spec_of(request[:end], (1,))
        except ValueError:
            refused += 1
        else:
            assert spec is None or spec == whole
    assert refused > len(request) // 2


def test_imports_neither_tensorflow_nor_our_other_packages_nor_numpy() -> None:
    code = (
        "import sys, dpsr_serving.proxy, dpsr_serving.proxy.server\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    loaded = set(eval(result.stdout))
    assert "dpsr_serving" in loaded and "grpc" not in loaded
    assert not loaded & {"tensorflow", "tensorflow_serving", "numpy", "dpsr_tf", "dpsr_export", "dpsr_tokenizer"}


def read_fields(message: bytes) -> list[tuple[int, int, int, int, int]]:
    """Returns number, wire type, begin, content and end of each field. Raises ValueError."""

    def read_varint(offset: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if offset >= len(message):
                raise ValueError("cut off")
            value |= (message[offset] & 0x7F) << shift
            offset += 1
            if message[offset - 1] < 0x80:
                break
        if message[offset - 1] >= 0x80 or value >= 2**64:
            raise ValueError("too long")
        return value, offset

    fields, offset = [], 0
    while offset < len(message):
        begin = offset
        tag, offset = read_varint(offset)
        if tag & 7 in (0, 2):
            value, offset = read_varint(offset)
        content = offset
        offset += {0: 0, 1: 8, 2: value if tag & 7 == 2 else 0, 5: 4}.get(tag & 7, len(message) + 1)
        if offset > len(message) or tag < 8:
            raise ValueError("cut off, or not a field")
        fields.append((tag >> 3, tag & 7, begin, content, offset))
    return fields


def test_fields_are_found_as_python_finds_them() -> None:
    chance = random.Random(1)
    # Fields 1 and 2 of all wire types, a number of 10 bytes, and what is cut off or not a message.
    too_long = b"\x8a" + b"\x80" * 8 + b"\x02"  # a tag of more than 64 bits, whose lowest 64 are those of field 1
    pieces = [b"\x0a\x02ab", b"\x0a\x00", b"\x12\x01c", b"\x08\x96\x01", b"\x0d1234", b"\x0912345678"]
    pieces += [b"\x10" + b"\xff" * 9 + b"\x01", b"\x8a\x80\x00\x01z", b"\x0a\x05a", too_long, b"\x0b"]
    found = refused = 0
    for _ in range(5000):
        message = b"".join(chance.choices(pieces, (9, 9, 9, 9, 9, 9, 9, 2, 1, 1, 1), k=chance.randrange(6)))
        try:
            places = [field[2:] for field in read_fields(message) if field[:2] == (1, 2)]
        except ValueError:
            for find in (_native.find_field, _native.find_places):
                with pytest.raises(ValueError, match=r"at byte|cut off"):
                    find(message, 1)
            refused += 1
            continue
        contents = [message[start:end] for _, start, end in places]
        assert _native.find_places(message, 1) == places, message
        assert _native.find_field(message, 1) == (b"".join(contents) if contents else None), message
        assert _native.find_field(message, 1, True) == (contents[0] if contents else None), message
        found += len(contents) == 1
    assert found > 300 and refused > 300
    most = b"\x0a\x01a" + b"\x10\x00" * 5
    assert _native.find_field(most, 1, False, 6) == b"a"
    for find in (functools.partial(_native.find_field, first=False), _native.find_places):
        with pytest.raises(ValueError, match="more than 6 fields"):
            find(most + b"\x10\x00", 1, most=6)


def test_two_proxies_do_not_share_a_port_silently(start_proxy: StartProxy) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_command("proxy", "--backend=127.0.0.1:1", f"--port={port}")
    assert result.returncode == 1 and f"127.0.0.1:{port}" in result.stderr


def test_ipv6(start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    proxy = start_proxy(f"--backend={start_backend().target}", "--host=::1")
    assert proxy.target.startswith("[::1]:")
    assert call(proxy.target, serving_apis.PREDICT, predict("m"))[0] is grpc.StatusCode.OK


def test_tensors_pass_undecoded(start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy) -> None:
    # No server would accept this tensor, but the proxy does not decode it.
    request = serving_apis.PredictRequest.FromString(predict("m", query=["a"]))
    request.inputs["query"].tensor_shape.dim[0].size = 1 << 40
    backend = start_backend()
    response = call(
        start_proxy(f"--backend={backend.target}").target, serving_apis.PREDICT, request.SerializeToString()
    )[2]
    with pytest.raises(ValueError):
        to_numpy(serving_apis.PredictRequest.FromString(response).inputs["query"])
