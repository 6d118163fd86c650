"""Clients of a search servable: they send query texts and return typed results. They need no TensorFlow.

    with SearchClient("127.0.0.1:8500", "demo") as client:
        for result in client.search(["red shoes", "angle bracket"], k=10, filters={"price": (10, 20)}):
            print(result.item_ids, result.scores)

    async with AsyncSearchClient("127.0.0.1:8500", "demo") as client:
        (result,) = await client.search("red shoes", user=User(features={"gender": "f"}, clicked_items=[17, 4]), k=10)

The target is a model server or a proxy: both speak TensorFlow Serving's API. The client asks the target which inputs
the model has besides the query (GetModelMetadata), at the first request and whenever another version answers.
"""

from __future__ import annotations

import dataclasses
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from dpsr_common import serving_apis
from dpsr_common.errors import CommandError
from dpsr_serving.search import (
    PADDING_ID,
    Ranking,
    RankOptions,
    Rewrite,
    Search,
    SearchOptions,
    SearchResult,
    Signature,
    Text,
    User,
    make_ranking,
    make_request,
    make_search,
    results,
    rewrite_tensors,
    rewrites_of,
    scores_of,
)

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.10 does not have it

__all__ = [
    "AsyncSearchClient",
    "ModelVersion",
    "Rewrite",
    "SearchClient",
    "SearchResult",
    "ServingError",
    "Tls",
    "User",
]

Retriever = Callable[[Sequence[Text], Sequence[Any] | None, int], tuple[NDArray[np.int64], NDArray[np.float32]]]

# gRPC itself retries within the deadline: only calls that no server has answered, a few times, and less often once many
# calls fail.
_RETRIES = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}
_OPTIONS = (
    *serving_apis.CHANNEL_OPTIONS,
    ("grpc.service_config", json.dumps(_RETRIES)),
    ("grpc.per_rpc_retry_buffer_size", serving_apis.MAX_MESSAGE_BYTES),
)


@dataclasses.dataclass(frozen=True)
class ModelVersion:
    """A version that the server knows, its state, such as "AVAILABLE", and the error that ended it, or ""."""

    version: int
    state: str
    error: str


@dataclasses.dataclass(frozen=True)
class Tls:
    """Settings of an encrypted connection: paths of PEM files, and a name.

    Attributes:
        ca: certificate of the authority that signed the server's certificate; None means the authorities that gRPC
            trusts.
        certificate, key: the client's own certificate and key, if the server asks for one.
        server_name: the name in the server's certificate, if it is not the target's host.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Returns the credentials for a gRPC channel. Raises OSError if a file cannot be read."""
        ca, key, certificate = (
            None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


class ServingError(CommandError):
    """The server did not answer, or answered with an error. A command that does not catch it ends with status 1.

    Attributes:
        code: the gRPC status code.
        message: what failed, where, and what to do about it.
        details: the server's own message.
    """

    def __init__(self, code: grpc.StatusCode, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


class InvalidRequestError(ServingError, ValueError):
    """The server refused the request, for example a filter on an attribute that the model does not have."""


class _Call(NamedTuple):
    """A call that a flow wants to be made. The flow receives (response, trailing metadata), or a grpc.RpcError."""

    path: str
    request: Any
    timeout_s: float
    metadata: tuple[tuple[str, str], ...]


T = TypeVar("T")
_Flow = Generator[_Call, tuple[Any, Any], T]
_ChannelT = TypeVar("_ChannelT")

_RESPONSES = {
    serving_apis.PREDICT: serving_apis.PredictResponse,
    serving_apis.GET_MODEL_METADATA: serving_apis.GetModelMetadataResponse,
    serving_apis.GET_MODEL_STATUS: serving_apis.GetModelStatusResponse,
}


class _Client(ABC, Generic[_ChannelT]):
    """Everything that both clients share. A flow is a generator that yields calls and receives their answers."""

    def __init__(
        self,
        target: str,
        model: str,
        timeout_s: float = 10.0,
        *,
        version: int | None = None,
        label: str | None = None,
        tls: Tls | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Opens a client.

        Args:
            target: "host:port" of a model server or a proxy.
            model: name of the model.
            timeout_s: seconds that one search may take, retries included. The server sees the deadline too.
            version, label: the version of the model to ask; without them the latest.
            tls: settings of an encrypted connection; None means that the connection is not encrypted.
            metadata: gRPC metadata to send with each call, such as {"user-id": "u17"}, by which a proxy assigns the
                arms of experiments.

        Raises:
            ValueError: an argument is wrong.
            OSError: a TLS file cannot be read.
        """
        if not target or not model:
            raise ValueError(f"a client needs a target (host:port) and a model name, got {target!r} and {model!r}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
        if version is not None and label is not None:
            raise ValueError(f"give a version or a label, got {version} and {label!r}")
        self._target, self._model, self._timeout_s = target, model, timeout_s
        self._metadata = dict(metadata or {})
        self._spec = serving_apis.ModelSpec(name=model)
        if version is not None:
            self._spec.version.value = version
        elif label is not None:
            self._spec.version_label = label
        self._signatures: dict[str, Signature] = {}
        self._versions: set[int] = set()
        self._channel = self._open(tls)
        self._methods = {
            path: self._channel.unary_unary(  # type: ignore[attr-defined]
                path,
                request_serializer=lambda request: request.SerializeToString(),
                response_deserializer=response.FromString,
            )
            for path, response in _RESPONSES.items()
        }

    @abstractmethod
    def _open(self, tls: Tls | None) -> _ChannelT:
        """Opens a channel to the target."""

    def _search_flow(
        self, search: Search, metadata: Mapping[str, str] | None, timeout_s: float | None = None
    ) -> _Flow[list[SearchResult]]:
        if not search.queries:
            return []
        deadline = self._deadline(timeout_s)
        sent = self._with(metadata)
        if search.plain:
            request = make_request(self._spec, "serving_default", {"query": np.array(search.queries, object)})
            response, trailing = yield from self._predict(request, deadline, sent)
            return self._read(lambda: results(response, len(search.queries), trailing), "search")
        response, trailing = yield from self._ask(
            "search", lambda known: self._search_request(known, search), deadline, sent
        )
        return self._read(lambda: results(response, len(search.queries), trailing), "search")

    def _rank_flow(
        self, ranking: Ranking, metadata: Mapping[str, str] | None, timeout_s: float | None = None
    ) -> _Flow[NDArray[np.float32]]:
        if not ranking.items:
            return np.zeros(0, np.float32)
        deadline = self._deadline(timeout_s)
        response, _ = yield from self._ask(
            "rank", lambda known: self._rank_request(known, ranking), deadline, self._with(metadata)
        )
        return self._read(lambda: self._scores(response, len(ranking.items)), "rank")

    def _rewrite_flow(
        self, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None, timeout_s: float | None = None
    ) -> _Flow[list[list[Rewrite]]]:
        batch = len(tensors["query"])
        if not batch:
            return []
        deadline = self._deadline(timeout_s)
        # Every rewriter has the same inputs, so that there is nothing to learn from the server.
        request = make_request(self._spec, "rewrite", tensors)
        response, _ = yield from self._predict(request, deadline, self._with(metadata))
        return self._read(lambda: rewrites_of(response, batch), "rewrite")

    def _scores(self, response: Any, items: int) -> NDArray[np.float32]:
        return scores_of(response, items)

    def _search_request(self, signature: Signature, search: Search) -> Any:
        return make_request(self._spec, "search", signature.tensors(search))

    def _rank_request(self, signature: Signature, ranking: Ranking) -> Any:
        return make_request(self._spec, "rank", signature.rank_tensors(ranking))

    def _ask(
        self,
        name: str,
        make: Callable[[Signature], Any],
        deadline: float,
        metadata: tuple[tuple[str, str], ...],
    ) -> _Flow[tuple[Any, Any]]:
        """Sends a request to a signature whose inputs the server tells. Returns response and trailing metadata."""
        signature, fresh = self._signatures.get(name), False
        while True:
            if signature is None:
                signature, fresh = (yield from self._learn(name, deadline, metadata)), True
            try:
                return (yield from self._predict(make(signature), deadline, metadata))
            except ValueError:
                # Raised by this client, or INVALID_ARGUMENT from the server: by now another version, with other inputs,
                # may be serving.
                if fresh:
                    raise
                known, signature = signature, (yield from self._learn(name, deadline, metadata))
                fresh = True
                if signature == known:
                    raise

    def _predict(self, request: Any, deadline: float, metadata: tuple[tuple[str, str], ...]) -> _Flow[tuple[Any, Any]]:
        response, trailing = yield from self._call(serving_apis.PREDICT, request, deadline, metadata)
        version = response.model_spec.version.value
        if self._signatures and version not in self._versions:
            self._versions.add(version)
            self._signatures.clear()
        return response, trailing

    def _read(self, decode: Callable[[], T], kind: str) -> T:
        """Returns what `decode` makes of a response. Raises ServingError if it is not that of a servable of a kind."""
        try:
            return decode()
        except ValueError as error:
            raise ServingError(
                grpc.StatusCode.INTERNAL,
                f"the answer of {self._target}, model {self._model!r}, is not that of a {kind} servable: {error}; "
                "was the model written by `dpsr export`?",
            ) from error

    def _learn(self, name: str, deadline: float, metadata: tuple[tuple[str, str], ...]) -> _Flow[Signature]:
        """Asks the server for a signature of the model, and keeps it."""
        request = serving_apis.GetModelMetadataRequest(model_spec=self._spec, metadata_field=["signature_def"])
        response, _ = yield from self._call(serving_apis.GET_MODEL_METADATA, request, deadline, metadata)
        try:
            signature = Signature.parse(response, name)
        except ValueError as error:
            what = "leave out k, user and filters, or " if name == "search" else ""
            raise ServingError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{self._target}, model {self._model!r}: {error}; {what}serve a "
                f"{'model' if name == 'search' else 'ranker'} that `dpsr export` wrote",
            ) from None
        self._signatures[name] = signature
        self._versions.add(signature.version)
        return signature

    def _status_flow(self) -> _Flow[list[ModelVersion]]:
        request = serving_apis.GetModelStatusRequest()
        request.model_spec.name = self._model
        response, _ = yield from self._call(
            serving_apis.GET_MODEL_STATUS, request, time.monotonic() + self._timeout_s, self._with(None)
        )
        states = serving_apis.ModelVersionStatus.State
        versions = [
            ModelVersion(
                version=status.version,
                state=states.Name(status.state) if status.state in states.values() else str(status.state),
                error=status.status.error_message,
            )
            for status in response.model_version_status
        ]
        return sorted(versions, key=lambda version: version.version, reverse=True)

    def _call(
        self, path: str, request: Any, deadline: float, metadata: tuple[tuple[str, str], ...]
    ) -> _Flow[tuple[Any, Any]]:
        try:
            return (yield _Call(path, request, max(deadline - time.monotonic(), 0.0), metadata))
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
            kind = InvalidRequestError if code is grpc.StatusCode.INVALID_ARGUMENT else ServingError
            raise kind(code, self._explain(code, details), details) from None

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)

    def _with(self, metadata: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
        """Returns the client's metadata, overridden by that of a call."""
        return tuple({**self._metadata, **(metadata or {})}.items())

    def _explain(self, code: grpc.StatusCode, details: str) -> str:
        where = f"{self._target}, model {self._model!r}"
        details = details.partition("\n\t [[{{node ")[0]  # drops the place in the graph where TensorFlow met the error
        if code is grpc.StatusCode.UNAVAILABLE:
            return f"{where}: no server answers: {details}; is it running? `dpsr serve` starts one"
        if code is grpc.StatusCode.NOT_FOUND:
            return (
                f"{self._target} does not serve a model {self._model!r}: {details}; "
                "check the name and that a version of it is loaded"
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"{where}: no answer within {self._timeout_s:g} s; allow more time or look at the server's load"
        return f"{where}: {code.name}: {details}"


class SearchClient(_Client[grpc.Channel]):
    """Searches with one model at one address. Threads may share a client. _Client.__init__ explains the arguments."""

    def _open(self, tls: Tls | None) -> grpc.Channel:
        if tls is None:
            return grpc.insecure_channel(self._target, options=_OPTIONS)
        return grpc.secure_channel(self._target, tls.credentials(), options=_with_name(tls))

    def __enter__(self) -> SearchClient:
        """Returns the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the client."""
        self.close()

    def close(self) -> None:
        """Closes the connection; the client answers no more."""
        self._channel.close()

    def search(
        self,
        queries: Text | Sequence[Text],
        k: int | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[SearchOptions],
    ) -> list[SearchResult]:
        """Finds the best items for each query, with one request for all queries.

        Args:
            queries: one query or several; bytes need not be valid UTF-8. An empty query finds nothing.
            k: number of items for each query; None means the number that the servable was exported with.
            metadata: gRPC metadata of this call; it overrides the client's.
            user: who searches: a User, a dict with the same keys, or a list with one of these or None for each query.
            filters: conditions that every item must meet: attribute -> a value, a list of alternatives, or a range of
                numbers (low, high) with None for an open end; or a list of filter expressions.
            exclude_filters: conditions that no item may meet, in the same form.
            exclude_items: items to leave out: ids, or keys if the shop's own ids are texts.
            search_parameters: settings of the index that replace the servable's own, such as "nprobe=64".

        Returns:
            One result for each query, in the same order.

        Raises:
            ServingError: the server refused the request or did not answer in time.
            ValueError: a value cannot be sent, or the model does not take a user feature or input.
        """
        asked = make_search(queries, k, **options)
        return self._run(self._search_flow(asked, metadata))

    def rank(
        self,
        query: Text,
        items: Sequence[int | str],
        *,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[RankOptions],
    ) -> NDArray[np.float32]:
        """Scores items for a query, with a servable that `dpsr export` wrote for a ranker.

        Args:
            query: the query; bytes need not be valid UTF-8.
            items: n items: ids, or keys if the shop's own ids are texts.
            metadata: gRPC metadata of this call; it overrides the client's.
            user: who searches: a User or a dict with the same keys. A ranker takes no past_queries.
            user_id: the user's id, for what the user has spent; None and unknown ids: nothing is known.
            dpsr_scores: the scores of a retrieval model for the items, NaN where there is none, for a ranker that reads
                them; () if there are none.

        Returns:
            float32 [n]. The higher, the better; only scores of one call can be compared. -inf for an item that the
            servable does not know.

        Raises:
            ServingError: the server refused the request or did not answer in time.
            ValueError: a value cannot be sent, or the model does not take a user feature or input.
        """
        return self._run(self._rank_flow(make_ranking(query, items, **options), metadata))

    def rewrite(
        self,
        queries: Text | Sequence[Text],
        n: int = 3,
        seed: int = 0,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> list[list[Rewrite]]:
        """Writes queries in other words, with a servable that `dpsr export` wrote for a rewriter.

        Args:
            queries: one query or several; bytes need not be valid UTF-8.
            n: largest number of rewrites of a query. A servable has a limit, and refuses more.
            seed: rewrites of a query that is not in the servable's table may be drawn by chance; the same seed draws
                the same ones.
            metadata: gRPC metadata of this call; it overrides the client's.

        Returns:
            For each query at most n rewrites, best first; none of them empty or the query itself. An empty query, or
            one without a word, has no rewrites.

        Raises:
            ServingError: the server refused the request or did not answer in time.
            ValueError: a value cannot be sent, or n is above the limit of the servable.
        """
        return self._run(self._rewrite_flow(rewrite_tensors(queries, n, seed), metadata))

    def model_status(self) -> list[ModelVersion]:
        """Returns the model's versions, newest first.

        Raises:
            ServingError: the server does not know the model or did not answer in time.
        """
        return self._run(self._status_flow())

    def signature(self) -> Signature:
        """Asks for the inputs of the model's signature `search`. Raises ServingError."""
        return self._run(self._learn("search", time.monotonic() + self._timeout_s, self._with(None)))

    def _run(self, flow: _Flow[T]) -> T:
        try:
            call = next(flow)
            while True:
                try:
                    response, done = self._methods[call.path].with_call(
                        call.request, timeout=call.timeout_s, metadata=call.metadata
                    )
                except grpc.RpcError as error:
                    call = flow.throw(error)
                else:
                    call = flow.send((response, done.trailing_metadata() or ()))
        except StopIteration as end:
            return end.value


class AsyncSearchClient(_Client[grpc.aio.Channel]):
    """SearchClient for asyncio. Create, use and close it within one event loop."""

    def _open(self, tls: Tls | None) -> grpc.aio.Channel:
        if tls is None:
            return grpc.aio.insecure_channel(self._target, options=_OPTIONS)
        return grpc.aio.secure_channel(self._target, tls.credentials(), options=_with_name(tls))

    async def __aenter__(self) -> AsyncSearchClient:
        """Returns the client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the client."""
        await self.close()

    async def close(self) -> None:
        """Closes the connection; the client answers no more."""
        await self._channel.close()

    async def search(
        self,
        queries: Text | Sequence[Text],
        k: int | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[SearchOptions],
    ) -> list[SearchResult]:
        """See SearchClient.search. `timeout_s` are the seconds that this call may take; None: those of the client."""
        asked = make_search(queries, k, **options)
        return await self._run(self._search_flow(asked, metadata, timeout_s))

    async def rank(
        self,
        query: Text,
        items: Sequence[int | str],
        *,
        metadata: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[RankOptions],
    ) -> NDArray[np.float32]:
        """See SearchClient.rank, and `search` for `timeout_s`."""
        return await self._run(self._rank_flow(make_ranking(query, items, **options), metadata, timeout_s))

    async def rewrite(
        self,
        queries: Text | Sequence[Text],
        n: int = 3,
        seed: int = 0,
        *,
        metadata: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> list[list[Rewrite]]:
        """See SearchClient.rewrite, and `search` for `timeout_s`."""
        return await self._run(self._rewrite_flow(rewrite_tensors(queries, n, seed), metadata, timeout_s))

    async def model_status(self) -> list[ModelVersion]:
        """See SearchClient.model_status."""
        return await self._run(self._status_flow())

    async def signature(self, name: str = "search") -> Signature:
        """Asks for the inputs of a signature of the model, "search" or "rank". Raises ServingError."""
        return await self._run(self._learn(name, self._deadline(None), self._with(None)))

    async def _run(self, flow: _Flow[T]) -> T:
        try:
            call = next(flow)
            while True:
                try:
                    done = self._methods[call.path](call.request, timeout=call.timeout_s, metadata=call.metadata)
                    response = await done
                except grpc.RpcError as error:
                    call = flow.throw(error)
                else:
                    call = flow.send((response, await done.trailing_metadata()))
        except StopIteration as end:
            return end.value


def _with_name(tls: Tls) -> list[tuple[str, Any]]:
    name = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return [*_OPTIONS, *name]


def retriever(
    target: str,
    model: str,
    batch_size: int = 64,
    timeout_s: float = 60.0,
    to_user: Callable[[Any], User | Mapping[str, Any] | None] | None = None,
) -> Retriever:
    """Returns a function that retrieves from a server, in the form that evaluation expects.

    Args:
        target: "host:port" of a model server or a proxy.
        model: name of the model.
        batch_size: number of queries in one request.
        timeout_s: seconds that one request may take.
        to_user: turns a user of evaluation into the User to send; None means to search as an anonymous user.

    Returns:
        `retrieve(queries, users, k)` -> (item_ids [n, k] int64 padded with -1, scores [n, k] float32 padded with -inf),
        n = len(queries). Its attribute `personal` says whether it uses users. Without `to_user`, users must be None,
        because ignoring them would measure something else than what was asked for. It raises ServingError, ValueError.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    client = SearchClient(target, model, timeout_s)

    def retrieve(
        queries: Sequence[Text], users: Sequence[Any] | None, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if to_user is None and users is not None and any(user is not None for user in users):
            raise ValueError(f"model {model!r} at {target} was opened without user features; pass users=None")
        ids = np.full((len(queries), k), PADDING_ID, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            asking: list[User | Mapping[str, Any] | None] | None = None
            if to_user is not None and users is not None:
                asking = [to_user(user) for user in users[start : start + batch_size]]
            for row, result in enumerate(client.search(batch, k, user=asking), start):
                found = min(len(result), k)
                ids[row, :found] = result.item_ids[:found]
                scores[row, :found] = result.scores[:found]
        return ids, scores

    retrieve.personal = to_user is not None  # type: ignore[attr-defined]
    return retrieve


def server_system(corpus: Any, target: str, model: str) -> Retriever:
    """Returns the retriever for `dpsr evaluate --system=server:HOST:PORT/MODEL`: a model server or proxy.

    Args:
        corpus: a dpsr_tf.evaluation.corpus.Corpus. If it has a store, requests carry what the store knows of users.
        target: "HOST:PORT".
        model: name of the model.
    """
    if corpus.store is None:
        return retriever(target, model)
    with SearchClient(target, model) as client:
        names = client.signature().inputs
    return retriever(target, model, to_user=corpus.user_teller(names))
