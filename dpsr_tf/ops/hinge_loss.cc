#include "dpsr_tf/ops/hinge_loss.h"

#include <algorithm>

#include "dpsr_tf/ops/for_each_cpu.h"

namespace dpsr {
namespace {

// Sums are kept in as many parts as a wide register holds, so that they are the same on every kind of CPU.
constexpr int64_t kLanes = 16;

template <typename T>
DPSR_INLINE T Total(const T (&lanes)[kLanes]) {
  T total = 0;
  for (T lane : lanes) total += lane;
  return total;
}

DPSR_INLINE int32_t Count(const bool* mask, int64_t n) {
  int32_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += mask[j];
  return count;
}

DPSR_INLINE void Fill(const bool* __restrict mask, int64_t n, float weight, float* __restrict weights) {
  for (int64_t j = 0; j < n; ++j) weights[j] = mask[j] ? weight : 0.f;
}

template <typename T>
struct Row {
  T loss, slope;
};

// `slopes` become weight * share where the margin is violated; their sum, and that of slope * violation.
template <typename T>
DPSR_INLINE Row<T> HingeRow(const T* __restrict scores, const T* __restrict weights, int64_t n, T bound, T share,
                            T* __restrict slopes) {
  T loss[kLanes] = {}, slope[kLanes] = {};
  auto add = [&](int64_t j, int64_t lane) DPSR_INLINE_LAMBDA {
    const T violation = bound + scores[j];
    const T s = violation > 0 ? weights[j] * share : 0;
    slopes[j] = s;
    slope[lane] += s;
    loss[lane] += s * violation;
  };
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(j + lane, lane);
  }
  for (; j < n; ++j) add(j, j % kLanes);
  return {Total(loss), Total(slope)};
}

template <typename T>
DPSR_INLINE T HingeRows(const HingeInput<T>& input, int64_t b, int64_t n, T margin, const HingeGradient<T>& gradient) {
  T loss = 0;
  for (int64_t i = 0; i < b; ++i) {
    const bool on_diagonal = input.positive == nullptr;
    const T positive = on_diagonal ? input.scores[i * n + i] : input.positive[i];
    const Row<T> row = HingeRow(input.scores + i * n, input.weights + i * n, n, margin - positive,
                                input.example_weights[i] / b, gradient.scores + i * n);
    (on_diagonal ? gradient.scores[i * n + i] : gradient.positive[i]) -= row.slope;
    loss += row.loss;
  }
  return loss;
}

}  // namespace

DPSR_FOR_EACH_CPU void NegativeWeights(const bool* mask, int64_t b, int64_t n, float mixing_ratio, float* weights) {
  for (int64_t i = 0; i < b; ++i, mask += n, weights += n) {
    const float in_batch = Count(mask, b), random = Count(mask + b, n - b);
    const float batch_share = in_batch > 0 ? 1 - mixing_ratio : 0.f, random_share = random > 0 ? mixing_ratio : 0.f;
    const float shares = batch_share + random_share, scale = shares > 0 ? (in_batch + random) / shares : 0.f;
    Fill(mask, b, in_batch > 0 ? scale * batch_share / in_batch : 0.f, weights);
    Fill(mask + b, n - b, random > 0 ? scale * random_share / random : 0.f, weights + b);
  }
}

DPSR_FOR_EACH_CPU float HingeLoss(const HingeInput<float>& input, int64_t b, int64_t n, float margin,
                                  const HingeGradient<float>& gradient) {
  return HingeRows(input, b, n, margin, gradient);
}

DPSR_FOR_EACH_CPU double HingeLoss(const HingeInput<double>& input, int64_t b, int64_t n, double margin,
                                   const HingeGradient<double>& gradient) {
  return HingeRows(input, b, n, margin, gradient);
}

}  // namespace dpsr
