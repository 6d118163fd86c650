// Helpers for TensorFlow's status.
#ifndef DPSR_SERVING_MODEL_SERVER_ERRORS_H_
#define DPSR_SERVING_MODEL_SERVER_ERRORS_H_

#include <exception>
#include <string>

#include "common/status.h"
#include "tensorflow/core/platform/status.h"

namespace dpsr::serving {

inline tensorflow::Status InvalidArgument(const std::string& message) { return absl::InvalidArgumentError(message); }

// Returns whether an error is the server's fault, and not that of the request. UNAVAILABLE is neither: a model is still
// being loaded.
inline bool IsServersFault(const tensorflow::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kDataLoss:
      return true;
    default:
      return false;
  }
}

// Returns run(), or INTERNAL, which names `what`, if it throws. Op libraries may throw, and memory may run out.
template <typename Run>
tensorflow::Status CatchExceptions(const std::string& what, Run run) {
  try {
    return run();
  } catch (const std::exception& error) {
    return absl::InternalError(StrCat(what, " threw an exception: ", error.what()));
  }
}

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_ERRORS_H_
