"""Limits of a model's requests, priorities, and when refused clients come back."""

from __future__ import annotations

import json
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import PATIENCE_S
from proxy_backends import StartBackend, StartProxy, call, http_address, metric, predict, wait_until, write_yaml

from dpsr_common import serving_apis
from dpsr_common.errors import UsageError
from dpsr_serving.proxy.admission import Gate, priority_of
from dpsr_serving.proxy.config import LimitConfig, PrioritiesConfig, parse_config

SHARES = {"high": 1.0, "low": 0.5}
PRIORITIES = "priorities: {key: x-priority, default: low, shares: {high: 1, low: 0.5}}\n"
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def taken(gate: Gate, priority: str, times: int, now: float) -> int:
    return sum(gate.enter(priority, now) is None for _ in range(times))


def test_rate_of_a_bucket() -> None:
    gate = Gate(LimitConfig(requests_per_s=100, burst=10), {}, 1, 0.0)
    assert taken(gate, "", 50, 0.0) == 10
    assert taken(gate, "", 50, 0.05) == 5
    refusal = gate.enter("", 0.05)
    assert refusal is not None and refusal.limit == "requests_per_s" and "100 per second" in refusal.words
    assert refusal.wait_s == pytest.approx(0.01)
    assert taken(gate, "", 1, 0.0601) == 1  # it succeeds when the refusal said
    assert taken(gate, "", 50, 1000.0) == 10  # no more than a burst is saved up


def test_low_priorities_leave_a_part_of_the_bucket() -> None:
    gate = Gate(LimitConfig(requests_per_s=100, burst=11), SHARES, 1, 0.0)
    assert taken(gate, "low", 20, 0.0) == 6
    assert taken(gate, "high", 20, 0.0) == 5
    # Alone, requests of a low priority have the whole rate.
    gate = Gate(LimitConfig(requests_per_s=100, burst=11), SHARES, 1, 0.0)
    assert 1000 <= sum(taken(gate, "low", 1, tick / 1000) for tick in range(10_000)) <= 1006


def test_low_priorities_leave_a_part_of_the_places() -> None:
    gate = Gate(LimitConfig(in_flight=8), SHARES, 1, 0.0)
    assert taken(gate, "low", 9, 0.0) == 4
    assert taken(gate, "high", 9, 0.0) == 4
    refusal = gate.enter("low", 0.0)
    assert refusal is not None and (refusal.limit, refusal.words) == ("in_flight", "4 in flight")
    for _ in range(4):
        gate.leave(2.0)
    later = gate.enter("low", 0.0)  # four of the high priority are still there
    assert later is not None and refusal.wait_s < later.wait_s < 2.0  # requests took longer than was thought
    gate.leave(2.0)
    assert gate.enter("low", 0.0) is None


def test_workers_divide_limits() -> None:
    limit = LimitConfig(requests_per_s=100, burst=10, in_flight=5)
    assert [taken(Gate(limit, {}, workers, 0.0), "", 20, 0.0) for workers in (1, 2, 4, 100)] == [5, 3, 2, 1]


def test_new_limits_keep_count() -> None:
    gate = Gate(LimitConfig(in_flight=4), {}, 1, 0.0)
    taken(gate, "", 4, 0.0)
    gate.set_limit(LimitConfig(in_flight=6), {}, 1)
    assert taken(gate, "", 9, 0.0) == 2


def test_unknown_priorities_are_the_default() -> None:
    config = PrioritiesConfig("x-priority", "low", SHARES)
    assert priority_of(config, ((b"x-priority", b"high"),)) == "high"
    assert priority_of(config, ((b"x-priority", b"invented"),)) == "low"
    assert priority_of(config, ((b"other", b"high"),)) == "low"
    assert priority_of(None, ((b"x-priority", b"high"),)) == ""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("limit: {}", "models.m.limit: got {}, expected requests_per_s, in_flight, or both"),
        ("limit: {burst: 3, in_flight: 1}", "models.m.limit.burst: cannot be given without requests_per_s"),
        ("limit: {requests_per_s: 0}", "models.m.limit.requests_per_s: got 0, expected a number above 0"),
        ("limit: {in_flight: 0.5}", "models.m.limit.in_flight: got 0.5, expected an integer of at least 1"),
    ],
)
def test_wrong_limits(more: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_config(f"models: {{m: {{backends: ['h:1'], {more}}}}}")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("priorities", "words"),
    [
        ("{default: a, shares: {a: 1}}", "priorities.key: got None"),
        ("{key: K, default: a, shares: {a: 1}}", "priorities.key: got 'K', expected a metadata key"),
        ("{key: k, default: a}", "priorities.shares: got None, expected a mapping of names to shares"),
        ("{key: k, default: a, shares: {a: 2}}", "priorities.shares.a: got 2, expected a number above 0 and at most 1"),
        ("{key: k, default: b, shares: {a: 1}}", "priorities.default: got 'b', expected one of a"),
        ("{key: k, shares: {a: 1}}", "priorities.default: got None, expected one of a"),
    ],
)
def test_wrong_priorities(priorities: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_config(f"default: {{backends: ['h:1']}}\npriorities: {priorities}")
    assert words in str(error.value)


def test_burst_is_a_tenth_of_a_second_by_default() -> None:
    config = parse_config("default: {backends: ['h:1'], limit: {requests_per_s: 205}}")
    assert config.default_limit == LimitConfig(205, 21, None)


def test_lowest_priority_is_refused_first(start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path) -> None:
    """A model with four places, whose server holds all requests: low ones get two, high ones the others."""
    backend, go = start_backend(), threading.Event()

    def hold(request: bytes, context: Any) -> bytes:
        go.wait(PATIENCE_S)
        return request

    backend.answer = hold
    pool = f"backends: ['{backend.target}']"
    config = f"{PRIORITIES}models: {{m: {{{pool}, limit: {{in_flight: 4}}}}, free: {{{pool}}}}}\n"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config), "--http_port=0")
    http = http_address(proxy)

    def ask(priority: str, model: str = "m") -> Any:
        return call(proxy.target, serving_apis.PREDICT, predict(model), PATIENCE_S, (("x-priority", priority),))

    with futures.ThreadPoolExecutor(6) as threads:
        held = [threads.submit(ask, "invented") for _ in range(2)]
        for _ in range(2):
            assert backend.entered.acquire(timeout=PATIENCE_S)
        code, details, _, _, trailing = ask("low")
        assert code is EXHAUSTED and "model 'm': requests of priority 'low' are at their limit, 2 in flight" in details
        assert int(dict(trailing)["grpc-retry-pushback-ms"]) >= 100
        held += [threads.submit(ask, "high") for _ in range(2)]
        for _ in range(2):
            assert backend.entered.acquire(timeout=PATIENCE_S)
        assert ask("high")[0] is EXHAUSTED
        held.append(threads.submit(ask, "low", "free"))  # another model has no limit
        assert backend.entered.acquire(timeout=PATIENCE_S)
        assert metric(http, "dpsr_proxy_shed_total", model="m", priority="low", limit="in_flight") == 1
        assert metric(http, "dpsr_proxy_shed_total", model="m", priority="high", limit="in_flight") == 1
        # A status says how a model does even if the model takes no requests.
        request = serving_apis.GetModelStatusRequest()
        request.model_spec.name = "m"
        go.set()
        assert call(proxy.target, serving_apis.GET_MODEL_STATUS, request.SerializeToString())[0].value[0] == 0
        assert all(one.result()[0] is grpc.StatusCode.OK for one in held)
    assert ask("low")[0] is grpc.StatusCode.OK  # the places are free again
    # A reload changes the limit, and invented models share the limit of the default.
    text = f"default: {{{pool}, limit: {{requests_per_s: 0.001}}}}\n"
    write_yaml(tmp_path / "p.yaml", text)
    wait_until(lambda: metric(http, "dpsr_proxy_config_reloads_total", result="ok") == 1)
    assert [ask("low", model)[0] for model in ("one", "two")] == [grpc.StatusCode.OK, EXHAUSTED]
    assert metric(http, "dpsr_proxy_shed_total", model="", priority="", limit="requests_per_s") == 1


def test_clients_of_grpc_come_back_when_told(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    """A client whose retry policy would wait for minutes obeys the proxy, which tells it some 0.2 s."""
    backend = start_backend()
    limit = "limit: {requests_per_s: 5, burst: 1}"
    config = f"default: {{backends: ['{backend.target}'], {limit}}}\n"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    policy = {
        "maxAttempts": 5,
        "initialBackoff": "200s",
        "maxBackoff": "200s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }
    service = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    with grpc.insecure_channel(proxy.target, (("grpc.service_config", service),)) as channel:
        method = channel.unary_unary(serving_apis.PREDICT)
        for _ in range(3):
            method(predict("m"), timeout=PATIENCE_S)
