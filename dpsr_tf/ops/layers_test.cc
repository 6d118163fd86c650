#include "dpsr_tf/ops/layers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace dpsr {
namespace {

std::vector<float> Random(int64_t size, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> result(size);
  for (float& x : result) x = normal(random);
  return result;
}

struct Case {
  int64_t n, width;
};

class EverySize : public testing::TestWithParam<Case> {};

TEST_P(EverySize, BiasAndReluAreThoseOfPlainLoops) {
  const auto [n, width] = GetParam();
  const std::vector<float> x = Random(n * width, 1), bias = Random(width, 2), upstream = Random(n * width, 3);
  for (const bool relu : {false, true}) {
    std::vector<float> y = x, of_x = upstream, of_bias(width, NAN);
    AddBias(y.data(), bias.data(), n, width, relu, y.data());
    AddBiasGradient(of_x.data(), y.data(), n, width, relu, of_x.data(), of_bias.data());
    for (int64_t k = 0; k < width; ++k) {
      double sum = 0;
      for (int64_t i = k; i < n * width; i += width) {
        const float expected = x[i] + bias[k], slope = !relu || expected > 0 ? upstream[i] : 0;
        ASSERT_EQ(y[i], relu && expected < 0 ? 0 : expected);
        ASSERT_EQ(of_x[i], slope);
        sum += slope;
      }
      ASSERT_NEAR(of_bias[k], sum, 1e-4);
    }
  }
}

TEST_P(EverySize, UnitVectorsAndTheirGradientAreThoseOfPlainLoops) {
  const auto [n, dim] = GetParam();
  const int64_t per_text = 2;
  std::vector<float> x = Random(n * per_text * dim, 1), upstream = Random(n * per_text * dim, 2);
  for (int64_t k = 0; k < dim && n > 0; ++k) x[k] *= 1e-8f;  // too short
  std::vector<int64_t> splits{0};
  for (int64_t text = 0; text < n; ++text) splits.push_back(splits.back() + (text == 1 ? 0 : 3));
  std::vector<float> y(x.size(), NAN), scales(n * per_text, NAN), of_x = upstream;
  UnitVectors(x.data(), splits.data(), n, per_text, dim, y.data(), scales.data());
  UnitVectorsGradient(of_x.data(), y.data(), scales.data(), n * per_text, dim, of_x.data());
  for (int64_t i = 0; i < n * per_text; ++i) {
    double squared = 0, along = 0;
    for (int64_t k = i * dim; k < (i + 1) * dim; ++k) squared += double{x[k]} * x[k];
    const bool is_short = squared < kLeastSquaredNorm;
    const double scale = i / per_text == 1 ? 0 : 1 / std::sqrt(is_short ? double{kLeastSquaredNorm} : squared);
    for (int64_t k = i * dim; k < (i + 1) * dim && !is_short; ++k) along += upstream[k] * x[k] * scale;
    for (int64_t k = i * dim; k < (i + 1) * dim; ++k) {
      ASSERT_NEAR(y[k], scale * x[k], 1e-5);
      ASSERT_NEAR(of_x[k], scale * (upstream[k] - along * scale * x[k]), 1e-4 * (1 + scale));
    }
  }
}

TEST(LayersTest, WhatIsNoNumberStaysNone) {
  const std::vector<float> x{NAN, 1}, bias{0, 0};
  const std::vector<int64_t> splits{0, 1};
  std::vector<float> y(2), scale(1);
  AddBias(x.data(), bias.data(), 1, 2, true, y.data());
  EXPECT_TRUE(std::isnan(y[0]));
  UnitVectors(x.data(), splits.data(), 1, 1, 2, y.data(), scale.data());
  EXPECT_TRUE(std::isnan(y[0]) && std::isnan(y[1]));
}

INSTANTIATE_TEST_SUITE_P(Sizes, EverySize,
                         testing::Values(Case{0, 3}, Case{1, 1}, Case{3, 16}, Case{5, 37}, Case{64, 256}));

}  // namespace
}  // namespace dpsr
