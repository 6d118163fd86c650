"""Message classes and method names of TensorFlow Serving's API, and tf.train.Example, without TensorFlow.

The generated module `tensorflow_serving.apis.predict_pb2` imports all of TensorFlow. Here the same messages are built
from the descriptors that common/dump_apis.py takes out of the `tensorflow-serving-api` wheel. They live in a descriptor
pool of their own, so that a process which also imports TensorFlow does not meet two definitions of one message. The
bytes on the wire are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_DESCRIPTOR_SET = Path(__file__).with_name("serving_apis.desc")

# gRPC's own limit is 4 MiB. Like TensorFlow Serving, we raise it to the size that a protobuf message can have.
MAX_MESSAGE_BYTES = 2**31 - 1
GRPC_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

# Options for connections to servers. They ignore the environment variable `http_proxy`, which is meant for the web, and
# find a server that comes back within two seconds instead of gRPC's two minutes.
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    *GRPC_OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


def load_pool(path: Path, *more: bytes) -> descriptor_pool.DescriptorPool:
    """Makes a descriptor pool of its own from a file with a FileDescriptorSet, which the build writes.

    Args:
        path: the file.
        more: serialized FileDescriptorProtos that are added.

    Raises:
        ImportError: the file does not exist.
    """
    try:
        descriptors = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())
    except FileNotFoundError:
        raise ImportError(f"{path} is missing: the native parts of DPSR are not built; run `make setup`") from None
    pool = descriptor_pool.DescriptorPool()
    for file in descriptors.file:
        pool.AddSerializedFile(file.SerializeToString())
    for serialized in more:
        pool.AddSerializedFile(serialized)
    return pool


POOL = load_pool(_DESCRIPTOR_SET)


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


TensorProto = _message("tensorflow.TensorProto")
Example = _message("tensorflow.Example")
ModelSpec = _message("tensorflow.serving.ModelSpec")
PredictRequest = _message("tensorflow.serving.PredictRequest")
PredictResponse = _message("tensorflow.serving.PredictResponse")
PredictionLog = _message("tensorflow.serving.PredictionLog")  # a warm-up request
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
SERVICES = ("tensorflow.serving.PredictionService", "tensorflow.serving.ModelService")
METHODS: dict[str, Any] = {
    f"/{service}/{method.name}": method.input_type
    for service in SERVICES
    for method in POOL.FindServiceByName(service).methods
}
