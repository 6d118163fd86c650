// The hinge loss over mixed negatives (DPSR sections 4.3 and 4.4.3) and its gradient, with one pass over each matrix.
//
// Matrices are [b, n], row by row. Row i is pair i; column j is an item that may serve as its negative.
#ifndef DPSR_TF_OPS_HINGE_LOSS_H_
#define DPSR_TF_OPS_HINGE_LOSS_H_

#include <cstdint>

namespace dpsr {

// Writes the weights of negatives. In each row, the columns that `mask` allows form two groups: the first b columns
// share 1 - mixing_ratio evenly, the others share mixing_ratio. Both are multiplied by the number of allowed columns.
// If a group is empty, the other one gets everything, unless its share is 0. The weight is 0 where the mask is false.
// `n` is at least `b`.
void NegativeWeights(const bool* mask, int64_t b, int64_t n, float mixing_ratio, float* weights);

// Returns the sum over i and j of example_weights[i] / b * weights[i, j] * max(0, margin - positive[i] + scores[i, j]),
// and writes its gradient. The order of summation depends on the sizes only. If `positive` is null, the positives are
// the diagonal of `scores`, and so is their gradient.
template <typename T>
struct HingeInput {
  const T* positive;         // [b], or null
  const T* scores;           // [b, n]
  const T* weights;          // [b, n]
  const T* example_weights;  // [b]
};
template <typename T>
struct HingeGradient {
  T* positive;  // [b], is added to; null if the positives are on the diagonal
  T* scores;    // [b, n]
};
float HingeLoss(const HingeInput<float>& input, int64_t b, int64_t n, float margin,
                const HingeGradient<float>& gradient);
double HingeLoss(const HingeInput<double>& input, int64_t b, int64_t n, double margin,
                 const HingeGradient<double>& gradient);

// Returns the same bits as HingeLoss with the NegativeWeights of `mask` [b, n] and positives on the diagonal of
// `scores`, and writes the gradient with respect to `scores` [b, n]. It needs no matrix of weights.
float MixedHingeLoss(const float* scores, const bool* mask, const float* example_weights, int64_t b, int64_t n,
                     float mixing_ratio, float margin, float* gradient);

}  // namespace dpsr

#endif  // DPSR_TF_OPS_HINGE_LOSS_H_
