"""The REST API, the health paths and the metrics of the model server."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import math
import re
import resource
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import saved_models
from model_servers import (
    Server,
    State,
    config_list,
    error_of,
    eventually,
    held_request,
    model_config,
    predict_request,
    serving,
)
from processes import PATIENCE_S, free_port
from tensorflow_serving.apis import prediction_log_pb2
from test_model_server_inference import REGRESS, input_of, multi_request

METRICS = "/monitoring/prometheus/metrics"


@pytest.fixture(scope="module")
def rest(exported: Path, zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves `sig` (version 7), `two` (half_plus_two in TF1 form, 1 and 2, label old is 1) and `keras`."""
    folder = tmp_path_factory.mktemp("rest")
    for name in ("sig", "two", "keras"):
        (folder / name).mkdir()
    saved_models.publish(exported / "signatures", folder / "sig", 7)
    saved_models.publish(zoo / "half_plus_two_keras", folder / "keras", 1)
    for version in (1, 2):
        saved_models.publish(zoo / "half_plus_two_tf1", folder / "two", version)
    models = config_list(
        model_config("sig", folder / "sig"),
        model_config("two", folder / "two", every=True, labels={"old": 1}),
        model_config("keras", folder / "keras"),
    )
    (folder / "models.config").write_text(str(models))
    (folder / "monitoring.config").write_text("prometheus_config { enable: true }")
    flags = [
        f"--model_config_file={folder / 'models.config'}",
        f"--monitoring_config_file={folder / 'monitoring.config'}",
    ]
    with serving(folder, *flags, rest_port=free_port()) as running:
        yield running


SIG = "/v1/models/sig:predict"
TWO = "/v1/models/two"


# ---- predict ----


def test_rows_and_columns(rest: Server) -> None:
    rows = rest.rest(SIG, {"instances": [1, 2.5, -3]})
    assert (rows.status, rows.json) == (200, {"predictions": [0.5, 1.25, -1.5]})
    assert rows.headers["Content-Type"] == "application/json"
    # One tensor may also stand under its name.
    assert rest.rest(SIG, {"instances": [{"x": 1}, {"x": 2}]}).json == {"predictions": [0.5, 1.0]}
    for value in ([1, 2], {"x": [1, 2]}):
        assert rest.rest(SIG, {"inputs": value}).json == {"outputs": [0.5, 1.0]}
    assert rest.rest(SIG, {"inputs": 3}).json == {"outputs": 1.5}  # a scalar
    assert rest.rest(SIG, {"inputs": [[1, 2], [3, 4]]}).json == {"outputs": [[0.5, 1.0], [1.5, 2.0]]}
    assert rest.rest("/v1/models/keras:predict", {"instances": [[2.0], [4.0]]}).json == {"predictions": [[3.0], [4.0]]}


def test_several_tensors(rest: Server) -> None:
    rows = [{"a": 1.5, "b": 2}, {"b": 4, "a": 0}]
    assert rest.rest(SIG, {"signature_name": "pair", "instances": rows}).json == {
        "predictions": [{"a": 1.5, "b": 2, "sum": 3.5}, {"a": 0.0, "b": 4, "sum": 4.0}]
    }
    columns = {"a": [1.5, 0], "b": [2, 4]}
    assert rest.rest(SIG, {"signature_name": "pair", "inputs": columns}).json == {
        "outputs": {"a": [1.5, 0.0], "b": [2, 4], "sum": [3.5, 4.0]}
    }


@pytest.mark.parametrize("rows", [[{"a": 1}], [1]])
@pytest.mark.parametrize("columns", [{"a": [1]}, [1]])
def test_an_input_that_is_left_out_gets_its_default(rest: Server, rows: list, columns: dict | list) -> None:
    found = rest.rest(SIG, {"signature_name": "defaulted", "instances": rows}).json
    assert found == {"predictions": [{"a": 1.0, "b": 7, "sum": 8.0}]}
    found = rest.rest(SIG, {"signature_name": "defaulted", "inputs": columns}).json
    assert found == {"outputs": {"a": [1.0], "b": [7], "sum": [8.0]}}


def test_texts_and_bytes(rest: Server) -> None:
    raw = base64.b64encode(b"\xff\x00").decode()
    body = {"signature_name": "text", "instances": ['三"\n', {"b64": raw}, {"b64": ""}]}
    doubled, mangled, empty = rest.rest(SIG, body).json["predictions"]
    assert doubled == {"bytes": 5, "doubled": '三"\n三"\n'}
    assert mangled["bytes"] == 2
    # Bytes that are not UTF-8 cannot be written as text.
    assert base64.b64decode(mangled["doubled"]["b64"]) == b"\xff\x00\xff\x00"
    assert empty == {"bytes": 0, "doubled": ""}
    named = rest.rest(SIG, {"signature_name": "text", "inputs": {"text": [{"b64": raw}]}}).json
    assert named["outputs"]["bytes"] == [2]
    alone = rest.rest(SIG, {"signature_name": "text", "inputs": {"b64": raw}}).json
    assert alone["outputs"]["bytes"] == 2


def test_outputs_named_bytes_are_base64(rest: Server) -> None:
    reply = rest.rest(SIG, {"signature_name": "image", "instances": [{"b64": "YWI="}, "c"]})
    assert reply.json == {"predictions": [{"b64": "YWI="}, {"b64": "Yw=="}]}


def test_numbers_that_json_does_not_have(rest: Server) -> None:
    reply = rest.rest(SIG, '{"instances": [NaN, Infinity, -Infinity, 1e-3]}')
    assert reply.status == 200
    assert "NaN" in reply.text and "-Infinity" in reply.text
    values = reply.json["predictions"]
    assert math.isnan(values[0]) and values[1:] == [math.inf, -math.inf, 0.0005]


def test_floats_keep_their_value(rest: Server) -> None:
    values = [0.1, 1e-38, 3e38, -0.0, 16777217.0, 1 / 3]
    got = rest.rest(SIG, {"inputs": values}).json["outputs"]
    assert np.float32(got).tolist() == (np.float32(values) / np.float32(2)).tolist()


def test_versions_and_labels_in_the_path(rest: Server) -> None:
    for path in (f"{TWO}:predict", f"{TWO}/versions/1:predict", f"{TWO}/versions/0002:predict"):
        assert rest.rest(path, {"instances": [[2]]}).json == {"predictions": [[3.0]]}
    assert rest.rest(f"{TWO}/labels/old:predict", {"instances": [[2]]}).status == 200
    assert rest.rest("/V1/Models/two/Versions/1:PREDICT", {"instances": [[2]]}).status == 200
    missing = rest.rest(f"{TWO}/versions/9:predict", {"instances": [[2]]})
    assert missing.error == (404, "Servable not found for request: Specific(two, 9)")
    unknown = rest.rest(f"{TWO}/labels/new:predict", {"instances": [[2]]})
    assert unknown.error == (400, "Unrecognized servable version label: new")
    assert rest.rest("/v1/models/m:predict", "{}").error == (404, "Servable not found for request: Latest(m)")
    assert rest.rest("/v1/models/TWO:predict", "{}").status == 404  # names keep their case


PREDICT_ERRORS = {
    "no JSON": ("x", "JSON Parse error: Invalid value. at offset: 0"),
    "nothing": ("", "JSON Parse error: The document is empty"),
    "no object": ("[]", "JSON Value: [] Is not object"),
    "more after it": ('{"instances": [1]} {}', "JSON Parse error"),
    "bad UTF-8": (b'{"instances": ["\xff"]}', "JSON Parse error"),
    "no key": ("{}", "Missing 'inputs' or 'instances' key"),
    "both keys": ('{"inputs": [1], "instances": [1]}', "expecting only one of 'instances' or 'inputs' keys"),
    "instances of no list": ('{"instances": 1}', "Excepting 'instances' to be an list/array. Got JSON Type: Number"),
    "no instance": ('{"instances": []}', "at least one"),
    "signature of no text": ('{"signature_name": 1, "instances": [1]}', "'signature_name' key must be a string value."),
    "unknown signature": (
        '{"signature_name": "s", "instances": [1]}',
        'Serving signature name: "s" not found in signature def',
    ),
    "text for a number": ('{"instances": ["1"]}', 'JSON Value: "1" Type: String is not of expected type: float'),
    "null": ('{"instances": [null]}', "Type: Null"),
    "bool for a number": ('{"instances": [true]}', "Type: Bool"),
    "wrong base64": ('{"signature_name": "text", "instances": [{"b64": "?"}]}', "Unable to base64 decode"),
    "base64 of no text": ('{"signature_name": "text", "instances": [{"b64": 1}]}', "is not of expected type: string"),
    "ragged": ('{"instances": [[1, 2], [3]]}', "of size: 1 at dimension: 0 expected size: 2"),
    "list after scalar": ('{"instances": [1, [2]]}', "Encountered list at unexpected depth"),
    "scalar after list": ('{"instances": [[1], 2]}', "Encountered scalar 2"),
    "wrong key": ('{"instances": [{"z": 1}]}', "key z is not expected; expected keys: x"),
    "mixed": ('{"instances": [{"x": 1}, 2]}', "mixes objects and plain values"),
    "mixed the other way": ('{"instances": [2, {"x": 1}]}', "mixes objects and plain values"),
    "missing key": ('{"signature_name": "pair", "instances": [{"a": 1}]}', "keys are missing; expected keys: a, b"),
    "plain list for two": ('{"signature_name": "pair", "instances": [1]}', "multiple input tensors"),
    "plain column for two": ('{"signature_name": "pair", "inputs": [1]}', "multiple input tensors"),
    "missing column": ('{"signature_name": "pair", "inputs": {"a": [1]}}', "Missing named input: b"),
    "extra column": ('{"inputs": {"x": [1], "z": 1}}', "Unexpected named input: z"),
    "column twice": ('{"inputs": {"x": [1], "x": [2]}}', "Repeated named input: x"),
    "name with NUL": ('{"inputs": {"x": [1], "x\\u0000": [2]}}', "Unexpected named input: x"),
    "fraction for integer": (
        '{"signature_name": "pair", "instances": [{"a": 1, "b": 1.5}]}',
        "expected type: int64",
    ),
    "integer too large": (
        '{"signature_name": "pair", "instances": [{"a": 1, "b": 9223372036854775808}]}',
        "expected type: int64",
    ),
    "number too large": ('{"instances": [1e999]}', "JSON Parse error: Number too big"),
    "the model's own error": ('{"signature_name": "pair", "inputs": {"a": [1, 2], "b": [1, 2, 3]}}', ""),
}


@pytest.mark.parametrize("case", PREDICT_ERRORS)
def test_predict_errors(rest: Server, case: str) -> None:
    body, message = PREDICT_ERRORS[case]
    status, error = rest.rest(SIG, body).error
    assert status == 400
    assert message in error


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [300, 100_000])
def test_deep_nesting_is_an_error_and_no_more(rest: Server, opening: str, depth: int) -> None:
    closing = "]" if opening == "[" else "}"
    body = '{"inputs": ' + opening * depth + "1" + closing * depth + "}"
    assert rest.rest(SIG, body).error[0] == 400
    assert rest.rest(SIG, body[: len(body) // 2]).error[0] == 400
    assert rest.rest(SIG, {"instances": [1]}).status == 200


def test_an_answer_that_rows_cannot_hold(rest: Server) -> None:
    body = {"signature_name": "many", "inputs": 1}
    assert rest.rest(SIG, body).json["outputs"]["y3"] == 4.0
    # The model answers scalars, which are no rows.
    assert rest.rest(SIG, {"signature_name": "scalar", "instances": [1, 2]}).error[0] == 400


# ---- classify and regress ----


def test_classify_and_regress(rest: Server) -> None:
    examples = {"examples": [{"x": 2.0}, {"x": [4.0]}]}
    reply = rest.rest(f"{TWO}:classify", {"signature_name": "classify_x_to_y", **examples})
    assert reply.json == {"results": [[["", 3.0]], [["", 4.0]]]}
    reply = rest.rest(f"{TWO}/versions/1:classify", {"signature_name": "classify_with_labels", **examples})
    assert reply.json["results"][0] == [["small", -3.0], ["large", 3.0]]
    reply = rest.rest(f"{TWO}/labels/old:regress", {"signature_name": "regress_x_to_y", **examples})
    assert reply.json == {"results": [3.0, 4.0]}
    reply = rest.rest(
        f"{TWO}:regress", {"signature_name": "regress_x_to_y", "context": {"x": 10.5}, "examples": [{}, {"x": 2.5}]}
    )
    assert reply.json == {"results": [7.25, 3.25]}
    # A number without a point is an integer, for the whole list.
    integer = rest.rest(f"{TWO}:regress", {"signature_name": "regress_x_to_y", "examples": [{"x": 2}]})
    assert integer.error[0] == 400 and "int64" in integer.error[1]
    mixed = rest.rest(f"{TWO}:regress", {"signature_name": "regress_x_to_y", "examples": [{"x": [2, 2.5]}]})
    assert "int64" not in mixed.text


EXAMPLE_ERRORS = {
    "no examples": ({}, "'examples' key must hold a list of at least one object"),
    "empty": ({"examples": []}, "'examples' key must hold"),
    "of no object": ({"examples": [1]}, "Example must be JSON object but got JSON Number"),
    "context of no object": ({"context": 1, "examples": [{}]}, "Example must be JSON object"),
    "null": ({"examples": [{"x": None}]}, "Unexpected JSON type Null in feature named: x"),
    "bool": ({"examples": [{"x": [True]}]}, "Unexpected JSON type Bool in feature named: x"),
    "list of lists": ({"examples": [{"x": [[1]]}]}, "Unexpected JSON type Array in feature named: x"),
    "mixed": ({"examples": [{"x": [1, "a"]}]}, "is not of expected type: string"),
    "missing feature": ({"examples": [{}]}, "x"),
    "signature": ({"signature_name": "s", "examples": [{"x": 1.5}]}, "No signature was found with the name: s"),
}


@pytest.mark.parametrize("case", EXAMPLE_ERRORS)
def test_example_errors(rest: Server, case: str) -> None:
    body, message = EXAMPLE_ERRORS[case]
    status, error = rest.rest(f"{TWO}:regress", {"signature_name": "regress_x_to_y", **body}).error
    assert status == 400
    assert message in error


# ---- status and metadata ----


def test_status(rest: Server) -> None:
    one = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    both = {"model_version_status": [{**one, "version": "2"}, one]}
    assert rest.rest(TWO).json == both
    assert rest.rest(f"{TWO}/versions/1").json == {"model_version_status": [one]}
    for label in ("old", "new"):  # a label is ignored here, as over gRPC
        assert rest.rest(f"{TWO}/labels/{label}").json == both
    assert rest.rest("/v1/models/m").error == (404, "Could not find any versions of model m")
    assert rest.rest(f"{TWO}/versions/9").error == (404, "Could not find version 9 of model two")
    large = rest.rest(f"{TWO}/versions/99999999999999999999")
    assert large.error == (400, "Failed to convert version: 99999999999999999999 to numeric.")


def test_metadata(rest: Server) -> None:
    for path, version in ((TWO, "2"), (f"{TWO}/versions/1", "1"), (f"{TWO}/labels/old", "1")):
        metadata = rest.rest(f"{path}/metadata").json
        assert list(metadata) == ["model_spec", "metadata"]
        assert metadata["model_spec"] == {"name": "two", "signature_name": "", "version": version}
        assert list(metadata["metadata"]) == ["signature_def"]
        assert list(metadata["metadata"]["signature_def"]) == ["signature_def"]  # and no @type
        regress = metadata["metadata"]["signature_def"]["signature_def"]["regress_x_to_y"]
        assert regress["method_name"] == "tensorflow/serving/regress"
        assert regress["inputs"]["inputs"] == {
            "dtype": "DT_STRING",
            "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False},
            "name": "tf_example:0",
        }
    assert rest.rest("/v1/models/m/metadata").error[0] == 404


MALFORMED = [
    ("POST", TWO),
    ("POST", f"{TWO}/metadata"),
    ("POST", f"{TWO}:run"),
    ("POST", f"{TWO}/versions/1"),
    ("POST", f"{TWO}/versions/x:predict"),
    ("POST", f"{TWO}/versions/-1:predict"),
    ("POST", f"{TWO}/versions/1/labels/old:predict"),
    ("GET", f"{TWO}:predict"),
    ("GET", f"{TWO}/versions/"),
    ("GET", f"{TWO}/versions/x"),
    ("GET", f"{TWO}/nothing"),
    ("GET", f"{TWO}/metadata/more"),
    ("GET", "/v1"),
    ("GET", "/v1/"),
    ("GET", "/v1/model/two"),
    ("PUT", f"{TWO}:predict"),
    ("DELETE", TWO),
    ("PATCH", TWO),
    ("OPTIONS", TWO),
    ("STARE", TWO),
]


@pytest.mark.parametrize(("method", "path"), MALFORMED)
def test_malformed_requests(rest: Server, method: str, path: str) -> None:
    assert rest.rest(path, method=method).error == (400, f"Malformed request: {method} {path}")


def test_paths_without_a_model(rest: Server) -> None:
    assert rest.rest("/v1/models").error == (400, "Missing model name in request.")
    for path in ("/v1/models/", "/v1/models//versions/1"):
        assert rest.rest(path).error == (400, f"Malformed request: GET {path}")
    assert rest.rest("/v1/models/t%77o").status == 200
    for path in ("/", "/v2/models/two", "/favicon.ico"):
        assert rest.rest(path).status == 404


def test_a_query_is_not_part_of_the_path(rest: Server) -> None:
    assert rest.rest(f"{TWO}?x=:predict").status == 200


# ---- health and metrics ----


def test_health_paths(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    saved_models.publish(exported / "half_plus_1", tmp_path / "here", 1)
    config = config_list(model_config("here", tmp_path / "here"), model_config("later", tmp_path / "later"))
    (tmp_path / "models.config").write_text(str(config))
    flags = [f"--model_config_file={tmp_path / 'models.config'}"]
    with serving(tmp_path, *flags, port=free_port(), rest_port=free_port(), wait=False) as running:
        eventually(lambda: "loaded model here" in running.log.read_text(), "one model is there")
        assert (running.rest("/healthz").status, running.rest("/healthz").text) == (200, "ok\n")
        assert running.rest("/readyz").status == 503
        assert running.rest("/v1/models/later:predict", "{}").status == 503
        (tmp_path / "later").mkdir()
        saved_models.publish(exported / "half_plus_2", tmp_path / "later", 1)
        eventually(lambda: running.rest("/readyz").status == 200, "all models are there")
        assert running.rest("/v1/models/later:predict", {"instances": [2]}).json == {"predictions": [3.0]}


def metrics(server: Server, path: str = METRICS) -> dict[str, float]:
    """Each line of the metrics; what they say about themselves is checked on the way."""
    reply = server.rest(path)
    assert reply.status == 200
    assert reply.headers["Content-Type"].startswith("text/plain")
    values, kinds = {}, {}
    for line in reply.text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert kind in ("counter", "gauge", "histogram") and name not in kinds
            kinds[name] = kind
            continue
        match = re.fullmatch(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{(?:[a-zA-Z_]\w*="(?:[^"\\]|\\.)*",?)*\})? (\S+)', line)
        assert match, line
        name = match[1]
        family = name if name in kinds else re.sub("_(bucket|sum|count)$", "", name)
        assert family in kinds, line  # its type comes first
        assert match[1] + (match[2] or "") not in values
        values[match[1] + (match[2] or "")] = float(match[3])
    return values


def test_metrics(rest: Server) -> None:
    before = metrics(rest)
    assert rest.rest(SIG, {"instances": [1]}).status == 200
    assert rest.rest(SIG, {"instances": ["a"]}).status == 400
    assert rest.rest("/v1/models/nobody:predict", {"instances": ["a"]}).status == 404
    rest.predict(predict_request(name="sig"))
    body = {"signature_name": "regress_x_to_y", "examples": [{"x": 2.5}] * 3}
    assert rest.rest(f"{TWO}:regress", body).status == 200
    rest.prediction.MultiInference(
        multi_request(input_of(2, 4), (REGRESS, "regress_x_to_y"), model="two"), timeout=PATIENCE_S
    )
    after = metrics(rest)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    prefix = ":tensorflow:serving:"
    assert grown(prefix + 'request_count{model_name="sig",status="OK"}') == 2
    assert grown(prefix + 'request_count{model_name="sig",status="INVALID_ARGUMENT"}') == 1
    assert not [name for name in after if "nobody" in name]
    for entrypoint in ("REST", "GRPC"):
        api = "predict" if entrypoint == "REST" else "Predict"
        labels = f'model_name="sig",API="{api}",entrypoint="{entrypoint}"'
        assert grown(f"{prefix}request_latency_count{{{labels}}}") == 1  # only what succeeded
        limits = [
            float(limit)
            for name in after
            for limit in re.findall(re.escape(f"{prefix}request_latency_bucket{{{labels},le=") + '"(.*)"', name)
        ]
        assert limits[:2] == [10, 18] and limits[-1] == math.inf
        assert len(limits) == 34
        assert (
            after[f'{prefix}request_latency_bucket{{{labels},le="+Inf"}}']
            == after[f"{prefix}request_latency_count{{{labels}}}"]
        )
    assert grown(prefix + 'runtime_latency_count{model_name="sig",API="Predict",runtime="TF1"}') == 2
    # Only MultiInference counts examples.
    assert grown(prefix + 'request_example_counts_sum{model="two"}') == 2
    assert grown(prefix + 'request_example_count_total{model="two"}') == 2
    assert grown(":dpsr:serving:queueing_latency_count") >= 3
    for state in ("running", "waiting"):
        eventually(lambda state=state: metrics(rest)[f":dpsr:serving:requests_{state}"] == 0, f"none is {state}")
    assert ':dpsr:serving:version_memory_bytes{model_name="sig",version="7"}' in after


def test_metrics_of_versions_that_are_gone_are_gone(exported: Path, base_path: Path, tmp_path: Path) -> None:
    (tmp_path / "monitoring.config").write_text("prometheus_config { enable: true }")
    flags = [f"--model_base_path={base_path}", f"--monitoring_config_file={tmp_path / 'monitoring.config'}"]
    for version in (1, 2):
        shutil.copytree(exported / "half_plus_1", tmp_path / str(version))
        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.CopyFrom(predict_request())
        saved_models.write_warmup(tmp_path / str(version), log.SerializeToString())
    saved_models.publish(tmp_path / "1", base_path, 1)
    with serving(tmp_path, *flags, rest_port=free_port()) as running:

        def shown(version: int) -> set[str]:
            ends = (f',version="{version}"', f'model_path="{base_path / str(version)}"')
            return {name.partition("{")[0] for name in metrics(running) if any(end in name for end in ends)}

        names = shown(1)
        assert {":dpsr:serving:version_memory_bytes", ":tensorflow:cc:saved_model:load_attempt_count"} <= names
        saved_models.publish(tmp_path / "2", base_path, 2)
        eventually(lambda: shown(2) == names and not shown(1), "only the new version has metrics")


def test_metrics_elsewhere_or_nowhere(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    config = tmp_path / "monitoring.config"
    flags = [f"--model_base_path={base_path}", f"--monitoring_config_file={config}"]
    config.write_text('prometheus_config { enable: true path: "/numbers" }')
    with serving(tmp_path, *flags, rest_port=free_port()) as running:
        assert metrics(running, "/numbers")
        assert running.rest(METRICS).status == 404
        assert running.rest("/numbers", "x").status == 405
    config.write_text("prometheus_config { enable: false }")
    with serving(tmp_path, *flags, rest_port=free_port()) as running:
        assert running.rest(METRICS).status == 404


# ---- HTTP ----


@contextlib.contextmanager
def connection(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.rest_port), timeout=PATIENCE_S) as client:
        yield client


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def exchange(client: socket.socket, data: bytes) -> bytes:
    """Sends data that the server may refuse before it has read all of it, and returns the answer.

    A server that closes a connection with bytes unread resets it: the rest cannot be sent then, and what has been
    answered is followed by an error instead of the end.
    """
    client.settimeout(PATIENCE_S)
    with contextlib.suppress(ConnectionError):
        client.sendall(data)
    pieces: list[bytes] = []
    with contextlib.suppress(ConnectionError):
        pieces.extend(iter(lambda: client.recv(1 << 16), b""))
    return b"".join(pieces)


def post(body: bytes, path: str = SIG, extra: str = "", version: str = "1.1") -> bytes:
    head = f"POST {path} HTTP/{version}\r\nHost: h\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


def test_pipelined_requests_are_answered_in_order(rest: Server) -> None:
    count = 50
    requests = [post(json.dumps({"instances": [i]}).encode()) for i in range(count - 1)]
    requests.append(post(b'{"instances": [1000]}', extra="Connection: close\r\n"))
    with connection(rest) as client:
        client.sendall(b"".join(requests))
        text = read_all(client)
    answers = [json.loads(part)["predictions"][0] for part in re.findall(rb"\r\n\r\n(\{.*?\})", text, re.DOTALL)]
    assert answers == [i / 2 for i in range(count - 1)] + [500]


def test_a_request_in_small_pieces(rest: Server) -> None:
    message = post(b'{"instances": [4]}', extra="Connection: close\r\n")
    with connection(rest) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(message)):
            client.sendall(message[i : i + 1])
        assert read_all(client).endswith(b'{"predictions":[2.0]}')


def test_chunked_bodies_and_old_clients(rest: Server) -> None:
    chunked = f"POST {SIG} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with connection(rest) as client:
        client.sendall(chunked.encode() + b'5\r\n{"ins\r\nd\r\ntances": [4]}\r\n0\r\n\r\n')
        assert read_all(client).endswith(b'{"predictions":[2.0]}')
    with connection(rest) as client:
        client.sendall(post(b'{"instances": [4]}', version="1.0"))
        assert read_all(client).endswith(b'{"predictions":[2.0]}')  # and closes by itself


def test_a_client_that_waits_for_a_word(rest: Server) -> None:
    body = b'{"instances": [4]}'
    head = post(body, extra="Expect: 100-continue\r\nConnection: close\r\n")[: -len(body)]
    with connection(rest) as client:
        client.sendall(head)
        assert client.recv(1 << 10) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert read_all(client).endswith(b'{"predictions":[2.0]}')


def test_head_has_no_body(rest: Server) -> None:
    with connection(rest) as client:
        client.sendall(b"HEAD /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        text = read_all(client)
    assert text.count(b"ok\n") == 1 and text.count(b"HTTP/1.1 200 OK") == 2
    assert text.count(b"Content-Length: 3") == 2


BAD_HTTP = {
    "garbage": bytes(range(256)) * 4,
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
    "gRPC": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"GET /healthz\r\n\r\n",
    "bad header": b"GET /healthz HTTP/1.1\r\nno colon\r\n\r\n",
    "bad length": b"POST /v1/models/sig:predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"POST /v1/models/sig:predict HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "huge length": b"POST /v1/models/sig:predict HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "bad chunk": b"POST /v1/models/sig:predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "long header": b"GET /healthz HTTP/1.1\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": b"GET /healthz HTTP/1.1\r\n" + b"A: a\r\n" * 20_000 + b"\r\n",
    "long path": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("case", BAD_HTTP)
def test_bad_http_is_answered_and_closed(rest: Server, case: str) -> None:
    with connection(rest) as client:
        text = exchange(client, BAD_HTTP[case])
    assert text.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":"not an HTTP request: ' in text
    assert rest.rest("/healthz").status == 200


def test_a_body_beyond_the_limit_is_refused_before_it_comes(rest: Server) -> None:
    head = f"POST {SIG} HTTP/1.1\r\nHost: h\r\nContent-Length: {2 << 30}\r\n\r\n"
    with connection(rest) as client:
        text = exchange(client, head.encode())
    assert text.startswith(b"HTTP/1.1 413 ") and b"too large" in text


def test_a_large_body(rest: Server) -> None:
    values = list(range(1 << 20))
    got = rest.rest(SIG, {"inputs": values}).json["outputs"]
    assert got[:3] == [0.0, 0.5, 1.0] and len(got) == len(values)


def test_clients_that_never_finish_hold_nobody_up(rest: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connection(rest)) for _ in range(200)]
        for i, client in enumerate(clients):
            message = post(b'{"instances": [4]}')
            client.sendall(message[: i % len(message)])
        for _ in range(20):
            assert rest.rest(SIG, {"instances": [1]}).status == 200


def test_mutated_requests_never_end_the_server(rest: Server) -> None:
    rng = np.random.default_rng(8)
    seeds = [post(json.dumps({"signature_name": "pair", "inputs": {"a": [1, 2], "b": [3, 4]}}).encode())]
    seeds.append(post(b'{"instances": [{"b64": "YWI="}], "signature_name": "text"}'))
    seeds.append(post(b'{"examples": [{"x": 2.5}], "signature_name": "regress_x_to_y"}', path=f"{TWO}:regress"))
    for _ in range(400):
        message = bytearray(seeds[rng.integers(len(seeds))])
        for _ in range(rng.integers(1, 5)):
            message[rng.integers(len(message))] = rng.integers(256)
        with connection(rest) as client:
            text = b""
            try:
                client.sendall(message)
                client.shutdown(socket.SHUT_WR)
                text = read_all(client)
            except TimeoutError:
                raise
            except OSError:
                pass  # the server may close the connection first
            assert text == b"" or text.startswith(b"HTTP/1.")
    assert rest.rest(SIG, {"instances": [1]}).status == 200
    assert rest.process.poll() is None


def test_cors_where_asked(exported: Path, base_path: Path, tmp_path: Path, rest: Server) -> None:
    assert rest.rest(SIG, {"instances": [1]}).headers["Access-Control-Allow-Origin"] is None
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    flags = [f"--model_base_path={base_path}", "--rest_api_enable_cors_support"]
    with serving(tmp_path, *flags, rest_port=free_port()) as running:
        preflight = running.rest("/v1/models/default:predict", method="OPTIONS", headers={"Origin": "http://h"})
        assert preflight.status == 200
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert "Content-Type" in preflight.headers["Access-Control-Allow-Headers"]
        reply = running.rest("/v1/models/default:predict", {"instances": [2]}, headers={"Origin": "http://h"})
        assert reply.json == {"predictions": [2.0]}
        assert reply.headers["Access-Control-Allow-Origin"] == "*"


# ---- limits, start and stop ----


def test_time_limit_and_full_queue(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "signatures", base_path, 1)
    (tmp_path / "monitoring.config").write_text("prometheus_config { enable: true }")
    flags = ["--grpc_max_threads=1", "--rest_api_num_threads=1", "--max_queued_requests=1"]
    flags.append(f"--monitoring_config_file={tmp_path / 'monitoring.config'}")
    with serving(
        tmp_path, f"--model_base_path={base_path}", *flags, "--rest_api_timeout_in_ms=1000", rest_port=free_port()
    ) as running:
        # One request runs, one may wait, and others are refused at once.
        held, release = held_request(running, tmp_path)
        asked = [running.prediction.Predict.future(predict_request(), timeout=PATIENCE_S) for _ in range(3)]
        eventually(lambda: sum(call.done() for call in asked) == 2, "two are refused")
        refusals = ':tensorflow:serving:request_count{model_name="default",status="RESOURCE_EXHAUSTED"}'
        assert metrics(running)[refusals] == 2
        for call in asked:
            if call.done():
                code, message = error_of(call.result)
                assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "--max_queued_requests" in message
        # The same over REST, where the running and the waiting request exceed their time limit in the end.
        path = "/v1/models/default:predict"
        gate = {name: str(tmp_path / f"rest_{name}") for name in ("begun", "release")}
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            late = [threads.submit(running.rest, path, {"signature_name": "gate", "inputs": gate})]
            eventually(Path(gate["begun"]).exists, "the request runs")
            replies = [threads.submit(running.rest, path, {"instances": [1]}) for _ in range(3)]
            eventually(lambda: sum(reply.done() for reply in replies) == 2, "two are refused")
            late += [reply for reply in replies if not reply.done()]
            refused = [reply.result() for reply in replies if reply not in late]
            assert [reply.status for reply in refused] == [429, 429]
            assert "--max_queued_requests" in refused[0].text
            assert metrics(running)[refusals] == 4
            time.sleep(1.2)  # longer than the time limit of both, which began when they arrived
            Path(gate["release"]).touch()
            assert [reply.result().status for reply in late] == [504, 504]
        release.touch()
        assert held.result().outputs["turns"].int64_val[0] >= 0
        eventually(lambda: running.rest(path, {"instances": [1]}).status == 200, "it answers in time again")


def test_the_grpc_port_cannot_be_the_rest_port(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    port = free_port()
    with serving(tmp_path, f"--model_base_path={base_path}", port=port, rest_port=port) as running:
        assert running.states() == {1: State.AVAILABLE}
        assert "is the gRPC port" in running.log.read_text()


def test_sigterm_lets_a_rest_request_end(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "signatures", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", rest_port=free_port()) as running:
        begun, release = tmp_path / "begun", tmp_path / "release"
        path = "/v1/models/default:predict"
        body = {"signature_name": "gate", "inputs": {"begun": str(begun), "release": str(release)}}
        with connection(running) as idle, concurrent.futures.ThreadPoolExecutor(1) as thread:
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
            assert idle.recv(1 << 10).startswith(b"HTTP/1.1 200")
            held = thread.submit(running.rest, path, body)
            eventually(begun.exists, "the request runs")
            running.process.send_signal(signal.SIGTERM)

            def refused() -> bool:
                try:
                    running.rest("/healthz")
                except ConnectionError:
                    return True
                return False

            eventually(refused, "new connections are refused")
            # A connection that was open takes no new request either.
            with contextlib.suppress(ConnectionError):
                idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
                assert idle.recv(1 << 10) == b""
            assert not held.done()
            release.touch()
            reply = held.result()
            assert reply.status == 200 and reply.json["outputs"] >= 0
            assert reply.headers["Connection"] == "close"
        assert running.process.wait(PATIENCE_S) == 0


def test_swaps_under_rest_load_fail_no_request(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", rest_port=free_port()) as running:
        done = False
        answers: set[float] = set()

        def load() -> None:
            while not done:
                reply = running.rest("/v1/models/default:predict", {"instances": [2]})
                assert reply.status == 200, reply.text
                answers.add(reply.json["predictions"][0])

        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            clients = [threads.submit(load) for _ in range(3)]
            try:
                for version in (1, 2, 3, 4):
                    if version > 1:
                        saved_models.publish(exported / f"half_plus_{version}", base_path, version)
                        eventually(lambda: running.states().get(version) == State.AVAILABLE, "it serves")  # noqa: B023
                        eventually(lambda: running.states()[version - 1] == State.END, "the old one ends")  # noqa: B023
                    eventually(
                        lambda: 1.0 + version in answers or any(client.done() for client in clients),  # noqa: B023
                        "clients see it",
                    )
            finally:
                done = True
            for client in clients:
                client.result()  # raises what went wrong
        assert answers == {2.0, 3.0, 4.0, 5.0}


def test_a_server_out_of_files_goes_on_when_it_has_some_again(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", rest_port=free_port()) as running:
        pid = running.process.pid
        used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 3, used + 3))

        def cpu_s() -> float:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / 100

        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(connection(running))
            before = cpu_s()
            time.sleep(1)
            assert cpu_s() - before < 0.5  # CPU seconds: the server does not busy-wait
        eventually(lambda: running.rest("/healthz").status == 200, "it answers again")
