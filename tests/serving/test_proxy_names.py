"""Backends by DNS, with a small DNS server on loopback that answers what the test says."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import run_command
from proxy_backends import (
    Load,
    RecordingBackend,
    StartProxy,
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
from dpsr_serving.proxy.config import DnsConfig, parse_config
from dpsr_serving.proxy.metrics import Metrics
from dpsr_serving.proxy.names import _Name

dns_message = pytest.importorskip("dns.message")
import dns.flags  # noqa: E402
import dns.rcode  # noqa: E402
import dns.rdatatype  # noqa: E402
import dns.rrset  # noqa: E402

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


class DnsServer:
    """Answers from `names`: name -> addresses. An unknown name does not exist; None as addresses means no answer."""

    def __init__(self) -> None:
        self.names: dict[str, list[str] | None] = {}
        self.lookups = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            data, client = self._socket.recvfrom(4096)
            if not data:
                return
            self.lookups += 1
            query = dns_message.from_wire(data)
            question = query.question[0]
            name = question.name.to_text(omit_final_dot=True)
            response = dns_message.make_response(query)
            addresses = self.names.get(name, [])
            if addresses is None:
                continue
            if name not in self.names:
                response.set_rcode(dns.rcode.NXDOMAIN)
            kind = dns.rdatatype.to_text(question.rdtype)
            fitting = [one for one in addresses if (":" in one) == (kind == "AAAA")]
            if fitting:
                response.answer.append(dns.rrset.from_text_list(question.name, 1, "IN", kind, fitting))
            self._socket.sendto(response.to_wire(), client)

    def stop(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()


@pytest.fixture
def dns_server() -> Iterator[DnsServer]:
    server = DnsServer()
    yield server
    server.stop()


@pytest.fixture
def pods() -> Iterator[list[RecordingBackend]]:
    """Servers at different addresses and one port, as the pods of a Service; each answers with its address."""
    made: list[RecordingBackend] = []
    port = 0
    for host in HOSTS:
        pod = RecordingBackend(address=f"{host}:{port}")
        port = int(pod.target.rpartition(":")[2])

        def answer(request: bytes, context: Any, host: str = host) -> bytes:
            context.set_trailing_metadata((("pod", host),))
            return request

        pod.answer = answer
        made.append(pod)
    yield made
    for pod in made:
        pod.stop()


def config_of(server: DnsServer, pods: list[RecordingBackend], name: str = "models.test", every_s: float = 0.05) -> str:
    port = pods[0].target.rpartition(":")[2]
    return (
        f"default: {{backends: ['dns:{name}:{port}']}}\nhealth: {{every_s: 0.1, return_s: 0}}\n"
        f"dns: {{resolver: '{server.address}', every_s: {every_s}, timeout_s: 0.5}}\n"
    )


def asked(target: str, times: int = 8) -> set[str]:
    """The pods that answer requests."""
    found = set()
    for _ in range(times):
        code, details, _, _, trailing = call(target, serving_apis.PREDICT, predict("m"))
        assert code is grpc.StatusCode.OK, details
        found.add(dict(trailing)["pod"])
    return found


def test_addresses_are_followed(
    dns_server: DnsServer, pods: list[RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    """Pods come and go while requests are under way, and none fails."""
    dns_server.names["models.test"] = list(HOSTS[:1])
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config_of(dns_server, pods)), "--http_port=0")
    http, name = http_address(proxy), f"dns:models.test:{pods[0].target.rpartition(':')[2]}"
    assert asked(proxy.target) == {HOSTS[0]}
    with Load(proxy.target, predict("m"), threads=2, pause_s=0.005) as load:
        for hosts in (HOSTS, HOSTS[1:], HOSTS[:1], HOSTS[1:2]):
            dns_server.names["models.test"] = list(hosts)
            wait_until(lambda hosts=hosts: metric(http, "dpsr_proxy_addresses", name=name) == len(hosts))  # type: ignore[misc]
            wait_until(lambda hosts=hosts: asked(proxy.target) == set(hosts))  # type: ignore[misc]
            load.wait_for(10)
    assert load.failed == 0
    assert metric(http, "dpsr_proxy_lookups_total", name=name, result="failed") == 0
    # Pods that are gone leave the metrics.
    wait_until(lambda: HOSTS[0] + ":" not in get(http, "/metrics")[1])
    assert HOSTS[1] + ":" in get(http, "/metrics")[1]


def test_failed_lookups_keep_the_last_addresses(
    dns_server: DnsServer, pods: list[RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    dns_server.names["models.test"] = list(HOSTS[:2])
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config_of(dns_server, pods)), "--http_port=0")
    http = http_address(proxy)
    assert asked(proxy.target) == set(HOSTS[:2])
    failed = 0.0
    for broken in ([], None, "unknown"):  # no addresses, no answer, no such name
        if broken == "unknown":
            del dns_server.names["models.test"]
        else:
            dns_server.names["models.test"] = broken  # type: ignore[assignment]
        enough = failed + 2
        wait_until(lambda enough=enough: metric(http, "dpsr_proxy_lookups_total", result="failed") >= enough)  # type: ignore[misc]
        failed = metric(http, "dpsr_proxy_lookups_total", result="failed")
        assert asked(proxy.target) == set(HOSTS[:2])
    dns_server.names["models.test"] = list(HOSTS[2:])
    wait_until(lambda: asked(proxy.target) == set(HOSTS[2:]))


def test_lost_server_means_a_new_lookup(
    dns_server: DnsServer, pods: list[RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    """The only pod is replaced. The interval of an hour does not matter, because the lost connection is noticed."""
    dns_server.names["models.test"] = list(HOSTS[:1])
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config_of(dns_server, pods, every_s=3600)))
    assert asked(proxy.target) == {HOSTS[0]}
    dns_server.names["models.test"] = list(HOSTS[1:2])
    pods[0].stop()
    wait_until(lambda: call(proxy.target, serving_apis.PREDICT, predict("m"))[0] is grpc.StatusCode.OK)
    assert asked(proxy.target) == {HOSTS[1]}


def test_name_without_addresses(
    dns_server: DnsServer, pods: list[RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", config_of(dns_server, pods)), "--http_port=0")
    http = http_address(proxy)
    code, details, *_ = call(proxy.target, serving_apis.PREDICT, predict("m"))
    assert code is grpc.StatusCode.UNAVAILABLE and "model 'm': no address of dns:models.test:" in details
    assert get(http, "/readyz")[0] == 503
    dns_server.names["models.test"] = list(HOSTS[:1])
    wait_until(lambda: get(http, "/readyz")[0] == 200)
    assert asked(proxy.target) == {HOSTS[0]}
    # A reload looks new names up before requests go there, and forgets others.
    dns_server.names["new.test"] = list(HOSTS[1:])
    write_yaml(tmp_path / "p.yaml", config_of(dns_server, pods, "new.test"))
    wait_until(lambda: metric(http, "dpsr_proxy_config_reloads_total", result="ok") == 1)
    assert asked(proxy.target) == set(HOSTS[1:])
    assert 'dpsr_proxy_addresses{name="dns:models.test' not in get(http, "/metrics")[1]


def test_system_looks_up_names_and_shards_have_some(
    pods: list[RecordingBackend], start_proxy: StartProxy, tmp_path: Path
) -> None:
    port = pods[0].target.rpartition(":")[2]
    proxy = start_proxy(f"--backend=dns:localhost:{port}")
    assert asked(proxy.target) == {HOSTS[0]}
    shards = f"shards: [['dns:localhost:{port}'], ['{pods[1].target}']]"
    proxy = start_proxy(write_yaml(tmp_path / "p.yaml", f"models: {{m: {{{shards}}}}}\n"))
    code, _, _, _, trailing = call(proxy.target, serving_apis.PREDICT, predict("m"))
    assert code is grpc.StatusCode.OK and dict(trailing)["dpsr-shards"] == "2/2"


def test_a_text_that_no_name_can_be_has_no_addresses(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--backend=dns:a..b:8500")
    code, details, *_ = call(proxy.target, serving_apis.PREDICT, predict("m"))
    assert code is grpc.StatusCode.UNAVAILABLE and "no address of dns:a..b:8500 is known" in details


def test_a_name_that_is_given_up_while_its_lookup_ends_is_not_followed() -> None:
    async def is_followed() -> bool:
        asking: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        name = _Name("dns:a:1", Metrics(), lambda: None)
        name.start(DnsConfig(every_s=0.01), lambda host, port: asking)
        task = name._task
        assert task is not None
        await asyncio.sleep(0)  # it asks
        asking.set_result(["127.0.0.1:1"])
        await asyncio.sleep(0)
        name.close()
        await asyncio.wait({task}, timeout=5)
        return not task.done()

    assert not asyncio.run(is_followed())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("default: {backends: ['dns:name']}", "default.backends[0]: got 'dns:name', expected host:port"),
        ("default: {backends: ['dns:name:0']}", "got 'dns:name:0', expected dns:NAME:PORT with a port from 1 to 65535"),
        (
            "default: {backends: ['h:1']}\ndns: {resolver: 'name:53'}",
            "dns.resolver: got 'name:53', expected IP:port, for example 127.0.0.1:53",
        ),
        ("default: {backends: ['h:1']}\ndns: {every_s: 0}", "dns.every_s: got 0, expected a number above 0"),
    ],
)
def test_wrong_names(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_config(text)
    assert words in str(error.value)


def test_configuration_of_names() -> None:
    config = parse_config("default: {backends: ['dns:a:1']}\ndns: {resolver: '[::1]:53', every_s: 2}")
    assert config.dns == DnsConfig(2, 2.0, "[::1]:53")
    assert config.default is not None and config.default.shards == (("dns:a:1",),)
    assert run_command("proxy", "--backend=dns:a:0").returncode == 2
