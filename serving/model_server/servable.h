// One loaded version of a model: a SavedModel in a TensorFlow session. It runs graphs; inference.h reads the requests.
#ifndef DPSR_SERVING_MODEL_SERVER_SERVABLE_H_
#define DPSR_SERVING_MODEL_SERVER_SERVABLE_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <shared_mutex>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "tensorflow/cc/saved_model/loader.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.pb.h"
#include "tensorflow/core/platform/status.h"
#include "tensorflow/core/protobuf/config.pb.h"
#include "tensorflow/core/protobuf/meta_graph.pb.h"
#include "tensorflow/core/public/session.h"
#include "tensorflow/core/public/session_options.h"

namespace dpsr::serving {

class BatchQueues;
class BatchThreads;

struct ServableOptions {
  tensorflow::SessionOptions session_options;
  std::unordered_set<std::string> tags;
  // Run the graph of a request in the thread that calls Run. This saves the hand-over between threads, and the number
  // of callers limits how many requests run. Ops still use the intra-op threads.
  bool run_in_caller_thread = true;
  // Send tensors as tensor_content instead of typed fields.
  bool tensor_content = false;
  // Refuse Classify and Regress for signatures with another method name.
  bool check_method_names = false;
  // The threads that compute the requests of several clients together; null: each request runs alone.
  std::shared_ptr<BatchThreads> batch_threads;
};

// An input or output of a signature: its alias, and the tensor of the graph that the alias stands for.
struct Endpoint {
  std::string alias;
  std::string tensor;
  tensorflow::DataType dtype;
  tensorflow::PartialTensorShape shape;
  // What an input is if a request leaves it out, from SignatureDef.defaults.
  std::optional<tensorflow::Tensor> fallback;
};

// A SignatureDef, with its endpoints sorted by alias.
struct Signature {
  std::string name;
  std::string method;  // such as tensorflow/serving/classify
  std::vector<Endpoint> inputs;
  std::vector<Endpoint> outputs;
};

// The signature of a request that names none.
inline constexpr char kDefaultSignature[] = "serving_default";

// Returns the signature that a request asks for.
inline std::string ResolveSignatureName(const std::string& name) { return name.empty() ? kDefaultSignature : name; }

using Deadline = std::chrono::system_clock::time_point;
using Feeds = std::vector<std::pair<std::string, tensorflow::Tensor>>;

// Thread-safe.
class Servable {
 public:
  // Starts the threads that all sessions of the process share. The first session starts them, and they keep the
  // priority of the thread that opened it for ever, so this must come before a load, which has a low one.
  static void StartSharedThreads(const ServableOptions& options);

  // Loads the SavedModel in `path`. If no library has one of its ops, returns NOT_FOUND, which names the op, the model
  // and the flag that loads op libraries. Other errors are TensorFlow's.
  static tensorflow::Status Load(const ServableOptions& options, const std::string& name, int64_t version,
                                 const std::string& path, std::unique_ptr<Servable>* servable);
  ~Servable();
  Servable(const Servable&) = delete;
  Servable& operator=(const Servable&) = delete;

  // Returns whether a load with this error would fail again, even if the files of the version changed.
  static bool IsFinal(const tensorflow::Status& status);

  const std::string& name() const { return name_; }
  int64_t version() const { return version_; }
  bool tensor_content() const { return tensor_content_; }
  bool check_method_names() const { return check_method_names_; }
  // Returns a signature by name; an empty name means `serving_default`. Null if there is none.
  const Signature* FindSignature(const std::string& name) const;
  // The SignatureDefs of the SavedModel.
  const google::protobuf::Map<std::string, tensorflow::SignatureDef>& signature_defs() const {
    return bundle_.GetSignatures();
  }

  // Computes the outputs of `signature` with these ascending indices, in a batch with other requests if that is
  // possible (batching.h has the errors of this). `deadline` becomes the session's timeout, which ends ops that wait
  // (queues, batching) but not an op that computes; time_point::max() means no deadline.
  tensorflow::Status Run(const Signature& signature, const Feeds& feeds, const std::vector<size_t>& outputs,
                         Deadline deadline, std::vector<tensorflow::Tensor>* results) const;
  // Computes tensors of the graph, without a batch, for requests that use several signatures.
  tensorflow::Status Run(const Feeds& feeds, const std::vector<std::string>& fetches, Deadline deadline,
                         std::vector<tensorflow::Tensor>* results) const;

 private:
  Servable(const ServableOptions& options, std::string name, int64_t version);

  tensorflow::Status RunAlone(const Signature& signature, const Feeds& feeds, const std::vector<size_t>& outputs,
                              Deadline deadline, std::vector<tensorflow::Tensor>* results) const;

  const std::string name_;
  const int64_t version_;
  const bool tensor_content_;
  const bool check_method_names_;
  tensorflow::RunOptions run_options_;
  tensorflow::SavedModelBundleLite bundle_;
  std::map<std::string, Signature> signatures_;

  // A session keeps a compiled executor for every set of fetches for ever, so only a limited number of sets of a
  // signature's outputs run as requested; for any other set, all outputs are computed.
  struct OutputSet {
    bool runs_as_requested = false;
    // What the session made for these inputs and outputs, which spares it most of the work of a run; nothing if it
    // cannot be used.
    std::optional<tensorflow::Session::CallableHandle> callable;
  };
  OutputSet FindOutputSet(const Signature& signature, const std::vector<size_t>& outputs) const;
  std::optional<tensorflow::Session::CallableHandle> MakeCallable(const Signature& signature,
                                                                  const std::vector<size_t>& outputs) const;
  mutable std::shared_mutex mutex_;
  mutable std::map<std::pair<std::string, std::vector<size_t>>, OutputSet> output_sets_;
  // Destroyed first, because its batches run in the session.
  std::unique_ptr<BatchQueues> batch_queues_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_SERVABLE_H_
