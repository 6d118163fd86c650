#include "dpsr_tf/ops/click_graph.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/test_util.h"

namespace dpsr {
namespace {

struct Node {
  std::vector<int32_t> nodes;
  std::vector<float> weights;
  std::vector<uint32_t> times;
  Edges edges() const {
    return {{nodes.data(), nodes.size()}, {weights.data(), weights.size()}, {times.data(), times.size()}};
  }
};

std::vector<int32_t> Picked(const Node& node, const NeighbourLimits& limits, uint64_t seed = 1) {
  RandomStream random(seed);
  std::vector<float> weights;
  std::vector<int32_t> found{-7};  // what is there stays
  PickNeighbours(node.edges(), limits, &random, &weights, &found);
  EXPECT_EQ(found[0], -7);
  return {found.begin() + 1, found.end()};
}

const Node kNode{{4, 9, 2, 7, 5}, {8, 4, 2, 1, 1}, {50, 10, 40, 20, 30}};

TEST(PickNeighboursTest, AllThatCountIfTheyAreFew) {
  EXPECT_EQ(Picked(kNode, {5}), kNode.nodes);
  EXPECT_EQ(Picked(kNode, {9}), kNode.nodes);
  EXPECT_EQ(Picked(kNode, {4, false, NeighbourLimits::kAnyTime, 2}), (std::vector<int32_t>{4, 9, 7, 5}));
  EXPECT_EQ(Picked(kNode, {4, false, 40}), (std::vector<int32_t>{9, 7, 5})) << "strictly before";
  EXPECT_EQ(Picked(kNode, {4, false, 10}), std::vector<int32_t>());
  EXPECT_EQ(Picked(kNode, {0}), std::vector<int32_t>());
  EXPECT_EQ(Picked(Node(), {4}), std::vector<int32_t>());
  Node timeless = kNode;
  timeless.times.clear();
  EXPECT_EQ(Picked(timeless, {9, false, 1}), kNode.nodes);
}

TEST(PickNeighboursTest, TheStrongestThatCount) {
  EXPECT_EQ(Picked(kNode, {2, true}), (std::vector<int32_t>{4, 9}));
  EXPECT_EQ(Picked(kNode, {2, true, 50, 9}), (std::vector<int32_t>{2, 7}));
}

TEST(PickNeighboursTest, DrawsByWeightWithoutReplacement) {
  // The first draw has probability w / 16, and the second is among the rest: the chance that a node is among two.
  const int trials = 20000;
  std::map<int32_t, int> counts;
  for (int seed = 0; seed < trials; ++seed) {
    const std::vector<int32_t> found = Picked(kNode, {2}, static_cast<uint64_t>(seed));
    ASSERT_EQ(std::set<int32_t>(found.begin(), found.end()).size(), 2u);
    for (int32_t node : found) ++counts[node];
  }
  for (size_t i = 0; i < kNode.nodes.size(); ++i) {
    double expected = kNode.weights[i] / 16;
    for (size_t j = 0; j < kNode.nodes.size(); ++j) {
      if (j != i) expected += kNode.weights[j] / 16 * kNode.weights[i] / (16 - kNode.weights[j]);
    }
    EXPECT_NEAR(counts[kNode.nodes[i]] / double{trials}, expected, 0.018) << kNode.nodes[i];
  }
  EXPECT_EQ(Picked(kNode, {3}, 5), Picked(kNode, {3}, 5));
}

TEST(PickNeighboursTest, ANodeWithAMillionEdgesDrawsFromTheStrongest) {
  Node node;
  for (int i = 0; i < 1'000'000; ++i) {
    node.nodes.push_back(i);
    node.weights.push_back(1);
  }
  for (uint64_t seed = 0; seed < 50; ++seed) {
    for (int32_t found : Picked(node, {10}, seed)) EXPECT_LT(found, static_cast<int32_t>(kDrawnFrom));
  }
}

TEST(RowNumbersTest, NumbersRowsByTheirFirstOccurrence) {
  RowNumbers numbers;
  for (int round = 0; round < 2; ++round) {
    numbers.Clear();
    std::map<int32_t, int32_t> expected;
    RandomStream random(static_cast<uint64_t>(round));
    for (int i = 0; i < 5000; ++i) {
      const int32_t row = static_cast<int32_t>(random.Uniform(900)) * 1000;
      const auto [at, is_new] = expected.emplace(row, static_cast<int32_t>(expected.size()));
      ASSERT_EQ(numbers.NumberOf(row), at->second);
      if (is_new) { ASSERT_EQ(numbers.rows().back(), row); }
    }
    EXPECT_EQ(numbers.rows().size(), expected.size());
  }
}

class ClickGraphTest : public FileTest {
 protected:
  template <typename T>
  using Section = std::pair<std::string, std::vector<T>>;

  // Two files: queries 0 and 1 and items 0 and 1 in the first, query 2 and item 2 in the second.
  void Write(const std::string& path, int file, std::vector<float> weights = {3, 1, 1}, int64_t first = -1,
             std::vector<int32_t> items = {2, 0, 1}) {
    PackedFileWriter writer(path, "graph");
    ASSERT_TRUE(IsOk(writer.Open()));
    const auto add = [&](const std::string& name, const auto& values) {
      using T = typename std::decay_t<decltype(values)>::value_type;
      ASSERT_TRUE(IsOk(writer.Add(name, DataTypeOf<T>::value, values.data(), values.size() * sizeof(T))));
    };
    const bool is_first = file == 0;
    add("query.splits", is_first ? std::vector<int64_t>{0, 2, 3} : std::vector<int64_t>{0, 0});
    add("query.item", is_first ? items : std::vector<int32_t>());
    add("query.weight", is_first ? weights : std::vector<float>());
    add("query.time", is_first ? std::vector<uint32_t>{5, 6, 7} : std::vector<uint32_t>());
    add("item.first", std::vector<int64_t>{first >= 0 ? first : is_first ? 0 : 2});
    add("item.splits", is_first ? std::vector<int64_t>{0, 1, 2} : std::vector<int64_t>{0, 1});
    add("item.query", is_first ? std::vector<int32_t>{0, 1} : std::vector<int32_t>{0});
    add("item.weight", std::vector<float>(is_first ? 2 : 1, 1.0f));
    if (is_first) {
      add("value.brand.splits", std::vector<int64_t>{0, 0, 2});
      add("value.brand.item", std::vector<int32_t>{2, 0});
      add("value.brand.weight", std::vector<float>{4, 1});
    }
    ASSERT_TRUE(IsOk(writer.Finish()));
  }
  Status Open(std::unique_ptr<ClickGraph>* graph, int64_t queries = 3, int64_t items = 3,
              const std::vector<std::string>& attributes = {"brand"}) {
    return ClickGraph::Open({directory_ + "/0", directory_ + "/1"}, attributes, queries, items,
                            [](const std::string& path, const char* kind, std::unique_ptr<PackedFile>* file) {
                              return PackedFile::Open(path, kind, false, file);
                            },
                            graph);
  }
  std::string ErrorOf(StatusCode code, int64_t queries = 3, int64_t items = 3,
                      const std::vector<std::string>& attributes = {"brand"}) {
    std::unique_ptr<ClickGraph> graph;
    const Status status = Open(&graph, queries, items, attributes);
    EXPECT_EQ(status.code(), code) << status.message();
    return std::string(status.message());
  }
};

TEST_F(ClickGraphTest, FindsTheEdgesOfAllFiles) {
  Write(directory_ + "/0", 0);
  Write(directory_ + "/1", 1);
  std::unique_ptr<ClickGraph> graph;
  ASSERT_TRUE(IsOk(Open(&graph)));
  const auto nodes = [](const Edges& edges) { return std::vector<int32_t>(edges.nodes.begin(), edges.nodes.end()); };
  EXPECT_EQ(nodes(graph->OfQuery(0)), (std::vector<int32_t>{2, 0}));
  EXPECT_EQ(nodes(graph->OfQuery(1)), (std::vector<int32_t>{1}));
  EXPECT_EQ(nodes(graph->OfQuery(2)), std::vector<int32_t>());
  EXPECT_EQ(graph->OfQuery(0).times[1], 6u);
  EXPECT_EQ(nodes(graph->OfItem(1)), (std::vector<int32_t>{1}));
  EXPECT_EQ(nodes(graph->OfItem(2)), (std::vector<int32_t>{0}));
  EXPECT_TRUE(graph->OfItem(2).times.empty());
  EXPECT_EQ(nodes(graph->OfValue(0, 1)), (std::vector<int32_t>{2, 0}));
  EXPECT_EQ(graph->num_codes(0), 2);
}

TEST_F(ClickGraphTest, FilesThatDoNotFitAreRefused) {
  Write(directory_ + "/0", 0);
  Write(directory_ + "/1", 1);
  EXPECT_NE(ErrorOf(StatusCode::kDataLoss, 4).find("has 3 queries, expected 4"), std::string::npos);
  EXPECT_NE(ErrorOf(StatusCode::kNotFound, 3, 3, {"shop"}).find("no attribute 'shop'"), std::string::npos);
  Write(directory_ + "/0", 0, {3, 0, 1});
  EXPECT_NE(ErrorOf(StatusCode::kDataLoss).find("query.weight row 1 is 0"), std::string::npos);
  Write(directory_ + "/0", 0, {3, 1, 1}, -1, {2, 3, 1});
  EXPECT_NE(ErrorOf(StatusCode::kDataLoss).find("query.item"), std::string::npos);
  Write(directory_ + "/0", 0);
  Write(directory_ + "/1", 1, {}, 1);
  EXPECT_NE(ErrorOf(StatusCode::kDataLoss).find("item.first is 1, expected 2"), std::string::npos);
  std::unique_ptr<ClickGraph> graph;
  const Status status = ClickGraph::Open({}, {}, 0, 0, nullptr, &graph);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace dpsr
