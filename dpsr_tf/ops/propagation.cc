#include "dpsr_tf/ops/propagation.h"

#include <algorithm>

#include "dpsr_tf/ops/for_each_cpu.h"

namespace dpsr {

DPSR_FOR_EACH_CPU void PropagateRows(const SparseRows& matrix, const float* x, int64_t begin, int64_t end, int64_t dim,
                                     float* y) {
  constexpr int64_t kAhead = 8;  // values between a prefetch and its use
  const int64_t last = matrix.row_splits[end];
  for (int64_t i = begin; i < end; ++i) {
    float* __restrict sum = y + i * dim;
    std::fill(sum, sum + dim, 0.f);
    for (int64_t e = matrix.row_splits[i]; e < matrix.row_splits[i + 1]; ++e) {
      if (e + kAhead < last) {
        const float* next = x + matrix.columns[e + kAhead] * dim;
        for (int64_t k = 0; k < dim; k += 16) __builtin_prefetch(next + k);
      }
      const float weight = matrix.weights[e], *row = x + matrix.columns[e] * dim;
      for (int64_t k = 0; k < dim; ++k) sum[k] += weight * row[k];
    }
  }
}

}  // namespace dpsr
