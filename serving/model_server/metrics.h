// What the server counts, kept where TensorFlow keeps its own counts, and all of it as Prometheus text.
#ifndef DPSR_SERVING_MODEL_SERVER_METRICS_H_
#define DPSR_SERVING_MODEL_SERVER_METRICS_H_

#include <chrono>
#include <cstdint>
#include <string>

#include "tensorflow/core/platform/status.h"

namespace dpsr::serving {

inline int64_t MicrosecondsSince(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin).count();
}

// One request that ended: TensorFlow Serving's request_count (all), request_latency and runtime_latency (those that
// succeeded), in microseconds. `model` is empty where none was found.
void RecordRequest(const std::string& model, const char* api, const char* entrypoint, const tensorflow::Status& status,
                   int64_t request_micros, int64_t runtime_micros);

// Examples of a request of the Classify and Regress kind.
void RecordExamples(const std::string& model, int64_t count);

// How long a model's warm-up took.
void RecordWarmup(const std::string& path, const tensorflow::Status& status, int64_t micros);

// Time that a request waited for a thread, and how many wait and run now.
void RecordQueueing(int64_t micros);
void SetInFlight(int64_t running, int64_t waiting);

// Time that a request, or a part of one, waited for its batch to run; and a batch that runs, with the rows of it that
// fill it up.
void RecordBatchQueueing(const std::string& thread_pool, int64_t micros);
void RecordBatch(int64_t num_rows, int64_t num_padding_rows);

// Bytes of the process in memory now.
int64_t ResidentBytes();

// Bytes that loading a version took; 0 when it is gone.
void SetVersionMemory(const std::string& model, int64_t version, int64_t bytes);

// All metrics of the process, TensorFlow's too, in Prometheus' text format: `/tensorflow/serving/request_count` is
// `:tensorflow:serving:request_count`.
std::string PrometheusText();

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_METRICS_H_
