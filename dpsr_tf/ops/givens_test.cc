#include "dpsr_tf/ops/givens.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
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

std::vector<float> Identity(int64_t d) {
  std::vector<float> result(d * d);
  for (int64_t i = 0; i < d; ++i) result[i * d + i] = 1;
  return result;
}

float Slope(const std::vector<float>& product, int64_t d, int64_t i, int64_t j) {
  return product[j * d + i] - product[i * d + j];
}

// Sorts all pairs and takes each whose axes are free.
std::vector<AxisPair> PlainGreedy(const std::vector<float>& product, int64_t d) {
  std::vector<AxisPair> all, chosen;
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i + 1; j < d; ++j) all.push_back({i, j, Slope(product, d, i, j)});
  }
  std::stable_sort(all.begin(), all.end(), [](const AxisPair& a, const AxisPair& b) {
    return std::fabs(a.slope) > std::fabs(b.slope);
  });
  std::set<int64_t> taken;
  for (const AxisPair& pair : all) {
    if (pair.slope == 0 || taken.count(pair.first) + taken.count(pair.second) > 0) continue;
    taken.insert({pair.first, pair.second});
    chosen.push_back(pair);
  }
  return chosen;
}

double OrthogonalityError(const std::vector<float>& rotation, int64_t d) {
  double error = 0;
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      double sum = i == j ? -1 : 0;
      for (int64_t k = 0; k < d; ++k) sum += double{rotation[k * d + i]} * rotation[k * d + j];
      error = std::max(error, std::fabs(sum));
    }
  }
  return error;
}

void ExpectEqual(const std::vector<AxisPair>& got, const std::vector<AxisPair>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].first, expected[i].first);
    EXPECT_EQ(got[i].second, expected[i].second);
    EXPECT_EQ(got[i].slope, expected[i].slope);
  }
}

TEST(GivensTest, SteepestPairsAreThoseOfASortedList) {
  for (const int64_t d : {1, 2, 3, 16, 37, 64, 101}) {
    std::vector<float> product = Random(d * d, d);
    ExpectEqual(SteepestPairs(product.data(), d), PlainGreedy(product, d));
    for (float& value : product) value = std::round(value);  // many equal slopes, many zeros
    ExpectEqual(SteepestPairs(product.data(), d), PlainGreedy(product, d));
  }
}

TEST(GivensTest, AllRowsMayWantTheSamePartner) {
  constexpr int64_t d = 50;
  std::vector<float> product(d * d);
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i + 1; j < d; ++j) product[i * d + j] = j + 1.f / (1 + i);
  }
  ExpectEqual(SteepestPairs(product.data(), d), PlainGreedy(product, d));
}

TEST(GivensTest, PairsWithoutASlopeAreLeftOut) {
  EXPECT_TRUE(SteepestPairs(Identity(8).data(), 8).empty());
  std::vector<float> product(16, NAN);
  EXPECT_TRUE(SteepestPairs(product.data(), 4).empty());
  product[0 * 4 + 2] = 1;
  product[2 * 4 + 0] = 0;
  ExpectEqual(SteepestPairs(product.data(), 4), {{0, 2, -1}});
}

TEST(GivensTest, RandomPairsAreDisjointAndAFunctionOfTheSeed) {
  for (const int64_t d : {1, 2, 7, 64}) {
    const std::vector<float> product = Random(d * d, 1);
    const std::vector<AxisPair> pairs = RandomPairs(product.data(), d, 3);
    ASSERT_EQ(pairs.size(), d / 2);
    std::set<int64_t> axes;
    for (const AxisPair& pair : pairs) {
      EXPECT_LT(pair.first, pair.second);
      EXPECT_EQ(pair.slope, Slope(product, d, pair.first, pair.second));
      axes.insert({pair.first, pair.second});
    }
    EXPECT_EQ(axes.size(), d / 2 * 2);
    ExpectEqual(RandomPairs(product.data(), d, 3), pairs);
  }
  const std::vector<float> product = Random(64 * 64, 1);
  EXPECT_NE(RandomPairs(product.data(), 64, 3)[0].first, RandomPairs(product.data(), 64, 4)[0].first);
}

TEST(GivensTest, ARotationIsTheMatrixOfItsAngle) {
  std::vector<float> rotation = Identity(3);
  RotatePairs({{0, 2, 2.f}}, 0.25f, 3, rotation.data());
  const float c = std::cos(-0.5f), s = std::sin(-0.5f);
  const std::vector<float> expected{c, 0, -s, 0, 1, 0, s, 0, c};
  for (int i = 0; i < 9; ++i) EXPECT_NEAR(rotation[i], expected[i], 1e-7);
}

TEST(GivensTest, OrthogonalizedColumnsAreOrthogonal) {
  constexpr int64_t d = 37;
  std::vector<float> rotation = Identity(d);
  const std::vector<float> noise = Random(d * d, 1);
  for (int64_t i = 0; i < d * d; ++i) rotation[i] += 1e-3f * noise[i];
  EXPECT_GT(OrthogonalityError(rotation, d), 1e-3);
  for (int round = 0; round < 3; ++round) {
    for (int64_t column = 0; column < d; ++column) OrthogonalizeColumn(column, d, rotation.data());
  }
  EXPECT_LT(OrthogonalityError(rotation, d), 1e-6);
}

TEST(GivensTest, ManyStepsKeepARotation) {
  constexpr int64_t d = 32;
  std::vector<float> rotation = Identity(d);
  const std::vector<float> product = Random(d * d, 1);
  for (int64_t step = 0; step < 100'000; ++step) {
    RotatePairs(RandomPairs(product.data(), d, step), step % 2 == 0 ? 1e-2f : 1e-4f, d, rotation.data());
    OrthogonalizeColumn(step % d, d, rotation.data());
  }
  EXPECT_LT(OrthogonalityError(rotation, d), 2e-6);
}

}  // namespace
}  // namespace dpsr
