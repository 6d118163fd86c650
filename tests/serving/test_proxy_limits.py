"""Clients that attack the proxy: what they send is bounded, in bytes and in time, and reaches no server."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import raw_http2 as http2
from processes import PATIENCE_S, ProxyProcess, child_environment
from proxy_backends import (
    FAST,
    RecordingBackend,
    StartBackend,
    StartProxy,
    call,
    get,
    http_address,
    metric,
    predict,
    wait_until,
    write_yaml,
)
from raw_http2 import RawBackend, Wire, encode, frame, head, message

from dpsr_common import serving_apis
from dpsr_common.errors import UsageError
from dpsr_serving.proxy import routing
from dpsr_serving.proxy.calls import Caller, Metadata, Reply, Server
from dpsr_serving.proxy.calls import Code as ReplyCode
from dpsr_serving.proxy.config import LimitsConfig, parse_config

REQUEST = predict("m", query=["a" * 300])
WHOLE, LAST = http2.END_HEADERS, http2.END_STREAM
# Short enough to wait for, and long enough for a busy machine.
LIMITS = """
limits: {message_bytes: 100000, connection_bytes: 300000, total_bytes: 2000000, connections: 8, streams: 20,
         connect_s: 2, headers_s: 1, body_s: 1, answer_s: 1, idle_s: 3}
"""


def start(start_proxy: StartProxy, backend: RecordingBackend, path: Path, limits: str = LIMITS) -> ProxyProcess:
    return start_proxy(write_yaml(path / "proxy.yaml", f"default: {{backends: ['{backend.target}']}}\n{limits}"))


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RecordingBackend, ProxyProcess]]:
    """A backend that echoes its requests, and a proxy with low limits in front of it."""
    backend = RecordingBackend()
    folder = tmp_path_factory.mktemp("limited")
    proxy = start(ProxyProcess, backend, folder)
    yield backend, proxy
    proxy.process.terminate()
    assert proxy.process.communicate(timeout=PATIENCE_S)[1] == ""  # an attack is not an error of the proxy
    backend.stop()


@pytest.fixture
def wire(limited: tuple[RecordingBackend, ProxyProcess]) -> Iterator[Callable[..., Wire]]:
    opened: list[Wire] = []

    def connect(settings: bytes = b"") -> Wire:
        opened.append(Wire(limited[1].target, settings))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()


def calls(*numbers: int, block: bytes | None = None, body: bytes | None = None) -> bytes:
    return b"".join(
        frame(http2.HEADERS, WHOLE, number, block or head())
        + frame(http2.DATA, LAST, number, message(REQUEST) if body is None else body)
        for number in numbers
    )


def code(answer: tuple[dict[bytes, bytes], bytes]) -> grpc.StatusCode:
    number = int(answer[0][b"grpc-status"])
    return next(status for status in grpc.StatusCode if status.value[0] == number)


BAD_HEADERS = [
    (b"user", b"a\r\nx: b"),
    (b"user", b"a\x00"),
    (b"user", b"\xff\xfe"),
    (b"User", b"a"),
    (b"us er", b"a"),
    (b"", b"a"),
    (b"user-bin", b"not base64!"),
    (b"connection", b"close"),
    (b"te", b"deadly"),
]


@pytest.mark.parametrize("header", BAD_HEADERS)
def test_headers_that_grpc_does_not_allow_are_not_forwarded(
    limited: tuple[RecordingBackend, ProxyProcess], wire: Callable[..., Wire], header: tuple[bytes, bytes]
) -> None:
    before = len(limited[0].calls)
    client = wire()
    client.send(calls(1, block=head() + encode([header])) + calls(3))
    assert code(client.answer(3)) is grpc.StatusCode.OK
    assert len(limited[0].calls) == before + 1


DEADLY = [
    encode([(b"te", b"deadly")]),
    encode([(b":scheme", b"deadly")]),
    encode([(b"grpclb_client_stats", b"deadly")]),
]
LONG = encode([(b"long%d" % index, b"v" * 1500) for index in range(6)])  # 9 KB


@pytest.mark.parametrize("header", DEADLY)
def test_headers_that_end_servers_of_grpc_reach_no_server(
    limited: tuple[RecordingBackend, ProxyProcess], wire: Callable[..., Wire], header: bytes
) -> None:
    backend, _ = limited
    before = len(backend.calls)
    for block in (head() + header + LONG, head() + LONG + header, head() + header):
        client = wire()
        client.send(calls(1, block=block))
        with contextlib.suppress(AssertionError):  # a reset stream has no answer
            client.send(calls(3))
            client.answer(3)
    for _, _, metadata, _ in backend.calls[before:]:
        assert "grpclb_client_stats" not in metadata and "long0" not in metadata


def test_too_many_header_bytes_are_refused(wire: Callable[..., Wire]) -> None:
    client = wire()
    client.send(calls(1, block=head() + LONG) + calls(3))
    assert code(client.answer(1)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert code(client.answer(3)) is grpc.StatusCode.OK
    # Short on the wire and long when decoded, as Huffman codes and as entries of the table.
    entry = b"\x40\x01a\x7f\xa1\x1e" + b"b" * 4000
    client.send(frame(http2.HEADERS, WHOLE | LAST, 5, head() + entry))
    client.send(frame(http2.HEADERS, WHOLE | LAST, 7, head() + b"\xbe" * 1000))
    assert client.goodbye() == http2.ENHANCE_YOUR_CALM


def test_messages_have_a_limit_packed_and_unpacked(wire: Callable[..., Wire]) -> None:
    client = wire()
    client.send(frame(http2.HEADERS, WHOLE, 1, head()) + frame(http2.DATA, 0, 1, struct.pack(">BI", 0, 100_001)))
    assert code(client.answer(1)) is grpc.StatusCode.RESOURCE_EXHAUSTED  # before the message has come
    for number, encoding, pack in ((3, "gzip", gzip.compress), (5, "deflate", zlib.compress)):
        for data, expected in ((bytes(100_001), "RESOURCE_EXHAUSTED"), (bytes(10_000_000), "RESOURCE_EXHAUSTED")):
            packed = pack(data)
            body = struct.pack(">BI", 1, len(packed)) + packed
            client = wire()
            client.send(calls(number, block=head(grpc_encoding=encoding), body=body))
            assert code(client.answer(number)).name == expected
    with_room = predict("m", query=["x" * 50_000])
    packed = gzip.compress(with_room)
    client.send(calls(9, block=head(grpc_encoding="gzip"), body=struct.pack(">BI", 1, len(packed)) + packed))
    assert gzip.decompress(client.answer(9)[1][5:]) == with_room


def test_answers_are_compressed_for_clients_that_ask(wire: Callable[..., Wire]) -> None:
    """A client asks by the compression of its own messages, also where one was too short to compress."""
    for size, packed in ((10, False), (2_000, True)):
        data = predict("m", query=["x" * size])
        for encoding, window, flag in (("gzip", 31, packed), ("deflate", 15, packed), ("identity", 0, False)):
            client = wire()
            client.send(calls(1, block=head(grpc_encoding=encoding), body=message(data)))
            headers, body = client.answer(1)
            assert (body[0], b"grpc-encoding" in headers) == (flag, flag)
            assert len(body) == 5 + int.from_bytes(body[1:5], "big")
            assert (zlib.decompress(body[5:], window) if flag else body[5:]) == data
            assert headers.get(b"grpc-encoding", encoding.encode()) == encoding.encode()
        client = wire()
        client.send(calls(1, block=head(grpc_accept_encoding="gzip"), body=message(data)))
        assert client.answer(1)[1] == message(data)


def test_answers_that_no_one_reads_are_held_up_to_a_limit(
    limited: tuple[RecordingBackend, ProxyProcess], wire: Callable[..., Wire]
) -> None:
    """Ten answers of 90 KB have no window; only those that fit into `connection_bytes` may wait for one."""
    client = wire(struct.pack(">HI", 4, 0))
    body = message(predict("m", query=["x" * 90_000]))
    for number in range(1, 21, 2):
        client.send(frame(http2.HEADERS, WHOLE, number, head()))
        for begin in range(0, len(body), 16384):
            last = LAST if begin + 16384 >= len(body) else 0
            client.send(frame(http2.DATA, last, number, body[begin : begin + 16384]))
    refused, reset = set(), set()
    while len(refused) + len(reset) < 10:  # the others are given up after answer_s
        kind, flags, stream, _ = client.read() or (None, 0, 0, b"")
        assert kind is not None
        if kind == http2.HEADERS and flags & LAST:
            refused.add(stream)
        elif kind == http2.RST_STREAM and stream not in refused:
            reset.add(stream)
    assert len(refused) >= 6 and reset
    code_, *_ = call(limited[1].target, serving_apis.PREDICT, REQUEST)
    assert code_ is grpc.StatusCode.OK


@pytest.mark.parametrize(
    "sent",
    [
        b"",  # nothing at all
        http2.PREFACE[:10],  # no whole preface
        http2.PREFACE + frame(http2.SETTINGS, 0, 0) + frame(http2.HEADERS, 0, 1, head()),  # headers without an end
        http2.PREFACE + frame(http2.SETTINGS, 0, 0),  # no call
    ],
)
def test_connections_on_which_nothing_happens_are_closed(
    limited: tuple[RecordingBackend, ProxyProcess], sent: bytes
) -> None:
    host, _, port = limited[1].target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(65536):
                pass


def test_messages_that_do_not_end_are_refused(wire: Callable[..., Wire]) -> None:
    client = wire()
    client.send(frame(http2.HEADERS, WHOLE, 1, head()) + frame(http2.DATA, 0, 1, message(REQUEST)[:50]))
    assert code(client.answer(1)) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_answers_that_fill_the_socket_end_the_connection(
    start_proxy: StartProxy, start_backend: StartBackend, tmp_path: Path
) -> None:
    backend = start_backend()
    proxy = start(start_proxy, backend, tmp_path, LIMITS.replace("streams: 20", "streams: 1000"))
    host, _, port = proxy.target.rpartition(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.settimeout(PATIENCE_S)
        window = struct.pack(">HI", 4, 2**31 - 1)
        client.sendall(http2.PREFACE + frame(http2.SETTINGS, 0, 0, window))
        client.sendall(frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30)))
        body = message(predict("m", query=["x" * 9000]))
        with contextlib.suppress(OSError):  # until the proxy gives up a client that reads nothing
            for number in range(1, 1_000_001, 2):
                client.sendall(calls(number, body=body))
            raise AssertionError("the proxy went on reading")
    assert call(proxy.target, serving_apis.PREDICT, REQUEST)[0] is grpc.StatusCode.OK


@pytest.mark.parametrize(
    "flood",
    [
        frame(http2.PING, 0, 0, bytes(8)),
        frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)),
        frame(http2.DATA, 0, 1),
        frame(http2.WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)),
        frame(http2.PRIORITY, 0, 1, bytes(5)),
    ],
)
def test_floods_of_frames_that_carry_nothing_end_their_connection(wire: Callable[..., Wire], flood: bytes) -> None:
    client = wire()
    client.send(frame(http2.HEADERS, WHOLE, 1, head()))
    with contextlib.suppress(OSError):
        for _ in range(1000):
            client.send(flood * 1000)
        raise AssertionError("the proxy went on reading")


def test_a_client_that_broke_a_limit_is_not_read_any_more(
    limited: tuple[RecordingBackend, ProxyProcess], wire: Callable[..., Wire]
) -> None:
    """The connection stays open for a while, so that a flood does not begin anew at once."""
    client = wire()
    client.send(frame(http2.PING, 0, 0, bytes(8)) * 12_000)
    assert client.goodbye() == http2.ENHANCE_YOUR_CALM
    assert not client.is_read()
    assert call(limited[1].target, serving_apis.PREDICT, REQUEST)[0] is grpc.StatusCode.OK


def test_calls_that_are_given_up_at_once_end_their_connection(
    limited: tuple[RecordingBackend, ProxyProcess], wire: Callable[..., Wire]
) -> None:
    before = len(limited[0].calls)
    client = wire()
    with contextlib.suppress(OSError):
        for number in range(1, 1_000_001, 2):
            client.send(calls(number) + frame(http2.RST_STREAM, 0, number, struct.pack(">I", http2.CANCEL)))
        raise AssertionError("the proxy went on reading")
    assert len(limited[0].calls) - before < 5000


def test_a_new_connection_takes_the_place_of_an_unused_one(
    limited: tuple[RecordingBackend, ProxyProcess], wire: Callable[..., Wire]
) -> None:
    clients = [wire() for _ in range(30)]  # of which 8 may live
    clients[-1].send(calls(1))
    assert code(clients[-1].answer(1)) is grpc.StatusCode.OK
    assert clients[0].goodbye() in (None, http2.NO_ERROR)
    for _ in range(30):
        wire()
    clients[-1].send(calls(3))  # it made a call, so it went last
    assert code(clients[-1].answer(3)) is grpc.StatusCode.OK


def test_connections_end_at_their_age_and_fail_no_call(
    start_proxy: StartProxy, start_backend: StartBackend, tmp_path: Path
) -> None:
    proxy = start(start_proxy, start_backend(), tmp_path, "limits: {age_s: 0.5, idle_s: 0.4, connect_s: 1}\n")
    with grpc.insecure_channel(proxy.target) as channel:
        method = channel.unary_unary(serving_apis.PREDICT)
        for _ in range(300):
            assert method(REQUEST, timeout=PATIENCE_S) == REQUEST
    client = Wire(proxy.target)
    assert client.goodbye() == http2.NO_ERROR
    client.close()


def test_the_proxy_ends_beside_a_connection_on_which_nothing_came(
    start_proxy: StartProxy, start_backend: StartBackend, tmp_path: Path
) -> None:
    proxy = start(start_proxy, start_backend(), tmp_path)
    host, _, port = proxy.target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as silent:
        assert call(proxy.target, serving_apis.PREDICT, REQUEST)[0] is grpc.StatusCode.OK
        proxy.process.terminate()
        assert silent.recv(1) == b""
        assert proxy.process.communicate(timeout=PATIENCE_S)[1] == ""
    assert proxy.process.returncode == 0


def test_a_request_that_ends_servers_is_not_given_to_all_of_them(start_proxy: StartProxy, tmp_path: Path) -> None:
    asked: list[int] = []

    def die(index: int) -> Callable[[int, int], bytes]:
        def answer(n: int, stream: int) -> bytes:
            asked.append(index)
            return b"\xff" * 100  # ends the connection

        return answer

    backends = [RawBackend(die(index)) for index in range(4)]
    try:
        targets = ", ".join(f"'{backend.target}'" for backend in backends)
        config = f"default: {{backends: [{targets}]}}\nretries: {{attempts: 4}}\n{FAST}"
        proxy = start_proxy(write_yaml(tmp_path / "proxy.yaml", config))
        code_, details, *_ = call(proxy.target, serving_apis.PREDICT, REQUEST)
        assert code_ is grpc.StatusCode.UNAVAILABLE, details
        assert len(asked) == 2
    finally:
        for backend in backends:
            backend.stop()


def test_requests_of_many_fields_or_with_a_long_model_spec_are_refused(
    limited: tuple[RecordingBackend, ProxyProcess],
) -> None:
    for request in (b"\x7a\x00" * 20_000, predict("m" * 5000)):
        code_, details, *_ = call(limited[1].target, serving_apis.PREDICT, request)
        assert code_ is grpc.StatusCode.INVALID_ARGUMENT, details
    with pytest.raises(ValueError, match="fields"):
        routing.find_model_spec(b"\x7a\x00" * 20_000, (1,))


class Done:
    """A call that has ended."""

    def cancel(self) -> None:
        pass


def test_other_clients_are_served_between_the_calls_of_one() -> None:
    begun: list[bytes] = []

    def echo(text: bytes, deadline: float | None, metadata: Metadata, caller: Caller, stream: int) -> Done:
        begun.append(text)
        caller.finish(stream, Reply(ReplyCode.OK, body=text))
        return Done()

    async def ask(texts: list[list[bytes]]) -> list[list[bytes]]:
        """Sends the texts of all connections before the server has its turn. Returns the answers of each."""
        server = Server({serving_apis.PREDICT: unused}, {}, LimitsConfig(), {serving_apis.PREDICT: echo})
        port = await server.listen("127.0.0.1", 0, None, False)
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in texts]
        for (_, writer), sent in zip(opened, texts, strict=True):
            frames = http2.PREFACE + frame(http2.SETTINGS, 0, 0)
            for index, text in enumerate(sent):
                number = 2 * index + 1
                frames += frame(http2.HEADERS, WHOLE, number, head()) + frame(http2.DATA, LAST, number, message(text))
            writer.write(frames)
        answers: list[list[bytes]] = [[] for _ in texts]
        for (reader, writer), sent, got in zip(opened, texts, answers, strict=True):
            while len(got) < len(sent):
                header = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(header[:3], "big"))
                got += [payload[5:]] if header[3] == http2.DATA else []
            writer.close()
        await server.stop(0)
        return answers

    async def unused(text: bytes, deadline: float | None, metadata: Metadata) -> Reply:
        raise AssertionError

    many = [b"%d" % number for number in range(100)]
    assert asyncio.run(asyncio.wait_for(ask([many, [b"other"]]), PATIENCE_S)) == [many, [b"other"]]
    assert begun.index(b"other") < 50


def test_limits_are_read_again(start_proxy: StartProxy, start_backend: StartBackend, tmp_path: Path) -> None:
    backend = start_backend()
    text = f"default: {{backends: ['{backend.target}']}}\n"
    proxy = start_proxy(write_yaml(tmp_path / "proxy.yaml", text), "--http_port=0")
    http = http_address(proxy)
    large = predict("m", query=["x" * 5000])
    assert call(proxy.target, serving_apis.PREDICT, large)[0] is grpc.StatusCode.OK
    write_yaml(tmp_path / "proxy.yaml", text + "limits: {message_bytes: 4000}\n")
    wait_until(lambda: metric(http, "dpsr_proxy_config_reloads_total", result="ok") == 1)
    assert call(proxy.target, serving_apis.PREDICT, large)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert get(http, "/healthz")[0] == 200


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ("{header_bytes: 0}", "limits.header_bytes: got 0"),
        ("{header_bytes: 2147483648}", "expected an integer of at least 1 and at most 2147483647"),
        ("{total_bytes: 100000000000000000000}", "line 2: limits.total_bytes: got 100000000000000000000, expected"),
        ("{streams: 9999999999}", "limits.streams: got 9999999999, expected an integer of at least 1 and at"),
        ("{message_bytes: 9999999999}", "limits.message_bytes: got 9999999999, expected at most 2147483647"),
        ("{message_bytes: 1000, total_bytes: 999}", "limits.total_bytes: got 999, expected at least message_bytes"),
        ("{body_s: 0}", "limits.body_s: got 0"),
        ("{bodies: 1}", "bodies"),
    ],
)
def test_wrong_limits_are_refused(limits: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_config(f"default: {{backends: ['h:1']}}\nlimits: {limits}")
    assert words in str(error.value)


@pytest.mark.long
@pytest.mark.slow
def test_a_client_goes_on_while_the_proxy_is_attacked() -> None:
    benchmark = Path(__file__).parents[2] / "benchmarks" / "attacks.py"
    done = subprocess.run(
        [sys.executable, str(benchmark), "--quick", "--json"],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    bars = json.loads(done.stdout.splitlines()[-1])["bars"]
    assert bars["crashes"] == 0 and bars["victim_failures"] == 0
    assert bars["rss_growth_mb_worst"] < 200
