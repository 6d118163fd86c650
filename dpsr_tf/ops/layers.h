// The work of a tower between its matrix products, each in one pass: bias and ReLU, scaling to length 1, and their
// gradients.
//
// Matrices are float32, row by row. The order of summation depends on the sizes only.
#ifndef DPSR_TF_OPS_LAYERS_H_
#define DPSR_TF_OPS_LAYERS_H_

#include <cstdint>

namespace dpsr {

// y = x + bias, and with `relu` at least 0. NaN stays NaN. x, y [n, width], bias [width]; y may be x.
void AddBias(const float* x, const float* bias, int64_t n, int64_t width, bool relu, float* y);

// Writes the gradients of AddBias. With respect to x it is `upstream` where y > 0, or everywhere without `relu`; with
// respect to the bias it is the sum of that over rows. `of_x` may be `upstream`. Without `relu` it may be null, because
// it would equal `upstream`.
void AddBiasGradient(const float* upstream, const float* y, int64_t n, int64_t width, bool relu, float* of_x,
                     float* of_bias);

// Vectors that are shorter than the square root of this are divided by that root, as tf.math.l2_normalize does.
constexpr float kLeastSquaredNorm = 1e-12f;

// y = scale * x, each vector of length 1, or zero if its text has no tokens. Text t has the tokens row_splits[t] to
// row_splits[t + 1] - 1 and the vectors t * per_text to (t + 1) * per_text - 1. x, y [texts * per_text, dim], `scales`
// [texts * per_text].
void UnitVectors(const float* x, const int64_t* row_splits, int64_t texts, int64_t per_text, int64_t dim, float* y,
                 float* scales);

// Writes the gradient of UnitVectors with respect to x. y [n, dim] and scales [n] are what UnitVectors wrote. `of_x`
// may be `upstream`.
void UnitVectorsGradient(const float* upstream, const float* y, const float* scales, int64_t n, int64_t dim,
                         float* of_x);

}  // namespace dpsr

#endif  // DPSR_TF_OPS_LAYERS_H_
