"""Warm-up requests of the model server: replayed before a version takes requests, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest
import saved_models
import tensorflow as tf
from model_servers import State, eventually, failing_start, predict_request, serving
from processes import PATIENCE_S
from tensorflow_serving.apis import get_model_status_pb2, prediction_log_pb2


def predict_log(signature: str, **inputs: object) -> prediction_log_pb2.PredictionLog:
    # The name and version that a log was recorded with do not matter.
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.CopyFrom(predict_request(signature, inputs, name="recorded elsewhere", version=99))
    return log


def increment(delta: float) -> bytes:
    return predict_log("incr_counter_by", delta=np.float32(delta)).SerializeToString()


@pytest.mark.parametrize(("flags", "expected"), [([], 7), (["--num_request_iterations_for_warmup=3"], 21)])
def test_warmup_is_replayed_before_a_version_serves(
    zoo: Path, base_path: Path, tmp_path: Path, flags: list[str], expected: float
) -> None:
    saved_models.publish(zoo / "counter", base_path, 1)
    saved_models.write_warmup(base_path / "1", increment(3), increment(4))
    with serving(tmp_path, f"--model_base_path={base_path}", *flags) as running:
        assert running.predict(predict_request("get_counter", {})).outputs["output"].float_val[0] == expected


def test_warmup_can_be_switched_off(zoo: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(zoo / "counter", base_path, 1)
    saved_models.write_warmup(base_path / "1", increment(3), b"\xff")
    with serving(tmp_path, f"--model_base_path={base_path}", "--enable_model_warmup=false") as running:
        assert running.predict(predict_request("get_counter", {})).outputs["output"].float_val[0] == 0


def test_every_kind_of_request(zoo: Path, base_path: Path, tmp_path: Path) -> None:
    classify, regress, multi = (prediction_log_pb2.PredictionLog() for _ in range(3))
    classify.classify_log.request.model_spec.signature_name = "classify_x_to_y"
    regress.regress_log.request.model_spec.signature_name = "regress_x_to_y"
    task = multi.multi_inference_log.request.tasks.add(method_name="tensorflow/serving/regress")
    task.model_spec.signature_name = "regress_x_to_y2"
    for log in (classify.classify_log, regress.regress_log, multi.multi_inference_log):
        example = log.request.input.example_list.examples.add()
        example.features.feature["x"].float_list.value.append(2)
    logs = [predict_log("", x=np.float32([[2]])), classify, regress, multi, prediction_log_pb2.PredictionLog()]
    saved_models.publish(zoo / "half_plus_two_tf1", base_path, 1)
    saved_models.write_warmup(base_path / "1", *(log.SerializeToString() for log in logs))
    with serving(tmp_path, f"--model_base_path={base_path}") as running:
        assert running.states() == {1: State.AVAILABLE}


def other_log(kind: str) -> bytes:
    log = prediction_log_pb2.PredictionLog()
    getattr(log, kind).SetInParent()
    return log.SerializeToString()


BROKEN = {
    "no PredictionLog": ([b"\xff\xff"], "INVALID_ARGUMENT", "Failed to parse warmup record 0"),
    "session run": ([other_log("session_run_log")], "UNIMPLEMENTED", "Unsupported log_type for warmup"),
    "streamed": ([other_log("predict_streamed_log")], "UNIMPLEMENTED", "Unsupported log_type for warmup"),
    "request that fails": (
        [increment(1), predict_log("nothing").SerializeToString()],
        "FAILED_PRECONDITION",
        'Serving signature key "nothing" not found.',
    ),
    "too many": ([increment(0)] * 1001, "INVALID_ARGUMENT", "exceeds the maximum (1000)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_version_whose_warmup_fails_does_not_serve(zoo: Path, base_path: Path, tmp_path: Path, case: str) -> None:
    records, code, message = BROKEN[case]
    saved_models.publish(zoo / "counter", tmp_path, 2)
    saved_models.write_warmup(tmp_path / "2", *records)
    saved_models.publish(zoo / "counter", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", "--max_num_load_retries=0") as running:
        (tmp_path / "2").rename(base_path / "2")
        eventually(lambda: running.states().get(2) == State.END, "2 has failed")
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = "default"
        request.model_spec.version.value = 2
        (status,) = running.model.GetModelStatus(request, timeout=PATIENCE_S).model_version_status
        assert status.status.error_code == grpc.StatusCode[code].value[0]
        assert message in status.status.error_message
        response = running.predict(predict_request("get_counter", {}))
        assert response.model_spec.version.value == 1


@pytest.mark.parametrize("content", [b"no TFRecord file at all", b"\x00" * 40])
def test_a_file_that_holds_no_records(zoo: Path, base_path: Path, content: bytes) -> None:
    saved_models.publish(zoo / "counter", base_path, 1)
    saved_models.write_warmup(base_path / "1")
    (base_path / "1" / "assets.extra" / "tf_serving_warmup_requests").write_bytes(content)
    status, error = failing_start("--port=0", f"--model_base_path={base_path}", "--max_num_load_retries=0")
    assert status == 1
    assert "DATA_LOSS" in error
    assert "Please verify your warmup data is in TFRecord format." in error


def test_a_thousand_records_and_none(zoo: Path, base_path: Path, tmp_path: Path) -> None:
    saved_models.publish(zoo / "counter", base_path, 1)
    saved_models.write_warmup(base_path / "1", *[increment(1)] * 1000)
    with serving(tmp_path, f"--model_base_path={base_path}") as running:
        output = running.predict(predict_request("get_counter", {})).outputs["output"]
        assert tf.make_ndarray(output) == 1000
        saved_models.publish(zoo / "counter", tmp_path, 2)
        saved_models.write_warmup(tmp_path / "2")
        (tmp_path / "2").rename(base_path / "2")
        eventually(lambda: running.states().get(2) == State.AVAILABLE, "an empty file is fine")
