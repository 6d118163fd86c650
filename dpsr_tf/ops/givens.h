// One step of block coordinate descent over rotations: disjoint pairs of axes are rotated, each in its own plane, so the
// matrix stays a rotation.
//
// Matrices are [d, d] float32, row by row. R maps a vector x to x R.
#ifndef DPSR_TF_OPS_GIVENS_H_
#define DPSR_TF_OPS_GIVENS_H_

#include <cstdint>
#include <vector>

namespace dpsr {

// Two different axes, first < second, and the derivative of the loss with respect to the angle of their rotation.
struct AxisPair {
  int64_t first, second;
  float slope;
};

// The slopes follow from `product` = R^T (dL/dR): the rotation of R's columns i and j by theta, to cos R_i + sin R_j and
// cos R_j - sin R_i, has dL/dtheta = A_ij at 0, where A = product^T - product.

// Returns disjoint pairs, the steepest first: each has the largest |A_ij| of all pairs that are disjoint from those
// before it. Of equal ones the lower axes. Pairs whose slope is 0 or NaN are left out.
std::vector<AxisPair> SteepestPairs(const float* product, int64_t d);

// Returns floor(d / 2) disjoint pairs; which ones is a function of `seed`.
std::vector<AxisPair> RandomPairs(const float* product, int64_t d, uint64_t seed);

// Rotates the columns of each pair by -learning_rate * slope.
void RotatePairs(const std::vector<AxisPair>& pairs, float learning_rate, int64_t d, float* rotation);

// Makes one column orthogonal to the others and of length 1, so far as they are orthogonal themselves. A call for one
// column after the other keeps rounding errors from adding up over many steps.
void OrthogonalizeColumn(int64_t column, int64_t d, float* rotation);

}  // namespace dpsr

#endif  // DPSR_TF_OPS_GIVENS_H_
