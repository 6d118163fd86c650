// The result of an operation of the C++ core: a code and, if it is not OK, one line that says what was given, what was
// expected and what to do. The core throws no exceptions. The TF ops and the pybind11 modules translate a Status into
// their own errors.
#ifndef DPSR_COMMON_STATUS_H_
#define DPSR_COMMON_STATUS_H_

#include <sstream>
#include <string>
#include <utility>

namespace dpsr {

// The names are those of absl and gRPC.
enum class StatusCode {
  kOk,
  kInvalidArgument,
  kNotFound,
  kDataLoss,
  kFailedPrecondition,
  kResourceExhausted,
  kInternal,
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

// Concatenates its arguments as `operator<<` prints them: StrCat("k is ", k, ", expected at least 1").
template <typename... Args>
std::string StrCat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// Returns a Status whose message is StrCat(args...).
template <typename... Args>
Status MakeStatus(StatusCode code, const Args&... args) {
  return Status(code, StrCat(args...));
}

}  // namespace dpsr

// Evaluates `expr`, and returns its Status from the enclosing function if that is not OK.
#define DPSR_RETURN_IF_ERROR(expr)                      \
  do {                                                  \
    ::dpsr::Status dpsr_status_ = (expr);               \
    if (!dpsr_status_.ok()) return dpsr_status_;        \
  } while (false)

#endif  // DPSR_COMMON_STATUS_H_
