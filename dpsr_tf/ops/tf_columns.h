// Gathers of columns.h as tensors, for op files.
#ifndef DPSR_DPSR_TF_OPS_TF_COLUMNS_H_
#define DPSR_DPSR_TF_OPS_TF_COLUMNS_H_

#include <cstdint>

#include "dpsr_tf/ops/columns.h"
#include "tensorflow/core/framework/allocator.h"
#include "tensorflow/core/framework/tensor.h"

namespace dpsr {

// values int32 [tokens], splits int64 [rows + 1].
inline void GatherTokens(const RaggedColumn& column, Span<const int32_t> rows, tensorflow::Allocator* allocator,
                         tensorflow::Tensor* values, tensorflow::Tensor* splits) {
  *splits = tensorflow::Tensor(allocator, tensorflow::DT_INT64, {static_cast<int64_t>(rows.size()) + 1});
  const int64_t total = GatherSplits(column, rows, splits->flat<int64_t>().data());
  *values = tensorflow::Tensor(allocator, tensorflow::DT_INT32, {total});
  GatherValues(column, rows, values->flat<tensorflow::int32>().data());
}

// codes int32 [rows, columns].
inline tensorflow::Tensor GatherCodesTensor(const FeatureColumns& features, Span<const int32_t> rows,
                                            tensorflow::Allocator* allocator) {
  tensorflow::Tensor codes(allocator, tensorflow::DT_INT32,
                           {static_cast<int64_t>(rows.size()), static_cast<int64_t>(features.fixed.size())});
  GatherCodes(features.fixed, rows, codes.flat<tensorflow::int32>().data());
  return codes;
}

}  // namespace dpsr

#endif  // DPSR_DPSR_TF_OPS_TF_COLUMNS_H_
