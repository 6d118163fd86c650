#include "serving/model_server/server_config.h"

#include <set>
#include <utility>

#include "common/status.h"
#include "google/protobuf/io/tokenizer.h"
#include "google/protobuf/text_format.h"
#include "serving/model_server/errors.h"
#include "serving/model_server/server_options.h"
#include "tensorflow/core/platform/env.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::serving::ModelServerConfig;
using Policy = ::tensorflow::serving::FileSystemStoragePathSourceConfig::ServableVersionPolicy;

constexpr char kPlatform[] = "tensorflow";

// Keeps the first error of a parse.
class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, google::protobuf::io::ColumnNumber column, const std::string& message) override {
    if (text.empty()) text = StrCat(line + 1, ":", column + 1, ": ", message);
  }
  std::string text;
};

VersionPolicy PolicyOf(const Policy& policy) {
  VersionPolicy result;
  switch (policy.policy_choice_case()) {
    case Policy::kAll:
      result.kind = VersionPolicy::Kind::kAll;
      break;
    case Policy::kSpecific:
      result.kind = VersionPolicy::Kind::kSpecific;
      result.specific = {policy.specific().versions().begin(), policy.specific().versions().end()};
      break;
    case Policy::kLatest:
      if (policy.latest().num_versions() > 0) result.num_latest = policy.latest().num_versions();
      break;
    case Policy::POLICY_CHOICE_NOT_SET:
      break;
  }
  return result;
}

// model_type is deprecated, but old configurations still use it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
tensorflow::Status CheckPlatform(const tensorflow::serving::ModelConfig& config) {
  const bool has_type = config.model_type() != tensorflow::serving::MODEL_TYPE_UNSPECIFIED;
  const std::string& platform = config.model_platform();
  if (has_type && !platform.empty()) {
    return InvalidArgument(
        "Illegal setting both ModelServerConfig::model_type (deprecated) and ModelServerConfig::model_platform.");
  }
  if (!has_type && platform.empty()) {
    return InvalidArgument(
        "Illegal setting neither ModelServerConfig::model_type (deprecated) nor ModelServerConfig::model_platform; "
        "give model_platform: \"tensorflow\"");
  }
  if (has_type ? config.model_type() != tensorflow::serving::TENSORFLOW : platform != kPlatform) {
    return InvalidArgument(StrCat("Model ", config.name(), " requests unsupported platform ",
                                  has_type ? "OTHER" : platform, "; expected \"", kPlatform, "\""));
  }
  return tensorflow::OkStatus();
}
#pragma GCC diagnostic pop

}  // namespace

tensorflow::Status ParseTextProto(const std::string& text, google::protobuf::Message* message) {
  google::protobuf::TextFormat::Parser parser;
  FirstError error;
  parser.RecordErrorsTo(&error);
  parser.SetRecursionLimit(100);
  if (parser.ParseFromString(text, message)) return tensorflow::OkStatus();
  return InvalidArgument(
      StrCat("Error parsing text-format ", message->GetDescriptor()->full_name(), ": ", error.text));
}

tensorflow::Status ReadTextProto(const std::string& path, google::protobuf::Message* message) {
  std::string text;
  TF_RETURN_IF_ERROR(tensorflow::ReadFileToString(tensorflow::Env::Default(), path, &text));
  const tensorflow::Status parsed = ParseTextProto(text, message);
  if (parsed.ok()) return parsed;
  return InvalidArgument(StrCat(path, ": ", std::string(parsed.message())));
}

tensorflow::Status ModelsOf(const ModelServerConfig& config, std::vector<ModelConfig>* models) {
  if (config.config_case() == ModelServerConfig::kCustomModelConfig) {
    return InvalidArgument("custom_model_config is not supported; use model_config_list");
  }
  std::set<std::string> names;
  for (const auto& model : config.model_config_list().config()) {
    if (model.name().empty()) return InvalidArgument("a model of the config list has no name; give each model a name");
    if (!names.insert(model.name()).second) {
      return InvalidArgument(StrCat("Illegal to list model ", model.name(), " multiple times in config list"));
    }
    TF_RETURN_IF_ERROR(CheckPlatform(model));
    const Status base_path = CheckBasePath(model.name(), model.base_path());
    if (!base_path.ok()) return InvalidArgument(base_path.message());
    ModelConfig result;
    result.name = model.name();
    result.base_path = model.base_path();
    result.policy = PolicyOf(model.model_version_policy());
    result.labels = {model.version_labels().begin(), model.version_labels().end()};
    models->push_back(std::move(result));
  }
  return tensorflow::OkStatus();
}

}  // namespace dpsr::serving
