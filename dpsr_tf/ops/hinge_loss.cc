#include "dpsr_tf/ops/hinge_loss.h"

#include <vector>

#include "dpsr_tf/ops/for_each_cpu.h"

namespace dpsr {
namespace {

// Compilers vectorise bytes but not bool. A product is used, because a choice would need masks of bytes.
DPSR_INLINE const uint8_t* Bytes(const bool* mask) { return reinterpret_cast<const uint8_t*>(mask); }
DPSR_INLINE float Masked(uint8_t mask, float weight) { return static_cast<float>(int32_t{mask}) * weight; }

DPSR_INLINE int32_t Count(const uint8_t* mask, int64_t n) {
  int32_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += mask[j];
  return count;
}

DPSR_INLINE void Fill(const uint8_t* __restrict mask, int64_t n, float weight, float* __restrict weights) {
  for (int64_t j = 0; j < n; ++j) weights[j] = Masked(mask[j], weight);
}

// Of one pair.
DPSR_INLINE void FillRow(const uint8_t* mask, int64_t b, int64_t n, float mixing_ratio, float* weights) {
  const float in_batch = Count(mask, b), random = Count(mask + b, n - b);
  const float batch_share = in_batch > 0 ? 1 - mixing_ratio : 0.f, random_share = random > 0 ? mixing_ratio : 0.f;
  const float shares = batch_share + random_share, scale = shares > 0 ? (in_batch + random) / shares : 0.f;
  Fill(mask, b, in_batch > 0 ? scale * batch_share / in_batch : 0.f, weights);
  Fill(mask + b, n - b, random > 0 ? scale * random_share / random : 0.f, weights + b);
}

template <typename T>
struct Row {
  T loss, slope;
};

// Sets `slopes` to weight * share where the margin is violated, and returns their sum and the sum of slope * violation.
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
  for (int64_t i = 0; i < b; ++i) FillRow(Bytes(mask) + i * n, b, n, mixing_ratio, weights + i * n);
}

DPSR_FOR_EACH_CPU float MixedHingeLoss(const float* scores, const bool* mask, const float* example_weights, int64_t b,
                                       int64_t n, float mixing_ratio, float margin, float* gradient) {
  std::vector<float> weights(n);
  float loss = 0;
  for (int64_t i = 0; i < b; ++i) {
    FillRow(Bytes(mask) + i * n, b, n, mixing_ratio, weights.data());
    const Row<float> row = HingeRow(scores + i * n, weights.data(), n, margin - scores[i * n + i],
                                    example_weights[i] / b, gradient + i * n);
    gradient[i * n + i] -= row.slope;
    loss += row.loss;
  }
  return loss;
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
