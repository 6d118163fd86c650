// Answers the requests of gRPC and REST: finds the model, runs it, and records metrics.
#ifndef DPSR_SERVING_MODEL_SERVER_REQUEST_HANDLER_H_
#define DPSR_SERVING_MODEL_SERVER_REQUEST_HANDLER_H_

#include <functional>

#include "serving/model_server/inference.h"
#include "serving/model_server/model_manager.h"
#include "tensorflow/core/platform/status.h"
#include "tensorflow_serving/apis/get_model_status.pb.h"
#include "tensorflow_serving/apis/model_management.pb.h"

namespace dpsr::serving {

// Thread-safe. No method throws. `entrypoint` is a label of the metrics, "GRPC" or "REST".
class RequestHandler {
 public:
  explicit RequestHandler(ModelManager* models) : models_(models) {}

  tensorflow::Status Predict(const tensorflow::serving::PredictRequest& request, Deadline deadline,
                             const char* entrypoint, tensorflow::serving::PredictResponse* response) const;
  tensorflow::Status Classify(const tensorflow::serving::ClassificationRequest& request, Deadline deadline,
                              const char* entrypoint, tensorflow::serving::ClassificationResponse* response) const;
  tensorflow::Status Regress(const tensorflow::serving::RegressionRequest& request, Deadline deadline,
                             const char* entrypoint, tensorflow::serving::RegressionResponse* response) const;
  tensorflow::Status MultiInference(const tensorflow::serving::MultiInferenceRequest& request, Deadline deadline,
                                    const char* entrypoint,
                                    tensorflow::serving::MultiInferenceResponse* response) const;
  tensorflow::Status GetModelMetadata(const tensorflow::serving::GetModelMetadataRequest& request,
                                      tensorflow::serving::GetModelMetadataResponse* response) const;
  tensorflow::Status GetModelStatus(const tensorflow::serving::GetModelStatusRequest& request,
                                    tensorflow::serving::GetModelStatusResponse* response) const;
  // Blocks until the new models are available or `cancelled` returns true.
  tensorflow::Status Reload(const tensorflow::serving::ReloadConfigRequest& request,
                            const std::function<bool()>& cancelled,
                            tensorflow::serving::ReloadConfigResponse* response) const;

  // Calls `run` with the version that `spec` asks for, and records it as a request of kind `api` ("Predict", ...). In
  // the latency of REST requests the kind is the method of the path ("predict", ...), as in TensorFlow Serving.
  tensorflow::Status Answer(const tensorflow::serving::ModelSpec& spec, const char* api, const char* entrypoint,
                            const std::function<tensorflow::Status(const Servable& servable)>& run) const;

  // Records a request of this kind that no thread can take, because too many wait.
  void RecordRefused(const tensorflow::serving::ModelSpec& spec, const char* api, const char* entrypoint) const;

  const ModelManager& models() const { return *models_; }

 private:
  ModelManager* const models_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_REQUEST_HANDLER_H_
