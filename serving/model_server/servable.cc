#include "serving/model_server/servable.h"

#include <algorithm>
#include <exception>
#include <iterator>
#include <limits>
#include <numeric>
#include <utility>

#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.h"
#include "tokenizer_cc/status.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::DataTypeString;
using ::tensorflow::Tensor;
using ::tensorflow::TensorInfo;
using ::tensorflow::TensorProto;
using ::tensorflow::serving::PredictRequest;
using ::tensorflow::serving::PredictResponse;

constexpr char kDefaultSignature[] = "serving_default";

// Beyond so many different sets of outputs a session computes all of them, and the answer keeps those asked for.
constexpr size_t kMaxOutputSets = 64;

// A tensor message may claim more elements than it carries: TensorFlow repeats the last value. Up to this size it may;
// beyond, each byte of the message stands for at most kMaxBytesPerMessageByte of the tensor. No message that carries
// all its elements exceeds that: the extreme is an empty string in tensor_content, 1 byte there and 24 in memory.
constexpr int64_t kMaxRepeatedBytes = int64_t{64} << 20;
constexpr int64_t kMaxBytesPerMessageByte = 32;

// Protobuf can neither hold nor send more, and checks that with an abort.
constexpr size_t kMaxResponseBytes = std::numeric_limits<int32_t>::max();
// A message is at most ten times as large as its tensors (an int8 that is negative): below this, no need to count.
constexpr size_t kSmallResponseBytes = kMaxResponseBytes / 16;

tensorflow::Status TooLarge() {
  return absl::ResourceExhaustedError(StrCat("the answer is larger than ", kMaxResponseBytes,
                                             " bytes, the most that a message holds; ask for less, or for fewer "
                                             "outputs with output_filter"));
}

tensorflow::Status InvalidArgument(const std::string& message) { return absl::InvalidArgumentError(message); }

using Names = std::set<std::string>;

Names NamesOf(const std::vector<Endpoint>& endpoints) {
  Names names;
  for (const Endpoint& endpoint : endpoints) names.insert(endpoint.alias);
  return names;
}

Names NamesOf(const PredictRequest& request) {
  Names names;
  for (const auto& input : request.inputs()) names.insert(input.first);
  return names;
}

std::string Join(const Names& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ",") + name;
  return text;
}

Names Difference(const Names& left, const Names& right) {
  Names result;
  std::set_difference(left.begin(), left.end(), right.begin(), right.end(), std::inserter(result, result.end()));
  return result;
}

std::vector<Endpoint> SortedEndpoints(const google::protobuf::Map<std::string, TensorInfo>& infos) {
  std::vector<Endpoint> endpoints;
  for (const auto& [alias, info] : infos) endpoints.push_back({alias, info.name(), info.dtype()});
  std::sort(endpoints.begin(), endpoints.end(),
            [](const Endpoint& left, const Endpoint& right) { return left.alias < right.alias; });
  return endpoints;
}

// Reads `proto` without trusting it.
tensorflow::Status ParseTensor(const std::string& alias, const TensorProto& proto, Tensor* tensor) {
  const std::string error = "tensor parsing error: " + alias;
  // Handles to resources and arbitrary C++ objects have no business in a request.
  if (proto.dtype() == tensorflow::DT_RESOURCE || proto.dtype() == tensorflow::DT_VARIANT) {
    return InvalidArgument(error);
  }
  // Refuses negative and unknown dimensions, too many of them, and products beyond int64.
  tensorflow::TensorShape shape;
  if (!tensorflow::TensorShape::BuildTensorShape(proto.tensor_shape(), &shape).ok()) return InvalidArgument(error);
  const int64_t element_bytes = std::max(1, tensorflow::DataTypeSize(proto.dtype()));
  const int64_t allowed_bytes =
      std::max(kMaxRepeatedBytes, kMaxBytesPerMessageByte * static_cast<int64_t>(proto.ByteSizeLong()));
  if (shape.num_elements() > allowed_bytes / element_bytes) {
    return InvalidArgument(StrCat(error, ": the shape ", shape.DebugString(), " of ", DataTypeString(proto.dtype()),
                                  " needs more than ", allowed_bytes, " bytes, far more than the message carries (",
                                  proto.ByteSizeLong(), " bytes); send every element"));
  }
  return tensor->FromProto(proto) ? tensorflow::OkStatus() : InvalidArgument(error);
}

// The request's inputs as a session takes them, in the signature's order.
tensorflow::Status ReadInputs(const Signature& signature, const PredictRequest& request,
                              std::vector<std::pair<std::string, Tensor>>* feeds) {
  if (request.inputs().size() != signature.inputs.size()) {
    const Names sent = NamesOf(request);
    const Names expected = NamesOf(signature.inputs);
    return InvalidArgument(StrCat("input size does not match signature: ", sent.size(), "!=", expected.size(), " len({",
                                  Join(sent), "}) != len({", Join(expected), "}). Sent extra: {",
                                  Join(Difference(sent, expected)), "}. Missing but required: {",
                                  Join(Difference(expected, sent)), "}."));
  }
  feeds->reserve(signature.inputs.size());
  for (const Endpoint& input : signature.inputs) {
    const auto sent = request.inputs().find(input.alias);
    if (sent == request.inputs().end()) {
      return InvalidArgument(StrCat("Signature input alias: ", input.alias, "(feed name: ", input.tensor,
                                    ") not found in request and no default value provided. Inputs expected to be in "
                                    "the request {",
                                    Join(NamesOf(request)), "}, or default input alias set: "));
    }
    Tensor tensor;
    TF_RETURN_IF_ERROR(ParseTensor(input.alias, sent->second, &tensor));
    // Before the session, whose own check speaks of the feeds in an order of its own.
    if (input.dtype != tensorflow::DT_INVALID && tensor.dtype() != input.dtype) {
      return InvalidArgument(StrCat("Expects arg[", feeds->size(), "] to be ", DataTypeString(input.dtype), " but ",
                                    DataTypeString(tensor.dtype()), " is provided"));
    }
    feeds->emplace_back(input.tensor, std::move(tensor));
  }
  return tensorflow::OkStatus();
}

// The places in `signature.outputs` of those that `filter` asks for, ascending; all of them where it is empty.
tensorflow::Status SelectOutputs(const Signature& signature,
                                 const google::protobuf::RepeatedPtrField<std::string>& filter,
                                 std::vector<size_t>* outputs) {
  Names wanted;
  for (const std::string& alias : filter) {
    const auto same = [&](const Endpoint& output) { return output.alias == alias; };
    if (std::none_of(signature.outputs.begin(), signature.outputs.end(), same)) {
      return InvalidArgument(StrCat("output tensor alias not found in signature: ", alias,
                                    " Outputs expected to be in the set {", Join(NamesOf(signature.outputs)), "}."));
    }
    if (!wanted.insert(alias).second) return InvalidArgument("duplicate output tensor alias: " + alias);
  }
  for (size_t i = 0; i < signature.outputs.size(); ++i) {
    if (wanted.empty() || wanted.count(signature.outputs[i].alias) > 0) outputs->push_back(i);
  }
  return tensorflow::OkStatus();
}

// TensorFlow's error of a load, in terms of the flag that mends it where an op is missing.
tensorflow::Status ExplainLoadError(const tensorflow::Status& status, const std::string& name, int64_t version) {
  const std::string message(status.message());
  for (const std::string marker : {"Op type not registered '", "No OpKernel was registered to support Op '"}) {
    const size_t begin = message.find(marker);
    if (begin == std::string::npos) continue;
    const size_t op_begin = begin + marker.size();
    const std::string op = message.substr(op_begin, message.find('\'', op_begin) - op_begin);
    return absl::NotFoundError(StrCat("model ", name, " version ", version, " needs the op ", op,
                                      ", which this server does not have; start it with the library that holds the "
                                      "op: --op_library=/path/to/library.so (",
                                      message, ")"));
  }
  return status;
}

}  // namespace

Servable::Servable(const ServableOptions& options, std::string name, int64_t version)
    : name_(std::move(name)), version_(version), tensor_content_(options.tensor_content) {
  if (options.run_in_caller_thread) run_options_.set_inter_op_thread_pool(-1);
}

tensorflow::Status Servable::Load(const ServableOptions& options, const std::string& name, int64_t version,
                                  const std::string& path, std::unique_ptr<Servable>* servable) {
  std::unique_ptr<Servable> loaded(new Servable(options, name, version));
  try {  // an op library may throw, and a SavedModel may claim more memory than there is
    const tensorflow::Status status =
        tensorflow::LoadSavedModel(options.session_options, {}, path, options.tags, &loaded->bundle_);
    if (!status.ok()) return ExplainLoadError(status, name, version);
  } catch (const std::exception& error) {
    return absl::InternalError(StrCat("the load of ", path, " threw an exception: ", error.what()));
  }
  for (const auto& [key, signature] : loaded->bundle_.GetSignatures()) {
    loaded->signatures_[key] = {SortedEndpoints(signature.inputs()), SortedEndpoints(signature.outputs())};
  }
  *servable = std::move(loaded);
  return tensorflow::OkStatus();
}

bool Servable::RunsAsAsked(const std::string& signature_name, const std::vector<size_t>& outputs) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto set = std::make_pair(signature_name, outputs);
  if (output_sets_.size() < kMaxOutputSets) output_sets_.insert(set);
  return output_sets_.count(set) > 0;
}

tensorflow::Status Servable::Predict(const PredictRequest& request, std::chrono::system_clock::time_point deadline,
                                     PredictResponse* response) const {
  const std::string& asked = request.model_spec().signature_name();
  const std::string signature_name = asked.empty() ? kDefaultSignature : asked;
  const auto found = signatures_.find(signature_name);
  if (found == signatures_.end()) {
    return absl::FailedPreconditionError("Serving signature key \"" + signature_name + "\" not found.");
  }
  const Signature& signature = found->second;
  std::vector<std::pair<std::string, Tensor>> feeds;
  TF_RETURN_IF_ERROR(ReadInputs(signature, request, &feeds));
  std::vector<size_t> wanted;
  TF_RETURN_IF_ERROR(SelectOutputs(signature, request.output_filter(), &wanted));
  std::vector<size_t> computed = wanted;
  if (wanted.size() < signature.outputs.size() && !RunsAsAsked(signature_name, wanted)) {
    computed.resize(signature.outputs.size());
    std::iota(computed.begin(), computed.end(), 0);
  }
  std::vector<std::string> fetches;
  for (const size_t output : computed) fetches.push_back(signature.outputs[output].tensor);

  tensorflow::RunOptions run_options = run_options_;
  if (deadline != std::chrono::system_clock::time_point::max()) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::system_clock::now()).count();
    if (left <= 0) return absl::DeadlineExceededError("the deadline passed before the request was computed");
    run_options.set_timeout_in_ms(left);
  }
  std::vector<Tensor> results;
  TF_RETURN_IF_ERROR(bundle_.GetSession()->Run(run_options, feeds, fetches, {}, &results, nullptr));

  response->mutable_model_spec()->set_name(name_);
  response->mutable_model_spec()->set_signature_name(signature_name);
  response->mutable_model_spec()->mutable_version()->set_value(version_);
  size_t tensor_bytes = 0;
  for (const Tensor& result : results) tensor_bytes += result.TotalBytes();
  if (tensor_bytes > kMaxResponseBytes) return TooLarge();
  for (size_t i = 0; i < computed.size(); ++i) {
    if (!std::binary_search(wanted.begin(), wanted.end(), computed[i])) continue;
    TensorProto* proto = &(*response->mutable_outputs())[signature.outputs[computed[i]].alias];
    if (tensor_content_) {
      results[i].AsProtoTensorContent(proto);
    } else {
      results[i].AsProtoField(proto);
    }
  }
  if (tensor_bytes > kSmallResponseBytes && response->ByteSizeLong() > kMaxResponseBytes) return TooLarge();
  return tensorflow::OkStatus();
}

}  // namespace dpsr::serving
