"""A model server written in Python, with which benchmarks/model_server.py compares ours.

    python python_server.py SAVED_MODEL [OP_LIBRARY...]

It uses grpcio with 8 threads, a TF1 session with a callable (faster than a TF2 signature), and writes answers as raw
bytes (faster than tf.make_tensor_proto).
"""

from __future__ import annotations

import concurrent.futures
import sys

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

THREADS = 8


class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Serves Predict on one SavedModel, for every signature whose inputs are lists of strings."""

    def __init__(self, path: str) -> None:
        v1 = tf.compat.v1
        self._session = v1.Session(graph=tf.Graph())
        with self._session.graph.as_default():
            graph = v1.saved_model.load(self._session, ["serve"], path)
        self._calls = {}
        for name, signature in graph.signature_def.items():
            if name.startswith("__"):
                continue
            inputs = sorted(signature.inputs)
            outputs = sorted(signature.outputs)
            call = self._session.make_callable(
                [signature.outputs[key].name for key in outputs], [signature.inputs[key].name for key in inputs]
            )
            self._calls[name] = (inputs, outputs, call)

    def Predict(self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext) -> object:
        """Returns every output of the signature."""
        inputs, outputs, call = self._calls[request.model_spec.signature_name or "serving_default"]
        found = call(*(np.array(list(request.inputs[key].string_val), dtype=object) for key in inputs))
        response = predict_pb2.PredictResponse()
        response.model_spec.CopyFrom(request.model_spec)
        for key, values in zip(outputs, found, strict=True):
            if values.dtype == object:
                response.outputs[key].CopyFrom(tf.make_tensor_proto(values))
                continue
            tensor = response.outputs[key]
            tensor.dtype = tf.as_dtype(values.dtype).as_datatype_enum
            for size in values.shape:
                tensor.tensor_shape.dim.add(size=size)
            tensor.tensor_content = values.tobytes()
        return response


def main() -> None:
    path, *op_libraries = sys.argv[1:]
    for library in op_libraries:
        tf.load_op_library(library)
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(THREADS))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(path), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
