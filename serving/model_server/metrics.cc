#include "serving/model_server/metrics.h"

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "common/status.h"
#include "tensorflow/core/lib/monitoring/collected_metrics.h"
#include "tensorflow/core/lib/monitoring/collection_registry.h"
#include "tensorflow/core/lib/monitoring/counter.h"
#include "tensorflow/core/lib/monitoring/gauge.h"
#include "tensorflow/core/lib/monitoring/sampler.h"

namespace dpsr::serving {
namespace {

namespace monitoring = ::tensorflow::monitoring;

// The buckets of latencies: 10 us times 1.8^n.
std::unique_ptr<monitoring::Buckets> Latencies() { return monitoring::Buckets::Exponential(10, 1.8, 33); }

auto* const kRequests = monitoring::Counter<2>::New("/tensorflow/serving/request_count",
                                                    "The total number of requests.", "model_name", "status");
auto* const kRequestLatency =
    monitoring::Sampler<3>::New({"/tensorflow/serving/request_latency", "Distribution of wall time (in microseconds).",
                                 "model_name", "API", "entrypoint"},
                                Latencies());
auto* const kRuntimeLatency = monitoring::Sampler<3>::New(
    {"/tensorflow/serving/runtime_latency", "Distribution of wall time of the model's graph (in microseconds).",
     "model_name", "API", "runtime"},
    Latencies());
auto* const kExampleCounts = monitoring::Sampler<1>::New(
    {"/tensorflow/serving/request_example_counts", "Distribution of examples by request.", "model"},
    monitoring::Buckets::Exponential(1, 2, 20));
auto* const kExamples = monitoring::Counter<1>::New("/tensorflow/serving/request_example_count_total",
                                                    "The total number of examples.", "model");
auto* const kWarmup = monitoring::Sampler<2>::New(
    {"/tensorflow/serving/model_warmup_latency", "Distribution of wall time of warm-up (in microseconds).",
     "model_path", "status"},
    Latencies());
auto* const kQueueing = monitoring::Sampler<0>::New(
    {"/dpsr/serving/queueing_latency", "Distribution of the time that requests wait for a thread (in microseconds)."},
    Latencies());
auto* const kRunning =
    monitoring::Gauge<int64_t, 0>::New("/dpsr/serving/requests_running", "Requests that are computed now.");
auto* const kWaiting =
    monitoring::Gauge<int64_t, 0>::New("/dpsr/serving/requests_waiting", "Requests that wait for a thread now.");

auto* const kBatchQueueing = monitoring::Sampler<1>::New(
    {"/tensorflow/serving/batching_session/queuing_latency",
     "Distribution of wall time spent (in microseconds) in queuing", "thread_pool_name"},
    monitoring::Buckets::Exponential(100, 1.2, 52));
auto* const kBatches = monitoring::Counter<0>::New("/tensorflow/serving/batching_session/wrapped_run_count",
                                                   "Total count of run calls on the wrapped session");
auto* const kBatchRows =
    monitoring::Sampler<0>::New({"/dpsr/serving/batch_rows", "Distribution of the rows of batches, padding included."},
                                monitoring::Buckets::Exponential(1, 2, 20));
auto* const kBatchPadding =
    monitoring::Counter<0>::New("/dpsr/serving/batch_padding_rows", "Rows that fill batches up to an allowed size.");

// What there is now. TensorFlow's metrics keep the labels of versions that are gone for ever.
struct Versions {
  std::mutex mutex;
  std::map<std::pair<std::string, int64_t>, int64_t> memory;
  std::set<std::string> paths;
};
Versions& CurrentVersions() {
  static auto* const versions = new Versions;
  return *versions;
}

// Returns a name that Prometheus allows: `/tensorflow/serving/x` becomes `:tensorflow:serving:x`.
std::string Name(const std::string& name) {
  std::string result = name;
  for (char& c : result) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '_') c = ':';
  }
  if (!result.empty() && std::isdigit(static_cast<unsigned char>(result[0]))) result = "_" + result;
  return result;
}

std::string Escaped(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (c == '\\' || c == '"') result += '\\';
    if (c == '\n') {
      result += "\\n";
    } else {
      result += c;
    }
  }
  return result;
}

std::string Labels(const std::vector<monitoring::Point::Label>& labels, const std::string& last = "") {
  std::string text;
  for (const auto& label : labels) {
    text += StrCat(text.empty() ? "" : ",", label.name, "=\"", Escaped(label.value), "\"");
  }
  if (!last.empty()) text += (text.empty() ? "" : ",") + last;
  return text.empty() ? "" : "{" + text + "}";
}

// Returns the shortest text that reads back as the same number. Infinity is written as Prometheus does.
std::string Number(double value) {
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  if (std::isnan(value)) return "NaN";
  char buffer[32];
  return {buffer, std::to_chars(buffer, buffer + sizeof(buffer), value).ptr};
}

void AppendHistogram(const std::string& name, const monitoring::Point& point, std::string* text) {
  const auto& histogram = point.histogram_value;
  double cumulative = 0;
  for (int i = 0; i < histogram.bucket_size() && i < histogram.bucket_limit_size(); ++i) {
    cumulative += histogram.bucket(i);
    const bool last = i + 1 == histogram.bucket_limit_size();
    const std::string limit = last ? "+Inf" : Number(histogram.bucket_limit(i));
    *text += StrCat(name, "_bucket", Labels(point.labels, "le=\"" + limit + "\""), " ", Number(cumulative), "\n");
  }
  *text += StrCat(name, "_sum", Labels(point.labels), " ", Number(histogram.sum()), "\n");
  *text += StrCat(name, "_count", Labels(point.labels), " ", Number(histogram.num()), "\n");
}

// TensorFlow's gauges have no fractions, and keep the labels of versions that are gone. So these are kept apart.
std::mutex item_changes_mutex;
std::map<std::pair<std::string, int64_t>, ItemChangeState>& ItemChangeStates() {
  static auto* const states = new std::map<std::pair<std::string, int64_t>, ItemChangeState>;
  return *states;
}

void AppendItemChanges(std::string* text) {
  struct Metric {
    const char* name;
    const char* kind;
    double (*value)(const ItemChangeState&);
  };
  constexpr Metric kMetrics[] = {
      {"item_changes_offset", "gauge", [](const ItemChangeState& s) { return static_cast<double>(s.offset); }},
      {"item_changes_lag_seconds", "gauge", [](const ItemChangeState& s) { return s.lag_seconds; }},
      {"item_changes_applied", "counter", [](const ItemChangeState& s) { return static_cast<double>(s.applied); }},
      {"item_changes_errors", "counter", [](const ItemChangeState& s) { return static_cast<double>(s.errors); }},
      {"item_changes_ignored", "counter", [](const ItemChangeState& s) { return static_cast<double>(s.ignored); }},
      {"items_visible", "gauge", [](const ItemChangeState& s) { return static_cast<double>(s.items); }},
      {"items_open", "gauge", [](const ItemChangeState& s) { return static_cast<double>(s.open); }},
      {"items_sealed", "gauge", [](const ItemChangeState& s) { return static_cast<double>(s.sealed); }},
      {"items_hidden_share", "gauge", [](const ItemChangeState& s) { return s.hidden_share; }},
      {"items_not_indexed", "counter", [](const ItemChangeState& s) { return static_cast<double>(s.not_indexed); }},
      {"items_drift", "gauge", [](const ItemChangeState& s) { return s.drift; }},
  };
  const std::lock_guard<std::mutex> lock(item_changes_mutex);
  if (ItemChangeStates().empty()) return;
  for (const Metric& metric : kMetrics) {
    const std::string name = StrCat(":dpsr:serving:", metric.name);
    *text += StrCat("# TYPE ", name, " ", metric.kind, "\n");
    for (const auto& [version, state] : ItemChangeStates()) {
      *text += StrCat(name, "{model_name=\"", Escaped(version.first), "\",version=\"", version.second, "\"} ",
                      Number(metric.value(state)), "\n");
    }
  }
}

}  // namespace

void RecordItemChanges(const std::string& model, int64_t version, const ItemChangeState& state) {
  const std::lock_guard<std::mutex> lock(item_changes_mutex);
  ItemChangeStates()[{model, version}] = state;
}

void ForgetItemChanges(const std::string& model, int64_t version) {
  const std::lock_guard<std::mutex> lock(item_changes_mutex);
  ItemChangeStates().erase({model, version});
}

void RecordRequest(const std::string& model, const char* api, const char* entrypoint, const tensorflow::Status& status,
                   int64_t request_micros, int64_t runtime_micros) {
  kRequests->GetCell(model, absl::StatusCodeToString(status.code()))->IncrementBy(1);
  if (!status.ok()) return;
  std::string method = api;
  if (std::strcmp(entrypoint, "REST") == 0) method[0] = static_cast<char>(std::tolower(method[0]));
  kRequestLatency->GetCell(model, method, entrypoint)->Add(request_micros);
  kRuntimeLatency->GetCell(model, api, "TF1")->Add(runtime_micros);
}

void RecordExamples(const std::string& model, int64_t count) {
  kExampleCounts->GetCell(model)->Add(count);
  kExamples->GetCell(model)->IncrementBy(count);
}

void RecordWarmup(const std::string& path, const tensorflow::Status& status, int64_t micros) {
  kWarmup->GetCell(path, absl::StatusCodeToString(status.code()))->Add(micros);
}

void RecordQueueing(int64_t micros) { kQueueing->GetCell()->Add(micros); }

void SetInFlight(int64_t running, int64_t waiting) {
  kRunning->GetCell()->Set(running);
  kWaiting->GetCell()->Set(waiting);
}

void RecordBatchQueueing(const std::string& thread_pool, int64_t micros) {
  kBatchQueueing->GetCell(thread_pool)->Add(static_cast<double>(micros));
}

void RecordBatch(int64_t num_rows, int64_t num_padding_rows) {
  kBatches->GetCell()->IncrementBy(1);
  kBatchRows->GetCell()->Add(static_cast<double>(num_rows));
  kBatchPadding->GetCell()->IncrementBy(num_padding_rows);
}

int64_t ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t size = 0, resident = 0;
  statm >> size >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

void SetVersionMemory(const std::string& model, int64_t version, int64_t bytes) {
  Versions& versions = CurrentVersions();
  const std::lock_guard<std::mutex> lock(versions.mutex);
  if (bytes == 0) {
    versions.memory.erase({model, version});
  } else {
    versions.memory[{model, version}] = bytes;
  }
}

void ShowVersionPath(const std::string& path, bool shown) {
  Versions& versions = CurrentVersions();
  const std::lock_guard<std::mutex> lock(versions.mutex);
  if (shown) {
    versions.paths.insert(path);
  } else {
    versions.paths.erase(path);
  }
}

std::string PrometheusText() {
  const auto metrics = monitoring::CollectionRegistry::Default()->CollectMetrics({});
  Versions& versions = CurrentVersions();
  const std::lock_guard<std::mutex> lock(versions.mutex);
  const auto is_gone = [&](const monitoring::Point& point) {
    return std::any_of(point.labels.begin(), point.labels.end(), [&](const monitoring::Point::Label& label) {
      return label.name == "model_path" && versions.paths.count(label.value) == 0;
    });
  };
  std::string text;
  for (const auto& [path, descriptor] : metrics->metric_descriptor_map) {
    const auto points = metrics->point_set_map.find(path);
    if (points == metrics->point_set_map.end()) continue;
    const std::string name = Name(path);
    const bool is_histogram = descriptor->value_type == monitoring::ValueType::kHistogram;
    const bool is_text = descriptor->value_type == monitoring::ValueType::kString;
    const bool is_percentiles = descriptor->value_type == monitoring::ValueType::kPercentiles;
    // Prometheus has no percentiles.
    if (is_percentiles) continue;
    const char* kind = is_histogram                                              ? "histogram"
                       : descriptor->metric_kind == monitoring::MetricKind::kCumulative ? "counter"
                                                                                 : "gauge";
    text += StrCat("# TYPE ", name, " ", kind, "\n");
    for (const auto& point : points->second->points) {
      if (is_gone(*point)) continue;
      if (is_histogram) {
        AppendHistogram(name, *point, &text);
      } else if (is_text) {
        text += StrCat(name, Labels(point->labels, "value=\"" + Escaped(point->string_value) + "\""), " 1\n");
      } else if (descriptor->value_type == monitoring::ValueType::kBool) {
        text += StrCat(name, Labels(point->labels), " ", point->bool_value ? 1 : 0, "\n");
      } else {
        text += StrCat(name, Labels(point->labels), " ", point->int64_value, "\n");
      }
    }
  }
  const char* const memory = ":dpsr:serving:version_memory_bytes";
  if (!versions.memory.empty()) text += StrCat("# TYPE ", memory, " gauge\n");
  for (const auto& [version, bytes] : versions.memory) {
    text += StrCat(memory, "{model_name=\"", Escaped(version.first), "\",version=\"", version.second, "\"} ", bytes, "\n");
  }
  AppendItemChanges(&text);
  return text;
}

}  // namespace dpsr::serving
