#include "serving/model_server/worker_pool.h"

#include <atomic>
#include <future>
#include <limits>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace dpsr::serving {
namespace {

TEST(WorkerPoolTest, RunsEveryTaskBeforeItEnds) {
  std::atomic<int> ran{0};
  {
    WorkerPool pool(3);
    for (int i = 0; i < 1000; ++i) pool.Add([&] { ++ran; });
  }
  EXPECT_EQ(ran, 1000);
}

TEST(WorkerPoolTest, OneThreadKeepsTheOrder) {
  std::vector<int> order;
  {
    WorkerPool pool(1);
    for (int i = 0; i < 100; ++i) pool.Add([&order, i] { order.push_back(i); });
  }
  ASSERT_EQ(order.size(), 100u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(order[i], i);
}

TEST(WorkerPoolTest, RunsAsManyTasksAtATimeAsItHasThreads) {
  constexpr int kThreads = 4;
  std::atomic<int> waiting{0};
  std::promise<void> all_wait;
  std::shared_future<void> release = all_wait.get_future().share();
  WorkerPool pool(kThreads);
  // Each task ends only when the last one has begun: fewer threads would never get there.
  for (int i = 0; i < kThreads; ++i) {
    pool.Add([&] {
      if (++waiting == kThreads) all_wait.set_value();
      release.wait();
    });
  }
  release.wait();
  EXPECT_EQ(waiting, kThreads);
}

// Counts tasks that run at a time.
class Counted {
 public:
  std::function<void()> Task() {
    return [this] {
      const int now = ++running_;
      int most = most_;
      while (most < now && !most_.compare_exchange_weak(most, now)) {
      }
      std::this_thread::yield();
      --running_;
      ++ran_;
    };
  }
  int most() const { return most_; }
  int ran() const { return ran_; }

 private:
  std::atomic<int> running_{0}, most_{0}, ran_{0};
};

TEST(WorkerPoolTest, TasksThatEndPromptlyKeepToAFewThreads) {
  for (const int max_prompt : {1, 2, 5}) {
    Counted counted;
    {
      WorkerPool pool({8, std::numeric_limits<size_t>::max(), max_prompt, std::chrono::hours(1)});
      std::vector<std::thread> clients;
      for (int i = 0; i < 4; ++i) {
        clients.emplace_back([&] {
          for (int j = 0; j < 500; ++j) pool.Add(counted.Task());
        });
      }
      for (std::thread& client : clients) client.join();
      while (counted.ran() < 2000) std::this_thread::yield();
    }
    EXPECT_LE(counted.most(), max_prompt);
  }
}

TEST(WorkerPoolTest, TasksThatWaitGiveWayToOthers) {
  constexpr int kThreads = 4;
  for (const auto patience : {std::chrono::microseconds(0), std::chrono::microseconds(500)}) {
    std::promise<void> end;
    std::shared_future<void> release = end.get_future().share();
    std::atomic<int> held{0}, ran{0};
    WorkerPool pool({kThreads, std::numeric_limits<size_t>::max(), 1, patience});
    for (int i = 0; i < kThreads - 1; ++i) {
      pool.Add([&] {
        ++held;
        release.wait();
      });
    }
    for (int i = 0; i < 100; ++i) pool.Add([&] { ++ran; });
    while (ran < 100) std::this_thread::yield();  // for ever, if those that wait kept their place
    EXPECT_EQ(held, kThreads - 1);
    for (int i = 0; i < 2; ++i) {
      pool.Add([&] {
        ++held;
        release.wait();
      });
    }
    while (held < kThreads) std::this_thread::yield();
    EXPECT_EQ(pool.num_queued(), 1u);
    end.set_value();
  }
}

TEST(WorkerPoolTest, RefusesBeyondItsQueue) {
  std::promise<void> end;
  std::shared_future<void> release = end.get_future().share();
  std::atomic<bool> begun{false};
  WorkerPool pool({1, 2});
  EXPECT_TRUE(pool.Add([&] {
    begun = true;
    release.wait();
  }));
  while (!begun) std::this_thread::yield();
  EXPECT_TRUE(pool.Add([] {}));
  EXPECT_TRUE(pool.Add([] {}));
  EXPECT_FALSE(pool.Add([] {}));
  end.set_value();
}

}  // namespace
}  // namespace dpsr::serving
