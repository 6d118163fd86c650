// Computes the requests of several clients together. Their tensors are joined along dimension 0, the graph runs once,
// and the results are taken apart again. TensorFlow's batch scheduler decides which requests form a batch.
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

// Fills in TensorFlow Serving's defaults: batches of up to 1000 rows, no wait for more requests, 10 waiting batches, as
// many threads as CPUs. INVALID_ARGUMENT names the field that is wrong and what is allowed.
tensorflow::Status CompleteBatchingParameters(BatchingParameters* parameters);

// The threads that run the batches of all models.
class BatchThreads {
 public:
  // `parameters` are the ones of --batching_parameters_file, empty without this flag. With `per_version`, a version's
  // own file batching_params.pbtxt replaces them, except for the threads, which all versions share.
  static tensorflow::Status Start(const BatchingParameters& parameters, bool per_version,
                                  std::shared_ptr<BatchThreads>* threads);
  virtual ~BatchThreads() = default;

  // The parameters for all versions, with defaults filled in.
  virtual const BatchingParameters& parameters() const = 0;
};

// The queues of one version, one queue for each signature. Thread-safe.
class BatchQueues {
 public:
  // Computes these outputs of a signature, like Servable::Run.
  using RunFunction = std::function<tensorflow::Status(const Signature& signature, const Feeds& feeds,
                                                       const std::vector<size_t>& outputs, Deadline deadline,
                                                       std::vector<tensorflow::Tensor>* results)>;

  // `path` is the version's folder. `signatures` must outlive the queues. INVALID_ARGUMENT: the version's
  // batching_params.pbtxt is wrong.
  static tensorflow::Status Open(std::shared_ptr<BatchThreads> threads, const std::string& path,
                                 const std::map<std::string, Signature>& signatures, RunFunction run,
                                 std::unique_ptr<BatchQueues>* queues);
  // Waits until all queued requests have been computed.
  virtual ~BatchQueues() = default;

  // Returns whether a request can be computed with others: every input has the same number of rows, at least one, and a
  // shape that fits the signature, in which the first dimension is unknown. Other requests have to run alone.
  static bool CanBatch(const Signature& signature, const Feeds& feeds);

  // Computes a request for which CanBatch is true. Blocks until it is done or `deadline` passes. RESOURCE_EXHAUSTED:
  // the queue is full. FAILED_PRECONDITION: an output does not have a row for each row of the inputs, or another
  // request in the batch has rows of another shape and pad_variable_length_inputs is off. INVALID_ARGUMENT: more than
  // max_batch_size rows. An error of the run itself goes to all requests of the batch.
  virtual tensorflow::Status Run(const Signature& signature, const Feeds& feeds, const std::vector<size_t>& outputs,
                                 Deadline deadline, std::vector<tensorflow::Tensor>* results) = 0;
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_BATCHING_H_
