"""Spans of requests, exported to OpenTelemetry by OTLP: the request, each shard, and each attempt on a server.

A client's trace goes on by the header `traceparent` (https://www.w3.org/TR/trace-context/). Each attempt sends its own
to the server. OpenTelemetry's packages are imported only when the configuration has `tracing`; a request that is not
sampled costs a look at its metadata.
"""

from __future__ import annotations

import contextvars
import os
import random
import re
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from dpsr_common.errors import CommandError
from dpsr_serving.proxy.calls import Code, Metadata, Reply
from dpsr_serving.proxy.config import TracingConfig
from dpsr_serving.proxy.routing import Spec

_TRACEPARENT = b"traceparent"
_FORM = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_CLOSE_S = 2.0  # time to export the last spans

# Times that model servers report in trailing metadata, in microseconds, and their attributes.
_TIMES = {b"dpsr-queue-us": "dpsr.queue_us", b"dpsr-compute-us": "dpsr.compute_us"}
# Codes that are errors of the server; any other code is the answer to a wrong request.
_SERVER_ERRORS = (
    Code.UNKNOWN,
    Code.DEADLINE_EXCEEDED,
    Code.UNIMPLEMENTED,
    Code.INTERNAL,
    Code.UNAVAILABLE,
    Code.DATA_LOSS,
)

# The span of the request, or of its shard, whose task is running. None: it is not sampled.
current: contextvars.ContextVar[Span | None] = contextvars.ContextVar("span", default=None)


class Tracer:
    """Makes spans and exports them from a thread of its own."""

    def __init__(self, config: TracingConfig) -> None:
        """Raises CommandError if OpenTelemetry's packages are not installed."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        except ImportError:
            raise CommandError(
                f"tracing.endpoint: got {config.endpoint!r}, but OpenTelemetry's packages are not installed; install "
                "them by `pip install 'dpsr[tracing]'`, or leave tracing out"
            ) from None
        self._api: Any = trace
        self._config = config
        names = {"service.name": config.service, "service.instance.id": f"{socket.gethostname()}:{os.getpid()}"}
        # begin() samples, so that requests without spans cost nothing here.
        self._provider = TracerProvider(ALWAYS_ON, Resource.create(names), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(config.endpoint, insecure=config.endpoint.startswith("http:"))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("dpsr.proxy")

    def begin(self, path: str, metadata: Metadata) -> Span | None:
        """Begins the span of a request, or returns None if it is not sampled.

        If the client sent a trace, its flag decides, unless the configuration does not follow clients.
        """
        parent = next((_FORM.fullmatch(value) for name, value in metadata if name == _TRACEPARENT), None)
        if parent is not None and parent[1] == b"00" and parent[5]:
            parent = None  # version 00 has no more parts
        if parent is not None and self._config.follow_clients:
            sampled = bool(int(parent[4], 16) & 1)
        else:
            sampled = random.random() < self._config.sample
        if not sampled:
            return None
        api, context = self._api, None
        if parent is not None:
            flags = api.TraceFlags(api.TraceFlags.SAMPLED)
            remote = api.SpanContext(int(parent[2], 16), int(parent[3], 16), True, flags)
            context = api.set_span_in_context(api.NonRecordingSpan(remote))
        service, _, method = path.lstrip("/").partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        name, kind = path.lstrip("/"), api.SpanKind.SERVER
        return Span(self, self._tracer.start_span(name, context, kind, attributes), kind)

    def close(self) -> None:
        """Exports what is left, for some seconds at most."""
        # The exporter may wait for a collector that is gone, which must not keep the proxy from ending.
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(_CLOSE_S)


class Span:
    """A span that ends with finish(), or with the `with` block as CANCELLED if its request is given up before."""

    def __init__(self, tracer: Tracer, span: Any, kind: Any) -> None:
        self._tracer, self._span, self._kind = tracer, span, kind
        self._attempts = 0
        self._ended = False

    def __enter__(self) -> Span:
        """Returns the span itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the span if nothing has ended it."""
        if not self._ended:
            self._span.set_attribute("rpc.grpc.status_code", int(Code.CANCELLED))
            self._end()

    def describe(self, spec: Spec, arm: str) -> None:
        """Notes what was asked for. `arm`: "experiment/arm", or "" without one."""
        given = {"model": spec.model, "version": spec.version, "label": spec.label, "signature": spec.signature}
        for name, value in {**given, "arm": arm}.items():
            if value not in (None, ""):
                self._span.set_attribute(f"dpsr.{name}", value)

    def part(self, name: str, **attributes: int) -> Span:
        """Begins a span for a part of the request, such as a shard."""
        kind = self._tracer._api.SpanKind.INTERNAL
        return self._child(name, kind, {f"dpsr.{key}": value for key, value in attributes.items()})

    async def attempt(self, address: str, metadata: Metadata, call: Callable[[Metadata], Awaitable[Reply]]) -> Reply:
        """Makes a call on a server in a span of its own. `call` gets the metadata that goes to the server."""
        self._attempts += 1
        host, _, port = address.rpartition(":")
        attributes: dict[str, Any] = {"rpc.system": "grpc", "dpsr.attempt": self._attempts}
        if address.startswith("unix:"):
            attributes["server.address"] = address
        else:
            attributes |= {"server.address": host.strip("[]"), "server.port": int(port)}
        with self._child("attempt", self._tracer._api.SpanKind.CLIENT, attributes) as span:
            context = span._span.get_span_context()
            own = b"00-%032x-%016x-01" % (context.trace_id, context.span_id)
            others = tuple(pair for pair in metadata if pair[0] != _TRACEPARENT)
            reply = await call((*others, (_TRACEPARENT, own)))
            for name, value in reply.trailing:
                if name in _TIMES and value.isdigit():
                    span._span.set_attribute(_TIMES[name], int(value))
            span.finish(reply)
            return reply

    def finish(self, reply: Reply) -> None:
        """Ends the span with an answer."""
        api = self._tracer._api
        self._span.set_attribute("rpc.grpc.status_code", int(reply.code))
        is_error = reply.code in _SERVER_ERRORS if self._kind is api.SpanKind.SERVER else reply.code is not Code.OK
        if is_error:
            self._span.set_status(api.StatusCode.ERROR, reply.details[:500])
        self._end()

    def _child(self, name: str, kind: Any, attributes: dict[str, Any]) -> Span:
        tracer = self._tracer
        context = tracer._api.set_span_in_context(self._span)
        return Span(tracer, tracer._tracer.start_span(name, context, kind, attributes), kind)

    def _end(self) -> None:
        self._ended = True
        self._span.end()
