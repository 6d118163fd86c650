#include "export/faiss_binding/combined_searches.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace dpsr {
namespace {

constexpr int64_t kDim = 2;

// Result i of a query is its first number plus i; the label is its second number.
void Answer(int64_t n, const float* x, int64_t k, float* distances, int64_t* labels) {
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      distances[row * k + i] = x[row * kDim] + static_cast<float>(i);
      labels[row * k + i] = static_cast<int64_t>(x[row * kDim + 1]);
    }
  }
}

// Searches for n queries and checks that the results are theirs.
void SearchAndCheck(CombinedSearches* searches, int64_t n, int64_t k, int64_t caller) {
  std::vector<float> x(n * kDim);
  for (int64_t row = 0; row < n; ++row) {
    x[row * kDim] = static_cast<float>(1000 * caller + row);
    x[row * kDim + 1] = static_cast<float>(caller);
  }
  std::vector<float> distances(n * k), expected(n * k);
  std::vector<int64_t> labels(n * k), expected_labels(n * k);
  Answer(n, x.data(), k, expected.data(), expected_labels.data());
  searches->Search(n, x.data(), k, distances.data(), labels.data());
  EXPECT_EQ(distances, expected);
  EXPECT_EQ(labels, expected_labels);
}

// A search whose first call waits until it is let go.
class Gate {
 public:
  void Pass() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (++calls_ > 1) return;
    changed_.notify_all();
    changed_.wait(lock, [this] { return is_open_; });
  }
  void AwaitFirst() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return calls_ > 0; });
  }
  void Open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int calls_ = 0;
  bool is_open_ = false;
};

TEST(CombinedSearchesTest, CallersThatWaitAreServedTogetherIfTheyWantAsManyResults) {
  Gate gate;
  std::vector<std::pair<int64_t, int64_t>> calls;  // n and k; only one thread at a time searches
  CombinedSearches searches(kDim, [&](int64_t n, const float* x, int64_t k, float* distances, int64_t* labels) {
    calls.emplace_back(n, k);
    gate.Pass();
    Answer(n, x, k, distances, labels);
  });
  std::vector<std::thread> threads;
  threads.emplace_back([&] { SearchAndCheck(&searches, 1, 3, 1); });
  gate.AwaitFirst();
  for (int64_t caller = 2; caller < 8; ++caller) {
    threads.emplace_back([&searches, caller] { SearchAndCheck(&searches, caller, caller % 2 == 0 ? 3 : 5, caller); });
  }
  while (searches.num_waiting() < 6) std::this_thread::yield();
  gate.Open();
  for (std::thread& thread : threads) thread.join();
  std::sort(calls.begin(), calls.end());
  EXPECT_EQ(calls, (std::vector<std::pair<int64_t, int64_t>>{{1, 3}, {2 + 4 + 6, 3}, {3 + 5 + 7, 5}}));
}

TEST(CombinedSearchesTest, ThereIsALimitButItDoesNotSplitACaller) {
  Gate gate;
  std::vector<int64_t> calls;
  CombinedSearches searches(kDim, [&](int64_t n, const float* x, int64_t k, float* distances, int64_t* labels) {
    calls.push_back(n);
    gate.Pass();
    Answer(n, x, k, distances, labels);
  });
  std::vector<std::thread> threads;
  threads.emplace_back([&] { SearchAndCheck(&searches, 1, 1, 1); });
  gate.AwaitFirst();
  const int64_t half = CombinedSearches::kMaxQueries / 2;
  for (const int64_t n : {half, half, half, 3 * half}) {
    threads.emplace_back([&searches, n] { SearchAndCheck(&searches, n, 1, 2); });
  }
  while (searches.num_waiting() < 4) std::this_thread::yield();
  gate.Open();
  for (std::thread& thread : threads) thread.join();
  std::sort(calls.begin(), calls.end());
  EXPECT_EQ(calls, (std::vector<int64_t>{1, half, 2 * half, 3 * half}));
}

TEST(CombinedSearchesTest, AnErrorGoesToAllThatItConcernsAndToNoOther) {
  Gate gate;
  CombinedSearches searches(kDim, [&](int64_t n, const float* x, int64_t k, float* distances, int64_t* labels) {
    gate.Pass();
    if (k == 2) throw std::runtime_error("no memory");
    Answer(n, x, k, distances, labels);
  });
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  threads.emplace_back([&] { SearchAndCheck(&searches, 1, 1, 1); });
  gate.AwaitFirst();
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      const std::vector<float> x(kDim);
      std::vector<float> distances(2);
      std::vector<int64_t> labels(2);
      try {
        searches.Search(1, x.data(), 2, distances.data(), labels.data());
      } catch (const std::runtime_error&) {
        ++failed;
      }
    });
  }
  threads.emplace_back([&] { SearchAndCheck(&searches, 4, 1, 2); });
  while (searches.num_waiting() < 4) std::this_thread::yield();
  gate.Open();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 3);
  SearchAndCheck(&searches, 1, 1, 3);  // and the next one is served
}

TEST(CombinedSearchesTest, ManyThreadsGetTheirOwnResults) {
  CombinedSearches searches(kDim, Answer);
  std::vector<std::thread> threads;
  for (int64_t caller = 0; caller < 8; ++caller) {
    threads.emplace_back([&searches, caller] {
      for (int64_t i = 0; i < 500; ++i) SearchAndCheck(&searches, 1 + i % 3, 1 + (i + caller) % 4, caller);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace dpsr
