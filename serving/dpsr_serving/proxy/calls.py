"""gRPC's unary calls over HTTP/2 with messages as bytes: a server, and a channel to another server.

Messages are not decoded, because the proxy only forwards most of them. grpc.aio does the same at five times the CPU
cost; benchmarks/proxy.py measures both.
"""

from __future__ import annotations

import asyncio
import base64
import enum
import functools
import math
import os
import ssl
import struct
import sys
import traceback
import urllib.parse
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

from dpsr_common.serving_apis import MAX_MESSAGE_BYTES
from dpsr_serving.proxy import http2
from dpsr_serving.proxy.hpack import Header, encode, literal

Metadata = tuple[Header, ...]

_CONNECT_S = 5.0  # time that a server has to accept a connection and to send its settings
_REFUSALS = 8  # attempts before a call counts as refused
# Seconds between them: they grow to the longest, some 0.4 s in all. Calls that wait for their turn may come first.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
_DRAIN_PING = b"draining"


class Code(enum.IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reply(NamedTuple):
    """The result of a call: a server's answer, or the proxy's own if `backend` is "".

    Metadata is in its form on the wire: pairs of bytes, with the values of keys that end in "-bin" in base64. `lost`
    says that no server answered.
    """

    code: Code
    details: str = ""
    body: bytes = b""
    initial: Metadata = ()
    trailing: Metadata = ()
    backend: str = ""
    attempts: int = 0
    lost: bool = False


Handler = Callable[[bytes, "float | None", Metadata], Awaitable[Reply]]


def readable(metadata: Metadata) -> Iterable[tuple[str, str | bytes]]:
    """Decodes metadata: names as str, values as str, or as bytes for keys that end in "-bin"."""
    for name, value in metadata:
        if name.endswith(b"-bin"):
            yield name.decode("latin-1"), base64.b64decode(value + b"=" * (-len(value) % 4))
        else:
            yield name.decode("latin-1"), value.decode("utf-8", "replace")


class _Request(NamedTuple):
    """The headers of a call."""

    path: bytes
    metadata: Metadata
    timeout_s: float | None
    encoding: bytes
    refusal: bytes  # a block of headers that refuses the call; b"" if nothing is wrong


class _Response(NamedTuple):
    """A block of headers of an answer: the first block, or the last one if it has a code."""

    http: int
    code: Code | None
    details: str
    metadata: Metadata


# Headers that are not metadata: they concern a single hop, and each side makes its own.
_HOP = frozenset(
    b"te content-type content-length user-agent host connection grpc-timeout grpc-encoding grpc-accept-encoding "
    b"grpc-status grpc-message".split()
)
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_STATUS_OK = b"\x88"  # :status 200, of the static table
_GRPC = literal(b"content-type", b"application/grpc")


def _parse_request(headers: list[Header]) -> _Request:
    found = dict(headers)
    metadata = tuple(header for header in headers if header[0] not in _HOP and not header[0].startswith(b":"))
    refusal = b""
    timeout_s = None
    timeout = found.get(b"grpc-timeout")
    if timeout is not None:
        unit = _UNITS.get(timeout[-1:])
        if unit is None or not timeout[:-1].isdigit() or len(timeout) > 9:
            refusal = _end_block(Code.INTERNAL, f"cannot parse the header grpc-timeout: {timeout!r}", ())
        else:
            timeout_s = int(timeout[:-1]) * unit
    if found.get(b":method") != b"POST":
        refusal = literal(b":status", b"405") + literal(b"allow", b"POST")
    elif not found.get(b"content-type", b"").startswith(b"application/grpc"):
        refusal = literal(b":status", b"415")
    return _Request(found.get(b":path", b""), metadata, timeout_s, found.get(b"grpc-encoding", b"identity"), refusal)


def _parse_response(headers: list[Header]) -> _Response:
    found = dict(headers)
    metadata = tuple(header for header in headers if header[0] not in _HOP and not header[0].startswith(b":"))
    code: Code | None = None
    if b"grpc-status" in found:
        status = found[b"grpc-status"]
        code = Code(int(status)) if status.isdigit() and int(status) <= max(Code) else Code.UNKNOWN
    details = urllib.parse.unquote_to_bytes(found.get(b"grpc-message", b"")).decode("utf-8", "replace")
    http = found.get(b":status", b"0")
    return _Response(int(http) if http.isdigit() else 0, code, details, metadata)


def _end_block(code: Code, details: str, metadata: Metadata) -> bytes:
    """Returns the only block of headers of an answer without a message."""
    return _STATUS_OK + _GRPC + _trailers(code, details, metadata)


def _trailers(code: Code, details: str, metadata: Metadata) -> bytes:
    block = literal(b"grpc-status", b"%d" % code)
    if details:
        # Printable ASCII characters other than the percent sign are not quoted.
        quoted = urllib.parse.quote(details.encode("utf-8", "replace"), safe=_PLAIN)
        block += encode([(b"grpc-message", quoted.encode())])
    return block + encode(metadata) if metadata else block


_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if code != 0x25)


def _headers_frames(number: int, block: bytes, flags: int = 0) -> bytes:
    """Returns the frames of a block of headers, with CONTINUATION frames if it is long."""
    if len(block) <= 16384:
        return http2.frame(http2.HEADERS, flags | http2.END_HEADERS, number, block)
    pieces = [block[begin : begin + 16384] for begin in range(0, len(block), 16384)]
    frames = [http2.frame(http2.HEADERS, flags, number, pieces[0])]
    frames += [http2.frame(http2.CONTINUATION, 0, number, piece) for piece in pieces[1:-1]]
    return b"".join([*frames, http2.frame(http2.CONTINUATION, http2.END_HEADERS, number, pieces[-1])])


def _message(stream: http2.Stream, encoding: bytes) -> bytes:
    """Returns the single message in a stream's data. Raises ValueError."""
    data = stream.chunks[0] if len(stream.chunks) == 1 else b"".join(stream.chunks)
    stream.chunks = []
    if len(data) < 5 or int.from_bytes(data[1:5], "big") != len(data) - 5:
        raise ValueError(f"expected exactly one message, got {len(data)} bytes that are not one")
    if not data[0]:
        return data[5:]
    if encoding not in (b"gzip", b"deflate"):
        raise ValueError(
            f"the message is compressed by {encoding.decode('latin-1')!r}, expected gzip, deflate or identity"
        )
    unpack = zlib.decompressobj(31 if encoding == b"gzip" else 15)
    try:
        message = unpack.decompress(data[5:], MAX_MESSAGE_BYTES)
    except zlib.error as error:
        raise ValueError(f"the message cannot be decompressed: {error}") from None
    if not unpack.eof or unpack.unconsumed_tail:
        raise ValueError("the compressed message is cut off or too large")
    return message


def _framed(message: bytes) -> bytes:
    return struct.pack(">BI", 0, len(message)) + message


# The server


class _Incoming(http2.Connection[_Request]):
    """The connection of a client."""

    def __init__(self, server: Server) -> None:
        super().__init__(_parse_request, b"", http2.PREFACE)
        self._server = server
        self._last = 0
        self._final: int | None = None  # the last stream that is accepted, once that is decided
        self.draining = False

    @property
    def idle(self) -> bool:
        """Whether no call is under way and none can come."""
        return self._final is not None and not self.streams

    def connection_made(self, transport: Any) -> None:
        self._server.connections.add(self)
        super().connection_made(transport)

    def on_closed(self) -> None:
        self._server.connections.discard(self)
        for stream in self.streams.values():
            if stream.owner is not None:
                stream.owner.cancel()

    def on_headers(self, number: int, head: _Request, ended: bool) -> None:
        stream = self.streams.get(number)
        if stream is not None:  # trailers, which gRPC clients do not send
            if not ended or stream.ended:
                raise http2.ProtocolError(http2.PROTOCOL_ERROR, "headers in the middle of a stream")
            stream.ended = True
            self.on_end(stream)
            return
        if number <= self._last:
            return  # the stream has been answered or given up
        if not number & 1:
            raise http2.ProtocolError(http2.PROTOCOL_ERROR, f"a client opened a stream with the even number {number}")
        if self._final is not None:
            return  # the client knows by our GOAWAY that it may make this call elsewhere
        self._last = number
        if len(self.streams) >= http2.STREAMS:
            refused = http2.REFUSED_STREAM.to_bytes(4, "big")
            self.write(http2.frame(http2.RST_STREAM, 0, number, refused))
            return
        stream = self._new_stream(number)
        stream.head = head
        if head.refusal:
            self._refuse(stream, head.refusal, ended)
        elif head.path not in self._server.handlers:
            words = f"Method not found: {head.path.decode('latin-1')}"
            self._refuse(stream, _end_block(Code.UNIMPLEMENTED, words, ()), ended)
        elif ended:
            stream.ended = True
            self.on_end(stream)

    def on_end(self, stream: http2.Stream) -> None:
        head: _Request = stream.head
        try:
            message = _message(stream, head.encoding)
        except ValueError as error:
            self._refuse(stream, _end_block(Code.INTERNAL, str(error), ()), True)
            return
        stream.owner = self._loop.create_task(self._answer(stream, message))

    def on_reset(self, stream: http2.Stream, code: int) -> None:
        if stream.owner is not None:
            stream.owner.cancel()

    def on_sent(self, stream: http2.Stream) -> None:
        self.forget(stream)

    def on_pong(self, payload: bytes) -> None:
        if payload == _DRAIN_PING and self.draining:
            self._settle()

    def drain(self) -> None:
        """Asks the client to make no more calls. Calls that it sends before it learns of that are still answered."""
        self.draining = True
        if self._transport is None or self._expects:
            self._settle()
            return
        goaway = struct.pack(">II", http2.MAX_ID, http2.NO_ERROR)
        self.write(http2.frame(http2.GOAWAY, 0, 0, goaway) + http2.frame(http2.PING, 0, 0, _DRAIN_PING))

    def finish(self) -> None:
        """Closes the connection and cancels the calls under way."""
        self.end(last=self._last)
        self.connection_lost(None)

    def _settle(self) -> None:
        self._final = self._last
        self.write(http2.frame(http2.GOAWAY, 0, 0, struct.pack(">II", self._last, http2.NO_ERROR)))

    def _refuse(self, stream: http2.Stream, block: bytes, ended: bool) -> None:
        """Refuses a call without calling a handler."""
        self.write(_headers_frames(stream.number, block, http2.END_STREAM))
        if ended:
            self.forget(stream)
        else:
            self.reset(stream, http2.NO_ERROR)

    async def _answer(self, stream: http2.Stream, message: bytes) -> None:
        head: _Request = stream.head
        deadline = None if head.timeout_s is None else self._loop.time() + head.timeout_s
        try:
            reply = await self._server.handlers[head.path](message, deadline, head.metadata)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            reply = Reply(Code.UNKNOWN, "the proxy failed; see its log")
        if stream.number not in self.streams:
            return
        number, code = stream.number, reply.code
        if code is not Code.OK and not reply.initial:
            self.write(_headers_frames(number, _end_block(code, reply.details, reply.trailing), http2.END_STREAM))
            self.forget(stream)
            return
        initial = _STATUS_OK + _GRPC
        if reply.initial:
            initial += encode(reply.initial)
        if code is Code.OK and not reply.trailing:
            trailers = _TRAILERS_OK
        else:
            trailers = _trailers(code, reply.details, reply.trailing)
        data = _framed(reply.body) if code is Code.OK else b""
        self.send(
            stream,
            _headers_frames(number, initial),
            data,
            _headers_frames(number, trailers, http2.END_STREAM),
        )
        if number not in self._blocked:
            self.forget(stream)


_TRAILERS_OK = _trailers(Code.OK, "", ())


class Server:
    """Answers unary calls by `handlers`: path -> async function of message, deadline (loop time) and metadata."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self.handlers = {path.encode(): handler for path, handler in handlers.items()}
        self.connections: set[_Incoming] = set()
        self._listeners: list[asyncio.AbstractServer] = []

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None, share_port: bool) -> int:
        """Listens; returns the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: _Incoming(self), host, port, ssl=tls, reuse_port=share_port or None, backlog=1024
        )
        self._listeners.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def listen_unix(self, path: str, tls: ssl.SSLContext | None) -> None:
        """Listens on a UNIX socket as well. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._listeners.append(await loop.create_unix_server(lambda: _Incoming(self), path, ssl=tls, backlog=1024))

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, lets those under way end within `grace_s` seconds, cancels the rest and closes."""
        for listener in self._listeners:
            listener.close()
        end = asyncio.get_running_loop().time() + grace_s
        for connection in list(self.connections):
            connection.drain()
        while self.connections and asyncio.get_running_loop().time() < end:
            for connection in list(self.connections):
                if connection.idle:
                    connection.finish()
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.finish()
        await asyncio.sleep(0)


# The channel


class _Call:
    """A call under way on a connection."""

    __slots__ = ("future", "initial", "timer")

    def __init__(self, future: asyncio.Future[Reply | None]) -> None:
        self.future = future
        self.initial: Metadata = ()
        self.timer: asyncio.TimerHandle | None = None


class _Outgoing(http2.Connection[_Response]):
    """The connection to a server."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(_parse_response, http2.PREFACE, b"")
        self._channel = channel
        self._next = 1
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.hello: asyncio.Future[None] = self._loop.create_future()
        self.usable = True

    def on_settings(self) -> None:
        if not self.hello.done():
            self.hello.set_result(None)
        self._wake()

    def on_closed(self) -> None:
        self.usable = False
        self._channel.forget(self)
        if not self.hello.done():
            self.hello.set_exception(ConnectionError("the connection was closed"))
            self.hello.exception()  # marks it as seen: perhaps no one waits for it any more
        for stream in self.streams.values():
            self._finish(stream, self._channel.lost("the connection was lost"))
        self._wake_all()

    def on_goaway(self, last: int) -> None:
        self.usable = False
        for stream in [stream for stream in self.streams.values() if stream.number > last]:
            self.forget(stream)
            self._finish(stream, None)
        self._close_idle()
        self._wake_all()

    def on_headers(self, number: int, head: _Response, ended: bool) -> None:
        stream = self.streams.get(number)
        if stream is None:
            return
        if not ended:
            if 100 <= head.http < 200:
                return
            stream.head = head
            stream.owner.initial = head.metadata
            return
        self._drop(stream)
        first: _Response = stream.head or head
        if head.code is None:
            code = _OF_HTTP.get(first.http, Code.UNKNOWN)
            words = f"backend {self._channel.address} answered with HTTP status {first.http} and no gRPC status"
            self._finish(stream, Reply(code, words, backend=self._channel.address))
            return
        if head.code is Code.CANCELLED and head.details in ("", "CANCELLED"):
            # gRPC servers answer like this to calls that arrive while they shut down. A client's cancellation never
            # reaches this place, so it was the server that gave up.
            words = f"backend {self._channel.address} gave up the call: is it shutting down?"
            self._finish(stream, Reply(Code.UNAVAILABLE, words, backend=self._channel.address))
            return
        body = b""
        if head.code is Code.OK:
            try:
                body = _message(stream, b"identity")  # our requests accept no other encoding
            except ValueError as error:
                words = f"the answer of backend {self._channel.address}: {error}"
                self._finish(stream, Reply(Code.INTERNAL, words, backend=self._channel.address))
                return
        self._finish(
            stream,
            Reply(head.code, head.details, body, stream.owner.initial, head.metadata, self._channel.address),
        )

    def on_end(self, stream: http2.Stream) -> None:
        self._drop(stream)
        words = f"the answer of backend {self._channel.address} ended without a status"
        self._finish(stream, Reply(Code.INTERNAL, words, backend=self._channel.address))

    def on_reset(self, stream: http2.Stream, code: int) -> None:
        self._close_idle()
        if code == http2.REFUSED_STREAM:
            self._finish(stream, None)
            return
        # Only a client has a reason to cancel a call, so a server that does is shutting down.
        status = Code.UNAVAILABLE if code == http2.CANCEL else _OF_RESET.get(code, Code.INTERNAL)
        words = f"backend {self._channel.address} gave up the call (HTTP/2 error {code})"
        self._finish(stream, Reply(status, words, backend=self._channel.address))

    async def call(self, head: bytes, message: bytes, timeout_s: float | None) -> Reply | None:
        """Makes a call. Returns None if the server has not begun to handle it."""
        while self.usable and len(self.streams) >= self.max_streams:
            waiter = self._loop.create_future()
            self._waiting.append(waiter)
            await waiter
        if not self.usable:
            return None
        stream = self._new_stream(self._next)
        self._next += 2
        if self._next > http2.MAX_ID:
            self.usable = False
        call = stream.owner = _Call(self._loop.create_future())
        self.send(stream, _headers_frames(stream.number, head), _framed(message), b"")
        if timeout_s is not None:
            call.timer = self._loop.call_later(timeout_s, self._expire, stream)
        try:
            return await call.future
        except asyncio.CancelledError:
            if self.streams.get(stream.number) is stream:
                self._cancel(stream)
            raise
        finally:
            if call.timer is not None:
                call.timer.cancel()

    def _expire(self, stream: http2.Stream) -> None:
        self._cancel(stream)
        words = f"backend {self._channel.address} did not answer within the deadline"
        self._finish(stream, Reply(Code.DEADLINE_EXCEEDED, words, backend=self._channel.address))

    def _cancel(self, stream: http2.Stream) -> None:
        self.reset(stream, http2.CANCEL)
        self._close_idle()

    def _drop(self, stream: http2.Stream) -> None:
        """Ends a stream that the server has ended, perhaps before it had all of our data."""
        if stream.number in self._blocked:
            self.reset(stream, http2.CANCEL)
        else:
            self.forget(stream)
        self._close_idle()

    def _finish(self, stream: http2.Stream, reply: Reply | None) -> None:
        if not stream.owner.future.done():
            stream.owner.future.set_result(reply)
        self._wake()

    def _wake(self) -> None:
        while self._waiting and len(self.streams) < self.max_streams:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _wake_all(self) -> None:
        """Wakes all calls that wait for a place, once the connection takes no more: they go elsewhere."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def _close_idle(self) -> None:
        if not self.usable and not self.streams and not self.closed:
            self.end()
            self.connection_lost(None)


_OF_HTTP = {
    400: Code.INTERNAL,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    429: Code.UNAVAILABLE,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.UNAVAILABLE,
}
_OF_RESET = {http2.ENHANCE_YOUR_CALM: Code.RESOURCE_EXHAUSTED, 12: Code.PERMISSION_DENIED}


class Channel:
    """Calls to one server, at "host:port" or "unix:/path", over one connection, which is renewed when it is lost."""

    def __init__(self, address: str, tls: ssl.SSLContext | None, server_name: str = "") -> None:
        self.address = address
        self._tls, self._server_name = tls, server_name
        self._connection: _Outgoing | None = None
        self._connections: set[_Outgoing] = set()  # also those that only finish calls under way
        self._connecting: asyncio.Future[_Outgoing] | None = None
        self._task: asyncio.Task[None] | None = None
        authority = "localhost" if address.startswith("unix:") else address
        self._heads = functools.cache(functools.partial(_request_head, server_name or authority, tls is not None))

    async def call(self, path: str, message: bytes, timeout_s: float | None, metadata: Metadata) -> Reply:
        """Makes one call. Raises nothing but CancelledError."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        # A server that shuts down refuses calls, which another connection may be able to make. A server with a limit of
        # calls may not have noticed yet that another call has ended.
        for attempt in range(_REFUSALS):
            connection = self._connection
            if connection is None or not connection.usable:
                try:
                    connection = await self._connected(None if deadline is None else deadline - loop.time())
                except asyncio.TimeoutError:
                    words = f"backend {self.address} did not accept a connection within the deadline"
                    return Reply(Code.DEADLINE_EXCEEDED, words, backend=self.address)
                except OSError as error:
                    return self.lost(str(error))
            head = self._heads(path)
            left = None
            if deadline is not None:
                left = max(deadline - loop.time(), 0.0)
                head += _timeout(left)
            if metadata:
                head += encode(metadata)
            reply = await connection.call(head, message, left)
            if reply is not None:
                return reply
            if connection.usable:
                await asyncio.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 4**attempt))
        return Reply(Code.UNAVAILABLE, f"backend {self.address} refuses calls", backend=self.address)

    def lost(self, why: str) -> Reply:
        """Returns the reply for a server that cannot be reached."""
        return Reply(
            Code.UNAVAILABLE, f"backend {self.address} cannot be reached: {why}", backend=self.address, lost=True
        )

    def drop(self) -> None:
        """Gives up the connection and its calls; the next call opens another connection."""
        self._connection = None
        for connection in list(self._connections):
            connection.abort()
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._connecting is not None and not self._connecting.done():
            self._connecting.set_exception(ConnectionError("the server does not answer"))
            self._connecting.exception()
        self._connecting = None

    def forget(self, connection: _Outgoing) -> None:
        """Forgets a connection that is closed."""
        self._connections.discard(connection)

    async def _connected(self, timeout_s: float | None) -> _Outgoing:
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._connect(self._connecting))
        return await asyncio.wait_for(asyncio.shield(self._connecting), timeout_s)

    async def _connect(self, connecting: asyncio.Future[_Outgoing]) -> None:
        loop = asyncio.get_running_loop()
        connection: _Outgoing | None = None
        try:
            name: str | None = None
            if self._tls is not None:
                name = self._server_name or _host(self.address)
            make = functools.partial(_Outgoing, self)
            if self.address.startswith("unix:"):
                path = self.address.removeprefix("unix:")
                opening = loop.create_unix_connection(make, path, ssl=self._tls, server_hostname=name)
            else:
                host, port = _host(self.address), int(self.address.rpartition(":")[2])
                opening = loop.create_connection(make, host, port, ssl=self._tls, server_hostname=name)
            _, made = await asyncio.wait_for(opening, _CONNECT_S)
            connection = made
            self._connections.add(made)
            await asyncio.wait_for(asyncio.shield(made.hello), _CONNECT_S)
        except (OSError, asyncio.TimeoutError) as error:
            if connection is not None:
                connection.abort()
            if self._connecting is connecting:
                self._connecting = self._task = None
            if not connecting.done():
                # Not the error itself, because a TimeoutError would look like the caller's deadline.
                connecting.set_exception(ConnectionError(str(error) or f"no connection within {_CONNECT_S:g} s"))
                connecting.exception()
        except asyncio.CancelledError:
            if connection is not None:
                connection.abort()
            raise
        else:
            self._connection, self._connecting, self._task = made, None, None
            if not connecting.done():
                connecting.set_result(made)


def _host(address: str) -> str:
    return "localhost" if address.startswith("unix:") else address.rpartition(":")[0].strip("[]")


def _request_head(authority: str, tls: bool, path: str) -> bytes:
    """Returns the headers that all calls of one method begin with."""
    # Entries of the static table: the method POST and the scheme.
    return (b"\x83\x87" if tls else b"\x83\x86") + encode(
        [
            (b":path", path.encode()),
            (b":authority", authority.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", b"dpsr-proxy"),
        ]
    )


def _timeout(seconds: float) -> bytes:
    """Returns the header `grpc-timeout`, rounded up: at most 8 digits and a unit."""
    if seconds < 90:
        value = b"%du" % math.ceil(seconds * 1e6)
    elif seconds < 90_000:
        value = b"%dm" % math.ceil(seconds * 1e3)
    else:
        value = b"%dS" % min(math.ceil(seconds), 99_999_999)
    # Not by literal(), which caches its results: each timeout is different.
    return b"\0\x0cgrpc-timeout%c%b" % (len(value), value)


# TLS


def server_tls(certificate: str, key: str, ca: str | None) -> ssl.SSLContext:
    """Returns a server's TLS settings. With `ca` clients must show a certificate. Raises OSError, naming the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    _load(context, certificate, key, ca)
    if ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_tls(certificate: str | None, key: str | None, ca: str | None) -> ssl.SSLContext:
    """Returns a channel's TLS settings. Without `ca` it trusts the system's authorities. Raises OSError, as above."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if ca is None:
        context.load_default_certs()
    _load(context, certificate, key, ca)
    return context


def _load(context: ssl.SSLContext, certificate: str | None, key: str | None, ca: str | None) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in (key, certificate, ca):
        if path is not None:
            os.close(os.open(path, os.O_RDONLY))  # the error of the ssl module would not name the file
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        if ca is not None:
            context.load_verify_locations(ca)
    except ssl.SSLError as error:
        paths = ", ".join(path for path in (key, certificate, ca) if path is not None)
        raise OSError(
            error.errno, f"not PEM files of a key, its certificate and an authority ({error.reason})", paths
        ) from None
