#include "serving/model_server/batch_tensors.h"

#include <algorithm>
#include <cstring>

#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.h"

namespace dpsr::serving {
namespace {

using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;
using ::tensorflow::tstring;

// Copies `count` elements between tensors of the same dtype, plain numbers or strings.
void CopyElements(const Tensor& from, int64_t from_index, int64_t count, Tensor* to, int64_t to_index) {
  if (from.dtype() == tensorflow::DT_STRING) {
    const auto* source = static_cast<const tstring*>(from.data()) + from_index;
    std::copy(source, source + count, static_cast<tstring*>(to->data()) + to_index);
    return;
  }
  const int64_t bytes = tensorflow::DataTypeSize(from.dtype());
  if (count == 0) return;
  std::memcpy(static_cast<char*>(to->data()) + to_index * bytes,
              static_cast<const char*>(from.data()) + from_index * bytes, count * bytes);
}

int64_t ElementsPerRow(const Tensor& tensor) {
  int64_t elements = 1;
  for (int d = 1; d < tensor.dims(); ++d) elements *= tensor.dim_size(d);
  return elements;
}

std::vector<int64_t> LargestDims(const std::vector<Rows>& parts) {
  std::vector<int64_t> dims(parts[0].tensor->dims(), 0);
  for (const Rows& part : parts) {
    for (size_t d = 1; d < dims.size(); ++d) dims[d] = std::max(dims[d], part.tensor->dim_size(d));
  }
  return dims;
}

// Copies a part whose rows are smaller than the rows of `to`, and pads them. Fills `to` from element `to_index` on.
void CopyPadded(const Rows& part, Tensor* to, int64_t to_index) {
  const Tensor& from = *part.tensor;
  const int64_t from_row = ElementsPerRow(from);
  const int64_t to_row = ElementsPerRow(*to);
  if (from_row == 0) {
    // New strings are empty already.
    if (to->dtype() == tensorflow::DT_STRING) return;
    const int64_t bytes = tensorflow::DataTypeSize(to->dtype());
    std::memset(static_cast<char*>(to->data()) + to_index * bytes, 0, part.size * to_row * bytes);
    return;
  }
  for (int64_t i = 0; i < part.size * to_row; ++i) CopyElements(from, part.begin * from_row, 1, to, to_index + i);
  // Elements along the last dimension are copied as one run. `place` counts the runs, like the digits of a clock.
  const int last = from.dims() - 1;
  const int64_t run = from.dim_size(last);
  std::vector<int64_t> place(last, 0);
  const int64_t num_runs = part.size * from_row / run;
  for (int64_t i = 0; i < num_runs; ++i) {
    int64_t to_run = place[0];
    for (int d = 1; d < last; ++d) to_run = to_run * to->dim_size(d) + place[d];
    CopyElements(from, part.begin * from_row + i * run, run, to, to_index + to_run * to->dim_size(last));
    for (int d = last - 1; d > 0 && ++place[d] == from.dim_size(d); --d) place[d] = 0;
    // After the last run of a row all places within the row are back at 0.
    if ((i + 1) % (from_row / run) == 0) ++place[0];
  }
}

}  // namespace

bool HaveSameRows(const Tensor& left, const Tensor& right) {
  if (left.dims() != right.dims()) return false;
  for (int d = 1; d < left.dims(); ++d) {
    if (left.dim_size(d) != right.dim_size(d)) return false;
  }
  return true;
}

int64_t NumElementsOfConcat(const std::vector<Rows>& parts, int64_t num_rows) {
  std::vector<int64_t> dims = LargestDims(parts);
  dims[0] = num_rows;
  TensorShape shape;
  return TensorShape::BuildTensorShape(dims, &shape).ok() ? shape.num_elements() : -1;
}

Tensor ConcatRows(const std::vector<Rows>& parts, int64_t num_rows) {
  std::vector<int64_t> dims = LargestDims(parts);
  dims[0] = num_rows;
  Tensor result(parts[0].tensor->dtype(), TensorShape(dims));
  const int64_t per_row = ElementsPerRow(result);
  int64_t row = 0;
  for (const Rows& part : parts) {
    if (HaveSameRows(*part.tensor, result)) {
      CopyElements(*part.tensor, part.begin * per_row, part.size * per_row, &result, row * per_row);
    } else {
      CopyPadded(part, &result, row * per_row);
    }
    row += part.size;
  }
  for (; row < num_rows; ++row) CopyElements(result, 0, per_row, &result, row * per_row);
  return result;
}

Tensor CopyRows(const Rows& rows) { return ConcatRows({rows}, rows.size); }

int64_t RoundUpBatch(int64_t size, const std::vector<int64_t>& allowed) {
  const auto found = std::lower_bound(allowed.begin(), allowed.end(), size);
  return found == allowed.end() ? size : *found;
}

std::vector<int64_t> SplitSizes(int64_t size, int64_t room, int64_t limit) {
  std::vector<int64_t> sizes;
  for (int64_t next = room > 0 ? room : limit; size > 0; next = limit) {
    sizes.push_back(std::min(next, size));
    size -= sizes.back();
  }
  return sizes;
}

}  // namespace dpsr::serving
