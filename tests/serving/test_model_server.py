"""The model server, as a client of TensorFlow Serving sees it: Predict, hostile requests, start and stop."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import socket
import subprocess
from pathlib import Path

import grpc
import model_servers
import numpy as np
import pytest
import saved_models
import tensorflow as tf
from model_servers import (
    INVALID,
    Server,
    State,
    error_of,
    eventually,
    failing_start,
    gate_request,
    held_request,
    predict_request,
    serving,
)
from processes import PATIENCE_S, free_port
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import get_model_status_pb2, predict_pb2, prediction_service_pb2_grpc

# ---- Predict ----


def test_predict_answers_with_resolved_signature_and_version(server: Server) -> None:
    response = server.predict(predict_request())
    assert response.model_spec.name == "default"
    assert response.model_spec.signature_name == "serving_default"
    assert response.model_spec.version.value == 7
    assert list(response.outputs) == ["y"]
    assert list(response.outputs["y"].float_val) == [0.5, 1.0]  # typed fields, not tensor_content
    assert not response.outputs["y"].tensor_content
    assert server.predict(predict_request(version=7)) == response


def test_predict_runs_the_signature_that_is_asked_for(server: Server) -> None:
    response = server.predict(predict_request("pair", {"a": np.float32([1, 2]), "b": np.int64([3, 4])}))
    assert response.model_spec.signature_name == "pair"
    outputs = {key: tf.make_ndarray(value).tolist() for key, value in response.outputs.items()}
    assert outputs == {"a": [1, 2], "b": [3, 4], "sum": [4, 6]}

    text = server.predict(predict_request("text", {"text": [b"", b"\xff\x00", "三".encode()]}))
    assert list(text.outputs["doubled"].string_val) == [b"", b"\xff\x00\xff\x00", "三三".encode()]
    assert list(text.outputs["bytes"].int_val) == [0, 2, 3]


@pytest.mark.parametrize("shape", [[0], [1], [2, 2]])
def test_a_shape_unlike_the_placeholders_is_accepted_where_the_graph_computes(server: Server, shape: list[int]) -> None:
    response = server.predict(predict_request(inputs={"x": np.ones(shape, np.float32)}))
    np.testing.assert_array_equal(tf.make_ndarray(response.outputs["y"]), np.full(shape, 0.5, np.float32))


def test_inputs_may_be_typed_fields_raw_bytes_or_a_repeated_value(server: Server) -> None:
    raw = tensor_pb2.TensorProto(dtype=tf.float32.as_datatype_enum, tensor_content=np.float32([2, 4]).tobytes())
    raw.tensor_shape.dim.add(size=2)
    assert list(server.predict(predict_request(inputs={"x": raw})).outputs["y"].float_val) == [1, 2]
    repeated = tensor_pb2.TensorProto(dtype=tf.float32.as_datatype_enum, float_val=[2])
    repeated.tensor_shape.dim.add(size=3)
    assert list(server.predict(predict_request(inputs={"x": repeated})).outputs["y"].float_val) == [1, 1, 1]


def test_output_filter_keeps_what_is_asked_for(server: Server) -> None:
    request = predict_request("pair", {"a": np.float32([1]), "b": np.int64([3])})
    request.output_filter.extend(["sum", "b"])
    assert sorted(server.predict(request).outputs) == ["b", "sum"]


def test_output_filters_beyond_those_that_the_session_keeps(server: Server) -> None:
    aliases = [f"y{i}" for i in range(8)]
    for subset in range(1, 2**8):
        wanted = {alias: float(i) for i, alias in enumerate(aliases) if subset >> i & 1}
        request = predict_request("many", {"x": np.float32(0)})
        request.output_filter.extend(reversed(wanted))
        outputs = server.predict(request).outputs
        assert {alias: tensor.float_val[0] for alias, tensor in outputs.items()} == wanted


def test_messages_beyond_grpcs_default_limit(server: Server) -> None:
    values = np.arange(4 << 20, dtype=np.float32)  # 16 MiB
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        response = stub.Predict(predict_request(inputs={"x": values}), timeout=PATIENCE_S)
    np.testing.assert_array_equal(tf.make_ndarray(response.outputs["y"]), values / 2)


def test_an_answer_too_large_for_a_message_is_an_error(server: Server) -> None:
    code, message = error_of(lambda: server.predict(predict_request("negatives", {"n": np.int64(2**31)})))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2147483647" in message


def test_tensor_content_on_request(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_2", base_path, 1)
    flags = [f"--model_base_path={base_path}", "--enable_serialization_as_tensor_content"]
    with serving(tmp_path, *flags) as running:
        output = running.predict(predict_request()).outputs["y"]
        assert not output.float_val
        assert np.frombuffer(output.tensor_content, np.float32).tolist() == [2.5, 3.0]


def spec(**fields: object) -> predict_pb2.PredictRequest:
    request = predict_request()
    request.ClearField("model_spec")
    label = fields.pop("version_label", None)
    for key, value in fields.items():
        setattr(request.model_spec, key, value)
    if label:
        request.model_spec.version_label = str(label)
    return request


def test_an_input_that_is_left_out_gets_its_default(server: Server) -> None:
    for given, total in (({"b": np.int64([3, 4])}, [4, 6]), ({}, [8, 9])):
        response = server.predict(predict_request("defaulted", {"a": np.float32([1, 2])} | given))
        assert tf.make_ndarray(response.outputs["sum"]).tolist() == total


def filtered(*outputs: str) -> predict_pb2.PredictRequest:
    request = predict_request("pair", {"a": np.float32([1]), "b": np.int64([3])})
    request.output_filter.extend(outputs)
    return request


ERRORS = {
    "no model spec": (spec(), INVALID, "Missing ModelSpec"),
    "no name": (spec(signature_name="s"), INVALID, "ModelSpec has no name specified."),
    "unknown model": (
        predict_request(name="m"),
        grpc.StatusCode.NOT_FOUND,
        "Servable not found for request: Latest(m)",
    ),
    "unknown version": (
        predict_request(version=8),
        grpc.StatusCode.NOT_FOUND,
        "Servable not found for request: Specific(default, 8)",
    ),
    "unknown label": (
        spec(name="default", version_label="canary"),
        INVALID,
        "Unrecognized servable version label: canary",
    ),
    "unknown signature": (
        predict_request("s"),
        grpc.StatusCode.FAILED_PRECONDITION,
        'Serving signature key "s" not found.',
    ),
    "too few inputs": (
        predict_request("pair", {"a": np.float32([1])}),
        INVALID,
        "input size does not match signature: 1!=2 len({a}) != len({a,b}). Sent extra: {}. Missing but required: {b}.",
    ),
    "too many inputs": (
        predict_request(inputs={"x": np.float32([1]), "z": np.float32([1]), "u": np.float32([1])}),
        INVALID,
        "input size does not match signature: 3!=1 len({u,x,z}) != len({x}). Sent extra: {u,z}. "
        "Missing but required: {}.",
    ),
    "wrong input name": (
        predict_request(inputs={"z": np.float32([1])}),
        INVALID,
        "Signature input alias: x(feed name: serving_default_x:0) not found in request and no default value provided. "
        "Inputs expected to be in the request {z}, or default input alias set: ",
    ),
    "an input without a default is missing": (
        predict_request("defaulted", {"b": np.int64([1])}),
        INVALID,
        "Signature input alias: a(feed name: pair_a:0) not found in request and no default value provided. "
        "Inputs expected to be in the request {b}, or default input alias set: b",
    ),
    "an unknown input beside a missing one": (
        predict_request("defaulted", {"a": np.float32([1]), "B": np.int64([1])}),
        INVALID,
        "input size does not match signature: 2!=2 len({B,a}) != len({a,b}). Sent extra: {B}. "
        "Missing but required: {}.",
    ),
    "wrong dtype": (
        predict_request(inputs={"x": np.int32([1])}),
        INVALID,
        "Expects arg[0] to be float but int32 is provided",
    ),
    "wrong dtype of the second": (
        predict_request("pair", {"a": np.float32([1]), "b": np.float64([1])}),
        INVALID,
        "Expects arg[1] to be int64 but double is provided",
    ),
    "unknown output": (
        filtered("sum", "z"),
        INVALID,
        "output tensor alias not found in signature: z Outputs expected to be in the set {a,b,sum}.",
    ),
    "repeated output": (filtered("sum", "sum"), INVALID, "duplicate output tensor alias: sum"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_tensorflow_servings(server: Server, case: str) -> None:
    request, code, message = ERRORS[case]
    assert error_of(lambda: server.predict(request)) == (code, message)


def test_shapes_that_do_not_go_together_are_the_clients_error(server: Server) -> None:
    request = predict_request("pair", {"a": np.ones(2, np.float32), "b": np.ones(3, np.int64)})
    assert error_of(lambda: server.predict(request))[0] == INVALID


def test_long_error_texts_are_cut(server: Server) -> None:
    code, message = error_of(lambda: server.predict(predict_request("fail", {"message": b"x" * 5000})))
    assert code == INVALID
    assert message.endswith("x...TRUNCATED")
    assert len(message) == 1024 + len("...TRUNCATED")


# ---- requests that no client should send ----


def tensor(dtype: tf.DType = tf.float32, shape: tuple[int, ...] = (), **fields: object) -> tensor_pb2.TensorProto:
    proto = tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum, **fields)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    return proto


GARBAGE = {
    "empty": tensor_pb2.TensorProto(),
    "dtype that does not exist": tensor_pb2.TensorProto(dtype=4711, float_val=[1]),
    "reference dtype": tensor_pb2.TensorProto(dtype=101, float_val=[1]),
    "negative dimension": tensor(shape=(-1,), float_val=[1]),
    "smallest dimension": tensor(shape=(-(2**63),), float_val=[1]),
    "terabytes claimed": tensor(shape=(2**40,), float_val=[1]),
    "gigabytes claimed": tensor(shape=(2**28,), float_val=[1]),
    "gigabytes of nothing": tensor(shape=(2**28,)),
    "overflow": tensor(shape=(2**62, 2**62), float_val=[1]),
    "overflow to zero": tensor(shape=(2**32, 2**32), float_val=[1]),
    "300 dimensions": tensor(shape=(1,) * 300, float_val=[1]),
    "raw bytes too short": tensor(shape=(4,), tensor_content=b"123"),
    "raw bytes too long": tensor(shape=(1,), tensor_content=b"12345678"),
    "raw bytes claimed": tensor(shape=(2**40,), tensor_content=b"1234"),
    "strings claimed": tensor(tf.string, shape=(2**40,), string_val=[b"a"]),
    "a long string repeated": tensor(tf.string, shape=(2**16,), string_val=[b"a" * 2**20]),
    "string lengths claimed": tensor(tf.string, shape=(2,), tensor_content=b"\xff\xff\xff\xff\x0f\x01ab"),
    "resource": tensor(tf.resource, shape=(1,)),
    "variant": tensor(tf.variant, shape=(1,)),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_a_garbage_tensor_is_an_error_and_no_more(server: Server, case: str) -> None:
    for key, signature in (("x", ""), ("text", "text")):
        code, message = error_of(lambda: server.predict(predict_request(signature, {key: GARBAGE[case]})))  # noqa: B023
        assert code == INVALID
        assert message.startswith((f"tensor parsing error: {key}", "Expects arg[0] to be "))
    assert list(server.predict(predict_request()).outputs["y"].float_val) == [0.5, 1.0]
    assert server.process.poll() is None


def test_an_oversized_claim_is_explained(server: Server) -> None:
    code, message = error_of(lambda: server.predict(predict_request(inputs={"x": GARBAGE["gigabytes claimed"]})))
    assert code == INVALID
    assert message.startswith("tensor parsing error: x: the shape [268435456] of float needs more than 67108864 bytes")


def test_mutated_messages_never_end_the_server(server: Server) -> None:
    call = server.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    rng = random.Random(20)
    seeds = [
        predict_request().SerializeToString(),
        predict_request("text", {"text": [b"ab", b"c"]}).SerializeToString(),
        predict_request("pair", {"a": np.float32([1]), "b": np.int64([3])}).SerializeToString(),
    ]
    outcomes = set()
    for _ in range(1500):
        message = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            message[rng.randrange(len(message))] = rng.randrange(256)
        try:
            call(bytes(message), timeout=PATIENCE_S)
            outcomes.add(grpc.StatusCode.OK)
        except grpc.RpcError as error:
            outcomes.add(error.code())
    assert INVALID in outcomes and grpc.StatusCode.NOT_FOUND in outcomes  # the mutations reach different depths
    assert not outcomes & {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert "protobuf" not in server.log.read_text()  # which would say a line of each text that is no UTF-8
    assert list(server.predict(predict_request()).outputs["y"].float_val) == [0.5, 1.0]


def test_rpcs_that_are_not_served(server: Server) -> None:
    for path in ("PredictionService/PredictStreamed", "SessionService/SessionRun", "PredictionService/Nothing"):
        call = server.channel.unary_unary(f"/tensorflow.serving.{path}")
        assert error_of(lambda: call(b"", timeout=PATIENCE_S))[0] == grpc.StatusCode.UNIMPLEMENTED  # noqa: B023


# ---- deadlines ----


def test_a_request_beyond_its_deadline_fails_and_the_server_goes_on(server: Server, tmp_path: Path) -> None:
    request, begun, release = gate_request(tmp_path)
    try:
        call = server.prediction.Predict.future(request, timeout=PATIENCE_S)
        eventually(begun.exists, "the request runs")
        code, _ = error_of(lambda: server.predict(request, timeout=0.2))
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert list(server.predict(predict_request()).outputs["y"].float_val) == [0.5, 1.0]
    finally:
        release.touch()
    assert call.result().outputs["turns"].int64_val[0] >= 0


def test_requests_beyond_the_threads_wait_their_turn(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "signatures", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", "--grpc_max_threads=1") as running:
        first, release = held_request(running, tmp_path)
        assert error_of(lambda: running.predict(predict_request(), timeout=0.2))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
        second = running.prediction.Predict.future(predict_request(), timeout=PATIENCE_S)
        assert running.states() == {1: State.AVAILABLE}  # answered beside the busy thread
        release.touch()
        assert first.result().outputs["turns"].int64_val[0] >= 0
        assert list(second.result().outputs["y"].float_val) == [0.5, 1.0]


# ---- GetModelStatus ----


def test_model_status(server: Server) -> None:
    assert server.states() == {7: State.AVAILABLE}
    request = get_model_status_pb2.GetModelStatusRequest()
    missing = error_of(lambda: server.model.GetModelStatus(request, timeout=PATIENCE_S))
    assert missing == (INVALID, "Missing ModelSpec")
    request.model_spec.name = "m"
    unknown = error_of(lambda: server.model.GetModelStatus(request, timeout=PATIENCE_S))
    assert unknown == (grpc.StatusCode.NOT_FOUND, "Could not find any versions of model m")
    request.model_spec.name = "default"
    request.model_spec.version.value = 8
    no_version = error_of(lambda: server.model.GetModelStatus(request, timeout=PATIENCE_S))
    assert no_version == (grpc.StatusCode.NOT_FOUND, "Could not find version 8 of model default")
    request.model_spec.version_label = "canary"  # ignored: every version is listed
    assert len(server.model.GetModelStatus(request, timeout=PATIENCE_S).model_version_status) == 1


# ---- start and stop ----


def test_a_missing_base_path_is_waited_for(exported: Path, tmp_path: Path) -> None:
    base_path = tmp_path / "later" / "model"
    with serving(tmp_path, f"--model_base_path={base_path}", port=free_port(), wait=False) as running:
        eventually(lambda: "cannot read the base path" in running.log.read_text(), "a warning")
        code, message = error_of(lambda: running.predict(predict_request()))
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "starting" in message
        base_path.mkdir(parents=True)
        eventually(lambda: "no versions of model default" in running.log.read_text(), "another warning")
        saved_models.publish(exported / "half_plus_2", base_path, 1)
        running.wait_until_ready()
        assert list(running.predict(predict_request()).outputs["y"].float_val) == [2.5, 3.0]


def test_a_signal_ends_a_server_that_waits_for_its_model(tmp_path: Path) -> None:
    with serving(tmp_path, f"--model_base_path={tmp_path / 'never'}", wait=False) as running:
        eventually(lambda: "cannot read the base path" in running.log.read_text(), "a warning")
        assert running.stop() == 0


def test_sigterm_lets_running_requests_end(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "signatures", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}") as running:
        held, release = held_request(running, tmp_path)
        running.process.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping" in running.log.read_text(), "the server stops")

        def refused() -> bool:
            with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
                stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
                try:
                    stub.Predict(predict_request(), timeout=PATIENCE_S)
                except grpc.RpcError as error:
                    return error.code() == grpc.StatusCode.UNAVAILABLE
            return False

        eventually(refused, "new requests are refused")
        assert not held.done()
        release.touch()
        assert held.result().outputs["turns"].int64_val[0] >= 0
        assert running.process.wait(PATIENCE_S) == 0
        assert "unloaded model default version 1" in running.log.read_text()


def test_a_log_that_nobody_reads_does_not_end_the_server(exported: Path, base_path: Path) -> None:
    """As when Ctrl-C ends `tee`, which the log goes to, before the server has let its requests end."""
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    command = [str(model_servers.BINARY), "--port=0", f"--model_base_path={base_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline().startswith(model_servers.READY.encode())
            process.stderr.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_sigint_ends_it_too_and_its_log_is_its_own(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", "--rest_api_portt=1", "-v") as running:
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(PATIENCE_S) == 0
        lines = running.log.read_text().splitlines()
        assert [line for line in lines if " model_server: " not in line] == [
            "unknown argument ignored: --rest_api_portt=1",
            "unknown argument ignored: -v",
        ]


def test_a_port_in_use_is_one_clear_line(server: Server, tmp_path: Path) -> None:
    status, error = failing_start(f"--port={server.port}", f"--model_base_path={tmp_path}")
    assert status == 1
    (line,) = error.splitlines()
    assert line.startswith("Failed to start server. Error: ")
    assert f"127.0.0.1:{server.port}: Address already in use" in line
    assert "--port" in line


def test_a_first_version_that_fails_ends_the_start(base_path: Path, tmp_path: Path) -> None:
    saved_models.write_unknown_op(base_path / "3", "OpOfNobody")
    status, error = failing_start("--port=0", f"--model_base_path={base_path}", "--model_name=shop")
    assert status == 1
    line = next(line for line in error.splitlines() if line.startswith("Failed to start server. Error: "))
    assert "1 model(s) did not become available: {{name: shop version: 3} due to error: " in line
    assert "model shop version 3 needs the op OpOfNobody" in line
    assert "--op_library=" in line


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        ([], 1, "Failed to start server. Error: no model to serve; give the folder of its versions with "),
        (["--model_base_path=m"], 1, "Expected model default to have an absolute path or URI; got base_path()=m"),
        (["--model_base_path=/m", "--op_library=/no/lib.so"], 1, "--op_library: cannot load /no/lib.so: "),
        (["--model_base_path=/m", "--port=http"], 2, 'flag --port: got "--port=http", expected an integer from 0 to '),
        (["--grpc_max_threads"], 2, "expected --grpc_max_threads=VALUE"),
    ],
)
def test_bad_usage(arguments: list[str], status: int, error: str) -> None:
    code, text = failing_start(*arguments)
    assert code == status
    assert error in text


def test_help_and_version() -> None:
    def output(flag: str) -> str:
        return subprocess.run([str(model_servers.BINARY), flag], capture_output=True, text=True, check=True).stdout

    assert "--model_base_path=" in output("--help")
    assert f"TensorFlow Library: {tf.__version__}" in output("--version")


def test_all_memory_comes_from_jemalloc() -> None:
    def allocated(**environment: str) -> int:
        run = subprocess.run(
            [str(model_servers.BINARY), "--version"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "MALLOC_CONF": "stats_print:true", **environment},
        )
        found = re.search(r"^Allocated: (\d+)", run.stderr, re.MULTILINE)
        return int(found[1]) if found else 0

    # TensorFlow allocates more than 10 MB while its libraries load.
    assert allocated() > 5e6
    # docs/model_server.md tells users to go back to glibc's allocator like this. jemalloc then holds only its own data.
    assert allocated(LD_PRELOAD="libc.so.6 libstdc++.so.6") < 1e6


def test_many_connections_do_not_end_listening(exported: Path, base_path: Path, tmp_path: Path) -> None:
    # Each connection takes an open file, so the server raises the soft limit.
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        server = Server(tmp_path / "server.log", f"--model_base_path={base_path}")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        opened.callback(server.process.wait)
        opened.callback(server.process.kill)
        for _ in range(700):
            opened.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE_S))
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("dpsr.client", 1)]) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            assert stub.Predict(predict_request(), timeout=PATIENCE_S).model_spec.version.value == 1
