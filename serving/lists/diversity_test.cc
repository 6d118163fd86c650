#include "serving/lists/diversity.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace dpsr::serving {
namespace {

using Order = std::vector<size_t>;

// One attribute, whose values are the letters of a text; "-" is none.
std::vector<ResultValue> Brands(const std::string& text) {
  std::vector<ResultValue> values;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '-') values.push_back({i, 0, text[i]});
  }
  return values;
}

TEST(DiversityTest, WithoutValuesTheOrderStays) {
  EXPECT_EQ(MaximalMarginalRelevance({3, 2, 2, 1}, {}, 1, 10, 1), (Order{0, 1, 2, 3}));
  EXPECT_EQ(SlidingWindow(3, {}, 10, 1), (Order{0, 1, 2}));
  EXPECT_TRUE(MaximalMarginalRelevance({}, {}, 1, 10, 1).empty());
  EXPECT_TRUE(SlidingWindow(0, {}, 10, 1).empty());
}

TEST(DiversityTest, TheWindowForgets) {
  // With a window of 1, the third result only differs from the second one.
  EXPECT_EQ(MaximalMarginalRelevance({1, 1, 1, 1}, Brands("AABB"), 1, 1, 0.5), (Order{0, 2, 1, 3}));
  EXPECT_EQ(MaximalMarginalRelevance({1, 1, 1, 1}, Brands("AAAB"), 1, 10, 0.5), (Order{0, 3, 1, 2}));
}

TEST(DiversityTest, SlidingWindowAllowsSoManyNeighbours) {
  EXPECT_EQ(SlidingWindow(8, Brands("AAAAABBC"), 4, 2), (Order{0, 1, 5, 6, 2, 3, 7, 4}));
  EXPECT_EQ(SlidingWindow(3, Brands("AAA"), 10, 1), (Order{0, 1, 2}));
}

// The formula, computed anew for each place.
Order Slowly(const std::vector<double>& gains, const std::vector<ResultValue>& values, size_t window, double cost) {
  Order left(gains.size()), order;
  for (size_t i = 0; i < left.size(); ++i) left[i] = i;
  while (!left.empty()) {
    std::set<int64_t> recent;
    for (size_t at = order.size() - std::min(order.size(), window); at < order.size(); ++at) {
      for (const ResultValue& one : values) {
        if (one.result == order[at]) recent.insert(one.value);
      }
    }
    const auto gain = [&](size_t result) {
      std::set<size_t> common;
      for (const ResultValue& one : values) {
        if (one.result == result && recent.count(one.value)) common.insert(one.attribute);
      }
      return gains[result] - cost * static_cast<double>(common.size());
    };
    auto best = left.begin();
    for (auto at = left.begin(); at != left.end(); ++at) {
      if (gain(*at) > gain(*best)) best = at;
    }
    order.push_back(*best);
    left.erase(best);
  }
  return order;
}

TEST(DiversityTest, IsTheFormula) {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    const size_t results = random() % 20, attributes = 1 + random() % 3, window = 1 + random() % 6;
    std::vector<double> gains;
    for (size_t i = 0; i < results; ++i) gains.push_back(static_cast<double>(random() % 8) / 4);
    std::sort(gains.rbegin(), gains.rend());
    std::vector<ResultValue> values;
    for (size_t i = 0; results > 0 && i < random() % 60; ++i) {
      const size_t attribute = random() % attributes;  // a result may have a value twice
      values.push_back({random() % results, attribute, static_cast<int64_t>(attribute + attributes * (random() % 5))});
    }
    EXPECT_EQ(MaximalMarginalRelevance(gains, values, attributes, window, 0.25), Slowly(gains, values, window, 0.25));
  }
}

}  // namespace
}  // namespace dpsr::serving
