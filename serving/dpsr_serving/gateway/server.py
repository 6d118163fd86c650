"""The gateway's servers: REST (with the page) on one port, gRPC on another, in one process.

Both read a request into messages.SearchRequest and write a messages.SearchResponse; everything between is Searcher's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from dpsr_common.errors import CommandError
from dpsr_serving.addresses import join_address
from dpsr_serving.gateway import search_api
from dpsr_serving.gateway.config import LimitsConfig
from dpsr_serving.gateway.messages import RequestError, SearchRequest, SearchResponse
from dpsr_serving.gateway.metrics import METRICS
from dpsr_serving.gateway.openapi import OPENAPI
from dpsr_serving.gateway.pipeline import RecallError, Searcher
from dpsr_serving.proxy.metrics import merge

_log = logging.getLogger(__name__)

_SWEEP_S = 1.0
_LAST_ANSWERS_S = 1.0  # time to send the answers of the last searches
_JSON = "application/json"
_RETRY_S = 1  # what a refused client should wait


class BusyError(CommandError):
    """Too many searches are under way."""


class Gateway:
    """Answers searches over both APIs.

    Attributes:
        rest_address, grpc_address: "host:port" once they are listening; "" for none.
    """

    def __init__(self, searcher: Searcher, limits: LimitsConfig) -> None:
        self.rest_address = self.grpc_address = ""
        self._searcher = searcher
        self._limits = limits
        self._under_way = 0
        self._draining = False
        self._runner: web.AppRunner | None = None
        self._site: asyncio.Server | None = None
        self._grpc: Any = None
        self._sweeper: asyncio.Task[None] | None = None
        # Connections that have not sent a whole request yet, and when they were opened.
        self._new: dict[Any, float] = {}
        # Connections whose clients have not read all answers, with their transports, and since when.
        self._unread: dict[Any, tuple[asyncio.Transport, float]] = {}

    # What both APIs do.

    async def answer(self, api: str, read: Callable[[], SearchRequest]) -> SearchResponse:
        """Answers one search. Raises RequestError, RecallError, BusyError."""
        metrics, start = self._searcher.metrics, time.perf_counter()
        code, labels = "OK", ("", "")
        if self._under_way >= self._limits.concurrent:
            metrics.count("dpsr_search_requests_total", (api, "", "", "RESOURCE_EXHAUSTED"))
            raise BusyError(f"{self._under_way} searches are under way, which is the limit; try again later")
        self._under_way += 1
        try:
            response = await self._searcher.search(read())
            labels = (response.pipeline, response.arm)
            return response
        except RequestError:
            code = "INVALID_ARGUMENT"
            raise
        except RecallError:
            code = "UNAVAILABLE"
            raise
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception:
            code = "INTERNAL"
            _log.exception("a search failed")
            raise
        finally:
            self._under_way -= 1
            metrics.count("dpsr_search_requests_total", (api, *labels, code))
            metrics.observe("dpsr_search_request_seconds", labels, time.perf_counter() - start)

    # REST.

    def _app(self, routes: Callable[[web.Application], None] | None) -> web.Application:
        app = web.Application(client_max_size=self._limits.body_bytes, middlewares=[self._errors])
        app.router.add_post("/v1/search", self._search)
        app.router.add_get("/v1/pipelines", self._pipelines)
        app.router.add_get("/v1/openapi.json", self._openapi)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._metrics)
        if routes is not None:
            routes(app)
        return app

    @web.middleware
    async def _errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Writes every error as {"error": text}."""
        self._new.pop(request.protocol, None)
        try:
            return await handler(request)
        except RequestError as error:
            return _error(400, str(error))
        except BusyError as error:
            return _error(503, str(error), {"Retry-After": str(_RETRY_S)})
        except RecallError as error:
            return _error(503, str(error))
        except web.HTTPRequestEntityTooLarge:
            return _error(413, f"the body has more than {self._limits.body_bytes} bytes, which is the limit")
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            return _error(405, f"{request.path}: got {error.method}, expected {allowed}", {"Allow": allowed})
        except web.HTTPNotFound:
            return _error(404, f"{request.path}: there is no such path; GET /v1/openapi.json lists all")
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return _error(error.status, error.text or error.reason)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:
            return _error(500, f"internal error: {type(error).__name__}; the log has more")

    async def _search(self, request: web.Request) -> web.Response:
        if request.content_type not in (_JSON, "application/x-www-form-urlencoded", "application/octet-stream"):
            return _error(415, f"Content-Type: got {request.content_type}, expected {_JSON}")
        body = await self.read_body(request)
        response = await self.answer("rest", lambda: SearchRequest.from_json(body))
        return web.Response(body=response.to_json(), content_type=_JSON)

    async def read_body(self, request: web.Request) -> bytes:
        """Returns the body of a request. Raises HTTPException if it is too large, or arrives too slowly."""
        length = request.content_length
        if length is not None and length > self._limits.body_bytes:
            raise web.HTTPRequestEntityTooLarge(self._limits.body_bytes, length)
        if request.content.is_eof():
            return await request.read()
        try:
            return await asyncio.wait_for(request.read(), self._limits.receive_s)
        except asyncio.TimeoutError:
            raise web.HTTPRequestTimeout(
                text=f"the body did not arrive within {self._limits.receive_s:g} s; send it at once"
            ) from None

    async def _pipelines(self, _: web.Request) -> web.Response:
        return web.json_response(self._searcher.describe())

    async def _openapi(self, _: web.Request) -> web.Response:
        return web.json_response(OPENAPI)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.Request) -> web.Response:
        return web.Response(text="draining\n", status=503) if self._draining else web.Response(text="ok\n")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.metrics_text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    def metrics_text(self) -> str:
        """Returns all metrics in Prometheus' text format."""
        self._searcher.metrics.set("dpsr_search_under_way", {(): float(self._under_way)})
        return merge([self._searcher.metrics.dump()], METRICS)

    def _connect(self) -> Any:
        """Returns the protocol of a new connection, and notes it until it sends a request."""
        assert self._runner is not None and self._runner.server is not None
        protocol = self._runner.server()
        self._new[protocol] = time.monotonic()
        if len(self._runner.server.connections) >= self._limits.connections:
            loop = asyncio.get_running_loop()
            # In the turn after the next one: the protocol has nothing to close before asyncio calls connection_made().
            loop.call_soon(lambda: loop.call_soon(protocol.force_close))
        return protocol

    async def _sweep(self) -> None:
        """Ends connections that do not send a request or do not read answers; aiohttp itself waits for ever."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for protocol, opened in list(self._new.items()):
                if now - opened > self._limits.receive_s:
                    self._new.pop(protocol, None)
                    protocol.force_close()
            self._end_unread(now)

    def _end_unread(self, now: float) -> None:
        assert self._runner is not None and self._runner.server is not None
        before, self._unread = self._unread, {}
        for protocol in self._runner.server.connections:
            # A protocol that was closed has no transport any more, but its transport still waits for the client.
            transport, since = before.get(protocol) or (protocol.transport, now)
            if transport is None or not transport.get_write_buffer_size():
                continue
            if now - since > self._limits.answer_s:
                transport.abort()  # close() would wait for the client, too
            else:
                self._unread[protocol] = transport, since

    # Both servers.

    async def start(
        self,
        host: str,
        port: int,
        grpc_port: int | None,
        routes: Callable[[web.Application], None] | None = None,
        reuse_port: bool = False,
    ) -> None:
        """Listens. `routes` adds those of the page. Raises CommandError if it cannot."""
        self._runner = web.AppRunner(
            self._app(routes),
            access_log=None,
            keepalive_timeout=self._limits.idle_s,
            max_line_size=8190,
            max_field_size=8190,
            handler_cancellation=True,
        )
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            self._site = await loop.create_server(
                self._connect, host, port, backlog=1024, reuse_port=reuse_port or None
            )
        except OSError as error:
            raise CommandError(
                f"cannot listen on {join_address(host, port)}: {error.strerror}; is the port in use, or is the host "
                "not an address of this machine?"
            ) from error
        self.rest_address = join_address(host, self._site.sockets[0].getsockname()[1])
        self._sweeper = asyncio.create_task(self._sweep())
        if grpc_port is not None:
            self._grpc = search_api.make_server(self, self._searcher, self._limits)
            try:
                bound = self._grpc.add_insecure_port(join_address(host, grpc_port))
            except RuntimeError as error:
                raise CommandError(f"cannot listen on {join_address(host, grpc_port)}: {error}") from None
            await self._grpc.start()
            self.grpc_address = join_address(host, bound)

    async def stop(self, drain_s: float) -> None:
        """Accepts no more searches, and lets those under way finish for at most `drain_s` seconds."""
        self._draining = True
        end = time.monotonic() + drain_s
        if self._site is not None:
            self._site.close()
        stopping = asyncio.create_task(self._grpc.stop(drain_s)) if self._grpc is not None else None
        while self._under_way and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if self._grpc is not None and stopping is not None:
            # Whoever watches the health of the gateway does so without an end.
            await asyncio.gather(stopping, self._grpc.stop(min(max(end - time.monotonic(), 0.0), _LAST_ANSWERS_S)))
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._runner is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._runner.cleanup(), max(end - time.monotonic(), 1.0))
        await self._searcher.close()

    @property
    def serving(self) -> bool:
        """Whether new searches are answered."""
        return not self._draining


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.json_response({"error": text}, status=status, headers=headers)
