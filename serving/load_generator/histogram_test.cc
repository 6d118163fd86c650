#include "serving/load_generator/histogram.h"

#include <gtest/gtest.h>

#include <random>

namespace dpsr::serving {
namespace {

TEST(Histogram, SmallValuesAreExact) {
  Histogram histogram;
  for (int i = 1; i <= 100; ++i) histogram.Add(i);
  EXPECT_EQ(histogram.Quantile(0.5), 50);
  EXPECT_EQ(histogram.Quantile(0.99), 99);
  EXPECT_EQ(histogram.Quantile(0.999), 100);
  EXPECT_EQ(histogram.Quantile(0), 1);
  EXPECT_EQ(histogram.Quantile(1), 100);
  EXPECT_DOUBLE_EQ(histogram.mean(), 50.5);
}

TEST(Histogram, QuantilesAreWithinATenthOfAPercent) {
  std::mt19937_64 random(1);
  std::lognormal_distribution<double> latency(13, 2);  // around 0.4 ms, up to minutes
  Histogram histogram;
  std::vector<int64_t> values(20'000);
  for (int64_t& value : values) histogram.Add(value = static_cast<int64_t>(latency(random)));
  std::sort(values.begin(), values.end());
  for (const double q : {0.001, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0}) {
    const auto exact = static_cast<double>(values[static_cast<size_t>(std::ceil(q * 20'000)) - 1]);
    EXPECT_NEAR(static_cast<double>(histogram.Quantile(q)), exact, exact * 0.001) << q;
  }
}

TEST(Histogram, NoValueIsLost) {
  Histogram one, other;
  one.Add(-5);
  one.Add(int64_t{1} << 60);
  other.Add((int64_t{1} << 47) - 1);
  other.Add(one);
  EXPECT_EQ(other.count(), 3);
  EXPECT_EQ(other.Quantile(0), 0);
  EXPECT_EQ(other.Quantile(1), (int64_t{1} << 47) - 1);
  EXPECT_EQ(Histogram().Quantile(0.5), 0);
}

}  // namespace
}  // namespace dpsr::serving
