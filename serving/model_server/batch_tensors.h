// The rows of many requests as one tensor, and back. Row i of a tensor is tensor[i, ...].
#ifndef DPSR_SERVING_MODEL_SERVER_BATCH_TENSORS_H_
#define DPSR_SERVING_MODEL_SERVER_BATCH_TENSORS_H_

#include <cstdint>
#include <vector>

#include "tensorflow/core/framework/tensor.h"

namespace dpsr::serving {

// Rows begin, begin + 1, ... begin + size - 1 of a tensor of rank 1 or more.
struct Rows {
  const tensorflow::Tensor* tensor;
  int64_t begin;
  int64_t size;
};

// Whether all dimensions but the first are equal.
bool HaveSameRows(const tensorflow::Tensor& left, const tensorflow::Tensor& right);

// The parts below each other, [num_rows, ...]. All have one dtype, one rank, and at least one row. A dimension in which
// they differ is the largest of theirs: what a part lacks there is filled with the first element of its first row, with
// zeros or empty strings where it has none. Rows beyond those of the parts repeat the first row.
tensorflow::Tensor ConcatRows(const std::vector<Rows>& parts, int64_t num_rows);

// Elements of the tensor that ConcatRows makes; -1 beyond int64.
int64_t NumElementsOfConcat(const std::vector<Rows>& parts, int64_t num_rows);

// A copy of these rows, [rows.size, ...].
tensorflow::Tensor CopyRows(const Rows& rows);

// The smallest of `allowed`, ascending, that is at least `size`; `size` where there is none.
int64_t RoundUpBatch(int64_t size, const std::vector<int64_t>& allowed);

// The sizes into which a request of `size` rows is cut: the first fills the `room` of a batch that has begun, if there
// is any, the others are full batches of `limit` rows, but the last.
std::vector<int64_t> SplitSizes(int64_t size, int64_t room, int64_t limit);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_BATCH_TENSORS_H_
