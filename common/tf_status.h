// Translates the core's Status into TensorFlow's, for op files.
#ifndef DPSR_COMMON_TF_STATUS_H_
#define DPSR_COMMON_TF_STATUS_H_

#include "absl/status/status.h"
#include "common/status.h"
#include "tensorflow/core/platform/status.h"

namespace dpsr {

inline absl::StatusCode ToAbslCode(StatusCode code) {
  switch (code) {
    case StatusCode::kOk:
      return absl::StatusCode::kOk;
    case StatusCode::kInvalidArgument:
      return absl::StatusCode::kInvalidArgument;
    case StatusCode::kNotFound:
      return absl::StatusCode::kNotFound;
    case StatusCode::kDataLoss:
      return absl::StatusCode::kDataLoss;
    case StatusCode::kFailedPrecondition:
      return absl::StatusCode::kFailedPrecondition;
    case StatusCode::kResourceExhausted:
      return absl::StatusCode::kResourceExhausted;
    case StatusCode::kInternal:
      break;
  }
  return absl::StatusCode::kInternal;
}

inline tensorflow::Status ToTensorFlow(const Status& status) {
  return tensorflow::Status(ToAbslCode(status.code()), status.message());
}

}  // namespace dpsr

#endif  // DPSR_COMMON_TF_STATUS_H_
