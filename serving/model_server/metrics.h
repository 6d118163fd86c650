// The metrics of the server. They are kept in TensorFlow's registry, together with TensorFlow's own, and shown as text
// for Prometheus.
#ifndef DPSR_SERVING_MODEL_SERVER_METRICS_H_
#define DPSR_SERVING_MODEL_SERVER_METRICS_H_

#include <chrono>
#include <cstdint>
#include <string>

#include "tensorflow/core/platform/status.h"

namespace dpsr::serving {

// Returns the microseconds that have passed since `begin`.
inline int64_t MicrosecondsSince(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin).count();
}

// Records a request that has ended. TensorFlow Serving's request_count counts all requests; request_latency and
// runtime_latency, in microseconds, only those that succeeded. `model` is empty if no model was found.
void RecordRequest(const std::string& model, const char* api, const char* entrypoint, const tensorflow::Status& status,
                   int64_t request_micros, int64_t runtime_micros);

// Records the number of examples in a request that has examples (Classify, Regress, MultiInference).
void RecordExamples(const std::string& model, int64_t count);

// Records how long the warm-up of a version took.
void RecordWarmup(const std::string& path, const tensorflow::Status& status, int64_t micros);

// Record how long a request waited for a thread, and how many requests run and wait now.
void RecordQueueing(int64_t micros);
void SetInFlight(int64_t running, int64_t waiting);

// Record how long a request, or a part of one, waited for its batch to run; and a batch, with the number of its rows
// and how many of them are padding.
void RecordBatchQueueing(const std::string& thread_pool, int64_t micros);
void RecordBatch(int64_t num_rows, int64_t num_padding_rows);

// Returns the bytes of memory that the process uses now.
int64_t ResidentBytes();

// Sets the bytes of memory that loading a version took; 0 when it has been unloaded, and then it is shown no more.
void SetVersionMemory(const std::string& model, int64_t version, int64_t bytes);

// Shows the metrics of the version in this folder, or hides them when the version is gone.
void ShowVersionPath(const std::string& path, bool shown);

// How far a version has applied the changes of its items (item_changes.h).
struct ItemChangeState {
  int64_t offset = 0;        // of the next change
  double lag_seconds = 0;    // since the oldest change that is not applied was acknowledged; 0 if all are applied
  int64_t applied = 0;       // changes since the version was loaded
  int64_t errors = 0;        // calls that failed
  int64_t items = 0;         // items that searches can find
  int64_t open = 0;          // new items that are not in lists yet
  int64_t sealed = 0;        // new items in lists
  double hidden_share = 0;   // share of the entries that searches skip, because their item was replaced or deleted
  int64_t ignored = 0;       // changes that came late, or of items that are not there
  int64_t not_indexed = 0;   // items without a vector
  double drift = 0;          // error of the new items' codes, divided by that of the index's own items; may be NaN
};

// Shows the state of a version in the metrics, until it is forgotten.
void RecordItemChanges(const std::string& model, int64_t version, const ItemChangeState& state);
void ForgetItemChanges(const std::string& model, int64_t version);

// Returns all metrics of the process, including TensorFlow's own, in Prometheus' text format, where
// `/tensorflow/serving/request_count` is written `:tensorflow:serving:request_count`.
std::string PrometheusText();

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_METRICS_H_
