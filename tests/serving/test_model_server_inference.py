"""Classify, Regress, MultiInference and GetModelMetadata of the model server, over gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import saved_models
import tensorflow as tf
from model_servers import INVALID, Server, config_list, error_of, model_config, predict_request, serving
from processes import PATIENCE_S
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    inference_pb2,
    input_pb2,
    regression_pb2,
)

FORMS = ("tf1", "tf2")
CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"


@pytest.fixture(scope="module")
def examples_server(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the models tf1, tf2, keras and counter, and the first two versions of tf1: 1 and 2."""
    folder = tmp_path_factory.mktemp("inference")
    models = []
    for name in ("half_plus_two_tf1", "half_plus_two_tf2", "half_plus_two_keras", "counter"):
        base_path = folder / name
        base_path.mkdir()
        short = name.removeprefix("half_plus_two_")
        for version in (1, 2) if short == "tf1" else (1,):
            saved_models.publish(zoo / name, base_path, version)
        models.append(model_config(short, base_path, every=True, labels={"old": 1}))
    (folder / "models.config").write_text(str(config_list(*models)))
    with serving(folder, f"--model_config_file={folder / 'models.config'}") as running:
        yield running


def input_of(*values: float, context: float | None = None) -> input_pb2.Input:
    """Examples with the feature x; those whose value is NaN have none, and take that of the context."""
    result = input_pb2.Input()
    with_context = context is not None
    for value in values:
        target = result.example_list_with_context if with_context else result.example_list
        example = target.examples.add()
        if not np.isnan(value):
            example.features.feature["x"].float_list.value.append(value)
    if context is not None:
        features = result.example_list_with_context.context.features
        features.feature["x"].float_list.value.append(context)
    return result


def classify_request(model: str, signature: str, examples: input_pb2.Input) -> classification_pb2.ClassificationRequest:
    request = classification_pb2.ClassificationRequest(input=examples)
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    return request


def regress_request(model: str, signature: str, examples: input_pb2.Input) -> regression_pb2.RegressionRequest:
    request = regression_pb2.RegressionRequest(input=examples)
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    return request


def multi_request(
    examples: input_pb2.Input, *tasks: tuple[str, str], model: str = "tf1"
) -> inference_pb2.MultiInferenceRequest:
    request = inference_pb2.MultiInferenceRequest(input=examples)
    for method, signature in tasks:
        task = request.tasks.add(method_name=method)
        task.model_spec.name = model
        task.model_spec.signature_name = signature
    return request


@pytest.mark.parametrize("form", FORMS)
def test_classify(examples_server: Server, form: str) -> None:
    request = classify_request(form, "classify_x_to_y", input_of(2, 4, 0))
    response = examples_server.prediction.Classify(request, timeout=PATIENCE_S)
    rows = [[(c.label, c.score) for c in row.classes] for row in response.result.classifications]
    assert rows == [[("", 3.0)], [("", 4.0)], [("", 2.0)]]
    assert response.model_spec.name == form
    assert response.model_spec.signature_name == "classify_x_to_y"
    assert response.model_spec.version.value == (2 if form == "tf1" else 1)


@pytest.mark.parametrize("form", FORMS)
def test_classify_with_labels(examples_server: Server, form: str) -> None:
    request = classify_request(form, "classify_with_labels", input_of(2))
    request.model_spec.version_label = "old"
    response = examples_server.prediction.Classify(request, timeout=PATIENCE_S)
    (row,) = response.result.classifications
    assert [(c.label, c.score) for c in row.classes] == [("small", -3.0), ("large", 3.0)]
    assert response.model_spec.version.value == 1


@pytest.mark.parametrize("form", FORMS)
def test_regress(examples_server: Server, form: str) -> None:
    request = regress_request(form, "regress_x_to_y2", input_of(2, 4))
    response = examples_server.prediction.Regress(request, timeout=PATIENCE_S)
    assert [r.value for r in response.result.regressions] == [4.0, 5.0]
    assert response.model_spec.signature_name == "regress_x_to_y2"


def test_a_context_is_part_of_every_example(examples_server: Server) -> None:
    nan = float("nan")
    request = regress_request("tf1", "regress_x_to_y", input_of(nan, 4, nan, context=10))
    response = examples_server.prediction.Regress(request, timeout=PATIENCE_S)
    assert [r.value for r in response.result.regressions] == [7.0, 4.0, 7.0]


def test_a_context_does_not_multiply_without_bounds(examples_server: Server) -> None:
    examples = input_of(*[float("nan")] * 1000, context=1)
    feature = examples.example_list_with_context.context.features.feature["pad"]
    feature.bytes_list.value.append(b"x" * (1 << 20))
    request = regress_request("tf1", "regress_x_to_y", examples)
    code, message = error_of(lambda: examples_server.prediction.Regress(request, timeout=PATIENCE_S))
    assert code == INVALID
    assert "for each of 1000 examples needs too much memory" in message


@pytest.mark.parametrize("form", FORMS)
def test_multi_inference(examples_server: Server, form: str) -> None:
    request = multi_request(input_of(2, 4), (CLASSIFY, "classify_x_to_y"), (REGRESS, "regress_x_to_y"), model=form)
    response = examples_server.prediction.MultiInference(request, timeout=PATIENCE_S)
    classified, regressed = response.results
    assert [row.classes[0].score for row in classified.classification_result.classifications] == [3, 4]
    assert [r.value for r in regressed.regression_result.regressions] == [3, 4]
    assert [result.model_spec.signature_name for result in response.results] == ["classify_x_to_y", "regress_x_to_y"]
    # Each signature of a TF2 model has an input tensor of its own.
    assert {result.model_spec.version.value for result in response.results} == {2 if form == "tf1" else 1}


def test_multi_inference_of_one_kind(examples_server: Server) -> None:
    request = multi_request(input_of(2), (REGRESS, "regress_x_to_y"), (REGRESS, "regress_x_to_y2"))
    response = examples_server.prediction.MultiInference(request, timeout=PATIENCE_S)
    assert [result.regression_result.regressions[0].value for result in response.results] == [3, 4]


def other_model() -> inference_pb2.MultiInferenceRequest:
    request = multi_request(input_of(2), (REGRESS, "regress_x_to_y"), (REGRESS, "regress_x_to_y2"))
    request.tasks[1].model_spec.name = "tf2"
    return request


def no_spec() -> inference_pb2.MultiInferenceRequest:
    request = multi_request(input_of(2), (REGRESS, "regress_x_to_y"))
    request.tasks[0].ClearField("model_spec")
    return request


MULTI_ERRORS = {
    "no task": (multi_request(input_of(2)), INVALID, "has no tasks"),
    "no spec": (no_spec(), INVALID, "Missing ModelSpec"),
    "no name": (multi_request(input_of(2), (REGRESS, "r"), model=""), INVALID, "ModelSpec has no name specified."),
    "two models": (other_model(), INVALID, "must access the same model name"),
    "twice": (
        multi_request(input_of(2), (REGRESS, "regress_x_to_y"), (REGRESS, "regress_x_to_y")),
        INVALID,
        "Duplicate evaluation of signature: regress_x_to_y",
    ),
    "unknown method": (
        multi_request(input_of(2), ("tensorflow/serving/predict", "regress_x_to_y")),
        grpc.StatusCode.UNIMPLEMENTED,
        "Unsupported signature method_name: tensorflow/serving/predict",
    ),
    "unknown signature": (multi_request(input_of(2), (REGRESS, "s")), INVALID, "not found in model graph: s"),
    "empty": (multi_request(input_of(), (REGRESS, "regress_x_to_y")), INVALID, "Input is empty."),
}


@pytest.mark.parametrize("case", MULTI_ERRORS)
def test_multi_inference_errors(examples_server: Server, case: str) -> None:
    request, code, message = MULTI_ERRORS[case]
    got = error_of(lambda: examples_server.prediction.MultiInference(request, timeout=PATIENCE_S))
    assert got[0] == code
    assert message in got[1]


@pytest.mark.parametrize("rpc", ["Classify", "Regress"])
def test_errors_of_both(examples_server: Server, rpc: str) -> None:
    make = classify_request if rpc == "Classify" else regress_request
    call = getattr(examples_server.prediction, rpc)
    signature = "classify_x_to_y" if rpc == "Classify" else "regress_x_to_y"

    def error(model: str, name: str, examples: input_pb2.Input) -> tuple[grpc.StatusCode, str]:
        return error_of(lambda: call(make(model, name, examples), timeout=PATIENCE_S))

    assert error("tf1", signature, input_of()) == (INVALID, "Input is empty.")
    assert error("tf1", "s", input_of(1)) == (INVALID, "No signature was found with the name: s")
    assert error("keras", "s", input_of(1)) == (INVALID, "No signature was found with the name: s")
    assert error("m", signature, input_of(1)) == (
        grpc.StatusCode.NOT_FOUND,
        "Servable not found for request: Latest(m)",
    )
    assert error("", signature, input_of(1)) == (INVALID, "ModelSpec has no name specified.")
    # A feature that the model needs and the example lacks: TensorFlow's own error.
    assert error("tf1", signature, input_of(float("nan")))[0] == INVALID
    # Of the wrong kind.
    other = "regress_x_to_y" if rpc == "Classify" else "classify_x_to_y"
    assert error("tf1", other, input_of(1))[0] == INVALID
    assert error("tf1", "serving_default", input_of(1))[0] == INVALID
    request = make("tf1", signature, input_of(1))
    request.ClearField("model_spec")
    assert error_of(lambda: call(request, timeout=PATIENCE_S)) == (INVALID, "Missing ModelSpec")


@pytest.mark.parametrize("form", FORMS)
def test_classes_and_scores_that_do_not_go_together(examples_server: Server, form: str) -> None:
    request = classify_request(form, "classify_wrongly", input_of(2))
    code, message = error_of(lambda: examples_server.prediction.Classify(request, timeout=PATIENCE_S))
    assert code == INVALID
    assert message == "Tensors class and score should match in dim_size(1). Got 0 vs. 1"
    assert examples_server.process.poll() is None


def test_method_names_are_checked_where_asked(zoo: Path, base_path: Path, tmp_path: Path) -> None:
    # TF2 exports call every signature "predict"; by default only inputs and outputs matter.
    saved_models.publish(zoo / "half_plus_two_tf2", base_path, 1)
    with serving(tmp_path, f"--model_base_path={base_path}", "--enable_signature_method_name_check") as running:
        request = regress_request("default", "regress_x_to_y", input_of(2))
        assert error_of(lambda: running.prediction.Regress(request, timeout=PATIENCE_S)) == (
            INVALID,
            "Expected regression signature method_name to be tensorflow/serving/regress. "
            "Was: tensorflow/serving/predict",
        )


# ---- the forms of models ----


def test_predict_on_every_form(examples_server: Server) -> None:
    for model, x in (("tf1", [[2.0]]), ("tf2", [2.0]), ("keras", [[2.0]])):
        response = examples_server.predict(predict_request(inputs={"x": np.float32(x)}, name=model))
        assert tf.make_ndarray(response.outputs["y"]).tolist() == (np.float32(x) / 2 + 2).tolist()


def test_a_model_with_state(examples_server: Server) -> None:
    def call(signature: str, **inputs: object) -> float:
        response = examples_server.predict(predict_request(signature, inputs, name="counter"))
        return float(tf.make_ndarray(response.outputs["output"]))

    assert call("reset_counter") == 0
    assert [call("incr_counter") for _ in range(3)] == [1, 2, 3]
    assert call("incr_counter_by", delta=np.float32(5)) == 8
    assert call("get_counter") == 8


# ---- metadata ----


def metadata_request(name: str, *fields: str) -> get_model_metadata_pb2.GetModelMetadataRequest:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
    request.model_spec.name = name
    return request


def test_metadata(examples_server: Server, zoo: Path) -> None:
    call = examples_server.prediction.GetModelMetadata
    request = metadata_request("tf1", "signature_def")
    request.model_spec.version_label = "old"
    response = call(request, timeout=PATIENCE_S)
    assert (response.model_spec.name, response.model_spec.version.value) == ("tf1", 1)
    assert response.model_spec.signature_name == ""
    assert list(response.metadata) == ["signature_def"]
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    saved = tf.compat.v1.saved_model.load  # the signatures as they stand in the file
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        expected = saved(session, ["serve"], str(zoo / "half_plus_two_tf1")).signature_def
    assert dict(signatures.signature_def) == dict(expected)


def test_metadata_errors(examples_server: Server) -> None:
    call = examples_server.prediction.GetModelMetadata

    def error(request: get_model_metadata_pb2.GetModelMetadataRequest) -> tuple[grpc.StatusCode, str]:
        return error_of(lambda: call(request, timeout=PATIENCE_S))

    assert error(metadata_request("tf1")) == (
        INVALID,
        "GetModelMetadataRequest must specify at least one metadata_field",
    )
    assert error(metadata_request("tf1", "f")) == (INVALID, "Metadata field f is not supported")
    missing = (grpc.StatusCode.NOT_FOUND, "Servable not found for request: Latest(m)")
    assert error(metadata_request("m", "signature_def")) == missing
    request = metadata_request("tf1", "signature_def")
    request.ClearField("model_spec")
    assert error(request) == (INVALID, "Missing ModelSpec")
