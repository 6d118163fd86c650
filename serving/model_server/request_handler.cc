#include "serving/model_server/request_handler.h"

#include <chrono>
#include <memory>
#include <utility>

#include "common/status.h"
#include "serving/model_server/errors.h"
#include "serving/model_server/metrics.h"
#include "serving/model_server/server_config.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::serving::ModelSpec;
using Clock = std::chrono::steady_clock;

tensorflow::Status MissingModelSpec() { return InvalidArgument("Missing ModelSpec"); }

}  // namespace

tensorflow::Status RequestHandler::Answer(
    const ModelSpec& spec, const char* api, const char* entrypoint,
    const std::function<tensorflow::Status(const Servable& servable)>& run) const {
  const auto begin = Clock::now();
  std::shared_ptr<const Servable> servable;
  tensorflow::Status status = models_->Find(spec, &servable);
  const bool found = status.ok();
  int64_t run_micros = 0;
  if (found) {
    const auto run_begin = Clock::now();
    status = CatchExceptions("the model", [&] { return run(*servable); });
    run_micros = MicrosecondsSince(run_begin);
  }
  // A client that asks for models that do not exist must not make the metrics grow.
  RecordRequest(found ? servable->name() : "", api, entrypoint, status, MicrosecondsSince(begin), run_micros);
  return status;
}

void RequestHandler::RecordRefused(const ModelSpec& spec, const char* api, const char* entrypoint) const {
  std::shared_ptr<const Servable> servable;
  const std::string name = models_->Find(spec, &servable).ok() ? servable->name() : "";
  RecordRequest(name, api, entrypoint, absl::ResourceExhaustedError(""), 0, 0);
}

tensorflow::Status RequestHandler::Predict(const tensorflow::serving::PredictRequest& request, Deadline deadline,
                                           const char* entrypoint,
                                           tensorflow::serving::PredictResponse* response) const {
  if (!request.has_model_spec()) return MissingModelSpec();
  return Answer(request.model_spec(), "Predict", entrypoint, [&](const Servable& servable) {
    return dpsr::serving::Predict(servable, request, deadline, response);
  });
}

tensorflow::Status RequestHandler::Classify(const tensorflow::serving::ClassificationRequest& request,
                                            Deadline deadline, const char* entrypoint,
                                            tensorflow::serving::ClassificationResponse* response) const {
  if (!request.has_model_spec()) return MissingModelSpec();
  return Answer(request.model_spec(), "Classify", entrypoint, [&](const Servable& servable) {
    return dpsr::serving::Classify(servable, request, deadline, response);
  });
}

tensorflow::Status RequestHandler::Regress(const tensorflow::serving::RegressionRequest& request, Deadline deadline,
                                           const char* entrypoint,
                                           tensorflow::serving::RegressionResponse* response) const {
  if (!request.has_model_spec()) return MissingModelSpec();
  return Answer(request.model_spec(), "Regress", entrypoint, [&](const Servable& servable) {
    return dpsr::serving::Regress(servable, request, deadline, response);
  });
}

tensorflow::Status RequestHandler::MultiInference(const tensorflow::serving::MultiInferenceRequest& request,
                                                  Deadline deadline, const char* entrypoint,
                                                  tensorflow::serving::MultiInferenceResponse* response) const {
  tensorflow::Status status;
  const ModelSpec* spec = SpecOf(request, &status);
  if (spec == nullptr) return status;
  return Answer(*spec, "MultiInference", entrypoint, [&](const Servable& servable) {
    return dpsr::serving::MultiInference(servable, request, deadline, response);
  });
}

tensorflow::Status RequestHandler::GetModelMetadata(const tensorflow::serving::GetModelMetadataRequest& request,
                                                    tensorflow::serving::GetModelMetadataResponse* response) const {
  if (!request.has_model_spec()) return MissingModelSpec();
  TF_RETURN_IF_ERROR(CheckMetadataFields(request));
  std::shared_ptr<const Servable> servable;
  TF_RETURN_IF_ERROR(models_->Find(request.model_spec(), &servable));
  return dpsr::serving::GetModelMetadata(*servable, request, response);
}

tensorflow::Status RequestHandler::GetModelStatus(const tensorflow::serving::GetModelStatusRequest& request,
                                                  tensorflow::serving::GetModelStatusResponse* response) const {
  if (!request.has_model_spec()) return MissingModelSpec();
  return models_->GetStatus(request.model_spec(), response);
}

tensorflow::Status RequestHandler::Reload(const tensorflow::serving::ReloadConfigRequest& request,
                                          const std::function<bool()>& cancelled,
                                          tensorflow::serving::ReloadConfigResponse* response) const {
  tensorflow::Status status;
  if (request.config().config_case() != tensorflow::serving::ModelServerConfig::kModelConfigList) {
    status = InvalidArgument(
        "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is currently "
        "supported");
  } else {
    std::vector<ModelConfig> models;
    status = ModelsOf(request.config(), &models);
    if (status.ok()) status = models_->Reconfigure(models, cancelled);
  }
  response->mutable_status()->set_error_code(static_cast<tensorflow::error::Code>(status.code()));
  response->mutable_status()->set_error_message(std::string(status.message()));
  return status;
}

}  // namespace dpsr::serving
