"""The client of a search servable: text in, typed results out. Needs no TensorFlow.

    with SearchClient("127.0.0.1:8500", "demo") as client:
        for result in client.search(["red shoes", "angle bracket"], k=10):
            print(result.item_ids, result.scores)

The target is a model server or a proxy: both speak TensorFlow Serving's API.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from dpsr_serving import apis
from dpsr_serving.errors import CommandError
from dpsr_serving.tensors import make_tensor, to_numpy

Query = str | bytes
Retriever = Callable[[Sequence[Query], Sequence[Any] | None, int], tuple[NDArray[np.int64], NDArray[np.float32]]]

_PADDING_ID = -1


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """What one query found, best first; n is at most the k asked for.

    Attributes:
        item_ids: [n] int64.
        scores: [n] float32, an item's largest inner product over the heads of the query tower.
        heads: [n] int32, the head that gave this score.
        item_keys: the shop's own ids, where those are strings; else None.
    """

    item_ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    heads: NDArray[np.int32]
    item_keys: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """How many items were found."""
        return len(self.item_ids)


@dataclasses.dataclass(frozen=True)
class ModelVersion:
    """A version that the server knows: its state, such as "AVAILABLE", and the error that it ended with, or ""."""

    version: int
    state: str
    error: str


class ServingError(CommandError):
    """The server did not answer, or not with results. A command that lets it pass ends with status 1.

    Attributes:
        code: the gRPC status code.
        message: what failed, where, and what to do about it.
        details: the server's own words.
    """

    def __init__(self, code: grpc.StatusCode, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


class SearchClient:
    """Asks one model at one address. Threads may share a client.

    Args:
        target: "host:port" of a model server or a proxy.
        model: name of the model.
        timeout_s: how long one call may take, seconds; the server sees the deadline too.
    """

    def __init__(self, target: str, model: str, timeout_s: float = 10.0) -> None:
        if not target or not model:
            raise ValueError(f"a client needs a target (host:port) and a model name, got {target!r} and {model!r}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
        self._target = target
        self._model = model
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(target, options=apis.CHANNEL_OPTIONS)
        self._predict = self._channel.unary_unary(
            apis.PREDICT,
            request_serializer=apis.PredictRequest.SerializeToString,
            response_deserializer=apis.PredictResponse.FromString,
        )
        self._get_model_status = self._channel.unary_unary(
            apis.GET_MODEL_STATUS,
            request_serializer=apis.GetModelStatusRequest.SerializeToString,
            response_deserializer=apis.GetModelStatusResponse.FromString,
        )

    def __enter__(self) -> SearchClient:
        """Returns the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the client."""
        self.close()

    def close(self) -> None:
        """Closes the connection; the client answers no more."""
        self._channel.close()

    def search(self, queries: Query | Sequence[Query], k: int | None = None) -> list[SearchResult]:
        """Asks for the best items of each query, all queries in one request.

        Args:
            queries: one query or several; bytes need not be valid UTF-8. An empty query finds nothing.
            k: how many items each; None leaves it to the servable (signature `serving_default`).

        Returns:
            One result a query, in their order.

        Raises:
            ServingError: the server refused the request or did not answer in time.
            ValueError: k is not positive, or a query is a str that UTF-8 cannot encode.
        """
        batch = [queries] if isinstance(queries, (str, bytes)) else list(queries)
        if not batch:
            return []
        outputs = self._search(batch, k)
        ids, scores, heads = outputs["item_ids"], outputs["scores"], outputs["heads"]
        keys = outputs.get("item_keys")
        results = []
        for row in range(len(batch)):
            found = ids[row] != _PADDING_ID
            row_keys = None
            if keys is not None:
                row_keys = tuple(key.decode("utf-8", "replace") for key in keys[row][found])
            results.append(SearchResult(ids[row][found], scores[row][found], heads[row][found], row_keys))
        return results

    def model_status(self) -> list[ModelVersion]:
        """The model's versions, newest first.

        Raises:
            ServingError: the server does not know the model or did not answer in time.
        """
        request = apis.GetModelStatusRequest()
        request.model_spec.name = self._model
        response = self._call(self._get_model_status, request)
        states = apis.ModelVersionStatus.State
        versions = [
            ModelVersion(
                version=status.version,
                state=states.Name(status.state) if status.state in states.values() else str(status.state),
                error=status.status.error_message,
            )
            for status in response.model_version_status
        ]
        return sorted(versions, key=lambda version: version.version, reverse=True)

    def _search(self, batch: Sequence[Query], k: int | None) -> dict[str, NDArray[Any]]:
        """The outputs of one request: item_ids, scores, heads and perhaps item_keys, each [len(batch), columns]."""
        request = apis.PredictRequest()
        request.model_spec.name = self._model
        request.inputs["query"].CopyFrom(make_tensor(batch))
        if k is None:
            request.model_spec.signature_name = "serving_default"
        else:
            if not 0 < k < 2**31:
                raise ValueError(f"k must be a positive int32, got {k}")
            request.model_spec.signature_name = "search"
            request.inputs["k"].CopyFrom(make_tensor(np.int32(k)))
        response = self._call(self._predict, request)
        try:
            return _decode(response.outputs, len(batch))
        except ValueError as error:
            raise ServingError(
                grpc.StatusCode.INTERNAL,
                f"the answer of {self._target}, model {self._model!r}, is not that of a search servable: {error}; "
                "is the model one that `dpsr export` wrote?",
            ) from error

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
            raise ServingError(code, self._explain(code, details), details) from None

    def _explain(self, code: grpc.StatusCode, details: str) -> str:
        where = f"{self._target}, model {self._model!r}"
        if code is grpc.StatusCode.UNAVAILABLE:
            return f"{where}: no server answers: {details}; is it running? `dpsr serve` starts one"
        if code is grpc.StatusCode.NOT_FOUND:
            return (
                f"{self._target} does not serve a model {self._model!r}: {details}; "
                "check the name and that a version of it is loaded"
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"{where}: no answer within {self._timeout_s:g} s; allow more time or look at the server's load"
        if code is grpc.StatusCode.FAILED_PRECONDITION and "ignature" in details:
            return f"{where}: {details} It is not a search servable that takes k; leave k out or export it again"
        return f"{where}: {code.name}: {details}"


def _decode(outputs: Any, batch: int) -> dict[str, NDArray[Any]]:
    """Decodes and checks the outputs of a search signature. Raises ValueError."""
    decoded: dict[str, NDArray[Any]] = {}
    shape: tuple[int, ...] | None = None
    for name, kind in (("item_ids", "i8"), ("scores", "f4"), ("heads", "i4"), ("item_keys", "O")):
        if name not in outputs:
            if name == "item_keys":
                continue
            raise ValueError(f"no output {name!r} among {sorted(outputs)}")
        array = to_numpy(outputs[name])
        if array.dtype != np.dtype(kind) or array.ndim != 2 or array.shape[0] != batch:
            raise ValueError(
                f"output {name!r} is {array.dtype.name} {list(array.shape)}, "
                f"expected {np.dtype(kind).name} [{batch}, k]"
            )
        if shape is not None and array.shape != shape:
            raise ValueError(f"output {name!r} is {list(array.shape)}, the ids are {list(shape)}")
        shape = array.shape
        decoded[name] = array
    return decoded


def retriever(target: str, model: str, batch_size: int = 64, timeout_s: float = 60.0) -> Retriever:
    """A server as the callable that evaluation takes.

    Returns:
        `retrieve(queries, users, k)` -> (item_ids [n, k] int64 padded with -1, scores [n, k] float32 padded with -inf),
        n = len(queries), asked in batches of `batch_size`. `users` must be None, or None for each query: a servable
        has no user features yet, and leaving given ones out would measure something else than what was asked for.
        Raises ServingError, ValueError.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    client = SearchClient(target, model, timeout_s)

    def retrieve(
        queries: Sequence[Query], users: Sequence[Any] | None, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if users is not None and any(user is not None for user in users):
            raise ValueError(f"model {model!r} at {target} takes no user features; pass users=None")
        ids = np.full((len(queries), k), _PADDING_ID, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            for row, result in enumerate(client.search(batch, k), start):
                found = min(len(result), k)
                ids[row, :found] = result.item_ids[:found]
                scores[row, :found] = result.scores[:found]
        return ids, scores

    return retrieve
