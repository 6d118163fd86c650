// What a tower does between its matrix products, each in one pass: bias and ReLU, vectors of length 1, their gradients.
//
// Matrices are float32, row by row. The order of summation depends on nothing but the sizes.
#ifndef DPSR_TF_OPS_LAYERS_H_
#define DPSR_TF_OPS_LAYERS_H_

#include <cstdint>

namespace dpsr {

// y = x + bias, with `relu` no less than 0; what is no number stays none. x, y [n, width], bias [width]; y may be x.
void AddBias(const float* x, const float* bias, int64_t n, int64_t width, bool relu, float* y);

// With respect to x, where y > 0 or always without `relu`, and to the bias, the sum of that over rows. `of_x` may be
// `upstream`, and null without `relu`, where it would be the same.
void AddBiasGradient(const float* upstream, const float* y, int64_t n, int64_t width, bool relu, float* of_x,
                     float* of_bias);

// Shorter vectors than the root of this are divided by that root, as tf.math.l2_normalize does.
constexpr float kLeastSquaredNorm = 1e-12f;

// y = scale * x, of length 1 each; zero for those of a text without tokens. Text t has the tokens row_splits[t] to
// row_splits[t + 1] and the vectors t * per_text, ..., (t + 1) * per_text - 1. x, y [texts * per_text, dim], `scales`
// [texts * per_text].
void UnitVectors(const float* x, const int64_t* row_splits, int64_t texts, int64_t per_text, int64_t dim, float* y,
                 float* scales);

// With respect to x; y, scales [n, dim], [n] are what UnitVectors wrote. `of_x` may be `upstream`.
void UnitVectorsGradient(const float* upstream, const float* y, const float* scales, int64_t n, int64_t dim,
                         float* of_x);

}  // namespace dpsr

#endif  // DPSR_TF_OPS_LAYERS_H_
