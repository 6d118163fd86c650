#include "dpsr_tf/ops/batch_sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dpsr_tf/ops/permutation.h"
#include "common/test_util.h"
#include "tokenizer_cc/vocabulary.h"

namespace dpsr {
namespace {

using Rows = std::vector<std::vector<int32_t>>;

template <typename... Sections>
void WriteFile(const std::string& path, const char* kind, const Sections&... sections) {
  PackedFileWriter writer(path, kind);
  ASSERT_TRUE(IsOk(writer.Open()));
  (
      [&] {
        using T = typename Sections::second_type::value_type;
        ASSERT_TRUE(IsOk(writer.Add(sections.first, DataTypeOf<T>::value, sections.second.data(),
                                    sections.second.size() * sizeof(T))));
      }(),
      ...);
  ASSERT_TRUE(IsOk(writer.Finish()));
}

std::vector<int64_t> SplitsOf(const Rows& rows) {
  std::vector<int64_t> splits{0};
  for (const auto& row : rows) splits.push_back(splits.back() + static_cast<int64_t>(row.size()));
  return splits;
}

std::vector<int32_t> ValuesOf(const Rows& rows) {
  std::vector<int32_t> values;
  for (const auto& row : rows) values.insert(values.end(), row.begin(), row.end());
  return values;
}

struct Event {
  uint32_t time;
  int32_t query, item;
  uint8_t type;
  bool operator<(const Event& o) const {
    return std::tie(time, query, item, type) < std::tie(o.time, o.query, o.item, o.type);
  }
};

// A small store. Query q has positives on items q, q + 1, ..., q + q % 4 (mod items), query 0 hundreds on a few; if q is
// even it has two labelled negatives. User of every positive: (q + item) % users; weight: the number of the positive,
// so that a test can tell it from a batch. Request of a positive: q, shows q % 3 items; none when q % 5 == 0. In `shards`
// files, query q in file q % shards.
struct Shop {
  static constexpr int kUsers = 4, kItems = 40, kQueries = 25, kHeadPositives = 600;
  struct Positive {
    int query, item, user;  // query: global row
    uint32_t time;
    uint8_t type;
  };
  std::vector<Positive> positives;  // by weight - 1
  std::set<std::pair<int, int>> clicked;
  std::map<int, std::vector<int32_t>> shown, negatives;  // by global query row
  std::vector<std::vector<Event>> events{kUsers};
  std::vector<std::string> text_of;  // by global query row
  TrainingStore::Options options;

  explicit Shop(const std::string& directory, int shards = 1) {
    options.users = directory + "/users.dpsr";
    options.items = directory + "/items.dpsr";
    options.user_features.fixed = {"sex", "age"};
    options.item_features.lists = {"tags"};
    options.events = true;
    options.impressions = true;
    RandomStream random(7);
    int row = 0;
    for (int f = 0; f < shards; ++f) {
      options.interactions.push_back(StrCat(directory, "/interactions-", f, ".dpsr"));
      Rows tokens, requests, labelled, items;
      std::string texts;
      std::vector<int64_t> text_splits{0};
      std::vector<int32_t> user, request;
      std::vector<uint32_t> time;
      std::vector<uint8_t> type;
      std::vector<float> weight, labels{0.5, 2};
      std::vector<uint8_t> label;
      for (int q = f; q < kQueries; q += shards, ++row) {
        std::vector<int32_t> own;
        if (q == 0) {
          for (int i = 0; i < kHeadPositives; ++i) own.push_back(i * 7 % 5);
        } else if (q == 1) {
          for (int i = 0; i < kHeadPositives; ++i) own.push_back(i % 30);
        }
        for (int i = q; i <= q + q % 4; ++i) own.push_back(i % kItems);
        std::sort(own.begin(), own.end());
        tokens.push_back({q});
        texts += TitleOf(kItems - 1 - q);
        text_splits.push_back(static_cast<int64_t>(texts.size()));
        text_of.push_back(TitleOf(kItems - 1 - q));
        requests.emplace_back();
        for (int i = 0; i < q % 3; ++i) requests.back().push_back(30 + i);
        labelled.emplace_back();
        if (q % 2 == 0) labelled.back() = {std::min((q + 20) % kItems, 31), std::min((q + 20) % kItems, 31) + 1};
        shown[row] = q % 5 == 0 ? std::vector<int32_t>() : requests.back();
        negatives[row] = labelled.back();
        for (int32_t item : own) {
          const int u = (q + item) % kUsers;
          user.push_back(u);
          time.push_back(1000 + static_cast<uint32_t>(random.Uniform(50)));
          type.push_back(static_cast<uint8_t>(2 + random.Uniform(3)));
          request.push_back(q % 5 == 0 ? -1 : static_cast<int32_t>(requests.size()) - 1);
          positives.push_back({row, item, u, time.back(), type.back()});
          weight.push_back(static_cast<float>(positives.size()));
          label.push_back(static_cast<uint8_t>(item % 2));
          clicked.emplace(row, item);
          if (u > 0) events[u].push_back({time.back(), row, item, type.back()});
        }
        items.push_back(own);
      }
      WriteFile(options.interactions.back(), "interactions", std::pair("query.splits", SplitsOf(tokens)),
                std::pair("query.tokens", ValuesOf(tokens)), std::pair("query_text.splits", text_splits),
                std::pair("query_text.bytes", std::vector<uint8_t>(texts.begin(), texts.end())), std::pair("positive.splits", SplitsOf(items)),
                std::pair("positive.label", label), std::pair("positive.label.values", labels),
                std::pair("positive.user", user),
                std::pair("positive.item", ValuesOf(items)), std::pair("positive.time", time),
                std::pair("positive.type", type), std::pair("positive.weight", weight),
                std::pair("positive.request", request), std::pair("impression.splits", SplitsOf(requests)),
                std::pair("impression.item", ValuesOf(requests)), std::pair("negative.splits", SplitsOf(labelled)),
                std::pair("negative.item", ValuesOf(labelled)));
    }
    std::vector<int64_t> ids(kUsers), splits{0};
    std::iota(ids.begin(), ids.end(), 99);
    ids[0] = -1;
    std::vector<uint32_t> time;
    std::vector<int32_t> item, query, sex;
    std::vector<uint8_t> type, age;
    for (int u = 0; u < kUsers; ++u) {
      age.push_back(static_cast<uint8_t>(u == 0 ? 0 : 10 + u));
      sex.push_back(u % 2);
      std::sort(events[u].begin(), events[u].end());
      for (const Event& e : events[u]) {
        time.push_back(e.time);
        item.push_back(e.item);
        query.push_back(e.query);
        type.push_back(e.type);
      }
      splits.push_back(static_cast<int64_t>(time.size()));
    }
    WriteFile(options.users, "users", std::pair("id", ids), std::pair("feature.age", age), std::pair("feature.sex", sex),
              std::pair("event.splits", splits), std::pair("event.time", time), std::pair("event.item", item),
              std::pair("event.query", query), std::pair("event.type", type));
    Rows text, tags;
    for (int i = 0; i < kItems; ++i) {
      text.emplace_back();
      for (int t = 0; t < i % 3; ++t) text.back().push_back(1000 * i + t);
      tags.push_back(std::vector<int32_t>(i % 2, i));
    }
    std::vector<int64_t> item_ids(kItems);
    std::iota(item_ids.begin(), item_ids.end(), 1000);
    WriteFile(options.items, "items", std::pair("id", item_ids), std::pair("tokens.splits", SplitsOf(text)),
              std::pair("tokens.values", ValuesOf(text)), std::pair("feature.tags.splits", SplitsOf(tags)),
              std::pair("feature.tags.values", ValuesOf(tags)));
    options.titles = directory + "/titles.dpsr";
    options.vocabulary = directory + "/vocabulary.dpsr";
    options.has_titles = options.has_query_texts = true;
    std::string titles;
    std::vector<int64_t> title_splits{0};
    TokenizerConfig config;
    config.letter_trigrams = false;
    VocabularyBuilder vocabulary(config);
    for (int i = 0; i < kItems; ++i) {
      titles += TitleOf(i);
      title_splits.push_back(static_cast<int64_t>(titles.size()));
      EXPECT_TRUE(IsOk(vocabulary.Add(TitleOf(i))));
    }
    WriteFile(options.titles, "titles", std::pair("title.splits", title_splits),
              std::pair("title.bytes", std::vector<uint8_t>(titles.begin(), titles.end())));
    EXPECT_TRUE(IsOk(vocabulary.Write(options.vocabulary, 1, 1000, /*num_oov_buckets=*/1)));
  }

  // Words of its own, as many as the last digit of the number, and one that all have; none where that digit is 0.
  static std::string TitleOf(int item) {
    std::string name, title;
    for (char digit : std::to_string(item)) name += std::string(1, static_cast<char>('k' + digit - '0')) + "o";
    for (char c = 'a'; c < 'a' + item % 10; ++c) title += name + c + " ";
    return title.empty() ? title : title + "all";
  }

  Status Open(std::unique_ptr<TrainingStore>* store) const {
    return TrainingStore::Open(options, TrainingStore::OpenLocalFile, store);
  }
  const Positive& Of(const Batch& batch, size_t i) const { return positives[static_cast<size_t>(batch.weight[i]) - 1]; }
};

class BatchSamplerTest : public FileTest {
 protected:
  void SetUp() override {
    FileTest::SetUp();
    Make(1);
  }
  void Make(int shards) {
    shop_ = std::make_unique<Shop>(directory_, shards);
    ASSERT_TRUE(IsOk(shop_->Open(&store_)));
  }
  // Weights of all examples that a worker gets, in order.
  std::vector<int> Weights(const TrainingStore& store, BatchOptions options) {
    options.batch_size = 1;
    options.num_random_negatives = 0;
    if (options.num_epochs == 0) options.num_epochs = 1;
    const BatchSampler sampler(store, options);
    std::vector<int> weights;
    Batch batch;
    for (int64_t step = 0; step < sampler.num_batches(); ++step) {
      sampler.Sample(step, &batch);
      weights.push_back(static_cast<int>(batch.weight[0]));
    }
    return weights;
  }
  std::vector<int> All() const {
    std::vector<int> all(shop_->positives.size());
    std::iota(all.begin(), all.end(), 1);
    return all;
  }

  std::unique_ptr<Shop> shop_;
  std::unique_ptr<TrainingStore> store_;
};

template <typename T>
std::vector<T> Sorted(std::vector<T> values) {
  std::sort(values.begin(), values.end());
  return values;
}

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

TEST(PermutationTest, InverseGoesBack) {
  for (uint64_t n : {1, 2, 5, 16, 17, 1000}) {
    const Permutation permutation(n, 5);
    for (uint64_t i = 0; i < n; ++i) ASSERT_EQ(permutation.Inverse(permutation(i)), i) << n;
  }
}

TEST(BlockShuffleTest, IsABijectionForEverySizeAndWindow) {
  for (uint64_t n : {1, 7, 8, 9, 63, 64, 65, 500, 1001}) {
    for (uint64_t window : {1, 2, 3, 8, 1000}) {
      for (uint64_t seed : {0, 1, 2, 3, 4, 5}) {
        BlockShuffle shuffle(n, 8, window, seed);
        std::set<uint64_t> seen;
        for (uint64_t i = 0; i < n; ++i) seen.insert(shuffle(i));
        ASSERT_EQ(seen.size(), n) << "window " << window << " seed " << seed;
        ASSERT_EQ(*seen.rbegin(), n - 1);
      }
    }
  }
}

TEST(BlockShuffleTest, OrderOfQuestionsDoesNotMatter) {
  BlockShuffle forward(1001, 8, 4, 3), backward(1001, 8, 4, 3);
  std::vector<uint64_t> rows;
  for (uint64_t i = 0; i < 1001; ++i) rows.push_back(forward(i));
  for (uint64_t i = 1001; i-- > 0;) ASSERT_EQ(backward(i), rows[i]);
}

TEST(BlockShuffleTest, TouchesAWindowOfBlocksAtATime) {
  constexpr uint64_t kBlock = 16, kWindow = 4, kRows = 16 * 40 + 5;
  BlockShuffle shuffle(kRows, kBlock, kWindow, 11);
  std::set<uint64_t> touched;
  size_t windows = 0;
  for (uint64_t i = 0; i < kRows; ++i) {
    touched.insert(shuffle(i) / kBlock);
    // One window holds the short block, so windows end at 64, 128, ... or 11 rows earlier.
    if (touched.size() > kWindow) {
      EXPECT_TRUE(i % 64 == 0 || (i + 11) % 64 == 0) << i;
      touched = {shuffle(i) / kBlock};
      ++windows;
    }
  }
  EXPECT_EQ(windows, 10u);
}

// Where each of 8 stretches of the file goes among 8 stretches of the epoch: for a log that fits the buffer each of the
// 64 cells expects 2,048 / 64 = 32 rows. Chi-square of 49 degrees of freedom is below 100 but once in 50,000 orders.
TEST(BlockShuffleTest, ALogThatFitsIsShuffledEvenly) {
  double sum = 0;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    BlockShuffle shuffle(2048, 16, 128, seed);
    std::vector<int> cells(64);
    for (uint64_t i = 0; i < 2048; ++i) ++cells[i / 256 * 8 + shuffle(i) / 256];
    double chi_square = 0;
    for (int cell : cells) chi_square += (cell - 32.0) * (cell - 32.0) / 32;
    EXPECT_LT(chi_square, 100) << seed;
    sum += chi_square;
  }
  EXPECT_NEAR(sum / 50, 49, 7) << "neither more nor less even than chance: five standard deviations of the mean";
}

// The same of the order of blocks, over seeds: block 0 goes to each of 32 windows of 2 equally often.
TEST(BlockShuffleTest, BlocksGoToAnyWindow) {
  std::vector<int> counts(32);
  for (uint64_t seed = 0; seed < 3200; ++seed) {
    BlockShuffle shuffle(64 * 4, 4, 2, seed);
    for (uint64_t i = 0; i < 256; ++i) {
      if (shuffle(i) == 0) ++counts[i / 8];
    }
  }
  for (int count : counts) EXPECT_NEAR(count, 100, 50);
}

TEST_F(BatchSamplerTest, AnEpochGivesEveryPositiveOnce) {
  for (int64_t buffer : {int64_t{1}, int64_t{1} << 20}) {
    BatchOptions options;
    options.shuffle_buffer = buffer;
    options.num_epochs = 3;
    const std::vector<int> weights = Weights(*store_, options);
    const size_t n = shop_->positives.size();
    ASSERT_EQ(weights.size(), 3 * n);
    std::set<std::vector<int>> orders;
    for (size_t epoch = 0; epoch < 3; ++epoch) {
      const std::vector<int> order(weights.begin() + epoch * n, weights.begin() + (epoch + 1) * n);
      EXPECT_EQ(Sorted(order), All());
      orders.insert(order);
    }
    EXPECT_EQ(orders.size(), 3u) << "another order each epoch";
  }
}

TEST_F(BatchSamplerTest, PositionsAreSharedWhereFilesAreFewerThanWorkers) {
  Make(2);
  const std::vector<int> whole = Weights(*store_, {});
  std::vector<int> seen;
  for (int worker = 0; worker < 3; ++worker) {
    shop_->options.shard_index = worker;
    shop_->options.num_shards = 3;
    ASSERT_TRUE(IsOk(shop_->Open(&store_)));
    BatchOptions options;
    options.shard_index = worker;
    options.num_shards = 3;
    const std::vector<int> part = Weights(*store_, options);
    for (size_t i = 0; i < part.size(); ++i) ASSERT_EQ(part[i], whole[3 * i + worker]);
    seen.insert(seen.end(), part.begin(), part.end());
  }
  EXPECT_EQ(Sorted(seen), All());
}

TEST_F(BatchSamplerTest, FilesAreSharedWhereThereAreEnough) {
  constexpr int kFiles = 5, kWorkers = 2;
  Make(kFiles);
  EXPECT_EQ(Sorted(Weights(*store_, {})), All());
  std::vector<int> seen;
  for (int worker = 0; worker < kWorkers; ++worker) {
    shop_->options.shard_index = worker;
    shop_->options.num_shards = kWorkers;
    ASSERT_TRUE(IsOk(shop_->Open(&store_)));
    BatchOptions options;
    options.shard_index = worker;
    options.num_shards = kWorkers;
    for (int weight : Weights(*store_, options)) {
      seen.push_back(weight);
      int64_t local;
      const int query = shop_->positives[weight - 1].query;
      const InteractionsShard& shard = store_->ShardOfQuery(query, &local);
      EXPECT_TRUE(shard.own);
    }
  }
  EXPECT_EQ(Sorted(seen), All());
}

// What other workers read is damaged: it does not matter, but for the dictionaries of queries, which histories need.
TEST_F(BatchSamplerTest, OnlyWhatAWorkerReadsIsVerified) {
  Make(2);
  shop_->options.num_shards = 2;
  path_ = shop_->options.interactions[1];
  std::unique_ptr<PackedFile> file;
  ASSERT_TRUE(IsOk(PackedFile::Open(path_, "interactions", true, &file)));
  const std::string bytes = ReadBytes();
  for (const PackedFile::Section& section : file->sections()) {
    if (section.bytes == 0) continue;
    std::string flipped = bytes;
    flipped[section.offset] ^= 4;
    WriteBytes(flipped);
    for (int worker = 0; worker < 2; ++worker) {
      shop_->options.shard_index = worker;
      const Status status = shop_->Open(&store_);
      const bool reads = worker == 1 || section.name.rfind("query.", 0) == 0;
      ASSERT_EQ(status.ok(), !reads) << section.name << ' ' << worker;
      if (reads) {
        EXPECT_TRUE(Contains(status.message(), StrCat(path_, ": the checksum of section \"", section.name, "\" (byte ")));
      }
    }
  }
}

TEST_F(BatchSamplerTest, SeedsDifferAndRepeat) {
  BatchOptions options;
  options.batch_size = store_->num_positives();
  const BatchSampler sampler(*store_, options);
  EXPECT_EQ(sampler.num_batches(), -1);
  Batch first, again;
  sampler.Sample(0, &first);
  sampler.Sample(1, &again);
  EXPECT_NE(first.item, again.item);
  sampler.Sample(0, &again);
  EXPECT_EQ(first.item, again.item);
  options.seed = 1;
  BatchSampler(*store_, options).Sample(0, &again);
  EXPECT_NE(first.item, again.item);
}

TEST_F(BatchSamplerTest, ColumnsOfAnExampleBelongTogether) {
  Make(3);
  BatchOptions options;
  options.batch_size = 10;
  Batch batch;
  for (int step = 0; step < 100; ++step) {
    BatchSampler(*store_, options).Sample(step, &batch);
    for (size_t i = 0; i < 10; ++i) {
      const Shop::Positive& positive = shop_->Of(batch, i);
      ASSERT_EQ(batch.query[i], positive.query);
      ASSERT_EQ(batch.user[i], positive.user);
      ASSERT_EQ(batch.item[i], positive.item);
      ASSERT_EQ(batch.type[i], positive.type);
      ASSERT_EQ(batch.label[i], positive.item % 2 == 0 ? 0.5f : 2.0f);
    }
  }
}

TEST_F(BatchSamplerTest, SupervisedNegativesTakePlacesOfTheSharedSet) {
  BatchOptions options;
  options.batch_size = 1;
  options.num_random_negatives = 8;
  options.num_supervised_negatives = 3;
  const BatchSampler sampler(*store_, options);
  Batch batch;
  for (int step = 0; step < 200; ++step) {
    sampler.Sample(step, &batch);
    const std::vector<int32_t>& labelled = shop_->negatives[batch.query[0]];
    for (int i = 1; i <= 3 && !labelled.empty(); ++i) {
      ASSERT_EQ(std::count(labelled.begin(), labelled.end(), batch.item[i]), 1) << batch.item[i];
    }
  }
}

TEST_F(BatchSamplerTest, OwnNegativesAreDrawnWithoutReplacement) {
  for (int source : {1, 2, 3}) {
    for (int64_t m : {1, 2, 5}) {
      BatchOptions options;
      options.batch_size = 20;
      options.num_title_queries = 3;
      options.num_random_negatives = 4;
      options.num_own_negatives = m;
      options.own_negative_source = static_cast<OwnNegativeSource>(source - 1);
      const BatchSampler sampler(*store_, options);
      Batch batch;
      std::map<std::pair<int, int>, int> drawn;
      for (int step = 0; step < 60; ++step) {
        sampler.Sample(step, &batch);
        ASSERT_EQ(batch.item.size(), 20 + 4 + 20 * m);
        ASSERT_EQ(batch.own_negative_mask.size(), 20 * m);
        for (size_t i = 0; i < 20; ++i) {
          std::set<int32_t> expected, got;
          if (i < 17) {
            const int query = shop_->Of(batch, i).query;
            if (source & 1) expected.insert(shop_->shown[query].begin(), shop_->shown[query].end());
            if (source & 2) expected.insert(shop_->negatives[query].begin(), shop_->negatives[query].end());
          }
          for (int64_t j = 0; j < m; ++j) {
            const int32_t item = batch.item[24 + i * m + j];
            if (!batch.own_negative_mask[i * m + j]) {
              ASSERT_EQ(item, 0);
              continue;
            }
            ASSERT_TRUE(expected.count(item));
            ASSERT_TRUE(got.insert(item).second) << "twice";
            ++drawn[{shop_->Of(batch, i).query, item}];
          }
          ASSERT_EQ(got.size(), std::min(static_cast<size_t>(m), expected.size()));
        }
      }
      for (const auto& [query, items] : shop_->negatives) {  // each candidate has its turn
        if (source != 2 || query != 0) continue;
        for (int32_t item : items) EXPECT_GT((drawn[{query, item}]), 100);
      }
    }
  }
}

TEST_F(BatchSamplerTest, TitleQueriesArePiecesOfTheirItemsTitle) {
  BatchOptions options;
  options.batch_size = 20;
  options.num_title_queries = 15;
  for (float title_typo_rate : {0.0f, 0.5f}) {
    options.title_typo_rate = title_typo_rate;
    const BatchSampler sampler(*store_, options);
    const Vocabulary& vocabulary = store_->vocabulary();
    std::set<int32_t> items;
    int known = 0, unknown = 0;
    Batch batch;
    for (int step = 0; step < 100; ++step) {
      sampler.Sample(step, &batch);
      ASSERT_EQ(batch.rows.size(), 5u);
      ASSERT_EQ(batch.made_splits.size(), 16u);
      for (size_t i = 0; i < 15; ++i) {
        const int32_t item = batch.item[5 + i];
        ASSERT_EQ(batch.query[5 + i], Batch::kTitleQuery);
        items.insert(item);
        std::istringstream title(Shop::TitleOf(item));
        const std::set<std::string> words{std::istream_iterator<std::string>(title), {}};
        ASSERT_EQ(batch.made_splits[i] == batch.made_splits[i + 1], words.empty()) << item;
        for (int64_t t = batch.made_splits[i]; t < batch.made_splits[i + 1]; ++t) {
          const int32_t id = batch.made_tokens[t];
          ASSERT_TRUE(id >= 0 && id < vocabulary.num_ids());
          if (id == vocabulary.size()) {
            ++unknown;
          } else {  // a typo may make another item's word, but hardly ever does
            known += words.count(std::string(vocabulary.Token(id)));
          }
        }
      }
    }
    EXPECT_EQ(items.size(), Shop::kItems);
    EXPECT_GT(known, 1000);
    if (title_typo_rate == 0) {
      EXPECT_EQ(unknown, 0);
    } else {  // words of four letters and more
      EXPECT_NEAR(unknown, 0.45 * (known + unknown), 0.15 * (known + unknown));
    }
  }
}

TEST_F(BatchSamplerTest, FrequentWordsOfTitlesAreThinned) {
  BatchOptions options;
  options.batch_size = 100;
  options.num_title_queries = 99;
  std::map<float, double> frequent, rare;  // occurrences
  for (float subsampling : {0.0f, 0.1f}) {
    options.title_subsampling = subsampling;
    const BatchSampler sampler(*store_, options);
    const int32_t all = store_->vocabulary().Lookup("all");
    Batch batch;
    for (int step = 0; step < 50; ++step) {
      sampler.Sample(step, &batch);
      for (int32_t id : batch.made_tokens) ++(id == all ? frequent : rare)[subsampling];
    }
  }
  // 36 of the 40 titles have it: it stays with probability sqrt(0.1 / 0.9), and always where it would be alone.
  EXPECT_NEAR(frequent[0.1f] / frequent[0.0f], 0.33, 0.1);
  EXPECT_NEAR(rare[0.1f] / rare[0.0f], 1.1, 0.1) << "in its place";
}

TEST_F(BatchSamplerTest, QueriesOfTheLogMayHaveTypos) {
  Make(3);
  BatchOptions options;
  options.batch_size = 20;
  options.num_title_queries = 2;
  const BatchSampler plain(*store_, options);
  for (float query_typo_rate : {1e-9f, 0.1f}) {
    options.query_typo_rate = query_typo_rate;
    const BatchSampler sampler(*store_, options);
    int64_t same = 0, other = 0;
    Batch batch, expected;
    for (int step = 0; step < 50; ++step) {
      sampler.Sample(step, &batch);
      plain.Sample(step, &expected);
      ASSERT_EQ(batch.query, expected.query) << "the same pairs";
      ASSERT_EQ(batch.item, expected.item);
      ASSERT_EQ(batch.made_splits.size(), 21u);
      for (size_t i = 0; i < 18; ++i) {
        std::vector<int32_t> tokens;
        store_->vocabulary().Encode(shop_->text_of[batch.query[i]], &tokens);
        const std::vector<int32_t> made(batch.made_tokens.begin() + batch.made_splits[i],
                                        batch.made_tokens.begin() + batch.made_splits[i + 1]);
        ++(made == tokens ? same : other);
      }
    }
    if (query_typo_rate < 0.01f) {
      EXPECT_EQ(other, 0);
    } else {
      EXPECT_GT(other, 200);
      EXPECT_GT(same, 100);
    }
  }
}

TEST_F(BatchSamplerTest, PretrainingComesBeforeTheLog) {
  BatchOptions options;
  options.batch_size = 10;
  options.num_title_queries = 4;
  options.num_supervised_negatives = 5;
  options.num_own_negatives = 2;
  options.history_length = 3;
  options.num_epochs = 2;
  const BatchSampler plain(*store_, options);
  options.pretrain_steps = 7;
  const BatchSampler sampler(*store_, options);
  ASSERT_EQ(sampler.num_batches(), plain.num_batches() + 7);
  Batch batch, expected;
  for (int64_t step = 0; step < sampler.num_batches(); ++step) {
    sampler.Sample(step, &batch);
    ASSERT_EQ(batch.query.size(), 10u);
    ASSERT_EQ(batch.made_splits.size(), (step < 7 ? 10u : 4u) + 1);
    ASSERT_EQ(batch.item.size(), 10u + 64u + 20u);
    std::vector<uint8_t> mask(10 * 74);
    sampler.NegativeMask(&batch, reinterpret_cast<bool*>(mask.data()));
    if (step < 7) {
      ASSERT_EQ(batch.query, std::vector<int32_t>(10, Batch::kTitleQuery));
      ASSERT_EQ(batch.user, std::vector<int32_t>(10, 0));
      ASSERT_EQ(batch.own_negative_mask, std::vector<uint8_t>(20, 0));
      ASSERT_EQ(batch.history_splits, std::vector<int64_t>(11, 0));
      continue;
    }
    plain.Sample(step - 7, &expected);  // the log from its beginning
    ASSERT_TRUE(std::equal(batch.query.begin(), batch.query.end(), expected.query.begin()));
    ASSERT_TRUE(std::equal(batch.item.begin(), batch.item.begin() + 6, expected.item.begin()));
  }
}

TEST_F(BatchSamplerTest, DamagedTitlesAndVocabularyAreNamed) {
  for (const std::string& path : {shop_->options.titles, shop_->options.vocabulary}) {
    const auto flip = [&path] {  // the first byte behind the header
      std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
      file.seekg(64);
      const char byte = static_cast<char>(file.get() ^ 1);
      file.seekp(64);
      file.put(byte);
      ASSERT_TRUE(file.good());
    };
    flip();
    const Status status = shop_->Open(&store_);
    EXPECT_EQ(status.code(), StatusCode::kDataLoss);
    EXPECT_TRUE(Contains(status.message(), path)) << status.message();
    shop_->options.has_titles = shop_->options.has_query_texts = false;
    EXPECT_TRUE(IsOk(shop_->Open(&store_))) << "nobody asks for them";
    shop_->options.has_titles = shop_->options.has_query_texts = true;
    flip();
  }
}

TEST_F(BatchSamplerTest, HistoryIsThatOfTheMoment) {
  Make(2);
  size_t cut = 0, whole = 0;
  for (int64_t types : {0, 1 << 2, 1 << 3 | 1 << 4}) {
    for (int64_t length : {0, 1, 3, 1000}) {
      BatchOptions options;
      options.batch_size = 50;
      options.num_title_queries = 2;
      options.history_length = length;
      options.history_types = types;
      options.query_history_length = length;
      const BatchSampler sampler(*store_, options);
      Batch batch;
      for (int step = 0; step < 15; ++step) {
        sampler.Sample(step, &batch);
        for (size_t i = 0; i < 50; ++i) {
          std::vector<std::pair<int32_t, int32_t>> items, got;
          std::vector<int32_t> queries;
          const std::vector<Event>& events = shop_->events[batch.user[i]];
          size_t end = 0;
          while (i < 48 && end < events.size() && events[end].time < shop_->Of(batch, i).time) ++end;
          for (size_t k = 0; k < end; ++k) {
            const Event& e = events[k];
            if (types == 0 || (types >> e.type & 1)) items.emplace_back(e.item, e.type);
            if (queries.empty() || queries.back() != e.query) queries.push_back(e.query);
          }
          ++(items.size() > static_cast<size_t>(length) ? cut : whole);
          items.erase(items.begin(), items.end() - std::min<int64_t>(length, items.size()));
          queries.erase(queries.begin(), queries.end() - std::min<int64_t>(length, queries.size()));
          for (int64_t e = batch.history_splits[i]; e < batch.history_splits[i + 1]; ++e) {
            got.emplace_back(batch.history_item[e], batch.history_type[e]);
          }
          ASSERT_EQ(got, items);
          ASSERT_EQ(std::vector<int32_t>(batch.query_history.begin() + batch.query_history_splits[i],
                                         batch.query_history.begin() + batch.query_history_splits[i + 1]),
                    queries);
        }
      }
    }
  }
  EXPECT_GT(cut, 500u);
  EXPECT_GT(whole, 500u);
}

TEST_F(BatchSamplerTest, SharedNegativesAreUniform) {
  BatchOptions options;
  options.batch_size = 1;
  options.num_random_negatives = 100;
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

TEST_F(BatchSamplerTest, FilesOfOtherWorkersMayBeMissing) {
  constexpr int kFiles = 3;
  Make(kFiles);
  TrainingStore::Options& files = shop_->options;
  files.shard_index = 1;
  files.num_shards = 2;
  BatchOptions options;
  options.shard_index = 1;
  options.num_shards = 2;
  ASSERT_TRUE(IsOk(shop_->Open(&store_)));
  const std::vector<int> expected = Weights(*store_, options);
  ASSERT_FALSE(expected.empty());
  for (int f = 0; f < kFiles; ++f) files.queries.push_back((Shop::kQueries - f + kFiles - 1) / kFiles);
  ASSERT_TRUE(IsOk(shop_->Open(&store_)));
  for (int f : {0, 2}) ASSERT_EQ(std::remove(files.interactions[f].c_str()), 0);
  EXPECT_EQ(shop_->Open(&store_).code(), StatusCode::kNotFound);
  files.all_queries = false;
  ASSERT_TRUE(IsOk(shop_->Open(&store_)));
  EXPECT_EQ(store_->num_queries(), Shop::kQueries);
  EXPECT_EQ(Weights(*store_, options), expected);

  files.queries[0] = -1;
  EXPECT_EQ(shop_->Open(&store_).code(), StatusCode::kInvalidArgument);
  files.queries[0] = int64_t{1} << 31;
  EXPECT_EQ(shop_->Open(&store_).code(), StatusCode::kInvalidArgument);
  files.queries[0] = (int64_t{1} << 31) - 1;
  EXPECT_EQ(shop_->Open(&store_).code(), StatusCode::kFailedPrecondition) << "too many in all";
  files.queries[0] = 9;
  ++files.queries[1];
  EXPECT_EQ(shop_->Open(&store_).code(), StatusCode::kDataLoss) << "not what its own file has";
  files.queries.pop_back();
  EXPECT_EQ(shop_->Open(&store_).code(), StatusCode::kInvalidArgument);
  files.queries.clear();
  EXPECT_EQ(shop_->Open(&store_).code(), StatusCode::kNotFound);
}

TEST_F(BatchSamplerTest, MaskLeavesOutEveryClickedItemOfTheQuery) {
  Make(2);
  int64_t local;
  const InteractionsShard& first = store_->ShardOfQuery(0, &local);
  ASSERT_EQ(first.ClicksOf(local).items.size(), 5u) << "a head query, each item once";
  ASSERT_FALSE(first.ClicksOf(local).filter.words.empty());
  ASSERT_TRUE(first.ClicksOf(local + 1).filter.words.empty());
  for (int64_t shared : {0, 5, 60}) {  // few and many items beside the length of the click lists
    BatchOptions options;
    options.batch_size = shared == 0 ? 1 : 20;
    options.num_random_negatives = shared;
    options.num_title_queries = shared == 5 ? 4 : 0;
    options.num_own_negatives = 2;
    const BatchSampler sampler(*store_, options);
    Batch batch;
    for (int step = 0; step < 40; ++step) {
      sampler.Sample(step, &batch);
      const size_t columns = batch.query.size() + shared;
      const std::unique_ptr<bool[]> mask(new bool[batch.query.size() * columns]);
      sampler.NegativeMask(&batch, mask.get());
      for (size_t i = 0; i < batch.query.size(); ++i) {
        for (size_t j = 0; j < columns; ++j) {
          const bool expected = batch.query[i] == Batch::kTitleQuery
                                    ? batch.item[i] != batch.item[j]
                                    : shop_->clicked.count({batch.query[i], batch.item[j]}) == 0;
          ASSERT_EQ(mask[i * columns + j], expected) << i << ' ' << j;
        }
      }
    }
  }
}

TEST(ItemFilterTest, HasItsItemsAndFewOthers) {
  for (int n : {1, 2, 3, 4, 100, 5000}) {
    std::vector<int32_t> items;
    for (int i = 0; i < n; ++i) items.push_back(3 * i);
    const std::vector<uint64_t> words = ItemFilter::Of({items.data(), items.size()});
    EXPECT_LE(words.size(), static_cast<size_t>(n / 4 + 1));
    const ItemFilter filter{{words.data(), words.size()}};
    for (int32_t item : items) ASSERT_TRUE(filter.MayHave(ItemFilter::KeyOf(item)));
    int others = 0;
    for (int i = 0; i < 10'000; ++i) others += filter.MayHave(ItemFilter::KeyOf(3 * i + 1));
    EXPECT_LT(others, 400);
  }
}

TEST_F(BatchSamplerTest, EveryPositiveKnowsItsQuery) {
  for (int shards : {1, 4}) {
    Make(shards);
    for (int64_t i = 0; i < store_->num_positives(); ++i) {
      int64_t row;
      const InteractionsShard& shard = store_->ShardOfPositive(i, &row);
      ASSERT_EQ(shard.first_query + shard.QueryOfPositive(row), shop_->positives[i].query);
    }
  }
  // Queries without positives, first, last and between, around places that the index knows.
  InteractionsShard shard;
  const std::vector<int64_t> splits{0, 0, 0, 1, 31, 31, 32, 32, 33, 95, 96, 96, 96, 130, 130, 130};
  shard.positives.splits = {splits.data(), splits.size()};
  shard.FindQueries();
  for (int64_t row = 0; row < 130; ++row) {
    const int64_t query = shard.QueryOfPositive(row);
    ASSERT_TRUE(splits[query] <= row && row < splits[query + 1]) << row << ' ' << query;
  }
}

TEST(GatherCodesTest, BytesAndWords) {
  const std::vector<uint8_t> bytes{0, 7, 255};
  const std::vector<int32_t> words{300, 0, 70'000}, rows{2, -1, 0, 1};
  const std::vector<CodeColumn> columns{{{bytes.data(), 3}, {}}, {{}, {words.data(), 3}}};
  std::vector<int32_t> codes(8);
  GatherCodes(columns, {rows.data(), rows.size()}, codes.data());
  EXPECT_EQ(codes, (std::vector<int32_t>{255, 70'000, 0, 0, 0, 300, 7, 0}));
}

TEST(PositionIndexTest, FindsEachPositionInOrder) {
  RandomStream random(1);
  PositionIndex index;
  for (size_t n : {1, 2, 15, 16, 17, 300, 5000}) {
    std::vector<int32_t> values(n);
    for (int32_t& value : values) value = static_cast<int32_t>(random.Uniform(n)) * 65536 - 1;
    index.Build(values.data(), n);
    for (size_t i = 0; i < n; ++i) {
      std::vector<size_t> expected, got;
      if (n <= 300) {
        for (size_t j = 0; j < n; ++j) {
          if (values[j] == values[i]) expected.push_back(j);
        }
        index.ForEach(values[i], [&](size_t j) { got.push_back(j); });
        ASSERT_EQ(got, expected);
      }
      ASSERT_EQ(index.First(values[i]), static_cast<size_t>(std::find(values.begin(), values.end(), values[i]) - values.begin()));
    }
    index.ForEach(12345, [](size_t) { FAIL(); });
    // Of many values, some of them there: as one by one.
    std::vector<int32_t> asked;
    for (size_t i = 0; i < 1003; ++i) asked.push_back(static_cast<int32_t>(random.Uniform(4 * n)) * 65536 - 1);
    std::vector<size_t> one_by_one, at_once;
    for (int32_t value : asked) index.ForEach(value, [&](size_t j) { one_by_one.push_back(j); });
    index.ForEachOf({asked.data(), asked.size()}, [&](size_t j) { at_once.push_back(j); });
    ASSERT_EQ(at_once, one_by_one);
  }
}

TEST_F(BatchSamplerTest, UnknownFeaturesAreNamed) {
  shop_->options.user_features.fixed = {"shoe_size"};
  Status status = shop_->Open(&store_);
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_TRUE(Contains(status.message(), "no user feature 'shoe_size'"));
  shop_->options.user_features.fixed.clear();
  shop_->options.history_features.fixed = {"tags"};  // which is a list
  status = shop_->Open(&store_);
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_TRUE(Contains(status.message(), "no item feature 'tags'"));
}

TEST_F(BatchSamplerTest, FilesInTheWrongPlaceAreRefused) {
  std::swap(shop_->options.users, shop_->options.items);
  EXPECT_EQ(shop_->Open(&store_).code(), StatusCode::kFailedPrecondition);
  shop_->options.interactions.clear();
  std::swap(shop_->options.users, shop_->options.items);
  EXPECT_EQ(shop_->Open(&store_).code(), StatusCode::kInvalidArgument);
}

TEST(ItemTableTest, FindsEveryIdAndNoOther) {
  for (int items : {0, 1, 2, 3, 8, 9, 1000}) {
    const std::string path = StrCat(::testing::TempDir(), "item_table_", items);
    int bits = 0;
    while ((1 << bits) < items) ++bits;
    std::vector<int64_t> ids, splits(items + 1);
    Rows buckets(size_t{1} << bits);
    for (int i = 0; i < items; ++i) {
      ids.push_back((int64_t{i} * i * i) << 20);
      buckets[bits == 0 ? 0 : Mix64(ids[i]) >> (64 - bits)].push_back(i);
    }
    const std::vector<int64_t> wide = SplitsOf(buckets);
    std::vector<int32_t> bucket_splits(wide.begin(), wide.end()), rows = ValuesOf(buckets);
    const auto open = [&](std::unique_ptr<ItemTable>* table) {
      WriteFile(path, "items", std::pair("id", ids), std::pair("tokens.splits", splits),
                std::pair("tokens.values", std::vector<int32_t>()), std::pair("id_index.splits", bucket_splits),
                std::pair("id_index.rows", rows));
      std::unique_ptr<PackedFile> file;
      EXPECT_TRUE(IsOk(PackedFile::Open(path, "items", true, &file)));
      return ItemTable::Open(std::move(file), {}, /*with_ids=*/true, table);
    };
    std::unique_ptr<ItemTable> table;
    ASSERT_TRUE(IsOk(open(&table)));
    for (int i = 0; i < items; ++i) {
      ASSERT_EQ(table->Find(ids[i]), i);
      ASSERT_EQ(table->Find(ids[i] + 1), -1);
    }
    ASSERT_EQ(table->Find(-1), -1);
    if (items < 9) continue;
    std::swap(rows[0], rows[1]);  // in another bucket, or not ascending
    Status status = open(&table);
    EXPECT_EQ(status.code(), StatusCode::kDataLoss);
    EXPECT_TRUE(Contains(status.message(), "id_index.splits row "));
    std::swap(rows[0], rows[1]);
    bucket_splits.back() -= 1;
    EXPECT_EQ(open(&table).code(), StatusCode::kDataLoss);
  }
}

TEST(ItemTableTest, VectorsKeepTheirBits) {
  const std::string path = StrCat(::testing::TempDir(), "item_table_vectors");
  const std::vector<float> numbers{1.5f, -2.0f, -0.0f, 1e-30f};  // bits of negative numbers are negative codes
  std::vector<int64_t> splits{0, 2, 2, 4};
  const auto open = [&](std::unique_ptr<ItemTable>* table) {
    WriteFile(path, "items", std::pair("tokens.splits", std::vector<int64_t>(4)),
              std::pair("tokens.values", std::vector<int32_t>()), std::pair("feature.photo.splits", splits),
              std::pair("feature.photo.values", numbers));
    std::unique_ptr<PackedFile> file;
    EXPECT_TRUE(IsOk(PackedFile::Open(path, "items", true, &file)));
    FeatureNames names;
    names.lists = {"photo"};
    return ItemTable::Open(std::move(file), names, /*with_ids=*/false, table);
  };
  std::unique_ptr<ItemTable> table;
  ASSERT_TRUE(IsOk(open(&table)));
  const RaggedColumn& column = table->features().lists[0];
  const std::vector<int32_t> rows{2, -1, 1, 0};
  std::vector<int64_t> found_splits(5);
  ASSERT_EQ(GatherSplits(column, {rows.data(), rows.size()}, found_splits.data()), 4);
  EXPECT_EQ(found_splits, (std::vector<int64_t>{0, 2, 2, 2, 4}));
  std::vector<int32_t> bits(4);
  GatherValues(column, {rows.data(), rows.size()}, bits.data());
  const std::vector<float> expected{-0.0f, 1e-30f, 1.5f, -2.0f};
  EXPECT_EQ(std::memcmp(bits.data(), expected.data(), sizeof(float) * 4), 0);
  splits.back() = 3;
  const Status status = open(&table);
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_TRUE(Contains(status.message(), "feature.photo.splits does not span its 4 values"));
}

}  // namespace
}  // namespace dpsr
