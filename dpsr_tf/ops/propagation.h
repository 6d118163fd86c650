// One layer of propagation over a whole graph: a sparse matrix in compressed rows times a dense one, as LightGCN has it
// (He et al., SIGIR 2020, equation 7).
#ifndef DPSR_TF_OPS_PROPAGATION_H_
#define DPSR_TF_OPS_PROPAGATION_H_

#include <cstdint>

namespace dpsr {

// A square matrix [n, n]: row i has the values weights[row_splits[i]] to weights[row_splits[i + 1] - 1], in the columns
// that stand at the same places of `columns`.
struct SparseRows {
  const int64_t* row_splits;  // [n + 1]
  const int32_t* columns;
  const float* weights;
};

// Writes the rows begin to end - 1 of y = matrix * x; x, y [n, dim] float32, row by row. The sum of a row is in the order
// of its values.
void PropagateRows(const SparseRows& matrix, const float* x, int64_t begin, int64_t end, int64_t dim, float* y);

}  // namespace dpsr

#endif  // DPSR_TF_OPS_PROPAGATION_H_
