// Joins the rows of many requests into one tensor, and takes them apart again. Row i of a tensor is tensor[i, ...].
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

// Returns whether all dimensions except the first are equal.
bool HaveSameRows(const tensorflow::Tensor& left, const tensorflow::Tensor& right);

// Puts the parts below each other, [num_rows, ...]. All parts have the same dtype and rank, and at least one row. If a
// dimension differs, the result has the largest size. Smaller parts are padded with the first element of their first
// row, or with zeros or empty strings if they have no element. Rows beyond the ones of the parts repeat the first row.
tensorflow::Tensor ConcatRows(const std::vector<Rows>& parts, int64_t num_rows);

// Returns the number of elements of the tensor that ConcatRows makes; -1 if it does not fit into int64.
int64_t NumElementsOfConcat(const std::vector<Rows>& parts, int64_t num_rows);

// Returns a copy of these rows, [rows.size, ...].
tensorflow::Tensor CopyRows(const Rows& rows);

// Returns the smallest of the ascending sizes `allowed` that is at least `size`; `size` itself if there is none.
int64_t RoundUpBatch(int64_t size, const std::vector<int64_t>& allowed);

// Returns the sizes of the parts into which a request of `size` rows is cut. The first part fills the `room` of a batch
// that has begun, if it has any. The others are full batches of `limit` rows, except the last one.
std::vector<int64_t> SplitSizes(int64_t size, int64_t room, int64_t limit);

}  // namespace dpsr::serving

#endif  // DPSR_SERVING_MODEL_SERVER_BATCH_TENSORS_H_
