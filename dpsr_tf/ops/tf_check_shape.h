// Checks the shape of an op's input, for op files.
#ifndef DPSR_DPSR_TF_OPS_TF_CHECK_SHAPE_H_
#define DPSR_DPSR_TF_OPS_TF_CHECK_SHAPE_H_

#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/status.h"

namespace dpsr {

inline tensorflow::Status CheckShape(const char* name, const tensorflow::TensorShape& got,
                                     const tensorflow::TensorShape& expected) {
  if (got == expected) return tensorflow::OkStatus();
  return tensorflow::errors::InvalidArgument(name, " has shape ", got.DebugString(), ", expected ",
                                             expected.DebugString());
}

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_TF_CHECK_SHAPE_H_
