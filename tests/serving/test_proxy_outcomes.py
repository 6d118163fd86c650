"""Servers that answer checks but not requests, and second calls for requests that take long."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import PATIENCE_S
from proxy_backends import (
    Load,
    RecordingBackend,
    StartBackend,
    StartProxy,
    call,
    http_address,
    metric,
    predict,
    wait_until,
    write_yaml,
)

from dpsr_common import serving_apis
from dpsr_serving.proxy.outcomes import Outcomes, does_badly, is_silent


def outcomes(good: int = 0, failed: int = 0, seconds: float = 0.01, now: float = 100.0) -> Outcomes:
    made = Outcomes(10)
    for _ in range(good):
        made.add(now, seconds, True)
    for _ in range(failed):
        made.add(now, seconds, False)
    return made


def test_outcomes_forget() -> None:
    made = outcomes(good=3, failed=2, now=100.0)
    assert (made.calls(101), made.failed(101)) == (5, 2)
    made.add(106, 0.01, True)
    assert (made.calls(106), made.failed(106)) == (6, 2)
    assert made.calls(111.5) == 1
    assert made.calls(130) == 0 and made.quantile(130, 0.5) is None


def test_quantiles_are_right_to_a_tenth() -> None:
    made = Outcomes(10)
    for milliseconds in range(1, 1001):
        made.add(0, milliseconds / 1000, True)
    made.add(0, 500, False)  # how long a failure took says nothing
    for share in (0.05, 0.5, 0.95, 1.0):
        assert made.quantile(0, share) == pytest.approx(share, rel=0.11)
    for seconds in (0.0, 1e9):  # beyond the first and the last bucket
        made.add(0, seconds, True)


@pytest.mark.parametrize(
    ("one", "peer", "badly"),
    [
        (outcomes(good=5, failed=5), outcomes(good=10), True),
        (outcomes(good=6, failed=4), outcomes(good=10), False),
        (outcomes(failed=4), outcomes(good=10), False),  # too few
        (outcomes(failed=9), outcomes(good=4), False),  # too few to compare with
        (outcomes(failed=9), outcomes(good=5, failed=5), False),  # it is the requests
        (outcomes(good=9, seconds=0.5), outcomes(good=9, seconds=0.01), True),
        (outcomes(good=9, seconds=0.05), outcomes(good=9, seconds=0.001), False),  # not slow enough to matter
        (outcomes(good=9, seconds=5), outcomes(good=9, seconds=1), False),
    ],
)
def test_a_server_is_compared_with_its_peers(one: Outcomes, peer: Outcomes, badly: bool) -> None:
    assert does_badly(one, [peer], 100.0) is badly


def test_a_server_is_silent_if_its_peers_are_not() -> None:
    peers = [outcomes(good=10, seconds=0.01)]
    assert is_silent(2, 0.6, peers, 100.0)
    assert not is_silent(1, 60, peers, 100.0)  # one request may take long
    assert not is_silent(2, 0.4, peers, 100.0)
    assert not is_silent(2, 0.6, [outcomes(good=10, seconds=0.1)], 100.0)
    assert not is_silent(2, 60, [outcomes(failed=10)], 100.0)
    assert not is_silent(2, 60, [], 100.0)


def pool_of(backends: list[RecordingBackend], more: str = "") -> str:
    addresses = [backend.target for backend in backends]
    health = "{every_s: 0.1, timeout_s: 10, eject_s: 0.3, return_s: 0.2}"
    return f"models: {{m: {{backends: {addresses}}}}}\nhealth: {health}\n{more}"


def test_a_server_that_hangs_on_requests_fails_none(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    good, bad = start_backend(), start_backend()
    release = threading.Event()
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", pool_of([good, bad])), "--http_port=0")
    http = http_address(proxy)
    with Load(proxy.target, predict("m"), threads=8) as load:
        load.wait_for(100)
        bad.answer = lambda request, context: (release.wait(PATIENCE_S), request)[1]
        wait_until(lambda: metric(http, "dpsr_proxy_ejections_total", backend=bad.target) == 1)
        load.wait_for(200)
        # It still hangs, so a call like those of clients keeps it out, however well it answers other checks.
        time.sleep(1.0)
        assert metric(http, "dpsr_proxy_backend_up", backend=bad.target) == 0
        bad.answer = lambda request, context: request
        release.set()
        wait_until(lambda: metric(http, "dpsr_proxy_backend_up", backend=bad.target) == 1)
        load.wait_for(100)
    assert load.failed == 0, load.details


def test_a_server_that_fails_alone_is_taken_out_and_never_all_of_them(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    backends = [start_backend() for _ in range(2)]
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", pool_of(backends)), "--http_port=0")
    http = http_address(proxy)

    def fail(request: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.INTERNAL, "broken")
        raise AssertionError

    backends[0].answer = fail

    def is_out() -> bool:
        call(proxy.target, serving_apis.PREDICT, predict("m"))
        return metric(http, "dpsr_proxy_backend_up", backend=backends[0].target) == 0

    wait_until(is_out)
    for _ in range(5):
        assert call(proxy.target, serving_apis.PREDICT, predict("m"))[0] is grpc.StatusCode.OK
    backends[1].answer = fail
    for _ in range(20):
        assert call(proxy.target, serving_apis.PREDICT, predict("m"))[0] is grpc.StatusCode.INTERNAL
    assert metric(http, "dpsr_proxy_backend_up", backend=backends[1].target) == 1


def test_a_second_server_is_asked_when_the_first_takes_long(
    start_backend: Callable[[], RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    backends = [start_backend(), start_backend()]
    hedged = start_proxy(write_yaml(tmp_path / "p.yaml", pool_of(backends, "hedge: {budget: 0.5}\n")))
    plain = start_proxy(write_yaml(tmp_path / "q.yaml", pool_of(backends)))
    for _ in range(20):
        assert call(hedged.target, serving_apis.PREDICT, predict("m"))[0] is grpc.StatusCode.OK
    slow, turn, lock = threading.Event(), itertools.count(), threading.Lock()

    def first_is_slow(request: bytes, context: Any) -> bytes:
        with lock:
            number = next(turn)
        if number == 0:
            slow.wait(PATIENCE_S)
            return b"late"
        return request

    for backend in backends:
        backend.answer = first_is_slow
    code, _, response, *_ = call(hedged.target, serving_apis.PREDICT, predict("m"))
    assert code is grpc.StatusCode.OK and response == predict("m") and next(turn) == 2
    turn = itertools.count()
    code, *_ = call(plain.target, serving_apis.PREDICT, predict("m"), 0.5)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED and next(turn) == 1
    slow.set()
