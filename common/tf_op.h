// What every file of TensorFlow ops needs: the headers that define ops and kernels, short names for their types, and the
// check of an input's shape. CMake precompiles this header.
#ifndef DPSR_COMMON_TF_OP_H_
#define DPSR_COMMON_TF_OP_H_

#include "common/tf_status.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/platform/errors.h"

namespace dpsr {

namespace errors = ::tensorflow::errors;
using ::tensorflow::DEVICE_CPU;
using ::tensorflow::int32;
using ::tensorflow::OpInputList;
using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::OpOutputList;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;
using ::tensorflow::TensorShapeUtils;
using ::tensorflow::tstring;
using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

// Returns InvalidArgument, with the name of the input and both shapes, where `got` is not `expected`.
inline tensorflow::Status CheckShape(const char* name, const TensorShape& got, const TensorShape& expected) {
  if (got == expected) return tensorflow::OkStatus();
  return errors::InvalidArgument(name, " has shape ", got.DebugString(), ", expected ", expected.DebugString());
}

}  // namespace dpsr

#endif  // DPSR_COMMON_TF_OP_H_
