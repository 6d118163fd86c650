#include "export/rank_features/rank_layers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace dpsr {
namespace {

TEST(AddProductTest, EqualsThePlainLoop) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const size_t n : {0, 1, 3, 8, 11, 100}) {
    for (const size_t k : {0, 1, 5, 64}) {
      for (const size_t m : {1, 4, 16, 31, 32, 33, 100, 128}) {
        std::vector<float> x(n * k), kernel(k * m), y(n * m);
        for (std::vector<float>* values : {&x, &kernel, &y}) {
          for (float& value : *values) value = normal(random);
        }
        std::vector<double> expected(y.begin(), y.end());
        for (size_t r = 0; r < n; ++r) {
          for (size_t c = 0; c < m; ++c) {
            for (size_t p = 0; p < k; ++p) expected[r * m + c] += double{x[r * k + p]} * kernel[p * m + c];
          }
        }
        AddProduct(x.data(), kernel.data(), n, k, m, y.data());
        for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], expected[i], 1e-4) << n << " " << k << " " << m;
      }
    }
  }
}

TEST(PairInputsTest, AllParts) {
  PairLayout layout;
  layout.scales.numbers = {{2, 1, 0.5}, {1, 0, 1}, {1, 0, 0.01f}};
  layout.scales.may_miss = {1};
  layout.scales.cut = 5;
  layout.fields = {2, 1};
  const std::vector<float> wanted{2, 3}, text{1, -1}, pooled{1, 2, 4};
  // Three events with two codes; the last one is the newest.
  const std::vector<float> history{7, 0, 9, 1, 7, 0};
  RankedRequest request;
  request.wanted = {wanted.data(), 2};
  request.text = {text.data(), 2};
  request.pooled = {pooled.data(), 3};
  request.SetHistory(history.data(), 3, 2, 5);
  const std::vector<float> numbers{-6, NAN, 100}, vector{10, 20, 30}, offered{5, 7}, codes{7, 0};
  std::vector<float> out(request.Width(layout));
  ASSERT_EQ(out.size(), 3u + 1 + 2 + 1 + 2 + 6);
  PairInputs(layout, request, numbers.data(), vector.data(), offered.data(), codes.data(), out.data());
  const std::vector<float> expected{
      (-std::log1p(3.0f) - 1) / 0.5f, 0, 5, 1, 10, 21, -10, 50, 120, std::log1p(2.0f), 0, 2.0f / 3, 0,
      std::exp2(-0.2f) + std::exp2(-0.6f), 0};
  for (size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(out[i], expected[i], 1e-5) << i;
}

TEST(PairInputsTest, WideTexts) {
  PairLayout layout;
  layout.fields = {19};
  std::vector<float> vector(19), text(19);
  double expected = 0;
  for (int i = 0; i < 19; ++i) {
    vector[i] = static_cast<float>(i - 4);
    text[i] = static_cast<float>(2 * i + 1);
    expected += vector[i] * text[i];
  }
  RankedRequest request;
  request.text = request.pooled = {text.data(), text.size()};
  std::vector<float> out(request.Width(layout));
  PairInputs(layout, request, nullptr, vector.data(), nullptr, nullptr, out.data());
  EXPECT_FLOAT_EQ(out[0], static_cast<float>(expected));
  EXPECT_FLOAT_EQ(out[1], static_cast<float>(expected));
}

TEST(PairInputsTest, NumbersOnlyAndAnEmptyHistory) {
  PairLayout layout;
  layout.scales.numbers = {{1, 0, 1}};
  layout.scales.cut = 5;
  RankedRequest request;
  const float number = 1;
  std::vector<float> out(request.Width(layout), -1);
  ASSERT_EQ(out.size(), 1u);
  PairInputs(layout, request, &number, nullptr, nullptr, nullptr, out.data());
  EXPECT_FLOAT_EQ(out[0], std::log1p(1.0f));
  request.SetHistory(nullptr, 0, 1, 5);
  out.assign(request.Width(layout), -1);
  const float code = 3;
  PairInputs(layout, request, &number, nullptr, nullptr, &code, out.data());
  EXPECT_EQ(std::vector<float>(out.begin() + 1, out.end()), std::vector<float>(3, 0));
}

}  // namespace
}  // namespace dpsr
