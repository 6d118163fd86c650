#include "serving/model_server/request_log.h"

#include <algorithm>
#include <new>

#include "common/status.h"
#include "serving/model_server/log.h"

namespace dpsr::serving {
namespace {

// Where the parts of a traceparent begin: version-trace-span-flags.
constexpr size_t kTrace = 3, kSpan = 36, kFlags = 53, kSize = 55;
constexpr size_t kTraceDigits = 32, kSpanDigits = 16;

bool IsHex(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool IsZero(std::string_view text) { return text.find_first_not_of('0') == std::string_view::npos; }

// Returns `text` without what would break or garble a line: it may come from a client.
std::string Printable(std::string_view text) {
  std::string line(text.substr(0, RequestLog::kMaxOutcomeBytes));
  for (char& c : line) {
    if (static_cast<unsigned char>(c) < ' ' || static_cast<unsigned char>(c) > '~') c = '?';
  }
  if (text.size() > line.size()) line += "...";
  return line;
}

double Milliseconds(int64_t micros) { return static_cast<double>(micros / 100) / 10; }

}  // namespace

std::optional<TraceParent> ParseTraceParent(std::string_view text) {
  if (text.size() < kSize || text[kTrace - 1] != '-' || text[kSpan - 1] != '-' || text[kFlags - 1] != '-') return {};
  const std::string_view version = text.substr(0, 2);
  // Later versions may add parts at the end.
  if (version == "ff" || (text.size() > kSize && (version == "00" || text[kSize] != '-'))) return {};
  const std::string_view trace = text.substr(kTrace, kTraceDigits), span = text.substr(kSpan, kSpanDigits),
                         flags = text.substr(kFlags, 2);
  for (const std::string_view part : {version, trace, span, flags}) {
    if (!IsHex(part)) return {};
  }
  if (IsZero(trace) || IsZero(span)) return {};
  const char last = flags[1];
  const int value = last <= '9' ? last - '0' : last - 'a' + 10;
  return TraceParent{trace, value % 2 == 1};
}

void RequestLog::Write(std::string_view request, std::string_view outcome, const RequestTimes& times,
                       std::string_view traceparent) {
  try {
    const std::optional<std::string> line = Line(request, outcome, times, traceparent, Clock::now());
    if (line.has_value()) LogWarning(*line);
  } catch (const std::bad_alloc&) {
    // The line is left out.
  }
}

std::optional<std::string> RequestLog::Line(std::string_view request, std::string_view outcome,
                                            const RequestTimes& times, std::string_view traceparent,
                                            Clock::time_point now) {
  int64_t left_out;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (now - second_begin_ >= std::chrono::seconds(1)) {
      second_begin_ = now;
      lines_ = 0;
    }
    if (lines_ == kLinesPerSecond) {
      ++left_out_;
      return {};
    }
    ++lines_;
    left_out = left_out_;
    left_out_ = 0;
  }
  const std::optional<TraceParent> trace = ParseTraceParent(traceparent);
  return StrCat(Printable(request), outcome.empty() ? " took " : " failed after ",
                Milliseconds(times.queue_micros + times.compute_micros), " ms, ", Milliseconds(times.queue_micros),
                " ms of it in the queue", outcome.empty() ? "" : ": ", Printable(outcome),
                left_out > 0 ? StrCat(" (", left_out, " such lines before it were left out)") : "",
                trace.has_value() ? StrCat(" trace=", trace->trace_id) : "");
}

}  // namespace dpsr::serving
