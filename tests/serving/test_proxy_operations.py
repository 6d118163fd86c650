"""Running the proxy: HTTP pages, metrics, access log, TLS, several workers."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import socket
import ssl
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import PATIENCE_S, alive, freeze, run_command
from proxy_backends import (
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
from dpsr_common.errors import UsageError
from dpsr_serving.model_server import ModelServer
from dpsr_serving.proxy import workers
from dpsr_serving.proxy.calls import readable
from dpsr_serving.proxy.config import (
    AccessLogConfig,
    ExperimentConfig,
    HealthConfig,
    ModelConfig,
    PoolConfig,
    ProxyConfig,
    RetryConfig,
    RuleConfig,
    ShadowConfig,
    TargetConfig,
    TlsConfig,
    parse_config,
)
from dpsr_serving.proxy.metrics import METRICS, Metrics, merge
from dpsr_serving.proxy.workers import Settings, _Worker

ROOT = Path(__file__).resolve().parents[2]


# HTTP and metrics


def test_pages(servers: dict[str, ModelServer], start_proxy: StartProxy) -> None:
    proxy = start_proxy(f"--backend={servers['shop'].target}", "--http_port=0")
    http = http_address(proxy)
    assert get(http, "/healthz") == (200, "ok\n")
    wait_until(lambda: get(http, "/readyz")[0] == 200)
    assert get(http, "/elsewhere")[0] == 404
    assert ask_ids(proxy.target, "shop") == [100]
    call(proxy.target, serving_apis.PREDICT, predict("invented", query=["a"]))
    call(proxy.target, serving_apis.PREDICT, b"")
    text = get(http, "/metrics")[1]
    for name, (kind, _, _) in METRICS.items():
        assert f"# TYPE {name} {kind}\n" in text
    series = re.compile(r'[a-z_]+\{([a-z_]+="([^"\\\n]|\\.)*",?)*\} [0-9.e+-]+|# (HELP|TYPE) .*')
    assert all(series.fullmatch(line) for line in text.splitlines())
    assert metric(http, "dpsr_proxy_requests_total", method="Predict", code="OK") == 1
    assert metric(http, "dpsr_proxy_requests_total", code="INVALID_ARGUMENT") == 1
    assert "invented" not in text  # clients can invent names, which must not create series
    assert metric(http, "dpsr_proxy_backend_up", backend=servers["shop"].target) == 1
    assert metric(http, "dpsr_proxy_backend_outstanding", backend=servers["shop"].target) == 0


def test_unready_without_backends(start_proxy: StartProxy) -> None:
    http = http_address(start_proxy("--backend=127.0.0.1:1", "--http_port=0"))
    wait_until(lambda: 'dpsr_proxy_backend_up{backend="127.0.0.1:1"} 0' in get(http, "/metrics")[1])
    assert get(http, "/readyz") == (503, "not ready\n")
    assert get(http, "/healthz")[0] == 200


def test_metrics_of_workers_add_up() -> None:
    dumps = []
    for seconds, up in ((0.0015, 1.0), (7.0, 0.0), (70.0, 1.0)):
        metrics = Metrics()
        metrics.count("dpsr_proxy_retries_total", ('m"\\\n',))
        metrics.observe("dpsr_proxy_request_seconds", ("m", "", ""), seconds)
        metrics.set("dpsr_proxy_backend_up", {("b",): up})
        dumps.append(metrics.dump())
    lines = merge(dumps).splitlines()
    assert 'dpsr_proxy_retries_total{model="m\\"\\\\\\n"} 3' in lines
    assert 'dpsr_proxy_backend_up{backend="b"} 0' in lines
    labels = 'model="m",experiment="",arm=""'
    for edge, count in (("0.001", 0), ("0.002", 1), ("5.0", 1), ("10.0", 2), ("+Inf", 3)):
        assert f'dpsr_proxy_request_seconds_bucket{{{labels},le="{edge}"}} {count}' in lines
    assert f"dpsr_proxy_request_seconds_sum{{{labels}}} 77.0015" in lines
    assert f"dpsr_proxy_request_seconds_count{{{labels}}} 3" in lines


def test_documentation_names_every_metric() -> None:
    text = (ROOT / "docs" / "proxy.md").read_text()
    assert all(f"`{name}`" in text for name in METRICS)


def test_access_log_samples_and_keeps_errors(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    backend = start_backend()
    log = tmp_path / "access.log"
    config = f"default: {{backends: ['{backend.target}']}}\naccess_log: {{path: {log}, sample: 0, metadata: [trace]}}"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config))
    for _ in range(20):
        call(proxy.target, serving_apis.PREDICT, predict("m"))
    assert log.read_text() == ""

    def refuse(request: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "wrong\ninput")
        raise AssertionError

    backend.answer = refuse
    request = predict("m", "search")
    call(proxy.target, serving_apis.PREDICT, request, PATIENCE_S, (("trace", "t1"), ("secret", "s")))
    (line,) = log.read_text().splitlines()
    entry = json.loads(line)
    assert entry.pop("time") > 1.6e9 and entry.pop("ms") >= 0
    assert entry == {
        "method": "Predict",
        "model": "m",
        "signature": "search",
        "code": "INVALID_ARGUMENT",
        "backend": backend.target,
        "attempts": 1,
        "request_bytes": len(request),
        "response_bytes": 0,
        "details": "wrong\ninput",
        "metadata": {"trace": "t1"},
    }


# TLS


def test_metadata_that_is_not_base64_stays_as_it_is() -> None:
    sent = ((b"a-bin", b"AP8"), (b"b-bin", b"a"), (b"c", b"\xff"))
    assert list(readable(sent)) == [("a-bin", b"\0\xff"), ("b-bin", b"a"), ("c", "\ufffd")]


def test_mutual_tls_on_both_sides(
    certificates: Path, servers: dict[str, ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    """A client with a certificate asks a proxy that asks another with its own; the last asks a real server."""
    pem = {name: certificates / name for name in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")}
    to_shop = f"default: {{backends: ['{servers['shop'].target}']}}"
    listen = f"{{certificate: {pem['server.pem']}, key: {pem['server.key']}, ca: {pem['ca.pem']}}}"
    inner = start_proxy(write_yaml(tmp_path / "a.yaml", f"{to_shop}\ntls: {{listen: {listen}}}"))
    side = (
        f"{{certificate: {pem['client.pem']}, key: {pem['client.key']}, ca: {pem['ca.pem']}, server_name: localhost}}"
    )
    outer = start_proxy(
        write_yaml(
            tmp_path / "b.yaml",
            f"default: {{backends: ['{inner.target}']}}\ntls: {{listen: {listen}, backends: {side}}}",
        )
    )

    def ask(target: str, credentials: Any) -> grpc.StatusCode:
        with grpc.secure_channel(target, credentials) as channel:
            return (
                channel.unary_unary(serving_apis.PREDICT)
                .future(predict("shop", query=["a"]), timeout=PATIENCE_S)
                .code()
            )

    read = {name: path.read_bytes() for name, path in pem.items()}
    known = grpc.ssl_channel_credentials(read["ca.pem"], read["client.key"], read["client.pem"])
    unknown = grpc.ssl_channel_credentials(read["ca.pem"])
    for proxy in (inner, outer):
        assert ask(proxy.target, known) is grpc.StatusCode.OK
        assert ask(proxy.target, unknown) is grpc.StatusCode.UNAVAILABLE
    assert call(outer.target, serving_apis.PREDICT, predict("shop", query=["a"]))[0] is grpc.StatusCode.UNAVAILABLE
    # Without its certificate the proxy cannot reach the inner one either.
    bare = start_proxy(
        write_yaml(
            tmp_path / "c.yaml",
            f"default: {{backends: ['{inner.target}']}}\n"
            f"tls: {{backends: {{ca: {pem['ca.pem']}, server_name: localhost}}}}",
        )
    )
    code, details, *_ = call(bare.target, serving_apis.PREDICT, predict("shop", query=["a"]))
    assert code is grpc.StatusCode.UNAVAILABLE and inner.target in details


def test_certificates_are_renewed_under_load(
    certificates: Path, servers: dict[str, ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    """The outer proxy gets the inner one's authority, and the inner one a new certificate, while clients ask."""
    ca = certificates / "ca.pem"

    def put(name: str, source: Path) -> None:
        (tmp_path / "new").write_bytes(source.read_bytes())
        (tmp_path / "new").rename(tmp_path / name)

    put("a.pem", certificates / "server.pem")
    put("a.key", certificates / "server.key")
    put("ca.pem", certificates / "client.pem")  # not the authority
    listen = f"{{certificate: {tmp_path}/a.pem, key: {tmp_path}/a.key}}"
    text = f"default: {{backends: ['{servers['shop'].target}']}}\ntls: {{listen: {listen}}}"
    inner = start_proxy(write_yaml(tmp_path / "a.yaml", text), "--http_port=0")
    http = http_address(inner)
    address = inner.target.replace("127.0.0.1", "localhost")
    text = f"default: {{backends: ['{address}']}}\ntls: {{backends: {{ca: {tmp_path}/ca.pem}}}}"
    outer = start_proxy(write_yaml(tmp_path / "b.yaml", text))
    request = predict("shop", query=["a"])
    assert call(outer.target, serving_apis.PREDICT, request)[0] is grpc.StatusCode.UNAVAILABLE
    put("ca.pem", ca)
    wait_until(lambda: call(outer.target, serving_apis.PREDICT, request)[0] is grpc.StatusCode.OK)

    def shown() -> str:
        """The name in the certificate that a new connection sees."""
        host, _, port = inner.target.rpartition(":")
        context = ssl.create_default_context(cafile=str(ca))
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection((host, int(port)), PATIENCE_S)
        with context.wrap_socket(plain, server_hostname="localhost") as secure:
            found: Any = secure.getpeercert()
            return str(found["subject"][0][0][1])

    def refused() -> bool:
        return metric(http, "dpsr_proxy_config_reloads_total", result="refused") == 1

    assert shown() == "server"
    stop, codes = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca.read_bytes())) as channel:
                future = channel.unary_unary(serving_apis.PREDICT).future(request, timeout=PATIENCE_S)
                codes.extend([future.code(), call(outer.target, serving_apis.PREDICT, request)[0]])
            stop.wait(0.03)

    client = threading.Thread(target=ask)
    client.start()
    try:
        put("a.pem", certificates / "client.pem")
        wait_until(refused)  # the key is still the old one
        assert shown() == "server"
        put("a.key", certificates / "client.key")
        wait_until(lambda: shown() == "client")
    finally:
        stop.set()
        client.join()
    assert set(codes) == {grpc.StatusCode.OK}


def test_missing_certificate_is_one_clear_line(tmp_path: Path) -> None:
    flag = write_yaml(
        tmp_path / "p.yaml",
        f"default: {{backends: ['h:1']}}\ntls: {{listen: {{certificate: {tmp_path}/no.pem, key: {tmp_path}/no.key}}}}",
    )
    for more in ((), ("--workers=2",)):
        result = run_command("proxy", flag, "--port=0", *more)
        assert result.returncode == 1 and result.stderr.count("\n") == 1
        assert f"{tmp_path}/no.key: No such file" in result.stderr


# Workers


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_workers_share_the_port_and_are_replaced(
    servers: dict[str, ModelServer], start_proxy: StartProxy, tmp_path: Path
) -> None:
    path = tmp_path / "p.yaml"
    shop, keyed = (f"{{backends: ['{servers[name].target}']}}" for name in ("shop", "keyed"))
    proxy = start_proxy(write_yaml(path, f"models: {{shop: {shop}}}"), "--workers=2", "--http_port=0")
    http = http_address(proxy)
    wait_until(lambda: get(http, "/readyz")[0] == 200)
    workers = children(proxy.process.pid)
    assert len(workers) == 2

    def spent(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return float(int(fields[11]) + int(fields[12]))

    before = [spent(pid) for pid in workers]
    asked = 0

    def both_work() -> bool:
        nonlocal asked
        for _ in range(20):  # a connection each: the kernel spreads them
            assert ask_ids(proxy.target, "shop") == [100]
            asked += 1
        return all(spent(pid) > start for pid, start in zip(workers, before, strict=True))

    wait_until(both_work)
    assert metric(http, "dpsr_proxy_requests_total", code="OK") == asked
    write_yaml(path, f"models: {{shop: {shop}, keyed: {keyed}}}")
    wait_until(lambda: metric(http, "dpsr_proxy_config_reloads_total", result="ok") == 2)
    assert {tuple(ask_ids(proxy.target, "keyed")) for _ in range(10)} == {(200,)}
    os.kill(workers[0], signal.SIGKILL)

    def replaced() -> bool:
        now = children(proxy.process.pid)
        return len(now) == 2 and workers[0] not in now

    wait_until(replaced)
    wait_until(lambda: metric(http, "dpsr_proxy_backend_up", backend=servers["shop"].target) == 1)
    for _ in range(20):
        assert ask_ids(proxy.target, "shop") == [100]
    # A second proxy must not share the port unnoticed.
    port = proxy.target.rpartition(":")[2]
    for more in ((), ("--workers=2",)):
        result = run_command("proxy", f"--backend={servers['shop'].target}", f"--port={port}", *more)
        assert result.returncode == 1 and f"cannot listen on 127.0.0.1:{port}" in result.stderr
    rest = children(proxy.process.pid)
    proxy.process.terminate()
    assert proxy.process.wait(PATIENCE_S) == 0
    assert not any(alive(pid) for pid in rest)


def test_a_worker_that_stops_for_a_while_is_counted_again(
    servers: dict[str, ModelServer], start_proxy: StartProxy
) -> None:
    proxy = start_proxy(f"--backend={servers['shop'].target}", "--workers=2", "--http_port=0")
    http = http_address(proxy)
    wait_until(lambda: get(http, "/readyz")[0] == 200)
    for _ in range(20):
        assert ask_ids(proxy.target, "shop") == [100]
    stopped = children(proxy.process.pid)[0]
    freeze(stopped)
    try:
        assert metric(http, "dpsr_proxy_requests_total", code="OK") < 20
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: metric(http, "dpsr_proxy_requests_total", code="OK") == 20)


def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may lack processes or memory for a while."""

    class Ended:
        async def wait(self) -> int:
            return 1

    async def keep() -> int:
        worker, starts, running = _Worker(Settings(None, "h:1", "h", 1, None, 0, None, 2)), 0, asyncio.Event()

        async def start() -> None:
            nonlocal starts
            starts += 1
            if starts < 3:
                raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
            running.set()
            await asyncio.sleep(PATIENCE_S)

        monkeypatch.setattr(worker, "_process", Ended())
        monkeypatch.setattr(worker, "start", start)
        keeper = asyncio.create_task(worker.keep())
        await asyncio.wait_for(running.wait(), PATIENCE_S)
        keeper.cancel()
        return starts

    monkeypatch.setattr(workers, "_RESTART_S", 0.01)
    assert asyncio.run(keep()) == 3


def test_workers_drain(start_backend: StartBackend, start_proxy: StartProxy) -> None:
    backend = start_backend()
    release = threading.Event()
    backend.answer = lambda request, context: (release.wait(PATIENCE_S), b"late")[1]
    proxy = start_proxy(f"--backend={backend.target}", "--workers=2")
    with futures.ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(call, proxy.target, serving_apis.PREDICT, predict("m")) for _ in range(4)]
        for _ in pending:
            assert backend.entered.acquire(timeout=PATIENCE_S)
        proxy.process.terminate()
        wait_until(lambda: call(proxy.target, serving_apis.PREDICT, b"")[0] is grpc.StatusCode.UNAVAILABLE)
        release.set()
        assert {done.result()[2] for done in pending} == {b"late"}
    assert proxy.process.wait(PATIENCE_S) == 0


def test_workers_end_with_the_first_process(servers: dict[str, ModelServer], start_proxy: StartProxy) -> None:
    proxy = start_proxy(f"--backend={servers['shop'].target}", "--workers=2", "--drain_s=0")
    workers = children(proxy.process.pid)
    proxy.process.kill()
    wait_until(lambda: not any(alive(pid) for pid in workers))


def test_sigterm_under_load_answers_or_is_unavailable(servers: dict[str, ModelServer], start_proxy: StartProxy) -> None:
    proxy = start_proxy(f"--backend={servers['shop'].target}")
    with Load(proxy.target, predict("shop", query=["abc"])) as load:
        load.wait_for(50)
        proxy.process.terminate()
        assert proxy.process.wait(PATIENCE_S) == 0
        wait_until(lambda: load.failed > 0)
    # gRPC cancels a call that arrives at the moment of the shutdown: at most one for each thread.
    cancelled = load.codes.count(grpc.StatusCode.CANCELLED)
    assert cancelled <= 4
    assert set(load.codes) - {grpc.StatusCode.CANCELLED} == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


# The configuration


def test_whole_config() -> None:
    config = parse_config(
        """
        models:
          a:
            shards: [["h1:1", "h2:1"], ["h3:1"]]
            missing_shards: error
            shard_timeout_s: 0.5
            rules:
            - {version: 7, backends: ["h4:1"]}
            - {label: canary, signature: search, backends: ["unix:/run/x"], discover: true}
            experiment:
              name: e
              key: user-id
              override: x-arm
              arms: {new: {weight: 1, model: b}, old: {weight: 9.5, label: stable}}
            shadow: {share: 0.25, version: 9, backends: ["h5:1"]}
          b: {backends: ["h6:1"]}
        default: {backends: ["h7:1"], discover: true}
        max_outstanding: 64
        health: {every_s: 2, timeout_s: 0.5, failures: 3, return_s: 0}
        retries: {attempts: 2, budget: 0.1, reserve: 5}
        tls:
          listen: {certificate: c, key: k, ca: a}
          backends: {ca: b, server_name: s}
        access_log: {path: /log, sample: 1, errors: false, metadata: [user-id]}
        """
    )
    assert config == ProxyConfig(
        models={
            "a": ModelConfig(
                PoolConfig((("h1:1", "h2:1"), ("h3:1",)), allow_partial=False, shard_timeout_s=0.5),
                (
                    RuleConfig(PoolConfig((("h4:1",),)), version=7),
                    RuleConfig(PoolConfig((("unix:/run/x",),), discover=True), label="canary", signature="search"),
                ),
                ExperimentConfig(
                    "e",
                    "user-id",
                    "x-arm",
                    {"new": 1.0, "old": 9.5},
                    {"new": TargetConfig(model="b"), "old": TargetConfig(label="stable")},
                ),
                ShadowConfig(TargetConfig(PoolConfig((("h5:1",),)), version=9), 0.25),
            ),
            "b": ModelConfig(PoolConfig((("h6:1",),))),
        },
        default=PoolConfig((("h7:1",),), discover=True),
        max_outstanding=64,
        health=HealthConfig(2, 0.5, 3, 0),
        retries=RetryConfig(2, 0.1, 5),
        listen_tls=TlsConfig("c", "k", "a"),
        backend_tls=TlsConfig(ca="b", server_name="s"),
        access_log=AccessLogConfig("/log", 1, False, ("user-id",)),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: {m: {shards: [['h:1']]}}", "models.m.shards: got [['h:1']], expected at least two"),
        ("models: {m: {shards: [['h:1'], ['h:1']]}}", "each address once"),
        ("models: {m: {shards: [['h:1'], ['h']]}}", "models.m.shards[1][0]: got 'h'"),
        ("models: {m: {shards: [], backends: ['h:1']}}", "models.m.shards: cannot be combined with backends"),
        (
            "models: {m: {backends: ['h:1'], missing_shards: error}}",
            "models.m.missing_shards: got 'error', but it only applies to shards",
        ),
        ("models: {m: {shards: [['h:1'], ['h:2']], missing_shards: no}}", "expected 'partial' or 'error'"),
        ("models: {m: {backends: ['h:1'], discover: 1}}", "models.m.discover: got 1, expected true or false"),
        ("models: {m: {rules: []}}", "models.m.backends: got None"),
        ("models: {m: {backends: ['h:1'], rules: 3}}", "models.m.rules: got 3"),
        ("models: {m: {backends: ['h:1'], rules: [{backends: ['h:1']}]}}", "expected a version, a label or a sig"),
        ("models: {m: {backends: ['h:1'], rules: [{version: 1}]}}", "models.m.rules[0].backends: got None"),
        ("models: {m: {backends: ['h:1'], rules: [{version: -1, backends: ['h:1']}]}}", "rules[0].version: got -1"),
        ("models: {m: {backends: ['h:1'], experiment: {name: e, key: k, arms: {}}}}", "experiment.arms: got {}"),
        ("models: {m: {backends: ['h:1'], experiment: {name: e, arms: {a: {weight: 1}}}}}", "experiment.key: got None"),
        (
            "models: {m: {backends: ['h:1'], experiment: {name: e, key: K, arms: {a: {weight: 1}}}}}",
            "experiment.key: got 'K', expected a metadata key: lower case",
        ),
        (
            "models: {m: {backends: ['h:1'], experiment: {name: e, key: k, arms: {a: {weight: 0}}}}}",
            "experiment.arms.a.weight: got 0, expected a number above 0",
        ),
        (
            "models: {m: {backends: ['h:1'], experiment: {name: e, key: k, arms: {a: {weight: 1, model: x}}}}}",
            "models.m.experiment.arms.a.model: got 'x', expected one of the configured models",
        ),
        ("models: {m: {backends: ['h:1'], shadow: {share: 1}}}", "expected the target of the copies"),
        ("models: {m: {backends: ['h:1'], shadow: {share: 2, version: 1}}}", "shadow.share: got 2"),
        (
            "default: {backends: ['h:1']}\nmax_outstanding: 0",
            "max_outstanding: got 0, expected an integer of",
        ),
        ("default: {backends: ['h:1']}\nhealth: {every_s: .nan}", "health.every_s: got nan"),
        ("default: {backends: ['h:1']}\nhealth: {every: 1}", "health: unknown key 'every'"),
        ("default: {backends: ['h:1']}\nretries: {budget: 1.5}", "retries.budget: got 1.5"),
        ("default: {backends: ['h:1']}\ntls: {listen: {certificate: a}}", "tls.listen: got"),
        ("default: {backends: ['h:1']}\naccess_log: {}", "access_log.path: got None"),
        ("default: {discover: true}", "default.backends: got None"),
    ],
)
def test_bad_config_names_key_value_and_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_config(text)
    assert words in str(raised.value)


def test_a_reload_that_fails_in_any_way_leaves_the_proxy_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Server:
        def __init__(self, signals: Any) -> None:
            self.metrics, self.stopped = Metrics(), False
            self._signals = signals

        def renew_certificates(self) -> list[str]:
            return []

        async def reload(self, config: Any) -> None:
            self._signals.stop_now()
            raise OverflowError("a number that is too large")

        async def stop(self, grace_s: float) -> None:
            self.stopped = True

    path = tmp_path / "proxy.yaml"
    path.write_text("default: {backends: ['h:1']}\n")

    async def serve() -> bool:
        signals = workers._Signals()
        server = Server(signals)
        settings = Settings(str(path), None, "127.0.0.1", 0, None, 0.0, None, 1)
        await asyncio.wait_for(workers._serve(settings, server, signals, None), PATIENCE_S)
        return server.stopped

    assert asyncio.run(serve())
    assert "a number that is too large; keeping the last good configuration" in capsys.readouterr().err
