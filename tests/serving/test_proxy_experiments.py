"""Experiments: the assignment to arms, the targets of arms and shadow copies, and their metrics and logs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import PATIENCE_S
from proxy_backends import (
    StartBackend,
    StartProxy,
    ask_ids,
    call,
    http_address,
    metric,
    predict,
    wait_until,
    write_yaml,
)

from dpsr_common import serving_apis
from dpsr_serving.model_server import ModelServer
from dpsr_serving.proxy.experiments import assign


def test_assignment_is_pinned() -> None:
    """These values must never change, so that old logs can be joined."""
    weights = {"t": 10, "c": 40, "o": 50}
    assert "".join(assign("ranker-v2", f"user-{n}", weights) for n in range(12)) == "ctotcooocooc"
    # By hand: SHA-256("e\0k") starts with these 8 bytes.
    share = int.from_bytes(hashlib.sha256(b"e\0k").digest()[:8], "big") / 2**64
    assert assign("e", "k", {"a": share * 1.0001, "b": 1 - share}) == "a"
    assert assign("e", b"k", {"a": share * 0.9999, "b": 1 - share * 0.9999}) == "b"


def test_assignment_follows_the_weights_and_moves_nobody_needlessly() -> None:
    users = [f"u{n}" for n in range(20_000)]
    before = [assign("x", user, {"new": 10, "old": 90}) for user in users]
    after = [assign("x", user, {"new": 20, "old": 80}) for user in users]
    other = [assign("y", user, {"new": 10, "old": 90}) for user in users]
    # 4 standard deviations of a binomial share
    assert abs(before.count("new") / len(users) - 0.1) < 4 * (0.09 / len(users)) ** 0.5
    assert all(b == "old" or a == "new" for b, a in zip(before, after, strict=True))
    both = sum(a == b == "new" for a, b in zip(before, other, strict=True))
    assert abs(both / len(users) - 0.01) < 4 * (0.0099 / len(users)) ** 0.5  # independent of another experiment


@given(st.text(), st.one_of(st.text(), st.binary()), st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=5))
def test_assignment_is_one_of_the_arms(name: str, key: Any, weights: list[float]) -> None:
    arms = {f"a{i}": weight for i, weight in enumerate(weights)}
    try:
        arm = assign(name, key, arms)
    except UnicodeEncodeError:
        return
    assert arm in arms and assign(name, key, {a: 2 * w for a, w in arms.items()}) == arm


def test_assignment_refuses_weights_that_are_none() -> None:
    for weights in ({}, {"a": 0.0}, {"a": 1, "b": -1}):
        with pytest.raises(ValueError, match="weights"):
            assign("x", "u", weights)


def test_arms_are_sticky_and_reproducible_and_testers_choose(
    servers: dict[str, ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    log = tmp_path / "access.log"
    config = f"""
models:
  shop:
    backends: ["{servers["shop"].target}"]
    experiment:
      name: keys
      key: user-id
      override: x-arm
      arms:
        keyed: {{weight: 1, model: keyed, backends: ["{servers["keyed"].target}"]}}
        plain: {{weight: 3}}
access_log: {{path: {log}, sample: 1, metadata: [user-id]}}
"""
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config), "--http_port=0")
    http = http_address(proxy)
    weights = {"keyed": 1, "plain": 3}
    base = {"keyed": 200, "plain": 100}
    users = [f"user-{n}" for n in range(24)]
    expected = Counter(assign("keys", user, weights) for user in users)
    assert len(expected) == 2
    for user in users * 2:
        sent = (("user-id", user),)
        code, _, response, _, trailing = call(
            proxy.target, serving_apis.PREDICT, predict("shop", query=["a"]), 20, sent
        )
        arm = assign("keys", user, weights)
        assert code is grpc.StatusCode.OK and ("dpsr-arm", f"keys/{arm}") in trailing
        spec = serving_apis.PredictResponse.FromString(response).model_spec
        assert spec.name == {"keyed": "keyed", "plain": "shop"}[arm]
        assert ask_ids(proxy.target, "shop", metadata=sent) == [base[arm]]
    for arm, first in base.items():
        assert ask_ids(proxy.target, "shop", metadata=(("user-id", users[0]), ("x-arm", arm))) == [first]
    stranger = ask_ids(proxy.target, "shop", metadata=(("user-id", users[0]), ("x-arm", "none of them")))
    assert stranger == [base[assign("keys", users[0], weights)]]
    anonymous = {tuple(ask_ids(proxy.target, "shop")) for _ in range(4)}
    assert anonymous == {(base[assign("keys", "", weights)],)}
    total = {arm: 4 * expected[arm] + 1 for arm in base}
    total[assign("keys", users[0], weights)] += 1
    total[assign("keys", "", weights)] += 4
    for arm in base:
        assert metric(http, "dpsr_proxy_requests_total", experiment="keys", arm=arm, code="OK") == total[arm]
        assert metric(http, "dpsr_proxy_request_seconds_count", arm=arm) == total[arm]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert Counter(line["arm"] for line in lines) == total
    joined = [line for line in lines if "metadata" in line][: 4 * len(users)]
    assert all(assign("keys", line["metadata"]["user-id"], weights) == line["arm"] for line in joined)
    assert {line["backend"] for line in lines} == {server.target for server in servers.values()}
    # Requests other than inference go to the model itself, not to an arm.
    status = serving_apis.GetModelStatusRequest()
    status.model_spec.name = "shop"
    response = call(
        proxy.target, serving_apis.GET_MODEL_STATUS, status.SerializeToString(), PATIENCE_S, (("x-arm", "keyed"),)
    )[2]
    assert serving_apis.GetModelStatusResponse.FromString(response).model_version_status[0].version == 7


def test_an_arm_may_be_a_version_of_the_model(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    backend = start_backend()
    config = f"""
models:
  m:
    backends: ["{backend.target}"]
    experiment:
      name: v
      key: user-id
      arms: {{new: {{weight: 1, version: 8}}, stable: {{weight: 1, label: stable}}}}
"""
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    for user in ("a", "b", "c", "d", "e", "f"):
        response = call(proxy.target, serving_apis.PREDICT, predict("m"), PATIENCE_S, (("user-id", user),))[2]
        spec = serving_apis.PredictRequest.FromString(response).model_spec  # it answers with what it was asked
        arm = assign("v", user, {"new": 1, "stable": 1})
        assert (spec.version.value, spec.version_label) == {"new": (8, ""), "stable": (0, "stable")}[arm]
        assert spec.signature_name == "serving_default"


def test_shadow_gets_copies_and_cannot_harm(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    backend, shadow = start_backend(), start_backend()
    backend.answer = lambda request, context: b"answer"

    def fail(request: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.INTERNAL, "broken")
        raise AssertionError

    shadow.answer = fail
    config = f"""
models:
  m:
    backends: ["{backend.target}"]
    shadow: {{model: m2, backends: ["{shadow.target}"]}}
  half:
    backends: ["{backend.target}"]
    shadow: {{model: m3, share: 0.5, backends: ["{shadow.target}"]}}
"""
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config), "--http_port=0")
    http = http_address(proxy)
    for _ in range(10):
        code, _, response, *_ = call(proxy.target, serving_apis.PREDICT, predict("m"), PATIENCE_S, (("user-id", "1"),))
        assert (code, response) == (grpc.StatusCode.OK, b"answer")
    wait_until(lambda: metric(http, "dpsr_proxy_shadow_total", model="m", code="INTERNAL") == 10)
    assert {serving_apis.PredictRequest.FromString(seen[1]).model_spec.name for seen in shadow.calls} == {"m2"}
    assert all(seen[2]["user-id"] == "1" for seen in shadow.calls)
    assert metric(http, "dpsr_proxy_requests_total", model="m", code="OK") == 10
    with grpc.insecure_channel(proxy.target) as channel:
        for _ in range(200):
            channel.unary_unary(serving_apis.PREDICT)(predict("half"), timeout=PATIENCE_S)
    wait_until(lambda: metric(http, "dpsr_proxy_shadow_total", model="half") >= 60)
    assert metric(http, "dpsr_proxy_shadow_total", model="half") <= 140  # a fair coin: 5.6 standard deviations
    shadow.stop()
    assert call(proxy.target, serving_apis.PREDICT, predict("m"))[2] == b"answer"
