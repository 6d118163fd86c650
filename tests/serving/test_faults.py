"""Clients under load must not notice that servers are killed, hang, end, come back, or get another version.

Real model servers and proxies, each a process; benchmarks/faults.py measures the same.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from processes import PATIENCE_S, free_port, freeze, save_search_model
from proxy_backends import (
    FAST,
    Load,
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
from saved_models import publish

from dpsr_common import serving_apis
from dpsr_serving.model_server import ModelServer, start_model_server


@pytest.fixture
def pair(model_paths: dict[str, Path]) -> Iterator[list[ModelServer]]:
    """Two servers of the model "shop" that a test may harm."""
    running = [start_model_server(model_paths["shop"], "shop", free_port(), op_libraries=()) for _ in range(2)]
    yield running
    for server in running:
        server.process.send_signal(signal.SIGCONT)
        server.stop()


def shop_config(pair: list[ModelServer], more: str = FAST) -> str:
    return f"models: {{shop: {{backends: {[server.target for server in pair]}}}}}\n{more}"


def test_killed_backend_fails_no_request_and_gets_no_more(
    pair: list[ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", shop_config(pair)), "--http_port=0")
    http = http_address(proxy)
    with Load(proxy.target, predict("shop", query=["abc"])) as load:
        load.wait_for(200)
        pair[0].process.kill()
        load.wait_for(400)
    assert load.failed == 0, load.details
    # Each lost call was made again once, and the dead server gets no new calls.
    assert metric(http, "dpsr_proxy_backend_failures_total", backend=pair[0].target) <= 8
    wait_until(lambda: metric(http, "dpsr_proxy_backend_up", backend=pair[0].target) == 0)
    wait_until(lambda: metric(http, "dpsr_proxy_backend_up", backend=pair[1].target) == 1)


def test_hanging_backend_fails_no_request_and_comes_back(
    pair: list[ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", shop_config(pair)), "--http_port=0")
    http = http_address(proxy)
    with Load(proxy.target, predict("shop", query=["abc"])) as load:
        load.wait_for(100)
        freeze(pair[0].process.pid)
        wait_until(lambda: metric(http, "dpsr_proxy_backend_up", backend=pair[0].target) == 0)
        load.wait_for(200)
        pair[0].process.send_signal(signal.SIGCONT)
        wait_until(lambda: metric(http, "dpsr_proxy_backend_up", backend=pair[0].target) == 1)
        load.wait_for(100)
    assert load.failed == 0, load.details
    assert metric(http, "dpsr_proxy_retries_total", model="shop") >= 1
    pair[1].process.kill()  # the server that came back has to answer alone
    assert ask_ids(proxy.target, "shop") == [100]


def test_restarted_backend_is_found_again(
    pair: list[ModelServer], model_paths: dict[str, Path], start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", shop_config(pair[:1])), "--http_port=0")
    http = http_address(proxy)
    wait_until(lambda: get(http, "/readyz")[0] == 200)
    pair[0].process.kill()
    pair[0].process.wait()
    wait_until(lambda: get(http, "/readyz")[0] == 503)
    code, details, *_ = call(proxy.target, serving_apis.PREDICT, predict("shop", query=["a"]))
    assert code is grpc.StatusCode.UNAVAILABLE and "model 'shop'" in details and pair[0].target in details
    with start_model_server(model_paths["shop"], "shop", pair[0].port, op_libraries=()):
        wait_until(lambda: get(http, "/readyz")[0] == 200)
        assert ask_ids(proxy.target, "shop") == [100]


@pytest.mark.slow
def test_servers_that_end_in_turn_fail_no_request(
    pair: list[ModelServer], model_paths: dict[str, Path], start_proxy: StartProxy, tmp_path: Path
) -> None:
    """A rolling restart: each gets SIGTERM under load, drains, and is started again."""
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", shop_config(pair)), "--http_port=0")
    http = http_address(proxy)
    with Load(proxy.target, predict("shop", query=["abc"]), threads=8) as load:
        for index in range(2):
            load.wait_for(300)
            server, port = pair[index], pair[index].port
            server.process.send_signal(signal.SIGTERM)
            load.wait_for(300)
            server.stop()
            pair[index] = start_model_server(model_paths["shop"], "shop", port, op_libraries=())
            wait_until(lambda n=index: metric(http, "dpsr_proxy_backend_up", backend=pair[n].target) == 1)
    assert load.failed == 0, load.details


@pytest.mark.slow
def test_all_gone_under_load_is_unavailable_by_name_and_ends_when_one_is_back(
    pair: list[ModelServer], model_paths: dict[str, Path], start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", shop_config(pair)), "--http_port=0")
    http = http_address(proxy)
    with Load(proxy.target, predict("shop", query=["abc"]), timeout=PATIENCE_S) as load:
        load.wait_for(100)
        for server in pair:
            server.process.kill()
            server.process.wait()
        wait_until(lambda: get(http, "/readyz")[0] == 503)
        load.wait_for(50)  # each would take a minute if the proxy waited for a server
        with start_model_server(model_paths["shop"], "shop", pair[0].port, op_libraries=()):
            wait_until(lambda: get(http, "/readyz")[0] == 200)
            good = load.codes.count(grpc.StatusCode.OK)
            wait_until(lambda: load.codes.count(grpc.StatusCode.OK) > good + 100)
    assert set(load.codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    words = {words for words in load.details if "server is starting" not in words}  # the starting server's own message
    assert words and all(text.startswith("model 'shop': ") for text in words), words


def test_all_backends_gone_is_told_at_once(pair: list[ModelServer], start_proxy: StartProxy, tmp_path: Path) -> None:
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", shop_config(pair)))
    for server in pair:
        server.process.kill()
        server.process.wait()
    for _ in range(3):  # without a deadline, a proxy that waited for a server would wait for ever
        code, details, *_ = call(proxy.target, serving_apis.PREDICT, predict("shop", query=["a"]), timeout=None)
        assert code is grpc.StatusCode.UNAVAILABLE and "model 'shop'" in details
        assert any(server.target in details for server in pair)


@pytest.mark.slow
def test_reloads_that_move_a_model_fail_no_request(
    pair: list[ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    path = tmp_path / "p.yaml"
    proxy = start_proxy(write_yaml(path, shop_config(pair[:1])), "--http_port=0")
    http = http_address(proxy)
    with Load(proxy.target, predict("shop", query=["abc"]), threads=8) as load:
        for count, some in enumerate((pair[1:], pair, pair[:1], pair[1:]), 1):
            write_yaml(path, shop_config(some))
            wait_until(lambda n=count: metric(http, "dpsr_proxy_config_reloads_total", result="ok") == n)
            load.wait_for(100)
    assert load.failed == 0, load.details


def test_version_rollout_over_two_backends_fails_no_request(
    model_paths: dict[str, Path], start_proxy: StartProxy, tmp_path: Path
) -> None:
    save_search_model(tmp_path / "new", base=300)
    bases = [tmp_path / "a", tmp_path / "b"]
    running = []
    try:
        for base in bases:
            base.mkdir()
            publish(model_paths["shop"] / "7", base, 7)
            running.append(
                start_model_server(base, "shop", op_libraries=(), arguments=("--file_system_poll_wait_seconds=1",))
            )
        config = f"models: {{shop: {{backends: {[s.target for s in running]}, discover: true}}}}\n{FAST}"
        proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
        pinned = serving_apis.PredictRequest.FromString(predict("shop", query=["a"]))
        pinned.model_spec.version.value = 8
        with Load(proxy.target, predict("shop", query=["abc"]), threads=2) as load:
            for number, base in enumerate(bases):
                publish(tmp_path / "new", base, 8)
                wait_until(lambda n=number: ask_ids(running[n].target, "shop") == [300])
                # A request for version 8 reaches a server that has it, and one for 7 as long as a server has that.
                wait_until(
                    lambda: (
                        call(proxy.target, serving_apis.PREDICT, pinned.SerializeToString())[0] is grpc.StatusCode.OK
                    )
                )
                for _ in range(6):
                    response = call(proxy.target, serving_apis.PREDICT, pinned.SerializeToString())[2]
                    assert serving_apis.PredictResponse.FromString(response).model_spec.version.value == 8
                old = serving_apis.PredictRequest.FromString(pinned.SerializeToString())
                old.model_spec.version.value = 7
                if number == 0:
                    for _ in range(6):
                        assert (
                            call(proxy.target, serving_apis.PREDICT, old.SerializeToString())[0] is grpc.StatusCode.OK
                        )
        assert load.failed == 0, load.details
    finally:
        for server in running:
            server.stop()
