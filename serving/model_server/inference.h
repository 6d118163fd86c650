// Answers the requests of PredictionService with a servable. The codes and messages of errors are TensorFlow Serving's.
#ifndef DPSR_SERVING_MODEL_SERVER_INFERENCE_H_
#define DPSR_SERVING_MODEL_SERVER_INFERENCE_H_

#include <string>

#include "serving/model_server/servable.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor.pb.h"
#include "tensorflow/core/platform/status.h"
#include "tensorflow_serving/apis/classification.pb.h"
#include "tensorflow_serving/apis/get_model_metadata.pb.h"
#include "tensorflow_serving/apis/inference.pb.h"
#include "tensorflow_serving/apis/model.pb.h"
#include "tensorflow_serving/apis/predict.pb.h"
#include "tensorflow_serving/apis/regression.pb.h"

namespace dpsr::serving {

// Reads the input `alias` of a request, which may be malicious. INVALID_ARGUMENT: not a valid tensor, or one that
// claims far more memory than the message carries.
tensorflow::Status ParseTensor(const std::string& alias, const tensorflow::TensorProto& proto,
                               tensorflow::Tensor* tensor);

// Runs the signature that the request names, by default `serving_default`, on the request's tensors.
tensorflow::Status Predict(const Servable& servable, const tensorflow::serving::PredictRequest& request,
                           Deadline deadline, tensorflow::serving::PredictResponse* response);

// Run signatures that take serialized tf.Examples.
tensorflow::Status Classify(const Servable& servable, const tensorflow::serving::ClassificationRequest& request,
                            Deadline deadline, tensorflow::serving::ClassificationResponse* response);
tensorflow::Status Regress(const Servable& servable, const tensorflow::serving::RegressionRequest& request,
                           Deadline deadline, tensorflow::serving::RegressionResponse* response);
tensorflow::Status MultiInference(const Servable& servable, const tensorflow::serving::MultiInferenceRequest& request,
                                  Deadline deadline, tensorflow::serving::MultiInferenceResponse* response);

// Returns the signatures of a servable.
tensorflow::Status GetModelMetadata(const Servable& servable,
                                    const tensorflow::serving::GetModelMetadataRequest& request,
                                    tensorflow::serving::GetModelMetadataResponse* response);
// Checks what a request asks for, which does not depend on the servable.
tensorflow::Status CheckMetadataFields(const tensorflow::serving::GetModelMetadataRequest& request);

// Returns the one model that all tasks of a request ask for; null, with an error in `status`, if there is none.
const tensorflow::serving::ModelSpec* SpecOf(const tensorflow::serving::MultiInferenceRequest& request,
                                             tensorflow::Status* status);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_INFERENCE_H_
