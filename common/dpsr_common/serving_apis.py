"""TensorFlow Serving's API: message classes and methods, without TensorFlow.

The generated module `tensorflow_serving.apis.predict_pb2` imports all of TensorFlow. The same messages are built here
from the descriptor set that the build takes out of the `tensorflow-serving-api` wheel, in a pool of their own, so that
a process may also import TensorFlow without two definitions of one message meeting. What matters is the wire format,
which is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_DESCRIPTOR_SET = Path(__file__).with_name("serving_apis.desc")

# gRPC's own limit is 4 MiB; TensorFlow Serving raises it to what a message may hold at all, and so do we.
MAX_MESSAGE_BYTES = 2**31 - 1
GRPC_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

# A connection to a server is direct (`http_proxy` is about the web), and a server that comes back is found within
# two seconds instead of gRPC's two minutes.
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    *GRPC_OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


def _load_pool() -> descriptor_pool.DescriptorPool:
    try:
        descriptors = descriptor_pb2.FileDescriptorSet.FromString(_DESCRIPTOR_SET.read_bytes())
    except FileNotFoundError:
        raise ImportError(
            f"{_DESCRIPTOR_SET} is missing: the native parts of DPSR are not built; run `make setup`"
        ) from None
    pool = descriptor_pool.DescriptorPool()
    for file in descriptors.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _load_pool()


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(name))


TensorProto = _message("tensorflow.TensorProto")
ModelSpec = _message("tensorflow.serving.ModelSpec")
PredictRequest = _message("tensorflow.serving.PredictRequest")
PredictResponse = _message("tensorflow.serving.PredictResponse")
ClassificationRequest = _message("tensorflow.serving.ClassificationRequest")
ClassificationResponse = _message("tensorflow.serving.ClassificationResponse")
RegressionRequest = _message("tensorflow.serving.RegressionRequest")
RegressionResponse = _message("tensorflow.serving.RegressionResponse")
MultiInferenceRequest = _message("tensorflow.serving.MultiInferenceRequest")
MultiInferenceResponse = _message("tensorflow.serving.MultiInferenceResponse")
GetModelMetadataRequest = _message("tensorflow.serving.GetModelMetadataRequest")
GetModelMetadataResponse = _message("tensorflow.serving.GetModelMetadataResponse")
SignatureDefMap = _message("tensorflow.serving.SignatureDefMap")
GetModelStatusRequest = _message("tensorflow.serving.GetModelStatusRequest")
GetModelStatusResponse = _message("tensorflow.serving.GetModelStatusResponse")
ModelVersionStatus = _message("tensorflow.serving.ModelVersionStatus")
ReloadConfigRequest = _message("tensorflow.serving.ReloadConfigRequest")
ReloadConfigResponse = _message("tensorflow.serving.ReloadConfigResponse")

PREDICT = "/tensorflow.serving.PredictionService/Predict"
GET_MODEL_METADATA = "/tensorflow.serving.PredictionService/GetModelMetadata"
GET_MODEL_STATUS = "/tensorflow.serving.ModelService/GetModelStatus"
RELOAD_CONFIG = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"

# Every method of both services, as gRPC addresses it ("/package.Service/Method"), with the descriptor of its request.
METHODS: dict[str, Any] = {
    f"/{service}/{method.name}": method.input_type
    for service in ("tensorflow.serving.PredictionService", "tensorflow.serving.ModelService")
    for method in _POOL.FindServiceByName(service).methods
}
