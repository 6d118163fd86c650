#include "dpsr_tf/ops/embedding.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace dpsr {
namespace {

struct Lists {
  std::vector<int32_t> values;
  std::vector<int64_t> splits;
  std::vector<float> weights;

  TokenLists View() const {
    return {values.data(), static_cast<int64_t>(values.size()), splits.data(), static_cast<int64_t>(splits.size()) - 1,
            weights.empty() ? nullptr : weights.data()};
  }
};

using Arrays = std::map<int, std::vector<int32_t>>;

// `shards` is the shard of each range; each range is a shard if it is empty.
Status Pack(const std::vector<Lists>& lists, const std::vector<int64_t>& first_rows, Arrays* packed,
            const std::vector<int64_t>& shards = {}, int num_shards = 0) {
  std::vector<TokenLists> views;
  for (const Lists& list : lists) views.push_back(list.View());
  RowRanges ranges;
  DPSR_RETURN_IF_ERROR(RowRanges::Make(first_rows, shards, shards.empty() ? first_rows.size() - 1 : num_shards, &ranges));
  return PackTokens(views, ranges, [&](int shard, int64_t size) {
    (*packed)[shard].assign(size, -99);
    return (*packed)[shard].data();
  });
}

PackedTokens Parsed(const std::vector<int32_t>& data, int64_t num_rows) {
  PackedTokens tokens;
  const Status status = PackedTokens::Parse(data.data(), data.size(), num_rows, &tokens);
  EXPECT_TRUE(status.ok()) << status.message();
  return tokens;
}

std::vector<float> Random(int64_t size, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> result(size);
  for (float& x : result) x = normal(random);
  return result;
}

TEST(PackTokensTest, WritesTheDocumentedArrays) {
  Arrays packed;
  ASSERT_TRUE(Pack({{{3, 1, 3}, {0, 2, 2, 3}, {}}, {{7}, {0, 1}, {}}}, {0, 8}, &packed).ok());
  EXPECT_EQ(packed, (Arrays{{0, {4, 0, 2, 2, 3, 4, 3, 1, 3, 7}}}));
}

TEST(PackTokensTest, TextsOfOneIdNeedNoEnds) {
  Arrays packed;
  ASSERT_TRUE(Pack({{{3, 1}, {0, 1, 2}, {}}}, {0, 8}, &packed).ok());
  EXPECT_EQ(packed, (Arrays{{0, {kOnePerText, 0, 3, 1}}}));
  const PackedTokens tokens = Parsed(packed[0], 8);
  EXPECT_EQ(tokens.num_texts(), 2);
  EXPECT_EQ(tokens.end(1), 2);
  ASSERT_TRUE(Pack({{{}, {0}, {}}}, {0, 8}, &packed).ok());
  EXPECT_EQ(Parsed(packed[0], 8).num_texts(), 0);
}

TEST(PackTokensTest, EachShardGetsItsIdsOfEveryText) {
  Arrays packed;
  ASSERT_TRUE(Pack({{{3, 1, 4, 3}, {0, 2, 2, 4}, {.5, 1, 2, 4}}}, {0, 3, 3, 8}, &packed).ok());
  EXPECT_EQ(packed[0].size(), 2u + 3 + 2);
  const PackedTokens first = Parsed(packed[0], 3), second = Parsed(packed[1], 0), third = Parsed(packed[2], 5);
  EXPECT_EQ(first.num_values(), 1);
  EXPECT_EQ(first.row(0), 1);
  EXPECT_EQ(first.weight(0), 1.f);
  EXPECT_EQ(second.num_values(), 0);
  EXPECT_EQ(second.num_texts(), 3);
  EXPECT_EQ(third.num_values(), 3);
  EXPECT_EQ(third.row(1), 1);
  EXPECT_EQ(third.weight(2), 4.f);
  EXPECT_EQ(third.end(0), 1);
  EXPECT_EQ(third.end(1), 1);
  EXPECT_EQ(third.end(2), 3);
}

TEST(PackTokensTest, AShardHasSeveralRangesOneBehindTheOther) {
  // Shard 0: ids 0, 1, 5, 6, 7. Shard 1: ids 4 and 8. Shard 2: ids 2 and 3. Range 3 is empty.
  Arrays packed;
  const std::vector<int64_t> first_rows = {0, 2, 4, 5, 5, 8, 9}, shards = {0, 2, 1, 2, 0, 1};
  ASSERT_TRUE(Pack({{{0, 1, 2, 3, 4, 5, 6, 7, 8}, {0, 9}, {}}}, first_rows, &packed, shards, 3).ok());
  EXPECT_EQ(packed, (Arrays{{0, {1, 0, 5, 0, 1, 2, 3, 4}}, {1, {1, 0, 2, 0, 1}}, {2, {1, 0, 2, 0, 1}}}));
}

TEST(PackTokensTest, RefusesRangesThatDoNotFit) {
  struct Case {
    std::string message;
    std::vector<int64_t> first_rows, shards;
  };
  const std::vector<Case> cases = {
      {"expected ascending ones from 0", {1, 4}, {0}},
      {"expected ascending ones from 0", {0, 4, 3}, {0, 1}},
      {"expected ascending ones from 0", {0}, {0}},
      {"at most 2^31 - 1", {0, int64_t{1} << 31}, {0}},
      {"first_rows has 3 numbers, and shards 1", {0, 4, 8}, {0}},
      {"range 1 is in shard 2, expected 0 to 1", {0, 4, 8}, {0, 2}},
      {"range 0 is in shard -1, expected 0 to 1", {0, 4, 8}, {-1, 0}},
  };
  for (const Case& each : cases) {
    Arrays packed;
    const Status status = Pack({{{}, {0}, {}}}, each.first_rows, &packed, each.shards, 2);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(each.message), std::string::npos) << status.message();
  }
}

TEST(PackTokensTest, RefusesIdsAndSplitsThatDoNotFit) {
  const std::map<std::string, Lists> cases = {
      {"id 8 in text 1, expected 0 to 7", {{1, 8}, {0, 1, 2}, {}}},
      {"id -1 in text 2, expected 0 to 7", {{1, -1}, {0, 1, 1, 2}, {}}},
      {"row_splits go from 1 to 2, expected 0 to the 2 values", {{1, 2}, {1, 2}, {}}},
      {"row_splits go from 0 to 1, expected 0 to the 2 values", {{1, 2}, {0, 1}, {}}},
      {"row_splits fall from 9 to 1 at text 1", {{1, 2}, {0, 9, 1, 2}, {}}},
  };
  for (const auto& [message, list] : cases) {
    Arrays packed;
    const Status status = Pack({list}, {0, 4, 8}, &packed);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
    EXPECT_TRUE(packed.empty());
  }
}

TEST(PackedTokensTest, RefusesArraysThatAreNone) {
  const std::map<std::string, std::vector<int32_t>> cases = {
      {"expected at least 2", {1}},
      {"the header is -2, 0", {-2, 0}},
      {"the header is 1, 2", {1, 2, 0}},
      {"3 texts do not fit", {3, 0, 0, 0}},
      {"1 texts do not fit", {1, 1, 1, 5}},
      {"text 1 ends at 0, before its begin", {2, 0, 1, 0, 5}},
      {"text 0 ends at -1, before its begin", {1, 0, -1}},
      {"the last text ends at 1, expected 2", {1, 0, 1, 5, 5}},
      {"the last text ends at 7, expected 1", {1, 0, 7, 5}},
      {"the last text ends at 0, expected 1", {0, 0, 5}},
      {"row 8, expected 0 to 7", {kOnePerText, 0, 8}},
      {"row -1, expected 0 to 7", {kOnePerText, 0, -1}},
  };
  for (const auto& [message, data] : cases) {
    PackedTokens tokens;
    const Status status = PackedTokens::Parse(data.data(), data.size(), 8, &tokens);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << message;
    EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
  }
}

// Sums and steps of random texts with repeated ids and empty texts, against sums in double precision.
class EveryDim : public testing::TestWithParam<int> {};

TEST_P(EveryDim, SumsAndStepsAsPlainLoopsDo) {
  const int64_t dim = GetParam(), num_rows = 5000;
  RowLocks locks;
  std::mt19937 random(dim);
  std::vector<Lists> bags(2);
  std::vector<float> table = Random(num_rows * dim, 1), accumulator(num_rows * dim, 0.1f);
  std::vector<double> sums(num_rows * dim);
  std::vector<std::vector<float>> gradients;
  std::vector<Arrays> packed(2);
  std::vector<PooledGradient> pooled;
  for (int b = 0; b < 2; ++b) {
    Lists& bag = bags[b];
    bag.splits = {0};
    for (int text = 0; text < 40; ++text) {
      for (int i = random() % 30; i > 0; --i) {
        bag.values.push_back(random() % 4 == 0 ? random() % num_rows : 4990 + random() % 10);
        if (b == 1) bag.weights.push_back((random() % 8) / 4.f);
      }
      bag.splits.push_back(bag.values.size());
    }
    ASSERT_TRUE(Pack({bag}, {0, num_rows}, &packed[b]).ok());
    const PackedTokens tokens = Parsed(packed[b][0], num_rows);
    gradients.push_back(Random(40 * dim, 2 + b));
    std::vector<float> out(40 * dim, NAN);
    SumRows(table.data(), dim, tokens, b == 0 ? &locks : nullptr, out.data());
    for (int64_t text = 0; text < 40; ++text) {
      for (int64_t k = 0; k < dim; ++k) {
        double sum = 0;
        for (int64_t i = bag.splits[text]; i < bag.splits[text + 1]; ++i) {
          const double weight = b == 1 ? bag.weights[i] : 1;
          sum += weight * table[bag.values[i] * dim + k];
          sums[bag.values[i] * dim + k] += weight * gradients[b][text * dim + k];
        }
        ASSERT_NEAR(out[text * dim + k], sum, 2e-5);
      }
    }
    pooled.push_back({tokens, gradients[b].data()});
  }
  const std::vector<float> before = table;
  std::vector<float> alone = table, alone_accumulator = accumulator;
  ApplyAdagrad(pooled, 0.5f, num_rows, dim, &locks, table.data(), accumulator.data());
  ApplyAdagrad(pooled, 0.5f, num_rows, dim, nullptr, alone.data(), alone_accumulator.data());
  EXPECT_EQ(alone, table) << "locks change no bit";
  EXPECT_EQ(alone_accumulator, accumulator);
  for (int64_t i = 0; i < num_rows * dim; ++i) {
    const double total = 0.1f + sums[i] * sums[i];
    // Hundreds of float32 terms that cancel.
    ASSERT_NEAR(accumulator[i], total, 1e-4 * std::max(1.0, total)) << i;
    ASSERT_NEAR(table[i], before[i] - 0.5 * sums[i] / std::sqrt(total), 1e-4) << i;
  }
}

TEST_P(EveryDim, DenseStepIsThatOfARow) {
  const int64_t dim = GetParam();
  RowLocks locks;
  std::vector<float> table = Random(dim, 1), accumulator(dim, 0.1f), values = table, values_accumulator = accumulator;
  const std::vector<float> gradient = Random(dim, 2);
  ApplyAdagrad({{Parsed({kOnePerText, 0, 0}, 1), gradient.data()}}, 0.5f, 1, dim, &locks, table.data(),
               accumulator.data());
  ApplyDenseAdagrad(gradient.data(), dim, 0.5f, values.data(), values_accumulator.data());
  for (int64_t i = 0; i < dim; ++i) {
    ASSERT_NEAR(values[i], table[i], 1e-6);
    ASSERT_NEAR(values_accumulator[i], accumulator[i], 1e-6 * accumulator[i]);
  }
}

TEST_P(EveryDim, SquaresDecay) {
  const int64_t dim = GetParam();
  RowLocks locks;
  std::vector<float> table = Random(dim, 1), accumulator(dim, 0.5f);
  const std::vector<float> before = table, gradient = Random(dim, 2);
  ApplyAdagrad({{Parsed({kOnePerText, 0, 0}, 1), gradient.data()}}, 0.5f, 1, dim, &locks, table.data(),
               accumulator.data(), 0.9f);
  for (int64_t i = 0; i < dim; ++i) {
    const float total = 0.9f * 0.5f + 0.1f * gradient[i] * gradient[i];
    ASSERT_NEAR(accumulator[i], total, 1e-5 * total);
    ASSERT_NEAR(table[i], before[i] - 0.5f * gradient[i] / std::sqrt(total), 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(Dims, EveryDim, testing::Values(1, 3, 8, 17, 64, 100, 128));

TEST(ApplyAdagradTest, NoUpdateOfARowIsLostBetweenThreads) {
  constexpr int kThreads = 4, kSteps = 3000, kDim = 33;
  RowLocks locks;
  std::vector<float> table(3 * kDim), accumulator(3 * kDim);
  Arrays packed;
  ASSERT_TRUE(Pack({{{0, 1, 0, 2}, {0, 2, 4}, {}}}, {0, 3}, &packed).ok());
  const PackedTokens tokens = Parsed(packed[0], 3);
  const std::vector<float> gradient(2 * kDim, 1);
  std::atomic<bool> torn{false};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&] {
      std::vector<float> out(2 * kDim);
      for (int step = 0; step < kSteps; ++step) {
        ApplyAdagrad({{tokens, gradient.data()}}, 1, 3, kDim, &locks, table.data(), accumulator.data());
        // All numbers of a row are alike, at any moment at which it may be seen.
        SumRows(table.data(), kDim, Parsed({kOnePerText, 0, 0, 1}, 3), &locks, out.data());
        for (int k = 0; k < kDim; ++k) torn = torn || out[k] != out[0] || out[kDim + k] != out[kDim];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(torn);
  for (int k = 0; k < kDim; ++k) {
    // Row 0 is in both texts: its gradient is 2.
    EXPECT_EQ(accumulator[k], 4.f * kThreads * kSteps);
    EXPECT_EQ(accumulator[kDim + k], 1.f * kThreads * kSteps);
    EXPECT_EQ(accumulator[2 * kDim + k], 1.f * kThreads * kSteps);
  }
}

TEST(UseHugePagesTest, ContentStays) {
  std::vector<float> data = Random(3 << 19, 1), before = data;  // 6 MiB
  for (const auto& [begin, size] : {std::pair<int64_t, int64_t>{0, 3 << 19}, {1, (3 << 19) - 2}, {5, 1}, {7, 0}}) {
    UseHugePages(data.data() + begin, size * sizeof(float));
    ASSERT_EQ(data, before);
  }
}

}  // namespace
}  // namespace dpsr
