// The hinge loss over mixed negatives (DPSR sections 4.3 and 4.4.3) in one pass a matrix, its gradient with it.
//
// Matrices are [b, n], row by row: row i is pair i, column j an item that may serve as its negative.
#ifndef DPSR_TF_OPS_HINGE_LOSS_H_
#define DPSR_TF_OPS_HINGE_LOSS_H_

#include <cstdint>

namespace dpsr {

// Weights of negatives: in each row, those that `mask` allows of the first b columns share 1 - mixing_ratio, those of
// the others mixing_ratio, evenly, times how many are allowed in all. Where a row has none of one group, all goes to the
// other, unless mixing_ratio gives that one nothing. Zero where the mask is false. `n` is at least `b`.
void NegativeWeights(const bool* mask, int64_t b, int64_t n, float mixing_ratio, float* weights);

// The sum over pairs i of example_weights[i] / b * weights[i, j] * max(0, margin - positive[i] + scores[i, j]), and its
// gradient. The order of summation depends on nothing but the sizes. Where `positive` is null, those are the diagonal of
// `scores`, and so is their gradient.
template <typename T>
struct HingeInput {
  const T* positive;         // [b], or null
  const T* scores;           // [b, n]
  const T* weights;          // [b, n]
  const T* example_weights;  // [b]
};
template <typename T>
struct HingeGradient {
  T* positive;  // [b]: is added to; null where there are no positives
  T* scores;    // [b, n]
};
float HingeLoss(const HingeInput<float>& input, int64_t b, int64_t n, float margin,
                const HingeGradient<float>& gradient);
double HingeLoss(const HingeInput<double>& input, int64_t b, int64_t n, double margin,
                 const HingeGradient<double>& gradient);

// HingeLoss of the NegativeWeights of `mask` [b, n], to the bit, positives on the diagonal of `scores`; its gradient with
// respect to those [b, n]. There is no matrix of weights to write and read.
float MixedHingeLoss(const float* scores, const bool* mask, const float* example_weights, int64_t b, int64_t n,
                     float mixing_ratio, float margin, float* gradient);

}  // namespace dpsr

#endif  // DPSR_TF_OPS_HINGE_LOSS_H_
