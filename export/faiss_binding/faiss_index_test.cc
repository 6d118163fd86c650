// Runs against the FAISS library that the environment variable FAISS_LIBRARY names.
#include "export/faiss_binding/faiss_index.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/packed_file.h"
#include "export/faiss_binding/test_util.h"
#include "gtest/gtest.h"

namespace dpsr {
namespace {

constexpr int kDim = 8;
constexpr int64_t kVectors = 300;

class FaissIndexTest : public testing::Test {
 protected:
  void SetUp() override {
    const Status status = FaissLibrary::Get(&library_);
    ASSERT_TRUE(status.ok()) << status.message();
    path_ = testing::TempDir() + "faiss_index_test_" + std::to_string(getpid()) + ".faiss";
    vectors_ = RandomVectors(kVectors, kDim, 1);
    WriteTestIndex(*library_, path_, "Flat", kDim, FaissMetric::kInnerProduct, vectors_);
  }
  void TearDown() override { std::remove(path_.c_str()); }

  std::unique_ptr<FaissIndex> Read(bool mmap = true) {
    std::unique_ptr<FaissIndex> index;
    const Status status = FaissIndex::Read(*library_, path_, mmap, &index);
    EXPECT_TRUE(status.ok()) << status.message();
    return index;
  }

  // The labels [n, k] of an exact search by inner product.
  std::vector<int64_t> Exact(const std::vector<float>& queries, int64_t k) const {
    std::vector<int64_t> labels;
    for (size_t query = 0; query < queries.size(); query += kDim) {
      std::vector<float> scores(kVectors);
      for (int64_t i = 0; i < kVectors; ++i) {
        scores[i] = std::inner_product(&vectors_[i * kDim], &vectors_[i * kDim] + kDim, &queries[query], 0.0f);
      }
      std::vector<int64_t> order(kVectors);
      std::iota(order.begin(), order.end(), 0);
      std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
      labels.insert(labels.end(), order.begin(), order.begin() + k);
    }
    return labels;
  }

  const FaissLibrary* library_ = nullptr;
  std::string path_;
  std::vector<float> vectors_;
};

TEST(FaissMetricNameTest, NamesAll) {
  EXPECT_EQ(FaissMetricName(FaissMetric::kInnerProduct), "inner product");
  EXPECT_EQ(FaissMetricName(FaissMetric::kL2), "L2");
  EXPECT_EQ(FaissMetricName(static_cast<FaissMetric>(4)), "faiss::MetricType(4)");
}

TEST_F(FaissIndexTest, ReadsTheFields) {
  for (const bool mmap : {false, true}) {
    const std::unique_ptr<FaissIndex> index = Read(mmap);
    ASSERT_NE(index, nullptr);
    EXPECT_EQ(index->d(), kDim);
    EXPECT_EQ(index->ntotal(), kVectors);
    EXPECT_TRUE(index->is_trained());
    EXPECT_EQ(index->metric(), FaissMetric::kInnerProduct);
  }
  WriteTestIndex(*library_, path_, "Flat", kDim, FaissMetric::kL2, vectors_);
  EXPECT_EQ(Read()->metric(), FaissMetric::kL2);
}

TEST_F(FaissIndexTest, SearchesExactly) {
  constexpr int64_t kQueries = 5;
  constexpr int64_t kResults = 20;
  const std::vector<float> queries = RandomVectors(kQueries, kDim, 2);
  for (const bool mmap : {false, true}) {
    const std::unique_ptr<FaissIndex> index = Read(mmap);
    ASSERT_NE(index, nullptr);
    for (const int nthreads : {1, 2}) {
      std::vector<float> distances(kQueries * kResults);
      std::vector<int64_t> labels(kQueries * kResults);
      const Status status =
          index->Search(kQueries, queries.data(), kResults, distances.data(), labels.data(), nthreads);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(labels, Exact(queries, kResults));
    }
  }
}

TEST_F(FaissIndexTest, PadsBeyondNtotal) {
  const std::unique_ptr<FaissIndex> index = Read();
  ASSERT_NE(index, nullptr);
  const std::vector<float> query = RandomVectors(1, kDim, 3);
  std::vector<float> distances(kVectors + 2);
  std::vector<int64_t> labels(kVectors + 2);
  ASSERT_TRUE(index->Search(1, query.data(), kVectors + 2, distances.data(), labels.data()).ok());
  EXPECT_GE(labels[kVectors - 1], 0);
  EXPECT_EQ(labels[kVectors], -1);
  EXPECT_EQ(labels[kVectors + 1], -1);
}

TEST_F(FaissIndexTest, RefusesBadSearchSizes) {
  const std::unique_ptr<FaissIndex> index = Read();
  ASSERT_NE(index, nullptr);
  const std::vector<float> query = RandomVectors(1, kDim, 3);
  float distance;
  int64_t label;
  EXPECT_EQ(index->Search(-1, query.data(), 1, &distance, &label).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(index->Search(1, query.data(), 0, &distance, &label).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(index->Search(1, query.data(), 1, &distance, &label, 0).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(index->Search(0, query.data(), 1, &distance, &label).ok());
}

TEST_F(FaissIndexTest, SetParametersReportsWhatFaissDoesNotKnow) {
  const std::unique_ptr<FaissIndex> index = Read();
  ASSERT_NE(index, nullptr);
  EXPECT_TRUE(index->SetParameters("").ok());
  EXPECT_TRUE(index->SetParameters("verbose=0").ok());
  for (const std::string parameters : {"nprobe=32", "no_such_parameter=1", "nonsense"}) {
    const Status status = index->SetParameters(parameters);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << parameters;
    EXPECT_NE(status.message().find(parameters), std::string::npos) << status.message();
  }
}

TEST_F(FaissIndexTest, ChecksTheFile) {
  std::ifstream in(path_, std::ios::binary);
  std::string bytes(std::istreambuf_iterator<char>(in), {});
  const uint64_t checksum = Checksum(bytes.data(), bytes.size());
  EXPECT_TRUE(FaissIndex::CheckFile(path_, bytes.size(), checksum).ok());
  EXPECT_EQ(FaissIndex::CheckFile(path_, bytes.size() + 1, checksum).code(), StatusCode::kDataLoss);
  EXPECT_EQ(FaissIndex::CheckFile(path_, bytes.size(), checksum + 1).code(), StatusCode::kDataLoss);
  EXPECT_EQ(FaissIndex::CheckFile(path_ + ".missing", 1, 1).code(), StatusCode::kNotFound);
}

TEST_F(FaissIndexTest, SearchesAmongAllowedPositions) {
  const auto index = Read();
  std::vector<uint64_t> bits((kVectors + 63) / 64, 0);
  for (int64_t i = 0; i < kVectors; i += 3) bits[i / 64] |= uint64_t{1} << (i % 64);
  const PositionSet allowed(bits.data(), bits.size());
  std::vector<float> distances(kVectors);
  std::vector<int64_t> labels(kVectors);
  ASSERT_TRUE(index->Search(1, vectors_.data(), kVectors, distances.data(), labels.data(), 1, {}, &allowed).ok());
  std::vector<int64_t> expected = Exact({vectors_.begin(), vectors_.begin() + kDim}, kVectors);
  expected.erase(std::remove_if(expected.begin(), expected.end(), [](int64_t i) { return i % 3 != 0; }),
                 expected.end());
  expected.resize(kVectors, -1);
  EXPECT_EQ(labels, expected);
}

// What a new vector needs to be put into the lists of an index: each part does what the index itself does.
TEST_F(FaissIndexTest, ListsAndCodesOfNewVectors) {
  for (const char* const factory : {"IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4x4"}) {
    WriteTestIndex(*library_, path_, factory, kDim, FaissMetric::kInnerProduct, vectors_, kVectors);
    const auto index = Read();
    ASSERT_TRUE(index->SetParameters("nprobe=3").ok());
    std::vector<int64_t> lists(kVectors);
    std::vector<float> scores(kVectors);
    ASSERT_TRUE(index->NearestLists(kVectors, vectors_.data(), 1, lists.data(), scores.data()).ok());
    std::vector<uint8_t> codes(kVectors * index->code_size());
    ASSERT_TRUE(index->Encode(kVectors, vectors_.data(), lists.data(), codes.data()).ok());
    std::vector<float> decoded(vectors_.size());
    ASSERT_TRUE(index->Decode(kVectors, codes.data(), lists.data(), decoded.data()).ok());
    int64_t found = 0;
    for (int64_t list = 0; list < 8; ++list) {
      std::vector<int64_t> ids(index->list_size(list));
      index->ReadListIds(list, ids.data());
      for (size_t i = 0; i < ids.size(); ++i) {
        EXPECT_EQ(lists[ids[i]], list);
        const uint8_t* const code = codes.data() + ids[i] * index->code_size();
        EXPECT_TRUE(std::equal(code, code + index->code_size(), index->list_codes(list) + i * index->code_size()));
        ++found;
      }
    }
    EXPECT_EQ(found, kVectors);
    double error = 0, size = 0;
    for (size_t i = 0; i < decoded.size(); ++i) {
      error += (decoded[i] - vectors_[i]) * (decoded[i] - vectors_[i]);
      size += vectors_[i] * vectors_[i];
    }
    EXPECT_LT(error, size / 4);

    const float* const x = vectors_.data();
    int64_t nearest[3];
    float nearest_scores[3];
    ASSERT_TRUE(index->NearestLists(1, x, 3, nearest, nearest_scores).ok());
    const std::vector<uint64_t> even(kVectors / 64 + 1, 0x5555555555555555);
    const PositionSet allowed(even.data(), even.size());
    for (const PositionSet* set : {static_cast<const PositionSet*>(nullptr), &allowed}) {
      float distances[2][20];
      int64_t labels[2][20];
      ASSERT_TRUE(index->Search(1, x, 20, distances[0], labels[0], 1, {}, set).ok());
      ASSERT_TRUE(index->SearchLists(x, 20, {nearest, 3}, nearest_scores, 0, set, distances[1], labels[1]).ok());
      EXPECT_TRUE(std::equal(labels[0], labels[0] + 20, labels[1]));
      EXPECT_TRUE(std::equal(distances[0], distances[0] + 20, distances[1]));
    }
  }
}

TEST_F(FaissIndexTest, WithoutAGpuItStaysOnTheCpu) {
  const auto index = Read();
  const Status status = index->CopyToGpu(0);
  if (status.ok()) GTEST_SKIP() << "there is a GPU";
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_FALSE(status.message().empty());
  std::vector<float> distances(3);
  std::vector<int64_t> labels(3);
  ASSERT_TRUE(index->Search(1, vectors_.data(), 3, distances.data(), labels.data()).ok());
  EXPECT_EQ(labels, Exact({vectors_.begin(), vectors_.begin() + kDim}, 3));
}

TEST_F(FaissIndexTest, AGpuCannotFindAsManyResultsWithSomeCodes) {
  for (const auto& [description, most] : {std::pair<std::string, int64_t>{"Flat", 2048},
                                          {"IVF4,Flat", 2048},
                                          {"IVF4,SQ8", 512},
                                          {"IVF4,SQ4", 512},
                                          {"IVF4,SQfp16", 2048}}) {
    WriteTestIndex(*library_, path_, description, kDim, FaissMetric::kInnerProduct, vectors_, kVectors);
    EXPECT_EQ(Read()->max_gpu_results(), most) << description;
  }
}

// Needs faiss-gpu and a GPU.
TEST_F(FaissIndexTest, AGpuFindsWhatTheCpuFinds) {
  const std::vector<float> queries = RandomVectors(64, kDim, 2);
  std::vector<uint64_t> even((kVectors + 63) / 64, 0x5555555555555555);
  const PositionSet allowed(even.data(), even.size());
  for (const std::string description : {"Flat", "IVF4,Flat", "IVF4,SQ8", "IVF4,SQ4", "IVF4,SQfp16", "IVF4,PQ4"}) {
    SCOPED_TRACE(description);
    WriteTestIndex(*library_, path_, description, kDim, FaissMetric::kInnerProduct, vectors_, kVectors);
    const auto cpu = Read(), gpu = Read();
    const Status status = gpu->CopyToGpu(0);
    if (!status.ok()) GTEST_SKIP() << status.message();
    EXPECT_EQ(Read()->CopyToGpu(1000).code(), StatusCode::kFailedPrecondition);  // there are not that many
    // For more results, and with a filter, the CPU searches.
    const int64_t most = gpu->max_gpu_results();
    for (const auto& [k, filter] : {std::pair<int64_t, const PositionSet*>{1, nullptr},
                                    {50, nullptr},
                                    {most, nullptr},
                                    {most + 1, nullptr},
                                    {20, &allowed}}) {
      std::vector<float> expected(64 * k), distances(64 * k);
      std::vector<int64_t> expected_labels(64 * k), labels(64 * k);
      ASSERT_TRUE(cpu->Search(64, queries.data(), k, expected.data(), expected_labels.data(), 1, {}, filter).ok());
      ASSERT_TRUE(gpu->Search(64, queries.data(), k, distances.data(), labels.data(), 1, {}, filter).ok());
      // Scores agree to rounding, so that items may change places only where scores are as good as equal.
      for (size_t i = 0; i < labels.size(); ++i) {
        ASSERT_EQ(labels[i] < 0, expected_labels[i] < 0) << "k " << k << ", result " << i;
        if (labels[i] >= 0) {
          ASSERT_NEAR(distances[i], expected[i], 1e-2) << "k " << k << ", result " << i;
        }
      }
    }
    // Threads take turns.
    std::vector<std::thread> threads;
    std::vector<std::vector<int64_t>> found(4, std::vector<int64_t>(64 * 10));
    for (std::vector<int64_t>& labels : found) {
      threads.emplace_back([&] {
        std::vector<float> distances(64 * 10);
        for (int i = 0; i < 50; ++i) {
          EXPECT_TRUE(gpu->Search(64, queries.data(), 10, distances.data(), labels.data()).ok());
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::vector<int64_t>& labels : found) EXPECT_EQ(labels, found[0]);
  }
}

TEST_F(FaissIndexTest, KnowsItsParameters) {
  const auto index = Read();
  EXPECT_TRUE(index->parameters().empty());
  EXPECT_FALSE(index->has_lists());
  SearchParameters parameters;
  parameters.nprobe = 1;
  const Status status = index->CheckParameters(parameters);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("takes none; leave out nprobe"), std::string::npos) << status.message();
}

TEST_F(FaissIndexTest, MissingFileIsNotFound) {
  std::unique_ptr<FaissIndex> index;
  const Status status = FaissIndex::Read(*library_, path_ + ".missing", true, &index);
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_NE(status.message().find(path_ + ".missing"), std::string::npos) << status.message();
  EXPECT_EQ(FaissIndex::Read(*library_, testing::TempDir(), true, &index).code(), StatusCode::kDataLoss);
}

TEST_F(FaissIndexTest, EveryTruncationIsDataLoss) {
  std::ifstream whole_file(path_, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(whole_file)), std::istreambuf_iterator<char>());
  ASSERT_GT(whole.size(), kVectors * kDim * sizeof(float));
  for (size_t size = 0; size < whole.size(); size += size < 128 ? 1 : 997) {
    std::ofstream(path_, std::ios::binary | std::ios::trunc) << whole.substr(0, size);
    for (const bool mmap : {false, true}) {
      std::unique_ptr<FaissIndex> index;
      const Status status = FaissIndex::Read(*library_, path_, mmap, &index);
      ASSERT_EQ(status.code(), StatusCode::kDataLoss) << size << " of " << whole.size() << " bytes";
      EXPECT_NE(status.message().find(path_), std::string::npos) << status.message();
    }
  }
}

TEST_F(FaissIndexTest, ThreadsSearchOneIndex) {
  constexpr int64_t kQueries = 64;
  constexpr int64_t kResults = 10;
  const std::unique_ptr<FaissIndex> index = Read();
  ASSERT_NE(index, nullptr);
  const std::vector<float> queries = RandomVectors(kQueries, kDim, 4);
  const std::vector<int64_t> expected = Exact(queries, kResults);
  std::vector<std::vector<int64_t>> labels(8, std::vector<int64_t>(kQueries * kResults));
  std::vector<std::thread> threads;
  for (std::vector<int64_t>& own : labels) {
    threads.emplace_back([&index, &queries, &own] {
      std::vector<float> distances(kResults);
      for (int64_t i = 0; i < kQueries; ++i) {
        const Status status = index->Search(1, &queries[i * kDim], kResults, distances.data(), &own[i * kResults]);
        EXPECT_TRUE(status.ok()) << status.message();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::vector<int64_t>& own : labels) EXPECT_EQ(own, expected);
}

TEST_F(FaissIndexTest, LeavesTheOpenMpSettingOfTheCallerAlone) {
  void* handle = dlopen(library_->path().c_str(), RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(handle, nullptr);
  const auto set_threads = reinterpret_cast<void (*)(int)>(dlsym(handle, "omp_set_num_threads"));
  const auto threads = reinterpret_cast<int (*)()>(dlsym(handle, "omp_get_max_threads"));
  ASSERT_TRUE(set_threads != nullptr && threads != nullptr);
  const std::unique_ptr<FaissIndex> index = Read();
  ASSERT_NE(index, nullptr);
  set_threads(3);
  const std::vector<float> query = RandomVectors(1, kDim, 3);
  float distance;
  int64_t label;
  ASSERT_TRUE(index->Search(1, query.data(), 1, &distance, &label).ok());
  EXPECT_EQ(threads(), 3);
}

}  // namespace
}  // namespace dpsr
