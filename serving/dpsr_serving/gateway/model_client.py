"""A client of a model server for the gateway: AsyncSearchClient over the proxy's connections.

grpc.aio takes five times the CPU time of these connections (benchmarks/proxy.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from dpsr_common import serving_apis
from dpsr_common.serving_apis import MAX_MESSAGE_BYTES
from dpsr_serving.client import AsyncSearchClient, Tls
from dpsr_serving.proxy.calls import Channel, Code
from dpsr_serving.proxy.config import LimitsConfig
from dpsr_serving.search import (
    PADDING_ID,
    Filters,
    Ranking,
    Rewrite,
    Search,
    Signature,
    User,
    expressions,
    make_ranking,
    make_request,
    results,
    rewrite_tensors,
    rewrites_of,
    scores_of,
)

# Calls in a row that get no answer in time, after which the connection is renewed: its other end may be gone.
_SILENT_CALLS = 5
_ANSWERS = LimitsConfig(message_bytes=MAX_MESSAGE_BYTES, connection_bytes=MAX_MESSAGE_BYTES)
_CODES = {code.value[0]: code for code in grpc.StatusCode}


_NO_SPEC = serving_apis.ModelSpec()
_PARTS = 256
_STRING = 7  # DT_STRING of tensorflow/core/framework/types.proto
# Outputs of `search`: name, number of the type in types.proto, its field in a TensorProto, its dtype.
_COLUMNS = (
    ("item_ids", 9, "int64_val", np.dtype("<i8")),
    ("scores", 1, "float_val", np.dtype("<f4")),
    ("heads", 3, "int_val", np.dtype("<i4")),
)


class _Joined:
    """A request whose encoded form is that of two messages in a row."""

    def __init__(self, first: bytes, rest: Any) -> None:
        self._first, self._rest = first, rest

    def SerializeToString(self) -> bytes:
        return self._first + bytes(self._rest.SerializeToString())


def _of_query(query: Any) -> Any:
    """Returns a request that says nothing but the query."""
    request = serving_apis.PredictRequest()
    tensor = request.inputs["query"]
    tensor.dtype = _STRING
    tensor.tensor_shape.dim.add(size=1)
    tensor.string_val.append(query.encode() if isinstance(query, str) else query)
    return request


def _row_of(response: Any, with_heads: bool) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """Returns ids, scores and, if asked for, heads of the items found for the only query of a request.

    Reads the forms in which servers answer in a third of the time that `results` takes, and leaves others to that.

    Raises:
        ValueError: the response is not that of a search servable.
    """
    columns = [_values(response.outputs[name], number, field, dtype) for name, number, field, dtype in _COLUMNS]
    if any(values is None or len(values) != len(columns[0]) for values in columns):
        (result,) = results(response, 1, ())
        return result.item_ids, result.scores, result.heads if with_heads else None
    # A slice of a field is a list, which NumPy reads faster than the field; a slice of an array is the array.
    ids, scores = np.asarray(columns[0][:], np.int64), np.asarray(columns[1][:], np.float32)
    heads = np.asarray(columns[2][:], np.int32) if with_heads else None
    found = ids != PADDING_ID
    if found.all():
        return ids, scores, heads
    return ids[found], scores[found], None if heads is None else heads[found]


def _scores_of(response: Any, items: int) -> NDArray[np.float32]:
    """Returns what `scores_of` does; it reads the forms in which servers answer in less time."""
    if "scores" not in response.outputs:
        return scores_of(response, items)
    output = response.outputs["scores"]
    dims, content = output.tensor_shape.dim, output.tensor_content
    if output.dtype == 1 and len(dims) == 1 and dims[0].size == items:
        if len(content) == 4 * items:
            return np.frombuffer(content, "<f4")
        if not content and len(output.float_val) == items:
            return np.array(output.float_val[:], np.float32)
    return scores_of(response, items)


def _rewrites_of(response: Any) -> list[Rewrite]:
    """Returns the rewrites of the only query as `rewrites_of` does; it reads the usual form in less time."""
    if "rewrites" not in response.outputs or "log_probabilities" not in response.outputs:
        return rewrites_of(response, 1)[0]
    texts, scores = response.outputs["rewrites"], response.outputs["log_probabilities"]
    found, given = texts.string_val, _values(scores, 1, "float_val", np.dtype("<f4"))
    dims = texts.tensor_shape.dim
    if texts.dtype != _STRING or given is None or len(dims) != 2 or dims[0].size != 1:
        return rewrites_of(response, 1)[0]
    if not len(found) == len(given) == dims[1].size:
        return rewrites_of(response, 1)[0]
    # The rows are padded with empty texts.
    return [
        Rewrite(text.decode("utf-8", "replace"), float(score)) for text, score in zip(found, given, strict=True) if text
    ]


def _values(output: Any, number: int, field: str, dtype: np.dtype[Any]) -> Any:
    """Returns the values of a tensor [1, n] as an array or a field of the message; None if it has another form."""
    dims, content = output.tensor_shape.dim, output.tensor_content
    if len(dims) != 2 or dims[0].size != 1 or output.dtype != number:
        return None
    if not content:
        values = getattr(output, field)
        return values if len(values) == dims[1].size else None
    return np.frombuffer(content, dtype) if len(content) == dims[1].size * dtype.itemsize else None


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
        self._encoded: dict[tuple[str, int, str], tuple[Signature, bytes]] = {}
        self._encoded_rewrite: dict[int, bytes] = {}  # n -> the request without a query
        self._parts: dict[frozenset[str], Signature] = {}
        self._parts_of: Signature | None = None

    def _open(self, tls: Tls | None) -> Any:
        return _Connection(self._target)

    async def find(
        self,
        query: str,
        k: int,
        user: User,
        filters: Filters,
        parameters: str,
        metadata: Mapping[str, str] | None,
        timeout_s: float,
        with_heads: bool,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32] | None]:
        """Finds the best items for one query: ids, scores and, if asked for, heads, [n] each.

        Raises what `search` raises.
        """
        search = Search([query], k, [user], expressions(filters), search_parameters=parameters)
        flow = self._ask(
            "search", lambda known: self._search_request(known, search), self._deadline(timeout_s), self._with(metadata)
        )
        response, _ = await self._run(flow)
        return self._read(lambda: _row_of(response, with_heads), "search")

    async def rewrites(self, query: str, n: int, metadata: Mapping[str, str] | None, timeout_s: float) -> list[Rewrite]:
        """Returns the n best rewrites of one query. Raises what `rewrite` raises."""
        known = self._encoded_rewrite.get(n)
        if known is None:
            anyone = make_request(self._spec, "rewrite", rewrite_tensors("", n, 0))
            known = self._encoded_rewrite[n] = bytes(anyone.SerializeToString())
        request = _Joined(known, _of_query(query))
        response, _ = await self._run(self._predict(request, self._deadline(timeout_s), self._with(metadata)))
        return self._read(lambda: _rewrites_of(response), "rewrite")

    # A signature has a dozen inputs, of which a request gives a few. Encoding the empty ones again and again took more
    # time than everything else in a request. Now they are encoded once: protobuf reads two messages in a row as one,
    # whose map has the later value of a key.

    def _search_request(self, signature: Signature, search: Search) -> Any:
        k, parameters = search.k or 1, search.search_parameters
        anyone = self._encoded_for(
            ("search", k, parameters),
            signature,
            lambda: make_request(
                self._spec,
                "search",
                signature.tensors(Search([""], k, [None], search_parameters=parameters)),
            ),
        )
        (user,) = search.users
        names = _names_of(user or User())
        if search.include:
            names.add("include")
        if not names:
            return _Joined(anyone, _of_query(search.queries[0]))
        given = self._part(signature, {"query", *names}).tensors(search)
        return _Joined(anyone, make_request(_NO_SPEC, "search", given))

    def _rank_request(self, signature: Signature, ranking: Ranking) -> Any:
        anyone = self._encoded_for(
            ("rank", 0, ""),
            signature,
            lambda: make_request(self._spec, "rank", signature.rank_tensors(make_ranking("", []))),
        )
        names = {"query", "item_ids", "item_keys", *_names_of(ranking.user)}
        if ranking.dpsr_scores:
            names.add("dpsr_score")
        if ranking.user_id is not None:
            names.add("user_id")
        given = self._part(signature, names).rank_tensors(ranking)
        return _Joined(anyone, make_request(_NO_SPEC, "rank", given))

    def _scores(self, response: Any, items: int) -> NDArray[np.float32]:
        return _scores_of(response, items)

    def _encoded_for(self, key: tuple[str, int, str], signature: Signature, make: Callable[[], Any]) -> bytes:
        """Returns the encoded request of an anonymous user without anything that can be left out."""
        known = self._encoded.get(key)
        if known is None or known[0] is not signature:
            known = self._encoded[key] = (signature, bytes(make().SerializeToString()))
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
        known = [find(item) for item in user.clicked_items]
        given = [*user.clicked_item_types, *[""] * (len(known) - len(user.clicked_item_types))]
        items = [item for item in known if item is not None]
        types = [kind for item, kind in zip(known, given, strict=False) if item is not None]
    reads_types = "clicked_item_types" in inputs and any(types)
    past = user.past_queries if "past_queries" in inputs else ()
    return User(features, items, past, types if reads_types else ())
