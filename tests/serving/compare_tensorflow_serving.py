"""Our model server beside TensorFlow Serving's own: equal codes, messages and tensors for requests of all kinds.

`make test-tensorflow-serving TENSORFLOW_MODEL_SERVER=PATH` runs this file, which other runs do not collect. PATH is
a tensorflow_model_server 2.15. With SERVABLE=BASE, a servable of `dpsr export` is compared as well; that server must
have our ops (docs/tensorflow_serving.md).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
import saved_models
import tensorflow as tf
from model_servers import BINARY, Server, config_list, model_config, predict_request, serving
from processes import PATIENCE_S, free_port
from tensorflow_serving.apis import get_model_metadata_pb2
from test_model_server_inference import (
    CLASSIFY,
    MULTI_ERRORS,
    REGRESS,
    classify_request,
    input_of,
    metadata_request,
    multi_request,
    regress_request,
)
from test_model_server_rest import EXAMPLE_ERRORS, MALFORMED, PREDICT_ERRORS, SIG, TWO

from dpsr_serving.model_server import registered_op_libraries

PEER = os.environ.get("TENSORFLOW_MODEL_SERVER", "")

# What is meant to differ, by the name of the request: docs/model_server.md says why.
INTENDED = {
    "grpc predict default unknown": "an input with an unknown name is refused",
    "rest defaulted rows": "REST requests may leave out inputs with a default",
    "rest defaulted columns": "REST requests may leave out inputs with a default",
    "rest predict error extra column": "an input with an unknown name is refused",
    "rest predict error column twice": "an input that is given twice is refused",
    "rest predict error name with NUL": "an input with an unknown name is refused",
    "rest predict error bad UTF-8": "JSON has to be UTF-8",
    "rest scalar answer": "our text says what to send instead",
    "rest POST /V1/Models/two:PREDICT": "case does not matter",
    "rest GET /v1/models/two/versions/99999999999999999999": "our body is not empty",
    "rest GET /v1": "it is an error of the API",
    "grpc multi no spec": "each task needs a ModelSpec",
    "grpc multi no task": "the text says what is wrong",
}


class Pair(NamedTuple):
    """The two servers."""

    ours: Server
    theirs: Server


@pytest.fixture(scope="module")
def pair(exported: Path, zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both serve `sig` (version 7), `two` and `tf1` (1 and 2; label old is 1), `tf2`, `keras` and `counter`."""
    if not PEER:
        pytest.fail("give the path of TensorFlow Serving's server: TENSORFLOW_MODEL_SERVER=PATH")
    folder = tmp_path_factory.mktemp("pair")
    sources = {
        "sig": exported / "signatures",
        "two": zoo / "half_plus_two_tf1",
        "tf1": zoo / "half_plus_two_tf1",
        "tf2": zoo / "half_plus_two_tf2",
        "keras": zoo / "half_plus_two_keras",
        "counter": zoo / "counter",
    }
    configs = []
    for name, source in sources.items():
        (folder / name).mkdir()
        versions = {"sig": (7,), "two": (1, 2), "tf1": (1, 2)}.get(name, (1,))
        for version in versions:
            saved_models.publish(source, folder / name, version)
        labels = {"old": 1} if len(versions) > 1 else {}
        configs.append(model_config(name, folder / name, every=True, labels=labels))
    (folder / "models.config").write_text(str(config_list(*configs)))
    flags = [f"--model_config_file={folder / 'models.config'}", "--allow_version_labels_for_unavailable_models"]
    with (
        serving(folder, *flags, port=free_port(), rest_port=free_port()) as ours,
        _peer(folder, [*flags], dict.fromkeys(sources, 1)) as theirs,
    ):
        yield Pair(ours, theirs)


class _peer:
    """TensorFlow Serving's server with these flags, once the models answer."""

    def __init__(self, folder: Path, flags: list[str], models: dict[str, int]) -> None:
        self._folder, self._flags, self._models = folder, flags, models

    def __enter__(self) -> Server:
        server = Server.__new__(Server)
        server.log = self._folder / "peer.log"
        server.port, server.rest_port = free_port(), free_port()
        with server.log.open("wb") as log:
            server.process = subprocess.Popen(
                [PEER, f"--port={server.port}", f"--rest_api_port={server.rest_port}", *self._flags],
                stdout=log,
                stderr=log,
            )
        server.connect()
        end = time.monotonic() + PATIENCE_S
        for name in self._models:
            while True:
                try:
                    if any(state == 30 for state in server.states(name).values()):
                        break
                except grpc.RpcError:
                    pass
                if server.process.poll() is not None or time.monotonic() > end:
                    server.process.kill()
                    raise RuntimeError(f"{PEER} does not serve {name}:\n{server.log.read_text()[-3000:]}")
                time.sleep(0.05)
        self._server = server
        return server

    def __exit__(self, *_: object) -> None:
        self._server.process.kill()
        self._server.process.wait()


# A name, and what a server answers: anything that can be compared.
Case = tuple[str, Callable[[Server], Any]]


def _grpc(service: str, method: str, request: Any) -> Callable[[Server], Any]:
    def ask(server: Server) -> Any:
        try:
            return getattr(getattr(server, service), method)(request, timeout=PATIENCE_S)
        except grpc.RpcError as error:
            return error.code(), error.details()

    return ask


def _rest(path: str, body: object = None, method: str | None = None) -> Callable[[Server], Any]:
    def ask(server: Server) -> Any:
        try:
            reply = server.rest(path, body, method=method)
        except UnicodeDecodeError as error:
            return 0, f"not UTF-8: {error.reason}"
        try:
            return reply.status, reply.json
        except ValueError:
            return reply.status, reply.text

    return ask


def _status(ask: Callable[[Server], Any]) -> Callable[[Server], Any]:
    """Compares the status alone: what is wrong in a JSON body our server says in words of its own."""
    return lambda server: ask(server)[0]


def _predict_cases() -> Iterator[Case]:
    def predict(case: str, *arguments: Any, filters: tuple[str, ...] = (), **more: Any) -> Case:
        request = predict_request(*arguments, **{"name": "sig", **more})
        request.output_filter.extend(filters)
        return f"grpc predict {case}", _grpc("prediction", "Predict", request)

    floats, ints = np.float32([1, 2]), np.int64([3, 4])
    yield predict("half")
    yield predict("one version", version=7)
    yield predict("unknown version", version=8)
    yield predict("unknown model", name="m")
    yield predict("no name", name="")
    yield predict("pair", "pair", {"a": floats, "b": ints})
    yield predict("filter", "pair", {"a": floats, "b": ints}, filters=("sum",))
    yield predict("unknown filter", "pair", {"a": floats, "b": ints}, filters=("z",))
    yield predict("filter twice", "pair", {"a": floats, "b": ints}, filters=("a", "a"))
    yield predict("text", "text", {"text": ["a", "手机", ""]})
    yield predict("image", "image", {"image": [b"\xff\x00"]})
    yield predict("scalar", "scalar", {"x": floats})
    yield predict("many", "many", {"x": np.float32(2)})
    yield predict("negatives", "negatives", {"n": np.int64(5)})
    yield predict("other shape", "", {"x": np.float32([[1, 2], [3, 4]])})
    yield predict("no element", "", {"x": np.float32([])})
    yield predict("unknown signature", "s")
    yield predict("wrong type", "", {"x": np.int32([1])})
    yield predict("wrong name", "", {"z": floats})
    yield predict("missing", "pair", {"a": floats})
    yield predict("extra", "", {"x": floats, "z": floats})
    yield predict("no input", "", {})
    yield predict("default", "defaulted", {"a": np.float32([1])})
    yield predict("default given", "defaulted", {"a": np.float32([1]), "b": np.int64([2])})
    yield predict("default unknown", "defaulted", {"z": np.float32([1])})
    yield predict("wrong sizes", "pair", {"a": floats, "b": np.int64([1, 2, 3])})
    for model in ("tf1", "tf2", "keras"):
        x = np.float32([2.0]) if model == "tf2" else np.float32([[2.0]])
        yield predict(f"half_plus_two {model}", "", {"x": x}, name=model)
    for signature in ("reset_counter", "incr_counter", "incr_counter", "get_counter"):
        yield predict(signature, signature, {}, name="counter")
    broken = predict_request(name="sig")
    broken.inputs["x"].tensor_shape.dim[0].size = -2
    yield "grpc predict broken tensor", _grpc("prediction", "Predict", broken)
    for label in ("old", "new"):
        labelled = predict_request(inputs={"x": np.float32([[1.0]])}, name="two")
        labelled.model_spec.version_label = label
        yield f"grpc predict label {label}", _grpc("prediction", "Predict", labelled)
    unnamed = predict_request(name="sig")
    unnamed.ClearField("model_spec")
    yield "grpc predict no spec", _grpc("prediction", "Predict", unnamed)


def _example_cases() -> Iterator[Case]:
    def both(name: str, model: str, signature: str, examples: Any) -> Iterator[Case]:
        yield f"grpc classify {name}", _grpc("prediction", "Classify", classify_request(model, signature, examples))
        yield f"grpc regress {name}", _grpc("prediction", "Regress", regress_request(model, signature, examples))

    for form in ("tf1", "tf2"):
        for signature in ("classify_x_to_y", "classify_with_labels", "classify_wrongly", "regress_x_to_y"):
            yield from both(f"{form} {signature}", form, signature, input_of(2, 4, 0))
        yield from both(f"{form} serving_default", form, "", input_of(2))
        tasks = ((CLASSIFY, "classify_x_to_y"), (REGRESS, "regress_x_to_y"))
        multi = multi_request(input_of(2, 4), *tasks, model=form)
        yield f"grpc multi {form}", _grpc("prediction", "MultiInference", multi)
    yield from both("empty", "tf1", "regress_x_to_y", input_of())
    yield from both("context", "tf1", "regress_x_to_y", input_of(4.0, context=10))
    yield from both("unknown signature", "tf1", "s", input_of(2))
    yield from both("unknown model", "m", "s", input_of(2))
    yield from both("missing feature", "tf2", "regress_x_to_y", input_of(float("nan")))
    for name, (request, _, _) in MULTI_ERRORS.items():
        yield f"grpc multi {name}", _grpc("prediction", "MultiInference", request)
    for name, fields in (("tf1", ["signature_def"]), ("tf1", []), ("tf1", ["f"]), ("m", ["signature_def"])):
        yield (
            f"grpc metadata {name} {fields}",
            _grpc("prediction", "GetModelMetadata", metadata_request(name, *fields)),
        )


def _rest_cases() -> Iterator[Case]:
    nan = '{"instances": [NaN, Infinity, -Infinity, 1e-3, 16777217.0]}'
    for name, body in {
        "rows": {"instances": [1, 2.5, -3]},
        "named rows": {"instances": [{"x": 1}, {"x": 2}]},
        "columns": {"inputs": [1, 2]},
        "scalar": {"inputs": 3},
        "matrix": {"inputs": [[1, 2], [3, 4]]},
        "pair rows": {"signature_name": "pair", "instances": [{"a": 1.5, "b": 2}]},
        "pair columns": {"signature_name": "pair", "inputs": {"a": [1.5, 0], "b": [2, 4]}},
        "text": {"signature_name": "text", "instances": ['三"\n', {"b64": "YQ=="}]},
        "image": {"signature_name": "image", "instances": [{"b64": "YWI="}, "c"]},
        "many": {"signature_name": "many", "inputs": 1},
        "scalar answer": {"signature_name": "scalar", "instances": [1, 2]},
        "defaulted rows": {"signature_name": "defaulted", "instances": [{"a": 1}]},
        "defaulted columns": {"signature_name": "defaulted", "inputs": {"a": [1]}},
        "numbers": nan,
    }.items():
        yield f"rest {name}", _rest(SIG, body)
    for name, (text, _) in PREDICT_ERRORS.items():
        yield f"rest predict error {name}", _status(_rest(SIG, text))
    for name, (body, _) in EXAMPLE_ERRORS.items():
        ask = _rest(f"{TWO}:regress", {"signature_name": "regress_x_to_y", **body})
        yield f"rest example error {name}", _status(ask)
    examples = {"examples": [{"x": 2.0}, {"x": [4.0]}]}
    yield "rest classify", _rest(f"{TWO}:classify", {"signature_name": "classify_with_labels", **examples})
    yield "rest regress", _rest(f"{TWO}/labels/old:regress", {"signature_name": "regress_x_to_y", **examples})
    for path in (
        f"{TWO}/versions/1:predict", f"{TWO}/versions/0002:predict", f"{TWO}/versions/9:predict",
        f"{TWO}/labels/old:predict", f"{TWO}/labels/new:predict", "/V1/Models/two:PREDICT", "/v1/models/m:predict",
        "/v1/models/TWO:predict", "/v1/models/t%77o:predict",
    ):  # fmt: skip
        yield f"rest POST {path}", _rest(path, {"instances": [[2]]})
    for path in (
        TWO, f"{TWO}/versions/1", f"{TWO}/versions/9", f"{TWO}/labels/old", f"{TWO}/labels/new", "/v1/models/m",
        "/v1/models/m/labels/x", f"{TWO}/versions/99999999999999999999", f"{TWO}/metadata",
        f"{TWO}/labels/old/metadata", f"{TWO}/labels/new/metadata", f"{TWO}/versions/9/metadata",
        "/v1/models/m/metadata", "/v1/models", "/v1/models/",
    ):  # fmt: skip
        yield f"rest GET {path}", _rest(path)
    for method, path in MALFORMED:
        if method in ("POST", "GET"):
            yield f"rest {method} {path}", _rest(path, method=method)


def _plain(answer: Any) -> Any:
    """Returns an answer in a form in which equal ones are equal. Some texts of TensorFlow depend on the run."""
    if isinstance(answer, get_model_metadata_pb2.GetModelMetadataResponse):
        # Maps are sent in no certain order.
        signatures = get_model_metadata_pb2.SignatureDefMap()
        answer.metadata["signature_def"].Unpack(signatures)
        return answer.model_spec, signatures
    if isinstance(answer, tuple):
        text = json.dumps(answer[1], sort_keys=True) if not isinstance(answer[1], str) else answer[1]
        # They print the whole SignatureDef, ours its name.
        text = re.sub(r"(SignatureDef: |Signature was: ).*", r"\1", text, flags=re.DOTALL)
        return answer[0], re.sub(r"\[\[\{\{node .*", "", text, flags=re.DOTALL)
    return answer


def differences(pair: Pair, cases: Iterator[Case]) -> tuple[int, dict[str, tuple[Any, Any]]]:
    """Sends each request to both. Returns how many there were, and the answers that differ, by the request's name."""
    count, found = 0, {}
    for name, ask in cases:
        count += 1
        ours, theirs = _plain(ask(pair.ours)), _plain(ask(pair.theirs))
        if ours != theirs:
            found[name] = (ours, theirs)
    return count, found


@pytest.mark.parametrize("batching", [False, True])
def test_a_servable_of_dpsr_export(batching: bool, tmp_path: Path) -> None:
    """With batching, only a servable that was exported with --warmup=batchable loads there."""
    base_path = os.environ.get("SERVABLE", "")
    if not base_path:
        pytest.skip("give a servable of `dpsr export`, of which both servers have the ops: SERVABLE=BASE")
    flags = ["--model_name=sig", f"--model_base_path={Path(base_path).resolve()}"]
    flags += ["--enable_batching"] if batching else []
    libraries = f"--op_library={','.join(registered_op_libraries())}"
    with serving(tmp_path, *flags, libraries, port=free_port()) as ours, _peer(tmp_path, flags, {"sig": 1}) as theirs:
        count, found = differences(Pair(ours, theirs), _servable_cases(batching))
    lines = [f"{name}\n    ours:   {ours}\n    theirs: {theirs}" for name, (ours, theirs) in found.items()]
    assert not lines, f"{len(lines)} of {count} requests differ:\n" + "\n".join(lines)


def _servable_cases(batching: bool) -> Iterator[Case]:
    queries: list[list[str]] = [["red shoes"], ["手机", "", "phone case"], ["!?"], ["a"] * 9]
    for number, texts in enumerate(queries):
        for signature in ("serving_default", "query_embedding"):
            request = predict_request(signature, {"query": np.array(texts, object)}, name="sig")
            if signature == "query_embedding" and batching:
                continue  # inputs that are left out have no rows
            yield f"{signature} {number}", _grpc("prediction", "Predict", request)
        if batching:
            continue
        for k in (1, 10, 1000, 0, 10_001):
            request = predict_request("search", {"query": np.array(texts, object), "k": np.int32(k)}, name="sig")
            yield f"search {number} {k}", _grpc("prediction", "Predict", request)
    for name, value in (
        ("include", [["brand=nobody"]]), ("include", [["brand"]]), ("exclude", [["z=1"]]),
        ("excluded_item_ids", np.int64([[1, 2]])), ("search_parameters", "nprobe=1"), ("search_parameters", "x"),
    ):  # fmt: skip
        if not batching:
            inputs = {"query": np.array(["red shoes"], object), name: value}
            request = predict_request("search", inputs, name="sig")
            yield f"search {name} {value}", _grpc("prediction", "Predict", request)


@pytest.mark.parametrize("cases", [_predict_cases, _example_cases, _rest_cases])
def test_answers_are_equal(pair: Pair, cases: Callable[[], Iterator[Case]]) -> None:
    count, found = differences(pair, cases())
    unexpected = {name: both for name, both in found.items() if name not in INTENDED}
    lines = [f"{name}\n    ours:   {ours}\n    theirs: {theirs}" for name, (ours, theirs) in unexpected.items()]
    print(f"{count} requests, {len(found) - len(unexpected)} differ as intended")
    assert not lines, f"{len(lines)} of {count} requests differ:\n" + "\n".join(lines)


def test_our_server_is_the_one_of_this_checkout() -> None:
    assert BINARY.is_file() and Path(PEER).is_file() and Path(PEER).resolve() != BINARY.resolve()
    assert tf.__version__.startswith("2.15.")
