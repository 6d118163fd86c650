"""The proxy's server: passes each call on to a backend, and the backend's answer back, as the bytes they are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from dpsr_serving import apis
from dpsr_serving.addresses import join_address
from dpsr_serving.proxy import routing
from dpsr_serving.proxy.config import ProxyConfig


class Backend:
    """A connection to one model server, shared by all models that are routed to it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.outstanding = 0
        self._channel = grpc.aio.insecure_channel(address, options=apis.CHANNEL_OPTIONS)
        self._methods = {path: self._channel.unary_unary(path) for path in apis.METHODS}

    def call(self, path: str, request: bytes, timeout_s: float | None, metadata: Any) -> Any:
        """Starts a call with serialized messages; returns grpc.aio's call, to be awaited."""
        return self._methods[path](request, timeout=timeout_s, metadata=metadata)

    def connected(self) -> bool:
        """Whether the server was there when last heard of."""
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def close(self) -> None:
        """Closes the connection; calls in flight fail."""
        await self._channel.close()


class ProxyServer:
    """Serves PredictionService and ModelService by asking the backends of a configuration.

    Passed through unchanged: the messages, the deadline, metadata (gRPC sets `user-agent` anew on each hop), the
    status code, its message, initial and trailing metadata. The proxy itself answers only:

    - INVALID_ARGUMENT: the request names no model;
    - NOT_FOUND: no backend is configured for the model, in TensorFlow Serving's words;
    - UNAVAILABLE: the backend cannot be reached, with model and address;
    - FAILED_PRECONDITION: HandleReloadConfigRequest, which names no model, where there are several backends.
    """

    def __init__(self, config: ProxyConfig) -> None:
        addresses = dict.fromkeys([a for route in config.models.values() for a in route] + list(config.default))
        self._backends = {address: Backend(address) for address in addresses}
        self._routes = {model: [self._backends[a] for a in route] for model, route in config.models.items()}
        self._default = [self._backends[a] for a in config.default]
        self._turn = 0
        # Without so_reuseport=0 a second proxy on the same port would start and take half of the connections.
        self._server = grpc.aio.server(options=(*apis.GRPC_OPTIONS, ("grpc.so_reuseport", 0)))
        self._server.add_generic_rpc_handlers((_Methods(self._forward),))

    async def start(self, host: str, port: int) -> str:
        """Begins to serve; returns "host:port" (port 0 takes a free one). Raises OSError where it cannot listen."""
        address = join_address(host, port)
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}") from error
        await self._server.start()
        return join_address(host, bound)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, lets those in flight end within `grace_s` seconds, then closes the connections."""
        await self._server.stop(grace_s)
        for backend in self._backends.values():
            await backend.close()

    async def _forward(self, path: str, spec_path: tuple[int, ...] | None, request: bytes, context: Any) -> bytes:
        if spec_path is None:
            model, candidates = "", await self._sole_backend(path, context)
        else:
            model, candidates = await self._route(path, spec_path, request, context)
        self._turn += 1
        backend = routing.least_outstanding(candidates, self._turn)
        backend.outstanding += 1
        try:
            call = backend.call(path, request, context.time_remaining(), context.invocation_metadata())
            response: bytes = await call
            await _send_initial_metadata(context, await call.initial_metadata())
            context.set_trailing_metadata(tuple(await call.trailing_metadata()))
            return response
        except grpc.aio.AioRpcError as error:
            failure = error
        finally:
            backend.outstanding -= 1
        details = failure.details() or ""
        if failure.code() is grpc.StatusCode.UNAVAILABLE and not backend.connected():
            # gRPC's own words for a lost connection, not the server's: they tell nothing of whom we asked for what.
            whose = f"model {model!r}: " if model else ""
            details = f"{whose}backend {backend.address} cannot be reached: {details}"
        await _send_initial_metadata(context, failure.initial_metadata())
        await context.abort(failure.code(), details, tuple(failure.trailing_metadata()))
        raise AssertionError("abort raises")

    async def _route(
        self, path: str, spec_path: tuple[int, ...], request: bytes, context: Any
    ) -> tuple[str, Sequence[Backend]]:
        """The request's model and its backends; aborts the call where there are none."""
        try:
            spec = routing.read_model_spec(request, spec_path)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"cannot decode the request of {path}: {error}")
        if spec is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "Missing ModelSpec")
        if not spec.name:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "ModelSpec has no name specified.")
        backends = self._routes.get(spec.name, self._default)
        if not backends:
            await context.abort(grpc.StatusCode.NOT_FOUND, _not_found(path, spec))
        return spec.name, backends

    async def _sole_backend(self, path: str, context: Any) -> Sequence[Backend]:
        if len(self._backends) > 1:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{path} names no model, and this proxy has {len(self._backends)} backends: ask a model server itself",
            )
        return list(self._backends.values())


class _Methods(grpc.GenericRpcHandler):
    """The methods of both services; grpc answers UNIMPLEMENTED for every other."""

    def __init__(self, forward: Any) -> None:
        # No (de)serializers: handlers get and give bytes.
        self._handlers = {
            path: grpc.unary_unary_rpc_method_handler(
                functools.partial(forward, path, routing.model_spec_path(request))
            )
            for path, request in apis.METHODS.items()
        }

    def service(self, handler_call_details: Any) -> Any:
        return self._handlers.get(handler_call_details.method)


async def _send_initial_metadata(context: Any, metadata: Any) -> None:
    if metadata:
        await context.send_initial_metadata(tuple(metadata))


def _not_found(path: str, spec: Any) -> str:
    """TensorFlow Serving's words for a model that it does not know."""
    version = spec.version.value if spec.HasField("version") else None
    if path == apis.GET_MODEL_STATUS:
        return f"Could not find {'any versions' if version is None else f'version {version}'} of model {spec.name}"
    wanted = f"Latest({spec.name})" if version is None else f"Specific({spec.name}, {version})"
    return f"Servable not found for request: {wanted}"
