// TensorFlow Serving's JSON: requests into messages, answers back into text. Pure functions of their arguments.
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

// How tensors stand in a request, and so in its answer: a list of instances, or a whole tensor a name.
enum class JsonFormat { kRow, kColumn };

// Reads `{"signature_name": ..., "instances": [...]}` or `{..., "inputs": ...}`. All but the name and version of the
// model spec is filled in. The signature says the types: numbers and texts become what it expects, or INVALID_ARGUMENT.
tensorflow::Status ReadPredictJson(const std::string& text, const SignatureDefs& signatures,
                                   tensorflow::serving::PredictRequest* request, JsonFormat* format);

// `{"predictions": [...]}` or `{"outputs": ...}`; one tensor alone stands without its name.
tensorflow::Status WritePredictJson(const google::protobuf::Map<std::string, tensorflow::TensorProto>& outputs,
                                    JsonFormat format, std::string* text);

// Reads `{"signature_name": ..., "context": {...}, "examples": [{...}, ...]}`.
tensorflow::Status ReadExamplesJson(const std::string& text, std::string* signature_name,
                                    tensorflow::serving::Input* input);

// `{"results": [[["label", score], ...], ...]}` and `{"results": [value, ...]}`.
std::string WriteClassifyJson(const tensorflow::serving::ClassificationResult& result);
std::string WriteRegressJson(const tensorflow::serving::RegressionResult& result);

// `{"error": "..."}`
std::string WriteErrorJson(const std::string& message);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_JSON_TENSOR_H_
