#include "serving/model_server/rest_api.h"

#include <algorithm>
#include <cctype>
#include <string_view>
#include <utility>

#include "common/status.h"
#include "google/protobuf/util/json_util.h"
#include "serving/model_server/errors.h"
#include "serving/model_server/json_tensor.h"
#include "serving/model_server/metrics.h"
#include "serving/model_server/parse_number.h"
#include "serving/model_server/request_scope.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::serving::ModelSpec;

constexpr char kEntrypoint[] = "REST";
constexpr char kText[] = "text/plain; charset=utf-8";

bool EqualsIgnoringCase(std::string_view left, std::string_view right) {
  return left.size() == right.size() && std::equal(left.begin(), left.end(), right.begin(), [](char a, char b) {
           return std::tolower(static_cast<unsigned char>(a)) == std::tolower(static_cast<unsigned char>(b));
         });
}

// Removes `prefix` from the front of `text`, ignoring case. Returns false if it is not there.
bool Consume(std::string_view* text, std::string_view prefix) {
  if (text->size() < prefix.size() || !EqualsIgnoringCase(text->substr(0, prefix.size()), prefix)) return false;
  text->remove_prefix(prefix.size());
  return true;
}

// Returns the value of a hexadecimal digit, or -1.
int HexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  const int letter = std::tolower(static_cast<unsigned char>(c));
  return letter >= 'a' && letter <= 'f' ? letter - 'a' + 10 : -1;
}

// Removes the text before the next '/' or ':', and returns it. %XX stands for a byte.
std::string ConsumeName(std::string_view* text) {
  const size_t end = std::min(text->find_first_of("/:"), text->size());
  std::string name;
  for (size_t i = 0; i < end; ++i) {
    const bool escaped = (*text)[i] == '%' && i + 2 < end && HexValue((*text)[i + 1]) >= 0 && HexValue((*text)[i + 2]) >= 0;
    name += escaped ? static_cast<char>(HexValue((*text)[i + 1]) * 16 + HexValue((*text)[i + 2])) : (*text)[i];
    if (escaped) i += 2;
  }
  text->remove_prefix(end);
  return name;
}

tensorflow::Status Malformed(const RestRequest& request) {
  return InvalidArgument("Malformed request: " + request.method + " " + request.path);
}

// Reads `M[/versions/N|/labels/L]` and removes it from the front of `path`.
tensorflow::Status ReadSpec(const RestRequest& request, std::string_view* path, ModelSpec* spec) {
  spec->set_name(ConsumeName(path));
  if (spec->name().empty()) return Malformed(request);
  if (Consume(path, "/versions/")) {
    const std::string text = ConsumeName(path);
    const bool is_number =
        !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
    if (!is_number) return Malformed(request);
    int64_t version = 0;
    if (!ParseNumber(text, &version)) {
      return InvalidArgument("Failed to convert version: " + text + " to numeric.");
    }
    spec->mutable_version()->set_value(version);
  } else if (Consume(path, "/labels/")) {
    spec->set_version_label(ConsumeName(path));
    if (spec->version_label().empty()) return Malformed(request);
  }
  return tensorflow::OkStatus();
}

tensorflow::Status ToJson(const google::protobuf::Message& message, std::string* text) {
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = true;
  options.always_print_primitive_fields = true;
  options.preserve_proto_field_names = true;
  const auto status = google::protobuf::util::MessageToJsonString(message, text, options);
  if (status.ok()) return tensorflow::OkStatus();
  return absl::InternalError("cannot write the answer as JSON: " + std::string(status.message()));
}

}  // namespace

int HttpStatus(const tensorflow::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 200;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kOutOfRange:
      return 400;
    case absl::StatusCode::kUnauthenticated:
      return 401;
    case absl::StatusCode::kPermissionDenied:
      return 403;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kAborted:
      return 409;
    case absl::StatusCode::kResourceExhausted:
      return 429;
    case absl::StatusCode::kCancelled:
      return 499;
    case absl::StatusCode::kUnimplemented:
      return 501;
    case absl::StatusCode::kUnavailable:
      return 503;
    case absl::StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 500;
  }
}

RestReply ErrorReply(int status, const std::string& message) {
  return {status, "application/json", WriteErrorJson(message), {}};
}

void RestApi::RecordRefused(const RestRequest& request) const {
  std::string_view path = request.path;
  ModelSpec spec;
  if (!Consume(&path, "/v1/models/") || !ReadSpec(request, &path, &spec).ok()) spec.Clear();
  const char* const api =
      EqualsIgnoringCase(path, ":classify") ? "Classify" : EqualsIgnoringCase(path, ":regress") ? "Regress" : "Predict";
  handler_->RecordRefused(spec, api, kEntrypoint);
}

RestReply RestApi::Answer(const RestRequest& request) const {
  RestReply reply;
  const tensorflow::Status status = CatchExceptions("the request", [&] { return AnswerPath(request, &reply); });
  if (!status.ok()) return ErrorReply(HttpStatus(status), std::string(status.message()));
  return reply;
}

tensorflow::Status RestApi::AnswerPath(const RestRequest& request, RestReply* reply) const {
  std::string_view path = request.path;
  if (path == "/healthz") {
    *reply = {200, kText, "ok\n", {}};
  } else if (path == "/readyz") {
    const bool ready = handler_->models().AllAvailable();
    *reply = {ready ? 200 : 503, kText, ready ? "ok\n" : "a model is not available\n", {}};
  } else if (!metrics_path_.empty() && path == metrics_path_) {
    *reply = AnswerMetrics(request.method);
  } else if (Consume(&path, "/v1/") || EqualsIgnoringCase(path, "/v1")) {
    return AnswerModel(request, &reply->body);
  } else {
    *reply = ErrorReply(404, "Not found: " + request.method + " " + request.path);
  }
  return tensorflow::OkStatus();
}

RestReply RestApi::AnswerMetrics(const std::string& method) const {
  if (method != "GET") return {405, kText, "expected GET\n", {}};
  size_t running = 0, waiting = 0;
  for (const WorkerPool* workers : workers_) {
    running += workers->num_running();
    waiting += workers->num_queued();
  }
  SetInFlight(running, waiting);
  return {200, "text/plain; version=0.0.4", PrometheusText(), {}};
}

tensorflow::Status RestApi::AnswerModel(const RestRequest& request, std::string* body) const {
  std::string_view path = request.path;
  if (request.method != "GET" && request.method != "POST") return Malformed(request);
  if (EqualsIgnoringCase(path, "/v1/models")) {
    return request.method == "GET" ? InvalidArgument("Missing model name in request.") : Malformed(request);
  }
  if (!Consume(&path, "/v1/models/")) return Malformed(request);
  ModelSpec spec;
  TF_RETURN_IF_ERROR(ReadSpec(request, &path, &spec));
  if (request.method == "POST") {
    for (const char* method : {"predict", "classify", "regress"}) {
      if (EqualsIgnoringCase(path, StrCat(":", method))) return Infer(method, spec, request, body);
    }
    return Malformed(request);
  }
  if (path.empty()) {
    tensorflow::serving::GetModelStatusRequest status;
    tensorflow::serving::GetModelStatusResponse response;
    *status.mutable_model_spec() = spec;
    TF_RETURN_IF_ERROR(handler_->GetModelStatus(status, &response));
    return ToJson(response, body);
  }
  if (EqualsIgnoringCase(path, "/metadata")) {
    tensorflow::serving::GetModelMetadataRequest metadata;
    tensorflow::serving::GetModelMetadataResponse response;
    *metadata.mutable_model_spec() = spec;
    metadata.add_metadata_field("signature_def");
    TF_RETURN_IF_ERROR(handler_->GetModelMetadata(metadata, &response));
    // Unpacked, so that the JSON does not contain the type of the Any.
    tensorflow::serving::SignatureDefMap signatures;
    if (!response.metadata().at("signature_def").UnpackTo(&signatures)) {
      return absl::InternalError("cannot read the metadata");
    }
    std::string spec_json, signatures_json;
    TF_RETURN_IF_ERROR(ToJson(response.model_spec(), &spec_json));
    TF_RETURN_IF_ERROR(ToJson(signatures, &signatures_json));
    *body =
        StrCat("{\n\"model_spec\": ", spec_json, ",\n\"metadata\": {\"signature_def\": ", signatures_json, "}\n}\n");
    return tensorflow::OkStatus();
  }
  return Malformed(request);
}

tensorflow::Status RestApi::Infer(const std::string& method, const ModelSpec& spec, const RestRequest& request,
                                  std::string* body) const {
  const RequestScope scope(request.deadline);
  if (method == "predict") {
    // The JSON is read with the signature of the version that answers, because the signature gives the types.
    return handler_->Answer(spec, "Predict", kEntrypoint, [&](const Servable& servable) {
      tensorflow::serving::PredictRequest predict;
      tensorflow::serving::PredictResponse response;
      JsonFormat format;
      TF_RETURN_IF_ERROR(ReadPredictJson(request.body, servable.signature_defs(), &predict, &format));
      TF_RETURN_IF_ERROR(dpsr::serving::Predict(servable, predict, request.deadline, &response));
      return WritePredictJson(response.outputs(), format, body);
    });
  }
  if (method == "classify") {
    tensorflow::serving::ClassificationRequest classify;
    tensorflow::serving::ClassificationResponse response;
    *classify.mutable_model_spec() = spec;
    TF_RETURN_IF_ERROR(ReadExamplesJson(request.body, classify.mutable_model_spec()->mutable_signature_name(),
                                        classify.mutable_input()));
    TF_RETURN_IF_ERROR(handler_->Classify(classify, request.deadline, kEntrypoint, &response));
    *body = WriteClassifyJson(response.result());
    return tensorflow::OkStatus();
  }
  tensorflow::serving::RegressionRequest regress;
  tensorflow::serving::RegressionResponse response;
  *regress.mutable_model_spec() = spec;
  TF_RETURN_IF_ERROR(ReadExamplesJson(request.body, regress.mutable_model_spec()->mutable_signature_name(),
                                      regress.mutable_input()));
  TF_RETURN_IF_ERROR(handler_->Regress(regress, request.deadline, kEntrypoint, &response));
  *body = WriteRegressJson(response.result());
  return tensorflow::OkStatus();
}

}  // namespace dpsr::serving
