// Runs against the FAISS library that FAISS_LIBRARY names.
#include "export/faiss_search/filtered_search.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "common/test_util.h"
#include "export/faiss_binding/test_util.h"

namespace dpsr {
namespace {

constexpr int kDim = 8;
constexpr int64_t kItems = 20000;

class FilteredSearchTest : public FileTest {
 protected:
  void SetUp() override {
    FileTest::SetUp();
    ASSERT_TRUE(IsOk(FaissLibrary::Get(&library_)));
    vectors_ = RandomVectors(kItems, kDim, 1);
  }

  // Builds an index of the vectors and opens it.
  void Build(const char* factory, bool lists, const std::string& parameters) {
    constexpr int64_t kTrain = 4000;
    WriteTestIndex(*library_, path_, factory, kDim, FaissMetric::kInnerProduct, vectors_, kTrain);
    ASSERT_TRUE(IsOk(FaissIndex::Read(*library_, path_, /*mmap=*/true, &index_)));
    ASSERT_TRUE(IsOk(index_->SetParameters(parameters)));
    EXPECT_EQ(index_->has_lists(), lists);
    ASSERT_TRUE(IsOk(FilteredSearch::Create(index_.get(), &search_)));
  }

  // The slots whose positions `passes` takes.
  template <typename Passes>
  ItemMask Mask(const Passes& passes) const {
    const ItemOrder& order = search_->order();
    ItemMask mask;
    mask.words.assign((kItems + 63) / 64, 0);
    for (int64_t slot = 0; slot < kItems; ++slot) {
      if (!passes(order.positions.empty() ? slot : order.positions[slot])) continue;
      mask.words[slot / 64] |= uint64_t{1} << (slot % 64);
      ++mask.count;
    }
    for (size_t group = 0; group + 1 < order.group_begins.size(); ++group) {
      mask.group_counts.push_back(static_cast<int32_t>(CountBits({mask.words.data(), mask.words.size()},
                                                                 order.group_begins[group],
                                                                 order.group_begins[group + 1])));
    }
    return mask;
  }

  struct Found {
    std::vector<float> scores;
    std::vector<int64_t> positions;
  };
  Found Search(const float* x, int64_t k, const ItemMask& mask, const SearchParameters& parameters = {}) const {
    Found found = {std::vector<float>(k), std::vector<int64_t>(k)};
    EXPECT_TRUE(IsOk(search_->Search(x, k, mask, parameters, found.scores.data(), found.positions.data())));
    return found;
  }

  float Score(const float* x, int64_t position) const {
    return std::inner_product(x, x + kDim, &vectors_[position * kDim], 0.0f);
  }

  // The k best of every `step`-th position.
  std::vector<int64_t> Exact(const float* x, int64_t k, int64_t step) const {
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < kItems; i += step) positions.push_back(i);
    k = std::min<int64_t>(k, positions.size());
    std::partial_sort(positions.begin(), positions.begin() + k, positions.end(),
                      [&](int64_t a, int64_t b) { return Score(x, a) > Score(x, b); });
    positions.resize(k);
    return positions;
  }

  const FaissLibrary* library_ = nullptr;
  std::vector<float> vectors_;
  std::unique_ptr<FaissIndex> index_;
  std::unique_ptr<FilteredSearch> search_;
};

TEST_F(FilteredSearchTest, FewItemsAreAllScored) {
  for (const bool lists : {true, false}) {
    Build(lists ? "IVF32,Flat" : "Flat", lists, lists ? "nprobe=2" : "");
    for (const int64_t step : {3, 10, 100, 5000}) {
      const ItemMask mask = Mask([&](int64_t i) { return i % step == 0; });
      const std::vector<float> queries = RandomVectors(5, kDim, 2);
      for (int query = 0; query < 5; ++query) {
        const float* const x = &queries[query * kDim];
        const std::vector<int64_t> expected = Exact(x, 50, step);
        const Found found = Search(x, 50, mask);
        for (size_t i = 0; i < 50; ++i) {
          if (i < expected.size()) {
            EXPECT_EQ(found.positions[i], expected[i]);
            EXPECT_NEAR(found.scores[i], Score(x, expected[i]), 1e-4);
          } else {
            EXPECT_EQ(found.positions[i], -1);
            EXPECT_EQ(found.scores[i], -INFINITY);
          }
        }
      }
    }
  }
}

TEST_F(FilteredSearchTest, AsManyAreScoredAsWithoutAFilter) {
  Build("IVF32,SQ8", true, "nprobe=8");
  const std::vector<float> queries = RandomVectors(50, kDim, 3);
  double recall[2] = {0, 0};
  for (const int64_t step : {1, 2}) {
    const ItemMask mask = Mask([&](int64_t i) { return i % step == 0; });
    ASSERT_GT(mask.count, FilteredSearch::kFewItems);
    for (int query = 0; query < 50; ++query) {
      const float* const x = &queries[query * kDim];
      const std::vector<int64_t> exact = Exact(x, 100, step);
      const Found found = Search(x, 100, mask);
      const std::set<int64_t> there(found.positions.begin(), found.positions.end());
      EXPECT_EQ(there.count(-1), 0U);
      for (const int64_t position : there) EXPECT_EQ(position % step, 0);
      for (const int64_t position : exact) recall[step - 1] += there.count(position) / 5000.0;
    }
  }
  EXPECT_GT(recall[0], 0.8);
  EXPECT_GE(recall[1], recall[0] - 0.01);
}

// What passes lies to one side, far from half of the queries.
TEST_F(FilteredSearchTest, OneRegionIsFoundFromElsewhere) {
  Build("IVF64,SQ8", true, "nprobe=4");
  std::vector<float> queries = RandomVectors(60, kDim, 6);
  for (int query = 0; query < 60; ++query) queries[query * kDim] = -2;
  const ItemMask region = Mask([&](int64_t i) { return vectors_[i * kDim] > 0.2f; });
  ASSERT_GT(region.count, FilteredSearch::kFewItems);
  double recall = 0;
  for (int query = 0; query < 60; ++query) {
    const float* const x = &queries[query * kDim];
    std::vector<int64_t> exact = Exact(x, kItems, 1);
    exact.erase(std::remove_if(exact.begin(), exact.end(), [&](int64_t i) { return !(vectors_[i * kDim] > 0.2f); }),
                exact.end());
    const Found found = Search(x, 100, region);
    const std::set<int64_t> there(found.positions.begin(), found.positions.end());
    for (int i = 0; i < 100; ++i) recall += static_cast<double>(there.count(exact[i])) / 6000;
  }
  EXPECT_GT(recall, 0.9);
}

// The bits of a list are computed when a search looks into it; that so many pass is an estimate, right or wrong.
TEST_F(FilteredSearchTest, BitsThatAreNotKnownBeforehand) {
  Build("IVF64,SQ8", true, "nprobe=8");
  const std::vector<float> queries = RandomVectors(20, kDim, 7);
  for (const int64_t step : {2, 20, 3000}) {
    for (const bool region : {false, true}) {
      const auto passes = [&](int64_t i) { return region ? i < kItems / step && vectors_[i * kDim] > 0 : i % step == 0; };
      const ItemMask known = Mask(passes);
      for (const double estimate : {0.1, 1.0, 10.0}) {
        ItemMask unknown;
        unknown.count = std::min<int64_t>(static_cast<int64_t>(static_cast<double>(known.count) * estimate), kItems);
        unknown.keep = [&known](int64_t begin, int64_t end, uint64_t* words) {
          ASSERT_EQ(begin % 64, 0);
          ASSERT_LE(end, kItems);
          for (int64_t slot = begin; slot < end; ++slot) {
            const uint64_t bit = known.words[slot / 64] >> (slot % 64) & 1;
            words[(slot - begin) / 64] &= ~(uint64_t{1} << (slot % 64)) | bit << (slot % 64);
          }
        };
        double same = 0;
        for (int query = 0; query < 20; ++query) {
          const float* const x = &queries[query * kDim];
          const Found expected = Search(x, 50, known);
          const Found found = Search(x, 50, unknown);
          EXPECT_EQ(std::count(found.positions.begin(), found.positions.end(), -1),
                    std::count(expected.positions.begin(), expected.positions.end(), -1));
          for (const int64_t position : found.positions) EXPECT_TRUE(position < 0 || passes(position));
          const std::set<int64_t> there(found.positions.begin(), found.positions.end());
          for (const int64_t position : expected.positions) same += static_cast<double>(there.count(position)) / 1000;
        }
        EXPECT_GT(same, 0.95) << "step " << step << " region " << region << " estimate " << estimate;
      }
    }
  }
}

// A budget bounds how many of the items that pass are scored, but k of them always are.
TEST_F(FilteredSearchTest, MaxCodesBoundsWhatIsScored) {
  Build("IVF32,Flat", true, "nprobe=32");
  const std::vector<float> queries = RandomVectors(10, kDim, 8);
  const ItemMask half = Mask([](int64_t i) { return i % 2 == 0; });
  ASSERT_GT(half.count, FilteredSearch::kFewItems);
  for (int query = 0; query < 10; ++query) {
    const float* const x = &queries[query * kDim];
    for (const int64_t budget : {1, 50, 2000, 100000}) {
      SearchParameters parameters;
      parameters.max_codes = budget;
      const Found found = Search(x, 100, half, parameters);
      EXPECT_EQ(std::count(found.positions.begin(), found.positions.end(), -1), 0);
      for (const int64_t position : found.positions) EXPECT_EQ(position % 2, 0);
      if (budget == 100000) {
        EXPECT_EQ(found.positions, Exact(x, 100, 2));
      }
    }
    // The index's own budget holds if a search sets none.
    ASSERT_TRUE(IsOk(index_->SetParameters("max_codes=150")));
    SearchParameters budget;
    budget.max_codes = 150;
    EXPECT_EQ(Search(x, 100, half).positions, Search(x, 100, half, budget).positions);
    ASSERT_TRUE(IsOk(index_->SetParameters("max_codes=0")));
  }
}

TEST_F(FilteredSearchTest, IndexesThatCannotHoldItemsTwice) {
  Build("Flat", false, "");
  std::unique_ptr<FilteredSearch> search;
  const Status status = FilteredSearch::Create(index_.get(), &search, 2);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("2 entries for each item, expected one"), std::string::npos) << status.message();
  Build("IVF32,Flat", true, "");
  EXPECT_EQ(FilteredSearch::Create(index_.get(), &search, 2).code(), StatusCode::kDataLoss);  // positions end at n / 2
}

TEST_F(FilteredSearchTest, NothingPasses) {
  Build("IVF32,SQ8", true, "nprobe=8");
  const Found found = Search(vectors_.data(), 3, Mask([](int64_t) { return false; }));
  EXPECT_EQ(found.positions, (std::vector<int64_t>{-1, -1, -1}));
}

TEST_F(FilteredSearchTest, ParametersHoldForOneCall) {
  Build("IVF32,Flat", true, "nprobe=1");
  const ItemMask all = Mask([](int64_t) { return true; });
  const std::vector<float> x = RandomVectors(1, kDim, 4);
  SearchParameters every_list;
  every_list.nprobe = 32;
  EXPECT_EQ(Search(x.data(), 100, all, every_list).positions, Exact(x.data(), 100, 1));
  std::vector<float> scores(100);
  std::vector<int64_t> labels(100);
  ASSERT_TRUE(IsOk(index_->Search(1, x.data(), 100, scores.data(), labels.data(), 1, every_list)));
  EXPECT_EQ(labels, Exact(x.data(), 100, 1));
  ASSERT_TRUE(IsOk(index_->Search(1, x.data(), 100, scores.data(), labels.data())));
  EXPECT_NE(labels, Exact(x.data(), 100, 1));
  EXPECT_EQ(index_->parameters().nprobe, 1);
}

TEST_F(FilteredSearchTest, EightThreadsShareOne) {
  Build("IVF32,SQ8", true, "nprobe=4");
  const std::vector<float> queries = RandomVectors(16, kDim, 5);
  std::vector<ItemMask> masks;
  for (const int64_t step : {1, 2, 7, 300}) masks.push_back(Mask([&](int64_t i) { return i % step == 0; }));
  std::vector<Found> expected;
  for (const ItemMask& mask : masks) {
    for (int query = 0; query < 16; ++query) expected.push_back(Search(&queries[query * kDim], 40, mask));
  }
  std::vector<std::thread> threads;
  for (int seed = 0; seed < 8; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937 random(seed);
      for (int i = 0; i < 100; ++i) {
        const size_t mask = random() % masks.size();
        const size_t query = random() % 16;
        const Found found = Search(&queries[query * kDim], 40, masks[mask]);
        ASSERT_EQ(found.positions, expected[mask * 16 + query].positions);
        SearchParameters parameters;
        parameters.nprobe = 1 + static_cast<int64_t>(random() % 32);
        std::vector<float> scores(40);
        std::vector<int64_t> labels(40);
        ASSERT_TRUE(IsOk(index_->Search(1, &queries[query * kDim], 40, scores.data(), labels.data(), 1, parameters)));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace dpsr
