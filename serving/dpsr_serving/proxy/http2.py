"""The part of HTTP/2 (RFC 9113) that gRPC needs: frames, streams and flow control of one connection.

Messages are handled whole: the data of a stream is collected until the stream ends, and data to send waits here until
the other side's flow-control windows allow it. Subclasses know what messages mean and which side opens streams.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from dpsr_common.serving_apis import MAX_MESSAGE_BYTES
from dpsr_serving.proxy.hpack import LIST_BYTES, Decoder, Header, HpackError

_HEAD = struct.Struct(">HBBBI").unpack_from

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x1, 0x4, 0x8, 0x20

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, _, STREAM_CLOSED, FRAME_SIZE_ERROR = range(7)
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, _, ENHANCE_YOUR_CALM = range(7, 12)

MAX_ID = 2**31 - 1
_MAX_WINDOW = 2**31 - 1
_DEFAULT_WINDOW = 65535
_MAX_STREAMS, _INITIAL_WINDOW, _MAX_FRAME = 3, 4, 5  # settings
_ENABLE_PUSH = 2

# What the other side may send before it needs our permission for more. Messages are collected whole, so the real limit
# is on their size.
_STREAM_WINDOW = 2**24
_CONNECTION_WINDOW = 2**30
_FRAME_BYTES = 2**18
STREAMS = 2**14
_DATA_BYTES = MAX_MESSAGE_BYTES + 5  # most data of one stream: a message and its prefix
_WRITE_BYTES = 2**20  # bytes that may wait in the transport before streams wait instead
_OWN_SETTINGS = struct.pack(
    ">HIHIHIHI", _ENABLE_PUSH, 0, _MAX_STREAMS, STREAMS, _INITIAL_WINDOW, _STREAM_WINDOW, _MAX_FRAME, _FRAME_BYTES
)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Returns the bytes of a frame."""
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


class ProtocolError(Exception):
    """The other side violated the protocol; the connection ends with this HTTP/2 error code."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


class Stream:
    """One exchange of messages.

    Attributes:
        number: the stream's number.
        head: the first block of headers received, as the connection parses it.
        chunks, size: the data received so far, and its number of bytes.
        ended: whether the other side has sent everything.
        owner: for the use of the connection's subclass.
    """

    __slots__ = ("chunks", "data", "ended", "head", "number", "owner", "sent", "size", "tail", "unacked", "window")

    def __init__(self, number: int, window: int) -> None:
        self.number = number
        self.head: Any = None
        self.chunks: list[bytes] = []
        self.size = 0
        self.ended = False
        self.owner: Any = None
        self.window = window  # bytes that we may still send
        self.unacked = 0  # bytes received that we have not yet allowed the other side to send again
        # Our data that waits for the window begins at `sent`; the frame `tail` follows it.
        self.data = b""
        self.sent = 0
        self.tail = b""


H = TypeVar("H")


class Connection(asyncio.Protocol, ABC, Generic[H]):
    """One side of a connection. `parse` turns a block of headers into what `on_headers` receives."""

    def __init__(self, parse: Callable[[list[Header]], H], preface: bytes, expects: bytes) -> None:
        self.streams: dict[int, Stream] = {}
        self.closed = False
        self.max_streams = STREAMS  # number of streams that the other side lets us open
        self._decoder: Decoder[H] = Decoder(parse)
        self._preface, self._expects = preface, expects
        self._transport: Any = None
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._out: list[bytes] = []
        self._paused = False
        self._blocked: dict[int, Stream] = {}  # streams whose data waits for a window
        self._window = _DEFAULT_WINDOW
        self._first_window = _DEFAULT_WINDOW
        self._frame_bytes = 16384
        self._unacked = 0
        self._block: tuple[int, int, list[bytes]] | None = None  # headers that CONTINUATION frames continue

    # Subclasses implement these.

    @abstractmethod
    def on_headers(self, number: int, head: H, ended: bool) -> None:
        """A block of headers was received."""

    @abstractmethod
    def on_end(self, stream: Stream) -> None:
        """A stream ended after its data, without trailers."""

    @abstractmethod
    def on_reset(self, stream: Stream, code: int) -> None:
        """The other side gave up a stream."""

    def on_goaway(self, last: int) -> None:
        """The other side accepts no more streams and ignores those with numbers above `last`."""

    def on_settings(self) -> None:
        """Settings were received."""

    def on_pong(self, payload: bytes) -> None:
        """The answer to one of our pings was received."""

    @abstractmethod
    def on_closed(self) -> None:
        """The connection is lost, and with it all of its streams."""

    # Subclasses use these.

    def write(self, data: bytes) -> None:
        """Sends bytes, in one write with everything else that is sent in this turn of the event loop."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)

    def send(self, stream: Stream, head: bytes, data: bytes, tail: bytes) -> None:
        """Sends everything that a stream needs: a frame of headers, data, and a frame that ends the stream.

        Without `tail` the last frame of data ends the stream.
        """
        size = len(data)
        if size <= self._frame_bytes and size <= self._window and size <= stream.window and not self._paused:
            self._window -= size
            stream.window -= size
            flags = 0 if tail else END_STREAM
            kind = struct.pack(">HBBBI", size >> 8, size & 0xFF, DATA, flags, stream.number)
            self.write(b"".join((head, kind, data, tail)))
            return
        self.write(head)
        stream.data, stream.sent, stream.tail = data, 0, tail
        self._blocked[stream.number] = stream
        self._pump()

    def reset(self, stream: Stream, code: int) -> None:
        """Gives up a stream."""
        self.forget(stream)
        if not self.closed:
            self.write(frame(RST_STREAM, 0, stream.number, struct.pack(">I", code)))

    def forget(self, stream: Stream) -> None:
        """Forgets a stream that has nothing more to send or to receive."""
        self.streams.pop(stream.number, None)
        self._blocked.pop(stream.number, None)

    def end(self, code: int = NO_ERROR, words: str = "", last: int = 0) -> None:
        """Sends GOAWAY, and closes the connection when that is sent."""
        if not self.closed and self._transport is not None:
            self.write(frame(GOAWAY, 0, 0, struct.pack(">II", last, code) + words.encode()[:200]))
            self._flush()
            self._transport.close()

    def abort(self) -> None:
        """Closes the connection at once."""
        if self._transport is not None:
            self._transport.abort()
        self.connection_lost(None)

    # asyncio calls these.

    def connection_made(self, transport: Any) -> None:
        """Sends our settings."""
        self._transport = transport
        transport.set_write_buffer_limits(_WRITE_BYTES)
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1
        )  # notices a peer that vanished
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self.abort()
            return
        more = struct.pack(">I", _CONNECTION_WINDOW - _DEFAULT_WINDOW)
        self.write(self._preface + frame(SETTINGS, 0, 0, _OWN_SETTINGS) + frame(WINDOW_UPDATE, 0, 0, more))

    def connection_lost(self, error: Exception | None) -> None:
        """Ends all streams."""
        if self.closed:
            return
        self.closed = True
        self._out.clear()
        self._blocked.clear()
        self.on_closed()
        self.streams.clear()

    def pause_writing(self) -> None:
        """The other side reads slower than we write."""
        self._paused = True

    def resume_writing(self) -> None:
        """The other side has caught up."""
        self._paused = False
        self._pump()

    def data_received(self, data: bytes) -> None:
        """Splits the received bytes into frames."""
        if self.closed:
            return
        buffer = self._buffer + data if self._buffer else data
        if self._expects:
            if not buffer.startswith(self._expects[: len(buffer)]):
                self.abort()
                return
            if len(buffer) < len(self._expects):
                self._buffer = buffer
                return
            buffer, self._expects = buffer[len(self._expects) :], b""
        offset, size = 0, len(buffer)
        try:
            while size - offset >= 9:
                high, low, kind, flags, number = _HEAD(buffer, offset)
                end = offset + 9 + (high << 8 | low)
                if end > size:
                    if end - offset - 9 > _FRAME_BYTES:
                        raise ProtocolError(FRAME_SIZE_ERROR, "a frame larger than allowed")
                    break
                self._frame(kind, flags, number & MAX_ID, buffer[offset + 9 : end])
                offset = end
                if self.closed:
                    return
        except (ProtocolError, HpackError) as error:
            code = error.code if isinstance(error, ProtocolError) else COMPRESSION_ERROR
            self.end(code, str(error))
            self.connection_lost(None)
            return
        self._buffer = buffer[offset:] if offset else buffer

    def eof_received(self) -> bool:
        """The other side closed: there is nothing to wait for."""
        return False

    # Frames.

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block is not None and (kind != CONTINUATION or number != self._block[0]):
            raise ProtocolError(PROTOCOL_ERROR, "headers that do not end")
        if kind == DATA:
            self._on_data(flags, number, payload)
        elif kind == HEADERS:
            if not number:
                raise ProtocolError(PROTOCOL_ERROR, "headers of no stream")
            if flags & PADDED:
                payload = _unpadded(payload)
            if flags & PRIORITIZED:
                payload = payload[5:]
            if flags & END_HEADERS:
                self.on_headers(number, self._decoder.decode(payload), bool(flags & END_STREAM))
            else:
                self._block = (number, flags & END_STREAM, [payload])
        elif kind == WINDOW_UPDATE:
            self._on_window_update(number, payload)
        elif kind == PING:
            if len(payload) != 8:
                raise ProtocolError(FRAME_SIZE_ERROR, f"a ping of {len(payload)} bytes")
            if flags & ACK:
                self.on_pong(payload)
            else:
                self.write(frame(PING, ACK, 0, payload))
        elif kind == SETTINGS:
            self._on_settings(flags, payload)
        elif kind == RST_STREAM:
            stream = self.streams.get(number)
            if stream is not None:
                self.forget(stream)
                self.on_reset(stream, int.from_bytes(payload, "big"))
        elif kind == GOAWAY:
            self.on_goaway(int.from_bytes(payload[:4], "big") & MAX_ID)
        elif kind == CONTINUATION:
            if self._block is None:
                raise ProtocolError(PROTOCOL_ERROR, "a CONTINUATION frame without a beginning")
            pieces = self._block[2]
            pieces.append(payload)
            if len(pieces) > 64 or sum(map(len, pieces)) > LIST_BYTES:
                raise ProtocolError(ENHANCE_YOUR_CALM, f"headers of more than {LIST_BYTES} bytes")
            if flags & END_HEADERS:
                _, ended, _ = self._block
                self._block = None
                self.on_headers(number, self._decoder.decode(b"".join(pieces)), bool(ended))
        elif kind == PUSH_PROMISE:
            raise ProtocolError(PROTOCOL_ERROR, "a PUSH_PROMISE frame, which our settings forbid")

    def _on_data(self, flags: int, number: int, payload: bytes) -> None:
        # Padding counts towards the windows. The connection's window is always refilled, because streams hold the data
        # and their number and size have limits.
        count = len(payload)
        self._unacked += count
        if self._unacked >= _CONNECTION_WINDOW // 2:
            self.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._unacked)))
            self._unacked = 0
        stream = self.streams.get(number)
        if stream is None:
            if not number:
                raise ProtocolError(PROTOCOL_ERROR, "data without a stream")
            return
        if stream.ended:
            self.reset(stream, STREAM_CLOSED)
            self.on_reset(stream, STREAM_CLOSED)
            return
        if flags & PADDED:
            payload = _unpadded(payload)
        stream.chunks.append(payload)
        stream.size += len(payload)
        if stream.size > _DATA_BYTES:
            self.reset(stream, ENHANCE_YOUR_CALM)
            self.on_reset(stream, ENHANCE_YOUR_CALM)
            return
        if flags & END_STREAM:
            stream.ended = True
            self.on_end(stream)
            return
        stream.unacked += count
        if stream.unacked >= _STREAM_WINDOW // 2:
            self.write(frame(WINDOW_UPDATE, 0, number, struct.pack(">I", stream.unacked)))
            stream.unacked = 0

    def _on_window_update(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(FRAME_SIZE_ERROR, f"a window update of {len(payload)} bytes")
        more = int.from_bytes(payload, "big") & MAX_ID
        if number:
            stream = self.streams.get(number)
            if stream is None:
                return
            stream.window += more
            if stream.window > _MAX_WINDOW:
                self.reset(stream, FLOW_CONTROL_ERROR)
                self.on_reset(stream, FLOW_CONTROL_ERROR)
                return
        else:
            self._window += more
            if self._window > _MAX_WINDOW:
                raise ProtocolError(FLOW_CONTROL_ERROR, "a window above 2^31 - 1")
        if self._blocked:
            self._pump()

    def _on_settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            return
        if len(payload) % 6:
            raise ProtocolError(FRAME_SIZE_ERROR, f"settings of {len(payload)} bytes")
        for name, value in struct.iter_unpack(">HI", payload):
            if name == _INITIAL_WINDOW:
                if value > _MAX_WINDOW:
                    raise ProtocolError(FLOW_CONTROL_ERROR, f"an initial window of {value}")
                for stream in self.streams.values():
                    stream.window += value - self._first_window
                self._first_window = value
            elif name == _MAX_FRAME:
                if not 16384 <= value < 2**24:
                    raise ProtocolError(PROTOCOL_ERROR, f"frames of {value} bytes")
                self._frame_bytes = value
            elif name == _MAX_STREAMS:
                self.max_streams = value
        self.write(frame(SETTINGS, ACK, 0))
        self.on_settings()
        if self._blocked:
            self._pump()

    def _new_stream(self, number: int) -> Stream:
        stream = self.streams[number] = Stream(number, self._first_window)
        return stream

    def _pump(self) -> None:
        """Sends as much waiting data as the windows allow, one frame of each stream at a time."""
        while self._blocked and not self._paused:
            progress = False
            for number, stream in list(self._blocked.items()):
                size = len(stream.data)
                count = min(size - stream.sent, self._frame_bytes, self._window, stream.window)
                if count <= 0 and stream.sent < size:
                    continue
                progress = True
                begin, stream.sent = stream.sent, stream.sent + max(count, 0)
                self._window -= stream.sent - begin
                stream.window -= stream.sent - begin
                done = stream.sent == size
                flags = END_STREAM if done and not stream.tail else 0
                self.write(frame(DATA, flags, number, stream.data[begin : stream.sent]))
                if done:
                    self.write(stream.tail)
                    del self._blocked[number]
                    stream.data = b""
                    self.on_sent(stream)
            if not progress:
                return
            self._flush()  # may call pause_writing()

    def on_sent(self, stream: Stream) -> None:
        """A stream whose data had to wait has been sent completely."""

    def _flush(self) -> None:
        if self._out and not self.closed:
            data = b"".join(self._out)
            self._out.clear()
            self._transport.write(data)


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise ProtocolError(PROTOCOL_ERROR, "padding longer than the frame")
    return payload[1 : len(payload) - payload[0]]
