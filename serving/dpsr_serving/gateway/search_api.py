"""The gateway's gRPC API (search.proto), with reflection and gRPC's health service.

The messages come from descriptors in a pool of their own, as those of TensorFlow Serving do (dpsr_common.serving_apis).
A request becomes the same tree that a JSON body is, so both APIs accept and refuse the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from dpsr_common.errors import CommandError
from dpsr_common.serving_apis import load_pool
from dpsr_serving import grpc_services
from dpsr_serving.gateway.config import LimitsConfig
from dpsr_serving.gateway.messages import Facet, Item, RequestError, SearchRequest, SearchResponse
from dpsr_serving.gateway.pipeline import RecallError, Searcher

SERVICE = "dpsr.search.v1.Search"
_STREAMS = 64  # streaming calls under way, which last as long as their clients want
POOL = load_pool(Path(__file__).with_name("search.desc"))


def message(name: str) -> Any:
    """Returns the class of a message, such as "dpsr.search.v1.SearchRequest"."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


_SearchRequest = message("dpsr.search.v1.SearchRequest")
_SearchResponse = message("dpsr.search.v1.SearchResponse")
_ListPipelinesResponse = message("dpsr.search.v1.ListPipelinesResponse")


class Answers(Protocol):
    """The gateway, as this module uses it."""

    @property
    def serving(self) -> bool:
        """Whether new searches are answered."""

    async def answer(self, api: str, read: Callable[[], SearchRequest]) -> SearchResponse:
        """Answers one search."""


def make_server(gateway: Answers, searcher: Searcher, limits: LimitsConfig) -> Any:
    """Returns a grpc.aio server without a port."""
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", limits.body_bytes),
            ("grpc.max_connection_idle_ms", int(limits.idle_s * 1000)),
            ("grpc.so_reuseport", 0),
        ),
        maximum_concurrent_rpcs=2 * limits.concurrent + _STREAMS,
    )

    async def search(body: bytes, context: Any) -> Any:
        try:
            response = await gateway.answer("grpc", lambda: SearchRequest.from_dict(_request_tree(body)))
        except RequestError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except RecallError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except CommandError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await context.abort(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}; the log has more")
        return _response(response)

    async def list_pipelines(_: bytes, context: Any) -> Any:
        return _pipelines(searcher.describe())

    def status(service: str) -> int:
        if service not in ("", SERVICE):
            return grpc_services.SERVICE_UNKNOWN
        return grpc_services.SERVING if gateway.serving else grpc_services.NOT_SERVING

    health = grpc_services.Health(status)
    reflection = grpc_services.Reflection((SERVICE, grpc_services.HEALTH), (POOL,))

    async def check(body: bytes, context: Any) -> bytes:
        try:
            return health.check(body)
        except grpc_services.UnknownServiceError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise AssertionError

    streams = 0

    @contextlib.asynccontextmanager
    async def counted(context: Any) -> AsyncIterator[None]:
        """Counts a streaming call while it lasts. Refuses it if there are too many."""
        nonlocal streams
        streams += 1
        try:
            if streams > _STREAMS:
                words = f"{_STREAMS} streaming calls are under way, which is the limit; try again later"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, words)
            yield
        finally:
            streams -= 1

    async def watch(body: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            async with counted(context):
                async for answer in health.watch(body):
                    yield answer
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def reflect(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            async with counted(context):
                async for request in requests:
                    yield reflection.answer(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                SERVICE,
                {"Search": _unary(search), "ListPipelines": _unary(list_pipelines)},
            ),
            grpc.method_handlers_generic_handler(
                grpc_services.HEALTH,
                {
                    "Check": grpc.unary_unary_rpc_method_handler(check),
                    "Watch": grpc.unary_stream_rpc_method_handler(watch),
                },
            ),
            *(
                grpc.method_handlers_generic_handler(
                    service, {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(reflect)}
                )
                for service in (grpc_services.REFLECTION, grpc_services.REFLECTION_ALPHA)
            ),
        )
    )
    return server


def _unary(handler: Any) -> Any:
    # Handlers parse requests themselves: gRPC would answer INTERNAL to one that is malformed.
    return grpc.unary_unary_rpc_method_handler(handler, None, _serialize)


def _serialize(response: Any) -> bytes:
    return bytes(response.SerializeToString())


# Requests.


def _not_a(kind: Any, error: Exception) -> str:
    return f"the message is no {kind.DESCRIPTOR.full_name}: {error}"


def _request_tree(body: bytes) -> dict[str, Any]:
    """Returns a request as the tree that a JSON body is. Raises RequestError."""
    try:
        request = _SearchRequest.FromString(body)
    except DecodeError as error:
        raise RequestError(_not_a(_SearchRequest, error)) from None
    tree: dict[str, Any] = {
        "query": request.query,
        "pipeline": request.pipeline,
        "arm": request.arm,
        "filters": {name: _filter(one) for name, one in request.filters.items()},
        "facets": list(request.facets),
        "cursor": request.cursor,
        "explain": request.explain,
    }
    if request.size:
        tree["size"] = request.size
    if request.HasField("user"):
        tree["user"] = _user(request.user)
    return tree


def _filter(one: Any) -> Any:
    if one.HasField("min") or one.HasField("max"):
        if one.texts or one.numbers:
            raise RequestError("filters: a filter has values and a range; give one of them")
        return {name: getattr(one, name) for name in ("min", "max") if one.HasField(name)}
    return [*one.texts, *one.numbers]


def _user(user: Any) -> dict[str, Any]:
    which = user.WhichOneof("id")
    return {
        "id": getattr(user, which) if which else None,
        "features": {name: _feature(one) for name, one in user.features.items()},
        "clicked_items": [getattr(item, item.WhichOneof("id") or "key") for item in user.clicked_items],
        "clicked_item_types": list(user.clicked_item_types),
        "past_queries": list(user.past_queries),
    }


def _feature(one: Any) -> Any:
    which = one.WhichOneof("kind")
    value: Any = getattr(one, which) if which else None
    return list(value.values) if which in ("texts", "numbers") else value


# Answers.


def _response(response: SearchResponse) -> Any:
    found = _SearchResponse(
        query=response.query,
        pipeline=response.pipeline,
        arm=response.arm,
        total=response.total,
        next_cursor=response.next_cursor,
        degraded=response.degraded,
        rewrites=response.rewrites,
    )
    for item in response.items:
        _put_item(found.items.add(), item)
    for name, facet in response.facets.items():
        _put_facet(found.facets[name], facet)
    if response.explain is not None:
        explain = found.explain
        for stage in response.explain.stages:
            explain.stages.add(
                name=stage.name, items_in=stage.items_in, items_out=stage.items_out, ms=stage.ms, error=stage.error
            )
        explain.tokens.extend(response.explain.tokens)
        for name, heads in response.explain.heads.items():
            explain.heads[name].items.extend(heads)
        explain.cut_off, explain.identifier = response.explain.cut_off, response.explain.identifier
    return found


def _put_item(found: Any, item: Item) -> None:
    found.id, found.key, found.title = item.id, item.key or "", item.title
    found.score = item.score if math.isfinite(item.score) else 0.0
    found.group, found.variants = item.group or "", item.variants
    found.sources.extend(item.sources)
    for name, value in item.attributes.items():
        _put_value(found.attributes[name], value)
    if item.explain is not None:
        _put_explanation(found.explain, item.explain)


def _put_value(found: Any, value: str | float | Sequence[str]) -> None:
    if isinstance(value, str):
        found.text = value
    elif isinstance(value, (int, float)):
        found.number = value
    else:
        found.texts.values.extend(value)


def _put_explanation(found: Any, explain: Mapping[str, Any]) -> None:
    for name, value in explain.items():
        if name == "rerank":
            found.rerank.extend(value)
        elif name in ("coarse", "fine"):
            if value is not None:
                setattr(found, name, value)
        else:
            found.recall[name].rank = value["rank"]
            found.recall[name].score = value["score"] or 0.0


def _put_facet(found: Any, facet: Facet) -> None:
    found.kind, found.more = facet.kind, facet.more
    for value, count in facet.values:
        found.values.add(value=value, count=count)
    if facet.minimum is not None and facet.maximum is not None:
        found.min, found.max = facet.minimum, facet.maximum


def _pipelines(described: Mapping[str, Any]) -> Any:
    found = _ListPipelinesResponse(default_pipeline=described["default"])
    for feature in described["user_features"]:
        found.user_features.add(**feature)
    for pipeline in described["pipelines"]:
        found.pipelines.add(**pipeline)
    for attribute in described["attributes"]:
        found.attributes.add(**attribute)
    return found
