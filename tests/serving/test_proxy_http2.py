"""The proxy's HTTP/2: the RFC's examples of HPACK, frames that gRPC clients never send, and servers that shut down."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import PATIENCE_S, ProxyProcess
from proxy_backends import Load, RecordingBackend, call, predict, wait_until

from dpsr_common import serving_apis
from dpsr_serving.proxy import http2
from dpsr_serving.proxy.hpack import Decoder, HpackError, encode
from dpsr_serving.proxy.http2 import frame

StartProxy = Callable[..., ProxyProcess]

# HPACK

REQUESTS = [  # RFC 7541, appendix C.3, then C.4: the same with Huffman codes
    ["828684410f7777772e6578616d706c652e636f6d", "828684be58086e6f2d6361636865",
     "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565"],
    ["828684418cf1e3c2e5f23a6ba0ab90f4ff", "828684be5886a8eb10649cbf",
     "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf"],
]  # fmt: skip
REQUEST_HEADERS = [
    [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com")],
    [
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":path", b"/"),
        (b":authority", b"www.example.com"),
        (b"cache-control", b"no-cache"),
    ],
    [
        (b":method", b"GET"),
        (b":scheme", b"https"),
        (b":path", b"/index.html"),
        (b":authority", b"www.example.com"),
        (b"custom-key", b"custom-value"),
    ],
]
# Appendix C.5 and C.6: a table of 256 bytes, from which entries have to go.
RESPONSES = [
    ["4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d546e17"
     "68747470733a2f2f7777772e6578616d706c652e636f6d", "4803333037c1c0bf",
     "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f3d4153444a4b48514b425a"
     "584f5157454f50495541585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31"],
    ["488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3",
     "4883640effc1c0bf",
     "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f"
     "3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007"],
]  # fmt: skip
DATE = b"Mon, 21 Oct 2013 20:13:2"
RESPONSE_HEADERS = [
    [
        (b":status", b"302"),
        (b"cache-control", b"private"),
        (b"date", DATE + b"1 GMT"),
        (b"location", b"https://www.example.com"),
    ],
    [
        (b":status", b"307"),
        (b"cache-control", b"private"),
        (b"date", DATE + b"1 GMT"),
        (b"location", b"https://www.example.com"),
    ],
    [
        (b":status", b"200"),
        (b"cache-control", b"private"),
        (b"date", DATE + b"2 GMT"),
        (b"location", b"https://www.example.com"),
        (b"content-encoding", b"gzip"),
        (b"set-cookie", b"foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"),
    ],
]


@pytest.mark.parametrize("blocks", REQUESTS)
def test_requests_of_the_rfc(blocks: list[str]) -> None:
    decoder = Decoder(list)
    assert [decoder.decode(bytes.fromhex(block)) for block in blocks] == REQUEST_HEADERS


@pytest.mark.parametrize("blocks", RESPONSES)
def test_responses_of_the_rfc_with_a_small_table(blocks: list[str]) -> None:
    decoder = Decoder(list)
    size = bytes.fromhex("3fe101")  # the table is to have 256 bytes
    first, *others = map(bytes.fromhex, blocks)
    assert [decoder.decode(block) for block in (size + first, *others)] == RESPONSE_HEADERS


def test_a_block_means_something_else_once_the_table_has_changed() -> None:
    decoder = Decoder(list)
    newest = bytes((0x80 | 62,))
    for value in (b"1", b"2", b"2", b"3"):
        decoder.decode(b"\x40\x01a\x01" + value)
        assert decoder.decode(newest) == decoder.decode(newest) == [(b"a", value)]
    decoder.decode(b"\x20")  # empty the table
    with pytest.raises(HpackError, match="beyond the table"):
        decoder.decode(newest)


@given(st.lists(st.tuples(st.binary(max_size=200), st.binary(max_size=300)), max_size=8))
def test_what_is_encoded_is_decoded(headers: list[tuple[bytes, bytes]]) -> None:
    assert Decoder(list).decode(encode(headers)) == headers


@given(st.binary(max_size=40))
def test_junk_is_decoded_or_refused(junk: bytes) -> None:
    decoder = Decoder(list)
    try:
        decoder.decode(junk)
    except HpackError:
        return
    except IndexError:
        raise AssertionError(junk) from None


@pytest.mark.parametrize(
    "block",
    ["80", "be", "3fe2ffff0f", "8220", "00", "0001", "000161", "7fffffffffff", "00826161", "0081ff", "0083ffffffff"],
)
def test_broken_blocks_are_refused(block: str) -> None:
    with pytest.raises(HpackError):
        Decoder(list).decode(bytes.fromhex(block))


def test_a_block_cannot_grow_without_bounds() -> None:
    decoder = Decoder(list)
    decoder.decode(b"\x40" + encode([(b"a", b"x" * 4000)])[1:])
    with pytest.raises(HpackError, match="65536"):
        decoder.decode(bytes((0x80 | 62,)) * 1000)


# Frames that come from a client


class Wire:
    """A client's connection, frame by frame."""

    def __init__(self, target: str, settings: bytes = b"") -> None:
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        self._socket.settimeout(PATIENCE_S)
        self._rest = b""
        self.decoder: Decoder[Any] = Decoder(list)
        self.send(http2.PREFACE + frame(http2.SETTINGS, 0, 0, settings))

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read(self) -> tuple[int, int, int, bytes] | None:
        """The next frame: kind, flags, stream, payload; None at the end."""
        while True:
            if len(self._rest) >= 9:
                size = int.from_bytes(self._rest[:3], "big")
                if len(self._rest) >= 9 + size:
                    head, payload = self._rest[:9], self._rest[9 : 9 + size]
                    self._rest = self._rest[9 + size :]
                    return head[3], head[4], int.from_bytes(head[5:9], "big"), payload
            try:
                more = self._socket.recv(65536)
            except ConnectionResetError:
                return None
            if not more:
                return None
            self._rest += more

    def answer(self, number: int) -> tuple[dict[bytes, bytes], bytes]:
        """All headers of a stream's answer, and its data."""
        headers: dict[bytes, bytes] = {}
        data = b""
        while (got := self.read()) is not None:
            kind, flags, stream, payload = got
            if kind == http2.HEADERS:
                block = dict(self.decoder.decode(payload))
                if stream == number:
                    headers |= block
            elif kind == http2.DATA and stream == number:
                data += payload
            if stream == number and kind in (http2.HEADERS, http2.DATA) and flags & http2.END_STREAM:
                return headers, data
        raise AssertionError(f"the connection ended: {headers}")

    def goodbye(self) -> int | None:
        """The error code of the GOAWAY that comes before the end; None where there is none."""
        code = None
        while (got := self.read()) is not None:
            if got[0] == http2.GOAWAY:
                code = int.from_bytes(got[3][4:8], "big")
        return code

    def close(self) -> None:
        self._socket.close()


def head(path: str = serving_apis.PREDICT, **more: str) -> bytes:
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    fields |= {"content-type": "application/grpc", **{name.replace("_", "-"): value for name, value in more.items()}}
    return encode([(name.encode(), value.encode()) for name, value in fields.items()])


def message(data: bytes) -> bytes:
    return struct.pack(">BI", 0, len(data)) + data


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
    wire: Callable[..., Wire], headers: bytes, body: bytes, expected: dict[bytes, bytes]
) -> None:
    client = wire()
    client.send(frame(http2.HEADERS, WHOLE, 1, headers) + frame(http2.DATA, LAST, 1, body))
    got, _ = client.answer(1)
    assert got.items() >= expected.items()
    client.send(frame(http2.HEADERS, WHOLE, 3, head()) + frame(http2.DATA, LAST, 3, message(REQUEST)))
    assert client.answer(3)[1] == message(REQUEST)


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


class RawBackend:
    """A server that answers the n-th call, on stream s, with the frames answer(n, s), and health checks with OK."""

    def __init__(self, answer: Callable[[int, int], bytes]) -> None:
        self._calls = 0
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        data, checks = b"", set()
        with connection, contextlib.suppress(OSError):  # the proxy may have gone
            connection.sendall(frame(http2.SETTINGS, 0, 0))
            while more := connection.recv(65536):
                data = (data + more).removeprefix(http2.PREFACE)
                while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):
                    size = int.from_bytes(data[:3], "big")
                    kind, flags, stream = data[3], data[4], int.from_bytes(data[5:9], "big")
                    if kind == http2.HEADERS and b"dpsr-proxy\x05check" in data[9 : 9 + size]:
                        checks.add(stream)
                    data = data[9 + size :]
                    if kind == http2.DATA and flags & http2.END_STREAM:
                        if stream in checks:
                            connection.sendall(good(stream))
                            continue
                        self._calls += 1
                        connection.sendall(self._answer(self._calls, stream))

    def stop(self) -> None:
        self._listener.close()


def good(stream: int) -> bytes:
    begin = frame(http2.HEADERS, WHOLE, stream, b"\x88" + encode([(b"content-type", b"application/grpc")]))
    end = frame(http2.HEADERS, WHOLE | LAST, stream, encode([(b"grpc-status", b"0")]))
    return begin + frame(http2.DATA, 0, stream, message(b"well")) + end


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
