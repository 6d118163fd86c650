"""Requests that the model server computes together, as clients see them.

Every row of `batch_rows`, an output of the model, tells how many rows were computed with it. A long
batch_timeout_micros makes batches certain: they run when they are full.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import saved_models
import tensorflow as tf
from model_servers import INVALID, Server, State, error_of, eventually, failing_start, predict_request, serving
from processes import PATIENCE_S, free_port
from tensorflow_serving.apis import classification_pb2, predict_pb2, prediction_service_pb2_grpc

FOREVER_US = 3_600_000_000
EXHAUSTED, UNMET = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION


def _rows(x: tf.Tensor) -> tf.Tensor:
    return tf.fill([tf.shape(x)[0]], tf.shape(x)[0])


class _Model(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def half(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x / 2, "batch_rows": _rows(x), "total": tf.reduce_sum(x)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text"), tf.TensorSpec([None], tf.int64, "n")])
    def text(self, text: tf.Tensor, n: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"joined": tf.strings.join([text, tf.strings.as_string(n)]), "batch_rows": _rows(n)}

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32, "x")])
    def wide(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"sum": tf.reduce_sum(x, 1), "copy": x, "batch_rows": _rows(x)}

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.string, "text")])
    def texts(self, text: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"bytes": tf.reduce_sum(tf.strings.length(text), 1), "batch_rows": _rows(text)}

    @tf.function(input_signature=[tf.TensorSpec([], tf.float32, "x")])
    def scalar(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x / 2}

    @tf.function(input_signature=[tf.TensorSpec([2], tf.float32, "x")])
    def fixed(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x / 2, "batch_rows": _rows(x)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def checked(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.control_dependencies([tf.debugging.assert_non_negative(x, "below zero")]):
            return {"y": tf.sqrt(x)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "folder")])
    def gate(self, folder: tf.Tensor) -> dict[str, tf.Tensor]:
        """Writes `begun` into the folder of the first row, then runs until `release` is there."""
        with tf.control_dependencies([tf.io.write_file(folder[0] + "/begun", "")]):
            turns = tf.while_loop(
                lambda turns: tf.equal(tf.size(tf.io.matching_files(folder[0] + "/release")), 0),
                lambda turns: [turns + 1],
                [tf.constant(0, tf.int64)],
            )[0]
        with tf.control_dependencies([turns]):
            return {"batch_rows": _rows(folder)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batching") / "saved"
    module = _Model()
    names = ("text", "wide", "texts", "scalar", "fixed", "checked", "gate")
    signatures = {"serving_default": module.half} | {name: getattr(module, name) for name in names}
    tf.saved_model.save(module, str(path), signatures=signatures)
    return path


def parameters_file(folder: Path, text: str = "", **values: int) -> Path:
    file = folder / "batching.pbtxt"
    file.write_text("".join(f"{name} {{ value: {value} }}\n" for name, value in values.items()) + text)
    return file


@pytest.fixture
def start(model: Path, base_path: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server of the model with these batching parameters, text or wrapped numbers."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def started(text: str = "", *flags: str, **values: int) -> Server:
            saved_models.publish(model, base_path, 1)
            monitoring = tmp_path / "monitoring.pbtxt"
            monitoring.write_text("prometheus_config { enable: true }")
            return stack.enter_context(
                serving(
                    tmp_path,
                    f"--model_base_path={base_path}",
                    "--enable_batching",
                    f"--batching_parameters_file={parameters_file(tmp_path, text, **values)}",
                    f"--monitoring_config_file={monitoring}",
                    *flags,
                    rest_port=free_port(),
                )
            )

        yield started


def metric(server: Server, name: str) -> float:
    lines = server.rest("/monitoring/prometheus/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition(" ")[0].partition("{")[0] == name)


BATCHES = ":tensorflow:serving:batching_session:wrapped_run_count"
WAITED = ":tensorflow:serving:batching_session:queuing_latency_count"


def outputs_of(response: predict_pb2.PredictResponse) -> dict[str, Any]:
    return {key: tf.make_ndarray(value).tolist() for key, value in response.outputs.items()}


def half_request(*x: float, outputs: tuple[str, ...] = ("y", "batch_rows")) -> predict_pb2.PredictRequest:
    request = predict_request(inputs={"x": np.float32(x)})
    request.output_filter.extend(outputs)
    return request


def wide_request(x: list[list[float]]) -> predict_pb2.PredictRequest:
    return predict_request("wide", {"x": np.float32(x)})


def gate_request(folder: Path) -> predict_pb2.PredictRequest:
    folder.mkdir(exist_ok=True)
    return predict_request("gate", {"folder": [str(folder)]})


def together(server: Server, *requests: predict_pb2.PredictRequest) -> list[Any]:
    """What each request is answered, outputs or code and message, when all are sent at once."""

    def answer(call: grpc.Future) -> Any:
        try:
            return outputs_of(call.result())
        except grpc.RpcError as error:
            return error.code(), error.details()

    return [answer(call) for call in [server.prediction.Predict.future(r, timeout=PATIENCE_S) for r in requests]]


# ---- batches ----


def test_requests_meet_in_a_batch_and_each_gets_its_rows(start: Callable[..., Server]) -> None:
    server = start(max_batch_size=8, batch_timeout_micros=FOREVER_US)
    answers = together(server, half_request(1), half_request(2, 3, 4), half_request(5), half_request(6, 7, 8))
    assert [answer["y"] for answer in answers] == [[0.5], [1, 1.5, 2], [2.5], [3, 3.5, 4]]
    assert [answer["batch_rows"] for answer in answers] == [[8], [8] * 3, [8], [8] * 3]
    assert metric(server, BATCHES) == 1
    assert metric(server, WAITED) == 4
    assert metric(server, ":dpsr:serving:batch_rows_sum") == 8


def test_answers_are_those_without_batching(start: Callable[..., Server]) -> None:
    """Many clients, several signatures: and fewer runs than requests."""
    server = start(
        "allowed_batch_sizes: [4, 16, 32]", max_batch_size=32, batch_timeout_micros=2000, num_batch_threads=2
    )

    def client(number: int) -> None:
        random = np.random.default_rng(number)
        for _ in range(40):
            n = random.integers(1, 6)
            x = random.normal(size=n).astype(np.float32)
            answer = outputs_of(server.predict(half_request(*x)))
            np.testing.assert_array_equal(np.float32(answer["y"]), x / 2)
            numbers = random.integers(0, 1000, n)
            request = predict_request("text", {"text": [f"é{i}".encode() for i in numbers], "n": numbers})
            joined = outputs_of(server.predict(request))["joined"]
            assert joined == [f"é{i}{i}".encode() for i in numbers]
            wide = random.normal(size=(n, 3)).astype(np.float32)
            assert outputs_of(server.predict(wide_request(wide.tolist())))["copy"] == wide.tolist()

    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        for done in [threads.submit(client, number) for number in range(12)]:
            done.result()
    requests = 12 * 40 * 3
    assert metric(server, WAITED) == requests
    assert metric(server, BATCHES) < 0.8 * requests


def test_without_a_file_what_waits_for_a_thread_meets(model: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(model, base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", "--enable_batching") as server:
        assert outputs_of(server.predict(half_request(1, 2))) == {"y": [0.5, 1], "batch_rows": [2, 2]}


def test_a_batch_that_is_not_full_runs_after_the_timeout(start: Callable[..., Server]) -> None:
    server = start(max_batch_size=1000, batch_timeout_micros=1000)
    assert outputs_of(server.predict(half_request(1)))["batch_rows"] == [1]


def test_signatures_do_not_mix(start: Callable[..., Server]) -> None:
    server = start(max_batch_size=2, batch_timeout_micros=FOREVER_US)
    text = [predict_request("text", {"text": ["a"], "n": np.int64([i])}) for i in range(2)]
    answers = together(server, half_request(1), text[0], text[1], half_request(2))
    assert [answer["batch_rows"] for answer in answers] == [[2]] * 4
    assert [answers[1]["joined"], answers[2]["joined"]] == [[b"a0"], [b"a1"]]


def test_requests_for_different_outputs_meet(start: Callable[..., Server]) -> None:
    server = start(max_batch_size=2, batch_timeout_micros=FOREVER_US)
    answers = together(server, half_request(4, outputs=("y",)), half_request(6, outputs=("batch_rows",)))
    assert answers == [{"y": [2]}, {"batch_rows": [2]}]


def test_classify_meets_too(zoo: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(zoo / "half_plus_two_tf1", base_path, 1)
    file = parameters_file(tmp_path, max_batch_size=2, batch_timeout_micros=FOREVER_US)
    flags = [f"--model_base_path={base_path}", "--enable_batching", f"--batching_parameters_file={file}"]
    with serving(tmp_path, *flags) as server:
        calls = []
        for value in (2.0, 4.0):
            request = classification_pb2.ClassificationRequest()
            request.model_spec.name, request.model_spec.signature_name = "default", "classify_x_to_y"
            request.input.example_list.examples.add().features.feature["x"].float_list.value.append(value)
            calls.append(server.prediction.Classify.future(request, timeout=PATIENCE_S))
        scores = [call.result().result.classifications[0].classes[0].score for call in calls]
        assert scores == [3.0, 4.0]


def test_rest_and_grpc_meet(start: Callable[..., Server]) -> None:
    server = start(max_batch_size=2, batch_timeout_micros=FOREVER_US)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        body = {"signature_name": "text", "inputs": {"text": ["r"], "n": [1]}}
        rest = threads.submit(server.rest, "/v1/models/default:predict", body)
        (answer,) = together(server, predict_request("text", {"text": ["g"], "n": np.int64([2])}))
        assert answer == {"joined": [b"g2"], "batch_rows": [2]}
        assert rest.result().json == {"outputs": {"joined": ["r1"], "batch_rows": [2]}}


# ---- sizes and shapes ----


def test_batches_are_filled_up_to_an_allowed_size(start: Callable[..., Server]) -> None:
    server = start("allowed_batch_sizes: [2, 5, 8]", max_batch_size=8)
    for rows, size in ((1, 2), (2, 2), (3, 5), (8, 8)):
        x = list(range(rows))
        answer = outputs_of(server.predict(half_request(*x)))
        assert answer == {"y": [i / 2 for i in x], "batch_rows": [size] * rows}
    assert metric(server, ":dpsr:serving:batch_padding_rows") == 1 + 2


def test_rows_of_different_lengths_without_padding(start: Callable[..., Server]) -> None:
    """One of the two runs, whichever came first."""
    server = start(max_batch_size=2, batch_timeout_micros=FOREVER_US)
    answers = together(server, wide_request([[1, 2]]), wide_request([[1, 2, 3]]))
    failed = [answer for answer in answers if isinstance(answer, tuple)]
    assert len(failed) == 1
    code, message = failed[0]
    assert code == UNMET
    assert "[1,2] and [1,3]" in message or "[1,3] and [1,2]" in message
    assert "padding is turned off" in message
    assert [answer["sum"] for answer in answers if isinstance(answer, dict)] in ([[3]], [[6]])


def test_rows_of_different_lengths_are_padded_with_their_first_element(start: Callable[..., Server]) -> None:
    server = start("pad_variable_length_inputs: true", max_batch_size=3, batch_timeout_micros=FOREVER_US)
    answers = together(server, wide_request([[2, 1]]), wide_request([[1, 2, 3]]), wide_request([[7]]))
    assert [answer["copy"] for answer in answers] == [[[2, 1, 2]], [[1, 2, 3]], [[7, 7, 7]]]
    assert [answer["batch_rows"] for answer in answers] == [[3]] * 3


def test_one_very_long_row_runs_apart(start: Callable[..., Server]) -> None:
    """Its neighbours would each become as long."""
    server = start("pad_variable_length_inputs: true", max_batch_size=64, batch_timeout_micros=FOREVER_US)
    requests = [wide_request([[1.0] * 1_000_000]), *(wide_request([[2, 3]]) for _ in range(63))]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.max_receive_message_length", -1)]) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        for request in requests:
            request.output_filter.append("sum")
        sums = [call.result() for call in [stub.Predict.future(r, timeout=PATIENCE_S) for r in requests]]
    assert [outputs_of(answer)["sum"] for answer in sums] == [[1_000_000]] + [[5]] * 63
    assert metric(server, BATCHES) == 64


def test_a_long_text_that_would_pad_many_places_runs_apart(start: Callable[..., Server]) -> None:
    """It would stand in each of the other's places: a megabyte a hundred thousand times."""
    server = start("pad_variable_length_inputs: true", max_batch_size=2, batch_timeout_micros=FOREVER_US)
    long, many = [["a" * (1 << 20)]], [["b"] * 100_000]
    answers = together(server, *(predict_request("texts", {"text": texts}) for texts in (long, many)))
    assert answers == [{"bytes": [1 << 20], "batch_rows": [1]}, {"bytes": [100_000], "batch_rows": [1]}]
    short = together(server, *(predict_request("texts", {"text": texts}) for texts in ([["abc"]], [["b", "cd"]])))
    assert short == [{"bytes": [6], "batch_rows": [2]}, {"bytes": [3], "batch_rows": [2]}]


def test_large_requests_are_split(start: Callable[..., Server]) -> None:
    text = "enable_large_batch_splitting { value: true } allowed_batch_sizes: [2, 4]"
    server = start(text, max_batch_size=10, max_execution_batch_size=4)
    answer = outputs_of(server.predict(half_request(*range(10))))
    assert answer == {"y": [i / 2 for i in range(10)], "batch_rows": [4] * 8 + [2] * 2}
    code, message = error_of(lambda: server.predict(half_request(*range(11))))
    assert code == INVALID
    assert "11" in message and "10" in message
    texts = {"text": [f"{i}" for i in range(9)], "n": np.arange(9)}
    assert outputs_of(server.predict(predict_request("text", texts)))["joined"] == [b"%d%d" % (i, i) for i in range(9)]


def test_a_part_that_is_filled_up_to_the_size_of_its_request(start: Callable[..., Server]) -> None:
    """One row of the second request fills the batch of the first. Its other two are filled up to three, as it has."""
    text = "enable_large_batch_splitting { value: true } allowed_batch_sizes: [3, 4]"
    server = start(text, max_batch_size=8, max_execution_batch_size=4, batch_timeout_micros=1_000_000)
    answers = together(server, half_request(1, 2, 3), half_request(4, 5, 6))
    assert [answer["y"] for answer in answers] == [[0.5, 1, 1.5], [2, 2.5, 3]]
    assert sorted(answer["batch_rows"] for answer in answers) == [[4, 3, 3], [4, 4, 4]]


def test_a_request_beyond_the_largest_batch(start: Callable[..., Server]) -> None:
    server = start(max_batch_size=2)
    assert error_of(lambda: server.predict(half_request(1, 2, 3)))[0] == INVALID


def test_what_has_no_rows_runs_alone(start: Callable[..., Server]) -> None:
    server = start("allowed_batch_sizes: [4]", max_batch_size=4, batch_timeout_micros=FOREVER_US)
    assert outputs_of(server.predict(predict_request("scalar", {"x": np.float32(3)}))) == {"y": 1.5}
    assert outputs_of(server.predict(half_request())) == {"y": [], "batch_rows": []}
    fixed = predict_request("fixed", {"x": np.float32([1, 2])})
    assert outputs_of(server.predict(fixed)) == {"y": [0.5, 1], "batch_rows": [2, 2]}
    # Unlike the signature: who sends it must not spoil the batch of others.
    odd = predict_request(inputs={"x": np.float32([[1, 2]])})
    odd.output_filter.append("y")
    assert outputs_of(server.predict(odd)) == {"y": [[0.5, 1]]}
    unequal = predict_request("text", {"text": ["a", "b"], "n": np.int64([1])})
    assert error_of(lambda: server.predict(unequal))[0] == INVALID
    assert metric(server, BATCHES) == 0


def test_outputs_must_keep_the_rows(start: Callable[..., Server]) -> None:
    """The request that asks for such an output fails, its neighbour does not."""
    server = start(max_batch_size=2, batch_timeout_micros=FOREVER_US)
    good, bad = together(server, half_request(2), half_request(4, outputs=("total",)))
    assert good == {"y": [1], "batch_rows": [2]}
    assert bad[0] == UNMET
    assert "output total of signature serving_default has the shape []" in bad[1]


# ---- errors, deadlines, limits ----


def test_an_error_is_that_of_all_in_the_batch(start: Callable[..., Server]) -> None:
    server = start(max_batch_size=2, batch_timeout_micros=FOREVER_US)
    requests = [predict_request("checked", {"x": np.float32([x])}) for x in (4, -1)]
    for code, message in together(server, *requests):
        assert code == INVALID
        assert "below zero" in message
    assert [answer["y"] for answer in together(server, requests[0], requests[0])] == [[2], [2]]


def test_a_wrong_dtype_fails_before_its_batch(start: Callable[..., Server]) -> None:
    server = start(max_batch_size=2, batch_timeout_micros=FOREVER_US)
    wrong = predict_request(inputs={"x": np.int32([1])})
    assert error_of(lambda: server.predict(wrong)) == (INVALID, "Expects arg[0] to be float but int32 is provided")
    assert [answer["batch_rows"] for answer in together(server, half_request(1), half_request(2))] == [[2], [2]]


def test_a_full_queue(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(max_batch_size=1, max_enqueued_batches=2, num_batch_threads=1)
    calls = [server.prediction.Predict.future(gate_request(tmp_path / "a"), timeout=PATIENCE_S)]
    eventually((tmp_path / "a" / "begun").exists, "the first request runs")
    # Of these two wait, and two find no room.
    calls += [server.prediction.Predict.future(gate_request(tmp_path / "b"), timeout=PATIENCE_S) for _ in range(4)]
    eventually(lambda: sum(call.done() for call in calls) == 2, "two requests are refused")
    for call in calls:
        if call.done():
            assert call.code() == EXHAUSTED
            assert "max_enqueued_batches" in call.details()
    for folder in ("a", "b"):
        (tmp_path / folder / "release").touch()
    assert sum(call.exception() is None for call in calls) == 3


def test_a_deadline_ends_the_wait_for_a_batch(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start("", "--rest_api_timeout_in_ms=300", max_batch_size=2, num_batch_threads=1)
    call = server.prediction.Predict.future(gate_request(tmp_path / "a"), timeout=PATIENCE_S)
    eventually((tmp_path / "a" / "begun").exists, "the first request runs")
    code, _ = error_of(lambda: server.predict(half_request(1), timeout=0.2))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    # The client's clock began before the server's: the time of this one lets the first pass there too.
    assert server.rest("/v1/models/default:predict", {"inputs": [1.0]}).status == 504
    assert not call.done()
    (tmp_path / "a" / "release").touch()
    assert outputs_of(call.result()) == {"batch_rows": [1]}
    # Nobody waits for the two: they were not computed.
    assert outputs_of(server.predict(half_request(8))) == {"y": [4], "batch_rows": [1]}
    assert metric(server, BATCHES) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size { value: 0 }", "max_batch_size: got 0, expected an integer from 1"),
        ("batch_timeout_micros { value: -1 }", "batch_timeout_micros: got -1"),
        ("max_enqueued_batches { value: 0 }", "max_enqueued_batches: got 0"),
        ("num_batch_threads { value: 0 }", "num_batch_threads: got 0"),
        (
            "max_batch_size { value: 4 } allowed_batch_sizes: [2, 3]",
            "allowed_batch_sizes: got 3, expected as last one 4",
        ),
        ("max_batch_size { value: 4 } allowed_batch_sizes: [4, 2]", "got 2, expected more than 4"),
        ("max_batch_size { value: 4 } allowed_batch_sizes: [0, 4]", "got 0, expected more than 0"),
        ("max_execution_batch_size { value: 4 }", "needs enable_large_batch_splitting"),
        (
            "max_batch_size { value: 4 } max_execution_batch_size { value: 5 } "
            "enable_large_batch_splitting { value: true }",
            "max_execution_batch_size: got 5, expected an integer from 1 to 4",
        ),
        ("no_such_field: 1", "no_such_field"),
    ],
)
def test_wrong_parameters_stop_the_start(text: str, message: str, tmp_path: Path) -> None:
    file = parameters_file(tmp_path, text)
    status, log = failing_start(
        f"--model_base_path={tmp_path}", "--port=0", "--enable_batching", f"--batching_parameters_file={file}"
    )
    assert status != 0
    assert "Failed to start server. Error: " in log
    assert message in log


def test_the_file_needs_the_flag(tmp_path: Path) -> None:
    file = parameters_file(tmp_path)
    status, log = failing_start(f"--model_base_path={tmp_path}", f"--batching_parameters_file={file}")
    assert status != 0
    assert "--batching_parameters_file supplied without --enable_batching" in log


# ---- versions ----


def test_a_version_brings_its_own_parameters(
    start: Callable[..., Server], model: Path, base_path: Path, tmp_path: Path
) -> None:
    server = start("", "--enable_per_model_batching_parameters", max_batch_size=2, batch_timeout_micros=FOREVER_US)
    assert [a["batch_rows"] for a in together(server, half_request(1), half_request(2))] == [[2], [2]]
    own = tmp_path / "own"
    own.mkdir()
    saved_models.publish(model, own, 2)
    (own / "2" / "batching_params.pbtxt").write_text("allowed_batch_sizes: 3 max_batch_size { value: 3 }")
    saved_models.publish(own / "2", base_path, 2)
    eventually(lambda: server.states() == {2: State.AVAILABLE, 1: State.END}, "version 2 takes over")
    assert outputs_of(server.predict(half_request(1)))["batch_rows"] == [3]

    (own / "2" / "batching_params.pbtxt").write_text("max_batch_size { value: -3 }")
    saved_models.publish(own / "2", base_path, 3)
    eventually(lambda: server.states().get(3) == State.END, "version 3 fails")
    assert "batching_params.pbtxt: BatchingParameters.max_batch_size: got -3" in server.log.read_text()
    assert outputs_of(server.predict(half_request(1)))["batch_rows"] == [3]


def test_versions_change_under_batched_load(exported: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(exported / "half_plus_1", base_path, 1)
    file = parameters_file(tmp_path, max_batch_size=4, batch_timeout_micros=500, max_enqueued_batches=1000)
    flags = [f"--model_base_path={base_path}", "--enable_batching", f"--batching_parameters_file={file}"]
    with serving(tmp_path, *flags) as server:
        stop = threading.Event()
        answered = {version: 0 for version in range(1, 5)}

        def client() -> None:
            while not stop.is_set():
                response = server.predict(predict_request(inputs={"x": np.float32([2])}))
                version = response.model_spec.version.value
                assert list(response.outputs["y"].float_val) == [1 + version]
                answered[version] += 1

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            clients = [threads.submit(client) for _ in range(8)]
            try:
                for version in range(1, 5):
                    if version > 1:
                        saved_models.publish(exported / f"half_plus_{version}", base_path, version)
                    eventually(
                        lambda version=version: answered[version] > 20 or any(c.done() for c in clients),
                        f"version {version} answers",
                    )
            finally:
                stop.set()
            for done in clients:
                done.result()
        eventually(lambda: server.states()[3] == State.END, "the versions before are gone")
        assert server.stop() == 0


def test_a_version_leaves_when_what_it_queued_has_run(
    start: Callable[..., Server], model: Path, base_path: Path, tmp_path: Path
) -> None:
    server = start(max_batch_size=2, batch_timeout_micros=0, num_batch_threads=1)
    first = server.prediction.Predict.future(gate_request(tmp_path / "a"), timeout=PATIENCE_S)
    eventually((tmp_path / "a" / "begun").exists, "the first request runs")
    request = half_request(6)
    request.model_spec.version.value = 1
    queued = server.prediction.Predict.future(request, timeout=PATIENCE_S)
    saved_models.publish(model, base_path, 2)
    eventually(lambda: server.states() == {2: State.AVAILABLE, 1: State.UNLOADING}, "version 2 takes over")
    (tmp_path / "a" / "release").touch()
    assert outputs_of(first.result()) == {"batch_rows": [1]}
    assert outputs_of(queued.result())["y"] == [3]
    eventually(lambda: server.states()[1] == State.END, "version 1 is gone")
