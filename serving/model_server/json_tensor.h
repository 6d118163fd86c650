// Reads requests in TensorFlow Serving's JSON, and writes answers. Pure functions of their arguments.
#ifndef DPSR_SERVING_MODEL_SERVER_JSON_TENSOR_H_
#define DPSR_SERVING_MODEL_SERVER_JSON_TENSOR_H_

#include <map>
#include <string>

#include "tensorflow/core/framework/tensor.pb.h"
#include "tensorflow/core/platform/status.h"
#include "tensorflow/core/protobuf/meta_graph.pb.h"
#include "tensorflow_serving/apis/classification.pb.h"
#include "tensorflow_serving/apis/input.pb.h"
#include "tensorflow_serving/apis/predict.pb.h"
#include "tensorflow_serving/apis/regression.pb.h"

namespace dpsr::serving {

using SignatureDefs = google::protobuf::Map<std::string, tensorflow::SignatureDef>;

// How a request, and so its answer, writes tensors: as a list of instances (kRow), or as a whole tensor for each name
// (kColumn).
enum class JsonFormat { kRow, kColumn };

// Reads `{"signature_name": ..., "instances": [...]}` or `{..., "inputs": ...}`. Fills in everything except the model's
// name and version. Numbers and texts are converted to the types of the signature; INVALID_ARGUMENT if that fails.
// Inputs with a default may be left out, by all instances alike. Values without a name are those of the only input, or
// of the only one without a default.
tensorflow::Status ReadPredictJson(const std::string& text, const SignatureDefs& signatures,
                                   tensorflow::serving::PredictRequest* request, JsonFormat* format);

// Writes `{"predictions": [...]}` or `{"outputs": ...}`. A single tensor is written without its name.
tensorflow::Status WritePredictJson(const google::protobuf::Map<std::string, tensorflow::TensorProto>& outputs,
                                    JsonFormat format, std::string* text);

// Reads `{"signature_name": ..., "context": {...}, "examples": [{...}, ...]}`.
tensorflow::Status ReadExamplesJson(const std::string& text, std::string* signature_name,
                                    tensorflow::serving::Input* input);

// Write `{"results": [[["label", score], ...], ...]}` and `{"results": [value, ...]}`.
std::string WriteClassifyJson(const tensorflow::serving::ClassificationResult& result);
std::string WriteRegressJson(const tensorflow::serving::RegressionResult& result);

// Writes `{"error": "..."}`.
std::string WriteErrorJson(const std::string& message);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_JSON_TENSOR_H_
