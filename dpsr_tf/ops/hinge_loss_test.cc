#include "dpsr_tf/ops/hinge_loss.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

namespace dpsr {
namespace {

struct Case {
  int64_t b, n;
};

class EverySize : public testing::TestWithParam<Case> {};

TEST_P(EverySize, WeightsMixTheGroups) {
  const auto [b, n] = GetParam();
  std::mt19937 random(b * 100 + n);
  const std::unique_ptr<bool[]> mask(new bool[b * n]);
  for (float ratio : {0.f, 0.25f, 1.f}) {
    for (int64_t i = 0; i < b * n; ++i) mask[i] = random() % 3 != 0;
    std::vector<float> weights(b * n, NAN);
    NegativeWeights(mask.get(), b, n, ratio, weights.data());
    for (int64_t i = 0; i < b; ++i) {
      double counts[2] = {}, shares[2] = {1. - ratio, ratio};
      for (int64_t j = 0; j < n; ++j) counts[j >= b] += mask[i * n + j];
      for (int group = 0; group < 2; ++group) shares[group] *= counts[group] > 0;
      const double total = shares[0] + shares[1];
      for (int64_t j = 0; j < n; ++j) {
        const int group = j >= b;
        const double expected = mask[i * n + j] && total > 0
                                    ? (counts[0] + counts[1]) * shares[group] / total / counts[group]
                                    : 0;
        ASSERT_NEAR(weights[i * n + j], expected, 1e-5 * (1 + expected)) << i << ", " << j;
        ASSERT_TRUE(mask[i * n + j] || weights[i * n + j] == 0.f);
      }
    }
  }
}

TEST_P(EverySize, LossAndGradientAreThoseOfPlainLoops) {
  const auto [b, n] = GetParam();
  std::mt19937 random(b * 100 + n);
  std::uniform_real_distribution<float> uniform(-1, 1);
  auto draw = [&](int64_t size) {
    std::vector<float> values(size);
    for (float& value : values) value = uniform(random);
    return values;
  };
  const std::vector<float> positive = draw(b), scores = draw(b * n);
  std::vector<float> weights = draw(b * n), example_weights = draw(b);
  for (float& weight : weights) weight = weight < 0 ? 0 : weight;
  std::vector<float> of_positive(b), of_scores(b * n, NAN);
  const float loss = HingeLoss({positive.data(), scores.data(), weights.data(), example_weights.data()}, b, n, 0.3f,
                               {of_positive.data(), of_scores.data()});
  double expected = 0;
  for (int64_t i = 0; i < b; ++i) {
    double slopes = 0;
    for (int64_t j = 0; j < n; ++j) {
      const float violation = 0.3f - positive[i] + scores[i * n + j];
      const double slope = violation > 0 ? double{weights[i * n + j]} * example_weights[i] / b : 0;
      ASSERT_NEAR(of_scores[i * n + j], slope, 1e-6);
      slopes += slope;
      expected += slope * violation;
    }
    ASSERT_NEAR(of_positive[i], -slopes, 1e-5);
  }
  ASSERT_NEAR(loss, expected, 1e-5 * (1 + std::abs(expected)));
}

TEST_P(EverySize, PositivesMayBeTheDiagonal) {
  const auto [b, n] = GetParam();
  std::mt19937 random(b * 100 + n);
  std::vector<float> scores(b * n), weights(b * n), positive(b), of_positive(b), expected(b * n), found(b * n);
  for (float& score : scores) score = (random() % 100) / 100.f;
  for (float& weight : weights) weight = random() % 3;
  for (int64_t i = 0; i < b; ++i) positive[i] = scores[i * n + i];
  const std::vector<float> example_weights(b, 1);
  HingeInput<float> input{positive.data(), scores.data(), weights.data(), example_weights.data()};
  const float loss = HingeLoss(input, b, n, 0.3f, {of_positive.data(), expected.data()});
  input.positive = nullptr;
  EXPECT_EQ(HingeLoss(input, b, n, 0.3f, {nullptr, found.data()}), loss);
  for (int64_t i = 0; i < b; ++i) expected[i * n + i] += of_positive[i];
  EXPECT_EQ(found, expected);
}

TEST_P(EverySize, MixedLossIsThatOfTheWeights) {
  const auto [b, n] = GetParam();
  std::mt19937 random(b * 100 + n);
  const std::unique_ptr<bool[]> mask(new bool[b * n]);
  std::vector<float> scores(b * n), weights(b * n), example_weights(b), expected(b * n), found(b * n, NAN);
  for (float& score : scores) score = (random() % 100) / 100.f;
  for (float& weight : example_weights) weight = random() % 3;
  for (float ratio : {0.f, 0.25f, 1.f}) {
    for (int64_t i = 0; i < b * n; ++i) mask[i] = random() % 3 != 0;
    NegativeWeights(mask.get(), b, n, ratio, weights.data());
    const HingeInput<float> input{nullptr, scores.data(), weights.data(), example_weights.data()};
    const float loss = HingeLoss(input, b, n, 0.3f, {nullptr, expected.data()});
    EXPECT_EQ(MixedHingeLoss(scores.data(), mask.get(), example_weights.data(), b, n, ratio, 0.3f, found.data()), loss);
    EXPECT_EQ(found, expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, EverySize,
                         testing::Values(Case{1, 1}, Case{1, 2}, Case{3, 3}, Case{3, 16}, Case{5, 37}, Case{64, 128}));

}  // namespace
}  // namespace dpsr
