#include "dpsr_tf/ops/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dpsr_tf/ops/for_each_cpu.h"

namespace dpsr {

DPSR_FOR_EACH_CPU void Attend(const float* wanted, const float* messages, const NearRows& rows, int64_t dim,
                              float scale, float* y, float* weights) {
  for (int64_t i = 0; i < rows.n; ++i) {
    const int64_t begin = rows.row_splits[i], end = rows.row_splits[i + 1];
    float* __restrict sum = y + i * dim;
    std::fill(sum, sum + dim, 0.f);
    float top = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t e = begin; e < end; ++e) {
      weights[e] = scale * Dot(wanted + i * dim, messages + rows.near[e] * dim, dim);
      top = std::max(top, weights[e]);
    }
    for (int64_t e = begin; e < end; ++e) total += weights[e] = std::exp(weights[e] - top);
    for (int64_t e = begin; e < end; ++e) {
      const float weight = weights[e] /= total;
      const float* message = messages + rows.near[e] * dim;
      for (int64_t k = 0; k < dim; ++k) sum[k] += weight * message[k];
    }
  }
}

DPSR_FOR_EACH_CPU void AttendGradient(const float* upstream, const float* wanted, const float* messages,
                                      const NearRows& rows, const float* weights, int64_t m, int64_t dim, float scale,
                                      float* of_wanted, float* of_messages) {
  std::fill(of_messages, of_messages + m * dim, 0.f);
  for (int64_t i = 0; i < rows.n; ++i) {
    const int64_t begin = rows.row_splits[i], end = rows.row_splits[i + 1];
    const float *up = upstream + i * dim, *want = wanted + i * dim;
    float* __restrict of_want = of_wanted + i * dim;
    std::fill(of_want, of_want + dim, 0.f);
    float mean = 0;
    for (int64_t e = begin; e < end; ++e) mean += weights[e] * Dot(up, messages + rows.near[e] * dim, dim);
    for (int64_t e = begin; e < end; ++e) {
      const float* message = messages + rows.near[e] * dim;
      float* __restrict of_message = of_messages + rows.near[e] * dim;
      const float weight = weights[e], of_logit = scale * weight * (Dot(up, message, dim) - mean);
      for (int64_t k = 0; k < dim; ++k) {
        of_message[k] += weight * up[k] + of_logit * want[k];
        of_want[k] += of_logit * message[k];
      }
    }
  }
}

}  // namespace dpsr
