// Requests of several clients computed together: their tensors are laid below each other along dimension 0, run once,
// and the answers cut apart. TensorFlow's own batch scheduler decides which requests meet.
#ifndef DPSR_SERVING_MODEL_SERVER_BATCHING_H_
#define DPSR_SERVING_MODEL_SERVER_BATCHING_H_

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "serving/model_server/servable.h"
#include "serving/model_server/server_files.pb.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/platform/status.h"

namespace dpsr::serving {

// Fills in what is not set with TensorFlow Serving's defaults: batches of up to 1000 rows, no wait for company, 10
// batches waiting, as many threads as CPUs. INVALID_ARGUMENT names the field that is wrong, and what is allowed.
tensorflow::Status CompleteBatchingParameters(BatchingParameters* parameters);

// The threads that run the batches of all models.
class BatchThreads {
 public:
  // `parameters` of --batching_parameters_file, empty without one. With `per_version` a version's own file
  // batching_params.pbtxt goes before them, but for the threads, which all versions share.
  static tensorflow::Status Start(const BatchingParameters& parameters, bool per_version,
                                  std::shared_ptr<BatchThreads>* threads);
  virtual ~BatchThreads() = default;

  // Those for all versions, complete.
  virtual const BatchingParameters& parameters() const = 0;
};

// The queues of one version, one a signature. Thread-safe.
class BatchQueues {
 public:
  // Computes these outputs of a signature, as Servable::Run.
  using RunFunction = std::function<tensorflow::Status(const Signature& signature, const Feeds& feeds,
                                                       const std::vector<size_t>& outputs, Deadline deadline,
                                                       std::vector<tensorflow::Tensor>* results)>;

  // `path` is the version's folder, `signatures` must outlive the queues. INVALID_ARGUMENT: its batching_params.pbtxt
  // is wrong.
  static tensorflow::Status Open(std::shared_ptr<BatchThreads> threads, const std::string& path,
                                 const std::map<std::string, Signature>& signatures, RunFunction run,
                                 std::unique_ptr<BatchQueues>* queues);
  // Waits until what is queued has been computed.
  virtual ~BatchQueues() = default;

  // Whether a request can be computed with others: every input has the same number of rows, at least one, and a shape
  // that fits the signature, whose first dimension must be open. Others are to run alone.
  static bool CanBatch(const Signature& signature, const Feeds& feeds);

  // Computes with others what CanBatch. Blocks until it is done, or `deadline` passes. RESOURCE_EXHAUSTED: as many as
  // may wait already do. FAILED_PRECONDITION: an output does not have a row for each row of the inputs; or this request
  // met one whose inputs have rows of another shape, and pad_variable_length_inputs is off. INVALID_ARGUMENT: more than
  // max_batch_size rows. An error of the run itself is the answer of all its requests.
  virtual tensorflow::Status Run(const Signature& signature, const Feeds& feeds, const std::vector<size_t>& outputs,
                                 Deadline deadline, std::vector<tensorflow::Tensor>* results) = 0;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_BATCHING_H_
