// One loaded version of a model: a SavedModel in a TensorFlow session. It runs graphs; what a request asks of it is
// read in inference.h.
#ifndef DPSR_SERVING_MODEL_SERVER_SERVABLE_H_
#define DPSR_SERVING_MODEL_SERVER_SERVABLE_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
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
#include "tensorflow/core/public/session_options.h"

namespace dpsr::serving {

class BatchQueues;
class BatchThreads;

struct ServableOptions {
  tensorflow::SessionOptions session_options;
  std::unordered_set<std::string> tags;
  // Run a request's graph in the thread that asks for it: no hand-over between threads, and the number of threads that
  // ask bounds what runs. Ops still use the intra-op threads.
  bool run_in_caller_thread = true;
  // Answer with tensor_content instead of typed fields.
  bool tensor_content = false;
  // Refuse Classify and Regress on signatures whose method is another.
  bool check_method_names = false;
  // Compute requests of several clients together, on these threads; null: each alone.
  std::shared_ptr<BatchThreads> batch_threads;
};

// An alias of a signature's input or output, and the tensor of the graph that it stands for.
struct Endpoint {
  std::string alias;
  std::string tensor;
  tensorflow::DataType dtype;
  tensorflow::PartialTensorShape shape;
};

// A SignatureDef, its endpoints sorted by alias.
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
  // Loads the SavedModel in `path`. An op that no library brought is NOT_FOUND, with the op, the model and the flag
  // that would load it; other errors are TensorFlow's.
  static tensorflow::Status Load(const ServableOptions& options, const std::string& name, int64_t version,
                                 const std::string& path, std::unique_ptr<Servable>* servable);
  ~Servable();
  Servable(const Servable&) = delete;
  Servable& operator=(const Servable&) = delete;

  // Whether a load with this error would fail again, whatever comes into the folder.
  static bool IsFinal(const tensorflow::Status& status);

  const std::string& name() const { return name_; }
  int64_t version() const { return version_; }
  bool tensor_content() const { return tensor_content_; }
  bool check_method_names() const { return check_method_names_; }
  // By name, `serving_default` for the empty one. Null when there is none.
  const Signature* FindSignature(const std::string& name) const;
  // The SignatureDefs as they stand in the SavedModel.
  const google::protobuf::Map<std::string, tensorflow::SignatureDef>& signature_defs() const {
    return bundle_.GetSignatures();
  }

  // Computes the outputs of `signature` at these places, ascending, together with other requests where they may be
  // batched (see batching.h for what can go wrong there). `deadline` becomes the session's timeout, which ends ops that
  // wait (queues, batching) but not one that computes; time_point::max() is none.
  tensorflow::Status Run(const Signature& signature, const Feeds& feeds, const std::vector<size_t>& outputs,
                         Deadline deadline, std::vector<tensorflow::Tensor>* results) const;
  // The same, alone, for tensors that belong to no one signature.
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

  // A session keeps a compiled executor per set of fetches, for ever. So only a bounded number of sets of outputs, by
  // their places in the signature, run as they are asked for; true for those.
  bool RunsAsAsked(const std::string& signature_name, const std::vector<size_t>& outputs) const;
  mutable std::mutex mutex_;
  mutable std::set<std::pair<std::string, std::vector<size_t>>> output_sets_;
  std::unique_ptr<BatchQueues> batch_queues_;  // goes first: its batches run in the session
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_SERVABLE_H_
