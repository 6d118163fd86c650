#include "serving/model_server/inference.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <set>
#include <utility>

#include "common/status.h"
#include "serving/model_server/errors.h"
#include "serving/model_server/metrics.h"
#include "tensorflow/core/example/example.pb.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::DataTypeString;
using ::tensorflow::Tensor;
using ::tensorflow::TensorProto;
using ::tensorflow::tstring;
using ::tensorflow::serving::ClassificationRequest;
using ::tensorflow::serving::ClassificationResponse;
using ::tensorflow::serving::ClassificationResult;
using ::tensorflow::serving::GetModelMetadataRequest;
using ::tensorflow::serving::GetModelMetadataResponse;
using ::tensorflow::serving::InferenceTask;
using ::tensorflow::serving::Input;
using ::tensorflow::serving::ModelSpec;
using ::tensorflow::serving::MultiInferenceRequest;
using ::tensorflow::serving::MultiInferenceResponse;
using ::tensorflow::serving::PredictRequest;
using ::tensorflow::serving::PredictResponse;
using ::tensorflow::serving::RegressionRequest;
using ::tensorflow::serving::RegressionResponse;
using ::tensorflow::serving::RegressionResult;

// TensorFlow's names for the methods, inputs and outputs of signatures that take examples.
constexpr char kClassifyMethod[] = "tensorflow/serving/classify";
constexpr char kRegressMethod[] = "tensorflow/serving/regress";
constexpr char kInputs[] = "inputs";
constexpr char kClasses[] = "classes";
constexpr char kScores[] = "scores";
constexpr char kOutputs[] = "outputs";
constexpr char kSignatureDef[] = "signature_def";

// A tensor message may claim more elements than it carries, because TensorFlow repeats the last value. This is allowed
// up to kMaxRepeatedBytes. In a larger tensor, each byte of the message may stand for at most kMaxBytesPerMessageByte.
// A message that carries all its elements never exceeds that: the extreme is an empty string in tensor_content, with 1
// byte in the message and 24 in memory.
constexpr int64_t kMaxRepeatedBytes = int64_t{64} << 20;
constexpr int64_t kMaxBytesPerMessageByte = 32;

// Protobuf cannot send a larger message, and aborts the process if it has to.
constexpr size_t kMaxResponseBytes = std::numeric_limits<int32_t>::max();
// A message is at most ten times as large as its tensors (a negative int8), so tensors below this limit need no check.
constexpr size_t kSmallResponseBytes = kMaxResponseBytes / 16;

tensorflow::Status TooLarge() {
  return absl::ResourceExhaustedError(StrCat("the answer is larger than ", kMaxResponseBytes,
                                             " bytes, the largest possible message; ask for less, or for fewer "
                                             "outputs with output_filter"));
}

tensorflow::Status NoTasks() { return InvalidArgument("MultiInferenceRequest has no tasks, expected at least one"); }

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

Names NamesWithDefault(const Signature& signature) {
  Names names;
  for (const Endpoint& input : signature.inputs) {
    if (input.fallback.has_value()) names.insert(input.alias);
  }
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

// Returns the memory in bytes that a tensor of this shape needs when it is read from the message.
double BytesNeeded(const TensorProto& proto, const tensorflow::TensorShape& shape) {
  const double elements = static_cast<double>(shape.num_elements());
  const double bytes = elements * std::max(1, tensorflow::DataTypeSize(proto.dtype()));
  const int texts = proto.string_val_size();
  if (texts == 0 || elements <= texts) return bytes;
  return bytes + (elements - texts) * static_cast<double>(proto.string_val(texts - 1).size());
}

// Returns the error of a request with other inputs than the signature has. Inputs with a default are not required.
tensorflow::Status OtherInputs(const Signature& signature, const PredictRequest& request) {
  const Names sent = NamesOf(request);
  const Names expected = NamesOf(signature.inputs);
  return InvalidArgument(StrCat("input size does not match signature: ", sent.size(), "!=", expected.size(), " len({",
                                Join(sent), "}) != len({", Join(expected), "}). Sent extra: {",
                                Join(Difference(sent, expected)), "}. Missing but required: {",
                                Join(Difference(Difference(expected, sent), NamesWithDefault(signature))), "}."));
}

// Reads the inputs of a request as feeds of a session, in the order of the signature. Inputs that are left out get
// their default.
tensorflow::Status ReadInputs(const Signature& signature, const PredictRequest& request,
                              Feeds* feeds) {
  const size_t sent_inputs = request.inputs().size();
  if (sent_inputs > signature.inputs.size() ||
      (sent_inputs < signature.inputs.size() && NamesWithDefault(signature).empty())) {
    return OtherInputs(signature, request);
  }
  size_t known = 0;
  feeds->reserve(signature.inputs.size());
  for (const Endpoint& input : signature.inputs) {
    const auto sent = request.inputs().find(input.alias);
    if (sent == request.inputs().end()) {
      if (input.fallback.has_value()) {
        feeds->emplace_back(input.tensor, *input.fallback);
        continue;
      }
      return InvalidArgument(StrCat("Signature input alias: ", input.alias, "(feed name: ", input.tensor,
                                    ") not found in request and no default value provided. Inputs expected to be in "
                                    "the request {",
                                    Join(NamesOf(request)), "}, or default input alias set: ",
                                    Join(NamesWithDefault(signature))));
    }
    ++known;
    Tensor tensor;
    TF_RETURN_IF_ERROR(ParseTensor(input.alias, sent->second, &tensor));
    // The session would check this, too, but its message counts the feeds in another order.
    if (input.dtype != tensorflow::DT_INVALID && tensor.dtype() != input.dtype) {
      return InvalidArgument(StrCat("Expects arg[", feeds->size(), "] to be ", DataTypeString(input.dtype), " but ",
                                    DataTypeString(tensor.dtype()), " is provided"));
    }
    feeds->emplace_back(input.tensor, std::move(tensor));
  }
  // TensorFlow Serving ignores an input with an unknown name if others are left out. A filter with a mistyped name
  // would then have no effect.
  if (known < sent_inputs) return OtherInputs(signature, request);
  return tensorflow::OkStatus();
}

// Finds the outputs that `filter` asks for, as ascending indices into `signature.outputs`; all outputs if it is empty.
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

void SetSpec(const Servable& servable, const std::string& signature, ModelSpec* spec) {
  spec->set_name(servable.name());
  spec->set_signature_name(signature);
  spec->mutable_version()->set_value(servable.version());
}

const Endpoint* FindEndpoint(const std::vector<Endpoint>& endpoints, const std::string& alias) {
  const auto found =
      std::find_if(endpoints.begin(), endpoints.end(), [&](const Endpoint& e) { return e.alias == alias; });
  return found == endpoints.end() ? nullptr : &*found;
}

// Reads the examples of a request as the graph expects them: serialized, string [examples]. A context, which all
// examples share, is put before the bytes of each example; parsing merges the two.
tensorflow::Status ReadExamples(const Input& input, Tensor* examples) {
  std::string context;
  const google::protobuf::RepeatedPtrField<tensorflow::Example>* list = nullptr;
  if (input.kind_case() == Input::kExampleList) list = &input.example_list().examples();
  if (input.kind_case() == Input::kExampleListWithContext) {
    list = &input.example_list_with_context().examples();
    context = input.example_list_with_context().context().SerializeAsString();
  }
  if (list == nullptr || list->empty()) return InvalidArgument("Input is empty.");
  const int64_t repeated_bytes = static_cast<int64_t>(context.size()) * list->size();
  if (repeated_bytes >
      std::max(kMaxRepeatedBytes, kMaxBytesPerMessageByte * static_cast<int64_t>(input.ByteSizeLong()))) {
    return InvalidArgument(StrCat("a context of ", context.size(), " bytes for each of ", list->size(),
                                  " examples needs too much memory; send fewer examples in a request"));
  }
  *examples = Tensor(tensorflow::DT_STRING, tensorflow::TensorShape({list->size()}));
  for (int i = 0; i < list->size(); ++i) examples->vec<tstring>()(i) = context + list->at(i).SerializeAsString();
  return tensorflow::OkStatus();
}

tensorflow::Status FindSignature(const Servable& servable, const std::string& name, const Signature** signature) {
  *signature = servable.FindSignature(name);
  if (*signature != nullptr) return tensorflow::OkStatus();
  return InvalidArgument("No signature was found with the name: " + ResolveSignatureName(name));
}

// Checks the method name of a signature, if --enable_signature_method_name_check asks for that.
tensorflow::Status CheckMethod(const Servable& servable, const Signature& signature, const char* what,
                               const char* method) {
  if (!servable.check_method_names() || signature.method == method) return tensorflow::OkStatus();
  return InvalidArgument(
      StrCat("Expected ", what, " signature method_name to be ", method, ". Was: ", signature.method));
}

// Checks the inputs and outputs of a signature for classification.
tensorflow::Status CheckClassify(const Servable& servable, const Signature& signature) {
  TF_RETURN_IF_ERROR(CheckMethod(servable, signature, "classification", kClassifyMethod));
  if (signature.inputs.size() != 1) return InvalidArgument("Expected one input Tensor.");
  if (signature.outputs.empty() || signature.outputs.size() > 2) {
    return InvalidArgument(StrCat("Expected one or two output Tensors, found ", signature.outputs.size()));
  }
  if (signature.inputs[0].alias != kInputs) {
    return InvalidArgument(StrCat("No classification inputs found in SignatureDef: ", signature.name));
  }
  for (const Endpoint& output : signature.outputs) {
    if (output.alias == kClasses || output.alias == kScores) continue;
    return InvalidArgument(
        StrCat("Expected classification signature outputs to contain at least one of \"classes\" or \"scores\". "
               "Signature was: ", signature.name, ", with the output \"", output.alias, "\""));
  }
  return tensorflow::OkStatus();
}

// Checks the inputs and outputs of a signature for regression.
tensorflow::Status CheckRegress(const Servable& servable, const Signature& signature) {
  TF_RETURN_IF_ERROR(CheckMethod(servable, signature, "regression", kRegressMethod));
  if (signature.inputs.size() != 1) return InvalidArgument("Expected one input Tensor.");
  if (signature.outputs.size() != 1) return InvalidArgument("Expected one output Tensor.");
  if (signature.inputs[0].alias != kInputs) {
    return InvalidArgument(StrCat("No regression inputs found in SignatureDef: ", signature.name));
  }
  if (signature.outputs[0].alias != kOutputs) {
    return InvalidArgument(StrCat("No regression outputs found in SignatureDef: ", signature.name));
  }
  return tensorflow::OkStatus();
}

tensorflow::Status CheckOutput(const Tensor& tensor, DataType dtype, int64_t examples, const char* what) {
  if (tensor.dtype() != dtype) {
    return InvalidArgument(StrCat("Expected ", what, " Tensor of ", DataTypeString(dtype), ". Got: ",
                                  DataTypeString(tensor.dtype())));
  }
  if (tensor.dims() == 0 || tensor.dim_size(0) != examples) {
    return InvalidArgument(StrCat("Expected ", what, " output batch size of ", examples, ". Got: ",
                                  tensor.shape().DebugString()));
  }
  return tensorflow::OkStatus();
}

// Writes the classes of each example. `classes` and `scores` are [examples, n]; one of them may be null.
tensorflow::Status WriteClasses(const Tensor* classes, const Tensor* scores, int64_t examples,
                                ClassificationResult* result) {
  int64_t n = -1;
  for (auto [tensor, dtype, what] : {std::make_tuple(classes, tensorflow::DT_STRING, "classes"),
                                     std::make_tuple(scores, tensorflow::DT_FLOAT, "scores")}) {
    if (tensor == nullptr) continue;
    TF_RETURN_IF_ERROR(CheckOutput(*tensor, dtype, examples, what));
    if (tensor->dims() != 2) {
      return InvalidArgument(StrCat("Expected Tensor shape: [batch_size num_classes] but got ",
                                    tensor->shape().DebugString()));
    }
    if (n != -1 && tensor->dim_size(1) != n) {
      return InvalidArgument(
          StrCat("Tensors class and score should match in dim_size(1). Got ", n, " vs. ", tensor->dim_size(1)));
    }
    n = tensor->dim_size(1);
  }
  for (int64_t i = 0; i < examples; ++i) {
    auto* row = result->add_classifications();
    for (int64_t j = 0; j < n; ++j) {
      auto* entry = row->add_classes();
      if (classes != nullptr) entry->set_label(std::string(classes->matrix<tstring>()(i, j)));
      if (scores != nullptr) entry->set_score(scores->matrix<float>()(i, j));
    }
  }
  return tensorflow::OkStatus();
}

tensorflow::Status WriteValues(const Tensor& values, int64_t examples, RegressionResult* result) {
  TF_RETURN_IF_ERROR(CheckOutput(values, tensorflow::DT_FLOAT, examples, "output"));
  if (values.dims() != 1 && !(values.dims() == 2 && values.dim_size(1) == 1)) {
    return InvalidArgument(StrCat("Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got ",
                                  values.shape().DebugString()));
  }
  for (int64_t i = 0; i < examples; ++i) result->add_regressions()->set_value(values.flat<float>()(i));
  return tensorflow::OkStatus();
}

std::vector<size_t> AllOutputs(const Signature& signature) {
  std::vector<size_t> outputs(signature.outputs.size());
  for (size_t i = 0; i < outputs.size(); ++i) outputs[i] = i;
  return outputs;
}

// Runs `signature` on the examples of `input`.
tensorflow::Status RunOnExamples(const Servable& servable, const Signature& signature, const Input& input,
                                 Deadline deadline, int64_t* examples, std::vector<Tensor>* results) {
  Feeds feeds(1);
  feeds[0].first = signature.inputs[0].tensor;
  TF_RETURN_IF_ERROR(ReadExamples(input, &feeds[0].second));
  *examples = feeds[0].second.NumElements();
  return servable.Run(signature, feeds, AllOutputs(signature), deadline, results);
}

const Tensor* Find(const Signature& signature, const std::vector<Tensor>& results, const std::string& alias) {
  const Endpoint* output = FindEndpoint(signature.outputs, alias);
  return output == nullptr ? nullptr : &results[output - signature.outputs.data()];
}

}  // namespace

tensorflow::Status ParseTensor(const std::string& alias, const TensorProto& proto, Tensor* tensor) {
  const std::string error = "tensor parsing error: " + alias;
  // A request must not contain handles to resources or arbitrary C++ objects.
  if (proto.dtype() == tensorflow::DT_RESOURCE || proto.dtype() == tensorflow::DT_VARIANT) {
    return InvalidArgument(error);
  }
  // Refuses negative and unknown dimensions, too many dimensions, and sizes that do not fit into int64.
  tensorflow::TensorShape shape;
  if (!tensorflow::TensorShape::BuildTensorShape(proto.tensor_shape(), &shape).ok()) return InvalidArgument(error);
  const int64_t allowed_bytes =
      std::max(kMaxRepeatedBytes, kMaxBytesPerMessageByte * static_cast<int64_t>(proto.ByteSizeLong()));
  if (BytesNeeded(proto, shape) > static_cast<double>(allowed_bytes)) {
    return InvalidArgument(StrCat(error, ": the shape ", shape.DebugString(), " of ", DataTypeString(proto.dtype()),
                                  " needs more than ", allowed_bytes, " bytes, far more than the message carries (",
                                  proto.ByteSizeLong(), " bytes); send every element"));
  }
  return tensor->FromProto(proto) ? tensorflow::OkStatus() : InvalidArgument(error);
}

tensorflow::Status Predict(const Servable& servable, const PredictRequest& request, Deadline deadline,
                           PredictResponse* response) {
  const std::string name = ResolveSignatureName(request.model_spec().signature_name());
  const Signature* signature = servable.FindSignature(name);
  if (signature == nullptr) return absl::FailedPreconditionError("Serving signature key \"" + name + "\" not found.");
  Feeds feeds;
  TF_RETURN_IF_ERROR(ReadInputs(*signature, request, &feeds));
  std::vector<size_t> wanted;
  TF_RETURN_IF_ERROR(SelectOutputs(*signature, request.output_filter(), &wanted));
  std::vector<Tensor> results;
  TF_RETURN_IF_ERROR(servable.Run(*signature, feeds, wanted, deadline, &results));

  SetSpec(servable, signature->name, response->mutable_model_spec());
  size_t tensor_bytes = 0;
  for (const Tensor& result : results) tensor_bytes += result.TotalBytes();
  if (tensor_bytes > kMaxResponseBytes) return TooLarge();
  for (size_t i = 0; i < wanted.size(); ++i) {
    TensorProto* proto = &(*response->mutable_outputs())[signature->outputs[wanted[i]].alias];
    if (servable.tensor_content()) {
      results[i].AsProtoTensorContent(proto);
    } else {
      results[i].AsProtoField(proto);
    }
  }
  if (tensor_bytes > kSmallResponseBytes && response->ByteSizeLong() > kMaxResponseBytes) return TooLarge();
  return tensorflow::OkStatus();
}

tensorflow::Status Classify(const Servable& servable, const ClassificationRequest& request, Deadline deadline,
                            ClassificationResponse* response) {
  const Signature* signature;
  TF_RETURN_IF_ERROR(FindSignature(servable, request.model_spec().signature_name(), &signature));
  TF_RETURN_IF_ERROR(CheckClassify(servable, *signature));
  int64_t examples;
  std::vector<Tensor> results;
  TF_RETURN_IF_ERROR(RunOnExamples(servable, *signature, request.input(), deadline, &examples, &results));
  SetSpec(servable, signature->name, response->mutable_model_spec());
  TF_RETURN_IF_ERROR(WriteClasses(Find(*signature, results, kClasses), Find(*signature, results, kScores), examples,
                                  response->mutable_result()));
  return response->ByteSizeLong() > kMaxResponseBytes ? TooLarge() : tensorflow::OkStatus();
}

tensorflow::Status Regress(const Servable& servable, const RegressionRequest& request, Deadline deadline,
                           RegressionResponse* response) {
  const Signature* signature;
  TF_RETURN_IF_ERROR(FindSignature(servable, request.model_spec().signature_name(), &signature));
  TF_RETURN_IF_ERROR(CheckRegress(servable, *signature));
  int64_t examples;
  std::vector<Tensor> results;
  TF_RETURN_IF_ERROR(RunOnExamples(servable, *signature, request.input(), deadline, &examples, &results));
  SetSpec(servable, signature->name, response->mutable_model_spec());
  TF_RETURN_IF_ERROR(WriteValues(results[0], examples, response->mutable_result()));
  return response->ByteSizeLong() > kMaxResponseBytes ? TooLarge() : tensorflow::OkStatus();
}

tensorflow::Status MultiInference(const Servable& servable, const MultiInferenceRequest& request, Deadline deadline,
                                  MultiInferenceResponse* response) {
  // One run computes all tasks: they read the same examples, and usually share most of their layers.
  std::vector<const Signature*> signatures;
  std::vector<std::string> fetches;
  std::set<std::string> names;
  std::set<std::string> inputs;
  for (const InferenceTask& task : request.tasks()) {
    const std::string name = ResolveSignatureName(task.model_spec().signature_name());
    if (!names.insert(name).second) return InvalidArgument("Duplicate evaluation of signature: " + name);
    const Signature* const signature = servable.FindSignature(name);
    if (signature == nullptr) return InvalidArgument("Requested signature not found in model graph: " + name);
    if (task.method_name() == kClassifyMethod) {
      TF_RETURN_IF_ERROR(CheckClassify(servable, *signature));
    } else if (task.method_name() == kRegressMethod) {
      TF_RETURN_IF_ERROR(CheckRegress(servable, *signature));
    } else {
      return absl::UnimplementedError("Unsupported signature method_name: " + task.method_name());
    }
    signatures.push_back(signature);
    inputs.insert(signature->inputs[0].tensor);
    for (const Endpoint& output : signature->outputs) fetches.push_back(output.tensor);
  }
  if (signatures.empty()) return NoTasks();
  Tensor serialized;
  TF_RETURN_IF_ERROR(ReadExamples(request.input(), &serialized));
  const int64_t examples = serialized.NumElements();
  // The signatures of a TF2 SavedModel have an input tensor each.
  Feeds feeds;
  for (const std::string& input : inputs) feeds.emplace_back(input, serialized);
  std::vector<Tensor> all;
  TF_RETURN_IF_ERROR(servable.Run(feeds, fetches, deadline, &all));
  RecordExamples(servable.name(), examples);
  auto next = all.begin();
  for (const Signature* signature : signatures) {
    const std::vector<Tensor> results(next, next + signature->outputs.size());
    next += signature->outputs.size();
    auto* result = response->add_results();
    SetSpec(servable, signature->name, result->mutable_model_spec());
    const bool classifies = FindEndpoint(signature->outputs, kOutputs) == nullptr;
    TF_RETURN_IF_ERROR(classifies
                           ? WriteClasses(Find(*signature, results, kClasses), Find(*signature, results, kScores),
                                          examples, result->mutable_classification_result())
                           : WriteValues(results[0], examples, result->mutable_regression_result()));
  }
  return response->ByteSizeLong() > kMaxResponseBytes ? TooLarge() : tensorflow::OkStatus();
}

tensorflow::Status GetModelMetadata(const Servable& servable, const GetModelMetadataRequest&,
                                    GetModelMetadataResponse* response) {
  response->mutable_model_spec()->set_name(servable.name());
  response->mutable_model_spec()->mutable_version()->set_value(servable.version());
  tensorflow::serving::SignatureDefMap map;
  *map.mutable_signature_def() = servable.signature_defs();
  (*response->mutable_metadata())[kSignatureDef].PackFrom(map);
  return tensorflow::OkStatus();
}

tensorflow::Status CheckMetadataFields(const GetModelMetadataRequest& request) {
  if (request.metadata_field().empty()) {
    return InvalidArgument("GetModelMetadataRequest must specify at least one metadata_field");
  }
  for (const std::string& field : request.metadata_field()) {
    if (field != kSignatureDef) return InvalidArgument(StrCat("Metadata field ", field, " is not supported"));
  }
  return tensorflow::OkStatus();
}

const ModelSpec* SpecOf(const MultiInferenceRequest& request, tensorflow::Status* status) {
  *status = tensorflow::OkStatus();
  const ModelSpec* first = nullptr;
  for (const InferenceTask& task : request.tasks()) {
    if (!task.has_model_spec()) {
      *status = InvalidArgument("Missing ModelSpec");
      return nullptr;
    }
    if (first == nullptr) first = &task.model_spec();
    if (first->name().empty()) break;  // refused like any other request
    if (task.model_spec().name().empty()) {
      *status = InvalidArgument("Found ModelSpec with an empty model name.");
      return nullptr;
    }
    if (task.model_spec().name() != first->name()) {
      *status = InvalidArgument(
          "All ModelSpecs in a MultiInferenceRequest must access the same model name.");
      return nullptr;
    }
  }
  if (first == nullptr) *status = NoTasks();
  return first;
}

}  // namespace dpsr::serving
