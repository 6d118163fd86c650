#include "export/rank_features/rank_layers.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace dpsr {
namespace {

// Every third input is 0 in the first 40 rows, as after a ReLU.
std::vector<float> SparseRows(size_t n, size_t k, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n * k);
  for (size_t i = 0; i < x.size(); ++i) x[i] = i / k < 40 && i % k % 3 == 1 ? 0.0f : normal(*random);
  return x;
}

TEST(DenseLayerTest, EqualsThePlainLoop) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const size_t n : {0, 1, 3, 8, 11, 100}) {
    for (const size_t k : {0, 1, 5, 16, 70}) {
      for (const size_t m : {1, 4, 16, 31, 32, 33, 64, 100, 128}) {
        const std::vector<float> x = SparseRows(n, k, &random);
        std::vector<float> kernel(k * m), bias(m), rows(n * m);
        for (std::vector<float>* values : {&kernel, &bias, &rows}) {
          for (float& value : *values) value = normal(random);
        }
        std::vector<const float*> start;
        for (size_t r = 0; r < n; ++r) start.push_back(rows.data() + r * m);
        for (const bool has_start : {false, true}) {
          for (const bool relu : {false, true}) {
            std::vector<float> y(n * m, -7);
            DenseLayer{kernel.data(), bias.data(), k, m, relu}.Apply(x.data(), has_start ? start.data() : nullptr, n,
                                                                     y.data());
            for (size_t r = 0; r < n; ++r) {
              for (size_t c = 0; c < m; ++c) {
                double expected = double{bias[c]} + (has_start ? start[r][c] : 0);
                for (size_t p = 0; p < k; ++p) expected += double{x[r * k + p]} * kernel[p * m + c];
                if (relu) expected = std::max(expected, 0.0);
                ASSERT_NEAR(y[r * m + c], expected, 1e-4) << n << " " << k << " " << m << " " << has_start << relu;
              }
            }
          }
        }
      }
    }
  }
}

TEST(MoveCommonInputsTest, MovesValuesOfMostRows) {
  // The columns: one value in most rows, in all, in half of them; only different ones; 0 in most.
  std::vector<float> x{3, 5, 2, 1, 0,  //
                       9, 5, 2, 2, 0,  //
                       3, 5, 4, 3, 7,  //
                       3, 5, 4, 4, 0};
  const std::vector<float> old = x;
  std::vector<float> common(5, -1);
  MoveCommonInputs(4, 5, x.data(), common.data());
  EXPECT_EQ(common[0], 3);
  EXPECT_EQ(common[1], 5);
  EXPECT_EQ(common[4], 0);
  EXPECT_EQ((std::vector<float>{x[0], x[5], x[10], x[15]}), (std::vector<float>{0, 6, 0, 0}));
  for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(x[i] + common[i % 5], old[i]) << i;
  MoveCommonInputs(0, 5, nullptr, common.data());
  EXPECT_EQ(common, std::vector<float>(5, 0));
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
