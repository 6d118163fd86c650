"""A client of a model server for the gateway: AsyncSearchClient over the proxy's connections.

grpc.aio takes five times the CPU time of these connections (benchmarks/proxy.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import grpc.aio

from dpsr_common import serving_apis
from dpsr_common.serving_apis import MAX_MESSAGE_BYTES
from dpsr_serving.client import AsyncSearchClient, Tls
from dpsr_serving.proxy.calls import Channel, Code
from dpsr_serving.proxy.config import LimitsConfig
from dpsr_serving.search import (
    Ranking,
    Search,
    Signature,
    User,
    make_ranking,
    make_request,
    make_search,
)

# Calls in a row that get no answer in time, after which the connection is renewed: its other end may be gone.
_SILENT_CALLS = 5
_ANSWERS = LimitsConfig(message_bytes=MAX_MESSAGE_BYTES, connection_bytes=MAX_MESSAGE_BYTES)
_CODES = {code.value[0]: code for code in grpc.StatusCode}


_NO_SPEC = serving_apis.ModelSpec()
_PARTS = 256


class _Joined:
    """A request whose encoded form is that of two messages in a row."""

    def __init__(self, first: bytes, rest: Any) -> None:
        self._first, self._rest = first, rest

    def SerializeToString(self) -> bytes:
        return self._first + bytes(self._rest.SerializeToString())


def _names_of(user: User) -> set[str]:
    """Returns the names of the inputs that say something about a user."""
    names = {f"user_{name}" for name in user.features}
    if user.clicked_items:
        names |= {"clicked_items", "clicked_item_keys"}
    if user.clicked_item_types:
        names.add("clicked_item_types")
    if user.past_queries:
        names.add("past_queries")
    return names


class ModelClient(AsyncSearchClient):
    """The client of one model.

    Attributes:
        name: the model's name in the configuration.
    """

    def __init__(self, name: str, target: str, model: str) -> None:
        super().__init__(target, model)
        self.name = name
        self._encoded: dict[str, tuple[Signature, bytes]] = {}
        self._parts: dict[frozenset[str], Signature] = {}
        self._parts_of: Signature | None = None

    def _open(self, tls: Tls | None) -> Any:
        return _Connection(self._target)

    # A signature has a dozen inputs, of which a request gives a few. Encoding the empty ones again and again took more
    # time than everything else in a request. Now they are encoded once: protobuf reads two messages in a row as one,
    # whose map has the later value of a key.

    def _search_request(self, signature: Signature, search: Search) -> Any:
        (user,) = search.users
        names = {"query", "k", "search_parameters" if search.search_parameters else "query"}
        if search.include:
            names.add("include")
        if user is not None:
            names |= _names_of(user)
        empty = self._empty("search", signature, lambda: make_search("", 1))
        return _Joined(empty, make_request(_NO_SPEC, "search", self._part(signature, names).tensors(search)))

    def _rank_request(self, signature: Signature, ranking: Ranking) -> Any:
        names = {"query", "item_ids", "item_keys", *_names_of(ranking.user)}
        if ranking.dpsr_scores:
            names.add("dpsr_score")
        if ranking.user_id is not None:
            names.add("user_id")
        empty = self._empty("rank", signature, lambda: make_ranking("", []))
        return _Joined(empty, make_request(_NO_SPEC, "rank", self._part(signature, names).rank_tensors(ranking)))

    def _empty(self, name: str, signature: Signature, ask: Callable[[], Any]) -> bytes:
        """Returns the encoded request of an anonymous user without anything that can be left out."""
        known = self._encoded.get(name)
        if known is None or known[0] is not signature:
            given = ask()
            tensors = signature.tensors(given) if name == "search" else signature.rank_tensors(given)
            known = (signature, bytes(make_request(self._spec, name, tensors).SerializeToString()))
            self._encoded[name] = known
        return known[1]

    def _part(self, signature: Signature, names: set[str]) -> Signature:
        """Returns the signature with some of its inputs."""
        if self._parts_of is not signature or len(self._parts) > _PARTS:
            self._parts_of, self._parts = signature, {}
        key = frozenset(names)
        if key not in self._parts:
            self._parts[key] = signature.only(key)
        return self._parts[key]

    @property
    def signatures(self) -> list[Signature]:
        """The inputs that the server has told."""
        return list(self._signatures.values())

    async def known_signature(self, name: str, timeout_s: float) -> Signature:
        """Returns the inputs of a signature; asks the server only if they are not known yet. Raises ServingError."""
        known = self._signatures.get(name)
        if known is None:
            known = await self._run(self._learn(name, self._deadline(timeout_s), self._with(None)))
        return known


class _Connection:
    """Looks like the channel of grpc.aio, as far as AsyncSearchClient uses it."""

    def __init__(self, target: str) -> None:
        self._channel = Channel(target, None, "", _ANSWERS)
        self._silent = 0

    def unary_unary(
        self, path: str, request_serializer: Callable[[Any], bytes], response_deserializer: Callable[[bytes], Any]
    ) -> Any:
        def call(request: Any, timeout: float, metadata: tuple[tuple[str, str], ...]) -> _Call:
            return _Call(self._call(path, request_serializer(request), timeout, metadata, response_deserializer))

        return call

    async def _call(
        self,
        path: str,
        request: bytes,
        timeout_s: float,
        metadata: tuple[tuple[str, str], ...],
        decode: Callable[[bytes], Any],
    ) -> tuple[Any, Mapping[str, str]]:
        sent = tuple((key.encode(), value.encode()) for key, value in metadata)
        end = asyncio.get_running_loop().time() + timeout_s
        reply = await self._channel.call(path, request, timeout_s, sent)
        # The server was restarted since the last call: the connection is lost with the first call after that.
        if reply.lost and not reply.begun and (left := end - asyncio.get_running_loop().time()) > 0:
            reply = await self._channel.call(path, request, left, sent)
        if reply.code is Code.DEADLINE_EXCEEDED:
            self._silent += 1
            if self._silent >= _SILENT_CALLS:
                self._silent = 0
                self._channel.drop()
        else:
            self._silent = 0
        if reply.code is not Code.OK:
            raise grpc.aio.AioRpcError(
                _CODES[int(reply.code)], grpc.aio.Metadata(), grpc.aio.Metadata(), details=reply.details
            )
        trailing = {key.decode("latin-1"): value.decode("utf-8", "replace") for key, value in reply.trailing}
        return decode(reply.body), trailing

    async def close(self) -> None:
        self._channel.drop()


class _Call:
    """Looks like a call of grpc.aio: awaiting it gives the answer; afterwards it has trailing metadata."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._trailing: Any = {}

    def __await__(self) -> Any:
        answer, self._trailing = yield from self._work.__await__()
        return answer

    async def trailing_metadata(self) -> Any:
        return self._trailing.items()


def fitting(user: User, signature: Signature, find: Callable[[int | str], int | str | None]) -> User:
    """Returns what a model reads of a user: models differ in the features and histories that they know.

    Args:
        user: as the request tells it.
        signature: the inputs of the model.
        find: returns an item as models identify it, or None for an unknown one.
    """
    if not (user.features or user.clicked_items or user.past_queries):
        return user
    inputs = signature.inputs
    features = {name: value for name, value in user.features.items() if name in signature.user_features}
    items: list[int | str] = []
    types: list[Any] = []
    if "clicked_items" in inputs or "clicked_item_keys" in inputs:
        given = [*user.clicked_item_types, *[""] * (len(user.clicked_items) - len(user.clicked_item_types))]
        for item, kind in zip(user.clicked_items, given, strict=False):
            known = find(item)
            if known is not None:
                items.append(known)
                types.append(kind)
    reads_types = "clicked_item_types" in inputs and any(types)
    past = user.past_queries if "past_queries" in inputs else ()
    return User(features, items, past, types if reads_types else ())
