#include "serving/model_server/batching.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <set>
#include <utility>

#include "common/status.h"
#include "serving/model_server/batch_tensors.h"
#include "serving/model_server/errors.h"
#include "serving/model_server/metrics.h"
#include "serving/model_server/server_config.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/kernels/batching_util/shared_batch_scheduler.h"
#include "tensorflow/core/platform/cpu_info.h"
#include "tensorflow/core/platform/env.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::Tensor;
using Clock = std::chrono::steady_clock;

constexpr char kVersionFile[] = "/batching_params.pbtxt";
constexpr char kThreadPoolName[] = "model_server_batch_threads";
// The scheduler counts the rows of a split request in int.
constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxTimeoutMicros = int64_t{3600} * 1'000'000;

// A batch may be padded up to this size, or up to this factor times the size of its inputs. If it would get larger, its
// requests run one by one.
constexpr int64_t kMaxPaddedBytes = int64_t{64} << 20;
constexpr double kMaxPaddedFactor = 8;

// A request in a queue, perhaps in several parts. The thread that waits for it leaves at the deadline at the latest.
struct Request {
  Feeds feeds;
  std::vector<size_t> outputs;
  Deadline deadline;
  int64_t num_rows = 0;
  Clock::time_point arrival = Clock::now();

  std::mutex mutex;
  std::condition_variable changed;
  size_t parts_left = 1;
  std::vector<std::vector<Tensor>> results{1};  // the outputs of each part
  tensorflow::Status status;                    // the first error
  bool abandoned = false;                       // no thread waits for it
};

// Rows begin, ..., begin + num_rows - 1 of a request.
struct Part : tensorflow::serving::BatchTask {
  Part(std::shared_ptr<Request> of, size_t place, int64_t from, int64_t num)
      : request(std::move(of)), index(place), begin(from), num_rows(num) {}
  size_t size() const override { return static_cast<size_t>(num_rows); }

  const std::shared_ptr<Request> request;
  const size_t index;
  const int64_t begin;
  const int64_t num_rows;
};

using Parts = std::vector<std::unique_ptr<Part>>;
using Scheduler = tensorflow::serving::SharedBatchScheduler<Part>;
using Queue = tensorflow::serving::BatchScheduler<Part>;

tensorflow::Status Invalid(const char* field, int64_t got, const std::string& expected) {
  return InvalidArgument(StrCat("BatchingParameters.", field, ": got ", got, ", expected ", expected));
}

tensorflow::Status CheckRange(const char* field, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return tensorflow::OkStatus();
  return Invalid(field, value, StrCat("an integer from ", least, " to ", most));
}

// Returns the largest number of rows of a batch.
int64_t ExecutionLimit(const BatchingParameters& parameters) {
  return parameters.enable_large_batch_splitting().value() ? parameters.max_execution_batch_size().value()
                                                           : parameters.max_batch_size().value();
}

// Stores the result of a part, and wakes the thread that waits if it was the last part.
void Finish(const Part& part, const tensorflow::Status& status, std::vector<Tensor> results) {
  Request& request = *part.request;
  std::lock_guard<std::mutex> lock(request.mutex);
  if (!status.ok() && request.status.ok()) request.status = status;
  request.results[part.index] = std::move(results);
  if (--request.parts_left == 0) request.changed.notify_all();
}

class BatchThreadsImpl final : public BatchThreads {
 public:
  BatchThreadsImpl(BatchingParameters parameters, bool per_version, std::shared_ptr<Scheduler> scheduler)
      : parameters_(std::move(parameters)), per_version_(per_version), scheduler_(std::move(scheduler)) {}

  const BatchingParameters& parameters() const override { return parameters_; }
  Scheduler* scheduler() const { return scheduler_.get(); }

  tensorflow::Status ParametersOf(const std::string& path, BatchingParameters* parameters) const {
    *parameters = parameters_;
    const std::string file = path + kVersionFile;
    if (!per_version_ || !tensorflow::Env::Default()->FileExists(file).ok()) return tensorflow::OkStatus();
    parameters->Clear();
    TF_RETURN_IF_ERROR(ReadTextProto(file, parameters));
    *parameters->mutable_num_batch_threads() = parameters_.num_batch_threads();
    *parameters->mutable_thread_pool_name() = parameters_.thread_pool_name();
    const tensorflow::Status status = CompleteBatchingParameters(parameters);
    return status.ok() ? status : InvalidArgument(StrCat(file, ": ", std::string(status.message())));
  }

 private:
  const BatchingParameters parameters_;
  const bool per_version_;
  const std::shared_ptr<Scheduler> scheduler_;
};

class BatchQueuesImpl final : public BatchQueues {
 public:
  BatchQueuesImpl(std::shared_ptr<BatchThreads> threads, const BatchingParameters& parameters, RunFunction run)
      : threads_(std::move(threads)),
        thread_pool_(parameters.thread_pool_name().value()),
        allowed_sizes_(parameters.allowed_batch_sizes().begin(), parameters.allowed_batch_sizes().end()),
        pads_(parameters.pad_variable_length_inputs()),
        run_(std::move(run)) {}

  tensorflow::Status Add(const BatchingParameters& parameters, const Signature& signature) {
    Scheduler::QueueOptions options;
    options.input_batch_size_limit = parameters.max_batch_size().value();
    options.batch_timeout_micros = parameters.batch_timeout_micros().value();
    options.max_enqueued_batches = parameters.max_enqueued_batches().value();
    options.max_execution_batch_size = ExecutionLimit(parameters);
    if (parameters.enable_large_batch_splitting().value()) {
      options.enable_large_batch_splitting = true;
      options.split_input_task_func = Split;
    }
    const auto process = [this, &signature](std::unique_ptr<tensorflow::serving::Batch<Part>> batch) {
      Process(signature, batch->RemoveAllTasks());
    };
    auto* threads = static_cast<BatchThreadsImpl*>(threads_.get());
    return threads->scheduler()->AddQueue(options, process, &queues_[&signature]);
  }

  tensorflow::Status Run(const Signature& signature, const Feeds& feeds, const std::vector<size_t>& outputs,
                         Deadline deadline, std::vector<Tensor>* results) override {
    if (deadline <= Deadline::clock::now()) return TooLate();
    auto request = std::make_shared<Request>();
    request->feeds = feeds;
    request->outputs = outputs;
    request->deadline = deadline;
    request->num_rows = feeds[0].second.dim_size(0);
    auto part = std::make_unique<Part>(request, 0, 0, request->num_rows);
    const tensorflow::Status scheduled = queues_.at(&signature)->Schedule(&part);
    if (absl::IsUnavailable(scheduled)) {
      return absl::ResourceExhaustedError(StrCat("the batch queue of signature ", signature.name,
                                                 " that may wait are full (max_enqueued_batches of the batching "
                                                 "parameters); try again later, or elsewhere"));
    }
    TF_RETURN_IF_ERROR(scheduled);

    std::unique_lock<std::mutex> lock(request->mutex);
    const auto done = [&] { return request->parts_left == 0; };
    if (deadline == Deadline::max()) {
      request->changed.wait(lock, done);
    } else if (!request->changed.wait_until(lock, deadline, done)) {
      request->abandoned = true;
      return TooLate();
    }
    TF_RETURN_IF_ERROR(request->status);
    return Join(signature, *request, results);
  }

 private:
  static tensorflow::Status TooLate() {
    return absl::DeadlineExceededError("the deadline passed before the request's batch was computed");
  }

  // The scheduler calls this with the lock of the queue, so the tensors are cut later.
  static tensorflow::Status Split(std::unique_ptr<Part>* part, int room, int limit, Parts* parts) {
    const std::shared_ptr<Request> request = (*part)->request;
    int64_t begin = 0;
    for (const int64_t size : SplitSizes(request->num_rows, room, limit)) {
      parts->push_back(std::make_unique<Part>(request, parts->size(), begin, size));
      begin += size;
    }
    request->parts_left = parts->size();
    request->results.resize(parts->size());
    return tensorflow::OkStatus();
  }

  tensorflow::Status Join(const Signature& signature, const Request& request, std::vector<Tensor>* results) const {
    *results = request.results[0];
    if (request.results.size() == 1) return tensorflow::OkStatus();
    for (size_t output = 0; output < results->size(); ++output) {
      std::vector<Rows> rows;
      for (const std::vector<Tensor>& part : request.results) {
        rows.push_back({&part[output], 0, part[output].dim_size(0)});
      }
      for (const Rows& part : rows) {
        if (HaveSameRows(*part.tensor, *rows[0].tensor)) continue;
        return absl::FailedPreconditionError(
            StrCat("output ", signature.outputs[request.outputs[output]].alias,
                   " has rows of different shapes in two parts of a request that was split, ",
                   rows[0].tensor->shape().DebugString(), " and ", part.tensor->shape().DebugString(),
                   "; send it in smaller requests, or turn enable_large_batch_splitting off"));
      }
      (*results)[output] = ConcatRows(rows, request.num_rows);
    }
    return tensorflow::OkStatus();
  }

  void Process(const Signature& signature, Parts batch) const {
    Parts parts;
    for (std::unique_ptr<Part>& part : batch) {
      Request& request = *part->request;
      RecordBatchQueueing(thread_pool_, MicrosecondsSince(request.arrival));
      bool late = Deadline::clock::now() >= request.deadline;
      {
        std::lock_guard<std::mutex> lock(request.mutex);
        late |= request.abandoned;
      }
      const std::string mismatch = late || parts.empty() || pads_ ? "" : Mismatch(request, *parts[0]->request);
      if (late) {
        Finish(*part, TooLate(), {});
      } else if (!mismatch.empty()) {
        Finish(*part, absl::FailedPreconditionError(mismatch), {});
      } else {
        parts.push_back(std::move(part));
      }
    }
    if (parts.empty()) return;
    if (IsTooSparse(parts)) {
      for (std::unique_ptr<Part>& part : parts) {
        Parts alone;
        alone.push_back(std::move(part));
        Compute(signature, alone);
      }
    } else {
      Compute(signature, parts);
    }
  }

  // Returns why `request` cannot run in one batch with `first`, the first request of the batch; empty if it can.
  static std::string Mismatch(const Request& request, const Request& first) {
    for (size_t i = 0; i < request.feeds.size(); ++i) {
      const Tensor& tensor = request.feeds[i].second;
      const Tensor& other = first.feeds[i].second;
      if (HaveSameRows(tensor, other)) continue;
      return StrCat("Tensors with name '", request.feeds[i].first, "' from different requests have different shapes, ",
                    tensor.shape().DebugString(), " and ", other.shape().DebugString(),
                    ", and padding is turned off. Set pad_variable_length_inputs to true, or send tensors whose "
                    "dimensions beyond the first are equal");
    }
    return "";
  }

  static std::vector<Rows> RowsOf(const Parts& parts, size_t input) {
    std::vector<Rows> rows;
    for (const auto& part : parts) rows.push_back({&part->request->feeds[input].second, part->begin, part->num_rows});
    return rows;
  }

  static int64_t NumRows(const Parts& parts) {
    int64_t num_rows = 0;
    for (const auto& part : parts) num_rows += part->num_rows;
    return num_rows;
  }

  // Returns whether the parts should not run together: with one long row among many short ones, the padded batch may
  // need far more memory than the requests; or the ranks differ, if the signature does not fix them.
  bool IsTooSparse(const Parts& parts) const {
    const int64_t num_rows = RoundUpBatch(NumRows(parts), allowed_sizes_);
    for (size_t input = 0; pads_ && input < parts[0]->request->feeds.size(); ++input) {
      const std::vector<Rows> rows = RowsOf(parts, input);
      const Tensor& first = *rows[0].tensor;
      for (const Rows& part : rows) {
        if (part.tensor->dims() != first.dims()) return true;
      }
      if (NumElementsOfConcat(rows, num_rows) < 0) return true;
      const double per_row = static_cast<double>(NumElementsOfConcat(rows, 1));
      const int bytes = std::max(1, tensorflow::DataTypeSize(first.dtype()));
      double sent = 0, needed = static_cast<double>(num_rows) * per_row * bytes;
      for (const Rows& part : rows) {
        sent += static_cast<double>(part.tensor->TotalBytes());
        if (first.dtype() != tensorflow::DT_STRING || part.tensor->NumElements() == 0) continue;
        // The padding repeats a string, which may be long.
        const int64_t own = part.tensor->NumElements() / part.tensor->dim_size(0);
        const auto* texts = static_cast<const tensorflow::tstring*>(part.tensor->data());
        const double places = static_cast<double>(part.size) * (per_row - static_cast<double>(own));
        needed += places * static_cast<double>(texts[part.begin * own].size());
      }
      if (needed > std::max(static_cast<double>(kMaxPaddedBytes), kMaxPaddedFactor * sent)) return true;
    }
    return false;
  }

  // Runs the parts as one batch, and finishes each of them. Does not throw.
  void Compute(const Signature& signature, const Parts& parts) const {
    std::vector<std::vector<Tensor>> results(parts.size());
    std::vector<tensorflow::Status> statuses(parts.size());
    const tensorflow::Status ran =
        CatchExceptions("the model", [&] { return RunBatch(signature, parts, &results, &statuses); });
    if (!ran.ok()) statuses.assign(parts.size(), ran);
    for (size_t i = 0; i < parts.size(); ++i) Finish(*parts[i], statuses[i], std::move(results[i]));
  }

  // Runs the parts together. An error is that of all parts; `statuses` gets the errors of single ones.
  tensorflow::Status RunBatch(const Signature& signature, const Parts& parts, std::vector<std::vector<Tensor>>* results,
                              std::vector<tensorflow::Status>* statuses) const {
    const int64_t asked_rows = NumRows(parts);
    const int64_t num_rows = RoundUpBatch(asked_rows, allowed_sizes_);
    // Computes every output that a request asks for, with the latest deadline of all requests.
    std::set<size_t> wanted;
    Deadline deadline = Deadline::min();
    for (const auto& part : parts) {
      wanted.insert(part->request->outputs.begin(), part->request->outputs.end());
      deadline = std::max(deadline, part->request->deadline);
    }
    const std::vector<size_t> outputs(wanted.begin(), wanted.end());
    const Request& first = *parts[0]->request;
    // A part of a request that was split may become as large as the request when it is filled up.
    const bool is_whole = parts.size() == 1 && parts[0]->num_rows == num_rows && first.num_rows == num_rows;
    Feeds joined;
    for (size_t input = 0; !is_whole && input < first.feeds.size(); ++input) {
      joined.emplace_back(first.feeds[input].first, ConcatRows(RowsOf(parts, input), num_rows));
    }
    RecordBatch(num_rows, num_rows - asked_rows);
    std::vector<Tensor> computed;
    TF_RETURN_IF_ERROR(run_(signature, is_whole ? first.feeds : joined, outputs, deadline, &computed));
    int64_t begin = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      for (const size_t output : parts[i]->request->outputs) {
        const size_t place = std::lower_bound(outputs.begin(), outputs.end(), output) - outputs.begin();
        const Tensor& tensor = computed[place];
        if (tensor.dims() == 0 || tensor.dim_size(0) != num_rows) {
          (*statuses)[i] = absl::FailedPreconditionError(
              StrCat("output ", signature.outputs[output].alias, " of signature ", signature.name, " has the shape ",
                     tensor.shape().DebugString(), " for a batch of ", num_rows,
                     " rows: batching needs outputs with a row for each row of the inputs. Do not ask for this output, "
                     "or serve the model without --enable_batching"));
          break;
        }
        (*results)[i].push_back(is_whole ? tensor : CopyRows({&tensor, begin, parts[i]->num_rows}));
      }
      begin += parts[i]->num_rows;
    }
    return tensorflow::OkStatus();
  }

  const std::shared_ptr<BatchThreads> threads_;
  const std::string thread_pool_;
  const std::vector<int64_t> allowed_sizes_;
  const bool pads_;
  const RunFunction run_;
  // Destroyed first, which waits for the batches that still run.
  std::map<const Signature*, std::unique_ptr<Queue>> queues_;
};

}  // namespace

tensorflow::Status CompleteBatchingParameters(BatchingParameters* parameters) {
  BatchingParameters& p = *parameters;
  if (p.has_max_execution_batch_size() && !p.enable_large_batch_splitting().value()) {
    return InvalidArgument(
        "BatchingParameters.max_execution_batch_size needs enable_large_batch_splitting { value: true }");
  }
  if (!p.has_thread_pool_name()) p.mutable_thread_pool_name()->set_value(kThreadPoolName);
  if (!p.has_num_batch_threads()) p.mutable_num_batch_threads()->set_value(tensorflow::port::MaxParallelism());
  if (!p.has_max_batch_size()) p.mutable_max_batch_size()->set_value(1000);
  if (!p.has_max_enqueued_batches()) p.mutable_max_enqueued_batches()->set_value(10);
  const int64_t max_batch_size = p.max_batch_size().value();
  if (!p.has_max_execution_batch_size()) p.mutable_max_execution_batch_size()->set_value(max_batch_size);
  TF_RETURN_IF_ERROR(CheckRange("num_batch_threads", p.num_batch_threads().value(), 1, 4096));
  TF_RETURN_IF_ERROR(CheckRange("max_batch_size", max_batch_size, 1, kMaxRows));
  TF_RETURN_IF_ERROR(CheckRange("max_enqueued_batches", p.max_enqueued_batches().value(), 1, kMaxRows));
  TF_RETURN_IF_ERROR(CheckRange("batch_timeout_micros", p.batch_timeout_micros().value(), 0, kMaxTimeoutMicros));
  TF_RETURN_IF_ERROR(CheckRange("max_execution_batch_size", p.max_execution_batch_size().value(), 1, max_batch_size));
  int64_t previous = 0;
  for (const int64_t size : p.allowed_batch_sizes()) {
    if (size <= previous) return Invalid("allowed_batch_sizes", size, StrCat("more than ", previous, ": they ascend"));
    previous = size;
  }
  if (previous != 0 && previous != ExecutionLimit(p)) {
    return Invalid("allowed_batch_sizes", previous,
                   StrCat("as last one ", ExecutionLimit(p), ", the largest batch (",
                          p.enable_large_batch_splitting().value() ? "max_execution_batch_size" : "max_batch_size",
                          ")"));
  }
  return tensorflow::OkStatus();
}

tensorflow::Status BatchThreads::Start(const BatchingParameters& parameters, bool per_version,
                                       std::shared_ptr<BatchThreads>* threads) {
  BatchingParameters complete = parameters;
  TF_RETURN_IF_ERROR(CompleteBatchingParameters(&complete));
  Scheduler::Options options;
  options.thread_pool_name = complete.thread_pool_name().value();
  options.num_batch_threads = static_cast<int>(complete.num_batch_threads().value());
  std::shared_ptr<Scheduler> scheduler;
  TF_RETURN_IF_ERROR(Scheduler::Create(options, &scheduler));
  *threads = std::make_shared<BatchThreadsImpl>(std::move(complete), per_version, std::move(scheduler));
  return tensorflow::OkStatus();
}

tensorflow::Status BatchQueues::Open(std::shared_ptr<BatchThreads> threads, const std::string& path,
                                     const std::map<std::string, Signature>& signatures, RunFunction run,
                                     std::unique_ptr<BatchQueues>* queues) {
  BatchingParameters parameters;
  TF_RETURN_IF_ERROR(static_cast<BatchThreadsImpl*>(threads.get())->ParametersOf(path, &parameters));
  auto opened = std::make_unique<BatchQueuesImpl>(std::move(threads), parameters, std::move(run));
  for (const auto& [name, signature] : signatures) TF_RETURN_IF_ERROR(opened->Add(parameters, signature));
  *queues = std::move(opened);
  return tensorflow::OkStatus();
}

bool BatchQueues::CanBatch(const Signature& signature, const Feeds& feeds) {
  if (feeds.empty() || feeds.size() != signature.inputs.size()) return false;
  for (size_t i = 0; i < feeds.size(); ++i) {
    const Tensor& tensor = feeds[i].second;
    const tensorflow::PartialTensorShape& declared = signature.inputs[i].shape;
    if (tensor.dims() == 0 || tensor.dim_size(0) == 0 || tensor.dim_size(0) != feeds[0].second.dim_size(0)) {
      return false;
    }
    if (!declared.IsCompatibleWith(tensor.shape())) return false;
    if (declared.dims() > 0 && declared.dim_size(0) >= 0) return false;
  }
  return true;
}

}  // namespace dpsr::serving
