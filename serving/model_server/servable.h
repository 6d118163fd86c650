// One loaded version of a model: a SavedModel in a TensorFlow session, and the answer to a Predict request on it.
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
#include "tensorflow/core/framework/types.pb.h"
#include "tensorflow/core/platform/status.h"
#include "tensorflow/core/protobuf/config.pb.h"
#include "tensorflow/core/public/session_options.h"
#include "tensorflow_serving/apis/predict.pb.h"

namespace dpsr::serving {

struct ServableOptions {
  tensorflow::SessionOptions session_options;
  std::unordered_set<std::string> tags;
  // Run a request's graph in the thread that asks for it: no hand-over between threads, and the number of threads that
  // ask bounds what runs. Ops still use the intra-op threads.
  bool run_in_caller_thread = true;
  // Answer with tensor_content instead of typed fields.
  bool tensor_content = false;
};

// An alias of a signature's input or output, and the tensor of the graph that it stands for.
struct Endpoint {
  std::string alias;
  std::string tensor;
  tensorflow::DataType dtype;
};

// A SignatureDef, its endpoints sorted by alias.
struct Signature {
  std::vector<Endpoint> inputs;
  std::vector<Endpoint> outputs;
};

// Thread-safe.
class Servable {
 public:
  // Loads the SavedModel in `path`. An op that no library brought is NOT_FOUND, with the op, the model and the flag
  // that would load it; other errors are TensorFlow's.
  static tensorflow::Status Load(const ServableOptions& options, const std::string& name, int64_t version,
                                 const std::string& path, std::unique_ptr<Servable>* servable);

  // Runs the signature that the request names, `serving_default` without a name. The codes and messages of errors are
  // TensorFlow Serving's. `deadline` becomes the session's timeout, which ends ops that wait (queues, batching) but not
  // one that computes; time_point::max() is none.
  tensorflow::Status Predict(const tensorflow::serving::PredictRequest& request,
                             std::chrono::system_clock::time_point deadline,
                             tensorflow::serving::PredictResponse* response) const;

 private:
  Servable(const ServableOptions& options, std::string name, int64_t version);

  const std::string name_;
  const int64_t version_;
  const bool tensor_content_;
  tensorflow::RunOptions run_options_;
  tensorflow::SavedModelBundleLite bundle_;
  std::map<std::string, Signature> signatures_;

  // A session keeps a compiled executor per set of fetches, for ever. So only a bounded number of sets of outputs, by
  // their places in the signature, run as they are asked for; true for those.
  bool RunsAsAsked(const std::string& signature_name, const std::vector<size_t>& outputs) const;
  mutable std::mutex mutex_;
  mutable std::set<std::pair<std::string, std::vector<size_t>>> output_sets_;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_SERVABLE_H_
