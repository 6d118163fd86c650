from __future__ import annotations

import subprocess
import sys

import pytest

from dpsr_common import serving_apis

SERVICES = {
    "PredictionService": ["Classify", "Regress", "Predict", "MultiInference", "GetModelMetadata"],
    "ModelService": ["GetModelStatus", "HandleReloadConfigRequest"],
}


def test_the_methods_are_those_of_both_services():
    assert set(serving_apis.METHODS) == {
        f"/tensorflow.serving.{service}/{method}" for service, methods in SERVICES.items() for method in methods
    }
    assert serving_apis.METHODS[serving_apis.PREDICT].full_name == "tensorflow.serving.PredictRequest"
    named = (serving_apis.GET_MODEL_METADATA, serving_apis.GET_MODEL_STATUS, serving_apis.RELOAD_CONFIG)
    assert set(named) < set(serving_apis.METHODS)


def test_a_request_survives_the_wire():
    request = serving_apis.PredictRequest()
    request.model_spec.name = "demo"
    request.model_spec.version.value = 7
    request.inputs["query"].CopyFrom(serving_apis.TensorProto(dtype=7, string_val=[b"red shoes"]))
    request.output_filter.append("item_ids")
    assert serving_apis.PredictRequest.FromString(request.SerializeToString()) == request


def test_the_bytes_are_those_of_tensorflows_own_messages():
    tensor_pb2 = pytest.importorskip("tensorflow.core.framework.tensor_pb2")
    own = serving_apis.TensorProto(dtype=1, float_val=[1.5, 2.5])
    own.tensor_shape.dim.add(size=2)
    theirs = tensor_pb2.TensorProto.FromString(own.SerializeToString())
    assert list(theirs.float_val) == [1.5, 2.5] and theirs.tensor_shape.dim[0].size == 2
    assert theirs.SerializeToString() == own.SerializeToString()


def test_a_message_may_be_as_large_as_protobuf_allows():
    assert dict(serving_apis.GRPC_OPTIONS) == {
        "grpc.max_send_message_length": 2**31 - 1,
        "grpc.max_receive_message_length": 2**31 - 1,
    }
    assert set(serving_apis.GRPC_OPTIONS) < set(serving_apis.CHANNEL_OPTIONS)


def test_without_the_built_descriptors_the_error_says_what_to_run(tmp_path):
    code = (
        "import pathlib, sys; read = pathlib.Path.read_bytes\n"
        "def missing(path):\n"
        "    if path.name == 'serving_apis.desc': raise FileNotFoundError(path)\n"
        "    return read(path)\n"
        "pathlib.Path.read_bytes = missing\n"
        "import dpsr_common.serving_apis"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: ") and "run `make setup`" in result.stderr
