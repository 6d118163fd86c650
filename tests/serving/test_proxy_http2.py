"""The proxy's HTTP/2: frames that gRPC clients never send, and servers that shut down."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy
import pytest
import raw_http2 as http2
from processes import PATIENCE_S, ProxyProcess
from proxy_backends import (
    Load,
    RecordingBackend,
    StartBackend,
    StartProxy,
    call,
    predict,
    wait_until,
    write_yaml,
)
from raw_http2 import RawBackend, Wire, encode, frame, good, head, message

from dpsr_common import serving_apis
from dpsr_serving.proxy import calls
from dpsr_serving.proxy.calls import Channel, Code, Reply
from dpsr_serving.proxy.config import LimitsConfig

# Frames that come from a client


@pytest.fixture(scope="module")
def echo() -> Iterator[tuple[RecordingBackend, ProxyProcess]]:
    """A backend that echoes its requests, and a proxy in front of it."""
    backend = RecordingBackend()
    proxy = ProxyProcess(f"--backend={backend.target}")
    yield backend, proxy
    proxy.process.terminate()
    assert (
        proxy.process.communicate(timeout=PATIENCE_S)[1] == ""
    )  # bad input from the wire is not an error of the proxy
    backend.stop()


@pytest.fixture
def wire(echo: tuple[RecordingBackend, ProxyProcess]) -> Iterator[Callable[..., Wire]]:
    opened: list[Wire] = []

    def connect(settings: bytes = b"") -> Wire:
        opened.append(Wire(echo[1].target, settings))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()


REQUEST = predict("m", query=["a" * 300])
WHOLE = http2.END_HEADERS
LAST = http2.END_STREAM


def test_frames_in_every_form(wire: Callable[..., Wire]) -> None:
    client = wire()
    block, body = head(), message(REQUEST)
    # Headers in pieces, padded, with a priority; data in pieces, padded, empty; frames of unknown kinds.
    padded = bytes((3,)) + struct.pack(">IB", 0, 16) + block[:20] + b"\0\0\0"
    client.send(frame(http2.HEADERS, http2.PADDED | http2.PRIORITIZED, 1, padded))
    client.send(frame(http2.CONTINUATION, 0, 1, block[20:60]) + frame(http2.CONTINUATION, WHOLE, 1, block[60:]))
    client.send(frame(99, 7, 1, b"?") + frame(http2.PRIORITY, 0, 1, bytes(5)) + frame(http2.DATA, 0, 1))
    client.send(frame(http2.DATA, 0, 1, body[:7]) + frame(http2.DATA, http2.PADDED, 1, b"\x02" + body[7:9] + b"\0\0"))
    client.send(frame(http2.DATA, LAST, 1, body[9:]))
    headers, data = client.answer(1)
    assert headers[b"grpc-status"] == b"0" and data == body
    # Byte by byte, and with trailers.
    for byte in frame(http2.HEADERS, WHOLE, 3, block) + frame(http2.DATA, 0, 3, body):
        client.send(bytes((byte,)))
    client.send(frame(http2.HEADERS, WHOLE | LAST, 3, encode([(b"late", b"1")])))
    assert client.answer(3)[1] == body
    client.send(frame(http2.PING, 0, 0, b"12345678"))
    kinds = []
    while not kinds or kinds[-1][0] != http2.PING:
        kinds.append(client.read())
    assert kinds[-1] == (http2.PING, http2.ACK, 0, b"12345678")


def test_answers_wait_for_the_clients_windows(wire: Callable[..., Wire]) -> None:
    client = wire(struct.pack(">HI", 4, 10))  # 10 bytes a stream
    body = message(REQUEST)
    for number in (1, 3):
        client.send(frame(http2.HEADERS, WHOLE, number, head()) + frame(http2.DATA, LAST, number, body))
    got = {1: b"", 3: b""}
    ended = set()

    def take() -> None:
        kind, flags, stream, payload = client.read() or (0, 0, 0, b"")
        assert kind != http2.GOAWAY, payload
        if kind == http2.DATA:
            assert stream, "the connection ended"
            got[stream] += payload
        if kind in (http2.DATA, http2.HEADERS) and flags & LAST:
            ended.add(stream)

    while not got[1] or not got[3]:
        take()
    assert (len(got[1]), len(got[3])) == (10, 10) and not ended
    client.send(frame(http2.WINDOW_UPDATE, 0, 3, struct.pack(">I", 1000)))  # the second overtakes the first
    while 3 not in ended:
        take()
    assert got[3] == body and len(got[1]) == 10
    client.send(frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 4, 30)))  # now each has 20 more
    while len(got[1]) < 30:
        take()
    client.send(frame(http2.WINDOW_UPDATE, 0, 1, struct.pack(">I", 1000)))
    while 1 not in ended:
        take()
    assert got[1] == body


def test_large_messages_wait_for_the_connections_window(wire: Callable[..., Wire]) -> None:
    client = wire(struct.pack(">HI", 4, 2**30))
    client.acknowledge()
    body = message(predict("m", query=["x" * 3_000_000]))
    client.send(frame(http2.HEADERS, WHOLE, 1, head()))
    for begin in range(0, len(body), 16384):
        client.send(frame(http2.DATA, LAST if begin + 16384 >= len(body) else 0, 1, body[begin : begin + 16384]))
    got, ended = b"", False
    while not ended:
        kind, flags, stream, payload = client.read() or (http2.GOAWAY, 0, 0, b"")
        assert kind != http2.GOAWAY, payload
        if stream == 1 and kind == http2.DATA:
            got += payload
            if len(got) == 65535:  # all that it may send so far
                client.send(frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30)))
        ended = stream == 1 and kind == http2.HEADERS and bool(flags & LAST)
    assert got == body


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(http2.DATA, 0, 0, b"x"), http2.PROTOCOL_ERROR),
        (frame(http2.HEADERS, WHOLE, 0, head()), http2.PROTOCOL_ERROR),
        (frame(http2.HEADERS, WHOLE, 2, head()), http2.PROTOCOL_ERROR),
        (frame(http2.HEADERS, WHOLE, 1, b"\x80"), http2.COMPRESSION_ERROR),
        (frame(http2.HEADERS, 0, 1, head()) + frame(http2.PING, 0, 0, bytes(8)), http2.PROTOCOL_ERROR),
        (frame(http2.HEADERS, WHOLE | http2.PADDED, 1, b"\xff" + head()), http2.PROTOCOL_ERROR),
        (frame(http2.HEADERS, WHOLE, 1, head()) * 2, http2.PROTOCOL_ERROR),
        (frame(http2.CONTINUATION, WHOLE, 1, head()), http2.PROTOCOL_ERROR),
        (frame(http2.PUSH_PROMISE, WHOLE, 1, head()), http2.PROTOCOL_ERROR),
        (frame(http2.PING, 0, 0, b"short"), http2.FRAME_SIZE_ERROR),
        (frame(http2.SETTINGS, 0, 0, b"short"), http2.FRAME_SIZE_ERROR),
        (frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31)), http2.FLOW_CONTROL_ERROR),
        (frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 5, 1)), http2.PROTOCOL_ERROR),
        (frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1)), http2.FLOW_CONTROL_ERROR),
        (frame(http2.WINDOW_UPDATE, 0, 0, b"1"), http2.FRAME_SIZE_ERROR),
        (b"\xff\xff\xff\x00\x00\x00\x00\x00\x01", http2.FRAME_SIZE_ERROR),
        (
            frame(http2.HEADERS, 0, 1, bytes(16000)) + frame(http2.CONTINUATION, 0, 1, bytes(16000)) * 5,
            http2.ENHANCE_YOUR_CALM,
        ),
    ],
)
def test_a_broken_protocol_ends_the_connection_and_says_why(wire: Callable[..., Wire], sent: bytes, code: int) -> None:
    client = wire()
    with contextlib.suppress(ConnectionError):  # the proxy may close before it has read all
        client.send(sent)
    assert client.goodbye() == code


def test_bytes_that_are_not_http2_are_not_answered(echo: tuple[RecordingBackend, ProxyProcess]) -> None:
    host, _, port = echo[1].target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in connection.recv(4096)


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        (head(content_type="text/html"), message(REQUEST), {b":status": b"415"}),
        (head(**{":method": "GET"}), message(REQUEST), {b":status": b"405"}),
        (head("/nowhere"), message(REQUEST), {b"grpc-status": b"12", b"grpc-message": b"Method not found: /nowhere"}),
        (head(grpc_timeout="1x"), message(REQUEST), {b"grpc-status": b"13"}),
        (head(), b"", {b"grpc-status": b"13"}),
        (head(), message(REQUEST)[:-1], {b"grpc-status": b"13"}),
        (head(), message(REQUEST) * 2, {b"grpc-status": b"13"}),
        (head(grpc_encoding="snappy"), b"\x01" + message(REQUEST)[1:], {b"grpc-status": b"13"}),
        (head(grpc_encoding="gzip"), b"\x01" + message(REQUEST)[1:], {b"grpc-status": b"13"}),
        (head(grpc_timeout="0n"), message(REQUEST), {b"grpc-status": b"4"}),
    ],
)
def test_invalid_calls_are_refused_and_the_connection_goes_on(
    echo: tuple[RecordingBackend, ProxyProcess],
    wire: Callable[..., Wire],
    headers: bytes,
    body: bytes,
    expected: dict[bytes, bytes],
) -> None:
    client, before = wire(), len(echo[0].calls)
    client.send(frame(http2.HEADERS, WHOLE, 1, headers) + frame(http2.DATA, LAST, 1, body))
    got, _ = client.answer(1)
    assert got.items() >= expected.items()
    client.send(frame(http2.HEADERS, WHOLE, 3, head()) + frame(http2.DATA, LAST, 3, message(REQUEST)))
    assert client.answer(3)[1] == message(REQUEST)
    assert len(echo[0].calls) == before + 1, "the backend gets good calls only"


def test_frames_at_random_end_their_connection_at_most(
    echo: tuple[RecordingBackend, ProxyProcess], wire: Callable[..., Wire]
) -> None:
    random = numpy.random.default_rng(1)
    for _ in range(150):
        client = wire()
        with contextlib.suppress(OSError):  # it may be closed already
            for _ in range(int(random.integers(1, 8))):
                kind, flags, number = (int(random.integers(top)) for top in (11, 64, 6))
                payloads = (
                    random.bytes(int(random.integers(20))),
                    head(),
                    message(REQUEST),
                    head()[: len(head()) // 2],
                )
                client.send(frame(kind, flags, number, payloads[int(random.integers(4))]))
        client.close()
    assert call(echo[1].target, serving_apis.PREDICT, REQUEST)[0] is grpc.StatusCode.OK
    assert echo[1].process.poll() is None


def test_compressed_requests(echo: tuple[RecordingBackend, ProxyProcess]) -> None:
    backend, proxy = echo
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        with grpc.insecure_channel(proxy.target, compression=compression) as channel:
            assert channel.unary_unary(serving_apis.PREDICT)(REQUEST * 20, timeout=PATIENCE_S) == REQUEST * 20
    assert backend.calls[-1][1] == REQUEST * 20


def test_large_messages_pass_through_tls(
    certificates: Path, start_proxy: StartProxy, start_backend: StartBackend, tmp_path: Path
) -> None:
    """TLS hands over what it has decrypted piece by piece."""
    backend = start_backend()
    listen = f"{{certificate: {certificates / 'server.pem'}, key: {certificates / 'server.key'}}}"
    text = f"default: {{backends: ['{backend.target}']}}\ntls: {{listen: {listen}}}"
    inner = start_proxy(write_yaml(tmp_path / "inner.yaml", text))
    side = f"{{ca: {certificates / 'ca.pem'}, server_name: localhost}}"
    text = f"default: {{backends: ['{inner.target}']}}\ntls: {{listen: {listen}, backends: {side}}}"
    outer = start_proxy(write_yaml(tmp_path / "outer.yaml", text))
    known = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes())
    request = predict("m", query=[numpy.random.default_rng(1).bytes(3_000_000)])
    with grpc.secure_channel(outer.target, known, options=serving_apis.CHANNEL_OPTIONS) as channel:
        method = channel.unary_unary(serving_apis.PREDICT)
        for _ in range(3):
            assert method(request, timeout=PATIENCE_S) == request


# Servers that end, refuse, or take few calls at a time


def backend_of(*options: tuple[str, Any]) -> RecordingBackend:
    return RecordingBackend(options)


def test_connections_that_a_server_ends_for_their_age_fail_no_call(start_proxy: StartProxy) -> None:
    backend = backend_of(("grpc.max_connection_age_ms", 200), ("grpc.max_connection_age_grace_ms", 5000))
    try:
        proxy = start_proxy(f"--backend={backend.target}")
        with Load(proxy.target, REQUEST, threads=4) as load:
            wait_until(lambda: len(backend.peers) > 8)
            load.wait_for(100)
        assert load.failed == 0, load.details
    finally:
        backend.stop()


def test_a_server_that_takes_few_calls_at_a_time_gets_no_more(start_proxy: StartProxy) -> None:
    backend = backend_of(("grpc.max_concurrent_streams", 2))
    try:
        proxy = start_proxy(f"--backend={backend.target}")
        assert call(proxy.target, serving_apis.PREDICT, REQUEST)[0] is grpc.StatusCode.OK
        with Load(proxy.target, REQUEST, threads=8) as load:
            load.wait_for(300)
        assert load.failed == 0, load.details
    finally:
        backend.stop()


def reset(stream: int, code: int) -> bytes:
    return frame(http2.RST_STREAM, 0, stream, struct.pack(">I", code))


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        # Refused calls were not begun: another connection may bring them, even to the only server.
        (lambda n, s: good(s) if n > 1 else frame(http2.GOAWAY, 0, 0, bytes(8)), "OK", ""),
        (lambda n, s: good(s) if n > 1 else reset(s, http2.REFUSED_STREAM), "OK", ""),
        (lambda n, s: reset(s, http2.REFUSED_STREAM), "UNAVAILABLE", "refuses calls"),
        (lambda n, s: reset(s, http2.CANCEL), "UNAVAILABLE", "gave up the call"),
        (lambda n, s: reset(s, http2.INTERNAL_ERROR), "INTERNAL", "gave up the call"),
        (lambda n, s: reset(s, http2.ENHANCE_YOUR_CALM), "RESOURCE_EXHAUSTED", "gave up the call"),
        (lambda n, s: frame(http2.HEADERS, WHOLE | LAST, s, encode([(b":status", b"503")])), "UNAVAILABLE", "503"),
        (lambda n, s: frame(http2.HEADERS, WHOLE | LAST, s, encode([(b":status", b"404")])), "UNIMPLEMENTED", "404"),
        (lambda n, s: frame(http2.HEADERS, WHOLE, s, b"\x88") + frame(http2.DATA, LAST, s, b""), "INTERNAL", "without"),
        (lambda n, s: good(s).replace(message(b"well"), b"123456789"), "INTERNAL", "one message"),
        (lambda n, s: frame(http2.HEADERS, WHOLE, s, b"\x80"), "UNAVAILABLE", "cannot be reached"),
        (lambda n, s: frame(http2.HEADERS, WHOLE, s, encode([(b":status", b"103")])) + good(s), "OK", ""),
    ],
)
def test_what_servers_do_instead_of_answering(
    start_proxy: StartProxy, answer: Callable[[int, int], bytes], code: str, words: str
) -> None:
    backend = RawBackend(answer)
    try:
        proxy = start_proxy(f"--backend={backend.target}")
        got, details, response, *_ = call(proxy.target, serving_apis.PREDICT, REQUEST)
        assert got.name == code and words in details, details
        assert response == (b"well" if code == "OK" else None)
    finally:
        backend.stop()


def test_a_call_that_waits_for_a_place_keeps_its_deadline() -> None:
    release = threading.Event()
    backend = RecordingBackend([("grpc.max_concurrent_streams", 1)])
    backend.answer = lambda request, context: (release.wait(PATIENCE_S), request)[1]

    async def calls() -> list[Reply]:
        channel = Channel(backend.target, None, "", LimitsConfig())
        try:
            first = asyncio.create_task(channel.call(serving_apis.PREDICT, b"first", None, ()))
            await asyncio.get_running_loop().run_in_executor(None, backend.entered.acquire)
            late = [channel.call(serving_apis.PREDICT, b"late", 0.2, ()) for _ in range(2)]
            gone = asyncio.create_task(channel.call(serving_apis.PREDICT, b"gone", None, ()))
            patient = asyncio.create_task(channel.call(serving_apis.PREDICT, b"patient", None, ()))
            replies = await asyncio.gather(*late)
            gone.cancel()
            release.set()
            return [*replies, await first, await patient]
        finally:
            channel.drop()

    try:
        *late, first, patient = asyncio.run(asyncio.wait_for(calls(), PATIENCE_S))
    finally:
        backend.stop()
    for reply in late:
        assert reply.code is Code.DEADLINE_EXCEEDED and "had 1 calls under way until the deadline" in reply.details
    assert (first.body, patient.body) == (b"first", b"patient")
    assert [request for _, request, *_ in backend.calls] == [b"first", b"patient"]


def test_deadlines_of_calls_that_have_ended_do_not_pile_up() -> None:
    backend = RecordingBackend()

    async def ask() -> tuple[int, Reply]:
        channel = Channel(backend.target, None, "", LimitsConfig())
        try:
            for _ in range(300):
                await channel.call(serving_apis.PREDICT, b"", PATIENCE_S, ())
            assert channel._connection is not None
            kept = len(channel._connection._ends)
            backend.answer = lambda request, context: (time.sleep(0.5), request)[1]
            return kept, await channel.call(serving_apis.PREDICT, b"", 0.1, ())
        finally:
            channel.drop()

    try:
        kept, late = asyncio.run(ask())
    finally:
        backend.stop()
    assert kept <= calls._SPARE_ENDS + 2 and late.code is Code.DEADLINE_EXCEEDED


def test_a_server_that_allows_more_calls_wakes_all_that_wait() -> None:
    async def wait() -> list[bool]:
        connection = calls._Outgoing(Channel("h:1", None, "", LimitsConfig()))
        waiting = [asyncio.create_task(connection._free_place(None)) for _ in range(3)]
        await asyncio.sleep(0)
        connection.on_event((calls._SETTINGS, 0))
        return await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE_S)

    assert asyncio.run(wait()) == [True] * 3


def test_messages_that_a_streaming_call_does_not_read_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def watch(messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        await asyncio.sleep(PATIENCE_S)
        yield b""

    async def send() -> tuple[list[tuple[int, Code]], int]:
        ended: list[tuple[int, Code]] = []
        connection = calls._Incoming(calls.Server({}, {"/s/Watch": watch}, LimitsConfig()))
        monkeypatch.setattr(connection, "_end_stream", lambda stream, code, words: ended.append((stream, code)))
        connection.on_event((calls._CALL, 1, "/s/Watch", b"", b"", None, (), b""))
        for _ in range(calls._UNREAD_BYTES):
            connection.on_event((calls._MESSAGE, 1, b"x"))
            if ended:
                break
        held = connection._streaming[1].held
        connection.on_closed()
        return ended, held

    ended, held = asyncio.run(send())
    assert ended == [(1, Code.RESOURCE_EXHAUSTED)] and held < 2 * calls._UNREAD_BYTES


def test_connections_that_end_at_once_are_forgotten() -> None:
    """A forwarder whose own server is down accepts connections and closes them."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()

    thread = threading.Thread(target=accept)
    thread.start()

    async def ask() -> tuple[list[Reply], int]:
        channel = Channel(f"127.0.0.1:{listener.getsockname()[1]}", None, "", LimitsConfig())
        replies = [await channel.call(serving_apis.PREDICT, b"", PATIENCE_S, ()) for _ in range(20)]
        return replies, len(channel._connections)

    try:
        replies, left = asyncio.run(ask())
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
    assert {reply.code for reply in replies} == {Code.UNAVAILABLE} and left == 0


def test_a_host_that_no_name_can_be_is_told_at_once() -> None:
    async def ask() -> Reply:
        return await Channel("a..b:1", None, "", LimitsConfig()).call(serving_apis.PREDICT, b"", PATIENCE_S, ())

    reply = asyncio.run(ask())
    assert reply.code is Code.UNAVAILABLE and "backend a..b:1 cannot be reached" in reply.details


def test_new_connections_to_a_server_have_the_new_limits() -> None:
    backend = RecordingBackend()

    async def ask() -> list[Reply]:
        channel = Channel(backend.target, None, "", LimitsConfig(message_bytes=4000))
        try:
            first = await channel.call(serving_apis.PREDICT, b"x" * 5000, PATIENCE_S, ())
            channel.set_limits(LimitsConfig())
            channel.drop()
            return [first, await channel.call(serving_apis.PREDICT, b"x" * 5000, PATIENCE_S, ())]
        finally:
            channel.drop()

    try:
        assert [reply.code for reply in asyncio.run(ask())] == [Code.RESOURCE_EXHAUSTED, Code.OK]
    finally:
        backend.stop()
