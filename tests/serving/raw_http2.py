"""HTTP/2 frame by frame, for tests that send what no library would send."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable

import hpack
from processes import PATIENCE_S

from dpsr_common import serving_apis

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, _, STREAM_CLOSED, FRAME_SIZE_ERROR = range(7)
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, _, ENHANCE_YOUR_CALM = range(7, 12)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def encode(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block of literals without Huffman codes, which do not enter the table. Any bytes are allowed."""
    block = b""
    for header in headers:
        block += b"\0"
        for text in header:
            block += _length(len(text)) + text
    return block


def _length(size: int) -> bytes:
    if size < 0x7F:
        return bytes((size,))
    out, size = b"\x7f", size - 0x7F
    while size > 0x7F:
        out, size = out + bytes((size & 0x7F | 0x80,)), size >> 7
    return out + bytes((size,))


class Wire:
    """A client's connection, frame by frame."""

    def __init__(self, target: str, settings: bytes = b"") -> None:
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        self._socket.settimeout(PATIENCE_S)
        self._rest = b""
        self.decoder = hpack.Decoder()
        self.send(PREFACE + frame(SETTINGS, 0, 0, settings))

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

    def acknowledge(self) -> None:
        """Acknowledges the settings, from which on the windows that they name count."""
        while (got := self.read()) is not None and got[:2] != (SETTINGS, 0):
            pass
        self.send(frame(SETTINGS, ACK, 0))

    def answer(self, number: int) -> tuple[dict[bytes, bytes], bytes]:
        """All headers of a stream's answer, and its data."""
        headers: dict[bytes, bytes] = {}
        data = b""
        while (got := self.read()) is not None:
            kind, flags, stream, payload = got
            if kind == HEADERS:
                block = dict(self.decoder.decode(payload, raw=True))
                if stream == number:
                    headers |= block
            elif kind == DATA and stream == number:
                data += payload
            if stream == number and kind in (HEADERS, DATA) and flags & END_STREAM:
                return headers, data
        raise AssertionError(f"the connection ended: {headers}")

    def goodbye(self) -> int | None:
        """The error code of the GOAWAY that comes before the end; None where there is none."""
        code = None
        while (got := self.read()) is not None:
            if got[0] == GOAWAY:
                code = int.from_bytes(got[3][4:8], "big")
        return code

    def is_read(self) -> bool:
        """Sends data of a stream that is over. Returns false if the other side leaves the bytes where they are."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self._socket.settimeout(0.2)
        try:
            for _ in range(2000):
                self.send(frame(DATA, 0, 1, bytes(16000)))
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        self._socket.close()


def head(path: str = serving_apis.PREDICT, **more: str) -> bytes:
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    fields |= {"content-type": "application/grpc", **{name.replace("_", "-"): value for name, value in more.items()}}
    return encode([(name.encode(), value.encode()) for name, value in fields.items()])


def message(data: bytes) -> bytes:
    return struct.pack(">BI", 0, len(data)) + data


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
        data, checks, decoder = b"", set(), hpack.Decoder()
        with connection, contextlib.suppress(OSError):  # the proxy may have gone
            connection.sendall(frame(SETTINGS, 0, 0))
            while more := connection.recv(65536):
                data = (data + more).removeprefix(PREFACE)
                while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):
                    size = int.from_bytes(data[:3], "big")
                    kind, flags, stream = data[3], data[4], int.from_bytes(data[5:9], "big")
                    if kind == HEADERS and ("dpsr-proxy", "check") in decoder.decode(data[9 : 9 + size]):
                        checks.add(stream)
                    data = data[9 + size :]
                    if kind == DATA and flags & END_STREAM:
                        if stream in checks:
                            connection.sendall(good(stream))
                            continue
                        self._calls += 1
                        connection.sendall(self._answer(self._calls, stream))

    def stop(self) -> None:
        self._listener.close()


def good(stream: int) -> bytes:
    begin = frame(HEADERS, END_HEADERS, stream, b"\x88" + encode([(b"content-type", b"application/grpc")]))
    end = frame(HEADERS, END_HEADERS | END_STREAM, stream, encode([(b"grpc-status", b"0")]))
    return begin + frame(DATA, 0, stream, message(b"well")) + end
