// The log lines of single requests: those that failed by the server's fault, and those that were slow. They name the
// trace that the client sent, and are limited, so that clients cannot fill the log.
#ifndef DPSR_SERVING_MODEL_SERVER_REQUEST_LOG_H_
#define DPSR_SERVING_MODEL_SERVER_REQUEST_LOG_H_

#include <chrono>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

namespace dpsr::serving {

// A request's `traceparent`, as W3C's recommendation "Trace Context" defines it.
struct TraceParent {
  std::string_view trace_id;  // 32 hexadecimal digits
  bool sampled = false;       // whether the trace is kept somewhere
};

// Reads a traceparent. Nothing if the text is not one. The result refers to the text.
std::optional<TraceParent> ParseTraceParent(std::string_view text);

// The times of a request: in the queue, and from when a thread took it to its answer.
struct RequestTimes {
  int64_t queue_micros = 0;
  int64_t compute_micros = 0;
};

// The names of the times in trailing metadata (gRPC) and headers (REST) of answers to requests whose trace is sampled.
inline constexpr char kQueueMicros[] = "dpsr-queue-us";
inline constexpr char kComputeMicros[] = "dpsr-compute-us";
inline constexpr char kTraceParent[] = "traceparent";

// Thread-safe.
class RequestLog {
 public:
  using Clock = std::chrono::steady_clock;

  static constexpr int kLinesPerSecond = 10;
  static constexpr size_t kMaxOutcomeBytes = 500;

  // Requests that take `slow` or longer, the time in the queue included, are logged; zero: none of them.
  explicit RequestLog(std::chrono::milliseconds slow) : slow_(slow) {}

  // Returns whether to log a request. `failed`: by the server's fault.
  bool Wants(bool failed, const RequestTimes& times) const {
    return failed || (slow_.count() > 0 &&
                      std::chrono::microseconds(times.queue_micros + times.compute_micros) >= slow_);
  }

  // Logs a request such as "Predict of model shop", unless there were kLinesPerSecond lines in this second.
  // `outcome` is the error, or empty; `traceparent` is what the client sent, or empty. Does not throw.
  void Write(std::string_view request, std::string_view outcome, const RequestTimes& times,
             std::string_view traceparent);

  // Returns the line that Write logs at `now`; nothing if there were too many. For tests.
  std::optional<std::string> Line(std::string_view request, std::string_view outcome, const RequestTimes& times,
                                  std::string_view traceparent, Clock::time_point now);

 private:
  const std::chrono::milliseconds slow_;
  std::mutex mutex_;
  Clock::time_point second_begin_{};
  int lines_ = 0;         // since second_begin_
  int64_t left_out_ = 0;  // since the last line
};

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_REQUEST_LOG_H_
