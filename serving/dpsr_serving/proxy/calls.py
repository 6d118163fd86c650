"""gRPC's calls with messages as bytes: a server, and a channel to another server that makes unary calls.

The wire (serving/wire/, in C++ on nghttp2) keeps HTTP/2 and gRPC's headers, and enforces the limits of calls and
connections. This module moves bytes between sockets and the wire, and decides which connections live.

Messages are not decoded, because the proxy only forwards most of them. grpc.aio does the same at five times the CPU
cost; benchmarks/proxy.py measures both.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import enum
import functools
import heapq
import os
import random
import socket
import ssl
import sys
import traceback
import weakref
import zlib
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from dpsr_serving import _native
from dpsr_serving.proxy.config import LimitsConfig

Header = tuple[bytes, bytes]
Metadata = tuple[Header, ...]

# Kinds of the wire's events (enum EventKind in serving/wire/session.h), and HTTP/2's error codes.
_CALL, _ANSWER, _END, _SETTINGS, _GOAWAY, _DRAINED, _MESSAGE, _HALF_CLOSE = range(8)
_NO_ERROR, _REFUSED_STREAM, _CANCEL, _ENHANCE_YOUR_CALM, _INADEQUATE_SECURITY = 0, 7, 8, 11, 12

_CONNECT_S = 5.0  # time that a server has to accept a connection and to send its settings
_REFUSALS = 8  # attempts before a call counts as refused
# Seconds between them: they grow to the longest, some 0.4 s in all. Calls that wait for their turn may come first.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
# Bytes that may wait in the transport. What is beyond waits in the wire, where the limits count it.
_WRITE_BYTES = 2**16
_CLOSE_S = 5.0  # time to send the last bytes of a connection that ends
# How long a connection whose client broke a rule stays open without being read, and of how many connections. So a flood
# stops, and cannot begin anew at once.
_LINGER_S, _LINGERING = 2.0, 256
_ACCEPTS = 4  # new connections that are accepted before calls have their turn again
_BACKLOG = 1024  # connections that wait for that
_EVENTS = 8  # of a client's connection that are handled before other connections have their turn
_SWEEP_S = 1.0  # time between two looks at the connections' time limits
_AGE_JITTER = 0.1  # share of a connection's age, so that connections made together do not end together
_STREAMING = 8  # streaming calls of a connection, which cost something as long as they last
_UNREAD_BYTES = 2**16  # messages of a streaming call that are not handled yet
_UNREAD_COST = 64  # bytes that each of them takes besides its own
_ANSWER_HEADER_BYTES = 65536  # of a server, which is trusted with more than a client
_PACKED_FROM = 1024  # bytes of an answer that is compressed if its client asks; as the model server
_PACKED_AT_ONCE = 2**15  # bytes that are compressed on the event loop, in some 0.5 ms; more goes to a thread
_UNPACKED_AT_ONCE = 2**18  # bytes that are decompressed on the event loop, in some 0.5 ms; more goes to a thread
_NOT_PACKED = (b"", b"identity")
_SPARE_ENDS = 64  # deadlines of calls that have ended, which are kept beside one for each call


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
    says that no server answered, and `begun` that the server was lost after it may have begun with the call.
    """

    code: Code
    details: str = ""
    body: bytes = b""
    initial: Metadata = ()
    trailing: Metadata = ()
    backend: str = ""
    attempts: int = 0
    lost: bool = False
    begun: bool = False


FAILED = Reply(Code.UNKNOWN, "the proxy failed; see its log")

Handler = Callable[[bytes, "float | None", Metadata], Awaitable[Reply]]


class Caller(Protocol):
    """Who waits for the answer of a call."""

    def finish(self, stream: int, reply: Reply) -> None:
        """Takes the answer."""


class Connection(Protocol):
    """A connection to a server."""

    def begin(self, path: str, message: bytes, timeout_s: float | None, metadata: Metadata, receiver: Receiver) -> int:
        """Begins a call, and returns its stream, or a negative number if the connection takes no more."""

    def give_up(self, stream: int) -> None:
        """Ends a call that is still under way. Its receiver hears nothing."""


class Pending(Protocol):
    """A call under way."""

    def cancel(self) -> object:
        """Gives it up."""


class Receiver(Protocol):
    """Who waits for a server's answer."""

    def on_reply(self, reply: Reply | None) -> None:
        """Takes the answer; None if the server has not begun to handle the call."""


# As a handler, but calls finish() of the caller, and returns at once: the call, or None if only the handler can answer.
Starter = Callable[[bytes, "float | None", Metadata, Caller, int], "Pending | None"]
# Of a streaming method: messages of the client -> messages to the client. ValueError: the client sent a wrong message.
StreamHandler = Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]]


def readable(metadata: Metadata) -> Iterable[tuple[str, str | bytes]]:
    """Decodes metadata: names as str, values as str, or as bytes for keys that end in "-bin"."""
    for name, value in metadata:
        if name.endswith(b"-bin"):
            # The wire looks at the characters only, so a client can send a number of them that stands for nothing.
            with contextlib.suppress(binascii.Error):
                value = base64.b64decode(value + b"=" * (-len(value) % 4))
            yield name.decode("latin-1"), value
        else:
            yield name.decode("latin-1"), value.decode("utf-8", "replace")


# Where all connections receive bytes, one after the other: the wire has read them before the next ones come. Without it
# asyncio makes a buffer for each read.
_RECEIVED = memoryview(bytearray(2**16))


class _Outbox:
    """Connections of an event loop that have something to send.

    What connections have to say because of received bytes is sent right after these were handled, without another turn
    of the loop. Everything else waits for the next turn.
    """

    __slots__ = ("__weakref__", "_is_scheduled", "_loop", "_waiting", "receiving")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[_Connection] = deque()
        self._is_scheduled = False
        self.receiving = False

    def add(self, connection: _Connection) -> None:
        """Lets a connection send soon."""
        self._waiting.append(connection)
        if not self.receiving:
            self._flush_soon()

    def flush(self) -> None:
        """Lets all connections send."""
        try:
            while self._waiting:
                self._waiting.popleft().flush()
        finally:
            # One connection that fails must not keep the others from sending.
            if self._waiting:
                self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._flush_later)

    def _flush_later(self) -> None:
        self._is_scheduled = False
        self.flush()


_outboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Outbox] = weakref.WeakKeyDictionary()


def _outbox() -> _Outbox:
    loop = asyncio.get_running_loop()
    found = _outboxes.get(loop)
    if found is None:
        found = _outboxes[loop] = _Outbox(loop)
    return found


class _Connection(asyncio.BufferedProtocol):
    """One side of a connection: moves bytes between a socket and a session of the wire."""

    def __init__(self) -> None:
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._outbox = _outbox()
        self._session: _native.Session | None = None
        self._transport: Any = None
        self._scheduled = False
        self._paused_at: float | None = None  # since when the other side reads too slowly
        self._unsent = 0

    # Subclasses implement these.

    @abstractmethod
    def on_event(self, event: tuple[Any, ...]) -> None:
        """The wire reports something."""

    @abstractmethod
    def on_closed(self) -> None:
        """The connection is lost, and with it all of its calls."""

    # Subclasses use these.

    def schedule(self) -> None:
        """Sends what the session has, in one write with everything else that comes up at the same time."""
        if not self._scheduled:
            self._scheduled = True
            self._outbox.add(self)

    def end(self) -> None:
        """Closes the connection, when all that the session has to say is sent or after some seconds."""
        if not self.closed:
            if self._session is not None:
                self._session.terminate(_NO_ERROR)
                self._flush()
            if not self.closed:
                self._close()

    def abort(self) -> None:
        """Closes the connection at once."""
        if self._transport is not None:
            self._transport.abort()
        self.connection_lost(None)

    # asyncio calls these.

    def connection_made(self, transport: Any) -> None:
        """Prepares the socket."""
        self._transport = transport
        transport.set_write_buffer_limits(_WRITE_BYTES)
        # Notices a peer that vanished.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Ends all calls."""
        if not self.closed:
            self.closed = True
            self.on_closed()
            self._session = None

    def pause_writing(self) -> None:
        """The other side reads more slowly than we write."""
        self._paused_at = self._loop.time()

    def resume_writing(self) -> None:
        """The other side has caught up."""
        self._paused_at = None
        self._flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Returns the buffer for the next read."""
        return _RECEIVED

    def buffer_updated(self, size: int) -> None:
        """Gives bytes to the wire."""
        if self.closed:
            return
        assert self._session is not None
        events = self._session.receive(_RECEIVED, size, self._loop.time())
        if events is None:
            self.abort()
            return
        outbox = self._outbox
        outbox.receiving = True
        try:
            self._take(events)
            if not self.closed and (self._session.wants_write or self._session.finished):
                self.schedule()
        finally:
            outbox.receiving = False
            outbox.flush()

    def eof_received(self) -> bool:
        """The other side closed: there is nothing to wait for."""
        return False

    def flush(self) -> None:
        """Sends what the session has, if schedule() was called since the last time."""
        if self._scheduled:
            self._flush()

    def _flush(self) -> None:
        self._scheduled = False
        if self.closed:
            return
        session, transport = self._session, self._transport
        assert session is not None
        while self._paused_at is None:
            data = session.send(_WRITE_BYTES)
            if data:
                transport.write(data)
            if len(data) < _WRITE_BYTES:
                break
        unsent = transport.get_write_buffer_size()
        if unsent or self._unsent:
            self._unsent = unsent
            session.set_unsent(unsent)
        if session.has_events:
            self._take(session.take_events())
        if not self.closed and session.finished:
            self._close()

    def _take(self, events: list[tuple[Any, ...]]) -> None:
        for event in events:
            if self.closed:
                return
            self.on_event(event)

    def _close(self) -> None:
        self._transport.close()
        self._loop.call_later(_CLOSE_S, self._transport.abort)
        self.connection_lost(None)


# The server


class _Messages(asyncio.Queue["bytes | None"]):
    """Messages of a streaming call that are not handled yet; None: no more. `held` is what they take, in bytes."""

    held = 0

    def _put(self, item: bytes | None) -> None:
        super()._put(item)
        self.held += _UNREAD_COST + len(item or b"")

    def _get(self) -> bytes | None:
        item = super()._get()
        self.held -= _UNREAD_COST + len(item or b"")
        return item


class _Incoming(_Connection):
    """The connection of a client."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server
        self._made = self._loop.time()
        self._ends = self._made + server.limits.age_s * random.uniform(1 - _AGE_JITTER, 1)
        self._hello = False  # whether the client has sent its settings
        self._tasks: dict[int, Pending] = {}
        self._streaming: dict[int, _Messages] = {}
        self._later: deque[tuple[Any, ...]] = deque()  # events that wait for the next turn of the loop
        self._drained: float | None = None  # when the client was asked to make no more calls
        self._settled = False  # whether it knows

    @property
    def idle(self) -> bool:
        """Whether no call is under way and none can come."""
        return self._settled and (self._session is None or not self._session.num_streams)

    @property
    def idle_since(self) -> float | None:
        """Since when the connection has had no call; None if it has one."""
        if self._session is None:
            return self._made
        return None if self._session.num_streams else self._session.idle_since

    @property
    def spare_since(self) -> float | None:
        """Since when the connection may end in favour of another: it has no calls, or only streaming ones."""
        if self._session is not None and self._session.num_streams == len(self._streaming):
            return self._session.idle_since
        return self.idle_since

    @property
    def held(self) -> int:
        """Bytes that the connection holds."""
        return 0 if self._session is None else self._session.held

    @property
    def stalled(self) -> bool:
        """Whether the client keeps the connection from going on: it sends or reads too slowly."""
        return self._paused_at is not None or (self._session is not None and self._session.is_stalled)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if not self.closed and not self._server.admit(self):
            self.abort()

    def _close(self) -> None:
        if self._session is not None and self._session.has_failed and self._server.linger(self._transport):
            self.connection_lost(None)
        else:
            super()._close()

    def on_closed(self) -> None:
        self._server.forget(self)
        tasks, self._tasks = self._tasks, {}
        for task in tasks.values():
            task.cancel()
        self._streaming.clear()
        self._later.clear()

    def pause_writing(self) -> None:
        # Calls that would add to the answers that the client does not read are not read either.
        super().pause_writing()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.closed and self._paused_at is None:
            self._transport.resume_reading()

    def buffer_updated(self, size: int) -> None:
        if self._session is None and not self.closed:
            # Not before, because connections on which nothing comes should cost little.
            self._session = _native.server_session(self._server.wire_limits, self._server.host, self._loop.time())
        super().buffer_updated(size)
        if self._server.host.over:
            self._server.shed()

    def on_event(self, event: tuple[Any, ...]) -> None:
        kind, stream = event[0], event[1]
        if kind == _CALL:
            self._server.fresh.pop(self, None)
            if event[2] in self._server.streaming and len(self._streaming) >= _STREAMING:
                words = f"the connection has {_STREAMING} calls of streaming methods, which is the limit"
                self._end_stream(stream, Code.RESOURCE_EXHAUSTED, words)
            elif event[2] in self._server.streaming:
                self._streaming[stream] = _Messages()
                self._tasks[stream] = self._loop.create_task(self._stream(stream, event[2], event[5]))
            else:
                self._begin(*event[1:])
        elif kind == _END:
            # A task that has not begun yet ends without a trace.
            self._streaming.pop(stream, None)
            task = self._tasks.pop(stream, None)
            if task is not None:
                task.cancel()
        elif kind in (_MESSAGE, _HALF_CLOSE):
            messages = self._streaming.get(stream)
            if messages is not None and messages.held > _UNREAD_BYTES:
                words = f"more than {_UNREAD_BYTES} bytes of messages wait for an answer, which is the limit"
                self._end_stream(stream, Code.RESOURCE_EXHAUSTED, words)
            elif messages is not None:
                messages.put_nowait(event[2] if kind == _MESSAGE else None)
        elif kind == _SETTINGS:
            self._hello = True
        elif kind == _DRAINED and self._drained is not None and not self._settled:
            self._settle()

    def _take(self, events: list[tuple[Any, ...]]) -> None:
        # Many calls may come at once. Other clients are served between them.
        if self._later:
            self._later.extend(events)
            return
        if len(events) > _EVENTS:
            self._later.extend(events[_EVENTS:])
            self._loop.call_soon(self._go_on)
        super()._take(events[:_EVENTS])

    def _go_on(self) -> None:
        outbox = self._outbox
        outbox.receiving = True
        try:
            super()._take([self._later.popleft() for _ in range(min(_EVENTS, len(self._later)))])
        finally:
            if self._later:
                self._loop.call_soon(self._go_on)
            outbox.receiving = False
            outbox.flush()

    def drain(self) -> None:
        """Asks the client to make no more calls. Calls that it sends before it learns of that are still answered."""
        if self._drained is not None or self.closed:
            return
        self._drained = self._loop.time()
        if self._session is None or not self._hello:
            self.end()
            return
        # Streaming calls may last for ever, so they would keep the connection.
        for stream in list(self._streaming):
            self._end_stream(stream, Code.UNAVAILABLE, "the connection is about to end; call again")
        self._session.drain()
        self.schedule()

    def leave(self) -> None:
        """Closes a connection without calls, to make room for another."""
        if self._hello:
            self.end()
        else:
            self.abort()

    def sweep(self, now: float, limits: LimitsConfig) -> None:
        """Ends calls and the connection where they have passed their time limits."""
        if not self._hello:
            if now - self._made > limits.connect_s:
                self.abort()
            return
        assert self._session is not None
        if self._paused_at is not None and now - self._paused_at > limits.answer_s:
            self.abort()
            return
        self._session.expire(now)
        if self._session.wants_write:
            self.schedule()
        since = self.idle_since
        if self._drained is not None:
            silent = since is not None and now - self._drained > limits.connect_s
            if self.idle or silent or now - self._drained > limits.answer_s:
                self.end()
            return
        if now > self._ends or (since is not None and now - since > limits.idle_s):
            self.drain()

    def _settle(self) -> None:
        assert self._session is not None
        self._settled = True
        self._session.settle()
        self.schedule()

    def finish(self, stream: int, reply: Reply) -> None:
        """Answers a call that a starter began."""
        self._tasks.pop(stream, None)
        self._send(stream, reply, reply.body if reply.code is Code.OK else b"", "")

    def _begin(
        self,
        stream: int,
        path: str,
        message: bytes,
        encoding: bytes,
        timeout_s: float | None,
        metadata: Metadata,
        asked: bytes,
    ) -> None:
        deadline = None if timeout_s is None else self._loop.time() + timeout_s
        start = self._server.starters.get(path)
        if start is not None and not encoding and asked in _NOT_PACKED:
            try:
                call = start(message, deadline, metadata, self, stream)
            except Exception:
                traceback.print_exc(file=sys.stderr)
                self.finish(stream, FAILED)
                return
            if call is not None:
                self._tasks[stream] = call
                return
        answer = self._answer(stream, path, message, encoding, deadline, metadata, asked)
        self._tasks[stream] = self._loop.create_task(answer)

    async def _answer(
        self,
        stream: int,
        path: str,
        message: bytes,
        encoding: bytes,
        deadline: float | None,
        metadata: Metadata,
        asked: bytes,
    ) -> None:
        try:
            if encoding:
                message = await self._unpacked(stream, message, encoding)
            reply = await self._server.handlers[path](message, deadline, metadata)
        except _Refused as error:
            reply = Reply(error.code, str(error))
        except Exception:
            traceback.print_exc(file=sys.stderr)
            reply = FAILED
        finally:
            self._tasks.pop(stream, None)
        if self._session is None:
            return
        body = reply.body if reply.code is Code.OK else b""
        packed_by = ""
        if asked and len(body) >= _PACKED_FROM:
            body, packed_by = await self._packed(body, asked)
            if self._session is None:
                return
        self._send(stream, reply, body, packed_by)

    def _send(self, stream: int, reply: Reply, body: bytes, packed_by: str) -> None:
        session = self._session
        if session is None:
            return
        if session.answer(stream, reply.code, reply.details, reply.initial, body, reply.trailing, packed_by):
            self.schedule()
            if self._server.host.over:
                self._server.shed()

    async def _stream(self, stream: int, path: str, timeout_s: float | None) -> None:
        """Answers a streaming call."""
        messages = self._streaming[stream]

        async def received() -> AsyncIterator[bytes]:
            while (message := await messages.get()) is not None:
                yield message

        async def answer() -> None:
            async for message in self._server.streaming[path](received()):
                if self._session is None or not self._session.push(stream, message):
                    return
                self.schedule()

        code, words = Code.OK, ""
        try:
            await asyncio.wait_for(answer(), timeout_s)
        except asyncio.TimeoutError:
            code, words = Code.DEADLINE_EXCEEDED, "the deadline of the call has passed"
        except ValueError as error:
            code, words = Code.INVALID_ARGUMENT, str(error)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            code, words = FAILED.code, FAILED.details
        self._end_stream(stream, code, words)

    def _end_stream(self, stream: int, code: Code, words: str) -> None:
        self._streaming.pop(stream, None)
        task = self._tasks.pop(stream, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        if self._session is not None and self._session.answer(stream, code, words, (), b"", ()):
            self.schedule()

    async def _packed(self, body: bytes, asked: bytes) -> tuple[bytes, str]:
        """Compresses an answer as its client compresses requests. Returns it with the name of the compression."""
        if asked not in (b"gzip", b"deflate"):
            return body, ""
        pack = functools.partial(zlib.compress, body, zlib.Z_BEST_SPEED, 31 if asked == b"gzip" else 15)
        if len(body) <= _PACKED_AT_ONCE:
            return pack(), asked.decode()
        return await self._loop.run_in_executor(self._server.unpacking, pack), asked.decode()

    async def _unpacked(self, stream: int, message: bytes, encoding: bytes) -> bytes:
        """Decompresses a message. Raises _Refused."""
        most = self._server.limits.message_bytes
        if encoding not in (b"gzip", b"deflate"):
            name = encoding.decode("latin-1")
            raise _Refused(Code.INTERNAL, f"the message is compressed by {name!r}, expected gzip, deflate or identity")
        unpack = zlib.decompressobj(31 if encoding == b"gzip" else 15)
        pieces: list[bytes] = []
        try:
            if not _unpack(unpack, message, pieces, _UNPACKED_AT_ONCE):
                if encoding == b"gzip" and int.from_bytes(message[-4:], "little") > most:
                    raise _too_large(most)  # what is packed by gzip ends with its size
                tail = unpack.unconsumed_tail
                await self._loop.run_in_executor(self._server.unpacking, _unpack, unpack, tail, pieces, most)
        except zlib.error as error:
            raise _Refused(Code.INTERNAL, f"the message cannot be decompressed: {error}") from None
        if sum(map(len, pieces)) > most:
            raise _too_large(most)
        if not unpack.eof:
            raise _Refused(Code.INTERNAL, "the compressed message is cut off")
        unpacked = b"".join(pieces)
        if self._session is None or not self._session.hold(stream, len(unpacked)):
            raise _Refused(
                Code.RESOURCE_EXHAUSTED,
                f"the calls of this connection hold more than {self._server.limits.connection_bytes} bytes",
            )
        if self._server.host.over:
            self._server.shed()
        return unpacked


def _too_large(most: int) -> _Refused:
    return _Refused(Code.RESOURCE_EXHAUSTED, f"a message of more than {most} bytes")


def _unpack(unpack: Any, data: bytes, pieces: list[bytes], most: int) -> bool:
    """Adds what `data` unpacks to, a little above `most` bytes at most. Returns whether that was all."""
    size = 0
    while size <= most:
        piece = unpack.decompress(data, _UNPACKED_AT_ONCE)
        size += len(piece)
        pieces.append(piece)
        data = unpack.unconsumed_tail
        if unpack.eof or not data:
            return True
    return False


class _Refused(Exception):
    """A call that is answered with this code."""

    def __init__(self, code: Code, words: str) -> None:
        super().__init__(words)
        self.code = code


class Server:
    """Answers unary calls by `handlers`: path -> async function of message, deadline (loop time) and metadata.

    `streaming` has the methods with many messages. Those calls are for small messages that the proxy itself answers.
    `starters` may answer a call of `handlers` in its place, at a lower cost.
    """

    def __init__(
        self,
        handlers: dict[str, Handler],
        streaming: dict[str, StreamHandler],
        limits: LimitsConfig,
        starters: Mapping[str, Starter] | None = None,
    ) -> None:
        self.handlers = handlers
        self.streaming = streaming
        self.starters = starters or {}
        self.connections: dict[_Incoming, None] = {}  # in the order in which they were made
        self.fresh: dict[_Incoming, None] = {}  # those that have not made a call yet
        self._lingering: dict[Any, asyncio.TimerHandle] = {}  # transport -> its end
        self.host = _native.Host(handlers, streaming, limits.total_bytes)
        # One thread, so that one message is decompressed at a time, and always into the memory of the last one.
        self.unpacking = ThreadPoolExecutor(1, "unpacking")
        self._listeners: list[asyncio.AbstractServer] = []
        self._sweeping: asyncio.Task[None] | None = None
        self.set_limits(limits)

    def set_limits(self, limits: LimitsConfig) -> None:
        """Changes the limits. Those of the wire apply to connections that are made from now on."""
        self.limits = limits
        self.host.total_bytes = limits.total_bytes
        self.wire_limits = _wire_limits(limits, limits.header_bytes)

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None, share_port: bool) -> int:
        """Listens; returns the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: _Incoming(self), host, port, **self._options(tls), reuse_port=share_port or None
        )
        self._start(server)
        return int(server.sockets[0].getsockname()[1])

    async def listen_unix(self, path: str, tls: ssl.SSLContext | None) -> None:
        """Listens on a UNIX socket as well. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._start(await loop.create_unix_server(lambda: _Incoming(self), path, **self._options(tls)))

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, lets those under way end within `grace_s` seconds, cancels the rest and closes."""
        for listener in self._listeners:
            listener.close()
        if self._sweeping is not None:
            self._sweeping.cancel()
        end = asyncio.get_running_loop().time() + grace_s
        for connection in list(self.connections):
            connection.drain()
        while self.connections and asyncio.get_running_loop().time() < end:
            for connection in list(self.connections):
                if connection.idle:
                    connection.end()
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.end()
        for transport in list(self._lingering):
            self._end(transport)
        self.unpacking.shutdown(wait=False, cancel_futures=True)
        await asyncio.sleep(0)

    def admit(self, connection: _Incoming) -> bool:
        """Takes a new connection. If there are too many, one without calls ends for it; False if there is none."""
        while len(self.connections) >= self.limits.connections:
            oldest = self._least_used()
            if oldest is None:
                return False
            oldest.leave()
        self.connections[connection] = self.fresh[connection] = None
        return True

    def forget(self, connection: _Incoming) -> None:
        """Forgets a connection that is closed."""
        self.connections.pop(connection, None)
        self.fresh.pop(connection, None)

    def linger(self, transport: Any) -> bool:
        """Leaves a connection that has said all open for a while, but unread. Returns false if there are too many."""
        if len(self._lingering) >= _LINGERING:
            return False
        self._lingering[transport] = asyncio.get_running_loop().call_later(_LINGER_S, self._end, transport)
        transport.pause_reading()
        if transport.can_write_eof():
            transport.write_eof()
        return True

    def _end(self, transport: Any) -> None:
        self._lingering.pop(transport).cancel()
        transport.abort()

    def shed(self) -> None:
        """Ends the connections that hold the most, until all hold less than the limit; first those that stall."""
        for connection in sorted(self.connections, key=lambda c: (c.stalled, c.held), reverse=True):
            if not self.host.over:
                return
            connection.abort()

    def _least_used(self) -> _Incoming | None:
        # Connections that never made a call come first, so that a flood of them ends none that is in use.
        for connection in self.fresh:
            if connection.idle_since is not None:
                return connection
        spare = [(since, id(c), c) for c in self.connections if (since := c.spare_since) is not None]
        return min(spare)[2] if spare else None

    @staticmethod
    def _options(tls: ssl.SSLContext | None) -> dict[str, Any]:
        return {"ssl": tls, "backlog": _ACCEPTS, **({"ssl_handshake_timeout": _CONNECT_S} if tls else {})}

    def _start(self, server: asyncio.AbstractServer) -> None:
        # asyncio accepts as many connections in one turn as it lets wait. So a flood of connections would keep calls
        # waiting, unless the first number is small; the kernel gets a larger one for the second.
        for listening in getattr(server, "sockets", ()):
            with socket.socket(fileno=os.dup(listening.fileno())) as same:
                same.listen(_BACKLOG)
        self._listeners.append(server)
        if self._sweeping is None:
            self._sweeping = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            limits = self.limits
            shortest = min(limits.connect_s, limits.headers_s, limits.body_s, limits.answer_s, limits.idle_s)
            await asyncio.sleep(min(_SWEEP_S, shortest / 4))
            now = loop.time()
            for connection in list(self.connections):
                connection.sweep(now, limits)


def _wire_limits(limits: LimitsConfig, header_bytes: int) -> _native.Limits:
    return _native.Limits(
        streams=limits.streams,
        header_bytes=header_bytes,
        message_bytes=limits.message_bytes,
        connection_bytes=limits.connection_bytes,
        headers_s=limits.headers_s,
        body_s=limits.body_s,
        answer_s=limits.answer_s,
    )


# The channel


class _Outgoing(_Connection):
    """The connection to a server."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel
        self._calls: dict[int, Receiver] = {}
        self._ends: list[tuple[float, int]] = []  # a heap of deadlines with their streams, also of some that have ended
        self._timer: asyncio.TimerHandle | None = None  # for the first of them
        self._waiting: deque[asyncio.Future[bool]] = deque()
        self._session = _native.client_session(channel.wire_limits, self._loop.time())
        self._max_calls = self._session.max_calls
        self.hello: asyncio.Future[None] = self._loop.create_future()
        self.usable = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if not self.closed:
            self._channel.remember(self)
            self.schedule()

    def on_event(self, event: tuple[Any, ...]) -> None:
        kind = event[0]
        if kind == _ANSWER:
            self._finish(event[1], self._reply(*event[2:]))
        elif kind == _END:
            self._on_end(event[1], event[2])
        elif kind == _SETTINGS:
            assert self._session is not None
            self._max_calls = self._session.max_calls
            if not self.hello.done():
                self.hello.set_result(None)
            self._wake_all()
        elif kind == _GOAWAY:
            self.usable = False
            self._close_idle()
            self._wake_all()

    def on_closed(self) -> None:
        self.usable = False
        self._channel.forget(self)
        if not self.hello.done():
            self.hello.set_exception(ConnectionError("the connection was closed"))
            self.hello.exception()  # marks it as seen: perhaps no one waits for it any more
        if self._timer is not None:
            self._timer.cancel()
        calls, self._calls = self._calls, {}
        for receiver in calls.values():
            receiver.on_reply(self._channel.lost("the connection was lost", begun=True))
        self._wake_all()

    async def call(self, path: str, message: bytes, timeout_s: float | None, metadata: Metadata) -> Reply | None:
        """Makes a call. Returns None if the server has not begun to handle it."""
        ends = None if timeout_s is None else self._loop.time() + timeout_s
        while self.usable and self._session is not None and len(self._calls) >= self._max_calls:
            if not await self._free_place(ends):
                words = f"backend {self._channel.address} had {len(self._calls)} calls under way until the deadline"
                return Reply(Code.DEADLINE_EXCEEDED, words, backend=self._channel.address)
        if ends is not None:
            timeout_s = max(ends - self._loop.time(), 0.0)
        if not self.usable:
            return None
        receiver = _Future(self._loop)
        stream = self.begin(path, message, timeout_s, metadata, receiver)
        if stream < 0:
            return None
        try:
            return await receiver.future
        except asyncio.CancelledError:
            self.give_up(stream)
            raise

    @property
    def has_place(self) -> bool:
        """Whether the connection takes a call at once, before which no other waits."""
        return self.usable and len(self._calls) < self._max_calls and not self._waiting

    def begin(self, path: str, message: bytes, timeout_s: float | None, metadata: Metadata, receiver: Receiver) -> int:
        """Begins a call, and returns its stream, or a negative number if the connection takes no more."""
        channel = self._channel
        assert self._session is not None
        stream = self._session.call(path, channel.authority, channel.is_tls, timeout_s, metadata, message)
        if stream < 0:
            self.usable = False  # it has used up its stream numbers
            self._close_idle()
            return stream
        self._calls[stream] = receiver
        self.schedule()
        if timeout_s is not None:
            self._expire_at(self._loop.time() + timeout_s, stream)
        return stream

    def give_up(self, stream: int) -> None:
        """Ends a call that is still under way. Its receiver hears nothing."""
        if self._calls.pop(stream, None) is None:
            return
        if self._session is not None:
            self._session.reset(stream, _CANCEL)
            self.schedule()
        self._wake()
        self._close_idle()

    async def _free_place(self, ends: float | None) -> bool:
        """Waits until a call ends, or the connection takes no more. Returns False if that lasts until `ends`."""
        place: asyncio.Future[bool] = self._loop.create_future()
        self._waiting.append(place)
        timer = None if ends is None else self._loop.call_at(ends, _settle, place, False)
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._wake()  # the place was given to this call, and goes to the next one
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _reply(
        self,
        number: int,
        details: str,
        body: bytes | None,
        initial: Metadata,
        trailing: Metadata,
        http: int,
    ) -> Reply:
        address = self._channel.address
        if number < 0:
            if http == 200:
                words = f"the answer of backend {address} ended without a status"
                return Reply(Code.INTERNAL, words, backend=address)
            words = f"backend {address} answered with HTTP status {http} and no gRPC status"
            return Reply(_OF_HTTP.get(http, Code.UNKNOWN), words, backend=address)
        code = _CODES[number]
        if code is Code.CANCELLED and details in ("", "CANCELLED"):
            # gRPC servers answer like this to calls that arrive while they shut down. A client's cancellation never
            # reaches this place, so it was the server that gave up.
            words = f"backend {address} gave up the call: is it shutting down?"
            return Reply(Code.UNAVAILABLE, words, backend=address)
        if code is not Code.OK:
            return Reply(code, details, b"", initial, trailing, address)
        if body is None:
            words = f"the answer of backend {address}: expected exactly one message that is not compressed"
            return Reply(Code.INTERNAL, words, backend=address)
        return Reply(code, details, body, initial, trailing, address)

    def _on_end(self, stream: int, error: int) -> None:
        if error == _REFUSED_STREAM:
            self._finish(stream, None)
            return
        # Only a client has a reason to cancel a call, so a server that does is shutting down.
        status = Code.UNAVAILABLE if error == _CANCEL else _OF_RESET.get(error, Code.INTERNAL)
        words = f"backend {self._channel.address} gave up the call (HTTP/2 error {error})"
        self._finish(stream, Reply(status, words, backend=self._channel.address))

    def _expire_at(self, ends: float, stream: int) -> None:
        heapq.heappush(self._ends, (ends, stream))
        if len(self._ends) > 2 * len(self._calls) + _SPARE_ENDS:
            self._ends = [end for end in self._ends if end[1] in self._calls]
            heapq.heapify(self._ends)
        if self._timer is None or ends < self._timer.when():
            self._set_timer(ends)

    def _set_timer(self, ends: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(ends, self._expire)

    def _expire(self) -> None:
        """Ends the calls whose deadline has passed."""
        self._timer = None
        now = self._loop.time()
        while self._ends:
            ends, stream = self._ends[0]
            receiver = self._calls.get(stream)
            if receiver is not None and ends > now:
                self._set_timer(ends)
                return
            heapq.heappop(self._ends)
            if receiver is not None:
                self.give_up(stream)
                words = f"backend {self._channel.address} did not answer within the deadline"
                receiver.on_reply(Reply(Code.DEADLINE_EXCEEDED, words, backend=self._channel.address))

    def _finish(self, stream: int, reply: Reply | None) -> None:
        receiver = self._calls.pop(stream, None)
        if receiver is not None:
            receiver.on_reply(reply)
        if self._waiting:
            self._wake()
        self._close_idle()

    def _wake(self) -> None:
        while self._waiting and self._session is not None and len(self._calls) < self._max_calls:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(True)
                return

    def _wake_all(self) -> None:
        """Wakes all calls that wait for a place. They look again: for one here, or elsewhere if there can be none."""
        waiting, self._waiting = self._waiting, deque()
        for waiter in waiting:
            _settle(waiter, True)

    def _close_idle(self) -> None:
        if not self.usable and not self._calls and not self.closed:
            # Not at once, because the events of this turn may still name calls.
            self._loop.call_soon(self.end)


_CODES = tuple(Code)
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
_OF_RESET = {_ENHANCE_YOUR_CALM: Code.RESOURCE_EXHAUSTED, _INADEQUATE_SECURITY: Code.PERMISSION_DENIED}


class _Future:
    """Lets a coroutine wait for an answer."""

    __slots__ = ("future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[Reply | None] = loop.create_future()

    def on_reply(self, reply: Reply | None) -> None:
        if not self.future.done():
            self.future.set_result(reply)


class Channel:
    """Calls to one server, at "host:port" or "unix:/path", over one connection, which is renewed when it is lost."""

    def __init__(self, address: str, tls: Tls | None, server_name: str, limits: LimitsConfig) -> None:
        self.address = address
        self.authority = server_name or ("localhost" if address.startswith("unix:") else address)
        self.is_tls = tls is not None
        self._tls, self._server_name = tls, server_name
        self._connection: _Outgoing | None = None
        self._connections: set[_Outgoing] = set()  # also those that only finish calls under way
        self._connecting: asyncio.Future[_Outgoing] | None = None
        self._task: asyncio.Task[None] | None = None
        self.set_limits(limits)

    def set_limits(self, limits: LimitsConfig) -> None:
        """Changes the limits of connections that are made from now on."""
        self.wire_limits = _wire_limits(limits, _ANSWER_HEADER_BYTES)

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
            left = None if deadline is None else max(deadline - loop.time(), 0.0)
            reply = await connection.call(path, message, left, metadata)
            if reply is not None:
                return reply
            if connection.usable:
                await asyncio.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 4**attempt))
        return Reply(Code.UNAVAILABLE, f"backend {self.address} refuses calls", backend=self.address)

    def ready(self) -> Connection | None:
        """Returns the connection if it takes a call at once."""
        connection = self._connection
        return connection if connection is not None and connection.has_place else None

    def lost(self, why: str, begun: bool = False) -> Reply:
        """Returns the reply for a server that cannot be reached, or that was lost after a call had `begun`."""
        words = f"backend {self.address} cannot be reached: {why}"
        return Reply(Code.UNAVAILABLE, words, backend=self.address, lost=True, begun=begun)

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

    def remember(self, connection: _Outgoing) -> None:
        """Notes a connection that is open. It may be lost before _connect() hears of it."""
        self._connections.add(connection)

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
            tls: ssl.SSLContext | None = None
            if self._tls is not None:
                name, tls = self._server_name or _host(self.address), self._tls.context
            make = lambda: _Outgoing(self)  # noqa: E731
            if self.address.startswith("unix:"):
                path = self.address.removeprefix("unix:")
                opening = loop.create_unix_connection(make, path, ssl=tls, server_hostname=name)
            else:
                host, port = _host(self.address), int(self.address.rpartition(":")[2])
                opening = loop.create_connection(make, host, port, ssl=tls, server_hostname=name)
            _, made = await asyncio.wait_for(opening, _CONNECT_S)
            connection = made
            await asyncio.wait_for(asyncio.shield(made.hello), _CONNECT_S)
        except (OSError, asyncio.TimeoutError, UnicodeError) as error:  # UnicodeError: a host that no name can be
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
            if self._connecting is not connecting:
                made.abort()  # drop() came in the same turn, which wait_for() does not notice
                return
            self._connection, self._connecting, self._task = made, None, None
            if not connecting.done():
                connecting.set_result(made)


def _settle(future: asyncio.Future[bool], result: bool) -> None:
    if not future.done():
        future.set_result(result)


def _host(address: str) -> str:
    return "localhost" if address.startswith("unix:") else address.rpartition(":")[0].strip("[]")


# TLS


class Tls:
    """TLS settings made of PEM files that may be replaced.

    Args:
        make: one of server_tls and client_tls.
        files: the arguments of `make`: paths of a certificate, a key and an authority; each may be None.

    Attributes:
        context: what new connections use.

    Raises:
        OSError: a file cannot be read, or is not what it must be.
    """

    def __init__(self, make: Callable[..., ssl.SSLContext], *files: str | None) -> None:
        self._make, self._files = make, files
        self._stamps = self._look()
        self.context = make(*files)

    def renew(self) -> bool:
        """Reads the files again if they have changed. Returns whether they have. After OSError the old ones stay."""
        stamps = self._look()
        if stamps == self._stamps:
            return False
        self.context = self._make(*self._files)
        self._stamps = stamps
        return True

    def listening(self) -> ssl.SSLContext:
        """Returns settings for a listener: each new connection uses `context` as it is then."""

        def use(connection: ssl.SSLObject, name: str | None, listener: ssl.SSLContext) -> None:
            connection.context = self.context

        context = self._make(*self._files)
        context.sni_callback = use  # OpenSSL calls it for clients that send no name, too
        return context

    def _look(self) -> list[tuple[int, ...]]:
        """Returns what changes when a file is replaced; a file that is missing is `make`'s to report."""
        stamps: list[tuple[int, ...]] = []
        for path in self._files:
            with contextlib.suppress(OSError):
                status = os.stat(path or "")
                stamps.append((status.st_mtime_ns, status.st_ino, status.st_size))
        return stamps


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
