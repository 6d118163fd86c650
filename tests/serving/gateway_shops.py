"""A small shop behind the search gateway: an inverted index on disk, model servers that do as told, and the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tantivy
from processes import PATIENCE_S
from proxy_backends import RecordingBackend

from dpsr_common import serving_apis
from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_serving.gateway import catalogue as catalogue_file
from dpsr_serving.gateway.catalogue import Catalogue, file_record, identifier_hash
from dpsr_serving.gateway.config import parse_config
from dpsr_serving.gateway.inverted import Analysis, Field, InvertedIndex, open_inverted_index, tantivy_schema
from dpsr_serving.gateway.pipeline import Searcher
from dpsr_serving.gateway.server import Gateway
from dpsr_serving.tensors import make_tensor, to_numpy

FIRST_ID = 100
BRANDS = ("acme", "bolt", "crux")


def title(item: int) -> str:
    """Items 100 to 139 are shoes and boots, in turn red, blue and green."""
    return f"{('red', 'blue', 'green')[item % 3]} {('shoes', 'boots')[item % 2]} no {item}"


def write_index(folder: Path, items: int = 40, keys: bool = False) -> Path:
    """Writes an inverted index as `dpsr index --inverted` does, of items FIRST_ID, FIRST_ID + 1, ...

    Item i has the brand i % 3 of BRANDS (none if i % 10 is 9), the price i - 100, the identifier MX-i, and is a variant
    of the product (i - 100) // 4.
    """
    ids = np.arange(FIRST_ID, FIRST_ID + items)
    folder.mkdir()
    texts: dict[str, list[str]] = {
        "title": [title(i) for i in ids],
        "text.brand": list(BRANDS),
        "group_text": [f"product {g}" for g in range(items // 4 + 1)],
    }
    if keys:
        texts["key"] = [f"sku-{i}" for i in ids]
    hashes = [identifier_hash(f"MX-{i}") or 0 for i in ids]
    order = np.argsort(np.array(hashes, np.uint64))
    with PackedFileWriter(str(folder / catalogue_file.CATALOGUE), "catalogue") as file:
        file.add("id", ids)
        for name, column in texts.items():
            data = [text.encode() for text in column]
            file.add(f"{name}.splits", np.cumsum([0, *map(len, data)]))
            file.add(f"{name}.bytes", np.frombuffer(b"".join(data), np.uint8))
        file.add("value.brand", np.array([0 if i % 10 == 9 else i % 3 + 1 for i in ids], np.int32))
        file.add("value.price", (ids - FIRST_ID).astype(np.float32))
        file.add("group", ((ids - FIRST_ID) // 4).astype(np.int32))
        file.add("identifier.hash", np.array(hashes, np.uint64)[order])
        file.add("identifier.row", order.astype(np.int32))
    fields = [Field("text", ("title",))]
    manifest: dict[str, Any] = {
        "format": catalogue_file.FORMAT,
        "version": catalogue_file.FORMAT_VERSION,
        "engine": "tantivy",
        "store": {"checksum": "0", "vocabulary_fingerprint": "0"},
        "items": items,
        "fields": [dataclasses.asdict(field) for field in fields],
        "attributes": [{"name": "brand", "kind": "categorical"}, {"name": "price", "kind": "number"}],
        "group": "product",
        "identifiers": ["model"],
    }
    catalogue = Catalogue(manifest, PackedFile(str(folder / catalogue_file.CATALOGUE), "catalogue"))
    analysis = Analysis(fields)
    (folder / catalogue_file.TANTIVY).mkdir()
    index = tantivy.Index(tantivy_schema(catalogue, fields), path=str(folder / catalogue_file.TANTIVY))
    writer = index.writer(num_threads=1)
    for row, item in enumerate(ids):
        document = tantivy.Document()
        document.add_unsigned("row", row)
        document.add_text("text", " ".join(analysis.tokens(fields[0], title(item))))
        document.add_float("attribute1", float(item - FIRST_ID))
        if item % 10 != 9:
            document.add_unsigned("attribute0", int(item % 3 + 1))
        writer.add_document(document)
    writer.commit()
    writer.wait_merging_threads()
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    manifest["files"] = {path.relative_to(folder).as_posix(): file_record(path) for path in paths}
    (folder / catalogue_file.MANIFEST).write_text(json.dumps(manifest))
    return folder


Search = Callable[[dict[str, Any]], Sequence[tuple[int, float]]]
Rank = Callable[[dict[str, Any]], Sequence[float]]
Rewrites = Callable[[dict[str, Any]], Sequence[tuple[str, float]]]

_STRING, _FLOAT, _INT32, _INT64 = 7, 1, 3, 9
_SEARCH_INPUTS = {
    "query": (_STRING, 1),
    "k": (_INT32, 0),
    "search_parameters": (_STRING, 0),
    "include": (_STRING, 2),
    "user_gender": (_STRING, 1),
    "user_age": (_FLOAT, 1),
    "clicked_items": (_INT64, 2),
    "past_queries": (_STRING, 2),
}
_RANK_INPUTS = {
    "query": (_STRING, 1),
    "item_ids": (_INT64, 1),
    "dpsr_score": (_FLOAT, 1),
    "user_id": (_INT64, 1),
    "user_gender": (_STRING, 1),
}


class Models:
    """A model server of our own protocol whose models are Python functions, for answers that are late, wrong or lost.

    Attributes:
        search, rank, rewrite: what the signatures answer, from the inputs of a request.
        requests: the inputs of all requests, by signature.
        delay_s: time that every answer takes.
        fails: signature -> status code that it answers.
    """

    def __init__(self) -> None:
        self.search: Search = lambda inputs: [(FIRST_ID + 2 * i, 1 - i / 100) for i in range(int(inputs["k"]))]
        self.rank: Rank = lambda inputs: [float(-item) for item in inputs["item_ids"]]
        self.rewrite: Rewrites = lambda inputs: [("blue boots", -0.5)]
        self.requests: dict[str, list[dict[str, Any]]] = {"search": [], "rank": [], "rewrite": []}
        self.metadata: list[dict[str, Any]] = []
        self.delay_s = 0.0
        self.fails: dict[str, grpc.StatusCode] = {}
        self._backend = RecordingBackend()
        self._backend.answer = self._answer
        self.target = self._backend.target

    def stop(self) -> None:
        self._backend.stop()

    def _answer(self, body: bytes, context: Any) -> bytes:
        method, _, metadata, _ = self._backend.calls[-1]
        if method == serving_apis.GET_MODEL_METADATA:
            return _metadata()
        request = serving_apis.PredictRequest.FromString(body)
        signature = request.model_spec.signature_name
        inputs = {name: to_numpy(tensor) for name, tensor in request.inputs.items()}
        self.requests[signature].append(inputs)
        self.metadata.append(metadata)
        time.sleep(self.delay_s)
        if signature in self.fails:
            context.abort(self.fails[signature], "as told")
        response = serving_apis.PredictResponse()
        response.model_spec.version.value = 1
        for name, array in getattr(self, f"_{signature}")(inputs).items():
            response.outputs[name].CopyFrom(make_tensor(array))
        return bytes(response.SerializeToString())

    def _search(self, inputs: dict[str, Any]) -> dict[str, Any]:
        found = list(self.search(inputs))
        return {
            "item_ids": np.array([[item for item, _ in found]], np.int64).reshape(1, -1),
            "scores": np.array([[score for _, score in found]], np.float32).reshape(1, -1),
            "heads": np.zeros((1, len(found)), np.int32),
        }

    def _rank(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"scores": np.array(self.rank(inputs), np.float32)}

    def _rewrite(self, inputs: dict[str, Any]) -> dict[str, Any]:
        found = [*self.rewrite(inputs), *[("", -np.inf)] * 3][: int(inputs["n"])]
        return {
            "rewrites": np.array([[text.encode() for text, _ in found]], object),
            "log_probabilities": np.array([[number for _, number in found]], np.float32),
        }


def _metadata() -> bytes:
    signatures = serving_apis.SignatureDefMap()
    for signature, inputs in (("search", _SEARCH_INPUTS), ("rank", _RANK_INPUTS)):
        for name, (dtype, rank) in inputs.items():
            info = signatures.signature_def[signature].inputs[name]
            info.dtype = dtype
            for _ in range(rank):
                info.tensor_shape.dim.add(size=-1)
    signatures.signature_def["serving_default"].outputs["item_ids"].dtype = _INT64
    response = serving_apis.GetModelMetadataResponse()
    response.model_spec.version.value = 1
    response.metadata["signature_def"].value = signatures.SerializeToString()
    return bytes(response.SerializeToString())


@dataclasses.dataclass
class Answer:
    """An HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The text of an error, which must be the only field."""
        assert self.status >= 400 and list(self.json) == ["error"], self.body
        return str(self.json["error"])


def call(address: str, path: str, body: Any = None, **headers: str) -> Answer:
    """POST with a body, which is JSON unless it is bytes; else GET."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        connection.request("GET" if data is None else "POST", path, data, sent)
        response = connection.getresponse()
        return Answer(response.status, dict(response.headers), response.read())
    finally:
        connection.close()


class Shop:
    """A gateway that runs in a thread."""

    def __init__(self, gateway: Gateway, searcher: Searcher, loop: asyncio.AbstractEventLoop) -> None:
        self.gateway, self.searcher, self.loop = gateway, searcher, loop

    def search(self, query: str | None = "red shoes", **fields: Any) -> Any:
        """Answers a search that has to succeed."""
        answer = self.post({**({} if query is None else {"query": query}), **fields})
        assert answer.status == 200, answer.body
        return answer.json

    def post(self, body: Any, **headers: str) -> Answer:
        return call(self.gateway.rest_address, "/v1/search", body, **headers)

    def get(self, path: str) -> Answer:
        return call(self.gateway.rest_address, path)

    def metric(self, name: str) -> dict[str, float]:
        """Values of a metric by their labels, as they are written."""
        lines = [line for line in self.get("/metrics").body.decode().splitlines() if line.startswith(name + "{")]
        return {line[len(name) :].rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


@contextlib.contextmanager
def running(
    config: str,
    folder: Path,
    wrap: Callable[[InvertedIndex], Any] | None = None,
    drain_s: float = 1.0,
    add_routes: Callable[[Gateway, InvertedIndex], Callable[[Any], None]] | None = None,
    **targets: str,
) -> Iterator[Shop]:
    """Runs a gateway on the index below `folder`/index.

    Args:
        config: what follows `index` and `models` in the YAML file.
        folder: where relative paths begin.
        wrap: makes another index of the index.
        drain_s: time that searches under way have at the end.
        add_routes: returns what adds routes to the gateway's REST server.
        targets: address of each model.
    """
    models = "".join(f"  {name}: {{target: '{target}'}}\n" for name, target in targets.items())
    text = f"index: index\n{f'models:{chr(10)}{models}' if models else ''}{config}"
    parsed = parse_config(text, folder)
    index = open_inverted_index(Path(parsed.index))
    ready, shops, failures = threading.Event(), [], []
    done: list[asyncio.Event] = []

    async def serve() -> None:
        searcher = Searcher(parsed, index if wrap is None else wrap(index))
        gateway = Gateway(searcher, parsed.limits)
        await gateway.start("127.0.0.1", 0, 0, None if add_routes is None else add_routes(gateway, index))
        searcher.start()
        done.append(asyncio.Event())
        shops.append(Shop(gateway, searcher, asyncio.get_running_loop()))
        ready.set()
        await done[0].wait()
        await gateway.stop(drain_s)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(PATIENCE_S)
    if failures:
        raise failures[0]
    try:
        yield shops[0]
    finally:
        with contextlib.suppress(RuntimeError):
            shops[0].loop.call_soon_threadsafe(done[0].set)
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the gateway does not stop"
        if failures:
            raise failures[0]
