#include "dpsr_tf/ops/batch_sampler.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "dpsr_tf/ops/permutation.h"

namespace dpsr {
namespace {

using ::testing::TempDir;

// A small store: query q has clicked items q, q + 1, ..., q + q % 4 (mod items), and, if q is even, two labelled
// negatives. User of every row of query q: q % users, with features "age" = 10 + user and "sex" = user % 2.
struct Shop {
  static constexpr int kUsers = 3, kItems = 40, kQueries = 25;
  std::vector<std::pair<int, int>> clicks;

  TrainingStore::Paths Write(const std::string& name, int broken_item = -1) {
    const std::string base = TempDir() + "/" + name;
    TrainingStore::Paths paths{base + "_users", base + "_items", base + "_interactions"};
    std::vector<int64_t> user_ids(kUsers), item_ids(kItems), item_splits{0}, query_splits{0}, positive_splits{0},
        negative_splits{0};
    std::iota(user_ids.begin(), user_ids.end(), 100);
    std::iota(item_ids.begin(), item_ids.end(), 1000);
    std::vector<int32_t> age, sex, item_tokens, query_tokens, query, user, item, negative;
    std::vector<float> weight;
    for (int u = 0; u < kUsers; ++u) {
      age.push_back(10 + u);
      sex.push_back(u % 2);
    }
    for (int i = 0; i < kItems; ++i) {
      for (int t = 0; t < i % 3; ++t) item_tokens.push_back(1000 * i + t);
      item_splits.push_back(item_tokens.size());
    }
    for (int q = 0; q < kQueries; ++q) {
      query_tokens.push_back(q);
      query_splits.push_back(query_tokens.size());
      std::set<int> clicked;
      for (int i = q; i <= q + q % 4; ++i) clicked.insert(i % kItems);
      for (int i : clicked) {
        clicks.emplace_back(q, i);
        query.push_back(q);
        user.push_back(q % kUsers);
        item.push_back(i);
        weight.push_back(1 + q);
      }
      positive_splits.push_back(item.size());
      if (q % 2 == 0) negative.insert(negative.end(), {(q + 20) % kItems, (q + 21) % kItems});
      negative_splits.push_back(negative.size());
    }
    if (broken_item >= 0) item[3] = broken_item;
    auto write = [](const std::string& path, const char* kind, auto... sections) {
      PackedFileWriter writer(path, kind);
      ASSERT_TRUE(writer.Open().ok());
      (
          [&] {
            using T = typename decltype(sections.second)::value_type;
            const Status status = writer.Add(sections.first, DataTypeOf<T>::value, sections.second.data(),
                                             sections.second.size() * sizeof(T));
            ASSERT_TRUE(status.ok()) << status.message();
          }(),
          ...);
      ASSERT_TRUE(writer.Finish().ok());
    };
    write(paths.users, "users", std::pair("id", user_ids), std::pair("feature.age", age), std::pair("feature.sex", sex));
    write(paths.items, "items", std::pair("id", item_ids), std::pair("tokens.splits", item_splits),
          std::pair("tokens.values", item_tokens));
    write(paths.interactions, "interactions", std::pair("query.splits", query_splits),
          std::pair("query.tokens", query_tokens), std::pair("positive.splits", positive_splits),
          std::pair("positive.query", query), std::pair("positive.user", user), std::pair("positive.item", item),
          std::pair("positive.weight", weight), std::pair("negative.splits", negative_splits),
          std::pair("negative.item", negative));
    return paths;
  }
};

class BatchSamplerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const Status status = TrainingStore::Open(shop_.Write(Name()), {"sex", "age"}, &store_);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  static std::string Name() { return ::testing::UnitTest::GetInstance()->current_test_info()->name(); }
  std::vector<std::pair<int, int>> Pairs(const Batch& batch) {
    std::vector<std::pair<int, int>> pairs;
    for (size_t i = 0; i < batch.query.size(); ++i) pairs.emplace_back(batch.query[i], batch.item[i]);
    return pairs;
  }

  Shop shop_;
  std::unique_ptr<TrainingStore> store_;
};

TEST(PermutationTest, IsABijectionForEverySize) {
  for (uint64_t n : {1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097}) {
    for (uint64_t seed : {0, 1, 77}) {
      const Permutation permutation(n, seed);
      std::set<uint64_t> seen;
      for (uint64_t i = 0; i < n; ++i) seen.insert(permutation(i));
      ASSERT_EQ(seen.size(), n) << "seed " << seed;
      ASSERT_EQ(*seen.rbegin(), n - 1);
    }
  }
}

TEST(PermutationTest, EveryPositionIsReachedFromEveryPosition) {
  // 5 positions under 5,000 seeds: each cell of the 5 x 5 table expects 1,000; five standard deviations are 141.
  std::map<std::pair<int, int>, int> counts;
  for (uint64_t seed = 0; seed < 5000; ++seed) {
    const Permutation permutation(5, seed);
    for (int i = 0; i < 5; ++i) ++counts[{i, static_cast<int>(permutation(i))}];
  }
  for (const auto& [cell, count] : counts) EXPECT_NEAR(count, 1000, 141) << cell.first << " -> " << cell.second;
}

TEST_F(BatchSamplerTest, AnEpochGivesEveryPositiveOnce) {
  BatchOptions options;
  options.batch_size = 1;
  options.num_epochs = 1;
  const BatchSampler sampler(*store_, options);
  ASSERT_EQ(sampler.num_batches(), store_->num_positives());
  std::multiset<std::pair<int, int>> seen;
  Batch batch;
  for (int64_t step = 0; step < sampler.num_batches(); ++step) {
    sampler.Sample(step, &batch);
    seen.insert(Pairs(batch)[0]);
  }
  EXPECT_EQ(seen, std::multiset(shop_.clicks.begin(), shop_.clicks.end()));
}

TEST_F(BatchSamplerTest, ShardsAreDisjointAndComplete) {
  std::multiset<std::pair<int, int>> seen;
  for (int shard = 0; shard < 4; ++shard) {
    BatchOptions options;
    options.batch_size = 1;
    options.num_epochs = 1;
    options.shard_index = shard;
    options.num_shards = 4;
    const BatchSampler sampler(*store_, options);
    Batch batch;
    for (int64_t step = 0; step < sampler.num_batches(); ++step) {
      sampler.Sample(step, &batch);
      seen.insert(Pairs(batch)[0]);
    }
  }
  EXPECT_EQ(seen, std::multiset(shop_.clicks.begin(), shop_.clicks.end()));
}

TEST_F(BatchSamplerTest, EpochsAndSeedsDifferAndRepeat) {
  BatchOptions options;
  options.batch_size = store_->num_positives();
  const BatchSampler sampler(*store_, options);
  EXPECT_EQ(sampler.num_batches(), -1);
  Batch first, second, again;
  sampler.Sample(0, &first);
  sampler.Sample(1, &second);
  sampler.Sample(0, &again);
  EXPECT_EQ(first.item, again.item);
  EXPECT_NE(first.item, second.item);
  options.seed = 1;
  BatchSampler(*store_, options).Sample(0, &again);
  EXPECT_NE(first.item, again.item);
}

TEST_F(BatchSamplerTest, RowsOfAnExampleBelongTogether) {
  BatchOptions options;
  options.batch_size = 10;
  Batch batch;
  BatchSampler(*store_, options).Sample(3, &batch);
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(batch.user[i], batch.query[i] % Shop::kUsers);
    EXPECT_EQ(batch.weight[i], 1 + batch.query[i]);
    EXPECT_EQ(store_->user_features()[1][batch.user[i]], 10 + batch.user[i]);
  }
}

TEST_F(BatchSamplerTest, SupervisedNegativesTakePlacesOfTheSharedSet) {
  BatchOptions options;
  options.batch_size = 1;
  options.num_shared_negatives = 8;
  options.num_supervised_negatives = 3;
  const BatchSampler sampler(*store_, options);
  Batch batch;
  for (int step = 0; step < 50; ++step) {
    sampler.Sample(step, &batch);
    const int q = batch.query[0];
    for (int i = 1; i <= 3 && q % 2 == 0; ++i) {
      EXPECT_TRUE(batch.item[i] == (q + 20) % Shop::kItems || batch.item[i] == (q + 21) % Shop::kItems) << batch.item[i];
    }
  }
}

TEST_F(BatchSamplerTest, SharedNegativesAreUniform) {
  BatchOptions options;
  options.batch_size = 1;
  options.num_shared_negatives = 100;
  const BatchSampler sampler(*store_, options);
  std::vector<int> counts(Shop::kItems);
  Batch batch;
  for (int step = 0; step < 400; ++step) {
    sampler.Sample(step, &batch);
    for (int i = 1; i <= 100; ++i) ++counts[batch.item[i]];
  }
  // 40,000 draws over 40 items: 1,000 each, five standard deviations are 156.
  for (int count : counts) EXPECT_NEAR(count, 1000, 156);
}

TEST_F(BatchSamplerTest, MaskLeavesOutEveryClickedItemOfTheQuery) {
  const std::set<std::pair<int, int>> clicks(shop_.clicks.begin(), shop_.clicks.end());
  for (int64_t shared : {0, 5, 60}) {  // few and many items beside the length of the click lists
    BatchOptions options;
    options.batch_size = shared == 0 ? 1 : 20;
    options.num_shared_negatives = shared;
    const BatchSampler sampler(*store_, options);
    for (int step = 0; step < 20; ++step) {
      Batch batch;
      sampler.Sample(step, &batch);
      const size_t items = batch.item.size();
      std::unique_ptr<bool[]> mask(new bool[batch.query.size() * items]);
      sampler.NegativeMask(batch, mask.get());
      for (size_t i = 0; i < batch.query.size(); ++i) {
        for (size_t j = 0; j < items; ++j) {
          ASSERT_EQ(mask[i * items + j], clicks.count({batch.query[i], batch.item[j]}) == 0) << i << ' ' << j;
        }
      }
    }
  }
}

TEST(BatchOptionsTest, OutOfRangeOptionsAreNamed) {
  const auto message = [](auto change) {
    BatchOptions options;
    change(options);
    const Status status = BatchSampler::Validate(options);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_EQ(message([](auto& o) { o.batch_size = 0; }), "batch_size is 0, expected 1 or more");
  EXPECT_EQ(message([](auto& o) { o.num_shared_negatives = -1; }), "num_shared_negatives is -1, expected 0 or more");
  EXPECT_NE(message([](auto& o) { o.batch_size = 1LL << 40; }).find("1099511627776"), std::string::npos);
  EXPECT_NE(message([](auto& o) { o.num_supervised_negatives = 65; }).find("at most num_shared_negatives, 64"),
            std::string::npos);
  EXPECT_NE(message([](auto& o) { o.shard_index = 1; }).find("expected 0 to num_shards - 1, 0"), std::string::npos);
}

TEST(TrainingStoreTest, RowsBeyondATableAreFoundAtOpen) {
  std::unique_ptr<TrainingStore> store;
  const Status status = TrainingStore::Open(Shop().Write("broken", /*broken_item=*/40), {}, &store);
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_NE(status.message().find("positive.item row 3 refers to row 40 of 40 items"), std::string::npos)
      << status.message();
}

TEST(TrainingStoreTest, UnknownUserFeatureIsNamed) {
  std::unique_ptr<TrainingStore> store;
  const Status status = TrainingStore::Open(Shop().Write("feature"), {"shoe_size"}, &store);
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_NE(status.message().find("no user feature 'shoe_size'"), std::string::npos) << status.message();
}

TEST(TrainingStoreTest, FilesInTheWrongPlaceAreRefused) {
  TrainingStore::Paths paths = Shop().Write("swapped");
  std::swap(paths.users, paths.items);
  std::unique_ptr<TrainingStore> store;
  EXPECT_EQ(TrainingStore::Open(paths, {}, &store).code(), StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace dpsr
