"""Evaluation of a pipeline: `dpsr evaluate --system=search:HOST:PORT/PIPELINE` asks a running gateway."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from dpsr_common.errors import CommandError, UsageError
from dpsr_serving.addresses import check_address

_TIMEOUT_S = 60.0
_PAGE = 100  # items of one request, where the gateway allows as many; a cursor gets the rest
_LARGEST_PAGE = re.compile(r": size: got \d+, expected at most (\d+)$")  # in the gateway's error


def search_system(_: Any, operand: str) -> PipelineRetriever:
    """Returns the retriever for --system=search:HOST:PORT/PIPELINE.

    Raises:
        UsageError: `operand` is not HOST:PORT/PIPELINE.
        CommandError: no gateway answers there, or it has no such pipeline.
    """
    address, _, pipeline = operand.removeprefix("http://").partition("/")
    if not pipeline:
        raise UsageError(f"--system=search:{operand}: expected search:HOST:PORT/PIPELINE")
    found = PipelineRetriever(check_address("--system=search", address), pipeline)
    known = [entry["name"] for entry in found.call("GET", "/v1/pipelines")["pipelines"]]
    if pipeline not in known:
        raise CommandError(f"{address}: has no pipeline {pipeline!r}, expected one of {', '.join(known)}")
    return found


class PipelineRetriever:
    """Retrieves the items of a pipeline's list, for anonymous users, as dpsr_tf.evaluation.retriever describes it."""

    def __init__(self, address: str, pipeline: str) -> None:
        self._address, self._pipeline, self._page = address, pipeline, _PAGE
        parts = urlsplit(f"//{address}")
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)

    def __call__(
        self, queries: Sequence[str], users: Sequence[Any] | None, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Returns the first k items of each query: ids int64 [n, k], padded with -1, and scores float32 [n, k].

        The scores are -1 for the first item, -2 for the second, ..., and -inf for padding, because re-ranking changes
        the order of items without changing their scores.

        Raises:
            CommandError: the gateway does not answer, refuses the query, or answers without one of its stages.
        """
        ids = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for row, query in enumerate(queries):
            found = self._list(query, k)
            ids[row, : len(found)] = found
            scores[row, : len(found)] = -np.arange(1, len(found) + 1)
        return ids, scores

    def _list(self, query: str, k: int) -> list[int]:
        body: dict[str, Any] = {"query": query, "pipeline": self._pipeline}
        found: list[int] = []
        while len(found) < k:
            try:
                answer = self.call("POST", "/v1/search", {**body, "size": min(self._page, k - len(found))})
            except CommandError as error:
                largest = _LARGEST_PAGE.search(str(error))
                if largest is None or int(largest[1]) >= self._page:
                    raise
                self._page = int(largest[1])
                continue
            if answer["degraded"]:
                stages = ", ".join(answer["degraded"])
                raise CommandError(
                    f"{self._address}: the query {query!r} was answered without {stages}, which would measure another "
                    "pipeline; see the gateway's log, or give the stages a longer deadline_ms"
                )
            found += [item["id"] for item in answer["items"]]
            if not answer["next_cursor"]:
                break
            body = {"cursor": answer["next_cursor"]}
        return found

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Returns the JSON that the gateway answers. Raises CommandError."""
        data = None if body is None else json.dumps(body).encode()
        for last in (False, True):
            try:
                self._connection.request(method, path, data, {"Content-Type": "application/json"})
                response = self._connection.getresponse()
                answer = json.loads(response.read())
                break
            except (http.client.HTTPException, ConnectionError) as error:
                # The gateway ends connections that were idle for a while.
                self._connection.close()
                if last:
                    raise CommandError(f"{self._address}: the gateway does not answer: {error}") from None
            except (OSError, ValueError) as error:
                raise CommandError(f"{self._address}: the gateway does not answer: {error}") from None
        if response.status != 200:
            raise CommandError(f"{self._address}: {answer.get('error', f'status {response.status}')}")
        return answer
