"""Replicas, retries, rules, discovery and reloads; test_faults.py has what happens when servers fail."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import PATIENCE_S
from proxy_backends import (
    FAST,
    Load,
    StartBackend,
    StartProxy,
    ask_ids,
    call,
    get,
    http_address,
    metric,
    predict,
    wait_until,
    write_yaml,
)

from dpsr_common import serving_apis
from dpsr_serving.model_server import ModelServer
from dpsr_serving.proxy import routing
from dpsr_serving.proxy.backends import Backend, RetryBudget
from dpsr_serving.proxy.calls import Code, Reply
from dpsr_serving.proxy.config import LimitsConfig, RetryConfig, parse_config
from dpsr_serving.proxy.metrics import Metrics


def test_only_what_another_server_can_mend_is_retried(
    start_backend: StartBackend,
    start_proxy: StartProxy,
    tmp_path: Path,
) -> None:
    backends = [start_backend() for _ in range(3)]
    config = f"models: {{m: {{backends: {[backend.target for backend in backends]}}}}}"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    for code in grpc.StatusCode:
        if code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE):
            continue

        def refuse(request: bytes, context: Any, code: Any = code) -> bytes:
            context.abort(code, "mine")
            raise AssertionError

        for backend in backends:
            backend.answer = refuse
            backend.calls.clear()
        assert call(proxy.target, serving_apis.PREDICT, predict("m"))[:2] == (code, "mine")
        assert sum(len(backend.calls) for backend in backends) == 1, code

    def unavailable(request: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.UNAVAILABLE, "loading")
        raise AssertionError

    for backend in backends:
        backend.answer = unavailable
        backend.calls.clear()
    assert call(proxy.target, serving_apis.PREDICT, predict("m"))[:2] == (grpc.StatusCode.UNAVAILABLE, "loading")
    assert [len(backend.calls) for backend in backends] == [1, 1, 1]  # each once
    backends[1].answer = lambda request, context: b"well"
    sent = (("user-id", "7"),)
    for _ in range(3):
        code, _, response, *_ = call(proxy.target, serving_apis.PREDICT, predict("m"), metadata=sent)
        assert (code, response) == (grpc.StatusCode.OK, b"well")
    # A second try has the metadata and what is left of the deadline.
    assert all(
        seen[2]["user-id"] == "7" and seen[3] is not None and seen[3] < 1.3 * PATIENCE_S
        for seen in backends[1].calls[1:]
    )


def test_a_status_that_is_no_message_does_not_end_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(*_: Any) -> Reply:
        return Reply(Code.OK, body=b"\xff")

    async def ask() -> Backend:
        backend = Backend("h:1", Metrics(), None, "", LimitsConfig(), lambda: None)
        monkeypatch.setattr(backend._channel, "call", answer)
        await backend.ask("m", 1.0)
        return backend

    backend = asyncio.run(ask())
    assert backend.holds == {"m": frozenset()} and backend.asked == {"m"}


def test_retry_budget_is_a_share_of_the_requests() -> None:
    budget = RetryBudget(RetryConfig(budget=0.25, reserve=2))
    assert [budget.retry() for _ in range(3)] == [True, True, False]
    granted = 0
    for _ in range(100):
        budget.request()
        granted += budget.retry()
    assert granted == 25
    for _ in range(1000):  # what is saved up has an end
        budget.request()
    assert [budget.retry() for _ in range(3)] == [True, True, False]


def test_full_backends_refuse(start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path) -> None:
    backends = [start_backend(), start_backend()]
    release = threading.Event()
    for backend in backends:
        backend.answer = lambda request, context: (release.wait(PATIENCE_S), request)[1]
    config = f"default: {{backends: {[backend.target for backend in backends]}}}\nmax_outstanding: 2\n"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config), "--http_port=0")
    with grpc.insecure_channel(proxy.target) as channel:
        pending = [channel.unary_unary(serving_apis.PREDICT).future(predict("m"), timeout=PATIENCE_S) for _ in range(4)]
        for backend in backends:
            for _ in range(2):
                assert backend.entered.acquire(timeout=PATIENCE_S)
        code, details, *_ = call(proxy.target, serving_apis.PREDICT, predict("m"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "model 'm'" in details and "2 requests" in details
        # A client can invent any number of names, so metrics have only those that are configured.
        http = http_address(proxy)
        assert metric(http, "dpsr_proxy_rejected_total", model="") == 1
        assert 'model="m"' not in get(http, "/metrics")[1]
        release.set()
        assert all(done.code() is grpc.StatusCode.OK for done in pending)
    assert call(proxy.target, serving_apis.PREDICT, predict("m"))[0] is grpc.StatusCode.OK


def test_rules_route_by_version_label_and_signature(
    start_backend: StartBackend,
    start_proxy: StartProxy,
    tmp_path: Path,
) -> None:
    names = ("plain", "seven", "canary", "scores", "rest")
    backends = {name: start_backend() for name in names}
    for name, backend in backends.items():
        backend.answer = lambda request, context, name=name: name.encode()
    at = {name: f"backends: ['{backend.target}']" for name, backend in backends.items()}
    config = (
        f"models:\n  m:\n    {at['plain']}\n    rules:\n"
        f"    - {{version: 7, {at['seven']}}}\n    - {{label: canary, {at['canary']}}}\n"
        f"    - {{signature: score, {at['scores']}}}\ndefault: {{{at['rest']}}}\n"
    )
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))

    def ask(
        model: str, method: str = serving_apis.PREDICT, version: int = 0, label: str = "", signature: str = ""
    ) -> str:
        request = serving_apis.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = model, signature
        if version:
            request.model_spec.version.value = version
        if label:
            request.model_spec.version_label = label
        message = request.SerializeToString()
        if method.endswith("MultiInference"):
            multi = serving_apis.MultiInferenceRequest()
            multi.tasks.add().model_spec.CopyFrom(request.model_spec)
            message = multi.SerializeToString()
        return str(call(proxy.target, method, message)[2].decode())

    for method in serving_apis.METHODS:
        if method.endswith("HandleReloadConfigRequest"):
            continue
        assert ask("m", method) == "plain"
        assert ask("m", method, version=7, signature="score") == "seven"  # the first that matches
        assert ask("m", method, version=8) == "plain"
        assert ask("m", method, label="canary") == "canary"
        assert ask("m", method, signature="score") == "scores"
        assert ask("other", method, version=7) == "rest"


def test_discovery_asks_who_holds_a_model(
    servers: dict[str, ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    addresses = [server.target for server in servers.values()]
    config = f"default: {{backends: {addresses}, discover: true}}\n{FAST}"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    for _ in range(4):
        assert ask_ids(proxy.target, "shop") == [100]
        assert ask_ids(proxy.target, "keyed") == [200]
    status = serving_apis.GetModelStatusRequest()
    status.model_spec.name = "keyed"
    assert call(proxy.target, serving_apis.GET_MODEL_STATUS, status.SerializeToString())[0] is grpc.StatusCode.OK
    code, details, *_ = call(proxy.target, serving_apis.PREDICT, predict("nowhere", query=["a"]))
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, "Servable not found for request: Latest(nowhere)")


def test_reload_takes_a_good_file_over_and_refuses_a_bad_one(
    servers: dict[str, ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    path = tmp_path / "p.yaml"
    shop, keyed = (f"{{backends: ['{servers[name].target}']}}" for name in ("shop", "keyed"))
    proxy = start_proxy(write_yaml(path, f"models: {{shop: {shop}}}"), "--http_port=0")
    http = http_address(proxy)
    with Load(proxy.target, predict("shop", query=["abc"]), threads=2) as load:
        load.wait_for(20)
        write_yaml(path, f"models: {{shop: {shop}, keyed: {keyed}}}")
        wait_until(lambda: metric(http, "dpsr_proxy_config_reloads_total", result="ok") == 1)
        assert ask_ids(proxy.target, "keyed") == [200]
        for text in ("models: {shop: 1}", "tls: {backends: {}}\ndefault: {backends: ['h:1']}", "{"):
            refused = metric(http, "dpsr_proxy_config_reloads_total", result="refused")
            write_yaml(path, text)
            wait_until(lambda n=refused: metric(http, "dpsr_proxy_config_reloads_total", result="refused") == n + 1)
            assert ask_ids(proxy.target, "keyed") == [200]
        write_yaml(path, f"models: {{shop: {shop}}}")
        proxy.process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric(http, "dpsr_proxy_config_reloads_total", result="ok") >= 2)
        assert call(proxy.target, serving_apis.PREDICT, predict("keyed", query=["a"]))[0] is grpc.StatusCode.NOT_FOUND
        load.wait_for(20)
    assert load.failed == 0, load.details
    proxy.process.terminate()
    said = proxy.process.communicate(timeout=PATIENCE_S)[1]
    assert f"{path}: models.shop: got 1" in said and "keeping the last good configuration" in said


def test_unix_sockets_on_both_sides(start_proxy: StartProxy, servers: dict[str, ModelServer], tmp_path: Path) -> None:
    start_proxy(f"--backend={servers['shop'].target}", f"--unix_socket={tmp_path / 'inner'}")
    config = f"default: {{backends: ['unix:{tmp_path / 'inner'}']}}"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    assert ask_ids(proxy.target, "shop") == [100]


# Rewriting the model spec


def test_rewritten_model_spec_keeps_all_else() -> None:
    request = serving_apis.PredictRequest.FromString(predict("a", "search", query=["x" * 200]))
    request.model_spec.version_label = "stable"
    unknown = b"\x9a\x3f\x03new"
    message = request.SerializeToString() + unknown
    got = routing.rewrite_model_spec(message, (1,), routing.Spec("b", version=9))
    assert got.endswith(unknown)
    request.model_spec.name = "b"
    request.model_spec.version.value = 9
    assert serving_apis.PredictRequest.FromString(got.removesuffix(unknown)) == request
    multi = serving_apis.MultiInferenceRequest()
    for signature in ("s", "t"):
        task = multi.tasks.add()
        task.model_spec.name, task.model_spec.signature_name, task.method_name = "a", signature, "m"
    got = routing.rewrite_model_spec(multi.SerializeToString(), (1, 1), routing.Spec("b", label="canary"))
    for task in multi.tasks:
        task.model_spec.name, task.model_spec.version_label = "b", "canary"
    assert serving_apis.MultiInferenceRequest.FromString(got) == multi


def test_targets_without_a_version_mean_the_latest_of_another_model() -> None:
    config = parse_config("models: {a: {backends: ['h:1']}, b: {backends: ['h:2']}}")
    from dpsr_serving.proxy.config import TargetConfig

    asked = routing.Spec("a", version=7, signature="search")
    for target, spec, address in (
        (TargetConfig(), asked, "h:1"),
        (TargetConfig(model="b"), routing.Spec("b", signature="search"), "h:2"),
        (TargetConfig(model="a"), asked, "h:1"),
        (TargetConfig(label="canary"), routing.Spec("a", label="canary", signature="search"), "h:1"),
    ):
        new, pool = routing.redirect(config, asked, target)
        assert new == spec and pool is not None and pool.shards == ((address,),)
