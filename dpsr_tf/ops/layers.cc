#include "dpsr_tf/ops/layers.h"

#include <algorithm>
#include <cmath>

#include "dpsr_tf/ops/for_each_cpu.h"

namespace dpsr {

DPSR_FOR_EACH_CPU void AddBias(const float* x, const float* __restrict bias, int64_t n, int64_t width, bool relu,
                               float* y) {
  for (int64_t i = 0; i < n; ++i, x += width, y += width) {
    if (relu) {
      for (int64_t k = 0; k < width; ++k) {
        const float sum = x[k] + bias[k];
        y[k] = 0.f > sum ? 0.f : sum;
      }
    } else {
      for (int64_t k = 0; k < width; ++k) y[k] = x[k] + bias[k];
    }
  }
}

DPSR_FOR_EACH_CPU void AddBiasGradient(const float* upstream, const float* y, int64_t n, int64_t width, bool relu,
                                       float* of_x, float* __restrict of_bias) {
  std::fill(of_bias, of_bias + width, 0.f);
  for (int64_t row = 0; row < n * width; row += width) {
    if (relu) {
      for (int64_t k = 0; k < width; ++k) {
        const float g = y[row + k] > 0.f ? upstream[row + k] : 0.f;
        of_x[row + k] = g;
        of_bias[k] += g;
      }
    } else {
      for (int64_t k = 0; k < width; ++k) of_bias[k] += upstream[row + k];
    }
  }
}

DPSR_FOR_EACH_CPU void UnitVectors(const float* x, const int64_t* row_splits, int64_t texts, int64_t per_text,
                                   int64_t dim, float* y, float* scales) {
  for (int64_t text = 0; text < texts; ++text) {
    for (int64_t i = 0; i < per_text; ++i, x += dim, y += dim, ++scales) {
      const float squared = Dot(x, x, dim);
      const bool has_tokens = row_splits[text + 1] > row_splits[text];
      const float scale = has_tokens ? 1 / std::sqrt(squared < kLeastSquaredNorm ? kLeastSquaredNorm : squared) : 0.f;
      *scales = scale;
      for (int64_t k = 0; k < dim; ++k) y[k] = scale * x[k];
    }
  }
}

DPSR_FOR_EACH_CPU void UnitVectorsGradient(const float* upstream, const float* y, const float* scales, int64_t n,
                                           int64_t dim, float* of_x) {
  const float largest = 1 / std::sqrt(kLeastSquaredNorm);
  for (int64_t i = 0; i < n; ++i, upstream += dim, y += dim, of_x += dim) {
    // The scale of a vector below kLeastSquaredNorm is a constant.
    const float along = scales[i] < largest ? Dot(upstream, y, dim) : 0.f;
    for (int64_t k = 0; k < dim; ++k) of_x[k] = scales[i] * (upstream[k] - along * y[k]);
  }
}

}  // namespace dpsr
