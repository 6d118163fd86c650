#include "serving/model_server/servable.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "common/status.h"
#include "serving/model_server/batching.h"
#include "serving/model_server/errors.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/public/session.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::TensorInfo;

// Marks an error of a load that another try cannot change.
constexpr char kFinal[] = "dpsr.serving.final";

// After this many different sets of outputs, the session computes all outputs for a new set, and the answer keeps the
// requested ones.
constexpr size_t kMaxOutputSets = 64;

// TensorFlow's number of the thread that calls.
constexpr int kCallersThread = -1;

std::vector<Endpoint> SortedEndpoints(const google::protobuf::Map<std::string, TensorInfo>& infos) {
  std::vector<Endpoint> endpoints;
  for (const auto& [alias, info] : infos) {
    Endpoint endpoint{alias, info.name(), info.dtype(), {}, {}};
    // A shape that is not valid stays unknown.
    tensorflow::PartialTensorShape::BuildPartialTensorShape(info.tensor_shape(), &endpoint.shape).IgnoreError();
    endpoints.push_back(std::move(endpoint));
  }
  std::sort(endpoints.begin(), endpoints.end(),
            [](const Endpoint& left, const Endpoint& right) { return left.alias < right.alias; });
  return endpoints;
}

// Reads the inputs that requests may leave out.
tensorflow::Status ReadFallbacks(const tensorflow::SignatureDef& definition, Signature* signature) {
  for (Endpoint& input : signature->inputs) {
    const auto found = definition.defaults().find(input.alias);
    if (found == definition.defaults().end()) continue;
    tensorflow::Tensor tensor;
    if (!tensor.FromProto(found->second) || tensor.dtype() != input.dtype) {
      return InvalidArgument(StrCat("the default of input ", input.alias, " of signature ", signature->name,
                                    " is not a tensor of type ", tensorflow::DataTypeString(input.dtype),
                                    "; export the model again"));
    }
    input.fallback = std::move(tensor);
  }
  return tensorflow::OkStatus();
}

tensorflow::Status TooLate() {
  return absl::DeadlineExceededError("the deadline passed before the request was computed");
}

// Returns the status of a run. TensorFlow does not check the time while the graph runs in the caller's thread. Our ops do,
// and then stop as if the request were cancelled.
tensorflow::Status CheckTime(tensorflow::Status status, Deadline deadline) {
  if ((status.ok() || absl::IsCancelled(status)) && Deadline::clock::now() >= deadline) {
    return absl::DeadlineExceededError("the deadline passed while the request was computed");
  }
  return status;
}

// Returns the error of a load. If an op is missing, the error names the flag that loads op libraries.
tensorflow::Status ExplainLoadError(const tensorflow::Status& status, const std::string& name, int64_t version) {
  const std::string message(status.message());
  for (const std::string marker : {"Op type not registered '", "No OpKernel was registered to support Op '"}) {
    const size_t begin = message.find(marker);
    if (begin == std::string::npos) continue;
    const size_t op_begin = begin + marker.size();
    const std::string op = message.substr(op_begin, message.find('\'', op_begin) - op_begin);
    tensorflow::Status missing = absl::NotFoundError(StrCat("model ", name, " version ", version, " needs the op ", op,
                                      ", which this server does not have; start it with the library that holds the "
                                      "op: --op_library=/path/to/library.so (",
                                      message, ")"));
    missing.SetPayload(kFinal, absl::Cord());
    return missing;
  }
  return status;
}

}  // namespace

Servable::Servable(const ServableOptions& options, std::string name, int64_t version)
    : name_(std::move(name)),
      version_(version),
      tensor_content_(options.tensor_content),
      check_method_names_(options.check_method_names) {
  if (options.run_in_caller_thread) run_options_.set_inter_op_thread_pool(kCallersThread);
}

Servable::~Servable() = default;

void Servable::StartSharedThreads(const ServableOptions& options) {
  // If this fails, so do the loads, which say why.
  tensorflow::Session* session = nullptr;
  if (tensorflow::NewSession(options.session_options, &session).ok()) delete session;
}

tensorflow::Status Servable::Load(const ServableOptions& options, const std::string& name, int64_t version,
                                  const std::string& path, std::unique_ptr<Servable>* servable) {
  std::unique_ptr<Servable> loaded(new Servable(options, name, version));
  // A SavedModel may also claim more memory than there is, which throws.
  const tensorflow::Status status = CatchExceptions(StrCat("the load of ", path), [&] {
    return tensorflow::LoadSavedModel(options.session_options, loaded->run_options_, path, options.tags,
                                      &loaded->bundle_);
  });
  if (!status.ok()) return ExplainLoadError(status, name, version);
  for (const auto& [key, signature] : loaded->bundle_.GetSignatures()) {
    Signature& read = loaded->signatures_[key];
    read = {key, signature.method_name(), SortedEndpoints(signature.inputs()), SortedEndpoints(signature.outputs())};
    TF_RETURN_IF_ERROR(ReadFallbacks(signature, &read));
  }
  if (options.batch_threads != nullptr) {
    const auto run = [alone = loaded.get()](const Signature& signature, const Feeds& feeds,
                                            const std::vector<size_t>& outputs, Deadline deadline,
                                            std::vector<tensorflow::Tensor>* results) {
      return alone->RunAlone(signature, feeds, outputs, deadline, results);
    };
    TF_RETURN_IF_ERROR(
        BatchQueues::Open(options.batch_threads, path, loaded->signatures_, run, &loaded->batch_queues_));
  }
  *servable = std::move(loaded);
  return tensorflow::OkStatus();
}

bool Servable::IsFinal(const tensorflow::Status& status) { return status.GetPayload(kFinal).has_value(); }

const Signature* Servable::FindSignature(const std::string& name) const {
  const auto found = signatures_.find(ResolveSignatureName(name));
  return found == signatures_.end() ? nullptr : &found->second;
}

Servable::OutputSet Servable::FindOutputSet(const Signature& signature, const std::vector<size_t>& outputs) const {
  const auto key = std::make_pair(signature.name, outputs);
  {
    std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto found = output_sets_.find(key);
    if (found != output_sets_.end()) return found->second;
  }
  std::lock_guard<std::shared_mutex> lock(mutex_);
  const auto found = output_sets_.find(key);
  if (found != output_sets_.end()) return found->second;
  // Signatures as a whole are never too many.
  const bool whole = outputs.size() == signature.outputs.size();
  if (!whole && output_sets_.size() >= kMaxOutputSets + signatures_.size()) return {};
  return output_sets_[key] = {true, MakeCallable(signature, outputs)};
}

std::optional<tensorflow::Session::CallableHandle> Servable::MakeCallable(const Signature& signature,
                                                                          const std::vector<size_t>& outputs) const {
  // Elsewhere a run needs a timeout of its own, and a callable has always the same.
  if (run_options_.inter_op_thread_pool() != kCallersThread) return std::nullopt;
  tensorflow::CallableOptions options;
  *options.mutable_run_options() = run_options_;
  for (const Endpoint& input : signature.inputs) options.add_feed(input.tensor);
  for (const size_t output : outputs) options.add_fetch(signature.outputs[output].tensor);
  tensorflow::Session::CallableHandle handle;
  // What cannot be made, such as two inputs with the same tensor, is left to Session::Run and its errors.
  if (!bundle_.GetSession()->MakeCallable(options, &handle).ok()) return std::nullopt;
  return handle;
}

tensorflow::Status Servable::Run(const Signature& signature, const Feeds& feeds, const std::vector<size_t>& outputs,
                                 Deadline deadline, std::vector<tensorflow::Tensor>* results) const {
  if (batch_queues_ != nullptr && BatchQueues::CanBatch(signature, feeds)) {
    return batch_queues_->Run(signature, feeds, outputs, deadline, results);
  }
  return RunAlone(signature, feeds, outputs, deadline, results);
}

tensorflow::Status Servable::RunAlone(const Signature& signature, const Feeds& feeds,
                                      const std::vector<size_t>& outputs, Deadline deadline,
                                      std::vector<tensorflow::Tensor>* results) const {
  const OutputSet set = FindOutputSet(signature, outputs);
  if (!set.runs_as_requested) {
    std::vector<size_t> all(signature.outputs.size());
    std::iota(all.begin(), all.end(), 0);
    std::vector<tensorflow::Tensor> computed;
    TF_RETURN_IF_ERROR(RunAlone(signature, feeds, all, deadline, &computed));
    for (const size_t output : outputs) results->push_back(std::move(computed[output]));
    return tensorflow::OkStatus();
  }
  if (set.callable.has_value()) {
    std::vector<tensorflow::Tensor> inputs;
    inputs.reserve(feeds.size());
    for (const auto& feed : feeds) inputs.push_back(feed.second);
    if (Deadline::clock::now() >= deadline) return TooLate();
    return CheckTime(bundle_.GetSession()->RunCallable(*set.callable, inputs, results, nullptr), deadline);
  }
  std::vector<std::string> fetches;
  for (const size_t output : outputs) fetches.push_back(signature.outputs[output].tensor);
  return Run(feeds, fetches, deadline, results);
}

tensorflow::Status Servable::Run(const Feeds& feeds, const std::vector<std::string>& fetches, Deadline deadline,
                                 std::vector<tensorflow::Tensor>* results) const {
  tensorflow::RunOptions run_options = run_options_;
  if (deadline != Deadline::max()) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::system_clock::now()).count();
    if (left <= 0) return TooLate();
    run_options.set_timeout_in_ms(left);
  }
  return CheckTime(bundle_.GetSession()->Run(run_options, feeds, fetches, {}, results, nullptr), deadline);
}

}  // namespace dpsr::serving
