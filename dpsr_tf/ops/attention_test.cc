#include "dpsr_tf/ops/attention.h"

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

// Three rows: two neighbours, none, and three of which one stands twice.
const std::vector<int32_t> kNear{4, 0, 2, 2, 3};
const std::vector<int64_t> kSplits{0, 2, 2, 5};
constexpr int64_t kRows = 3, kMessages = 5;
constexpr float kScale = 0.7f;

// The sum of upstream * y, by plain loops in double precision.
double Loss(const std::vector<float>& wanted, const std::vector<float>& messages, const std::vector<float>& upstream,
            int64_t dim, std::vector<double>* y) {
  y->assign(kRows * dim, 0);
  double loss = 0;
  for (int64_t i = 0; i < kRows; ++i) {
    double total = 0;
    for (int64_t e = kSplits[i]; e < kSplits[i + 1]; ++e) {
      double logit = 0;
      for (int64_t k = 0; k < dim; ++k) logit += double{wanted[i * dim + k]} * messages[kNear[e] * dim + k];
      const double weight = std::exp(kScale * logit);
      total += weight;
      for (int64_t k = 0; k < dim; ++k) (*y)[i * dim + k] += weight * messages[kNear[e] * dim + k];
    }
    for (int64_t k = 0; k < dim && total > 0; ++k) loss += upstream[i * dim + k] * ((*y)[i * dim + k] /= total);
  }
  return loss;
}

class EveryWidth : public testing::TestWithParam<int64_t> {};

TEST_P(EveryWidth, IsThatOfPlainLoopsAndItsGradientThatOfDifferences) {
  const int64_t dim = GetParam();
  std::vector<float> wanted = Random(kRows * dim, 1), messages = Random(kMessages * dim, 2);
  for (float& x : messages) x /= std::sqrt(static_cast<float>(dim));
  const std::vector<float> upstream = Random(kRows * dim, 3);
  const NearRows rows{kNear.data(), kSplits.data(), kRows};
  std::vector<float> y(kRows * dim, NAN), weights(kNear.size(), NAN);
  Attend(wanted.data(), messages.data(), rows, dim, kScale, y.data(), weights.data());
  std::vector<double> expected;
  Loss(wanted, messages, upstream, dim, &expected);
  for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], expected[i], 1e-5);
  EXPECT_NEAR(weights[0] + weights[1], 1, 1e-6);
  EXPECT_EQ(weights[2], weights[3]);

  std::vector<float> of_wanted(wanted.size(), NAN), of_messages(messages.size(), NAN);
  AttendGradient(upstream.data(), wanted.data(), messages.data(), rows, weights.data(), kMessages, dim, kScale,
                 of_wanted.data(), of_messages.data());
  std::vector<double> unused;
  for (auto [values, gradient] : {std::pair{&wanted, &of_wanted}, {&messages, &of_messages}}) {
    for (size_t i = 0; i < values->size(); ++i) {
      const float before = (*values)[i], step = 1e-2f;
      (*values)[i] = before + step;
      const double above = Loss(wanted, messages, upstream, dim, &unused);
      (*values)[i] = before - step;
      const double below = Loss(wanted, messages, upstream, dim, &unused);
      (*values)[i] = before;
      ASSERT_NEAR((*gradient)[i], (above - below) / (2 * step), 2e-3) << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Widths, EveryWidth, testing::Values(1, 7, 16, 64, 65));

TEST(AttendTest, LargeLogitsStayFinite) {
  const std::vector<float> wanted{1000}, messages{1000, -1000};
  const std::vector<int32_t> near{0, 1};
  const std::vector<int64_t> splits{0, 2};
  float y, weights[2];
  Attend(wanted.data(), messages.data(), {near.data(), splits.data(), 1}, 1, 1, &y, weights);
  EXPECT_EQ(y, 1000);
  EXPECT_EQ(weights[1], 0);
}

}  // namespace
}  // namespace dpsr
